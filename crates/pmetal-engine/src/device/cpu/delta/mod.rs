//! Linear-attention layers on the CPU. Documents and heads are computed apart and sums have a fixed order, so the results
//! are bit-identical for any number of threads.

mod convolution;
mod norm;
mod rule;
mod sweeps;

use super::Cpu;
use crate::device::{DeltaGradients, DeltaInputs, DeltaKernels, Documents};
use crate::error::Result;
use crate::tensor::Tensor;

impl DeltaKernels for Cpu {
    fn short_convolution(
        &self,
        x: &Tensor,
        weight: &Tensor,
        documents: &Documents,
        state: Option<&Tensor>,
        out: &mut Tensor,
    ) {
        convolution::forward(x, weight, documents, state, out);
    }

    fn move_convolution_state(&self, x: &Tensor, documents: &Documents, state: &mut Tensor) {
        convolution::move_state(x, documents, state);
    }

    fn short_convolution_backward(
        &self,
        x: &Tensor,
        weight: &Tensor,
        documents: &Documents,
        d_out: &Tensor,
        d_x: &mut Tensor,
        d_weight: Option<&mut Tensor>,
    ) -> Result<()> {
        convolution::backward(x, weight, documents, d_out, d_x, d_weight);
        Ok(())
    }

    fn gated_delta(
        &self,
        inputs: &DeltaInputs<'_>,
        state: Option<&mut Tensor>,
        out: &mut Tensor,
    ) -> Result<()> {
        rule::forward(inputs, state, out);
        Ok(())
    }

    fn gated_delta_backward(
        &self,
        inputs: &DeltaInputs<'_>,
        d_out: &Tensor,
        gradients: DeltaGradients<'_>,
    ) -> Result<()> {
        rule::backward(inputs, d_out, gradients);
        Ok(())
    }

    fn gated_rms_norm(&self, x: &Tensor, gate: &Tensor, weight: &Tensor, epsilon: f32, out: &mut Tensor) {
        norm::forward(x, gate, weight, epsilon, out);
    }

    fn gated_rms_norm_backward(
        &self,
        inputs: [&Tensor; 3],
        epsilon: f32,
        d_out: &Tensor,
        d_inputs: [&mut Tensor; 2],
        d_weight: Option<&mut Tensor>,
    ) -> Result<()> {
        norm::backward(inputs, epsilon, d_out, d_inputs, d_weight);
        Ok(())
    }
}
