//! LayerNorm on the CPU, forward and backward.

use rayon::prelude::*;

use super::simd::{Element, LANES, lane_sum, multiversion, with_element};
use crate::device::{Held, LayerNorm};
use crate::tensor::Tensor;

/// Tokens that one task takes; also the unit in which weight gradients are summed, so it is fixed.
const TOKENS_A_TASK: usize = 64;

/// The mean and 1 / sqrt(variance + epsilon).
#[inline(always)]
fn moments<X: Element>(x: &[X], epsilon: f32) -> (f32, f32) {
    let mean = lane_sum((x, x, x), |x, _, _, sum| sum + x.widen()) / x.len() as f32;
    let squares = lane_sum((x, x, x), |x, _, _, sum| {
        let rest = x.widen() - mean;
        rest.mul_add(rest, sum)
    });
    (mean, 1.0 / (squares / x.len() as f32 + epsilon).sqrt())
}

multiversion! {
    fn forward_rows<X: Element>(x: &[X], width: usize, weight: &[f32], bias: &[f32], epsilon: f32, out: &mut [X]) {
        let factors = weight.chunks_exact(width).zip(bias.chunks_exact(width)).cycle();
        let rows = x.chunks_exact(width).zip(out.chunks_exact_mut(width));
        for ((input, output), (weight, bias)) in rows.zip(factors) {
            let (mean, inverse) = moments(input, epsilon);
            for (((value, &source), &factor), &addend) in output.iter_mut().zip(input).zip(weight).zip(bias) {
                *value = X::narrow(((source.widen() - mean) * inverse).mul_add(factor, addend));
            }
        }
    }
}

multiversion! {
    fn backward_rows<X: Element>(x: &[X], width: usize, weight: &[f32], epsilon: f32, d_out: &[X], d_x: &mut [X], accumulate: bool) {
        let rows = x.chunks_exact(width).zip(d_out.chunks_exact(width)).zip(d_x.chunks_exact_mut(width));
        for (((input, gradient), output), weight) in rows.zip(weight.chunks_exact(width).cycle()) {
            // With n the normed row, d = w dy and r = 1 / sqrt(variance + epsilon): dx = r (d - mean(d) - n mean(n d)).
            let (mean, inverse) = moments(input, epsilon);
            let slopes = lane_sum((weight, gradient, gradient), |w, d, _, sum| w.mul_add(d.widen(), sum));
            let products = lane_sum((input, weight, gradient), |x, w, d, sum| {
                ((x.widen() - mean) * inverse * w).mul_add(d.widen(), sum)
            });
            let (slope, product) = (slopes / width as f32, products / width as f32);
            let own = |x: X, d: X, w: f32| {
                inverse * ((x.widen() - mean) * inverse).mul_add(-product, d.widen() * w - slope)
            };
            let columns = output.iter_mut().zip(input).zip(gradient).zip(weight);
            if accumulate {
                columns.for_each(|(((sum, &x), &d), &w)| *sum = X::narrow(sum.widen() + own(x, d, w)));
            } else {
                columns.for_each(|(((value, &x), &d), &w)| *value = X::narrow(own(x, d, w)));
            }
        }
    }
}

multiversion! {
    /// Adds `d_out`, times the normed rows for a weight, to the sums of each head.
    fn weight_rows<X: Element>(x: &[X], width: usize, epsilon: f32, d_out: &[X], sums: &mut [f32], is_bias: bool) {
        let heads = sums.len() / width;
        for (row, (input, gradient)) in x.chunks_exact(width).zip(d_out.chunks_exact(width)).enumerate() {
            let sums = &mut sums[row % heads * width..][..width];
            if is_bias {
                for (sum, &slope) in sums.iter_mut().zip(gradient) {
                    *sum += slope.widen();
                }
                continue;
            }
            let (mean, inverse) = moments(input, epsilon);
            for ((sum, &value), &slope) in sums.iter_mut().zip(input).zip(gradient) {
                *sum = ((value.widen() - mean) * inverse).mul_add(slope.widen(), *sum);
            }
        }
    }
}

/// A weight's values for every head of a token, or one value for all.
fn values(weight: Option<&Tensor>, absent: f32, count: usize) -> Vec<f32> {
    let values =
        |weight: &Tensor| weight.to_f32_vec().expect("invariant: host tensors are read without fail");
    let own = weight.map_or_else(|| vec![absent], values);
    own.iter().copied().cycle().take(count).collect()
}

/// Elements of all heads that have weights of their own.
fn period(x: &Tensor, norm: &LayerNorm<'_>) -> usize {
    [norm.weight, norm.bias].into_iter().flatten().map(Tensor::elements).fold(x.columns(), usize::max)
}

pub(super) fn forward(x: &Tensor, norm: &LayerNorm<'_>, out: &mut Tensor) {
    let (width, period) = (x.columns(), period(x, norm));
    if x.elements() == 0 {
        return;
    }
    let (weight, bias) = (values(norm.weight, 1.0, period), values(norm.bias, 0.0, period));
    let task = period * TOKENS_A_TASK;
    with_element!(x.dtype(), X => {
        let tasks = out.as_mut_slice::<X>().par_chunks_mut(task).zip(x.as_slice::<X>().par_chunks(task));
        tasks.for_each(|(output, input)| forward_rows(input, width, &weight, &bias, norm.epsilon, output));
    });
}

pub(super) fn backward(
    x: &Tensor,
    norm: &LayerNorm<'_>,
    d_out: &Tensor,
    d_x: Option<(&mut Tensor, Held<'_>)>,
    d_weights: [Option<&mut Tensor>; 2],
) {
    let (width, period, epsilon) = (x.columns(), period(x, norm), norm.epsilon);
    if x.elements() == 0 {
        return;
    }
    let task = period * TOKENS_A_TASK;
    with_element!(x.dtype(), X => {
        let (input, gradient) = (x.as_slice::<X>(), d_out.as_slice::<X>());
        if let Some((d_x, held)) = d_x {
            let weight = values(norm.weight, 1.0, period);
            let accumulate = !matches!(held, Held::Nothing);
            if let Held::Other(held) = held {
                d_x.as_mut_slice::<X>().copy_from_slice(held.as_slice::<X>());
            }
            d_x.as_mut_slice::<X>()
                .par_chunks_mut(task)
                .zip(input.par_chunks(task).zip(gradient.par_chunks(task)))
                .for_each(|(output, (x, d_out))| {
                    backward_rows(x, width, &weight, epsilon, d_out, output, accumulate);
                });
        }
        for (index, total) in d_weights.into_iter().enumerate() {
            let Some(total) = total else { continue };
            let count = total.elements();
            let partial: Vec<Vec<f32>> = input
                .par_chunks(task * LANES)
                .zip(gradient.par_chunks(task * LANES))
                .map(|(x, d_out)| {
                    let mut sums = vec![0.0; count];
                    weight_rows(x, width, epsilon, d_out, &mut sums, index == 1);
                    sums
                })
                .collect();
            for sums in partial {
                for (total, sum) in total.as_mut_slice::<f32>().iter_mut().zip(sums) {
                    *total += sum;
                }
            }
        }
    });
}
