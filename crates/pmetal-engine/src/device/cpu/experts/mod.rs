//! Mixtures of experts on the CPU.

mod choice;
mod products;
mod rows;

use crate::Tensor;
use crate::device::{
    Arithmetic, BalanceSlope, ExpertFinish, ExpertKernels, Held, Operand, PairedGate, Router, RoutingPlan,
};
use crate::error::Result;

impl ExpertKernels for super::Cpu {
    fn choose_experts(
        &self,
        logits: &Tensor,
        router: &Router,
        correction: Option<&Tensor>,
        weights: &mut Tensor,
        chosen: &mut Tensor,
    ) {
        choice::forward(logits, router, correction.map(Tensor::as_slice::<f32>), weights, chosen);
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
        choice::backward(logits, router, chosen, d_weights, balance, d_logits);
    }

    fn plan_experts(&self, chosen: Tensor, experts: usize) -> Result<RoutingPlan> {
        choice::plan(chosen, experts)
    }

    fn add_balance(
        &self,
        logits: &Tensor,
        chosen: &Tensor,
        mask: Option<&Tensor>,
        sums: &mut Tensor,
    ) -> Result<()> {
        choice::add_balance(logits, chosen, mask, sums);
        Ok(())
    }

    fn balance_loss(&self, sums: &Tensor, loss: &mut Tensor) {
        choice::balance_loss(sums.as_slice::<f32>(), loss);
    }

    fn spread_tokens(
        &self,
        x: &Tensor,
        plan: &RoutingPlan,
        weights: Option<&Tensor>,
        scale: f32,
        out: &mut Tensor,
    ) {
        rows::spread(x, plan, weights, scale, out);
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
        rows::collect(y, plan, weights, scale, held, out);
    }

    fn pair_products(
        &self,
        tokens: &Tensor,
        rows: &Tensor,
        plan: &RoutingPlan,
        scale: f32,
        out: &mut Tensor,
    ) {
        rows::pair_products(tokens, rows, plan, scale, out);
    }

    fn gate_rows(
        &self,
        y: &Tensor,
        logits: &Tensor,
        scale: f32,
        residual: Option<&Tensor>,
        out: &mut Tensor,
    ) {
        rows::gate(y, logits, scale, residual, out);
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
        rows::gate_backward(y, logits, scale, d_out, d_y, d_logits);
    }

    fn gated_pair(&self, kind: PairedGate, gate_up: &Tensor, out: &mut Tensor) {
        rows::gated_pair(kind, gate_up, out);
    }

    fn gated_pair_backward(
        &self,
        kind: PairedGate,
        gate_up: &Tensor,
        d_out: &Tensor,
        d_gate_up: &mut Tensor,
    ) {
        rows::gated_pair_backward(kind, gate_up, d_out, d_gate_up);
    }

    fn multiply_experts(
        &self,
        products: &[(&Tensor, Operand<'_>)],
        plan: &RoutingPlan,
        finish: &ExpertFinish<'_>,
        out: &mut Tensor,
        arithmetic: Arithmetic,
    ) -> Result<()> {
        products::multiply(products, plan, finish, out, arithmetic)
    }

    fn add_expert_gradients(
        &self,
        left: &Tensor,
        right: &Tensor,
        plan: &RoutingPlan,
        scale: f32,
        out: &mut Tensor,
    ) -> Result<()> {
        products::add_gradients(left, right, plan, scale, out)
    }

    fn add_expert_sums(&self, x: &Tensor, plan: &RoutingPlan, out: &mut Tensor) {
        products::add_sums(x, plan, out);
    }
}
