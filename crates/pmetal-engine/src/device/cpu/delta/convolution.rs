//! Causal depthwise convolution over time, followed by SiLU.

use std::ops::Range;

use rayon::prelude::*;

use crate::device::Documents;
use crate::device::cpu::simd::{Element, multiversion, sigmoid, with_element};
use crate::tensor::Tensor;

/// Tokens that one task takes; also the unit in which weight gradients are summed, so it is fixed.
const TOKENS_A_TASK: usize = 64;

multiversion! {
    fn add_tap<X: Element>(sums: &mut [f32], x: &[X], factors: &[f32]) {
        for ((sum, &x), &factor) in sums.iter_mut().zip(x).zip(factors) {
            *sum = x.widen().mul_add(factor, *sum);
        }
    }
}

multiversion! {
    fn activate<X: Element>(sums: &[f32], out: &mut [X]) {
        for (out, &sum) in out.iter_mut().zip(sums) {
            *out = X::narrow(sum * sigmoid(sum));
        }
    }
}

multiversion! {
    /// Turns sums of taps into their gradients.
    fn activate_back<X: Element>(sums: &mut [f32], d_out: &[X]) {
        for (sum, &slope) in sums.iter_mut().zip(d_out) {
            let share = sigmoid(*sum);
            *sum = slope.widen() * share * (1.0 - share).mul_add(*sum, 1.0);
        }
    }
}

multiversion! {
    fn store<X: Element>(sums: &[f32], out: &mut [X]) {
        for (out, &sum) in out.iter_mut().zip(sums) {
            *out = X::narrow(sum);
        }
    }
}

/// What the rows of one run are convolved with.
struct Taps<'a, X> {
    x: &'a [X],
    /// [K - 1, C]: what came before the first token.
    state: &'a [X],
    /// [K, C].
    factors: Vec<f32>,
    channels: usize,
    taps: usize,
    documents: &'a [Range<usize>],
}

impl<'a, X: Element> Taps<'a, X> {
    fn new(x: &'a [X], state: &'a [X], weight: &Tensor, documents: &'a Documents) -> Self {
        let (channels, taps) = (weight.rows(), weight.columns());
        let given = weight.as_slice::<f32>();
        let factors =
            (0..taps * channels).map(|index| given[index % channels * taps + index / channels]).collect();
        Self { x, state, factors, channels, taps, documents: &documents.ranges }
    }

    fn document(&self, token: usize) -> Option<&Range<usize>> {
        let index = self.documents.partition_point(|range| range.end <= token);
        self.documents.get(index).filter(|range| range.contains(&token))
    }

    fn factors(&self, tap: usize) -> &[f32] {
        &self.factors[tap * self.channels..][..self.channels]
    }

    /// The row that a tap of a token of a document that begins at `start` reads; the last tap is the token itself.
    fn row(&self, start: usize, token: usize, tap: usize) -> Option<&'a [X]> {
        let row = token + tap + 1;
        match row.checked_sub(self.taps) {
            Some(row) if row >= start => Some(&self.x[row * self.channels..][..self.channels]),
            None if start == 0 && !self.state.is_empty() => {
                Some(&self.state[(row - 1) * self.channels..][..self.channels])
            }
            _ => None,
        }
    }

    /// The sums of a token's taps.
    fn sum(&self, start: usize, token: usize, sums: &mut [f32]) {
        sums.fill(0.0);
        for tap in 0..self.taps {
            if let Some(row) = self.row(start, token, tap) {
                add_tap(sums, row, self.factors(tap));
            }
        }
    }
}

pub(super) fn forward(
    x: &Tensor,
    weight: &Tensor,
    documents: &Documents,
    state: Option<&Tensor>,
    out: &mut Tensor,
) {
    if x.elements() == 0 {
        return;
    }
    with_element!(x.dtype(), X => {
        let taps = Taps::<X>::new(x.as_slice(), state.map_or(&[], Tensor::as_slice), weight, documents);
        let rows = out.as_mut_slice::<X>().par_chunks_exact_mut(taps.channels).enumerate();
        rows.with_min_len(8).for_each_init(
            || vec![0.0; taps.channels],
            |sums, (token, out)| match taps.document(token) {
                Some(document) => {
                    taps.sum(document.start, token, sums);
                    activate(sums, out);
                }
                None => out.fill(X::narrow(0.0)),
            },
        );
    });
}

pub(super) fn move_state(x: &Tensor, documents: &Documents, state: &mut Tensor) {
    let (channels, held) = (state.columns(), state.shape()[0]);
    let tokens = documents.ranges.last().map_or(0, |range| range.end);
    with_element!(x.dtype(), X => {
        let (rows, state) = (&x.as_slice::<X>()[..tokens * channels], state.as_mut_slice::<X>());
        let kept = held.saturating_sub(tokens);
        state.copy_within((held - kept) * channels.., 0);
        let fresh = (held - kept) * channels;
        state[kept * channels..].copy_from_slice(&rows[rows.len() - fresh..]);
    });
}

/// The gradients of sums of taps of tokens `tokens`, zeros for padding.
fn slopes_of<X: Element>(taps: &Taps<'_, X>, d_out: &[X], tokens: Range<usize>) -> Vec<f32> {
    let mut slopes = vec![0.0; tokens.len() * taps.channels];
    for (token, sums) in tokens.zip(slopes.chunks_exact_mut(taps.channels)) {
        if let Some(document) = taps.document(token) {
            taps.sum(document.start, token, sums);
            activate_back(sums, &d_out[token * taps.channels..][..taps.channels]);
        }
    }
    slopes
}

pub(super) fn backward(
    x: &Tensor,
    weight: &Tensor,
    documents: &Documents,
    d_out: &Tensor,
    d_x: &mut Tensor,
    d_weight: Option<&mut Tensor>,
) {
    let tokens = documents.tokens;
    if x.elements() == 0 {
        return;
    }
    with_element!(x.dtype(), X => {
        let taps = Taps::<X>::new(x.as_slice(), &[], weight, documents);
        let (channels, d_out, trains) = (taps.channels, d_out.as_slice::<X>(), d_weight.is_some());
        let tasks = d_x.as_mut_slice::<X>().par_chunks_mut(TOKENS_A_TASK * channels).enumerate();
        let partial: Vec<Vec<f32>> = tasks
            .map(|(task, d_x)| {
                let first = task * TOKENS_A_TASK;
                let (last, own) = ((first + TOKENS_A_TASK + taps.taps - 1).min(tokens), d_x.len() / channels);
                let slopes = slopes_of(&taps, d_out, first..last);
                let slope = |token: usize| &slopes[(token - first) * channels..][..channels];
                let mut sums = vec![0.0; channels];
                let mut d_factors = vec![0.0; if trains { taps.taps * channels } else { 0 }];
                for (token, d_x) in (first..first + own).zip(d_x.chunks_exact_mut(channels)) {
                    sums.fill(0.0);
                    if let Some(document) = taps.document(token) {
                        for tap in (0..taps.taps).rev() {
                            // The token that reads this one by this tap.
                            let reader = token + taps.taps - 1 - tap;
                            if reader < document.end {
                                add_tap(&mut sums, slope(reader), taps.factors(tap));
                            }
                        }
                        for (tap, d_factors) in d_factors.chunks_exact_mut(channels).enumerate() {
                            if let Some(row) = taps.row(document.start, token, tap) {
                                add_tap(d_factors, row, slope(token));
                            }
                        }
                    }
                    store(&sums, d_x);
                }
                d_factors
            })
            .collect();
        if let Some(d_weight) = d_weight {
            let d_weight = d_weight.as_mut_slice::<f32>();
            for (index, &sum) in partial.iter().flat_map(|sums| sums.iter().enumerate()) {
                d_weight[index % channels * taps.taps + index / channels] += sum;
            }
        }
    });
}
