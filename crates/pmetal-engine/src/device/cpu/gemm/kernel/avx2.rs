use std::arch::x86_64::*;

use super::{Kernel, Left, Right, SimdLevel, Sums};

/// 6 x 16 sums in 12 of the 16 registers: two for the right panel and one for a broadcast of the left remain.
pub(super) struct Avx2;

impl Kernel for Avx2 {
    type Packed = f32;
    const MR: usize = 6;
    const NR: usize = 16;
    const LEVEL: SimdLevel = SimdLevel::Avx2;

    unsafe fn multiply(k: usize, left: Left<f32>, right: Right<f32>, sums: Sums) {
        let is_packed = left.row_stride == 1 && left.k_stride == Self::MR && right.k_stride == Self::NR;
        // SAFETY: as granted by the caller.
        unsafe {
            if is_packed {
                multiply::<true>(k, left, right, sums);
            } else {
                multiply::<false>(k, left, right, sums);
            }
        }
    }
}

/// # Safety
/// As for [`Kernel::multiply`]; the strides are those of packed panels if `PACKED`.
#[target_feature(enable = "avx2,fma")]
unsafe fn multiply<const PACKED: bool>(k: usize, left: Left<f32>, right: Right<f32>, sums: Sums) {
    let (row_stride, left_stride) = if PACKED { (1, 6) } else { (left.row_stride, left.k_stride) };
    let right_stride = if PACKED { 16 } else { right.k_stride };
    let mut tile = [[_mm256_setzero_ps(); 2]; 6];
    let (mut columns, mut rows) = (right.pointer, left.pointer);
    // SAFETY: the caller grants 6 rows and 16 columns at every k, and 6 x 16 elements of the sums.
    unsafe {
        for i in 0..6 {
            // Sums were last touched one block of K ago, so they may have left the nearer caches.
            let row = sums.pointer.add(i * sums.stride);
            _mm_prefetch::<_MM_HINT_T0>(row.cast::<i8>());
            _mm_prefetch::<_MM_HINT_T0>(row.add(15).cast::<i8>());
        }
        for _ in 0..k / 4 {
            for step in 0..4 {
                let (rows, columns) = (rows.add(step * left_stride), columns.add(step * right_stride));
                add_products(&mut tile, rows, row_stride, columns);
            }
            rows = rows.wrapping_add(4 * left_stride);
            columns = columns.wrapping_add(4 * right_stride);
        }
        for _ in 0..k % 4 {
            add_products(&mut tile, rows, row_stride, columns);
            rows = rows.wrapping_add(left_stride);
            columns = columns.wrapping_add(right_stride);
        }
        for (i, row) in tile.iter().enumerate() {
            for (half, &sum) in row.iter().enumerate() {
                let out = sums.pointer.add(i * sums.stride + 8 * half);
                _mm256_storeu_ps(out, if sums.add { _mm256_add_ps(_mm256_loadu_ps(out), sum) } else { sum });
            }
        }
    }
}

/// # Safety
/// 6 rows at the stride and 16 columns may be read.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn add_products(
    tile: &mut [[__m256; 2]; 6],
    rows: *const f32,
    row_stride: usize,
    columns: *const f32,
) {
    // SAFETY: granted by the caller.
    unsafe {
        let right = [_mm256_loadu_ps(columns), _mm256_loadu_ps(columns.add(8))];
        let lower = rows.add(3 * row_stride);
        for (i, row) in tile.iter_mut().enumerate() {
            let base = if i < 3 { rows } else { lower };
            let value = _mm256_broadcast_ss(&*base.add(i % 3 * row_stride));
            row[0] = _mm256_fmadd_ps(value, right[0], row[0]);
            row[1] = _mm256_fmadd_ps(value, right[1], row[1]);
        }
    }
}
