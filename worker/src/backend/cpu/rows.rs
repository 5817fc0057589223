//! Activations regrouped for the matrix kernel: tiles of a few rows, element by element.

use std::ops::Range;

use super::simd::{
    pool::Pool,
    rectangles::{Cut, SMALL, split, starts},
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

/// Rows in tiles, `[tile][element][row of the tile]`. An element is a column, or a block of them in whatever form.
pub(super) struct PackedRows<T> {
    elements: Vec<T>,
    /// Elements of a row, with the padding.
    width: usize,
    /// Rows of each tile, and the first of them.
    tiles: Vec<(usize, usize)>,
    /// Bands in the order of their rows.
    pub(super) bands: Vec<Band>,
}

/// What is packed: `order` names rows of `elements`, `matrices` says how many of them in turn meet which matrix.
pub(super) struct Selection<'a, T> {
    /// `[rows, width]`.
    pub(super) elements: &'a [T],
    /// Elements of a row.
    pub(super) width: usize,
    /// The number of elements of which rows become multiples, with zeros.
    pub(super) padded_to: usize,
    /// A row of `elements` for each row that is packed.
    pub(super) order: &'a [usize],
    /// Matrices and the number of their rows; they add up to the length of `order`.
    pub(super) matrices: &'a [(usize, usize)],
}

impl<T: Copy + Default + Send + Sync> PackedRows<T> {
    /// Packs rows into tiles of at most `tile_rows`, in the memory of `elements`.
    pub(super) fn new(pool: &mut Pool, selection: &Selection<'_, T>, tile_rows: usize, mut elements: Vec<T>) -> Self {
        let (bands, heights) = bands(selection.matrices, tile_rows);
        let width = selection.width.next_multiple_of(selection.padded_to);
        let tiles: Vec<_> = heights.iter().copied().zip(starts(&heights)).collect();
        elements.resize(selection.order.len() * width, T::default());
        let cut = Cut { width, heights: &heights, columns: width };
        let mut alone = Pool::alone();
        let pool = if size_of_val(&elements[..]) < SMALL { &mut alone } else { pool };
        split(pool, &mut elements, &cut, |tile, _, mut part| {
            let (rows, first) = tiles[tile];
            let packed = part.flat();
            for (lane, &row) in selection.order[first..first + rows].iter().enumerate() {
                let source = &selection.elements[row * selection.width..(row + 1) * selection.width];
                interleave(packed, source, lane, rows);
            }
        });
        Self { elements, width, tiles, bands }
    }

    /// Rows of a tile and its elements, `[element][row]`.
    pub(super) fn tile(&self, index: usize) -> (usize, &[T]) {
        let (rows, first) = self.tiles[index];
        (rows, &self.elements[first * self.width..(first + rows) * self.width])
    }

    /// Rows of each band.
    pub(super) fn heights(&self) -> Vec<usize> {
        self.bands.iter().map(|band| band.rows).collect()
    }

    /// Gives the memory back, to be used again.
    pub(super) fn into_elements(self) -> Vec<T> {
        self.elements
    }
}

/// Writes a row to its lane of a tile, and zeros after its end.
fn interleave<T: Copy + Default>(packed: &mut [T], source: &[T], lane: usize, rows: usize) {
    let mut lanes = packed.iter_mut().skip(lane).step_by(rows);
    // The source first: the other order would swallow a lane as the source ends.
    for (from, to) in source.iter().zip(lanes.by_ref()) {
        *to = *from;
    }
    lanes.for_each(|to| *to = T::default());
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
        let (order, matrices) = (&[4, 0, 2], &[(7, 2), (1, 1)]);
        let selection = Selection { elements: &values, width: 33, padded_to: 32, order, matrices };
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
