//! The matrix kernel: activations times resident weights.
//!
//! Every sum is taken in one order, whatever the number of tokens, threads or the instruction set: within a block of 32
//! columns the even and the odd columns each form a chain of fused multiply-adds, the two are added, and the block's sum
//! times its scale is fused onto the row's sum, block after block. So results are the same bit for bit in every batch.
//!
//! Few tokens: weights are decoded in registers on their way from memory. Many: some blocks are decoded to the
//! first-level cache and then meet all tokens of the band.

use super::{
    blocks::{Block, Blocks, DECODED, Decoded, Panel},
    panels::{BLOCK, GROUPS, PANEL_ROWS, Panels},
    rows::{BAND_ROWS, Band, PackedRows},
    simd::{
        Kernel, LANES, Level, Simd, exp,
        pool::Pool,
        rectangles::{Cut, Rectangle, split},
    },
};

/// One row's sums with a panel.
type Sums = [[f32; LANES]; GROUPS];

/// What becomes of sums.
#[derive(Clone, Copy)]
pub(super) enum Outputs {
    /// Themselves.
    Sums,
    /// The first group's are gates, the second's ups.
    Swiglu {
        /// Clamp of both.
        limit: f32,
    },
}

impl Outputs {
    /// Outputs of a panel.
    fn columns(self) -> usize {
        match self {
            Self::Sums => PANEL_ROWS,
            Self::Swiglu { .. } => LANES,
        }
    }
}

/// A product about to be computed.
pub(super) struct Product<'a> {
    pub(super) panels: &'a Panels,
    /// Panels of each matrix.
    pub(super) panels_each: usize,
    /// Added to the sums: `[matrix, panel, group, lane]`.
    pub(super) bias: &'a [f32],
    pub(super) rows: &'a PackedRows,
    pub(super) outputs: Outputs,
}

impl Product<'_> {
    /// Computes `[rows, width]` in the order of the packed rows.
    pub(super) fn compute(&self, pool: &mut Pool, level: Level, out: &mut [f32], width: usize) {
        let cut = Cut { width, heights: &self.rows.heights(), columns: self.outputs.columns() };
        split(pool, out, &cut, |band, panel, out| {
            let band = &self.rows.bands[band];
            let panel = band.matrix * self.panels_each + panel;
            level.run(PanelTask { product: self, band, panel, out });
        });
    }
}

/// One panel of weights times one band of rows.
struct PanelTask<'a> {
    product: &'a Product<'a>,
    band: &'a Band,
    /// Counted through all matrices.
    panel: usize,
    out: Rectangle<'a, f32>,
}

impl Kernel for PanelTask<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        if self.band.tiles.len() >= S::DECODE_FROM_TILES {
            self.multiply_band(s);
            return;
        }
        match self.product.panels.panel(self.panel) {
            Panel::F32(blocks) => self.multiply_tiles(s, blocks),
            Panel::Bf16(blocks) => self.multiply_tiles(s, blocks),
            Panel::Mxfp4(blocks) => self.multiply_tiles(s, blocks),
        }
    }
}

impl PanelTask<'_> {
    /// Few tiles, for each of which weights are decoded in registers.
    #[inline(always)]
    fn multiply_tiles<S: Simd, B: Blocks>(&mut self, s: S, blocks: B) {
        let mut first = 0;
        for tile in self.band.tiles.clone() {
            let (rows, values) = self.product.rows.tile(tile);
            let mut sums = [[[0.0; LANES]; GROUPS]; MAX_TILE_ROWS];
            accumulate_tile(s, blocks, values, &mut sums[..rows]);
            self.finish(s, first, &sums[..rows]);
            first += rows;
        }
    }

    /// Many tiles, which share the work of decoding.
    #[inline(always)]
    fn multiply_band<S: Simd>(&mut self, s: S) {
        let mut sums = [[[0.0; LANES]; GROUPS]; BAND_ROWS];
        let mut decoded = Decoded::new();
        let panel = self.product.panels.panel(self.panel);
        for first in (0..self.product.panels.blocks).step_by(DECODED) {
            match panel {
                Panel::F32(blocks) => decoded.fill(s, blocks, first),
                Panel::Bf16(blocks) => decoded.fill(s, blocks, first),
                Panel::Mxfp4(blocks) => decoded.fill(s, blocks, first),
            }
            let columns = first * BLOCK..(first + (&decoded).len()) * BLOCK;
            let mut sums = &mut sums[..];
            for tile in self.band.tiles.clone() {
                let (rows, values) = self.product.rows.tile(tile);
                let (tile_sums, rest) = sums.split_at_mut(rows);
                accumulate_tile(s, &decoded, &values[columns.start * rows..columns.end * rows], tile_sums);
                sums = rest;
            }
        }
        self.finish(s, 0, &sums[..self.band.rows]);
    }

    #[inline(always)]
    fn finish<S: Simd>(&mut self, s: S, first: usize, sums: &[Sums]) {
        let (bias, _) = self.product.bias[self.panel * PANEL_ROWS..].as_chunks::<LANES>();
        for (row, sums) in sums.iter().enumerate() {
            let low = s.add(s.load(&sums[0]), s.load(&bias[0]));
            let high = s.add(s.load(&sums[1]), s.load(&bias[1]));
            let mut outputs = [[0.0; LANES]; GROUPS];
            match self.product.outputs {
                Outputs::Sums => {
                    s.store(low, &mut outputs[0]);
                    s.store(high, &mut outputs[1]);
                }
                Outputs::Swiglu { limit } => s.store(swiglu(s, low, high, limit), &mut outputs[0]),
            }
            // The last panel of a matrix may have fewer rows than lanes.
            let out = self.out.row(first + row);
            out.copy_from_slice(&outputs.as_flattened()[..out.len()]);
        }
    }
}

/// Slope of the sigmoid, from `gpt_oss/torch/model.py` of openai/gpt-oss.
const SWIGLU_ALPHA: f32 = 1.702;

/// `gate * sigmoid(1.702 gate) * (up + 1)` with the gate clamped from above and the up on both sides.
#[inline(always)]
fn swiglu<S: Simd>(s: S, gate: S::Float, up: S::Float, limit: f32) -> S::Float {
    // With the constant first, NaN passes through.
    let gate = s.min(s.splat(limit), gate);
    let up = s.max(s.splat(-limit), s.min(s.splat(limit), up));
    let one = s.splat(1.0);
    let divisor = s.add(one, exp(s, s.mul(gate, s.splat(-SWIGLU_ALPHA))));
    s.mul(s.div(gate, divisor), s.add(up, one))
}

/// Most rows of a tile, of all instruction sets.
const MAX_TILE_ROWS: usize = 6;

/// Adds the products of some blocks with a tile's `values`, `[column][row]`, to the sums of its rows.
#[inline(always)]
fn accumulate_tile<S: Simd, B: Blocks>(s: S, blocks: B, values: &[f32], sums: &mut [Sums]) {
    // The constant conditions keep sizes that an instruction set never has from being compiled for it.
    match sums.len() {
        1 => accumulate::<S, B, 1>(s, blocks, values, sums),
        2 if S::TILE_ROWS >= 2 => accumulate::<S, B, 2>(s, blocks, values, sums),
        3 if S::TILE_ROWS >= 3 => accumulate::<S, B, 3>(s, blocks, values, sums),
        4 if S::TILE_ROWS >= 4 => accumulate::<S, B, 4>(s, blocks, values, sums),
        5 if S::TILE_ROWS >= 5 => accumulate::<S, B, 5>(s, blocks, values, sums),
        _ if S::TILE_ROWS >= 6 => accumulate::<S, B, MAX_TILE_ROWS>(s, blocks, values, sums),
        rows => unreachable!("a tile of {rows} rows, of {} at most", S::TILE_ROWS),
    }
}

/// Per block: `ROWS * 64` multiply-adds of vectors, on chains that stay in registers.
#[inline(always)]
fn accumulate<S: Simd, B: Blocks, const ROWS: usize>(s: S, blocks: B, values: &[f32], sums: &mut [Sums]) {
    let (columns, _) = values.as_chunks::<ROWS>();
    let (values, _) = columns.as_chunks::<BLOCK>();
    let Some(sums) = sums.first_chunk_mut::<ROWS>() else { return };
    for (index, values) in values.iter().enumerate().take(blocks.len()) {
        let block = blocks.block(index);
        // Both groups at once, so that a value is broadcast once; one after the other where registers are few.
        if S::MANY_REGISTERS && ROWS > B::Block::GROUP_BY_GROUP_ROWS {
            accumulate_block::<S, _, ROWS, GROUPS>(s, (block, 0), values, sums);
        } else {
            for group in 0..GROUPS {
                accumulate_block::<S, _, ROWS, 1>(s, (block, group), values, sums);
            }
        }
    }
}

/// One block of `AT_ONCE` groups from the given one on.
#[inline(always)]
fn accumulate_block<S: Simd, B: Block, const ROWS: usize, const AT_ONCE: usize>(
    s: S,
    (block, first): (B, usize),
    values: &[[f32; ROWS]; BLOCK],
    sums: &mut [Sums; ROWS],
) {
    let mut chains = [[[s.splat(0.0); 2]; AT_ONCE]; ROWS];
    let (octets, _) = values.as_chunks::<8>();
    for (octet, x) in octets.iter().enumerate() {
        if first == 0 && (ROWS > 1 || B::PREFETCH_FOR_ONE_ROW) {
            block.prefetch(s, octet);
        }
        step::<S, B, 0, ROWS, AT_ONCE>(s, (block, octet, first), [&x[0], &x[1]], &mut chains);
        step::<S, B, 1, ROWS, AT_ONCE>(s, (block, octet, first), [&x[2], &x[3]], &mut chains);
        step::<S, B, 2, ROWS, AT_ONCE>(s, (block, octet, first), [&x[4], &x[5]], &mut chains);
        step::<S, B, 3, ROWS, AT_ONCE>(s, (block, octet, first), [&x[6], &x[7]], &mut chains);
    }
    for row in 0..ROWS {
        for at in 0..AT_ONCE {
            let block_sum = s.add(chains[row][at][0], chains[row][at][1]);
            let sum = &mut sums[row][first + at];
            s.store(s.fma(block_sum, block.scale(s, first + at), s.load(sum)), sum);
        }
    }
}

/// Two columns of all rows.
#[inline(always)]
fn step<S: Simd, B: Block, const PAIR: usize, const ROWS: usize, const AT_ONCE: usize>(
    s: S,
    (block, octet, first): (B, usize, usize),
    values: [&[f32; ROWS]; 2],
    chains: &mut [[[S::Float; 2]; AT_ONCE]; ROWS],
) {
    let mut weights = [[s.splat(0.0); 2]; AT_ONCE];
    for (at, weights) in weights.iter_mut().enumerate() {
        *weights = block.pair::<S, PAIR>(s, octet, first + at);
    }
    for row in 0..ROWS {
        for parity in 0..2 {
            let x = s.splat(values[parity][row]);
            for at in 0..AT_ONCE {
                chains[row][at][parity] = s.fma(weights[at][parity], x, chains[row][at][parity]);
            }
        }
    }
}
