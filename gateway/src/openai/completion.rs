//! The body of `/v1/completions`.

use serde_json::Value;

use super::{
    error::ApiError,
    fields::Fields,
    params::{Params, token_ids},
};

/// Most prompts of one request.
const MAX_PROMPTS: usize = 64;
/// Most choices over all prompts.
const MAX_ALL_CHOICES: usize = 128;
/// Most alternatives beside a token.
const MAX_LOGPROBS: u32 = 20;

/// One prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Prompt {
    /// Text, in which names of special tokens stand for these.
    Text(String),
    /// Token ids, taken as they are.
    Tokens(Vec<u32>),
}

/// A completion request, checked.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct CompletionRequest {
    pub(crate) params: Params,
    pub(crate) prompts: Vec<Prompt>,
    pub(crate) echo: bool,
    /// Report log-probabilities, with this many alternatives.
    pub(crate) logprobs: Option<u32>,
    pub(crate) skip_special_tokens: bool,
}

impl CompletionRequest {
    /// Checks a body.
    pub(crate) fn from_body(body: Value) -> Result<Self, ApiError> {
        let mut fields = Fields::of_body(body)?;
        let prompts = take_prompts(&mut fields)?;
        if fields.string("suffix")?.is_some_and(|suffix| !suffix.is_empty()) {
            return Err(ApiError::unsupported("suffix", "the model cannot fill in a middle"));
        }
        fields.refuse("response_format", "constrained decoding is not available yet")?;
        let mut params = Params::take(&mut fields, 0)?;
        let best_of = fields.count("best_of", 1, super::params::MAX_CHOICES)?;
        if best_of.is_some_and(|best_of| best_of != params.n) {
            return Err(ApiError::unsupported("best_of", "it must equal 'n': every choice is returned"));
        }
        if prompts.len() * params.n as usize > MAX_ALL_CHOICES {
            let text = format!("prompts times 'n' is over {MAX_ALL_CHOICES}");
            return Err(ApiError::invalid_value("n", text));
        }
        let echo = fields.boolean("echo")?.unwrap_or(false);
        let logprobs = fields.count("logprobs", 0, MAX_LOGPROBS)?;
        let skip_special_tokens = fields.boolean("skip_special_tokens")?.unwrap_or(true);
        params.ignored.extend(fields.untaken());
        Ok(Self { params, prompts, echo, logprobs, skip_special_tokens })
    }
}

/// Text, a list of texts, token ids, or a list of lists of token ids.
fn take_prompts(fields: &mut Fields) -> Result<Vec<Prompt>, ApiError> {
    const EXPECTED: &str = "a string, an array of strings, an array of token ids, or an array of such arrays";
    let prompts = match fields.value("prompt").ok_or_else(|| ApiError::missing("prompt"))? {
        Value::String(text) => vec![Prompt::Text(text)],
        Value::Array(items) if items.first().is_some_and(Value::is_number) => {
            vec![Prompt::Tokens(token_ids("prompt", &items)?)]
        }
        Value::Array(items) if items.len() > MAX_PROMPTS => {
            let text = format!("it has {} prompts, expected at most {MAX_PROMPTS}", items.len());
            return Err(ApiError::invalid_value("prompt", text));
        }
        Value::Array(items) => {
            let prompt_of = |(at, item)| match item {
                Value::String(text) => Ok(Prompt::Text(text)),
                Value::Array(ids) => Ok(Prompt::Tokens(token_ids(&format!("prompt[{at}]"), &ids)?)),
                other => Err(ApiError::invalid_type(&format!("prompt[{at}]"), "a string or an array", &other)),
            };
            items.into_iter().enumerate().map(prompt_of).collect::<Result<_, _>>()?
        }
        other => return Err(ApiError::invalid_type("prompt", EXPECTED, &other)),
    };
    let is_empty = |prompt: &Prompt| match prompt {
        Prompt::Text(text) => text.is_empty(),
        Prompt::Tokens(ids) => ids.is_empty(),
    };
    if prompts.is_empty() || prompts.iter().any(is_empty) {
        return Err(ApiError::invalid_value("prompt", "it is empty; expected at least one token"));
    }
    Ok(prompts)
}
