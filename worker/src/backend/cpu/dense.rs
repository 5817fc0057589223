//! Products with bf16 and f32 weights.
//!
//! Within a block the even and the odd columns each form a chain of fused multiply-adds; the two are added, and their sum is
//! added to the row's.
//!
//! Few tokens: weights are decoded in registers on their way from memory. Many: some blocks are decoded to the
//! first-level cache and then meet all tokens of the band.

use super::{
    blocks::{Block, Blocks, DECODED, Decoded, Panel},
    panels::{BLOCK, Dense, GROUPS, Panels},
    product::{ForRows, PanelTask, Sums, Weights, for_rows},
    rows::BAND_ROWS,
    simd::{LANES, Simd},
};

impl Weights for Dense {
    type Element = f32;

    #[inline(always)]
    fn accumulate<S: Simd>(s: S, panels: &Panels<Self>, panel: usize, tile: &[f32], sums: &mut [Sums]) {
        match panels.panel(panel) {
            Panel::F32(blocks) => for_rows(s, sums.len(), Tile { blocks, values: tile, sums }),
            Panel::Bf16(blocks) => for_rows(s, sums.len(), Tile { blocks, values: tile, sums }),
        }
    }

    #[inline(always)]
    fn multiply<S: Simd>(s: S, task: &mut PanelTask<'_, Self>) {
        if task.band.tiles.len() >= S::DECODE_FROM_TILES {
            multiply_band(s, task);
        } else {
            task.multiply_tiles(s);
        }
    }
}

/// Many tiles, which share the work of decoding.
#[inline(always)]
fn multiply_band<S: Simd>(s: S, task: &mut PanelTask<'_, Dense>) {
    let mut sums = [[[0.0; LANES]; GROUPS]; BAND_ROWS];
    let mut decoded = Decoded::new();
    let panel = task.product.panels.panel(task.panel);
    for first in (0..task.product.panels.blocks).step_by(DECODED) {
        match panel {
            Panel::F32(blocks) => decoded.fill(s, blocks, first),
            Panel::Bf16(blocks) => decoded.fill(s, blocks, first),
        }
        let columns = first * BLOCK..(first + (&decoded).len()) * BLOCK;
        let mut sums = &mut sums[..];
        for tile in task.band.tiles.clone() {
            let (rows, values) = task.product.rows.tile(tile);
            let (sums_of_tile, rest) = sums.split_at_mut(rows);
            let values = &values[columns.start * rows..columns.end * rows];
            for_rows(s, rows, Tile { blocks: &decoded, values, sums: sums_of_tile });
            sums = rest;
        }
    }
    task.finish(s, 0, &sums[..task.band.rows]);
}

/// Some blocks of a panel, the values of a tile in their columns, `[column][row]`, and the sums of its rows.
struct Tile<'a, B> {
    blocks: B,
    values: &'a [f32],
    sums: &'a mut [Sums],
}

impl<B: Blocks> ForRows for Tile<'_, B> {
    /// Per block: `ROWS * 64` multiply-adds of vectors, on chains that stay in registers.
    #[inline(always)]
    fn run<S: Simd, const ROWS: usize>(self, s: S) {
        let (columns, _) = self.values.as_chunks::<ROWS>();
        let (values, _) = columns.as_chunks::<BLOCK>();
        let Some(sums) = self.sums.first_chunk_mut::<ROWS>() else { return };
        for (index, values) in values.iter().enumerate().take(self.blocks.len()) {
            let block = self.blocks.block(index);
            // Both groups at once, so that a value is broadcast once; one after the other where registers are few.
            if S::MANY_REGISTERS {
                accumulate_block::<S, _, ROWS, GROUPS>(s, (block, 0), values, sums);
            } else {
                for group in 0..GROUPS {
                    accumulate_block::<S, _, ROWS, 1>(s, (block, group), values, sums);
                }
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
        // With a single row weights stream faster than hints can lead: they would only take the line buffers from the
        // hardware's own prefetcher.
        if first == 0 && ROWS > 1 {
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
            s.store(s.add(block_sum, s.load(sum)), sum);
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
