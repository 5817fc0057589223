//! A worker's device in the simulation: it loads, forms and steps like the real one, in virtual time.
//!
//! Ranks meet at a [`Hub`] in place of a collective. Like NCCL it blocks: whoever waits for a rank that is gone waits
//! until its epoch is aborted, which the device learns from its plans' channel.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, Mutex},
    time::Duration,
};

use phalanx_proto::{
    fault::{Fault, FaultKind},
    v1::{self, step_message},
};
use phalanx_worker::{
    checkpoint::LoadedBytes,
    executor::{Command, Device, Event, Formation, Run},
};
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, sleep},
};

use crate::room::{Room, WORLD_SIZE};

/// How often a device looks whether the others have come, which is also what a step takes at least.
const LOOK: Duration = Duration::from_millis(2);
/// How long loading takes.
const LOADING: Duration = Duration::from_millis(300);
/// Bytes that the weights leave: a few sequences' worth, so that blocks are short now and then.
const FREE_BYTES: u64 = 3 << 20;

/// One epoch's ranks at their meeting place.
#[derive(Default)]
struct Meeting {
    seats: [Option<Formation>; WORLD_SIZE],
    room: Option<Room>,
    /// Somebody has left: nothing will come of it any more.
    broken: bool,
    brought: [Option<v1::Plan>; WORLD_SIZE],
    answers: [Option<Result<v1::StepResult, Fault>>; WORLD_SIZE],
}

/// Everything that the workers of one simulation share, and what was seen there.
#[derive(Default)]
struct Seen {
    meetings: BTreeMap<u64, Meeting>,
    newest: u64,
    steps: u64,
    /// Digest of all that happened, in order.
    trace: u64,
    violations: Vec<String>,
}

/// Where the ranks of all epochs meet.
#[derive(Clone, Default)]
pub(crate) struct Hub(Arc<Mutex<Seen>>);

/// A rank's place in an epoch; dropping it leaves.
struct Seat {
    hub: Hub,
    epoch: u64,
    rank: usize,
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut seen = self.hub.0.lock().unwrap();
        if let Some(meeting) = seen.meetings.get_mut(&self.epoch) {
            meeting.seats[self.rank] = None;
            (meeting.broken, meeting.room) = (true, None);
            if meeting.seats.iter().all(Option::is_none) {
                seen.meetings.remove(&self.epoch);
            }
        }
    }
}

impl Hub {
    /// Steps that were computed, and the digest of all that happened.
    pub(crate) fn summary(&self) -> (u64, u64) {
        let seen = self.0.lock().unwrap();
        (seen.steps, seen.trace)
    }

    /// What must not have happened.
    pub(crate) fn violations(&self) -> Vec<String> {
        self.0.lock().unwrap().violations.clone()
    }

    /// Adds to the digest of all that happened.
    pub(crate) fn note(&self, what: &str) {
        let at = turmoil::sim_elapsed().unwrap_or_default().as_micros();
        let mut seen = self.0.lock().unwrap();
        seen.trace = xxhash_rust::xxh3::xxh3_64_with_seed(format!("{at} {what}").as_bytes(), seen.trace);
    }

    fn sit(&self, rank: usize, formation: &Formation) -> Seat {
        let epoch = formation.epoch.0;
        self.note(&format!("rank {rank} sits down in epoch {epoch}"));
        let mut seen = self.0.lock().unwrap();
        let meeting = seen.meetings.entry(epoch).or_default();
        let taken = meeting.seats[rank].replace(formation.clone()).is_some() || meeting.broken;
        if taken {
            seen.violations.push(format!("epoch {epoch} is used twice, by rank {rank}"));
        }
        Seat { hub: self.clone(), epoch, rank }
    }

    /// Whether all ranks have sat down. The last one forms the group.
    fn is_formed(&self, epoch: u64) -> Result<bool, Fault> {
        let mut seen = self.0.lock().unwrap();
        let Some(meeting) = seen.meetings.get_mut(&epoch).filter(|meeting| !meeting.broken) else { return Ok(false) };
        if meeting.room.is_none() && meeting.seats.iter().all(Option::is_some) {
            let formation = meeting.seats[0].clone().unwrap();
            meeting.room = Some(Room::open(&formation)?);
            if seen.newest >= epoch {
                let newest = seen.newest;
                seen.violations.push(format!("epoch {epoch} is formed after epoch {newest}"));
            }
            seen.newest = seen.newest.max(epoch);
        }
        Ok(seen.meetings.get(&epoch).is_some_and(|meeting| meeting.room.is_some()))
    }

    /// Brings a rank's next plan. Once all have, all compute.
    fn bring(&self, epoch: u64, rank: usize, plan: v1::Plan) {
        let mut seen = self.0.lock().unwrap();
        let newest = seen.newest;
        let Some(meeting) = seen.meetings.get_mut(&epoch) else { return };
        meeting.brought[rank] = Some(plan);
        let Some(room) = meeting.room.as_ref().filter(|_| meeting.brought.iter().all(Option::is_some)) else { return };
        let plans: Vec<v1::Plan> = meeting.brought.iter_mut().filter_map(Option::take).collect();
        let step = plans[0].step;
        let equal = plans.iter().all(|plan| *plan == plans[0]);
        let answers = room.step(plans);
        let digests: Vec<Option<u64>> =
            answers.iter().map(|answer| answer.as_ref().ok().map(|result| result.token_digest)).collect();
        let agree = digests.iter().all(|digest| digest.is_some() && *digest == digests[0]);
        meeting.answers = answers.into_iter().map(Some).collect::<Vec<_>>().try_into().unwrap();
        seen.steps += 1;
        if epoch < newest {
            seen.violations.push(format!("epoch {epoch} runs step {step} after epoch {newest} was formed"));
        }
        if !equal || !agree {
            seen.violations.push(format!("epoch {epoch}, step {step}: ranks differ: {digests:?}"));
        }
        drop(seen);
        self.note(&format!("epoch {epoch} step {step} {digests:?}"));
    }

    fn take(&self, epoch: u64, rank: usize) -> Option<Result<v1::StepResult, Fault>> {
        self.0.lock().unwrap().meetings.get_mut(&epoch)?.answers[rank].take()
    }
}

/// Plans of one epoch, which can also be waited beside.
struct Inbox {
    plans: mpsc::Receiver<v1::Plan>,
    early: VecDeque<v1::Plan>,
}

impl Inbox {
    async fn next(&mut self) -> Option<v1::Plan> {
        match self.early.pop_front() {
            Some(plan) => Some(plan),
            None => self.plans.recv().await,
        }
    }

    /// Waits a little, unless the epoch is aborted.
    async fn pause(&mut self) -> Result<(), Fault> {
        let until = Instant::now() + LOOK;
        loop {
            tokio::select! {
                biased;
                plan = self.plans.recv() => match plan {
                    Some(plan) => self.early.push_back(plan),
                    None => return Err(Fault::new(FaultKind::CollectiveAborted, "the collective was aborted")),
                },
                () = tokio::time::sleep_until(until) => return Ok(()),
            }
        }
    }
}

/// A device, and the task that is behind it.
pub(crate) fn device(hub: Hub) -> (Device, impl Future<Output = ()> + Send) {
    let (command_sender, mut commands) = mpsc::channel(16);
    let (events, event_receiver) = mpsc::channel(16);
    let (progress, progress_receiver) = watch::channel(LoadedBytes { loaded: 0, total: 0 });
    let task = async move {
        let _progress = progress;
        let mut rank = 0;
        while let Some(command) = commands.recv().await {
            let event = match command {
                Command::Load(assign) => {
                    sleep(LOADING).await;
                    rank = assign.rank as usize;
                    Event::Loaded { assign, loaded: v1::Loaded { weight_bytes: 1 << 20, free_bytes: FREE_BYTES } }
                }
                Command::Run(run) => {
                    let epoch = run.formation.epoch;
                    Event::Ended(epoch, run_epoch(&hub, rank, *run, &events).await)
                }
            };
            if events.send(event).await.is_err() {
                return;
            }
        }
    };
    let device = Device {
        backend: "cpu",
        description: "simulated".to_owned(),
        commands: command_sender,
        events: event_receiver,
        progress: progress_receiver,
    };
    (device, task)
}

async fn run_epoch(hub: &Hub, rank: usize, run: Run, events: &mpsc::Sender<Event>) -> Result<(), Fault> {
    let epoch = run.formation.epoch;
    let mut inbox = Inbox { plans: run.plans, early: VecDeque::new() };
    let _seat = hub.sit(rank, &run.formation);
    let deadline = Instant::now() + run.patience;
    while !hub.is_formed(epoch.0)? {
        inbox.pause().await?;
        if Instant::now() > deadline {
            return Err(Fault::new(FaultKind::CollectiveAborted, "ranks are missing"));
        }
    }
    if events.send(Event::Formed(epoch)).await.is_err() {
        return Ok(());
    }
    while let Some(plan) = inbox.next().await {
        hub.bring(epoch.0, rank, plan);
        let result = loop {
            inbox.pause().await?;
            if let Some(answer) = hub.take(epoch.0, rank) {
                break answer?;
            }
        };
        let message = v1::StepMessage { message: Some(step_message::Message::Result(result)) };
        if run.results.send(message).await.is_err() {
            break;
        }
    }
    Ok(())
}
