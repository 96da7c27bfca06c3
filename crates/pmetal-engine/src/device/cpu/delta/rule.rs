//! The gated delta rule: a task for every document and key head, with the value heads that share it.

use std::ops::Range;

use rayon::prelude::*;

use super::sweeps::{self, Columns, LANES, Slopes, Text, dot};
use crate::device::cpu::simd::{Element, with_element};
use crate::device::{DeltaGradients, DeltaInputs, DeltaSizes, SQUARES_EPSILON};
use crate::tensor::Tensor;

/// log(1 + e^x), which does not lose what is small.
fn softplus(x: f32) -> f32 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}

fn logistic(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

/// What a task reads, widened: keys and queries \[L, D\], values \[r, L, E\].
struct Inputs {
    keys: Vec<f32>,
    queries: Vec<f32>,
    /// 1 / norm of each key and query.
    inverses: Vec<[f32; 2]>,
    values: Vec<f32>,
    /// Decay and rate, \[r, L\].
    gates: Vec<[f32; 2]>,
    length: usize,
    sizes: DeltaSizes,
}

/// Rows of a head in a range of tokens, head by head.
fn heads_of<X: Element>(tensor: &Tensor, tokens: &Range<usize>, heads: Range<usize>) -> Vec<f32> {
    let (all, width) = (tensor.shape()[1], tensor.shape().get(2).copied().unwrap_or(1));
    let values = tensor.as_slice::<X>();
    let mut widened = Vec::with_capacity(tokens.len() * heads.len() * width);
    for head in heads {
        for token in tokens.clone() {
            let start = (token * all + head) * width;
            widened.extend(values[start..start + width].iter().map(|value| value.widen()));
        }
    }
    widened
}

fn normalise(values: &mut [f32], width: usize, scale: f32) -> Vec<f32> {
    let rows = values.chunks_exact_mut(width);
    rows.map(|row| {
        let inverse = 1.0 / (dot(row, row) + SQUARES_EPSILON).sqrt();
        row.iter_mut().for_each(|value| *value *= inverse * scale);
        inverse
    })
    .collect()
}

impl Inputs {
    fn new<X: Element>(inputs: &DeltaInputs<'_>, tokens: &Range<usize>, key_head: usize) -> Self {
        let sizes = inputs.sizes();
        let shared = sizes.value_heads / sizes.key_heads;
        let (own, heads) = (key_head..key_head + 1, key_head * shared..(key_head + 1) * shared);
        let [mut keys, mut queries] =
            [inputs.k, inputs.q].map(|tensor| heads_of::<X>(tensor, tokens, own.clone()));
        let key_inverses = normalise(&mut keys, sizes.key_width, 1.0);
        let query_inverses = normalise(&mut queries, sizes.key_width, query_scale(sizes));
        let [rates, delays] =
            [inputs.beta_logits, inputs.a_logits].map(|tensor| heads_of::<X>(tensor, tokens, heads.clone()));
        let (a_log, dt_bias) = (inputs.a_log.as_slice::<f32>(), inputs.dt_bias.as_slice::<f32>());
        let gates = rates.iter().zip(&delays).enumerate().map(|(index, (&rate, &delay))| {
            let head = heads.start + index / tokens.len();
            let decay = -a_log[head].exp() * softplus(delay + dt_bias[head]);
            [decay.exp(), logistic(rate)]
        });
        Self {
            gates: gates.collect(),
            inverses: key_inverses.into_iter().zip(query_inverses).map(|(key, query)| [key, query]).collect(),
            values: heads_of::<X>(inputs.v, tokens, heads.clone()),
            keys,
            queries,
            length: tokens.len(),
            sizes,
        }
    }

    fn text(&self, head: usize) -> Text<'_> {
        Text {
            keys: &self.keys,
            queries: &self.queries,
            gates: &self.gates[head * self.length..][..self.length],
            width: self.sizes.key_width,
        }
    }

    /// Where a value head's array \[L, E\] is among all of them.
    fn of_head(&self, head: usize) -> Range<usize> {
        let elements = self.length * self.sizes.value_width;
        head * elements..(head + 1) * elements
    }
}

fn query_scale(sizes: DeltaSizes) -> f32 {
    1.0 / (sizes.key_width as f32).sqrt()
}

/// The run's documents and the tensors that their tasks fill.
struct Tasks<'a, T> {
    documents: &'a [Range<usize>],
    key_heads: usize,
    results: Vec<T>,
}

impl<T: Sync> Tasks<'_, T> {
    /// Fills a tensor \[T, heads, width\] by arrays \[heads of a task, L, width\], and zeros for padding.
    fn fill<X: Element>(&self, tensor: &mut Tensor, of_task: impl Fn(&T) -> &[f32] + Sync) {
        let (heads, width) = (tensor.shape()[1], tensor.shape().get(2).copied().unwrap_or(1));
        if tensor.elements() == 0 {
            return;
        }
        let shared = heads / self.key_heads;
        let rows = tensor.as_mut_slice::<X>().par_chunks_exact_mut(heads * width).enumerate();
        rows.with_min_len(16).for_each(|(token, row)| {
            let document = self.documents.partition_point(|range| range.end <= token);
            let Some(range) = self.documents.get(document).filter(|range| range.contains(&token)) else {
                return row.fill(X::narrow(0.0));
            };
            for (head, out) in row.chunks_exact_mut(width).enumerate() {
                let values = of_task(&self.results[document * self.key_heads + head / shared]);
                let start = (head % shared * range.len() + token - range.start) * width;
                for (out, &value) in out.iter_mut().zip(&values[start..start + width]) {
                    *out = X::narrow(value);
                }
            }
        });
    }
}

pub(super) fn forward(inputs: &DeltaInputs<'_>, state: Option<&mut Tensor>, out: &mut Tensor) {
    let sizes = inputs.sizes();
    let documents = &inputs.documents.ranges[..];
    let state_of_task = sizes.value_heads / sizes.key_heads * sizes.key_width * sizes.value_width;
    let mut states: Vec<Option<&mut [f32]>> = match state {
        Some(state) => state.as_mut_slice::<f32>().chunks_exact_mut(state_of_task).map(Some).collect(),
        None => Vec::new(),
    };
    states.resize_with(documents.len() * sizes.key_heads, || None);
    with_element!(inputs.q.dtype(), X => {
        let tasks = states.into_par_iter().enumerate().map(|(task, state)| {
            let (document, head) = (&documents[task / sizes.key_heads], task % sizes.key_heads);
            answers(&Inputs::new::<X>(inputs, document, head), state)
        });
        let tasks = Tasks { documents, key_heads: sizes.key_heads, results: tasks.collect() };
        tasks.fill::<X>(out, |answers: &Vec<f32>| answers);
    });
}

/// Answers \[r, L, E\].
fn answers(inputs: &Inputs, mut state: Option<&mut [f32]>) -> Vec<f32> {
    let (depth, width) = (inputs.sizes.key_width, inputs.sizes.value_width);
    let mut out = vec![0.0; inputs.values.len()];
    let mut block = vec![[0.0; LANES]; depth];
    for head in 0..inputs.sizes.value_heads / inputs.sizes.key_heads {
        let own = inputs.of_head(head);
        for columns in Columns::of(width) {
            let place = |row: usize| (head * depth + row) * width + columns.first;
            for (row, lanes) in block.iter_mut().enumerate() {
                match &state {
                    Some(state) => {
                        lanes[..columns.count].copy_from_slice(&state[place(row)..][..columns.count])
                    }
                    None => lanes.fill(0.0),
                }
            }
            let (values, out) = (&inputs.values[own.clone()], &mut out[own.clone()]);
            sweeps::answer(&mut block, inputs.text(head), columns, values, &mut [], out);
            if let Some(state) = &mut state {
                for (row, lanes) in block.iter().enumerate() {
                    state[place(row)..][..columns.count].copy_from_slice(&lanes[..columns.count]);
                }
            }
        }
    }
    out
}

/// Gradients of a task's inputs.
struct Gradients {
    /// \[L, D\].
    keys: Vec<f32>,
    queries: Vec<f32>,
    /// \[r, L, E\].
    values: Vec<f32>,
    /// \[r, L\].
    rates: Vec<f32>,
    delays: Vec<f32>,
    /// \[r\].
    a_log: Vec<f32>,
    dt_bias: Vec<f32>,
}

pub(super) fn backward(inputs: &DeltaInputs<'_>, d_out: &Tensor, gradients: DeltaGradients<'_>) {
    let sizes = inputs.sizes();
    let documents = &inputs.documents.ranges[..];
    let key_heads = sizes.key_heads;
    with_element!(inputs.q.dtype(), X => {
        let results = (0..documents.len() * key_heads).into_par_iter().map(|task| {
            let (document, head) = (&documents[task / key_heads], task % key_heads);
            gradients_of::<X>(inputs, document, head, d_out)
        });
        let tasks = Tasks { documents, key_heads, results: results.collect() };
        tasks.fill::<X>(gradients.q, |task: &Gradients| &task.queries);
        tasks.fill::<X>(gradients.k, |task| &task.keys);
        tasks.fill::<X>(gradients.v, |task| &task.values);
        tasks.fill::<X>(gradients.beta_logits, |task| &task.rates);
        tasks.fill::<X>(gradients.a_logits, |task| &task.delays);
        add_all(gradients.a_log, &tasks, |task| &task.a_log);
        add_all(gradients.dt_bias, &tasks, |task| &task.dt_bias);
    });
}

/// Adds numbers for each value head, document by document.
fn add_all(sums: Option<&mut Tensor>, tasks: &Tasks<'_, Gradients>, of_task: impl Fn(&Gradients) -> &[f32]) {
    let Some(sums) = sums else { return };
    for document in tasks.results.chunks_exact(tasks.key_heads) {
        let values = document.iter().flat_map(&of_task);
        for (sum, value) in sums.as_mut_slice::<f32>().iter_mut().zip(values) {
            *sum += value;
        }
    }
}

fn gradients_of<X: Element>(
    inputs: &DeltaInputs<'_>,
    document: &Range<usize>,
    key_head: usize,
    d_out: &Tensor,
) -> Gradients {
    let own = Inputs::new::<X>(inputs, document, key_head);
    let shared = own.sizes.value_heads / own.sizes.key_heads;
    let first = key_head * shared;
    let d_out = heads_of::<X>(d_out, document, first..first + shared);
    let delays = heads_of::<X>(inputs.a_logits, document, first..first + shared);
    let empty = || Vec::with_capacity(shared * own.length);
    let mut sums = Gradients {
        keys: vec![0.0; own.keys.len()],
        queries: vec![0.0; own.keys.len()],
        values: vec![0.0; own.values.len()],
        rates: empty(),
        delays: empty(),
        a_log: Vec::new(),
        dt_bias: Vec::new(),
    };
    for head in 0..shared {
        let decay_slopes = add_head(&own, head, &d_out[own.of_head(head)], &mut sums);
        let [a_log, dt_bias] =
            [inputs.a_log, inputs.dt_bias].map(|tensor| tensor.as_slice::<f32>()[first + head]);
        let (mut d_a_log, mut d_dt_bias) = (0.0, 0.0);
        for (&delay, slope) in delays[head * own.length..].iter().zip(decay_slopes) {
            let strength = -a_log.exp();
            let delay = delay + dt_bias;
            let d_delay = slope * strength * logistic(delay);
            d_a_log += slope * strength * softplus(delay);
            d_dt_bias += d_delay;
            sums.delays.push(d_delay);
        }
        sums.a_log.push(d_a_log);
        sums.dt_bias.push(d_dt_bias);
    }
    let scale = query_scale(own.sizes);
    let width = own.sizes.key_width;
    for (token, &[key, query]) in own.inverses.iter().enumerate() {
        let row = token * width..(token + 1) * width;
        normalise_back(&own.keys[row.clone()], key, 1.0, &mut sums.keys[row.clone()]);
        normalise_back(&own.queries[row.clone()], query, scale, &mut sums.queries[row]);
    }
    sums
}

/// From the gradient of n = scale x / |x| to that of x.
fn normalise_back(normed: &[f32], inverse: f32, scale: f32, gradient: &mut [f32]) {
    let back = dot(normed, gradient) / (scale * scale);
    for (gradient, normed) in gradient.iter_mut().zip(normed) {
        *gradient = scale * inverse * (*gradient - normed * back);
    }
}

/// Adds the gradients of one value head and returns those of the logarithms of its decays, \[L\].
fn add_head(own: &Inputs, head: usize, d_out: &[f32], sums: &mut Gradients) -> Vec<f32> {
    let (depth, width) = (own.sizes.key_width, own.sizes.value_width);
    let (text, values) = (own.text(head), &own.values[own.of_head(head)]);
    let (mut updates, mut recalled) = (vec![0.0; d_out.len()], vec![0.0; d_out.len()]);
    for columns in Columns::of(width) {
        sweeps::answer(&mut vec![[0.0; LANES]; depth], text, columns, values, &mut updates, &mut []);
        sweeps::answer_back(&mut vec![[0.0; LANES]; depth], text, columns, d_out, &mut recalled);
    }
    let rows = updates.chunks_exact_mut(width).zip(recalled.chunks_exact_mut(width));
    for ((updates, recalled), &[_, rate]) in rows.zip(text.gates) {
        sums.rates.push(dot(updates, recalled) * rate * (1.0 - rate));
        updates.iter_mut().chain(recalled).for_each(|value| *value *= rate);
    }
    let slopes = Slopes { d_out, updates: &updates, d_values: &recalled, width };
    let [mut answers, mut past, mut future] = [(); 3].map(|()| vec![0.0; own.queries.len()]);
    for columns in Columns::of(depth) {
        let mut block = vec![[0.0; LANES]; width];
        sweeps::rows(&mut block, text, columns, slopes, &mut answers, &mut past);
        block.fill([0.0; LANES]);
        sweeps::rows_back(&mut block, text, columns, slopes, &mut future);
    }
    let mut decay_slopes = vec![0.0; own.length];
    let mut sum = 0.0;
    for (token, slope) in decay_slopes.iter_mut().enumerate().rev() {
        let (row, of_keys) = (token * width..(token + 1) * width, token * depth..(token + 1) * depth);
        let (keys, queries) = (&own.keys[of_keys.clone()], &own.queries[of_keys.clone()]);
        let direct = dot(&updates[row.clone()], &d_out[row]);
        for i in of_keys.clone() {
            sums.queries[i] += own.keys[i].mul_add(direct, answers[i]);
            sums.keys[i] += own.queries[i].mul_add(direct, past[i] + future[i]);
        }
        let from_before = dot(queries, &answers[of_keys.clone()]) + dot(keys, &past[of_keys.clone()]);
        sum += from_before - dot(keys, &future[of_keys]);
        *slope = sum;
    }
    sums.values[own.of_head(head)].copy_from_slice(&recalled);
    decay_slopes
}
