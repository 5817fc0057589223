//! What is let in: configurations that can work, and requests that can be carried out.

use phalanx_proto::{
    fault::{Fault, FaultKind},
    sampling::MAX_STOP_TOKENS,
};

use super::{Engine, Request, kv::KvShape};

/// Limits and the model's shape, as far as scheduling depends on them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EngineConfig {
    /// Tokens a KV block.
    pub block_size: usize,
    /// Positions that a query of a sliding layer sees, its own included.
    pub sliding_window: usize,
    /// Whether the model has layers of full attention.
    pub has_full_layers: bool,
    /// Whether the model has sliding-window layers.
    pub has_sliding_layers: bool,
    /// Most tokens of prompt and output together.
    pub max_model_len: usize,
    /// Most tokens of one plan; at least `max_num_seqs`, so that every running sequence can go on in each step.
    pub max_num_batched_tokens: usize,
    /// Most sequences on the ranks.
    pub max_num_seqs: usize,
    /// Most requests beyond `max_num_seqs` that are kept; more are refused.
    pub max_num_queued_reqs: usize,
    /// Most plans in flight.
    pub window: usize,
    /// Whether equal beginnings are computed once.
    pub enable_prefix_caching: bool,
}

impl EngineConfig {
    /// What decides how many blocks are needed.
    pub(super) fn shape(&self) -> KvShape {
        KvShape {
            block_size: self.block_size,
            sliding_window: self.sliding_window,
            has_full_layers: self.has_full_layers,
            has_sliding_layers: self.has_sliding_layers,
        }
    }

    /// Names the first field that is out of range.
    pub(super) fn check(&self) -> Result<(), Fault> {
        let sizes = [
            ("block_size", self.block_size),
            ("sliding_window", self.sliding_window),
            ("max_model_len", self.max_model_len),
            ("max_num_seqs", self.max_num_seqs),
            ("window", self.window),
        ];
        if let Some((field, _)) = sizes.into_iter().find(|(_, size)| *size == 0) {
            return Err(Fault::invalid(field, format!("{field} is 0, expected at least 1")));
        }
        let (tokens, seqs) = (self.max_num_batched_tokens, self.max_num_seqs);
        if tokens < seqs {
            let text = format!("max_num_batched_tokens is {tokens}, expected at least max_num_seqs, which is {seqs}");
            return Err(Fault::invalid("max_num_batched_tokens", text));
        }
        if !self.has_full_layers && !self.has_sliding_layers {
            return Err(Fault::invalid("layer_types", "the model has neither full nor sliding layers"));
        }
        Ok(())
    }
}

impl Engine {
    /// Checks a request, and says at which length of prompt and output it ends.
    pub(super) fn check_request(&self, request: &Request) -> Result<usize, Fault> {
        let (prompt, resume, stop) = (request.prompt.len(), request.resume.len(), request.stop_tokens.len());
        if prompt == 0 {
            return Err(Fault::invalid("prompt", "prompt is empty, expected at least one token"));
        }
        if stop > MAX_STOP_TOKENS {
            let text = format!("stop_token_ids has {stop} entries, expected at most {MAX_STOP_TOKENS}");
            return Err(Fault::invalid("stop_token_ids", text));
        }
        if let Some(max_tokens) = request.max_tokens.filter(|&max_tokens| resume > max_tokens) {
            let text = format!("resume has {resume} tokens, expected at most max_tokens, which is {max_tokens}");
            return Err(Fault::invalid("resume", text));
        }
        let limit = self.limit(request)?;
        let most = self.config.max_num_seqs + self.config.max_num_queued_reqs;
        if self.sequences.len() >= most {
            let text =
                format!("{most} requests are running or queued, which is the most that are kept; try again later");
            return Err(Fault::new(FaultKind::QueueFull, text));
        }
        Ok(limit)
    }

    /// Length of prompt and output at which a request ends.
    pub(super) fn limit(&self, request: &Request) -> Result<usize, Fault> {
        let (prompt, context) = (request.prompt.len(), self.config.max_model_len);
        // The token sampled last is not computed, so the cache may end one before it.
        let (shape, capacity) = (self.config.shape(), self.capacity);
        let cache = capacity.map_or(usize::MAX, |capacity| shape.most_positions(capacity).saturating_add(1));
        let wanted = prompt.saturating_add(request.max_tokens.unwrap_or(1));
        let too_long =
            |text: String| Fault { field: "max_tokens".into(), ..Fault::new(FaultKind::ContextLength, text) };
        if wanted > context {
            let output = wanted - prompt;
            let text = format!(
                "prompt of {prompt} tokens and output of {output} make {wanted}, the context is {context}: shorten the \
                 prompt or lower max_tokens"
            );
            return Err(too_long(text));
        }
        let computed = prompt.max(wanted - 1);
        if let Some(capacity) = capacity
            && !capacity.covers(shape.alone(computed))
        {
            let (need, size) = (shape.alone(computed), shape.block_size);
            let text = format!(
                "prompt of {prompt} tokens and output of {} need {} full and {} sliding KV blocks of {size} tokens, the \
                 cache has {} and {}: shorten the prompt, lower max_tokens, or give the KV cache more memory",
                wanted - prompt,
                need.full,
                need.sliding,
                capacity.full,
                capacity.sliding
            );
            return Err(too_long(text));
        }
        Ok(if request.max_tokens.is_some() { wanted } else { context.min(cache) })
    }
}
