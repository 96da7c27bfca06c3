use super::{Kernel, Left, Right, SimdLevel, Sums};

/// The kernel without intrinsics.
pub(super) struct Portable;

impl Kernel for Portable {
    type Packed = f32;
    const MR: usize = 4;
    const NR: usize = 16;
    const LEVEL: SimdLevel = SimdLevel::Portable;

    unsafe fn multiply(k: usize, left: Left<f32>, right: Right<f32>, sums: Sums) {
        let mut tile = [[0.0f32; Self::NR]; Self::MR];
        for k in 0..k {
            for (i, row) in tile.iter_mut().enumerate() {
                // SAFETY: the caller grants MR rows and NR columns at every k.
                unsafe {
                    let left = *left.pointer.add(i * left.row_stride + k * left.k_stride);
                    let right = right.pointer.add(k * right.k_stride);
                    for (j, sum) in row.iter_mut().enumerate() {
                        *sum = left.mul_add(*right.add(j), *sum);
                    }
                }
            }
        }
        for (i, row) in tile.iter().enumerate() {
            for (j, &sum) in row.iter().enumerate() {
                // SAFETY: the caller grants MR x NR elements at this stride.
                unsafe {
                    let out = sums.pointer.add(i * sums.stride + j);
                    *out = if sums.add { *out + sum } else { sum };
                }
            }
        }
    }
}
