//! Linear layers of one input, computed together where a device gains by it.

mod fp8;

use crate::device::{Arithmetic, Finish, GradientCodes, Operand, Riding, ScaledRows, Share};
use crate::error::Result;
use crate::memory::Category;
use crate::ops::columns::join_columns;
use crate::ops::linear::{check_residual, linear, token_count};
use crate::ops::{Linear, LinearOptions, Lora};
use crate::tape::{Gradients, Saved};
use crate::{DType, Tape, Tensor, Var, Weight};

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
    /// `[W ; A]` \[sum of N + S, D\], whose W is the same memory: `[d_out | s d_out B]` times it is the gradient of x.
    tall: Option<Tensor>,
    /// The first D columns of `wide`.
    weight: Tensor,
    /// The weights in eight bits; `weight` are their codes then.
    quantised: Option<fp8::Quantised>,
    /// All A \[S, D\], rows of no adapter zero; `None` when there are no adapters.
    a: Option<Tensor>,
    /// f32 \[sum of N\].
    bias: Option<Tensor>,
    /// s, the same for all adapters.
    scale: f32,
}

/// Rows for which what an adapter reduces is not put next to its input.
const FEW_TOKENS: usize = 4;

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

    /// Whether the backward pass adds to gradients of adapters.
    fn trains(&self) -> bool {
        self.layers.iter().filter_map(|layer| layer.lora.as_ref()).any(Lora::is_trained)
    }

    /// The packed form, where the adapters' columns follow those of the input. They would be out of line after rows of
    /// another width: kernels that read them so differ in rounding from those that read copies, and what is kept of a
    /// layer decides which there are.
    fn rides(&self) -> Option<&Packed> {
        let lined_up = |packed: &&Packed| packed.weight.columns().is_multiple_of(SPARE_UNIT);
        self.packed.as_ref().filter(|packed| packed.quantised.is_none()).filter(lined_up)
    }

    /// Columns that the group's input should have to spare; see [`Tensor::scratch_with_spare`].
    pub fn spare(&self) -> usize {
        self.rides().map_or(0, |packed| packed.wide.columns() - packed.weight.columns())
    }

    /// What whoever computes the group's input can multiply it by at once, into the columns that it has to spare.
    pub fn riding(&self) -> Option<Riding> {
        let packed = self.rides()?;
        packed.a.clone().map(|a| Riding { a, scale: packed.scale })
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
        let under = if self.quantised.is_some() { 0 } else { spare };
        let all = Tensor::zeros(&device, Category::Weights, dtype, &[rows + under, columns])?;
        let wide = all.block([0, rows], [0, columns])?;
        let a = match (spare, under) {
            (0, _) => None,
            (_, 0) => Some(Tensor::zeros(&device, Category::Weights, dtype, &[spare, width])?),
            (_, _) => Some(all.block([rows, spare], [0, width])?),
        };
        let tall = if under > 0 { Some(all.block([0, rows + under], [0, width])?) } else { None };
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
        let quantised = self.quantised.clone();
        let weight = match &quantised {
            Some(quantised) => quantised.rows.codes.clone(),
            None => wide.block([0, rows], [0, width])?,
        };
        let bias = bias.map(|bias| bias.reshape(&[rows])).transpose()?;
        self.packed = Some(Packed { wide, tall, weight, quantised, a, bias, scale });
        Ok(())
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
    let (kernels, arithmetic) = (device.kernels(), Arithmetic::of(input.dtype()));
    let features = packed.wide.rows();
    let residual = check_residual(&options, &input, features)?;
    let scratch =
        |columns| Tensor::scratch(&device, Category::Activations, input.dtype(), &[tokens, columns]);
    let Reduced { reduced, wide_input, kept } = reduce(tape, x, group, packed, &input)?;
    if let Some(residual) = residual.filter(|_| options.ends_block && tape.is_again()) {
        return record(tape, x, group, packed, options, (residual.clone(), kept));
    }
    let mut out = scratch(features)?;
    if let Some(quantised) = &packed.quantised {
        let input = (&input, x.codes());
        packed.forward_fp8(quantised, input, reduced.as_ref(), residual, &mut out)?;
        return record(tape, x, group, packed, options, (out, kept));
    }
    let finish = Finish { bias: packed.bias.as_ref(), residual, ..Finish::STORE };
    match (&reduced, wide_input) {
        (Some(_), Some(wide_input)) => {
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
    record(tape, x, group, packed, options, (out, kept))
}

/// What the adapters of a group make of its input.
struct Reduced {
    /// s x A^T \[T, S\]; `None` without adapters.
    reduced: Option<Tensor>,
    /// `[x | s x A^T]`, where rows of x have room for it.
    wide_input: Option<Tensor>,
    /// Where it is in the backward pass; `None` where that does not read it.
    kept: Option<KeptReduced>,
}

/// Where s x A^T \[T, S\] is in the backward pass.
enum KeptReduced {
    Here(Tensor),
    /// Next to the input, which is computed again together with it.
    BesideInput,
}

/// Multiplies the input by all A, into the columns that it has to spare if it has them. There the result stays where the
/// input is kept for the backward pass anyway; else it is copied, because a norm that is computed again has none, unless
/// the product rides on the norm.
fn reduce(tape: &Tape, x: &Var, group: &LinearGroup, packed: &Packed, input: &Tensor) -> Result<Reduced> {
    let Some(a) = &packed.a else { return Ok(Reduced { reduced: None, wide_input: None, kept: None }) };
    let is_kept = tape.is_recording() && group.trains();
    let here = |reduced: &Tensor| is_kept.then(|| KeptReduced::Here(reduced.clone()));
    let (device, arithmetic) = (input.device().clone(), Arithmetic::of(input.dtype()));
    let (tokens, finish) = (input.rows(), Finish::scaled(packed.scale));
    let product = (Operand::plain(input), Operand::transposed(a));
    let scratch = || Tensor::scratch(&device, Category::Activations, input.dtype(), &[tokens, a.rows()]);
    // Few rows are done in one launch either way; weights in eight bits read no wider rows.
    let rides = tokens > FEW_TOKENS && packed.quantised.is_none();
    let spare = input.spare_columns().filter(|(spare, _)| rides && spare.columns() == a.rows());
    let Some((mut spare, wide_input)) = spare else {
        let mut reduced = scratch()?;
        device.kernels().matmul(&[product], &mut reduced, &finish, arithmetic)?;
        return Ok(Reduced { kept: here(&reduced), reduced: Some(reduced), wide_input: None });
    };
    let has_it =
        x.riding().is_some_and(|riding| riding.a.address() == a.address() && riding.scale == packed.scale);
    if !has_it {
        device.kernels().matmul(&[product], &mut spare, &finish, arithmetic)?;
    }
    // Another group that reads this input does not ride, also where nothing is kept here: what is kept must not show.
    input.keep_spare();
    let kept = match x.save() {
        _ if !is_kept => None,
        Saved::Value(_) => here(&spare),
        Saved::Again(_) if has_it => Some(KeptReduced::BesideInput),
        Saved::Again(_) => {
            let mut copy = scratch()?;
            device.kernels().convert(&spare, &mut copy);
            here(&copy)
        }
    };
    Ok(Reduced { reduced: Some(spare), wide_input: Some(wide_input), kept })
}

/// Divides the result among the layers and records how gradients flow back.
fn record(
    tape: &Tape,
    x: &Var,
    group: &LinearGroup,
    packed: &Packed,
    options: LinearOptions<'_>,
    (out, reduced): (Tensor, Option<KeptReduced>),
) -> Result<Vec<Var>> {
    let adapters: Vec<Option<Lora>> = group.layers.iter().map(|layer| layer.lora.clone()).collect();
    let trains = group.trains();
    let residual_slot = options.residual.and_then(Var::slot);
    let wanted = trains || x.slot().is_some() || residual_slot.is_some();
    let widths: Vec<usize> = group.layers.iter().map(|layer| layer.weight.shape()[0]).collect();
    let node = Node {
        input: trains.then(|| x.save()),
        input_shape: [out.rows(), packed.weight.columns()],
        packed: packed.clone(),
        adapters,
        widths: widths.clone(),
        reduced,
        takes_share: x.riding().is_some(),
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
    reduced: Option<KeptReduced>,
    /// Whether who computed the input adds the adapters' part to its gradient.
    takes_share: bool,
    input_slot: Option<usize>,
    residual_slot: Option<usize>,
}

/// Inputs of at least so many bytes do not exist together with their gradient, where they are wider than the result: what
/// a feed-forward layer's middle takes is most of what a block takes at its peak. (Smaller ones in tests, to have both.)
const APART_BYTES: usize = if cfg!(test) { 256 } else { 32 << 20 };

impl Node {
    fn backward(mut self, gradients: &mut Gradients, slots: &[usize]) -> Result<()> {
        let Some((d_out, codes)) = self.d_out(gradients, slots)? else { return Ok(()) };
        let [tokens, width] = self.input_shape;
        let is_large = tokens * width * d_out.dtype().bytes() >= APART_BYTES;
        if is_large && let Some(d_input) = self.riding_slopes(gradients, &d_out)? {
            return self.hand_on(gradients, Some(d_input), None, d_out);
        }
        let is_apart = width > d_out.columns() && is_large;
        let (mut d_input, d_reduced) = match self.input_slot {
            _ if self.packed.quantised.is_some() => {
                self.packed.backward_fp8((&d_out, codes), self.input_slot.is_some())?
            }
            Some(_) if !is_apart => self.joint_slopes(&d_out)?,
            _ => (None, self.reduced_slope(&d_out)?),
        };
        if let Some(d_reduced) = &d_reduced {
            self.adapter_gradients(gradients, &d_out, (d_reduced, self.packed.scale))?;
        }
        // It may have been computed again, and what was reduced may lie next to it.
        (self.input, self.reduced) = (None, None);
        if self.input_slot.is_some() && d_input.is_none() {
            let mut alone = self.scratch(&d_out, width)?;
            self.multiply((Operand::plain(&d_out), &self.packed.weight), &mut alone, &Finish::STORE)?;
            d_input = Some(alone);
        }
        let is_left = self.packed.quantised.is_none();
        let mut share = None;
        if let (true, Some(d), Some(d_input), Some(a)) = (is_left, d_reduced, &mut d_input, &self.packed.a) {
            let rest = Share { d, riding: Riding { a: a.clone(), scale: self.packed.scale } };
            match self.takes_share {
                true => share = Some(rest),
                false => rest.add_to(d_input)?,
            }
        }
        self.hand_on(gradients, d_input, share, d_out)
    }

    fn hand_on(
        self,
        gradients: &mut Gradients,
        d_input: Option<Tensor>,
        share: Option<Share>,
        d_out: Tensor,
    ) -> Result<()> {
        match (self.input_slot, d_input, share) {
            (Some(slot), Some(d_input), Some(share)) => gradients.add_with_share(slot, d_input, share)?,
            (Some(slot), Some(d_input), None) => gradients.add(slot, d_input)?,
            _ => {}
        }
        match self.residual_slot {
            Some(slot) => gradients.add(slot, d_out),
            None => Ok(()),
        }
    }

    /// The gradient of x in one product, where the rows of d_out have room for s d_out B: no second pass over it.
    fn riding_slopes(&mut self, gradients: &mut Gradients, d_out: &Tensor) -> Result<Option<Tensor>> {
        let ranks = self.packed.a.as_ref().map_or(0, Tensor::rows);
        let (Some(tall), Some((mut d_reduced, wide_d_out))) =
            (self.packed.tall.clone(), d_out.spare_columns())
        else {
            return Ok(None);
        };
        if self.input_slot.is_none() || d_reduced.columns() != ranks {
            return Ok(None);
        }
        let b = self.packed.wide.block([0, self.packed.wide.rows()], [self.input_shape[1], ranks])?;
        self.multiply((Operand::plain(d_out), &b), &mut d_reduced, &Finish::scaled(self.packed.scale))?;
        self.adapter_gradients(gradients, d_out, (&d_reduced, 1.0))?;
        // The columns are another group's next; and the input may have been computed again.
        gradients.finish_weights()?;
        (self.input, self.reduced) = (None, None);
        let mut d_input = self.scratch(d_out, self.input_shape[1])?;
        self.multiply((Operand::plain(&wide_d_out), &tall), &mut d_input, &Finish::STORE)?;
        Ok(Some(d_input))
    }

    fn scratch(&self, like: &Tensor, columns: usize) -> Result<Tensor> {
        let shape = [self.input_shape[0], columns];
        Tensor::scratch(like.device(), Category::Activations, like.dtype(), &shape)
    }

    fn multiply(
        &self,
        (left, right): (Operand<'_>, &Tensor),
        out: &mut Tensor,
        finish: &Finish<'_>,
    ) -> Result<()> {
        let (device, arithmetic) = (out.device().clone(), Arithmetic::of(left.tensor.dtype()));
        device.kernels().matmul(&[(left, Operand::plain(right))], out, finish, arithmetic)
    }

    /// The gradients of x and of s x A^T / s in one pass over d_out.
    fn joint_slopes(&self, d_out: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (width, ranks) = (self.input_shape[1], self.packed.a.as_ref().map_or(0, Tensor::rows));
        let mut both = self.scratch(d_out, width + ranks)?;
        self.multiply((Operand::plain(d_out), &self.packed.wide), &mut both, &Finish::STORE)?;
        let widths = if ranks > 0 { vec![width, ranks] } else { vec![width] };
        let mut parts = both.split_columns(&widths)?.into_iter();
        Ok((parts.next(), parts.next()))
    }

    /// The gradient of s x A^T / s alone.
    fn reduced_slope(&self, d_out: &Tensor) -> Result<Option<Tensor>> {
        let Some(ranks) = self.packed.a.as_ref().map(Tensor::rows) else { return Ok(None) };
        let b = self.packed.wide.block([0, self.packed.wide.rows()], [self.input_shape[1], ranks])?;
        let mut d_reduced = self.scratch(d_out, ranks)?;
        self.multiply((Operand::plain(d_out), &b), &mut d_reduced, &Finish::STORE)?;
        Ok(Some(d_reduced))
    }

    /// The gradients of all layers as one matrix, with its codes where they are known; `None` when none has arrived.
    fn d_out(
        &self,
        gradients: &mut Gradients,
        slots: &[usize],
    ) -> Result<Option<(Tensor, Option<ScaledRows>)>> {
        let arrived = slots.iter().map(|&slot| gradients.take_with_codes(slot).unzip());
        let (arrived, codes): (Vec<Option<Tensor>>, Vec<_>) = arrived.unzip();
        let codes: Vec<Option<GradientCodes>> = codes.into_iter().map(Option::flatten).collect();
        let codes = self.packed.gradient_codes(&codes, &self.widths);
        let Some(like) = arrived.iter().flatten().next().cloned() else { return Ok(None) };
        let rows = self.input_shape[0];
        let parts = arrived.into_iter().zip(&self.widths).map(|(gradient, &width)| match gradient {
            Some(gradient) => gradient.reshape(&[rows, width]),
            None => Tensor::zeros(like.device(), Category::Activations, like.dtype(), &[rows, width]),
        });
        let mut parts = parts.collect::<Result<Vec<_>>>()?;
        drop(like);
        // One alone keeps its columns to spare.
        let d_out = if parts.len() == 1 { parts.pop() } else { Some(join_columns(parts)?) };
        Ok(d_out.map(|d_out| (d_out, codes)))
    }

    /// Adds to the gradients of every layer's A and B; `factor` times `d_reduced` is the gradient of x A^T.
    fn adapter_gradients(
        &self,
        gradients: &mut Gradients,
        d_out: &Tensor,
        (d_reduced, factor): (&Tensor, f32),
    ) -> Result<()> {
        let (Some(reduced), Some(saved)) = (&self.reduced, &self.input) else { return Ok(()) };
        let input = saved.get()?.reshape(&self.input_shape)?;
        let beside = || input.spare_columns().expect("invariant: it rides on the input").0;
        let reduced = match reduced {
            KeptReduced::Here(reduced) => reduced.clone(),
            KeptReduced::BesideInput => beside(),
        };
        let tokens = d_out.rows();
        let (mut row, mut column) = (0, 0);
        for (lora, &features) in self.adapters.iter().zip(&self.widths) {
            let Some(lora) = lora else {
                row += features;
                continue;
            };
            let rank = lora.a.shape()[0];
            if let Some(b) = lora.b.parameter() {
                let slope = d_out.block([0, tokens], [row, features])?;
                let own = reduced.block([0, tokens], [column, rank])?;
                gradients.add_weight(b, slope, own, 1.0)?;
            }
            if let Some(a) = lora.a.parameter() {
                let slope = d_reduced.block([0, tokens], [column, rank])?;
                gradients.add_weight(a, slope, input.clone(), factor)?;
            }
            row += features;
            column += rank;
        }
        gradients.settle_weights()
    }
}
