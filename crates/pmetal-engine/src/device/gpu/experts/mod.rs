//! Mixtures of experts.

mod matrix;

use super::Gpu;
use super::launch::{Kernel, is_aligned};
use super::runtime::Argument;
use crate::device::{
    Arithmetic, BalanceSlope, ExpertFinish, ExpertKernels, Gate, GateActivation, Held, Kernels, Operand,
    PairedGate, Router, RoutingPlan, RowTiles,
};
use crate::error::Result;
use crate::memory::Category;
use crate::{DType, Tensor};

/// Pairs of a group that ranks them, as the kernel has it.
const PART: usize = 512;

fn flag(value: bool) -> Argument {
    Argument::U32(value.into())
}

fn router_arguments(router: &Router) -> [Argument; 3] {
    let epsilon = Argument::F32(router.normalise.unwrap_or(0.0));
    [flag(router.normalise.is_some()), epsilon, Argument::F32(router.scale)]
}

/// The kernel's number of a gated activation, and its constants.
fn pair_constants(kind: PairedGate) -> (usize, [Argument; 2]) {
    match kind {
        PairedGate::Halves(GateActivation::Silu) => (0, [Argument::F32(0.0); 2]),
        PairedGate::Halves(GateActivation::GeluTanh) => (1, [Argument::F32(0.0); 2]),
        PairedGate::Halves(GateActivation::Gelu) => (4, [Argument::F32(0.0); 2]),
        PairedGate::Halves(GateActivation::Sigmoid) => (3, [Argument::F32(0.0); 2]),
        PairedGate::Clamped { slope, limit } => (2, [Argument::F32(slope), Argument::F32(limit)]),
    }
}

impl Gpu {
    fn routing(kernel: &'static str, dtype: DType, gate: Gate) -> Kernel {
        Kernel::new("routing", kernel).element(dtype).define("SIGMOID", gate == Gate::Sigmoid)
    }

    /// A kernel of rows, whose columns are read by eight where they can.
    fn rows_of_experts(kernel: &'static str, columns: usize, tensors: &[&Tensor], logits: DType) -> Kernel {
        let dtype = tensors.first().map_or(DType::F32, |tensor| tensor.dtype());
        Kernel::new("experts", kernel).source(logits).element(dtype).aligned(is_aligned(columns, tensors))
    }

    /// Rows of a tile: as many as an expert has, within what kernels take.
    fn tile_rows(&self, pairs: usize, experts: usize) -> usize {
        match pairs / experts.max(1) {
            _ if self.facts.capability < (8, 0) => 16,
            0..=16 => 16,
            17..=64 => 64,
            _ => 128,
        }
    }
}

impl ExpertKernels for Gpu {
    fn choose_experts(
        &self,
        logits: &Tensor,
        router: &Router,
        correction: Option<&Tensor>,
        weights: &mut Tensor,
        chosen: &mut Tensor,
    ) {
        let (groups, open) = router.groups.map_or((0, 0), |groups| (groups.count, groups.chosen));
        let by_scores = correction.is_some() || router.groups.is_some();
        let tokens = logits.rows();
        Self::routing("choose_experts", logits.dtype(), router.gate)
            .arguments(&[logits.into(), correction.into(), weights.into(), chosen.into()])
            .sizes(&[logits.columns(), logits.pitch(), router.choices, groups, open])
            .arguments(&[flag(by_scores), flag(correction.is_some())])
            .arguments(&router_arguments(router))
            .launch(self.runtime.as_ref(), [tokens, 1, 1], 32);
    }

    fn choose_experts_backward(
        &self,
        logits: &Tensor,
        router: &Router,
        chosen: &Tensor,
        d_weights: Option<&Tensor>,
        balance: Option<BalanceSlope<'_>>,
        d_logits: &mut Tensor,
    ) {
        let (sums, mask) = (balance.map(|balance| balance.sums), balance.and_then(|balance| balance.mask));
        let factor = balance.map(|balance| balance.factor);
        let (tokens, d_pitch) = (logits.rows(), d_logits.pitch());
        Self::routing("choose_experts_backward", logits.dtype(), router.gate)
            .arguments(&[logits.into(), chosen.into(), d_weights.into(), sums.into(), mask.into()])
            .arguments(&[factor.into(), d_logits.into()])
            .sizes(&[logits.columns(), logits.pitch(), d_pitch, router.choices])
            .arguments(&router_arguments(router))
            .arguments(&[flag(d_weights.is_some()), flag(sums.is_some()), flag(mask.is_some())])
            .launch(self.runtime.as_ref(), [tokens, 1, 1], 32);
    }

    fn plan_experts(&self, chosen: Tensor, experts: usize) -> Result<RoutingPlan> {
        let pairs = chosen.elements();
        let indices =
            |category, count: usize| Tensor::scratch(chosen.device(), category, DType::U32, &[count]);
        let tile_rows = self.tile_rows(pairs, experts);
        let most_reached = experts.min(pairs);
        let tile_count = (pairs - most_reached) / tile_rows + most_reached;
        let parts = pairs.div_ceil(PART);
        let (mut order, mut places) =
            (indices(Category::Activations, pairs)?, indices(Category::Activations, pairs)?);
        let mut offsets = indices(Category::Activations, experts + 1)?;
        let mut tiles =
            Tensor::scratch(chosen.device(), Category::Activations, DType::U32, &[tile_count, 3])?;
        let mut ranks = indices(Category::Workspace, pairs)?;
        let mut counts = indices(Category::Workspace, parts * experts)?;
        let kernel = |name| Self::routing(name, DType::F32, Gate::Softmax);
        kernel("rank_pairs")
            .arguments(&[(&chosen).into(), (&mut ranks).into(), (&mut counts).into()])
            .sizes(&[pairs, experts])
            .launch(self.runtime.as_ref(), [parts, 1, 1], PART);
        kernel("sum_counts")
            .arguments(&[(&mut counts).into(), (&mut offsets).into(), (&mut tiles).into()])
            .sizes(&[parts, experts, pairs, tile_rows, tile_count])
            .launch(self.runtime.as_ref(), [1, 1, 1], experts.next_multiple_of(32));
        kernel("place_pairs")
            .arguments(&[(&chosen).into(), (&ranks).into(), (&counts).into(), (&offsets).into()])
            .arguments(&[(&mut places).into(), (&mut order).into()])
            .sizes(&[pairs, experts])
            .launch(self.runtime.as_ref(), [parts, 1, 1], PART);
        Ok(RoutingPlan {
            experts,
            chosen,
            order,
            places,
            offsets,
            tiles: Some(RowTiles { tiles, rows: tile_rows }),
        })
    }

    fn add_balance(
        &self,
        logits: &Tensor,
        chosen: &Tensor,
        mask: Option<&Tensor>,
        sums: &mut Tensor,
    ) -> Result<()> {
        let (tokens, experts) = (logits.rows(), logits.columns());
        let shape = [tokens, 2 * experts + 1];
        let mut rows = Tensor::scratch(logits.device(), Category::Workspace, DType::F32, &shape)?;
        Self::routing("balance_rows", logits.dtype(), Gate::Softmax)
            .arguments(&[logits.into(), chosen.into(), mask.into(), (&mut rows).into()])
            .sizes(&[experts, logits.pitch(), chosen.columns()])
            .arguments(&[flag(mask.is_some())])
            .launch(self.runtime.as_ref(), [tokens, 1, 1], 32);
        self.sum_rows(&rows, sums);
        Ok(())
    }

    fn balance_loss(&self, sums: &Tensor, loss: &mut Tensor) {
        Self::routing("balance_loss", DType::F32, Gate::Softmax)
            .arguments(&[sums.into(), loss.into()])
            .sizes(&[sums.elements() / 2])
            .launch(self.runtime.as_ref(), [1, 1, 1], 32);
    }

    fn spread_tokens(
        &self,
        x: &Tensor,
        plan: &RoutingPlan,
        weights: Option<&Tensor>,
        scale: f32,
        out: &mut Tensor,
    ) {
        let (columns, out_pitch) = (x.columns(), out.pitch());
        Self::rows_of_experts("spread_tokens", columns, &[x, out], DType::F32)
            .arguments(&[x.into(), (&plan.order).into(), weights.into(), out.into()])
            .sizes(&[plan.rows(), columns, x.pitch(), out_pitch, plan.choices()])
            .arguments(&[Argument::F32(scale), flag(weights.is_some())])
            .launch(self.runtime.as_ref(), [plan.rows().div_ceil(4), columns.div_ceil(2048), 1], 256);
    }

    fn collect_tokens(
        &self,
        y: &Tensor,
        plan: &RoutingPlan,
        weights: Option<&Tensor>,
        scale: f32,
        held: Held<'_>,
        out: &mut Tensor,
    ) {
        let (columns, tokens, out_pitch) = (y.columns(), plan.chosen.rows(), out.pitch());
        let other = match held {
            Held::Other(other) => Some(other),
            Held::Nothing | Held::Itself => None,
        };
        let all: Vec<&Tensor> = [y, &*out].into_iter().chain(other).collect();
        let kernel = Self::rows_of_experts("collect_tokens", columns, &all, DType::F32);
        let out = out.address_mut();
        kernel
            .arguments(&[y.into(), (&plan.places).into(), weights.into()])
            .arguments(&[Argument::Address(other.map_or(out, Tensor::address)), Argument::Address(out)])
            .sizes(&[columns, y.pitch(), other.map_or(out_pitch, Tensor::pitch), out_pitch, plan.choices()])
            .arguments(&[Argument::F32(scale), flag(weights.is_some())])
            .arguments(&[flag(!matches!(held, Held::Nothing))])
            .launch(self.runtime.as_ref(), [tokens, columns.div_ceil(2048), 1], 256);
    }

    fn pair_products(
        &self,
        tokens: &Tensor,
        rows: &Tensor,
        plan: &RoutingPlan,
        scale: f32,
        out: &mut Tensor,
    ) {
        let columns = tokens.columns();
        Self::rows_of_experts("pair_products", columns, &[tokens, rows], DType::F32)
            .arguments(&[tokens.into(), rows.into(), (&plan.places).into(), out.into()])
            .sizes(&[columns, tokens.pitch(), rows.pitch(), plan.choices()])
            .arguments(&[Argument::F32(scale)])
            .launch(self.runtime.as_ref(), [plan.rows(), 1, 1], 128);
    }

    fn gate_rows(
        &self,
        y: &Tensor,
        logits: &Tensor,
        scale: f32,
        residual: Option<&Tensor>,
        out: &mut Tensor,
    ) {
        let (rows, columns, out_pitch) = (y.rows(), y.columns(), out.pitch());
        let all: Vec<&Tensor> = [y, &*out].into_iter().chain(residual).collect();
        Self::rows_of_experts("gate_rows", columns, &all, logits.dtype())
            .arguments(&[y.into(), logits.into(), residual.unwrap_or(y).into(), out.into()])
            .sizes(&[columns, y.pitch(), logits.pitch(), residual.unwrap_or(y).pitch(), out_pitch])
            .arguments(&[Argument::F32(scale), flag(residual.is_some())])
            .launch(self.runtime.as_ref(), [rows, columns.div_ceil(2048), 1], 256);
    }

    fn gate_rows_backward(
        &self,
        y: &Tensor,
        logits: &Tensor,
        scale: f32,
        d_out: &Tensor,
        d_y: &mut Tensor,
        d_logits: &mut Tensor,
    ) {
        let (rows, columns) = (y.rows(), y.columns());
        let pitches = [y.pitch(), logits.pitch(), d_out.pitch(), d_y.pitch(), d_logits.pitch()];
        Self::rows_of_experts("gate_rows_backward", columns, &[y, d_out], logits.dtype())
            .arguments(&[y.into(), logits.into(), d_out.into(), d_y.into(), d_logits.into()])
            .sizes(&[columns])
            .sizes(&pitches)
            .arguments(&[Argument::F32(scale)])
            .launch(self.runtime.as_ref(), [rows, 1, 1], 128);
    }

    fn gated_pair(&self, kind: PairedGate, gate_up: &Tensor, out: &mut Tensor) {
        let (number, constants) = pair_constants(kind);
        let (rows, columns, out_pitch) = (out.rows(), out.columns(), out.pitch());
        Self::rows_of_experts("gated_pair", columns, &[gate_up, out], DType::F32)
            .number("PAIR", number)
            .arguments(&[gate_up.into(), out.into()])
            .sizes(&[columns, gate_up.pitch(), out_pitch])
            .arguments(&constants)
            .launch(self.runtime.as_ref(), [rows, columns.div_ceil(2048), 1], 256);
    }

    fn gated_pair_backward(
        &self,
        kind: PairedGate,
        gate_up: &Tensor,
        d_out: &Tensor,
        d_gate_up: &mut Tensor,
    ) {
        let (number, constants) = pair_constants(kind);
        let (rows, columns, d_pitch) = (d_out.rows(), d_out.columns(), d_gate_up.pitch());
        Self::rows_of_experts("gated_pair_backward", columns, &[gate_up, d_out, d_gate_up], DType::F32)
            .number("PAIR", number)
            .arguments(&[gate_up.into(), d_out.into(), d_gate_up.into()])
            .sizes(&[columns, gate_up.pitch(), d_out.pitch(), d_pitch])
            .arguments(&constants)
            .launch(self.runtime.as_ref(), [rows, columns.div_ceil(2048), 1], 256);
    }

    fn multiply_experts(
        &self,
        products: &[(&Tensor, Operand<'_>)],
        plan: &RoutingPlan,
        finish: &ExpertFinish<'_>,
        out: &mut Tensor,
        _arithmetic: Arithmetic,
    ) -> Result<()> {
        if self.multiplies_tiles(products, plan, out) {
            // What is trained is f32 and is narrowed for the product.
            let stacks = products.iter().map(|(_, stack)| self.in_type(stack.tensor, out.dtype()));
            let stacks = stacks.collect::<Result<Vec<Tensor>>>()?;
            let narrow = |((left, stack), tensor)| {
                let (left, stack): (&Tensor, Operand<'_>) = (left, stack);
                (left, Operand { tensor, ..stack })
            };
            let products: Vec<_> = products.iter().copied().zip(&stacks).map(narrow).collect();
            self.multiply_tiles(&products, plan, finish, out);
            return Ok(());
        }
        let tiles = plan.tiles.as_ref().expect("invariant: plans of GPUs have tiles");
        let (left, right) = products.first().expect("invariant: something is multiplied");
        let (second_left, second_right) = products.get(1).unwrap_or(&products[0]);
        let second_inner = products.get(1).map_or(0, |(left, _)| left.columns());
        let (columns, out_pitch) = (out.columns(), out.pitch());
        Kernel::new("expert_products", "multiply_experts")
            .source(left.dtype())
            .weight(right.tensor.dtype())
            .element(out.dtype())
            .second(second_right.tensor.dtype())
            .number("TILE_ROWS", tiles.rows)
            .define("TURNED", right.transposed)
            .define("SECOND_TURNED", second_right.transposed)
            .arguments(&[
                (*left).into(),
                right.tensor.into(),
                (*second_left).into(),
                second_right.tensor.into(),
            ])
            .arguments(&[finish.bias.into(), (&tiles.tiles).into(), out.into()])
            .sizes(&[columns, left.columns(), second_inner, left.pitch(), second_left.pitch(), out_pitch])
            .arguments(&[Argument::F32(finish.scale), flag(finish.bias.is_some()), flag(finish.accumulate)])
            .launch(self.runtime.as_ref(), [columns.div_ceil(64), tiles.tiles.rows(), 1], 256);
        Ok(())
    }

    fn add_expert_gradients(
        &self,
        left: &Tensor,
        right: &Tensor,
        plan: &RoutingPlan,
        scale: f32,
        out: &mut Tensor,
    ) -> Result<()> {
        if self.add_gradient_tiles(left, right, plan, scale, out) {
            return Ok(());
        }
        let (rows, columns) = (left.columns(), right.columns());
        Self::product("expert_gradients", left.dtype())
            .arguments(&[left.into(), right.into(), (&plan.offsets).into(), out.into()])
            .sizes(&[rows, columns, left.pitch(), right.pitch()])
            .arguments(&[Argument::F32(scale)])
            .launch(self.runtime.as_ref(), [rows.div_ceil(64), columns.div_ceil(64), plan.experts], 256);
        Ok(())
    }

    fn add_expert_sums(&self, x: &Tensor, plan: &RoutingPlan, out: &mut Tensor) {
        let columns = x.columns();
        Self::product("expert_sums", x.dtype())
            .arguments(&[x.into(), (&plan.offsets).into(), out.into()])
            .sizes(&[columns, x.pitch()])
            .launch(self.runtime.as_ref(), [columns.div_ceil(128), plan.experts, 1], 128);
    }
}

impl Gpu {
    /// A kernel of sums over the rows of each expert.
    fn product(kernel: &'static str, dtype: DType) -> Kernel {
        Kernel::new("expert_products", kernel).source(dtype).weight(DType::F32).element(DType::F32)
    }
}
