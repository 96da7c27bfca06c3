//! The innermost tiles: MR x NR sums held in registers over one block of K.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;
mod portable;

use super::Arithmetic;
#[cfg(target_arch = "x86_64")]
use super::amx;
use super::blocked::{Call, run};
use super::convert::Packed;
use super::level::SimdLevel;

/// MR rows of the left operand: row i at k is `pointer[i * row_stride + k * k_stride]`.
///
/// What is packed in groups of k counts a group as one element.
#[derive(Clone, Copy)]
pub(in crate::device::cpu) struct Left<P> {
    pub(in crate::device::cpu) pointer: *const P,
    pub(in crate::device::cpu) row_stride: usize,
    pub(in crate::device::cpu) k_stride: usize,
}

/// NR columns of the right operand: column j at k is `pointer[j + k * k_stride]`.
#[derive(Clone, Copy)]
pub(in crate::device::cpu) struct Right<P> {
    pub(in crate::device::cpu) pointer: *const P,
    pub(in crate::device::cpu) k_stride: usize,
}

/// Where the MR x NR sums go, rows `stride` apart: added to what is there if `add`.
#[derive(Clone, Copy)]
pub(in crate::device::cpu) struct Sums {
    pub(in crate::device::cpu) pointer: *mut f32,
    pub(in crate::device::cpu) stride: usize,
    pub(in crate::device::cpu) add: bool,
}

/// A tile of the output that is summed in registers.
pub(in crate::device::cpu) trait Kernel {
    /// What its panels are packed as.
    type Packed: Packed;
    /// Rows of the tile.
    const MR: usize;
    /// Columns of the tile.
    const NR: usize;
    /// The instructions it needs, which packing may use as well.
    const LEVEL: SimdLevel;

    /// Sums over `k`, in order, and stores.
    ///
    /// # Safety
    /// The processor has the instructions of the level; the operands may be read for `k`, rounded up to the packed
    /// group, and MR rows or NR columns; the sums may be written, and read if they are added to.
    unsafe fn multiply(k: usize, left: Left<Self::Packed>, right: Right<Self::Packed>, sums: Sums);
}

/// Runs the call with the kernel of the level.
pub(in crate::device::cpu::gemm) fn dispatch(level: SimdLevel, arithmetic: Arithmetic, call: Call<'_, '_>) {
    // Without dot products of bf16 the operands are rounded while they are packed and multiplied as f32.
    let round = arithmetic == Arithmetic::Bf16;
    match level {
        #[cfg(target_arch = "x86_64")]
        SimdLevel::Avx512Amx if round => amx::run::<amx::Amx>(call),
        // Wider tiles would be half empty.
        #[cfg(target_arch = "x86_64")]
        SimdLevel::Avx512 | SimdLevel::Avx512Bf16 | SimdLevel::Avx512Amx if call.out.columns <= 16 => {
            run::<avx2::Avx2>(call, round)
        }
        #[cfg(target_arch = "x86_64")]
        SimdLevel::Avx512Bf16 if round && !call.is_thin(12, 32) => run::<avx512::Avx512Bf16>(call, round),
        #[cfg(target_arch = "x86_64")]
        SimdLevel::Avx512 | SimdLevel::Avx512Bf16 | SimdLevel::Avx512Amx => {
            run::<avx512::Avx512>(call, round)
        }
        #[cfg(target_arch = "x86_64")]
        SimdLevel::Avx2 => run::<avx2::Avx2>(call, round),
        #[cfg(target_arch = "aarch64")]
        SimdLevel::Neon => run::<neon::Neon>(call, round),
        _ => run::<portable::Portable>(call, round),
    }
}

/// Work that is compiled for each kernel of f32.
pub(in crate::device::cpu) trait F32Call {
    /// Does the work with the kernel.
    fn run<K: Kernel<Packed = f32>>(self);
}

/// Does the work with the f32 kernel of the level.
pub(in crate::device::cpu) fn dispatch_f32(level: SimdLevel, call: impl F32Call) {
    assert!(level.is_available(), "invariant: {level:?} is not available on this processor");
    match level {
        #[cfg(target_arch = "x86_64")]
        SimdLevel::Avx512 | SimdLevel::Avx512Bf16 | SimdLevel::Avx512Amx => call.run::<avx512::Avx512>(),
        #[cfg(target_arch = "x86_64")]
        SimdLevel::Avx2 => call.run::<avx2::Avx2>(),
        #[cfg(target_arch = "aarch64")]
        SimdLevel::Neon => call.run::<neon::Neon>(),
        _ => call.run::<portable::Portable>(),
    }
}
