//! Rotary embeddings of a batch.

use super::simd::{
    pool::Pool,
    rectangles::{Cut, row_bands, split},
};
use crate::backend::Arithmetic;

/// Cosines and sines of a batch's positions, kept from layer to layer.
#[derive(Default)]
pub(super) struct Rotary {
    positions: Vec<u32>,
    /// `[rows, head_dim / 2]`: cosine and sine, the model's scale included.
    turns: Vec<(f32, f32)>,
}

impl Rotary {
    /// Makes ready for the positions of a batch.
    pub(super) fn prepare(&mut self, positions: &[u32], arithmetic: &Arithmetic) {
        if self.positions == positions {
            return;
        }
        self.positions = positions.to_vec();
        self.turns.clear();
        let pairs = arithmetic.inverse_frequencies.len();
        let turn = |&position: &u32| (0..pairs).map(move |pair| arithmetic.rotation(position, pair));
        self.turns.extend(positions.iter().flat_map(turn));
    }

    /// Turns every head of every row, first half against second half, and multiplies by `factor`.
    pub(super) fn turn(&self, pool: &mut Pool, x: &mut [f32], width: usize, factor: f32) {
        let rows = self.positions.len();
        let half = self.turns.len() / rows.max(1);
        let heights = row_bands(rows, width);
        let band_rows = heights.first().copied().unwrap_or(0);
        split(pool, x, &Cut { width, heights: &heights, columns: width }, |band, _, mut part| {
            for row in 0..part.rows() {
                let turns = &self.turns[(band * band_rows + row) * half..][..half];
                for head in part.row(row).chunks_exact_mut(2 * half) {
                    turn_head(head, turns, factor);
                }
            }
        });
    }
}

fn turn_head(head: &mut [f32], turns: &[(f32, f32)], factor: f32) {
    let (first, second) = head.split_at_mut(turns.len());
    for ((x1, x2), (cos, sin)) in first.iter_mut().zip(second).zip(turns) {
        let (a, b) = (*x1, *x2);
        *x1 = (a * cos - b * sin) * factor;
        *x2 = (b * cos + a * sin) * factor;
    }
}
