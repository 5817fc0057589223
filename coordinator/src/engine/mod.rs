//! The scheduler's core: requests, results and the time go in; plans and tokens come out.
//!
//! The [`Engine`] owns every mutable fact about sequences: who waits, who runs, which KV block holds what. It does no
//! I/O, reads no clock, spawns nothing and is deterministic: equal calls give equal plans.
//!
//! | file | decides |
//! | --- | --- |
//! | `scheduler` | what the next plan computes, who is admitted, who has to make room |
//! | `results` | what a step's result means: tokens, ends, blocks that return |
//! | `sequence` | how far one completion is |
//! | `limits` | what is let in |
//! | `tenants`, `queue` | who goes first: between tenants, and within one |
//! | `throughput` | how fast tokens are served, for those who are told to come back |
//! | `kv`, `blocks` | which block holds which positions; when a block may be taken again |
//! | `prefix` | what was computed before and can be shared |
//! | `alone` | whether one sequence runs apart from the others |
//! | `integrity` | whether all of this adds up |
//!
//! The caller sends each plan to all ranks, in order, and calls [`Engine::apply`] with rank 0's result once *all* ranks
//! have acknowledged the step. Up to `window` plans are in flight. A sequence that ends is retired by the next plan, and
//! its blocks return when that plan has been acknowledged.

mod alone;
mod blocks;
mod integrity;
mod kv;
mod limits;
#[cfg(test)]
mod naive;
mod prefix;
mod queue;
mod results;
mod scheduler;
mod sequence;
mod stats;
mod tenants;
mod throughput;

use std::{collections::VecDeque, time::Duration};

use phalanx_proto::{
    fault::Fault,
    ids::{Epoch, SequenceId, Step, TokenId},
    sampling::SamplingSettings,
    v1::{self, FinishReason},
};
use rustc_hash::FxHashMap;

use kv::{Blocks, KvCache};
pub use limits::EngineConfig;
use queue::Standing;
use results::Flight;
use sequence::Sequence;
pub use stats::{Stats, Totals};
use tenants::Tenants;
pub use tenants::{MAX_WEIGHT, Tenant};
use throughput::Throughput;

/// One completion to generate, checked against the vocabulary.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// For logs; the engine goes by the id it gives.
    pub request_id: String,
    /// At least one token.
    pub prompt: Vec<TokenId>,
    /// Output tokens the client already holds; they count towards `max_tokens` and are not delivered again.
    pub resume: Vec<TokenId>,
    /// Most output tokens. `None`: what context and KV cache leave.
    pub max_tokens: Option<usize>,
    /// Tokens that end the completion, delivered last.
    pub stop_tokens: Vec<TokenId>,
    /// How tokens are chosen.
    pub sampling: SamplingSettings,
    /// On whose behalf.
    pub tenant: Tenant,
    /// Higher goes first among the requests of one tenant.
    pub priority: i32,
    /// Nothing is shared between different salts.
    pub cache_salt: String,
    /// W3C trace context, or empty.
    pub traceparent: String,
}

/// What happened to a sequence, in the order in which it happened. Each sequence ends with exactly one
/// [`Event::Finished`] or [`Event::Failed`].
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// It was scheduled for the first time.
    Admitted {
        /// Which one.
        sequence: SequenceId,
        /// Length of its prompt.
        prompt_tokens: usize,
        /// How much of the prompt came from the prefix cache.
        cached_tokens: usize,
        /// Time since it was submitted.
        queued: Duration,
    },
    /// Tokens came out.
    Tokens {
        /// Which one.
        sequence: SequenceId,
        /// Output tokens.
        tokens: Vec<v1::Token>,
        /// Prompt tokens with their log-probabilities, from the second one on, if they were asked for.
        prompt: Vec<v1::Token>,
    },
    /// It ended.
    Finished {
        /// Which one.
        sequence: SequenceId,
        /// Why.
        reason: FinishReason,
        /// Length of its prompt.
        prompt_tokens: usize,
        /// Length of its output, resumed tokens included.
        completion_tokens: usize,
        /// How much of the prompt came from the prefix cache.
        cached_tokens: usize,
    },
    /// It cannot go on: it waited for too long, or the group formed anew with a KV cache that is too small for it.
    Failed {
        /// Which one.
        sequence: SequenceId,
        /// Why, with the numbers.
        fault: Fault,
    },
}

/// Turns requests into plans and results into tokens.
#[derive(Debug)]
pub struct Engine {
    config: EngineConfig,
    /// `None` between epochs: nothing is planned.
    epoch: Option<Epoch>,
    kv: KvCache,
    /// Of the last epoch; `None` before the first.
    capacity: Option<Blocks>,
    sequences: FxHashMap<SequenceId, Sequence>,
    /// Who waits, and whose turn it is.
    tenants: Tenants,
    /// Sequences that were never on the ranks, in order of arrival. May hold some that have ended or been admitted since.
    arrivals: VecDeque<SequenceId>,
    /// On the ranks, foremost first.
    running: Vec<Standing>,
    /// For the next plan: sequences that the ranks have to forget.
    retire: Vec<SequenceId>,
    /// Oldest first.
    in_flight: VecDeque<Flight>,
    next_step: Step,
    next_sequence: SequenceId,
    /// Nobody else is put on the ranks while it lives.
    alone: Option<SequenceId>,
    events: Vec<Event>,
    totals: Totals,
    throughput: Throughput,
}

impl Engine {
    /// An engine without a group: requests may be submitted, nothing is planned before [`Engine::begin_epoch`].
    ///
    /// # Errors
    /// Names the first field of the configuration that is out of range.
    pub fn new(config: EngineConfig) -> Result<Self, Fault> {
        config.check()?;
        let kv = KvCache::new(config.shape(), Blocks::default());
        Ok(Self {
            config,
            epoch: None,
            kv,
            capacity: None,
            sequences: FxHashMap::default(),
            tenants: Tenants::default(),
            arrivals: VecDeque::new(),
            running: Vec::new(),
            retire: Vec::new(),
            in_flight: VecDeque::new(),
            next_step: Step(1),
            next_sequence: SequenceId(1),
            alone: None,
            events: Vec::new(),
            totals: Totals::default(),
            throughput: Throughput::default(),
        })
    }

    /// Starts an epoch with empty pools of the given sizes. Every live sequence waits again, with prompt and the tokens
    /// delivered so far. Returns the events that are due, among them the end of sequences that no longer fit.
    pub fn begin_epoch(&mut self, epoch: Epoch, full_blocks: usize, sliding_blocks: usize) -> Vec<Event> {
        self.end_epoch();
        self.kv = KvCache::new(self.config.shape(), Blocks { full: full_blocks, sliding: sliding_blocks });
        self.capacity = Some(self.kv.capacity());
        self.epoch = Some(epoch);
        self.next_step = Step(1);
        self.fit_again();
        self.take_events()
    }

    /// Ends the epoch: plans in flight are forgotten, nothing is planned until [`Engine::begin_epoch`].
    pub fn end_epoch(&mut self) {
        self.epoch = None;
        self.kv = KvCache::new(self.config.shape(), self.kv.capacity());
        self.in_flight.clear();
        self.retire.clear();
        self.running.clear();
        for sequence in self.sequences.values_mut() {
            sequence.slices_in_flight = 0;
            sequence.samples_in_flight = 0;
            if sequence.run.take().is_some() {
                self.tenants.enqueue(sequence.tenant, sequence.standing(), sequence.queue_tokens);
            }
        }
    }

    /// Takes a request in.
    ///
    /// # Errors
    /// `QueueFull` when there is no place to wait, with the time after which there may be one; `ContextLength` when prompt and output exceed the context or can
    /// never fit the KV cache; `InvalidArgument` for an empty prompt, too many stop tokens or an over-long `resume`.
    pub fn submit(&mut self, request: Request, now: Duration) -> Result<SequenceId, Fault> {
        let limit = match self.check_request(&request) {
            Ok(limit) => limit,
            Err(fault) => {
                self.totals.refused += 1;
                return Err(fault);
            }
        };
        let id = self.next_sequence;
        self.next_sequence = SequenceId(id.0 + 1);
        let tenant = self.tenants.join(&request.tenant);
        let sequence = Sequence::new(id, tenant, request, limit, now);
        let finished = sequence.finished_already().filter(|_| !sequence.wants_only_prompt());
        self.tenants.enqueue(tenant, sequence.standing(), sequence.queue_tokens);
        self.sequences.insert(id, sequence);
        self.arrivals.push_back(id);
        if let Some(reason) = finished {
            self.note_admission(id, 0, now);
            self.finish(id, reason);
        }
        Ok(id)
    }

    /// Ends a sequence at once, wherever it is. Its `Finished` event is the last thing heard of it; the next plan tells
    /// the ranks. Returns whether it was alive.
    pub fn cancel(&mut self, sequence: SequenceId) -> bool {
        let alive = self.sequences.contains_key(&sequence);
        if alive {
            self.finish(sequence, FinishReason::Aborted);
        }
        alive
    }

    /// Refuses requests that have waited since before `max_queue_age` without ever having run.
    pub fn expire(&mut self, now: Duration) {
        while let Some(&id) = self.arrivals.front() {
            let untouched = self.sequences.get(&id).filter(|sequence| !sequence.was_served());
            let waited = untouched.map(|sequence| now.saturating_sub(sequence.submitted));
            if waited.is_some_and(|waited| waited <= self.config.max_queue_age) {
                return;
            }
            self.arrivals.pop_front();
            if let Some(waited) = waited {
                let fault = self.too_old(waited);
                self.remove(id);
                self.totals.expired += 1;
                self.events.push(Event::Failed { sequence: id, fault });
            }
        }
    }

    /// Events since the last call of this or of [`Engine::apply`]: what `submit`, `cancel` and `next_plan` caused.
    pub fn take_events(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.events)
    }

    /// Figures about what is going on.
    pub fn stats(&self) -> Stats {
        let capacity = self.kv.capacity();
        let used = capacity.minus(self.kv.available());
        Stats {
            running: self.running.len(),
            waiting: self.tenants.waiting(),
            waiting_tokens: self.tenants.waiting_tokens(),
            tokens_per_second: self.throughput.per_second().map_or(0, |rate| rate.round() as u64),
            retry_after: if self.is_full() { self.retry_after() } else { Duration::ZERO },
            full_blocks_used: used.full,
            full_blocks: capacity.full,
            sliding_blocks_used: used.sliding,
            sliding_blocks: capacity.sliding,
            totals: self.totals,
        }
    }

    /// Plans whose results are awaited.
    pub fn plans_in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// Whether no sequence is alive, no plan is in flight and the ranks have nothing to be told.
    pub fn is_idle(&self) -> bool {
        self.sequences.is_empty() && self.in_flight.is_empty() && self.retire.is_empty()
    }

    /// Ends a sequence: its blocks return with the plan that retires it.
    fn finish(&mut self, id: SequenceId, reason: FinishReason) {
        let Some(sequence) = self.remove(id) else { return };
        self.totals.count_finished(reason);
        self.events.push(Event::Finished {
            sequence: id,
            reason,
            prompt_tokens: sequence.request.prompt.len(),
            completion_tokens: sequence.completion_tokens(),
            cached_tokens: sequence.cached_tokens.unwrap_or(0),
        });
    }

    fn remove(&mut self, id: SequenceId) -> Option<Sequence> {
        let mut sequence = self.sequences.remove(&id)?;
        let standing = sequence.standing();
        match sequence.run.take() {
            Some(run) => {
                self.running.retain(|other| *other != standing);
                self.kv.let_go_all(run.table, self.next_step);
                self.retire.push(id);
            }
            None => self.tenants.dequeue(sequence.tenant, standing, sequence.queue_tokens),
        }
        self.tenants.leave(sequence.tenant);
        if self.sequences.is_empty() {
            self.arrivals.clear();
        }
        Some(sequence)
    }

    /// Says once that a sequence has been scheduled, and counts it.
    fn note_admission(&mut self, id: SequenceId, hit_tokens: usize, now: Duration) {
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        if sequence.cached_tokens.is_some() {
            return;
        }
        let prompt_tokens = sequence.request.prompt.len();
        let cached_tokens = hit_tokens.min(prompt_tokens);
        sequence.cached_tokens = Some(cached_tokens);
        self.totals.prompt_tokens += prompt_tokens as u64;
        let queued = now.saturating_sub(sequence.submitted);
        self.events.push(Event::Admitted { sequence: id, prompt_tokens, cached_tokens, queued });
    }

    /// Checks every live sequence against the pools of a new epoch.
    fn fit_again(&mut self) {
        let mut ids: Vec<SequenceId> = self.sequences.keys().copied().collect();
        ids.sort_unstable();
        for id in ids {
            let limit = self.sequences.get(&id).map(|sequence| self.limit(&sequence.request));
            match limit {
                Some(Ok(limit)) => self.set_limit(id, limit),
                Some(Err(fault)) => {
                    self.remove(id);
                    self.totals.failed += 1;
                    self.events.push(Event::Failed { sequence: id, fault });
                }
                None => {}
            }
        }
    }

    /// A smaller cache may end a completion that goes as far as the cache does.
    fn set_limit(&mut self, id: SequenceId, limit: usize) {
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        sequence.limit = limit;
        if sequence.completion_tokens() > 0 && sequence.tokens.len() >= limit {
            self.finish(id, FinishReason::Length);
        }
    }
}
