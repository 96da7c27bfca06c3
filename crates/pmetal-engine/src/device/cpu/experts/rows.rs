//! Rows between tokens and experts, and what is done to each row on its own.

use rayon::prelude::*;

use crate::Tensor;
use crate::device::cpu::activations::{Activation, Gelu, GeluTanh, Sigmoid, Silu};
use crate::device::cpu::simd::{Element, lane_sum, multiversion, sigmoid, with_element};
use crate::device::experts::{PairedGate, RoutingPlan};
use crate::device::{GateActivation, Held};

/// Rows of a task at least.
const ROWS_A_TASK: usize = 8;

multiversion! {
    fn scale_row<X: Element>(source: &[X], factor: f32, target: &mut [X]) {
        for (value, &other) in target.iter_mut().zip(source) {
            *value = X::narrow(other.widen() * factor);
        }
    }
}

multiversion! {
    fn add_scaled<X: Element>(sums: &mut [f32], source: &[X], factor: f32) {
        for (sum, &other) in sums.iter_mut().zip(source) {
            *sum = other.widen().mul_add(factor, *sum);
        }
    }
}

multiversion! {
    fn finish_row<X: Element>(sums: &[f32], held: Option<&[X]>, target: &mut [X]) {
        match held {
            Some(held) => {
                for ((value, &sum), &held) in target.iter_mut().zip(sums).zip(held) {
                    *value = X::narrow(held.widen() + sum);
                }
            }
            None => {
                for (value, &sum) in target.iter_mut().zip(sums) {
                    *value = X::narrow(sum);
                }
            }
        }
    }
}

multiversion! {
    fn dot_rows<X: Element>(left: &[X], right: &[X]) -> f32 {
        lane_sum((left, right, right), |x, y, _, sum| x.widen().mul_add(y.widen(), sum))
    }
}

pub(super) fn spread(x: &Tensor, plan: &RoutingPlan, weights: Option<&Tensor>, scale: f32, out: &mut Tensor) {
    let (width, choices) = (x.columns(), plan.choices());
    let order = plan.order.as_slice::<u32>();
    let weights = weights.map(Tensor::as_slice::<f32>);
    with_element!(x.dtype(), X => {
        let source = x.as_slice::<X>();
        out.as_mut_slice::<X>().par_chunks_exact_mut(width).zip(order).with_min_len(ROWS_A_TASK).for_each(
            |(row, &pair)| {
                let from = &source[pair as usize / choices * width..][..width];
                match weights {
                    Some(weights) => scale_row(from, scale * weights[pair as usize], row),
                    None if scale == 1.0 => row.copy_from_slice(from),
                    None => scale_row(from, scale, row),
                }
            },
        );
    });
}

pub(super) fn collect(
    y: &Tensor,
    plan: &RoutingPlan,
    weights: Option<&Tensor>,
    scale: f32,
    held: Held<'_>,
    out: &mut Tensor,
) {
    let (width, choices) = (y.columns(), plan.choices());
    let places = plan.places.as_slice::<u32>();
    let weights = weights.map(Tensor::as_slice::<f32>);
    with_element!(y.dtype(), X => {
        let source = y.as_slice::<X>();
        let (other, is_own) = match held {
            Held::Other(other) => (Some(other.as_slice::<X>()), false),
            Held::Itself => (None, true),
            Held::Nothing => (None, false),
        };
        let rows = out.as_mut_slice::<X>().par_chunks_exact_mut(width).enumerate().with_min_len(ROWS_A_TASK);
        rows.for_each_init(|| (vec![0.0_f32; width], Vec::new()), |(sums, own), (token, row)| {
            sums.fill(0.0);
            for pair in token * choices..(token + 1) * choices {
                let factor = scale * weights.map_or(1.0, |weights| weights[pair]);
                add_scaled(sums, &source[places[pair] as usize * width..][..width], factor);
            }
            if is_own {
                own.clear();
                own.extend_from_slice(row);
            }
            let held = if is_own { Some(own.as_slice()) } else { other.map(|all| &all[token * width..][..width]) };
            finish_row(sums, held, row);
        });
    });
}

pub(super) fn pair_products(
    tokens: &Tensor,
    rows: &Tensor,
    plan: &RoutingPlan,
    scale: f32,
    out: &mut Tensor,
) {
    let (width, choices) = (tokens.columns(), plan.choices());
    let places = plan.places.as_slice::<u32>();
    with_element!(tokens.dtype(), X => {
        let (left, right) = (tokens.as_slice::<X>(), rows.as_slice::<X>());
        let pairs = out.as_mut_slice::<f32>().par_iter_mut().zip(places).enumerate().with_min_len(ROWS_A_TASK);
        pairs.for_each(|(pair, (value, &row))| {
            let left = &left[pair / choices * width..][..width];
            *value = scale * dot_rows(left, &right[row as usize * width..][..width]);
        });
    });
}

pub(super) fn gate(y: &Tensor, logits: &Tensor, scale: f32, residual: Option<&Tensor>, out: &mut Tensor) {
    let width = y.columns();
    with_element!(y.dtype(), X => with_element!(logits.dtype(), L => {
        let (source, logits) = (y.as_slice::<X>(), logits.as_slice::<L>());
        let residual = residual.map(Tensor::as_slice::<X>);
        let rows = out.as_mut_slice::<X>().par_chunks_exact_mut(width).enumerate().with_min_len(ROWS_A_TASK);
        rows.for_each_init(|| vec![0.0_f32; width], |sums, (token, row)| {
            sums.fill(0.0);
            add_scaled(sums, &source[token * width..][..width], scale * sigmoid(logits[token].widen()));
            finish_row(sums, residual.map(|all| &all[token * width..][..width]), row);
        });
    }));
}

pub(super) fn gate_backward(
    y: &Tensor,
    logits: &Tensor,
    scale: f32,
    d_out: &Tensor,
    d_y: &mut Tensor,
    d_logits: &mut Tensor,
) {
    let width = y.columns();
    with_element!(y.dtype(), X => with_element!(logits.dtype(), L => {
        let (source, slopes, logits) = (y.as_slice::<X>(), d_out.as_slice::<X>(), logits.as_slice::<L>());
        d_y.as_mut_slice::<X>()
            .par_chunks_exact_mut(width)
            .zip(d_logits.as_mut_slice::<L>())
            .enumerate()
            .with_min_len(ROWS_A_TASK)
            .for_each(|(token, (d_y, d_logit))| {
                let share = sigmoid(logits[token].widen());
                let slope = &slopes[token * width..][..width];
                scale_row(slope, scale * share, d_y);
                let product = dot_rows(slope, &source[token * width..][..width]);
                *d_logit = L::narrow(scale * share * (1.0 - share) * product);
            });
    }));
}

/// Value of a gated activation and its slopes to gate and up.
#[inline(always)]
fn pair(kind: PairedGate, gate: f32, up: f32) -> (f32, f32, f32) {
    match kind {
        PairedGate::Halves(activation) => {
            let (value, derivative) = match activation {
                GateActivation::Silu => Silu::at(gate),
                GateActivation::Gelu => Gelu::at(gate),
                GateActivation::GeluTanh => GeluTanh::at(gate),
                GateActivation::Sigmoid => Sigmoid::at(gate),
            };
            (value * up, up * derivative, value)
        }
        PairedGate::Clamped { slope, limit } => {
            let (bounded, shifted) = (gate.min(limit), up.clamp(-limit, limit) + 1.0);
            let share = sigmoid(slope * bounded);
            let active = bounded * share;
            let d_gate = shifted * share * (slope * bounded).mul_add(1.0 - share, 1.0);
            let (gate_passes, up_passes) = (gate <= limit, up.abs() <= limit);
            (active * shifted, if gate_passes { d_gate } else { 0.0 }, if up_passes { active } else { 0.0 })
        }
    }
}

/// Distance between neighbouring gates, and from a gate to its up.
#[inline(always)]
fn strides(kind: PairedGate, width: usize) -> (usize, usize) {
    match kind {
        PairedGate::Halves(_) => (1, width),
        PairedGate::Clamped { .. } => (2, 1),
    }
}

multiversion! {
    fn pair_row<X: Element>(kind: PairedGate, gate_up: &[X], out: &mut [X]) {
        let (step, up) = strides(kind, out.len());
        for (i, value) in out.iter_mut().enumerate() {
            *value = X::narrow(pair(kind, gate_up[i * step].widen(), gate_up[i * step + up].widen()).0);
        }
    }
}

multiversion! {
    fn pair_backward_row<X: Element>(kind: PairedGate, gate_up: &[X], d_out: &[X], d_gate_up: &mut [X]) {
        let (step, up) = strides(kind, d_out.len());
        for (i, d) in d_out.iter().enumerate() {
            let (_, d_gate, d_up) = pair(kind, gate_up[i * step].widen(), gate_up[i * step + up].widen());
            d_gate_up[i * step] = X::narrow(d.widen() * d_gate);
            d_gate_up[i * step + up] = X::narrow(d.widen() * d_up);
        }
    }
}

pub(super) fn gated_pair(kind: PairedGate, gate_up: &Tensor, out: &mut Tensor) {
    let width = out.columns();
    with_element!(gate_up.dtype(), X => {
        out.as_mut_slice::<X>()
            .par_chunks_exact_mut(width)
            .zip(gate_up.as_slice::<X>().par_chunks_exact(2 * width))
            .with_min_len(ROWS_A_TASK)
            .for_each(|(out, gate_up)| pair_row(kind, gate_up, out));
    });
}

pub(super) fn gated_pair_backward(
    kind: PairedGate,
    gate_up: &Tensor,
    d_out: &Tensor,
    d_gate_up: &mut Tensor,
) {
    let width = d_out.columns();
    with_element!(gate_up.dtype(), X => {
        d_gate_up.as_mut_slice::<X>()
            .par_chunks_exact_mut(2 * width)
            .zip(gate_up.as_slice::<X>().par_chunks_exact(2 * width))
            .zip(d_out.as_slice::<X>().par_chunks_exact(width))
            .with_min_len(ROWS_A_TASK)
            .for_each(|((d_gate_up, gate_up), d_out)| pair_backward_row(kind, gate_up, d_out, d_gate_up));
    });
}
