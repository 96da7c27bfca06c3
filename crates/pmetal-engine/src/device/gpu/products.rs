//! Matrix products, by the driver's library.

use super::Gpu;
use super::runtime::{Gemm, Matrix};
use crate::device::{Arithmetic, Finish, Operand};
use crate::error::{Error, Result};
use crate::memory::Category;
use crate::{DType, Tensor};

impl Gpu {
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
