//! Which path leads to which handler.

use std::sync::Arc;

use axum::{
    Router,
    middleware::from_fn_with_state,
    routing::{MethodRouter, get, post},
};
use http::{Method, StatusCode, Uri};

use crate::{
    access::guard,
    app::App,
    frame::frame,
    handlers::{chat, completions, models, observe, tokens},
    openai::error::{ApiError, ErrorKind},
};

/// One line of the API.
pub(crate) struct Route {
    pub(crate) method: &'static str,
    pub(crate) path: &'static str,
    handler: MethodRouter<Arc<App>>,
}

/// Every route that is behind the door. `GET /` shows them, and `/livez`, which is not.
pub(crate) fn routes() -> Vec<Route> {
    let read = |path, handler| Route { method: "GET", path, handler };
    let write = |path, handler| Route { method: "POST", path, handler };
    vec![
        read("/", get(observe::root)),
        write("/v1/chat/completions", post(chat::create)),
        write("/v1/completions", post(completions::create)),
        read("/v1/models", get(models::list)),
        read("/v1/models/{*id}", get(models::retrieve)),
        write("/tokenize", post(tokens::tokenize)),
        write("/detokenize", post(tokens::detokenize)),
        read("/health", get(observe::readyz)),
        read("/readyz", get(observe::readyz)),
        read("/version", get(observe::version)),
        read("/stats", get(observe::stats)),
        read("/metrics", get(observe::metrics)),
    ]
}

/// The one route that needs no key.
pub(crate) const OPEN: &str = "/livez";

/// The whole API. Nothing allows other origins: browsers get no CORS headers.
pub(crate) fn router(app: Arc<App>) -> Router {
    let add = |router: Router<Arc<App>>, route: Route| router.route(route.path, route.handler);
    // The door is around the fallbacks too: without a key nobody learns which paths there are.
    routes()
        .into_iter()
        .fold(Router::new(), add)
        .fallback(no_such_route)
        .method_not_allowed_fallback(no_such_method)
        .layer(from_fn_with_state(Arc::clone(&app), guard))
        .route(OPEN, get(observe::livez))
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
