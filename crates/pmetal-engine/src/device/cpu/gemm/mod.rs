//! Matrix products on the CPU: packed, blocked and parallel, bit-identical for any number of threads.
//!
//! An output element is the sum over blocks of the concatenated K axis of a chain of fused multiply-adds in
//! the order of k; the blocks depend on K alone, so tiling, threads and instruction set cannot change a bit of an
//! [`Arithmetic::F32`] product. Products of few rows with weights that are contiguous along K (decoding) use a
//! chain per lane of 16 instead, with the same guarantee.

#[cfg(target_arch = "x86_64")]
pub(super) mod amx;
mod blocked;
pub(super) mod buffer;
pub(super) mod convert;
mod epilogue;
pub(super) mod kernel;
mod level;
mod matrix;
pub(super) mod pack;
mod rows;
pub(super) mod tasks;
#[cfg(test)]
mod tests;

use super::simd::level_of_products;
pub use buffer::Workspace;
pub use level::SimdLevel;
pub use matrix::{Elements, ElementsMut, MatrixMut, MatrixRef};

/// One term of the sum that [`gemm`] computes: `left` [M, K_i] times `right` [K_i, N].
#[derive(Clone, Copy, Debug)]
pub struct Product<'a> {
    /// The left factor, [M, K_i].
    pub left: MatrixRef<'a>,
    /// The right factor, [K_i, N].
    pub right: MatrixRef<'a>,
}

/// What happens to the sum of products before it is stored: `scale * sum (+ bias) (+ out)`, in that order.
#[derive(Clone, Copy, Debug)]
pub struct Epilogue<'a> {
    /// Factor of the sum.
    pub scale: f32,
    /// Added to every row, \[N\].
    pub bias: Option<&'a [f32]>,
    /// Whether to add to what the output holds; otherwise it is overwritten unread.
    pub accumulate: bool,
}

impl Default for Epilogue<'_> {
    fn default() -> Self {
        Epilogue { scale: 1.0, bias: None, accumulate: false }
    }
}

/// How the products are formed; sums are in f32 either way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arithmetic {
    /// Operands as f32: identical bits on every processor.
    F32,
    /// Operands may be rounded to bf16, which dot-product instructions take where the processor has them.
    Bf16,
}

/// Writes `scale * sum_i left_i right_i (+ bias) (+ out)` to `out` [M, N], on the current rayon pool.
///
/// The products are summed as one along the concatenated K axis. The result is the same for any number of threads;
/// with [`Arithmetic::F32`] it is also the same on every processor. No products, or K = 0, count as a sum of zero.
/// Workspace: at most 24 MiB for each calling thread, kept for its next call. Shapes that disagree are a bug of the
/// caller and stop the program.
pub fn gemm(products: &[Product<'_>], out: MatrixMut<'_>, epilogue: &Epilogue<'_>, arithmetic: Arithmetic) {
    let threads = rayon::current_num_threads();
    buffer::with_thread_workspace(|workspace| {
        gemm_at(level_of_products(), products, out, epilogue, arithmetic, workspace, threads);
    });
}

/// Does what [`gemm`] does, with the same bits, on the calling thread alone and in a workspace of the caller.
pub fn gemm_serial(
    products: &[Product<'_>],
    out: MatrixMut<'_>,
    epilogue: &Epilogue<'_>,
    arithmetic: Arithmetic,
    workspace: &mut Workspace,
) {
    gemm_at(level_of_products(), products, out, epilogue, arithmetic, workspace, 1);
}

/// Does what [`gemm`] does, with the same bits, on the calling thread alone.
pub(super) fn gemm_on_this_thread(
    products: &[Product<'_>],
    out: MatrixMut<'_>,
    epilogue: &Epilogue<'_>,
    arithmetic: Arithmetic,
) {
    buffer::with_thread_workspace(|workspace| gemm_serial(products, out, epilogue, arithmetic, workspace));
}

fn gemm_at(
    level: SimdLevel,
    products: &[Product<'_>],
    mut out: MatrixMut<'_>,
    epilogue: &Epilogue<'_>,
    arithmetic: Arithmetic,
    workspace: &mut Workspace,
    threads: usize,
) {
    assert!(level.is_available(), "invariant: {level:?} is not available on this processor");
    let (m, n) = (out.rows, out.columns);
    for Product { left, right } in products {
        let (left, right) = ((left.rows, left.columns), (right.rows, right.columns));
        assert!(
            left.0 == m && right.1 == n && left.1 == right.0,
            "invariant: a product of {left:?} by {right:?} does not fit an output of {m} x {n}"
        );
    }
    if let Some(bias) = epilogue.bias {
        assert!(bias.len() == n, "invariant: a bias of {} elements does not fit {n} columns", bias.len());
    }
    if m == 0 || n == 0 {
        return;
    }
    if rows::applies(products, m) {
        rows::run(level, products, &mut out, epilogue, workspace, threads);
    } else {
        kernel::dispatch(level, arithmetic, blocked::Call { products, out, epilogue, workspace, threads });
    }
}
