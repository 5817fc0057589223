//! Products with dense matrices.

use phalanx_worker::backend::cuda::{
    driver::{Arguments, Shape},
    kernels::{DENSE, GEMM},
};

use crate::bench::{Bench, assert_close, noise, to_bf16};

/// Sums of up to 4096 products of deviation one in f32, in some order: a relative error of 2^-24 a step, of values that
/// are a few times smaller than the largest sum.
const F32_SUM: f64 = 1e-5;
/// Half a unit of bf16's last place.
const BF16: f64 = 1.0 / 256.0;

struct Case {
    outputs: usize,
    inputs: usize,
    rows: usize,
    splits: usize,
    warps: usize,
}

/// `tiles` of 8 rows a block; 0 for the kernels for many rows.
fn check(bench: &Bench, name: &'static str, tiles: usize, case: &Case) {
    let &Case { outputs, inputs, rows, splits, warps } = case;
    let what = format!("{name}: {rows} x {inputs} -> {outputs}, {splits} splits of {warps} warps");
    let (weight, x) = (to_bf16(&noise(outputs * inputs, 1)), to_bf16(&noise(rows * inputs, 2)));
    let bias = noise(outputs, 3);
    let narrow = name.ends_with("bf16");
    // Columns of a wider result.
    let stride = outputs + 5;
    let y = bench.poisoned(rows * stride);
    let arguments = Arguments::new()
        .pointer(bench.halves(&weight))
        .optional((outputs % 2 == 0).then(|| bench.floats(&bias)))
        .pointer(bench.halves(&x))
        .pointer(y)
        .size(outputs)
        .size(inputs)
        .size(rows);
    if tiles == 0 {
        let grid = [outputs.div_ceil(128) as u32, rows.div_ceil(128) as u32, 1];
        bench.launch(name, Shape { grid, threads: 256, shared_bytes: 96 * 1024 }, &arguments.size(stride));
    } else {
        let grid = [outputs.div_ceil(16 * (warps / splits)) as u32, rows.div_ceil(8 * tiles) as u32, 1];
        let shape = Shape { grid, threads: 32 * warps as u32, shared_bytes: (512 * tiles * warps) as u32 };
        bench.launch(name, shape, &arguments.size(splits).size(stride));
    }
    let count = rows * stride - 5;
    let all = if narrow { bench.read_halves(y, count) } else { bench.read_floats(y, count) };
    let found: Vec<f32> = all.chunks(stride).flat_map(|row| &row[..outputs]).copied().collect();
    let mut expected = Vec::new();
    for x in x.chunks(inputs) {
        for (weights, bias) in weight.chunks(inputs).zip(&bias) {
            let sum: f64 = x.iter().zip(weights).map(|(x, w)| x.to_f64() * w.to_f64()).sum();
            expected.push(sum + if outputs % 2 == 0 { f64::from(*bias) } else { 0.0 });
        }
    }
    assert_close(&what, &found, &expected, outputs, if narrow { BF16 } else { F32_SUM });
    assert!(all.chunks(stride).all(|row| row[outputs..].iter().all(|value| value.is_nan())), "{what}: wrote beside");
}

#[test]
fn matrices_of_every_shard_multiply_few_rows() {
    // Contracted axes of gpt-oss's matrices at world sizes 1, 2, 4 and 8, and odd ones; a slice of the outputs.
    let cases = [
        Case { outputs: 40, inputs: 2880, rows: 1, splits: 8, warps: 8 },
        Case { outputs: 16, inputs: 4096, rows: 3, splits: 4, warps: 8 },
        Case { outputs: 33, inputs: 2048, rows: 8, splits: 2, warps: 4 },
        Case { outputs: 34, inputs: 1024, rows: 2, splits: 1, warps: 2 },
        Case { outputs: 7, inputs: 512, rows: 5, splits: 2, warps: 2 },
        Case { outputs: 48, inputs: 96, rows: 4, splits: 4, warps: 8 },
        Case { outputs: 21, inputs: 32, rows: 7, splits: 2, warps: 2 },
    ];
    Bench::in_both_orders(&DENSE, &[], |bench| {
        for case in &cases {
            check(bench, "gemv_8_f32", 1, case);
            check(bench, "gemv_8_bf16", 1, case);
        }
    });
}

#[test]
fn wider_tiles_take_more_rows_and_any_number_of_them() {
    Bench::in_both_orders(&DENSE, &[], |bench| {
        for rows in [1, 9, 16, 33, 70] {
            let case = Case { outputs: 36, inputs: 160, rows, splits: 2, warps: 4 };
            check(bench, "gemv_8_f32", 1, &case);
            check(bench, "gemv_16_f32", 2, &case);
            check(bench, "gemv_16_bf16", 2, &case);
            check(bench, "gemv_32_f32", 4, &case);
            check(bench, "gemv_32_bf16", 4, &case);
        }
    });
}

#[test]
fn matrices_of_every_shard_multiply_many_rows() {
    let case = |outputs, inputs, rows| Case { outputs, inputs, rows, splits: 1, warps: 8 };
    Bench::in_both_orders(&GEMM, &[], |bench| {
        for case in [case(40, 2880, 70), case(16, 4096, 3), case(131, 96, 130), case(300, 32, 65), case(7, 512, 257)] {
            check(bench, "gemm_f32", 0, &case);
            check(bench, "gemm_bf16", 0, &case);
        }
    });
}
