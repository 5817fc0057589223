//! Resident weights: panels of 32 rows, interleaved so that one vector holds one column of 16 rows.
//!
//! A kernel reads a panel from its first byte to its last and never looks across lanes: each lane is one output.
//! Rows are padded to whole panels and columns to whole blocks of 32, with zeros.

use std::borrow::Cow;

use half::bf16;
use phalanx_proto::geometry::MXFP4_BLOCK;

use super::{
    blocks::Panel,
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

/// Lines of a block in f32: `[column][group]`.
const LINES_F32: usize = BLOCK * GROUPS;
/// Lines of a block in bf16: `[pair of columns][group]`, the even column in the low half of each word.
const LINES_BF16: usize = BLOCK / 2 * GROUPS;
/// Lines of a block's codes: `[eight columns][group]`, the first column in the lowest nibble of each word.
const LINES_CODES: usize = BLOCK / 8 * GROUPS;

/// A block of a panel in f32.
pub(super) type F32Block = [[f32; LANES]; LINES_F32];
/// A block of a panel in bf16.
pub(super) type Bf16Block = [[u32; LANES]; LINES_BF16];
/// The FP4 codes of a block of a panel.
pub(super) type CodeBlock = [[u32; LANES]; LINES_CODES];
/// The E8M0 scales of a block of a panel.
pub(super) type ScaleBlock = [[u8; LANES]; GROUPS];

/// One or more matrices of the same shape, panel after panel.
pub(super) struct Panels<W> {
    /// Columns before padding.
    pub(super) columns: usize,
    /// Blocks along the columns.
    pub(super) blocks: usize,
    /// The weights, `[panel][block]`.
    weights: W,
}

/// Dense weights as they lie in memory.
pub(super) enum Dense {
    F32(Slab<[f32; LANES]>),
    Bf16(Slab<[u32; LANES]>),
}

/// MXFP4 weights as they lie in memory.
pub(super) struct Mxfp4 {
    codes: Slab<[u32; LANES]>,
    scales: Slab<[u8; LANES]>,
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

impl Panels<Dense> {
    /// Makes a matrix resident.
    pub(super) fn new(pool: &mut Pool, matrix: &DenseMatrix) -> Result<Self, BackendError> {
        let (rows, columns) = (matrix.rows, matrix.columns);
        let what = format!("a matrix of {rows} by {columns}");
        let (panels, blocks) = (rows.div_ceil(PANEL_ROWS), columns.div_ceil(BLOCK));
        let row_of_lane = |panel, lane| Some(straight(panel, lane)).filter(|row| *row < rows);
        let weights = match &matrix.data {
            DenseData::Bf16(values) => {
                check_length(&what, "values", values.len(), rows * columns)?;
                let padded = if columns.is_multiple_of(2) {
                    Cow::Borrowed(values)
                } else {
                    Cow::Owned(pad_rows(values, columns))
                };
                let (pairs, _) = padded.as_chunks::<2>();
                let mut slab = Slab::zeroed(&what, panels * blocks * LINES_BF16)?;
                let source = Rows { panels, each: columns.div_ceil(2), row_of_lane };
                let word = |[even, odd]: &[bf16; 2]| u32::from(even.to_bits()) | u32::from(odd.to_bits()) << 16;
                source.pack(pool, &mut slab, pairs, word);
                Dense::Bf16(slab)
            }
            DenseData::F32(values) => {
                check_length(&what, "values", values.len(), rows * columns)?;
                let mut slab = Slab::zeroed(&what, panels * blocks * LINES_F32)?;
                Rows { panels, each: columns, row_of_lane }.pack(pool, &mut slab, values, |value| *value);
                Dense::F32(slab)
            }
        };
        Ok(Self { columns, blocks, weights })
    }

    /// One panel.
    #[inline(always)]
    pub(super) fn panel(&self, index: usize) -> Panel<'_> {
        let blocks = index * self.blocks..(index + 1) * self.blocks;
        match &self.weights {
            Dense::F32(lines) => Panel::F32(&lines.as_chunks().0[blocks]),
            Dense::Bf16(lines) => Panel::Bf16(&lines.as_chunks().0[blocks]),
        }
    }

    /// Bytes in memory.
    pub(super) fn bytes(&self) -> usize {
        match &self.weights {
            Dense::F32(slab) => slab.bytes(),
            Dense::Bf16(slab) => slab.bytes(),
        }
    }
}

impl Panels<Mxfp4> {
    /// Makes matrices resident.
    pub(super) fn new(pool: &mut Pool, source: &Mxfp4Source<'_>) -> Result<Self, BackendError> {
        let (blocks, rows) = (source.columns / BLOCK, source.matrices * source.rows);
        if !source.rows.is_multiple_of(PANEL_ROWS) || !source.columns.is_multiple_of(BLOCK) {
            return Err(BackendError::Unsupported(format!(
                "{}: {} rows by {} columns, expected multiples of {PANEL_ROWS} and {BLOCK}",
                source.what, source.rows, source.columns
            )));
        }
        check_length(source.what, "bytes of FP4", source.blocks.len(), rows * blocks * BLOCK / 2)?;
        check_length(source.what, "scales", source.scales.len(), rows * blocks)?;
        let (panels, panels_each) = (rows / PANEL_ROWS, source.rows / PANEL_ROWS);
        let row_of_lane = |panel: usize, lane: usize| {
            Some(panel / panels_each * source.rows + (source.row_of_lane)(panel % panels_each, lane))
        };
        let mut codes = Slab::zeroed(source.what, panels * blocks * LINES_CODES)?;
        let (words, _) = source.blocks.as_chunks::<4>();
        let each = source.columns / 8;
        Rows { panels, each, row_of_lane }.pack(pool, &mut codes, words, |word| u32::from_le_bytes(*word));
        let mut scales = Slab::zeroed(source.what, panels * blocks * GROUPS)?;
        Rows { panels, each: blocks, row_of_lane }.pack(pool, &mut scales, source.scales, |scale| *scale);
        Ok(Self { columns: source.columns, blocks, weights: Mxfp4 { codes, scales } })
    }

    /// Codes and scales of one panel, counted through all matrices.
    #[inline(always)]
    pub(super) fn panel(&self, index: usize) -> (&[CodeBlock], &[ScaleBlock]) {
        let blocks = index * self.blocks..(index + 1) * self.blocks;
        (&self.weights.codes.as_chunks().0[blocks.clone()], &self.weights.scales.as_chunks().0[blocks])
    }

    /// Bytes in memory.
    pub(super) fn bytes(&self) -> usize {
        self.weights.codes.bytes() + self.weights.scales.bytes()
    }
}

/// Where the rows of panels come from.
struct Rows<F> {
    panels: usize,
    /// Elements of a row.
    each: usize,
    /// The source's row of a panel's lane, if there is one.
    row_of_lane: F,
}

impl<F: Fn(usize, usize) -> Option<usize> + Sync> Rows<F> {
    /// Interleaves the rows of `source`, `[row, element]`, into panels: `[panel][element][group][lane]`.
    fn pack<E: Sync, V: Send + Default>(
        &self,
        pool: &mut Pool,
        lines: &mut [[V; LANES]],
        source: &[E],
        value: impl Fn(&E) -> V + Sync,
    ) {
        let panel_lines = lines.len() / self.panels.max(1);
        if panel_lines == 0 {
            return;
        }
        let cut = Cut { width: panel_lines, heights: &vec![1; self.panels], columns: panel_lines };
        split(pool, lines, &cut, |panel, _, mut part| {
            let row = |row: usize| &source[row * self.each..(row + 1) * self.each];
            let rows: [&[E]; PANEL_ROWS] =
                std::array::from_fn(|lane| (self.row_of_lane)(panel, lane).map(row).unwrap_or_default());
            // Lines are written whole, one after the other; the 32 rows are read side by side. The other way round is
            // four times slower.
            let (elements, _) = part.flat().as_chunks_mut::<GROUPS>();
            for (at, lines) in elements.iter_mut().enumerate().take(self.each) {
                for (lane, row) in rows.iter().enumerate() {
                    lines[lane / LANES][lane % LANES] = row.get(at).map_or_else(V::default, &value);
                }
            }
        });
    }
}

/// The rows with a zero after each.
fn pad_rows(values: &[bf16], columns: usize) -> Vec<bf16> {
    values.chunks(columns).flat_map(|row| row.iter().copied().chain([bf16::ZERO])).collect()
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
