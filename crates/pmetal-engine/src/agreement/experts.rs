//! Mixtures of experts.

use super::Inputs;
use crate::device::{
    Arithmetic, BalanceSlope, ExpertFinish, Gate, Groups, Held, Operand, PairedGate, Router, RoutingPlan,
};
use crate::error::Result;
use crate::memory::Category;
use crate::{DType, Tensor};

const TOKENS: usize = 9;
const CHOICES: usize = 3;

/// Rows of 5 experts, of which the fourth has none.
fn plan(inputs: &Inputs<'_>) -> Result<RoutingPlan> {
    let chosen = (0..TOKENS as u32).flat_map(|token| [0, 4, 1 + token % 2]).collect::<Vec<u32>>();
    let chosen = inputs.indices(&chosen)?.reshape(&[TOKENS, CHOICES])?;
    inputs.device.kernels().experts().plan_experts(chosen, 5)
}

/// Choices by two routers, their order, their balance and the gradients of both.
pub(super) fn routed(inputs: &Inputs<'_>, experts: usize) -> Result<Vec<Tensor>> {
    let kernels = inputs.device.kernels().experts();
    let logits = inputs.tensor(1, &[TOKENS, experts])?;
    let (correction, d_weights) = (inputs.floats(2, &[experts])?, inputs.floats(3, &[TOKENS, CHOICES])?);
    let softmax = Router { gate: Gate::Softmax, choices: CHOICES, normalise: None, groups: None, scale: 1.0 };
    let groups = Some(Groups { count: 4, chosen: 2 });
    let sigmoid = Router { gate: Gate::Sigmoid, normalise: Some(0.25), groups, scale: 2.5, ..softmax };
    let normalised = Router { normalise: Some(0.0), ..softmax };
    let mut results = Vec::new();
    for (router, correction) in
        [(softmax, None), (sigmoid, Some(&correction)), (normalised, Some(&correction))]
    {
        let mut weights = inputs.floats(4, &[TOKENS, CHOICES])?;
        let mut chosen = inputs.indices(&[9; TOKENS * CHOICES])?.reshape(&[TOKENS, CHOICES])?;
        kernels.choose_experts(&logits, &router, correction, &mut weights, &mut chosen);
        let mask = inputs.floats(5, &[TOKENS])?;
        let mut sums = inputs.place(DType::F32, &[2 * experts + 1], 0, &vec![0.0; 2 * experts + 1])?;
        kernels.add_balance(&logits, &chosen, None, &mut sums)?;
        kernels.add_balance(&logits, &chosen, Some(&mask), &mut sums)?;
        let mut loss = inputs.floats(6, &[1])?;
        kernels.balance_loss(&sums, &mut loss);
        let (mut d_logits, mut d_both) =
            (inputs.empty(&[TOKENS, experts])?, inputs.empty(&[TOKENS, experts])?);
        kernels.choose_experts_backward(&logits, &router, &chosen, Some(&d_weights), None, &mut d_logits);
        results.extend([weights, loss, d_logits]);
        if router.gate == Gate::Softmax {
            let factor = inputs.place(DType::F32, &[1], 0, &[10.0])?;
            let slope = BalanceSlope { sums: &sums, mask: Some(&mask), factor: &factor };
            kernels.choose_experts_backward(
                &logits,
                &router,
                &chosen,
                Some(&d_weights),
                Some(slope),
                &mut d_both,
            );
            results.push(d_both);
        }
        results.push(sums);
        let plan = kernels.plan_experts(chosen, experts)?;
        results.extend([plan.chosen, plan.order, plan.places, plan.offsets]);
    }
    Ok(results)
}

/// Rows from tokens to experts and back, and gates of rows.
pub(super) fn rows(inputs: &Inputs<'_>, width: usize) -> Result<Vec<Tensor>> {
    let (kernels, plan) = (inputs.device.kernels().experts(), plan(inputs)?);
    let (tokens, pairs) = ([TOKENS, width], [TOKENS * CHOICES, width]);
    let (x, y, weights) =
        (inputs.tensor(1, &tokens)?, inputs.tensor(2, &pairs)?, inputs.floats(3, &[TOKENS, CHOICES])?);
    let (mut plain, mut weighed) = (inputs.empty(&pairs)?, inputs.empty(&pairs)?);
    kernels.spread_tokens(&x, &plan, None, 1.0, &mut plain);
    kernels.spread_tokens(&x, &plan, Some(&weights), 0.5, &mut weighed);
    let (mut sum, mut onto, mut added) =
        (inputs.empty(&tokens)?, inputs.empty(&tokens)?, inputs.tensor(4, &tokens)?);
    kernels.collect_tokens(&y, &plan, None, 1.0, Held::Nothing, &mut sum);
    kernels.collect_tokens(&y, &plan, Some(&weights), 0.5, Held::Other(&x), &mut onto);
    kernels.collect_tokens(&y, &plan, Some(&weights), 1.0, Held::Itself, &mut added);
    let mut products = inputs.floats(5, &[TOKENS, CHOICES])?;
    kernels.pair_products(&x, &y, &plan, 0.5, &mut products);
    let (logits, d_out) = (inputs.tensor(6, &[TOKENS, 1])?, inputs.tensor(7, &tokens)?);
    let (mut gated, mut gated_onto) = (inputs.empty(&tokens)?, inputs.empty(&tokens)?);
    kernels.gate_rows(&x, &logits, 1.0, None, &mut gated);
    kernels.gate_rows(&x, &logits, 0.5, Some(&d_out), &mut gated_onto);
    let (mut d_x, mut d_logits) = (inputs.empty(&tokens)?, inputs.empty(&[TOKENS, 1])?);
    kernels.gate_rows_backward(&x, &logits, 0.5, &d_out, &mut d_x, &mut d_logits);
    Ok(vec![plain, weighed, sum, onto, added, products, gated, gated_onto, d_x, d_logits])
}

/// A gated activation of rows of twice its width, forward and backward.
pub(super) fn paired(inputs: &Inputs<'_>, width: usize, kind: PairedGate) -> Result<Vec<Tensor>> {
    let (whole, half) = ([3, 2 * width], [3, width]);
    let (gate_up, d_out) = (inputs.tensor(1, &whole)?, inputs.tensor(2, &half)?);
    let (mut out, mut d_gate_up) = (inputs.empty(&half)?, inputs.empty(&whole)?);
    let kernels = inputs.device.kernels().experts();
    kernels.gated_pair(kind, &gate_up, &mut out);
    kernels.gated_pair_backward(kind, &gate_up, &d_out, &mut d_gate_up);
    Ok(vec![out, d_gate_up])
}

/// Products of experts \[K, N\] with a second one over `rank`, all ways to store them, and gradients of weights.
pub(super) fn products(inputs: &Inputs<'_>, [k, n, rank]: [usize; 3]) -> Result<Vec<Tensor>> {
    let (kernels, plan) = (inputs.device.kernels().experts(), plan(inputs)?);
    let arithmetic = Arithmetic::of(inputs.dtype);
    let rows = TOKENS * CHOICES;
    let stack = |seed, shape: [usize; 3]| inputs.dense(seed, &shape);
    let (left, second) = (inputs.tensor(1, &[rows, k])?, inputs.tensor(2, &[rows, rank])?);
    let (plain, turned) = (stack(3, [5, k, n])?, stack(4, [5, n, k])?);
    let (second_plain, second_turned) = (stack(5, [5, rank, n])?, stack(6, [5, n, rank])?);
    let bias = inputs.floats(7, &[5, n])?;
    let finish = ExpertFinish { scale: 0.5, bias: Some(&bias), accumulate: false };
    let added = ExpertFinish { accumulate: true, ..ExpertFinish::STORE };
    let mut results = Vec::new();
    for (products, finish) in [
        (vec![(&left, Operand::transposed(&turned))], finish),
        (vec![(&left, Operand::plain(&plain))], added),
        (vec![(&left, Operand::transposed(&turned)), (&second, Operand::transposed(&second_turned))], finish),
        (vec![(&left, Operand::plain(&plain)), (&second, Operand::plain(&second_plain))], added),
        (vec![(&left, Operand::plain(&plain)), (&second, Operand::transposed(&second_turned))], finish),
        (vec![(&left, Operand::transposed(&turned)), (&second, Operand::plain(&second_plain))], added),
    ] {
        let mut out =
            if finish.accumulate { inputs.tensor(8, &[rows, n])? } else { inputs.empty(&[rows, n])? };
        kernels.multiply_experts(&products, &plan, &finish, &mut out, arithmetic)?;
        results.push(out);
    }
    // A trained stack is f32 whatever the activations are.
    let wide = Tensor::from_slice(inputs.device, Category::Workspace, &[5, k, n], &plain.to_f32_vec()?)?;
    let mut out = inputs.empty(&[rows, n])?;
    kernels.multiply_experts(
        &[(&left, Operand::plain(&wide))],
        &plan,
        &ExpertFinish::STORE,
        &mut out,
        arithmetic,
    )?;
    let right = inputs.tensor(9, &[rows, n])?;
    let (mut gradient, mut thin, mut sums) =
        (inputs.floats(10, &[5, k, n])?, inputs.floats(11, &[5, n, rank])?, inputs.floats(12, &[5, n])?);
    kernels.add_expert_gradients(&left, &right, &plan, 0.5, &mut gradient)?;
    kernels.add_expert_gradients(&right, &second, &plan, 1.0, &mut thin)?;
    kernels.add_expert_sums(&right, &plan, &mut sums);
    results.extend([out, gradient, thin, sums]);
    Ok(results)
}
