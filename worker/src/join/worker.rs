//! What outlives a connection to a coordinator.

use std::{
    hash::{BuildHasher, Hasher, RandomState},
    sync::Arc,
    time::Duration,
};

use phalanx_proto::{
    checkpoint::Checkpoint,
    fault::{Fault, FaultKind},
    v1,
};
use tokio::time::Instant;
use tracing::info;

use crate::{
    backend::{
        Arithmetic,
        cpu::CpuBackend,
        cuda::{self, CudaBackend},
        reference::ReferenceBackend,
    },
    collective::host::host_identity,
    config::{BackendKind, Config},
    executor::{Command, Device, faults},
    vocabulary,
};

/// An aborted epoch must end within this time, or the process ends and is started again: its weights are worth less than
/// the time of everyone who waits for the group to form. A step notices an abort in its next sum, at most half a layer
/// later.
const STUCK_AFTER: Duration = Duration::from_secs(2);

/// A shard in memory.
#[derive(Clone, PartialEq)]
pub(super) struct Resident {
    pub(super) assign: v1::Assign,
    pub(super) loaded: v1::Loaded,
}

/// A worker process, attached or not.
pub(super) struct Worker {
    pub(super) config: Config,
    pub(super) device: Device,
    /// Drawn when the process starts.
    pub(super) incarnation: u64,
    pub(super) host: String,
    /// Tokens from here on are never chosen.
    pub(super) sampled_vocab: usize,
    /// Highest epoch that was prepared here.
    pub(super) highest_epoch: u64,
    pub(super) resident: Option<Resident>,
    /// The shard that is being loaded.
    pub(super) loading: Option<v1::Assign>,
    /// An epoch that was aborted and has not ended yet, and when it must have.
    pub(super) ending: Option<(u64, Instant)>,
    memory_bytes: u64,
    checkpoint_digest: u64,
}

/// A fault that only a mistake in this program explains.
pub(super) fn bug(message: impl Into<String>) -> Fault {
    Fault::new(FaultKind::Internal, message)
}

impl Worker {
    /// Opens the checkpoint's headers and the device. Blocks.
    pub(super) fn open(
        config: &Config,
        start_device: &dyn Fn(&Config, Checkpoint, u64) -> Result<Device, Fault>,
    ) -> Result<Self, Fault> {
        let bad_checkpoint = |error| Fault::new(FaultKind::Checkpoint, format!("{error}"));
        let checkpoint = Checkpoint::open(&config.model_dir).map_err(bad_checkpoint)?;
        checkpoint.check_complete().map_err(bad_checkpoint)?;
        let sampled_vocab = vocabulary::sampled_vocab(&config.model_dir, checkpoint.geometry.vocab_size)?;
        let host = host_identity().map_err(|error| faults::of_collective(&error))?;
        let memory_bytes = config.memory_limit()?;
        let checkpoint_digest = checkpoint.digest;
        let device = start_device(config, checkpoint, memory_bytes)?;
        // The standard library seeds hash maps from the system's randomness.
        let incarnation = RandomState::new().build_hasher().finish();
        info!(backend = device.backend, device = device.description, memory_bytes, incarnation, "worker started");
        Ok(Self {
            config: config.clone(),
            device,
            incarnation,
            host,
            sampled_vocab,
            highest_epoch: 0,
            resident: None,
            loading: None,
            ending: None,
            memory_bytes,
            checkpoint_digest,
        })
    }

    pub(super) fn hello(&self) -> v1::Hello {
        v1::Hello {
            incarnation: self.incarnation,
            deployment: self.config.deployment.clone(),
            host: self.host.clone(),
            device: self.device.description.clone(),
            backend: self.device.backend.to_owned(),
            memory_bytes: self.memory_bytes,
            highest_epoch: self.highest_epoch,
            resident: self.resident.as_ref().map(|resident| resident.assign.clone()),
            wanted_rank: self.config.rank,
            checkpoint_digest: self.checkpoint_digest,
        }
    }

    /// Hands a command to the device thread.
    pub(super) async fn command(&self, command: Command) -> Result<(), Fault> {
        self.device.commands.send(command).await.map_err(|_| bug("the device thread has ended"))
    }

    /// Remembers that `epoch` was aborted and has to end.
    pub(super) fn watch_end_of(&mut self, epoch: u64) {
        self.ending = Some((epoch, Instant::now() + STUCK_AFTER));
    }
}

/// The one place that knows which backends there are.
pub(super) fn start_device(config: &Config, checkpoint: Checkpoint, memory_bytes: u64) -> Result<Device, Fault> {
    let arithmetic = Arithmetic::new(checkpoint.geometry.clone());
    let (checkpoint, threads) = (Arc::new(checkpoint), config.threads);
    match config.backend {
        BackendKind::Cpu => {
            Device::start(checkpoint, memory_bytes, move || CpuBackend::new(arithmetic.clone(), threads))
        }
        BackendKind::Reference => {
            Device::start(checkpoint, memory_bytes, move || Ok(ReferenceBackend::new(arithmetic.clone())))
        }
        BackendKind::Cuda => {
            let index = config.device_index();
            let make = move || CudaBackend::new(arithmetic.clone(), cuda::open(index)?);
            Device::start(checkpoint, memory_bytes, make)
        }
    }
}
