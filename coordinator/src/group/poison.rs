//! Which request may be what brings ranks down, and what is done about it.
//!
//! A request that was in flight in two crashes in a row runs alone, one suspect after the other, while everyone else
//! waits. A third crash ends it. One that gets past the point where it was twice was only a bystander and runs with the
//! others again: what crashes ranks crashes them again at the same token, because a replay computes the same.

use std::collections::BTreeMap;

use phalanx_proto::{
    fault::{Fault, FaultKind},
    ids::SequenceId,
};
use tracing::{error, warn};

use super::actor::Group;

/// Crashes in a row after which a request runs alone, and after which it is ended.
const ALONE_AFTER: u32 = 2;
const GUILTY_AFTER: u32 = 3;
/// Output tokens that take a sequence past the step that crashed: more than plans are in flight.
const PAST_THE_CRASH: usize = 4;

/// A sequence that was in flight when an epoch crashed, and has not got past that point since.
#[derive(Clone, Copy, Debug)]
struct Suspect {
    /// Crashes in a row.
    crashes: u32,
    /// Output tokens that would take it past the last of them.
    to_go: usize,
}

/// Sequences under suspicion. The oldest of those that must run alone goes first.
#[derive(Debug, Default)]
pub(super) struct Suspects {
    by_sequence: BTreeMap<SequenceId, Suspect>,
    alone: Option<SequenceId>,
}

impl Suspects {
    /// Takes note of a crash with `present` in flight. Gives those that have had their last chance.
    fn crashed(&mut self, present: &[SequenceId]) -> Vec<SequenceId> {
        let mut guilty = Vec::new();
        let before = std::mem::take(&mut self.by_sequence);
        for &sequence in present {
            let crashes = before.get(&sequence).map_or(0, |suspect| suspect.crashes) + 1;
            if crashes >= GUILTY_AFTER {
                guilty.push(sequence);
            } else {
                self.by_sequence.insert(sequence, Suspect { crashes, to_go: PAST_THE_CRASH });
            }
        }
        guilty
    }

    /// Takes note of a sequence's tokens.
    fn advanced(&mut self, sequence: SequenceId, tokens: usize) {
        if let Some(suspect) = self.by_sequence.get_mut(&sequence) {
            suspect.to_go = suspect.to_go.saturating_sub(tokens);
            if suspect.to_go == 0 {
                self.by_sequence.remove(&sequence);
            }
        }
    }

    fn ended(&mut self, sequence: SequenceId) {
        self.by_sequence.remove(&sequence);
    }

    /// Who has to run alone, if that has changed.
    fn next(&mut self) -> Option<Option<SequenceId>> {
        let alone = self.by_sequence.iter().find(|(_, suspect)| suspect.crashes >= ALONE_AFTER).map(|(&id, _)| id);
        (std::mem::replace(&mut self.alone, alone) != alone).then_some(alone)
    }
}

impl Group {
    /// Ends requests that were in flight in too many crashes in a row, and sets suspects apart.
    pub(super) fn judge_crash(&mut self, present: &[SequenceId], reason: &str) {
        for sequence in self.suspects.crashed(present) {
            error!(sequence = sequence.0, crashes = GUILTY_AFTER, reason, "request ended: it crashes the group");
            let text = format!("the request was in flight in {GUILTY_AFTER} crashes in a row, the last one: {reason}");
            self.give_up(sequence, Fault::new(FaultKind::Internal, text));
        }
        self.set_suspects_apart();
    }

    /// A sequence went on.
    pub(super) fn suspect_advanced(&mut self, sequence: SequenceId, tokens: usize) {
        self.suspects.advanced(sequence, tokens);
    }

    /// A sequence is over.
    pub(super) fn suspect_ended(&mut self, sequence: SequenceId) {
        self.suspects.ended(sequence);
    }

    /// Lets the next suspect run alone, or all together again.
    pub(super) fn set_suspects_apart(&mut self) {
        let Some(alone) = self.suspects.next() else { return };
        if let Some(sequence) = alone {
            warn!(sequence = sequence.0, "two crashes in a row had this request in flight; it runs alone for a while");
        }
        self.engine.run_alone(alone);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: SequenceId = SequenceId(1);
    const B: SequenceId = SequenceId(2);
    const C: SequenceId = SequenceId(3);

    #[test]
    fn suspects_run_alone_in_turn_and_the_third_crash_finds_the_one() {
        let mut suspects = Suspects::default();
        assert!(suspects.crashed(&[A, B]).is_empty());
        assert_eq!(suspects.next(), None, "one crash accuses nobody");
        assert!(suspects.crashed(&[A, B, C]).is_empty());
        assert_eq!(suspects.next(), Some(Some(A)));
        suspects.advanced(A, PAST_THE_CRASH - 1);
        assert_eq!(suspects.next(), None);
        suspects.advanced(A, 1);
        assert_eq!(suspects.next(), Some(Some(B)));
        assert_eq!(suspects.crashed(&[B]), [B]);
        assert_eq!(suspects.next(), Some(None));
        assert!(suspects.crashed(&[A, C]).is_empty(), "nothing is held against those that were not there");
    }

    #[test]
    fn who_goes_on_between_crashes_is_no_suspect() {
        let mut suspects = Suspects::default();
        for _ in 0..10 {
            assert!(suspects.crashed(&[A, B]).is_empty());
            suspects.advanced(A, 1);
            suspects.advanced(A, PAST_THE_CRASH);
            suspects.advanced(B, PAST_THE_CRASH);
        }
        assert_eq!(suspects.next(), None);
    }

    #[test]
    fn a_suspect_that_ends_makes_way() {
        let mut suspects = Suspects::default();
        suspects.crashed(&[A, B]);
        suspects.crashed(&[A, B]);
        assert_eq!(suspects.next(), Some(Some(A)));
        suspects.ended(A);
        assert_eq!(suspects.next(), Some(Some(B)));
        suspects.ended(B);
        assert_eq!(suspects.next(), Some(None));
    }
}
