//! Columns of heads, divided and put together.

use rayon::prelude::*;

use super::gemm::{Epilogue, MatrixMut, MatrixRef, Product, gemm_on_this_thread};
use super::simd::{Element, multiversion, with_element};
use crate::device::{Arithmetic, HeadCopy, HeadRows};
use crate::tensor::Tensor;

pub(super) fn copy_heads(source: &Tensor, target: &mut Tensor, copy: &HeadCopy) {
    let (token, out_token) = (token_width(source), token_width(target));
    let HeadCopy { heads, width, from, to } = *copy;
    if width == 0 || source.elements() == 0 || target.elements() == 0 {
        return;
    }
    with_element!(source.dtype(), X => {
        let tokens = source.as_slice::<X>().par_chunks_exact(token).with_min_len(16);
        target.as_mut_slice::<X>().par_chunks_exact_mut(out_token).zip(tokens).for_each(|(out, token)| {
            for head in 0..heads {
                let part = &token[from[0] + head * from[1]..][..width];
                out[to[0] + head * to[1]..][..width].copy_from_slice(part);
            }
        });
    });
}

multiversion! {
    fn sum_token<X: Element>(token: &[X], stride: usize, first: usize, sums: &mut [f32], out: &mut [X]) {
        sums.fill(0.0);
        for head in token.chunks_exact(stride) {
            for (sum, value) in sums.iter_mut().zip(&head[first..]) {
                *sum += value.widen();
            }
        }
        for (value, &sum) in out.iter_mut().zip(sums.iter()) {
            *value = X::narrow(sum);
        }
    }
}

pub(super) fn sum_heads(source: &Tensor, first: usize, target: &mut Tensor) {
    let (token, stride, width) = (token_width(source), source.columns(), target.columns());
    if source.elements() == 0 || target.elements() == 0 {
        return;
    }
    with_element!(source.dtype(), X => {
        let tokens = source.as_slice::<X>().par_chunks_exact(token).with_min_len(16);
        target.as_mut_slice::<X>().par_chunks_exact_mut(width).zip(tokens).for_each_init(
            || vec![0.0; width],
            |sums, (out, token)| sum_token(token, stride, first, sums, out),
        );
    });
}

/// Heads are multiplied side by side, each by one thread.
pub(super) fn head_products(x: &Tensor, rows: &HeadRows<'_>, out: &mut Tensor, adds: bool) {
    let (tokens, heads, width, features) = (x.shape()[0], x.shape()[1], x.columns(), out.columns());
    if out.elements() == 0 {
        return;
    }
    let all = |tensor| MatrixRef::row_major(super::elements(tensor), tensor.rows(), tensor.columns());
    let lefts = MatrixRef::row_major(super::elements(x), tokens, heads * width);
    let (matrix, [first, count]) = (all(rows.matrix), rows.part);
    let mut sums = vec![0.0_f32; out.elements()];
    sums.par_chunks_exact_mut(tokens * features).enumerate().for_each(|(head, sums)| {
        let start = head * rows.rows + first;
        let own = matrix.part(start..start + count, 0..matrix.columns());
        let left = lefts.part(0..tokens, head * width..(head + 1) * width);
        let right = if rows.by_columns { own } else { own.transposed() };
        let target = MatrixMut::row_major(sums, tokens, features);
        gemm_on_this_thread(
            &[Product { left, right }],
            target,
            &Epilogue::default(),
            Arithmetic::of(x.dtype()),
        );
    });
    with_element!(out.dtype(), X => {
        for (index, out) in out.as_mut_slice::<X>().chunks_exact_mut(features).enumerate() {
            let (token, head) = (index / heads, index % heads);
            for (value, sum) in out.iter_mut().zip(&sums[(head * tokens + token) * features..]) {
                *value = X::narrow(if adds { sum + value.widen() } else { *sum });
            }
        }
    });
}

fn token_width(tensor: &Tensor) -> usize {
    tensor.shape()[1..].iter().product()
}
