//! One sequence apart from the others: how a request that may be what brings ranks down is told from bystanders.

use std::time::Duration;

use phalanx_proto::ids::SequenceId;

use super::{Engine, scheduler::Draft};

impl Engine {
    /// Live sequences in plans whose results are awaited, the oldest first.
    pub fn sequences_in_flight(&self) -> Vec<SequenceId> {
        let slices = self.in_flight.iter().flat_map(|flight| &flight.slices);
        let mut ids: Vec<SequenceId> = slices.map(|slice| slice.sequence).collect();
        ids.sort_unstable();
        ids.dedup();
        ids.retain(|id| self.sequences.contains_key(id));
        ids
    }

    /// Lets nobody but this sequence run from the next plan on, until it ends or this is called again with another one or
    /// with nobody. Everyone else waits meanwhile and loses nothing.
    pub fn run_alone(&mut self, sequence: Option<SequenceId>) {
        self.alone = sequence;
        if sequence.is_some() {
            while !self.running.is_empty() {
                self.preempt(self.running.len() - 1);
            }
        }
    }

    /// Plans the sequence that runs alone. False if there is none: then all are planned as usual.
    pub(super) fn plan_alone(&mut self, draft: &mut Draft, now: Duration) -> bool {
        let Some(id) = self.alone else { return false };
        let Some(sequence) = self.sequences.get(&id) else {
            self.alone = None;
            return false;
        };
        if sequence.is_prefilling() {
            self.plan_chunk(id, draft);
        } else if sequence.run.is_none() {
            self.admit(id, draft, now);
        }
        true
    }
}
