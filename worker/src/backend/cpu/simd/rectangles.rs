//! A matrix that many threads write at once, each its own rectangle.

use std::{marker::PhantomData, ops::Range};

use super::pool::Pool;

/// Rows by columns of a matrix that no other task has.
pub(crate) struct Rectangle<'a, T> {
    start: *mut T,
    rows: usize,
    columns: usize,
    /// From one row to the next.
    width: usize,
    matrix: PhantomData<&'a mut [T]>,
}

impl<T> Rectangle<'_, T> {
    /// Number of rows.
    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    /// One row's part within the rectangle.
    pub(crate) fn row(&mut self, row: usize) -> &mut [T] {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        let start = self.start.wrapping_add(row * self.width);
        // SAFETY: the row lies within the matrix, the rectangle is the only access to it, and `&mut self` to the rectangle.
        unsafe { std::slice::from_raw_parts_mut(start, self.columns) }
    }

    /// All values, of a rectangle as wide as its matrix.
    pub(crate) fn flat(&mut self) -> &mut [T] {
        assert!(self.columns == self.width, "{} of {} columns", self.columns, self.width);
        // SAFETY: whole rows follow each other within the matrix, and `&mut self` is the only access to them.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.rows * self.columns) }
    }
}

/// A pointer that tasks may share, since each makes another rectangle of it.
struct Start<T>(*mut T);

// SAFETY: only `split` uses it, which gives each task a part of its own.
unsafe impl<T: Send> Sync for Start<T> {}

/// How a matrix is cut into rectangles.
pub(crate) struct Cut<'a> {
    /// Columns of the matrix.
    pub(crate) width: usize,
    /// Rows of each band; together at most the matrix's.
    pub(crate) heights: &'a [usize],
    /// Columns of each block; the last one may be narrower.
    pub(crate) columns: usize,
}

/// Values below which waking another thread costs more than it saves.
pub(crate) const SMALL: usize = 1 << 14;

/// Bands of whole rows for work that is proportional to the values, none of them too small to be worth a thread.
pub(crate) fn row_bands(rows: usize, width: usize) -> Vec<usize> {
    let height = SMALL.div_ceil(width.max(1));
    (0..rows).step_by(height).map(|first| height.min(rows - first)).collect()
}

/// Where each of consecutive bands begins.
pub(crate) fn starts(heights: &[usize]) -> Vec<usize> {
    heights.iter().scan(0, |next, height| Some(std::mem::replace(next, *next + height))).collect()
}

/// Calls `task(band, block, rectangle)` for each band of rows and block of columns, on all threads of the pool.
pub(crate) fn split<T: Send>(
    pool: &mut Pool,
    matrix: &mut [T],
    cut: &Cut<'_>,
    task: impl Fn(usize, usize, Rectangle<'_, T>) + Sync,
) {
    let starts = starts(cut.heights);
    let rows: usize = cut.heights.iter().sum();
    assert!(cut.columns > 0 && rows * cut.width <= matrix.len(), "{rows} rows of {} in {}", cut.width, matrix.len());
    let blocks = cut.width.div_ceil(cut.columns);
    let start = Start(matrix.as_mut_ptr());
    // A reference to the whole, so that the closure captures `Start` and not the pointer inside it.
    let start = &start;
    pool.run(cut.heights.len() * blocks, &|index| {
        let (band, block) = (index / blocks, index % blocks);
        let columns: Range<usize> = block * cut.columns..((block + 1) * cut.columns).min(cut.width);
        let rectangle = Rectangle {
            start: start.0.wrapping_add(starts[band] * cut.width + columns.start),
            rows: cut.heights[band],
            columns: columns.len(),
            width: cut.width,
            matrix: PhantomData,
        };
        task(band, block, rectangle);
    });
}
