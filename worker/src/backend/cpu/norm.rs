//! RMS norm.

use super::simd::{
    Kernel, LANES, Level, Simd,
    pool::Pool,
    rectangles::{Cut, Rectangle, row_bands, split},
    sum_lanes,
};

/// `x / sqrt(mean(x²) + eps) * weight`, row by row.
pub(super) fn rms_norm((pool, level): (&mut Pool, Level), x: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    let width = weight.len();
    let mut out = vec![0.0; x.len()];
    let heights = row_bands(x.len() / width.max(1), width);
    let band_rows = heights.first().copied().unwrap_or(0);
    split(pool, &mut out, &Cut { width: width.max(1), heights: &heights, columns: width.max(1) }, |band, _, out| {
        let x = &x[band * band_rows * width..][..out.rows() * width];
        level.run(Norm { x, weight, eps, out });
    });
    out
}

struct Norm<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    eps: f32,
    out: Rectangle<'a, f32>,
}

impl Kernel for Norm<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        for (row, x) in self.x.chunks_exact(self.weight.len()).enumerate() {
            let mut squares = s.splat(0.0);
            let (lines, rest) = x.as_chunks::<LANES>();
            for line in lines {
                let line = s.load(line);
                squares = s.fma(line, line, squares);
            }
            let mut last = [0.0; LANES];
            last[..rest.len()].copy_from_slice(rest);
            let last = s.load(&last);
            let mut sums = [0.0; LANES];
            s.store(s.fma(last, last, squares), &mut sums);
            let scale = 1.0 / (sum_lanes(sums) / x.len() as f32 + self.eps).sqrt();
            for ((out, x), weight) in self.out.row(row).iter_mut().zip(x).zip(self.weight) {
                *out = x * scale * weight;
            }
        }
    }
}
