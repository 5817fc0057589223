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
};

/// A sequence that was preempted this often goes before all others, so that it gets done.
const SHIELDED_AFTER: u32 = 4;

/// A live sequence, waiting or running.
#[derive(Debug)]
pub(super) struct Sequence {
    pub(super) id: SequenceId,
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
    pub(super) fn new(id: SequenceId, request: Request, limit: usize, now: Duration) -> Self {
        let tokens = [request.prompt.as_slice(), &request.resume].concat();
        // Who holds output tokens already has read what was reported of the prompt.
        let prompt_reported = if request.resume.is_empty() { 1 } else { request.prompt.len() };
        let keys = PrefixKeys::new(&request.cache_salt);
        Self {
            id,
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
