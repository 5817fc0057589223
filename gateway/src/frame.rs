//! What every request goes through: its id, its time, its count, and the net below a panic.

use std::{
    panic::AssertUnwindSafe,
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    body::Body,
    extract::{MatchedPath, State},
    middleware::Next,
    response::{IntoResponse, Response},
};
use futures::FutureExt;
use http::{HeaderName, HeaderValue, Request};
use phalanx_proto::trace::TRACEPARENT;
use tracing::error;
use uuid::Uuid;

use crate::{access::Tenant, app::App, instruments::Answer, openai::error::ApiError};

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const PROCESSING_MS: HeaderName = HeaderName::from_static("openai-processing-ms");
/// Longest id that is taken over from a client.
const MAX_REQUEST_ID: usize = 128;

/// When a request has to be answered.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Deadline {
    pub(crate) at: tokio::time::Instant,
    /// The time that the request was given, in milliseconds.
    pub(crate) ms: u64,
}

impl Deadline {
    pub(crate) fn after(arrived: Instant, ms: u64) -> Self {
        Self { at: (arrived + Duration::from_millis(ms)).into(), ms }
    }
}

/// Who asks, and until when.
#[derive(Clone)]
pub(crate) struct Identity {
    /// The client's `x-request-id`, or one made here.
    pub(crate) id: String,
    /// The client's trace, or nothing.
    pub(crate) traceparent: String,
    pub(crate) arrived: Instant,
    /// The client's own deadline, or the configured one.
    pub(crate) deadline: Deadline,
    /// Whose key it was; nobody's where no keys are set.
    pub(crate) tenant: Option<Arc<Tenant>>,
}

/// Runs a request and frames its response.
pub(crate) async fn frame(State(app): State<Arc<App>>, mut request: Request<Body>, next: Next) -> Response {
    let began = Instant::now();
    let route = request.extensions().get::<MatchedPath>().map_or("unmatched", MatchedPath::as_str).to_owned();
    let identity = identify(&app, &request, began);
    let id = identity.id.clone();
    request.extensions_mut().insert(identity);
    let mut response = match AssertUnwindSafe(next.run(request)).catch_unwind().await {
        Ok(response) => response,
        Err(_) => {
            error!(request_id = id, route, "handler panicked");
            ApiError::internal(&id).into_response()
        }
    };
    let answer = Answer { route, status: response.status().as_u16() };
    app.instruments.answers.get_or_create(&answer).inc();
    let headers = response.headers_mut();
    if let Ok(value) = HeaderValue::try_from(id) {
        headers.insert(REQUEST_ID, value);
    }
    let ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
    headers.insert(PROCESSING_MS, HeaderValue::from(ms));
    response
}

fn identify(app: &App, request: &Request<Body>, arrived: Instant) -> Identity {
    let text = |name: &str| request.headers().get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let given = text(REQUEST_ID.as_str());
    let is_usable = !given.is_empty() && given.len() <= MAX_REQUEST_ID && given.bytes().all(|b| b.is_ascii_graphic());
    let id = if is_usable { given.to_owned() } else { format!("req_{}", Uuid::new_v4().simple()) };
    let limit_ms = u64::try_from(app.config.timeouts.request.as_millis()).unwrap_or(u64::MAX);
    let deadline = Deadline::after(arrived, limit_ms);
    Identity { id, traceparent: text(TRACEPARENT).to_owned(), arrived, deadline, tenant: None }
}
