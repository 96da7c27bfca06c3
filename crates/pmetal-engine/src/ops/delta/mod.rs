//! Linear-attention layers with the gated delta rule, as in the hybrid families.

mod convolution;
mod norm;
mod rule;

pub use convolution::{ConvolutionState, short_convolution};
pub use norm::{gated_rms_norm, gated_rms_norm_with_spare};
pub use rule::{DeltaInputVars, DeltaState, gated_delta};

use crate::device::Documents;
use crate::error::{Error, Result};
use crate::memory::Category;
use crate::{DType, Device, Tape, Tensor, Weight};

/// A weight in f32, which is what the kernels read.
fn single(weight: &Weight) -> Result<Tensor> {
    let value = weight.value();
    if value.dtype() == DType::F32 {
        return Ok(value);
    }
    let mut converted = Tensor::scratch(value.device(), Category::Workspace, DType::F32, value.shape())?;
    value.device().kernels().convert(&value, &mut converted);
    Ok(converted)
}

/// Checks documents of a run of `tokens` tokens, and that a state goes with one document that is not being trained on.
fn check(
    operation: &'static str,
    tape: &Tape,
    documents: &Documents,
    (tokens, device): (usize, &Device),
    has_state: bool,
) -> Result<()> {
    if documents.marks.is_none() != device.is_host() {
        let name = device.name();
        return Err(Error::Other(format!("{operation}: the documents were not made for {name}")));
    }
    if documents.tokens != tokens {
        let given = documents.tokens;
        return Err(Error::Other(format!(
            "{operation}: the documents have {given} tokens, there are {tokens}"
        )));
    }
    if !has_state {
        return Ok(());
    }
    if tape.is_recording() {
        return Err(Error::Other(format!("{operation}: a state is kept while the tape records")));
    }
    match &documents.ranges[..] {
        [] => Ok(()),
        [range] if range.start == 0 => Ok(()),
        ranges => Err(Error::Other(format!(
            "{operation}: a state goes with one document at the first token, these are {ranges:?}"
        ))),
    }
}
