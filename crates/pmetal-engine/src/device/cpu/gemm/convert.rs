#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

use half::{bf16, f16};

/// What a matrix is stored as.
pub(in crate::device::cpu) trait Element: Copy + Send + Sync {
    /// The value, exactly.
    fn widen(self) -> f32;

    /// Eight values, exactly.
    ///
    /// # Safety
    /// The processor has AVX2 and F16C; eight values may be read.
    #[cfg(target_arch = "x86_64")]
    unsafe fn load(values: *const Self) -> __m256;

    /// Sixteen consecutive values as pairs of bf16.
    ///
    /// # Safety
    /// The processor has AVX2 and F16C; sixteen values may be read.
    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn pairs_along(values: *const Self) -> __m256i {
        // SAFETY: granted by the caller.
        unsafe { narrowed(Self::load(values), Self::load(values.add(8))) }
    }

    /// Eight pairs of bf16, of which `low` and `high` hold a half each.
    ///
    /// # Safety
    /// The processor has AVX2 and F16C; eight values of each may be read.
    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn pairs_across(low: *const Self, high: *const Self) -> __m256i {
        // SAFETY: granted by the caller.
        let (low, high) = unsafe { (Self::load(low), Self::load(high)) };
        _mm256_or_si256(_mm256_srli_epi32::<16>(rounded_bits(low)), rounded_bits(high))
    }
}

/// Sixteen values rounded to bf16, in order.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn narrowed(low: __m256, high: __m256) -> __m256i {
    let low = _mm256_srli_epi32::<16>(rounded_bits(low));
    let high = _mm256_srli_epi32::<16>(rounded_bits(high));
    // Packing works within halves.
    _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packus_epi32(low, high))
}

/// Sixteen values rounded to bf16, in order.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) fn narrowed_avx512(values: __m512) -> __m256i {
    let bits = _mm512_castps_si512(values);
    let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
    let rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    let quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x0040_0000));
    let is_nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(values, values);
    let chosen = _mm512_mask_blend_epi32(is_nan, rounded, quiet);
    _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(chosen))
}

/// Values rounded to bf16, ties to even, in the upper half of each lane and zeros in the lower; NaN stays NaN.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn rounded_bits(values: __m256) -> __m256i {
    let bits = _mm256_castps_si256(values);
    let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
    let rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x0040_0000));
    let is_nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(values, values));
    let chosen = _mm256_blendv_epi8(rounded, quiet, is_nan);
    _mm256_and_si256(chosen, _mm256_set1_epi32(0xffff_0000_u32 as i32))
}

impl Element for f32 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn load(values: *const Self) -> __m256 {
        // SAFETY: granted by the caller.
        unsafe { _mm256_loadu_ps(values) }
    }
}

impl Element for bf16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn load(values: *const Self) -> __m256 {
        // SAFETY: granted by the caller.
        unsafe {
            {
                let bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(values.cast()));
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits))
            }
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn pairs_along(values: *const Self) -> __m256i {
        // SAFETY: granted by the caller.
        unsafe { _mm256_loadu_si256(values.cast()) }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn pairs_across(low: *const Self, high: *const Self) -> __m256i {
        // SAFETY: granted by the caller.
        let (low, high) = unsafe { (_mm_loadu_si128(low.cast()), _mm_loadu_si128(high.cast())) };
        _mm256_or_si256(_mm256_cvtepu16_epi32(low), _mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(high)))
    }
}

impl Element for f16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self.to_f32()
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn load(values: *const Self) -> __m256 {
        // SAFETY: granted by the caller.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(values.cast())) }
    }
}

/// Rounds to nearest, ties to even, without a branch so that loops over it vectorise; NaN stays NaN.
#[inline(always)]
pub(in crate::device::cpu) fn round_to_bf16(value: f32) -> bf16 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    let quiet = (bits >> 16) | 0x40;
    bf16::from_bits(if value.is_nan() { quiet as u16 } else { rounded as u16 })
}

/// What a panel is packed as.
pub(in crate::device::cpu) trait Packed: bytemuck::Pod + Send + Sync {
    /// Consecutive k of one lane that lie side by side.
    const GROUP: usize;
    fn pack(value: f32) -> Self;
}

impl Packed for f32 {
    const GROUP: usize = 1;
    #[inline(always)]
    fn pack(value: f32) -> Self {
        value
    }
}

impl Packed for bf16 {
    const GROUP: usize = 2;
    #[inline(always)]
    fn pack(value: f32) -> Self {
        round_to_bf16(value)
    }
}
