//! Weights of logits: probabilities relative to the best one, as whole numbers.
//!
//! Adding whole numbers has no rounding, so a sum of weights does not depend on how the vocabulary is divided.

use super::noise::{exp, ln};

/// The best logit's weight. Logits more than 31.2 nats below it weigh nothing.
const BEST_WEIGHT: f64 = (1_u64 << 44) as f64;
/// As many weights as this add up in 64 bits.
const SUMMED_IN_64_BITS: usize = 1 << 12;
/// Buckets of a [`Histogram`].
const BUCKETS: usize = 1024;
/// Buckets in one nat; together they cover 32 nats, below which nothing has weight.
const BUCKETS_IN_A_NAT: f64 = 32.0;

/// How one row's logits become weights.
#[derive(Clone, Copy)]
pub(super) struct Weighing {
    /// The largest logit of the whole row.
    pub(super) best: f64,
    /// One over the temperature.
    pub(super) scale: f64,
    /// Logits below have no weight.
    pub(super) floor: f64,
}

/// Sums of weights by distance from the best logit.
pub(super) struct Histogram(pub(super) Vec<u64>);

/// Where the smallest set of most probable rows with a given sum of weights ends.
#[derive(Clone, Copy)]
pub(super) struct Boundary {
    /// The bucket in which it ends; all nearer ones belong to it.
    pub(super) bucket: usize,
    /// Sum of the weights of the nearer ones.
    pub(super) before: u128,
    /// The sum to reach.
    pub(super) target: f64,
}

/// Weight of a logit that is `nats` (at least 0) below the best one.
#[inline]
fn weight(nats: f64) -> u64 {
    // Adding 2^52 rounds to the nearest whole number, which then is the mantissa.
    const ROUND: f64 = (1_u64 << 52) as f64;
    (exp(-nats) * BEST_WEIGHT + ROUND).to_bits() & ((1 << 52) - 1)
}

/// Natural logarithm of a sum of weights, relative to the best one.
pub(super) fn ln_weights(sum: u128) -> f64 {
    ln(sum as f64) - ln(BEST_WEIGHT)
}

impl Weighing {
    /// Weights by the model's own probabilities.
    pub(super) fn raw(best: f32) -> Self {
        Self { best: f64::from(best), scale: 1.0, floor: f64::NEG_INFINITY }
    }

    #[inline]
    fn nats(&self, key: f64) -> f64 {
        (self.best - key) * self.scale
    }

    #[inline]
    pub(super) fn weight(&self, key: f64) -> u64 {
        let weight = weight(self.nats(key));
        if key >= self.floor { weight } else { 0 }
    }

    /// Sum of the weights of all `logits`.
    pub(super) fn sum(&self, logits: &[f32]) -> u128 {
        let of_chunk = |chunk: &[f32]| chunk.iter().map(|&logit| self.weight(f64::from(logit))).sum::<u64>();
        logits.chunks(SUMMED_IN_64_BITS).map(|chunk| u128::from(of_chunk(chunk))).sum()
    }

    /// Bucket of a logit; `None` if it has no weight whatever its bucket.
    #[inline]
    pub(super) fn bucket(&self, key: f64) -> Option<usize> {
        let bucket = self.nats(key) * BUCKETS_IN_A_NAT;
        (bucket < BUCKETS as f64 && key >= self.floor).then_some(bucket as usize)
    }

    /// The weights of all `logits` by bucket. A bucket holds fewer than 2^19 rows, as many as a vocabulary has at most.
    pub(super) fn histogram(&self, logits: &[f32]) -> Histogram {
        let mut sums = vec![0_u64; BUCKETS];
        // Weights by the chunk, so that they are computed with vector instructions.
        let mut weights = [0; 64];
        for chunk in logits.chunks(64) {
            weights.iter_mut().zip(chunk).for_each(|(weight, &logit)| *weight = self.weight(f64::from(logit)));
            for (&logit, &weight) in chunk.iter().zip(&weights) {
                if let Some(bucket) = self.bucket(f64::from(logit)) {
                    sums[bucket] += weight;
                }
            }
        }
        Histogram(sums)
    }
}

impl Histogram {
    /// Where the share `top_p` of the weights of all ranks ends.
    pub(super) fn boundary(ranks: &[Self], top_p: f64) -> Boundary {
        let of_bucket = |bucket: usize| ranks.iter().map(|rank| u128::from(rank.0[bucket])).sum::<u128>();
        let total: u128 = (0..BUCKETS).map(of_bucket).sum();
        let target = top_p * total as f64;
        let mut before = 0;
        for bucket in 0..BUCKETS {
            let sum = of_bucket(bucket);
            if (before + sum) as f64 >= target {
                return Boundary { bucket, before, target };
            }
            before += sum;
        }
        // Only if `top_p * total` were rounded to more than `total`.
        Boundary { bucket: BUCKETS - 1, before: total, target }
    }

    /// Number of buckets, the same on every rank.
    pub(super) const fn len() -> usize {
        BUCKETS
    }
}
