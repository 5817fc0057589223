//! One rank's part of one row of logits.

use std::{borrow::Cow, ops::Range};

use super::{
    Query,
    candidates::{Candidate, Filter, Offer, first, weight},
    history::Choice,
    noise::Noise,
};

/// This rank's logits of one query.
pub(super) struct Shard<'a> {
    /// First token of the rows.
    first: usize,
    /// As the model gave them, all rows.
    raw: &'a [f32],
    /// After bias, penalties and masks; only tokens that may be chosen.
    edited: Cow<'a, [f32]>,
}

impl<'a> Shard<'a> {
    /// The rows `rows` of a vocabulary of which the first `sampled_vocab` may be chosen.
    pub(super) fn new(raw: &'a [f32], rows: &Range<usize>, sampled_vocab: usize, query: &Query<'_>) -> Self {
        let mut edited = Cow::Borrowed(&raw[..sampled_vocab.saturating_sub(rows.start).min(raw.len())]);
        if let Query::Choose(choice) = query
            && choice.edits()
        {
            choice.edit(edited.to_mut(), rows.start);
        }
        Self { first: rows.start, raw, edited }
    }

    /// The largest logit as the model gave it, or NaN if any is not finite.
    pub(super) fn raw_max(&self) -> f32 {
        let finite = self.raw.iter().fold(true, |all, logit| all & logit.is_finite());
        if finite { max(self.raw) } else { f32::NAN }
    }

    /// What this rank would choose by itself. For a filtered choice it is the largest logit, which the filter starts from.
    pub(super) fn best(&self, query: &Query<'_>) -> Candidate {
        match query {
            Query::Score { token, .. } => self.target(token.index()),
            Query::Choose(choice) if choice.settings.is_greedy() || Filter::applies(choice.settings) => self.largest(),
            Query::Choose(choice) => self.noisiest(choice),
        }
    }

    fn target(&self, token: usize) -> Candidate {
        let logit = token.checked_sub(self.first).and_then(|slot| self.raw.get(slot));
        logit.map_or(Candidate::NONE, |&raw| Candidate { key: f64::from(raw), raw, token: token as u32 })
    }

    fn candidate(&self, slot: usize, key: f64) -> Candidate {
        Candidate { key, raw: self.raw[slot], token: (self.first + slot) as u32 }
    }

    /// The lowest token with the largest logit.
    fn largest(&self) -> Candidate {
        let max = max(&self.edited);
        let slot = self.edited.iter().position(|&logit| logit == max && logit > f32::NEG_INFINITY);
        slot.map_or(Candidate::NONE, |slot| self.candidate(slot, f64::from(max)))
    }

    /// Gumbel-max over all rows. The noise's bound spares nearly every row its logarithms.
    fn noisiest(&self, choice: &Choice<'_>) -> Candidate {
        let noise = Noise::new(choice.settings.seed, choice.settings.choice, choice.position);
        let scale = f64::from(choice.settings.temperature).recip();
        let largest = self.largest();
        if largest == Candidate::NONE {
            return largest;
        }
        let mut best = Candidate { key: largest.key * scale + noise.gumbel(largest.token), ..largest };
        for (slot, &logit) in self.edited.iter().enumerate() {
            let (key, draw) = (f64::from(logit) * scale, noise.draw((self.first + slot) as u32));
            if key + draw.gumbel_bound() < best.key {
                continue;
            }
            let candidate = self.candidate(slot, key + draw.gumbel());
            if candidate.order(&best).is_lt() {
                best = candidate;
            }
        }
        best
    }

    /// The first `count` candidates of a filtered choice.
    pub(super) fn offer(&self, filter: &Filter, count: usize) -> Offer {
        let finite = || self.edited.iter().enumerate().filter(|(_, logit)| **logit > f32::NEG_INFINITY);
        let candidates = first(finite().map(|(slot, &logit)| self.candidate(slot, f64::from(logit))), count);
        let complete = candidates.len() < count || finite().count() == count;
        Offer { mass: filter.mass(&self.edited), complete, candidates }
    }

    /// Sum of the weights of all rows as the model gave them, relative to the largest logit of the whole row.
    pub(super) fn raw_mass(&self, raw_max: f32) -> u128 {
        let below = self.raw.iter().map(|&logit| f64::from(logit) - f64::from(raw_max));
        below.map(|below| u128::from(weight(below))).sum()
    }

    /// The `count` most probable tokens by the model's own logits. Tokens beyond the tokenizer's have no text to report.
    pub(super) fn alternatives(&self, count: usize) -> Vec<Candidate> {
        let raw = self.raw[..self.edited.len()].iter().enumerate();
        first(raw.map(|(slot, &logit)| self.candidate(slot, f64::from(logit))), count)
    }
}

/// The largest value, or -∞ of nothing. Sixteen running maxima keep it at the speed of memory.
fn max(values: &[f32]) -> f32 {
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let (chunks, rest) = values.as_chunks::<16>();
    let mut lanes = [f32::NEG_INFINITY; 16];
    for chunk in chunks {
        for (lane, &value) in lanes.iter_mut().zip(chunk) {
            *lane = larger(*lane, value);
        }
    }
    lanes.iter().chain(rest).copied().fold(f32::NEG_INFINITY, larger)
}
