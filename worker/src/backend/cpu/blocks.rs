//! How kernels read dense weights: always two columns of both groups at a time, exactly, as f32.

use super::{
    panels::{BLOCK, Bf16Block, F32Block, GROUPS},
    simd::{LANES, Simd},
};

/// Distance at which weights are prefetched, in bytes: what a thread reads in twice the time that memory takes to answer.
pub(super) const AHEAD: usize = 4096;

/// Two neighbouring columns of a group.
pub(super) type Pair<S> = [<S as Simd>::Float; 2];

/// 32 columns of a panel.
pub(super) trait Block: Copy {
    /// Columns `8 * octet + 2 * PAIR` and the next one of a group.
    fn pair<S: Simd, const PAIR: usize>(self, s: S, octet: usize, group: usize) -> Pair<S>;
    /// Asks for the weights that lie [`AHEAD`] bytes after an octet. Called octet by octet: asking for much at once
    /// stalls the loads behind it.
    fn prefetch<S: Simd>(self, s: S, octet: usize);
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

impl Block for &F32Block {
    #[inline(always)]
    fn prefetch<S: Simd>(self, s: S, octet: usize) {
        let (octets, _) = self.as_chunks::<{ 8 * GROUPS }>();
        for line in &octets[octet] {
            s.prefetch(line, AHEAD);
        }
    }

    #[inline(always)]
    fn pair<S: Simd, const PAIR: usize>(self, s: S, octet: usize, group: usize) -> Pair<S> {
        let at = (octet * 4 + PAIR) * 2 * GROUPS + group;
        [s.load(&self[at]), s.load(&self[at + GROUPS])]
    }
}

impl Block for &Bf16Block {
    #[inline(always)]
    fn prefetch<S: Simd>(self, s: S, octet: usize) {
        let (octets, _) = self.as_chunks::<{ 4 * GROUPS }>();
        for line in &octets[octet] {
            s.prefetch(line, AHEAD);
        }
    }

    #[inline(always)]
    fn pair<S: Simd, const PAIR: usize>(self, s: S, octet: usize, group: usize) -> Pair<S> {
        let line = &self[(octet * 4 + PAIR) * GROUPS + group];
        let words = s.bits(line);
        // A bf16 is the upper half of an f32.
        [s.bits_to_float(s.shl(words, 16)), s.bits_to_float(s.and_bits(words, s.splat_bits(0xffff_0000)))]
    }
}

/// A block that was decoded from another kind.
#[derive(Clone, Copy)]
pub(super) struct DecodedBlock<'a> {
    weights: &'a F32Block,
}

impl Block for DecodedBlock<'_> {
    #[inline(always)]
    fn prefetch<S: Simd>(self, _s: S, _octet: usize) {}

    #[inline(always)]
    fn pair<S: Simd, const PAIR: usize>(self, s: S, octet: usize, group: usize) -> Pair<S> {
        let at = (octet * 4 + PAIR) * 2 * GROUPS + group;
        [s.load(&self.weights[at]), s.load(&self.weights[at + GROUPS])]
    }
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

/// The blocks of one panel, by kind.
#[derive(Clone, Copy)]
pub(super) enum Panel<'a> {
    F32(&'a [F32Block]),
    Bf16(&'a [Bf16Block]),
}

/// Blocks decoded at a time: 16 KiB of f32, half of a first-level cache.
pub(super) const DECODED: usize = 4;

/// Room for decoded blocks.
#[repr(align(64))]
pub(super) struct Decoded {
    weights: [F32Block; DECODED],
    len: usize,
}

impl Decoded {
    /// Room for [`DECODED`] blocks.
    pub(super) fn new() -> Self {
        Self { weights: [[[0.0; LANES]; BLOCK * GROUPS]; DECODED], len: 0 }
    }

    /// Decodes some blocks from `first` on.
    #[inline(always)]
    pub(super) fn fill<S: Simd, B: Blocks>(&mut self, s: S, blocks: B, first: usize) {
        self.len = DECODED.min(blocks.len() - first);
        for index in 0..self.len {
            let block = blocks.block(first + index);
            for octet in 0..BLOCK / 8 {
                block.prefetch(s, octet);
                for group in 0..GROUPS {
                    let lines = &mut self.weights[index][octet * 8 * GROUPS + group..];
                    let pairs = [
                        block.pair::<S, 0>(s, octet, group),
                        block.pair::<S, 1>(s, octet, group),
                        block.pair::<S, 2>(s, octet, group),
                        block.pair::<S, 3>(s, octet, group),
                    ];
                    for column in 0..8 {
                        s.store(pairs[column / 2][column % 2], &mut lines[column * GROUPS]);
                    }
                }
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
        DecodedBlock { weights: &self.weights[index] }
    }
}
