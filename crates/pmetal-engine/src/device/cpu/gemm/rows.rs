//! Products of few rows with weights that are contiguous along K, as decoding needs: the weights are read once, where
//! they are, about as fast as memory delivers them.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{__m256, _MM_HINT_T0, _mm_prefetch};

use super::buffer::Workspace;
use super::convert::Element;
use super::epilogue::Output;
use super::level::SimdLevel;
use super::matrix::{Elements, MatrixMut, MatrixRef};
use super::tasks::for_each_index;
use super::{Epilogue, Product};
use crate::device::cpu::simd::{LANES, tree_sum};

/// Most rows; beyond, packing the weights pays.
const MAX_ROWS: usize = 8;
/// Output columns of a task.
const COLUMNS: usize = 32;
/// Multiply-adds below which waking other threads costs more than it gains.
const SERIAL_WORK: usize = 1 << 16;

/// How far ahead weights are asked for: rows follow each other in memory, so this is rarely in vain.
#[cfg(target_arch = "x86_64")]
const PREFETCH_BYTES: usize = 1024;

/// The chains of `M` rows times `N` columns.
type Sums<const M: usize, const N: usize> = [[[f32; LANES]; N]; M];

/// Whether this is the way to compute these products of `m` rows.
pub(super) fn applies(products: &[Product<'_>], m: usize) -> bool {
    let is_contiguous = |right: &MatrixRef<'_>| right.row_stride == 1 || right.rows <= 1;
    m <= MAX_ROWS && products.iter().all(|product| is_contiguous(&product.right))
}

pub(super) fn run(
    level: SimdLevel,
    products: &[Product<'_>],
    out: &mut MatrixMut<'_>,
    epilogue: &Epilogue<'_>,
    workspace: &mut Workspace,
    threads: usize,
) {
    let (m, n) = (out.rows, out.columns);
    let stride = products.iter().map(|product| product.left.columns.next_multiple_of(LANES)).sum::<usize>();
    let left = workspace.left.elements::<f32>(m * stride);
    widen_rows(products, left, stride);
    let strip = Strip { level, products, left, stride };
    let output = Output::new(level, out, epilogue);
    let threads = if m * n * stride < SERIAL_WORK { 1 } else { threads };
    for_each_index(n.div_ceil(COLUMNS), threads, |next| {
        while let Some(index) = next.take() {
            let columns = index * COLUMNS..n.min((index + 1) * COLUMNS);
            let mut values = [[0.0f32; COLUMNS]; MAX_ROWS];
            for row in (0..m).step_by(4) {
                let values = &mut values[row..];
                match m - row {
                    1 => strip.columns::<1, 4>(row, columns.clone(), values),
                    2 => strip.columns::<2, 2>(row, columns.clone(), values),
                    3 => strip.columns::<3, 1>(row, columns.clone(), values),
                    _ => strip.columns::<4, 1>(row, columns.clone(), values),
                }
            }
            for (row, values) in values.iter_mut().enumerate().take(m) {
                // SAFETY: the columns lie within the output and belong to this task.
                unsafe { output.finish_values(row, columns.start, &mut values[..columns.len()]) };
            }
        }
    });
}

/// Copies the left operands side by side, each padded with zeros to whole lanes.
fn widen_rows(products: &[Product<'_>], out: &mut [f32], stride: usize) {
    if stride == 0 {
        return;
    }
    for (row, out) in out.chunks_exact_mut(stride).enumerate() {
        let mut start = 0;
        for Product { left, .. } in products {
            let end = start + left.columns.next_multiple_of(LANES);
            let (values, padding) = out[start..end].split_at_mut(left.columns);
            match left.elements {
                Elements::F32(elements) => widen_row(elements, left, row, values),
                Elements::Bf16(elements) => widen_row(elements, left, row, values),
                Elements::F16(elements) => widen_row(elements, left, row, values),
            }
            padding.fill(0.0);
            start = end;
        }
    }
}

fn widen_row<E: Element>(elements: &[E], matrix: &MatrixRef<'_>, row: usize, out: &mut [f32]) {
    for (k, out) in out.iter_mut().enumerate() {
        *out = elements[matrix.offset + row * matrix.row_stride + k * matrix.column_stride].widen();
    }
}

/// The rows of the left operands, and what they are multiplied with.
struct Strip<'a, 'b> {
    level: SimdLevel,
    products: &'a [Product<'b>],
    left: &'a [f32],
    stride: usize,
}

impl Strip<'_, '_> {
    /// Computes `M` rows from `row` on of the columns, `N` columns at a time; column i goes to `out[..][i]`.
    fn columns<const M: usize, const N: usize>(
        &self,
        row: usize,
        columns: std::ops::Range<usize>,
        out: &mut [[f32; COLUMNS]],
    ) {
        let mut column = columns.start;
        while column < columns.end {
            let at = column - columns.start;
            if columns.end - column >= N {
                self.dots::<M, N>(row, column, at, out);
                column += N;
            } else {
                self.dots::<M, 1>(row, column, at, out);
                column += 1;
            }
        }
    }

    fn dots<const M: usize, const N: usize>(
        &self,
        row: usize,
        column: usize,
        at: usize,
        out: &mut [[f32; COLUMNS]],
    ) {
        let mut sums = [[[0.0f32; LANES]; N]; M];
        let mut start = 0;
        for Product { right, .. } in self.products {
            if right.rows == 0 {
                continue;
            }
            let left: [&[f32]; M] = std::array::from_fn(|i| &self.left[(row + i) * self.stride + start..]);
            let first = right.offset + column * right.column_stride;
            match right.elements {
                Elements::F32(values) => add(self.level, left, &values[first..], right, &mut sums),
                Elements::Bf16(values) => add(self.level, left, &values[first..], right, &mut sums),
                Elements::F16(values) => add(self.level, left, &values[first..], right, &mut sums),
            }
            start += right.rows.next_multiple_of(LANES);
        }
        for (sums, out) in sums.iter().zip(out) {
            for (i, sums) in sums.iter().enumerate() {
                out[at + i] = tree_sum(*sums);
            }
        }
    }
}

/// Adds the products of `M` rows with the `N` columns from the start of `values` on.
fn add<E: Element, const M: usize, const N: usize>(
    level: SimdLevel,
    left: [&[f32]; M],
    values: &[E],
    right: &MatrixRef<'_>,
    sums: &mut Sums<M, N>,
) {
    let columns: [&[E]; N] = std::array::from_fn(|i| &values[i * right.column_stride..][..right.rows]);
    match level {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the level is only chosen where the processor has it.
        SimdLevel::Avx2 => unsafe { add_avx2(left, columns, sums) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        SimdLevel::Avx512 | SimdLevel::Avx512Bf16 | SimdLevel::Avx512Amx => unsafe {
            add_avx512(left, columns, sums)
        },
        _ => add_lanes(left, columns, sums, |values| values.map(E::widen)),
    }
}

/// # Safety
/// The processor has AVX2 and F16C.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx2,f16c")]
unsafe fn widen_avx2<E: Element>(values: &[E; LANES]) -> [f32; LANES] {
    // SAFETY: both halves of the sixteen values may be read; any bits are floats. A prefetch reads nothing.
    unsafe {
        _mm_prefetch::<_MM_HINT_T0>(values.as_ptr().cast::<i8>().wrapping_add(PREFETCH_BYTES));
        let halves = [E::load(values.as_ptr()), E::load(values.as_ptr().add(8))];
        std::mem::transmute::<[__m256; 2], [f32; LANES]>(halves)
    }
}

/// # Safety
/// The processor has AVX2, FMA and F16C.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn add_avx2<E: Element, const M: usize, const N: usize>(
    left: [&[f32]; M],
    columns: [&[E]; N],
    sums: &mut Sums<M, N>,
) {
    // SAFETY: granted by the caller.
    add_lanes(left, columns, sums, |values| unsafe { widen_avx2(values) });
}

/// # Safety
/// The processor has AVX-512 F, BW, DQ and VL besides AVX2, FMA and F16C.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn add_avx512<E: Element, const M: usize, const N: usize>(
    left: [&[f32]; M],
    columns: [&[E]; N],
    sums: &mut Sums<M, N>,
) {
    // SAFETY: granted by the caller.
    add_lanes(left, columns, sums, |values| unsafe { widen_avx2(values) });
}

/// The arithmetic of all levels; the compiler turns its loops over lanes into their vectors.
#[inline(always)]
fn add_lanes<E: Element, const M: usize, const N: usize>(
    left: [&[f32]; M],
    columns: [&[E]; N],
    sums: &mut Sums<M, N>,
    widen: impl Fn(&[E; LANES]) -> [f32; LANES],
) {
    let k = columns[0].len();
    let mut chains = *sums;
    let whole = k / LANES * LANES;
    for start in (0..whole).step_by(LANES) {
        let mut vectors = [[0.0; LANES]; N];
        for (vector, column) in vectors.iter_mut().zip(&columns) {
            if let Some(values) = column[start..].first_chunk() {
                *vector = widen(values);
            }
        }
        multiply_add(&mut chains, &left, start, &vectors);
    }
    if whole < k {
        let mut vectors = [[0.0; LANES]; N];
        for (vector, column) in vectors.iter_mut().zip(&columns) {
            for (lane, value) in vector.iter_mut().zip(&column[whole..]) {
                *lane = value.widen();
            }
        }
        multiply_add(&mut chains, &left, whole, &vectors);
    }
    *sums = chains;
}

#[inline(always)]
fn multiply_add<const M: usize, const N: usize>(
    chains: &mut Sums<M, N>,
    left: &[&[f32]; M],
    start: usize,
    columns: &[[f32; LANES]; N],
) {
    for (chains, left) in chains.iter_mut().zip(left) {
        let left = &left[start..start + LANES];
        for (chains, column) in chains.iter_mut().zip(columns) {
            for lane in 0..LANES {
                chains[lane] = left[lane].mul_add(column[lane], chains[lane]);
            }
        }
    }
}
