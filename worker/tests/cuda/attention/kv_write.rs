//! Rotation, and the way into the cache.

use std::{fs, path::Path};

use half::bf16;
use phalanx_proto::geometry::Geometry;
use phalanx_worker::backend::{
    Arithmetic,
    cuda::{
        driver::{Arguments, Shape},
        kernels::KV_WRITE,
    },
};

use super::{KV_HEADS, SHAPES, definitions, room};
use crate::bench::{Bench, assert_close, noise, to_bf16};

/// Rounding to bf16 loses at most half of 2^-8 of a value.
const BF16: f64 = 1.0 / 256.0;
const SKIPPED: u32 = u32::MAX;

fn frequencies(dim: usize) -> Vec<f32> {
    (0..dim / 2).map(|pair| 150_000_f32.powf(-2.0 * pair as f32 / dim as f32)).collect()
}

fn rotation(position: u32, frequency: f32) -> [f32; 2] {
    let angle = f64::from(position as f32 * frequency);
    [angle.cos() as f32, angle.sin() as f32]
}

fn table(dim: usize, positions: u32) -> Vec<f32> {
    let row = |position| frequencies(dim).into_iter().flat_map(move |frequency| rotation(position, frequency));
    (0..positions).flat_map(row).collect()
}

#[test]
fn the_table_has_the_angles_that_every_backend_turns_by() {
    for (model, shape) in [("headers/gpt-oss-20b", (8, 64)), ("golden/tiny-ragged", (3, 32))] {
        let config = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data").join(model).join("config.json");
        let geometry = Geometry::from_config_json(&fs::read_to_string(config).unwrap()).unwrap();
        let arithmetic = Arithmetic::new(geometry);
        let frequencies: Vec<f32> = arithmetic.inverse_frequencies.iter().map(|&frequency| frequency as f32).collect();
        let positions = 20_000;
        let row = |position| (0..shape.1 / 2).map(move |pair| (position, pair));
        let turn = |(position, pair)| <[f32; 2]>::from(arithmetic.rotation(position, pair));
        let expected: Vec<f32> = (0..positions).flat_map(row).flat_map(turn).collect();
        Bench::in_both_orders(&KV_WRITE, &definitions(shape), |bench| {
            let found = bench.poisoned(expected.len());
            let arguments = Arguments::new().pointer(bench.floats(&frequencies)).pointer(found);
            let arguments = arguments.u64(arithmetic.rotary_scale.to_bits()).u32(positions);
            bench.launch("rotary_table", Shape { grid: [7, 1, 1], threads: 256, shared_bytes: 0 }, &arguments);
            assert_eq!(bench.read_floats(found, expected.len()), expected);
        });
    }
}

#[test]
fn queries_and_keys_are_turned_and_values_lie_across() {
    for ((group, dim), block_size) in SHAPES.into_iter().zip([16, 8, 40, 16]) {
        Bench::in_both_orders(&KV_WRITE, &definitions((group, dim)), |bench| {
            // A run of consecutive slots across blocks, rows that go nowhere, and one of another sequence.
            let run = (0..11).map(|i| (40 + i, 3 * block_size as u32 + 5 + i));
            let rows: Vec<(u32, u32)> = run.chain([(9, SKIPPED), (77, 2), (0, SKIPPED)]).collect();
            Rotation { group, dim, block_size, rows }.check(bench);
        });
    }
}

/// Position and slot of each row.
struct Rotation {
    group: usize,
    dim: usize,
    block_size: usize,
    rows: Vec<(u32, u32)>,
}

impl Rotation {
    fn check(&self, bench: &Bench) {
        let (group, dim, rows) = (self.group, self.dim, self.rows.len());
        let blocks = 3 + 16_usize.div_ceil(self.block_size);
        let size = blocks * KV_HEADS * self.block_size * dim;
        let qkv = to_bf16(&noise(rows * (group + 2) * KV_HEADS * dim, 1));
        let (q, keys, values) = (room(bench, rows * group * KV_HEADS * dim), room(bench, size), room(bench, size));
        let (positions, slots): (Vec<_>, Vec<_>) = self.rows.iter().copied().unzip();
        let arguments = Arguments::new().pointer(bench.halves(&qkv)).pointer(bench.floats(&table(dim, 128)));
        let arguments = arguments.pointer(bench.words(&positions)).pointer(bench.words(&slots)).pointer(q);
        let arguments = arguments.pointer(keys).pointer(values).size(rows).size(KV_HEADS).size(self.block_size);
        let grid = [rows.div_ceil(8) as u32, KV_HEADS as u32, 1];
        bench.launch("rotate_and_store", Shape { grid, threads: 256, shared_bytes: 0 }, &arguments);
        let q = bench.read_halves(q, rows * group * KV_HEADS * dim);
        let (keys, values) = (bench.read_halves(keys, size), bench.read_halves(values, size));

        let mut written = 0;
        for (row, &(position, slot)) in self.rows.iter().enumerate() {
            let heads = qkv[row * (group + 2) * KV_HEADS * dim..].chunks(dim);
            let heads: Vec<&[bf16]> = heads.take((group + 2) * KV_HEADS).collect();
            let found = &q[row * group * KV_HEADS * dim..][..group * KV_HEADS * dim];
            if slot == SKIPPED {
                assert!(found.iter().all(|value| value.is_nan()));
                continue;
            }
            let turned: Vec<f64> = heads[..group * KV_HEADS].iter().flat_map(|head| turn(head, position)).collect();
            assert_close("q", found, &turned, dim, BF16);
            let (block, offset) = (slot as usize / self.block_size, slot as usize % self.block_size);
            for kv_head in 0..KV_HEADS {
                let start = (block * KV_HEADS + kv_head) * self.block_size * dim;
                let key = turn(heads[group * KV_HEADS + kv_head], position);
                assert_close("k", &keys[start + offset * dim..][..dim], &key, dim, BF16);
                let across: Vec<f32> = (0..dim).map(|i| values[start + i * self.block_size + offset]).collect();
                let value = heads[(group + 1) * KV_HEADS + kv_head].iter().map(|value| value.to_f32());
                assert_eq!(across, value.collect::<Vec<_>>());
            }
            written += KV_HEADS * dim;
        }
        for cache in [keys, values] {
            assert_eq!(cache.iter().filter(|value| !value.is_nan()).count(), written);
        }
    }
}

fn turn(head: &[bf16], position: u32) -> Vec<f64> {
    let (dim, half) = (head.len(), head.len() / 2);
    let frequencies = frequencies(dim);
    let at = |i: usize| f64::from(head[i].to_f32());
    let turned = |i: usize| {
        let [cos, sin] = rotation(position, frequencies[i % half]).map(f64::from);
        if i < half { at(i) * cos - at(i + half) * sin } else { at(i) * cos + at(i - half) * sin }
    };
    (0..dim).map(turned).collect()
}
