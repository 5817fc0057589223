//! Reads a request's body: bounded in size, time and depth, and JSON.

use std::time::Duration;

use axum::body::Body;
use futures::StreamExt;
use http::{Request, StatusCode, header};
use serde_json::Value;
use tokio::time::timeout;

use crate::{
    config::Config,
    openai::error::{ApiError, ErrorKind},
};

/// A body that is too large is read on up to this many times its limit, so that its sender sees the answer rather than
/// a broken connection.
const DRAIN_FACTOR: usize = 4;
/// How long the body of a request that is refused before it is read may take to arrive.
const DISCARD_TIME: Duration = Duration::from_secs(2);

/// Reads a JSON body. `serde_json` refuses what is nested deeper than 128.
///
/// # Errors
/// 408, 413, 415, or 400 when it is not JSON.
pub(crate) async fn read_json(config: &Config, request: Request<Body>) -> Result<Value, ApiError> {
    check_type(&request)?;
    let (seconds, limit) = (config.timeouts.body.as_secs(), config.limits.body_bytes);
    let bytes =
        match timeout(config.timeouts.body, read(request.into_body(), limit, limit.saturating_mul(DRAIN_FACTOR))).await
        {
            Ok(bytes) => bytes?,
            Err(_) => {
                let text = format!("The body was not complete after {seconds} s.");
                return Err(error(StatusCode::REQUEST_TIMEOUT, "body_timeout", text));
            }
        };
    if bytes.is_empty() {
        return Err(ApiError::invalid_json("it is empty"));
    }
    // Said before serde's own words, which call invalid UTF-8 an invalid code point of some line.
    let text = std::str::from_utf8(&bytes).map_err(|error| ApiError::invalid_json(format!("not UTF-8: {error}")))?;
    serde_json::from_str(text).map_err(ApiError::invalid_json)
}

/// Takes a body off the wire and forgets it, within limits.
pub(crate) async fn discard(config: &Config, body: Body) {
    // Whatever is wrong with it, its sender is about to be told something else.
    let _ = timeout(DISCARD_TIME.min(config.timeouts.body), read(body, 0, config.limits.body_bytes)).await;
}

fn error(status: StatusCode, code: &'static str, message: String) -> ApiError {
    ApiError::new(status, ErrorKind::InvalidRequest, code, message)
}

fn check_type(request: &Request<Body>) -> Result<(), ApiError> {
    let Some(value) = request.headers().get(header::CONTENT_TYPE) else { return Ok(()) };
    let name = value.to_str().unwrap_or_default();
    let essence = name.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    if essence == "application/json" || essence.ends_with("+json") {
        return Ok(());
    }
    let text = format!("The content type is '{}'; send 'Content-Type: application/json'.", name.escape_default());
    Err(error(StatusCode::UNSUPPORTED_MEDIA_TYPE, "unsupported_media_type", text))
}

/// Keeps up to `limit` bytes and reads on up to `drained`.
async fn read(body: Body, limit: usize, drained: usize) -> Result<Vec<u8>, ApiError> {
    let mut chunks = body.into_data_stream();
    let mut bytes = Vec::new();
    let mut length = 0;
    while let Some(chunk) = chunks.next().await {
        let chunk = chunk.map_err(|error| ApiError::invalid_json(format!("it could not be read: {error}")))?;
        length += chunk.len();
        if length <= limit {
            bytes.extend_from_slice(&chunk);
        } else {
            bytes = Vec::new();
        }
        if length > drained {
            break;
        }
    }
    if length > limit {
        let text = format!("The body has more than {limit} bytes.");
        return Err(error(StatusCode::PAYLOAD_TOO_LARGE, "body_too_large", text));
    }
    Ok(bytes)
}
