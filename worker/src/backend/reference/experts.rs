//! The mixture of experts: routing, MXFP4, clamped SwiGLU.

use candle_core::{Device, Result, Tensor};
use phalanx_proto::geometry::MXFP4_BLOCK;

use super::{product, select, tensor};
use crate::backend::ExpertsData;

/// Slope of the sigmoid in SwiGLU (`alpha` in openai/gpt-oss).
const SWIGLU_SLOPE: f64 = 1.702;
/// Values of the sixteen FP4 codes (E2M1).
const FP4: [f32; 16] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

/// For each row its experts and their weights, most likely first.
pub struct Routing(Vec<Vec<(usize, f32)>>);

impl Routing {
    /// Chooses experts for every row of router logits.
    pub(super) fn new(logits: &[Vec<f32>], chosen: usize) -> Self {
        Self(logits.iter().map(|row| top_experts(row, chosen)).collect())
    }
}

/// One layer's experts, packed.
pub struct Experts {
    data: ExpertsData,
}

/// The experts with the largest logits, weighted by the softmax over those logits. Ties go to the lower expert.
fn top_experts(logits: &[f32], chosen: usize) -> Vec<(usize, f32)> {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a])); // stable
    order.truncate(chosen);
    let largest = order.first().map_or(0.0, |&expert| logits[expert]);
    let exps: Vec<f32> = order.iter().map(|&expert| (logits[expert] - largest).exp()).collect();
    let sum: f32 = exps.iter().sum();
    order.into_iter().zip(exps).map(|(expert, exp)| (expert, exp / sum)).collect()
}

/// Widens MXFP4: `[rows, columns / 32, 16]` bytes and `[rows, columns / 32]` scales to `[rows, columns]`.
fn dequantize(blocks: &[u8], scales: &[u8], rows: usize) -> Result<Tensor> {
    let mut values = vec![0.0; 2 * blocks.len()];
    let packed = blocks.chunks_exact(MXFP4_BLOCK / 2).zip(scales);
    for ((block, &scale), values) in packed.zip(values.chunks_exact_mut(MXFP4_BLOCK)) {
        // In f64, because the smallest scales are below f32's normal numbers.
        let scale = f64::powi(2.0, i32::from(scale) - 127) as f32;
        for (byte, pair) in block.iter().zip(values.chunks_exact_mut(2)) {
            pair[0] = FP4[usize::from(byte & 15)] * scale;
            pair[1] = FP4[usize::from(byte >> 4)] * scale;
        }
    }
    tensor(values, (rows, ()))
}

impl Experts {
    pub(super) fn new(data: ExpertsData) -> Self {
        Self { data }
    }

    /// Every held expert's output for the rows that visit it, weighted and added in the order of experts.
    pub(super) fn mix(&self, x: &Tensor, routing: &Routing, limit: f64) -> Result<Tensor> {
        let mut mixed = x.zeros_like()?;
        for expert in self.data.experts.clone() {
            let visits = routing.0.iter().zip(0_u32..).filter_map(|(chosen, row)| {
                chosen.iter().find(|(visited, _)| *visited == expert).map(|&(_, weight)| (row, weight))
            });
            let (rows, weights): (Vec<u32>, Vec<f32>) = visits.unzip();
            if rows.is_empty() {
                continue;
            }
            let y = self.expert(&select(x, rows.iter().copied())?, expert - self.data.experts.start, limit)?;
            let visits = rows.len();
            let weighted = y.broadcast_mul(&tensor(weights, (visits, 1))?)?;
            mixed = mixed.index_add(&Tensor::from_vec(rows, visits, &Device::Cpu)?, &weighted, 0)?;
        }
        Ok(mixed)
    }

    /// `W2 swiglu(W1 x + b1) + b2` of one expert, by its index among those held.
    fn expert(&self, x: &Tensor, index: usize, limit: f64) -> Result<Tensor> {
        let (data, held) = (&self.data, self.data.experts.len());
        let part = |all: &[u8]| index * (all.len() / held)..(index + 1) * (all.len() / held);
        let widen = |blocks: &[u8], scales: &[u8], rows| dequantize(&blocks[part(blocks)], &scales[part(scales)], rows);
        let bias = |all: &[f32]| {
            let len = all.len() / held;
            tensor(all[index * len..(index + 1) * len].to_vec(), len)
        };
        let gate_up = widen(&data.gate_up_blocks, &data.gate_up_scales, 2 * data.intermediate)?;
        let h = product(x, &gate_up)?.broadcast_add(&bias(&data.gate_up_bias)?)?;
        let down = widen(&data.down_blocks, &data.down_scales, data.hidden)?;
        let y = product(&swiglu(&h, limit)?, &down)?;
        if data.down_bias.is_empty() { Ok(y) } else { y.broadcast_add(&bias(&data.down_bias)?) }
    }
}

/// `gate * sigmoid(1.702 gate) * (up + 1)` for `h` `[rows, 2 * intermediate]` with even columns gate and odd ones up.
/// The gate is clamped above only.
fn swiglu(h: &Tensor, limit: f64) -> Result<Tensor> {
    let (rows, width) = h.dims2()?;
    let pairs = h.reshape((rows, width / 2, 2))?;
    let gate = pairs.narrow(2, 0, 1)?.squeeze(2)?.minimum(limit)?;
    let up = pairs.narrow(2, 1, 1)?.squeeze(2)?.clamp(-limit, limit)?;
    let sigmoid = ((&gate * -SWIGLU_SLOPE)?.exp()? + 1.0)?.recip()?;
    (gate * sigmoid)? * (up + 1.0)?
}
