//! Resident weights: panels of 32 rows, interleaved so that one vector holds one column of 16 rows.
//!
//! A kernel reads a panel from its first byte to its last and never looks across lanes: each lane is one output.
//! Rows are padded to whole panels and columns to whole blocks of 32, with zeros.

use phalanx_proto::geometry::MXFP4_BLOCK;

use super::{
    blocks::{Mxfp4Blocks, Panel},
    simd::{
        LANES,
        memory::Slab,
        pool::Pool,
        rectangles::{Cut, split},
    },
};
use crate::backend::{BackendError, DenseData, DenseMatrix};

/// Vectors side by side in a panel.
pub(super) const GROUPS: usize = 2;
/// Rows of a panel.
pub(super) const PANEL_ROWS: usize = GROUPS * LANES;
/// Columns of a block: as many as share an MXFP4 scale. Sums are taken block by block for every kind of weight.
pub(super) const BLOCK: usize = MXFP4_BLOCK;

/// A block of a panel in f32: `[column][group]`.
pub(super) type F32Block = [[f32; LANES]; BLOCK * GROUPS];
/// A block of a panel in bf16: `[pair of columns][group]`, the even column in the low half of each word.
pub(super) type Bf16Block = [[u32; LANES]; BLOCK / 2 * GROUPS];
/// The codes of a block of a panel: `[eight columns][group]`, the first column in the lowest nibble of each word.
pub(super) type CodeBlock = [[u32; LANES]; BLOCK / 8 * GROUPS];
/// The E8M0 scales of a block of a panel.
pub(super) type ScaleBlock = [[u8; LANES]; GROUPS];

/// One or more matrices of the same shape, panel after panel.
pub(super) struct Panels {
    /// Columns before padding.
    pub(super) columns: usize,
    /// Blocks along the columns.
    pub(super) blocks: usize,
    /// The weights, `[panel][block]`.
    pub(super) weights: Weights,
}

/// Weights as they lie in memory.
pub(super) enum Weights {
    F32(Slab<[f32; LANES]>),
    Bf16(Slab<[u32; LANES]>),
    Mxfp4 { codes: Slab<[u32; LANES]>, scales: Slab<ScaleBlock> },
}

/// MXFP4 matrices as in the checkpoint, that become panels.
pub(super) struct Mxfp4Source<'a> {
    /// What it is, for errors.
    pub(super) what: &'a str,
    /// Matrices, one after the other.
    pub(super) matrices: usize,
    /// Rows of each, a multiple of the panel's.
    pub(super) rows: usize,
    /// Columns, a multiple of the block.
    pub(super) columns: usize,
    /// `[matrix, row, block, 16]`.
    pub(super) blocks: &'a [u8],
    /// `[matrix, row, block]`.
    pub(super) scales: &'a [u8],
    /// The checkpoint's row for each lane of a panel: first of the panel, then of the lane within it.
    pub(super) row_of_lane: fn(panel: usize, lane: usize) -> usize,
}

/// Rows in their own order.
pub(super) fn straight(panel: usize, lane: usize) -> usize {
    panel * PANEL_ROWS + lane
}

/// The gates of a panel's 16 outputs in its first group, their ups in the second; the checkpoint alternates them.
pub(super) fn gates_then_ups(panel: usize, lane: usize) -> usize {
    panel * PANEL_ROWS + lane % LANES * 2 + lane / LANES
}

impl Panels {
    /// Makes a dense matrix resident.
    pub(super) fn dense(pool: &mut Pool, matrix: &DenseMatrix) -> Result<Self, BackendError> {
        let (rows, columns) = (matrix.rows, matrix.columns);
        let (panels, blocks) = (rows.div_ceil(PANEL_ROWS), columns.div_ceil(BLOCK));
        let what = format!("a matrix of {rows} by {columns}");
        let values = match &matrix.data {
            DenseData::Bf16(values) => values.len(),
            DenseData::F32(values) => values.len(),
        };
        check_length(&what, "values", values, rows * columns)?;
        let weights = match &matrix.data {
            DenseData::Bf16(values) => {
                let mut slab =
                    Slab::zeroed(&what, panels * blocks * size_of::<Bf16Block>() / size_of::<[u32; LANES]>())?;
                pack(pool, &mut slab, panels, (rows, columns), |lines: &mut [[u32; LANES]], row, lane| {
                    let values = &values[row * columns..(row + 1) * columns];
                    for (pair, values) in values.chunks(2).enumerate() {
                        let high = values.get(1).map_or(0, |value| u32::from(value.to_bits()));
                        let line = &mut lines[pair * GROUPS + lane / LANES];
                        line[lane % LANES] = high << 16 | u32::from(values[0].to_bits());
                    }
                });
                Weights::Bf16(slab)
            }
            DenseData::F32(values) => {
                let mut slab =
                    Slab::zeroed(&what, panels * blocks * size_of::<F32Block>() / size_of::<[f32; LANES]>())?;
                pack(pool, &mut slab, panels, (rows, columns), |lines: &mut [[f32; LANES]], row, lane| {
                    for (column, value) in values[row * columns..(row + 1) * columns].iter().enumerate() {
                        lines[column * GROUPS + lane / LANES][lane % LANES] = *value;
                    }
                });
                Weights::F32(slab)
            }
        };
        Ok(Self { columns, blocks, weights })
    }

    /// Makes MXFP4 matrices resident.
    pub(super) fn mxfp4(pool: &mut Pool, source: &Mxfp4Source<'_>) -> Result<Self, BackendError> {
        let blocks = source.columns / BLOCK;
        let rows = source.matrices * source.rows;
        if source.rows % PANEL_ROWS != 0 || source.columns % BLOCK != 0 {
            return Err(BackendError::Unsupported(format!(
                "{}: {} rows by {} columns, expected multiples of {PANEL_ROWS} and {BLOCK}",
                source.what, source.rows, source.columns
            )));
        }
        check_length(source.what, "bytes of FP4", source.blocks.len(), rows * blocks * BLOCK / 2)?;
        check_length(source.what, "scales", source.scales.len(), rows * blocks)?;
        let panels = rows / PANEL_ROWS;
        let mut codes =
            Slab::zeroed(source.what, panels * blocks * size_of::<CodeBlock>() / size_of::<[u32; LANES]>())?;
        let panels_each = source.rows / PANEL_ROWS;
        let first_row = |panel: usize, lane: usize| {
            panel / panels_each * source.rows + (source.row_of_lane)(panel % panels_each, lane)
        };
        pack(pool, &mut codes, panels, (rows, source.columns), |lines: &mut [[u32; LANES]], slot, lane| {
            let row = first_row(slot / PANEL_ROWS, lane);
            let row_bytes = blocks * BLOCK / 2;
            let (words, _) = source.blocks[row * row_bytes..(row + 1) * row_bytes].as_chunks::<4>();
            for (word, bytes) in words.iter().enumerate() {
                lines[word * GROUPS + lane / LANES][lane % LANES] = u32::from_le_bytes(*bytes);
            }
        });
        let mut scales = Slab::zeroed(source.what, panels * blocks)?;
        pack(pool, &mut scales, panels, (rows, source.columns), |lines: &mut [ScaleBlock], slot, lane| {
            let row = first_row(slot / PANEL_ROWS, lane);
            for (line, scale) in lines.iter_mut().zip(&source.scales[row * blocks..(row + 1) * blocks]) {
                line[lane / LANES][lane % LANES] = *scale;
            }
        });
        Ok(Self { columns: source.columns, blocks, weights: Weights::Mxfp4 { codes, scales } })
    }

    /// One panel, counted through all matrices.
    #[inline(always)]
    pub(super) fn panel(&self, index: usize) -> Panel<'_> {
        let blocks = index * self.blocks..(index + 1) * self.blocks;
        match &self.weights {
            Weights::F32(lines) => Panel::F32(&lines.as_chunks().0[blocks]),
            Weights::Bf16(lines) => Panel::Bf16(&lines.as_chunks().0[blocks]),
            Weights::Mxfp4 { codes, scales } => {
                Panel::Mxfp4(Mxfp4Blocks { codes: &codes.as_chunks().0[blocks.clone()], scales: &scales[blocks] })
            }
        }
    }

    /// Bytes in memory.
    pub(super) fn bytes(&self) -> usize {
        match &self.weights {
            Weights::F32(slab) => slab.bytes(),
            Weights::Bf16(slab) => slab.bytes(),
            Weights::Mxfp4 { codes, scales } => codes.bytes() + scales.bytes(),
        }
    }
}

/// Fills each panel of a slab: calls `fill(panel's lines, row, lane)` for all of its rows that exist.
fn pack<T: Send>(
    pool: &mut Pool,
    lines: &mut [T],
    panels: usize,
    (rows, columns): (usize, usize),
    fill: impl Fn(&mut [T], usize, usize) + Sync,
) {
    if rows == 0 || columns == 0 {
        return;
    }
    let panel_lines = lines.len() / panels;
    let cut = Cut { width: panel_lines, heights: &vec![1; panels], columns: panel_lines };
    split(pool, lines, &cut, |panel, _, mut part| {
        let first = panel * PANEL_ROWS;
        for row in first..(first + PANEL_ROWS).min(rows) {
            fill(part.flat(), row, row - first);
        }
    });
}

fn check_length(what: &str, of: &str, found: usize, expected: usize) -> Result<(), BackendError> {
    if found == expected {
        return Ok(());
    }
    Err(BackendError::Operation {
        operation: "load weights",
        message: format!("{what} has {found} {of}, expected {expected}"),
    })
}
