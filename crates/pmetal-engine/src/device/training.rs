//! What losses and the optimizer are told, and what they leave on a device.

use super::{Device, gpu};
use crate::error::Result;
use crate::memory::Category;
use crate::{DType, Tensor};

/// A number that is summed up on the device and read when it is needed.
#[derive(Debug)]
pub struct Sum {
    /// What the host has added.
    pub(crate) host: f64,
    /// What a device has added: f32 \[1\].
    pub(crate) device: Option<Tensor>,
}

impl Sum {
    /// Zero.
    ///
    /// # Errors
    /// Out of memory.
    pub fn new(device: &Device) -> Result<Self> {
        let zero = || Tensor::zeros(device, Category::Workspace, DType::F32, &[1]);
        Ok(Self { host: 0.0, device: if device.is_host() { None } else { Some(zero()?) } })
    }

    /// The sum; waits for the device.
    ///
    /// # Errors
    /// [`crate::Error::Driver`] when the device failed.
    pub fn read(&self) -> Result<f64> {
        let remote = match &self.device {
            Some(tensor) => f64::from(tensor.to_vec::<f32>()?[0]),
            None => 0.0,
        };
        Ok(self.host + remote)
    }
}

/// Constants of a cross-entropy over logits.
#[derive(Debug, Clone, Copy)]
pub struct CrossEntropyParameters {
    /// Factor on the logits before anything else.
    pub logit_scale: f32,
    /// `cap * tanh(logit / cap)` after the scale.
    pub softcap: Option<f32>,
    /// Factor on the gradient, usually 1 / trained tokens of the optimizer step.
    pub gradient_scale: f32,
}

/// Constants of one AdamW step (Loshchilov and Hutter, arXiv 1711.05101).
#[derive(Debug, Clone, Copy)]
pub struct AdamWParameters {
    /// Learning rate of this step.
    pub learning_rate: f64,
    /// Decay rate of the first moment.
    pub beta1: f64,
    /// Decay rate of the second moment.
    pub beta2: f64,
    /// Added to the denominator.
    pub epsilon: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Number of this step, from 1.
    pub step: u32,
    /// Factor on every gradient, clipping not included.
    pub gradient_scale: f32,
    /// Largest 2-norm of all gradients together, after the factor; 0 = no clipping.
    pub max_norm: f64,
}

impl AdamWParameters {
    /// What gradients are multiplied by, clipping included, given the sum of their squares; `None` when that is not
    /// finite. As `clip_grad_norm_` of PyTorch, whose denominator carries 1e-6.
    pub fn clipped_scale(&self, squares: Option<f64>) -> Option<f32> {
        let Some(squares) = squares else { return Some(self.gradient_scale) };
        if !squares.is_finite() {
            return None;
        }
        let norm = squares.sqrt() * f64::from(self.gradient_scale);
        let clip = if self.max_norm > 0.0 { (self.max_norm / (norm + 1e-6)).min(1.0) } else { 1.0 };
        Some((f64::from(self.gradient_scale) * clip) as f32)
    }
}

/// The constants of an optimizer step where the device's kernels find them.
#[derive(Debug)]
pub struct AdamWControl {
    pub(crate) constants: AdamWParameters,
    /// The same for devices: f32, in the order that the kernel states.
    pub(crate) device: Option<Tensor>,
}

impl AdamWControl {
    /// Constants for a device.
    ///
    /// # Errors
    /// Out of memory.
    pub fn new(device: &Device, constants: AdamWParameters) -> Result<Self> {
        let device = if device.is_host() {
            None
        } else {
            let values = gpu::control_values(&constants);
            Some(Tensor::from_slice(device, Category::Workspace, &[values.len()], &values)?)
        };
        Ok(Self { constants, device })
    }

    /// Replaces the constants, in the same memory.
    pub fn set(&mut self, constants: AdamWParameters) {
        self.constants = constants;
        if let Some(tensor) = &mut self.device {
            tensor.write_bytes(bytemuck::cast_slice(&gpu::control_values(&constants)));
        }
    }
}

/// One tensor of an optimizer step; all are f32 of one shape.
pub struct AdamWEntry<'a> {
    /// What is trained.
    pub value: &'a mut Tensor,
    /// Its gradient, which becomes zero on devices other than the CPU.
    pub gradient: &'a mut Tensor,
    /// Running mean of gradients.
    pub first: &'a mut Tensor,
    /// Running mean of squared gradients.
    pub second: &'a mut Tensor,
    /// Whether weight decay applies.
    pub decays: bool,
    /// A copy of the value in the type of products, where there is one.
    pub shadow: Option<&'a mut Tensor>,
}
