//! Devices with memory of their own: one kernel set over any driver.
//!
//! The texts of the kernels are in the crate's folder `kernels` and are compiled when the program runs; their heads state
//! what each kernel takes. Everything that is summed is summed in a fixed order, so that results do not change from run to
//! run.

mod attention;
mod choice;
mod counters;
pub(crate) mod cuda;
mod delta;
#[cfg(any(test, feature = "emulator"))]
pub(crate) mod emulator;
mod experts;
mod fp8;
mod gemv;
mod heads;
mod launch;
mod layer_norm;
mod loss;
mod optimizer;
mod products;
mod riding;
pub(crate) mod runtime;
mod sampler;
mod weight_gradients;

use std::sync::Arc;

pub(crate) use optimizer::control_values;
pub(crate) use runtime::Runtime;

use launch::{Kernel, RowGroups, lanes};
use runtime::{Argument, DeviceFacts};

use super::{
    AdamWControl, AdamWEntry, Arithmetic, AttentionMask, AttentionParameters, CrossEntropyParameters,
    DeltaKernels, DropoutMask, ExpertKernels, Finish, Fp8Kernels, GateActivation, HeadCopy, HeadRows, Held,
    Kernels, LayerNorm, NormWeight, Operand, Riding, RopePairing, RopeRows, RowKernel, Share, Sum,
    WeightGradient,
};
use crate::error::Result;
use crate::memory::Category;
use crate::ops::{Cursor, SampleOptions};
use crate::random::RandomKey;
use crate::{DType, Tensor};

/// The kernel set of GPUs.
pub(crate) struct Gpu {
    runtime: Arc<dyn Runtime>,
    facts: DeviceFacts,
    tables: optimizer::Tables,
    counters: counters::Counters,
}

/// Parts that column sums over many rows are divided into.
const SUM_PARTS: usize = 64;

impl Gpu {
    pub(crate) fn new(runtime: Arc<dyn Runtime>) -> Self {
        let (facts, counters) = (runtime.facts(), counters::Counters::new(&runtime));
        Self { runtime, facts, tables: optimizer::Tables::default(), counters }
    }

    /// `target = factor * source`, or `+=`; any float types and pitches.
    fn move_rows(&self, source: &Tensor, target: &mut Tensor, factor: f32, accumulate: bool) {
        let ([rows, columns], pitches) = common_rows(source, target);
        let addresses = [source.address(), target.address_mut()];
        let aligned = [columns, pitches[0], pitches[1]].iter().all(|size| size.is_multiple_of(8))
            && addresses.iter().all(|address| address.is_multiple_of(16));
        Kernel::new("elementwise", "convert_rows")
            .source(source.dtype())
            .element(target.dtype())
            .aligned(aligned)
            .arguments(&addresses.map(Argument::Address))
            .sizes(&[columns])
            .sizes(&pitches)
            .arguments(&[Argument::F32(factor), Argument::U32(accumulate.into())])
            .launch(self.runtime.as_ref(), [rows, columns.div_ceil(2048), 1], 256);
    }

    /// Adds `factor` times the column sums of `x` \[rows, columns\] to f32 \[columns\].
    fn add_column_sums(&self, sums: &Tensor, parts: usize, factor: f32, out: &mut Tensor) {
        let columns = out.elements();
        Kernel::new("elementwise", "add_partial_sums")
            .source(DType::F32)
            .element(DType::F32)
            .arguments(&[sums.into(), out.into()])
            .sizes(&[parts, columns])
            .arguments(&[Argument::F32(factor)])
            .launch(self.runtime.as_ref(), [columns.div_ceil(128), 1, 1], 128);
    }

    fn scratch(like: &Tensor, dtype: DType, shape: &[usize]) -> Option<Tensor> {
        Tensor::scratch(like.device(), Category::Workspace, dtype, shape).ok()
    }
}

/// Rows and columns that two tensors of as many elements can both be read by, and the pitches of both.
fn common_rows(source: &Tensor, target: &Tensor) -> ([usize; 2], [usize; 2]) {
    const COLUMNS: usize = 2048;
    let elements = source.elements();
    if source.is_contiguous() && target.is_contiguous() {
        if elements.is_multiple_of(COLUMNS) {
            return ([elements / COLUMNS, COLUMNS], [COLUMNS; 2]);
        }
        if elements < COLUMNS * 65_535 {
            return ([1, elements], [elements.next_multiple_of(8); 2]);
        }
    }
    // The side that has gaps says what a row is.
    let (rows, columns) = rows_and_columns(if source.is_contiguous() { target } else { source });
    let pitch = |tensor: &Tensor| if tensor.is_contiguous() { columns } else { tensor.pitch() };
    ([rows, columns], [pitch(source), pitch(target)])
}

/// Rows of the outermost dimension, and elements of one.
fn rows_and_columns(tensor: &Tensor) -> (usize, usize) {
    let rows = tensor.shape().first().copied().unwrap_or(1);
    (rows, tensor.elements().checked_div(rows).unwrap_or(0))
}

fn shift(kind: NormWeight) -> f32 {
    match kind {
        NormWeight::Plain => 0.0,
        NormWeight::PlusOne => 1.0,
    }
}

/// How the rows of a norm lie in a tensor: rows of the outermost dimension hold `inner` of them.
fn norm_rows(x: &Tensor) -> (usize, usize, usize) {
    let (outer, width) = (x.shape().first().copied().unwrap_or(1), x.columns());
    let rows = x.elements().checked_div(width).unwrap_or(0);
    (rows, rows.checked_div(outer).unwrap_or(1).max(1), width)
}

impl Kernels for Gpu {
    fn name(&self) -> &'static str {
        self.runtime.name()
    }

    fn matmul(
        &self,
        products: &[(Operand<'_>, Operand<'_>)],
        out: &mut Tensor,
        finish: &Finish<'_>,
        arithmetic: Arithmetic,
    ) -> Result<()> {
        match gemv::Gemv::of(products, out, finish) {
            Some(gemv) => gemv.launch(self.runtime.as_ref(), out),
            None => return self.multiply(products, out, finish, arithmetic),
        }
        Ok(())
    }

    fn add_weight_gradients(&self, gradients: &mut [WeightGradient<'_>]) -> Result<()> {
        self.add_gradients(gradients)
    }

    fn embedding(&self, ids: &Tensor, table: &Tensor, scale: f32, out: &mut Tensor) {
        let columns = table.columns();
        Kernel::new("elementwise", "embedding")
            .source(table.dtype())
            .element(out.dtype())
            .aligned(launch::is_aligned(columns, &[table, out]))
            .arguments(&[table.into(), ids.into(), out.into()])
            .sizes(&[columns, out.pitch()])
            .arguments(&[Argument::F32(scale)])
            .launch(self.runtime.as_ref(), [ids.elements(), columns.div_ceil(2048), 1], 256);
    }

    fn embedding_backward(
        &self,
        ids: &Tensor,
        d_out: &Tensor,
        scale: f32,
        skipped: Option<u32>,
        d_table: &mut Tensor,
    ) {
        let (tokens, columns) = (ids.elements(), d_table.columns());
        Kernel::new("elementwise", "embedding_gradient")
            .source(d_out.dtype())
            .element(DType::F32)
            .arguments(&[d_out.into(), ids.into(), d_table.into()])
            .sizes(&[tokens, columns, d_out.pitch()])
            .arguments(&[Argument::F32(scale), Argument::U32(skipped.is_some().into())])
            .arguments(&[Argument::U32(skipped.unwrap_or(0))])
            .launch(self.runtime.as_ref(), [tokens, columns.div_ceil(256), 1], 256);
    }

    fn rms_norm(
        &self,
        x: &Tensor,
        weight: Option<&Tensor>,
        kind: NormWeight,
        epsilon: f32,
        out: &mut Tensor,
    ) {
        let (rows, inner, width) = norm_rows(x);
        let groups = RowGroups::new(rows, launch::lanes_of(rows, width));
        let (grid, threads) = groups.grid(rows);
        let all: Vec<&Tensor> = [x, &*out].into_iter().chain(weight).collect();
        Kernel::new("norm", "rms_norm")
            .element(x.dtype())
            .weight(weight.map_or(DType::F32, Tensor::dtype))
            .row(width, groups.lanes, launch::is_aligned(width, &all))
            .define("SIMD_ROWS", groups.simd)
            .arguments(&[x.into(), weight.into(), out.into()])
            .sizes(&[rows, width, inner, x.pitch(), out.pitch()])
            .arguments(&[Argument::F32(epsilon), Argument::F32(shift(kind))])
            .arguments(&[Argument::U32(weight.is_some().into())])
            .launch(self.runtime.as_ref(), grid, threads);
    }

    fn rms_norm_backward(
        &self,
        x: &Tensor,
        weight: Option<&Tensor>,
        kind: NormWeight,
        epsilon: f32,
        d_out: &Tensor,
        d_x: Option<(&mut Tensor, Held<'_>)>,
        d_weight: Option<&mut Tensor>,
    ) {
        let (rows, inner, width) = norm_rows(x);
        if let Some((d_x, held)) = d_x {
            let accumulate = !matches!(held, Held::Nothing);
            let (held, held_pitch) = match held {
                Held::Other(other) => (Some(other), other.pitch()),
                Held::Nothing | Held::Itself => (None, d_x.pitch()),
            };
            let all: Vec<&Tensor> = [x, d_out, &*d_x].into_iter().chain(weight).chain(held).collect();
            let aligned = launch::is_aligned(width, &all);
            let held = Argument::Address(held.map_or(d_x.address(), Tensor::address));
            let groups = RowGroups::new(rows, lanes(width));
            let (grid, threads) = groups.grid(rows);
            Kernel::new("norm", "rms_norm_backward")
                .element(x.dtype())
                .weight(weight.map_or(DType::F32, Tensor::dtype))
                .row(width, groups.lanes, aligned)
                .define("SIMD_ROWS", groups.simd)
                .arguments(&[x.into(), weight.into(), d_out.into(), (&mut *d_x).into(), held])
                .sizes(&[rows, width, inner, x.pitch(), d_out.pitch(), d_x.pitch(), held_pitch])
                .arguments(&[Argument::F32(epsilon), Argument::F32(shift(kind))])
                .arguments(&[Argument::U32(weight.is_some().into()), Argument::U32(accumulate.into())])
                .launch(self.runtime.as_ref(), grid, threads);
        }
        let Some(d_weight) = d_weight else { return };
        let parts = rows.clamp(1, SUM_PARTS);
        let (Some(scales), Some(sums)) =
            (Self::scratch(x, DType::F32, &[rows]), Self::scratch(x, DType::F32, &[parts, width]))
        else {
            return self.runtime.fail("rms_norm_backward", "no memory is left for its partial sums");
        };
        Kernel::new("norm", "rms_scales")
            .element(x.dtype())
            .weight(DType::F32)
            .row(width, lanes(width), false)
            .arguments(&[x.into(), (&scales).into()])
            .sizes(&[width, inner, x.pitch()])
            .arguments(&[Argument::F32(epsilon)])
            .launch(self.runtime.as_ref(), [rows, 1, 1], lanes(width));
        Kernel::new("norm", "norm_weight_sums")
            .element(x.dtype())
            .weight(DType::F32)
            .row(width, lanes(width), false)
            .arguments(&[x.into(), d_out.into(), (&scales).into(), (&sums).into()])
            .sizes(&[rows, width, inner, x.pitch(), d_out.pitch()])
            .launch(self.runtime.as_ref(), [width.div_ceil(128), parts, 1], 128);
        self.add_column_sums(&sums, parts, 1.0, d_weight);
    }

    fn layer_norm(&self, x: &Tensor, norm: &LayerNorm<'_>, out: &mut Tensor) {
        self.norm_layer(x, norm, out);
    }

    fn layer_norm_backward(
        &self,
        x: &Tensor,
        norm: &LayerNorm<'_>,
        d_out: &Tensor,
        d_x: Option<(&mut Tensor, Held<'_>)>,
        d_weights: [Option<&mut Tensor>; 2],
    ) {
        self.norm_layer_backward(x, norm, d_out, d_x, d_weights);
    }

    fn rides(&self, on: RowKernel, x: &Tensor, riding: &Riding) -> bool {
        // Tests go the same ways on devices without these kernels.
        cfg!(test) || riding::rides(&self.facts, on, x, &riding.a)
    }

    fn rms_norm_riding(
        &self,
        x: &Tensor,
        weight: Option<&Tensor>,
        norm: (NormWeight, f32),
        riding: &Riding,
        out: &mut Tensor,
    ) -> bool {
        self.norm_riding(x, weight, norm, riding, out)
    }

    fn rms_norm_backward_riding(
        &self,
        x: &Tensor,
        weight: Option<&Tensor>,
        norm: (NormWeight, f32),
        d_out: (&Tensor, &Share),
        d_x: (&mut Tensor, Held<'_>),
    ) -> bool {
        self.norm_backward_riding(x, weight, norm, d_out, d_x)
    }

    fn rope(&self, x: &mut Tensor, angles: &RopeRows<'_>, inverse: bool) {
        let (tokens, row) = rows_and_columns(x);
        let (width, half) = (x.columns(), angles.cosines.columns());
        let heads = row.checked_div(width).unwrap_or(0);
        let halves = angles.pairing == RopePairing::Halves;
        let aligned = halves
            && launch::is_aligned(width, &[x])
            && launch::is_aligned(half, &[angles.cosines, angles.sines]);
        let (threads, pairs) = if aligned { (128, 1024) } else { (256, 256) };
        Kernel::new("rope", "rope")
            .element(x.dtype())
            .define("PAIRS_HALVES", halves)
            .aligned(aligned)
            .arguments(&[x.into(), angles.cosines.into(), angles.sines.into(), angles.rows.into()])
            .sizes(&[heads, width, x.pitch(), half])
            .arguments(&[Argument::F32(if inverse { -1.0 } else { 1.0 })])
            .launch(self.runtime.as_ref(), [tokens, (heads * half).div_ceil(pairs), 1], threads);
    }

    fn attention(
        &self,
        parameters: &AttentionParameters,
        mask: &AttentionMask,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        sinks: Option<&Tensor>,
        out: &mut Tensor,
        log_sum_exp: &mut Tensor,
    ) {
        self.attend(&attention::Inputs::new(parameters, mask, [q, k, v], sinks), out, log_sum_exp);
    }

    fn choose_keys(
        &self,
        mask: &AttentionMask,
        inputs: [&Tensor; 3],
        count: usize,
        bits: &mut Tensor,
    ) -> Result<()> {
        self.choose_best_keys(mask, inputs, count, bits)
    }

    fn attention_backward(
        &self,
        parameters: &AttentionParameters,
        mask: &AttentionMask,
        inputs: [&Tensor; 3],
        sinks: Option<&Tensor>,
        out: &Tensor,
        log_sum_exp: &Tensor,
        d_out: &Tensor,
        d_inputs: [&mut Tensor; 3],
        d_sinks: Option<&mut Tensor>,
    ) {
        let inputs = attention::Inputs::new(parameters, mask, inputs, sinks);
        self.attend_backward(&inputs, [out, log_sum_exp, d_out], d_inputs, d_sinks);
    }

    fn gated(&self, activation: GateActivation, gate: &Tensor, up: &Tensor, out: &mut Tensor) {
        let (rows, columns) = rows_and_columns(gate);
        Kernel::new("gated", "gated")
            .element(gate.dtype())
            .activation(activation)
            .aligned(launch::is_aligned(columns, &[gate, up, out]))
            .arguments(&[gate.into(), up.into(), out.into()])
            .sizes(&[columns, gate.pitch(), up.pitch(), out.pitch()])
            .launch(self.runtime.as_ref(), [rows, columns.div_ceil(2048), 1], 256);
    }

    fn gated_backward(
        &self,
        activation: GateActivation,
        gate: &Tensor,
        up: &Tensor,
        d_out: &Tensor,
        d_gate: &mut Tensor,
        d_up: &mut Tensor,
    ) {
        let pitches = [gate.pitch(), up.pitch(), d_out.pitch(), d_gate.pitch(), d_up.pitch()];
        let addresses =
            [gate.address(), up.address(), d_out.address(), d_gate.address_mut(), d_up.address_mut()];
        self.gate_gradients(activation, rows_and_columns(gate), gate.dtype(), addresses, pitches);
    }

    fn gated_riding(
        &self,
        activation: GateActivation,
        gate_and_up: [&Tensor; 2],
        riding: &Riding,
        out: &mut Tensor,
    ) -> bool {
        self.gate_riding(activation, gate_and_up, riding, out)
    }

    fn gated_backward_riding(
        &self,
        activation: GateActivation,
        gate_and_up: [&mut Tensor; 2],
        d_out: (&Tensor, &Share),
    ) -> bool {
        self.gate_gradients_riding(activation, gate_and_up, d_out)
    }

    fn gated_backward_in_place(
        &self,
        activation: GateActivation,
        gate: &mut Tensor,
        up: &mut Tensor,
        d_out: &Tensor,
    ) -> bool {
        let pitches = [gate.pitch(), up.pitch(), d_out.pitch(), gate.pitch(), up.pitch()];
        let (own_gate, own_up) = (gate.address_mut(), up.address_mut());
        let addresses = [own_gate, own_up, d_out.address(), own_gate, own_up];
        self.gate_gradients(activation, rows_and_columns(gate), gate.dtype(), addresses, pitches);
        true
    }

    fn sum_rows(&self, x: &Tensor, out: &mut Tensor) {
        let (rows, columns) = (x.rows(), x.columns());
        let parts = rows.clamp(1, SUM_PARTS);
        let Some(sums) = Self::scratch(x, DType::F32, &[parts, columns]) else {
            return self.runtime.fail("sum_rows", "no memory is left for its partial sums");
        };
        Kernel::new("elementwise", "sum_columns")
            .source(x.dtype())
            .element(DType::F32)
            .arguments(&[x.into(), (&sums).into()])
            .sizes(&[rows, columns, x.pitch()])
            .launch(self.runtime.as_ref(), [columns.div_ceil(128), parts, 1], 128);
        self.add_column_sums(&sums, parts, 1.0, out);
    }

    fn scale(&self, x: &mut Tensor, factor: f32) {
        let ([rows, columns], [pitch, _]) = common_rows(x, x);
        let address = x.address_mut();
        let aligned = columns.is_multiple_of(8) && pitch.is_multiple_of(8) && address.is_multiple_of(16);
        Kernel::new("elementwise", "convert_rows")
            .source(x.dtype())
            .element(x.dtype())
            .aligned(aligned)
            .arguments(&[Argument::Address(address); 2])
            .sizes(&[columns, pitch, pitch])
            .arguments(&[Argument::F32(factor), Argument::U32(0)])
            .launch(self.runtime.as_ref(), [rows, columns.div_ceil(2048), 1], 256);
    }

    fn add_assign(&self, target: &mut Tensor, source: &Tensor) {
        self.move_rows(source, target, 1.0, true);
    }

    fn add_scaled(&self, x: &Tensor, factor: f32, y: &mut Tensor) {
        let ([rows, columns], [pitch, y_pitch]) = common_rows(x, y);
        let addresses = [x.address(), y.address_mut()];
        let aligned = [columns, pitch, y_pitch].iter().all(|size| size.is_multiple_of(8))
            && addresses.iter().all(|address| address.is_multiple_of(16));
        Kernel::new("elementwise", "add_scaled")
            .source(x.dtype())
            .element(x.dtype())
            .aligned(aligned)
            .arguments(&addresses.map(Argument::Address))
            .sizes(&[columns, pitch, y_pitch])
            .arguments(&[Argument::F32(factor)])
            .launch(self.runtime.as_ref(), [rows, columns.div_ceil(2048), 1], 256);
    }

    fn scaled(&self, x: &Tensor, factor: f32, out: &mut Tensor) {
        self.move_rows(x, out, factor, false);
    }

    fn softcap(&self, x: &mut Tensor, cap: f32) {
        let ([rows, columns], [pitch, _]) = common_rows(x, x);
        Kernel::new("elementwise", "softcap")
            .source(x.dtype())
            .element(x.dtype())
            .aligned(false)
            .arguments(&[x.into()])
            .sizes(&[columns, pitch])
            .arguments(&[Argument::F32(cap)])
            .launch(self.runtime.as_ref(), [rows, columns.div_ceil(2048), 1], 256);
    }

    fn convert(&self, source: &Tensor, target: &mut Tensor) {
        self.move_rows(source, target, 1.0, false);
    }

    fn dropout(&self, x: &Tensor, mask: &DropoutMask<'_>, out: &mut Tensor, accumulate: bool) {
        let DropoutMask { probability, key, steps_before } = *mask;
        let Ok(x) = x.contiguous() else {
            return self.runtime.fail("dropout", "no memory is left for a contiguous copy");
        };
        let threshold = (f64::from(probability) * f64::from(1u32 << 24)) as u32;
        let elements = x.elements();
        Kernel::new("elementwise", "dropout")
            .source(x.dtype())
            .element(out.dtype())
            .arguments(&[(&x).into(), out.into(), Argument::U64(elements as u64), Argument::U32(threshold)])
            .arguments(&[Argument::F32(1.0 / (1.0 - probability)), Argument::U32(key.seed as u32)])
            .arguments(&[Argument::U32((key.seed >> 32) as u32), Argument::U32(key.step)])
            .arguments(&[Argument::U32(key.stream), steps_before.into(), Argument::U32(accumulate.into())])
            .launch(self.runtime.as_ref(), [elements.div_ceil(1024), 1, 1], 256);
    }

    fn uniform(&self, key: RandomKey, bound: f32, out: &mut Tensor) {
        let elements = out.elements();
        Kernel::new("elementwise", "uniform")
            .source(DType::F32)
            .element(out.dtype())
            .arguments(&[out.into(), Argument::U64(elements as u64), Argument::F32(bound)])
            .arguments(&[Argument::U32(key.seed as u32), Argument::U32((key.seed >> 32) as u32)])
            .arguments(&[Argument::U32(key.step), Argument::U32(key.stream)])
            .launch(self.runtime.as_ref(), [elements.div_ceil(1024), 1, 1], 256);
    }

    fn gather_rows(&self, x: &Tensor, indices: &Tensor, out: &mut Tensor) {
        self.choose_rows("gather_rows", x, indices, out);
    }

    fn scatter_rows(&self, x: &Tensor, indices: &Tensor, out: &mut Tensor) {
        self.choose_rows("scatter_rows", x, indices, out);
    }

    fn copy_heads(&self, source: &Tensor, target: &mut Tensor, copy: &HeadCopy) {
        self.copy_head_columns(source, target, copy);
    }

    fn sum_heads(&self, source: &Tensor, first: usize, target: &mut Tensor) {
        self.sum_head_columns(source, first, target);
    }

    fn head_products(&self, x: &Tensor, rows: &HeadRows<'_>, out: &mut Tensor, adds: bool) -> Result<()> {
        self.multiply_heads(x, rows, out, adds)
    }

    fn cross_entropy(
        &self,
        logits: Tensor,
        labels: &Tensor,
        parameters: &CrossEntropyParameters,
        sum: &mut Sum,
        gradient: DType,
    ) -> Result<Tensor> {
        self.lose(logits, labels, parameters, sum, gradient)
    }

    fn experts(&self) -> &dyn ExpertKernels {
        self
    }

    fn delta(&self) -> &dyn DeltaKernels {
        self
    }

    fn fp8(&self) -> Option<&dyn Fp8Kernels> {
        Some(self)
    }

    fn sum_of_squares(&self, tensors: &[&Tensor], sum: &mut Sum) {
        self.add_squares(tensors, sum);
    }

    fn sample(&self, logits: &Tensor, options: &SampleOptions, cursor: &Cursor) -> Result<()> {
        self.choose(logits, &options.constants(logits.columns()), cursor)
    }

    fn adamw(&self, entries: &mut [AdamWEntry<'_>], control: &AdamWControl, squares: Option<&Sum>) {
        self.step(entries, control, squares);
    }
}

impl Gpu {
    /// Gate, up, d_out, d_gate and d_up by address and pitch; a thread reads its elements before it writes.
    fn gate_gradients(
        &self,
        activation: GateActivation,
        (rows, columns): (usize, usize),
        dtype: DType,
        addresses: [u64; 5],
        pitches: [usize; 5],
    ) {
        let aligned = columns.is_multiple_of(8)
            && pitches.iter().all(|pitch| pitch.is_multiple_of(8))
            && addresses.iter().all(|address| address.is_multiple_of(16));
        Kernel::new("gated", "gated_backward")
            .element(dtype)
            .activation(activation)
            .aligned(aligned)
            .arguments(&addresses.map(Argument::Address))
            .sizes(&[columns])
            .sizes(&pitches)
            .launch(self.runtime.as_ref(), [rows, columns.div_ceil(2048), 1], 256);
    }

    fn choose_rows(&self, kernel: &'static str, x: &Tensor, indices: &Tensor, out: &mut Tensor) {
        let columns = x.columns();
        Kernel::new("elementwise", kernel)
            .source(x.dtype())
            .element(out.dtype())
            .aligned(launch::is_aligned(columns, &[x, out]))
            .arguments(&[x.into(), indices.into(), out.into()])
            .sizes(&[columns, x.pitch(), out.pitch()])
            .launch(self.runtime.as_ref(), [indices.elements(), columns.div_ceil(2048), 1], 256);
    }

    /// Adds all values, f32, to f32 \[1\] in a fixed order.
    fn add_values(&self, module: &'static str, kernel: &'static str, values: &Tensor, total: &mut Tensor) {
        Kernel::new(module, kernel)
            .element(DType::F32)
            .aligned(false)
            .arguments(&[values.into(), total.into()])
            .sizes(&[values.elements()])
            .launch(self.runtime.as_ref(), [1, 1, 1], 1024);
    }
}
