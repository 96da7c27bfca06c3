//! Trainable values with their gradients, and weights that are either frozen or trainable.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::error::Result;
use crate::memory::Category;
use crate::{DType, Tensor};

/// A trainable f32 tensor and the gradient that backward passes have summed into it so far.
#[derive(Debug)]
pub struct Parameter {
    name: String,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    value: Tensor,
    gradient: Option<Tensor>,
}

impl Parameter {
    /// A parameter from its f32 value.
    pub fn new(name: impl Into<String>, value: Tensor) -> Arc<Self> {
        Arc::new(Self { name: name.into(), state: Mutex::new(State { value, gradient: None }) })
    }

    /// The name that checkpoints use.
    pub fn name(&self) -> &str {
        &self.name
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A handle to the current value. Drop it before the next [`Self::update`], which otherwise copies.
    pub fn value(&self) -> Tensor {
        self.state().value.clone()
    }

    /// Replaces the value.
    pub fn set_value(&self, value: Tensor) {
        self.state().value = value;
    }

    /// A handle to the gradient, `None` when no backward pass has reached the parameter.
    pub fn gradient(&self) -> Option<Tensor> {
        self.state().gradient.clone()
    }

    /// Drops the gradient and its memory.
    pub fn clear_gradient(&self) {
        self.state().gradient = None;
    }

    /// Lets `add` add to the gradient, which starts at zero.
    ///
    /// # Errors
    /// What `add` returns, or out of memory for the gradient.
    pub fn accumulate(&self, add: impl FnOnce(&mut Tensor) -> Result<()>) -> Result<()> {
        let mut state = self.state();
        let mut gradient = match state.gradient.take() {
            Some(gradient) => gradient.into_unique()?,
            None => {
                let value = &state.value;
                Tensor::zeros(value.device(), Category::Gradients, DType::F32, value.shape())?
            }
        };
        let outcome = add(&mut gradient);
        state.gradient = Some(gradient);
        outcome
    }

    /// Lets `change` write the value, given the gradient (`None` = nothing reached it), and keeps the gradient.
    ///
    /// # Errors
    /// What `change` returns, or out of memory when the value is shared and must be copied.
    pub fn update(&self, change: impl FnOnce(&mut Tensor, Option<&Tensor>) -> Result<()>) -> Result<()> {
        let mut state = self.state();
        if !state.value.is_unique() {
            state.value = state.value.copy(Category::Parameters)?;
        }
        let gradient = state.gradient.clone();
        change(&mut state.value, gradient.as_ref())
    }
}

/// A weight: what the checkpoint holds, or something being trained.
#[derive(Debug, Clone)]
pub enum Weight {
    /// Never changed; no gradient is computed for it.
    Frozen(Tensor),
    /// Trained in f32.
    Trainable(Arc<Parameter>),
}

impl Weight {
    /// A handle to the current value.
    pub fn value(&self) -> Tensor {
        match self {
            Self::Frozen(tensor) => tensor.clone(),
            Self::Trainable(parameter) => parameter.value(),
        }
    }

    /// The parameter behind it, if it is trained.
    pub fn parameter(&self) -> Option<&Arc<Parameter>> {
        match self {
            Self::Frozen(_) => None,
            Self::Trainable(parameter) => Some(parameter),
        }
    }

    /// The shape of the value.
    pub fn shape(&self) -> Vec<usize> {
        self.value().shape().to_vec()
    }
}
