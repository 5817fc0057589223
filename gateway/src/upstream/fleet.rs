//! What the coordinator serves and how it fares, as it said last.

use phalanx_proto::{
    fault::{Fault, FaultKind},
    v1::{Capacity, DeploymentLoad, GroupState},
};

/// The last word of the coordinator.
#[derive(Clone, Debug, Default)]
pub(crate) struct Fleet {
    /// Whether the coordinator is connected now.
    pub(crate) reachable: bool,
    /// Why it is not.
    detail: String,
    /// Kept when the coordinator is lost: names and sizes stay true.
    pub(crate) deployments: Vec<DeploymentLoad>,
    was_ready: bool,
    /// Whether there are other coordinators to go to.
    others: bool,
}

impl Fleet {
    /// Nothing is known yet. `others`: whether there is more than one coordinator.
    pub(super) fn new(others: bool) -> Self {
        Self { others, ..Self::default() }
    }

    pub(super) fn learn(&mut self, capacity: Capacity) {
        self.reachable = true;
        self.deployments = capacity.deployments;
        self.was_ready |= self.is_ready();
    }

    pub(super) fn lost(&mut self, fault: &Fault) {
        self.reachable = false;
        self.detail = fault.message.clone();
    }

    /// Whether something can be generated now.
    pub(crate) fn is_ready(&self) -> bool {
        self.reachable && self.deployments.iter().any(|load| load.state() == GroupState::Ready)
    }

    /// Whether waiting a little makes sense: a group that ran is forming again, the coordinator is being restarted, or
    /// another one takes over from it.
    pub(super) fn may_be_ready_soon(&self) -> bool {
        let over = |load: &DeploymentLoad| match load.state() {
            GroupState::Failed => true,
            GroupState::Draining => !self.others,
            _ => false,
        };
        self.was_ready && !(self.reachable && self.deployments.iter().all(over))
    }

    /// Whether every group has failed for good.
    pub(super) fn has_failed(&self) -> bool {
        let failed = |load: &DeploymentLoad| load.state() == GroupState::Failed;
        self.reachable && !self.deployments.is_empty() && self.deployments.iter().all(failed)
    }

    /// What to tell those who cannot be served.
    pub(crate) fn not_ready(&self) -> Fault {
        if !self.reachable {
            let detail = if self.detail.is_empty() { "not connected yet" } else { &self.detail };
            return Fault::new(FaultKind::NotReady, format!("the coordinator cannot be reached: {detail}"));
        }
        let Some(load) = self.deployments.first() else {
            return Fault::new(FaultKind::NotReady, "the coordinator serves no model yet");
        };
        let kind = match load.state() {
            GroupState::Draining => FaultKind::Draining,
            _ => FaultKind::NotReady,
        };
        let detail = if load.detail.is_empty() { String::new() } else { format!(": {}", load.detail) };
        Fault::new(kind, format!("the model is {}{detail}", state_name(load.state())))
    }

    /// The state in a word.
    pub(crate) fn state(&self) -> &'static str {
        match self.deployments.first() {
            _ if !self.reachable => "unreachable",
            Some(load) => state_name(load.state()),
            None => "joining",
        }
    }
}

/// A group's state in a word.
pub(crate) fn state_name(state: GroupState) -> &'static str {
    match state {
        GroupState::Unspecified | GroupState::Joining => "joining",
        GroupState::Loading => "loading",
        GroupState::Warming => "warming",
        GroupState::Ready => "ready",
        GroupState::Fenced => "fenced",
        GroupState::Draining => "draining",
        GroupState::Failed => "failed",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn capacity(state: GroupState) -> Capacity {
        let load = DeploymentLoad { state: state as i32, detail: "rank 1".into(), ..Default::default() };
        Capacity { deployments: vec![load] }
    }

    #[test]
    fn waiting_makes_sense_only_after_the_group_ran() {
        let mut fleet = Fleet::default();
        fleet.learn(capacity(GroupState::Loading));
        assert!(!fleet.may_be_ready_soon());
        assert_eq!(fleet.not_ready().message, "the model is loading: rank 1");
        fleet.learn(capacity(GroupState::Ready));
        assert!(fleet.is_ready());
        fleet.learn(capacity(GroupState::Fenced));
        assert!(fleet.may_be_ready_soon());
        fleet.lost(&Fault::new(FaultKind::NotReady, "connection refused"));
        assert!(fleet.may_be_ready_soon() && !fleet.is_ready());
        fleet.learn(capacity(GroupState::Failed));
        assert!(!fleet.may_be_ready_soon());
    }

    #[test]
    fn a_coordinator_that_drains_is_waited_out_only_if_there_is_another() {
        for others in [false, true] {
            let mut fleet = Fleet::new(others);
            fleet.learn(capacity(GroupState::Ready));
            fleet.learn(capacity(GroupState::Draining));
            assert_eq!(fleet.may_be_ready_soon(), others);
        }
    }
}
