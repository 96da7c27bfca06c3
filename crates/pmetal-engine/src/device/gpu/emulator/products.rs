//! Matrix products by three loops.

use half::{bf16, f16};

use crate::DType;
use crate::device::e4m3_value;
use crate::device::gpu::runtime::{Gemm, Matrix, ScaledGemm};

/// Reads one element of device memory.
fn load(address: u64, dtype: DType, index: usize) -> f32 {
    // SAFETY: the caller of the product owns the matrices; the index is within their rows.
    unsafe {
        match dtype {
            DType::Bf16 => (address as *const bf16).add(index).read().to_f32(),
            DType::F16 => (address as *const f16).add(index).read().to_f32(),
            DType::E4m3 => e4m3_value((address as *const u8).add(index).read()),
            _ => (address as *const f32).add(index).read(),
        }
    }
}

fn store(address: u64, dtype: DType, index: usize, value: f32) {
    // SAFETY: as for `load`.
    unsafe {
        match dtype {
            DType::Bf16 => (address as *mut bf16).add(index).write(bf16::from_f32(value)),
            DType::F16 => (address as *mut f16).add(index).write(f16::from_f32(value)),
            _ => (address as *mut f32).add(index).write(value),
        }
    }
}

/// The product as [`Gemm`] states it, summed in f64.
pub(super) fn multiply(gemm: &Gemm) {
    let is_known = gemm.out_dtype == DType::F32 || gemm.out_dtype == gemm.operands;
    assert!(is_known, "no library multiplies {} into {}", gemm.operands, gemm.out_dtype);
    let at = |matrix: &Matrix, row: usize, column: usize| {
        let (row, column) = if matrix.transposed { (column, row) } else { (row, column) };
        f64::from(load(matrix.address, gemm.operands, row * matrix.pitch + column))
    };
    for row in 0..gemm.rows {
        for column in 0..gemm.columns {
            let products = (0..gemm.inner).map(|i| at(&gemm.left, row, i) * at(&gemm.right, i, column));
            let mut sum = f64::from(gemm.scale) * products.sum::<f64>();
            if let Some((address, dtype)) = gemm.bias {
                sum += f64::from(load(address, dtype, column));
            }
            let index = row * gemm.out.pitch + column;
            if gemm.accumulate || gemm.addend.is_some() {
                let held = gemm.addend.unwrap_or(gemm.out.address);
                sum += f64::from(load(held, gemm.out_dtype, index));
            }
            store(gemm.out.address, gemm.out_dtype, index, sum as f32);
        }
    }
}

/// The product as [`ScaledGemm`] states it, summed in f64.
pub(super) fn multiply_scaled(gemm: &ScaledGemm) {
    let at = |address, index| f64::from(load(address, DType::E4m3, index));
    for row in 0..gemm.rows {
        for column in 0..gemm.columns {
            let products = (0..gemm.inner)
                .map(|i| at(gemm.left, row * gemm.inner + i) * at(gemm.right, column * gemm.inner + i));
            let factor = gemm.scales.map_or(1.0, |[left, right]| {
                f64::from(load(left, DType::F32, row)) * f64::from(load(right, DType::F32, column))
            });
            let index = row * gemm.out.pitch + column;
            let added = gemm.addend.map_or(0.0, |addend| f64::from(load(addend, gemm.out_dtype, index)));
            let sum = factor * products.sum::<f64>() + added;
            store(gemm.out.address, gemm.out_dtype, index, sum as f32);
        }
    }
}
