//! The workers of one group: who is attached, which rank each has, and how far each is.

use std::{cmp::Reverse, collections::BTreeMap, time::Duration};

use phalanx_proto::{
    fault::{Fault, FaultKind},
    ids::{Epoch, Rank},
    v1::{self, worker_command::Command},
};
use tokio::sync::mpsc;
use tonic::Status;

/// Commands to one worker's Attach stream; an error ends the stream.
pub(crate) type CommandSender = mpsc::Sender<Result<v1::WorkerCommand, Status>>;
/// Plans to one worker's Steps stream; dropping it ends the stream.
pub(crate) type PlanSender = mpsc::Sender<Result<v1::Plan, Status>>;

/// One attachment of one worker. Never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct MemberId(pub u64);

/// How far a worker's shard is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Load {
    Loading { loaded: u64, total: u64 },
    Loaded { weight_bytes: u64, free_bytes: u64 },
}

/// What a member has done for an epoch.
#[derive(Debug, Default)]
pub(super) struct Readiness {
    /// The epoch that it was asked to prepare and has not been fenced from.
    epoch: Option<Epoch>,
    pub rendezvous: Option<Vec<u8>>,
    pub formed: bool,
    pub plans: Option<PlanSender>,
}

/// One attached worker.
#[derive(Debug)]
pub(super) struct Member {
    pub hello: v1::Hello,
    commands: CommandSender,
    /// Absent for a spare.
    pub rank: Option<Rank>,
    pub load: Load,
    pub readiness: Readiness,
    /// When it last said anything, on any stream.
    pub heard: Duration,
}

impl Member {
    /// Sends a command. A full queue means that the worker no longer reads; its stream's end will be noticed.
    pub(super) fn command(&self, command: Command) {
        if self.commands.try_send(Ok(v1::WorkerCommand { command: Some(command) })).is_err() {
            tracing::debug!(incarnation = self.hello.incarnation, "command not taken, worker is leaving or stuck");
        }
    }

    /// Ends the worker's stream with a reason.
    fn dismiss(&self, fault: Fault) {
        // The sender goes with the member, so a full queue only costs the reason.
        let _ = self.commands.try_send(Err(fault.into()));
    }
}

/// All attached workers of a group.
#[derive(Debug)]
pub(super) struct Roster {
    world_size: usize,
    parallelism: String,
    members: BTreeMap<MemberId, Member>,
    next_id: u64,
}

impl Roster {
    pub(super) fn new(world_size: usize, parallelism: String) -> Self {
        Self { world_size, parallelism, members: BTreeMap::new(), next_id: 1 }
    }

    /// The earlier attachment of a worker that attaches anew.
    pub(super) fn find_incarnation(&self, incarnation: u64) -> Option<MemberId> {
        self.members.iter().find(|(_, member)| member.hello.incarnation == incarnation).map(|(&id, _)| id)
    }

    /// Takes a worker in, as a rank if one is free, else as a spare.
    ///
    /// # Errors
    /// When there are as many spares as ranks already.
    pub(super) fn attach(
        &mut self,
        hello: v1::Hello,
        commands: CommandSender,
        now: Duration,
    ) -> Result<MemberId, Fault> {
        if self.members.len() >= 2 * self.world_size {
            let text = format!("the group of {} ranks has as many spares already", self.world_size);
            return Err(Fault::new(FaultKind::QueueFull, text));
        }
        let id = MemberId(self.next_id);
        self.next_id += 1;
        let load = Load::Loading { loaded: 0, total: 0 };
        let readiness = Readiness::default();
        self.members.insert(id, Member { hello, commands, rank: None, load, readiness, heard: now });
        self.fill(id, now);
        Ok(id)
    }

    /// Gives a spare the free rank that suits it best: the one that it holds already, else the one it would like, else
    /// the lowest.
    fn fill(&mut self, id: MemberId, now: Duration) {
        let missing = self.missing();
        let (world_size, parallelism) = (self.world_size as u32, self.parallelism.clone());
        let Some(member) = self.members.get_mut(&id).filter(|member| member.rank.is_none()) else { return };
        let resident = member.hello.resident.as_ref();
        let resident = resident.filter(|held| held.world_size == world_size && held.parallelism == parallelism);
        let wishes = [resident.map(|held| held.rank), member.hello.wanted_rank];
        let free = |rank: u32| missing.iter().copied().find(|missing| missing.0 == rank);
        let wished = wishes.into_iter().flatten().find_map(free);
        let Some(rank) = wished.or_else(|| missing.first().copied()) else { return };
        member.rank = Some(rank);
        member.heard = now;
        member.command(Command::Assign(v1::Assign { rank: rank.0, world_size, parallelism }));
    }

    /// Lets a worker go, with a reason for it, and gives its rank to a spare.
    pub(super) fn remove(&mut self, id: MemberId, fault: Option<Fault>, now: Duration) -> Option<Member> {
        let member = self.members.remove(&id)?;
        if let Some(fault) = fault {
            member.dismiss(fault);
        }
        if member.rank.is_some()
            && let Some(spare) = self.liveliest_spare()
        {
            self.fill(spare, now);
        }
        Some(member)
    }

    /// The spare that was heard last, of equal ones the oldest: one that hangs must not get a rank in the moment before
    /// its silence is noticed.
    fn liveliest_spare(&self) -> Option<MemberId> {
        let spares = self.members.iter().filter(|(_, member)| member.rank.is_none());
        spares.max_by_key(|(id, member)| (member.heard, Reverse(**id))).map(|(&id, _)| id)
    }

    pub(super) fn get_mut(&mut self, id: MemberId) -> Option<&mut Member> {
        self.members.get_mut(&id)
    }

    /// Every attached worker, spares included.
    pub(super) fn all(&self) -> impl Iterator<Item = &Member> {
        self.members.values()
    }

    /// Workers with a rank.
    pub(super) fn ranked(&self) -> impl Iterator<Item = (MemberId, Rank, &Member)> {
        self.members.iter().filter_map(|(&id, member)| member.rank.map(|rank| (id, rank, member)))
    }

    /// Ranks that no worker has.
    pub(super) fn missing(&self) -> Vec<Rank> {
        let taken: Vec<Rank> = self.ranked().map(|(_, rank, _)| rank).collect();
        (0..self.world_size as u32).map(Rank).filter(|rank| !taken.contains(rank)).collect()
    }

    /// Whether every rank has a worker of which `holds` is true.
    pub(super) fn all_ranks(&self, holds: impl Fn(&Member) -> bool) -> bool {
        self.ranked().filter(|(_, _, member)| holds(member)).count() == self.world_size
    }

    /// Workers with a rank of which `lags` is true.
    pub(super) fn laggards(&self, lags: impl Fn(&Member) -> bool) -> Vec<MemberId> {
        self.ranked().filter(|(_, _, member)| lags(member)).map(|(id, _, _)| id).collect()
    }

    /// Attached workers of which `holds` is true, spares included.
    pub(super) fn find_all(&self, holds: impl Fn(&Member) -> bool) -> Vec<MemberId> {
        self.members.iter().filter(|(_, member)| holds(member)).map(|(&id, _)| id).collect()
    }

    /// Counts nobody silent for the time in which the coordinator itself could not listen.
    pub(super) fn forgive(&mut self, lateness: Duration) {
        for member in self.members.values_mut() {
            member.heard += lateness;
        }
    }

    /// The highest epoch that any worker has formed.
    pub(super) fn highest_epoch(&self) -> Epoch {
        Epoch(self.all().map(|member| member.hello.highest_epoch).max().unwrap_or(0))
    }

    /// What the rank with the least memory left has for its KV cache, in bytes.
    pub(super) fn least_free_bytes(&self) -> u64 {
        let free = self.ranked().filter_map(|(_, _, member)| match member.load {
            Load::Loaded { free_bytes, .. } => Some(free_bytes),
            Load::Loading { .. } => None,
        });
        free.min().unwrap_or(0)
    }

    /// Asks every rank to open its end of a new epoch's collective.
    pub(super) fn prepare(&mut self, epoch: Epoch) {
        for member in self.members.values_mut().filter(|member| member.rank.is_some()) {
            member.readiness = Readiness { epoch: Some(epoch), ..Default::default() };
            let incarnation = member.hello.incarnation;
            member.command(Command::Prepare(v1::Prepare { epoch: epoch.0, incarnation }));
        }
    }

    /// Tells every rank where the others are. `shape` is the form without rendezvous and incarnation.
    pub(super) fn form(&mut self, shape: &v1::Form) {
        let mut ranked: Vec<_> = self.ranked().collect();
        ranked.sort_unstable_by_key(|&(_, rank, _)| rank);
        let rendezvous: Vec<Vec<u8>> =
            ranked.iter().map(|(_, _, member)| member.readiness.rendezvous.clone().unwrap_or_default()).collect();
        for (_, _, member) in ranked {
            let form =
                v1::Form { incarnation: member.hello.incarnation, rendezvous: rendezvous.clone(), ..shape.clone() };
            member.command(Command::Form(form));
        }
    }

    /// Tells every survivor that an epoch is over, and closes their step streams.
    pub(super) fn fence(&mut self, epoch: Epoch) {
        for member in self.members.values_mut().filter(|member| member.readiness.epoch == Some(epoch)) {
            member.readiness = Readiness::default();
            member.hello.highest_epoch = member.hello.highest_epoch.max(epoch.0);
            member.command(Command::Fence(v1::Fence { epoch: epoch.0 }));
        }
    }

    /// Asks every worker to end in order.
    pub(super) fn leave(&self, reason: &str) {
        for member in self.all() {
            member.command(Command::Leave(v1::Leave { reason: reason.to_owned() }));
        }
    }

    /// Sends one plan to every rank.
    ///
    /// # Errors
    /// Names the first rank that does not take it.
    pub(super) fn broadcast(&self, plan: &v1::Plan) -> Result<(), Rank> {
        for (_, rank, member) in self.ranked() {
            let taken = member.readiness.plans.as_ref().is_some_and(|plans| plans.try_send(Ok(plan.clone())).is_ok());
            if !taken {
                return Err(rank);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hello(incarnation: u64, wanted_rank: Option<u32>) -> v1::Hello {
        v1::Hello { incarnation, wanted_rank, ..Default::default() }
    }

    struct Workers {
        roster: Roster,
        inboxes: Vec<mpsc::Receiver<Result<v1::WorkerCommand, Status>>>,
    }

    impl Workers {
        fn new(world_size: usize) -> Self {
            Self { roster: Roster::new(world_size, "tp".into()), inboxes: Vec::new() }
        }

        fn attach(&mut self, hello: v1::Hello) -> Result<MemberId, Fault> {
            let (commands, inbox) = mpsc::channel(4);
            self.inboxes.push(inbox);
            self.roster.attach(hello, commands, Duration::ZERO)
        }

        fn ranks(&self) -> Vec<(u64, u32)> {
            self.roster.ranked().map(|(_, rank, member)| (member.hello.incarnation, rank.0)).collect()
        }
    }

    #[test]
    fn ranks_go_to_whom_holds_or_wants_them_else_by_arrival() {
        let mut workers = Workers::new(3);
        workers.attach(hello(10, Some(2))).unwrap();
        workers.attach(hello(11, Some(2))).unwrap();
        let held = v1::Assign { rank: 1, world_size: 3, parallelism: "tp".into() };
        workers.attach(v1::Hello { resident: Some(held), ..hello(12, Some(0)) }).unwrap();
        assert_eq!(workers.ranks(), [(10, 2), (11, 0), (12, 1)]);
        assert!(workers.roster.missing().is_empty());
    }

    #[test]
    fn a_resident_shard_of_another_layout_does_not_count() {
        let mut workers = Workers::new(2);
        let held = v1::Assign { rank: 1, world_size: 4, parallelism: "tp".into() };
        workers.attach(v1::Hello { resident: Some(held), ..hello(10, None) }).unwrap();
        assert_eq!(workers.ranks(), [(10, 0)]);
    }

    #[test]
    fn a_spare_takes_the_rank_of_a_worker_that_leaves() {
        let mut workers = Workers::new(1);
        let first = workers.attach(hello(10, None)).unwrap();
        workers.attach(hello(11, None)).unwrap();
        assert!(workers.attach(hello(12, None)).is_err(), "as many spares as ranks are enough");
        assert!(workers.inboxes[1].try_recv().is_err(), "a spare loads nothing");
        workers.roster.remove(first, Some(Fault::new(FaultKind::WorkerLost, "hung")), Duration::ZERO);
        assert_eq!(workers.ranks(), [(11, 0)]);
        let command = workers.inboxes[1].try_recv().unwrap().unwrap().command.unwrap();
        assert!(matches!(command, Command::Assign(v1::Assign { rank: 0, .. })));
    }
}
