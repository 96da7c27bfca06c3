//! Linear layers of experts.

use std::sync::Arc;

use super::Routing;
use crate::device::{Arithmetic, ExpertFinish, ExpertKernels, Operand, RoutingPlan};
use crate::error::{Result, expect_shape};
use crate::memory::Category;
use crate::tape::{Gradients, Saved};
use crate::{DType, Parameter, Tape, Tensor, Var, Weight};

/// A linear layer of each expert: `y = x W^T + b + s (x A^T) B^T` with the W, b, A and B of a row's expert.
#[derive(Debug, Clone)]
pub struct ExpertLinear {
    /// W \[X, N, D\], or \[X, D, N\] when `transposed`.
    pub weight: Weight,
    /// Whether the weight is stored for x from the left.
    pub transposed: bool,
    /// b \[X, N\].
    pub bias: Option<Weight>,
    /// The low-rank adapters.
    pub lora: Option<ExpertLora>,
}

/// A low-rank adapter of each expert.
#[derive(Debug, Clone)]
pub struct ExpertLora {
    /// A \[X, R, D\].
    pub a: Weight,
    /// B \[X, N, R\].
    pub b: Weight,
    /// s: alpha / R, or alpha / sqrt(R).
    pub scale: f32,
}

impl ExpertLinear {
    /// Keeps copies of trained adapters in the type of activations on devices with memory of their own. Adapters that are
    /// given later have none.
    ///
    /// # Errors
    /// Out of memory.
    pub fn pack(&self, dtype: DType) -> Result<()> {
        self.lora.iter().flat_map(|lora| [&lora.a, &lora.b]).try_for_each(|weight| weight.keep_copy(dtype))
    }
}

/// Rows of experts x \[P, D\] through their layers, \[P, N\] in the type of x.
///
/// The adapters ride on the main product, as in [`crate::ops::linear`]. Keeps x only when A or W is trained, and s x A^T. The
/// gradient of a frozen W is never computed; those of trained ones are summed in f32 over an expert's rows in their order.
/// Flops: 2 P N D + 2 P R (N + D) forward; backward the same for the input, 2 P R (N + D) for A and B, 2 P N D for W.
///
/// # Errors
/// [`crate::Error::Shape`] when sizes disagree; out of memory.
pub fn expert_linear(tape: &Tape, x: &Var, layer: &ExpertLinear, routing: &Routing) -> Result<Var> {
    let (input, plan) = (x.tensor(), &routing.plan);
    let weight = layer.weight.value();
    let [features, width] = check_weight(layer, &weight, input, plan)?;
    let rows = input.rows();
    let (device, dtype) = (input.device().clone(), input.dtype());
    let arithmetic = Arithmetic::of(dtype);
    let kernels = device.kernels().experts();
    let scratch = |columns| Tensor::scratch(&device, Category::Activations, dtype, &[rows, columns]);

    let reduced = match &layer.lora {
        Some(lora) => {
            let a = lora.a.read_in(dtype);
            expect_shape(
                "expert_linear",
                "lora_A",
                a.shape(),
                &[plan.experts, a.rows() / plan.experts, width],
            )?;
            let mut reduced = scratch(a.shape()[1])?;
            let finish = ExpertFinish { scale: lora.scale, ..ExpertFinish::STORE };
            kernels.multiply_experts(
                &[(input, Operand::transposed(&a))],
                plan,
                &finish,
                &mut reduced,
                arithmetic,
            )?;
            Some(reduced)
        }
        None => None,
    };
    let b = layer.lora.as_ref().map(|lora| lora.b.read_in(dtype));
    let mut products = vec![(input, Operand { tensor: &weight, transposed: !layer.transposed })];
    if let (Some(reduced), Some(b)) = (&reduced, &b) {
        expect_shape("expert_linear", "lora_B", b.shape(), &[plan.experts, features, reduced.columns()])?;
        products.push((reduced, Operand::transposed(b)));
    }
    let bias = layer.bias.as_ref().map(|bias| as_f32(bias, &[plan.experts, features])).transpose()?;
    let mut out = scratch(features)?;
    let finish = ExpertFinish { bias: bias.as_ref(), ..ExpertFinish::STORE };
    kernels.multiply_experts(&products, plan, &finish, &mut out, arithmetic)?;

    let is_trained = |weight: &Weight| weight.parameter().is_some();
    let keeps_input =
        is_trained(&layer.weight) || layer.lora.as_ref().is_some_and(|lora| is_trained(&lora.a));
    let trains = keeps_input
        || layer.bias.as_ref().is_some_and(is_trained)
        || layer.lora.as_ref().is_some_and(|lora| is_trained(&lora.b));
    let input_slot = x.slot();
    let node = Node {
        input: keeps_input.then(|| x.save()),
        shape: [rows, width],
        layer: layer.clone(),
        reduced,
        plan: plan.clone(),
        input_slot,
    };
    Ok(tape.push(out, trains || input_slot.is_some(), |slot| {
        Box::new(move |gradients| node.backward(gradients, slot))
    }))
}

/// N and D.
fn check_weight(
    layer: &ExpertLinear,
    weight: &Tensor,
    input: &Tensor,
    plan: &RoutingPlan,
) -> Result<[usize; 2]> {
    let width = input.columns();
    expect_shape("expert_linear", "input", input.shape(), &[plan.rows(), width])?;
    let features = match (weight.shape(), layer.transposed) {
        (&[_, features, _], false) | (&[_, _, features], true) => features,
        _ => 0,
    };
    let expected =
        if layer.transposed { [plan.experts, width, features] } else { [plan.experts, features, width] };
    expect_shape("expert_linear", "weight", weight.shape(), &expected)?;
    Ok([features, width])
}

/// The bias as products read it.
fn as_f32(bias: &Weight, shape: &[usize]) -> Result<Tensor> {
    let bias = bias.value();
    expect_shape("expert_linear", "bias", bias.shape(), shape)?;
    if bias.dtype() == DType::F32 {
        return Ok(bias);
    }
    let mut copy = Tensor::scratch(bias.device(), Category::Workspace, DType::F32, shape)?;
    bias.device().kernels().convert(&bias, &mut copy);
    Ok(copy)
}

/// What the backward pass reads.
struct Node {
    input: Option<Saved>,
    shape: [usize; 2],
    layer: ExpertLinear,
    reduced: Option<Tensor>,
    plan: RoutingPlan,
    input_slot: Option<usize>,
}

impl Node {
    fn backward(mut self, gradients: &mut Gradients, slot: usize) -> Result<()> {
        let Some(d_out) = gradients.take(slot) else { return Ok(()) };
        let device = d_out.device().clone();
        let kernels = device.kernels().experts();
        let input = self.input.as_ref().map(Saved::get).transpose()?;
        let d_reduced = match (&self.layer.lora, &self.reduced) {
            (Some(lora), Some(reduced)) => {
                let shape = [d_out.rows(), reduced.columns()];
                let mut d_reduced = Tensor::scratch(&device, Category::Activations, d_out.dtype(), &shape)?;
                let b = lora.b.read_in(d_out.dtype());
                let finish = ExpertFinish { scale: lora.scale, ..ExpertFinish::STORE };
                let product = (&d_out, Operand::plain(&b));
                let arithmetic = Arithmetic::of(d_out.dtype());
                kernels.multiply_experts(&[product], &self.plan, &finish, &mut d_reduced, arithmetic)?;
                drop(b);
                self.add(kernels, lora.b.parameter(), &d_out, reduced)?;
                if let Some(input) = &input {
                    self.add(kernels, lora.a.parameter(), &d_reduced, input)?;
                }
                Some(d_reduced)
            }
            _ => None,
        };
        if let (Some(input), parameter) = (&input, self.layer.weight.parameter()) {
            let [left, right] = if self.layer.transposed { [input, &d_out] } else { [&d_out, input] };
            self.add(kernels, parameter, left, right)?;
        }
        if let Some(bias) = self.layer.bias.as_ref().and_then(Weight::parameter) {
            bias.accumulate(|d_bias| {
                kernels.add_expert_sums(&d_out, &self.plan, d_bias);
                Ok(())
            })?;
        }
        // It may have been computed again: it need not be there, nor in its recipe, while its gradient is.
        drop(input);
        self.input = None;
        match self.input_slot {
            Some(slot) => self.input_gradient(gradients, slot, &d_out, d_reduced.as_ref()),
            None => Ok(()),
        }
    }

    fn add(
        &self,
        kernels: &dyn ExpertKernels,
        parameter: Option<&Arc<Parameter>>,
        left: &Tensor,
        right: &Tensor,
    ) -> Result<()> {
        let Some(parameter) = parameter else { return Ok(()) };
        parameter.accumulate(|sum| kernels.add_expert_gradients(left, right, &self.plan, 1.0, sum))
    }

    /// dx = dy W + d_reduced A.
    fn input_gradient(
        &self,
        gradients: &mut Gradients,
        slot: usize,
        d_out: &Tensor,
        d_reduced: Option<&Tensor>,
    ) -> Result<()> {
        let kernels = d_out.device().kernels().experts();
        let weight = self.layer.weight.value();
        let a = self.layer.lora.as_ref().map(|lora| lora.a.read_in(d_out.dtype()));
        let mut products = vec![(d_out, Operand { tensor: &weight, transposed: self.layer.transposed })];
        products.extend(d_reduced.zip(a.as_ref()).map(|(d, a)| (d, Operand::plain(a))));
        gradients.add_with(slot, (d_out, &self.shape, 0), |d_input, accumulate| {
            let finish = ExpertFinish { accumulate, ..ExpertFinish::STORE };
            kernels.multiply_experts(&products, &self.plan, &finish, d_input, Arithmetic::of(d_out.dtype()))
        })
    }
}
