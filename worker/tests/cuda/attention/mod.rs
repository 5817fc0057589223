//! Attention: a paged cache as the kernels see it, and what f64 says of it.

mod decode;
mod kv_write;
mod prefill;

use half::bf16;
use phalanx_worker::backend::cuda::driver::{Address, Arguments};

use crate::bench::{Bench, noise, to_bf16};

/// Weights are rounded to bf16 before they multiply values: each is off by at most 2^-9 of itself, up or down, so that
/// an average over tokens moves by about 2^-9 of its size; the result is rounded by as much again. Twice their sum.
const TOLERANCE: f64 = 1.0 / 128.0;

/// Query heads a kv head, and the width of a head.
const SHAPES: [(usize, usize); 4] = [(8, 64), (4, 64), (3, 32), (1, 64)];
const KV_HEADS: usize = 2;
const BLOCK_SIZES: [usize; 3] = [8, 16, 40];
/// 0 is none.
const WINDOWS: [usize; 4] = [0, 128, 1, 37];

fn definitions((group, dim): (usize, usize)) -> [(&'static str, u32); 2] {
    [("GROUP", group as u32), ("HEAD_DIM", dim as u32)]
}

/// The rotated queries, keys and values of one sequence from its first token on.
struct Sequence {
    length: usize,
    /// Position of the first row of the batch; the last row is the last token.
    first: usize,
    /// `[length, heads, dim]`
    q: Vec<bf16>,
    /// `[length, KV_HEADS, dim]`
    k: Vec<bf16>,
    /// As `k`.
    v: Vec<bf16>,
}

/// Sequences in a cache whose every other value is NaN: what is outside of the windows, what comes after the sequences,
/// and blocks of nobody. Tables name a block that does not exist wherever nobody may look.
struct Scene {
    group: usize,
    dim: usize,
    block_size: usize,
    window: usize,
    sequences: Vec<Sequence>,
    sinks: Vec<f32>,
    /// `[sequences, table_stride]`
    tables: Vec<u32>,
    table_stride: usize,
    /// `[blocks, KV_HEADS, block_size, dim]`
    keys: Vec<bf16>,
    /// `[blocks, KV_HEADS, dim, block_size]`
    values: Vec<bf16>,
}

impl Scene {
    /// `spans` are the positions of each sequence's rows.
    fn new((group, dim): (usize, usize), block_size: usize, window: usize, spans: &[(usize, usize)]) -> Self {
        let heads = group * KV_HEADS;
        let sequence = |(i, &(first, length)): (usize, &(usize, usize))| {
            let values = |per_token: usize, seed: usize| to_bf16(&noise(length * per_token, (10 * i + seed) as u64));
            let (k, v) = (values(KV_HEADS * dim, 2), values(KV_HEADS * dim, 3));
            let q = values(heads * dim, 1).iter().map(|q| bf16::from_f32(2.0 * q.to_f32())).collect();
            Sequence { length, first, q, k, v }
        };
        let sequences: Vec<_> = spans.iter().enumerate().map(sequence).collect();
        let longest = spans.iter().map(|span| span.1).max().unwrap_or(0);
        let mut scene = Self {
            group,
            dim,
            block_size,
            window,
            sequences,
            sinks: noise(heads, 7),
            tables: Vec::new(),
            table_stride: longest.div_ceil(block_size) + 1,
            keys: Vec::new(),
            values: Vec::new(),
        };
        scene.fill();
        scene
    }

    fn heads(&self) -> usize {
        self.group * KV_HEADS
    }

    fn row_width(&self) -> usize {
        self.heads() * self.dim
    }

    /// First position that the query at `position` sees.
    fn first_visible(&self, position: usize) -> usize {
        if self.window == 0 { 0 } else { (position + 1).saturating_sub(self.window) }
    }

    fn fill(&mut self) {
        let most: usize = self.sequences.iter().map(|sequence| sequence.length.div_ceil(self.block_size)).sum();
        let blocks = most + 3;
        // Blocks in an order that has nothing to do with the sequences'.
        let mut free: Vec<u32> = (0..blocks as u32).collect();
        free.sort_by_key(|block| block.wrapping_mul(2_654_435_761));
        let size = blocks * KV_HEADS * self.block_size * self.dim;
        self.keys = vec![bf16::NAN; size];
        self.values = vec![bf16::NAN; size];
        self.tables = vec![blocks as u32; self.sequences.len() * self.table_stride];
        for i in 0..self.sequences.len() {
            let begin = self.first_visible(self.sequences[i].first);
            for token in begin..self.sequences[i].length {
                let entry = i * self.table_stride + token / self.block_size;
                if token == begin || token % self.block_size == 0 {
                    self.tables[entry] = free.pop().unwrap();
                }
                self.write(i, token, self.tables[entry] as usize);
            }
        }
    }

    fn write(&mut self, sequence: usize, token: usize, block: usize) {
        let (dim, size, offset) = (self.dim, self.block_size, token % self.block_size);
        let sequence = &self.sequences[sequence];
        for head in 0..KV_HEADS {
            let start = (block * KV_HEADS + head) * size * dim;
            for i in 0..dim {
                let from = (token * KV_HEADS + head) * dim + i;
                self.keys[start + offset * dim + i] = sequence.k[from];
                self.values[start + i * size + offset] = sequence.v[from];
            }
        }
    }

    /// Queries of all rows of the batch, `[rows, heads, dim]`.
    fn queries(&self) -> Vec<bf16> {
        let rows = |sequence: &Sequence| sequence.q[sequence.first * self.row_width()..].to_vec();
        self.sequences.iter().flat_map(rows).collect()
    }

    /// What all rows of the batch see, `[rows, heads, dim]`.
    fn expected(&self) -> Vec<f64> {
        let rows = |i: usize| (self.sequences[i].first..self.sequences[i].length).map(move |position| (i, position));
        (0..self.sequences.len()).flat_map(rows).flat_map(|(i, position)| self.attend(i, position)).collect()
    }

    fn attend(&self, sequence: usize, position: usize) -> Vec<f64> {
        let (sequence, dim) = (&self.sequences[sequence], self.dim);
        let mut out = vec![0.0; self.row_width()];
        for (head, out) in out.chunks_mut(dim).enumerate() {
            let vector = |of: &[bf16], start: usize| -> Vec<f64> {
                of[start * dim..][..dim].iter().map(|value| f64::from(value.to_f32())).collect()
            };
            let q = vector(&sequence.q, position * self.heads() + head);
            let tokens = self.first_visible(position)..position + 1;
            let row = |token: usize| token * KV_HEADS + head / self.group;
            let product = |k: &[f64]| q.iter().zip(k).map(|(q, k)| q * k).sum::<f64>();
            let weight = |token| (product(&vector(&sequence.k, row(token))) / (dim as f64).sqrt()).exp();
            let weights: Vec<f64> = tokens.clone().map(weight).collect();
            let sum = weights.iter().sum::<f64>() + f64::from(self.sinks[head]).exp();
            for (token, weight) in tokens.zip(&weights) {
                for (out, v) in out.iter_mut().zip(vector(&sequence.v, row(token))) {
                    *out += weight / sum * v;
                }
            }
        }
        out
    }

    /// Writes the fields of `KvCache`.
    fn cache(&self, bench: &Bench, arguments: Arguments) -> Arguments {
        let arguments = arguments.pointer(bench.halves(&self.keys)).pointer(bench.halves(&self.values));
        let arguments = arguments.pointer(bench.words(&self.tables)).size(self.table_stride);
        arguments.size(KV_HEADS).size(self.block_size).size(self.window)
    }
}

/// Room for so many values of bf16, poisoned.
fn room(bench: &Bench, values: usize) -> Address {
    bench.poisoned(values.div_ceil(2))
}
