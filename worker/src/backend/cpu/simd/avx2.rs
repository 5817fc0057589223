//! Sixteen lanes in two 256-bit registers.

use std::arch::x86_64::*;

use super::{FP4_CODES, Kernel, LANES, MAX_CODE, Simd};

/// Proof that the machine has AVX2 and FMA.
#[derive(Clone, Copy)]
pub(crate) struct Avx2(());

impl Avx2 {
    /// `None` where the machine lacks either.
    pub(crate) fn detect() -> Option<Self> {
        (is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")).then_some(Self(()))
    }
}

/// Everything that is inlined here may use AVX2 and FMA.
#[target_feature(enable = "avx2,fma")]
fn enabled<K: Kernel>(simd: Avx2, kernel: K) -> K::Output {
    kernel.run(simd)
}

/// Both halves of a line of floats.
#[inline(always)]
fn halves<T>(line: &[T; LANES]) -> (*const T, *const T) {
    let (low, high) = line.split_at(LANES / 2);
    (low.as_ptr(), high.as_ptr())
}

impl Simd for Avx2 {
    type Float = [__m256; 2];
    type Bits = [__m256i; 2];
    const TILE_ROWS: usize = 3;
    const MANY_REGISTERS: bool = false;
    const DECODE_FROM_TILES: usize = 3;

    #[inline(always)]
    fn vectorize<K: Kernel>(self, kernel: K) -> K::Output {
        // SAFETY: the token proves AVX2 and FMA.
        unsafe { enabled(self, kernel) }
    }

    #[inline(always)]
    fn load(self, from: &[f32; LANES]) -> Self::Float {
        let (low, high) = halves(from);
        // SAFETY: the token proves AVX; 8 floats are readable.
        let low = unsafe { _mm256_loadu_ps(low) };
        // SAFETY: the token proves AVX; 8 floats are readable.
        let high = unsafe { _mm256_loadu_ps(high) };
        [low, high]
    }

    #[inline(always)]
    fn store(self, [low, high]: Self::Float, to: &mut [f32; LANES]) {
        let (to_low, to_high) = to.split_at_mut(LANES / 2);
        // SAFETY: the token proves AVX; 8 floats are writable.
        unsafe { _mm256_storeu_ps(to_low.as_mut_ptr(), low) };
        // SAFETY: the token proves AVX; 8 floats are writable.
        unsafe { _mm256_storeu_ps(to_high.as_mut_ptr(), high) };
    }

    #[inline(always)]
    fn splat(self, value: f32) -> Self::Float {
        // SAFETY: the token proves AVX.
        [unsafe { _mm256_set1_ps(value) }; 2]
    }

    #[inline(always)]
    fn add(self, a: Self::Float, b: Self::Float) -> Self::Float {
        // SAFETY: the token proves AVX2 and FMA.
        let low = unsafe { _mm256_add_ps(a[0], b[0]) };
        // SAFETY: the token proves AVX2 and FMA.
        let high = unsafe { _mm256_add_ps(a[1], b[1]) };
        [low, high]
    }

    #[inline(always)]
    fn sub(self, a: Self::Float, b: Self::Float) -> Self::Float {
        // SAFETY: the token proves AVX2 and FMA.
        let low = unsafe { _mm256_sub_ps(a[0], b[0]) };
        // SAFETY: the token proves AVX2 and FMA.
        let high = unsafe { _mm256_sub_ps(a[1], b[1]) };
        [low, high]
    }

    #[inline(always)]
    fn mul(self, a: Self::Float, b: Self::Float) -> Self::Float {
        // SAFETY: the token proves AVX2 and FMA.
        let low = unsafe { _mm256_mul_ps(a[0], b[0]) };
        // SAFETY: the token proves AVX2 and FMA.
        let high = unsafe { _mm256_mul_ps(a[1], b[1]) };
        [low, high]
    }

    #[inline(always)]
    fn div(self, a: Self::Float, b: Self::Float) -> Self::Float {
        // SAFETY: the token proves AVX2 and FMA.
        let low = unsafe { _mm256_div_ps(a[0], b[0]) };
        // SAFETY: the token proves AVX2 and FMA.
        let high = unsafe { _mm256_div_ps(a[1], b[1]) };
        [low, high]
    }

    #[inline(always)]
    fn fma(self, a: Self::Float, b: Self::Float, c: Self::Float) -> Self::Float {
        // SAFETY: the token proves AVX2 and FMA.
        let low = unsafe { _mm256_fmadd_ps(a[0], b[0], c[0]) };
        // SAFETY: the token proves AVX2 and FMA.
        let high = unsafe { _mm256_fmadd_ps(a[1], b[1], c[1]) };
        [low, high]
    }

    #[inline(always)]
    fn min(self, a: Self::Float, b: Self::Float) -> Self::Float {
        // SAFETY: the token proves AVX2 and FMA.
        let low = unsafe { _mm256_min_ps(a[0], b[0]) };
        // SAFETY: the token proves AVX2 and FMA.
        let high = unsafe { _mm256_min_ps(a[1], b[1]) };
        [low, high]
    }

    #[inline(always)]
    fn max(self, a: Self::Float, b: Self::Float) -> Self::Float {
        // SAFETY: the token proves AVX2 and FMA.
        let low = unsafe { _mm256_max_ps(a[0], b[0]) };
        // SAFETY: the token proves AVX2 and FMA.
        let high = unsafe { _mm256_max_ps(a[1], b[1]) };
        [low, high]
    }

    #[inline(always)]
    fn max_lane(self, [low, high]: Self::Float) -> f32 {
        // SAFETY: the token proves AVX.
        let most = unsafe { _mm256_max_ps(low, high) };
        let mut lanes = [0.0; LANES];
        self.store([most, most], &mut lanes);
        let [a, b, c, d, e, f, g, h, ..] = lanes;
        let greater = |a: f32, b: f32| if a > b { a } else { b };
        greater(greater(greater(a, b), greater(c, d)), greater(greater(e, f), greater(g, h)))
    }

    #[inline(always)]
    fn bits(self, from: &[u32; LANES]) -> Self::Bits {
        let (low, high) = halves(from);
        // SAFETY: the token proves AVX; 32 bytes are readable.
        let low = unsafe { _mm256_loadu_si256(low.cast()) };
        // SAFETY: the token proves AVX; 32 bytes are readable.
        let high = unsafe { _mm256_loadu_si256(high.cast()) };
        [low, high]
    }

    #[inline(always)]
    fn widen(self, from: &[u8; LANES]) -> Self::Bits {
        let (low, high) = halves(from);
        // SAFETY: SSE2 is part of x86-64; 8 bytes are readable.
        let low = unsafe { _mm_loadl_epi64(low.cast()) };
        // SAFETY: SSE2 is part of x86-64; 8 bytes are readable.
        let high = unsafe { _mm_loadl_epi64(high.cast()) };
        // SAFETY: the token proves AVX2.
        let low = unsafe { _mm256_cvtepu8_epi32(low) };
        // SAFETY: the token proves AVX2.
        let high = unsafe { _mm256_cvtepu8_epi32(high) };
        [low, high]
    }

    #[inline(always)]
    fn splat_bits(self, value: u32) -> Self::Bits {
        // SAFETY: the token proves AVX.
        [unsafe { _mm256_set1_epi32(value.cast_signed()) }; 2]
    }

    #[inline(always)]
    fn float_to_bits(self, value: Self::Float) -> Self::Bits {
        // SAFETY: the token proves AVX2 and FMA.
        let low = unsafe { _mm256_castps_si256(value[0]) };
        // SAFETY: the token proves AVX2 and FMA.
        let high = unsafe { _mm256_castps_si256(value[1]) };
        [low, high]
    }

    #[inline(always)]
    fn bits_to_float(self, value: Self::Bits) -> Self::Float {
        // SAFETY: the token proves AVX2 and FMA.
        let low = unsafe { _mm256_castsi256_ps(value[0]) };
        // SAFETY: the token proves AVX2 and FMA.
        let high = unsafe { _mm256_castsi256_ps(value[1]) };
        [low, high]
    }

    #[inline(always)]
    fn add_bits(self, a: Self::Bits, b: Self::Bits) -> Self::Bits {
        // SAFETY: the token proves AVX2 and FMA.
        let low = unsafe { _mm256_add_epi32(a[0], b[0]) };
        // SAFETY: the token proves AVX2 and FMA.
        let high = unsafe { _mm256_add_epi32(a[1], b[1]) };
        [low, high]
    }

    #[inline(always)]
    fn and_bits(self, a: Self::Bits, b: Self::Bits) -> Self::Bits {
        // SAFETY: the token proves AVX2 and FMA.
        let low = unsafe { _mm256_and_si256(a[0], b[0]) };
        // SAFETY: the token proves AVX2 and FMA.
        let high = unsafe { _mm256_and_si256(a[1], b[1]) };
        [low, high]
    }

    #[inline(always)]
    fn xor_bits(self, a: Self::Bits, b: Self::Bits) -> Self::Bits {
        // SAFETY: the token proves AVX2 and FMA.
        let low = unsafe { _mm256_xor_si256(a[0], b[0]) };
        // SAFETY: the token proves AVX2 and FMA.
        let high = unsafe { _mm256_xor_si256(a[1], b[1]) };
        [low, high]
    }

    #[inline(always)]
    fn max_bits(self, a: Self::Bits, b: Self::Bits) -> Self::Bits {
        // SAFETY: the token proves AVX2 and FMA.
        let low = unsafe { _mm256_max_epi32(a[0], b[0]) };
        // SAFETY: the token proves AVX2 and FMA.
        let high = unsafe { _mm256_max_epi32(a[1], b[1]) };
        [low, high]
    }

    #[inline(always)]
    fn shl(self, a: Self::Bits, by: u32) -> Self::Bits {
        let by = self.splat_bits(by);
        // SAFETY: the token proves AVX2 and FMA.
        let low = unsafe { _mm256_sllv_epi32(a[0], by[0]) };
        // SAFETY: the token proves AVX2 and FMA.
        let high = unsafe { _mm256_sllv_epi32(a[1], by[1]) };
        [low, high]
    }

    #[inline(always)]
    fn shr(self, a: Self::Bits, by: u32) -> Self::Bits {
        let by = self.splat_bits(by);
        // SAFETY: the token proves AVX2 and FMA.
        let low = unsafe { _mm256_srlv_epi32(a[0], by[0]) };
        // SAFETY: the token proves AVX2 and FMA.
        let high = unsafe { _mm256_srlv_epi32(a[1], by[1]) };
        [low, high]
    }

    #[inline(always)]
    fn to_float(self, numbers: Self::Bits) -> Self::Float {
        // SAFETY: the token proves AVX.
        numbers.map(|half| unsafe { _mm256_cvtepi32_ps(half) })
    }

    #[inline(always)]
    fn fp4_codes(self, nibbles: Self::Bits) -> Self::Bits {
        // SAFETY: SSE2 is part of x86-64; 16 bytes are readable.
        let table = unsafe { _mm_loadu_si128(FP4_CODES.as_ptr().cast()) };
        // SAFETY: the token proves AVX2.
        let table = unsafe { _mm256_broadcastsi128_si256(table) };
        // SAFETY: the token proves AVX2.
        nibbles.map(|half| unsafe { _mm256_shuffle_epi8(table, half) })
    }

    #[inline(always)]
    fn dot(self, sums: Self::Bits, codes: [Self::Bits; 2], values: [u32; 2]) -> Self::Bits {
        // Sums of four products, two of them from each word, still fit 16 bits.
        const { assert!(MAX_CODE as i32 * 128 * 4 <= i16::MAX as i32) };
        let values = values.map(|value| self.splat_bits(value)[0]);
        let half = |half: usize| {
            // SAFETY: the token proves AVX2.
            let pairs = |at: usize| unsafe { _mm256_maddubs_epi16(codes[at][half], values[at]) };
            // SAFETY: the token proves AVX2.
            let add = |a, b| unsafe { _mm256_add_epi16(a, b) };
            let pairs = add(pairs(0), pairs(1));
            // SAFETY: the token proves AVX.
            let ones = unsafe { _mm256_set1_epi16(1) };
            // SAFETY: the token proves AVX2.
            let words = unsafe { _mm256_madd_epi16(pairs, ones) };
            // SAFETY: the token proves AVX2.
            unsafe { _mm256_add_epi32(sums[half], words) }
        };
        [half(0), half(1)]
    }

    #[inline(always)]
    fn prefetch<T>(self, from: &T, bytes: usize) {
        let line = std::ptr::from_ref(from).cast::<i8>().wrapping_add(bytes);
        // SAFETY: a prefetch never faults, wherever it points.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(line) }
    }
}
