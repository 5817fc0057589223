//! What is let in: configurations that can work, and requests that can be carried out.

use std::time::Duration;

use phalanx_proto::{
    fault::{Fault, FaultKind},
    sampling::MAX_STOP_TOKENS,
};

use super::{Engine, Request, kv::KvShape};

/// Shortest time after which it makes sense to ask again; the longest one is the longest wait in the queue.
const LEAST_RETRY: Duration = Duration::from_millis(100);
/// The time that is named before anything was measured.
const RETRY_UNMEASURED: Duration = Duration::from_secs(1);

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
    /// Most tokens that wait, prompts and outputs at most; more are refused. One request may always wait.
    pub max_queued_tokens: usize,
    /// Longest wait of a request that has never run; after it the request is refused.
    pub max_queue_age: Duration,
    /// Output tokens of each running sequence for which room is kept when others are admitted. 0: none.
    pub output_horizon: usize,
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
        if self.is_full() {
            return Err(self.queue_full());
        }
        Ok(limit)
    }

    /// Whether nobody else is taken in.
    pub(super) fn is_full(&self) -> bool {
        self.sequences.len() >= self.most_kept()
            || self.tenants.waiting_tokens() >= self.config.max_queued_tokens.max(1)
    }

    fn most_kept(&self) -> usize {
        self.config.max_num_seqs + self.config.max_num_queued_reqs
    }

    fn queue_full(&self) -> Fault {
        let text = if self.sequences.len() >= self.most_kept() {
            let most = self.most_kept();
            format!("{most} requests are running or queued, which is the most that are kept; try again later")
        } else {
            let (waiting, most) = (self.tenants.waiting_tokens(), self.config.max_queued_tokens);
            format!("{waiting} tokens wait to be served, from {most} on nobody else is taken in; try again later")
        };
        Fault::new(FaultKind::QueueFull, text).retry_after(self.retry_after())
    }

    /// Says that a request has waited for too long.
    pub(super) fn too_old(&self, waited: Duration) -> Fault {
        let text = format!(
            "the request waited for {:.0} s without being served, the longest wait is {:.0} s; try again later",
            waited.as_secs_f64(),
            self.config.max_queue_age.as_secs_f64()
        );
        Fault::new(FaultKind::QueueFull, text).retry_after(self.retry_after())
    }

    /// When somebody who is refused is likely to find a place: when a tenth of those that wait, at least one, has been
    /// served at the speed measured lately. Sooner they would only meet each other again.
    pub(super) fn retry_after(&self) -> Duration {
        let (least, most) = (LEAST_RETRY, self.config.max_queue_age.max(LEAST_RETRY));
        let Some(rate) = self.throughput.per_second() else { return RETRY_UNMEASURED.min(most) };
        let waiting = self.tenants.waiting().max(1);
        let share = (waiting / 10).max(1) as f64 / waiting as f64;
        let seconds = self.tenants.waiting_tokens() as f64 * share / rate;
        Duration::try_from_secs_f64(seconds).unwrap_or(most).clamp(least, most)
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
