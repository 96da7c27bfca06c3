//! Products of weights of eight bits.

use super::{Finish, GateActivation, NormWeight};
use crate::Tensor;
use crate::error::Result;

/// The value of a code of e4m3: sign, four bits of exponent biased by 7, three of mantissa; 0x7f and 0xff are NaN.
pub(crate) fn e4m3_value(code: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(code >> 3 & 15), f32::from(code & 7));
    let size = match (exponent, code & 7) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa / 512.0,
        _ => (1.0 + mantissa / 8.0) * 2.0_f32.powi(exponent - 7),
    };
    if code & 0x80 == 0 { size } else { -size }
}

/// A matrix of e4m3 with a scale f32 for each row.
#[derive(Debug, Clone)]
pub struct ScaledRows {
    /// e4m3 \[N, K\], without gaps.
    pub codes: Tensor,
    /// f32 \[N\].
    pub scales: Tensor,
}

/// The codes of a gradient that lies in several tensors side by side, as each of these carries them.
#[derive(Clone)]
pub(crate) struct GradientCodes {
    /// Of all columns, times `factors`.
    pub(crate) rows: ScaledRows,
    /// What the columns were multiplied with before they were rounded.
    pub(crate) factors: Tensor,
    /// The first column of the tensor that carries this.
    pub(crate) first: usize,
}

impl GradientCodes {
    /// The codes of tensors of these widths side by side, where each carries its own columns of the same ones.
    pub(crate) fn of_all(parts: &[Option<Self>], widths: &[usize]) -> Option<Self> {
        let all = parts.first()?.as_ref()?;
        let mut first = all.first;
        for (part, width) in parts.iter().zip(widths) {
            let part = part.as_ref()?;
            let is_alike = part.rows.codes.address() == all.rows.codes.address()
                && part.factors.address() == all.factors.address();
            if !is_alike || part.first != first {
                return None;
            }
            first += width;
        }
        Some(all.clone())
    }
}

/// Kernels for matrices of e4m3.
pub trait Fp8Kernels {
    /// Why they cannot be used on this device; `None` where they can.
    fn refusal(&self) -> Option<String>;

    /// Rounds each row of x, its columns times `factors` (f32) first, to codes and a scale.
    ///
    /// # Errors
    /// Out of memory.
    fn quantise_rows(&self, x: &Tensor, factors: Option<&Tensor>) -> Result<ScaledRows>;

    /// Overwrites rows from `start` of `target` by those of x, rounded; nobody else may use these rows.
    ///
    /// # Errors
    /// [`crate::Error::Shape`] or [`crate::Error::Range`] where they do not fit.
    fn quantise_into(&self, x: &Tensor, target: &ScaledRows, start: usize) -> Result<()>;

    /// The transpose of codes whose sizes are multiples of 16.
    ///
    /// # Errors
    /// Out of memory.
    fn transpose_codes(&self, codes: &Tensor) -> Result<Tensor>;

    /// Whether [`Self::multiply`] adds to what is there, or a residual, on its way out, with no second pass over the result.
    fn adds_in_product(&self) -> bool;

    /// `out = left right^T`, finished as said; with no factor.
    ///
    /// # Errors
    /// [`crate::Error::Unsupported`] where the driver's library has no kernel for the sizes.
    fn multiply(
        &self,
        left: &ScaledRows,
        right: &ScaledRows,
        out: &mut Tensor,
        finish: &Finish<'_>,
    ) -> Result<()>;

    /// [`super::Kernels::rms_norm`] and what [`Self::quantise_rows`] makes of its result, in one pass; `None`, with
    /// nothing done, for rows that the kernel does not hold.
    ///
    /// # Errors
    /// Out of memory.
    fn rms_norm_rounded(
        &self,
        x: &Tensor,
        weight: Option<&Tensor>,
        kind: NormWeight,
        epsilon: f32,
        out: &mut Tensor,
    ) -> Result<Option<ScaledRows>>;

    /// [`super::Kernels::gated`] and what [`Self::quantise_rows`] makes of its result, likewise.
    ///
    /// # Errors
    /// Out of memory.
    fn gated_rounded(
        &self,
        activation: GateActivation,
        gate: &Tensor,
        up: &Tensor,
        out: &mut Tensor,
    ) -> Result<Option<ScaledRows>>;

    /// [`super::Kernels::gated_backward_in_place`] and what [`Self::quantise_rows`] makes, with `factors`, of the two
    /// gradients side by side, likewise.
    ///
    /// # Errors
    /// Out of memory.
    fn gated_backward_rounded(
        &self,
        activation: GateActivation,
        gate: &mut Tensor,
        up: &mut Tensor,
        d_out: &Tensor,
        factors: &Tensor,
    ) -> Result<Option<ScaledRows>>;
}
