//! The CPU backend's attention against f64, and its independence of how a prompt is fed.
#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests fail by panicking, as tests do")]

mod cpu_common;

use std::ops::Range;

use cpu_common::{EPS, Noise, arithmetic, bits, every_way, same_bits_expected};
use phalanx_proto::{
    geometry::LayerKind,
    ids::{BlockId, TokenId},
};
use phalanx_worker::backend::{
    Arithmetic, AttentionSite, Backend, BackendError, Batch, BatchSequence, KvCacheSpec, Qkv, cpu::CpuBackend,
};

/// A layer of each kind.
const LAYERS: [LayerKind; 2] = [LayerKind::SlidingAttention, LayerKind::FullAttention];

/// One sequence's queries, keys and values, and where its blocks are.
struct Sequence {
    len: usize,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    table: Vec<BlockId>,
}

struct Case {
    arithmetic: Arithmetic,
    heads: usize,
    kv_heads: usize,
    block_size: usize,
    sinks: Vec<f32>,
    sequences: Vec<Sequence>,
}

impl Case {
    fn new(
        noise: &mut Noise,
        (heads, kv_heads, head_dim): (usize, usize, usize),
        block_size: usize,
        lengths: &[usize],
    ) -> Self {
        let blocks: usize = lengths.iter().map(|len| len.div_ceil(block_size)).sum();
        // Blocks in an order that has nothing to do with the sequences': 7 shares no factor with the next odd power.
        let mut free: Vec<_> = (0..blocks as u32).map(BlockId).collect();
        free.sort_by_key(|block| (block.0.wrapping_mul(2_654_435_761), block.0));
        let sequences = lengths.iter().map(|&len| Sequence {
            len,
            q: noise.values(len * heads * head_dim, 2.0),
            k: noise.values(len * kv_heads * head_dim, 2.0),
            v: noise.values(len * kv_heads * head_dim, 1.0),
            table: free.split_off(free.len() - len.div_ceil(block_size)),
        });
        let sequences = sequences.collect();
        Self {
            arithmetic: arithmetic(4, 2, head_dim, 24),
            heads,
            kv_heads,
            block_size,
            sinks: noise.values(heads, 1.0),
            sequences,
        }
    }

    fn fresh_cache(&self, backend: &mut CpuBackend) {
        let blocks = self.sequences.iter().map(|sequence| sequence.table.len()).sum();
        let spec = KvCacheSpec {
            layers: LAYERS.to_vec(),
            kv_heads: self.kv_heads,
            head_dim: self.arithmetic.geometry.head_dim,
            block_size: self.block_size,
            full_blocks: blocks,
            sliding_blocks: blocks,
        };
        backend.allocate_kv_cache(&spec).unwrap();
    }

    /// Feeds these positions of these sequences in one batch; the output of each sequence's rows, layer by layer.
    fn feed(&self, backend: &mut CpuBackend, parts: &[(usize, Range<usize>)]) -> Vec<[Vec<f32>; 2]> {
        let mut batch = Batch::default();
        let (mut q, mut k, mut v) = (Vec::new(), Vec::new(), Vec::new());
        let width = self.heads * self.arithmetic.geometry.head_dim;
        let kv_width = self.kv_heads * self.arithmetic.geometry.head_dim;
        for (index, positions) in parts {
            let sequence = &self.sequences[*index];
            let first = batch.tokens.len();
            batch.tokens.extend(positions.clone().map(|_| TokenId(0)));
            batch.positions.extend(positions.clone().map(|position| position as u32));
            batch.sequences.push(BatchSequence {
                rows: first..batch.tokens.len(),
                first_position: positions.start,
                full_table: sequence.table.clone(),
                sliding_table: sequence.table.clone(),
            });
            q.extend_from_slice(&sequence.q[positions.start * width..positions.end * width]);
            k.extend_from_slice(&sequence.k[positions.start * kv_width..positions.end * kv_width]);
            v.extend_from_slice(&sequence.v[positions.start * kv_width..positions.end * kv_width]);
        }
        let outputs = [0, 1].map(|layer| {
            let qkv = Qkv {
                q: backend.from_host(q.clone(), width).unwrap(),
                k: backend.from_host(k.clone(), kv_width).unwrap(),
                v: backend.from_host(v.clone(), kv_width).unwrap(),
            };
            let out = backend.attention(qkv, &AttentionSite { layer, sinks: &self.sinks }, &batch).unwrap();
            backend.to_host(&out).unwrap()
        });
        let part = |layer: usize, rows: &Range<usize>| outputs[layer][rows.start * width..rows.end * width].to_vec();
        batch.sequences.iter().map(|sequence| [part(0, &sequence.rows), part(1, &sequence.rows)]).collect()
    }

    /// One whole sequence, fed in chunks of a size.
    fn in_chunks(&self, backend: &mut CpuBackend, index: usize, size: usize) -> [Vec<f32>; 2] {
        let len = self.sequences[index].len;
        let mut out = [Vec::new(), Vec::new()];
        for first in (0..len).step_by(size) {
            let part = self.feed(backend, &[(index, first..(first + size).min(len))]).remove(0);
            for (out, part) in out.iter_mut().zip(part) {
                out.extend(part);
            }
        }
        out
    }

    /// A head's vector, turned to its position, in f64.
    fn turned(&self, values: &[f32], position: usize) -> Vec<f64> {
        let half = values.len() / 2;
        let mut turned = vec![0.0; values.len()];
        for i in 0..half {
            // The table is part of the model; the turn itself is what is tested.
            let (cos, sin) = self.arithmetic.rotation(position as u32, i);
            let (cos, sin) = (f64::from(cos), f64::from(sin));
            let (a, b) = (f64::from(values[i]), f64::from(values[i + half]));
            turned[i] = a * cos - b * sin;
            turned[i + half] = b * cos + a * sin;
        }
        turned
    }

    fn check(&self, way: &str, index: usize, kind: LayerKind, found: &[f32]) {
        let sequence = &self.sequences[index];
        let dim = self.arithmetic.geometry.head_dim;
        let head_of = |values: &[f32], position: usize, heads: usize, head: usize| {
            values[(position * heads + head) * dim..][..dim].to_vec()
        };
        for head in 0..self.heads {
            let kv_head = head / (self.heads / self.kv_heads);
            let keys: Vec<_> =
                (0..sequence.len).map(|p| self.turned(&head_of(&sequence.k, p, self.kv_heads, kv_head), p)).collect();
            for position in 0..sequence.len {
                let query = self.turned(&head_of(&sequence.q, position, self.heads, head), position);
                let first = match kind {
                    LayerKind::FullAttention => 0,
                    LayerKind::SlidingAttention => (position + 1).saturating_sub(24),
                };
                let (mut weights, mut logit_error) = (Vec::new(), 0f64);
                for key in &keys[first..=position] {
                    let size: f64 = query.iter().zip(key).map(|(q, k)| (q * k).abs()).sum();
                    let logit: f64 = query.iter().zip(key).map(|(q, k)| q * k).sum();
                    weights.push((logit / (dim as f64).sqrt()).exp());
                    // A chain of half the dimensions; the turns round three times each (against a size that the turn
                    // itself may shrink, hence the 4), the factor and the last sum once.
                    logit_error =
                        logit_error.max((dim as f64 / 2.0 + 4.0 * 8.0 + 4.0) * EPS * size / (dim as f64).sqrt());
                }
                let sum = weights.iter().sum::<f64>() + f64::from(self.sinks[head]).exp();
                for i in 0..dim {
                    let values =
                        (first..=position).map(|p| f64::from(sequence.v[(p * self.kv_heads + kv_head) * dim + i]));
                    let exact = weights.iter().zip(values).map(|(weight, value)| weight * value).sum::<f64>() / sum;
                    let found = found[(position * self.heads + head) * dim + i];
                    // Weights are off by the logits' error, on both sides of the division, and by exp (2 ulp and what
                    // its argument, below 64, rounds by); each shrinks again with each greater tile, and all of them
                    // (of |value| < 1) are added one by one.
                    let roundings = 2.0 * (64.0 + 8.0 + (position + 1) as f64);
                    let bound = 2.0 * logit_error + roundings * EPS;
                    let error = (f64::from(found) - exact).abs();
                    assert!(
                        error <= bound,
                        "{way}: {kind:?} head {head} position {position}: off by {error:e}, bound {bound:e}"
                    );
                }
            }
        }
    }
}

#[test]
fn attention_is_within_the_rounding_bound_for_odd_heads_blocks_and_windows() {
    let mut noise = Noise::new(11);
    for (shape, block_size, len) in
        [((8, 2, 64), 16, 70), ((6, 2, 32), 5, 50), ((3, 1, 10), 40, 90), ((4, 4, 64), 1, 33)]
    {
        let case = Case::new(&mut noise, shape, block_size, &[len]);
        for (way, mut backend) in every_way(&case.arithmetic) {
            case.fresh_cache(&mut backend);
            let out = case.in_chunks(&mut backend, 0, 29);
            for (kind, out) in LAYERS.into_iter().zip(&out) {
                case.check(&way, 0, kind, out);
            }
        }
    }
}

#[test]
fn a_prompt_has_the_same_bits_however_it_is_chunked() {
    let mut noise = Noise::new(12);
    let case = Case::new(&mut noise, (8, 2, 64), 16, &[150]);
    let mut expected = None;
    for (way, mut backend) in every_way(&case.arithmetic) {
        case.fresh_cache(&mut backend);
        let whole = case.in_chunks(&mut backend, 0, 150).map(|out| bits(&out));
        for chunk in [1, 7, 16, 64, 149] {
            // What an earlier user left in the blocks must not matter.
            let chunked = case.in_chunks(&mut backend, 0, chunk).map(|out| bits(&out));
            assert_eq!(chunked, whole, "{way}, chunks of {chunk}");
        }
        if same_bits_expected(&way) {
            assert_eq!(expected.get_or_insert(whole.clone()), &whole, "{way}");
        }
    }
}

#[test]
fn a_sequence_has_the_same_bits_alone_and_among_others_even_if_they_are_not_numbers() {
    let mut noise = Noise::new(13);
    let mut case = Case::new(&mut noise, (8, 2, 64), 16, &[40, 90, 23]);
    case.sequences[2].v.fill(f32::NAN);
    for (way, mut backend) in every_way(&case.arithmetic) {
        case.fresh_cache(&mut backend);
        let alone = [0, 1].map(|index| case.in_chunks(&mut backend, index, 1000));
        case.fresh_cache(&mut backend);
        case.feed(&mut backend, &[(2, 0..23), (1, 0..50)]);
        let together = case.feed(&mut backend, &[(1, 50..90), (2, 0..23), (0, 0..40)]);
        let width = 8 * 64;
        for layer in 0..2 {
            assert_eq!(bits(&together[0][layer]), bits(&alone[1][layer][50 * width..]), "{way}");
            assert_eq!(bits(&together[2][layer]), bits(&alone[0][layer]), "{way}");
        }
    }
}

#[test]
fn stale_blocks_before_the_window_are_not_read() {
    let mut noise = Noise::new(14);
    let mut case = Case::new(&mut noise, (4, 2, 32), 16, &[80]);
    let mut backend = CpuBackend::new(case.arithmetic.clone(), 2).unwrap();
    case.fresh_cache(&mut backend);
    let expected = case.in_chunks(&mut backend, 0, 79)[0].clone();
    // The last query sees positions 56 to 79: blocks 3 and 4. The others may name anything.
    case.feed(&mut backend, &[(0, 0..79)]);
    case.sequences[0].table[..3].fill(BlockId(u32::MAX));
    let sequence = &case.sequences[0];
    let batch = Batch {
        tokens: vec![TokenId(0)],
        positions: vec![79],
        sequences: vec![BatchSequence {
            rows: 0..1,
            first_position: 79,
            full_table: Vec::new(),
            sliding_table: sequence.table.clone(),
        }],
    };
    let qkv = Qkv {
        q: backend.from_host(sequence.q[79 * 128..].to_vec(), 128).unwrap(),
        k: backend.from_host(sequence.k[79 * 64..].to_vec(), 64).unwrap(),
        v: backend.from_host(sequence.v[79 * 64..].to_vec(), 64).unwrap(),
    };
    let out = backend.attention(qkv, &AttentionSite { layer: 0, sinks: &case.sinks }, &batch).unwrap();
    assert_eq!(bits(&backend.to_host(&out).unwrap()), bits(&expected[79 * 128..]));
}

#[test]
fn batches_that_do_not_fit_the_cache_are_refused() {
    let mut noise = Noise::new(15);
    let mut case = Case::new(&mut noise, (4, 2, 32), 16, &[20]);
    let mut backend = CpuBackend::new(case.arithmetic.clone(), 1).unwrap();
    let attempt = |case: &Case, backend: &mut CpuBackend, layer: usize| {
        let sequence = &case.sequences[0];
        let batch = Batch {
            tokens: vec![TokenId(0); 20],
            positions: (0..20).collect(),
            sequences: vec![BatchSequence {
                rows: 0..20,
                first_position: 0,
                full_table: sequence.table.clone(),
                sliding_table: sequence.table.clone(),
            }],
        };
        let qkv = Qkv {
            q: backend.from_host(sequence.q.clone(), 128).unwrap(),
            k: backend.from_host(sequence.k.clone(), 64).unwrap(),
            v: backend.from_host(sequence.v.clone(), 64).unwrap(),
        };
        match backend.attention(qkv, &AttentionSite { layer, sinks: &case.sinks }, &batch) {
            Err(BackendError::Operation { operation: "attention", message }) => message,
            _ => panic!("expected a refusal"),
        }
    };
    assert!(attempt(&case, &mut backend, 0).contains("no KV cache"));
    case.fresh_cache(&mut backend);
    assert!(attempt(&case, &mut backend, 2).contains("layer 2"));
    case.sequences[0].table[1] = BlockId(9);
    assert!(attempt(&case, &mut backend, 1).contains("block 9 of a pool of 2"));
    case.sequences[0].table.pop();
    assert!(attempt(&case, &mut backend, 1).contains("lacks some of blocks 0..2"));
}
