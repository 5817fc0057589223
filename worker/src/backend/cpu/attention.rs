//! Attention over the paged cache: tiles of 16 keys, online softmax, always in the order of positions.
//!
//! A row's operations depend on its position (and the block size) alone. How the prompt was chunked, which rows share
//! a task and what was found in the prefix cache change nothing, bit for bit.

use std::ops::Range;

use phalanx_proto::{geometry::LayerKind, ids::BlockId};

use super::{
    kv_cache::{KvCache, LayerView, first_visible},
    simd::{
        Kernel, LANES, Level, Simd, exp,
        pool::Pool,
        rectangles::{Cut, Rectangle, split},
        sum_lanes,
    },
};
use crate::backend::{Batch, BatchSequence};

/// Rows of a task, so that a tile of keys fetched from memory serves many queries.
const TASK_ROWS: usize = 64;
/// Tasks for each thread that suffice to keep all of them busy to the end.
const TASKS_PER_THREAD: usize = 2;
/// Rows that share the registers with a tile.
const REGISTER_ROWS: usize = 4;
/// Tiles that all rows of a task meet before the next ones come: 64 KiB of keys and values at 64 dimensions.
const SPAN: usize = 8;

/// Rotated and scaled queries of a batch, and whom they ask.
pub(super) struct Attention<'a> {
    pub(super) cache: &'a KvCache,
    pub(super) layer: usize,
    pub(super) kind: LayerKind,
    pub(super) window: usize,
    /// `[rows, heads * head_dim]`.
    pub(super) queries: &'a [f32],
    /// A logit for each query head.
    pub(super) sinks: &'a [f32],
}

impl Attention<'_> {
    /// Computes `[rows, heads * head_dim]`.
    pub(super) fn compute(&self, pool: &mut Pool, level: Level, batch: &Batch) -> Vec<f32> {
        let view = self.cache.view(self.layer);
        let heads = self.sinks.len();
        let group = heads / view.shape.kv_heads;
        let width = heads * view.shape.head_dim;
        let (tasks, task_heads) = self.tasks(batch, (group, view.shape.kv_heads), pool.threads());
        let heights: Vec<usize> = tasks.iter().map(|(_, rows)| rows.len()).collect();
        let mut out = vec![0.0; batch.tokens.len() * width];
        let cut = Cut { width, heights: &heights, columns: task_heads * view.shape.head_dim };
        split(pool, &mut out, &cut, |band, block, out| {
            let (sequence, rows) = &tasks[band];
            let heads = block * task_heads..(block + 1) * task_heads;
            level.run(Task { attention: self, view, sequence, rows: rows.clone(), heads, group, out });
        });
        out
    }

    /// Rows of each task, and how many heads it takes: those that share keys, fewer where threads would idle otherwise,
    /// and more where each sequence has one row, since the keys of a block's heads lie one after the other.
    fn tasks<'b>(
        &self,
        batch: &'b Batch,
        (group, kv_heads): (usize, usize),
        threads: usize,
    ) -> (Vec<(&'b BatchSequence, Range<usize>)>, usize) {
        let rows = (TASK_ROWS / group).max(1);
        let mut tasks = Vec::new();
        for sequence in &batch.sequences {
            let all = sequence.rows.clone();
            tasks.extend(all.clone().step_by(rows).map(|first| (sequence, first..(first + rows).min(all.end))));
        }
        let heads = self.sinks.len();
        let enough = |task_heads: &usize| tasks.len() * (heads / task_heads) >= TASKS_PER_THREAD * threads;
        let single = tasks.iter().all(|(_, rows)| rows.len() == 1);
        let most = if single { kv_heads } else { 1 };
        let several =
            (1..=most).rev().filter(|several| kv_heads.is_multiple_of(*several)).map(|several| several * group);
        let parts = (1..group).rev().filter(|part| group.is_multiple_of(*part));
        let task_heads = several.chain(parts).find(|heads| threads == 1 || enough(heads)).unwrap_or(1);
        (tasks, task_heads)
    }
}

/// Some rows and heads of one sequence.
struct Task<'a> {
    attention: &'a Attention<'a>,
    view: LayerView<'a>,
    sequence: &'a BatchSequence,
    rows: Range<usize>,
    heads: Range<usize>,
    /// Heads that share keys and values.
    group: usize,
    out: Rectangle<'a, f32>,
}

/// A query on its way through the keys.
struct Query<'a> {
    values: &'a [f32],
    /// Positions it sees.
    visible: Range<usize>,
    sink: f32,
    /// The greatest logit so far, the sink's included.
    most: f32,
    /// Sum of the weights, by lane; the sink's is added at the end.
    sums: [f32; LANES],
    /// Weighted sum of values.
    out: Vec<[f32; LANES]>,
}

impl Kernel for Task<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let mut queries = self.queries();
        let (Some(first), Some(last)) = (queries.first(), queries.last()) else { return };
        let heads = self.heads.len();
        let kv_heads = self.heads.start / self.group..(self.heads.end - 1) / self.group + 1;
        // A task with the heads of several keys has one row.
        let sharing = if kv_heads.len() > 1 { self.group } else { queries.len() };
        let shape = self.view.shape;
        let tiles = shape.tile_of(first.visible.start)..shape.tile_of(last.visible.end - 1) + 1;
        let table = self.sequence.table(self.attention.kind);
        // In the order in which several heads' tiles lie in memory.
        let step = if kv_heads.len() > 1 { 1 } else { SPAN };
        for start in tiles.clone().step_by(step) {
            let span = start..(start + step).min(tiles.end);
            for (kv_head, queries) in kv_heads.clone().zip(queries.chunks_mut(sharing)) {
                for (index, queries) in queries.chunks_mut(REGISTER_ROWS).enumerate() {
                    // The first queries of a span fetch the next tile for all.
                    let next = if index > 0 {
                        None
                    } else if kv_head + 1 < kv_heads.end {
                        Some((0, kv_head + 1))
                    } else {
                        Some((1, kv_heads.start))
                    };
                    self.meet_span(s, queries, (kv_head, next), span.clone(), table);
                }
            }
        }
        for (index, query) in queries.iter().enumerate() {
            let row = &mut self.out.row(index / heads)[index % heads * shape.head_dim..][..shape.head_dim];
            query.finish(row);
        }
    }
}

impl<'a> Task<'a> {
    /// One query a row and head, rows first.
    fn queries(&self) -> Vec<Query<'a>> {
        let (attention, shape) = (self.attention, self.view.shape);
        let width = attention.sinks.len() * shape.head_dim;
        let mut queries = Vec::with_capacity(self.rows.len() * self.heads.len());
        for row in self.rows.clone() {
            let position = self.sequence.first_position + row - self.sequence.rows.start;
            let visible = first_visible(position, attention.kind, attention.window)..position + 1;
            for head in self.heads.clone() {
                let sink = attention.sinks[head];
                queries.push(Query {
                    values: &attention.queries[row * width + head * shape.head_dim..][..shape.head_dim],
                    visible: visible.clone(),
                    sink,
                    most: sink,
                    sums: [0.0; LANES],
                    out: vec![[0.0; LANES]; shape.value_lines],
                });
            }
        }
        queries
    }

    /// Up to [`REGISTER_ROWS`] queries meet the tiles of a span that any of them sees. The tile that comes next is so many
    /// further on, of that head.
    #[inline(always)]
    fn meet_span<S: Simd>(
        &self,
        s: S,
        queries: &mut [Query<'_>],
        (kv_head, next): (usize, Option<(usize, usize)>),
        span: Range<usize>,
        table: &[BlockId],
    ) {
        let shape = self.view.shape;
        let (Some(first), Some(last)) = (queries.first(), queries.last()) else { return };
        let start = span.start.max(shape.tile_of(first.visible.start));
        let beyond = shape.tile_of(last.visible.end - 1) + 1;
        let end = span.end.min(beyond);
        for index in start..end {
            let positions = shape.positions(index);
            let (keys, values) = self.view.tile(table, index, kv_head);
            let next = match next {
                Some((further, head)) if index + further < beyond => self.view.tile(table, index + further, head),
                _ => (&[][..], &[][..]),
            };
            let lanes = |query: &Query<'_>| {
                let first = query.visible.start.max(positions.start);
                first - positions.start..query.visible.end.min(positions.end).max(first) - positions.start
            };
            let tile = |lanes| Tile { keys, values, next, lanes };
            let shared = lanes(&queries[0]);
            if queries.iter().all(|query| lanes(query) == shared) {
                meet_all(s, &tile(shared), queries);
            } else {
                for query in queries.chunks_mut(1) {
                    meet_all(s, &tile(lanes(&query[0])), query);
                }
            }
        }
    }
}

/// 16 positions' keys and values, and which of them are seen.
struct Tile<'a> {
    keys: &'a [[f32; LANES]],
    values: &'a [[f32; LANES]],
    /// Keys and values of the tile that comes next, to be prefetched; empty where another query has done so.
    next: (&'a [[f32; LANES]], &'a [[f32; LANES]]),
    lanes: Range<usize>,
}

/// Up to [`REGISTER_ROWS`] queries, which see the same lanes, meet a tile.
#[inline(always)]
fn meet_all<S: Simd>(s: S, tile: &Tile<'_>, queries: &mut [Query<'_>]) {
    if tile.lanes == (0..LANES) {
        // Compiled with the bounds as constants, which is twice as fast.
        meet_some(s, &Tile { lanes: 0..LANES, ..*tile }, queries);
    } else if !tile.lanes.is_empty() {
        meet_some(s, tile, queries);
    }
}

#[inline(always)]
fn meet_some<S: Simd>(s: S, tile: &Tile<'_>, queries: &mut [Query<'_>]) {
    match queries.len() {
        1 => meet::<S, 1>(s, tile, queries),
        2 => meet::<S, 2>(s, tile, queries),
        3 => meet::<S, 3>(s, tile, queries),
        _ => meet::<S, REGISTER_ROWS>(s, tile, queries),
    }
}

/// Some queries meet a tile.
#[inline(always)]
fn meet<S: Simd, const ROWS: usize>(s: S, tile: &Tile<'_>, queries: &mut [Query<'_>]) {
    let Some(queries) = queries.first_chunk_mut::<ROWS>() else { return };
    let mut chains = [[s.splat(0.0); 2]; ROWS];
    let (lines, _) = tile.keys.as_chunks::<2>();
    for (pair, lines) in lines.iter().enumerate() {
        // Tiles lie where their blocks do, so the hardware cannot guess the next one.
        for line in tile.next.0.iter().skip(2 * pair).take(2) {
            s.prefetch(line, 0);
        }
        let keys = [s.load(&lines[0]), s.load(&lines[1])];
        for row in 0..ROWS {
            let query = &queries[row].values[2 * pair..2 * pair + 2];
            chains[row][0] = s.fma(s.splat(query[0]), keys[0], chains[row][0]);
            chains[row][1] = s.fma(s.splat(query[1]), keys[1], chains[row][1]);
        }
    }
    let mut weights = [[0.0; LANES]; ROWS];
    for row in 0..ROWS {
        let logits = hide(s, s.add(chains[row][0], chains[row][1]), &tile.lanes);
        weigh(s, logits, &mut queries[row], &mut weights[row]);
    }
    // Lanes that are not seen are not read either: what stands there may be another sequence's, or not a number.
    let lines = tile.values.len() / LANES;
    for line in 0..lines {
        let mut sums = [s.splat(0.0); ROWS];
        for row in 0..ROWS {
            sums[row] = s.load(&queries[row].out[line]);
        }
        for lane in tile.lanes.clone() {
            if let Some(line) = tile.next.1.get(lane * lines + line) {
                s.prefetch(line, 0);
            }
            let value = s.load(&tile.values[lane * lines + line]);
            for row in 0..ROWS {
                sums[row] = s.fma(s.splat(weights[row][lane]), value, sums[row]);
            }
        }
        for row in 0..ROWS {
            s.store(sums[row], &mut queries[row].out[line]);
        }
    }
}

/// Minus infinity in the lanes that are not seen.
#[inline(always)]
fn hide<S: Simd>(s: S, logits: S::Float, seen: &Range<usize>) -> S::Float {
    if *seen == (0..LANES) {
        return logits;
    }
    let mut lanes = [0.0; LANES];
    s.store(logits, &mut lanes);
    lanes[..seen.start].fill(f32::NEG_INFINITY);
    lanes[seen.end..].fill(f32::NEG_INFINITY);
    s.load(&lanes)
}

/// Weights of a tile's logits relative to the greatest one so far; what came before shrinks when a greater one comes.
#[inline(always)]
fn weigh<S: Simd>(s: S, logits: S::Float, query: &mut Query<'_>, weights: &mut [f32; LANES]) {
    let most = s.max_lane(logits);
    if most > query.most {
        let shrink = exp(s, s.splat(query.most - most));
        query.most = most;
        s.store(s.mul(s.load(&query.sums), shrink), &mut query.sums);
        for line in &mut query.out {
            s.store(s.mul(s.load(line), shrink), line);
        }
    }
    let tile_weights = exp(s, s.sub(logits, s.splat(query.most)));
    s.store(tile_weights, weights);
    s.store(s.add(s.load(&query.sums), tile_weights), &mut query.sums);
}

impl Query<'_> {
    /// The weighted mean.
    fn finish(&self, out: &mut [f32]) {
        // The sink takes part in the sum but carries no value.
        let sum = sum_lanes(self.sums) + (self.sink - self.most).exp();
        for (out, value) in out.iter_mut().zip(self.out.iter().flatten()) {
            *out = value / sum;
        }
    }
}
