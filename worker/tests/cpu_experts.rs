//! The CPU backend's experts against f64, and their invariance.
#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests fail by panicking, as tests do")]

mod cpu_common;

use std::ops::Range;

use cpu_common::{EPS, Noise, arithmetic, bits, entry, every_way, fp4_entry, same_bits_expected};
use phalanx_worker::backend::{Backend, DenseMatrix, ExpertsData, cpu::CpuBackend};

const EXPERTS: usize = 9;
const PER_TOKEN: usize = 3;

/// Runs a layer's router and experts.
fn moe(backend: &mut CpuBackend, router: &DenseMatrix, experts: &ExpertsData, x: &[f32]) -> Vec<f32> {
    let router = backend.load_linear(router.clone(), None).unwrap();
    let resident = backend.load_experts(experts.clone()).unwrap();
    let x = backend.from_host(x.to_vec(), experts.hidden).unwrap();
    let routing = backend.route(&x, &router).unwrap();
    let y = backend.experts(&x, &routing, &resident).unwrap();
    backend.to_host(&y).unwrap()
}

/// Experts and weights of one token by the formulas, in f64.
fn route(router: &DenseMatrix, x: &[f64]) -> Vec<(usize, f64)> {
    let logit = |row: usize| x.iter().enumerate().map(|(i, x)| entry(router, row, i) * x).sum::<f64>();
    let mut logits: Vec<_> = (0..router.rows).map(|row| (row, logit(row))).collect();
    logits.sort_by(|a, b| b.1.total_cmp(&a.1));
    // The test would mean nothing if f32 could choose another expert.
    assert!(logits.windows(2).take(PER_TOKEN).all(|pair| pair[0].1 - pair[1].1 > 1e-5));
    logits.truncate(PER_TOKEN);
    let sum: f64 = logits.iter().map(|(_, logit)| logit.exp()).sum();
    logits.into_iter().map(|(expert, logit)| (expert, logit.exp() / sum)).collect()
}

/// A sum, and a bound of what f32 makes of it: `roundings` of the terms' sizes, and the terms' own errors.
fn sum(terms: impl Iterator<Item = (f64, f64, f64)>, bias: f64, roundings: f64) -> (f64, f64) {
    let (mut sum, mut size, mut inherited) = (bias, bias.abs(), 0.0);
    for (weight, value, error) in terms {
        sum += weight * value;
        size += (weight * value).abs();
        inherited += (weight * error).abs();
    }
    (sum, roundings * EPS * size + inherited)
}

/// What quantizing adds to each value's error: half a unit of the 32639 into which the greatest magnitude of 32 is divided,
/// and a rounding more for the division.
fn quantized(values: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let block = |block: &[(f64, f64)]| {
        let greatest = block.iter().map(|(value, error)| value.abs() + error).fold(0.0, f64::max);
        let added = greatest * (0.5 / 32_639.0 + 2.0 * EPS);
        block.iter().map(|(value, error)| (*value, error + added)).collect::<Vec<_>>()
    };
    values.chunks(32).flat_map(block).collect()
}

/// One expert's output and its error bound, by the formulas of `gpt_oss/torch/model.py`, in f64.
fn expert(data: &ExpertsData, index: usize, x: &[f64]) -> Vec<(f64, f64)> {
    let (hidden, inter) = (data.hidden, data.intermediate);
    // A block's sum is exact; it is rounded once with the activations' scale, once as it is added, and with the bias and
    // each later block.
    let roundings = |columns: usize| (3 + columns / 32) as f64;
    let x = quantized(&x.iter().map(|x| (*x, 0.0)).collect::<Vec<_>>());
    let gate_up = |row: usize| {
        let row = index * 2 * inter + row;
        let weight = |i| fp4_entry(&data.gate_up_blocks, &data.gate_up_scales, hidden, (row, i));
        let terms = x.iter().enumerate().map(|(i, (x, error))| (weight(i), *x, *error));
        sum(terms, f64::from(data.gate_up_bias[row]), roundings(hidden))
    };
    let inner: Vec<_> = (0..inter)
        .map(|i| {
            let ((gate, gate_error), (up, up_error)) = (gate_up(2 * i), gate_up(2 * i + 1));
            let (gate, up) = (gate.min(7.0), up.clamp(-7.0, 7.0));
            let swish = gate / (1.0 + (-1.702 * gate).exp());
            let value = swish * (up + 1.0);
            // The swish's slope is at most 1.1; exp is within 2 ulp (and its argument's rounding, 1.702 * 7 ulp at
            // most, counts too), everything else rounds once: 20 in all.
            (value, 1.1 * gate_error * (up + 1.0).abs() + swish.abs() * up_error + 20.0 * EPS * value.abs())
        })
        .collect();
    let inner = quantized(&inner);
    let outer = |row: usize| {
        let row = index * hidden + row;
        let weight = |i| fp4_entry(&data.down_blocks, &data.down_scales, inter, (row, i));
        let terms = inner.iter().enumerate().map(|(i, (value, error))| (weight(i), *value, *error));
        sum(terms, data.down_bias.get(row).map_or(0.0, |bias| f64::from(*bias)), roundings(inter))
    };
    (0..hidden).map(outer).collect()
}

fn check(way: &str, router: &DenseMatrix, data: &ExpertsData, x: &[f32], y: &[f32]) {
    let hidden = data.hidden;
    for (token, found) in y.chunks(hidden).enumerate() {
        let x: Vec<f64> = x[token * hidden..][..hidden].iter().map(|x| f64::from(*x)).collect();
        let routed = route(router, &x);
        let held = routed.iter().filter(|(expert, _)| data.experts.contains(expert));
        let parts: Vec<_> =
            held.map(|(index, weight)| (*weight, expert(data, index - data.experts.start, &x))).collect();
        for (at, found) in found.iter().enumerate() {
            // A weight's error: that of the logits (of size below 100) as f32 sums, twice, and of exp and division.
            let weight_error = 2.0 * 100.0 * EPS * (20 + hidden / 32) as f64;
            let exact: f64 = parts.iter().map(|(weight, out)| weight * out[at].0).sum();
            let bound: f64 = parts.iter().map(|(w, out)| w * (out[at].1 + out[at].0.abs() * weight_error)).sum();
            let error = (f64::from(*found) - exact).abs();
            assert!(error <= bound + 1e-30, "{way}: token {token}, {at}: {found} for {exact}, off by {error:e}");
        }
    }
}

fn cut(data: &ExpertsData, keep: Range<usize>) -> ExpertsData {
    let first = keep.start - data.experts.start;
    let part = |values: &[u8]| {
        let each = values.len() / data.experts.len();
        values[first * each..(first + keep.len()) * each].to_vec()
    };
    let floats = |values: &[f32]| {
        let each = values.len() / data.experts.len();
        values[first * each..(first + keep.len()) * each].to_vec()
    };
    ExpertsData {
        experts: keep.clone(),
        hidden: data.hidden,
        intermediate: data.intermediate,
        gate_up_blocks: part(&data.gate_up_blocks),
        gate_up_scales: part(&data.gate_up_scales),
        gate_up_bias: floats(&data.gate_up_bias),
        down_blocks: part(&data.down_blocks),
        down_scales: part(&data.down_scales),
        down_bias: floats(&data.down_bias),
    }
}

#[test]
fn experts_are_within_the_rounding_bound_with_vanishing_scales_and_odd_slices() {
    let mut noise = Noise::new(7);
    for (hidden, intermediate, tokens) in [(64, 32, 1), (96, 96, 5), (160, 64, 33)] {
        let router = noise.bf16_matrix(EXPERTS, hidden);
        let whole = noise.experts(0..EXPERTS, hidden, intermediate);
        let mut without_bias = cut(&whole, 2..7);
        without_bias.down_bias.clear();
        let x = noise.values(tokens * hidden, 2.0);
        for data in [whole.clone(), cut(&whole, 4..5), without_bias] {
            for (way, mut backend) in every_way(&arithmetic(EXPERTS, PER_TOKEN, 64, 128)) {
                check(&way, &router, &data, &x, &moe(&mut backend, &router, &data, &x));
            }
        }
    }
}

#[test]
fn a_token_has_the_same_bits_alone_and_in_any_batch_with_any_threads_and_instructions() {
    let mut noise = Noise::new(8);
    let (hidden, tokens) = (96, 150);
    let (router, data) = (noise.bf16_matrix(EXPERTS, hidden), noise.experts(0..EXPERTS, hidden, 64));
    let x = noise.values(tokens * hidden, 2.0);
    let mut expected: Option<Vec<u32>> = None;
    for (way, mut backend) in every_way(&arithmetic(EXPERTS, PER_TOKEN, 64, 128)) {
        let whole = moe(&mut backend, &router, &data, &x);
        for batch in [1, 2, 3, 8, 31, 100] {
            for first in [0, 7, tokens - batch] {
                let part = moe(&mut backend, &router, &data, &x[first * hidden..(first + batch) * hidden]);
                assert_eq!(
                    bits(&part),
                    bits(&whole[first * hidden..(first + batch) * hidden]),
                    "{way}, {batch}, {first}"
                );
            }
        }
        if same_bits_expected(&way) {
            assert_eq!(expected.get_or_insert(bits(&whole)), &bits(&whole), "{way}");
        }
    }
}

#[test]
fn ranks_that_hold_other_experts_add_nothing_for_these() {
    let mut noise = Noise::new(9);
    let (router, whole) = (noise.bf16_matrix(EXPERTS, 64), noise.experts(0..EXPERTS, 64, 64));
    // Every logit is 0, so each token visits the first three experts.
    let x = vec![0.0; 4 * 64];
    let mut backend = CpuBackend::new(arithmetic(EXPERTS, PER_TOKEN, 64, 128), 2).unwrap();
    assert_eq!(moe(&mut backend, &router, &cut(&whole, 3..9), &x), vec![0.0; 4 * 64]);
    let before = backend.weight_bytes_read();
    assert!(moe(&mut backend, &router, &cut(&whole, 1..9), &x).iter().any(|y| *y != 0.0));
    // Two of its experts, and the router: 2 * 64 * 64 codes and 64 * 64 more in half a byte, scales for each 32.
    let expert = 3 * 64 * 64 / 2 + 3 * 64 * 64 / 32;
    assert_eq!(backend.weight_bytes_read() - before, 2 * expert as u64 + 32 * 64 * 2 + 32 * 4);
}

#[test]
fn sizes_that_do_not_fit_are_refused() {
    let mut noise = Noise::new(10);
    let mut data = noise.experts(0..2, 64, 32);
    data.down_scales.pop();
    let mut backend = CpuBackend::new(arithmetic(EXPERTS, PER_TOKEN, 64, 128), 1).unwrap();
    let error = backend.load_experts(data).err().unwrap().to_string();
    assert!(error.contains("down_proj") && error.contains("127 scales, expected 128"), "{error}");
}
