//! The kernels of the processor.

mod activations;
pub mod attention;
mod choice;
mod delta;
mod elementwise;
mod experts;
pub mod gemm;
mod heads;
mod layer_norm;
mod loss;
mod norm;
mod optimizer;
pub(crate) mod pool;
pub(crate) mod simd;

use crate::device::{
    AdamWControl, AdamWEntry, Arithmetic, AttentionMask, AttentionParameters, CrossEntropyParameters,
    DropoutMask, ExpertKernels, Finish, GateActivation, HeadCopy, HeadRows, Held, Kernels, LayerNorm,
    NormWeight, Operand, RopeRows, Sum,
};
use crate::error::{Error, Result};
use crate::random::RandomKey;
use crate::{DType, Tensor};

/// The kernel set of the processor; parallel by rayon, bit-identical for any number of threads.
pub(crate) struct Cpu;

fn view<'a>(operand: &Operand<'a>) -> Result<gemm::MatrixRef<'a>> {
    let (tensor, rows, columns) = (operand.tensor, operand.tensor.rows(), operand.tensor.columns());
    let matrix = match tensor.dtype() {
        DType::F32 => gemm::MatrixRef::row_major(tensor.as_slice::<f32>(), rows, columns),
        DType::Bf16 => gemm::MatrixRef::row_major(tensor.as_slice::<half::bf16>(), rows, columns),
        DType::F16 => gemm::MatrixRef::row_major(tensor.as_slice::<half::f16>(), rows, columns),
        other => return Err(unsupported("matmul", format!("an operand is {other}"))),
    };
    Ok(if operand.transposed { matrix.transposed() } else { matrix })
}

fn elements(tensor: &Tensor) -> gemm::Elements<'_> {
    match tensor.dtype() {
        DType::Bf16 => tensor.as_slice::<half::bf16>().into(),
        DType::F16 => tensor.as_slice::<half::f16>().into(),
        _ => tensor.as_slice::<f32>().into(),
    }
}

fn elements_mut(tensor: &mut Tensor) -> gemm::ElementsMut<'_> {
    match tensor.dtype() {
        DType::Bf16 => tensor.as_mut_slice::<half::bf16>().into(),
        _ => tensor.as_mut_slice::<f32>().into(),
    }
}

fn attention_inputs<'a>(
    parameters: &'a AttentionParameters,
    mask: &'a AttentionMask,
    [q, k, v]: [&'a Tensor; 3],
    sinks: Option<&'a Tensor>,
) -> attention::Inputs<'a> {
    attention::Inputs {
        parameters,
        kind: mask.kind,
        segments: mask.segments(),
        q: elements(q),
        k: elements(k),
        v: elements(v),
        sinks: sinks.map(Tensor::as_slice::<f32>),
        chosen: mask.choice.as_ref().map(|choice| attention::Chosen {
            words: choice.bits.as_slice::<u32>(),
            stride: choice.bits.columns(),
        }),
    }
}

fn unsupported(operation: &'static str, reason: String) -> Error {
    Error::Unsupported { operation, device: "cpu", reason }
}

impl Kernels for Cpu {
    fn name(&self) -> &'static str {
        "cpu"
    }

    fn matmul(
        &self,
        products: &[(Operand<'_>, Operand<'_>)],
        out: &mut Tensor,
        finish: &Finish<'_>,
        arithmetic: Arithmetic,
    ) -> Result<()> {
        let views = products
            .iter()
            .map(|(left, right)| Ok(gemm::Product { left: view(left)?, right: view(right)? }))
            .collect::<Result<Vec<_>>>()?;
        let epilogue = gemm::Epilogue {
            scale: finish.scale,
            bias: finish.bias.map(Tensor::as_slice::<f32>),
            accumulate: finish.accumulate || finish.residual.is_some(),
        };
        if let Some(residual) = finish.residual {
            out.write_rows(0, residual)?;
        }
        let (rows, columns) = (out.rows(), out.columns());
        let matrix = match out.dtype() {
            DType::F32 => gemm::MatrixMut::row_major(out.as_mut_slice::<f32>(), rows, columns),
            DType::Bf16 => gemm::MatrixMut::row_major(out.as_mut_slice::<half::bf16>(), rows, columns),
            other => return Err(unsupported("matmul", format!("the result is {other}"))),
        };
        gemm::gemm(&views, matrix, &epilogue, arithmetic);
        Ok(())
    }

    fn embedding(&self, ids: &Tensor, table: &Tensor, scale: f32, out: &mut Tensor) {
        elementwise::embedding(ids, table, scale, out);
    }

    fn embedding_backward(
        &self,
        ids: &Tensor,
        d_out: &Tensor,
        scale: f32,
        skipped: Option<u32>,
        d_table: &mut Tensor,
    ) {
        elementwise::embedding_backward(ids, d_out, scale, skipped, d_table);
    }

    fn rms_norm(
        &self,
        x: &Tensor,
        weight: Option<&Tensor>,
        kind: NormWeight,
        epsilon: f32,
        out: &mut Tensor,
    ) {
        norm::forward(x, weight, kind, epsilon, out);
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
        norm::backward(x, weight, kind, epsilon, d_out, d_x, d_weight);
    }

    fn layer_norm(&self, x: &Tensor, norm: &LayerNorm<'_>, out: &mut Tensor) {
        layer_norm::forward(x, norm, out);
    }

    fn layer_norm_backward(
        &self,
        x: &Tensor,
        norm: &LayerNorm<'_>,
        d_out: &Tensor,
        d_x: Option<(&mut Tensor, Held<'_>)>,
        d_weights: [Option<&mut Tensor>; 2],
    ) {
        layer_norm::backward(x, norm, d_out, d_x, d_weights);
    }

    fn rope(&self, x: &mut Tensor, angles: &RopeRows<'_>, inverse: bool) {
        elementwise::rope(x, angles, inverse);
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
        let inputs = attention_inputs(parameters, mask, [q, k, v], sinks);
        attention::forward(&inputs, elements_mut(out), log_sum_exp.as_mut_slice::<f32>());
    }

    fn choose_keys(
        &self,
        mask: &AttentionMask,
        inputs: [&Tensor; 3],
        count: usize,
        bits: &mut Tensor,
    ) -> Result<()> {
        choice::choose_keys(mask, inputs, count, bits);
        Ok(())
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
        let inputs = attention_inputs(parameters, mask, inputs, sinks);
        let lse = log_sum_exp.as_slice::<f32>();
        let saved = attention::Saved { out: elements(out), lse, d_out: elements(d_out) };
        let mut own_sinks = d_sinks.as_ref().map(|_| vec![0.0; parameters.query_heads]);
        let [dq, dk, dv] = d_inputs.map(elements_mut);
        let gradients = attention::Gradients { dq, dk, dv, d_sinks: own_sinks.as_deref_mut() };
        attention::backward(&inputs, &saved, gradients);
        if let (Some(sums), Some(own)) = (d_sinks, own_sinks) {
            for (sum, value) in sums.as_mut_slice::<f32>().iter_mut().zip(own) {
                *sum += value;
            }
        }
    }

    fn gated(&self, activation: GateActivation, gate: &Tensor, up: &Tensor, out: &mut Tensor) {
        elementwise::gated(activation, gate, up, out);
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
        elementwise::gated_backward(activation, gate, up, d_out, d_gate, d_up);
    }

    fn sum_rows(&self, x: &Tensor, out: &mut Tensor) {
        elementwise::sum_rows(x, out);
    }

    fn scale(&self, x: &mut Tensor, factor: f32) {
        elementwise::scale(x, factor);
    }

    fn add_assign(&self, target: &mut Tensor, source: &Tensor) {
        elementwise::add_assign(target, source);
    }

    fn add_scaled(&self, x: &Tensor, factor: f32, y: &mut Tensor) {
        elementwise::add_scaled(x, factor, y);
    }

    fn scaled(&self, x: &Tensor, factor: f32, out: &mut Tensor) {
        elementwise::scaled(x, factor, out);
    }

    fn softcap(&self, x: &mut Tensor, cap: f32) {
        elementwise::softcap(x, cap);
    }

    fn convert(&self, source: &Tensor, target: &mut Tensor) {
        elementwise::convert(source, target);
    }

    fn dropout(&self, x: &Tensor, mask: &DropoutMask<'_>, out: &mut Tensor, accumulate: bool) {
        elementwise::dropout(x, mask.probability, mask.key, out, accumulate);
    }

    fn uniform(&self, key: RandomKey, bound: f32, out: &mut Tensor) {
        elementwise::uniform(key, bound, out);
    }

    fn gather_rows(&self, x: &Tensor, indices: &Tensor, out: &mut Tensor) {
        elementwise::gather_rows(x, indices, out);
    }

    fn scatter_rows(&self, x: &Tensor, indices: &Tensor, out: &mut Tensor) {
        elementwise::scatter_rows(x, indices, out);
    }

    fn copy_heads(&self, source: &Tensor, target: &mut Tensor, copy: &HeadCopy) {
        heads::copy_heads(source, target, copy);
    }

    fn sum_heads(&self, source: &Tensor, first: usize, target: &mut Tensor) {
        heads::sum_heads(source, first, target);
    }

    fn head_products(&self, x: &Tensor, rows: &HeadRows<'_>, out: &mut Tensor, adds: bool) -> Result<()> {
        heads::head_products(x, rows, out, adds);
        Ok(())
    }

    fn cross_entropy(
        &self,
        mut logits: Tensor,
        labels: &Tensor,
        parameters: &CrossEntropyParameters,
        sum: &mut Sum,
        _gradient: DType,
    ) -> Result<Tensor> {
        sum.host += loss::cross_entropy(&mut logits, labels.as_slice::<i32>(), parameters);
        Ok(logits)
    }

    fn experts(&self) -> &dyn ExpertKernels {
        self
    }

    fn delta(&self) -> &dyn crate::device::DeltaKernels {
        self
    }

    fn sum_of_squares(&self, tensors: &[&Tensor], sum: &mut Sum) {
        sum.host += tensors.iter().map(|tensor| optimizer::sum_of_squares(tensor)).sum::<f64>();
    }

    fn adamw(&self, entries: &mut [AdamWEntry<'_>], control: &AdamWControl, squares: Option<&Sum>) {
        optimizer::adamw(entries, &control.constants, squares.map(|squares| squares.host));
    }
}
