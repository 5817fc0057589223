//! The command line as typed. Names are the ones people know from vLLM; every flag has an environment variable
//! `PHALANX_…`. Values are checked here as far as one flag alone can tell.

use std::{ffi::OsString, net::IpAddr, path::PathBuf};

use clap::{ArgAction, Args, Parser, Subcommand, ValueEnum};

use crate::{
    access::{AccessArgs, KeyArgs},
    ca::CaArgs,
    etcd::EtcdArgs,
    foreign::ForeignArgs,
    tls::TlsArgs,
};

/// Serves OpenAI's gpt-oss models across several processes and GPUs.
#[derive(Debug, Parser)]
#[command(name = "phalanx", version, args_override_self = true)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Start a coordinator, a gateway and one worker per device, and supervise them.
    #[command(args_override_self = true)]
    Serve(Box<ServeArgs>),
    /// Start one coordinator.
    #[command(args_override_self = true)]
    Coordinator(Box<CoordinatorArgs>),
    /// Start one worker: one rank of a group.
    #[command(args_override_self = true)]
    Worker(Box<WorkerArgs>),
    /// Start one gateway: the OpenAI HTTP API.
    #[command(args_override_self = true)]
    Gateway(Box<GatewayArgs>),
    /// Show what each rank would hold, from the checkpoint's headers alone.
    Plan(PlanArgs),
    /// Say what this machine has for serving: GPUs, CUDA's libraries, limits. Ends with 0 if a GPU can serve, 3 if there
    /// is none and CPUs can, 1 if something is wrong.
    Doctor(DoctorArgs),
    /// Measure a running server, or with --engine the workers without a gateway.
    Bench(Box<BenchArgs>),
    /// Talk to a running server in the terminal.
    Chat(ChatArgs),
    /// Render a conversation to tokens, or parse tokens to messages.
    Harmony(HarmonyArgs),
    /// Make an API key and its entry for the key file.
    Key(KeyArgs),
    /// Make a private authority and certificates for TLS between components.
    Ca(CaArgs),
}

/// What computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Backend {
    /// Own kernels for AVX-512, AVX2 and plain processors.
    Cpu,
    /// Plain f32 tensor code: slow, for comparison.
    Reference,
    /// NVIDIA GPUs.
    Cuda,
}

impl ModelArgs {
    /// The model as named on the command line, in the environment or in the file.
    pub(crate) fn name(&self) -> &str {
        self.model.as_deref().unwrap_or(&self.model_flag)
    }
}

impl Backend {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Reference => "reference",
            Self::Cuda => "cuda",
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogFormat {
    Text,
    Json,
}

/// Names of the field that carries the model's reasoning.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ReasoningField {
    Both,
    Reasoning,
    #[value(name = "reasoning_content")]
    ReasoningContent,
}

impl ReasoningField {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Both => "both",
            Self::Reasoning => "reasoning",
            Self::ReasoningContent => "reasoning_content",
        }
    }
}

/// Logs and traces, for every process.
#[derive(Clone, Debug, Args)]
pub(crate) struct TelemetryArgs {
    /// Log as text or as JSON lines.
    #[arg(long, value_enum, default_value = "text", env = "PHALANX_LOG_FORMAT")]
    pub log_format: LogFormat,
    /// Which log lines to show, in the syntax of RUST_LOG.
    #[arg(long, default_value = "warn", env = "PHALANX_LOG")]
    pub log: String,
    /// Send traces to this OTLP receiver (gRPC), such as http://127.0.0.1:4317.
    #[arg(long, env = "PHALANX_OTLP_TRACES_ENDPOINT")]
    pub otlp_traces_endpoint: Option<String>,
}

/// Where the model lies and what it is called.
#[derive(Clone, Debug, Args)]
pub(crate) struct ModelArgs {
    /// Model directory in the Hugging Face layout, or a name below --model-dir. Default: the bundled small model.
    pub model: Option<String>,
    /// The same as a flag, for configuration files.
    #[arg(long = "model", env = "PHALANX_MODEL", default_value = "nano", hide = true)]
    pub model_flag: String,
    /// Directory in which model names are looked up. Default: the bundled models.
    #[arg(long, env = "PHALANX_MODELS")]
    pub model_dir: Option<PathBuf>,
    /// Name under which the model is served. Default: the directory's name.
    #[arg(long, env = "PHALANX_SERVED_MODEL_NAME", num_args = 1.., value_delimiter = ',')]
    pub served_model_name: Vec<String>,
}

/// What the coordinator may schedule.
#[derive(Clone, Debug, Args)]
pub(crate) struct SchedulerArgs {
    /// Ranks that share the model.
    #[arg(long = "tensor-parallel-size", visible_alias = "tp", env = "PHALANX_TENSOR_PARALLEL_SIZE")]
    pub tensor_parallel_size: Option<usize>,
    /// Give each rank whole experts instead of a slice of every expert.
    #[arg(long, env = "PHALANX_ENABLE_EXPERT_PARALLEL")]
    pub enable_expert_parallel: bool,
    /// Longest context, in tokens; accepts 128k. Default: the model's, as far as the KV cache reaches.
    #[arg(long, env = "PHALANX_MAX_MODEL_LEN", value_parser = parse_tokens)]
    pub max_model_len: Option<usize>,
    /// Tokens a KV block.
    #[arg(long, default_value = "16", env = "PHALANX_BLOCK_SIZE")]
    pub block_size: usize,
    /// Sequences in one step.
    #[arg(long, default_value = "64", env = "PHALANX_MAX_NUM_SEQS")]
    pub max_num_seqs: usize,
    /// Tokens in one step.
    #[arg(long, default_value = "512", env = "PHALANX_MAX_NUM_BATCHED_TOKENS", value_parser = parse_tokens)]
    pub max_num_batched_tokens: usize,
    /// Requests that may wait; more are refused with 429.
    #[arg(long, default_value = "1024", env = "PHALANX_MAX_NUM_QUEUED_REQS")]
    pub max_num_queued_reqs: usize,
    /// KV cache a rank, in bytes; accepts 4g. Default: what --gpu-memory-utilization leaves, 1g at most on CPUs.
    #[arg(long, env = "PHALANX_KV_CACHE_MEMORY_BYTES", value_parser = parse_bytes)]
    pub kv_cache_memory_bytes: Option<u64>,
    /// Share cached prefixes between requests (the default).
    #[arg(long, overrides_with = "no_enable_prefix_caching")]
    pub enable_prefix_caching: bool,
    /// Do not share cached prefixes.
    #[arg(long, overrides_with = "enable_prefix_caching", env = "PHALANX_NO_ENABLE_PREFIX_CACHING")]
    pub no_enable_prefix_caching: bool,
    /// Longest time a step may take before its group forms anew, in milliseconds.
    #[arg(long, default_value = "5000", env = "PHALANX_STEP_TIMEOUT_MS")]
    pub step_timeout_ms: u64,
    /// Directory of the epoch file. Default: memory only, for a cluster that lives and dies as one.
    #[arg(long, env = "PHALANX_STATE_DIR")]
    pub state_dir: Option<PathBuf>,
}

/// Where weights come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum LoadFormat {
    /// The checkpoint.
    Auto,
    /// Made up, to measure speed without a checkpoint.
    Dummy,
}

/// What a worker computes with.
#[derive(Clone, Debug, Args)]
pub(crate) struct DeviceArgs {
    /// What computes.
    #[arg(long, value_enum, default_value = "cpu", env = "PHALANX_BACKEND")]
    pub backend: Backend,
    /// Threads a rank. Default: the processors divided by the ranks of this host.
    #[arg(long, env = "PHALANX_THREADS")]
    pub threads: Option<usize>,
    /// Share of the free memory that weights and KV cache may take.
    #[arg(long, default_value = "0.9", env = "PHALANX_GPU_MEMORY_UTILIZATION", value_parser = parse_share)]
    pub gpu_memory_utilization: f64,
}

/// How the gateway talks HTTP.
#[derive(Clone, Debug, Args)]
pub(crate) struct HttpArgs {
    /// Address to listen on.
    #[arg(long, default_value = "127.0.0.1", env = "PHALANX_HOST")]
    pub host: IpAddr,
    /// Port to listen on; 0 takes a free one.
    #[arg(long, default_value = "8000", env = "PHALANX_PORT")]
    pub port: u16,
    #[command(flatten)]
    pub access: AccessArgs,
    /// Listen on other addresses than loopback although nothing guards the API.
    #[arg(long, env = "PHALANX_INSECURE_BIND")]
    pub insecure_bind: bool,
    /// Date that the system message names: today, none, or YYYY-MM-DD.
    #[arg(long, default_value = "today", env = "PHALANX_CURRENT_DATE")]
    pub current_date: String,
    /// Name of the field with the model's reasoning.
    #[arg(long, value_enum, default_value = "both", env = "PHALANX_REASONING_FIELD")]
    pub reasoning_field: ReasoningField,
    /// Seed of requests that name none; equal requests then get equal answers. Default: each draws its own.
    #[arg(long, env = "PHALANX_SEED", allow_negative_numbers = true)]
    pub seed: Option<i64>,
    /// YAML file: flags by their long names, and `profiles`.
    #[arg(long, env = "PHALANX_CONFIG")]
    pub config: Option<PathBuf>,
    /// YAML file whose `profiles` are taken and whose flags are not (as `phalanx serve` hands it over).
    #[arg(long, hide = true)]
    pub profiles: Option<PathBuf>,
    /// Seconds that running requests get to finish when the process is told to stop.
    #[arg(long, default_value = "30", env = "PHALANX_SHUTDOWN_TIMEOUT")]
    pub shutdown_timeout: u64,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct ServeArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub scheduler: SchedulerArgs,
    #[command(flatten)]
    pub device: DeviceArgs,
    #[command(flatten)]
    pub http: HttpArgs,
    #[command(flatten)]
    pub tls: TlsArgs,
    #[command(flatten)]
    pub telemetry: TelemetryArgs,
    #[command(flatten)]
    pub foreign: ForeignArgs,
    /// Where weights come from; this version reads checkpoints only.
    #[arg(long, value_enum, default_value = "auto", env = "PHALANX_LOAD_FORMAT")]
    pub load_format: LoadFormat,
    /// Equal groups that share the load; this version serves one.
    #[arg(long, default_value = "1", env = "PHALANX_DATA_PARALLEL_SIZE")]
    pub data_parallel_size: usize,
    /// Port of the coordinator's gRPC door on loopback; 0 takes a free one.
    #[arg(long, default_value = "0", env = "PHALANX_GRPC_PORT")]
    pub grpc_port: u16,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct CoordinatorArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub scheduler: SchedulerArgs,
    /// What the group's workers compute with.
    #[arg(long, value_enum, default_value = "cpu", env = "PHALANX_BACKEND")]
    pub backend: Backend,
    #[command(flatten)]
    pub etcd: EtcdArgs,
    /// Address and port of the gRPC door.
    #[arg(long, default_value = "127.0.0.1:7000", env = "PHALANX_LISTEN")]
    pub listen: std::net::SocketAddr,
    /// Take the listening socket from standard input instead (as `phalanx serve` hands it over).
    #[arg(long, hide = true)]
    pub listen_stdin: bool,
    /// Listen on other addresses than loopback although nothing guards them.
    #[arg(long, env = "PHALANX_INSECURE_BIND")]
    pub insecure_bind: bool,
    /// Seconds that running requests get to finish when the process is told to stop.
    #[arg(long, default_value = "30", env = "PHALANX_SHUTDOWN_TIMEOUT")]
    pub shutdown_timeout: u64,
    #[command(flatten)]
    pub tls: TlsArgs,
    #[command(flatten)]
    pub telemetry: TelemetryArgs,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct WorkerArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub device: DeviceArgs,
    /// The coordinator's gRPC door; with several coordinators all of them, separated by commas.
    #[arg(long, default_value = "127.0.0.1:7000", env = "PHALANX_COORDINATOR", value_delimiter = ',')]
    pub coordinator: Vec<String>,
    /// Rank to ask for.
    #[arg(long, env = "PHALANX_RANK")]
    pub rank: Option<u32>,
    /// Address at which other hosts' workers reach this one's collective. Default: the one that leads to the coordinator.
    #[arg(long, env = "PHALANX_BIND_IP")]
    pub bind_ip: Option<IpAddr>,
    #[command(flatten)]
    pub tls: TlsArgs,
    #[command(flatten)]
    pub telemetry: TelemetryArgs,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct GatewayArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub http: HttpArgs,
    /// The coordinator's gRPC door; with several coordinators all of them, separated by commas.
    #[arg(long, default_value = "127.0.0.1:7000", env = "PHALANX_COORDINATOR", value_delimiter = ',')]
    pub coordinator: Vec<String>,
    /// Take the listening socket from standard input instead (as `phalanx serve` hands it over).
    #[arg(long, hide = true)]
    pub listen_stdin: bool,
    /// Unix socket that is told once requests can be answered, as systemd's `Type=notify` has it.
    #[arg(long, hide = true, env = "NOTIFY_SOCKET")]
    pub notify_socket: Option<String>,
    #[command(flatten)]
    pub tls: TlsArgs,
    #[command(flatten)]
    pub telemetry: TelemetryArgs,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct PlanArgs {
    /// Model directory, or a name below --model-dir; headers suffice.
    #[arg(default_value = "nano")]
    pub model: String,
    /// Directory in which model names are looked up.
    #[arg(long, env = "PHALANX_MODELS")]
    pub model_dir: Option<PathBuf>,
    /// Ranks that share the model.
    #[arg(long = "tensor-parallel-size", visible_alias = "tp", default_value = "1")]
    pub tensor_parallel_size: usize,
    /// Give each rank whole experts.
    #[arg(long)]
    pub enable_expert_parallel: bool,
    /// Memory a rank, in bytes; accepts 80g. Says how many tokens of context fit beside the weights.
    #[arg(long, value_parser = parse_bytes)]
    pub memory: Option<u64>,
    /// Print JSON.
    #[arg(long, action = ArgAction::SetTrue)]
    pub json: bool,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct DoctorArgs {
    /// Also check this checkpoint: a directory, or a name below --model-dir.
    pub model: Option<String>,
    /// Directory in which model names are looked up.
    #[arg(long, env = "PHALANX_MODELS")]
    pub model_dir: Option<PathBuf>,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct BenchArgs {
    /// With --engine: the model, as for serve.
    #[command(flatten)]
    pub model: ModelArgs,
    /// Base address of the server to measure.
    #[arg(long, default_value = "http://127.0.0.1:8000")]
    pub url: String,
    /// Requests in flight, one run each.
    #[arg(long, value_delimiter = ',', default_value = "1,4,16")]
    pub concurrency: Vec<usize>,
    /// Requests a run. Default: four times the concurrency, at least 8.
    #[arg(long)]
    pub requests: Option<usize>,
    /// Tokens a prompt.
    #[arg(long, visible_alias = "prompt", default_value = "128")]
    pub input_len: usize,
    /// Tokens generated a request.
    #[arg(long, visible_alias = "generate", default_value = "64")]
    pub output_len: usize,
    /// Run the workers without a gateway: their threads, collectives and steps alone.
    #[arg(long)]
    pub engine: bool,
    /// With --engine: ranks that share the model.
    #[arg(long = "tensor-parallel-size", visible_alias = "tp", default_value = "1")]
    pub tensor_parallel_size: usize,
    /// With --engine: what computes.
    #[arg(long, value_enum, default_value = "cpu")]
    pub backend: Backend,
    /// With --engine: threads a rank. Default: the processors divided by the ranks.
    #[arg(long)]
    pub threads: Option<usize>,
    /// Seed of the prompts.
    #[arg(long, default_value = "1")]
    pub seed: u64,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct ChatArgs {
    /// Say this one thing and end. Default: a conversation, line by line.
    pub message: Option<String>,
    /// Base address of the server.
    #[arg(long, default_value = "http://127.0.0.1:8000", env = "PHALANX_URL")]
    pub url: String,
    /// Model to ask for. Default: the first one served.
    #[arg(long)]
    pub model: Option<String>,
    /// Profile to ask for.
    #[arg(long)]
    pub profile: Option<String>,
    /// Reasoning effort: low, medium or high.
    #[arg(long)]
    pub reasoning_effort: Option<String>,
    /// Sampling temperature.
    #[arg(long)]
    pub temperature: Option<f32>,
    /// System message.
    #[arg(long)]
    pub system: Option<String>,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct HarmonyArgs {
    /// `render`: {"messages", "tools", …} to {"text", "token_ids"}. `parse`: {"token_ids"} or {"text"} to messages.
    #[arg(value_enum)]
    pub action: HarmonyAction,
    /// The model's tokenizer.json. Default: the bundled model's.
    #[arg(long)]
    pub tokenizer: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum HarmonyAction {
    Render,
    Parse,
}

/// Spells out `-tp 4`, which people know from vLLM and which is not a single-letter flag.
pub(crate) fn spell_out(arg: OsString) -> OsString {
    match arg.to_str() {
        Some("-tp") => "--tensor-parallel-size".into(),
        Some(text) if text.starts_with("-tp=") => text.replacen("-tp", "--tensor-parallel-size", 1).into(),
        _ => arg,
    }
}

/// `4096`, `128k` (1024s), `1m`.
fn parse_tokens(text: &str) -> Result<usize, String> {
    parse_scaled(text).map(|n| n as usize)
}

/// `1073741824`, `4g`, `4GiB`, `512m`: powers of 1024.
fn parse_bytes(text: &str) -> Result<u64, String> {
    let lower = text.to_ascii_lowercase();
    parse_scaled(lower.strip_suffix("ib").or(lower.strip_suffix('b')).unwrap_or(&lower))
}

fn parse_scaled(text: &str) -> Result<u64, String> {
    let expected = || format!("{text:?} is not a number such as 4096, 128k, 512m or 4g");
    let lower = text.trim().to_ascii_lowercase();
    let split = lower.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(lower.len());
    let shift = match &lower[split..] {
        "" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        _ => return Err(expected()),
    };
    let number: f64 = lower[..split].parse().map_err(|_| expected())?;
    let scaled = number * (1_u64 << shift) as f64;
    if (1.0..9e18).contains(&scaled) { Ok(scaled as u64) } else { Err(expected()) }
}

fn parse_share(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(share) if share > 0.0 && share <= 1.0 => Ok(share),
        _ => Err(format!("{text:?} is not a share such as 0.9, more than 0 and at most 1")),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn sizes_take_the_suffixes_people_write() {
        assert_eq!(parse_tokens("128k"), Ok(131_072));
        assert_eq!(parse_bytes("4GiB"), Ok(4 << 30));
        assert_eq!(parse_bytes("1.5g"), Ok(3 << 29));
        assert!(parse_bytes("lots").is_err() && parse_tokens("0").is_err() && parse_bytes("-1").is_err());
    }
}
