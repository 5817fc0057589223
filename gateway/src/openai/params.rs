//! What the bodies of chat and text completions have in common: sampling, limits, streaming.

use std::collections::BTreeMap;

use serde_json::Value;

use super::{
    error::ApiError,
    fields::{Fields, integer_of, number_of},
};

/// Most choices of one request.
pub(crate) const MAX_CHOICES: u32 = 16;
/// Most stop strings, and the longest one in bytes.
const MAX_STOP: (usize, usize) = (16, 256);
/// Most stop tokens; the coordinator takes 64, the model's own among them.
const MAX_STOP_TOKENS: usize = 48;
/// Most entries of a logit bias.
const MAX_LOGIT_BIAS: usize = 1024;
/// Longest cache salt, in bytes.
const MAX_CACHE_SALT: usize = 256;

/// How tokens are chosen; absent values are the profile's, then the model card's.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct SamplingParams {
    pub(crate) temperature: Option<f32>,
    pub(crate) top_p: Option<f32>,
    pub(crate) top_k: Option<u32>,
    pub(crate) min_p: Option<f32>,
    pub(crate) presence_penalty: Option<f32>,
    pub(crate) frequency_penalty: Option<f32>,
    pub(crate) repetition_penalty: Option<f32>,
    pub(crate) logit_bias: BTreeMap<u32, f32>,
    pub(crate) seed: Option<i64>,
    pub(crate) min_tokens: u32,
    pub(crate) ignore_eos: bool,
}

/// What to send while streaming beside the text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct StreamOptions {
    pub(crate) include_usage: bool,
    pub(crate) continuous_usage_stats: bool,
}

/// The parameters that both endpoints share.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Params {
    pub(crate) model: Option<String>,
    pub(crate) profile: Option<String>,
    pub(crate) max_tokens: Option<u32>,
    pub(crate) sampling: SamplingParams,
    pub(crate) n: u32,
    pub(crate) stop: Vec<String>,
    pub(crate) stop_token_ids: Vec<u32>,
    /// `None`: one body instead of a stream.
    pub(crate) stream: Option<StreamOptions>,
    pub(crate) return_token_ids: bool,
    pub(crate) priority: Option<i32>,
    pub(crate) cache_salt: String,
    /// Places of what was accepted but has no effect.
    pub(crate) ignored: Vec<String>,
}

impl Params {
    /// Takes the shared parameters; `least_max_tokens` is the least that `max_tokens` may be.
    pub(crate) fn take(fields: &mut Fields, least_max_tokens: u32) -> Result<Self, ApiError> {
        refuse_unsupported(fields)?;
        let mut params = Self {
            model: fields.string("model")?,
            profile: fields.string("profile")?,
            max_tokens: fields.count("max_tokens", least_max_tokens, u32::MAX)?,
            sampling: SamplingParams::take(fields)?,
            n: fields.count("n", 1, MAX_CHOICES)?.unwrap_or(1),
            stop: stop_strings(fields)?,
            stop_token_ids: stop_tokens(fields)?,
            stream: stream_options(fields)?,
            return_token_ids: fields.boolean("return_token_ids")?.unwrap_or(false),
            priority: priority(fields)?,
            cache_salt: cache_salt(fields)?,
            ignored: Vec::new(),
        };
        params.take_without_effect(fields)?;
        Ok(params)
    }

    /// Checks the type of what OpenAI knows and Phalanx has no use for.
    fn take_without_effect(&mut self, fields: &mut Fields) -> Result<(), ApiError> {
        let mut note = |name: &str, given: bool| {
            if given {
                self.ignored.push(name.to_owned());
            }
        };
        note("user", fields.string("user")?.is_some());
        note("service_tier", fields.string("service_tier")?.is_some());
        note("metadata", fields.object("metadata")?.is_some());
        // Nothing is stored, so only a wish to store goes unfulfilled.
        note("store", fields.boolean("store")?.unwrap_or(false));
        Ok(())
    }
}

impl SamplingParams {
    fn take(fields: &mut Fields) -> Result<Self, ApiError> {
        Ok(Self {
            temperature: fields.number("temperature", 0.0..=2.0)?,
            top_p: above_zero(fields, "top_p", 1.0)?,
            top_k: top_k(fields)?,
            min_p: fields.number("min_p", 0.0..=1.0)?,
            presence_penalty: fields.number("presence_penalty", -2.0..=2.0)?,
            frequency_penalty: fields.number("frequency_penalty", -2.0..=2.0)?,
            repetition_penalty: above_zero(fields, "repetition_penalty", 2.0)?,
            logit_bias: logit_bias(fields)?,
            seed: fields.integer("seed", i64::MIN..=i64::MAX)?,
            min_tokens: fields.count("min_tokens", 0, u32::MAX)?.unwrap_or(0),
            ignore_eos: fields.boolean("ignore_eos")?.unwrap_or(false),
        })
    }
}

/// What would change the answer if it were passed over.
fn refuse_unsupported(fields: &mut Fields) -> Result<(), ApiError> {
    const GRAMMAR: &str = "constrained decoding is not available yet";
    for name in ["guided_json", "guided_regex", "guided_grammar", "guided_choice", "structured_outputs"] {
        fields.refuse(name, GRAMMAR)?;
    }
    fields.refuse("prompt_logprobs", "use `echo` with `logprobs` on /v1/completions")?;
    fields.refuse("truncate_prompt_tokens", "prompts are never cut")?;
    fields.refuse("use_beam_search", "there is no beam search")?;
    fields.refuse("logits_processors", "there are no custom processors; use `logit_bias`")?;
    if fields.boolean("include_stop_str_in_output")?.unwrap_or(false) {
        return Err(ApiError::unsupported("include_stop_str_in_output", "stop strings are always cut"));
    }
    Ok(())
}

fn above_zero(fields: &mut Fields, name: &str, most: f64) -> Result<Option<f32>, ApiError> {
    match fields.number(name, 0.0..=most)? {
        Some(value) if value <= 0.0 => {
            Err(ApiError::invalid_value(name, format!("{value} is out of range; expected more than 0")))
        }
        value => Ok(value),
    }
}

/// vLLM writes -1 for "no limit", Phalanx and others 0.
fn top_k(fields: &mut Fields) -> Result<Option<u32>, ApiError> {
    let value = fields.integer("top_k", -1..=i64::from(u32::MAX))?;
    Ok(value.map(|value| u32::try_from(value).unwrap_or(0)))
}

fn logit_bias(fields: &mut Fields) -> Result<BTreeMap<u32, f32>, ApiError> {
    const NAME: &str = "logit_bias";
    let entries = match fields.value(NAME) {
        None => return Ok(BTreeMap::new()),
        Some(Value::Object(entries)) => entries,
        Some(other) => return Err(ApiError::invalid_type(NAME, "an object", &other)),
    };
    if entries.len() > MAX_LOGIT_BIAS {
        let text = format!("it has {} entries, expected at most {MAX_LOGIT_BIAS}", entries.len());
        return Err(ApiError::invalid_value(NAME, text));
    }
    let bias_of = |(token, bias): (&String, &Value)| {
        let id = token.parse::<u32>();
        let id = id.map_err(|_| ApiError::invalid_value(NAME, format!("its key '{token}' is not a token id")))?;
        Ok((id, number_of(&format!("{NAME}.{id}"), bias, &(-100.0..=100.0))?))
    };
    entries.iter().map(bias_of).collect()
}

fn stop_strings(fields: &mut Fields) -> Result<Vec<String>, ApiError> {
    let (most, longest) = MAX_STOP;
    let values = match fields.value("stop") {
        None => return Ok(Vec::new()),
        Some(Value::Array(values)) if values.len() > most => {
            let text = format!("it has {} items, expected at most {most}", values.len());
            return Err(ApiError::invalid_value("stop", text));
        }
        Some(Value::Array(values)) => values,
        Some(text @ Value::String(_)) => vec![text],
        Some(other) => return Err(ApiError::invalid_type("stop", "a string or an array of strings", &other)),
    };
    let check = |value: Value| match value {
        Value::String(text) if text.is_empty() => Err(ApiError::invalid_value("stop", "an empty string stops nothing")),
        Value::String(text) if text.len() > longest => {
            let text = format!("a string of {} bytes, expected at most {longest}", text.len());
            Err(ApiError::invalid_value("stop", text))
        }
        Value::String(text) => Ok(text),
        other => Err(ApiError::invalid_type("stop", "a string or an array of strings", &other)),
    };
    values.into_iter().map(check).collect()
}

fn stop_tokens(fields: &mut Fields) -> Result<Vec<u32>, ApiError> {
    let values = fields.array("stop_token_ids", MAX_STOP_TOKENS)?.unwrap_or_default();
    token_ids("stop_token_ids", &values)
}

/// An array of token ids; whether the vocabulary has them is for others to check.
pub(crate) fn token_ids(path: &str, values: &[Value]) -> Result<Vec<u32>, ApiError> {
    let id_of = |(at, value)| {
        let id = integer_of(&format!("{path}[{at}]"), value, &(0..=i64::from(u32::MAX)))?;
        Ok(u32::try_from(id).unwrap_or(u32::MAX))
    };
    values.iter().enumerate().map(id_of).collect()
}

fn stream_options(fields: &mut Fields) -> Result<Option<StreamOptions>, ApiError> {
    let stream = fields.boolean("stream")?.unwrap_or(false);
    let Some(mut options) = fields.object("stream_options")? else {
        return Ok(stream.then(StreamOptions::default));
    };
    if !stream {
        return Err(ApiError::invalid_value("stream_options", "it is only allowed when 'stream' is true"));
    }
    let include_usage = options.boolean("include_usage")?.unwrap_or(false);
    let continuous_usage_stats = options.boolean("continuous_usage_stats")?.unwrap_or(false);
    Ok(Some(StreamOptions { include_usage, continuous_usage_stats }))
}

fn priority(fields: &mut Fields) -> Result<Option<i32>, ApiError> {
    let value = fields.integer("priority", i64::from(i32::MIN)..=i64::from(i32::MAX))?;
    Ok(value.and_then(|value| i32::try_from(value).ok()))
}

fn cache_salt(fields: &mut Fields) -> Result<String, ApiError> {
    let salt = fields.string("cache_salt")?.unwrap_or_default();
    if salt.len() > MAX_CACHE_SALT {
        let text = format!("it has {} bytes, expected at most {MAX_CACHE_SALT}", salt.len());
        return Err(ApiError::invalid_value("cache_salt", text));
    }
    Ok(salt)
}
