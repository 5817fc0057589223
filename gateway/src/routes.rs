//! Which path leads to which handler.

use std::sync::Arc;

use axum::{
    Router,
    middleware::from_fn_with_state,
    routing::{get, post},
};
use http::{Method, StatusCode, Uri};

use crate::{
    app::App,
    frame::frame,
    handlers::{chat, completions, models, observe, tokens},
    openai::error::{ApiError, ErrorKind},
};

/// The whole API. Nothing allows other origins: browsers get no CORS headers.
pub(crate) fn router(app: Arc<App>) -> Router {
    let open = Router::new().route("/livez", get(observe::livez));
    let guarded = Router::new()
        .route("/", get(observe::root))
        .route("/v1/chat/completions", post(chat::create))
        .route("/v1/completions", post(completions::create))
        .route("/v1/models", get(models::list))
        .route("/v1/models/{*id}", get(models::retrieve))
        .route("/tokenize", post(tokens::tokenize))
        .route("/detokenize", post(tokens::detokenize))
        .route("/health", get(observe::readyz))
        .route("/readyz", get(observe::readyz))
        .route("/version", get(observe::version))
        .route("/stats", get(observe::stats))
        .route("/metrics", get(observe::metrics));
    // Authentication belongs here, as a `layer` on `guarded` with its fallbacks, so that no route can miss it.
    guarded
        .fallback(no_such_route)
        .method_not_allowed_fallback(no_such_method)
        .merge(open)
        .layer(from_fn_with_state(Arc::clone(&app), frame))
        .with_state(app)
}

async fn no_such_route(uri: Uri) -> ApiError {
    let text = format!("Unknown path: {}.", uri.path());
    ApiError::new(StatusCode::NOT_FOUND, ErrorKind::NotFound, "unknown_path", text)
}

async fn no_such_method(method: Method, uri: Uri) -> ApiError {
    let text = format!("{method} is not allowed for {}.", uri.path());
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, ErrorKind::InvalidRequest, "method_not_allowed", text)
}
