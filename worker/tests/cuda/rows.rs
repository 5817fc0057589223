//! Embedding, norms, sums and selections.

use phalanx_worker::backend::cuda::{
    driver::{Arguments, Shape},
    kernels::ROWS,
};

use crate::bench::{Bench, assert_close, noise, to_bf16};

/// Rounding to bf16 loses at most half of 2^-8 of a value.
const BF16: f64 = 1.0 / 256.0;

fn one_a_row(rows: usize) -> Shape {
    Shape { grid: [rows as u32, 1, 1], threads: 256, shared_bytes: 64 }
}

#[test]
fn rows_of_the_table_are_embedded() {
    Bench::in_both_orders(&ROWS, &[], |bench| {
        let (hidden, tokens) = (96, [5, 0, 6, 5]);
        let table = to_bf16(&noise(7 * hidden, 1));
        let x = bench.poisoned(tokens.len() * hidden);
        let arguments =
            Arguments::new().pointer(bench.halves(&table)).pointer(bench.words(&tokens)).pointer(x).size(hidden);
        bench.launch("embed", one_a_row(tokens.len()), &arguments);
        let expected = tokens.iter().flat_map(|&token| &table[token as usize * hidden..][..hidden]);
        assert_eq!(bench.read_floats(x, 4 * hidden), expected.map(|value| value.to_f32()).collect::<Vec<_>>());
    });
}

#[test]
fn norms_add_what_is_pending_and_scale_each_row_by_itself() {
    Bench::in_both_orders(&ROWS, &[], |bench| {
        for (rows, hidden) in [(3, 160), (1, 2880), (2, 96)] {
            for added in [false, true] {
                let (x, addend, weight) = (noise(rows * hidden, 2), noise(rows * hidden, 3), noise(hidden, 4));
                let stream = bench.floats(&x);
                let y = bench.poisoned(rows * hidden / 2);
                let arguments = Arguments::new().pointer(stream).optional(added.then(|| bench.floats(&addend)));
                let arguments = arguments.pointer(bench.floats(&weight)).pointer(y).size(hidden).f32(1e-5);
                bench.launch("rms_norm", one_a_row(rows), &arguments);
                let sum = |i: usize| x[i] + if added { addend[i] } else { 0.0 };
                let sums: Vec<f32> = (0..rows * hidden).map(sum).collect();
                assert_eq!(bench.read_floats(stream, rows * hidden), sums);
                let expected = sums.chunks(hidden).flat_map(|row| {
                    let squares: f64 = row.iter().map(|&value| f64::from(value).powi(2)).sum();
                    let root = (squares / hidden as f64 + 1e-5).sqrt();
                    row.iter().zip(&weight).map(move |(&x, &w)| f64::from(x) / root * f64::from(w))
                });
                let expected: Vec<f64> = expected.collect();
                assert_close("norm", &bench.read_halves(y, rows * hidden), &expected, hidden, BF16);
            }
        }
    });
}

#[test]
fn sums_and_selections_touch_what_they_should() {
    Bench::in_both_orders(&ROWS, &[], |bench| {
        let (x, y) = (noise(5 * 96, 5), noise(5 * 96, 6));
        let sum = bench.floats(&x);
        let arguments = Arguments::new().pointer(sum).pointer(bench.floats(&y)).u64(x.len() as u64);
        bench.launch("add", Shape { grid: [2, 1, 1], threads: 128, shared_bytes: 0 }, &arguments);
        let expected: Vec<f32> = x.iter().zip(&y).map(|(x, y)| x + y).collect();
        assert_eq!(bench.read_floats(sum, x.len()), expected);

        let selected = bench.poisoned(2 * 96);
        let arguments = Arguments::new().pointer(sum).pointer(bench.words(&[4, 1])).pointer(selected).size(96);
        bench.launch("select_rows", one_a_row(2), &arguments);
        assert_eq!(bench.read_floats(selected, 2 * 96), [&expected[4 * 96..], &expected[96..2 * 96]].concat());
    });
}
