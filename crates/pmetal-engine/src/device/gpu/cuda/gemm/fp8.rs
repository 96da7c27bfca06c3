//! Products of e4m3, with scales of rows where the library has them (cuBLASLt 12.9 on compute capability 9.0).

use super::*;
use crate::DType;
use crate::device::gpu::runtime::{Fp8Scaling, Matrix, ScaledGemm};

/// Whether sums stay in the matrix unit, with fewer bits than f32, for the whole inner dimension.
pub(super) const FAST_SUMS: bool = true;

/// The product in the terms of all others.
fn plain(gemm: &ScaledGemm) -> Gemm {
    let operand = |address, transposed| Matrix { address, pitch: gemm.inner, transposed };
    Gemm {
        rows: gemm.rows,
        columns: gemm.columns,
        inner: gemm.inner,
        left: operand(gemm.left, false),
        right: operand(gemm.right, true),
        operands: DType::E4m3,
        out: gemm.out,
        out_dtype: gemm.out_dtype,
        bias: None,
        scale: 1.0,
        accumulate: false,
        addend: gemm.addend,
        tf32: false,
    }
}

impl Products {
    /// What the library does with scales; the reason where it has no products of e4m3.
    pub(in super::super) fn fp8_scaling(&self) -> std::result::Result<Fp8Scaling, String> {
        // The probe looks for an algorithm; nothing is computed, so any address serves.
        let address = self.workspace;
        let probe = |scales, addend| {
            let out = Matrix { address, pitch: 64, transposed: false };
            let gemm = ScaledGemm {
                rows: 64,
                columns: 64,
                inner: 64,
                left: address,
                right: address,
                scales,
                addend,
                out,
                out_dtype: DType::Bf16,
            };
            let problem = Problem::scaled(&plain(&gemm), scales.is_some()).map_err(unsupported)?;
            let plan = self.plan_fp8(&problem, scales)?;
            self.candidates(&problem, &plan).map(drop)
        };
        if probe(Some([address; 2]), Some(address)).is_ok() {
            return Ok(Fp8Scaling::RowsAndAddend);
        }
        if probe(Some([address; 2]), None).is_ok() {
            return Ok(Fp8Scaling::Rows);
        }
        match probe(None, None) {
            Ok(()) => Ok(Fp8Scaling::Afterwards),
            Err(error) => Err(format!("cuBLASLt has no products of 8-bit floats here: {error}")),
        }
    }

    fn plan_fp8(&self, problem: &Problem, scales: Option<[u64; 2]>) -> Result<Plan> {
        self.plan_with(problem, |operation| self.set_scales(operation, scales))
    }

    fn set_scales(&self, operation: &Owned, scales: Option<[u64; 2]>) -> Result<()> {
        let Some([left, right]) = scales else { return Ok(()) };
        self.set(operation, DESCRIPTOR_A_SCALE_POINTER, &right)?;
        self.set(operation, DESCRIPTOR_B_SCALE_POINTER, &left)
    }

    /// As [`Self::multiply`].
    pub(in super::super) fn multiply_fp8(
        &mut self,
        gemm: &ScaledGemm,
        scratch: &dyn Fn(usize) -> Option<u64>,
        give: &dyn Fn(u64, usize),
    ) -> Result<()> {
        let problem = Problem::scaled(&plain(gemm), gemm.scales.is_some()).map_err(unsupported)?;
        let call = Call {
            a: gemm.right,
            b: gemm.left,
            out: gemm.out.address,
            addend: gemm.addend.unwrap_or(gemm.out.address),
            scale: 1.0,
            accumulate: gemm.addend.is_some(),
        };
        let mut plan = match self.plans.remove(&problem) {
            Some(plan) => plan,
            None => self.plan_fp8(&problem, gemm.scales)?,
        };
        self.set_scales(&plan.operation, gemm.scales)?;
        if !plan.settled {
            self.settle(&problem, &mut plan, call, scratch, give)?;
        }
        let result = self.run(&plan, call, &plan.algorithm);
        self.plans.insert(problem, plan);
        result
    }
}
