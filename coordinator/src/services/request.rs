//! From the wire's `GenerateRequest` to a request that the engine can take: after this, nothing in it is out of range.

use std::num::NonZeroU32;

use phalanx_proto::{
    fault::{Fault, FaultKind},
    ids::TokenId,
    sampling::{MAX_STOP_TOKENS, SamplingSettings},
    v1,
};

use super::draw;
use crate::{
    config::Deployment,
    engine::{MAX_WEIGHT, Request, Tenant},
};

/// Longest request id and cache salt, in bytes.
const MAX_NAME_BYTES: usize = 256;
/// Longest tenant id, in bytes.
const MAX_TENANT_BYTES: usize = 64;

/// Checks a message against the model it is for. `traceparent` names the span that the ranks' spans belong to.
///
/// # Errors
/// Names the first field that is at fault.
pub(super) fn check(
    message: v1::GenerateRequest,
    deployment: &Deployment,
    traceparent: String,
) -> Result<Request, Fault> {
    let vocab_size = deployment.checkpoint.geometry.vocab_size;
    let context = deployment.demand.max_model_len;
    if message.prompt.is_empty() {
        return Err(Fault::invalid("prompt", "prompt is empty, expected at least one token"));
    }
    let length = message.prompt.len() + message.resume.len();
    if length > context {
        let text = format!("the prompt has {length} tokens, the context is {context}: shorten the prompt");
        return Err(Fault { field: "prompt".into(), ..Fault::new(FaultKind::ContextLength, text) });
    }
    let stop = message.stop_token_ids.len();
    if stop > MAX_STOP_TOKENS {
        let text = format!("stop_token_ids has {stop} entries, expected at most {MAX_STOP_TOKENS}");
        return Err(Fault::invalid("stop_token_ids", text));
    }
    short("request_id", &message.request_id, MAX_NAME_BYTES)?;
    short("cache_salt", &message.cache_salt, MAX_NAME_BYTES)?;
    let tenant = tenant(message.tenant.unwrap_or_default())?;
    let sampling = SamplingSettings::check(&message.sampling.unwrap_or_default(), vocab_size, draw())?;
    if let Some(most) = message.max_tokens.filter(|&most| sampling.min_tokens > most) {
        let text = format!("min_tokens is {}, expected at most max_tokens, which is {most}", sampling.min_tokens);
        return Err(Fault::invalid("min_tokens", text));
    }
    let request_id =
        if message.request_id.is_empty() { format!("gen-{:016x}{:016x}", draw(), draw()) } else { message.request_id };
    Ok(Request {
        request_id,
        prompt: tokens("prompt", message.prompt, vocab_size)?,
        resume: tokens("resume", message.resume, vocab_size)?,
        max_tokens: message.max_tokens.map(|most| most as usize),
        stop_tokens: tokens("stop_token_ids", message.stop_token_ids, vocab_size)?,
        sampling,
        tenant,
        priority: message.priority,
        cache_salt: message.cache_salt,
        traceparent,
    })
}

fn short(field: &str, text: &str, most: usize) -> Result<(), Fault> {
    if text.len() <= most {
        return Ok(());
    }
    Err(Fault::invalid(field, format!("{field} is {} bytes long, expected at most {most}", text.len())))
}

fn tenant(message: v1::Tenant) -> Result<Tenant, Fault> {
    short("tenant.id", &message.id, MAX_TENANT_BYTES)?;
    if message.weight > MAX_WEIGHT {
        let text = format!("tenant.weight is {}, expected at most {MAX_WEIGHT}", message.weight);
        return Err(Fault::invalid("tenant.weight", text));
    }
    let weight = NonZeroU32::new(message.weight).unwrap_or(NonZeroU32::MIN);
    Ok(Tenant { id: message.id, weight })
}

fn tokens(field: &str, ids: Vec<u32>, vocab_size: usize) -> Result<Vec<TokenId>, Fault> {
    if let Some(id) = ids.iter().find(|&&id| id as usize >= vocab_size) {
        let text = format!("{field} has token {id}, expected less than the vocabulary's {vocab_size}");
        return Err(Fault::invalid(field, text));
    }
    Ok(ids.into_iter().map(TokenId).collect())
}
