//! Linear layers of one input, computed together where a device gains by it.

mod fp8;

use crate::device::{Finish, Operand};
use crate::error::Result;
use crate::memory::Category;
use crate::ops::linear::{check_residual, linear, token_count};
use crate::ops::{Linear, LinearOptions, Lora};
use crate::tape::{Gradients, Saved, arithmetic_for};
use crate::{DType, Device, Tape, Tensor, Var, Weight};

/// Linear layers that read the same input.
#[derive(Debug, Clone)]
pub struct LinearGroup {
    layers: Vec<Linear>,
    packed: Option<Packed>,
    /// The weights of all layers in eight bits.
    quantised: Option<fp8::Quantised>,
}

/// The weights of a group as one matrix, the adapters' next to them, so that one product computes all layers.
///
/// `[W | B]` \[sum of N, D + S\]: row block i holds layer i's W and, in the columns of its rank, its B; the rest of the S
/// columns is zero. `[x | s x A^T]` times the transpose of that is every layer's result, adapter included, and d_out times
/// it is the gradient of x and of s x A^T / s.
#[derive(Debug, Clone)]
struct Packed {
    /// \[sum of N, D + S\]; B alone, \[sum of N, S\], where the weights have eight bits.
    wide: Tensor,
    /// Its first D columns.
    weight: Tensor,
    /// The weights in eight bits; `weight` are their codes then.
    quantised: Option<fp8::Quantised>,
    /// All A \[S, D\], rows of no adapter zero; `None` when there are no adapters.
    a: Option<Tensor>,
    /// The gradients of all A, f32 \[S, D\], where all are trained: the parameters' own memory.
    d_a: Option<Tensor>,
    /// f32 \[sum of N\].
    bias: Option<Tensor>,
    /// s, the same for all adapters.
    scale: f32,
}

/// Columns that adapters take are rounded up to this, so that rows stay aligned.
const SPARE_UNIT: usize = 8;

impl LinearGroup {
    /// A group whose layers are computed one by one until [`Self::pack`] is called.
    pub fn new(layers: Vec<Linear>) -> Self {
        Self { layers, packed: None, quantised: None }
    }

    /// The layers.
    pub fn layers(&self) -> &[Linear] {
        &self.layers
    }

    /// The layers, to be changed; they are computed one by one until [`Self::pack`] is called again.
    pub fn layers_mut(&mut self) -> &mut [Linear] {
        self.packed = None;
        &mut self.layers
    }

    /// Columns that the group's input should have to spare; see [`Tensor::scratch_with_spare`].
    pub fn spare(&self) -> usize {
        let riding = self.packed.as_ref().filter(|packed| packed.quantised.is_none());
        riding.map_or(0, |packed| packed.wide.columns() - packed.weight.columns())
    }

    /// Moves frozen weights into one matrix in the type of activations, and makes copies of the adapters there that
    /// follow their parameters. Does nothing on a CPU, for trained weights, and where adapters drop elements of their
    /// input or differ in scale.
    ///
    /// # Errors
    /// Out of memory.
    pub fn pack(&mut self, dtype: DType) -> Result<()> {
        self.packed = None;
        let adapters = || self.layers.iter().filter_map(|layer| layer.lora.as_ref());
        let trained = |layer: &Linear| {
            layer.weight.parameter().is_some() || layer.bias.as_ref().is_some_and(|b| b.parameter().is_some())
        };
        let scale = adapters().next().map_or(1.0, |lora| lora.scale);
        let uneven = adapters().any(|lora| lora.dropout > 0.0 || lora.scale != scale);
        let on_host = self.layers.iter().any(|layer| layer.weight.value().is_host());
        if self.quantised.is_some() && uneven {
            return Err(fp8::unsupported(&self.layers, "its adapters drop elements or differ in scale"));
        }
        if on_host || uneven || self.layers.iter().any(trained) {
            return Ok(());
        }
        let first = self.layers[0].weight.value();
        let (device, width) = (first.device().clone(), first.columns());
        drop(first);
        let ranks: usize = adapters().map(|lora| lora.a.shape()[0]).sum();
        let spare = ranks.next_multiple_of(SPARE_UNIT);
        let rows: usize = self.layers.iter().map(|layer| layer.weight.shape()[0]).sum();
        // Where weights have eight bits, B stands alone.
        let offset = if self.quantised.is_some() { 0 } else { width };
        let columns = (offset + spare).max(SPARE_UNIT);
        let wide = Tensor::zeros(&device, Category::Weights, dtype, &[rows, columns])?;
        let a = match spare {
            0 => None,
            _ => Some(Tensor::zeros(&device, Category::Weights, dtype, &[spare, width])?),
        };
        let has_bias = self.layers.iter().any(|layer| layer.bias.is_some());
        let bias = has_bias
            .then(|| Tensor::zeros(&device, Category::Weights, DType::F32, &[rows, 1]))
            .transpose()?;
        let (mut row, mut column) = (0, 0);
        for layer in &mut self.layers {
            let features = layer.weight.shape()[0];
            if self.quantised.is_none() {
                let mut block = wide.block([row, features], [0, width])?;
                device.kernels().convert(&layer.weight.value(), &mut block);
                layer.weight = Weight::Frozen(block);
            }
            if let (Some(all), Some(own)) = (&bias, &layer.bias) {
                let mut part = all.block([row, features], [0, 1])?;
                device.kernels().convert(&own.value().reshape(&[features, 1])?, &mut part);
            }
            if let (Some(lora), Some(a)) = (&layer.lora, &a) {
                let rank = lora.a.shape()[0];
                lora.a.copy_into(a.block([column, rank], [0, width])?)?;
                lora.b.copy_into(wide.block([row, features], [offset + column, rank])?)?;
                column += rank;
            }
            row += features;
        }
        let d_a = self.joint_gradients(&device, [spare, width])?;
        let quantised = self.quantised.clone();
        let weight = match &quantised {
            Some(quantised) => quantised.rows.codes.clone(),
            None => wide.block([0, rows], [0, width])?,
        };
        let bias = bias.map(|bias| bias.reshape(&[rows])).transpose()?;
        self.packed = Some(Packed { wide, weight, quantised, a, d_a, bias, scale });
        Ok(())
    }

    /// One matrix for the gradients of all A, when all are trained and none has a gradient yet.
    fn joint_gradients(&self, device: &Device, [spare, width]: [usize; 2]) -> Result<Option<Tensor>> {
        let adapters: Vec<&Lora> = self.layers.iter().filter_map(|layer| layer.lora.as_ref()).collect();
        let parameters: Option<Vec<_>> = adapters.iter().map(|lora| lora.a.parameter()).collect();
        let Some(parameters) = parameters.filter(|all| all.len() > 1) else { return Ok(None) };
        if parameters.iter().any(|parameter| parameter.gradient().is_some()) {
            return Ok(None);
        }
        let all = Tensor::zeros(device, Category::Gradients, DType::F32, &[spare, width])?;
        let mut row = 0;
        for parameter in parameters {
            let rank = parameter.value().rows();
            parameter.set_gradient_memory(all.block([row, rank], [0, width])?);
            row += rank;
        }
        Ok(Some(all))
    }
}

/// Every layer of a group on x \[.., D\]: results \[T, N\], in order. A residual and a factor go with a group of one.
///
/// A packed group is one product, forward and for the gradient of x; flops as [`linear`] for each layer, and for adapters 2 T
/// S (N + D) with the ranks of all layers in S. Keeps what [`linear`] keeps.
///
/// # Errors
/// As [`linear`].
pub fn linear_group(
    tape: &Tape,
    x: &Var,
    group: &LinearGroup,
    options: LinearOptions<'_>,
) -> Result<Vec<Var>> {
    let Some(packed) = group.packed.as_ref().filter(|_| options.scale == 1.0) else {
        if group.quantised.is_some() {
            return Err(fp8::unsupported(&group.layers, "its result has a factor, or it was not packed"));
        }
        return group.layers.iter().map(|layer| linear(tape, x, layer, options)).collect();
    };
    let tokens = token_count(x.tensor().shape(), packed.weight.columns())?;
    let width = packed.weight.columns();
    let input = x.tensor().reshape(&[tokens, width])?;
    let device = input.device().clone();
    let (kernels, arithmetic) = (device.kernels(), arithmetic_for(input.dtype()));
    let features = packed.wide.rows();
    let residual = check_residual(&options, &input, features)?;
    let scratch =
        |columns| Tensor::scratch(&device, Category::Activations, input.dtype(), &[tokens, columns]);
    let reduced = match &packed.a {
        Some(a) => {
            let mut reduced = scratch(a.rows())?;
            let product = (Operand::plain(&input), Operand::transposed(a));
            kernels.matmul(&[product], &mut reduced, &Finish::scaled(packed.scale), arithmetic)?;
            Some(reduced)
        }
        None => None,
    };
    let mut out = scratch(features)?;
    if let Some(quantised) = &packed.quantised {
        packed.forward_fp8(quantised, &input, reduced.as_ref(), residual, &mut out)?;
        return record(tape, x, group, packed, options, (out, reduced));
    }
    let finish = Finish { bias: packed.bias.as_ref(), residual, ..Finish::STORE };
    match (&reduced, input.spare_columns()) {
        (Some(reduced), Some((mut spare, wide_input))) if spare.columns() == reduced.columns() => {
            kernels.convert(reduced, &mut spare);
            let product = (Operand::plain(&wide_input), Operand::transposed(&packed.wide));
            kernels.matmul(&[product], &mut out, &finish, arithmetic)?;
        }
        (Some(reduced), _) => {
            let b = packed.wide.block([0, features], [width, reduced.columns()])?;
            let products = [
                (Operand::plain(&input), Operand::transposed(&packed.weight)),
                (Operand::plain(reduced), Operand::transposed(&b)),
            ];
            kernels.matmul(&products, &mut out, &finish, arithmetic)?;
        }
        (None, _) => {
            let product = (Operand::plain(&input), Operand::transposed(&packed.weight));
            kernels.matmul(&[product], &mut out, &finish, arithmetic)?;
        }
    }
    record(tape, x, group, packed, options, (out, reduced))
}

/// Divides the result among the layers and records how gradients flow back.
fn record(
    tape: &Tape,
    x: &Var,
    group: &LinearGroup,
    packed: &Packed,
    options: LinearOptions<'_>,
    (out, reduced): (Tensor, Option<Tensor>),
) -> Result<Vec<Var>> {
    let adapters: Vec<Option<Lora>> = group.layers.iter().map(|layer| layer.lora.clone()).collect();
    let trains = adapters.iter().flatten().any(|lora| lora.is_trained());
    let residual_slot = options.residual.and_then(Var::slot);
    let wanted = trains || x.slot().is_some() || residual_slot.is_some();
    let widths: Vec<usize> = group.layers.iter().map(|layer| layer.weight.shape()[0]).collect();
    let node = Node {
        input: trains.then(|| x.save()),
        input_shape: [out.rows(), packed.weight.columns()],
        packed: packed.clone(),
        adapters,
        widths: widths.clone(),
        reduced: reduced.filter(|_| trains),
        input_slot: x.slot(),
        residual_slot,
    };
    let parts = out.split_columns(&widths)?;
    Ok(tape.push_all(parts, wanted, |slots| Box::new(move |gradients| node.backward(gradients, &slots))))
}

/// What the backward pass of a packed group reads.
struct Node {
    input: Option<Saved>,
    input_shape: [usize; 2],
    packed: Packed,
    adapters: Vec<Option<Lora>>,
    widths: Vec<usize>,
    /// s x A^T \[T, S\].
    reduced: Option<Tensor>,
    input_slot: Option<usize>,
    residual_slot: Option<usize>,
}

impl Node {
    fn backward(self, gradients: &mut Gradients, slots: &[usize]) -> Result<()> {
        let Some(d_out) = self.d_out(gradients, slots)? else { return Ok(()) };
        let [tokens, width] = self.input_shape;
        let device = d_out.device().clone();
        let (kernels, arithmetic) = (device.kernels(), arithmetic_for(d_out.dtype()));
        let ranks = self.packed.a.as_ref().map_or(0, Tensor::rows);
        let scratch =
            |columns| Tensor::scratch(&device, Category::Activations, d_out.dtype(), &[tokens, columns]);
        // The gradients of x and of s x A^T / s in one pass over d_out.
        let (mut d_input, d_reduced) = match (self.input_slot, ranks) {
            _ if self.packed.quantised.is_some() => {
                self.packed.backward_fp8(&d_out, self.input_slot.is_some())?
            }
            (None, 0) => (None, None),
            (None, _) => {
                let b = self.packed.wide.block([0, self.packed.wide.rows()], [width, ranks])?;
                let mut d_reduced = scratch(ranks)?;
                let product = (Operand::plain(&d_out), Operand::plain(&b));
                kernels.matmul(&[product], &mut d_reduced, &Finish::STORE, arithmetic)?;
                (None, Some(d_reduced))
            }
            (Some(_), _) => {
                let mut both = scratch(width + ranks)?;
                let product = (Operand::plain(&d_out), Operand::plain(&self.packed.wide));
                kernels.matmul(&[product], &mut both, &Finish::STORE, arithmetic)?;
                let widths = if ranks > 0 { vec![width, ranks] } else { vec![width] };
                let mut parts = both.split_columns(&widths)?.into_iter();
                (parts.next(), parts.next())
            }
        };
        if let Some(d_reduced) = &d_reduced {
            self.adapter_gradients(&d_out, d_reduced)?;
            if let (Some(d_input), Some(a)) = (&mut d_input, &self.packed.a) {
                let product = (Operand::plain(d_reduced), Operand::plain(a));
                let finish = Finish { scale: self.packed.scale, ..Finish::ACCUMULATE };
                kernels.matmul(&[product], d_input, &finish, arithmetic)?;
            }
        }
        if let (Some(slot), Some(d_input)) = (self.input_slot, d_input) {
            gradients.add(slot, d_input)?;
        }
        match self.residual_slot {
            Some(slot) => gradients.add(slot, d_out),
            None => Ok(()),
        }
    }

    /// The gradients of all layers as one matrix; `None` when none has arrived.
    fn d_out(&self, gradients: &mut Gradients, slots: &[usize]) -> Result<Option<Tensor>> {
        let arrived: Vec<Option<Tensor>> = slots.iter().map(|&slot| gradients.take(slot)).collect();
        let Some(like) = arrived.iter().flatten().next().cloned() else { return Ok(None) };
        let rows = self.input_shape[0];
        let parts = arrived.into_iter().zip(&self.widths).map(|(gradient, &width)| match gradient {
            Some(gradient) => gradient.reshape(&[rows, width]),
            None => Tensor::zeros(like.device(), Category::Activations, like.dtype(), &[rows, width]),
        });
        let parts = parts.collect::<Result<Vec<_>>>()?;
        drop(like);
        Tensor::join_columns(parts).map(Some)
    }

    /// Adds to the gradients of every A in one product; false where they are not in one matrix.
    fn add_joint_gradients(&self, d_reduced: &Tensor, input: &Tensor) -> Result<bool> {
        let Some(all) = &self.packed.d_a else { return Ok(false) };
        let parameters = || self.adapters.iter().flatten().filter_map(|lora| lora.a.parameter());
        let is_ours = |held: Option<Tensor>| held.is_some_and(|held| held.shares_memory(all));
        if !parameters().all(|parameter| is_ours(parameter.last_gradient())) {
            return Ok(false);
        }
        let mut target = all.block([0, all.rows()], [0, all.columns()])?;
        let product = (Operand::transposed(d_reduced), Operand::plain(input));
        let finish = Finish { scale: self.packed.scale, ..Finish::ACCUMULATE };
        let arithmetic = arithmetic_for(d_reduced.dtype());
        all.device().kernels().matmul(&[product], &mut target, &finish, arithmetic)?;
        parameters().for_each(|parameter| parameter.mark_reached());
        Ok(true)
    }

    /// Adds to the gradients of every layer's A and B.
    fn adapter_gradients(&self, d_out: &Tensor, d_reduced: &Tensor) -> Result<()> {
        let kernels = d_out.device().kernels();
        let arithmetic = arithmetic_for(d_out.dtype());
        let (Some(reduced), Some(saved)) = (&self.reduced, &self.input) else { return Ok(()) };
        let input = saved.get()?.reshape(&self.input_shape)?;
        let is_joint = self.add_joint_gradients(d_reduced, &input)?;
        let (mut row, mut column) = (0, 0);
        for (lora, &features) in self.adapters.iter().zip(&self.widths) {
            let Some(lora) = lora else {
                row += features;
                continue;
            };
            let (rank, tokens) = (lora.a.shape()[0], d_out.rows());
            if let Some(b) = lora.b.parameter() {
                let (slope, own) =
                    (d_out.block([0, tokens], [row, features])?, reduced.block([0, tokens], [column, rank])?);
                b.accumulate(|d_b| {
                    let product = (Operand::transposed(&slope), Operand::plain(&own));
                    kernels.matmul(&[product], d_b, &Finish::ACCUMULATE, arithmetic)
                })?;
            }
            if let Some(a) = lora.a.parameter().filter(|_| !is_joint) {
                let slope = d_reduced.block([0, tokens], [column, rank])?;
                a.accumulate(|d_a| {
                    let product = (Operand::transposed(&slope), Operand::plain(&input));
                    let finish = Finish { scale: lora.scale, ..Finish::ACCUMULATE };
                    kernels.matmul(&[product], d_a, &finish, arithmetic)
                })?;
            }
            row += features;
            column += rank;
        }
        Ok(())
    }
}
