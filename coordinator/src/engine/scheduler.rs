//! What the next plan computes.
//!
//! 1. Room: each running sequence claims the blocks of its next token. While these will not be there even after the plans
//!    in flight, a sequence goes back to waiting: the hindmost of the tenant that was served most.
//! 2. Decodes: every running sequence that has a token to feed.
//! 3. Prefills with what is left of the token budget, running and waiting ones together, by turns of their tenants. They
//!    leave one block to each of these decodes. When one waits for room, nobody passes it.
//!
//! Nobody is admitted for whom there is no room beside what those that run are likely to take yet, so that preemption is
//! the exception. Whoever was preempted often goes before all others, and the foremost of these can always go on, so the
//! engine cannot come to a standstill. The tenant that was served least goes first, and within one the oldest candidate
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
    tenants::{Candidate, TenantKey},
};

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
    prefilled: Vec<(TenantKey, SequenceId)>,
    /// Blocks that running sequences are likely to take yet.
    claims: Blocks,
    /// Tokens that tenants were charged for.
    served: usize,
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
            claims: Blocks::default(),
            served: 0,
        };
        self.make_room();
        self.plan_decodes(&mut draft);
        self.plan_prefills(&mut draft, now);
        draft.plan.retire = std::mem::take(&mut self.retire);
        if draft.plan.retire.is_empty() && draft.plan.slices.is_empty() {
            return None;
        }
        self.launch(&draft, now);
        Some(draft.plan)
    }

    /// Preempts until the next token of everyone who is left has its blocks, now or once the plans in flight are done.
    fn make_room(&mut self) {
        let shape = *self.kv.shape();
        let need = |sequence: &Sequence| sequence.next_need(&shape);
        let mut claimed = Blocks::default();
        for standing in &self.running {
            claimed += self.sequences.get(&standing.sequence).map(need).unwrap_or_default();
        }
        while self.running.len() > 1
            && !(self.kv.available() + self.kv.pending()).covers(claimed)
            && let Some(index) = self.hindmost()
        {
            let id = self.running[index].sequence;
            claimed = claimed.minus(self.sequences.get(&id).map(need).unwrap_or_default());
            self.preempt(index);
        }
    }

    /// Whoever has to make room, as an index of `running`: the hindmost of the tenant that was served most, and shielded
    /// ones only when nobody else is left.
    fn hindmost(&self) -> Option<usize> {
        let rank = |index: &usize| {
            let standing = self.running[*index];
            let tenant = self.sequences.get(&standing.sequence).map(|sequence| sequence.tenant).unwrap_or_default();
            // Among shielded ones only their standing counts: it stays as it is, so that one of them gets done.
            let served = if standing.is_unshielded() { self.tenants.served(tenant) } else { 0 };
            (standing.is_unshielded(), served, standing)
        };
        (0..self.running.len()).max_by_key(rank)
    }

    /// Sends a running sequence back to the queue. What was sampled for it in plans in flight still counts.
    pub(super) fn preempt(&mut self, index: usize) {
        let standing = self.running.remove(index);
        let Some(sequence) = self.sequences.get_mut(&standing.sequence) else { return };
        let Some(run) = sequence.run.take() else { return };
        self.kv.let_go_all(run.table, self.next_step);
        sequence.preemptions += 1;
        self.tenants.enqueue(sequence.tenant, sequence.standing(), sequence.queue_tokens);
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
            let charge = sequence.take_charge(end);
            self.tenants.charge(sequence.tenant, charge);
            draft.served += charge;
        }
        // Those that stall are not counted: else a prefill could wait for them, and they for the blocks it holds.
        draft.headroom = self.kv.shape().each(draft.plan.slices.len());
    }

    fn plan_prefills(&mut self, draft: &mut Draft, now: Duration) {
        if self.plan_alone(draft, now) {
            return;
        }
        let mut prefilling = self.prefilling();
        draft.claims = self.claims();
        while draft.budget > 0
            && let Some(next) = self.tenants.foremost(&prefilling, !draft.closed)
        {
            let id = next.standing.sequence;
            if let Some(index) = prefilling.iter().position(|candidate| *candidate == next) {
                prefilling.remove(index);
                self.plan_chunk(id, draft);
            } else {
                draft.closed |= !self.admit(id, draft, now);
            }
        }
        self.tenants.note_prefills(&draft.prefilled, &prefilling);
    }

    /// Sequences that run and have not been given all they were admitted with.
    fn prefilling(&self) -> Vec<Candidate> {
        let candidate = |&standing: &Standing| {
            let sequence = self.sequences.get(&standing.sequence).filter(|sequence| sequence.is_prefilling())?;
            Some(Candidate { tenant: sequence.tenant, standing })
        };
        self.running.iter().filter_map(candidate).collect()
    }

    /// What all running sequences are likely to take yet. Nobody asks while nobody waits.
    fn claims(&self) -> Blocks {
        let mut claims = Blocks::default();
        if self.tenants.waiting() > 0 {
            let running = self.running.iter().filter_map(|standing| self.sequences.get(&standing.sequence));
            running.for_each(|sequence| claims += sequence.claim(&self.kv, self.config.output_horizon));
        }
        claims
    }

    /// Gives a prefilling sequence as many positions as budget and blocks allow. If the blocks do not suffice, nobody can
    /// be admitted after it either: a newcomer needs a block of each pool.
    pub(super) fn plan_chunk(&mut self, id: SequenceId, draft: &mut Draft) {
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        let Some(run) = &sequence.run else { return };
        let shape = *self.kv.shape();
        let room = self.kv.available().minus(draft.headroom);
        let start = run.planned;
        let end = run.prefill_end.min(start + draft.budget).min(run.table.reachable(&shape, room));
        if end <= start {
            return;
        }
        let filled = start / shape.block_size..end / shape.block_size;
        draft.filling.extend(filled.filter_map(|index| sequence.keys.get(index)));
        let horizon = self.config.output_horizon;
        let claim = sequence.claim(&self.kv, horizon);
        draft.plan.slices.extend(sequence.plan_slice(end, &mut self.kv));
        draft.claims = draft.claims.minus(claim) + sequence.claim(&self.kv, horizon);
        draft.prefilled.push((sequence.tenant, id));
        draft.budget -= end - start;
        let charge = sequence.take_charge(end);
        self.tenants.charge(sequence.tenant, charge);
        draft.served += charge;
    }

    /// Puts a waiting sequence on the ranks with its first chunk, if there is room for all its tokens now, and later for
    /// what it and the others are likely to grow to. Returns whether.
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
        let grown = sequence.claimed_len(self.config.output_horizon);
        let claim = self.kv.shape().need_in_chunks(reach, hit.unreferenced.sliding, grown);
        let later = room + self.kv.pending().minus(hit.returning);
        // Alone it fits: else it would not have been taken in.
        let fits_later = self.running.is_empty() || later.covers(claim + draft.claims);
        if !room.covers(need + draft.headroom) || !fits_later {
            return false;
        }
        draft.claims += claim;
        let hit_tokens = hit.blocks * self.config.block_size;
        if sequence.cached_tokens.is_none() && self.config.enable_prefix_caching && !sequence.must_compute_prompt() {
            self.totals.prefix_cache_queries += sequence.tokens.len() as u64;
            self.totals.prefix_cache_hits += hit_tokens as u64;
        }
        let standing = sequence.standing();
        draft.plan.admit.push(sequence.admit(hit, &mut self.kv));
        self.tenants.dequeue(sequence.tenant, standing, sequence.queue_tokens);
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
    fn launch(&mut self, draft: &Draft, now: Duration) {
        let plan = &draft.plan;
        for slice in &plan.slices {
            let Some(sequence) = self.sequences.get_mut(&slice.sequence) else { continue };
            if self.config.enable_prefix_caching {
                sequence.remember_blocks(&mut self.kv);
            }
            if let Some(run) = &mut sequence.run {
                self.kv.pass_window(&mut run.table, run.planned, plan.step);
            }
        }
        self.in_flight.push_back(Flight::new(plan, draft.served, now));
        self.next_step = plan.step.next();
    }
}
