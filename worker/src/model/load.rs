//! Makes one rank's shard resident, tensor by tensor in the order of use.

use phalanx_proto::{checkpoint::Checkpoint, layout::RankLayout};
use thiserror::Error;

use super::{Layer, Model};
use crate::{
    backend::{Backend, BackendError, ExpertsData},
    checkpoint::{LoadedBytes, ReadError, ShardReader, shard_bytes},
};

/// Why a shard could not be loaded.
#[derive(Debug, Error)]
pub enum LoadError {
    /// The checkpoint cannot be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The backend cannot hold it.
    #[error("making {what} resident: {source}")]
    Backend {
        /// Tensor or layer.
        what: String,
        /// What the backend said.
        source: BackendError,
    },
}

struct Loader<'a, B> {
    reader: ShardReader<'a>,
    backend: B,
    layout: &'a RankLayout,
    hidden: usize,
}

impl<B: Backend> Model<B> {
    /// Reads a rank's shard and makes it resident. `progress` is told after each tensor, on the calling thread.
    ///
    /// # Errors
    /// When the checkpoint cannot be read (the message names file and tensor) or does not fit the backend's memory.
    pub fn load(
        checkpoint: &Checkpoint,
        layout: RankLayout,
        backend: B,
        progress: &dyn Fn(LoadedBytes),
    ) -> Result<Self, LoadError> {
        let geometry = checkpoint.geometry.clone();
        let reader = ShardReader::open(checkpoint, &layout, progress)?;
        let mut loader = Loader { reader, backend, layout: &layout, hidden: geometry.hidden_size };
        let embedding = loader.embedding("model.embed_tokens.weight")?;
        let layers = (0..geometry.num_hidden_layers()).map(|layer| loader.layer(layer)).collect::<Result<_, _>>()?;
        let norm = loader.vector("model.norm.weight")?;
        let unembedding = loader.linear("lm_head.weight", None)?;
        let backend = loader.backend;
        Ok(Self {
            weight_bytes: shard_bytes(checkpoint, &layout),
            geometry,
            layout,
            backend,
            cache: None,
            embedding,
            layers,
            norm,
            unembedding,
            collective_time: std::time::Duration::ZERO,
        })
    }
}

/// Says what could not be made resident.
fn resident(what: &str) -> impl FnOnce(BackendError) -> LoadError {
    move |source| LoadError::Backend { what: what.to_owned(), source }
}

impl<B: Backend> Loader<'_, B> {
    fn layer(&mut self, layer: usize) -> Result<Layer<B>, LoadError> {
        let name = |tail: &str| format!("model.layers.{layer}.{tail}");
        let attention = |part: &str| {
            let name = |what: &str| name(&format!("self_attn.{part}_proj.{what}"));
            (name("weight"), name("bias"))
        };
        let mut projection = |part: &str| {
            let (weight, bias) = attention(part);
            self.linear(&weight, Some(&bias))
        };
        let (q, k, v, o) = (projection("q")?, projection("k")?, projection("v")?, projection("o")?);
        Ok(Layer {
            attention_norm: self.vector(&name("input_layernorm.weight"))?,
            q,
            k,
            v,
            sinks: self.vector(&name("self_attn.sinks"))?,
            o,
            experts_norm: self.vector(&name("post_attention_layernorm.weight"))?,
            router: self.linear(&name("mlp.router.weight"), Some(&name("mlp.router.bias")))?,
            experts: self.experts(layer)?,
        })
    }

    fn vector(&mut self, name: &str) -> Result<B::Vector, LoadError> {
        let values = self.reader.values(name)?;
        self.backend.load_vector(values).map_err(resident(name))
    }

    /// A bias of which this rank holds nothing (another adds it) is no bias.
    fn linear(&mut self, weight: &str, bias: Option<&str>) -> Result<B::Linear, LoadError> {
        let matrix = self.reader.matrix(weight)?;
        let bias = bias.map(|name| self.reader.values(name)).transpose()?.filter(|bias| !bias.is_empty());
        self.backend.load_linear(matrix, bias).map_err(resident(weight))
    }

    fn embedding(&mut self, name: &str) -> Result<B::Embedding, LoadError> {
        let table = self.reader.matrix(name)?;
        self.backend.load_embedding(table).map_err(resident(name))
    }

    fn experts(&mut self, layer: usize) -> Result<B::Experts, LoadError> {
        let held = &self.layout.experts[layer];
        let prefix = format!("model.layers.{layer}.mlp.experts");
        let name = |tail: &str| format!("{prefix}.{tail}");
        let reader = &mut self.reader;
        let experts = ExpertsData {
            experts: held.experts.clone(),
            hidden: self.hidden,
            intermediate: held.intermediate.len(),
            gate_up_blocks: reader.bytes(&name("gate_up_proj_blocks"))?,
            gate_up_scales: reader.bytes(&name("gate_up_proj_scales"))?,
            gate_up_bias: reader.values(&name("gate_up_proj_bias"))?,
            down_blocks: reader.bytes(&name("down_proj_blocks"))?,
            down_scales: reader.bytes(&name("down_proj_scales"))?,
            down_bias: reader.values(&name("down_proj_bias"))?,
        };
        self.backend.load_experts(experts).map_err(resident(&prefix))
    }
}
