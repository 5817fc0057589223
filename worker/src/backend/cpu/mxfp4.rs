//! Products with MXFP4 weights.
//!
//! A block's sum over quantized activations is an integer below 2^24, exact also as f32. Times the scale of its activations
//! it is fused, with the scale of its weights, onto the row's sum.

use super::{
    blocks::AHEAD,
    panels::{CodeBlock, GROUPS, Mxfp4, Panels, ScaleBlock},
    product::{ForRows, PanelTask, Sums, Weights, for_rows},
    quantized::QuantizedBlock,
    simd::{LANES, Simd},
};

impl Weights for Mxfp4 {
    type Element = QuantizedBlock;

    #[inline(always)]
    fn accumulate<S: Simd>(s: S, panels: &Panels<Self>, panel: usize, tile: &[QuantizedBlock], sums: &mut [Sums]) {
        let (codes, scales) = panels.panel(panel);
        for_rows(s, sums.len(), Tile { codes, scales, tile, sums });
    }

    #[inline(always)]
    fn multiply<S: Simd>(s: S, task: &mut PanelTask<'_, Self>) {
        // Decoding takes other units of the processor than multiplying, so that sharing it among tiles gains nothing.
        task.multiply_tiles(s);
    }
}

/// A panel, the blocks of a tile, `[block][row]`, and the sums of its rows.
struct Tile<'a> {
    codes: &'a [CodeBlock],
    scales: &'a [ScaleBlock],
    tile: &'a [QuantizedBlock],
    sums: &'a mut [Sums],
}

impl ForRows for Tile<'_> {
    #[inline(always)]
    fn run<S: Simd, const ROWS: usize>(self, s: S) {
        let (blocks, _) = self.tile.as_chunks::<ROWS>();
        let Some(sums) = self.sums.first_chunk_mut::<ROWS>() else { return };
        for ((codes, scales), rows) in self.codes.iter().zip(self.scales).zip(blocks) {
            accumulate_block::<S, ROWS>(s, (codes, scales), rows, sums);
        }
    }
}

/// One block: `ROWS * 64` products of vectors of bytes with four columns each.
#[inline(always)]
fn accumulate_block<S: Simd, const ROWS: usize>(
    s: S,
    (codes, scales): (&CodeBlock, &ScaleBlock),
    rows: &[QuantizedBlock; ROWS],
    sums: &mut [Sums; ROWS],
) {
    // Of high and low bytes for each group.
    let mut chains = [[[s.splat_bits(0); 2]; GROUPS]; ROWS];
    for (chains, row) in chains.iter_mut().zip(rows) {
        *chains = [row.offsets.map(|offset| s.splat_bits(offset)); GROUPS];
    }
    s.prefetch(scales, AHEAD / size_of::<CodeBlock>() * size_of::<ScaleBlock>());
    let (octets, _) = codes.as_chunks::<GROUPS>();
    for (octet, lines) in octets.iter().enumerate() {
        for line in lines {
            s.prefetch(line, AHEAD);
        }
        let codes = [decode(s, &lines[0]), decode(s, &lines[1])];
        for (chains, row) in chains.iter_mut().zip(rows) {
            for (limb, values) in row.values[octet].iter().enumerate() {
                // Both groups, so that a value is broadcast once.
                for (chains, codes) in chains.iter_mut().zip(codes) {
                    chains[limb] = s.dot(chains[limb], codes, *values);
                }
            }
        }
    }
    for ((chains, row), sums) in chains.iter().zip(rows).zip(sums) {
        for ((chains, scales), sum) in chains.iter().zip(scales).zip(sums) {
            let [high, low] = *chains;
            let block_sum = s.to_float(s.add_bits(s.shl(high, 8), low));
            let scaled = s.mul(block_sum, s.splat(row.scale));
            s.store(s.fma(scaled, weight_scale(s, scales), s.load(sum)), sum);
        }
    }
}

/// The codes of eight columns, a byte each: the even and the odd ones.
#[inline(always)]
fn decode<S: Simd>(s: S, line: &[u32; LANES]) -> [S::Bits; 2] {
    let words = s.bits(line);
    [words, s.shr(words, 4)].map(|words| s.fp4_codes(s.and_bits(words, s.splat_bits(0x0f0f_0f0f))))
}

/// 2^(e - 127): e is the exponent field, but 2^-127 is a subnormal whose field is 0.
#[inline(always)]
fn weight_scale<S: Simd>(s: S, exponents: &[u8; LANES]) -> S::Float {
    let exponents = s.shl(s.widen(exponents), 23);
    s.bits_to_float(s.max_bits(exponents, s.splat_bits(0x0040_0000)))
}
