//! What a coordinator is told: as given, and checked.

use std::{fmt, path::PathBuf, str::FromStr, sync::Arc, time::Duration};

use phalanx_proto::{
    checkpoint::{Checkpoint, CheckpointError},
    geometry::LayerKind,
    layout::{Layout, LayoutError, Parallelism},
    tls::Identity,
    v1,
};
use thiserror::Error;

use crate::{
    membership::MembershipConfig,
    planner::{
        self,
        pools::{BlockBytes, KvDemand},
    },
};

/// Largest context that is accepted, in tokens; positions are 32 bits wide on the wire.
const MAX_CONTEXT: usize = 1 << 24;
/// Most sequences that may run, and that may wait.
const MAX_SEQUENCES: usize = 1 << 16;
/// Most tokens that may wait; they are kept in memory.
const MAX_QUEUED_TOKENS: usize = 1 << 30;

/// Why a configuration is refused before anything starts.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// A value is out of range.
    #[error("{field} is {found}, expected {expected}")]
    Value {
        /// The field.
        field: &'static str,
        /// Its value.
        found: String,
        /// What would do.
        expected: String,
    },
    /// The checkpoint cannot be read or served.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The model does not divide as asked.
    #[error(transparent)]
    Layout(#[from] LayoutError),
}

/// What the workers of a group compute with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    /// Own kernels for x86-64 and others.
    Cpu,
    /// NVIDIA devices.
    Cuda,
    /// Plain f32 tensor code.
    Reference,
}

impl Backend {
    /// Bytes of one key or value in its KV cache: bf16 on devices, f32 on CPUs.
    pub fn kv_element_bytes(self) -> usize {
        match self {
            Self::Cuda => 2,
            Self::Cpu | Self::Reference => 4,
        }
    }

    /// What a token of a long prefill may take before its step counts as hung. Generous by a factor of ten or more for
    /// the largest model: this only has to tell slow from dead.
    fn deadline_per_token(self) -> Duration {
        match self {
            Self::Cuda => Duration::from_millis(5),
            Self::Cpu => Duration::from_millis(200),
            Self::Reference => Duration::from_secs(2),
        }
    }
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Cpu => "cpu",
            Self::Cuda => "cuda",
            Self::Reference => "reference",
        })
    }
}

impl FromStr for Backend {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        match text {
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda),
            "reference" => Ok(Self::Reference),
            other => Err(value("backend", format!("{other:?}"), "cpu, cuda or reference")),
        }
    }
}

/// What a coordinator serves and how long it waits.
#[derive(Clone, Debug, Default)]
pub struct Config {
    /// At least one; served names differ.
    pub deployments: Vec<DeploymentConfig>,
    /// Whether it is the only coordinator, and where epochs come from.
    pub membership: MembershipConfig,
    /// Certificate to show; clients must then show one of the same authority. Absent: plain connections.
    pub tls: Option<Arc<Identity>>,
    /// Waits and limits common to all deployments.
    pub limits: Limits,
}

/// One model under one name, as given.
#[derive(Clone, Debug)]
pub struct DeploymentConfig {
    /// Checkpoint directory; its headers suffice here.
    pub model_dir: PathBuf,
    /// Name in requests. Also the deployment that workers ask for.
    pub served_model_name: String,
    /// Number of ranks.
    pub world_size: usize,
    /// How the experts are divided.
    pub parallelism: Parallelism,
    /// What the workers compute with; workers with another are refused.
    pub backend: Backend,
    /// Longest sequence, prompt and output together. Absent: the model's own limit, as far as the KV cache reaches.
    pub max_model_len: Option<usize>,
    /// Sequences that run at once.
    pub max_num_seqs: usize,
    /// Most tokens of one step.
    pub max_num_batched_tokens: usize,
    /// Sequences that may wait before new ones are refused.
    pub max_num_queued_reqs: usize,
    /// Tokens, prompts and outputs at most, that may wait before new requests are refused.
    pub max_queued_tokens: usize,
    /// Tokens of a KV block.
    pub block_size: usize,
    /// Most bytes of KV cache on a rank. Absent: what the weights leave.
    pub kv_cache_memory_bytes: Option<u64>,
    /// Whether prompts share the blocks of equal beginnings.
    pub enable_prefix_caching: bool,
}

impl DeploymentConfig {
    /// A deployment with the defaults of every field that has one.
    pub fn new(model_dir: impl Into<PathBuf>, served_model_name: impl Into<String>, world_size: usize) -> Self {
        Self {
            model_dir: model_dir.into(),
            served_model_name: served_model_name.into(),
            world_size,
            parallelism: Parallelism::Tensor,
            backend: Backend::Cpu,
            max_model_len: None,
            max_num_seqs: 64,
            max_num_batched_tokens: 2048,
            max_num_queued_reqs: 1024,
            max_queued_tokens: 4 << 20,
            block_size: 16,
            kv_cache_memory_bytes: None,
            enable_prefix_caching: true,
        }
    }
}

/// Waits and limits. Every one of them ends in an error that says so.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Least time that a step may take before its epoch is given up.
    pub step_deadline: Duration,
    /// What a prefill token may add to it. Absent: by backend.
    pub step_deadline_per_token: Option<Duration>,
    /// Wait for all workers to answer `Prepare`; a hung one is dropped after it.
    pub prepare_timeout: Duration,
    /// Wait for all workers to form, KV cache and collective included.
    pub form_timeout: Duration,
    /// Silence after which a worker is dropped: all of them give a sign of life every second. Seconds and not less, so
    /// that a loaded machine raises no false alarms.
    pub silence: Duration,
    /// Silence after which a loading worker is dropped.
    pub load_silence: Duration,
    /// How long a client may leave its stream unread.
    pub client_stall: Duration,
    /// How long an accepted request may wait for a group that is not there.
    pub group_stall: Duration,
    /// How long a request may wait that was never served; after it the request is refused.
    pub max_queue_age: Duration,
    /// Failed epochs that one request may live through.
    pub max_replays: u32,
    /// How long running requests may go on after shutdown was asked for.
    pub drain_grace: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            step_deadline: Duration::from_secs(5),
            step_deadline_per_token: None,
            prepare_timeout: Duration::from_secs(3),
            form_timeout: Duration::from_secs(120),
            silence: Duration::from_secs(5),
            load_silence: Duration::from_secs(60),
            client_stall: Duration::from_secs(30),
            group_stall: Duration::from_secs(120),
            max_queue_age: Duration::from_secs(120),
            max_replays: 3,
            drain_grace: Duration::from_secs(30),
        }
    }
}

/// One deployment, checked against its checkpoint.
#[derive(Clone, Debug)]
pub struct Deployment {
    /// As given.
    pub config: DeploymentConfig,
    /// Geometry, digest and end tokens.
    pub checkpoint: Checkpoint,
    /// Who holds what.
    pub layout: Layout,
    /// What the KV cache must serve.
    pub demand: KvDemand,
    /// Whether a cache that is too small shortens the context instead of failing the group: nobody asked for a length.
    pub context_may_shrink: bool,
}

impl Deployment {
    /// Opens the checkpoint's headers and checks the configuration against them. Blocks on files.
    ///
    /// # Errors
    /// Names the field, or the file and tensor, that is at fault.
    pub fn open(config: &DeploymentConfig) -> Result<Self, ConfigError> {
        let checkpoint = Checkpoint::open(&config.model_dir)?;
        let geometry = &checkpoint.geometry;
        let layout = Layout::new(geometry, config.world_size, config.parallelism)?;
        let longest = geometry.max_position_embeddings.min(MAX_CONTEXT);
        let max_model_len = config.max_model_len.unwrap_or(longest);
        in_range("max_model_len", max_model_len, 2, longest)?;
        in_range("block_size", config.block_size, 1, 1 << 12)?;
        in_range("max_num_seqs", config.max_num_seqs, 1, MAX_SEQUENCES)?;
        in_range("max_num_queued_reqs", config.max_num_queued_reqs, 1, MAX_SEQUENCES)?;
        in_range("max_queued_tokens", config.max_queued_tokens, 1, MAX_QUEUED_TOKENS)?;
        // Every running sequence decodes in every step.
        in_range("max_num_batched_tokens", config.max_num_batched_tokens, config.max_num_seqs, 1 << 20)?;
        if config.served_model_name.is_empty() || config.served_model_name.len() > 256 {
            let found = format!("{} bytes long", config.served_model_name.len());
            return Err(value("served_model_name", found, "1 to 256 bytes"));
        }
        let demand = KvDemand {
            block_size: config.block_size,
            max_num_seqs: config.max_num_seqs,
            max_model_len,
            max_num_batched_tokens: config.max_num_batched_tokens,
            enable_prefix_caching: config.enable_prefix_caching,
        };
        let context_may_shrink = config.max_model_len.is_none();
        Ok(Self { config: config.clone(), checkpoint, layout, demand, context_may_shrink })
    }

    /// Number of ranks.
    pub fn world_size(&self) -> usize {
        self.layout.world_size()
    }

    /// Whether the model has layers of a kind.
    pub fn has_layers(&self, kind: LayerKind) -> bool {
        self.checkpoint.geometry.layers_of(kind) > 0
    }

    /// Bytes of a KV block of each kind on one rank.
    pub fn block_bytes(&self) -> BlockBytes {
        let element = self.config.backend.kv_element_bytes();
        planner::block_bytes(&self.layout, &self.checkpoint.geometry, self.config.block_size, element)
    }

    /// What clients are told.
    pub fn describe(&self) -> v1::Deployment {
        v1::Deployment {
            model: self.config.served_model_name.clone(),
            world_size: self.world_size() as u32,
            parallelism: self.layout.parallelism().to_string(),
            backend: self.config.backend.to_string(),
            max_model_len: self.demand.max_model_len as u32,
            vocab_size: self.checkpoint.geometry.vocab_size as u32,
            parameters: self.checkpoint.geometry.parameters(),
            eos_token_ids: self.checkpoint.eos_token_ids.clone(),
            block_size: self.config.block_size as u32,
        }
    }

    /// What a token of a prefill may add to its step's deadline.
    pub fn deadline_per_token(&self, limits: &Limits) -> Duration {
        limits.step_deadline_per_token.unwrap_or(self.config.backend.deadline_per_token())
    }
}

impl Config {
    /// Opens every deployment. Blocks on files.
    ///
    /// # Errors
    /// When there is none, two have one name, or one cannot be served.
    pub fn open(&self) -> Result<Vec<Deployment>, ConfigError> {
        if self.deployments.is_empty() {
            return Err(value("deployments", "empty", "at least one model"));
        }
        let mut names: Vec<_> = self.deployments.iter().map(|d| d.served_model_name.as_str()).collect();
        names.sort_unstable();
        if let Some(pair) = names.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(value("served_model_name", format!("{:?} twice", pair[0]), "a different name each"));
        }
        self.deployments.iter().map(Deployment::open).collect()
    }
}

fn value(field: &'static str, found: impl Into<String>, expected: impl Into<String>) -> ConfigError {
    ConfigError::Value { field, found: found.into(), expected: expected.into() }
}

fn in_range(field: &'static str, found: usize, least: usize, most: usize) -> Result<(), ConfigError> {
    if (least..=most).contains(&found) {
        return Ok(());
    }
    Err(value(field, found.to_string(), format!("{least} to {most}")))
}
