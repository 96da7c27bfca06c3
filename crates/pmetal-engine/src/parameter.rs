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
pub(crate) struct State {
    pub(crate) value: Tensor,
    pub(crate) gradient: Option<Tensor>,
    /// Whether anything was added to the gradient since it was cleared; else it is zero.
    pub(crate) is_reached: bool,
    /// A copy of the value in the type of products, kept up to date.
    pub(crate) shadow: Option<Tensor>,
}

impl Parameter {
    /// A parameter from its f32 value.
    pub fn new(name: impl Into<String>, value: Tensor) -> Arc<Self> {
        Arc::new(Self {
            name: name.into(),
            state: Mutex::new(State { value, gradient: None, is_reached: false, shadow: None }),
        })
    }

    /// The name that checkpoints use.
    pub fn name(&self) -> &str {
        &self.name
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A handle to the current value. Drop it before the next optimizer step, which otherwise copies.
    pub fn value(&self) -> Tensor {
        self.state().value.clone()
    }

    /// Replaces the value.
    pub fn set_value(&self, value: Tensor) {
        let mut state = self.state();
        state.value = value;
        state.refresh_shadow();
    }

    /// Keeps a copy of the value in `shadow`, which has its shape, from now on.
    pub(crate) fn set_shadow(&self, shadow: Tensor) {
        let mut state = self.state();
        state.shadow = Some(shadow);
        state.refresh_shadow();
    }

    /// The copy that is kept, if it is of this type.
    pub(crate) fn shadow_in(&self, dtype: DType) -> Option<Tensor> {
        self.state().shadow.clone().filter(|shadow| shadow.dtype() == dtype)
    }

    /// A handle to the gradient, `None` when no backward pass has reached the parameter.
    pub fn gradient(&self) -> Option<Tensor> {
        let state = self.state();
        state.gradient.clone().filter(|_| state.is_reached)
    }

    /// The gradient's memory, also after an optimizer step has taken it: what a step that changed nothing leaves.
    pub fn last_gradient(&self) -> Option<Tensor> {
        self.state().gradient.clone()
    }

    /// Forgets the gradient: on a CPU its memory too, elsewhere the next one has the same address.
    pub fn clear_gradient(&self) {
        let mut state = self.state();
        let was_reached = std::mem::take(&mut state.is_reached);
        if state.value.is_host() {
            state.gradient = None;
        }
        if let Some(gradient) = state.gradient.as_mut().filter(|_| was_reached) {
            gradient.fill_zero();
        }
    }

    /// Lets `add` add to the gradient, which starts at zero.
    ///
    /// # Errors
    /// What `add` returns, or out of memory for the gradient.
    pub fn accumulate(&self, add: impl FnOnce(&mut Tensor) -> Result<()>) -> Result<()> {
        let mut gradient = self.take_gradient()?;
        let outcome = add(&mut gradient);
        self.put_gradient(gradient);
        outcome
    }

    /// Takes the gradient out to be added to, zero if there is none yet; [`Self::put_gradient`] brings it back.
    pub(crate) fn take_gradient(&self) -> Result<Tensor> {
        let mut state = self.state();
        match state.gradient.take() {
            Some(gradient) => gradient.into_unique(),
            None => {
                let value = &state.value;
                Tensor::zeros(value.device(), Category::Gradients, DType::F32, value.shape())
            }
        }
    }

    /// Brings back what [`Self::take_gradient`] gave.
    pub(crate) fn put_gradient(&self, gradient: Tensor) {
        let mut state = self.state();
        state.gradient = Some(gradient);
        state.is_reached = true;
    }

    /// The value and gradient to be written, the value under no other handle.
    ///
    /// # Errors
    /// Out of memory when the value is shared and must be copied.
    pub(crate) fn unique(&self) -> Result<MutexGuard<'_, State>> {
        let mut state = self.state();
        if !state.value.is_unique() {
            state.value = state.value.copy(Category::Parameters)?;
        }
        Ok(state)
    }
}

impl State {
    fn refresh_shadow(&mut self) {
        if let Some(shadow) = &mut self.shadow {
            let device = self.value.device().clone();
            device.kernels().convert(&self.value, shadow);
        }
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

    /// Copies the value into a tensor of its shape, and every later value if it is trained.
    pub(crate) fn copy_into(&self, mut target: Tensor) -> Result<()> {
        match self {
            Self::Frozen(tensor) => tensor.device().kernels().convert(tensor, &mut target),
            Self::Trainable(parameter) => parameter.set_shadow(target),
        }
        Ok(())
    }

    /// Keeps a copy in the type of products from now on, where the value is trained and products would narrow it at every
    /// use.
    pub(crate) fn keep_copy(&self, dtype: DType) -> Result<()> {
        let value = self.value();
        if self.parameter().is_none() || value.is_host() || value.dtype() == dtype {
            return Ok(());
        }
        let (device, shape) = (value.device().clone(), value.shape().to_vec());
        drop(value);
        self.copy_into(Tensor::zeros(&device, Category::Weights, dtype, &shape)?)
    }

    /// The copy in this type, where one is kept, else the value in its own.
    pub(crate) fn read_in(&self, dtype: DType) -> Tensor {
        let copy = self.parameter().and_then(|parameter| parameter.shadow_in(dtype));
        copy.unwrap_or_else(|| self.value())
    }

    /// The shape of the value.
    pub fn shape(&self) -> Vec<usize> {
        self.value().shape().to_vec()
    }
}
