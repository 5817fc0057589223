//! The bodies of `/tokenize` and `/detokenize`.

use serde_json::Value;

use super::{chat::ChatRequest, error::ApiError, fields::Fields, params::token_ids};

/// What to tokenize.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum TokenizeRequest {
    /// Text; with `special`, names of special tokens in it stand for these.
    Text { text: String, special: bool, with_names: bool },
    /// A conversation, rendered as `/v1/chat/completions` would.
    Chat { chat: Box<ChatRequest>, with_names: bool },
}

impl TokenizeRequest {
    /// Checks a body: `prompt`, or a chat request.
    pub(crate) fn from_body(body: Value) -> Result<Self, ApiError> {
        if body.get("messages").is_some() {
            let with_names = body.get("return_token_strs") == Some(&Value::Bool(true));
            return Ok(Self::Chat { chat: Box::new(ChatRequest::from_body(body)?), with_names });
        }
        let mut fields = Fields::of_body(body)?;
        let text = fields.required_string("prompt")?;
        let special = fields.boolean("add_special_tokens")?.unwrap_or(true);
        Ok(Self::Text { text, special, with_names: fields.boolean("return_token_strs")?.unwrap_or(false) })
    }
}

/// Takes the token ids to turn into text.
pub(crate) fn detokenize_tokens(body: Value, most: usize) -> Result<Vec<u32>, ApiError> {
    let mut fields = Fields::of_body(body)?;
    let values = fields.array("tokens", most)?.ok_or_else(|| ApiError::missing("tokens"))?;
    token_ids("tokens", &values)
}
