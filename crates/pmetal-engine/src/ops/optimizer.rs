//! The optimizer's step over all parameters.

use std::sync::Arc;

use crate::device::{AdamWControl, AdamWEntry, AdamWParameters, Sum};
use crate::error::{Result, expect_shape};
use crate::memory::Category;
use crate::parameter::State;
use crate::{DType, Device, Parameter, Tensor};

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

/// The sum of squares of all gradients. Parameters without a gradient count as zero.
///
/// # Errors
/// Out of memory.
pub fn sum_of_squares(device: &Device, parameters: &[Arc<Parameter>]) -> Result<Sum> {
    let gradients: Vec<Tensor> = parameters.iter().filter_map(|parameter| parameter.gradient()).collect();
    let mut sum = Sum::new(device)?;
    device.kernels().sum_of_squares(&gradients.iter().collect::<Vec<_>>(), &mut sum);
    Ok(sum)
}

/// The 2-norm of all gradients together. Parameters without a gradient count as zero.
///
/// # Errors
/// Out of memory, or a failure of the device.
pub fn global_norm(parameters: &[Arc<Parameter>]) -> Result<f64> {
    let Some(first) = parameters.first() else { return Ok(0.0) };
    let device = first.value().device().clone();
    Ok(sum_of_squares(&device, parameters)?.read()?.sqrt())
}

/// One AdamW step on all parameters together. Devices other than the CPU clear the gradients on the way. A parameter without a gradient is left alone, as in PyTorch. `decays`
/// says of a parameter whether weight decay applies to it. `squares`, of [`sum_of_squares`], turns clipping on; where
/// it is not finite nothing changes.
///
/// # Errors
/// [`crate::Error::Shape`] when a state is another parameter's; out of memory when a parameter's value is shared and
/// must be copied.
pub fn adamw(
    parameters: &[Arc<Parameter>],
    states: &mut [AdamWState],
    control: &AdamWControl,
    squares: Option<&Sum>,
    decays: impl Fn(&Parameter) -> bool,
) -> Result<()> {
    let mut device = None;
    let mut held = Vec::with_capacity(parameters.len());
    for (parameter, state) in parameters.iter().zip(states) {
        let decays = decays(parameter);
        let guard = parameter.unique()?;
        expect_shape("adamw", "first moment", state.first.shape(), guard.value.shape())?;
        expect_shape("adamw", "second moment", state.second.shape(), guard.value.shape())?;
        device.get_or_insert_with(|| guard.value.device().clone());
        if guard.is_reached {
            held.push((guard, state, decays));
        }
    }
    let Some(device) = device else { return Ok(()) };
    let mut entries: Vec<_> = held
        .iter_mut()
        .map(|(guard, state, decays)| {
            let State { value, gradient, shadow, .. } = &mut **guard;
            let gradient = gradient.as_mut().expect("invariant: what was reached has a gradient");
            AdamWEntry {
                value,
                gradient,
                first: &mut state.first,
                second: &mut state.second,
                decays: *decays,
                shadow: shadow.as_mut(),
            }
        })
        .collect();
    device.kernels().adamw(&mut entries, control, squares);
    drop(entries);
    if !device.is_host() {
        held.iter_mut().for_each(|(guard, _, _)| guard.is_reached = false);
    }
    Ok(())
}

/// [`adamw`] on one parameter, with weight decay and without clipping.
///
/// # Errors
/// As [`adamw`].
pub fn adamw_step(
    parameter: &Arc<Parameter>,
    state: &mut AdamWState,
    constants: &AdamWParameters,
) -> Result<()> {
    let control = AdamWControl::new(parameter.value().device(), *constants)?;
    adamw(std::slice::from_ref(parameter), std::slice::from_mut(state), &control, None, |_| true)
}
