use std::arch::x86_64::*;

use half::bf16;

use super::{Kernel, Left, Right, SimdLevel, Sums};

/// 12 x 32 sums in 24 of the 32 registers.
pub(super) struct Avx512;

/// The same tile by dot products of two bf16, which are packed side by side.
pub(super) struct Avx512Bf16;

type Tile = [[__m512; 2]; 12];

impl Kernel for Avx512 {
    type Packed = f32;
    const MR: usize = 12;
    const NR: usize = 32;
    const LEVEL: SimdLevel = SimdLevel::Avx512;

    unsafe fn multiply(k: usize, left: Left<f32>, right: Right<f32>, sums: Sums) {
        let is_packed = left.row_stride == 1 && left.k_stride == Self::MR && right.k_stride == Self::NR;
        // SAFETY: as granted by the caller.
        unsafe {
            if is_packed {
                multiply_f32::<true>(k, left, right, sums);
            } else {
                multiply_f32::<false>(k, left, right, sums);
            }
        }
    }
}

impl Kernel for Avx512Bf16 {
    type Packed = bf16;
    const MR: usize = 12;
    const NR: usize = 32;
    const LEVEL: SimdLevel = SimdLevel::Avx512Bf16;

    unsafe fn multiply(k: usize, left: Left<bf16>, right: Right<bf16>, sums: Sums) {
        // SAFETY: as granted by the caller; what it holds is always packed, pairs of k side by side.
        unsafe { multiply_bf16(k.div_ceil(2), left.pointer.cast::<i32>(), right.pointer.cast::<i32>(), sums) }
    }
}

/// # Safety
/// As for [`Kernel::multiply`]; the strides are those of packed panels if `PACKED`.
#[target_feature(enable = "avx512f")]
unsafe fn multiply_f32<const PACKED: bool>(k: usize, left: Left<f32>, right: Right<f32>, sums: Sums) {
    let (row_stride, left_stride) = if PACKED { (1, 12) } else { (left.row_stride, left.k_stride) };
    let right_stride = if PACKED { 32 } else { right.k_stride };
    let mut tile: Tile = [[_mm512_setzero_ps(); 2]; 12];
    // SAFETY: the caller grants 12 x 32 elements of the sums.
    unsafe { prefetch(sums) };
    let (mut columns, mut rows) = (right.pointer, left.pointer);
    // SAFETY: the caller grants 12 rows and 32 columns at every k, and 12 x 32 elements of the sums.
    unsafe {
        for _ in 0..k {
            let right = [_mm512_loadu_ps(columns), _mm512_loadu_ps(columns.add(16))];
            let quarters =
                [rows, rows.add(3 * row_stride), rows.add(6 * row_stride), rows.add(9 * row_stride)];
            for (i, row) in tile.iter_mut().enumerate() {
                let value = _mm512_set1_ps(*quarters[i / 3].add(i % 3 * row_stride));
                row[0] = _mm512_fmadd_ps(value, right[0], row[0]);
                row[1] = _mm512_fmadd_ps(value, right[1], row[1]);
            }
            rows = rows.wrapping_add(left_stride);
            columns = columns.wrapping_add(right_stride);
        }
        store(&tile, sums);
    }
}

/// # Safety
/// 12 and 32 pairs of bf16 may be read for each of `pairs`, and 12 x 32 elements of the sums be written.
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn multiply_bf16(pairs: usize, mut rows: *const i32, mut columns: *const i32, sums: Sums) {
    let mut tile: Tile = [[_mm512_setzero_ps(); 2]; 12];
    // SAFETY: the caller grants 12 x 32 elements of the sums.
    unsafe { prefetch(sums) };
    // SAFETY: granted by the caller.
    unsafe {
        for _ in 0..pairs {
            let right_half = [pair(_mm512_loadu_epi32(columns)), pair(_mm512_loadu_epi32(columns.add(16)))];
            for (i, row) in tile.iter_mut().enumerate() {
                let value = pair(_mm512_set1_epi32(*rows.add(i)));
                row[0] = _mm512_dpbf16_ps(row[0], value, right_half[0]);
                row[1] = _mm512_dpbf16_ps(row[1], value, right_half[1]);
            }
            rows = rows.add(12);
            columns = columns.add(32);
        }
        store(&tile, sums);
    }
}

/// Sixteen 32-bit lanes as sixteen pairs of bf16.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn pair(lanes: __m512i) -> __m512bh {
    // SAFETY: both types are 512 bits without invalid patterns.
    unsafe { std::mem::transmute(lanes) }
}

/// Sums were last touched one block of K ago, so they may have left the nearer caches.
///
/// # Safety
/// 12 x 32 elements of the sums may be written.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn prefetch(sums: Sums) {
    for i in 0..12 {
        // SAFETY: granted by the caller.
        unsafe {
            let row = sums.pointer.add(i * sums.stride);
            _mm_prefetch::<_MM_HINT_T0>(row.cast::<i8>());
            _mm_prefetch::<_MM_HINT_T0>(row.add(16).cast::<i8>());
            _mm_prefetch::<_MM_HINT_T0>(row.add(31).cast::<i8>());
        }
    }
}

/// # Safety
/// 12 x 32 elements of the sums may be written, and read if they are added to.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn store(tile: &Tile, sums: Sums) {
    for (i, row) in tile.iter().enumerate() {
        for (half, &sum) in row.iter().enumerate() {
            // SAFETY: granted by the caller.
            unsafe {
                let out = sums.pointer.add(i * sums.stride + 16 * half);
                _mm512_storeu_ps(out, if sums.add { _mm512_add_ps(_mm512_loadu_ps(out), sum) } else { sum });
            }
        }
    }
}
