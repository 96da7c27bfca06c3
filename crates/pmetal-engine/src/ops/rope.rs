//! Rotary position embedding.

use crate::device::RopePairing;
use crate::error::{Error, Result, expect_shape};
use crate::memory::Category;
use crate::{Device, Tape, Tensor, Var};

/// Cosines and sines of each token's angles, f32 \[T, rotated width / 2\], any attention factor included.
#[derive(Debug, Clone)]
pub struct RopeTable {
    cosines: Tensor,
    sines: Tensor,
    pairing: RopePairing,
}

impl RopeTable {
    /// A table from row-major values.
    ///
    /// # Errors
    /// [`crate::Error::Shape`] when the lengths are not tokens x half; out of memory.
    pub fn new(
        device: &Device,
        tokens: usize,
        half: usize,
        cosines: &[f32],
        sines: &[f32],
        pairing: RopePairing,
    ) -> Result<Self> {
        let upload = |values| Tensor::from_slice(device, Category::Workspace, &[tokens, half], values);
        Ok(Self { cosines: upload(cosines)?, sines: upload(sines)?, pairing })
    }
}

/// Rotates pairs of the first elements of every head by the token's angles (Su et al., arXiv 2104.09864).
///
/// x \[T, H, E\]; heads wider than twice the table's columns keep their rest. Works in place when `x` is the
/// only handle to its memory. The backward pass keeps nothing but the table. Bytes: x read and written once.
///
/// # Errors
/// [`Error::Shape`] when the table has not one row per token; [`Error::Range`] when it turns more than a head's
/// width; out of memory for a copy.
pub fn rope(tape: &Tape, x: Var, table: &RopeTable) -> Result<Var> {
    let input_slot = x.slot();
    let shape = x.tensor().shape().to_vec();
    let (tokens, rotated_width) = (shape.first().copied().unwrap_or(1), 2 * table.cosines.columns());
    expect_shape("rope", "table", table.cosines.shape(), &[tokens, table.cosines.columns()])?;
    if rotated_width > x.tensor().columns() {
        return Err(Error::Range {
            operation: "rope",
            what: "rotated width",
            actual: rotated_width,
            limit: x.tensor().columns() + 1,
        });
    }
    let mut rotated = x.into_tensor().into_unique()?;
    let device = rotated.device().clone();
    device.kernels().rope(&mut rotated, &table.cosines, &table.sines, table.pairing, false);
    let table = table.clone();
    Ok(tape.push(rotated, input_slot.is_some(), |slot| {
        Box::new(move |gradients| {
            let (Some(d_out), Some(input_slot)) = (gradients.take(slot), input_slot) else { return Ok(()) };
            let mut d_x = d_out.into_unique()?.reshape(&shape)?;
            device.kernels().rope(&mut d_x, &table.cosines, &table.sines, table.pairing, true);
            gradients.add(input_slot, d_x)
        })
    }))
}
