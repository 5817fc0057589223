//! The door: whose key, until when, and within which limits.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use axum::{
    body::{Body, Bytes, HttpBody},
    extract::State,
    middleware::Next,
    response::{IntoResponse, Response},
};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request};
use hyper::body::{Frame, SizeHint};
use tokio::time::timeout_at;

use super::{
    Tenant,
    quota::{Limit, Place, Refusal, Standing},
};
use crate::{
    app::App,
    body::discard,
    frame::{Deadline, Identity},
    instruments::{KeyLabels, KeyRefusal},
    openai::error::ApiError,
};

const TIMEOUT_MS: &str = "x-request-timeout-ms";
/// Longest time that a client may ask for: a day.
const MAX_TIMEOUT_MS: u64 = 24 * 3600 * 1000;
/// What a handler gets beyond the deadline to say itself that it has passed.
const LAST_WORDS: Duration = Duration::from_millis(250);
/// Limit, rest and time to reset, for requests and for tokens, as OpenAI names them.
const HEADERS: [[HeaderName; 3]; 2] = [
    [
        HeaderName::from_static("x-ratelimit-limit-requests"),
        HeaderName::from_static("x-ratelimit-remaining-requests"),
        HeaderName::from_static("x-ratelimit-reset-requests"),
    ],
    [
        HeaderName::from_static("x-ratelimit-limit-tokens"),
        HeaderName::from_static("x-ratelimit-remaining-tokens"),
        HeaderName::from_static("x-ratelimit-reset-tokens"),
    ],
];

/// Lets a request through to its handler, or says why not.
pub(crate) async fn guard(State(app): State<Arc<App>>, mut request: Request<Body>, next: Next) -> Response {
    let tenant = match app.access.authenticate(request.headers()) {
        Ok(tenant) => tenant,
        Err(error) => return refuse(&app, request, error).await,
    };
    let mut response = match enter(&app, &mut request, tenant.as_ref()) {
        Ok(Entered { deadline, place }) => {
            let response = match timeout_at(deadline.at + LAST_WORDS, next.run(request)).await {
                Ok(response) => response,
                Err(_) => ApiError::deadline(deadline.ms).into_response(),
            };
            response.map(|body| Body::new(Held { body, _place: place }))
        }
        Err(error) => refuse(&app, request, error).await,
    };
    if let Some(tenant) = tenant {
        tell(&tenant.quota.standing(Instant::now()), response.headers_mut());
    }
    response
}

/// What a request goes in with.
struct Entered {
    deadline: Deadline,
    /// Held until the answer has been sent, if the request counts.
    place: Option<Place>,
}

fn enter(app: &App, request: &mut Request<Body>, tenant: Option<&Arc<Tenant>>) -> Result<Entered, ApiError> {
    let asked = timeout_ms(request.headers())?;
    // Looking at models and figures costs nothing; what is posted does.
    let counts = *request.method() == Method::POST;
    let place = tenant.filter(|_| counts).map(|tenant| begin(app, tenant)).transpose()?;
    let identity = request.extensions_mut().get_mut::<Identity>();
    // The frame around the door puts it there.
    let identity = identity.ok_or_else(|| ApiError::internal("no id"))?;
    identity.tenant = tenant.cloned();
    if let Some(ms) = asked {
        identity.deadline = Deadline::after(identity.arrived, ms);
    }
    Ok(Entered { deadline: identity.deadline, place })
}

fn begin(app: &App, tenant: &Arc<Tenant>) -> Result<Place, ApiError> {
    let key = KeyLabels { key: tenant.name.clone() };
    let entered = tenant.quota.enter(Instant::now());
    match &entered {
        Ok(_) => app.instruments.key_requests.get_or_create(&key).inc(),
        Err(refusal) => {
            let refusal = KeyRefusal { limit: refusal.limit.name() };
            app.instruments.key_refusals.get_or_create(&(key, refusal)).inc()
        }
    };
    entered.map_err(|refusal| too_many(&refusal))
}

fn too_many(refusal: &Refusal) -> ApiError {
    let Refusal { limit, most, wait } = refusal;
    let seconds = wait.as_millis().div_ceil(1000).max(1);
    let reached = match limit {
        Limit::Requests => format!("{most} requests a minute"),
        Limit::Tokens => format!("{most} tokens a minute"),
        Limit::Concurrency => format!("{most} requests at a time"),
    };
    let text = format!("This key's limit of {reached} is reached; try again in {seconds} s.");
    ApiError::too_many_requests(text).retry_after(Some(*wait))
}

fn timeout_ms(headers: &HeaderMap) -> Result<Option<u64>, ApiError> {
    let Some(value) = headers.get(TIMEOUT_MS) else { return Ok(None) };
    let ms = value.to_str().ok().and_then(|text| text.trim().parse().ok());
    match ms.filter(|ms| (1..=MAX_TIMEOUT_MS).contains(ms)) {
        Some(ms) => Ok(Some(ms)),
        None => {
            let text = format!("it is not a whole number of milliseconds from 1 to {MAX_TIMEOUT_MS}");
            Err(ApiError::invalid_value(TIMEOUT_MS, text))
        }
    }
}

/// Answers without a handler. What of the body is on its way is read, since a connection that is closed over unread
/// bytes is reset, and its sender would never see the answer.
async fn refuse(app: &App, request: Request<Body>, error: ApiError) -> Response {
    discard(&app.config, request.into_body()).await;
    error.into_response()
}

fn tell(standing: &[Option<Standing>; 2], headers: &mut HeaderMap) {
    for (names, standing) in HEADERS.iter().zip(standing) {
        let Some(Standing { limit, remaining, reset }) = standing else { continue };
        let [limit_name, remaining_name, reset_name] = names.clone();
        headers.insert(limit_name, HeaderValue::from(*limit));
        headers.insert(remaining_name, HeaderValue::from(*remaining));
        if let Ok(value) = HeaderValue::try_from(written(*reset)) {
            headers.insert(reset_name, value);
        }
    }
}

/// A duration as OpenAI writes it: `120ms`, `1.5s`, `6m0s`.
fn written(duration: Duration) -> String {
    let ms = duration.as_millis();
    match ms {
        0..1000 => format!("{ms}ms"),
        1000..60_000 => format!("{}s", ms as f64 / 1000.0),
        _ => format!("{}m{}s", ms / 60_000, ms % 60_000 / 1000),
    }
}

/// A body that holds a key's place until it has been sent or dropped.
struct Held {
    body: Body,
    _place: Option<Place>,
}

impl HttpBody for Held {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_written_as_clients_read_them() {
        let written = [0, 17, 1000, 1500, 59_999, 60_000, 361_200].map(|ms| written(Duration::from_millis(ms)));
        assert_eq!(written, ["0ms", "17ms", "1s", "1.5s", "59.999s", "1m0s", "6m1s"]);
    }
}
