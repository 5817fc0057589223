//! What operators and load balancers ask.

use std::{sync::Arc, time::Instant};

use axum::{
    Extension, Json,
    extract::State,
    response::{IntoResponse, Response},
};
use http::{StatusCode, header};
use phalanx_proto::v1::DeploymentLoad;
use serde_json::{Value, json};

use crate::{
    app::{App, capitalized},
    frame::Identity,
    instruments::{KeyLabels, NO_PROFILE, size_name},
    openai::error::ApiError,
    routes::{OPEN, routes},
    upstream::state_name,
};

/// What [`metrics`] answers with; OpenMetrics is what Prometheus asks for first.
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Where to look next: every route, as the router has it.
pub(crate) async fn root() -> Json<Value> {
    let guarded = routes().into_iter().map(|route| format!("{} {}", route.method, route.path));
    let endpoints: Vec<_> = guarded.chain([format!("GET {OPEN}")]).collect();
    Json(json!({ "name": "phalanx", "version": env!("CARGO_PKG_VERSION"), "endpoints": endpoints }))
}

/// The process is alive.
pub(crate) async fn livez() -> StatusCode {
    StatusCode::OK
}

/// A request would be answered.
pub(crate) async fn readyz(State(app): State<Arc<App>>) -> Response {
    let fleet = app.upstream.fleet();
    if app.draining.is_cancelled() {
        return ApiError::unavailable("draining", "The gateway is shutting down.").into_response();
    }
    if fleet.is_ready() {
        // Requests are answered, so this is no reason to send them elsewhere; but somebody should know.
        let trouble: Vec<&str> = fleet.deployments.iter().map(|load| load.detail.as_str()).collect();
        return match trouble.concat().as_str() {
            "" => Json(json!({ "status": "ready" })),
            _ => Json(json!({ "status": "degraded", "detail": trouble.join("; ") })),
        }
        .into_response();
    }
    let fault = fleet.not_ready();
    ApiError::unavailable("not_ready", capitalized(&fault.message)).into_response()
}

/// Which version this is.
pub(crate) async fn version() -> Json<Value> {
    Json(json!({ "version": env!("CARGO_PKG_VERSION") }))
}

/// Metrics for Prometheus.
pub(crate) async fn metrics(
    State(app): State<Arc<App>>,
    Extension(identity): Extension<Identity>,
) -> Result<Response, ApiError> {
    let render = || {
        for tenant in app.access.tenants() {
            let key = KeyLabels { key: tenant.name.clone() };
            app.instruments.key_running.get_or_create(&key).set(f64::from(tenant.quota.running()));
        }
        app.instruments.write(&app.upstream.fleet(), app.served_as())
    };
    let page = app.metrics_page.get(render).map_err(|error| {
        tracing::error!(request_id = identity.id, %error, "metrics could not be written");
        ApiError::internal(&identity.id)
    })?;
    Ok(([(header::CONTENT_TYPE, OPEN_METRICS)], page).into_response())
}

/// Figures of the last minute, for people.
pub(crate) async fn stats(State(app): State<Arc<App>>) -> Json<Value> {
    let fleet = app.upstream.fleet();
    let mut body = app.stats.body(Instant::now());
    body["state"] = json!(fleet.state());
    body["keys"] = keys(&app);
    body["profile"] = json!(app.config.profiles.default_name().unwrap_or(NO_PROFILE));
    if let Some(load) = fleet.deployments.first() {
        let names = app.names(&fleet);
        describe(&mut body, load, names.first().map_or("", String::as_str));
    }
    Json(body)
}

/// What each key has asked for, by the name that its file gives it.
fn keys(app: &App) -> Value {
    let tenants = app.access.tenants().into_iter();
    let figures = tenants.map(|tenant| {
        let key = KeyLabels { key: tenant.name.clone() };
        let figures = json!({
            "running": tenant.quota.running(),
            "requests": app.instruments.key_requests.get_or_create(&key).get(),
            "refused": app.instruments.refusals_of(&key),
            "prompt_tokens": app.instruments.key_prompt_tokens.get_or_create(&key).get(),
            "generation_tokens": app.instruments.key_generation_tokens.get_or_create(&key).get(),
        });
        (tenant.name.clone(), figures)
    });
    Value::Object(figures.collect())
}

fn describe(body: &mut Value, load: &DeploymentLoad, name: &str) {
    let deployment = load.deployment.clone().unwrap_or_default();
    let share = if load.kv_blocks == 0 { 0.0 } else { load.kv_blocks_used as f64 / load.kv_blocks as f64 };
    body["model_id"] = json!(name);
    body["model_size"] = json!(size_name(deployment.parameters));
    body["parameters"] = json!(deployment.parameters);
    body["parallelism"] = json!(format!("{}{}", deployment.parallelism, deployment.world_size));
    body["world_size"] = json!(deployment.world_size);
    body["backend"] = json!(deployment.backend);
    body["max_model_len"] = json!(deployment.max_model_len);
    body["group"] = json!({ "state": state_name(load.state()), "detail": load.detail, "epoch": load.epoch });
    body["running"] = json!(load.running);
    body["waiting"] = json!(load.waiting);
    body["max_waiting"] = json!(load.max_waiting);
    body["kv_cache"] = json!({ "used_blocks": load.kv_blocks_used, "blocks": load.kv_blocks, "usage": share });
    let totals = load.totals.unwrap_or_default();
    body["totals"] = json!({
        "steps": totals.steps,
        "step_us": totals.step_us,
        "execute_us": totals.execute_us,
        "collective_us": totals.collective_us,
        "sample_us": totals.sample_us,
        "prompt_tokens": totals.prompt_tokens,
        "generation_tokens": totals.generation_tokens,
        "prefix_cache_queries": totals.prefix_cache_queries,
        "prefix_cache_hits": totals.prefix_cache_hits,
        "preemptions": totals.preemptions,
    });
    let ranks = load.ranks.iter().map(|rank| {
        json!({
            "rank": rank.rank,
            "host": rank.host,
            "device": rank.device,
            "weight_bytes": rank.weight_bytes,
            "loaded_bytes": rank.loaded_bytes,
            "kv_bytes": rank.kv_bytes,
        })
    });
    body["ranks"] = Value::Array(ranks.collect());
}
