//! RMSNorm with a gate.

use rayon::prelude::*;

use crate::device::cpu::simd::{Element, lane_sum, multiversion, sigmoid, with_element};
use crate::tensor::Tensor;

/// Rows that one task takes; also the unit in which weight gradients are summed, so it is fixed.
const ROWS_A_TASK: usize = 256;

#[inline(always)]
fn inverse_rms<X: Element>(x: &[X], epsilon: f32) -> f32 {
    let squares = lane_sum((x, x, x), |x, _, _, sum| x.widen().mul_add(x.widen(), sum));
    1.0 / (squares / x.len() as f32 + epsilon).sqrt()
}

multiversion! {
    fn forward_rows<X: Element>(x: &[X], gate: &[X], weight: &[f32], epsilon: f32, out: &mut [X]) {
        let width = weight.len();
        let rows = x.chunks_exact(width).zip(gate.chunks_exact(width));
        for ((x, gate), out) in rows.zip(out.chunks_exact_mut(width)) {
            let inverse = inverse_rms(x, epsilon);
            for (((out, &x), &gate), &factor) in out.iter_mut().zip(x).zip(gate).zip(weight) {
                let (normed, gate) = (X::narrow(x.widen() * inverse).widen(), gate.widen());
                *out = X::narrow(normed * factor * (gate * sigmoid(gate)));
            }
        }
    }
}

pub(super) fn forward(x: &Tensor, gate: &Tensor, weight: &Tensor, epsilon: f32, out: &mut Tensor) {
    let weight = weight.as_slice::<f32>();
    let task = weight.len().max(1) * ROWS_A_TASK;
    with_element!(x.dtype(), X => {
        let inputs = x.as_slice::<X>().par_chunks(task).zip(gate.as_slice::<X>().par_chunks(task));
        out.as_mut_slice::<X>()
            .par_chunks_mut(task)
            .zip(inputs)
            .for_each(|(out, (x, gate))| forward_rows(x, gate, weight, epsilon, out));
    });
}

multiversion! {
    #[allow(clippy::too_many_arguments)]
    /// With n = x r, y = w n s(g): dn = w s dy, dx = r (dn - n mean(n dn)), dg = w n s' dy, dw = sum of n s dy.
    fn backward_rows<X: Element>(x: &[X], gate: &[X], weight: &[f32], epsilon: f32, d_out: &[X], d_x: &mut [X], d_gate: &mut [X], d_weight: &mut [f32]) {
        let width = weight.len();
        let mut d_normed = vec![0.0_f32; width];
        let inputs = x.chunks_exact(width).zip(gate.chunks_exact(width)).zip(d_out.chunks_exact(width));
        let outputs = d_x.chunks_exact_mut(width).zip(d_gate.chunks_exact_mut(width));
        for (((x, gate), d_out), (d_x, d_gate)) in inputs.zip(outputs) {
            let inverse = inverse_rms(x, epsilon);
            for i in 0..width {
                let (value, slope, normed) = (gate[i].widen(), d_out[i].widen(), x[i].widen() * inverse);
                let share = sigmoid(value);
                d_normed[i] = weight[i] * (value * share) * slope;
                d_gate[i] = X::narrow(weight[i] * normed * share * (1.0 - share).mul_add(value, 1.0) * slope);
                if let Some(sum) = d_weight.get_mut(i) {
                    *sum = (normed * (value * share)).mul_add(slope, *sum);
                }
            }
            let product = lane_sum((x, &d_normed, x), |x, d, _, sum| x.widen().mul_add(d, sum));
            let back = inverse * inverse * inverse * (product / width as f32);
            for ((d_x, &x), &d) in d_x.iter_mut().zip(x).zip(&d_normed) {
                *d_x = X::narrow(d.mul_add(inverse, -(x.widen() * back)));
            }
        }
    }
}

pub(super) fn backward(
    [x, gate, weight]: [&Tensor; 3],
    epsilon: f32,
    d_out: &Tensor,
    [d_x, d_gate]: [&mut Tensor; 2],
    d_weight: Option<&mut Tensor>,
) {
    let (weight, trains) = (weight.as_slice::<f32>(), d_weight.is_some());
    let task = weight.len().max(1) * ROWS_A_TASK;
    with_element!(x.dtype(), X => {
        let inputs = x.as_slice::<X>().par_chunks(task).zip(gate.as_slice::<X>().par_chunks(task));
        let inputs = inputs.zip(d_out.as_slice::<X>().par_chunks(task));
        let outputs = d_x.as_mut_slice::<X>().par_chunks_mut(task);
        let partial: Vec<Vec<f32>> = outputs
            .zip(d_gate.as_mut_slice::<X>().par_chunks_mut(task))
            .zip(inputs)
            .map(|((d_x, d_gate), ((x, gate), d_out))| {
                let mut sums = vec![0.0; if trains { weight.len() } else { 0 }];
                backward_rows(x, gate, weight, epsilon, d_out, d_x, d_gate, &mut sums);
                sums
            })
            .collect();
        if let Some(d_weight) = d_weight {
            for sums in partial {
                for (total, sum) in d_weight.as_mut_slice::<f32>().iter_mut().zip(sums) {
                    *total += sum;
                }
            }
        }
    });
}
