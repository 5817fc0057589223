//! Errors in OpenAI's form: four keys in the body, and the headers that tell a client whether to try again.

use std::time::Duration;

use axum::{
    Json,
    response::{IntoResponse, Response},
};
use http::{
    HeaderName, HeaderValue, StatusCode,
    header::{RETRY_AFTER, WWW_AUTHENTICATE},
};
use serde_json::{Value, json};

/// Tells OpenAI's clients not to send the same request again.
const SHOULD_RETRY: HeaderName = HeaderName::from_static("x-should-retry");

/// The closed set of `error.type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ErrorKind {
    InvalidRequest,
    NotFound,
    Permission,
    RateLimit,
    Server,
}

impl ErrorKind {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::InvalidRequest => "invalid_request_error",
            Self::NotFound => "not_found_error",
            Self::Permission => "permission_error",
            Self::RateLimit => "rate_limit_error",
            Self::Server => "server_error",
        }
    }
}

/// One error as a client sees it.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{message}")]
pub(crate) struct ApiError {
    pub(crate) status: StatusCode,
    pub(crate) kind: ErrorKind,
    /// For people: what is wrong, with which value, and what to do.
    pub(crate) message: String,
    /// The parameter at fault, as a path into the body: `messages[0].role`.
    pub(crate) param: Option<String>,
    /// What programs branch on.
    pub(crate) code: Option<&'static str>,
    /// Seconds after which a retry makes sense.
    pub(crate) retry_after_s: Option<u32>,
}

impl ApiError {
    pub(crate) fn new(status: StatusCode, kind: ErrorKind, code: &'static str, message: impl Into<String>) -> Self {
        Self { status, kind, message: message.into(), param: None, code: Some(code), retry_after_s: None }
    }

    fn bad_request(code: &'static str, param: &str, message: String) -> Self {
        let error = Self::new(StatusCode::BAD_REQUEST, ErrorKind::InvalidRequest, code, message);
        Self { param: (!param.is_empty()).then(|| param.to_owned()), ..error }
    }

    /// The body is not JSON at all.
    pub(crate) fn invalid_json(detail: impl std::fmt::Display) -> Self {
        Self::bad_request("invalid_json", "", format!("The body is not valid JSON: {detail}."))
    }

    /// A parameter has a value that is not allowed.
    pub(crate) fn invalid_value(param: &str, detail: impl std::fmt::Display) -> Self {
        Self::bad_request("invalid_value", param, format!("Invalid value for '{param}': {detail}."))
    }

    /// A parameter is of another JSON type.
    pub(crate) fn invalid_type(param: &str, expected: &str, found: &Value) -> Self {
        let text = format!("Invalid type for '{param}': expected {expected}, but got {} instead.", type_name(found));
        Self::bad_request("invalid_type", param, text)
    }

    /// A parameter that must be there is not.
    pub(crate) fn missing(param: &str) -> Self {
        Self::bad_request("missing_required_parameter", param, format!("Missing required parameter: '{param}'."))
    }

    /// A parameter asks for something that would change the answer and cannot be done.
    pub(crate) fn unsupported(param: &str, reason: impl std::fmt::Display) -> Self {
        Self::bad_request("unsupported_parameter", param, format!("Unsupported parameter: '{param}': {reason}."))
    }

    /// Prompt and wanted output do not fit.
    pub(crate) fn context_length(param: &str, message: String) -> Self {
        Self::bad_request("context_length_exceeded", param, message)
    }

    /// No model has that name.
    pub(crate) fn model_not_found(name: &str, served: &[String]) -> Self {
        let text = format!("The model '{name}' does not exist; served here: {}.", served.join(", "));
        let error = Self::new(StatusCode::NOT_FOUND, ErrorKind::NotFound, "model_not_found", text);
        Self { param: Some("model".to_owned()), ..error }
    }

    /// The request carries no key that is known here.
    pub(crate) fn unauthorized(message: &str) -> Self {
        Self::new(StatusCode::UNAUTHORIZED, ErrorKind::InvalidRequest, "invalid_api_key", message)
    }

    /// The model exists, but not for this key.
    pub(crate) fn model_not_allowed(name: &str) -> Self {
        let text = format!("This key may not use the model '{name}'; GET /v1/models lists those it may use.");
        let error = Self::new(StatusCode::FORBIDDEN, ErrorKind::Permission, "model_not_allowed", text);
        Self { param: Some("model".to_owned()), ..error }
    }

    /// The gateway has as much to do as it accepts.
    pub(crate) fn too_many_requests(message: impl Into<String>) -> Self {
        let error = Self::new(StatusCode::TOO_MANY_REQUESTS, ErrorKind::RateLimit, "rate_limit_exceeded", message);
        Self { retry_after_s: Some(1), ..error }
    }

    /// Nothing can be answered now, but later.
    pub(crate) fn unavailable(code: &'static str, message: impl Into<String>) -> Self {
        let error = Self::new(StatusCode::SERVICE_UNAVAILABLE, ErrorKind::Server, code, message);
        Self { retry_after_s: Some(2), ..error }
    }

    /// Something here is broken. What it is goes to the log, not to the client.
    pub(crate) fn internal(request_id: &str) -> Self {
        let text = format!("The server failed to answer this request; its log has the reason under {request_id}.");
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, ErrorKind::Server, "internal_error", text)
    }

    /// Somebody ended the request at the coordinator.
    pub(crate) fn aborted() -> Self {
        let text = "The request was aborted before its answer was complete.";
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, ErrorKind::Server, "aborted", text)
    }

    /// The whole request took longer than it may.
    pub(crate) fn deadline(ms: u64) -> Self {
        let text = format!("The request was not finished after {} s.", ms as f64 / 1000.0);
        Self::new(StatusCode::GATEWAY_TIMEOUT, ErrorKind::Server, "timeout", text)
    }

    /// The same error, with the time after which another attempt is likely to succeed, if that is known.
    pub(crate) fn retry_after(self, wait: Option<Duration>) -> Self {
        let seconds = wait.map(|wait| u32::try_from(wait.as_millis().div_ceil(1000).max(1)).unwrap_or(u32::MAX));
        Self { retry_after_s: seconds.or(self.retry_after_s), ..self }
    }

    /// The JSON body; also the `data` of an error in mid-stream.
    pub(crate) fn body(&self) -> Value {
        let Self { message, param, code, .. } = self;
        json!({ "error": { "message": message, "type": self.kind.name(), "param": param, "code": code } })
    }

    /// Whether the same request cannot succeed later either.
    fn is_final(&self) -> bool {
        let transient = [StatusCode::REQUEST_TIMEOUT, StatusCode::TOO_MANY_REQUESTS, StatusCode::GATEWAY_TIMEOUT];
        self.retry_after_s.is_none() && !transient.contains(&self.status)
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body())).into_response();
        if let Some(seconds) = self.retry_after_s {
            response.headers_mut().insert(RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            response.headers_mut().insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        if self.is_final() {
            response.headers_mut().insert(SHOULD_RETRY, HeaderValue::from_static("false"));
        }
        response
    }
}

/// A JSON value's type with its article, for messages.
pub(crate) fn type_name(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(number) if number.is_f64() => "a number",
        Value::Number(_) => "an integer",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}
