//! Activations regrouped for the matrix kernel: tiles of a few rows, column by column.

use std::ops::Range;

use super::{
    panels::BLOCK,
    simd::{
        pool::Pool,
        rectangles::{Cut, SMALL, split, starts},
    },
};

/// Most rows of a band: their sums fit the first-level cache beside a few blocks of weights.
pub(super) const BAND_ROWS: usize = 96;

/// Rows that meet the same matrix.
#[derive(Clone, Debug)]
pub(super) struct Band {
    /// Which matrix of the panels.
    pub(super) matrix: usize,
    /// Their tiles.
    pub(super) tiles: Range<usize>,
    /// How many they are.
    pub(super) rows: usize,
}

/// Rows in tiles, `[tile][column][row of the tile]`, columns padded to whole blocks with zeros.
pub(super) struct PackedRows {
    values: Vec<f32>,
    /// Padded columns.
    columns: usize,
    /// Rows of each tile, and the first of them.
    tiles: Vec<(usize, usize)>,
    /// Bands in the order of their rows.
    pub(super) bands: Vec<Band>,
}

/// What is packed: `order` names rows of `values`, `matrices` says how many of them in turn meet which matrix.
pub(super) struct Selection<'a> {
    /// `[rows, width]`.
    pub(super) values: &'a [f32],
    /// Columns.
    pub(super) width: usize,
    /// A row of `values` for each row that is packed.
    pub(super) order: &'a [usize],
    /// Matrices and the number of their rows; they add up to the length of `order`.
    pub(super) matrices: &'a [(usize, usize)],
}

impl PackedRows {
    /// Packs rows into tiles of at most `tile_rows`, in the memory of `values`.
    pub(super) fn new(pool: &mut Pool, selection: &Selection<'_>, tile_rows: usize, mut values: Vec<f32>) -> Self {
        let (bands, heights) = bands(selection.matrices, tile_rows);
        let columns = selection.width.next_multiple_of(BLOCK);
        let tiles: Vec<_> = heights.iter().copied().zip(starts(&heights)).collect();
        values.resize(selection.order.len() * columns, 0.0);
        let cut = Cut { width: columns, heights: &heights, columns };
        let mut alone = Pool::alone();
        let pool = if values.len() < SMALL { &mut alone } else { pool };
        split(pool, &mut values, &cut, |tile, _, mut part| {
            let (rows, first) = tiles[tile];
            let packed = part.flat();
            for (lane, &row) in selection.order[first..first + rows].iter().enumerate() {
                let source = &selection.values[row * selection.width..(row + 1) * selection.width];
                interleave(packed, source, lane, rows);
            }
        });
        Self { values, columns, tiles, bands }
    }

    /// Rows of a tile and its values, `[column][row]`.
    pub(super) fn tile(&self, index: usize) -> (usize, &[f32]) {
        let (rows, first) = self.tiles[index];
        (rows, &self.values[first * self.columns..(first + rows) * self.columns])
    }

    /// Rows of each band.
    pub(super) fn heights(&self) -> Vec<usize> {
        self.bands.iter().map(|band| band.rows).collect()
    }

    /// Gives the memory back, to be used again.
    pub(super) fn into_values(self) -> Vec<f32> {
        self.values
    }
}

/// Writes a row to its lane of a tile, and zeros after its end.
fn interleave(packed: &mut [f32], source: &[f32], lane: usize, rows: usize) {
    let mut lanes = packed.iter_mut().skip(lane).step_by(rows);
    // The source first: the other order would swallow a lane as the source ends.
    for (from, to) in source.iter().zip(lanes.by_ref()) {
        *to = *from;
    }
    lanes.for_each(|to| *to = 0.0);
}

/// Bands, and the rows of each tile. Rows are spread evenly over as few bands and tiles as do.
fn bands(matrices: &[(usize, usize)], tile_rows: usize) -> (Vec<Band>, Vec<usize>) {
    let (mut bands, mut heights) = (Vec::new(), Vec::new());
    for &(matrix, rows) in matrices {
        for rows in evenly(rows, BAND_ROWS) {
            let first = heights.len();
            heights.extend(evenly(rows, tile_rows));
            bands.push(Band { matrix, tiles: first..heights.len(), rows });
        }
    }
    (bands, heights)
}

/// Parts of at most `most`, whose sizes differ by one at most.
fn evenly(total: usize, most: usize) -> impl Iterator<Item = usize> {
    let parts = total.div_ceil(most);
    (0..parts).map(move |part| total / parts + usize::from(part < total % parts))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_spread_evenly_and_none_is_lost() {
        for total in 0..300 {
            for most in 1..10 {
                let parts: Vec<_> = evenly(total, most).collect();
                assert_eq!(parts.iter().sum::<usize>(), total);
                assert!(parts.iter().all(|&part| part > 0 && part <= most));
            }
        }
    }

    #[test]
    fn tiles_hold_their_rows_column_by_column_with_zeros_after_the_end() {
        let values: Vec<f32> = (0..5 * 33).map(|i| i as f32).collect();
        let selection = Selection { values: &values, width: 33, order: &[4, 0, 2], matrices: &[(7, 2), (1, 1)] };
        // Memory that was used before must not show through.
        let packed = PackedRows::new(&mut Pool::alone(), &selection, 6, vec![9.0; 500]);
        let (rows, tile) = packed.tile(0);
        assert_eq!((rows, tile.len(), packed.bands[0].matrix), (2, 2 * 64, 7));
        for column in 0..64 {
            let expected = |row: usize| if column < 33 { (row * 33 + column) as f32 } else { 0.0 };
            assert_eq!(tile[column * 2..column * 2 + 2], [expected(4), expected(0)]);
        }
        assert_eq!(packed.tile(1).1[32], (2 * 33 + 32) as f32);
    }
}
