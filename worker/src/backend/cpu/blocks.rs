//! How kernels read each kind of weight: always two columns of both groups at a time, exactly, as f32.

use super::{
    panels::{Bf16Block, CodeBlock, F32Block, GROUPS, ScaleBlock},
    simd::Simd,
};

/// Two neighbouring columns: `[group]` of the even one, `[group]` of the odd one.
pub(super) type Pair<S> = ([<S as Simd>::Float; GROUPS], [<S as Simd>::Float; GROUPS]);

/// 32 columns of a panel.
pub(super) trait Block: Copy {
    /// Columns `8 * octet + 2 * PAIR` and the next one, without the scale.
    fn pair<S: Simd, const PAIR: usize>(self, s: S, octet: usize) -> Pair<S>;
    /// What the rows of a group are multiplied with.
    fn scale<S: Simd>(self, s: S, group: usize) -> S::Float;
    /// Asks for the weights that lie [`AHEAD`] bytes on.
    fn prefetch<S: Simd>(self, s: S);
}

/// The blocks of one panel, or some of them.
pub(super) trait Blocks: Copy {
    /// The kind of block.
    type Block: Block;
    /// How many there are.
    fn len(self) -> usize;
    /// One of them.
    fn block(self, index: usize) -> Self::Block;
}

/// Distance at which weights are prefetched, in bytes: far enough for memory, and within what the caches keep.
const AHEAD: usize = 4096;

#[inline(always)]
fn prefetch_lines<S: Simd, T>(s: S, lines: &[T]) {
    for line in lines {
        s.prefetch(line, AHEAD);
    }
}

impl Block for &F32Block {
    #[inline(always)]
    fn pair<S: Simd, const PAIR: usize>(self, s: S, octet: usize) -> Pair<S> {
        let at = (octet * 4 + PAIR) * 2 * GROUPS;
        ([s.load(&self[at]), s.load(&self[at + 1])], [s.load(&self[at + 2]), s.load(&self[at + 3])])
    }

    #[inline(always)]
    fn scale<S: Simd>(self, s: S, _group: usize) -> S::Float {
        s.splat(1.0)
    }

    #[inline(always)]
    fn prefetch<S: Simd>(self, s: S) {
        prefetch_lines(s, self);
    }
}

impl Block for &Bf16Block {
    #[inline(always)]
    fn pair<S: Simd, const PAIR: usize>(self, s: S, octet: usize) -> Pair<S> {
        let at = (octet * 4 + PAIR) * GROUPS;
        let words = [s.bits(&self[at]), s.bits(&self[at + 1])];
        // A bf16 is the upper half of an f32.
        let upper = s.splat_bits(0xffff_0000);
        (
            [s.from_bits(s.shl(words[0], 16)), s.from_bits(s.shl(words[1], 16))],
            [s.from_bits(s.and_bits(words[0], upper)), s.from_bits(s.and_bits(words[1], upper))],
        )
    }

    #[inline(always)]
    fn scale<S: Simd>(self, s: S, _group: usize) -> S::Float {
        s.splat(1.0)
    }

    #[inline(always)]
    fn prefetch<S: Simd>(self, s: S) {
        prefetch_lines(s, self);
    }
}

/// Codes and scales of an MXFP4 block.
#[derive(Clone, Copy)]
pub(super) struct Mxfp4Block<'a> {
    codes: &'a CodeBlock,
    scales: &'a ScaleBlock,
}

impl Block for Mxfp4Block<'_> {
    #[inline(always)]
    fn pair<S: Simd, const PAIR: usize>(self, s: S, octet: usize) -> Pair<S> {
        let words = [s.bits(&self.codes[octet * GROUPS]), s.bits(&self.codes[octet * GROUPS + 1])];
        let (even, odd) = (8 * PAIR as u32, 8 * PAIR as u32 + 4);
        (
            [s.fp4(s.shr(words[0], even)), s.fp4(s.shr(words[1], even))],
            [s.fp4(s.shr(words[0], odd)), s.fp4(s.shr(words[1], odd))],
        )
    }

    #[inline(always)]
    fn scale<S: Simd>(self, s: S, group: usize) -> S::Float {
        // 2^(e - 127): e is the exponent field, but 2^-127 is a subnormal whose field is 0.
        let exponents = s.shl(s.widen(&self.scales[group]), 23);
        s.from_bits(s.max_bits(exponents, s.splat_bits(0x0040_0000)))
    }

    #[inline(always)]
    fn prefetch<S: Simd>(self, s: S) {
        prefetch_lines(s, self.codes);
        s.prefetch(self.scales, AHEAD / 16);
    }
}

/// A block that was decoded from another kind, with its scales.
#[derive(Clone, Copy)]
pub(super) struct DecodedBlock<'a> {
    weights: &'a F32Block,
    scales: &'a [[f32; 16]; GROUPS],
}

impl Block for DecodedBlock<'_> {
    #[inline(always)]
    fn pair<S: Simd, const PAIR: usize>(self, s: S, octet: usize) -> Pair<S> {
        self.weights.pair::<S, PAIR>(s, octet)
    }

    #[inline(always)]
    fn scale<S: Simd>(self, s: S, group: usize) -> S::Float {
        s.load(&self.scales[group])
    }

    #[inline(always)]
    fn prefetch<S: Simd>(self, _s: S) {}
}

impl<'a> Blocks for &'a [F32Block] {
    type Block = &'a F32Block;

    #[inline(always)]
    fn len(self) -> usize {
        <[F32Block]>::len(self)
    }

    #[inline(always)]
    fn block(self, index: usize) -> Self::Block {
        &self[index]
    }
}

impl<'a> Blocks for &'a [Bf16Block] {
    type Block = &'a Bf16Block;

    #[inline(always)]
    fn len(self) -> usize {
        <[Bf16Block]>::len(self)
    }

    #[inline(always)]
    fn block(self, index: usize) -> Self::Block {
        &self[index]
    }
}

/// The MXFP4 blocks of a panel.
#[derive(Clone, Copy)]
pub(super) struct Mxfp4Blocks<'a> {
    pub(super) codes: &'a [CodeBlock],
    pub(super) scales: &'a [ScaleBlock],
}

impl<'a> Blocks for Mxfp4Blocks<'a> {
    type Block = Mxfp4Block<'a>;

    #[inline(always)]
    fn len(self) -> usize {
        self.codes.len()
    }

    #[inline(always)]
    fn block(self, index: usize) -> Self::Block {
        Mxfp4Block { codes: &self.codes[index], scales: &self.scales[index] }
    }
}

/// The blocks of one panel, by kind.
#[derive(Clone, Copy)]
pub(super) enum Panel<'a> {
    F32(&'a [F32Block]),
    Bf16(&'a [Bf16Block]),
    Mxfp4(Mxfp4Blocks<'a>),
}

/// Blocks decoded at a time: 16 KiB of f32, half of a first-level cache.
pub(super) const DECODED: usize = 4;

/// Room for decoded blocks.
#[repr(align(64))]
pub(super) struct Decoded {
    weights: [F32Block; DECODED],
    scales: [[[f32; 16]; GROUPS]; DECODED],
    len: usize,
}

impl Decoded {
    /// Room for [`DECODED`] blocks.
    pub(super) fn new() -> Self {
        Self { weights: [[[0.0; 16]; 64]; DECODED], scales: [[[0.0; 16]; GROUPS]; DECODED], len: 0 }
    }

    /// Decodes some blocks from `first` on.
    #[inline(always)]
    pub(super) fn fill<S: Simd, B: Blocks>(&mut self, s: S, blocks: B, first: usize) {
        self.len = DECODED.min(blocks.len() - first);
        for index in 0..self.len {
            let block = blocks.block(first + index);
            block.prefetch(s);
            let (lines, _) = self.weights[index].as_chunks_mut::<16>();
            for (octet, lines) in lines.iter_mut().enumerate() {
                let ([a, b], [c, d]) = block.pair::<S, 0>(s, octet);
                let ([e, f], [g, h]) = block.pair::<S, 1>(s, octet);
                let ([i, j], [k, l]) = block.pair::<S, 2>(s, octet);
                let ([m, n], [o, p]) = block.pair::<S, 3>(s, octet);
                let values = [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p];
                for at in 0..16 {
                    s.store(values[at], &mut lines[at]);
                }
            }
            for (group, line) in self.scales[index].iter_mut().enumerate() {
                s.store(block.scale(s, group), line);
            }
        }
    }
}

impl<'a> Blocks for &'a Decoded {
    type Block = DecodedBlock<'a>;

    #[inline(always)]
    fn len(self) -> usize {
        self.len
    }

    #[inline(always)]
    fn block(self, index: usize) -> Self::Block {
        DecodedBlock { weights: &self.weights[index], scales: &self.scales[index] }
    }
}
