//! Groups whose frozen weights are kept in eight bits (e4m3), with one scale for each output.
//!
//! x is rounded to codes with a scale for each token, and one product of codes gives every layer's result. Backward, the
//! scales of the weights become factors of d_out before that is rounded for each token, because they belong to the
//! dimension that is summed over. Adapters stay out of it, in the type of activations.

use super::{LinearGroup, Packed};
use crate::device::{Arithmetic, Finish, Fp8Kernels, GradientCodes, Operand, ScaledRows};
use crate::error::{Error, Result};
use crate::memory::Category;
use crate::ops::Linear;
use crate::{DType, Device, Tensor, Weight};

/// The weights of a group in eight bits.
#[derive(Debug, Clone)]
pub(super) struct Quantised {
    /// \[sum of N, D\].
    pub(super) rows: ScaledRows,
    /// f32 \[D\]: the scales of the transpose, whose rows have none.
    ones: Tensor,
}

/// Sizes that products of codes take are multiples of this.
const UNIT: usize = 16;

pub(super) fn unsupported(layers: &[Linear], reason: &str) -> Error {
    let device = layers[0].weight.value().device().name();
    Error::Unsupported { operation: "a group with weights of eight bits", device, reason: reason.to_owned() }
}

/// The kernels; that the device has them was asked before anything was rounded.
fn kernels(device: &Device) -> Result<&dyn Fp8Kernels> {
    device.kernels().fp8().ok_or_else(|| Error::Unsupported {
        operation: "products of 8-bit floats",
        device: device.name(),
        reason: "the device has no kernels for them".to_owned(),
    })
}

impl LinearGroup {
    /// Rounds the frozen weights to eight bits (e4m3) with a scale for each output and drops the originals; false, with
    /// nothing done, where a size is not a multiple of 16. Call [`Self::pack`] afterwards.
    ///
    /// # Errors
    /// [`Error::Unsupported`] where the device has no such products or a weight is trained; out of memory.
    pub fn quantise(&mut self) -> Result<bool> {
        let first = self.layers[0].weight.value();
        let (device, width) = (first.device().clone(), first.columns());
        drop(first);
        if let Some(reason) = device.fp8_refusal() {
            return Err(unsupported(&self.layers, &reason));
        }
        if self.layers.iter().any(|layer| layer.weight.parameter().is_some()) {
            return Err(unsupported(&self.layers, "a weight is trained"));
        }
        let features: Vec<usize> = self.layers.iter().map(|layer| layer.weight.shape()[0]).collect();
        if features.iter().chain([&width]).any(|size| !size.is_multiple_of(UNIT)) {
            return Ok(false);
        }
        let rows = features.iter().sum();
        let all = ScaledRows {
            codes: Tensor::scratch(&device, Category::Weights, DType::E4m3, &[rows, width])?,
            scales: Tensor::scratch(&device, Category::Weights, DType::F32, &[rows])?,
        };
        let mut row = 0;
        for (layer, count) in self.layers.iter_mut().zip(features) {
            kernels(&device)?.quantise_into(&layer.weight.value(), &all, row)?;
            layer.weight = Weight::Frozen(all.codes.slice_rows(row, count)?);
            row += count;
        }
        self.packed = None;
        let ones = Tensor::from_slice(&device, Category::Weights, &[width], &vec![1.0_f32; width])?;
        self.quantised = Some(Quantised { rows: all, ones });
        Ok(true)
    }

    /// Whether the group reads its input in eight bits too, so that who computes it should round it on the way out.
    pub fn reads_codes(&self) -> bool {
        self.quantised.is_some()
    }

    /// What gradients of the group's results, side by side, are multiplied with before they are rounded to eight bits;
    /// `None` where they are not.
    pub fn gradient_factors(&self) -> Option<Tensor> {
        self.quantised.as_ref().map(|quantised| quantised.rows.scales.clone())
    }
}

#[cfg(test)]
impl LinearGroup {
    pub(crate) fn quantised_rows(&self) -> Option<ScaledRows> {
        self.quantised.as_ref().map(|quantised| quantised.rows.clone())
    }
}

impl Packed {
    /// B of all layers \[sum of N, S\], where adapters are.
    fn b_alone(&self) -> Result<Option<Tensor>> {
        let block = |a: &Tensor| self.wide.block([0, self.wide.rows()], [0, a.rows()]);
        self.a.as_ref().map(block).transpose()
    }

    /// Every layer's result into `out`, from an input of which `codes` may be known.
    pub(super) fn forward_fp8(
        &self,
        weight: &Quantised,
        (input, codes): (&Tensor, Option<&ScaledRows>),
        reduced: Option<&Tensor>,
        residual: Option<&Tensor>,
        out: &mut Tensor,
    ) -> Result<()> {
        let device = input.device().clone();
        let kernels = kernels(&device)?;
        let rounded = match codes {
            Some(codes) => codes.clone(),
            None => kernels.quantise_rows(input, None)?,
        };
        // The addend must lie as the output does.
        let residual = residual.map(Tensor::contiguous).transpose()?;
        let finish = Finish { bias: self.bias.as_ref(), residual: residual.as_ref(), ..Finish::STORE };
        let (Some(reduced), Some(b)) = (reduced, self.b_alone()?) else {
            return kernels.multiply(&rounded, &weight.rows, out, &finish);
        };
        let product = [(Operand::plain(reduced), Operand::transposed(&b))];
        let arithmetic = Arithmetic::of(input.dtype());
        if kernels.adds_in_product() {
            // The long product reads what it adds to beside its own work, the short one would wait for it.
            device.kernels().matmul(&product, out, &finish, arithmetic)?;
            return kernels.multiply(&rounded, &weight.rows, out, &Finish::ACCUMULATE);
        }
        kernels.multiply(&rounded, &weight.rows, out, &finish)?;
        device.kernels().matmul(&product, out, &Finish::ACCUMULATE, arithmetic)
    }

    /// The gradients of x, when wanted, adapters included, and of s x A^T / s, when there are adapters.
    pub(super) fn backward_fp8(
        &self,
        (d_out, codes): (&Tensor, Option<ScaledRows>),
        wants_input: bool,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let device = d_out.device().clone();
        let (tokens, dtype) = (d_out.rows(), d_out.dtype());
        let (plain, arithmetic) = (device.kernels(), Arithmetic::of(dtype));
        let scratch = |columns| Tensor::scratch(&device, Category::Activations, dtype, &[tokens, columns]);
        let d_reduced = match self.b_alone()? {
            Some(b) => {
                let mut d_reduced = scratch(b.columns())?;
                let product = (Operand::plain(d_out), Operand::plain(&b));
                plain.matmul(&[product], &mut d_reduced, &Finish::STORE, arithmetic)?;
                Some(d_reduced)
            }
            None => None,
        };
        let Some(weight) = self.quantised.as_ref().filter(|_| wants_input) else {
            return Ok((None, d_reduced));
        };
        let mut d_input = scratch(self.weight.columns())?;
        let kernels = kernels(&device)?;
        let rounded = match codes {
            Some(codes) => codes,
            None => kernels.quantise_rows(d_out, Some(&weight.rows.scales))?,
        };
        let turned =
            ScaledRows { codes: kernels.transpose_codes(&weight.rows.codes)?, scales: weight.ones.clone() };
        let (Some(reduced), Some(a)) = (&d_reduced, &self.a) else {
            kernels.multiply(&rounded, &turned, &mut d_input, &Finish::STORE)?;
            return Ok((Some(d_input), d_reduced));
        };
        let (product, finish) = ([(Operand::plain(reduced), Operand::plain(a))], Finish::scaled(self.scale));
        if kernels.adds_in_product() {
            plain.matmul(&product, &mut d_input, &finish, arithmetic)?;
            kernels.multiply(&rounded, &turned, &mut d_input, &Finish::ACCUMULATE)?;
        } else {
            kernels.multiply(&rounded, &turned, &mut d_input, &Finish::STORE)?;
            plain.matmul(&product, &mut d_input, &Finish { accumulate: true, ..finish }, arithmetic)?;
        }
        Ok((Some(d_input), d_reduced))
    }

    /// The codes of the gradients of all layers side by side, where every part carries them, in its place and times the
    /// scales of these weights.
    pub(super) fn gradient_codes(
        &self,
        parts: &[Option<GradientCodes>],
        widths: &[usize],
    ) -> Option<ScaledRows> {
        let own = &self.quantised.as_ref()?.rows;
        let all = &parts.first()?.as_ref()?.rows;
        let mut first = 0;
        for (part, width) in parts.iter().zip(widths) {
            let part = part.as_ref()?;
            let is_its_own = part.factors.address() == own.scales.address() && part.first == first;
            if !is_its_own || part.rows.codes.address() != all.codes.address() {
                return None;
            }
            first += width;
        }
        (first == all.codes.columns()).then(|| all.clone())
    }
}
