//! Cross-entropy of a linear head, in chunks of tokens: the logits of all tokens never exist.

use crate::device::{CrossEntropyParameters, Finish, Operand};
use crate::error::{Error, Result, expect_shape};
use crate::memory::Category;
use crate::tape::arithmetic_for;
use crate::{DType, Tape, Tensor, Var, Weight};

/// Logits that exist at one time take at most this many bytes.
pub const LOGIT_CHUNK_BYTES: usize = 48 << 20;

/// Tokens of one chunk for a vocabulary of that size.
pub fn logit_chunk_rows(vocabulary: usize) -> usize {
    (LOGIT_CHUNK_BYTES / (4 * vocabulary.max(1))).clamp(1, 1024)
}

/// The label of a token that is not trained.
const NOT_TRAINED: i32 = -100;

/// The loss of a batch and where to start its backward pass.
pub struct CrossEntropy {
    /// Sum of the losses of all trained tokens, in nats.
    pub sum: f64,
    /// Number of trained tokens.
    pub tokens: usize,
    /// Gradient for the hidden states, when the tape records and they want one.
    pub d_hidden: Option<Tensor>,
}

/// Sum over tokens of -log softmax(scale hidden W^T)\[label\]: hidden \[T, D\], W \[V, D\], labels i32 \[T\] with
/// -100 for tokens that are not trained; these cost nothing.
///
/// The gradient, times `parameters.gradient_scale`, is computed in the same pass, while a chunk's logits
/// exist; a trainable W receives its gradient at once. Flops: 2 T V D forward, the same again for the hidden
/// states and for a trainable W. Bytes beyond the result: one chunk of f32 logits, at most 48 MiB unless one row
/// is longer, and the chunk's hidden states and their gradient.
///
/// # Errors
/// [`Error::Range`] for a label that is not below V, [`Error::Other`] for another negative one; [`Error::Shape`];
/// out of memory.
pub fn linear_cross_entropy(
    tape: &Tape,
    hidden: &Var,
    weight: &Weight,
    labels: &[i32],
    parameters: &CrossEntropyParameters,
) -> Result<CrossEntropy> {
    in_chunks(tape, hidden, weight, labels, parameters, logit_chunk_rows(weight.value().rows()))
}

/// [`linear_cross_entropy`] with the logits of at most `chunk_rows` tokens at a time.
pub(super) fn in_chunks(
    tape: &Tape,
    hidden: &Var,
    weight: &Weight,
    labels: &[i32],
    parameters: &CrossEntropyParameters,
    chunk_rows: usize,
) -> Result<CrossEntropy> {
    let (value, states) = (weight.value(), hidden.tensor());
    let (vocabulary, width) = (value.rows(), value.columns());
    expect_shape("linear_cross_entropy", "hidden", states.shape(), &[labels.len(), width])?;
    let device = states.device().clone();
    let kernels = device.kernels();
    let arithmetic = arithmetic_for(states.dtype());
    let (rows, targets) = trained_rows(labels, vocabulary)?;
    let scratch = |dtype, shape: [usize; 2]| Tensor::scratch(&device, Category::Workspace, dtype, &shape);
    let mut d_hidden = (tape.is_recording() && hidden.slot().is_some())
        .then(|| Tensor::zeros(&device, Category::Activations, states.dtype(), states.shape()))
        .transpose()?;

    let mut sum = 0.0;
    for (rows, targets) in rows.chunks(chunk_rows).zip(targets.chunks(chunk_rows)) {
        let mut input = scratch(states.dtype(), [rows.len(), width])?;
        kernels.gather_rows(states, rows, &mut input);
        let mut logits = scratch(DType::F32, [rows.len(), vocabulary])?;
        let product = (Operand::plain(&input), Operand::transposed(&value));
        kernels.matmul(&[product], &mut logits, &Finish::STORE, arithmetic)?;
        sum += kernels.cross_entropy(&mut logits, targets, parameters);
        if let Some(parameter) = weight.parameter().filter(|_| tape.is_recording()) {
            parameter.accumulate(|d_weight| {
                let product = (Operand::transposed(&logits), Operand::plain(&input));
                kernels.matmul(&[product], d_weight, &Finish::ACCUMULATE, arithmetic)
            })?;
        }
        if let Some(d_hidden) = &mut d_hidden {
            let mut d_input = scratch(states.dtype(), [rows.len(), width])?;
            let product = (Operand::plain(&logits), Operand::plain(&value));
            kernels.matmul(&[product], &mut d_input, &Finish::STORE, arithmetic)?;
            kernels.scatter_rows(&d_input, rows, d_hidden);
        }
    }
    Ok(CrossEntropy { sum, tokens: rows.len(), d_hidden })
}

/// Indices and labels of the tokens that are trained.
fn trained_rows(labels: &[i32], vocabulary: usize) -> Result<(Vec<u32>, Vec<u32>)> {
    let (mut rows, mut targets) = (Vec::new(), Vec::new());
    for (row, &label) in labels.iter().enumerate() {
        if label == NOT_TRAINED {
            continue;
        }
        let target = usize::try_from(label).map_err(|_| {
            let expected = format!("{NOT_TRAINED} or a number below {vocabulary}");
            Error::Other(format!("linear_cross_entropy: label {row} is {label}, expected {expected}"))
        })?;
        if target >= vocabulary {
            return Err(Error::Range {
                operation: "linear_cross_entropy",
                what: "label",
                actual: target,
                limit: vocabulary,
            });
        }
        rows.push(row as u32);
        targets.push(target as u32);
    }
    Ok((rows, targets))
}
