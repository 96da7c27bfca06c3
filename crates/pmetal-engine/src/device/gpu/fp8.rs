//! Matrices of e4m3: rounding, turning, products.

use super::Gpu;
use super::launch::{self, Kernel, lanes};
use super::runtime::{Argument, Fp8Scaling, Matrix, ScaledGemm};
use crate::device::Fp8Kernels;
use crate::device::fp8::ScaledRows;
use crate::error::Result;
use crate::memory::Category;
use crate::{DType, Tensor};

impl Gpu {
    /// Codes and scales are written through handles that are shared: nobody else uses these rows.
    fn round_rows(&self, x: &Tensor, factors: Option<&Tensor>, target: &ScaledRows, start: usize) {
        let columns = x.columns();
        let all: Vec<&Tensor> = [x].into_iter().chain(factors).collect();
        let codes = target.codes.address() + (start * columns) as u64;
        let scales = target.scales.address() + (start * size_of::<f32>()) as u64;
        let pitch = if x.shape().len() == 2 { x.pitch() } else { columns };
        Kernel::new("fp8", "quantise_rows")
            .source(x.dtype())
            .element(x.dtype())
            .row(columns, lanes(columns), launch::is_aligned(columns, &all) && codes.is_multiple_of(8))
            .arguments(&[x.into(), factors.into(), Argument::Address(codes), Argument::Address(scales)])
            .sizes(&[columns, pitch])
            .arguments(&[Argument::U32(factors.is_some().into())])
            .launch(self.runtime.as_ref(), [x.rows(), 1, 1], lanes(columns));
    }

    /// What a product of e4m3 leaves to do.
    fn finish_rows(
        &self,
        out: &mut Tensor,
        scales: Option<[&Tensor; 2]>,
        bias: Option<&Tensor>,
        addend: Option<&Tensor>,
    ) {
        let (rows, columns, pitch) = (out.rows(), out.columns(), out.pitch());
        Kernel::new("fp8", "finish_rows")
            .source(out.dtype())
            .element(out.dtype())
            .aligned(false)
            .arguments(&[out.into(), scales.map(|both| both[0]).into(), scales.map(|both| both[1]).into()])
            .arguments(&[bias.into(), addend.into()])
            .sizes(&[columns, pitch])
            .arguments(&[scales.is_some(), bias.is_some(), addend.is_some()].map(|x| Argument::U32(x.into())))
            .launch(self.runtime.as_ref(), [rows, columns.div_ceil(2048), 1], 256);
    }
}

impl Fp8Kernels for Gpu {
    fn refusal(&self) -> Option<String> {
        self.runtime.fp8().err()
    }

    fn quantise_rows(&self, x: &Tensor, factors: Option<&Tensor>) -> Result<ScaledRows> {
        let (device, category) = (x.device(), Category::Workspace);
        let rows = ScaledRows {
            codes: Tensor::scratch(device, category, DType::E4m3, &[x.rows(), x.columns()])?,
            scales: Tensor::scratch(device, category, DType::F32, &[x.rows()])?,
        };
        self.round_rows(x, factors, &rows, 0);
        Ok(rows)
    }

    fn quantise_into(&self, x: &Tensor, target: &ScaledRows, start: usize) -> Result<()> {
        crate::error::expect_shape("quantise_into", "columns", &[x.columns()], &[target.codes.columns()])?;
        target.codes.slice_rows(start, x.rows())?;
        self.round_rows(x, None, target, start);
        Ok(())
    }

    fn transpose_codes(&self, codes: &Tensor) -> Result<Tensor> {
        let (rows, columns) = (codes.rows(), codes.columns());
        let shape = [columns, rows];
        let mut out = Tensor::scratch(codes.device(), Category::Workspace, DType::E4m3, &shape)?;
        Kernel::new("fp8", "transpose_codes")
            .source(DType::F32)
            .element(DType::F32)
            .aligned(false)
            .arguments(&[codes.into(), (&mut out).into()])
            .sizes(&[rows, columns])
            .launch(self.runtime.as_ref(), [columns.div_ceil(64), rows.div_ceil(64), 1], 256);
        Ok(out)
    }

    fn multiply(
        &self,
        left: &ScaledRows,
        right: &ScaledRows,
        out: &mut Tensor,
        bias: Option<&Tensor>,
        addend: Option<&Tensor>,
    ) -> Result<()> {
        let scaling = self.runtime.fp8().map_err(|reason| crate::Error::Unsupported {
            operation: "product of 8-bit floats",
            device: self.runtime.name(),
            reason,
        })?;
        let scales = [&left.scales, &right.scales];
        let in_product = scaling != Fp8Scaling::Afterwards;
        let (added, addend) = match scaling {
            Fp8Scaling::RowsAndAddend => (addend.map(Tensor::address), None),
            _ => (None, addend),
        };
        self.runtime.scaled_gemm(&ScaledGemm {
            rows: out.rows(),
            columns: out.columns(),
            inner: left.codes.columns(),
            left: left.codes.address(),
            right: right.codes.address(),
            scales: in_product.then(|| scales.map(Tensor::address)),
            addend: added,
            out: Matrix { address: out.address_mut(), pitch: out.pitch(), transposed: false },
            out_dtype: out.dtype(),
        })?;
        if !in_product || bias.is_some() || addend.is_some() {
            self.finish_rows(out, (!in_product).then_some(scales), bias, addend);
        }
        Ok(())
    }
}
