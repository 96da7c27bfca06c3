//! Kernels that treat each element, pair or row on its own.

use rayon::prelude::*;

use super::activations::{Activation, Gelu, GeluTanh, Sigmoid, Silu};
use super::simd::{Element, multiversion, tanh, with_element};
use crate::device::{GateActivation, RopePairing, RopeRows};
use crate::random::{RandomKey, WIDE};
use crate::tensor::Tensor;

/// Elements that one task takes.
const TASK: usize = 1 << 14;

pub(super) fn embedding(ids: &Tensor, table: &Tensor, scale: f32, out: &mut Tensor) {
    let width = table.columns();
    with_element!(out.dtype(), X => with_element!(table.dtype(), W => {
        let table = table.as_slice::<W>();
        out.as_mut_slice::<X>().par_chunks_mut(width).zip(ids.as_slice::<u32>()).for_each(|(row, &id)| {
            convert_row(&table[id as usize * width..][..width], scale, row);
        });
    }));
}

multiversion! {
    fn convert_row<W: Element, X: Element>(source: &[W], scale: f32, target: &mut [X]) {
        for (value, &other) in target.iter_mut().zip(source) {
            *value = X::narrow(other.widen() * scale);
        }
    }
}

multiversion! {
    fn add_row<X: Element, Y: Element>(target: &mut [X], source: &[Y], scale: f32) {
        for (value, &addend) in target.iter_mut().zip(source) {
            *value = X::narrow(value.widen() + addend.widen() * scale);
        }
    }
}

pub(super) fn embedding_backward(
    ids: &Tensor,
    d_out: &Tensor,
    scale: f32,
    skipped: Option<u32>,
    d_table: &mut Tensor,
) {
    let (vocabulary, width) = (d_table.rows(), d_table.columns());
    // Every task owns a range of the table and adds its rows in the order of tokens, so that repeated ids are
    // summed the same way for any number of threads. Ids cluster near zero: hence more tasks than threads.
    let owned = vocabulary.div_ceil(8 * rayon::current_num_threads()).max(1);
    let ids = ids.as_slice::<u32>();
    with_element!(d_out.dtype(), X => {
        let slopes = d_out.as_slice::<X>();
        d_table.as_mut_slice::<f32>().par_chunks_mut(owned * width).enumerate().for_each(|(task, rows)| {
            let range = task * owned..(task + 1) * owned;
            for (token, &id) in ids.iter().enumerate().filter(|(_, id)| range.contains(&(**id as usize)) && skipped != Some(**id)) {
                let row = &mut rows[(id as usize - range.start) * width..][..width];
                add_row(row, &slopes[token * width..][..width], scale);
            }
        });
    });
}

multiversion! {
    fn rotate_halves<X: Element>(head: &mut [X], cosines: &[f32], sines: &[f32], direction: f32) {
        // Equal lengths, which the compiler sees, make the loop free of bounds checks and thus vectors.
        let half = cosines.len();
        let (first, rest) = head.split_at_mut(half);
        let (rest, sines) = (&mut rest[..half], &sines[..half]);
        for i in 0..half {
            let (a, b) = (first[i].widen(), rest[i].widen());
            let (cosine, sine) = (cosines[i], sines[i] * direction);
            first[i] = X::narrow(a * cosine - b * sine);
            rest[i] = X::narrow(b * cosine + a * sine);
        }
    }
}

multiversion! {
    fn rotate_neighbours<X: Element>(head: &mut [X], cosines: &[f32], sines: &[f32], direction: f32) {
        for (pair, (&cosine, &sine)) in head.chunks_exact_mut(2).zip(cosines.iter().zip(sines)) {
            let (a, b) = (pair[0].widen(), pair[1].widen());
            let sine = sine * direction;
            pair[0] = X::narrow(a * cosine - b * sine);
            pair[1] = X::narrow(b * cosine + a * sine);
        }
    }
}

pub(super) fn rope(x: &mut Tensor, angles: &RopeRows<'_>, inverse: bool) {
    let (head_width, half) = (x.columns(), angles.cosines.columns());
    if half == 0 || x.elements() == 0 {
        return;
    }
    let token_width = x.elements() / x.shape()[0];
    let direction = if inverse { -1.0 } else { 1.0 };
    let (cosines, sines) = (angles.cosines.as_slice::<f32>(), angles.sines.as_slice::<f32>());
    let rows = angles.rows.as_slice::<u32>();
    with_element!(x.dtype(), X => {
        x.as_mut_slice::<X>().par_chunks_mut(token_width).zip(rows).for_each(|(token, &row)| {
            let start = row as usize * half;
            let (cosines, sines) = (&cosines[start..start + half], &sines[start..start + half]);
            for head in token.chunks_exact_mut(head_width) {
                match angles.pairing {
                    RopePairing::Halves => rotate_halves(head, cosines, sines, direction),
                    RopePairing::Neighbours => rotate_neighbours(head, cosines, sines, direction),
                }
            }
        });
    });
}

multiversion! {
    fn gated_task<X: Element, A: Activation>(gate: &[X], up: &[X], out: &mut [X]) {
        for ((value, &gate), &up) in out.iter_mut().zip(gate).zip(up) {
            *value = X::narrow(A::at(gate.widen()).0 * up.widen());
        }
    }
}

pub(super) fn gated(activation: GateActivation, gate: &Tensor, up: &Tensor, out: &mut Tensor) {
    with_element!(gate.dtype(), X => {
        out.as_mut_slice::<X>()
            .par_chunks_mut(TASK)
            .zip(gate.as_slice::<X>().par_chunks(TASK).zip(up.as_slice::<X>().par_chunks(TASK)))
            .for_each(|(out, (gate, up))| match activation {
                GateActivation::Silu => gated_task::<X, Silu>(gate, up, out),
                GateActivation::Gelu => gated_task::<X, Gelu>(gate, up, out),
                GateActivation::GeluTanh => gated_task::<X, GeluTanh>(gate, up, out),
                GateActivation::Sigmoid => gated_task::<X, Sigmoid>(gate, up, out),
            });
    });
}

multiversion! {
    fn gated_backward_task<X: Element, A: Activation>(
        gate: &[X],
        up: &[X],
        d_out: &[X],
        d_gate: &mut [X],
        d_up: &mut [X],
    ) {
        let count = gate.len();
        let (up, d_out) = (&up[..count], &d_out[..count]);
        let (d_gate, d_up) = (&mut d_gate[..count], &mut d_up[..count]);
        for i in 0..count {
            let (value, derivative) = A::at(gate[i].widen());
            let slope = d_out[i].widen();
            d_up[i] = X::narrow(slope * value);
            d_gate[i] = X::narrow(slope * up[i].widen() * derivative);
        }
    }
}

pub(super) fn gated_backward(
    activation: GateActivation,
    gate: &Tensor,
    up: &Tensor,
    d_out: &Tensor,
    d_gate: &mut Tensor,
    d_up: &mut Tensor,
) {
    with_element!(gate.dtype(), X => {
        let inputs = gate.as_slice::<X>().par_chunks(TASK).zip(up.as_slice::<X>().par_chunks(TASK));
        d_gate.as_mut_slice::<X>()
            .par_chunks_mut(TASK)
            .zip(d_up.as_mut_slice::<X>().par_chunks_mut(TASK))
            .zip(inputs.zip(d_out.as_slice::<X>().par_chunks(TASK)))
            .for_each(|((d_gate, d_up), ((gate, up), d_out))| match activation {
                GateActivation::Silu => gated_backward_task::<X, Silu>(gate, up, d_out, d_gate, d_up),
                GateActivation::Gelu => gated_backward_task::<X, Gelu>(gate, up, d_out, d_gate, d_up),
                GateActivation::GeluTanh => gated_backward_task::<X, GeluTanh>(gate, up, d_out, d_gate, d_up),
                GateActivation::Sigmoid => gated_backward_task::<X, Sigmoid>(gate, up, d_out, d_gate, d_up),
            });
    });
}

pub(super) fn scale(x: &mut Tensor, factor: f32) {
    x.as_mut_slice::<f32>().par_iter_mut().with_min_len(TASK).for_each(|value| *value *= factor);
}

/// Columns whose sums one task keeps.
const COLUMNS_A_TASK: usize = 64;

multiversion! {
    fn sum_columns<X: Element>(x: &[X], width: usize, first: usize, sums: &mut [f32]) {
        for row in x.chunks_exact(width) {
            for (sum, value) in sums.iter_mut().zip(&row[first..]) {
                *sum += value.widen();
            }
        }
    }
}

pub(super) fn sum_rows(x: &Tensor, out: &mut Tensor) {
    let width = x.columns();
    with_element!(x.dtype(), X => {
        let x = x.as_slice::<X>();
        out.as_mut_slice::<f32>()
            .par_chunks_mut(COLUMNS_A_TASK)
            .enumerate()
            .for_each(|(task, sums)| sum_columns(x, width, task * COLUMNS_A_TASK, sums));
    });
}

pub(super) fn add_assign(target: &mut Tensor, source: &Tensor) {
    with_element!(target.dtype(), X => with_element!(source.dtype(), Y => {
        target
            .as_mut_slice::<X>()
            .par_chunks_mut(TASK)
            .zip(source.as_slice::<Y>().par_chunks(TASK))
            .for_each(|(target, source)| add_row(target, source, 1.0));
    }));
}

multiversion! {
    fn add_scaled_task<X: Element>(x: &[X], factor: f32, y: &mut [X]) {
        for (value, &addend) in y.iter_mut().zip(x) {
            *value = X::narrow(value.widen().mul_add(factor, addend.widen()));
        }
    }
}

pub(super) fn add_scaled(x: &Tensor, factor: f32, y: &mut Tensor) {
    with_element!(x.dtype(), X => {
        let tasks = y.as_mut_slice::<X>().par_chunks_mut(TASK).zip(x.as_slice::<X>().par_chunks(TASK));
        tasks.for_each(|(y, x)| add_scaled_task(x, factor, y));
    });
}

pub(super) fn scaled(x: &Tensor, factor: f32, out: &mut Tensor) {
    with_element!(x.dtype(), X => {
        let tasks = out.as_mut_slice::<X>().par_chunks_mut(TASK).zip(x.as_slice::<X>().par_chunks(TASK));
        tasks.for_each(|(out, x)| convert_row(x, factor, out));
    });
}

multiversion! {
    fn softcap_task<X: Element>(x: &mut [X], cap: f32) {
        for value in x {
            *value = X::narrow(cap * tanh(value.widen() / cap));
        }
    }
}

pub(super) fn softcap(x: &mut Tensor, cap: f32) {
    with_element!(x.dtype(), X => {
        x.as_mut_slice::<X>().par_chunks_mut(TASK).for_each(|x| softcap_task(x, cap));
    });
}

pub(super) fn convert(source: &Tensor, target: &mut Tensor) {
    with_element!(target.dtype(), X => with_element!(source.dtype(), Y => {
        target
            .as_mut_slice::<X>()
            .par_chunks_mut(TASK)
            .zip(source.as_slice::<Y>().par_chunks(TASK))
            .for_each(|(target, source)| convert_row(source, 1.0, target));
    }));
}

multiversion! {
    fn dropout_task<X: Element>(x: &[X], first_block: u64, key: RandomKey, threshold: u32, scale: f32, out: &mut [X], accumulate: bool) {
        for (group, (out, x)) in out.chunks_mut(WIDE).zip(x.chunks(WIDE)).enumerate() {
            let words = key.wide_block(first_block + (group * WIDE / 4) as u64);
            let mut kept = [0.0_f32; WIDE];
            for ((kept, &x), &word) in kept.iter_mut().zip(x).zip(&words) {
                // Compared with the upper 24 bits; by a mask, as a branch would be taken at random.
                let mask = u32::from(word >> 8 >= threshold).wrapping_neg();
                *kept = f32::from_bits((x.widen() * scale).to_bits() & mask);
            }
            if accumulate {
                add_row(out, &kept[..out.len()], 1.0);
            } else {
                convert_row(&kept[..out.len()], 1.0, out);
            }
        }
    }
}

pub(super) fn dropout(x: &Tensor, probability: f32, key: RandomKey, out: &mut Tensor, accumulate: bool) {
    let threshold = (f64::from(probability) * f64::from(1u32 << 24)) as u32;
    let scale = 1.0 / (1.0 - probability);
    with_element!(x.dtype(), X => {
        let tasks = out.as_mut_slice::<X>().par_chunks_mut(TASK).zip(x.as_slice::<X>().par_chunks(TASK));
        tasks.enumerate().for_each(|(task, (out, x))| {
            dropout_task(x, (task * TASK / 4) as u64, key, threshold, scale, out, accumulate);
        });
    });
}

pub(super) fn uniform(key: RandomKey, bound: f32, out: &mut Tensor) {
    with_element!(out.dtype(), X => {
        out.as_mut_slice::<X>().par_chunks_mut(TASK).enumerate().for_each(|(task, out)| {
            for (group, out) in out.chunks_mut(4).enumerate() {
                let words = key.block((task * TASK / 4 + group) as u64);
                for (out, word) in out.iter_mut().zip(words) {
                    let uniform = (word >> 8) as f32 * (1.0 / (1u32 << 24) as f32);
                    *out = X::narrow((2.0 * uniform - 1.0) * bound);
                }
            }
        });
    });
}

pub(super) fn gather_rows(x: &Tensor, indices: &Tensor, out: &mut Tensor) {
    let (width, indices) = (x.columns(), indices.as_slice::<u32>());
    with_element!(x.dtype(), X => {
        let source = x.as_slice::<X>();
        out.as_mut_slice::<X>().par_chunks_exact_mut(width).zip(indices).with_min_len(16).for_each(
            |(row, &index)| row.copy_from_slice(&source[index as usize * width..][..width]),
        );
    });
}

pub(super) fn scatter_rows(x: &Tensor, indices: &Tensor, out: &mut Tensor) {
    let (width, indices) = (x.columns(), indices.as_slice::<u32>());
    with_element!(x.dtype(), X => {
        let target = out.as_mut_slice::<X>();
        for (row, &index) in x.as_slice::<X>().chunks_exact(width).zip(indices) {
            target[index as usize * width..][..width].copy_from_slice(row);
        }
    });
}
