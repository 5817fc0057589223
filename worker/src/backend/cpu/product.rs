//! The matrix kernel: activations times resident weights, panel by panel and band by band.
//!
//! Every sum is taken in one order, whatever the number of tokens, threads or the instruction set: block after block of 32
//! columns, and within a block as `dense` and `mxfp4` say. So results are the same bit for bit in every batch.

use super::{
    panels::{GROUPS, PANEL_ROWS, Panels},
    rows::{Band, PackedRows},
    simd::{
        Kernel, LANES, Level, Simd, exp,
        pool::Pool,
        rectangles::{Cut, Rectangle, split},
    },
};

/// One row's sums with a panel.
pub(super) type Sums = [[f32; LANES]; GROUPS];

/// A kind of weight.
pub(super) trait Weights: Sized + Sync {
    /// What its rows are packed as.
    type Element: Copy + Default + Send + Sync;
    /// Adds a panel's products with a tile of rows to the sums of these rows.
    fn accumulate<S: Simd>(s: S, panels: &Panels<Self>, panel: usize, tile: &[Self::Element], sums: &mut [Sums]);
    /// Computes a panel's outputs for a band of rows.
    fn multiply<S: Simd>(s: S, task: &mut PanelTask<'_, Self>);
}

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
pub(super) struct Product<'a, W: Weights> {
    pub(super) panels: &'a Panels<W>,
    /// Panels of each matrix.
    pub(super) panels_each: usize,
    /// Added to the sums: `[matrix, panel, group, lane]`.
    pub(super) bias: &'a [f32],
    pub(super) rows: &'a PackedRows<W::Element>,
    pub(super) outputs: Outputs,
}

impl<W: Weights> Product<'_, W> {
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
pub(super) struct PanelTask<'a, W: Weights> {
    pub(super) product: &'a Product<'a, W>,
    pub(super) band: &'a Band,
    /// Counted through all matrices.
    pub(super) panel: usize,
    out: Rectangle<'a, f32>,
}

impl<W: Weights> Kernel for PanelTask<'_, W> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        W::multiply(s, &mut self);
    }
}

impl<W: Weights> PanelTask<'_, W> {
    /// Tile by tile.
    #[inline(always)]
    pub(super) fn multiply_tiles<S: Simd>(&mut self, s: S) {
        let mut first = 0;
        for tile in self.band.tiles.clone() {
            let (rows, values) = self.product.rows.tile(tile);
            let mut sums = [[[0.0; LANES]; GROUPS]; MAX_TILE_ROWS];
            W::accumulate(s, self.product.panels, self.panel, values, &mut sums[..rows]);
            self.finish(s, first, &sums[..rows]);
            first += rows;
        }
    }

    /// Writes the outputs of some rows from `first` on.
    #[inline(always)]
    pub(super) fn finish<S: Simd>(&mut self, s: S, first: usize, sums: &[Sums]) {
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

/// Code that is compiled for each number of rows that a tile may have.
pub(super) trait ForRows {
    /// Runs it; `#[inline(always)]` like all kernels.
    fn run<S: Simd, const ROWS: usize>(self, s: S);
}

/// Runs code compiled for `rows` rows.
#[inline(always)]
pub(super) fn for_rows<S: Simd>(s: S, rows: usize, code: impl ForRows) {
    // The constant conditions keep sizes that an instruction set never has from being compiled for it.
    match rows {
        1 => code.run::<S, 1>(s),
        2 if S::TILE_ROWS >= 2 => code.run::<S, 2>(s),
        3 if S::TILE_ROWS >= 3 => code.run::<S, 3>(s),
        4 if S::TILE_ROWS >= 4 => code.run::<S, 4>(s),
        5 if S::TILE_ROWS >= 5 => code.run::<S, 5>(s),
        _ if S::TILE_ROWS >= 6 => code.run::<S, MAX_TILE_ROWS>(s),
        rows => unreachable!("a tile of {rows} rows, of {} at most", S::TILE_ROWS),
    }
}
