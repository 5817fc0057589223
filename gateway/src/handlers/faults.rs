//! What a client sees of a fault.

use http::StatusCode;
use phalanx_proto::fault::{Fault, FaultKind};
use tracing::error;

use crate::{
    app::capitalized,
    openai::error::{ApiError, ErrorKind},
};

/// The error for a fault. `prompt` is what the endpoint calls its prompt, for faults about its length.
pub(crate) fn api_error(fault: &Fault, request_id: &str, prompt: &str) -> ApiError {
    let text = capitalized(&fault.message);
    match fault.kind {
        FaultKind::InvalidArgument => {
            let field = if fault.field == "prompt" { prompt } else { &fault.field };
            let error = ApiError::new(StatusCode::BAD_REQUEST, ErrorKind::InvalidRequest, "invalid_value", text);
            ApiError { param: (!field.is_empty()).then(|| field.to_owned()), ..error }
        }
        FaultKind::ContextLength => ApiError::context_length(prompt, text),
        FaultKind::ModelNotFound => {
            let error = ApiError::new(StatusCode::NOT_FOUND, ErrorKind::NotFound, "model_not_found", text);
            ApiError { param: Some("model".to_owned()), ..error }
        }
        FaultKind::QueueFull => ApiError::too_many_requests(text).retry_after(fault.retry_after),
        FaultKind::NotReady => ApiError::unavailable("not_ready", text).retry_after(fault.retry_after),
        FaultKind::Draining => ApiError::unavailable("draining", text).retry_after(fault.retry_after),
        FaultKind::WorkerLost | FaultKind::StaleEpoch | FaultKind::CollectiveAborted => {
            ApiError::unavailable("worker_lost", text).retry_after(fault.retry_after)
        }
        FaultKind::DuplicateRequest
        | FaultKind::Diverged
        | FaultKind::Checkpoint
        | FaultKind::OutOfMemory
        | FaultKind::Unsupported
        | FaultKind::Internal => {
            error!(request_id, kind = fault.kind.name(), error = %fault, "request failed");
            ApiError::internal(request_id)
        }
    }
}
