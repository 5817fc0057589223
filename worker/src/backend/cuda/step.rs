//! What the attention kernels need to know of a step's batch, laid out in one upload.

use phalanx_proto::geometry::LayerKind;

use super::driver::Address;
use crate::backend::{Batch, BatchSequence};

/// A step's words on the device. Sequences with one row come first in everything that goes by sequence; they are
/// *decoding*, the others go through the prefill kernel.
#[derive(Clone, Debug, Default)]
pub(super) struct Step {
    /// Number of decoding sequences.
    pub(super) decoding: usize,
    /// Tiles of the prefill kernel.
    pub(super) tiles: usize,
    /// Tokens of the longest decoding sequence, that of this step included.
    pub(super) longest: usize,
    /// Entries of a sequence's block table.
    pub(super) table_stride: usize,
    positions: usize,
    slots: [usize; 2],
    rows: usize,
    lengths: usize,
    tables: [usize; 2],
    tile_list: usize,
    /// Everything, as uploaded.
    pub(super) words: Vec<u32>,
}

const KINDS: [LayerKind; 2] = [LayerKind::FullAttention, LayerKind::SlidingAttention];

fn pool(kind: LayerKind) -> usize {
    match kind {
        LayerKind::FullAttention => 0,
        LayerKind::SlidingAttention => 1,
    }
}

impl Step {
    /// A batch over blocks of `block_size` tokens, in tiles of at most `tile_positions` rows of one sequence.
    pub(super) fn new(batch: &Batch, block_size: usize, tile_positions: usize) -> Self {
        let (decoding, others): (Vec<_>, Vec<_>) = batch.sequences.iter().partition(|s| s.rows.len() == 1);
        let ordered = || decoding.iter().chain(&others).copied();
        let entries = |sequence: &BatchSequence| sequence.full_table.len().max(sequence.sliding_table.len());
        let length = |sequence: &&BatchSequence| (sequence.first_position + sequence.rows.len()) as u32;
        let mut step = Self {
            decoding: decoding.len(),
            longest: decoding.iter().map(|s| s.first_position + 1).max().unwrap_or_default(),
            table_stride: ordered().map(entries).max().unwrap_or_default(),
            ..Self::default()
        };
        step.positions = step.append(batch.positions.iter().copied());
        for kind in KINDS {
            step.slots[pool(kind)] = step.append(batch.sequences.iter().flat_map(|s| slots(s, kind, block_size)));
        }
        step.rows = step.append(decoding.iter().map(|s| s.rows.start as u32));
        step.lengths = step.append(decoding.iter().map(length));
        for kind in KINDS {
            let stride = step.table_stride;
            let table = |sequence: &BatchSequence| {
                let mut blocks: Vec<u32> = sequence.table(kind).iter().map(|block| block.0).collect();
                blocks.resize(stride, u32::MAX);
                blocks
            };
            step.tables[pool(kind)] = step.append(ordered().flat_map(table));
        }
        let mut tiles: Vec<_> =
            (decoding.len()..).zip(&others).flat_map(|(i, s)| tiles(i, s, tile_positions)).collect();
        // Those that see most come first, so that the last to end are short.
        tiles.sort_by_key(|tile| std::cmp::Reverse(tile[3]));
        step.tiles = tiles.len();
        step.tile_list = step.append(tiles.into_iter().flatten());
        step
    }

    /// Adds words at an offset that allows loads of 16 bytes, and answers it.
    fn append(&mut self, words: impl Iterator<Item = u32>) -> usize {
        self.words.resize(self.words.len().next_multiple_of(4), 0);
        let at = self.words.len();
        self.words.extend(words);
        at
    }

    /// Each row's position.
    pub(super) fn positions(&self, base: Address) -> Address {
        base.offset(4 * self.positions)
    }

    /// Each row's place in the KV cache of a kind of layers: block times block size plus offset.
    pub(super) fn slots(&self, base: Address, kind: LayerKind) -> Address {
        base.offset(4 * self.slots[pool(kind)])
    }

    /// Each decoding sequence's row.
    pub(super) fn rows(&self, base: Address) -> Address {
        base.offset(4 * self.rows)
    }

    /// Each decoding sequence's tokens in the cache, that of this step included.
    pub(super) fn lengths(&self, base: Address) -> Address {
        base.offset(4 * self.lengths)
    }

    /// `[sequences, table_stride]` block ids.
    pub(super) fn tables(&self, base: Address, kind: LayerKind) -> Address {
        base.offset(4 * self.tables[pool(kind)])
    }

    /// `[tiles, 4]`: sequence, first row, rows, first position.
    pub(super) fn tile_list(&self, base: Address) -> Address {
        base.offset(4 * self.tile_list)
    }
}

fn slots(sequence: &BatchSequence, kind: LayerKind, block_size: usize) -> impl Iterator<Item = u32> {
    let table = sequence.table(kind);
    let positions = sequence.first_position..sequence.first_position + sequence.rows.len();
    positions.map(move |position| table[position / block_size].0 * block_size as u32 + (position % block_size) as u32)
}

fn tiles(index: usize, sequence: &BatchSequence, positions: usize) -> impl Iterator<Item = [u32; 4]> {
    let (rows, first_position) = (sequence.rows.clone(), sequence.first_position);
    rows.clone().step_by(positions).map(move |row| {
        let count = (rows.end - row).min(positions);
        [index as u32, row as u32, count as u32, (first_position + row - rows.start) as u32]
    })
}
