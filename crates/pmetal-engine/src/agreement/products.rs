//! Matrix products.

use super::Inputs;
use crate::Tensor;
use crate::device::{Arithmetic, Finish, Operand, WeightGradient};
use crate::error::Result;

/// Products \[M, N\] over K: plain, of transposes, two as one, with a bias, onto what is there and with a residual.
pub(super) fn product(inputs: &Inputs<'_>, [m, n, k]: [usize; 3]) -> Result<Vec<Tensor>> {
    let kernels = inputs.device.kernels();
    let arithmetic = Arithmetic::of(inputs.dtype);
    let (left, right) = (inputs.tensor(1, &[m, k])?, inputs.tensor(2, &[k, n])?);
    let (left_turned, right_turned) = (inputs.tensor(3, &[k, m])?, inputs.tensor(4, &[n, k])?);
    let (bias, residual) = (inputs.floats(5, &[n])?, inputs.tensor(6, &[m, n])?);
    let pairs = [
        (Operand::plain(&left), Operand::plain(&right)),
        (Operand::plain(&left), Operand::transposed(&right_turned)),
        (Operand::transposed(&left_turned), Operand::plain(&right)),
    ];
    let mut results = Vec::new();
    for pair in pairs {
        let mut out = inputs.empty(&[m, n])?;
        kernels.matmul(
            &[pair],
            &mut out,
            &Finish { bias: Some(&bias), ..Finish::scaled(0.5) },
            arithmetic,
        )?;
        results.push(out);
    }
    let mut sum = inputs.tensor(7, &[m, n])?;
    kernels.matmul(&pairs[..1], &mut sum, &Finish::ACCUMULATE, arithmetic)?;
    let mut joined = inputs.empty(&[m, n])?;
    let finish = Finish { residual: Some(&residual), ..Finish::STORE };
    kernels.matmul(&pairs[1..], &mut joined, &finish, arithmetic)?;
    // Gradients of weights are f32 whatever the activations are.
    let mut gradient = inputs.floats(8, &[m, n])?;
    kernels.matmul(&pairs[2..], &mut gradient, &Finish::ACCUMULATE, arithmetic)?;
    results.extend([sum, joined, gradient]);
    Ok(results)
}

/// Gradients of two matrices over 300 tokens, thin on either side, and of one that is not thin.
pub(super) fn weight_gradients(inputs: &Inputs<'_>, width: usize) -> Result<Vec<Tensor>> {
    const TOKENS: usize = 300;
    let columns = [[width, 8], [16, width], [width + 40, width + 32]];
    let mut sides = Vec::new();
    let mut sums = Vec::new();
    for (seed, [m, n]) in (0..).step_by(3).zip(columns) {
        sides.push([inputs.tensor(seed, &[TOKENS, m])?, inputs.tensor(seed + 1, &[TOKENS, n])?]);
        sums.push(inputs.floats(seed + 2, &[m, n])?);
    }
    let mut gradients: Vec<WeightGradient<'_>> = Vec::new();
    for ([left, right], out) in sides.iter().zip(&mut sums) {
        gradients.push(WeightGradient { left, right, out, scale: 0.5 });
    }
    inputs.device.kernels().add_weight_gradients(&mut gradients)?;
    drop(gradients);
    Ok(sums)
}
