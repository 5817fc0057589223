//! Sequences with one row each: splits, and what brings them together.

use half::bf16;
use phalanx_worker::backend::cuda::{
    driver::{Address, Arguments, Shape},
    kernels::ATTEND_DECODE,
};

use super::{BLOCK_SIZES, KV_HEADS, SHAPES, Scene, TOLERANCE, WINDOWS, definitions, room};
use crate::bench::{Bench, assert_close};

const LENGTHS: [usize; 6] = [129, 1, 31, 500, 33, 128];

/// How a batch is attended to.
#[derive(Clone, Copy)]
pub(super) enum Way<'a> {
    /// One split, which writes the result itself.
    Whole,
    /// So many splits, then a combination.
    Split(usize),
    /// As the latter, with these rows of the batch.
    SplitAt(usize, &'a [u32]),
}

fn last_rows(lengths: &[usize]) -> Vec<(usize, usize)> {
    lengths.iter().map(|&length| (length.saturating_sub(1), length)).collect()
}

/// Attends on the device: `[rows, heads, dim]`.
pub(super) fn attend(bench: &Bench, scene: &Scene, way: Way<'_>) -> Vec<f32> {
    let (splits, rows) = match way {
        Way::Whole => (1, None),
        Way::Split(splits) => (splits, None),
        Way::SplitAt(splits, rows) => (splits, Some(rows)),
    };
    let (sequences, width) = (scene.sequences.len(), scene.row_width());
    let lengths: Vec<u32> = scene.sequences.iter().map(|sequence| sequence.length as u32).collect();
    // Sequences of no length have no query either.
    let mut q = vec![bf16::NAN; sequences * width];
    let present = (0..sequences).filter(|&i| scene.sequences[i].length > 0);
    for (i, query) in present.zip(scene.queries().chunks(width)) {
        let row = rows.map_or(i, |rows| rows[i] as usize);
        q[row * width..][..width].copy_from_slice(query);
    }
    let rows: Option<Address> = rows.map(|rows| bench.words(rows));
    let (out, sinks) = (room(bench, sequences * width), bench.floats(&scene.sinks));
    let places = sequences * scene.heads() * splits;
    let (statistics, partial) = (bench.poisoned(2 * places), bench.poisoned(places * scene.dim));
    let whole = matches!(way, Way::Whole);

    let arguments = Arguments::new().pointer(bench.halves(&q)).optional(rows).pointer(bench.words(&lengths));
    let arguments = scene.cache(bench, arguments).pointer(statistics).pointer(partial).pointer(sinks);
    let shape = Shape {
        grid: [splits as u32, KV_HEADS as u32, sequences as u32],
        threads: 128,
        shared_bytes: ((scene.dim + 10) * scene.group * 16) as u32,
    };
    bench.launch("attend_decode", shape, &arguments.optional(whole.then_some(out)));
    if !whole {
        let arguments = Arguments::new().pointer(statistics).pointer(partial).optional(rows).pointer(sinks);
        let arguments = arguments.pointer(out).size(scene.heads()).size(splits);
        let grid = [width.div_ceil(256) as u32, sequences as u32, 1];
        bench.launch("attend_combine", Shape { grid, threads: 128, shared_bytes: 0 }, &arguments);
    }
    bench.read_halves(out, sequences * width)
}

#[test]
fn one_row_sees_its_window_and_nothing_else_at_any_split() {
    for (i, shape) in SHAPES.into_iter().enumerate() {
        for (j, window) in WINDOWS.into_iter().enumerate() {
            let scene = Scene::new(shape, BLOCK_SIZES[(i + j) % 3], window, &last_rows(&LENGTHS));
            let expected = scene.expected();
            Bench::in_both_orders(&ATTEND_DECODE, &definitions(shape), |bench| {
                for splits in [1, 3, 8] {
                    let what = format!("{shape:?}, block {}, window {window}, {splits} splits", scene.block_size);
                    let found = attend(bench, &scene, Way::Split(splits));
                    assert_close(&what, &found, &expected, scene.dim, TOLERANCE);
                }
            });
        }
    }
}

#[test]
fn every_block_size_holds_the_same_tokens() {
    let shape = SHAPES[0];
    Bench::in_both_orders(&ATTEND_DECODE, &definitions(shape), |bench| {
        for window in WINDOWS {
            let found = BLOCK_SIZES.map(|block_size| {
                let scene = Scene::new(shape, block_size, window, &last_rows(&LENGTHS));
                attend(bench, &scene, Way::Split(2))
            });
            assert_eq!(found[0], found[1]);
            assert_eq!(found[0], found[2]);
        }
    });
}

#[test]
fn a_single_split_needs_no_combination() {
    for shape in [(8, 64), (3, 32), (16, 128)] {
        Bench::in_both_orders(&ATTEND_DECODE, &definitions(shape), |bench| {
            let scene = Scene::new(shape, 16, 0, &last_rows(&LENGTHS));
            let whole = attend(bench, &scene, Way::Whole);
            assert_close("whole", &whole, &scene.expected(), scene.dim, TOLERANCE);
            assert_eq!(whole, attend(bench, &scene, Way::Split(1)));
        });
    }
}

#[test]
fn the_row_of_a_sequence_does_not_depend_on_the_rest_of_the_batch() {
    let shape = SHAPES[0];
    Bench::in_both_orders(&ATTEND_DECODE, &definitions(shape), |bench| {
        let together = Scene::new(shape, 16, 128, &last_rows(&LENGTHS));
        let all = attend(bench, &together, Way::Split(3));
        // The first sequence of a scene has the same values whatever follows it.
        let alone = Scene::new(shape, 16, 128, &last_rows(&LENGTHS[..1]));
        assert_eq!(all[..alone.row_width()], attend(bench, &alone, Way::Split(3)));
    });
}

#[test]
fn rows_are_found_where_the_batch_has_them_and_padding_gives_zeros() {
    let shape = SHAPES[1];
    Bench::in_both_orders(&ATTEND_DECODE, &definitions(shape), |bench| {
        for splits in [1, 3] {
            let scene = Scene::new(shape, 8, 37, &last_rows(&[33, 0, 500, 0, 1]));
            let width = scene.row_width();
            let straight = attend(bench, &scene, Way::Split(splits));
            let expected = scene.expected();
            for (found, expected) in [0, 2, 4].into_iter().zip(expected.chunks(width)) {
                assert_close("row", &straight[found * width..][..width], expected, scene.dim, TOLERANCE);
            }
            for padding in [1, 3] {
                assert!(straight[padding * width..][..width].iter().all(|&value| value == 0.0));
            }
            let rows = [3, 1, 0, 4, 2];
            let moved = attend(bench, &scene, Way::SplitAt(splits, &rows));
            for (i, &row) in rows.iter().enumerate() {
                assert_eq!(straight[i * width..][..width], moved[row as usize * width..][..width]);
            }
        }
    });
}
