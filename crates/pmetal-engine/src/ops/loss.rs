//! Cross-entropy of a linear head, in chunks of tokens: the logits of all tokens never exist.

use crate::device::{Arithmetic, CrossEntropyParameters, Finish, Operand, Sum};
use crate::error::{Error, Result, expect_shape};
use crate::memory::Category;
use crate::{DType, Device, Tape, Tensor, Var, Weight};

/// Logits that exist at one time on a CPU take at most this many bytes.
pub const LOGIT_CHUNK_BYTES: usize = 48 << 20;

/// The same on a device that needs larger products to be busy.
const DEVICE_LOGIT_CHUNK_BYTES: usize = 256 << 20;

/// Tokens beyond which a device's products gain little, as the head's weights are read for enough of them.
const DEVICE_CHUNK_ROWS: usize = 384;

/// Tokens of one chunk for a vocabulary of that size, on a CPU or on another device.
pub fn logit_chunk_rows(on_host: bool, vocabulary: usize) -> usize {
    let (bytes, most) =
        if on_host { (LOGIT_CHUNK_BYTES, 1024) } else { (DEVICE_LOGIT_CHUNK_BYTES, DEVICE_CHUNK_ROWS) };
    let rows = (bytes / (4 * vocabulary.max(1))).clamp(1, most);
    // Whole tiles of matrix units.
    if on_host || rows < 128 { rows } else { rows / 128 * 128 }
}

/// The label of a token that is not trained.
const NOT_TRAINED: i32 = -100;

/// What each token of a run should be followed by, checked.
#[derive(Debug, Clone)]
pub struct Targets {
    /// Number of tokens.
    tokens: usize,
    /// Trained tokens and their labels.
    rows: Vec<u32>,
    labels: Vec<i32>,
    /// All labels in a device's memory, i32 \[T\].
    device: Option<Tensor>,
}

impl Targets {
    /// Labels of T tokens: ids below `vocabulary`, or -100 where nothing is trained.
    ///
    /// # Errors
    /// [`Error::Range`] for a label that is not below V, [`Error::Other`] for another negative one; out of memory.
    pub fn new(device: &Device, labels: &[i32], vocabulary: usize) -> Result<Self> {
        let (rows, trained) = trained_rows(labels, vocabulary)?;
        let on_device = if device.is_host() {
            None
        } else {
            Some(Tensor::from_slice(device, Category::Workspace, &[labels.len()], labels)?)
        };
        Ok(Self { tokens: labels.len(), rows, labels: trained, device: on_device })
    }

    /// Replaces the labels, in the same memory.
    ///
    /// # Errors
    /// As [`Self::new`]; [`Error::Shape`] for another number of tokens.
    pub fn set(&mut self, labels: &[i32], vocabulary: usize) -> Result<()> {
        expect_shape("linear_cross_entropy", "labels", &[labels.len()], &[self.tokens])?;
        (self.rows, self.labels) = trained_rows(labels, vocabulary)?;
        if let Some(tensor) = &mut self.device {
            tensor.write_bytes(bytemuck::cast_slice(labels));
        }
        Ok(())
    }

    /// Number of trained tokens.
    pub fn trained(&self) -> usize {
        self.rows.len()
    }
}

/// The loss of a batch and where to start its backward pass.
pub struct CrossEntropy {
    /// Sum of the losses of all trained tokens, in nats.
    pub sum: Sum,
    /// Number of trained tokens.
    pub tokens: usize,
    /// Gradient for the hidden states, when the tape records and they want one.
    pub d_hidden: Option<Tensor>,
}

/// Sum over tokens of -log softmax(scale hidden W^T)\[label\]: hidden \[T, D\], W \[V, D\].
///
/// The gradient, times `parameters.gradient_scale`, is computed in the same pass, while a chunk's logits
/// exist; a trainable W receives its gradient at once. Flops: 2 T V D forward, the same again for the hidden
/// states and for a trainable W. Bytes beyond the result: one chunk of f32 logits, at most 48 MiB on a CPU unless one
/// row is longer, and the chunk's hidden states and their gradient. On a CPU, tokens that are not trained cost nothing;
/// on other devices the work depends on T alone.
///
/// # Errors
/// [`Error::Shape`]; out of memory.
pub fn linear_cross_entropy(
    tape: &Tape,
    hidden: &Var,
    weight: &Weight,
    targets: &Targets,
    parameters: &CrossEntropyParameters,
) -> Result<CrossEntropy> {
    let rows = logit_chunk_rows(hidden.tensor().is_host(), weight.value().rows());
    in_chunks(tape, hidden, weight, targets, parameters, rows)
}

/// [`linear_cross_entropy`] with the logits of at most `chunk_rows` tokens at a time.
pub(super) fn in_chunks(
    tape: &Tape,
    hidden: &Var,
    weight: &Weight,
    targets: &Targets,
    parameters: &CrossEntropyParameters,
    chunk_rows: usize,
) -> Result<CrossEntropy> {
    let (value, states) = (weight.value(), hidden.tensor());
    expect_shape("linear_cross_entropy", "hidden", states.shape(), &[targets.tokens, value.columns()])?;
    let device = states.device().clone();
    let mut d_hidden = (tape.is_recording() && hidden.slot().is_some())
        .then(|| Tensor::zeros(&device, Category::Activations, states.dtype(), states.shape()))
        .transpose()?;
    let mut sum = Sum::new(&device)?;
    match &targets.device {
        Some(labels) => {
            for start in (0..targets.tokens).step_by(chunk_rows) {
                let count = chunk_rows.min(targets.tokens - start);
                let (input, labels) = (states.slice_rows(start, count)?, labels.slice_rows(start, count)?);
                let chunk = Chunk { tape, weight, parameters, input: &input, labels: &labels };
                match &mut d_hidden {
                    None => chunk.run(&mut sum, None)?,
                    Some(whole) => {
                        whole.with_rows_mut(start, count, |part| chunk.run(&mut sum, Some(part)))?;
                    }
                }
            }
        }
        None => {
            let upload_rows =
                |rows: &[u32]| Tensor::from_slice(&device, Category::Workspace, &[rows.len()], rows);
            for (rows, labels) in targets.rows.chunks(chunk_rows).zip(targets.labels.chunks(chunk_rows)) {
                let indices = upload_rows(rows)?;
                let labels = Tensor::from_slice(&device, Category::Workspace, &[rows.len()], labels)?;
                let shape = [rows.len(), value.columns()];
                let scratch = || Tensor::scratch(&device, Category::Workspace, states.dtype(), &shape);
                let mut input = scratch()?;
                device.kernels().gather_rows(states, &indices, &mut input);
                let chunk = Chunk { tape, weight, parameters, input: &input, labels: &labels };
                match &mut d_hidden {
                    None => chunk.run(&mut sum, None)?,
                    Some(whole) => {
                        let mut part = scratch()?;
                        chunk.run(&mut sum, Some(&mut part))?;
                        device.kernels().scatter_rows(&part, &indices, whole);
                    }
                }
            }
        }
    }
    Ok(CrossEntropy { sum, tokens: targets.trained(), d_hidden })
}

/// Some tokens whose logits exist together.
struct Chunk<'a> {
    tape: &'a Tape,
    weight: &'a Weight,
    parameters: &'a CrossEntropyParameters,
    /// \[t, D\].
    input: &'a Tensor,
    /// i32 \[t\].
    labels: &'a Tensor,
}

impl Chunk<'_> {
    /// Adds the losses to `sum`, the head's gradient to its parameter, and overwrites `d_input` \[t, D\].
    fn run(&self, sum: &mut Sum, d_input: Option<&mut Tensor>) -> Result<()> {
        let (value, input) = (self.weight.value(), self.input);
        let device = input.device();
        let kernels = device.kernels();
        let arithmetic = Arithmetic::of(input.dtype());
        let [rows, vocabulary] = [input.rows(), value.rows()];
        // Products of rows that are out of line are many times slower.
        let spare = if device.is_host() { 0 } else { vocabulary.next_multiple_of(8) - vocabulary };
        let shape = [rows, vocabulary];
        let mut logits = Tensor::scratch_with_spare(device, Category::Logits, DType::F32, shape, spare)?;
        let product = (Operand::plain(input), Operand::transposed(&value));
        kernels.matmul(&[product], &mut logits, &Finish::STORE, arithmetic)?;
        let logits = kernels.cross_entropy(logits, self.labels, self.parameters, sum, input.dtype())?;
        if let Some(parameter) = self.weight.parameter().filter(|_| self.tape.is_recording()) {
            parameter.accumulate(|d_weight| {
                let product = (Operand::transposed(&logits), Operand::plain(input));
                kernels.matmul(&[product], d_weight, &Finish::ACCUMULATE, arithmetic)
            })?;
        }
        match d_input {
            None => Ok(()),
            Some(d_input) => {
                let product = (Operand::plain(&logits), Operand::plain(&value));
                kernels.matmul(&[product], d_input, &Finish::STORE, arithmetic)
            }
        }
    }
}

/// Indices and labels of the tokens that are trained.
fn trained_rows(labels: &[i32], vocabulary: usize) -> Result<(Vec<u32>, Vec<i32>)> {
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
        targets.push(label);
    }
    Ok((rows, targets))
}
