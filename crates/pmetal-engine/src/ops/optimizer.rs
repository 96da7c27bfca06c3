//! The optimizer's step over all parameters.

use std::sync::Arc;

use crate::device::AdamWParameters;
use crate::error::{Result, expect_shape};
use crate::memory::Category;
use crate::{DType, Parameter, Tensor};

/// First and second moment of one parameter, f32.
#[derive(Debug)]
pub struct AdamWState {
    /// Running mean of gradients.
    pub first: Tensor,
    /// Running mean of squared gradients.
    pub second: Tensor,
}

impl AdamWState {
    /// Zero moments for a parameter.
    ///
    /// # Errors
    /// Out of memory.
    pub fn new(parameter: &Parameter) -> Result<Self> {
        let value = parameter.value();
        let zeros = || Tensor::zeros(value.device(), Category::Optimizer, DType::F32, value.shape());
        Ok(Self { first: zeros()?, second: zeros()? })
    }
}

/// The 2-norm of all gradients together, accumulated in f64. Parameters without a gradient count as zero.
pub fn global_norm(parameters: &[Arc<Parameter>]) -> f64 {
    let squares: f64 = parameters
        .iter()
        .filter_map(|parameter| parameter.gradient())
        .map(|gradient| gradient.device().kernels().sum_of_squares(&gradient))
        .sum();
    squares.sqrt()
}

/// One AdamW step on one parameter. A parameter without a gradient is left alone, as in PyTorch.
///
/// # Errors
/// [`crate::Error::Shape`] when the state is another parameter's; out of memory when the parameter's value is
/// shared and must be copied.
pub fn adamw_step(parameter: &Parameter, state: &mut AdamWState, constants: &AdamWParameters) -> Result<()> {
    parameter.update(|value, gradient| {
        expect_shape("adamw", "first moment", state.first.shape(), value.shape())?;
        expect_shape("adamw", "second moment", state.second.shape(), value.shape())?;
        if let Some(gradient) = gradient {
            let device = value.device().clone();
            device.kernels().adamw(constants, value, gradient, &mut state.first, &mut state.second);
        }
        Ok(())
    })
}
