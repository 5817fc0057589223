//! Whether everything the engine knows adds up. Cheap enough for tests and for an idle engine, not for every step.

use phalanx_proto::{geometry::LayerKind, ids::Step};
use rustc_hash::FxHashMap;

use super::{Engine, kv::Table, sequence::Sequence};

impl Engine {
    /// Recounts every block, sequence and plan.
    ///
    /// # Errors
    /// Says what does not add up; a bug.
    pub fn check_integrity(&self) -> Result<(), String> {
        self.check_blocks()?;
        self.check_places()?;
        self.check_flights()?;
        self.sequences.values().try_for_each(|sequence| self.check_progress(sequence))
    }

    /// Every block is free, idle, or referred to as often as it says.
    fn check_blocks(&self) -> Result<(), String> {
        let mut full_tables = vec![0_u32; self.kv.full().len()];
        let mut sliding_tables = vec![0_u32; self.kv.sliding().len()];
        for run in self.sequences.values().filter_map(|sequence| sequence.run.as_ref()) {
            let (full, sliding) = run.table.held();
            full.for_each(|block| full_tables[block.index()] += 1);
            sliding.for_each(|block| sliding_tables[block.index()] += 1);
        }
        let mut full_releases = vec![0_u32; full_tables.len()];
        let mut sliding_releases = vec![0_u32; sliding_tables.len()];
        for release in self.kv.releases() {
            match release.kind {
                LayerKind::FullAttention => full_releases[release.block.index()] += 1,
                LayerKind::SlidingAttention => sliding_releases[release.block.index()] += 1,
            }
        }
        let full = self.kv.full().check(&full_tables, &full_releases);
        full.map_err(|text| format!("full pool: {text}"))?;
        self.kv.sliding().check(&sliding_tables, &sliding_releases).map_err(|text| format!("sliding pool: {text}"))?;
        // Whatever waits must wait for a step that is still to be acknowledged.
        let done = self.in_flight.front().map_or(self.next_step, |flight| flight.step);
        match self.kv.releases().find(|release| release.after < done || release.after > self.next_step) {
            Some(release) => Err(format!("{release:?} waits while {done} to {} are awaited", self.next_step)),
            None => Ok(()),
        }
    }

    /// Every sequence is in exactly one place, and nobody else is anywhere.
    fn check_places(&self) -> Result<(), String> {
        if self.running.len() > self.config.max_num_seqs {
            return Err(format!("{} sequences run, at most {} may", self.running.len(), self.config.max_num_seqs));
        }
        if !self.running.is_sorted() || self.running.windows(2).any(|pair| pair[0] == pair[1]) {
            return Err(format!("running sequences are not in order: {:?}", self.running));
        }
        let of_tenant =
            |sequence: &Sequence| (sequence.tenant, Some(sequence.queue_tokens).filter(|_| sequence.run.is_none()));
        self.tenants.check(self.sequences.values().map(of_tenant))?;
        if self.running.len() + self.tenants.waiting() != self.sequences.len() {
            let (running, waiting, live) = (self.running.len(), self.tenants.waiting(), self.sequences.len());
            return Err(format!("{running} run and {waiting} wait, {live} are alive"));
        }
        for sequence in self.sequences.values() {
            let standing = sequence.standing();
            let running = self.running.binary_search(&standing).is_ok();
            let waiting = self.tenants.is_waiting(sequence.tenant, standing);
            if running == waiting || running != sequence.run.is_some() {
                return Err(format!("sequence {}: running {running}, waiting {waiting}", sequence.id));
            }
        }
        if self.epoch.is_none() && !(self.running.is_empty() && self.in_flight.is_empty() && self.retire.is_empty()) {
            return Err("something runs outside of an epoch".into());
        }
        Ok(())
    }

    /// Plans in flight are consecutive, and sequences know of exactly the slices in them.
    fn check_flights(&self) -> Result<(), String> {
        let count = self.in_flight.len() as u64;
        let steps = self.in_flight.iter().map(|flight| flight.step);
        if self.in_flight.len() > self.config.window
            || !steps.eq((self.next_step.0 - count..self.next_step.0).map(Step))
        {
            return Err(format!("plans in flight before step {}: {:?}", self.next_step, self.in_flight));
        }
        let mut slices = FxHashMap::default();
        for slice in self.in_flight.iter().flat_map(|flight| &flight.slices) {
            let counts: &mut (usize, usize) = slices.entry(slice.sequence).or_default();
            counts.0 += 1;
            counts.1 += usize::from(slice.sample);
        }
        for sequence in self.sequences.values() {
            let expected = slices.get(&sequence.id).copied().unwrap_or_default();
            let found = (sequence.slices_in_flight, sequence.samples_in_flight);
            if found != expected {
                return Err(format!("sequence {}: slices and samples {found:?}, in flight {expected:?}", sequence.id));
            }
        }
        Ok(())
    }

    /// A sequence's table holds what its next query needs, and its lengths are within their limits.
    fn check_progress(&self, sequence: &Sequence) -> Result<(), String> {
        let (id, limit) = (sequence.id, sequence.limit);
        let broken = |text: String| Err(format!("sequence {id}: {text}"));
        let longest = limit.max(sequence.request.prompt.len());
        if sequence.expected_len() > longest || longest > self.config.max_model_len {
            return broken(format!("{} tokens are expected, the limit is {limit}", sequence.expected_len()));
        }
        let Some(run) = &sequence.run else { return Ok(()) };
        if run.planned > sequence.expected_len() {
            return broken(format!("planned to {} of {} tokens", run.planned, sequence.expected_len()));
        }
        let shape = self.kv.shape();
        if run.table.reach() != shape.each(shape.blocks_for(run.planned)) {
            return broken(format!("planned to {}, blocks reach {:?}", run.planned, run.table.reach()));
        }
        let first_visible = if shape.has_sliding_layers { shape.first_visible(run.planned) } else { 0 };
        if !self.window_is_held(&run.table, first_visible) {
            return broken(format!("window begins in block {first_visible}, held from {}", run.table.sliding_start()));
        }
        Ok(())
    }

    fn window_is_held(&self, table: &Table, first_visible: usize) -> bool {
        table.sliding_start() == first_visible.min(table.reach().sliding)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use phalanx_proto::{
        ids::{Epoch, SequenceId, TokenId},
        sampling::SamplingSettings,
        v1,
    };

    use super::*;
    use crate::engine::{EngineConfig, Request, Tenant, tenants::TenantKey};

    /// An engine with one sequence running, one waiting and a plan in flight.
    fn engine() -> Engine {
        let config = EngineConfig {
            block_size: 4,
            sliding_window: 6,
            has_full_layers: true,
            has_sliding_layers: true,
            max_model_len: 100,
            max_num_batched_tokens: 100,
            max_num_seqs: 1,
            max_num_queued_reqs: 10,
            max_queued_tokens: 1000,
            max_queue_age: Duration::MAX,
            output_horizon: 0,
            window: 2,
            enable_prefix_caching: true,
        };
        let request = Request {
            request_id: String::new(),
            prompt: (0..18).map(TokenId).collect(),
            resume: Vec::new(),
            max_tokens: Some(10),
            stop_tokens: Vec::new(),
            sampling: SamplingSettings::check(&v1::Sampling::default(), 100, 0).unwrap(),
            tenant: Tenant::default(),
            priority: 0,
            cache_salt: String::new(),
            traceparent: String::new(),
        };
        let mut engine = Engine::new(config).unwrap();
        engine.begin_epoch(Epoch(1), 20, 20);
        engine.submit(request.clone(), Duration::ZERO).unwrap();
        engine.submit(request, Duration::ZERO).unwrap();
        engine.next_plan(Duration::ZERO).unwrap();
        engine.check_integrity().unwrap();
        engine
    }

    type Damage = fn(&mut Engine);

    fn first(engine: &mut Engine) -> &mut Sequence {
        engine.sequences.get_mut(&SequenceId(1)).unwrap()
    }

    #[test]
    fn everything_that_is_lost_or_doubled_is_found() {
        let faults: [(&str, Damage); 10] = [
            ("a table dropped without its blocks", |e| first(e).run.as_mut().unwrap().table = Table::default()),
            ("a sequence that was forgotten", |e| drop(e.sequences.remove(&SequenceId(1)))),
            ("a sequence that runs and waits", |e| {
                let (tenant, standing) = (first(e).tenant, first(e).standing());
                e.tenants.enqueue(tenant, standing, 28);
            }),
            ("blocks given back by a sequence that runs", |e| {
                let mut run = first(e).run.take().unwrap();
                e.kv.let_go_all(std::mem::take(&mut run.table), e.next_step);
                first(e).run = Some(run);
                e.next_step = e.next_step.next();
            }),
            ("a plan that was forgotten", |e| drop(e.in_flight.pop_front())),
            ("a slice nobody knows of", |e| first(e).slices_in_flight += 1),
            ("a position planned twice", |e| first(e).run.as_mut().unwrap().planned -= 4),
            ("a tenant whose sequence left without a word", |e| e.tenants.leave(TenantKey::default())),
            ("tokens past the limit", |e| first(e).limit = 17),
            ("something running between epochs", |e| e.epoch = None),
        ];
        for (name, break_it) in faults {
            let mut engine = engine();
            break_it(&mut engine);
            assert!(engine.check_integrity().is_err(), "{name}");
        }
    }
}
