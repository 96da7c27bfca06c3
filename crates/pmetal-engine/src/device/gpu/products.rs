//! Matrix products, by the driver's library.

use super::Gpu;
use super::runtime::{Gemm, Matrix};
use crate::device::{Arithmetic, Finish, Operand};
use crate::error::{Error, Result};
use crate::memory::Category;
use crate::{DType, Tensor};

/// Sizes above which what is over from whole units is multiplied apart (smaller ones in tests, to have both).
const LARGE: usize = if cfg!(test) { 64 } else { 4096 };

/// Elements of 16 bytes.
const UNIT: usize = 8;

/// What of a large size is in whole units, where something is over: the library is six times slower on all of a matrix whose
/// vocabulary is odd than on its even part.
fn whole_part(size: usize) -> Option<usize> {
    (size > LARGE && !size.is_multiple_of(UNIT)).then(|| size / UNIT * UNIT)
}

/// Rows of an operand as it is multiplied from the left, or its columns from the right, which the stored matrix may have the
/// other way round.
fn part_of(operand: &Operand<'_>, of_rows: bool, first: usize, count: usize) -> Result<Tensor> {
    let tensor = operand.tensor;
    if of_rows != operand.transposed {
        return tensor.slice_rows(first, count);
    }
    tensor.block([0, tensor.rows()], [first, count])
}

impl Gpu {
    /// One product in two parts where it has a large size that is not in whole units; false where it has none.
    fn multiply_in_parts(
        &self,
        (left, right): &(Operand<'_>, Operand<'_>),
        out: &mut Tensor,
        finish: &Finish<'_>,
        arithmetic: Arithmetic,
    ) -> Result<bool> {
        let is_plain = |tensor: &Tensor| tensor.shape().len() == 2 && tensor.dtype().bytes() == 2;
        if finish.bias.is_some()
            || finish.residual.is_some()
            || out.shape().len() != 2
            || !is_plain(left.tensor)
            || !is_plain(right.tensor)
        {
            return Ok(false);
        }
        let (rows, columns) = (out.rows(), out.columns());
        if let Some(whole) = whole_part(columns) {
            for (first, count) in [(0, whole), (whole, columns - whole)] {
                let part = part_of(right, false, first, count)?;
                let mut block = out.block([0, rows], [first, count])?;
                let part = Operand { tensor: &part, transposed: right.transposed };
                self.multiply(&[(*left, part)], &mut block, finish, arithmetic)?;
            }
            return Ok(true);
        }
        let inner = if left.transposed { left.tensor.rows() } else { left.tensor.columns() };
        let Some(whole) = whole_part(inner) else { return Ok(false) };
        // The little that is over comes first, so that it is what is rounded twice.
        for (first, count, accumulate) in [(whole, inner - whole, finish.accumulate), (0, whole, true)] {
            let (a, b) = (part_of(left, false, first, count)?, part_of(right, true, first, count)?);
            let product = (
                Operand { tensor: &a, transposed: left.transposed },
                Operand { tensor: &b, transposed: right.transposed },
            );
            self.multiply(&[product], out, &Finish { accumulate, ..*finish }, arithmetic)?;
        }
        Ok(true)
    }

    pub(super) fn multiply(
        &self,
        products: &[(Operand<'_>, Operand<'_>)],
        out: &mut Tensor,
        finish: &Finish<'_>,
        arithmetic: Arithmetic,
    ) -> Result<()> {
        let is_wide = |(left, right): &(Operand<'_>, Operand<'_>)| {
            operand_type(arithmetic, left.tensor.dtype(), right.tensor.dtype()) == DType::F32
        };
        if out.dtype() != DType::F32 && products.iter().any(is_wide) {
            return self.multiply_wide(products, out, finish, arithmetic);
        }
        if let [product] = products
            && self.multiply_in_parts(product, out, finish, arithmetic)?
        {
            return Ok(());
        }
        let mut accumulate = finish.accumulate;
        let alike = |residual: &&Tensor| residual.is_contiguous() && out.is_contiguous();
        let addend = finish.residual.filter(alike).map(Tensor::address);
        if let Some(residual) = finish.residual.filter(|_| addend.is_none()) {
            self.move_rows(residual, out, 1.0, false);
            accumulate = true;
        }
        let (rows, columns) = (out.rows(), out.columns());
        for (index, (left, right)) in products.iter().enumerate() {
            let operands = operand_type(arithmetic, left.tensor.dtype(), right.tensor.dtype());
            let (left_tensor, right_tensor) =
                (self.in_type(left.tensor, operands)?, self.in_type(right.tensor, operands)?);
            let inner = if left.transposed { left.tensor.rows() } else { left.tensor.columns() };
            if rows == 0 || columns == 0 {
                return Ok(());
            }
            if inner == 0 && accumulate {
                continue;
            }
            if inner == 0 {
                return Err(Error::Unsupported {
                    operation: "matmul",
                    device: self.runtime.name(),
                    reason: "the products have no inner dimension".to_owned(),
                });
            }
            self.runtime.gemm(&Gemm {
                rows,
                columns,
                inner,
                left: matrix(&left_tensor, left.transposed),
                right: matrix(&right_tensor, right.transposed),
                operands,
                out: Matrix { address: out.address_mut(), pitch: row_pitch(out), transposed: false },
                out_dtype: out.dtype(),
                // Added once, with the first product.
                bias: finish.bias.filter(|_| index == 0).map(|bias| (bias.address(), bias.dtype())),
                scale: finish.scale,
                accumulate: accumulate || index > 0,
                addend: addend.filter(|_| index == 0),
                tf32: false,
            })?;
        }
        Ok(())
    }

    /// Products of f32 for an output of 16 bits, which libraries do not write.
    fn multiply_wide(
        &self,
        products: &[(Operand<'_>, Operand<'_>)],
        out: &mut Tensor,
        finish: &Finish<'_>,
        arithmetic: Arithmetic,
    ) -> Result<()> {
        let mut wide = Tensor::scratch(out.device(), Category::Workspace, DType::F32, out.shape())?;
        let held = if finish.accumulate { Some(&*out) } else { finish.residual };
        if let Some(held) = held {
            self.move_rows(held, &mut wide, 1.0, false);
        }
        let finish = Finish { accumulate: held.is_some(), residual: None, ..*finish };
        self.multiply(products, &mut wide, &finish, arithmetic)?;
        self.move_rows(&wide, out, 1.0, false);
        Ok(())
    }

    /// The tensor itself, or a copy in another type.
    pub(super) fn in_type(&self, tensor: &Tensor, dtype: DType) -> Result<Tensor> {
        if tensor.dtype() == dtype {
            return Ok(tensor.clone());
        }
        let mut copy = Tensor::scratch(tensor.device(), Category::Workspace, dtype, tensor.shape())?;
        self.move_rows(tensor, &mut copy, 1.0, false);
        Ok(copy)
    }
}

/// Elements between the rows that a product sees: all leading dimensions are rows.
fn row_pitch(tensor: &Tensor) -> usize {
    if tensor.shape().len() == 2 { tensor.pitch() } else { tensor.columns() }
}

fn matrix(tensor: &Tensor, transposed: bool) -> Matrix {
    Matrix { address: tensor.address(), pitch: row_pitch(tensor), transposed }
}

fn operand_type(arithmetic: Arithmetic, left: DType, right: DType) -> DType {
    match arithmetic {
        Arithmetic::Bf16 => DType::Bf16,
        _ if left == DType::F16 && right == DType::F16 => DType::F16,
        _ => DType::F32,
    }
}
