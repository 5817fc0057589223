//! One rank's part of one row of logits.

use std::{borrow::Cow, ops::Range};

use super::{
    Query,
    candidates::{Candidate, first},
    filter::Filter,
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

    /// Logits as the model gave them, tokens beyond the tokenizer's included.
    pub(super) fn raw(&self) -> &[f32] {
        self.raw
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
            Query::Choose(choice) => {
                let scale = f64::from(choice.settings.temperature).recip();
                self.noisiest(&Noise::of(choice), scale, |key| key > f64::NEG_INFINITY)
            }
        }
    }

    /// Logits that may be chosen from, after bias, penalties and masks.
    pub(super) fn logits(&self) -> &[f32] {
        &self.edited
    }

    /// The same as candidates; keys are logits. What is forbidden is left out.
    pub(super) fn candidates(&self) -> impl Iterator<Item = Candidate> + '_ {
        let all = self.edited.iter().enumerate().filter(|(_, logit)| **logit > f32::NEG_INFINITY);
        all.map(|(slot, &logit)| self.candidate(slot, f64::from(logit)))
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

    /// Gumbel-max over the rows whose logits are `admitted`. The noise's bound spares nearly every row its logarithms.
    pub(super) fn noisiest(&self, noise: &Noise, scale: f64, admitted: impl Fn(f64) -> bool) -> Candidate {
        let mut best = Candidate::NONE;
        for (slot, &logit) in self.edited.iter().enumerate() {
            let (logit, draw) = (f64::from(logit), noise.draw((self.first + slot) as u32));
            let key = logit * scale;
            if key + draw.gumbel_bound() >= best.key && admitted(logit) {
                best = best.better(self.candidate(slot, key + draw.gumbel()));
            }
        }
        best
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
