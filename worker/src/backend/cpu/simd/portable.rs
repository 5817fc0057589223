//! Sixteen lanes in plain Rust, for machines whose instructions have no module of their own.

use super::{FP4_CODES, Kernel, LANES, Simd};

/// Needs nothing of the machine.
#[derive(Clone, Copy)]
pub(crate) struct Portable;

/// `f` of each lane.
#[inline(always)]
fn map<A: Copy, B: Copy, C>(a: [A; LANES], b: [B; LANES], f: impl Fn(A, B) -> C) -> [C; LANES] {
    std::array::from_fn(|i| f(a[i], b[i]))
}

impl Simd for Portable {
    type Float = [f32; LANES];
    type Bits = [u32; LANES];
    const TILE_ROWS: usize = 2;
    const MANY_REGISTERS: bool = false;
    const DECODE_FROM_TILES: usize = 2;

    #[inline(always)]
    fn vectorize<K: Kernel>(self, kernel: K) -> K::Output {
        kernel.run(self)
    }

    #[inline(always)]
    fn load(self, from: &[f32; LANES]) -> Self::Float {
        *from
    }

    #[inline(always)]
    fn store(self, value: Self::Float, to: &mut [f32; LANES]) {
        *to = value;
    }

    #[inline(always)]
    fn splat(self, value: f32) -> Self::Float {
        [value; LANES]
    }

    #[inline(always)]
    fn add(self, a: Self::Float, b: Self::Float) -> Self::Float {
        map(a, b, |a, b| a + b)
    }

    #[inline(always)]
    fn sub(self, a: Self::Float, b: Self::Float) -> Self::Float {
        map(a, b, |a, b| a - b)
    }

    #[inline(always)]
    fn mul(self, a: Self::Float, b: Self::Float) -> Self::Float {
        map(a, b, |a, b| a * b)
    }

    #[inline(always)]
    fn div(self, a: Self::Float, b: Self::Float) -> Self::Float {
        map(a, b, |a, b| a / b)
    }

    #[inline(always)]
    fn fma(self, a: Self::Float, b: Self::Float, c: Self::Float) -> Self::Float {
        // Where the instruction is not part of the target's baseline, `mul_add` would call a function for each lane.
        if cfg!(any(target_arch = "aarch64", target_feature = "fma")) {
            std::array::from_fn(|i| a[i].mul_add(b[i], c[i]))
        } else {
            std::array::from_fn(|i| a[i] * b[i] + c[i])
        }
    }

    #[inline(always)]
    fn min(self, a: Self::Float, b: Self::Float) -> Self::Float {
        map(a, b, |a, b| if a < b { a } else { b })
    }

    #[inline(always)]
    fn max(self, a: Self::Float, b: Self::Float) -> Self::Float {
        map(a, b, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    fn max_lane(self, a: Self::Float) -> f32 {
        a.into_iter().fold(f32::NEG_INFINITY, |most, lane| if lane > most { lane } else { most })
    }

    #[inline(always)]
    fn bits(self, from: &[u32; LANES]) -> Self::Bits {
        *from
    }

    #[inline(always)]
    fn widen(self, from: &[u8; LANES]) -> Self::Bits {
        from.map(u32::from)
    }

    #[inline(always)]
    fn splat_bits(self, value: u32) -> Self::Bits {
        [value; LANES]
    }

    #[inline(always)]
    fn float_to_bits(self, value: Self::Float) -> Self::Bits {
        value.map(f32::to_bits)
    }

    #[inline(always)]
    fn bits_to_float(self, value: Self::Bits) -> Self::Float {
        value.map(f32::from_bits)
    }

    #[inline(always)]
    fn add_bits(self, a: Self::Bits, b: Self::Bits) -> Self::Bits {
        map(a, b, u32::wrapping_add)
    }

    #[inline(always)]
    fn and_bits(self, a: Self::Bits, b: Self::Bits) -> Self::Bits {
        map(a, b, |a, b| a & b)
    }

    #[inline(always)]
    fn xor_bits(self, a: Self::Bits, b: Self::Bits) -> Self::Bits {
        map(a, b, |a, b| a ^ b)
    }

    #[inline(always)]
    fn max_bits(self, a: Self::Bits, b: Self::Bits) -> Self::Bits {
        map(a, b, |a, b| if a.cast_signed() > b.cast_signed() { a } else { b })
    }

    #[inline(always)]
    fn shl(self, a: Self::Bits, by: u32) -> Self::Bits {
        a.map(|a| a << by)
    }

    #[inline(always)]
    fn shr(self, a: Self::Bits, by: u32) -> Self::Bits {
        a.map(|a| a >> by)
    }

    #[inline(always)]
    fn to_float(self, numbers: Self::Bits) -> Self::Float {
        numbers.map(|number| number.cast_signed() as f32)
    }

    #[inline(always)]
    fn fp4_codes(self, nibbles: Self::Bits) -> Self::Bits {
        nibbles.map(|word| u32::from_le_bytes(word.to_le_bytes().map(|nibble| FP4_CODES[usize::from(nibble & 15)])))
    }

    #[inline(always)]
    fn dot(self, mut sums: Self::Bits, codes: [Self::Bits; 2], values: [u32; 2]) -> Self::Bits {
        for (codes, value) in codes.iter().zip(values) {
            for (sum, codes) in sums.iter_mut().zip(codes) {
                for (code, value) in codes.to_le_bytes().into_iter().zip(value.to_le_bytes()) {
                    *sum = sum.wrapping_add_signed(i32::from(code) * i32::from(value.cast_signed()));
                }
            }
        }
        sums
    }

    #[inline(always)]
    fn prefetch<T>(self, _from: &T, _bytes: usize) {}
}
