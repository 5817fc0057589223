//! One attachment to a coordinator: obeys its commands, tells it the device's news.

use std::{future::pending, time::Duration};

use phalanx_proto::{
    fault::{Fault, FaultKind},
    v1::{self, step_message, worker_command::Command as Order, worker_event::Event as News},
};
use tokio::{
    sync::mpsc,
    task::{AbortHandle as TaskHandle, JoinError, JoinSet},
    time::{Instant, Interval, MissedTickBehavior, interval_at, sleep_until, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};
use tracing::{debug, warn};

use super::{
    connection::{Client, fault_event, follow_steps},
    worker::{Resident, Worker, bug},
};
use crate::{
    checkpoint::LoadedBytes,
    collective::{AbortHandle, host::Preparation},
    executor::{Command, Event, Formation, Run, faults},
};

/// How often a worker says that it is alive. The coordinator misses several before it gives one up; this comes from
/// beside the device's thread, so that a long step is not taken for a process that hangs.
const PULSE_INTERVAL: Duration = Duration::from_secs(1);
/// How often loading is reported.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(200);
/// How long a group may take to meet, from the first rank's `Form` on. A rank that is missing ends the epoch earlier,
/// because the coordinator notices.
const FORM_TIMEOUT: Duration = Duration::from_secs(30);
/// Plans and results under way; the coordinator's window is smaller.
const STEP_QUEUE: usize = 16;
/// Events that wait for the network.
const EVENT_QUEUE: usize = 64;
/// Longest wait for the coordinator to take the last event of a worker that ends.
const FAREWELL: Duration = Duration::from_secs(2);

/// How an attachment ended.
pub(super) enum End {
    /// The coordinator said so, and why.
    Left(String),
    /// The coordinator is gone.
    Lost(String),
    /// The coordinator has no use for this worker now, but may have later.
    Refused(String),
}

/// An epoch between `Form` and its end.
struct Running {
    epoch: u64,
    abort: AbortHandle,
    /// Both ends of the step log, until the group is formed.
    log: Option<(mpsc::Receiver<v1::StepMessage>, mpsc::Sender<v1::Plan>)>,
    steps: Option<TaskHandle>,
}

/// One attachment.
pub(super) struct Session<'a> {
    worker: &'a mut Worker,
    client: Client,
    news: mpsc::Sender<v1::WorkerEvent>,
    /// What this coordinator asked for.
    assigned: Option<v1::Assign>,
    prepared: Option<(u64, Preparation)>,
    running: Option<Running>,
    /// Step logs by epoch; all but the last one are being aborted.
    steps: JoinSet<(u64, Result<(), Status>)>,
    reported: LoadedBytes,
}

impl<'a> Session<'a> {
    /// Attaches and obeys until the coordinator is gone or says to leave. No epoch runs afterwards; the weights stay.
    pub(super) async fn attach(worker: &'a mut Worker, mut client: Client) -> Result<End, Fault> {
        let (news, outgoing) = mpsc::channel(EVENT_QUEUE);
        let reported = *worker.device.progress.borrow();
        let (assigned, prepared, running) = (None, None, None);
        let mut session = Session {
            worker,
            client: client.clone(),
            news,
            assigned,
            prepared,
            running,
            steps: JoinSet::new(),
            reported,
        };
        session.tell(News::Hello(session.worker.hello())).await;
        let mut orders = match client.attach(ReceiverStream::new(outgoing)).await {
            Ok(attached) => attached.into_inner(),
            Err(status) => return refused(&status),
        };
        let outcome = session.serve(&mut orders).await;
        if outcome.is_err() {
            // Half-closing lets what was told last reach the coordinator before the process ends.
            drop(session);
            let _ = timeout(FAREWELL, async { while let Ok(Some(_)) = orders.message().await {} }).await;
        }
        outcome
    }

    async fn serve(&mut self, orders: &mut Streaming<v1::WorkerCommand>) -> Result<End, Fault> {
        let (mut progress, mut pulse) = (every(PROGRESS_INTERVAL), every(PULSE_INTERVAL));
        loop {
            // The device comes first, so that an epoch that has ended is not taken for one that hangs.
            tokio::select! {
                biased;
                event = self.worker.device.events.recv() => {
                    self.on_event(event.ok_or_else(|| bug("the device thread has ended"))?).await?;
                }
                order = orders.message() => match order {
                    Ok(Some(v1::WorkerCommand { command: Some(Order::Leave(leave)) })) => {
                        return Ok(End::Left(leave.reason));
                    }
                    Ok(Some(v1::WorkerCommand { command })) => self.obey(command).await?,
                    Ok(None) => return Ok(End::Lost("the coordinator closed the stream".to_owned())),
                    Err(status) => return Ok(End::Lost(status.to_string())),
                },
                Some(ended) = self.steps.join_next() => self.on_steps_ended(ended),
                () = stuck(self.worker.ending) => return Err(self.give_up().await),
                _ = pulse.tick() => self.tell(News::Pulse(v1::Pulse {})).await,
                _ = progress.tick(), if self.worker.loading.is_some() => self.tell_progress().await,
            }
        }
    }

    async fn tell(&self, event: News) {
        // Fails only when the stream is gone; then reading from it says so.
        let _ = self.news.send(v1::WorkerEvent { event: Some(event) }).await;
    }

    async fn tell_fault(&self, epoch: u64, fault: &Fault) {
        warn!(epoch, kind = fault.kind.name(), message = fault.message, "fault");
        self.tell(fault_event(epoch, fault)).await;
    }

    async fn tell_progress(&mut self) {
        let now = *self.worker.device.progress.borrow();
        if std::mem::replace(&mut self.reported, now) != now {
            self.tell(News::Progress(v1::LoadProgress { loaded_bytes: now.loaded, total_bytes: now.total })).await;
        }
    }

    async fn obey(&mut self, order: Option<Order>) -> Result<(), Fault> {
        match order {
            Some(Order::Assign(assign)) => self.assign(assign).await,
            Some(Order::Prepare(prepare)) => {
                self.prepare(prepare).await;
                Ok(())
            }
            Some(Order::Form(form)) => self.form(form).await,
            Some(Order::Fence(fence)) => {
                debug!(epoch = fence.epoch, "fenced");
                self.end_epochs_up_to(fence.epoch);
                Ok(())
            }
            // `Leave` was taken by the caller; an unknown command comes from a newer coordinator.
            Some(Order::Leave(_)) | None => Ok(()),
        }
    }

    async fn assign(&mut self, assign: v1::Assign) -> Result<(), Fault> {
        self.end_epoch();
        self.assigned = Some(assign.clone());
        if let Some(resident) = self.worker.resident.as_ref().filter(|resident| resident.assign == assign) {
            self.tell(News::Loaded(resident.loaded)).await;
            return Ok(());
        }
        // A coordinator that came back asks for what is being loaded already.
        if self.worker.loading.as_ref() != Some(&assign) {
            self.worker.resident = None;
            self.worker.loading = Some(assign.clone());
            self.worker.command(Command::Load(assign)).await?;
        }
        Ok(())
    }

    /// Whether an epoch's message is for this process and newer than all before.
    async fn accepts(&self, what: &str, epoch: u64, incarnation: u64, expected: bool) -> bool {
        if incarnation != self.worker.incarnation {
            warn!(what, epoch, incarnation, "meant for another process; ignored");
            return false;
        }
        if !expected {
            let highest = self.worker.highest_epoch;
            let message = format!("{what} of epoch {epoch}, but this worker has seen epoch {highest}");
            self.tell_fault(epoch, &Fault::new(FaultKind::StaleEpoch, message)).await;
        }
        expected
    }

    async fn prepare(&mut self, order: v1::Prepare) {
        let newer = order.epoch > self.worker.highest_epoch;
        if !self.accepts("prepare", order.epoch, order.incarnation, newer).await {
            return;
        }
        self.end_epoch();
        self.worker.highest_epoch = order.epoch;
        let bind_ip = self.worker.config.bind_ip;
        match Preparation::new(order.epoch, order.incarnation, &self.worker.host, bind_ip) {
            Ok(preparation) => {
                let rendezvous = preparation.rendezvous();
                self.prepared = Some((order.epoch, preparation));
                self.tell(News::Prepared(v1::Prepared { epoch: order.epoch, rendezvous })).await;
            }
            Err(error) => self.tell_fault(order.epoch, &faults::of_collective(&error)).await,
        }
    }

    async fn form(&mut self, order: v1::Form) -> Result<(), Fault> {
        let epoch = order.epoch;
        let prepared = self.prepared.as_ref().is_some_and(|(prepared, _)| *prepared == epoch);
        if !self.accepts("form", epoch, order.incarnation, prepared).await {
            return Ok(());
        }
        let Some((_, preparation)) = self.prepared.take() else { return Ok(()) };
        let formation = match Formation::from_message(&order, self.worker.sampled_vocab) {
            Ok(formation) => formation,
            Err(fault) => {
                self.tell_fault(epoch, &fault).await;
                return Ok(());
            }
        };
        let (plan_sender, plans) = mpsc::channel(STEP_QUEUE);
        let (results, result_receiver) = mpsc::channel(STEP_QUEUE);
        let rank = self.assigned.as_ref().map_or(0, |assign| assign.rank);
        let join = v1::StepJoin { epoch, rank, incarnation: self.worker.incarnation };
        let join = v1::StepMessage { message: Some(step_message::Message::Join(join)) };
        results.try_send(join).map_err(|_| bug("a new channel is full"))?;
        let abort = preparation.abort_handle();
        self.running = Some(Running { epoch, abort, log: Some((result_receiver, plan_sender)), steps: None });
        let (rendezvous, patience) = (order.rendezvous, FORM_TIMEOUT);
        let run = Run { preparation, rendezvous, patience, formation, plans, results };
        self.worker.command(Command::Run(Box::new(run))).await
    }

    async fn on_event(&mut self, event: Event) -> Result<(), Fault> {
        match event {
            Event::Loaded { assign, loaded } if self.worker.loading.as_ref() == Some(&assign) => {
                self.worker.loading = None;
                if self.assigned.as_ref() == Some(&assign) {
                    self.tell(News::Loaded(loaded)).await;
                }
                self.worker.resident = Some(Resident { assign, loaded });
            }
            Event::Loaded { .. } => debug!("loaded a shard that is no longer wanted"),
            Event::NotLoaded(fault) => {
                self.tell_fault(0, &fault).await;
                return Err(fault);
            }
            Event::Formed(epoch) => self.on_formed(epoch.0).await,
            Event::Ended(epoch, outcome) => self.on_ended(epoch.0, outcome).await,
        }
        Ok(())
    }

    async fn on_formed(&mut self, epoch: u64) {
        let Some(running) = self.running.as_mut().filter(|running| running.epoch == epoch) else { return };
        let Some((results, plans)) = running.log.take() else { return };
        let log = follow_steps(self.client.clone(), results, plans);
        running.steps = Some(self.steps.spawn(async move { (epoch, log.await) }));
        self.tell(News::Formed(v1::Formed { epoch })).await;
    }

    async fn on_ended(&mut self, epoch: u64, outcome: Result<(), Fault>) {
        if self.worker.ending.is_some_and(|(ending, _)| ending == epoch) {
            self.worker.ending = None;
        }
        // An epoch that was ended from here has nothing more to tell.
        if self.running.as_ref().is_none_or(|running| running.epoch != epoch) {
            return;
        }
        if let Err(fault) = outcome {
            self.tell_fault(epoch, &fault).await;
        }
        self.end_epoch();
        self.worker.ending = None;
    }

    fn on_steps_ended(&mut self, ended: Result<(u64, Result<(), Status>), JoinError>) {
        // An aborted task belongs to an epoch that has been ended.
        let Ok((epoch, outcome)) = ended else { return };
        if self.running.as_ref().is_some_and(|running| running.epoch == epoch) {
            let reason = outcome.err().map_or_else(|| "closed".to_owned(), |status| status.to_string());
            warn!(epoch, reason, "the step log has ended");
            self.end_epoch();
        }
    }

    fn end_epochs_up_to(&mut self, epoch: u64) {
        if self.prepared.as_ref().is_some_and(|(prepared, _)| *prepared <= epoch)
            || self.running.as_ref().is_some_and(|running| running.epoch <= epoch)
        {
            self.end_epoch();
        }
    }

    /// Aborts the collective and forgets every sequence. The weights stay.
    fn end_epoch(&mut self) {
        self.prepared = None;
        if let Some(running) = self.running.take() {
            running.abort.abort();
            if let Some(steps) = running.steps {
                steps.abort();
            }
            self.worker.watch_end_of(running.epoch);
        }
    }

    async fn give_up(&mut self) -> Fault {
        let epoch = self.worker.ending.map_or(0, |(epoch, _)| epoch);
        let fault = bug(format!("epoch {epoch} was aborted and did not end; the process has to start again"));
        self.tell_fault(epoch, &fault).await;
        fault
    }
}

impl Drop for Session<'_> {
    /// Whatever ends an attachment ends its epoch.
    fn drop(&mut self) {
        self.end_epoch();
    }
}

/// A refusal that another attempt would only meet again ends the worker.
fn refused(status: &Status) -> Result<End, Fault> {
    let fault = Fault::from(status);
    match fault.kind {
        FaultKind::Checkpoint | FaultKind::InvalidArgument | FaultKind::ModelNotFound | FaultKind::Unsupported => {
            Err(Fault { message: format!("the coordinator refuses this worker: {}", fault.message), ..fault })
        }
        _ => Ok(End::Refused(fault.message)),
    }
}

/// Ticks, for the first time after one interval; a tick that comes late puts off those after it.
fn every(period: Duration) -> Interval {
    let mut ticks = interval_at(Instant::now() + period, period);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks
}

/// Waits until an aborted epoch should have ended.
async fn stuck(ending: Option<(u64, Instant)>) {
    match ending {
        Some((_, deadline)) => sleep_until(deadline).await,
        None => pending().await,
    }
}
