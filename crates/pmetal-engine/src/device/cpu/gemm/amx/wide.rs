//! Packing of whole panels with AVX-512, which processors with a matrix unit have.

use std::arch::x86_64::*;

use half::bf16;

use super::super::convert::narrowed_avx512;
use super::super::matrix::{Elements, MatrixRef};
use super::pack::{Order, STEP_PAIRS};
use super::tiles::{SIDE, STEP};

/// Packs the first steps of `part` [lanes, k] as far as they are whole and stored in a way that is treated here, and
/// returns how many it packed.
pub(super) fn pack_steps(part: MatrixRef<'_>, order: Order, out: &mut [u32]) -> usize {
    let steps = part.columns / STEP;
    let has_features = std::arch::is_x86_feature_detected!("avx512bw")
        && std::arch::is_x86_feature_detected!("avx512vl")
        && std::arch::is_x86_feature_detected!("avx512f");
    if part.rows != SIDE || steps == 0 || !has_features {
        return 0;
    }
    let out = &mut out[..steps * STEP_PAIRS];
    let reach = (SIDE - 1) * part.row_stride + (steps * STEP - 1) * part.column_stride + 1;
    let (rows, columns) = (part.row_stride, part.column_stride);
    for (step, out) in out.chunks_exact_mut(STEP_PAIRS).enumerate() {
        let at = step * STEP * columns;
        // SAFETY: the features were detected; the slices show that the panel lies within the matrix, and `out` is a step.
        unsafe {
            match (part.elements, order) {
                (Elements::Bf16(values), Order::Lanes) if columns == 1 => {
                    lanes_of_bf16(values[part.offset..][..reach][at..].as_ptr(), rows, out);
                }
                (Elements::F32(values), Order::Lanes) if columns == 1 => {
                    lanes_of_f32(values[part.offset..][..reach][at..].as_ptr(), rows, out);
                }
                (Elements::Bf16(values), Order::Pairs) if columns == 1 => {
                    pairs_along(values[part.offset..][..reach][at..].as_ptr(), rows, out);
                }
                (Elements::Bf16(values), Order::Pairs) if rows == 1 => {
                    pairs_across(values[part.offset..][..reach][at..].as_ptr(), columns, out);
                }
                _ => return 0,
            }
        }
    }
    steps
}

/// # Safety
/// The processor has the features; 32 rows of 32 values, `stride` apart, may be read.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn lanes_of_bf16(values: *const bf16, stride: usize, out: &mut [u32]) {
    for (lane, out) in out[..STEP_PAIRS].chunks_exact_mut(STEP / 2).enumerate() {
        // SAFETY: granted by the caller; `out` is sixteen pairs.
        unsafe {
            _mm512_storeu_si512(out.as_mut_ptr().cast(), _mm512_loadu_si512(values.add(lane * stride).cast()))
        };
    }
}

/// # Safety
/// As for [`lanes_of_bf16`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn lanes_of_f32(values: *const f32, stride: usize, out: &mut [u32]) {
    for (lane, out) in out[..STEP_PAIRS].chunks_exact_mut(STEP / 2).enumerate() {
        // SAFETY: granted by the caller; `out` is sixteen pairs.
        unsafe {
            let row = values.add(lane * stride);
            let out = out.as_mut_ptr().cast::<__m256i>();
            _mm256_storeu_si256(out, narrowed_avx512(_mm512_loadu_ps(row)));
            _mm256_storeu_si256(out.add(1), narrowed_avx512(_mm512_loadu_ps(row.add(16))));
        }
    }
}

/// # Safety
/// As for [`lanes_of_bf16`], the rows being those of k.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn pairs_across(values: *const bf16, stride: usize, out: &mut [u32]) {
    for (pair, out) in out[..STEP_PAIRS].chunks_exact_mut(SIDE).enumerate() {
        // SAFETY: granted by the caller; `out` is 32 pairs; a prefetch reads nothing.
        unsafe {
            let low = values.add(2 * pair * stride);
            let high = low.add(stride);
            _mm_prefetch::<_MM_HINT_T0>(low.wrapping_add(STEP * stride).cast());
            _mm_prefetch::<_MM_HINT_T0>(high.wrapping_add(STEP * stride).cast());
            for half in [0, 16] {
                let low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(low.add(half).cast()));
                let high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(high.add(half).cast()));
                let both = _mm512_or_si512(low, _mm512_slli_epi32::<16>(high));
                _mm512_storeu_si512(out.as_mut_ptr().add(half).cast(), both);
            }
        }
    }
}

/// # Safety
/// As for [`lanes_of_bf16`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn pairs_along(values: *const bf16, stride: usize, out: &mut [u32]) {
    let out = &mut out[..STEP_PAIRS];
    for half in [0, 16] {
        let mut rows = [_mm512_setzero_si512(); 16];
        for (lane, row) in rows.iter_mut().enumerate() {
            // SAFETY: granted by the caller.
            *row = unsafe { _mm512_loadu_si512(values.add((half + lane) * stride).cast()) };
        }
        for (pair, &column) in transpose(rows).iter().enumerate() {
            // SAFETY: 16 pairs of 32 lanes each.
            unsafe { _mm512_storeu_si512(out.as_mut_ptr().add(pair * SIDE + half).cast(), column) };
        }
    }
}

/// Exchanges rows and columns of 16 x 16.
#[inline]
#[target_feature(enable = "avx512f")]
fn transpose(rows: [__m512i; 16]) -> [__m512i; 16] {
    // By fours of rows: quarter l of groups[g][c] holds rows 4g to 4g + 3 of column 4l + c.
    let mut groups = [[_mm512_setzero_si512(); 4]; 4];
    for (group, rows) in groups.iter_mut().zip(rows.as_chunks::<4>().0) {
        let [a, b, c, d] = *rows;
        let (ab_low, ab_high) = (_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
        let (cd_low, cd_high) = (_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
        *group = [
            _mm512_unpacklo_epi64(ab_low, cd_low),
            _mm512_unpackhi_epi64(ab_low, cd_low),
            _mm512_unpacklo_epi64(ab_high, cd_high),
            _mm512_unpackhi_epi64(ab_high, cd_high),
        ];
    }
    let mut columns = [_mm512_setzero_si512(); 16];
    for c in 0..4 {
        let [g0, g1, g2, g3] = groups.map(|group| group[c]);
        let (low_01, high_01) = (_mm512_shuffle_i32x4::<0x44>(g0, g1), _mm512_shuffle_i32x4::<0xEE>(g0, g1));
        let (low_23, high_23) = (_mm512_shuffle_i32x4::<0x44>(g2, g3), _mm512_shuffle_i32x4::<0xEE>(g2, g3));
        columns[c] = _mm512_shuffle_i32x4::<0x88>(low_01, low_23);
        columns[4 + c] = _mm512_shuffle_i32x4::<0xDD>(low_01, low_23);
        columns[8 + c] = _mm512_shuffle_i32x4::<0x88>(high_01, high_23);
        columns[12 + c] = _mm512_shuffle_i32x4::<0xDD>(high_01, high_23);
    }
    columns
}
