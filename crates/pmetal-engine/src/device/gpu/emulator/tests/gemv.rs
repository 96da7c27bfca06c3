//! Products of a few rows.

use super::*;
use crate::device::{Arithmetic, Finish, Operand};

/// A matrix of one type on a GPU, in f32 of the same values on the processor.
fn matrix(run: &Run<'_>, seed: u64, shape: &[usize], dtype: DType) -> Tensor {
    let values: Vec<f32> =
        numbers(seed, shape.iter().product()).into_iter().map(|value| round(value, dtype)).collect();
    let own = if run.device.is_host() { DType::F32 } else { dtype };
    run.place(own, shape, run.padding, &values)
}

/// `out = 0.5 (x w^T + x2 w2^T) + bias`, with what is added to it; the inner sizes say how many products there are.
fn product(
    run: &Run<'_>,
    weight: DType,
    [rows, features]: [usize; 2],
    inner: &[usize],
    added: &str,
) -> Vec<Tensor> {
    let (dtype, shape) = (run.rounding, [rows, features]);
    let pairs: Vec<(Tensor, Tensor)> = inner
        .iter()
        .zip(0..)
        .map(|(&inner, index)| {
            (matrix(run, index, &[rows, inner], dtype), matrix(run, 9 + index, &[features, inner], weight))
        })
        .collect();
    let products: Vec<_> = pairs.iter().map(|(x, w)| (Operand::plain(x), Operand::transposed(w))).collect();
    let bias = run.floats(20, &[features]);
    let residual = matrix(run, 21, &shape, dtype);
    let mut out = if added == "itself" { matrix(run, 22, &shape, dtype) } else { run.empty(&shape) };
    let finish = Finish {
        scale: 0.5,
        bias: Some(&bias).filter(|_| added != "nothing"),
        accumulate: added == "itself",
        residual: Some(&residual).filter(|_| added == "a residual"),
    };
    let arithmetic = Arithmetic::of(run.dtype);
    run.device.kernels().matmul(&products, &mut out, &finish, arithmetic).unwrap();
    vec![out]
}

#[test]
fn products_of_few_rows_agree_with_the_processor() {
    // Inner sizes within a vector, a SIMD group, all SIMD groups, and ends of each that are ragged.
    let inners: [&[usize]; 7] = [&[3], &[40], &[256], &[520, 8], &[1000, 13], &[2064, 16], &[4104]];
    for (index, inner) in inners.into_iter().enumerate() {
        let shapes = [(1, 1), (2, 5), (8, 70), (1, 37), (3, 24), (5, 33)];
        for (rows, features) in [shapes[index % 6], shapes[(index + 3) % 6]] {
            let added = ["nothing", "a residual", "itself"][(index + rows) % 3];
            let dtype = [DType::F32, DType::Bf16, DType::F16][(index + features) % 3];
            check(&format!("{rows} x {features} x {inner:?}, {added} added"), dtype, &|run| {
                product(run, dtype, [rows, features], inner, added)
            });
        }
    }
}

#[test]
fn weights_may_be_narrower_than_what_they_are_multiplied_with() {
    for weight in [DType::Bf16, DType::F16] {
        for rows in [3, 7] {
            check(&format!("{rows} rows of f32 by {weight}"), DType::F32, &|run| {
                product(run, weight, [rows, 20], &[264, 8], "a residual")
            });
        }
    }
}

#[test]
fn logits_are_f32_whatever_their_states_are() {
    check_padded("logits", DType::Bf16, &[0], &|run| {
        let (states, head) =
            (matrix(run, 1, &[1, 96], run.rounding), matrix(run, 2, &[50, 96], run.rounding));
        let mut logits = run.place(DType::F32, &[1, 50], 0, &[f32::NAN; 50]);
        crate::ops::project(&states, &head, 1.0, &mut logits).unwrap();
        vec![logits]
    });
}
