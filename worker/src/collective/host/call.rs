//! What a rank says it is doing. Ranks must call the same operations with the same sizes in the same order; each sends this
//! ahead of its data, so that a rank that does not is named instead of corrupting a sum or hanging the group.

use std::fmt;

use super::super::CollectiveError;

/// A kind of operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operation {
    AllReduceSum,
    AllGather,
}

/// One call of one rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Call {
    pub(super) operation: Operation,
    /// Values summed, or bytes that this rank contributes.
    pub(super) length: u64,
    /// Counts the calls of this group, from 1.
    pub(super) number: u64,
}

impl Call {
    /// Bytes of [`to_words`](Self::to_words).
    pub(super) const BYTES: usize = 24;

    pub(super) fn to_words(self) -> [u64; 3] {
        let operation = match self.operation {
            Operation::AllReduceSum => 1,
            Operation::AllGather => 2,
        };
        [operation, self.length, self.number]
    }

    fn from_words(words: [u64; 3]) -> Option<Self> {
        let [operation, length, number] = words;
        let operation = match operation {
            1 => Operation::AllReduceSum,
            2 => Operation::AllGather,
            _ => return None,
        };
        Some(Self { operation, length, number })
    }

    /// Reads what `rank` says it is doing and compares it with this rank's own call.
    pub(super) fn check(self, rank: usize, words: [u64; 3]) -> Result<Self, CollectiveError> {
        let mismatch = |found: String| CollectiveError::Mismatch { rank, found, expected: self.to_string() };
        let Some(found) = Self::from_words(words) else {
            return Err(mismatch(format!("an unknown operation ({words:?})")));
        };
        let same_length = found.length == self.length || self.operation == Operation::AllGather;
        if found.operation != self.operation || found.number != self.number || !same_length {
            return Err(mismatch(found.to_string()));
        }
        Ok(found)
    }
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { operation, length, number } = self;
        match operation {
            Operation::AllReduceSum => write!(f, "all_reduce_sum of {length} values as call {number}"),
            Operation::AllGather => write!(f, "all_gather of {length} bytes as call {number}"),
        }
    }
}
