//! Rotary position embedding.

use crate::device::{RopePairing, RopeRows};
use crate::error::{Error, Result, expect_shape};
use crate::memory::Category;
use crate::{Device, Tape, Tensor, Var};

/// Cosines and sines of angles, f32 \[P, rotated width / 2\], any attention factor included, and each token's row.
#[derive(Debug, Clone)]
pub struct RopeTable {
    cosines: Tensor,
    sines: Tensor,
    /// u32 \[T\].
    rows: Tensor,
    pairing: RopePairing,
}

impl RopeTable {
    /// A table of one row per token, from row-major values.
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
        let each: Vec<u32> = (0..tokens as u32).collect();
        let rows = Tensor::from_slice(device, Category::Workspace, &[tokens], &each)?;
        Ok(Self { cosines: upload(cosines)?, sines: upload(sines)?, rows, pairing })
    }

    /// A table whose row for token t is `rows[t]`.
    ///
    /// # Errors
    /// [`crate::Error::Range`] for a row that is not there; out of memory.
    pub fn indexed(cosines: &Tensor, sines: &Tensor, rows: &[u32], pairing: RopePairing) -> Result<Self> {
        check_rows(rows, cosines.rows())?;
        let tensor = Tensor::from_slice(cosines.device(), Category::Workspace, &[rows.len()], rows)?;
        Ok(Self { cosines: cosines.clone(), sines: sines.clone(), rows: tensor, pairing })
    }

    /// Replaces the tokens' rows, in the same memory.
    ///
    /// # Errors
    /// [`crate::Error::Range`] for a row that is not there; [`crate::Error::Shape`] for another number of tokens.
    pub fn set_rows(&mut self, rows: &[u32]) -> Result<()> {
        check_rows(rows, self.cosines.rows())?;
        expect_shape("rope", "rows", &[rows.len()], self.rows.shape())?;
        self.rows.write_bytes(bytemuck::cast_slice(rows));
        Ok(())
    }

    /// The same angles for tokens whose rows are those of a tensor, u32 \[T\], on the device. Its values must be below
    /// [`Self::len`] when they are read.
    pub fn at(&self, rows: Tensor) -> Self {
        Self { rows, ..self.clone() }
    }

    /// The same angles for other pairs of elements.
    pub fn paired(&self, pairing: RopePairing) -> Self {
        Self { pairing, ..self.clone() }
    }

    /// Whether the table's angles are those of these cosines, in the same memory.
    pub fn reads(&self, cosines: &Tensor) -> bool {
        self.cosines.shares_memory(cosines)
    }

    /// Rows of angles.
    pub fn len(&self) -> usize {
        self.cosines.rows()
    }

    /// Whether there are no angles.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn angles(&self) -> RopeRows<'_> {
        RopeRows { cosines: &self.cosines, sines: &self.sines, rows: &self.rows, pairing: self.pairing }
    }
}

fn check_rows(rows: &[u32], limit: usize) -> Result<()> {
    match rows.iter().find(|&&row| row as usize >= limit) {
        None => Ok(()),
        Some(&row) => Err(Error::Range { operation: "rope", what: "row", actual: row as usize, limit }),
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
    let [rotated] = rope_all(tape, [x], table)?;
    Ok(rotated)
}

/// [`rope`] of several tensors by the same angles; those that lie side by side are rotated together.
///
/// # Errors
/// As [`rope`].
pub fn rope_all<const COUNT: usize>(
    tape: &Tape,
    all: [Var; COUNT],
    table: &RopeTable,
) -> Result<[Var; COUNT]> {
    let shapes: Vec<Vec<usize>> = all.iter().map(|x| x.tensor().shape().to_vec()).collect();
    for (x, shape) in all.iter().zip(&shapes) {
        let (tokens, rotated_width) = (shape.first().copied().unwrap_or(1), 2 * table.cosines.columns());
        expect_shape("rope", "table", table.rows.shape(), &[tokens])?;
        if rotated_width > x.tensor().columns() {
            return Err(Error::Range {
                operation: "rope",
                what: "rotated width",
                actual: rotated_width,
                limit: x.tensor().columns() + 1,
            });
        }
    }
    let input_slots: Vec<Option<usize>> = all.iter().map(Var::slot).collect();
    // Every handle that they come with goes before any is asked to be the only one.
    let rotated: Vec<Tensor> = all.into_iter().map(Var::into_tensor).collect();
    let mut rotated = rotated.into_iter().map(Tensor::into_unique).collect::<Result<Vec<_>>>()?;
    turn(&mut rotated, table, false);
    let wanted = input_slots.iter().any(Option::is_some);
    let table = table.clone();
    let results = tape.push_all(rotated, wanted, |slots| {
        Box::new(move |gradients| {
            let (mut arrived, mut targets) = (Vec::new(), Vec::new());
            for ((slot, input_slot), shape) in slots.into_iter().zip(input_slots).zip(&shapes) {
                if let (Some(d_out), Some(input_slot)) = (gradients.take(slot), input_slot) {
                    arrived.push(d_out.into_unique()?.reshape(shape)?);
                    targets.push(input_slot);
                }
            }
            turn(&mut arrived, &table, true);
            targets.into_iter().zip(arrived).try_for_each(|(slot, d_x)| gradients.add(slot, d_x))
        })
    });
    results.try_into().map_err(|_| unreachable!("invariant: every tensor has a result"))
}

/// Rotates tensors to which these are the only handles.
fn turn(all: &mut [Tensor], table: &RopeTable, inverse: bool) {
    let mut rest = all;
    while let Some((first, others)) = rest.split_first_mut() {
        let device = first.device().clone();
        let both = others.first().and_then(|second| first.beside(second));
        rest = match both {
            Some(mut both) => {
                device.kernels().rope(&mut both, &table.angles(), inverse);
                &mut others[1..]
            }
            None => {
                device.kernels().rope(first, &table.angles(), inverse);
                others
            }
        };
    }
}
