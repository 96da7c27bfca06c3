//! The load-balancing loss of mixtures of experts (Fedus et al., arXiv 2101.03961, equations 4 to 6).

use std::cell::{Ref, RefCell};
use std::rc::Rc;

use crate::device::{BalanceSlope, Gate, Router};
use crate::error::{Error, Result, expect_dtype, expect_shape};
use crate::memory::Category;
use crate::{DType, Device, Tensor};

/// The balance of the experts of all layers over one micro-batch; clones share it.
///
/// The loss is X times the sum over experts of how often it was chosen times its mean probability, both over all tokens of
/// all layers, and over all k choices, as `transformers` computes it. Every layer's [`super::route`] is given it: that adds
/// the layer in the forward pass, but not when a block is computed again, and its gradient in the backward pass, when all
/// layers have been added.
#[derive(Debug, Clone)]
pub struct Balance(Rc<State>);

#[derive(Debug)]
struct State {
    experts: usize,
    mask: Option<Tensor>,
    factor: Tensor,
    sums: RefCell<Tensor>,
}

impl Balance {
    /// The balance of no layer yet. `mask`, f32 \[T\], weighs tokens: 1 for those that count, 0 for others. `factor`, f32
    /// \[1\], is the gradient of this loss: its coefficient times whatever the whole loss is multiplied by. Both are read
    /// where they lie, so that recorded work reads what they hold when it is replayed.
    ///
    /// # Errors
    /// [`Error::DType`] for a mask or factor of another type; [`Error::Shape`] for more than one factor; out of memory.
    pub fn new(device: &Device, experts: usize, mask: Option<Tensor>, factor: Tensor) -> Result<Self> {
        expect_dtype("balance", "factor", factor.dtype(), DType::F32)?;
        expect_shape("balance", "factor", factor.shape(), &[1])?;
        if let Some(mask) = &mask {
            expect_dtype("balance", "mask", mask.dtype(), DType::F32)?;
        }
        let sums = Tensor::zeros(device, Category::Activations, DType::F32, &[2 * experts + 1])?;
        Ok(Self(Rc::new(State { experts, mask, factor, sums: RefCell::new(sums) })))
    }

    /// The loss over the layers so far, f32 \[1\] on the device, the coefficient not included; zero without tokens.
    ///
    /// # Errors
    /// Out of memory.
    pub fn loss(&self) -> Result<Tensor> {
        let sums = self.sums();
        let mut loss = Tensor::scratch(sums.device(), Category::Workspace, DType::F32, &[1])?;
        sums.device().kernels().experts().balance_loss(&sums, &mut loss);
        Ok(loss)
    }

    pub(super) fn check(&self, router: &Router, logits: &Tensor) -> Result<()> {
        expect_shape("route", "balance", &[self.0.experts], &[logits.columns()])?;
        if let Some(mask) = &self.0.mask {
            expect_shape("route", "mask of the balance", mask.shape(), &[logits.rows()])?;
        }
        if router.gate != Gate::Softmax {
            let reason = "only experts that are chosen by a softmax are balanced".to_owned();
            return Err(Error::Unsupported { operation: "route", device: logits.device().name(), reason });
        }
        Ok(())
    }

    pub(super) fn add(&self, logits: &Tensor, chosen: &Tensor) -> Result<()> {
        let mut sums = self.0.sums.borrow_mut();
        logits.device().kernels().experts().add_balance(logits, chosen, self.0.mask.as_ref(), &mut sums)
    }

    pub(super) fn sums(&self) -> Ref<'_, Tensor> {
        self.0.sums.borrow()
    }

    pub(super) fn slope<'a>(&'a self, sums: &'a Tensor) -> BalanceSlope<'a> {
        BalanceSlope { sums, mask: self.0.mask.as_ref(), factor: &self.0.factor }
    }
}
