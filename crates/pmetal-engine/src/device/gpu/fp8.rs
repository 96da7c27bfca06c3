//! Matrices of e4m3: rounding, turning, products.

use super::launch::{self, Kernel, lanes};
use super::runtime::{Argument, Fp8Scaling, Matrix, ScaledGemm};
use super::{Gpu, norm_rows, rows_and_columns, shift};
use crate::device::fp8::ScaledRows;
use crate::device::{Finish, Fp8Kernels, GateActivation, NormWeight};
use crate::error::Result;
use crate::memory::Category;
use crate::{DType, Tensor};

/// Vectors of eight that a thread of the rounding gated kernels holds of each row, by how many registers 1024 threads have.
const GATED_VECTORS: usize = 4;
const GATED_BACKWARD_VECTORS: usize = 2;

/// Codes and scales that are still to be written.
fn unwritten(like: &Tensor, rows: usize, columns: usize) -> Result<ScaledRows> {
    let (device, category) = (like.device(), Category::Workspace);
    Ok(ScaledRows {
        codes: Tensor::scratch(device, category, DType::E4m3, &[rows, columns])?,
        scales: Tensor::scratch(device, category, DType::F32, &[rows])?,
    })
}

/// Threads of a rounding gated kernel; `None` for rows that it does not hold.
fn gated_lanes(columns: usize, vectors: usize, tensors: &[&Tensor]) -> Option<usize> {
    let threads = columns.div_ceil(8 * vectors).next_multiple_of(32);
    (threads <= 1024 && launch::is_aligned(columns, tensors)).then_some(threads)
}

fn gated_kernel(
    (kernel, vectors): (&'static str, usize),
    dtype: DType,
    activation: GateActivation,
) -> Kernel {
    Kernel::new("gated", kernel)
        .element(dtype)
        .activation(activation)
        .aligned(true)
        .number("VECTORS", vectors)
}

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
        let rows = unwritten(x, x.rows(), x.columns())?;
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
            .launch(self.runtime.as_ref(), [columns.div_ceil(128), rows.div_ceil(128), 1], 256);
        Ok(out)
    }

    fn adds_in_product(&self) -> bool {
        self.runtime.fp8() == Ok(Fp8Scaling::RowsAndAddend)
    }

    fn multiply(
        &self,
        left: &ScaledRows,
        right: &ScaledRows,
        out: &mut Tensor,
        finish: &Finish<'_>,
    ) -> Result<()> {
        let scaling = self.runtime.fp8().map_err(|reason| crate::Error::Unsupported {
            operation: "product of 8-bit floats",
            device: self.runtime.name(),
            reason,
        })?;
        let scales = [&left.scales, &right.scales];
        let in_product = scaling != Fp8Scaling::Afterwards;
        let held = (finish.accumulate && scaling != Fp8Scaling::RowsAndAddend)
            .then(|| out.copy(Category::Workspace))
            .transpose()?;
        let (added, addend) = match scaling {
            Fp8Scaling::RowsAndAddend if finish.accumulate => (Some(out.address()), None),
            Fp8Scaling::RowsAndAddend => (finish.residual.map(Tensor::address), None),
            _ => (None, held.as_ref().or(finish.residual)),
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
        if !in_product || finish.bias.is_some() || addend.is_some() {
            self.finish_rows(out, (!in_product).then_some(scales), finish.bias, addend);
        }
        Ok(())
    }

    fn rms_norm_rounded(
        &self,
        x: &Tensor,
        weight: Option<&Tensor>,
        kind: NormWeight,
        epsilon: f32,
        out: &mut Tensor,
    ) -> Result<Option<ScaledRows>> {
        let (rows, inner, width) = norm_rows(x);
        let threads = launch::lanes_of(rows, width);
        let all: Vec<&Tensor> = [x, &*out].into_iter().chain(weight).collect();
        if inner != 1 || !launch::is_aligned(width, &all) || !launch::holds(width, threads) {
            return Ok(None);
        }
        let codes = unwritten(x, rows, width)?;
        Kernel::new("norm", "rms_norm")
            .element(x.dtype())
            .weight(weight.map_or(DType::F32, Tensor::dtype))
            .row(width, threads, true)
            .define("CODES", true)
            .arguments(&[x.into(), weight.into(), out.into()])
            .sizes(&[rows, width, inner, x.pitch(), out.pitch()])
            .arguments(&[Argument::F32(epsilon), Argument::F32(shift(kind))])
            .arguments(&[Argument::U32(weight.is_some().into())])
            .arguments(&[(&codes.codes).into(), (&codes.scales).into()])
            .launch(self.runtime.as_ref(), [rows, 1, 1], threads);
        Ok(Some(codes))
    }

    fn gated_rounded(
        &self,
        activation: GateActivation,
        gate: &Tensor,
        up: &Tensor,
        out: &mut Tensor,
    ) -> Result<Option<ScaledRows>> {
        let (rows, columns) = rows_and_columns(gate);
        let is_narrow = gate.dtype().bytes() == 2;
        let vectors = if is_narrow { GATED_VECTORS } else { GATED_BACKWARD_VECTORS };
        let Some(threads) = gated_lanes(columns, vectors, &[gate, up, out]) else { return Ok(None) };
        let codes = unwritten(gate, rows, columns)?;
        gated_kernel(("gated_codes", vectors), gate.dtype(), activation)
            .arguments(&[gate.into(), up.into(), (&mut *out).into()])
            .arguments(&[(&codes.codes).into(), (&codes.scales).into()])
            .sizes(&[columns, gate.pitch(), up.pitch(), out.pitch()])
            .launch(self.runtime.as_ref(), [rows, 1, 1], threads);
        Ok(Some(codes))
    }

    fn gated_backward_rounded(
        &self,
        activation: GateActivation,
        gate: &mut Tensor,
        up: &mut Tensor,
        d_out: &Tensor,
        factors: &Tensor,
    ) -> Result<Option<ScaledRows>> {
        let (rows, columns) = rows_and_columns(gate);
        crate::error::expect_shape("gated_backward_rounded", "factors", factors.shape(), &[2 * columns])?;
        let Some(threads) = gated_lanes(columns, GATED_BACKWARD_VECTORS, &[gate, up, d_out, factors]) else {
            return Ok(None);
        };
        let codes = unwritten(gate, rows, 2 * columns)?;
        let [own_gate, own_up] = [gate.address_mut(), up.address_mut()].map(Argument::Address);
        let (gate_pitch, up_pitch) = (gate.pitch(), up.pitch());
        gated_kernel(("gated_backward_codes", GATED_BACKWARD_VECTORS), gate.dtype(), activation)
            .arguments(&[own_gate, own_up, d_out.into(), own_gate, own_up, factors.into()])
            .arguments(&[(&codes.codes).into(), (&codes.scales).into()])
            .sizes(&[columns, gate_pitch, up_pitch, d_out.pitch(), gate_pitch, up_pitch])
            .launch(self.runtime.as_ref(), [rows, 1, 1], threads);
        Ok(Some(codes))
    }
}
