//! Candidates for one choice: their order, the best ones of a shard, and which of them pass the filters.

use std::cmp::Ordering;

use phalanx_proto::sampling::SamplingSettings;

use super::{
    noise::{Noise, exp, ln},
    wire::{Reader, Writer},
};

/// Weights are whole numbers of this part of the best one's, so that their sum does not depend on how the vocabulary
/// is divided: adding whole numbers has no rounding.
const WEIGHT_UNIT: f64 = (1_u64 << 52) as f64;

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

    pub(super) fn write(&self, message: &mut Writer) {
        message.f64(self.key);
        message.f32(self.raw);
        message.u32(self.token);
    }

    pub(super) fn read(message: &mut Reader<'_>) -> Option<Self> {
        Some(Self { key: message.f64()?, raw: message.f32()?, token: message.u32()? })
    }
}

/// The first `count` candidates in order, sorted.
pub(super) fn first(candidates: impl Iterator<Item = Candidate>, count: usize) -> Vec<Candidate> {
    if count == 0 {
        return Vec::new();
    }
    let mut kept: Vec<Candidate> = Vec::with_capacity(2 * count.min(1 << 16));
    // No candidate behind this one can be among the first `count`.
    let mut worst = Candidate::NONE;
    for candidate in candidates {
        if candidate.key < worst.key {
            continue;
        }
        kept.push(candidate);
        if kept.len() >= 2 * count {
            let (_, nth, _) = kept.select_nth_unstable_by(count - 1, Candidate::order);
            worst = *nth;
            kept.truncate(count);
        }
    }
    kept.sort_unstable_by(Candidate::order);
    kept.truncate(count);
    kept
}

/// Weight of a candidate whose key is `below_best` (at most 0) from the best one's, after temperature.
pub(super) fn weight(below_best: f64) -> u64 {
    (exp(below_best) * WEIGHT_UNIT) as u64
}

/// Natural logarithm of a sum of weights, relative to the best one.
pub(super) fn ln_weights(sum: u128) -> f64 {
    ln(sum as f64) - ln(WEIGHT_UNIT)
}

/// What one rank offers for one filtered choice.
pub(super) struct Offer {
    /// Sum of the weights of all its rows that pass `min_p`; 0 where the nucleus does not need it.
    pub(super) mass: u128,
    /// Whether it holds no candidates beside these.
    pub(super) complete: bool,
    /// Its first candidates, in order; keys are logits.
    pub(super) candidates: Vec<Candidate>,
}

impl Offer {
    pub(super) fn write(&self, message: &mut Writer) {
        message.u128(self.mass);
        message.u32(u32::from(self.complete));
        write_all(&self.candidates, message);
    }

    pub(super) fn read(message: &mut Reader<'_>) -> Option<Self> {
        let (mass, complete) = (message.u128()?, message.u32()? != 0);
        Some(Self { mass, complete, candidates: read_all(message)? })
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

/// Which candidates of one choice may be taken: `min_p`, then `top_k`, then `top_p` of what these two leave.
pub(super) struct Filter {
    top_k: usize,
    top_p: f64,
    /// Least key that passes `min_p`.
    floor: f64,
    scale: f64,
    best: f64,
}

impl Filter {
    /// The filter of a choice whose largest logit is `best`.
    pub(super) fn new(settings: &SamplingSettings, best: f64) -> Self {
        let temperature = f64::from(settings.temperature);
        let floor = match settings.min_p {
            0.0 => f64::NEG_INFINITY,
            min_p => best + temperature * ln(f64::from(min_p)),
        };
        Self {
            top_k: if settings.top_k == 0 { usize::MAX } else { settings.top_k as usize },
            top_p: f64::from(settings.top_p),
            floor,
            scale: temperature.recip(),
            best,
        }
    }

    /// Whether the settings ask for any filter.
    pub(super) fn applies(settings: &SamplingSettings) -> bool {
        !settings.is_greedy() && (settings.top_k > 0 || settings.top_p < 1.0 || settings.min_p > 0.0)
    }

    fn weight(&self, key: f64) -> u64 {
        weight((key - self.best) * self.scale)
    }

    /// The part of [`Offer::mass`] that rows with these logits have.
    pub(super) fn mass(&self, logits: &[f32]) -> u128 {
        // With `top_k` the nucleus is one of the k, whose weights every rank sees.
        if self.top_p >= 1.0 || self.top_k != usize::MAX {
            return 0;
        }
        // Weights round to 0 from here on.
        let least = self.floor.max(self.best - 37.0 / self.scale);
        let keys = logits.iter().map(|&logit| f64::from(logit)).filter(|&key| key >= least);
        keys.map(|key| u128::from(self.weight(key))).sum()
    }

    /// The candidates that may be taken, in order, or nothing if the offers do not reach far enough to tell.
    pub(super) fn survivors(&self, offers: &[Offer]) -> Option<Vec<Candidate>> {
        // A rank that holds more rows than it offered may hold any candidate behind its last one.
        let last_known = offers.iter().filter(|offer| !offer.complete).filter_map(|offer| offer.candidates.last());
        let horizon = last_known.min_by(|a, b| a.order(b));
        let mut union: Vec<Candidate> = offers.iter().flat_map(|offer| &offer.candidates).copied().collect();
        union.sort_unstable_by(Candidate::order);
        let nucleus = match self.top_k {
            usize::MAX => self.top_p * offers.iter().map(|offer| offer.mass).sum::<u128>() as f64,
            _ => f64::INFINITY,
        };
        let (mut kept, mut mass) = (Vec::new(), 0_u128);
        let full = |kept: &Vec<Candidate>, mass: u128| {
            kept.len() == self.top_k || (self.top_p < 1.0 && mass as f64 >= nucleus)
        };
        for candidate in union {
            if full(&kept, mass) {
                return Some(self.nucleus_of_top_k(kept));
            }
            if horizon.is_some_and(|last| candidate.order(last) == Ordering::Greater) {
                return None;
            }
            if candidate.key < self.floor {
                return Some(self.nucleus_of_top_k(kept));
            }
            mass += u128::from(self.weight(candidate.key));
            kept.push(candidate);
        }
        (horizon.is_none() || full(&kept, mass)).then(|| self.nucleus_of_top_k(kept))
    }

    /// With `top_k`, the nucleus is taken of the k that are left.
    fn nucleus_of_top_k(&self, mut kept: Vec<Candidate>) -> Vec<Candidate> {
        if self.top_k == usize::MAX || self.top_p >= 1.0 {
            return kept;
        }
        let total: u128 = kept.iter().map(|candidate| u128::from(self.weight(candidate.key))).sum();
        let nucleus = self.top_p * total as f64;
        let mut before = 0_u128;
        kept.retain(|candidate| {
            let inside = (before as f64) < nucleus;
            before += u128::from(self.weight(candidate.key));
            inside
        });
        kept
    }

    /// The one of `survivors` that the noise favours.
    pub(super) fn pick(&self, survivors: &[Candidate], noise: &Noise) -> Option<Candidate> {
        let noisy = |c: &Candidate| Candidate { key: c.key * self.scale + noise.gumbel(c.token), ..*c };
        survivors.iter().map(noisy).min_by(Candidate::order)
    }
}
