use std::arch::aarch64::*;

use super::{Kernel, Left, Right, SimdLevel, Sums};

/// 8 x 12 sums in 24 of the 32 registers.
pub(super) struct Neon;

impl Kernel for Neon {
    type Packed = f32;
    const MR: usize = 8;
    const NR: usize = 12;
    const LEVEL: SimdLevel = SimdLevel::Neon;

    unsafe fn multiply(k: usize, left: Left<f32>, right: Right<f32>, sums: Sums) {
        let (mut rows, mut columns) = (left.pointer, right.pointer);
        // SAFETY: Advanced SIMD is part of every aarch64 target that has the standard library; the caller grants 8 rows
        // and 12 columns at every k, and 8 x 12 elements of the sums.
        unsafe {
            let mut tile = [[vdupq_n_f32(0.0); 3]; 8];
            for _ in 0..k {
                let right_third = [vld1q_f32(columns), vld1q_f32(columns.add(4)), vld1q_f32(columns.add(8))];
                for (i, row) in tile.iter_mut().enumerate() {
                    let value = vld1q_dup_f32(rows.add(i * left.row_stride));
                    for (sum, &right) in row.iter_mut().zip(&right_third) {
                        *sum = vfmaq_f32(*sum, right, value);
                    }
                }
                rows = rows.wrapping_add(left.k_stride);
                columns = columns.wrapping_add(right.k_stride);
            }
            for (i, row) in tile.iter().enumerate() {
                for (third, &sum) in row.iter().enumerate() {
                    let out = sums.pointer.add(i * sums.stride + 4 * third);
                    vst1q_f32(out, if sums.add { vaddq_f32(vld1q_f32(out), sum) } else { sum });
                }
            }
        }
    }
}
