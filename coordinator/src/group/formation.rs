//! How a group comes to be, and how it ends an epoch: attach → load → prepare → form → ready, fence → form again.

use std::time::Duration;

use phalanx_proto::{
    fault::{Fault, FaultKind},
    ids::Epoch,
    v1::{self, worker_event},
};
use tracing::{info, warn};

use super::{
    actor::{Group, Phase},
    flight::Flight,
    roster::{CommandSender, Load, Member, MemberId, PlanSender},
};
use crate::planner::pools::{self, KvDemand, KvPools, PoolError};

/// Longest text that a worker may say about itself.
const MAX_HELLO_BYTES: usize = 256;
/// Longest rendezvous; every rank gets all of them.
const MAX_RENDEZVOUS_BYTES: usize = 64 << 10;
/// When a stream breaks, who is gone becomes clear a moment later: forming at once would only fail again.
const SETTLE: Duration = Duration::from_millis(20);
/// Wait after an epoch could not be issued.
const REISSUE: Duration = Duration::from_millis(500);

impl Group {
    /// Takes a worker in.
    ///
    /// # Errors
    /// When it computes with another backend, holds another checkpoint, or is one too many.
    pub(super) fn attach(&mut self, hello: v1::Hello, commands: CommandSender) -> Result<MemberId, Fault> {
        check_hello(&hello)?;
        let backend = self.deployment.config.backend.to_string();
        if hello.backend != backend {
            let text = format!("worker computes with {:?}, this group with {backend:?}", hello.backend);
            return Err(Fault::new(FaultKind::Unsupported, text));
        }
        let digest = self.deployment.checkpoint.digest;
        // 0: the worker could not open its checkpoint; the fault that says why follows.
        if hello.checkpoint_digest != digest && hello.checkpoint_digest != 0 {
            let (found, path) = (hello.checkpoint_digest, self.deployment.checkpoint.path.display());
            let text =
                format!("worker's checkpoint has digest {found:016x}, {path} has {digest:016x}; use equal files");
            return Err(Fault::new(FaultKind::Checkpoint, text));
        }
        if let Some(earlier) = self.roster.find_incarnation(hello.incarnation) {
            self.lose(earlier, None, "it attached anew");
        }
        let (now, incarnation, host) = (self.now(), hello.incarnation, hello.host.clone());
        let id = self.roster.attach(hello, commands, now)?;
        let rank = self.roster.get_mut(id).and_then(|member| member.rank).map(|rank| rank.0);
        info!(incarnation, host, rank, "worker attached");
        if let Phase::Failed { .. } = self.phase {
            self.phase = Phase::Gathering { not_before: now };
        }
        Ok(id)
    }

    /// Takes what a worker says about itself.
    pub(super) fn worker_event(&mut self, id: MemberId, event: worker_event::Event) {
        let (now, current) = (self.now(), self.phase.epoch());
        let Some(member) = self.roster.get_mut(id) else { return };
        member.heard = now;
        match event {
            worker_event::Event::Progress(progress) => {
                if let Load::Loading { loaded, total } = &mut member.load {
                    (*loaded, *total) = (progress.loaded_bytes, progress.total_bytes);
                }
            }
            worker_event::Event::Loaded(loaded) => {
                let v1::Loaded { weight_bytes, free_bytes } = loaded;
                member.load = Load::Loaded { weight_bytes, free_bytes };
            }
            worker_event::Event::Prepared(prepared) => {
                if prepared.rendezvous.len() > MAX_RENDEZVOUS_BYTES {
                    let text = format!("rendezvous is {} bytes long", prepared.rendezvous.len());
                    self.lose(id, Some(Fault::invalid("rendezvous", text.clone())), &text);
                } else if current == Some(Epoch(prepared.epoch)) {
                    member.readiness.rendezvous = Some(prepared.rendezvous);
                }
            }
            worker_event::Event::Formed(formed) => {
                if current == Some(Epoch(formed.epoch)) {
                    member.readiness.formed = true;
                }
            }
            worker_event::Event::Fault(fault) => self.worker_fault(id, &fault),
            worker_event::Event::Pulse(v1::Pulse {}) => {}
            worker_event::Event::Hello(_) => {
                let fault = Fault::new(FaultKind::InvalidArgument, "hello is sent once, as the first message");
                self.lose(id, Some(fault), "it said hello twice");
            }
        }
    }

    /// A worker's fault ends its epoch; one that another attempt would only repeat ends the group.
    fn worker_fault(&mut self, id: MemberId, fault: &v1::WorkerFault) {
        let Some(member) = self.roster.get_mut(id) else { return };
        let Some(rank) = member.rank else { return };
        let loading = matches!(member.load, Load::Loading { .. });
        let kind = FaultKind::from_name(&fault.kind).unwrap_or(FaultKind::Internal);
        let for_good = matches!(kind, FaultKind::Checkpoint | FaultKind::OutOfMemory | FaultKind::Unsupported);
        let reason = format!("rank {rank}: {}", fault.message);
        if loading || for_good {
            self.fail(reason);
        } else if self.phase.epoch() == Some(Epoch(fault.epoch)) {
            self.fence(&reason);
        } else {
            warn!(rank = rank.0, epoch = fault.epoch, kind = kind.name(), message = fault.message, "late fault");
        }
    }

    /// Lets a worker go. If it had a rank, the epoch is over.
    pub(super) fn lose(&mut self, id: MemberId, dismissal: Option<Fault>, reason: &str) {
        let now = self.now();
        let Some(member) = self.roster.remove(id, dismissal, now) else { return };
        let Some(rank) = member.rank else { return };
        warn!(rank = rank.0, incarnation = member.hello.incarnation, reason, "worker lost");
        self.last_failure = format!("rank {rank} was lost: {reason}");
        self.fence(&self.last_failure.clone());
    }

    /// Accepts a worker's stream of steps.
    ///
    /// # Errors
    /// When it is not for the epoch that is being formed, or not from the worker that has the rank.
    pub(super) fn join_steps(&mut self, join: &v1::StepJoin, plans: PlanSender) -> Result<MemberId, Fault> {
        let Phase::Forming { epoch, .. } = self.phase else {
            return Err(stale(format!("epoch {} is not being formed", join.epoch)));
        };
        if epoch.0 != join.epoch {
            return Err(stale(format!("epoch {} is not being formed, {epoch} is", join.epoch)));
        }
        let id = self.roster.find_incarnation(join.incarnation);
        let member = id.and_then(|id| self.roster.get_mut(id).map(|member| (id, member)));
        let Some((id, member)) = member.filter(|(_, member)| member.rank.is_some_and(|rank| rank.0 == join.rank))
        else {
            return Err(stale(format!("rank {} belongs to another worker", join.rank)));
        };
        member.readiness.plans = Some(plans);
        Ok(id)
    }

    /// A stream of steps has ended before its epoch did.
    pub(super) fn steps_closed(&mut self, id: MemberId, epoch: Epoch, reason: &str) {
        if self.phase.epoch() != Some(epoch) {
            return;
        }
        let rank = self.roster.get_mut(id).and_then(|member| member.rank);
        let rank = rank.map_or_else(|| "a rank".to_owned(), |rank| format!("rank {rank}"));
        self.fence(&format!("{rank} closed its stream of steps: {reason}"));
    }

    /// Goes on to the next phase once everybody is there.
    pub(super) async fn advance(&mut self) {
        match self.phase {
            Phase::Gathering { not_before } => {
                let loaded = |member: &Member| matches!(member.load, Load::Loaded { .. });
                if self.now() >= not_before && self.roster.all_ranks(loaded) {
                    self.prepare().await;
                }
            }
            Phase::Preparing { epoch, .. } => {
                if self.roster.all_ranks(|member| member.readiness.rendezvous.is_some()) {
                    self.form(epoch);
                }
            }
            Phase::Forming { epoch, pools, .. } => {
                if self.roster.all_ranks(|member| member.readiness.formed && member.readiness.plans.is_some()) {
                    self.start(epoch, pools);
                }
            }
            Phase::Running { .. } | Phase::Failed { .. } => {}
        }
    }

    async fn prepare(&mut self) {
        let issued = self.epochs.next(self.roster.highest_epoch()).await;
        let now = self.now();
        match issued {
            Ok(epoch) => {
                info!(epoch = epoch.0, "forming");
                self.roster.prepare(epoch);
                self.phase = Phase::Preparing { epoch, since: now };
            }
            Err(error) => {
                let reason = format!("no epoch could be issued: {error}");
                // Nothing is wrong with the group, so this counts as no crash. Saying it once is enough.
                if reason != self.last_failure {
                    warn!(%error, "no epoch could be issued");
                    self.last_failure = reason;
                }
                self.phase = Phase::Gathering { not_before: now + REISSUE };
            }
        }
    }

    fn form(&mut self, epoch: Epoch) {
        let config = &self.deployment.config;
        let free = self.roster.least_free_bytes();
        let memory = config.kv_cache_memory_bytes.map_or(free, |most| most.min(free));
        let (pools, context) = match self.cut_pools(memory) {
            Ok(cut) => cut,
            Err(error) => return self.fail(error.to_string()),
        };
        self.context = context;
        let kv = v1::KvCacheShape {
            block_size: config.block_size as u32,
            full_blocks: pools.full_blocks,
            sliding_blocks: pools.sliding_blocks,
        };
        self.roster.form(&v1::Form {
            epoch: epoch.0,
            kv: Some(kv),
            max_batch_tokens: config.max_num_batched_tokens as u32,
            max_batch_sequences: config.max_num_seqs as u32,
            ..Default::default()
        });
        self.phase = Phase::Forming { epoch, since: self.now(), pools };
    }

    /// Pools for `memory` bytes on each rank, and the longest sequence that they serve.
    fn cut_pools(&self, memory: u64) -> Result<(KvPools, usize), PoolError> {
        let (bytes, window) = (self.deployment.block_bytes(), self.deployment.checkpoint.geometry.sliding_window);
        let split =
            |demand: &KvDemand| pools::split(memory, &bytes, window, demand).map(|pools| (pools, demand.max_model_len));
        let demand = &self.deployment.demand;
        match split(demand) {
            Err(short) if self.deployment.context_may_shrink && short.largest > 0 => {
                split(&KvDemand { max_model_len: short.largest as usize, ..demand.clone() })
            }
            outcome => outcome,
        }
    }

    fn start(&mut self, epoch: Epoch, pools: KvPools) {
        let now = self.now();
        let flight = Flight::new(epoch, self.deployment.world_size(), self.pace, now);
        self.phase = Phase::Running { flight, pools };
        (self.was_ready, self.stalled_since, self.touched) = (true, None, true);
        let KvPools { full_blocks, sliding_blocks } = pools;
        info!(epoch = epoch.0, full_blocks, sliding_blocks, max_model_len = self.context, "ready");
        let events = self.engine.begin_epoch(epoch, full_blocks as usize, sliding_blocks as usize);
        self.deliver(events);
    }

    /// Ends the epoch that runs or is being formed. Survivors keep their weights; live requests wait for the next one.
    pub(super) fn fence(&mut self, reason: &str) {
        let Some(epoch) = self.phase.epoch() else { return };
        let now = self.now();
        let ran = match &self.phase {
            Phase::Running { flight, .. } => now.saturating_sub(flight.began()),
            _ => Duration::ZERO,
        };
        let delay = self.crashes.record(now, ran).max(SETTLE);
        warn!(epoch = epoch.0, reason, delay_ms = delay.as_millis() as u64, "epoch ended");
        self.instruments.failed_epochs += 1;
        reason.clone_into(&mut self.last_failure);
        self.roster.fence(epoch);
        let ended = std::mem::replace(&mut self.phase, Phase::Gathering { not_before: now + delay });
        if let Phase::Running { flight, .. } = ended {
            self.pace = flight.pace();
            let present = self.engine.sequences_in_flight();
            self.engine.end_epoch();
            self.stalled_since = Some(now);
            self.judge_crash(&present, reason);
            self.give_up_exhausted(reason);
        }
    }

    /// Ends the group until another worker attaches. Nobody is kept waiting for it.
    pub(super) fn fail(&mut self, reason: String) {
        self.fence(&reason);
        warn!(reason, "group failed");
        self.fail_live(&Fault::new(FaultKind::NotReady, format!("the group failed: {reason}")));
        self.phase = Phase::Failed { reason };
    }
}

/// What a worker says about itself is shown and kept, so it is bounded.
fn check_hello(hello: &v1::Hello) -> Result<(), Fault> {
    if hello.incarnation == 0 {
        return Err(Fault::invalid("incarnation", "incarnation is 0, expected a number drawn at random"));
    }
    for (field, text) in [("host", &hello.host), ("device", &hello.device), ("backend", &hello.backend)] {
        if text.len() > MAX_HELLO_BYTES {
            let text = format!("{field} is {} bytes long, expected at most {MAX_HELLO_BYTES}", text.len());
            return Err(Fault::invalid(field, text));
        }
    }
    Ok(())
}

fn stale(message: String) -> Fault {
    Fault::new(FaultKind::StaleEpoch, message)
}
