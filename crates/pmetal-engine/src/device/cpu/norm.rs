//! RMSNorm on the CPU, forward and backward.

use rayon::prelude::*;

use super::simd::{Element, LANES, lane_sum, multiversion, with_element};
use crate::device::{Held, NormWeight};
use crate::tensor::Tensor;

/// Rows that one task takes; also the unit in which weight gradients are summed, so it is fixed.
const ROWS_A_TASK: usize = 64;

#[inline(always)]
fn inverse_rms<X: Element>(x: &[X], epsilon: f32) -> f32 {
    let squares = lane_sum((x, x, x), |x, _, _, sum| x.widen().mul_add(x.widen(), sum));
    1.0 / (squares / x.len() as f32 + epsilon).sqrt()
}

multiversion! {
    fn forward_rows<X: Element>(x: &[X], weight: &[f32], epsilon: f32, out: &mut [X]) {
        let width = weight.len();
        for (input, output) in x.chunks_exact(width).zip(out.chunks_exact_mut(width)) {
            let inverse = inverse_rms(input, epsilon);
            for ((value, &source), &factor) in output.iter_mut().zip(input).zip(weight) {
                *value = X::narrow(source.widen() * inverse * factor);
            }
        }
    }
}

/// With r = 1 / rms: dx = r (w dy - x r^2 mean(x w dy)).
#[inline(always)]
fn backward_row<X: Element>(input: &[X], d_out: &[X], weight: &[f32], epsilon: f32) -> (f32, f32) {
    let width = weight.len();
    let inverse = inverse_rms(input, epsilon);
    let product = lane_sum((input, weight, d_out), |x, w, d, sum| (x.widen() * w).mul_add(d.widen(), sum));
    (inverse, inverse * inverse * inverse * (product / width as f32))
}

multiversion! {
    fn backward_rows<X: Element>(x: &[X], weight: &[f32], epsilon: f32, d_out: &[X], d_x: &mut [X], accumulate: bool) {
        let width = weight.len();
        for ((input, gradient), output) in
            x.chunks_exact(width).zip(d_out.chunks_exact(width)).zip(d_x.chunks_exact_mut(width))
        {
            let (inverse, slope) = backward_row(input, gradient, weight, epsilon);
            let columns = output.iter_mut().zip(input).zip(gradient).zip(weight);
            let own = |x: X, d: X, w: f32| (d.widen() * w).mul_add(inverse, -(x.widen() * slope));
            if accumulate {
                columns.for_each(|(((sum, &x), &d), &w)| *sum = X::narrow(sum.widen() + own(x, d, w)));
            } else {
                columns.for_each(|(((value, &x), &d), &w)| *value = X::narrow(own(x, d, w)));
            }
        }
    }
}

multiversion! {
    fn weight_rows<X: Element>(x: &[X], epsilon: f32, d_out: &[X], d_weight: &mut [f32]) {
        let width = d_weight.len();
        for (input, gradient) in x.chunks_exact(width).zip(d_out.chunks_exact(width)) {
            let inverse = inverse_rms(input, epsilon);
            for ((sum, &value), &slope) in d_weight.iter_mut().zip(input).zip(gradient) {
                *sum = (value.widen() * inverse).mul_add(slope.widen(), *sum);
            }
        }
    }
}

/// The factors that multiply the normalised row, as f32.
fn factors(weight: Option<&Tensor>, kind: NormWeight, width: usize) -> Vec<f32> {
    let values =
        |weight: &Tensor| weight.to_f32_vec().expect("invariant: host tensors are read without fail");
    let mut factors = weight.map_or_else(|| vec![1.0; width], values);
    if weight.is_some() && kind == NormWeight::PlusOne {
        factors.iter_mut().for_each(|factor| *factor += 1.0);
    }
    factors
}

pub(super) fn forward(x: &Tensor, weight: Option<&Tensor>, kind: NormWeight, epsilon: f32, out: &mut Tensor) {
    let width = weight.map_or(x.columns(), Tensor::elements);
    let factors = factors(weight, kind, width);
    with_element!(x.dtype(), X => {
        out.as_mut_slice::<X>()
            .par_chunks_mut(width * ROWS_A_TASK)
            .zip(x.as_slice::<X>().par_chunks(width * ROWS_A_TASK))
            .for_each(|(output, input)| forward_rows(input, &factors, epsilon, output));
    });
}

pub(super) fn backward(
    x: &Tensor,
    weight: Option<&Tensor>,
    kind: NormWeight,
    epsilon: f32,
    d_out: &Tensor,
    d_x: Option<(&mut Tensor, Held<'_>)>,
    d_weight: Option<&mut Tensor>,
) {
    let width = weight.map_or(x.columns(), Tensor::elements);
    let factors = factors(weight, kind, width);
    let task = width * ROWS_A_TASK;
    with_element!(x.dtype(), X => {
        let (input, gradient) = (x.as_slice::<X>(), d_out.as_slice::<X>());
        if let Some((d_x, held)) = d_x {
            let accumulate = !matches!(held, Held::Nothing);
            if let Held::Other(held) = held {
                d_x.as_mut_slice::<X>().copy_from_slice(held.as_slice::<X>());
            }
            d_x.as_mut_slice::<X>()
                .par_chunks_mut(task)
                .zip(input.par_chunks(task).zip(gradient.par_chunks(task)))
                .for_each(|(output, (x, d_out))| backward_rows(x, &factors, epsilon, d_out, output, accumulate));
        }
        if let Some(d_weight) = d_weight {
            let partial: Vec<Vec<f32>> = input
                .par_chunks(task * LANES)
                .zip(gradient.par_chunks(task * LANES))
                .map(|(x, d_out)| {
                    let mut sums = vec![0.0; width];
                    weight_rows(x, epsilon, d_out, &mut sums);
                    sums
                })
                .collect();
            for sums in partial {
                for (total, sum) in d_weight.as_mut_slice::<f32>().iter_mut().zip(sums) {
                    *total += sum;
                }
            }
        }
    });
}
