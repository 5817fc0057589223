//! What the next plan computes.
//!
//! 1. Room: each running sequence, the foremost first, claims the blocks of its next token. Where they will not be there
//!    even after the plans in flight, the hindmost sequence goes back to waiting.
//! 2. Decodes: every running sequence that has a token to feed.
//! 3. Prefills with what is left of the token budget, running and waiting ones together, by standing. They leave one block
//!    to each of these decodes. When one waits for room, nobody passes it.
//!
//! Whoever is foremost can always go on, so the engine cannot come to a standstill; and the oldest candidate goes first
//! after it has been overtaken a few times, so nobody starves.

use std::time::Duration;

use phalanx_proto::{ids::SequenceId, plan::Plan};
use rustc_hash::FxHashSet;

use super::{
    Engine,
    kv::Blocks,
    prefix::{BlockKey, Hit},
    queue::Standing,
    results::Flight,
    sequence::Sequence,
};

/// Plans in a row in which the oldest candidate may be passed by others.
const MAX_OVERTAKES: u32 = 8;

/// A plan in the making.
pub(super) struct Draft {
    plan: Plan,
    /// Tokens that still go in.
    budget: usize,
    /// Nobody else is admitted: the one whose turn it is waits for room.
    closed: bool,
    /// Blocks that prefills leave to the decodes of this plan.
    headroom: Blocks,
    /// Prefix blocks that this plan fills; later plans can share them, this one cannot.
    filling: FxHashSet<BlockKey>,
    /// Sequences that got a prefill slice.
    prefilled: Vec<SequenceId>,
}

impl Engine {
    /// Makes the next plan. `None`: the window is full, there is nothing to do, or no epoch is running.
    pub fn next_plan(&mut self, now: Duration) -> Option<Plan> {
        let epoch = self.epoch?;
        if self.in_flight.len() >= self.config.window {
            return None;
        }
        let plan = Plan { epoch, step: self.next_step, retire: Vec::new(), admit: Vec::new(), slices: Vec::new() };
        let mut draft = Draft {
            plan,
            budget: self.config.max_num_batched_tokens,
            closed: false,
            headroom: Blocks::default(),
            filling: FxHashSet::default(),
            prefilled: Vec::new(),
        };
        self.make_room();
        self.plan_decodes(&mut draft);
        self.plan_prefills(&mut draft, now);
        draft.plan.retire = std::mem::take(&mut self.retire);
        if draft.plan.retire.is_empty() && draft.plan.slices.is_empty() {
            return None;
        }
        self.launch(&draft.plan, now);
        Some(draft.plan)
    }

    /// Preempts from the rear until the next token of everyone before has its blocks, now or once the plans in flight are
    /// done.
    fn make_room(&mut self) {
        let mut claimed = Blocks::default();
        let mut index = 0;
        while let Some(standing) = self.running.get(index) {
            index += 1;
            if let Some(sequence) = self.sequences.get(&standing.sequence) {
                claimed += sequence.next_need(self.kv.shape());
            }
            while self.running.len() > index && !(self.kv.available() + self.kv.pending()).covers(claimed) {
                self.preempt_hindmost();
            }
        }
    }

    /// Sends the last running sequence back to the queue. What was sampled for it in plans in flight still counts.
    pub(super) fn preempt_hindmost(&mut self) {
        let Some(standing) = self.running.pop() else { return };
        let Some(sequence) = self.sequences.get_mut(&standing.sequence) else { return };
        let Some(run) = sequence.run.take() else { return };
        self.kv.let_go_all(run.table, self.next_step);
        sequence.preemptions += 1;
        self.waiting.insert(sequence.standing());
        self.retire.push(standing.sequence);
        self.totals.preemptions += 1;
    }

    fn plan_decodes(&mut self, draft: &mut Draft) {
        for index in 0..self.running.len() {
            let id = self.running[index].sequence;
            let Some(sequence) = self.sequences.get_mut(&id) else { continue };
            let has_room = self.kv.available().covers(sequence.next_need(self.kv.shape()));
            if !sequence.can_decode() || !has_room || draft.budget == 0 {
                continue;
            }
            let end = sequence.run.as_ref().map_or(0, |run| run.planned + 1);
            draft.plan.slices.extend(sequence.plan_slice(end, &mut self.kv));
            draft.budget -= 1;
        }
        // Those that stall are not counted: else a prefill could wait for them, and they for the blocks it holds.
        draft.headroom = self.kv.shape().each(draft.plan.slices.len());
    }

    fn plan_prefills(&mut self, draft: &mut Draft, now: Duration) {
        if self.plan_alone(draft, now) {
            return;
        }
        let prefilling: Vec<Standing> =
            self.running.iter().copied().filter(|standing| self.is_prefilling(standing.sequence)).collect();
        let oldest = prefilling.iter().map(|standing| standing.sequence).chain(self.waiting.oldest()).min();
        if let Some(oldest) = oldest.filter(|_| self.overtakes >= MAX_OVERTAKES) {
            if self.is_prefilling(oldest) {
                self.plan_chunk(oldest, draft);
            } else {
                draft.closed |= !self.admit(oldest, draft, now);
            }
        }
        let mut prefilling = prefilling.into_iter().peekable();
        while draft.budget > 0 {
            let waiting = self.waiting.foremost().filter(|_| !draft.closed);
            if let Some(running) = prefilling.next_if(|running| waiting.is_none_or(|waiting| *running < waiting)) {
                self.plan_chunk(running.sequence, draft);
            } else if let Some(waiting) = waiting {
                draft.closed |= !self.admit(waiting.sequence, draft, now);
            } else {
                break;
            }
        }
        // A plan in which nobody prefilled tells nothing.
        if oldest.is_none_or(|oldest| draft.prefilled.contains(&oldest)) {
            self.overtakes = 0;
        } else if !draft.prefilled.is_empty() {
            self.overtakes += 1;
        }
    }

    fn is_prefilling(&self, id: SequenceId) -> bool {
        self.sequences.get(&id).is_some_and(Sequence::is_prefilling)
    }

    /// Gives a prefilling sequence as many positions as budget and blocks allow. If the blocks do not suffice, nobody can
    /// be admitted after it either: a newcomer needs a block of each pool.
    pub(super) fn plan_chunk(&mut self, id: SequenceId, draft: &mut Draft) {
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        let Some(run) = &sequence.run else { return };
        if draft.prefilled.contains(&id) {
            return;
        }
        let shape = *self.kv.shape();
        let room = self.kv.available().minus(draft.headroom);
        let start = run.planned;
        let end = run.prefill_end.min(start + draft.budget).min(run.table.reachable(&shape, room));
        if end <= start {
            return;
        }
        let filled = start / shape.block_size..end / shape.block_size;
        draft.filling.extend(filled.filter_map(|index| sequence.keys.get(index)));
        draft.plan.slices.extend(sequence.plan_slice(end, &mut self.kv));
        draft.prefilled.push(id);
        draft.budget -= end - start;
    }

    /// Puts a waiting sequence on the ranks with its first chunk, if there is room for all its tokens. Returns whether.
    pub(super) fn admit(&mut self, id: SequenceId, draft: &mut Draft, now: Duration) -> bool {
        if self.running.len() >= self.config.max_num_seqs {
            return false;
        }
        // Its last sampled tokens are still on their way: they belong to what it is admitted with.
        if self.sequences.get(&id).is_none_or(|sequence| sequence.slices_in_flight > 0) {
            return false;
        }
        let Some(hit) = self.look_up(id, draft) else { return false };
        let Some(sequence) = self.sequences.get_mut(&id) else { return false };
        let reach = self.kv.shape().each(hit.blocks);
        let need = self.kv.shape().need_in_chunks(reach, hit.sliding.len(), sequence.tokens.len());
        let room = self.kv.available().minus(hit.unreferenced);
        if !room.covers(need + draft.headroom) {
            return false;
        }
        let hit_tokens = hit.blocks * self.config.block_size;
        if sequence.cached_tokens.is_none() && self.config.enable_prefix_caching && !sequence.must_compute_prompt() {
            self.totals.prefix_cache_queries += sequence.tokens.len() as u64;
            self.totals.prefix_cache_hits += hit_tokens as u64;
        }
        let standing = sequence.standing();
        draft.plan.admit.push(sequence.admit(hit, &mut self.kv));
        self.waiting.remove(standing);
        let place = self.running.partition_point(|other| *other < standing);
        self.running.insert(place, standing);
        self.note_admission(id, hit_tokens, now);
        self.plan_chunk(id, draft);
        true
    }

    /// What the prefix cache has of a waiting sequence. `None` if waiting for the next plan finds more of it.
    fn look_up(&mut self, id: SequenceId, draft: &Draft) -> Option<Hit> {
        let sequence = self.sequences.get_mut(&id)?;
        if !self.config.enable_prefix_caching {
            return Some(Hit::default());
        }
        let size = self.config.block_size;
        sequence.keys.extend(&sequence.tokens, size);
        if sequence.must_compute_prompt() {
            return Some(Hit::default());
        }
        let hit = self.kv.longest_hit(&sequence.keys, &sequence.tokens);
        let shareable = sequence.tokens.len().saturating_sub(1) / size;
        let next = sequence.keys.get(hit.blocks).filter(|_| hit.blocks < shareable);
        next.is_none_or(|key| !draft.filling.contains(&key)).then_some(hit)
    }

    /// Takes note of a finished plan: what it fills can be shared from now on, what leaves the window returns with it.
    fn launch(&mut self, plan: &Plan, now: Duration) {
        for slice in &plan.slices {
            let Some(sequence) = self.sequences.get_mut(&slice.sequence) else { continue };
            if self.config.enable_prefix_caching {
                sequence.remember_blocks(&mut self.kv);
            }
            if let Some(run) = &mut sequence.run {
                self.kv.pass_window(&mut run.table, run.planned, plan.step);
            }
        }
        self.in_flight.push_back(Flight::new(plan, now));
        self.next_step = plan.step.next();
    }
}
