//! Sixteen lanes in one 512-bit register.

use std::arch::x86_64::*;

use super::{FP4_CODES, Kernel, LANES, Simd};

/// Proof that the machine has AVX-512 with its F, BW and VNNI parts.
#[derive(Clone, Copy)]
pub(crate) struct Avx512(());

impl Avx512 {
    /// `None` where the machine lacks it.
    pub(crate) fn detect() -> Option<Self> {
        let there = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vnni");
        there.then_some(Self(()))
    }
}

/// Everything that is inlined here may use AVX-512 F, BW and VNNI.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx2,fma")]
fn enabled<K: Kernel>(simd: Avx512, kernel: K) -> K::Output {
    kernel.run(simd)
}

impl Simd for Avx512 {
    type Float = __m512;
    type Bits = __m512i;
    const TILE_ROWS: usize = 6;
    const MANY_REGISTERS: bool = true;
    const DECODE_FROM_TILES: usize = 5;

    #[inline(always)]
    fn vectorize<K: Kernel>(self, kernel: K) -> K::Output {
        // SAFETY: the token proves AVX-512 F, BW and VNNI, which no processor has without AVX2 and FMA.
        unsafe { enabled(self, kernel) }
    }

    #[inline(always)]
    fn load(self, from: &[f32; LANES]) -> Self::Float {
        // SAFETY: the token proves AVX-512F; 16 floats are readable.
        unsafe { _mm512_loadu_ps(from.as_ptr()) }
    }

    #[inline(always)]
    fn store(self, value: Self::Float, to: &mut [f32; LANES]) {
        // SAFETY: the token proves AVX-512F; 16 floats are writable.
        unsafe { _mm512_storeu_ps(to.as_mut_ptr(), value) }
    }

    #[inline(always)]
    fn splat(self, value: f32) -> Self::Float {
        // SAFETY: the token proves AVX-512F.
        unsafe { _mm512_set1_ps(value) }
    }

    #[inline(always)]
    fn add(self, a: Self::Float, b: Self::Float) -> Self::Float {
        // SAFETY: the token proves AVX-512F.
        unsafe { _mm512_add_ps(a, b) }
    }

    #[inline(always)]
    fn sub(self, a: Self::Float, b: Self::Float) -> Self::Float {
        // SAFETY: the token proves AVX-512F.
        unsafe { _mm512_sub_ps(a, b) }
    }

    #[inline(always)]
    fn mul(self, a: Self::Float, b: Self::Float) -> Self::Float {
        // SAFETY: the token proves AVX-512F.
        unsafe { _mm512_mul_ps(a, b) }
    }

    #[inline(always)]
    fn div(self, a: Self::Float, b: Self::Float) -> Self::Float {
        // SAFETY: the token proves AVX-512F.
        unsafe { _mm512_div_ps(a, b) }
    }

    #[inline(always)]
    fn fma(self, a: Self::Float, b: Self::Float, c: Self::Float) -> Self::Float {
        // SAFETY: the token proves AVX-512F.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    fn min(self, a: Self::Float, b: Self::Float) -> Self::Float {
        // SAFETY: the token proves AVX-512F.
        unsafe { _mm512_min_ps(a, b) }
    }

    #[inline(always)]
    fn max(self, a: Self::Float, b: Self::Float) -> Self::Float {
        // SAFETY: the token proves AVX-512F.
        unsafe { _mm512_max_ps(a, b) }
    }

    #[inline(always)]
    fn max_lane(self, a: Self::Float) -> f32 {
        // SAFETY: the token proves AVX-512F.
        unsafe { _mm512_reduce_max_ps(a) }
    }

    #[inline(always)]
    fn bits(self, from: &[u32; LANES]) -> Self::Bits {
        // SAFETY: the token proves AVX-512F; 64 bytes are readable.
        unsafe { _mm512_loadu_si512(from.as_ptr().cast()) }
    }

    #[inline(always)]
    fn widen(self, from: &[u8; LANES]) -> Self::Bits {
        // SAFETY: SSE2 is part of x86-64; 16 bytes are readable.
        let bytes = unsafe { _mm_loadu_si128(from.as_ptr().cast()) };
        // SAFETY: the token proves AVX-512F.
        unsafe { _mm512_cvtepu8_epi32(bytes) }
    }

    #[inline(always)]
    fn splat_bits(self, value: u32) -> Self::Bits {
        // SAFETY: the token proves AVX-512F.
        unsafe { _mm512_set1_epi32(value.cast_signed()) }
    }

    #[inline(always)]
    fn float_to_bits(self, value: Self::Float) -> Self::Bits {
        // SAFETY: the token proves AVX-512F.
        unsafe { _mm512_castps_si512(value) }
    }

    #[inline(always)]
    fn bits_to_float(self, value: Self::Bits) -> Self::Float {
        // SAFETY: the token proves AVX-512F.
        unsafe { _mm512_castsi512_ps(value) }
    }

    #[inline(always)]
    fn add_bits(self, a: Self::Bits, b: Self::Bits) -> Self::Bits {
        // SAFETY: the token proves AVX-512F.
        unsafe { _mm512_add_epi32(a, b) }
    }

    #[inline(always)]
    fn and_bits(self, a: Self::Bits, b: Self::Bits) -> Self::Bits {
        // SAFETY: the token proves AVX-512F.
        unsafe { _mm512_and_si512(a, b) }
    }

    #[inline(always)]
    fn xor_bits(self, a: Self::Bits, b: Self::Bits) -> Self::Bits {
        // SAFETY: the token proves AVX-512F.
        unsafe { _mm512_xor_si512(a, b) }
    }

    #[inline(always)]
    fn max_bits(self, a: Self::Bits, b: Self::Bits) -> Self::Bits {
        // SAFETY: the token proves AVX-512F.
        unsafe { _mm512_max_epi32(a, b) }
    }

    #[inline(always)]
    fn shl(self, a: Self::Bits, by: u32) -> Self::Bits {
        let by = self.splat_bits(by);
        // SAFETY: the token proves AVX-512F.
        unsafe { _mm512_sllv_epi32(a, by) }
    }

    #[inline(always)]
    fn shr(self, a: Self::Bits, by: u32) -> Self::Bits {
        let by = self.splat_bits(by);
        // SAFETY: the token proves AVX-512F.
        unsafe { _mm512_srlv_epi32(a, by) }
    }

    #[inline(always)]
    fn to_float(self, numbers: Self::Bits) -> Self::Float {
        // SAFETY: the token proves AVX-512F.
        unsafe { _mm512_cvtepi32_ps(numbers) }
    }

    #[inline(always)]
    fn fp4_codes(self, nibbles: Self::Bits) -> Self::Bits {
        // SAFETY: SSE2 is part of x86-64; 16 bytes are readable.
        let table = unsafe { _mm_loadu_si128(FP4_CODES.as_ptr().cast()) };
        // SAFETY: the token proves AVX-512F.
        let table = unsafe { _mm512_broadcast_i32x4(table) };
        // SAFETY: the token proves AVX-512BW.
        unsafe { _mm512_shuffle_epi8(table, nibbles) }
    }

    #[inline(always)]
    fn dot(self, mut sums: Self::Bits, codes: [Self::Bits; 2], values: [u32; 2]) -> Self::Bits {
        for (codes, value) in codes.into_iter().zip(values) {
            let value = self.splat_bits(value);
            // SAFETY: the token proves AVX-512VNNI.
            sums = unsafe { _mm512_dpbusd_epi32(sums, codes, value) };
        }
        sums
    }

    #[inline(always)]
    fn prefetch<T>(self, from: &T, bytes: usize) {
        let line = std::ptr::from_ref(from).cast::<i8>().wrapping_add(bytes);
        // SAFETY: a prefetch never faults, wherever it points.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(line) }
    }
}
