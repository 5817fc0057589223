//! What can go wrong between processes, as kinds that somebody branches on, and their gRPC form.

use std::time::Duration;

use thiserror::Error;
use tonic::{Code, Status, metadata::MetadataValue};

use crate::tls;

/// Trailing metadata key that carries a fault's kind.
pub const FAULT_METADATA: &str = "phalanx-fault";

/// A kind of fault. Its name goes over the wire; its gRPC code follows from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FaultKind {
    /// A field of a request is out of range.
    InvalidArgument,
    /// Prompt and wanted output exceed the context.
    ContextLength,
    /// No deployment has the asked name.
    ModelNotFound,
    /// A request of that id is already running.
    DuplicateRequest,
    /// The queue is full.
    QueueFull,
    /// The group is forming, loading or lost.
    NotReady,
    /// The process is about to leave and takes nothing new.
    Draining,
    /// A rank died or stopped answering, and the request could not be carried over.
    WorkerLost,
    /// A message belongs to an epoch that is no longer running.
    StaleEpoch,
    /// Ranks of one step disagree.
    Diverged,
    /// A collective was aborted.
    CollectiveAborted,
    /// The checkpoint is missing, truncated or not what its headers say.
    Checkpoint,
    /// Not enough memory for weights or KV cache.
    OutOfMemory,
    /// A device, library or instruction set is missing.
    Unsupported,
    /// A broken invariant; a bug.
    Internal,
}

/// Every kind with its wire name and gRPC code.
const TABLE: [(FaultKind, &str, Code); 15] = [
    (FaultKind::InvalidArgument, "invalid_argument", Code::InvalidArgument),
    (FaultKind::ContextLength, "context_length", Code::OutOfRange),
    (FaultKind::ModelNotFound, "model_not_found", Code::NotFound),
    (FaultKind::DuplicateRequest, "duplicate_request", Code::AlreadyExists),
    (FaultKind::QueueFull, "queue_full", Code::ResourceExhausted),
    (FaultKind::NotReady, "not_ready", Code::Unavailable),
    (FaultKind::Draining, "draining", Code::Unavailable),
    (FaultKind::WorkerLost, "worker_lost", Code::Unavailable),
    (FaultKind::StaleEpoch, "stale_epoch", Code::FailedPrecondition),
    (FaultKind::Diverged, "diverged", Code::DataLoss),
    (FaultKind::CollectiveAborted, "collective_aborted", Code::Aborted),
    (FaultKind::Checkpoint, "checkpoint", Code::FailedPrecondition),
    (FaultKind::OutOfMemory, "out_of_memory", Code::ResourceExhausted),
    (FaultKind::Unsupported, "unsupported", Code::Unimplemented),
    (FaultKind::Internal, "internal", Code::Internal),
];

impl FaultKind {
    /// The name on the wire.
    pub fn name(self) -> &'static str {
        TABLE.iter().find(|row| row.0 == self).map_or("internal", |row| row.1)
    }

    /// The gRPC code.
    pub fn code(self) -> Code {
        TABLE.iter().find(|row| row.0 == self).map_or(Code::Internal, |row| row.2)
    }

    /// The kind of that name, if there is one.
    pub fn from_name(name: &str) -> Option<Self> {
        TABLE.iter().find(|row| row.1 == name).map(|row| row.0)
    }

    /// Whether the same request may succeed when it is sent again later.
    pub fn is_transient(self) -> bool {
        matches!(self, Self::QueueFull | Self::NotReady | Self::Draining | Self::WorkerLost | Self::CollectiveAborted)
    }
}

/// A fault with what was tried and what to do about it.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{message}")]
pub struct Fault {
    /// What callers branch on.
    pub kind: FaultKind,
    /// For people: what, with which value, and what to do.
    pub message: String,
    /// Name of the request's field that is at fault, empty if none is.
    pub field: String,
    /// When the same request is likely to be taken, if that is known. Travels in whole milliseconds.
    pub retry_after: Option<Duration>,
}

impl Fault {
    /// A fault that no single field of a request caused.
    pub fn new(kind: FaultKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), field: String::new(), retry_after: None }
    }

    /// A request's field out of range.
    pub fn invalid(field: impl Into<String>, message: impl Into<String>) -> Self {
        Self { field: field.into(), ..Self::new(FaultKind::InvalidArgument, message) }
    }

    /// The same fault, with a time after which another attempt makes sense.
    #[must_use]
    pub fn retry_after(self, wait: Duration) -> Self {
        Self { retry_after: Some(wait), ..self }
    }
}

/// Trailing metadata key that names the field at fault.
const FIELD_METADATA: &str = "phalanx-field";
/// Trailing metadata key of the time after which another attempt makes sense, in milliseconds.
pub const RETRY_AFTER_METADATA: &str = "phalanx-retry-after-ms";

impl From<Fault> for Status {
    fn from(fault: Fault) -> Self {
        let mut status = Status::new(fault.kind.code(), fault.message);
        status.metadata_mut().insert(FAULT_METADATA, MetadataValue::from_static(fault.kind.name()));
        if let Ok(field) = MetadataValue::try_from(fault.field.as_str())
            && !fault.field.is_empty()
        {
            status.metadata_mut().insert(FIELD_METADATA, field);
        }
        if let Some(wait) = fault.retry_after {
            let wait_ms = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX);
            status.metadata_mut().insert(RETRY_AFTER_METADATA, MetadataValue::from(wait_ms));
        }
        status
    }
}

impl From<&Status> for Fault {
    /// Reads the kind back; a status that some other software made is mapped by its code.
    fn from(status: &Status) -> Self {
        let text = |key| status.metadata().get(key).and_then(|value| value.to_str().ok());
        let by_code = || match status.code() {
            Code::InvalidArgument => FaultKind::InvalidArgument,
            Code::NotFound => FaultKind::ModelNotFound,
            Code::ResourceExhausted => FaultKind::QueueFull,
            Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled | Code::Unknown => FaultKind::NotReady,
            _ => FaultKind::Internal,
        };
        Self {
            kind: text(FAULT_METADATA).and_then(FaultKind::from_name).unwrap_or_else(by_code),
            message: match tls::advice(status) {
                Some(advice) => format!("{}; {advice}", status.message()),
                None => status.message().to_owned(),
            },
            field: text(FIELD_METADATA).unwrap_or_default().to_owned(),
            retry_after: text(RETRY_AFTER_METADATA).and_then(|wait| wait.parse().ok()).map(Duration::from_millis),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_survives_the_way_through_a_status() {
        for (kind, _, _) in TABLE {
            let fault = Fault { field: "temperature".into(), ..Fault::new(kind, "temperature is 3, expected 0 to 2") };
            assert_eq!(Fault::from(&Status::from(fault.clone())), fault);
            let later = fault.retry_after(Duration::from_millis(1500));
            assert_eq!(Fault::from(&Status::from(later.clone())), later);
        }
    }

    #[test]
    fn a_foreign_status_is_mapped_by_its_code() {
        assert_eq!(Fault::from(&Status::unavailable("connection refused")).kind, FaultKind::NotReady);
    }
}
