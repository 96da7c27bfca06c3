use std::arch::x86_64::*;

use super::Panel;
use crate::device::cpu::gemm::convert::{Element, Packed, rounded_bits};
use crate::device::cpu::gemm::matrix::MatrixRef;

/// Packs the columns of `part` that make up whole blocks of 8 and says how many those are.
///
/// # Safety
/// The processor has AVX2, FMA and F16C.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn pack_part<E: Element, P: Packed>(
    values: &[E],
    part: MatrixRef<'_>,
    panel: &mut Panel<'_, P>,
    at: usize,
) -> usize {
    let by_lane = part.row_stride == 1;
    if !(by_lane || part.column_stride == 1) || !at.is_multiple_of(P::GROUP) {
        return 0;
    }
    let width = panel.width;
    let round = panel.round;
    for k in (0..part.columns / 8 * 8).step_by(8) {
        for lane in (0..width).step_by(8) {
            let stored = 8.min(width - lane);
            let valid = part.rows.saturating_sub(lane).min(stored);
            let first = part.offset + lane * part.row_stride + k * part.column_stride;
            let mut block = [_mm256_setzero_ps(); 8];
            if by_lane {
                for (i, vector) in block.iter_mut().enumerate() {
                    let from = first + i * part.column_stride;
                    // Lanes beyond the panel may be read where there are any: they are not stored.
                    *vector = match values.get(from..from + 8) {
                        Some(values) if valid == stored => load(values),
                        _ => load_some(values, from, valid),
                    };
                }
            } else {
                for (i, vector) in block.iter_mut().enumerate().take(valid) {
                    let from = first + i * part.row_stride;
                    *vector = load(&values[from..from + 8]);
                }
                block = transpose(block);
            }
            if round || P::GROUP == 2 {
                for vector in &mut block {
                    *vector = _mm256_castsi256_ps(rounded_bits(*vector));
                }
            }
            let to = (at + k) / P::GROUP * width * P::GROUP + lane * P::GROUP;
            let packed = &mut panel.packed[to..];
            if P::GROUP == 1 {
                for (i, &vector) in block.iter().enumerate() {
                    store(vector, &mut packed[i * width..][..stored]);
                }
            } else {
                for i in 0..4 {
                    let pair = pair(block[2 * i], block[2 * i + 1]);
                    store(pair, &mut packed[i * width * 2..][..2 * stored]);
                }
            }
        }
    }
    part.columns / 8 * 8
}

/// Eight values.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn load<E: Element>(values: &[E]) -> __m256 {
    assert!(values.len() == 8, "invariant: a vector has eight lanes");
    // SAFETY: there are eight values.
    unsafe { E::load(values.as_ptr()) }
}

/// The first `valid` values, then zeros.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn load_some<E: Element>(values: &[E], from: usize, valid: usize) -> __m256 {
    let mut lanes = [0.0f32; 8];
    for (lane, value) in lanes.iter_mut().zip(&values[from.min(values.len())..]).take(valid) {
        *lane = value.widen();
    }
    // SAFETY: there are eight lanes.
    unsafe { _mm256_loadu_ps(lanes.as_ptr()) }
}

/// Stores the first lanes, as many as `out` holds of 32 bits, at most 8.
#[inline]
#[target_feature(enable = "avx2")]
fn store<P: Packed>(vector: __m256, out: &mut [P]) {
    let lanes = size_of_val(out) / 4;
    let pointer = out.as_mut_ptr().cast::<f32>();
    // SAFETY: `out` holds that many lanes; the stores need no alignment.
    unsafe {
        match lanes {
            8.. => _mm256_storeu_ps(pointer, vector),
            4 => _mm_storeu_ps(pointer, _mm256_castps256_ps128(vector)),
            6 => {
                let upper = _mm_castps_si128(_mm256_extractf128_ps::<1>(vector));
                _mm_storeu_ps(pointer, _mm256_castps256_ps128(vector));
                _mm_storel_epi64(pointer.add(4).cast::<__m128i>(), upper);
            }
            _ => {
                let values = std::mem::transmute::<__m256, [f32; 8]>(vector);
                std::ptr::copy_nonoverlapping(values.as_ptr(), pointer, lanes);
            }
        }
    }
}

/// Rounded values of two consecutive k as pairs of bf16, the lower k in the lower half.
#[inline]
#[target_feature(enable = "avx2")]
fn pair(low: __m256, high: __m256) -> __m256 {
    let low = _mm256_srli_epi32::<16>(_mm256_castps_si256(low));
    _mm256_castsi256_ps(_mm256_or_si256(low, _mm256_castps_si256(high)))
}

/// Exchanges rows and columns of 8 x 8.
#[inline]
#[target_feature(enable = "avx2")]
fn transpose(rows: [__m256; 8]) -> [__m256; 8] {
    let [a, b, c, d, e, f, g, h] = rows;
    let pairs = [
        (_mm256_unpacklo_ps(a, b), _mm256_unpacklo_ps(c, d)),
        (_mm256_unpackhi_ps(a, b), _mm256_unpackhi_ps(c, d)),
        (_mm256_unpacklo_ps(e, f), _mm256_unpacklo_ps(g, h)),
        (_mm256_unpackhi_ps(e, f), _mm256_unpackhi_ps(g, h)),
    ];
    let [upper_low, upper_high, lower_low, lower_high] = pairs
        .map(|(x, y)| (_mm256_shuffle_ps::<0b01_00_01_00>(x, y), _mm256_shuffle_ps::<0b11_10_11_10>(x, y)));
    let upper = [upper_low.0, upper_low.1, upper_high.0, upper_high.1];
    let lower = [lower_low.0, lower_low.1, lower_high.0, lower_high.1];
    let mut columns = [_mm256_setzero_ps(); 8];
    for i in 0..4 {
        columns[i] = _mm256_permute2f128_ps::<0x20>(upper[i], lower[i]);
        columns[i + 4] = _mm256_permute2f128_ps::<0x31>(upper[i], lower[i]);
    }
    columns
}
