//! Candidates for one choice: their order, and the best ones of many.

use std::cmp::Ordering;

use super::wire::{Reader, Writer};

/// One row of the vocabulary that may be chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Candidate {
    /// What candidates are ordered by: a logit, or a logit with noise.
    pub(super) key: f64,
    /// The model's own logit.
    pub(super) raw: f32,
    /// The token.
    pub(super) token: u32,
}

impl Candidate {
    /// Stands for "none": behind every other candidate.
    pub(super) const NONE: Self = Self { key: f64::NEG_INFINITY, raw: f32::NEG_INFINITY, token: u32::MAX };

    /// Larger keys first; of equal ones the lower token.
    pub(super) fn order(&self, other: &Self) -> Ordering {
        other.key.total_cmp(&self.key).then(self.token.cmp(&other.token))
    }

    /// The one of the two that comes first.
    pub(super) fn better(self, other: Self) -> Self {
        if other.order(&self).is_lt() { other } else { self }
    }

    pub(super) fn write(&self, message: &mut Writer) {
        message.f64(self.key);
        message.f32(self.raw);
        message.u32(self.token);
    }

    pub(super) fn read(message: &mut Reader<'_>) -> Option<Self> {
        Some(Self { key: message.f64()?, raw: message.f32()?, token: message.u32()? })
    }
}

/// Writes candidates with their number in front.
pub(super) fn write_all(candidates: &[Candidate], message: &mut Writer) {
    message.u32(candidates.len() as u32);
    for candidate in candidates {
        candidate.write(message);
    }
}

/// Reads what [`write_all`] wrote.
pub(super) fn read_all(message: &mut Reader<'_>) -> Option<Vec<Candidate>> {
    let count = message.u32()?;
    (0..count).map(|_| Candidate::read(message)).collect()
}

/// The first `count` candidates in order, sorted.
pub(super) fn first(candidates: impl Iterator<Item = Candidate>, count: usize) -> Vec<Candidate> {
    if count == 0 {
        return Vec::new();
    }
    let mut kept: Vec<Candidate> = Vec::with_capacity(2 * count.min(1 << 12));
    // No candidate behind this one can be among the first `count`.
    let mut worst = Candidate::NONE;
    for candidate in candidates {
        if candidate.key < worst.key {
            continue;
        }
        kept.push(candidate);
        if kept.len() / 2 >= count {
            let (_, nth, _) = kept.select_nth_unstable_by(count - 1, Candidate::order);
            worst = *nth;
            kept.truncate(count);
        }
    }
    kept.sort_unstable_by(Candidate::order);
    kept.truncate(count);
    kept
}
