//! Errors of the layers below as the faults that the coordinator branches on.

use phalanx_proto::{
    fault::{Fault, FaultKind},
    layout::LayoutError,
};

use crate::{
    backend::BackendError,
    checkpoint::ReadError,
    collective::CollectiveError,
    model::{LoadError, ModelError},
};

/// A backend that lacks memory or what it runs on; anything else is a bug or a broken device.
pub fn of_backend(error: &BackendError) -> Fault {
    let kind = match error {
        BackendError::OutOfMemory { .. } => FaultKind::OutOfMemory,
        BackendError::Unsupported(_) => FaultKind::Unsupported,
        BackendError::Operation { .. } => FaultKind::Internal,
    };
    Fault::new(kind, error.to_string())
}

/// A collective that ended: most often because a peer is gone.
pub fn of_collective(error: &CollectiveError) -> Fault {
    let kind = match error {
        CollectiveError::Mismatch { .. } => FaultKind::Diverged,
        CollectiveError::Rendezvous { .. } => FaultKind::Internal,
        CollectiveError::Aborted { .. }
        | CollectiveError::Late { .. }
        | CollectiveError::Unreachable { .. }
        | CollectiveError::Io { .. } => FaultKind::CollectiveAborted,
    };
    Fault::new(kind, error.to_string())
}

/// A forward pass that gave no logits.
pub fn of_model(error: &ModelError) -> Fault {
    match error {
        ModelError::Batch(_) => Fault::new(FaultKind::Internal, format!("broken plan: {error}")),
        ModelError::Backend(error) => of_backend(error),
        ModelError::Collective(error) => of_collective(error),
    }
}

/// A shard that was not loaded.
pub fn of_load(error: &LoadError) -> Fault {
    let kind = match error {
        LoadError::Read(ReadError::OutOfMemory { .. }) => FaultKind::OutOfMemory,
        LoadError::Read(ReadError::Unknown { .. }) => FaultKind::Internal,
        LoadError::Read(_) => FaultKind::Checkpoint,
        LoadError::Backend { source, .. } => of_backend(source).kind,
    };
    Fault::new(kind, error.to_string())
}

/// A model that cannot be divided as asked.
pub fn of_layout(error: &LayoutError) -> Fault {
    Fault::new(FaultKind::InvalidArgument, error.to_string())
}
