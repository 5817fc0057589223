//! What a worker is told when it starts.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr},
    path::PathBuf,
    str::FromStr,
    sync::Arc,
};

use phalanx_proto::{
    fault::{Fault, FaultKind},
    tls::Identity,
};
use tonic::transport::Uri;

use crate::memory;

/// Which backend computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BackendKind {
    /// Fast kernels for CPUs.
    Cpu,
    /// Slow and readable, for comparison.
    Reference,
    /// NVIDIA GPUs.
    Cuda,
}

impl BackendKind {
    /// The name in configuration and messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Reference => "reference",
            Self::Cuda => "cuda",
        }
    }
}

impl fmt::Display for BackendKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for BackendKind {
    type Err = Fault;

    fn from_str(text: &str) -> Result<Self, Fault> {
        let kinds = [Self::Cpu, Self::Reference, Self::Cuda];
        kinds.into_iter().find(|kind| kind.name() == text).ok_or_else(|| {
            Fault::invalid("backend", format!("backend is {text:?}, expected \"cpu\", \"reference\" or \"cuda\""))
        })
    }
}

/// A worker's settings.
#[derive(Clone, Debug)]
pub struct Config {
    /// Addresses of coordinators, at least one, of which one leads: `http://host:port`, or `https://host:port` with
    /// `tls`, or `host:port` for either.
    pub coordinators: Vec<String>,
    /// The deployment to work for.
    pub deployment: String,
    /// Directory of the checkpoint, in the Hugging Face layout.
    pub model_dir: PathBuf,
    /// What computes.
    pub backend: BackendKind,
    /// Threads that the backend computes with.
    pub threads: usize,
    /// The rank this worker would like.
    pub rank: Option<u32>,
    /// Bytes that weights and KV cache may take together. Absent: `memory_utilization` of what is available at start.
    pub memory_bytes: Option<u64>,
    /// Share of the available memory to use when `memory_bytes` is absent, in (0, 1].
    pub memory_utilization: f64,
    /// Address of this host at which other ranks reach its collective.
    pub bind_ip: IpAddr,
    /// Certificate to show to the coordinator, which must show one of the same authority. Absent: a plain connection.
    pub tls: Option<Arc<Identity>>,
}

impl Config {
    /// One worker of `deployment` on this host: the CPU backend on every core, nine tenths of the available memory, a
    /// collective that only this host reaches.
    pub fn new(coordinator: &str, deployment: &str, model_dir: PathBuf) -> Self {
        Self {
            coordinators: vec![coordinator.to_owned()],
            deployment: deployment.to_owned(),
            model_dir,
            backend: BackendKind::Cpu,
            threads: std::thread::available_parallelism().map_or(1, usize::from),
            rank: None,
            memory_bytes: None,
            memory_utilization: 0.9,
            bind_ip: Ipv4Addr::LOCALHOST.into(),
            tls: None,
        }
    }

    /// Checks every setting.
    ///
    /// # Errors
    /// One fault of kind `InvalidArgument` that names all settings at fault.
    pub fn check(&self) -> Result<(), Fault> {
        let mut problems = Vec::new();
        if self.coordinators.is_empty() {
            problems.push("coordinators is empty, expected at least one address".to_owned());
        }
        problems.extend(self.coordinators.iter().filter_map(|address| self.uri(address).err()));
        if self.deployment.is_empty() {
            problems.push("deployment is empty, expected a model name".to_owned());
        }
        if !(1..=MAX_THREADS).contains(&self.threads) {
            problems.push(format!("threads is {}, expected 1 to {MAX_THREADS}", self.threads));
        }
        if !(self.memory_utilization > 0.0 && self.memory_utilization <= 1.0) {
            let found = self.memory_utilization;
            problems.push(format!("memory utilization is {found}, expected more than 0 and at most 1"));
        }
        if self.bind_ip.is_unspecified() {
            problems
                .push(format!("bind address is {}, expected one at which other ranks reach this host", self.bind_ip));
        }
        match problems.is_empty() {
            true => Ok(()),
            false => Err(Fault::new(FaultKind::InvalidArgument, problems.join("; "))),
        }
    }

    /// A coordinator's address, checked.
    pub(crate) fn uri(&self, text: &str) -> Result<Uri, String> {
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        let address = if text.contains("://") { text.to_owned() } else { format!("{scheme}://{text}") };
        let uri = Uri::from_str(&address).map_err(|error| format!("coordinator is {text:?}: {error}"))?;
        match (uri.scheme_str(), uri.port_u16()) {
            (Some(found), Some(_)) if found == scheme => Ok(uri),
            _ => Err(format!("coordinator is {text:?}, expected {scheme}://host:port")),
        }
    }

    /// Which of the host's GPUs this worker uses. With `phalanx serve` a rank's place among the host's workers is its
    /// device's place among those that `CUDA_VISIBLE_DEVICES` leaves.
    pub(crate) fn device_index(&self) -> u32 {
        self.rank.unwrap_or_default()
    }

    /// Bytes that weights and KV cache may take together, of the host's memory or of the GPU's.
    ///
    /// # Errors
    /// When no limit is set and the system does not say what is available, or the GPU cannot be used.
    pub(crate) fn memory_limit(&self) -> Result<u64, Fault> {
        if let Some(bytes) = self.memory_bytes {
            return Ok(bytes);
        }
        let available = match self.backend {
            BackendKind::Cpu | BackendKind::Reference => memory::available_bytes()?,
            BackendKind::Cuda => memory::available_device_bytes(self.device_index())?,
        };
        Ok((available as f64 * self.memory_utilization) as u64)
    }
}

/// More threads than any machine this runs on has.
const MAX_THREADS: usize = 1024;
