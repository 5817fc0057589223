//! One sequence apart from the others: how a request that may be what brings ranks down is told from bystanders.

use std::time::Duration;

use phalanx_proto::ids::SequenceId;

use super::{Engine, scheduler::Draft};

impl Engine {
    /// Live sequences in plans whose results are awaited, each with the number of its output tokens.
    pub fn sequences_in_flight(&self) -> Vec<(SequenceId, usize)> {
        let slices = self.in_flight.iter().flat_map(|flight| &flight.slices);
        let mut ids: Vec<SequenceId> = slices.map(|slice| slice.sequence).collect();
        ids.sort_unstable();
        ids.dedup();
        ids.into_iter().filter_map(|id| Some((id, self.sequences.get(&id)?.completion_tokens()))).collect()
    }

    /// From now on nobody but this sequence is put on the ranks, until it ends or this is called with another one or
    /// with nobody. Whoever runs already goes on: call it at the beginning of an epoch.
    pub fn run_alone(&mut self, sequence: Option<SequenceId>) {
        self.alone = sequence;
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
