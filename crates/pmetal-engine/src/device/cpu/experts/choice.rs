//! The choice of experts, its order, and how balanced it is.

use rayon::prelude::*;

use crate::Tensor;
use crate::device::cpu::simd::{Element, exp, multiversion, sigmoid, with_element};
use crate::device::experts::{BalanceSlope, Gate, MOST_CHOICES, MOST_EXPERTS, Router, RoutingPlan};
use crate::error::Result;
use crate::memory::Category;

/// Tokens of a task; also the unit in which balances are summed, so it is fixed.
const TOKENS_A_TASK: usize = 64;

multiversion! {
    /// Logits to scores; those of a softmax are divided by their sum.
    fn score_row<X: Element>(gate: Gate, logits: &[X], scores: &mut [f32]) {
        match gate {
            Gate::Sigmoid => {
                for (score, logit) in scores.iter_mut().zip(logits) {
                    *score = sigmoid(logit.widen());
                }
            }
            Gate::Softmax => {
                let top = logits.iter().fold(f32::NEG_INFINITY, |top, logit| top.max(logit.widen()));
                let mut sum = 0.0;
                for (score, logit) in scores.iter_mut().zip(logits) {
                    *score = exp(logit.widen() - top);
                    sum += *score;
                }
                for score in scores.iter_mut() {
                    *score /= sum;
                }
            }
        }
    }
}

/// The positions of the largest keys, the first of equals first; what is not a number counts as the lowest.
fn choose(keys: &[f32], chosen: &mut [u32]) {
    let mut taken = [0_u64; MOST_EXPERTS / 64];
    let key = |index: usize| if keys[index].is_nan() { f32::NEG_INFINITY } else { keys[index] };
    for place in chosen {
        let mut best: Option<usize> = None;
        for index in 0..keys.len() {
            let is_free = taken[index / 64] >> (index % 64) & 1 == 0;
            if is_free && best.is_none_or(|best| key(index) > key(best)) {
                best = Some(index);
            }
        }
        let best = best.unwrap_or(0);
        taken[best / 64] |= 1 << (best % 64);
        *place = best as u32;
    }
}

/// The sum of the two largest keys of a group.
fn group_score(keys: &[f32]) -> f32 {
    let mut two = [0_u32; 2];
    choose(keys, &mut two);
    keys[two[0] as usize] + keys[two[1] as usize]
}

/// Keys of experts outside of the chosen groups become the lowest.
fn close_groups(keys: &mut [f32], count: usize, chosen: usize) {
    let width = keys.len() / count;
    let scores: Vec<f32> = keys.chunks_exact(width).map(group_score).collect();
    let mut open = vec![0_u32; chosen];
    choose(&scores, &mut open);
    for (group, keys) in keys.chunks_exact_mut(width).enumerate() {
        if !open.contains(&(group as u32)) {
            keys.fill(f32::NEG_INFINITY);
        }
    }
}

/// Chooses one token's experts and weighs them.
fn choose_row<X: Element>(
    logits: &[X],
    router: &Router,
    correction: Option<&[f32]>,
    [scores, keys]: [&mut [f32]; 2],
    weights: &mut [f32],
    chosen: &mut [u32],
) {
    score_row(router.gate, logits, scores);
    if correction.is_none() && router.groups.is_none() {
        keys.iter_mut().zip(logits).for_each(|(key, logit)| *key = logit.widen());
    } else {
        keys.copy_from_slice(scores);
    }
    if let Some(correction) = correction {
        keys.iter_mut().zip(correction).for_each(|(key, value)| *key += value);
    }
    if let Some(groups) = router.groups {
        close_groups(keys, groups.count, groups.chosen);
    }
    choose(keys, chosen);
    for (weight, &expert) in weights.iter_mut().zip(chosen.iter()) {
        *weight = scores[expert as usize];
    }
    let divisor = router.normalise.map_or(1.0, |epsilon| weights.iter().sum::<f32>() + epsilon);
    weights.iter_mut().for_each(|weight| *weight = *weight / divisor * router.scale);
}

pub(super) fn forward(
    logits: &Tensor,
    router: &Router,
    correction: Option<&[f32]>,
    weights: &mut Tensor,
    chosen: &mut Tensor,
) {
    let (experts, choices) = (logits.columns(), router.choices);
    with_element!(logits.dtype(), X => {
        weights.as_mut_slice::<f32>()
            .par_chunks_mut(choices * TOKENS_A_TASK)
            .zip(chosen.as_mut_slice::<u32>().par_chunks_mut(choices * TOKENS_A_TASK))
            .zip(logits.as_slice::<X>().par_chunks(experts * TOKENS_A_TASK))
            .for_each(|((weights, chosen), logits)| {
                let (mut scores, mut keys) = (vec![0.0; experts], vec![0.0; experts]);
                let tokens = weights.chunks_exact_mut(choices).zip(chosen.chunks_exact_mut(choices));
                for ((weights, chosen), logits) in tokens.zip(logits.chunks_exact(experts)) {
                    choose_row(logits, router, correction, [&mut scores, &mut keys], weights, chosen);
                }
            });
    });
}

/// The gradients of the chosen scores.
fn score_slopes(router: &Router, scores: &[f32], chosen: &[u32], d_weights: &[f32], slopes: &mut [f32]) {
    let score = |expert: &u32| scores[*expert as usize];
    let (divisor, mean) = match router.normalise {
        None => (1.0, 0.0),
        Some(epsilon) => {
            let divisor = chosen.iter().map(score).sum::<f32>() + epsilon;
            let product: f32 = chosen.iter().zip(d_weights).map(|(expert, d)| score(expert) * d).sum();
            (divisor, product / divisor)
        }
    };
    for (slope, d) in slopes.iter_mut().zip(d_weights) {
        *slope = router.scale * (d - mean) / divisor;
    }
}

/// What one token's backward pass reads besides its logits.
struct TokenSlopes<'a> {
    chosen: &'a [u32],
    d_weights: Option<&'a [f32]>,
    /// Slopes of all probabilities, and the token's factor on them.
    balance: Option<(&'a [f32], f32)>,
}

fn backward_row<X: Element>(
    logits: &[X],
    router: &Router,
    token: &TokenSlopes<'_>,
    [scores, slopes]: [&mut [f32]; 2],
    d_logits: &mut [X],
) {
    score_row(router.gate, logits, scores);
    match token.balance {
        Some((of_all, factor)) => slopes.iter_mut().zip(of_all).for_each(|(d, all)| *d = all * factor),
        None => slopes.fill(0.0),
    }
    if let Some(d_weights) = token.d_weights {
        let mut own = [0.0; MOST_CHOICES];
        score_slopes(router, scores, token.chosen, d_weights, &mut own[..token.chosen.len()]);
        token.chosen.iter().zip(own).for_each(|(&expert, slope)| slopes[expert as usize] += slope);
    }
    let mean: f32 = match router.gate {
        Gate::Softmax => scores.iter().zip(slopes.iter()).map(|(score, slope)| score * slope).sum(),
        Gate::Sigmoid => 0.0,
    };
    for ((d, &score), &slope) in d_logits.iter_mut().zip(scores.iter()).zip(slopes.iter()) {
        *d = X::narrow(match router.gate {
            Gate::Softmax => score * (slope - mean),
            Gate::Sigmoid => slope * score * (1.0 - score),
        });
    }
}

pub(super) fn backward(
    logits: &Tensor,
    router: &Router,
    chosen: &Tensor,
    d_weights: Option<&Tensor>,
    balance: Option<BalanceSlope<'_>>,
    d_logits: &mut Tensor,
) {
    let (experts, choices) = (logits.columns(), router.choices);
    let of_all = balance.map(|balance| {
        balance_slopes(balance.sums.as_slice::<f32>(), experts, balance.factor.as_slice::<f32>()[0])
    });
    let mask = balance.and_then(|balance| balance.mask).map(Tensor::as_slice::<f32>);
    let (chosen, d_weights) = (chosen.as_slice::<u32>(), d_weights.map(Tensor::as_slice::<f32>));
    with_element!(logits.dtype(), X => {
        let logits = logits.as_slice::<X>();
        d_logits.as_mut_slice::<X>().par_chunks_mut(experts * TOKENS_A_TASK).enumerate().for_each(|(task, rows)| {
            let (mut scores, mut slopes) = (vec![0.0; experts], vec![0.0; experts]);
            for (index, d_logits) in rows.chunks_exact_mut(experts).enumerate() {
                let token = task * TOKENS_A_TASK + index;
                let own = TokenSlopes {
                    chosen: &chosen[token * choices..][..choices],
                    d_weights: d_weights.map(|all| &all[token * choices..][..choices]),
                    balance: of_all.as_deref().map(|all| (all, mask.map_or(1.0, |mask| mask[token]))),
                };
                let logits = &logits[token * experts..][..experts];
                backward_row(logits, router, &own, [&mut scores, &mut slopes], d_logits);
            }
        });
    });
}

/// Gradients of the probabilities of a token that counts once.
fn balance_slopes(sums: &[f32], experts: usize, factor: f32) -> Vec<f32> {
    let tokens = sums[2 * experts];
    let each = factor * experts as f32 / (tokens * tokens);
    sums[experts..2 * experts].iter().map(|times| if tokens > 0.0 { times * each } else { 0.0 }).collect()
}

pub(super) fn balance_loss(sums: &[f32], loss: &mut Tensor) {
    let experts = sums.len() / 2;
    let tokens = sums[2 * experts];
    let (shares, times) = sums[..2 * experts].split_at(experts);
    let products: f32 =
        shares.iter().zip(times).map(|(share, times)| share / tokens * (times / tokens)).sum();
    loss.as_mut_slice::<f32>()[0] = if tokens > 0.0 { experts as f32 * products } else { 0.0 };
}

pub(super) fn add_balance(logits: &Tensor, chosen: &Tensor, mask: Option<&Tensor>, sums: &mut Tensor) {
    let (experts, choices) = (logits.columns(), chosen.columns());
    let (chosen, mask) = (chosen.as_slice::<u32>(), mask.map(Tensor::as_slice::<f32>));
    let partial: Vec<Vec<f32>> = with_element!(logits.dtype(), X => {
        let tasks = logits.as_slice::<X>().par_chunks(experts * TOKENS_A_TASK).enumerate();
        tasks.map(|(task, rows)| {
            let (mut own, mut scores) = (vec![0.0; 2 * experts + 1], vec![0.0; experts]);
            for (index, logits) in rows.chunks_exact(experts).enumerate() {
                let token = task * TOKENS_A_TASK + index;
                let factor = mask.map_or(1.0, |mask| mask[token]);
                score_row(Gate::Softmax, logits, &mut scores);
                own.iter_mut().zip(&scores).for_each(|(sum, score)| *sum += factor * score);
                for &expert in &chosen[token * choices..][..choices] {
                    own[experts + expert as usize] += factor;
                }
                own[2 * experts] += factor;
            }
            own
        }).collect()
    });
    let sums = sums.as_mut_slice::<f32>();
    for own in partial {
        sums.iter_mut().zip(own).for_each(|(sum, value)| *sum += value);
    }
}

/// A counting sort, which keeps the order of an expert's tokens.
pub(super) fn plan(chosen: Tensor, experts: usize) -> Result<RoutingPlan> {
    let pairs = chosen.as_slice::<u32>();
    let mut next = vec![0_u32; experts + 1];
    for &expert in pairs {
        next[expert as usize + 1] += 1;
    }
    for expert in 0..experts {
        next[expert + 1] += next[expert];
    }
    let offsets = next.clone();
    let (mut order, mut places) = (vec![0_u32; pairs.len()], vec![0_u32; pairs.len()]);
    for (pair, &expert) in pairs.iter().enumerate() {
        let row = &mut next[expert as usize];
        places[pair] = *row;
        order[*row as usize] = pair as u32;
        *row += 1;
    }
    let device = chosen.device().clone();
    let place = |values: &[u32]| Tensor::from_slice(&device, Category::Activations, &[values.len()], values);
    Ok(RoutingPlan {
        experts,
        order: place(&order)?,
        places: place(&places)?,
        offsets: place(&offsets)?,
        tiles: None,
        chosen,
    })
}
