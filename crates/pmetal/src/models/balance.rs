//! The load-balancing loss of a model whose configuration asks for one, as a part of the loss of a forward pass.

use pmetal_engine::ops::Balance;
use pmetal_engine::{Category, Device, Tensor};

use super::decoder::Decoder;
use super::spec::BalanceSpec;
use crate::error::Result;

/// What the balance of one forward pass reads, in the device's memory; overwritten in place by that of another pass.
#[derive(Debug)]
pub struct BalanceInputs {
    spec: BalanceSpec,
    device: Device,
    /// f32 \[T\], 1 for tokens of documents and 0 for padding; absent where there is no padding.
    mask: Option<Tensor>,
    /// f32 \[1\]: what the gradient of the balance is multiplied by.
    factor: Tensor,
}

impl BalanceInputs {
    /// The balance of a forward pass, over no layer yet.
    ///
    /// # Errors
    /// Out of memory.
    pub fn begin(&self) -> Result<Balance> {
        Ok(Balance::new(&self.device, self.spec.experts, self.mask.clone(), self.factor.clone())?)
    }

    /// Its coefficient in the loss.
    pub fn coefficient(&self) -> f32 {
        self.spec.coefficient
    }

    /// Takes on a pass of which the first `tokens` tokens are those of documents, in the same memory.
    pub(crate) fn set(&mut self, tokens: usize, weight: f32) {
        if let Some(mask) = &mut self.mask {
            let rows = mask.elements();
            mask.write_slice(&mask_of(tokens, rows));
        }
        self.factor.write_slice(&[self.spec.coefficient * weight]);
    }
}

fn mask_of(tokens: usize, rows: usize) -> Vec<f32> {
    (0..rows).map(|row| if row < tokens { 1.0 } else { 0.0 }).collect()
}

impl Decoder {
    /// What balances the experts over a pass of `rows` tokens, of which the first `tokens` are those of documents; `None`
    /// where the configuration asks for no balance. `weight` is what the loss that it is a part of is multiplied by.
    ///
    /// # Errors
    /// Out of memory.
    pub fn balance_inputs(&self, tokens: usize, rows: usize, weight: f32) -> Result<Option<BalanceInputs>> {
        let Some(spec) = self.spec.balance() else { return Ok(None) };
        let device = self.device().clone();
        let upload =
            |values: &[f32]| Tensor::from_slice(&device, Category::Workspace, &[values.len()], values);
        // Other devices replay a pass for runs that may be shorter.
        let mask =
            (!device.is_host() || tokens < rows).then(|| upload(&mask_of(tokens, rows))).transpose()?;
        let factor = upload(&[spec.coefficient * weight])?;
        Ok(Some(BalanceInputs { spec, device, mask, factor }))
    }
}
