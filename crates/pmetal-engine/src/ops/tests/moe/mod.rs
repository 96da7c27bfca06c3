//! Mixtures of experts against what they mean in f64.

mod golden;
mod layers;
mod routing;
mod rows;

use super::*;
use crate::ops::{Gate, Groups, Router, Routing};

/// The balance of no layer yet, whose gradient is that number.
pub(super) fn balance_by(
    device: &Device,
    experts: usize,
    mask: Option<Tensor>,
    factor: f64,
) -> crate::ops::Balance {
    let factor = tensor(device, DType::F32, &[1], &[factor]);
    crate::ops::Balance::new(device, experts, mask, factor).unwrap()
}

/// A softmax over all experts, as it is.
pub(super) const PLAIN: Router =
    Router { gate: Gate::Softmax, choices: 2, normalise: None, groups: None, scale: 1.0 };

/// Scores of one token.
pub(super) fn scores(gate: Gate, logits: &[f64]) -> Vec<f64> {
    match gate {
        Gate::Sigmoid => logits.iter().map(|logit| 1.0 / (1.0 + (-logit).exp())).collect(),
        Gate::Softmax => {
            let sum: f64 = logits.iter().map(|logit| logit.exp()).sum();
            logits.iter().map(|logit| logit.exp() / sum).collect()
        }
    }
}

/// Indices by value, the largest first and the first of equals first.
fn ranked(values: &[f64]) -> Vec<usize> {
    let mut indices: Vec<usize> = (0..values.len()).collect();
    indices.sort_by(|&a, &b| values[b].partial_cmp(&values[a]).unwrap().then(a.cmp(&b)));
    indices
}

/// The experts of each token.
pub(super) fn chosen(logits: &[f64], experts: usize, router: &Router, correction: &[f64]) -> Vec<u32> {
    let choose = |logits: &[f64]| {
        let mut keys = scores(router.gate, logits);
        keys.iter_mut().zip(correction).for_each(|(key, value)| *key += value);
        if let Some(Groups { count, chosen }) = router.groups {
            let width = experts / count;
            let of_groups: Vec<f64> = keys
                .chunks(width)
                .map(|keys| ranked(keys)[..2].iter().map(|&index| keys[index]).sum())
                .collect();
            let open = ranked(&of_groups)[..chosen].to_vec();
            for (index, key) in keys.iter_mut().enumerate() {
                if !open.contains(&(index / width)) {
                    *key = f64::NEG_INFINITY;
                }
            }
        }
        ranked(&keys)[..router.choices].to_vec()
    };
    logits.chunks(experts).flat_map(choose).map(|expert| expert as u32).collect()
}

/// What choices weigh.
pub(super) fn weights(logits: &[f64], experts: usize, router: &Router, chosen: &[u32]) -> Vec<f64> {
    let tokens = logits.chunks(experts).zip(chosen.chunks(router.choices));
    tokens
        .flat_map(|(logits, chosen)| {
            let scores = scores(router.gate, logits);
            let own: Vec<f64> = chosen.iter().map(|&expert| scores[expert as usize]).collect();
            let divisor =
                router.normalise.map_or(1.0, |epsilon| own.iter().sum::<f64>() + f64::from(epsilon));
            own.into_iter().map(move |score| score / divisor * f64::from(router.scale)).collect::<Vec<_>>()
        })
        .collect()
}

/// The pair of each row: by expert, and within an expert by token.
pub(super) fn order(chosen: &[u32]) -> Vec<usize> {
    let mut pairs: Vec<usize> = (0..chosen.len()).collect();
    pairs.sort_by_key(|&pair| chosen[pair]);
    pairs
}

/// A routing by a softmax of these logits, f32, whose weights want a gradient if `wanted`.
pub(super) fn routed(
    device: &Device,
    tape: &Tape,
    logits: &[f64],
    experts: usize,
    choices: usize,
    wanted: bool,
) -> (Var, Routing) {
    let shape = [logits.len() / experts, experts];
    let leaf = input(tape, wanted, tensor(device, DType::F32, &shape, logits));
    let router = Router { choices, ..PLAIN };
    let routing = crate::ops::route(tape, &leaf, &router, None, None).unwrap();
    (leaf, routing)
}

/// Logits of some load: by chance, all tokens to the same experts, or none to the first half.
pub(super) fn loads(name: &str, tokens: usize, experts: usize) -> Vec<f64> {
    let mut logits = numbers(name, tokens * experts, DType::F32);
    for (index, logit) in logits.iter_mut().enumerate() {
        let expert = index % experts;
        *logit += match name {
            "same" => 3.0 * (expert % 5) as f64 - 0.1 * expert as f64,
            "late" if expert < experts / 2 => -9.0,
            _ => 0.0,
        };
    }
    logits
}
