//! Kernels for mixtures of experts.
//!
//! T tokens choose k of X experts each; the T k pairs are the rows P of what experts read and write, ordered by expert and
//! within an expert by token, without gaps. Nothing about a plan is read by the host, so that recordings hold for every
//! choice.

use super::{Arithmetic, GateActivation, Held, Operand};
use crate::Tensor;
use crate::error::Result;

/// What turns logits into scores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gate {
    /// Over all experts.
    Softmax,
    /// Each expert for itself.
    Sigmoid,
}

/// A choice of groups of experts before that of experts; a group's score is the sum of its two best.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Groups {
    /// Groups that the experts are divided into, in order.
    pub count: usize,
    /// Groups whose experts can be chosen.
    pub chosen: usize,
}

/// How tokens choose experts, and what the choices weigh.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Router {
    /// From logits to scores.
    pub gate: Gate,
    /// Experts of a token.
    pub choices: usize,
    /// Chosen scores are divided by this plus their sum; `None` leaves them.
    pub normalise: Option<f32>,
    /// Groups, where experts have them.
    pub groups: Option<Groups>,
    /// Factor on the weights.
    pub scale: f32,
}

/// The most experts that a router chooses from, and the most that it chooses.
pub const MOST_EXPERTS: usize = 1024;
/// See [`MOST_EXPERTS`].
pub const MOST_CHOICES: usize = 32;

/// Where the pairs of tokens and experts are.
#[derive(Debug, Clone)]
pub struct RoutingPlan {
    /// X.
    pub experts: usize,
    /// u32 \[T, k\]: experts, the best first.
    pub chosen: Tensor,
    /// u32 \[P\]: the pair, token times k plus choice, of each row.
    pub order: Tensor,
    /// u32 \[P\]: the row of each pair.
    pub places: Tensor,
    /// u32 \[X + 1\]: the first row of each expert, and P.
    pub offsets: Tensor,
    /// Tiles of rows for kernels that need them.
    pub tiles: Option<RowTiles>,
}

/// A division of the rows so that each tile is of one expert.
#[derive(Debug, Clone)]
pub struct RowTiles {
    /// u32 \[tiles, 3\]: expert, first row and number of rows; no rows for tiles that are not needed.
    pub tiles: Tensor,
    /// Most rows of one.
    pub rows: usize,
}

impl RoutingPlan {
    /// k.
    pub fn choices(&self) -> usize {
        self.chosen.columns()
    }

    /// P.
    pub fn rows(&self) -> usize {
        self.chosen.elements()
    }
}

/// What the balance of experts adds to the gradient of one layer's logits.
#[derive(Debug, Clone, Copy)]
pub struct BalanceSlope<'a> {
    /// As [`ExpertKernels::add_balance`] left them for all layers.
    pub sums: &'a Tensor,
    /// Weight of each token, f32 \[T\]; absent = 1.
    pub mask: Option<&'a Tensor>,
    /// Gradient of the loss, f32 \[1\].
    pub factor: &'a Tensor,
}

/// How the two halves of a gated activation lie in a row of twice its width.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum PairedGate {
    /// The gate in the first half, up in the second: `activation(gate) * up`.
    Halves(GateActivation),
    /// The gate in even columns, up in odd ones: `(u + 1) g sigmoid(slope g)`, g the gate, at most `limit`, and u up
    /// within `limit` on both sides.
    Clamped {
        /// Factor within the sigmoid.
        slope: f32,
        /// Largest gate, and largest up on either side.
        limit: f32,
    },
}

/// What happens to a product of experts before it is stored.
#[derive(Debug, Clone, Copy)]
pub struct ExpertFinish<'a> {
    /// Factor on the product.
    pub scale: f32,
    /// Added to the rows of each expert: f32 \[X, N\].
    pub bias: Option<&'a Tensor>,
    /// Whether to add to what the output holds instead of replacing it.
    pub accumulate: bool,
}

impl ExpertFinish<'_> {
    /// Store the product itself.
    pub const STORE: Self = Self { scale: 1.0, bias: None, accumulate: false };
}

/// Kernels for mixtures of experts; shapes were checked by [`crate::ops`].
pub trait ExpertKernels {
    /// Chooses experts by logits \[T, X\] and gives their weights f32 \[T, k\]. `correction`, f32 \[X\], is added to the
    /// scores for the choice alone. Without it and without groups, logits are compared. Of equals the first is chosen; what
    /// is not a number counts as the lowest.
    fn choose_experts(
        &self,
        logits: &Tensor,
        router: &Router,
        correction: Option<&Tensor>,
        weights: &mut Tensor,
        chosen: &mut Tensor,
    );

    /// Gradient of the weights and of the balance, to logits. The choice has none.
    fn choose_experts_backward(
        &self,
        logits: &Tensor,
        router: &Router,
        chosen: &Tensor,
        d_weights: Option<&Tensor>,
        balance: Option<BalanceSlope<'_>>,
        d_logits: &mut Tensor,
    );

    /// Orders the pairs of u32 \[T, k\] by expert.
    ///
    /// # Errors
    /// Out of memory.
    fn plan_experts(&self, chosen: Tensor, experts: usize) -> Result<RoutingPlan>;

    /// Adds to sums f32 \[2 X + 1\]: each expert's probability by softmax, how often it was chosen, and the tokens, all
    /// times the mask.
    ///
    /// # Errors
    /// Out of memory.
    fn add_balance(
        &self,
        logits: &Tensor,
        chosen: &Tensor,
        mask: Option<&Tensor>,
        sums: &mut Tensor,
    ) -> Result<()>;

    /// `X sum_e probability_e chosen_e / tokens^2` of sums as [`Self::add_balance`] leaves them, to f32 \[1\].
    fn balance_loss(&self, sums: &Tensor, loss: &mut Tensor);

    /// `out[row] = scale * weight * x[its token]`; without weights, f32 \[T, k\], they count as 1.
    fn spread_tokens(
        &self,
        x: &Tensor,
        plan: &RoutingPlan,
        weights: Option<&Tensor>,
        scale: f32,
        out: &mut Tensor,
    );

    /// `out[token] = held + scale * sum over its choices of weight * y[row]`, in the order of choices.
    fn collect_tokens(
        &self,
        y: &Tensor,
        plan: &RoutingPlan,
        weights: Option<&Tensor>,
        scale: f32,
        held: Held<'_>,
        out: &mut Tensor,
    );

    /// `out[token, choice] = scale * sum over columns of tokens[token] * rows[row]`, f32.
    fn pair_products(&self, tokens: &Tensor, rows: &Tensor, plan: &RoutingPlan, scale: f32, out: &mut Tensor);

    /// `out[t] = residual[t] + scale * sigmoid(logits[t]) * y[t]`.
    fn gate_rows(&self, y: &Tensor, logits: &Tensor, scale: f32, residual: Option<&Tensor>, out: &mut Tensor);

    /// Gradients of [`Self::gate_rows`].
    fn gate_rows_backward(
        &self,
        y: &Tensor,
        logits: &Tensor,
        scale: f32,
        d_out: &Tensor,
        d_y: &mut Tensor,
        d_logits: &mut Tensor,
    );

    /// A gated activation of rows \[P, 2 F\].
    fn gated_pair(&self, kind: PairedGate, gate_up: &Tensor, out: &mut Tensor);

    /// Gradient of [`Self::gated_pair`]. At a limit the gradient passes.
    fn gated_pair_backward(&self, kind: PairedGate, gate_up: &Tensor, d_out: &Tensor, d_gate_up: &mut Tensor);

    /// `out[row] = finish(sum of left_i[row] right_i[its expert])`: right operands are stacked \[X, K, N\], or
    /// \[X, N, K\] when transposed.
    ///
    /// # Errors
    /// As [`super::Kernels::matmul`].
    fn multiply_experts(
        &self,
        products: &[(&Tensor, Operand<'_>)],
        plan: &RoutingPlan,
        finish: &ExpertFinish<'_>,
        out: &mut Tensor,
        arithmetic: Arithmetic,
    ) -> Result<()>;

    /// Adds `scale * sum over an expert's rows of left^T right` to f32 \[X, M, N\].
    ///
    /// # Errors
    /// As [`super::Kernels::matmul`].
    fn add_expert_gradients(
        &self,
        left: &Tensor,
        right: &Tensor,
        plan: &RoutingPlan,
        scale: f32,
        out: &mut Tensor,
    ) -> Result<()>;

    /// Adds the sums over each expert's rows to f32 \[X, N\].
    fn add_expert_sums(&self, x: &Tensor, plan: &RoutingPlan, out: &mut Tensor);
}
