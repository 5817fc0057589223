//! The only unsafe code of the CPU backend: vector instructions, memory from the system, and the fork-join of threads.
//!
//! Everything above this folder is safe: kernels are written once over [`Simd`], whose vectors always hold 16 lanes,
//! and each lane is one row of weights (or one key, or one output). A lane's operations are the same on every
//! instruction set that has fused multiply-add, so AVX-512 and AVX2 agree bit for bit.
#![allow(unsafe_code, reason = "intrinsics, system memory and scoped threads; nothing unsafe is exported")]

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
pub(crate) mod memory;
pub(crate) mod pool;
mod portable;
pub(crate) mod rectangles;

use portable::Portable;

/// Lanes of a vector.
pub(crate) const LANES: usize = 16;

/// An instruction set for which the kernels are compiled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isa {
    /// 512-bit vectors (AVX-512 F, BW and VNNI).
    Avx512,
    /// Pairs of 256-bit vectors (AVX2 and FMA).
    Avx2,
    /// Whatever the compiler makes of plain Rust.
    Portable,
}

impl Isa {
    /// The instruction sets of this machine, fastest first.
    pub fn available() -> Vec<Self> {
        [Self::Avx512, Self::Avx2, Self::Portable].into_iter().filter(|isa| Level::new(*isa).is_some()).collect()
    }

    /// The name for people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Avx512 => "AVX-512",
            Self::Avx2 => "AVX2",
            Self::Portable => "portable",
        }
    }
}

/// Proof that an instruction set is there.
#[derive(Clone, Copy)]
pub(crate) enum Level {
    #[cfg(target_arch = "x86_64")]
    Avx512(avx512::Avx512),
    #[cfg(target_arch = "x86_64")]
    Avx2(avx2::Avx2),
    Portable(Portable),
}

impl Level {
    /// `None` where the machine lacks the instruction set.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn new(isa: Isa) -> Option<Self> {
        match isa {
            Isa::Avx512 => avx512::Avx512::detect().map(Self::Avx512),
            Isa::Avx2 => avx2::Avx2::detect().map(Self::Avx2),
            Isa::Portable => Some(Self::Portable(Portable)),
        }
    }

    /// `None` where the machine lacks the instruction set.
    #[cfg(not(target_arch = "x86_64"))]
    pub(crate) fn new(isa: Isa) -> Option<Self> {
        (isa == Isa::Portable).then_some(Self::Portable(Portable))
    }

    /// Runs a kernel compiled for this instruction set.
    pub(crate) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(simd) => simd.vectorize(kernel),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(simd) => simd.vectorize(kernel),
            Self::Portable(simd) => simd.vectorize(kernel),
        }
    }

    /// [`Simd::TILE_ROWS`] of this instruction set.
    pub(crate) fn tile_rows(self) -> usize {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(_) => avx512::Avx512::TILE_ROWS,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(_) => avx2::Avx2::TILE_ROWS,
            Self::Portable(_) => Portable::TILE_ROWS,
        }
    }
}

/// Code that is compiled once for each instruction set. `run` and all that it calls on the hot path must be
/// `#[inline(always)]`: only what is inlined into [`Simd::vectorize`] may use its instructions.
pub(crate) trait Kernel {
    /// What it computes.
    type Output;
    /// Computes it.
    fn run<S: Simd>(self, simd: S) -> Self::Output;
}

/// Operations on vectors of 16 lanes.
pub(crate) trait Simd: Copy {
    /// 16 f32.
    type Float: Copy;
    /// 16 u32.
    type Bits: Copy;
    /// Most rows of activations whose sums fit the registers.
    const TILE_ROWS: usize;
    /// Whether the registers are 32, and not 16 that hold half a vector each.
    const MANY_REGISTERS: bool;
    /// Tiles from which on it pays to decode weights to memory once, rather than in registers for each tile.
    const DECODE_FROM_TILES: usize;

    /// Calls a kernel with this instruction set enabled.
    fn vectorize<K: Kernel>(self, kernel: K) -> K::Output;

    /// Reads 16 floats.
    fn load(self, from: &[f32; LANES]) -> Self::Float;
    /// Writes 16 floats.
    fn store(self, value: Self::Float, to: &mut [f32; LANES]);
    /// One value in all lanes.
    fn splat(self, value: f32) -> Self::Float;
    /// `a + b`.
    fn add(self, a: Self::Float, b: Self::Float) -> Self::Float;
    /// `a - b`.
    fn sub(self, a: Self::Float, b: Self::Float) -> Self::Float;
    /// `a * b`.
    fn mul(self, a: Self::Float, b: Self::Float) -> Self::Float;
    /// `a / b`.
    fn div(self, a: Self::Float, b: Self::Float) -> Self::Float;
    /// `a * b + c`, rounded once where the instruction set can.
    fn fma(self, a: Self::Float, b: Self::Float, c: Self::Float) -> Self::Float;
    /// The lesser; `b` where one is NaN.
    fn min(self, a: Self::Float, b: Self::Float) -> Self::Float;
    /// The greater; `b` where one is NaN.
    fn max(self, a: Self::Float, b: Self::Float) -> Self::Float;
    /// The greatest lane.
    fn max_lane(self, a: Self::Float) -> f32;

    /// Reads 16 words.
    fn bits(self, from: &[u32; LANES]) -> Self::Bits;
    /// Sixteen bytes, each widened to a word.
    fn widen(self, from: &[u8; LANES]) -> Self::Bits;
    /// One word in all lanes.
    fn splat_bits(self, value: u32) -> Self::Bits;
    /// The bits of floats.
    fn float_to_bits(self, value: Self::Float) -> Self::Bits;
    /// The floats of bits.
    fn bits_to_float(self, value: Self::Bits) -> Self::Float;
    /// Wrapping sum.
    fn add_bits(self, a: Self::Bits, b: Self::Bits) -> Self::Bits;
    /// Bitwise and.
    fn and_bits(self, a: Self::Bits, b: Self::Bits) -> Self::Bits;
    /// Bitwise exclusive or.
    fn xor_bits(self, a: Self::Bits, b: Self::Bits) -> Self::Bits;
    /// The greater as signed numbers.
    fn max_bits(self, a: Self::Bits, b: Self::Bits) -> Self::Bits;
    /// Left shift; `by` is a constant wherever this is called.
    fn shl(self, a: Self::Bits, by: u32) -> Self::Bits;
    /// Logical right shift; `by` is a constant wherever this is called.
    fn shr(self, a: Self::Bits, by: u32) -> Self::Bits;
    /// The floats of signed numbers, rounded where they have more than 24 bits.
    fn to_float(self, numbers: Self::Bits) -> Self::Float;
    /// The entry of [`FP4_CODES`] for each byte, all of which are below 16.
    fn fp4_codes(self, nibbles: Self::Bits) -> Self::Bits;
    /// Adds to each lane the products of its eight bytes of `codes`, unsigned and at most [`MAX_CODE`], with as many
    /// signed bytes of `values`, the same in all lanes.
    fn dot(self, sums: Self::Bits, codes: [Self::Bits; 2], values: [u32; 2]) -> Self::Bits;

    /// Asks for the cache line that lies `bytes` after `from`. A hint; the line need not exist. Into the second-level
    /// cache: the few line buffers of the first would be held for as long as memory takes.
    fn prefetch<T>(self, from: &T, bytes: usize);
}

/// What is added to doubled FP4 values, so that none is negative.
pub(crate) const CODE_OFFSET: i32 = 12;
/// The greatest entry of [`FP4_CODES`].
pub(crate) const MAX_CODE: u8 = 24;
/// FP4 (E2M1: a sign, two bits of exponent, one of mantissa) by nibble: twice its value plus [`CODE_OFFSET`].
pub(crate) const FP4_CODES: [u8; 16] = [12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0];

/// `eˣ` within 2 ulp for `x` in [-87, 88]; exactly 0 below -88, and a large finite number above 88.
///
/// Cody-Waite reduction by ln 2 and the polynomial of Cephes' `expf`.
#[inline(always)]
pub(crate) fn exp<S: Simd>(s: S, x: S::Float) -> S::Float {
    // Adding 1.5 * 2^23 rounds to an integer, which then stands in the sum's lowest bits.
    let shifter = s.splat(12_582_912.0);
    // In this order NaN passes through.
    let x = s.min(s.splat(88.0), s.max(s.splat(-88.0), x));
    let shifted = s.fma(x, s.splat(std::f32::consts::LOG2_E), shifter);
    let n = s.sub(shifted, shifter);
    let r = s.fma(n, s.splat(-0.693_359_4), x);
    let r = s.fma(n, s.splat(2.121_944_4e-4), r);
    let mut p = s.splat(1.987_569_1e-4);
    for coefficient in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_6e-1, 0.5] {
        p = s.fma(p, r, s.splat(coefficient));
    }
    let p = s.add(s.fma(p, s.mul(r, r), r), s.splat(1.0));
    // 2^n; at n = -127 the exponent field is 0, so that what lies below the range becomes exactly 0.
    let power = s.add_bits(s.shl(s.float_to_bits(shifted), 23), s.splat_bits(0x3f80_0000));
    s.mul(p, s.bits_to_float(power))
}

/// The sum of all lanes, always in the same order: halves onto halves.
pub(crate) fn sum_lanes(mut lanes: [f32; LANES]) -> f32 {
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
        half /= 2;
    }
    lanes[0]
}
