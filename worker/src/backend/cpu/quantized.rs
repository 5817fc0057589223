//! Activations as 16-bit integers, for products with MXFP4.
//!
//! Twice an FP4 value is an integer from -12 to 12. With activations as integers too, a block's sum is a sum of integers:
//! exact, whatever the order in which an instruction set takes it, and four columns to an instruction.
//!
//! The 32 activations of a block share a scale, the greatest magnitude among them over [`LARGEST`]; each is off by half of
//! the scale at most, 1.5e-5 of that greatest one. (bf16, in which the model was trained, is off by 2e-3 of each.) They are
//! stored as a high and a low byte, both signed, because instructions multiply bytes.

use super::{
    panels::BLOCK,
    simd::{
        CODE_OFFSET, Kernel, Level, Simd,
        pool::Pool,
        rectangles::{Cut, Rectangle, row_bands, split, starts},
    },
};

/// The greatest magnitude of an integer whose high and low byte are both signed: 127 * 256 + 127.
const LARGEST: f32 = 32_639.0;

/// 32 activations of a row.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct QuantizedBlock {
    /// Bytes of eight columns after eight: `[octet][high, low][even columns, odd columns]`.
    pub(super) values: [[[u32; 2]; 2]; BLOCK / 8],
    /// What the sums over high and over low bytes begin with: it undoes [`CODE_OFFSET`].
    pub(super) offsets: [u32; 2],
    /// Half of the scale, since weights are doubled; not finite where an activation is not.
    pub(super) scale: f32,
}

impl QuantizedBlock {
    #[inline(always)]
    fn new(values: &[f32; BLOCK]) -> Self {
        // As numbers, the bits of magnitudes are in the order of these, NaN last.
        let greatest = values.iter().fold(0, |greatest, value| (value.to_bits() & 0x7fff_ffff).max(greatest));
        let scale = f32::from_bits(greatest) / LARGEST;
        // Below this the reciprocal would not be finite.
        let scale = if scale < f32::MIN_POSITIVE { f32::MIN_POSITIVE } else { scale };
        let factor = 1.0 / scale;
        let (mut high, mut low) = ([0u8; BLOCK], [0u8; BLOCK]);
        let mut sums = [0i32; 2];
        for (at, value) in values.iter().enumerate() {
            // Adding 1.5 * 2^23 rounds to an integer, which then stands in the sum's lowest bits.
            let number = (value * factor + 12_582_912.0).to_bits() as i16;
            let (high_byte, low_byte) = ((number.wrapping_add(128) >> 8) as i8, number as i8);
            sums[0] += i32::from(high_byte);
            sums[1] += i32::from(low_byte);
            // Of eight columns first the even ones, then the odd ones, as they come out of the codes.
            let to = at / 8 * 8 + at % 2 * 4 + at % 8 / 2;
            (high[to], low[to]) = (high_byte.cast_unsigned(), low_byte.cast_unsigned());
        }
        let words = |bytes: &[u8; BLOCK], octet: usize| {
            let (words, _) = bytes.as_chunks::<4>();
            [words[octet * 2], words[octet * 2 + 1]].map(u32::from_le_bytes)
        };
        Self {
            values: std::array::from_fn(|octet| [words(&high, octet), words(&low, octet)]),
            offsets: sums.map(|sum| (-CODE_OFFSET * sum).cast_unsigned()),
            scale: scale / 2.0,
        }
    }
}

/// Quantizes `values`, `[rows, columns]` with whole blocks, into `blocks`, whose memory is used again.
pub(super) fn quantize(
    (pool, level): (&mut Pool, Level),
    values: &[f32],
    columns: usize,
    blocks: &mut Vec<QuantizedBlock>,
) {
    let (rows, width) = (values.len() / columns, columns / BLOCK);
    blocks.resize(rows * width, QuantizedBlock::default());
    let heights = row_bands(rows, columns);
    let first_rows = starts(&heights);
    split(pool, blocks, &Cut { width, heights: &heights, columns: width }, |band, _, out| {
        let (values, _) = values[first_rows[band] * columns..].as_chunks();
        level.run(Quantize { values, out });
    });
}

/// Quantizes as many blocks as the rectangle holds.
struct Quantize<'a> {
    values: &'a [[f32; BLOCK]],
    out: Rectangle<'a, QuantizedBlock>,
}

impl Kernel for Quantize<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, _: S) {
        for (block, values) in self.out.flat().iter_mut().zip(self.values) {
            *block = QuantizedBlock::new(values);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The activation of a column.
    fn value(block: &QuantizedBlock, column: usize) -> f32 {
        let byte = |words: [u32; 2]| words[column % 2].to_le_bytes()[column % 8 / 2].cast_signed();
        let [high, low] = block.values[column / 8].map(|words| i32::from(byte(words)));
        (high * 256 + low) as f32 * block.scale * 2.0
    }

    #[test]
    fn values_are_within_half_of_the_scale_and_the_greatest_is_kept() {
        let noise = |at: usize| ((at * 2_654_435_761) % 1000) as f32 / 500.0 - 1.0;
        for size in [1e-30, 1e-3, 1.0, 7e20, 1e38] {
            for sign in [1.0, -1.0] {
                let mut values: [f32; BLOCK] = std::array::from_fn(|at| noise(at) * size);
                values[13] = 1.01 * size * sign;
                let block = QuantizedBlock::new(&values);
                for (column, expected) in values.iter().enumerate() {
                    let error = (value(&block, column) - expected).abs();
                    assert!(error <= block.scale * 1.01, "{expected} is {}", value(&block, column));
                }
                assert!((value(&block, 13) - values[13]).abs() <= 2e-7 * size);
            }
        }
    }

    #[test]
    fn zeros_and_the_smallest_numbers_become_zeros_and_what_is_not_finite_stays_so() {
        let block = QuantizedBlock::new(&[0.0; BLOCK]);
        assert_eq!((block.values, block.offsets), Default::default());
        let block = QuantizedBlock::new(&[f32::from_bits(1); BLOCK]);
        assert_eq!((block.values, block.offsets), Default::default());
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut values = [1.0; BLOCK];
            values[31] = bad;
            assert!(!QuantizedBlock::new(&values).scale.is_finite());
        }
    }

    #[test]
    fn offsets_undo_what_codes_have_too_much() {
        let block = QuantizedBlock::new(&std::array::from_fn(|at| at as f32 - 7.5));
        for limb in 0..2 {
            let bytes = block.values.iter().flat_map(|octet| octet[limb]).flat_map(u32::to_le_bytes);
            let sum: i32 = bytes.map(|byte| i32::from(byte.cast_signed())).sum();
            assert_eq!(block.offsets[limb].cast_signed(), -CODE_OFFSET * sum);
        }
    }
}
