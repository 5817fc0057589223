//! Which candidates of one choice may be taken: `min_p`, then `top_k`, then `top_p` of what these two leave.
//!
//! With `top_k`, every rank offers its k best. Without it the nucleus may be any part of the vocabulary: the ranks' weights
//! by distance from the best logit tell in which bucket it ends. Each rank knows its rows in nearer buckets to be inside,
//! and only the rows of that one bucket are gathered.

use phalanx_proto::sampling::SamplingSettings;

use super::{
    candidates::{Candidate, first, read_all, write_all},
    history::Choice,
    noise::{Noise, ln},
    shard::Shard,
    weights::{Boundary, Histogram, Weighing},
    wire::{Reader, Writer},
};

/// The filter of one choice.
pub(super) struct Filter {
    noise: Noise,
    weighing: Weighing,
    top_p: f64,
    kind: Kind,
}

/// What the ranks have to tell each other.
#[derive(Clone, Copy)]
enum Kind {
    /// The best candidates of each rank.
    TopK(usize),
    /// Weights, then the candidates at the boundary and each rank's winner inside.
    Nucleus,
    /// Each rank's winner.
    MinP,
}

/// What one rank tells about one filtered choice in the second exchange.
pub(super) enum Offer {
    Candidates(Vec<Candidate>),
    Histogram(Histogram),
    Nothing,
}

/// What is known after the second exchange.
pub(super) enum Narrowed {
    /// The choice.
    Chosen(Candidate),
    /// The third exchange decides among rows up to this boundary, or among all that pass `min_p`.
    Open(Option<Boundary>),
}

/// What one rank tells about one filtered choice in the third exchange.
pub(super) struct Final {
    /// The winner of the rows that are certainly inside; its key is a logit with noise.
    pub(super) winner: Candidate,
    /// The rows in the boundary's bucket; their keys are logits.
    pub(super) boundary: Vec<Candidate>,
}

impl Filter {
    /// The filter of a choice whose largest logit is `best`; `None` if it has none.
    pub(super) fn new(choice: &Choice<'_>, best: f64) -> Option<Self> {
        let settings = choice.settings;
        let kind = match settings {
            _ if !Self::applies(settings) => return None,
            SamplingSettings { top_k: 1.., .. } => Kind::TopK(settings.top_k as usize),
            _ if settings.top_p < 1.0 => Kind::Nucleus,
            _ => Kind::MinP,
        };
        let temperature = f64::from(settings.temperature);
        let floor = match settings.min_p {
            0.0 => f64::NEG_INFINITY,
            min_p => best + temperature * ln(f64::from(min_p)),
        };
        let weighing = Weighing { best, scale: temperature.recip(), floor };
        Some(Self { noise: Noise::of(choice), weighing, top_p: f64::from(settings.top_p), kind })
    }

    /// Whether the settings ask for any filter.
    pub(super) fn applies(settings: &SamplingSettings) -> bool {
        !settings.is_greedy() && (settings.top_k > 0 || settings.top_p < 1.0 || settings.min_p > 0.0)
    }

    /// This rank's part of the second exchange.
    pub(super) fn offer(&self, shard: &Shard<'_>) -> Offer {
        match self.kind {
            Kind::TopK(k) => {
                let floor = self.weighing.floor;
                Offer::Candidates(first(shard.candidates().filter(|candidate| candidate.key >= floor), k))
            }
            Kind::Nucleus => Offer::Histogram(self.weighing.histogram(shard.logits())),
            Kind::MinP => Offer::Nothing,
        }
    }

    /// Reads an offer of this filter.
    pub(super) fn read_offer(&self, message: &mut Reader<'_>) -> Option<Offer> {
        Some(match self.kind {
            Kind::TopK(_) => Offer::Candidates(read_all(message)?),
            Kind::Nucleus => {
                let sums = (0..Histogram::len()).map(|_| message.u64()).collect::<Option<_>>()?;
                Offer::Histogram(Histogram(sums))
            }
            Kind::MinP => Offer::Nothing,
        })
    }

    /// What all ranks' offers tell.
    pub(super) fn narrow(&self, offers: Vec<Offer>) -> Narrowed {
        let (mut candidates, mut histograms) = (Vec::new(), Vec::new());
        for offer in offers {
            match offer {
                Offer::Candidates(theirs) => candidates.extend(theirs),
                Offer::Histogram(histogram) => histograms.push(histogram),
                Offer::Nothing => {}
            }
        }
        match self.kind {
            Kind::TopK(k) => {
                let kept = first(candidates.into_iter(), k);
                let total: u128 = kept.iter().map(|c| u128::from(self.weighing.weight(c.key))).sum();
                let target = if self.top_p < 1.0 { self.top_p * total as f64 } else { f64::INFINITY };
                Narrowed::Chosen(self.pick(kept, 0, target))
            }
            Kind::Nucleus => Narrowed::Open(Some(Histogram::boundary(&histograms, self.top_p))),
            Kind::MinP => Narrowed::Open(None),
        }
    }

    /// This rank's part of the third exchange.
    pub(super) fn finish(&self, boundary: Option<Boundary>, shard: &Shard<'_>) -> Final {
        let Weighing { scale, floor, .. } = self.weighing;
        let Some(Boundary { bucket: last, .. }) = boundary else {
            return Final { winner: shard.noisiest(&self.noise, scale, |key| key >= floor), boundary: Vec::new() };
        };
        let inside = |key: f64| self.weighing.bucket(key).is_some_and(|bucket| bucket < last);
        let at_boundary = shard.candidates().filter(|c| self.weighing.bucket(c.key) == Some(last));
        Final { winner: shard.noisiest(&self.noise, scale, inside), boundary: at_boundary.collect() }
    }

    /// The choice, from all ranks' last words.
    pub(super) fn decide(&self, boundary: Option<Boundary>, ranks: Vec<Final>) -> Candidate {
        let winner = ranks.iter().map(|rank| rank.winner).fold(Candidate::NONE, Candidate::better);
        let Some(boundary) = boundary else { return winner };
        let mut union: Vec<Candidate> = ranks.into_iter().flat_map(|rank| rank.boundary).collect();
        union.sort_unstable_by(Candidate::order);
        winner.better(self.pick(union, boundary.before, boundary.target))
    }

    /// The one that the noise favours of those `candidates`, in order, before which less than `target` of weight lies.
    fn pick(&self, candidates: Vec<Candidate>, mut before: u128, target: f64) -> Candidate {
        let mut best = Candidate::NONE;
        for candidate in candidates {
            if before as f64 >= target {
                break;
            }
            before += u128::from(self.weighing.weight(candidate.key));
            let key = candidate.key * self.weighing.scale + self.noise.draw(candidate.token).gumbel();
            best = best.better(Candidate { key, ..candidate });
        }
        best
    }
}

impl Offer {
    pub(super) fn write(&self, message: &mut Writer) {
        match self {
            Self::Candidates(candidates) => write_all(candidates, message),
            Self::Histogram(Histogram(sums)) => sums.iter().for_each(|&sum| message.u64(sum)),
            Self::Nothing => {}
        }
    }
}

impl Final {
    pub(super) fn write(&self, message: &mut Writer) {
        self.winner.write(message);
        write_all(&self.boundary, message);
    }

    pub(super) fn read(message: &mut Reader<'_>) -> Option<Self> {
        Some(Self { winner: Candidate::read(message)?, boundary: read_all(message)? })
    }
}
