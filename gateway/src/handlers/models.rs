//! `/v1/models` and `/v1/models/{id}`.

use std::sync::Arc;

use axum::{
    Extension, Json,
    extract::{Path, State},
};
use serde_json::{Value, json};

use crate::{
    app::{App, Served},
    frame::Identity,
    openai::error::ApiError,
};

/// Lists what is served to the owner of a key.
pub(crate) async fn list(
    State(app): State<Arc<App>>,
    Extension(identity): Extension<Identity>,
) -> Result<Json<Value>, ApiError> {
    let tenant = identity.tenant.as_deref();
    let names = app.names_for(&app.upstream.fleet(), tenant);
    let models = names.iter().map(|name| Ok(entry(&app, &app.model(Some(name), tenant)?)));
    let data = models.collect::<Result<Vec<_>, ApiError>>()?;
    Ok(Json(json!({ "object": "list", "data": data })))
}

/// Describes one model, under any of its names.
pub(crate) async fn retrieve(
    State(app): State<Arc<App>>,
    Extension(identity): Extension<Identity>,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    Ok(Json(entry(&app, &app.model(Some(&id), identity.tenant.as_deref())?)))
}

fn entry(app: &App, served: &Served) -> Value {
    let deployment = served.load.deployment.clone().unwrap_or_default();
    json!({
        "id": served.name,
        "object": "model",
        "created": app.started,
        "owned_by": "phalanx",
        "root": deployment.model,
        "parent": null,
        "max_model_len": deployment.max_model_len,
    })
}
