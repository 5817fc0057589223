//! Sequences with many rows.

use phalanx_worker::backend::cuda::{
    driver::{Arguments, Shape},
    kernels::{ATTEND_DECODE, ATTEND_PREFILL},
};

use super::{BLOCK_SIZES, KV_HEADS, SHAPES, Scene, TOLERANCE, WINDOWS, decode, decode::Way, definitions, room};
use crate::bench::{Bench, assert_close};

/// Chunks of prompts: whole ones, such as start in the middle, and one row.
const SPANS: [(usize, usize); 6] = [(97, 129), (0, 1), (0, 31), (463, 500), (32, 33), (0, 128)];

/// Attends on the device: `[rows, heads, dim]`.
fn attend(bench: &Bench, scene: &Scene) -> Vec<f32> {
    let positions = 128 / scene.group;
    let (mut tiles, mut row) = (Vec::new(), 0);
    for (i, sequence) in scene.sequences.iter().enumerate() {
        for position in (sequence.first..sequence.length).step_by(positions) {
            let count = positions.min(sequence.length - position);
            tiles.push([i, row, count, position].map(|value| value as u32));
            row += count;
        }
    }
    // In no order of the rows.
    tiles.reverse();
    let out = room(bench, row * scene.row_width());
    let arguments = Arguments::new().pointer(bench.halves(&scene.queries())).pointer(bench.words(tiles.as_flattened()));
    let arguments = scene.cache(bench, arguments).pointer(bench.floats(&scene.sinks)).pointer(out);
    let shape = Shape {
        grid: [tiles.len() as u32, KV_HEADS as u32, 1],
        threads: if scene.dim > 64 { 256 } else { 128 },
        shared_bytes: 4 * (64 * (scene.dim + 8) + scene.dim * 72) as u32,
    };
    bench.launch("attend_prefill", shape, &arguments);
    bench.read_halves(out, row * scene.row_width())
}

#[test]
fn rows_see_what_is_before_them_in_their_windows() {
    for (i, shape) in SHAPES.into_iter().enumerate() {
        for (j, window) in WINDOWS.into_iter().enumerate() {
            let scene = Scene::new(shape, BLOCK_SIZES[(i + j) % 3], window, &SPANS);
            let expected = scene.expected();
            Bench::in_both_orders(&ATTEND_PREFILL, &definitions(shape), |bench| {
                let what = format!("{shape:?}, block {}, window {window}", scene.block_size);
                assert_close(&what, &attend(bench, &scene), &expected, scene.dim, TOLERANCE);
            });
        }
    }
}

#[test]
fn wide_heads_and_wide_groups_fit_too() {
    let shape = (16, 128);
    let scene = Scene::new(shape, 16, 37, &[(50, 70), (0, 20)]);
    Bench::in_both_orders(&ATTEND_PREFILL, &definitions(shape), |bench| {
        assert_close("wide", &attend(bench, &scene), &scene.expected(), scene.dim, TOLERANCE);
    });
}

#[test]
fn a_prompt_gives_the_same_bits_in_any_chunks() {
    let shape = SHAPES[0];
    Bench::in_both_orders(&ATTEND_PREFILL, &definitions(shape), |bench| {
        for window in [0, 37] {
            let chunk = |first, length| attend(bench, &Scene::new(shape, 16, window, &[(first, length)]));
            // Noise of one seed is the same as far as it goes, so shorter sequences are beginnings of the longest.
            let whole = chunk(0, 200);
            let chunks = [chunk(0, 7), chunk(7, 65), chunk(65, 150), chunk(150, 200)].concat();
            assert_eq!(whole, chunks, "window {window}");
        }
    });
}

#[test]
fn decoding_gives_what_prefill_gives() {
    let shape = SHAPES[0];
    for window in [0, 128] {
        let scene = Scene::new(shape, 40, window, &[(128, 129), (499, 500), (0, 1), (30, 31)]);
        Bench::in_both_orders(&ATTEND_DECODE, &definitions(shape), |bench| {
            let decoded = decode::attend(bench, &scene, Way::Split(4));
            let decoded: Vec<f64> = decoded.into_iter().map(f64::from).collect();
            Bench::in_both_orders(&ATTEND_PREFILL, &definitions(shape), |bench| {
                assert_close("prefill", &attend(bench, &scene), &decoded, scene.dim, TOLERANCE);
            });
        });
    }
}
