//! Noise and elementary functions that have the same bits on every machine.
//!
//! The C library's `ln` and `exp` differ in the last bit between versions and processors. Ranks on different hosts must
//! choose the same token, so these two use nothing but additions, multiplications and divisions, which IEEE 754 fixes.

use std::f64::consts::{LN_2, LOG2_E, SQRT_2};

use xxhash_rust::xxh3::xxh3_64;

use super::history::Choice;

/// The counter-based generator of one choice: a key for the choice, the token's id as the counter. A token's noise
/// does not depend on which rank holds its row.
pub(super) struct Noise {
    key: u64,
}

/// The random bits of one token.
#[derive(Clone, Copy)]
pub(super) struct Draw(u64);

impl Noise {
    /// The noise of one choice.
    pub(super) fn of(choice: &Choice<'_>) -> Self {
        Self::new(choice.settings.seed, choice.settings.choice, choice.position)
    }

    /// Noise for the token at `position` of choice `choice` of the request seeded with `seed`.
    fn new(seed: u64, choice: u32, position: usize) -> Self {
        let mut counter = [0; 20];
        counter[..8].copy_from_slice(&seed.to_le_bytes());
        counter[8..12].copy_from_slice(&choice.to_le_bytes());
        counter[12..].copy_from_slice(&(position as u64).to_le_bytes());
        Self { key: xxh3_64(&counter) }
    }

    /// SplitMix64 (Steele, Lea, Flood 2014) with `key` as its state, at step `token + 1`.
    pub(super) fn draw(&self, token: u32) -> Draw {
        let mut z = self.key.wrapping_add((u64::from(token) + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15));
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        Draw(z ^ (z >> 31))
    }
}

impl Draw {
    /// Gumbel noise: the token with the largest `logit / temperature + gumbel` is a sample of the softmax. It is
    /// `-ln(-ln u)` for `u` in (0, 1), one of the 2^52 centres of equal intervals; at most 36.8.
    pub(super) fn gumbel(self) -> f64 {
        const INTERVAL: f64 = 1.0 / (1_u64 << 52) as f64;
        let u = ((self.0 >> 12) as f64 + 0.5) * INTERVAL;
        -ln(-ln(u))
    }

    /// Never less than [`Draw::gumbel`], at the price of counting leading zeros. With w = 1 - u, -ln(1 - w) ≥ w, so the
    /// noise is at most -ln w, and w is at least the power of two below it.
    pub(super) fn gumbel_bound(self) -> f64 {
        let complement = !self.0 >> 12;
        f64::from(complement.leading_zeros() - 11) * LN_2
    }
}

/// Natural logarithm of a positive normal number, to about one unit in the last place:
/// `ln(2^e m) = e ln 2 + 2 artanh((m - 1) / (m + 1))`, m in [√½, √2).
pub(super) fn ln(x: f64) -> f64 {
    const MANTISSA: u64 = (1 << 52) - 1;
    // 1 / (2k + 1) for k = 11 … 1; the first term left out is below 2^-60 of the sum.
    const TERMS: [f64; 11] = [
        1.0 / 23.0,
        1.0 / 21.0,
        1.0 / 19.0,
        1.0 / 17.0,
        1.0 / 15.0,
        1.0 / 13.0,
        1.0 / 11.0,
        1.0 / 9.0,
        1.0 / 7.0,
        1.0 / 5.0,
        1.0 / 3.0,
    ];
    let bits = x.to_bits();
    let mut exponent = (bits >> 52) as i64 - 1023;
    let mut m = f64::from_bits((bits & MANTISSA) | (1023 << 52));
    if m > SQRT_2 {
        m *= 0.5;
        exponent += 1;
    }
    let s = (m - 1.0) / (m + 1.0);
    let z = s * s;
    let series = TERMS.iter().fold(0.0, |sum, term| (sum + term) * z);
    exponent as f64 * LN_2 + 2.0 * (s + s * series)
}

/// Exponential of a number that is at most 0, to about one unit in the last place; below -700 that of -700. Without
/// branches and conversions, so that a loop over it uses vector instructions.
#[inline]
pub(super) fn exp(x: f64) -> f64 {
    // Adding 1.5 * 2^52 rounds to the nearest whole number, which then stands in the lowest bits.
    const ROUND: f64 = 6_755_399_441_055_744.0;
    // ln 2 in two parts, 0.6931471803691238 and 1.9082149292705877e-10 (fdlibm's e_exp.c), so that k ln 2 has no rounding
    // error that matters.
    const LN_2_HIGH: f64 = f64::from_bits(0x3fe6_2e42_fee0_0000);
    const LN_2_LOW: f64 = f64::from_bits(0x3dea_39ef_3579_3c76);
    // 1 / k! for k = 13 … 2; |r| ≤ ln 2 / 2 leaves a remainder below 2^-57.
    const TERMS: [f64; 12] = [
        1.0 / 6_227_020_800.0,
        1.0 / 479_001_600.0,
        1.0 / 39_916_800.0,
        1.0 / 3_628_800.0,
        1.0 / 362_880.0,
        1.0 / 40_320.0,
        1.0 / 5_040.0,
        1.0 / 720.0,
        1.0 / 120.0,
        1.0 / 24.0,
        1.0 / 6.0,
        1.0 / 2.0,
    ];
    let x = if x > -700.0 { x } else { -700.0 };
    let rounded = x * LOG2_E + ROUND;
    let k = rounded - ROUND;
    let r = (x - k * LN_2_HIGH) - k * LN_2_LOW;
    let series = TERMS.iter().fold(0.0, |sum, term| (sum + term) * r);
    let power = f64::from_bits(rounded.to_bits().wrapping_add(1023) << 52);
    (1.0 + (r + r * series)) * power
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logarithm_and_exponential_are_those_of_the_library() {
        // Both sides round correctly to within an ulp; k ln 2 adds half an ulp of the result.
        for i in 1..200_000_u32 {
            let x = f64::from(i) * 3.7e-3;
            for x in [x, 1.0 / x, 1.0 - x * 1e-9] {
                let (got, expected) = (ln(x), x.ln());
                assert!((got - expected).abs() <= 4e-16 * expected.abs().max(1e-3), "ln {x}: {got} {expected}");
            }
            let (got, expected) = (exp(-x.min(700.0)), (-x.min(700.0)).exp());
            assert!((got - expected).abs() <= 5e-16 * expected, "exp -{x}: {got} {expected}");
        }
        assert_eq!((exp(0.0), ln(1.0), exp(-1e6)), (1.0, 0.0, exp(-700.0)));
    }

    #[test]
    fn the_bound_is_never_below_the_noise() {
        let edges = (0..52).flat_map(|bit| [1_u64 << bit, (1 << bit) - 1, (1 << bit) + 1]);
        let edges = edges.map(|complement| Draw(!(complement << 12)));
        let noise = Noise::new(1, 2, 3);
        for draw in edges.chain((0..1_000_000).map(|token| noise.draw(token))) {
            let gumbel = draw.gumbel();
            assert!(gumbel.is_finite() && gumbel <= draw.gumbel_bound(), "{gumbel} {}", draw.gumbel_bound());
        }
    }

    #[test]
    fn the_noise_has_the_moments_of_the_gumbel_distribution() {
        const COUNT: u32 = 1_000_000;
        let noise = Noise::new(20_260_101, 0, 17);
        let draws: Vec<f64> = (0..COUNT).map(|token| noise.draw(token).gumbel()).collect();
        let mean = draws.iter().sum::<f64>() / f64::from(COUNT);
        let variance = draws.iter().map(|g| (g - mean).powi(2)).sum::<f64>() / f64::from(COUNT);
        // Euler's constant and π²/6; five standard errors (1.28e-3 and 3.5e-3).
        assert!((mean - 0.577_215_664_9).abs() < 6.5e-3, "{mean}");
        assert!((variance - std::f64::consts::PI.powi(2) / 6.0).abs() < 1.8e-2, "{variance}");
    }

    #[test]
    fn seed_choice_and_position_each_change_the_noise() {
        let base = Noise::new(1, 0, 0).draw(5).0;
        assert!([Noise::new(2, 0, 0), Noise::new(1, 1, 0), Noise::new(1, 0, 1)].iter().all(|n| n.draw(5).0 != base));
    }
}
