//! Causal depthwise convolution over time.

use super::{check, single};
use crate::device::Documents;
use crate::error::{Error, Result, expect_dtype, expect_shape};
use crate::memory::Category;
use crate::{DType, Device, Tape, Tensor, Var, Weight};

/// The last inputs of a document, for the outputs of the tokens behind them.
#[derive(Debug)]
pub struct ConvolutionState {
    /// \[K - 1, C\], the last token at the end.
    inputs: Tensor,
}

impl ConvolutionState {
    /// The state before a document: zeros of the type of activations, for `channels` channels and `taps` taps.
    ///
    /// # Errors
    /// [`Error::Range`] for no taps; out of memory.
    pub fn new(device: &Device, dtype: DType, channels: usize, taps: usize) -> Result<Self> {
        let held = held_rows(taps)?;
        Ok(Self { inputs: Tensor::zeros(device, Category::Cache, dtype, &[held, channels])? })
    }

    /// Goes back to before the document, in the same memory.
    pub fn reset(&mut self) {
        self.inputs.fill_zero();
    }

    /// Becomes what another state of its sizes is, in the same memory.
    ///
    /// # Errors
    /// [`Error::Shape`] or [`Error::DType`] where the other's sizes or type differ.
    pub fn copy_from(&mut self, other: &Self) -> Result<()> {
        expect_shape("short_convolution", "state", other.inputs.shape(), self.inputs.shape())?;
        expect_dtype("short_convolution", "state", other.inputs.dtype(), self.inputs.dtype())?;
        self.inputs.device().clone().kernels().convert(&other.inputs, &mut self.inputs);
        Ok(())
    }
}

/// The most taps that kernels hold.
const MOST_TAPS: usize = 16;

fn held_rows(taps: usize) -> Result<usize> {
    match taps {
        1..=MOST_TAPS => Ok(taps - 1),
        _ => Err(Error::Range {
            operation: "short_convolution",
            what: "number of taps",
            actual: taps,
            limit: MOST_TAPS + 1,
        }),
    }
}

/// `silu(sum over j of w[c, j] x[t - K + 1 + j, c])`: x \[T, C\], weight \[C, K\], result \[T, C\], in f32 inside. What is
/// before a document counts as zero, or as the state says, which then becomes that behind the last token of its document.
///
/// Padding gives zeros and gets none. A state goes with a tape that does not record and one document at the first token.
/// Keeps x. Bytes: two tensors forward, three backward.
///
/// # Errors
/// [`Error::Shape`] or [`Error::DType`] when weight or state disagree with x; [`Error::Range`] for more than 16 taps;
/// [`Error::Other`] for documents of other rows, or that do not go with a state; out of memory.
pub fn short_convolution(
    tape: &Tape,
    x: &Var,
    weight: &Weight,
    documents: &Documents,
    state: Option<&mut ConvolutionState>,
) -> Result<Var> {
    let input = x.tensor().clone();
    let (tokens, channels, value) = (input.rows(), input.columns(), single(weight)?);
    let taps = value.columns();
    // Checkpoints have a dimension of one between the two.
    let value = value.reshape(&[value.elements() / taps.max(1), taps])?;
    expect_shape("short_convolution", "x", input.shape(), &[tokens, channels])?;
    expect_shape("short_convolution", "weight", value.shape(), &[channels, taps])?;
    let held = held_rows(taps)?;
    let device = input.device().clone();
    check("short_convolution", tape, documents, (tokens, &device), state.is_some())?;
    let mut out = Tensor::scratch(&device, Category::Activations, input.dtype(), input.shape())?;
    let kernels = device.kernels().delta();
    match state {
        Some(state) => {
            expect_shape("short_convolution", "state", state.inputs.shape(), &[held, channels])?;
            expect_dtype("short_convolution", "state", state.inputs.dtype(), input.dtype())?;
            kernels.short_convolution(&input, &value, documents, Some(&state.inputs), &mut out);
            kernels.move_convolution_state(&input, documents, &mut state.inputs);
        }
        None => kernels.short_convolution(&input, &value, documents, None, &mut out),
    }
    let (input_slot, parameter) = (x.slot(), weight.parameter().cloned());
    let wanted = input_slot.is_some() || parameter.is_some();
    let documents = documents.clone();
    Ok(tape.push(out, wanted, |slot| {
        Box::new(move |gradients| {
            let Some(d_out) = gradients.take(slot) else { return Ok(()) };
            let d_out = d_out.reshape(input.shape())?;
            let mut d_x = Tensor::scratch(&device, Category::Activations, input.dtype(), input.shape())?;
            let mut run = |d_weight: Option<&mut Tensor>| {
                let kernels = device.kernels().delta();
                kernels.short_convolution_backward(&input, &value, &documents, &d_out, &mut d_x, d_weight)
            };
            match &parameter {
                Some(parameter) => parameter.accumulate(|d_weight| run(Some(d_weight)))?,
                None => run(None)?,
            }
            match input_slot {
                Some(slot) => gradients.add(slot, d_x),
                None => Ok(()),
            }
        })
    }))
}
