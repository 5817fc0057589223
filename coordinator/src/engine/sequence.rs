//! One completion: its tokens, its limits, and how far the ranks have been asked to go with it.

use std::time::Duration;

use phalanx_proto::{
    ids::{SequenceId, TokenId},
    plan::{Admission, Slice},
    v1::FinishReason,
};

use super::{
    Request,
    kv::{Blocks, KvCache, KvShape, Table},
    prefix::{Hit, PrefixKeys},
    queue::Standing,
    tenants::TenantKey,
};

/// A sequence that was preempted this often goes before all others, so that it gets done.
const SHIELDED_AFTER: u32 = 4;
/// What a request without a limit of its own counts for in the queue, beside its prompt: few answers are longer, and
/// counting what the context leaves would let a handful of requests fill any queue.
const OPEN_OUTPUT_TOKENS: usize = 2048;

/// A live sequence, waiting or running.
#[derive(Debug)]
pub(super) struct Sequence {
    pub(super) id: SequenceId,
    pub(super) tenant: TenantKey,
    /// What it counts for in the queue: prompt and most output.
    pub(super) queue_tokens: usize,
    /// Positions that its tenant has been charged for, from the first one on: what is computed again costs nothing.
    charged: usize,
    pub(super) request: Request,
    /// Prompt, then every output token that is known here.
    pub(super) tokens: Vec<TokenId>,
    /// Length of `tokens` at which it ends.
    pub(super) limit: usize,
    pub(super) submitted: Duration,
    pub(super) keys: PrefixKeys,
    /// Prompt tokens that the first admission found in the prefix cache; `None` until then.
    pub(super) cached_tokens: Option<usize>,
    pub(super) preemptions: u32,
    /// Prompt positions whose log-probabilities were delivered; position 0 has none.
    pub(super) prompt_reported: usize,
    /// Where it stands on the ranks; `None` while it waits.
    pub(super) run: Option<Run>,
    /// Its slices whose results are not known yet. May be above 0 while it waits again.
    pub(super) slices_in_flight: usize,
    /// How many of them sample a token.
    pub(super) samples_in_flight: usize,
}

/// What the ranks hold of a running sequence.
#[derive(Debug)]
pub(super) struct Run {
    pub(super) table: Table,
    /// Positions that were given out for computation, all of them before this one.
    pub(super) planned: usize,
    /// Tokens it was admitted with: up to here it prefills, from here on it decodes.
    pub(super) prefill_end: usize,
    /// Full blocks that were offered to the prefix cache.
    pub(super) remembered: usize,
}

impl Sequence {
    /// A sequence that waits.
    pub(super) fn new(id: SequenceId, tenant: TenantKey, request: Request, limit: usize, now: Duration) -> Self {
        let tokens = [request.prompt.as_slice(), &request.resume].concat();
        // Who holds output tokens already has read what was reported of the prompt.
        let prompt_reported = if request.resume.is_empty() { 1 } else { request.prompt.len() };
        let keys = PrefixKeys::new(&request.cache_salt);
        let queue_tokens = queue_tokens(&request, limit);
        Self {
            id,
            tenant,
            queue_tokens,
            charged: 0,
            request,
            tokens,
            limit,
            submitted: now,
            keys,
            cached_tokens: None,
            preemptions: 0,
            prompt_reported,
            run: None,
            slices_in_flight: 0,
            samples_in_flight: 0,
        }
    }

    /// Its place among others.
    pub(super) fn standing(&self) -> Standing {
        Standing::new(self.preemptions >= SHIELDED_AFTER, self.request.priority, self.id)
    }

    /// Whether it has been on the ranks, under this coordinator or one before.
    pub(super) fn was_served(&self) -> bool {
        self.cached_tokens.is_some() || !self.request.resume.is_empty()
    }

    /// Length up to which it keeps room when others are admitted: what it has to compute, and as many output tokens again
    /// as it has produced, at least `horizon` and never more than it may. Answers are mostly much shorter than their
    /// limits, so that keeping room for these would leave the ranks idle; and since the claim doubles with the length, a
    /// long answer outgrows it only a few times. What fits into `horizon` is never preempted for want of room.
    pub(super) fn claimed_len(&self, horizon: usize) -> usize {
        // The token sampled last is not computed.
        let rest = (self.limit - 1).saturating_sub(self.tokens.len());
        let growth = if horizon == 0 { 0 } else { horizon.max(self.completion_tokens()) };
        self.tokens.len() + growth.min(rest)
    }

    /// Blocks that it may still take, as far as room is kept for it.
    pub(super) fn claim(&self, kv: &KvCache, horizon: usize) -> Blocks {
        self.run.as_ref().map_or_else(Blocks::default, |run| {
            // A shared block that leaves the window makes no room for the next one.
            let own = kv.sliding_unshared(&run.table);
            kv.shape().need_in_chunks(run.table.reach(), own, self.claimed_len(horizon))
        })
    }

    /// Tokens up to `end` that its tenant has to be charged for now.
    pub(super) fn take_charge(&mut self, end: usize) -> usize {
        let fresh = end.saturating_sub(self.charged);
        self.charged = self.charged.max(end);
        fresh
    }

    /// Output tokens known so far, resumed ones included.
    pub(super) fn completion_tokens(&self) -> usize {
        self.tokens.len() - self.request.prompt.len()
    }

    /// Whether it must not share what others computed: its prompt's logits are wanted.
    pub(super) fn must_compute_prompt(&self) -> bool {
        self.request.sampling.prompt_logprobs.is_some()
    }

    /// Whether the prompt's logits are still wanted although nothing is left to sample.
    pub(super) fn wants_only_prompt(&self) -> bool {
        self.must_compute_prompt() && self.request.resume.is_empty()
    }

    /// Length once the plans in flight have been carried out, should none of them end it.
    pub(super) fn expected_len(&self) -> usize {
        self.tokens.len() + self.samples_in_flight
    }

    /// Whether part of what it was admitted with has not been given out.
    pub(super) fn is_prefilling(&self) -> bool {
        self.run.as_ref().is_some_and(|run| run.planned < run.prefill_end)
    }

    /// Whether there is a token to feed and another one to sample after it.
    pub(super) fn can_decode(&self) -> bool {
        let len = self.expected_len();
        len < self.limit && self.run.as_ref().is_some_and(|run| (run.prefill_end..len).contains(&run.planned))
    }

    /// Blocks that its next token takes.
    pub(super) fn next_need(&self, shape: &KvShape) -> Blocks {
        match &self.run {
            Some(run) if self.is_prefilling() || self.can_decode() => run.table.need(shape, run.planned + 1),
            _ => Blocks::default(),
        }
    }

    /// Puts it on the ranks, from the end of `hit` on.
    pub(super) fn admit(&mut self, hit: Hit, kv: &mut KvCache) -> Admission {
        let planned = hit.blocks * kv.shape().block_size;
        self.charged = self.charged.max(planned);
        let (remembered, prefill_end) = (hit.blocks, self.tokens.len());
        self.run = Some(Run { table: kv.share(hit), planned, prefill_end, remembered });
        Admission {
            sequence: self.id,
            tokens: self.tokens.clone(),
            prompt_tokens: self.request.prompt.len(),
            sampling: self.request.sampling.clone(),
            stop_tokens: self.request.stop_tokens.clone(),
            traceparent: self.request.traceparent.clone(),
        }
    }

    /// Gives out positions up to `end`, with the blocks they need.
    pub(super) fn plan_slice(&mut self, end: usize, kv: &mut KvCache) -> Option<Slice> {
        let sample = end == self.expected_len() && end < self.limit;
        let run = self.run.as_mut()?;
        let first_position = std::mem::replace(&mut run.planned, end);
        kv.grow(&mut run.table, end);
        let (full_blocks, sliding_blocks) = run.table.name_new();
        self.slices_in_flight += 1;
        self.samples_in_flight += usize::from(sample);
        let num_tokens = end - first_position;
        Some(Slice { sequence: self.id, first_position, num_tokens, full_blocks, sliding_blocks, sample })
    }

    /// Offers to the prefix cache every block whose positions have been given out and whose tokens are known. Plans run
    /// in order, so whoever shares it in a later plan finds it computed.
    pub(super) fn remember_blocks(&mut self, kv: &mut KvCache) {
        let Some(run) = &mut self.run else { return };
        let size = kv.shape().block_size;
        let filled = run.planned.min(self.tokens.len()) / size;
        if filled > run.remembered {
            self.keys.extend(&self.tokens, size);
            for index in run.remembered..filled {
                kv.remember(&run.table, index, &self.keys, &self.tokens);
            }
            run.remembered = filled;
        }
    }

    /// Appends a sampled token, and says whether that ends the sequence.
    pub(super) fn push(&mut self, token: TokenId) -> Option<FinishReason> {
        let before = self.completion_tokens();
        self.tokens.push(token);
        let sampling = &self.request.sampling;
        let may_stop = !sampling.ignore_eos && before >= sampling.min_tokens as usize;
        if may_stop && self.request.stop_tokens.contains(&token) {
            return Some(FinishReason::Stop);
        }
        (self.tokens.len() >= self.limit).then_some(FinishReason::Length)
    }

    /// Why there is nothing left to sample, if that is so: a resumed completion may have been whole.
    pub(super) fn finished_already(&self) -> Option<FinishReason> {
        let sampling = &self.request.sampling;
        let last = self.request.resume.last();
        let counted = self.request.resume.len() > sampling.min_tokens as usize;
        if !sampling.ignore_eos && counted && last.is_some_and(|token| self.request.stop_tokens.contains(token)) {
            return Some(FinishReason::Stop);
        }
        (self.tokens.len() >= self.limit).then_some(FinishReason::Length)
    }
}

/// What a request counts for in the queue, when it ends at length `limit`.
fn queue_tokens(request: &Request, limit: usize) -> usize {
    if request.max_tokens.is_some() { limit } else { limit.min(request.prompt.len() + OPEN_OUTPUT_TOKENS) }
}
