//! The task of one group: takes messages, watches the time, winds down on shutdown.

use std::{sync::Arc, time::Duration};

use futures::{StreamExt, future::BoxFuture, stream::FuturesUnordered};
use phalanx_proto::{
    fault::{Fault, FaultKind},
    geometry::LayerKind,
    ids::{Epoch, SequenceId},
    v1,
};
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, MissedTickBehavior, interval},
};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use super::{
    Epochs, Message,
    clients::Clients,
    crashes::Crashes,
    flight::{Flight, Pace},
    poison::Suspects,
    report,
    roster::Roster,
};
use crate::{
    config::{Deployment, Limits},
    engine::{Engine, EngineConfig},
    instruments::Instruments,
    planner::pools::KvPools,
};

/// How often deadlines are looked at and the load is published.
const TICK: Duration = Duration::from_millis(50);
/// A tick later than this means that the coordinator itself had no time, and its workers are not to blame.
const TOLERATED_LATENESS: Duration = Duration::from_millis(100);
/// Shortest time between two integrity checks.
const INTEGRITY_INTERVAL: Duration = Duration::from_secs(1);
/// Messages that are taken in one go before plans are made.
const BATCH: usize = 256;
/// Plans in flight.
const WINDOW: usize = 2;
/// Output tokens for which a running sequence keeps room when others are admitted: a short answer is never preempted.
const OUTPUT_HORIZON: usize = 256;

/// Where the group is in its life.
#[derive(Debug)]
pub(super) enum Phase {
    /// Workers are missing or loading, or it is too early to try again.
    Gathering { not_before: Duration },
    /// Workers open their ends of the collective.
    Preparing { epoch: Epoch, since: Duration },
    /// Workers connect and make their KV cache.
    Forming { epoch: Epoch, since: Duration, pools: KvPools },
    /// Steps run.
    Running { flight: Flight, pools: KvPools },
    /// Nothing will come of it before another worker attaches.
    Failed { reason: String },
}

impl Phase {
    /// The epoch that is being formed or runs.
    pub(super) fn epoch(&self) -> Option<Epoch> {
        match self {
            Self::Preparing { epoch, .. } | Self::Forming { epoch, .. } => Some(*epoch),
            Self::Running { flight, .. } => Some(flight.epoch()),
            Self::Gathering { .. } | Self::Failed { .. } => None,
        }
    }
}

/// Everything that one group's task owns.
pub(super) struct Group {
    pub(super) deployment: Arc<Deployment>,
    pub(super) limits: Limits,
    pub(super) epochs: Epochs,
    pub(super) engine: Engine,
    pub(super) roster: Roster,
    pub(super) phase: Phase,
    pub(super) pace: Pace,
    pub(super) clients: Clients,
    /// Resolve when a client's stream is dropped.
    pub(super) hang_ups: FuturesUnordered<BoxFuture<'static, SequenceId>>,
    pub(super) instruments: Instruments,
    /// Longest sequence, as far as the KV cache reaches.
    pub(super) context: usize,
    pub(super) crashes: Crashes,
    pub(super) suspects: Suspects,
    /// Why the last epoch ended.
    pub(super) last_failure: String,
    /// Since when steps do not run; absent while they do and before they ever did.
    pub(super) stalled_since: Option<Duration>,
    pub(super) was_ready: bool,
    pub(super) draining_since: Option<Duration>,
    started: Instant,
    last_tick: Duration,
    /// When the books were last found in order, and whether anything has happened since.
    checked: Duration,
    pub(super) touched: bool,
    published: watch::Sender<v1::DeploymentLoad>,
}

impl Group {
    /// A group without workers.
    ///
    /// # Errors
    /// When the engine refuses the configuration.
    pub(super) fn new(
        deployment: Arc<Deployment>,
        limits: Limits,
        epochs: Epochs,
    ) -> Result<(Self, watch::Receiver<v1::DeploymentLoad>), Fault> {
        let engine = Engine::new(engine_config(&deployment, &limits))?;
        let roster = Roster::new(deployment.world_size(), deployment.layout.parallelism().to_string());
        let (published, load) = watch::channel(v1::DeploymentLoad::default());
        let group = Self {
            context: deployment.demand.max_model_len,
            pace: Pace::new(limits.step_deadline, deployment.deadline_per_token(&limits)),
            deployment,
            limits,
            epochs,
            engine,
            roster,
            phase: Phase::Gathering { not_before: Duration::ZERO },
            clients: Clients::default(),
            hang_ups: FuturesUnordered::new(),
            instruments: Instruments::default(),
            crashes: Crashes::default(),
            suspects: Suspects::default(),
            last_failure: String::new(),
            stalled_since: None,
            was_ready: false,
            draining_since: None,
            started: Instant::now(),
            last_tick: Duration::ZERO,
            checked: Duration::ZERO,
            touched: false,
            published,
        };
        group.publish();
        Ok((group, load))
    }

    /// Time since the group's task was made.
    pub(super) fn now(&self) -> Duration {
        self.started.elapsed()
    }

    /// Serves until shutdown is asked for and nothing is left to do, or the grace period is over.
    pub(super) async fn run(mut self, mut inbox: mpsc::Receiver<Message>, shutdown: CancellationToken) {
        let mut tick = interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let state = report::state(&self);
            // What comes seldom comes first, so that nothing is kept waiting and equal events give equal runs.
            tokio::select! {
                biased;
                _ = tick.tick() => self.tick(),
                () = shutdown.cancelled(), if self.draining_since.is_none() => self.drain(),
                Some(sequence) = self.hang_ups.next(), if !self.hang_ups.is_empty() => self.hung_up(sequence),
                message = inbox.recv() => match message {
                    Some(message) => self.take(message, &mut inbox),
                    None => break,
                },
            }
            self.advance().await;
            self.fill_window();
            if report::state(&self) != state {
                self.publish();
            }
            if self.is_drained() {
                break;
            }
        }
        self.leave();
    }

    fn take(&mut self, message: Message, inbox: &mut mpsc::Receiver<Message>) {
        self.handle(message);
        for _ in 1..BATCH {
            let Ok(message) = inbox.try_recv() else { return };
            self.handle(message);
        }
    }

    fn handle(&mut self, message: Message) {
        match message {
            Message::Generate(submission) => self.submit(*submission),
            Message::Abort { request_id, reply } => {
                // Whoever asked may be gone; the sequence is aborted all the same.
                let _ = reply.send(self.abort(&request_id));
            }
            Message::Attach { hello, commands, reply } => {
                let _ = reply.send(self.attach(*hello, commands));
            }
            Message::Event { member, event } => self.worker_event(member, event),
            Message::Detached { member, reason } => self.lose(member, None, &reason),
            Message::JoinSteps { join, plans, reply } => {
                let _ = reply.send(self.join_steps(&join, plans));
            }
            Message::Result { member, result } => self.step_result(member, *result),
            Message::StepsClosed { member, epoch, reason } => self.steps_closed(member, epoch, &reason),
        }
    }

    fn tick(&mut self) {
        let now = self.now();
        let lateness = now.saturating_sub(self.last_tick + TICK);
        self.last_tick = now;
        if lateness > TOLERATED_LATENESS {
            self.forgive(lateness);
        }
        self.check_deadlines(now);
        self.cancel_slow_readers(now);
        self.expire_queued(now);
        self.check_integrity(now);
        self.publish();
    }

    /// The books are checked when nothing runs: then every block must be free or cached.
    fn check_integrity(&mut self, now: Duration) {
        if !self.touched || !self.engine.is_idle() || now < self.checked + INTEGRITY_INTERVAL {
            return;
        }
        (self.checked, self.touched) = (now, false);
        self.instruments.integrity_checks += 1;
        let stats = self.engine.stats();
        let in_use = stats.full_blocks_used + stats.sliding_blocks_used;
        let leaked = if in_use > 0 { Err(format!("{in_use} blocks in use while idle")) } else { Ok(()) };
        if let Err(problem) = self.engine.check_integrity().and(leaked) {
            self.instruments.integrity_failures += 1;
            error!(problem, "the engine's books are wrong; this is a bug, please report it");
        }
    }

    fn publish(&self) {
        let load = report::load(self);
        self.published.send_if_modified(|published| {
            let changed = *published != load;
            *published = load;
            changed
        });
    }

    fn drain(&mut self) {
        info!(model = self.deployment.config.served_model_name, "draining");
        self.draining_since = Some(self.now());
    }

    fn is_drained(&self) -> bool {
        self.draining_since.is_some_and(|since| {
            let idle = self.engine.is_idle() && self.clients.is_empty();
            idle || self.now().saturating_sub(since) > self.limits.drain_grace
        })
    }

    /// Ends what still runs, and lets the workers go.
    fn leave(&mut self) {
        let live = self.clients.live();
        if !live.is_empty() {
            warn!(requests = live.len(), "grace period is over, ending what still runs");
        }
        let fault = Fault::new(FaultKind::Draining, "the coordinator shut down before the request was finished");
        for sequence in live {
            self.clients.failed(sequence, fault.clone(), self.now());
        }
        self.roster.leave("the coordinator is shutting down");
        self.publish();
    }
}

fn engine_config(deployment: &Deployment, limits: &Limits) -> EngineConfig {
    let demand = &deployment.demand;
    EngineConfig {
        block_size: demand.block_size,
        sliding_window: deployment.checkpoint.geometry.sliding_window,
        max_model_len: demand.max_model_len,
        max_num_batched_tokens: demand.max_num_batched_tokens,
        max_num_seqs: demand.max_num_seqs,
        max_num_queued_reqs: deployment.config.max_num_queued_reqs,
        max_queued_tokens: deployment.config.max_queued_tokens,
        max_queue_age: limits.max_queue_age,
        output_horizon: OUTPUT_HORIZON,
        window: WINDOW,
        enable_prefix_caching: demand.enable_prefix_caching,
        has_full_layers: deployment.has_layers(LayerKind::FullAttention),
        has_sliding_layers: deployment.has_layers(LayerKind::SlidingAttention),
    }
}
