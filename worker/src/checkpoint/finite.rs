//! Whether a tensor's bytes are numbers: one NaN among the weights would make every answer one.

use phalanx_proto::checkpoint::Dtype;

/// Bits of an exponent that is all ones, by which a value is infinite or not a number.
const BF16_EXPONENT: u16 = 0x7F80;
const F16_EXPONENT: u16 = 0x7C00;
const F32_EXPONENT: u32 = 0x7F80_0000;
/// The one scale of MXFP4 (E8M0) that is not a number.
const SCALE_NAN: u8 = 0xFF;

/// What a tensor's bytes stand for.
#[derive(Clone, Copy, Debug)]
pub(super) enum Values {
    Bf16,
    F16,
    F32,
    /// MXFP4 scales.
    Scales,
    /// MXFP4 pairs, each of which is two numbers.
    Pairs,
}

impl Values {
    pub(super) fn of(dtype: Dtype, name: &str) -> Self {
        match dtype {
            Dtype::BF16 => Self::Bf16,
            Dtype::F16 => Self::F16,
            Dtype::F32 => Self::F32,
            Dtype::U8 if name.ends_with("_scales") => Self::Scales,
            Dtype::U8 => Self::Pairs,
        }
    }

    /// Offset of the first value that is infinite or not a number.
    pub(super) fn first_not_finite(self, bytes: &[u8]) -> Option<usize> {
        match self {
            Self::Bf16 => first(bytes, |value| u16::from_le_bytes(value) & BF16_EXPONENT, BF16_EXPONENT),
            Self::F16 => first(bytes, |value| u16::from_le_bytes(value) & F16_EXPONENT, F16_EXPONENT),
            Self::F32 => first(bytes, |value| u32::from_le_bytes(value) & F32_EXPONENT, F32_EXPONENT),
            Self::Scales => first(bytes, |[scale]| scale, SCALE_NAN),
            Self::Pairs => None,
        }
    }
}

/// Offset of the first value whose `key` is `worst`, the greatest there can be. The greatest of a whole span is found
/// without a branch, at the speed of memory; only a span with a bad value is looked through.
fn first<const N: usize, K: Ord + Default>(bytes: &[u8], key: impl Fn([u8; N]) -> K, worst: K) -> Option<usize> {
    let values = bytes.as_chunks::<N>().0;
    let greatest = values.iter().fold(K::default(), |greatest, value| greatest.max(key(*value)));
    if greatest < worst {
        return None;
    }
    values.iter().position(|value| key(*value) == worst).map(|at| at * N)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_bad_value_is_found_in_every_type() {
        let bf16 = [0x3F80_u16, 0x7F7F, 0xFF80, 0x7FC0].map(u16::to_le_bytes).concat();
        assert_eq!(Values::Bf16.first_not_finite(&bf16), Some(4));
        let f16 = [0x7BFF_u16, 0x7C01].map(u16::to_le_bytes).concat();
        assert_eq!(Values::F16.first_not_finite(&f16), Some(2));
        let f32s = [f32::MAX, f32::MIN_POSITIVE, f32::NEG_INFINITY].map(f32::to_le_bytes).concat();
        assert_eq!(Values::F32.first_not_finite(&f32s), Some(8));
        assert_eq!(Values::of(Dtype::U8, "x.down_proj_scales").first_not_finite(&[0, 254, 255]), Some(2));
        assert_eq!(Values::of(Dtype::U8, "x.down_proj_blocks").first_not_finite(&[255]), None);
        assert_eq!(Values::Bf16.first_not_finite(&bf16[..4]), None);
    }
}
