//! Rotary frequencies: plain, or stretched over a longer context by YaRN ("NTK by parts", arXiv 2309.00071, section 3.2).
//!
//! Computed in f32, step by step as openai/gpt-oss and transformers do, because a model is trained and released with
//! the rounding of its angles: at position 4000 exact angles differ by up to 2e-4, and the logits of the golden file by
//! 8e-4. A single frequency that is off by its last bit moves them by 1e-3 (the second pair) to 1e-5 (the ninth).

use std::f64::consts::TAU;

use phalanx_proto::geometry::{Geometry, RopeScaling};

use crate::backend::Arithmetic;

impl Arithmetic {
    /// The constants of a model of this geometry.
    pub fn new(geometry: Geometry) -> Self {
        let half = geometry.head_dim / 2;
        let period = |i: usize| (geometry.rope_theta as f32).powf((2 * i) as f32 / geometry.head_dim as f32);
        let frequency = |i: usize| match &geometry.rope_scaling {
            None => 1.0 / period(i),
            Some(yarn) => {
                let kept = 1.0 - Ramp::new(yarn, half as f64, geometry.rope_theta).at(i);
                1.0 / (yarn.factor as f32 * period(i)) * (1.0 - kept) + 1.0 / period(i) * kept
            }
        };
        let inverse_frequencies = (0..half).map(|i| f64::from(frequency(i))).collect();
        let rotary_scale = geometry.rope_scaling.as_ref().map_or(1.0, |yarn| attention_factor(yarn.factor));
        Self { geometry, inverse_frequencies, rotary_scale }
    }

    /// Cosine and sine, times the attention factor, by which pair `pair` of a head is turned at a position. The angle
    /// is rounded to f32, as the model was trained; every backend takes its angles from here.
    pub fn rotation(&self, position: u32, pair: usize) -> (f32, f32) {
        let angle = f64::from(position as f32 * self.inverse_frequencies[pair] as f32);
        ((angle.cos() * self.rotary_scale) as f32, (angle.sin() * self.rotary_scale) as f32)
    }
}

/// How far each frequency is interpolated: 0 for those that turn often within the original context, 1 for those that
/// hardly turn, linear between.
struct Ramp {
    low: f64,
    high: f64,
}

impl Ramp {
    fn new(yarn: &RopeScaling, half: f64, theta: f64) -> Self {
        // The dimension that turns `rotations` times over the original context.
        let dimension =
            |rotations: f64| half * (yarn.original_max_position_embeddings / (rotations * TAU)).ln() / theta.ln();
        let (mut low, mut high) = (dimension(yarn.beta_fast), dimension(yarn.beta_slow));
        if yarn.truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        // The bounds, and the widening of an empty ramp, are those of transformers.
        let (low, high) = (low.max(0.0), high.min(2.0 * half - 1.0));
        Self { low, high: if high == low { low + 0.001 } else { high } }
    }

    fn at(&self, i: usize) -> f32 {
        ((i as f32 - self.low as f32) / (self.high - self.low) as f32).clamp(0.0, 1.0)
    }
}

/// YaRN's correction of the attention's temperature, on cosine and sine alike (the paper's equation 22).
fn attention_factor(factor: f64) -> f64 {
    if factor > 1.0 { 0.1 * factor.ln() + 1.0 } else { 1.0 }
}
