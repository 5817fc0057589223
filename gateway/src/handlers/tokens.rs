//! `/tokenize` and `/detokenize`.

use std::sync::Arc;

use axum::{Extension, Json, body::Body, extract::State};
use http::{Request, StatusCode};
use serde_json::{Value, json};

use super::{chat::Turn, prepare::Prepared};
use crate::{
    app::{App, Served},
    body::read_json,
    frame::Identity,
    openai::{
        error::ApiError,
        tokens::{TokenizeRequest, detokenize_tokens},
    },
};

/// Most tokens of one `/detokenize`: more do not fit into a body.
const MAX_TOKENS: usize = 4 << 20;

/// Turns text, or a rendered chat, into token ids.
pub(crate) async fn tokenize(
    State(app): State<Arc<App>>,
    Extension(identity): Extension<Identity>,
    request: Request<Body>,
) -> Result<Json<Value>, ApiError> {
    let body = read_json(&app.config, request).await?;
    let served = usable(&app, &identity)?;
    let (ids, with_names) = match TokenizeRequest::from_body(body)? {
        TokenizeRequest::Text { text, special, with_names } => {
            (encode(&app, text, special, &identity).await?, with_names)
        }
        TokenizeRequest::Chat { mut chat, with_names } => {
            let prepared = Prepared::new(&app, &identity, std::mem::take(&mut chat.params), "tok")?;
            (Turn::render(&app, &chat, &prepared, &identity.id).await?.prompt, with_names)
        }
    };
    let max_model_len = served.and_then(|served| served.load.deployment).map(|deployment| deployment.max_model_len);
    let names = with_names.then(|| ids.iter().map(|&id| app.harmony.tokenizer().decode(&[id])).collect::<Vec<_>>());
    Ok(Json(json!({ "count": ids.len(), "max_model_len": max_model_len, "tokens": ids, "token_strs": names })))
}

/// The model whose tokenizer this is. Text can be tokenized before there is one, but not by those who may not use it.
fn usable(app: &App, identity: &Identity) -> Result<Option<Served>, ApiError> {
    match app.model(None, identity.tenant.as_deref()) {
        Ok(served) => Ok(Some(served)),
        Err(error) if error.status == StatusCode::FORBIDDEN => Err(error),
        Err(_) => Ok(None),
    }
}

async fn encode(app: &App, text: String, special: bool, identity: &Identity) -> Result<Vec<u32>, ApiError> {
    let tokenizer = Arc::clone(app.harmony.tokenizer());
    let encode = move || if special { tokenizer.encode_with_special(&text) } else { tokenizer.encode_ordinary(&text) };
    tokio::task::spawn_blocking(encode).await.map_err(|error| {
        // Not the panic's own words, which may quote the text.
        tracing::error!(request_id = identity.id, panicked = error.is_panic(), "text could not be encoded");
        ApiError::internal(&identity.id)
    })
}

/// Turns token ids into text.
pub(crate) async fn detokenize(
    State(app): State<Arc<App>>,
    Extension(identity): Extension<Identity>,
    request: Request<Body>,
) -> Result<Json<Value>, ApiError> {
    usable(&app, &identity)?;
    let ids = detokenize_tokens(read_json(&app.config, request).await?, MAX_TOKENS)?;
    let tokenizer = app.harmony.tokenizer();
    if let Some(at) = ids.iter().position(|&id| tokenizer.token_bytes(id).is_none()) {
        let text = format!("{} is not a token of this model", ids[at]);
        return Err(ApiError::invalid_value(&format!("tokens[{at}]"), text));
    }
    Ok(Json(json!({ "prompt": tokenizer.decode(&ids) })))
}
