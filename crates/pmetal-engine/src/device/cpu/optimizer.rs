//! AdamW and norms on the CPU.

use rayon::prelude::*;

use super::simd::{LANES, multiversion};
use crate::device::{AdamWEntry, AdamWParameters};
use crate::tensor::Tensor;

/// Elements that one task takes; also the unit in which norms are summed, so it is fixed.
const TASK: usize = 1 << 14;

struct Constants {
    gradient_scale: f32,
    keep: f32,
    first_share: f32,
    second_keep: f32,
    second_share: f32,
    step_size: f32,
    second_correction: f32,
    epsilon: f32,
}

multiversion! {
    fn adamw_task(c: &Constants, value: &mut [f32], gradient: &[f32], first: &mut [f32], second: &mut [f32]) {
        for i in 0..value.len() {
            let slope = gradient[i] * c.gradient_scale;
            first[i] += (slope - first[i]) * c.first_share;
            second[i] = second[i] * c.second_keep + slope * slope * c.second_share;
            let denominator = second[i].sqrt() / c.second_correction + c.epsilon;
            value[i] = value[i] * c.keep - c.step_size * (first[i] / denominator);
        }
    }
}

pub(super) fn adamw(entries: &mut [AdamWEntry<'_>], parameters: &AdamWParameters, squares: Option<f64>) {
    let Some(gradient_scale) = parameters.clipped_scale(squares) else { return };
    // Corrections in f64, as the step count makes powers that f32 loses.
    let step = f64::from(parameters.step);
    let first_correction = 1.0 - parameters.beta1.powf(step);
    let second_correction = (1.0 - parameters.beta2.powf(step)).sqrt();
    let rate = parameters.learning_rate;
    for entry in entries {
        let decay = if entry.decays { parameters.weight_decay } else { 0.0 };
        let constants = Constants {
            gradient_scale,
            keep: (1.0 - rate * decay) as f32,
            first_share: (1.0 - parameters.beta1) as f32,
            second_keep: parameters.beta2 as f32,
            second_share: (1.0 - parameters.beta2) as f32,
            step_size: (rate / first_correction) as f32,
            second_correction: second_correction as f32,
            epsilon: parameters.epsilon as f32,
        };
        let gradient = entry.gradient.as_slice::<f32>();
        let (first, second) = (entry.first.as_mut_slice::<f32>(), entry.second.as_mut_slice::<f32>());
        (entry.value.as_mut_slice::<f32>().par_chunks_mut(TASK))
            .zip(first.par_chunks_mut(TASK))
            .zip(second.par_chunks_mut(TASK))
            .zip(gradient.par_chunks(TASK))
            .for_each(|(((value, first), second), gradient)| {
                adamw_task(&constants, value, gradient, first, second)
            });
    }
}

multiversion! {
    fn squares_task(x: &[f32]) -> f64 {
        let mut sums = [0.0_f64; LANES];
        for lanes in x.chunks(LANES) {
            for (sum, &value) in sums.iter_mut().zip(lanes) {
                *sum += f64::from(value) * f64::from(value);
            }
        }
        sums.iter().sum()
    }
}

pub(super) fn sum_of_squares(x: &Tensor) -> f64 {
    let sums: Vec<f64> = x.as_slice::<f32>().par_chunks(TASK).map(squares_task).collect();
    sums.iter().sum()
}
