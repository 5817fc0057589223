//! Who of one tenant waits, and who goes first.

use std::{cmp::Reverse, collections::BTreeSet};

use phalanx_proto::ids::SequenceId;

/// A sequence's place among others; the foremost is the smallest. Ids grow with arrival, so they break ties by age.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Standing {
    shielded: Reverse<bool>,
    priority: Reverse<i32>,
    pub(super) sequence: SequenceId,
}

impl Standing {
    /// Shielded sequences go before all others, then higher priorities, then older ones.
    pub(super) fn new(shielded: bool, priority: i32, sequence: SequenceId) -> Self {
        Self { shielded: Reverse(shielded), priority: Reverse(priority), sequence }
    }

    /// Whether it takes its turn like others. Those that were preempted often go before everybody, of any tenant.
    pub(super) fn is_unshielded(self) -> bool {
        !self.shielded.0
    }
}

/// Sequences that are not on the ranks.
#[derive(Debug, Default)]
pub(super) struct WaitQueue {
    by_standing: BTreeSet<Standing>,
    by_age: BTreeSet<(SequenceId, Standing)>,
}

impl WaitQueue {
    /// Number of waiting sequences.
    pub(super) fn len(&self) -> usize {
        self.by_standing.len()
    }

    /// Adds a sequence.
    pub(super) fn insert(&mut self, standing: Standing) {
        self.by_standing.insert(standing);
        self.by_age.insert((standing.sequence, standing));
    }

    /// Takes a sequence out.
    pub(super) fn remove(&mut self, standing: Standing) {
        self.by_standing.remove(&standing);
        self.by_age.remove(&(standing.sequence, standing));
    }

    /// Whether the sequence waits here.
    pub(super) fn contains(&self, standing: Standing) -> bool {
        self.by_standing.contains(&standing) && self.by_age.contains(&(standing.sequence, standing))
    }

    /// The one that goes next.
    pub(super) fn foremost(&self) -> Option<Standing> {
        self.by_standing.first().copied()
    }

    /// The one that came first.
    pub(super) fn oldest(&self) -> Option<Standing> {
        self.by_age.first().map(|(_, standing)| *standing)
    }
}
