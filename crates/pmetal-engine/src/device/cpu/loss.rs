//! Cross-entropy over rows of logits, replaced in place by their gradient.

use rayon::prelude::*;

use super::simd::{LANES, exp, multiversion, tanh, tree_sum};
use crate::device::CrossEntropyParameters;
use crate::tensor::Tensor;

multiversion! {
    fn largest(row: &[f32]) -> f32 {
        let mut lanes = [f32::NEG_INFINITY; LANES];
        let whole = row.len() / LANES * LANES;
        for chunk in row[..whole].chunks_exact(LANES) {
            for (lane, &value) in lanes.iter_mut().zip(chunk) {
                *lane = if value > *lane { value } else { *lane };
            }
        }
        row[whole..].iter().chain(&lanes).copied().fold(f32::NEG_INFINITY, f32::max)
    }
}

multiversion! {
    /// Replaces the row by e^(x - shift) and returns the sum.
    fn exponentials(row: &mut [f32], shift: f32) -> f32 {
        let mut sums = [0.0_f32; LANES];
        for chunk in row.chunks_mut(LANES) {
            for (value, sum) in chunk.iter_mut().zip(&mut sums) {
                *value = exp(*value - shift);
                *sum += *value;
            }
        }
        tree_sum(sums)
    }
}

multiversion! {
    fn scale_row(row: &mut [f32], factor: f32) {
        for value in row.iter_mut() {
            *value *= factor;
        }
    }
}

multiversion! {
    fn cap_row(row: &mut [f32], cap: f32) {
        for value in row.iter_mut() {
            *value = cap * tanh(*value / cap);
        }
    }
}

/// Loss of one row; leaves d(loss) * gradient_scale / d(logit) behind.
fn row_loss(row: &mut [f32], label: usize, parameters: &CrossEntropyParameters) -> f64 {
    if parameters.logit_scale != 1.0 {
        scale_row(row, parameters.logit_scale);
    }
    let capped = parameters.softcap.map(|cap| {
        cap_row(row, cap);
        (cap, row.to_vec())
    });
    let shift = largest(row);
    let target = row[label];
    let sum = exponentials(row, shift);
    scale_row(row, parameters.gradient_scale / sum);
    row[label] -= parameters.gradient_scale;
    if let Some((cap, values)) = capped {
        for (slope, value) in row.iter_mut().zip(values) {
            *slope *= 1.0 - (value / cap) * (value / cap);
        }
    }
    if parameters.logit_scale != 1.0 {
        scale_row(row, parameters.logit_scale);
    }
    f64::from(sum).ln() + f64::from(shift) - f64::from(target)
}

pub(super) fn cross_entropy(logits: &mut Tensor, labels: &[i32], parameters: &CrossEntropyParameters) -> f64 {
    let width = logits.columns();
    let losses: Vec<f64> = logits
        .as_mut_slice::<f32>()
        .par_chunks_mut(width)
        .zip(labels)
        .map(|(row, &label)| match usize::try_from(label) {
            Ok(label) => row_loss(row, label, parameters),
            Err(_) => {
                row.fill(0.0);
                0.0
            }
        })
        .collect();
    losses.iter().sum()
}
