//! What the tests of the CPU backend share: seeded numbers, small models, and every way to run.
#![allow(dead_code, reason = "each test binary uses its own part")]

use half::bf16;
use phalanx_proto::geometry::{Geometry, LayerKind};
use phalanx_worker::backend::{
    Arithmetic, DenseData, DenseMatrix, ExpertsData,
    cpu::{CpuBackend, Isa},
};

/// Half an ulp of 1: the largest relative error of one f32 operation.
pub(crate) const EPS: f64 = 1.0 / (1u64 << 24) as f64;

/// Seeded noise.
pub(crate) struct Noise(u64);

impl Noise {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn bits(&mut self) -> u64 {
        // xorshift64*
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16
    }

    /// In [-1, 1).
    pub(crate) fn value(&mut self) -> f32 {
        (self.bits() % (1 << 24)) as f32 / (1 << 23) as f32 - 1.0
    }

    pub(crate) fn values(&mut self, len: usize, scale: f32) -> Vec<f32> {
        (0..len).map(|_| self.value() * scale).collect()
    }

    pub(crate) fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.bits() as u8).collect()
    }

    pub(crate) fn bf16_matrix(&mut self, rows: usize, columns: usize) -> DenseMatrix {
        let values = (0..rows * columns).map(|_| bf16::from_f32(self.value())).collect();
        DenseMatrix { rows, columns, data: DenseData::Bf16(values) }
    }

    pub(crate) fn f32_matrix(&mut self, rows: usize, columns: usize) -> DenseMatrix {
        DenseMatrix { rows, columns, data: DenseData::F32(self.values(rows * columns, 1.0)) }
    }

    /// Experts with ordinary scales and, every seventh block, vanishing or large ones.
    pub(crate) fn experts(
        &mut self,
        experts: std::ops::Range<usize>,
        hidden: usize,
        intermediate: usize,
    ) -> ExpertsData {
        let count = experts.len();
        let mut scales = |len: usize| -> Vec<u8> {
            (0..len)
                .map(|i| if i % 7 == 3 { [0, 1, 2, 60][i / 7 % 4] } else { 121 + (self.bits() % 5) as u8 })
                .collect()
        };
        let gate_up_scales = scales(count * 2 * intermediate * hidden / 32);
        let down_scales = scales(count * hidden * intermediate / 32);
        ExpertsData {
            experts,
            hidden,
            intermediate,
            gate_up_blocks: self.bytes(count * intermediate * hidden),
            gate_up_scales,
            gate_up_bias: self.values(count * 2 * intermediate, 0.5),
            down_blocks: self.bytes(count * hidden * intermediate / 2),
            down_scales,
            down_bias: self.values(count * hidden, 0.5),
        }
    }
}

/// One value of a matrix.
pub(crate) fn entry(matrix: &DenseMatrix, row: usize, column: usize) -> f64 {
    match &matrix.data {
        DenseData::Bf16(values) => values[row * matrix.columns + column].to_f64(),
        DenseData::F32(values) => f64::from(values[row * matrix.columns + column]),
    }
}

/// FP4 by nibble, from the OCP microscaling specification.
const FP4: [f64; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];

/// Value `column` of row `row` of MXFP4 blocks `[rows, columns / 32, 16]`.
pub(crate) fn fp4_entry(blocks: &[u8], scales: &[u8], columns: usize, (row, column): (usize, usize)) -> f64 {
    let at = row * columns + column;
    let byte = blocks[at / 2];
    let nibble = if at.is_multiple_of(2) { byte & 15 } else { byte >> 4 };
    let value = FP4[usize::from(nibble & 7)] * if nibble < 8 { 1.0 } else { -1.0 };
    value * 2f64.powi(i32::from(scales[at / 32]) - 127)
}

/// Arithmetic of a model of which only the named sizes matter.
pub(crate) fn arithmetic(experts: usize, per_token: usize, head_dim: usize, window: usize) -> Arithmetic {
    Arithmetic {
        geometry: Geometry {
            hidden_size: 64,
            intermediate_size: 64,
            num_attention_heads: 8,
            num_key_value_heads: 2,
            head_dim,
            num_local_experts: experts,
            num_experts_per_tok: per_token,
            vocab_size: 64,
            sliding_window: window,
            max_position_embeddings: 1 << 17,
            layer_types: vec![LayerKind::FullAttention],
            rms_norm_eps: 1e-5,
            rope_theta: 150_000.0,
            rope_scaling: None,
            swiglu_limit: 7.0,
            eos_token_ids: Vec::new(),
        },
        inverse_frequencies: (0..head_dim / 2).map(|i| 150_000f64.powf(-2.0 * i as f64 / head_dim as f64)).collect(),
        rotary_scale: 1.34,
    }
}

/// The same backend on every instruction set and with 1, 2 and 3 threads.
pub(crate) fn every_way(arithmetic: &Arithmetic) -> Vec<(String, CpuBackend)> {
    let mut ways = Vec::new();
    for isa in Isa::available() {
        for threads in [1, 2, 3] {
            let backend = CpuBackend::with_isa(arithmetic.clone(), threads, isa).unwrap();
            ways.push((format!("{}, {threads} threads", isa.name()), backend));
        }
    }
    ways
}

/// Whether results of these two ways must be the same bits: the portable path rounds products where the processor's
/// baseline has no fused multiply-add.
pub(crate) fn same_bits_expected(way: &str) -> bool {
    !way.starts_with(Isa::Portable.name()) || cfg!(target_arch = "aarch64")
}

/// The bits, so that a difference in the last one shows.
pub(crate) fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}
