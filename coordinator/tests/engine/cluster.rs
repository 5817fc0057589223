//! An engine with one fake rank behind it, and the books of what each request must get.

use std::{
    collections::{BTreeMap, VecDeque},
    time::Duration,
};

use phalanx_coordinator::engine::{Engine, EngineConfig, Event, Request, Tenant};
use phalanx_proto::{
    fault::Fault,
    ids::{Epoch, SequenceId, TokenId},
    plan::Plan,
    sampling::SamplingSettings,
    v1::{self, FinishReason},
};

use crate::rank::{FakeRank, Outcome, VOCAB, extend_hash, next_token};

/// Small enough that everything happens at once: several chunks a prompt, several blocks a window.
pub(crate) fn small_config() -> EngineConfig {
    EngineConfig {
        block_size: 4,
        sliding_window: 6,
        has_full_layers: true,
        has_sliding_layers: true,
        max_model_len: 96,
        max_num_batched_tokens: 24,
        max_num_seqs: 6,
        max_num_queued_reqs: 100,
        max_queued_tokens: 1 << 20,
        max_queue_age: Duration::MAX,
        // Room is promised to nobody, so that it runs short often.
        output_horizon: 0,
        window: 2,
        enable_prefix_caching: true,
    }
}

/// A request with neutral settings.
pub(crate) fn request(prompt: &[u32], max_tokens: usize) -> Request {
    Request {
        request_id: String::new(),
        prompt: prompt.iter().copied().map(TokenId).collect(),
        resume: Vec::new(),
        max_tokens: Some(max_tokens),
        stop_tokens: Vec::new(),
        sampling: settings(v1::Sampling::default()),
        tenant: Tenant::default(),
        priority: 0,
        cache_salt: String::new(),
        traceparent: String::new(),
    }
}

pub(crate) fn settings(message: v1::Sampling) -> SamplingSettings {
    SamplingSettings::check(&message, VOCAB as usize, 0).unwrap()
}

/// What a request gets when nobody else is there.
pub(crate) fn alone(request: &Request, limit: usize) -> (Vec<u32>, FinishReason) {
    let mut hash = request.prompt.iter().chain(&request.resume).fold(7, |hash, &token| extend_hash(hash, token));
    let mut output: Vec<TokenId> = request.resume.clone();
    while request.prompt.len() + output.len() < limit {
        let token = next_token(hash, &request.sampling, &request.stop_tokens, output.len());
        let masked = output.len() < request.sampling.min_tokens as usize || request.sampling.ignore_eos;
        output.push(token);
        if !masked && request.stop_tokens.contains(&token) {
            return (ids(&output[request.resume.len()..]), FinishReason::Stop);
        }
        hash = extend_hash(hash, token);
    }
    (ids(&output[request.resume.len()..]), FinishReason::Length)
}

fn ids(tokens: &[TokenId]) -> Vec<u32> {
    tokens.iter().map(|token| token.0).collect()
}

/// What was heard of one request.
#[derive(Debug, Default)]
pub(crate) struct Heard {
    pub(crate) request: Option<Request>,
    pub(crate) admitted: usize,
    pub(crate) cached_tokens: usize,
    pub(crate) tokens: Vec<u32>,
    pub(crate) prompt_positions: Vec<u32>,
    pub(crate) finished: Option<FinishReason>,
    pub(crate) failed: bool,
    pub(crate) fault: Option<Fault>,
    pub(crate) finished_at: Option<u64>,
}

pub(crate) struct Cluster {
    pub(crate) config: EngineConfig,
    pub(crate) engine: Engine,
    pub(crate) rank: FakeRank,
    pub(crate) heard: BTreeMap<SequenceId, Heard>,
    pub(crate) flying: VecDeque<(Plan, Outcome)>,
    pub(crate) steps: u64,
    pub(crate) check: bool,
    epoch: u64,
    acknowledged: u64,
    now: Duration,
}

impl Cluster {
    pub(crate) fn new(config: EngineConfig, full_blocks: usize, sliding_blocks: usize) -> Self {
        let mut cluster = Self {
            engine: Engine::new(config.clone()).unwrap(),
            rank: FakeRank::new(&config, full_blocks, sliding_blocks),
            config,
            heard: BTreeMap::new(),
            flying: VecDeque::new(),
            steps: 0,
            check: true,
            epoch: 0,
            acknowledged: 0,
            now: Duration::ZERO,
        };
        cluster.begin_epoch(full_blocks, sliding_blocks);
        cluster
    }

    pub(crate) fn submit(&mut self, request: Request) -> Result<SequenceId, Fault> {
        let id = self.engine.submit(request.clone(), self.now)?;
        self.heard.insert(id, Heard { request: Some(request), ..Heard::default() });
        self.listen();
        Ok(id)
    }

    pub(crate) fn cancel(&mut self, id: SequenceId) -> bool {
        let alive = self.engine.cancel(id);
        self.listen();
        alive
    }

    /// Asks for a plan and has the rank carry it out. Its result waits.
    pub(crate) fn plan(&mut self) -> Option<&Plan> {
        self.now += Duration::from_millis(1);
        let plan = self.engine.next_plan(self.now)?;
        assert!(self.flying.len() < self.config.window, "more plans in flight than the window has");
        assert_eq!(plan.epoch, Epoch(self.epoch));
        let outcome = self.rank.execute(&plan, self.acknowledged);
        self.flying.push_back((plan, outcome));
        self.listen();
        self.flying.back().map(|(plan, _)| plan)
    }

    /// Hands in the oldest result.
    pub(crate) fn apply(&mut self) -> bool {
        let Some((_, outcome)) = self.flying.pop_front() else { return false };
        self.steps += 1;
        self.acknowledged = outcome.step.0;
        let events = self.engine.apply(outcome.step, &outcome.sampled, &outcome.prompts, self.now).unwrap();
        self.hear(events);
        self.listen();
        true
    }

    /// One turn of a full pipeline: as many plans as the window takes, then one result. False when nothing is left.
    pub(crate) fn turn(&mut self) -> bool {
        while self.plan().is_some() {}
        self.apply()
    }

    /// Lets time pass in which nothing else happens.
    pub(crate) fn pass(&mut self, time: Duration) {
        self.now += time;
        self.engine.expire(self.now);
        self.listen();
    }

    pub(crate) fn end_epoch(&mut self) {
        self.engine.end_epoch();
        self.flying.clear();
        assert!(self.engine.next_plan(self.now).is_none(), "a plan outside of an epoch");
        self.listen();
    }

    pub(crate) fn begin_epoch(&mut self, full_blocks: usize, sliding_blocks: usize) {
        self.epoch += 1;
        self.acknowledged = 0;
        self.flying.clear();
        self.rank = FakeRank::new(&self.config, full_blocks, sliding_blocks);
        let events = self.engine.begin_epoch(Epoch(self.epoch), full_blocks, sliding_blocks);
        self.hear(events);
        self.listen();
    }

    /// Runs until nothing moves, then checks that nothing is left anywhere.
    pub(crate) fn drain(&mut self) {
        let mut turns = 0;
        while self.turn() {
            turns += 1;
            assert!(turns < 100_000, "no end in sight: {:?}", self.engine.stats());
        }
        assert!(self.engine.is_idle(), "stuck: {:?}", self.engine.stats());
        let stats = self.engine.stats();
        assert_eq!((stats.running, stats.waiting), (0, 0));
        assert_eq!((stats.full_blocks_used, stats.sliding_blocks_used), (0, 0), "blocks are left");
        assert_eq!(self.rank.live(), 0, "sequences are left on the rank");
    }

    /// Compares everything heard with what each request gets alone.
    pub(crate) fn check_outputs(&self) {
        for (id, heard) in &self.heard {
            let request = heard.request.as_ref().unwrap();
            let max_tokens = request.max_tokens.expect("tests with no max_tokens look for themselves");
            let (tokens, reason) = alone(request, request.prompt.len() + max_tokens);
            match heard.finished {
                None => assert!(heard.failed, "{id} never ended"),
                Some(FinishReason::Aborted) => assert!(tokens.starts_with(&heard.tokens), "{id}: wrong tokens"),
                Some(found) => {
                    assert_eq!((&heard.tokens, found), (&tokens, reason), "{id}: not what it gets alone");
                    let wanted = request.sampling.prompt_logprobs.is_some() && request.resume.is_empty();
                    let positions = if wanted { 1..request.prompt.len() as u32 } else { 0..0 };
                    assert_eq!(heard.prompt_positions, positions.collect::<Vec<_>>(), "{id}: prompt log-probabilities");
                }
            }
        }
    }

    fn listen(&mut self) {
        let events = self.engine.take_events();
        self.hear(events);
        if self.check {
            self.engine.check_integrity().unwrap();
        }
    }

    fn hear(&mut self, events: Vec<Event>) {
        for event in events {
            match event {
                Event::Admitted { sequence, prompt_tokens, cached_tokens, queued } => {
                    assert!(queued <= self.now);
                    let heard = self.heard_of(sequence);
                    assert_eq!(heard.admitted, 0, "{sequence} was admitted twice");
                    assert_eq!(prompt_tokens, heard.request.as_ref().unwrap().prompt.len());
                    heard.admitted += 1;
                    heard.cached_tokens = cached_tokens;
                }
                Event::Tokens { sequence, tokens, prompt } => {
                    let heard = self.heard_of(sequence);
                    assert_eq!(heard.admitted, 1, "tokens of {sequence} before its admission");
                    heard.tokens.extend(tokens.iter().map(|token| token.id));
                    heard.prompt_positions.extend(prompt.iter().map(|token| token.logprob.unwrap() as u32));
                }
                Event::Finished { sequence, reason, completion_tokens, cached_tokens, .. } => {
                    let steps = self.steps;
                    let heard = self.heard_of(sequence);
                    let resumed = heard.request.as_ref().unwrap().resume.len();
                    assert_eq!(completion_tokens, heard.tokens.len() + resumed);
                    assert_eq!(cached_tokens, heard.cached_tokens);
                    assert!(reason == FinishReason::Aborted || heard.admitted == 1);
                    heard.finished = Some(reason);
                    heard.finished_at = Some(steps);
                }
                Event::Failed { sequence, fault } => {
                    let heard = self.heard_of(sequence);
                    heard.failed = true;
                    heard.fault = Some(fault);
                }
            }
        }
    }

    /// The books of a sequence, from which nothing more may be heard once it has ended.
    fn heard_of(&mut self, id: SequenceId) -> &mut Heard {
        let heard = self.heard.entry(id).or_default();
        assert!(heard.finished.is_none() && !heard.failed, "{id} is heard of after its end");
        heard
    }
}
