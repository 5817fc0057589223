//! The shape of a gpt-oss model, read from its `config.json`. Nothing about a model's size stands anywhere else.

use serde::Deserialize;
use thiserror::Error;

/// Values along the contracted axis that share one MXFP4 scale.
pub const MXFP4_BLOCK: usize = 32;

/// Why a `config.json` cannot be served.
#[derive(Debug, Error)]
pub enum GeometryError {
    /// The file is not the JSON that a gpt-oss configuration is.
    #[error("{0}")]
    Json(#[from] serde_json::Error),
    /// A field has a value that this software cannot run.
    #[error("{field} is {found}, expected {expected}")]
    Unsupported {
        /// The field as spelled in the file.
        field: &'static str,
        /// Its value.
        found: String,
        /// What would do.
        expected: String,
    },
}

/// What a layer's queries may see.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LayerKind {
    /// Every earlier position.
    FullAttention,
    /// The last `sliding_window` positions, the query's own included.
    SlidingAttention,
}

/// YaRN's settings, named as in `config.json`.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct RopeScaling {
    /// Must be `yarn`.
    pub rope_type: String,
    /// Context extension factor.
    pub factor: f64,
    /// Rotations over the original context above which a dimension is not interpolated.
    pub beta_fast: f64,
    /// Rotations over the original context below which a dimension is fully interpolated.
    pub beta_slow: f64,
    /// Context length of the original training.
    pub original_max_position_embeddings: f64,
    /// Whether the ramp's ends are rounded to whole dimensions (not in the release).
    #[serde(default = "yes")]
    pub truncate: bool,
}

fn yes() -> bool {
    true
}

/// Shape and constants of a model, checked for everything the arithmetic relies on. Field names are `config.json`'s.
#[derive(Clone, Debug, PartialEq)]
pub struct Geometry {
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of one expert's inner layer.
    pub intermediate_size: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads; divides the query heads.
    pub num_key_value_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// Experts in each layer.
    pub num_local_experts: usize,
    /// Experts that see a token.
    pub num_experts_per_tok: usize,
    /// Rows of the embedding and of the unembedding.
    pub vocab_size: usize,
    /// Positions a query of a sliding layer sees.
    pub sliding_window: usize,
    /// Largest context.
    pub max_position_embeddings: usize,
    /// What each layer's queries see; its length is the number of layers.
    pub layer_types: Vec<LayerKind>,
    /// Added to the mean square before the root.
    pub rms_norm_eps: f32,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// YaRN, or plain rotary embeddings.
    pub rope_scaling: Option<RopeScaling>,
    /// Clamp inside SwiGLU.
    pub swiglu_limit: f32,
    /// Tokens that end a completion, from `config.json` (`generation_config.json` may name more).
    pub eos_token_ids: Vec<u32>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(u32),
    Many(Vec<u32>),
}

#[derive(Deserialize)]
struct Quantization {
    quant_method: String,
}

#[derive(Deserialize)]
struct RawConfig {
    model_type: String,
    hidden_size: usize,
    intermediate_size: usize,
    num_attention_heads: usize,
    num_key_value_heads: usize,
    head_dim: usize,
    num_local_experts: usize,
    #[serde(alias = "experts_per_token")]
    num_experts_per_tok: Option<usize>,
    vocab_size: usize,
    sliding_window: usize,
    max_position_embeddings: usize,
    num_hidden_layers: usize,
    layer_types: Option<Vec<LayerKind>>,
    rms_norm_eps: f32,
    rope_theta: f64,
    rope_scaling: Option<RopeScaling>,
    #[serde(default = "default_swiglu_limit")]
    swiglu_limit: f32,
    eos_token_id: Option<OneOrMany>,
    #[serde(default)]
    tie_word_embeddings: bool,
    quantization_config: Option<Quantization>,
    hidden_act: Option<String>,
}

/// The value of the release, for configurations written before the field existed.
fn default_swiglu_limit() -> f32 {
    7.0
}

fn unsupported(field: &'static str, found: impl ToString, expected: impl ToString) -> GeometryError {
    GeometryError::Unsupported { field, found: found.to_string(), expected: expected.to_string() }
}

impl Geometry {
    /// Reads and checks the text of a `config.json`.
    ///
    /// # Errors
    /// When the text is not a gpt-oss configuration or asks for something the arithmetic does not cover; the message
    /// names the field.
    pub fn from_config_json(text: &str) -> Result<Self, GeometryError> {
        // `experts_per_token` and `num_experts_per_tok` may both be present; serde would call that a duplicate.
        let mut value: serde_json::Value = serde_json::from_str(text)?;
        if let Some(map) = value.as_object_mut()
            && map.contains_key("num_experts_per_tok")
        {
            map.remove("experts_per_token");
        }
        let raw: RawConfig = serde_json::from_value(value)?;
        raw.check_features()?;
        let geometry = raw.into_geometry()?;
        geometry.check_sizes()?;
        Ok(geometry)
    }

    /// Number of layers.
    pub fn num_hidden_layers(&self) -> usize {
        self.layer_types.len()
    }

    /// Query heads that share one key and value head.
    pub fn group_size(&self) -> usize {
        self.num_attention_heads / self.num_key_value_heads
    }

    /// Layers of one kind.
    pub fn layers_of(&self, kind: LayerKind) -> usize {
        self.layer_types.iter().filter(|&&k| k == kind).count()
    }

    /// MXFP4 blocks along the experts' intermediate axis.
    pub fn intermediate_blocks(&self) -> usize {
        self.intermediate_size / MXFP4_BLOCK
    }

    /// Number of weights, every expert counted.
    pub fn parameters(&self) -> u64 {
        let (hidden, inter) = (self.hidden_size as u64, self.intermediate_size as u64);
        let (q, kv) =
            ((self.num_attention_heads * self.head_dim) as u64, (self.num_key_value_heads * self.head_dim) as u64);
        let attention = (q + 2 * kv) * (hidden + 1) + (q + 1) * hidden + self.num_attention_heads as u64;
        let expert = 2 * inter * (hidden + 1) + hidden * (inter + 1);
        let experts = self.num_local_experts as u64;
        let layer = attention + experts * expert + experts * (hidden + 1) + 2 * hidden;
        layer * self.num_hidden_layers() as u64 + 2 * self.vocab_size as u64 * hidden + hidden
    }

    fn check_sizes(&self) -> Result<(), GeometryError> {
        let sizes: [(&'static str, usize, usize); 11] = [
            ("hidden_size", self.hidden_size, 1 << 20),
            ("intermediate_size", self.intermediate_size, 1 << 20),
            ("num_attention_heads", self.num_attention_heads, 1 << 12),
            ("num_key_value_heads", self.num_key_value_heads, 1 << 12),
            ("head_dim", self.head_dim, 1 << 12),
            ("num_local_experts", self.num_local_experts, 1 << 14),
            ("num_experts_per_tok", self.num_experts_per_tok, self.num_local_experts),
            ("vocab_size", self.vocab_size, 1 << 24),
            ("sliding_window", self.sliding_window, 1 << 24),
            ("max_position_embeddings", self.max_position_embeddings, 1 << 24),
            ("num_hidden_layers", self.num_hidden_layers(), 1 << 12),
        ];
        for (field, found, most) in sizes {
            if found == 0 || found > most {
                return Err(unsupported(field, found, format!("1 to {most}")));
            }
        }
        for (field, found) in [("hidden_size", self.hidden_size), ("intermediate_size", self.intermediate_size)] {
            if !found.is_multiple_of(MXFP4_BLOCK) {
                return Err(unsupported(field, found, format!("a multiple of {MXFP4_BLOCK}, the MXFP4 block")));
            }
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(unsupported("head_dim", self.head_dim, "an even number (rotary embeddings turn pairs)"));
        }
        if !self.num_attention_heads.is_multiple_of(self.num_key_value_heads) {
            let expected = format!("a divisor of num_attention_heads ({})", self.num_attention_heads);
            return Err(unsupported("num_key_value_heads", self.num_key_value_heads, expected));
        }
        Ok(())
    }
}

impl RawConfig {
    fn check_features(&self) -> Result<(), GeometryError> {
        if self.model_type != "gpt_oss" {
            return Err(unsupported("model_type", &self.model_type, "gpt_oss"));
        }
        if self.tie_word_embeddings {
            return Err(unsupported("tie_word_embeddings", true, false));
        }
        if let Some(act) = self.hidden_act.as_ref().filter(|act| *act != "silu") {
            return Err(unsupported("hidden_act", act, "silu"));
        }
        match &self.quantization_config {
            Some(q) if q.quant_method == "mxfp4" => {}
            Some(q) => return Err(unsupported("quantization_config.quant_method", &q.quant_method, "mxfp4")),
            None => return Err(unsupported("quantization_config", "absent", "quant_method mxfp4")),
        }
        if let Some(rope) = self.rope_scaling.as_ref().filter(|rope| rope.rope_type != "yarn") {
            return Err(unsupported("rope_scaling.rope_type", &rope.rope_type, "yarn"));
        }
        self.check_numbers()
    }

    /// What is divided by, and what logarithms are taken of.
    fn check_numbers(&self) -> Result<(), GeometryError> {
        let rope = self.rope_scaling.as_ref();
        let yarn = |number: fn(&RopeScaling) -> f64| rope.map_or(1.0, number);
        let numbers = [
            ("rms_norm_eps", f64::from(self.rms_norm_eps)),
            ("swiglu_limit", f64::from(self.swiglu_limit)),
            ("rope_theta", self.rope_theta),
            ("rope_scaling.factor", yarn(|yarn| yarn.factor)),
            ("rope_scaling.beta_fast", yarn(|yarn| yarn.beta_fast)),
            ("rope_scaling.beta_slow", yarn(|yarn| yarn.beta_slow)),
            ("rope_scaling.original_max_position_embeddings", yarn(|yarn| yarn.original_max_position_embeddings)),
        ];
        if let Some((field, found)) = numbers.into_iter().find(|(_, n)| !n.is_finite() || *n <= 0.0) {
            return Err(unsupported(field, found, "a positive number"));
        }
        // The base of a logarithm.
        if self.rope_theta <= 1.0 {
            return Err(unsupported("rope_theta", self.rope_theta, "a number above 1"));
        }
        Ok(())
    }

    fn into_geometry(self) -> Result<Geometry, GeometryError> {
        // The release alternates, starting with a sliding layer.
        let alternating = [LayerKind::SlidingAttention, LayerKind::FullAttention];
        let layer_types = self
            .layer_types
            .unwrap_or_else(|| (0..self.num_hidden_layers.min(1 << 12)).map(|i| alternating[i % 2]).collect());
        if layer_types.len() != self.num_hidden_layers {
            let expected = format!("num_hidden_layers ({}) entries", self.num_hidden_layers);
            return Err(unsupported("layer_types", format!("{} entries", layer_types.len()), expected));
        }
        let Some(num_experts_per_tok) = self.num_experts_per_tok else {
            return Err(unsupported("num_experts_per_tok", "absent", "a number"));
        };
        Ok(Geometry {
            hidden_size: self.hidden_size,
            intermediate_size: self.intermediate_size,
            num_attention_heads: self.num_attention_heads,
            num_key_value_heads: self.num_key_value_heads,
            head_dim: self.head_dim,
            num_local_experts: self.num_local_experts,
            num_experts_per_tok,
            vocab_size: self.vocab_size,
            sliding_window: self.sliding_window,
            max_position_embeddings: self.max_position_embeddings,
            layer_types,
            rms_norm_eps: self.rms_norm_eps,
            rope_theta: self.rope_theta,
            rope_scaling: self.rope_scaling,
            swiglu_limit: self.swiglu_limit,
            eos_token_ids: match self.eos_token_id {
                None => Vec::new(),
                Some(OneOrMany::One(id)) => vec![id],
                Some(OneOrMany::Many(ids)) => ids,
            },
        })
    }
}
