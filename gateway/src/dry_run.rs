//! What a gateway makes of a request's body, without a server or a coordinator: for trying bodies offline.

use crate::{
    handlers::chat::chat_prompt,
    harmony::Harmony,
    openai::{
        chat::ChatRequest,
        completion::{CompletionRequest, Prompt},
        error::ApiError,
        tokens::{TokenizeRequest, detokenize_tokens},
    },
};

/// Most tokens of one `/detokenize`.
const MAX_TOKENS: usize = 4 << 20;

/// An endpoint with a body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// `/v1/chat/completions`.
    Chat,
    /// `/v1/completions`.
    Completions,
    /// `/tokenize`.
    Tokenize,
    /// `/detokenize`.
    Detokenize,
}

/// Why a body is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{status}: {message}")]
pub struct Refusal {
    /// The HTTP status.
    pub status: u16,
    /// What the client reads.
    pub message: String,
    /// The parameter at fault, as a path into the body.
    pub param: Option<String>,
}

impl From<ApiError> for Refusal {
    fn from(error: ApiError) -> Self {
        Self { status: error.status.as_u16(), message: error.message, param: error.param }
    }
}

/// Reads a body as the endpoint does; answers with the prompt's tokens (for `/detokenize`, those of the body).
///
/// # Errors
/// What the client would be told.
pub fn dry_run(endpoint: Endpoint, body: &[u8], harmony: &Harmony) -> Result<Vec<u32>, Refusal> {
    let body = serde_json::from_slice(body).map_err(ApiError::invalid_json)?;
    match endpoint {
        Endpoint::Chat => render(&ChatRequest::from_body(body)?, harmony),
        Endpoint::Completions => {
            let prompts = CompletionRequest::from_body(body)?.prompts;
            let tokens = |prompt| match prompt {
                Prompt::Text(text) => harmony.tokenizer().encode_with_special(&text),
                Prompt::Tokens(ids) => ids,
            };
            Ok(prompts.into_iter().flat_map(tokens).collect())
        }
        Endpoint::Tokenize => match TokenizeRequest::from_body(body)? {
            TokenizeRequest::Text { text, special: true, .. } => Ok(harmony.tokenizer().encode_with_special(&text)),
            TokenizeRequest::Text { text, .. } => Ok(harmony.tokenizer().encode_ordinary(&text)),
            TokenizeRequest::Chat { chat, .. } => render(&chat, harmony),
        },
        Endpoint::Detokenize => Ok(detokenize_tokens(body, MAX_TOKENS)?),
    }
}

fn render(chat: &ChatRequest, harmony: &Harmony) -> Result<Vec<u32>, Refusal> {
    let prompt = chat_prompt(chat, chat.reasoning_effort.unwrap_or_default(), None);
    Ok(harmony.render_chat(&prompt).map_err(|error| ApiError::invalid_value("messages", error))?)
}
