//! Linear-attention layers against their formulas, token by token in f64.

use std::ops::Range;

use super::*;
use crate::device::{Documents, Segment};
use crate::ops;
use crate::ops::{ConvolutionState, DeltaInputVars, DeltaState};

on_every_device! {
    short_convolutions_and_their_gradients_agree_with_the_reference,
    delta_rules_and_their_gradients_agree_with_the_reference,
    gated_norms_and_their_gradients_agree_with_the_reference,
    delta_rules_of_columns_of_wider_arrays_agree,
    delta_rules_of_extreme_decays_and_rates_agree,
    delta_rules_forget_nothing_where_nothing_decays,
    documents_of_delta_rules_do_not_see_each_other,
    delta_rules_of_padding_anywhere_are_those_of_their_documents,
    texts_in_parts_are_the_text_at_once,
    delta_steps_can_be_recorded,
    delta_documents_can_be_replaced,
}

/// Lengths of documents, and how many tokens of padding follow each.
type Layout = (&'static [usize], usize);

const RAGGED: Layout = (&[1, 63, 64, 65, 130], 0);

fn segments_of((lengths, padding): Layout) -> (Vec<Segment>, usize) {
    let mut start = 0;
    let segments = lengths.iter().map(|&length| {
        let first = start;
        start += length + padding;
        Segment { query_start: first, query_length: length, key_start: first, key_length: length }
    });
    (segments.collect(), start)
}

fn ranges_of(layout: Layout) -> Vec<Range<usize>> {
    let range = |segment: Segment| segment.query_start..segment.query_start + segment.query_length;
    segments_of(layout).0.into_iter().map(range).collect()
}

fn documents_of(device: &Device, layout: Layout) -> (Documents, usize) {
    let (segments, tokens) = segments_of(layout);
    (Documents::new(device, &segments, tokens).unwrap(), tokens)
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// x \[T, C\] with w \[C, K\].
fn convolution(x: &[f64], w: &[f64], channels: usize, ranges: &[Range<usize>]) -> Vec<f64> {
    let (mut out, taps) = (vec![0.0; x.len()], w.len() / channels);
    for range in ranges {
        for (token, channel) in range.clone().flat_map(|t| (0..channels).map(move |c| (t, c))) {
            let reads = |tap: usize| (token + tap + 1).checked_sub(taps).filter(|row| *row >= range.start);
            let term =
                |tap| reads(tap).map_or(0.0, |row| w[channel * taps + tap] * x[row * channels + channel]);
            let sum: f64 = (0..taps).map(term).sum();
            out[token * channels + channel] = sum * sigmoid(sum);
        }
    }
    out
}

/// Key heads, value heads, key width, value width.
type Heads = [usize; 4];

fn normed(x: &[f64], scale: f64) -> Vec<f64> {
    let squares: f64 = x.iter().map(|x| x * x).sum();
    x.iter().map(|x| x * scale / (squares + 1e-6).sqrt()).collect()
}

/// q, k, v, logits of beta, logits of a, log A, bias of dt.
fn rule(inputs: &[Vec<f64>], [key_heads, heads, depth, width]: Heads, ranges: &[Range<usize>]) -> Vec<f64> {
    let [q, k, v, beta, a, a_log, dt_bias] = inputs else { unreachable!("seven inputs") };
    let mut out = vec![0.0; v.len()];
    for (range, head) in ranges.iter().flat_map(|range| (0..heads).map(move |head| (range, head))) {
        let mut state = vec![0.0; depth * width];
        for token in range.clone() {
            let key_row = (token * key_heads + head * key_heads / heads) * depth;
            let query = normed(&q[key_row..][..depth], (depth as f64).powf(-0.5));
            let key = normed(&k[key_row..][..depth], 1.0);
            let delay = (a[token * heads + head] + dt_bias[head]).exp().ln_1p();
            let decay = (-a_log[head].exp() * delay).exp();
            state.iter_mut().for_each(|state| *state *= decay);
            for column in 0..width {
                let row = (token * heads + head) * width + column;
                let recalled: f64 = (0..depth).map(|i| state[i * width + column] * key[i]).sum();
                let update = sigmoid(beta[token * heads + head]) * (v[row] - recalled);
                (0..depth).for_each(|i| state[i * width + column] += key[i] * update);
                out[row] = (0..depth).map(|i| state[i * width + column] * query[i]).sum();
            }
        }
    }
    out
}

/// x, gate, w.
fn gated_norm(inputs: &[Vec<f64>], epsilon: f64) -> Vec<f64> {
    let [x, gate, w] = inputs else { unreachable!("three inputs") };
    let rows = x.chunks_exact(w.len()).zip(gate.chunks_exact(w.len()));
    rows.flat_map(|(x, gate)| {
        let square = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
        let value = |i: usize| w[i] * x[i] / (square + epsilon).sqrt() * gate[i] * sigmoid(gate[i]);
        (0..x.len()).map(value).collect::<Vec<_>>()
    })
    .collect()
}

fn short_convolutions_and_their_gradients_agree_with_the_reference(device: &Device) {
    let cases: [(Layout, usize, usize); 5] = [
        ((&[], 0), 4, 4),
        ((&[1], 0), 1, 1),
        (RAGGED, 3, 4),
        ((&[5, 2, 1, 150], 3), 40, 4),
        ((&[40], 2), 300, 3),
    ];
    for (index, (layout, channels, taps)) in cases.into_iter().enumerate() {
        let (documents, tokens) = documents_of(device, layout);
        for (kind, &dtype) in types(device).iter().enumerate() {
            let what = format!("{dtype} {layout:?} {channels} x {taps}");
            let inputs =
                vec![numbers("x", tokens * channels, dtype), numbers("w", channels * taps, DType::Bf16)];
            let w = weight(device, (index + kind) % 2 == 0, DType::Bf16, &[channels, taps], &inputs[1]);
            let tape = Tape::recording();
            let x = tape.leaf(tensor(device, dtype, &[tokens, channels], &inputs[0]));
            let y = ops::short_convolution(&tape, &x, &w, &documents, None).unwrap();
            let ranges = ranges_of(layout);
            let function = |inputs: &[Vec<f64>]| convolution(&inputs[0], &inputs[1], channels, &ranges);
            assert_close(&what, &wide(y.tensor()), &function(&inputs), tolerance(dtype));
            let d_y = numbers("d_y", tokens * channels, dtype);
            let slopes = tensor(device, dtype, &[tokens, channels], &d_y);
            let mut gradients = tape.backward(&y, slopes).unwrap();
            let ours = [arrived(&mut gradients, &x), gradient_of(&w)];
            assert_gradients(&what, &function, &inputs, &d_y, &ours, tolerance(dtype));
        }
    }
}

/// What the rule reads, by its sizes.
fn rule_inputs(tokens: usize, [key_heads, heads, depth, width]: Heads, dtype: DType) -> Vec<Vec<f64>> {
    let mut inputs: Vec<Vec<f64>> = [
        ("q", key_heads * depth),
        ("k", key_heads * depth),
        ("v", heads * width),
        ("beta", heads),
        ("a", heads),
    ]
    .map(|(name, row)| numbers(name, tokens * row, dtype))
    .into();
    inputs.push(numbers("a_log", heads, DType::Bf16));
    inputs.push(numbers("dt_bias", heads, DType::Bf16));
    inputs
}

fn shapes_of(tokens: usize, [key_heads, heads, depth, width]: Heads) -> [Vec<usize>; 5] {
    let (keys, gates) = (vec![tokens, key_heads, depth], vec![tokens, heads]);
    [keys.clone(), keys, vec![tokens, heads, width], gates.clone(), gates]
}

fn apply(
    tape: &Tape,
    vars: &[Var],
    weights: &[Weight; 2],
    documents: &Documents,
    state: Option<&mut DeltaState>,
) -> crate::Result<Var> {
    let [q, k, v, beta_logits, a_logits] = vars else { unreachable!("five values") };
    let inputs = DeltaInputVars { q, k, v, beta_logits, a_logits };
    ops::gated_delta(tape, inputs, &weights[0], &weights[1], documents, state)
}

fn delta_rules_and_their_gradients_agree_with_the_reference(device: &Device) {
    let cases: [(Layout, Heads); 8] = [
        ((&[], 0), [1, 2, 4, 4]),
        ((&[1], 0), [1, 1, 2, 3]),
        (RAGGED, [2, 4, 8, 5]),
        ((&[20, 3], 0), [1, 2, 70, 66]),
        ((&[37, 1, 30], 3), [1, 3, 33, 16]),
        ((&[9], 0), [2, 2, 64, 130]),
        ((&[64, 65], 1), [2, 2, 4, 8]),
        ((&[150], 0), [1, 1, 72, 80]),
    ];
    for (index, (layout, heads)) in cases.into_iter().enumerate() {
        let (documents, tokens) = documents_of(device, layout);
        for (kind, &dtype) in types(device).iter().enumerate() {
            let what = format!("{dtype} {layout:?} {heads:?}");
            let inputs = rule_inputs(tokens, heads, dtype);
            let trained = [(index + kind) % 2 == 0, index % 3 != 1];
            let weights =
                [0, 1].map(|i: usize| weight(device, trained[i], DType::Bf16, &[heads[1]], &inputs[5 + i]));
            let tape = Tape::recording();
            let shapes = shapes_of(tokens, heads);
            let leaves: Vec<Var> = shapes
                .iter()
                .zip(&inputs)
                .map(|(shape, values)| tape.leaf(tensor(device, dtype, shape, values)))
                .collect();
            let y = apply(&tape, &leaves, &weights, &documents, None).unwrap();
            let ranges = ranges_of(layout);
            let function = |inputs: &[Vec<f64>]| rule(inputs, heads, &ranges);
            assert_close(&what, &wide(y.tensor()), &function(&inputs), tolerance(dtype));
            let d_y = numbers("d_y", y.tensor().elements(), dtype);
            let slopes = tensor(device, dtype, y.tensor().shape(), &d_y);
            let mut gradients = tape.backward(&y, slopes).unwrap();
            let mut ours: Vec<_> = leaves.iter().map(|leaf| arrived(&mut gradients, leaf)).collect();
            ours.extend(weights.each_ref().map(gradient_of));
            // What is rounded to f32, or inside products to 11 bits, is some of what sums of both signs leave.
            let of_sums = if dtype == DType::F32 { 1e-4 } else { 4.0 * tolerance(dtype) };
            let errors = [tolerance(dtype), of_sums];
            assert_rule_gradients(40, &what, &function, (&inputs, &d_y), &ours, errors);
        }
    }
}

/// Gradients of tokens, and of the two inputs that have one number for a head, whose gradients are sums of terms of both signs.
fn assert_rule_gradients(
    small: usize,
    what: &str,
    function: &dyn Fn(&[Vec<f64>]) -> Vec<f64>,
    (inputs, d_y): (&[Vec<f64>], &[f64]),
    gradients: &[Option<Vec<f64>>],
    errors: [f64; 2],
) {
    for (is_sum, error) in [false, true].into_iter().zip(errors) {
        let of_kind = |(index, gradient): (usize, &Option<Vec<f64>>)| {
            gradient.clone().filter(|_| (index > 4) == is_sum)
        };
        let gradients: Vec<_> = gradients.iter().enumerate().map(of_kind).collect();
        assert_gradients_of(small, what, function, inputs, d_y, &gradients, error);
    }
}

/// The rule and all its gradients against the reference, for these inputs.
fn assert_rule(device: &Device, what: &str, layout: Layout, heads: Heads, inputs: &[Vec<f64>], error: f64) {
    let (documents, tokens) = documents_of(device, layout);
    let weights = [5, 6].map(|i: usize| weight(device, true, DType::F32, &[heads[1]], &inputs[i]));
    let (y, gradients) = rule_and_gradients(device, &documents, tokens, heads, inputs, &weights);
    let ranges = ranges_of(layout);
    let function = |inputs: &[Vec<f64>]| rule(inputs, heads, &ranges);
    assert_close(what, &y, &function(inputs), error);
    let d_y = numbers("d_y", y.len(), DType::F32);
    assert_rule_gradients(10, what, &function, (inputs, &d_y), &gradients, [error, 2e-2]);
}

/// What the rule computes in f32, and the gradients of all that it reads.
fn rule_and_gradients(
    device: &Device,
    documents: &Documents,
    tokens: usize,
    heads: Heads,
    inputs: &[Vec<f64>],
    weights: &[Weight; 2],
) -> (Vec<f64>, Vec<Option<Vec<f64>>>) {
    let tape = Tape::recording();
    let place =
        |(shape, values): (&Vec<usize>, &Vec<f64>)| tape.leaf(tensor(device, DType::F32, shape, values));
    let leaves: Vec<Var> = shapes_of(tokens, heads).iter().zip(inputs).map(place).collect();
    let y = apply(&tape, &leaves, weights, documents, None).unwrap();
    let d_y = numbers("d_y", y.tensor().elements(), DType::F32);
    let d_y = tensor(device, DType::F32, y.tensor().shape(), &d_y);
    let mut gradients = tape.backward(&y, d_y).unwrap();
    let mut all: Vec<_> = leaves.iter().map(|leaf| arrived(&mut gradients, leaf)).collect();
    all.extend(weights.each_ref().map(gradient_of));
    (wide(y.tensor()), all)
}

/// Inputs of which those of the gates are times these.
fn gated_inputs(tokens: usize, heads: Heads, [beta, a, a_log]: [f64; 3]) -> Vec<Vec<f64>> {
    let mut inputs = rule_inputs(tokens, heads, DType::F32);
    for (index, factor) in [(3, beta), (4, a), (5, a_log)] {
        inputs[index].iter_mut().for_each(|value| *value = f64::from((*value * factor) as f32));
    }
    inputs
}

fn delta_rules_of_extreme_decays_and_rates_agree(device: &Device) {
    let (layout, heads): (Layout, Heads) = ((&[70, 9, 129], 0), [1, 2, 8, 9]);
    let mut inputs = gated_inputs(208, heads, [20.0, 4.0, 0.0]);
    // Logarithms of decays from nearly 0 to -50, with tokens beside each other that forget all and nothing.
    inputs[5] = vec![2.5, 0.0];
    inputs[4].iter_mut().step_by(3).for_each(|value| *value -= 30.0);
    assert_rule(device, "extreme decays", layout, heads, &inputs, 2.0 * F32_ERROR);
}

fn delta_rules_forget_nothing_where_nothing_decays(device: &Device) {
    let (layout, heads): (Layout, Heads) = ((&[200], 0), [1, 1, 16, 8]);
    let mut inputs = gated_inputs(200, heads, [8.0, 0.0, 0.0]);
    inputs[4].fill(-30.0);
    // The same key again and again, at rates of nearly one.
    let key = inputs[1][..16].to_vec();
    inputs[1][16 * 20..16 * 60].chunks_exact_mut(16).for_each(|row| row.copy_from_slice(&key));
    inputs[3][20..60].fill(12.0);
    assert_rule(device, "no decay", layout, heads, &inputs, 2.0 * F32_ERROR);
}

fn documents_of_delta_rules_do_not_see_each_other(device: &Device) {
    let (layout, heads): (Layout, Heads) = (RAGGED, [1, 2, 8, 9]);
    let (documents, tokens) = documents_of(device, layout);
    let inputs = rule_inputs(tokens, heads, DType::F32);
    let weights = [5, 6].map(|i: usize| weight(device, false, DType::F32, &[heads[1]], &inputs[i]));
    let compute = |inputs: &[Vec<f64>]| {
        let (y, gradients) = rule_and_gradients(device, &documents, tokens, heads, inputs, &weights);
        let arrays = [Some(y)].into_iter().chain(gradients.into_iter().take(5));
        arrays.map(|values| values.expect("a gradient")).collect::<Vec<_>>()
    };
    let before = compute(&inputs);
    assert_eq!(compute(&inputs), before, "a second time");
    for changed in ranges_of(layout) {
        let mut others = inputs.clone();
        for values in &mut others[..5] {
            let row = values.len() / tokens;
            values[changed.start * row..changed.end * row]
                .iter_mut()
                .for_each(|value| *value = 0.75 - *value);
        }
        let after = compute(&others);
        for (which, (before, after)) in before.iter().zip(&after).enumerate() {
            let row = before.len() / tokens;
            let differs = |index: &usize| before[*index].to_bits() != after[*index].to_bits();
            let touched: Vec<usize> = (0..before.len()).filter(differs).map(|index| index / row).collect();
            assert!(
                touched.iter().all(|token| changed.contains(token)),
                "{which}: {changed:?} moves {touched:?}"
            );
            // What the only token of a document decays is zero.
            assert!(changed.len() == 1 || !touched.is_empty(), "{which}: {changed:?} moves nothing");
        }
    }
}

fn delta_rules_of_padding_anywhere_are_those_of_their_documents(device: &Device) {
    let (heads, tokens): (Heads, usize) = ([1, 2, 8, 9], 330);
    let inputs = rule_inputs(tokens, heads, DType::F32);
    let weights = [5, 6].map(|i: usize| weight(device, false, DType::F32, &[heads[1]], &inputs[i]));
    let ranges = [5..70, 70..71, 100..230, 290..310];
    let segment = |range: &Range<usize>| {
        let (query_start, query_length) = (range.start, range.len());
        Segment { query_start, query_length, key_start: query_start, key_length: query_length }
    };
    let segments: Vec<Segment> = ranges.iter().map(segment).collect();
    let mut documents = Documents::single(device, tokens).unwrap();
    documents.set(&segments).unwrap();
    let (y, gradients) = rule_and_gradients(device, &documents, tokens, heads, &inputs, &weights);
    let function = |inputs: &[Vec<f64>]| rule(inputs, heads, &ranges);
    assert_close("padding", &y, &function(&inputs), F32_ERROR);
    let d_y = numbers("d_y", y.len(), DType::F32);
    assert_gradients_of(10, "padding", &function, &inputs, &d_y, &gradients, F32_ERROR);
    let is_padding = |token: usize| !ranges.iter().any(|range| range.contains(&token));
    for values in [Some(y)].iter().chain(&gradients[..5]).flatten() {
        let row = values.len() / tokens;
        let mut rows = values.chunks_exact(row).enumerate();
        assert!(rows.all(|(token, row)| !is_padding(token) || row.iter().all(|&value| value == 0.0)));
    }
}

fn delta_rules_of_columns_of_wider_arrays_agree(device: &Device) {
    let (layout, heads): (Layout, Heads) = ((&[5, 8], 1), [1, 2, 8, 16]);
    let (documents, tokens) = documents_of(device, layout);
    let shapes = shapes_of(tokens, heads);
    let widths = shapes.each_ref().map(|shape| shape[1..].iter().product::<usize>());
    let total = widths.iter().sum();
    for &dtype in types(device) {
        let weights_of = rule_inputs(tokens, heads, dtype);
        let inputs = vec![numbers("all", tokens * total, dtype)];
        let weights = [5, 6].map(|i: usize| weight(device, false, DType::F32, &[2], &weights_of[i]));
        let tape = Tape::recording();
        let x = tape.leaf(tensor(device, dtype, &[tokens, total], &inputs[0]));
        let slot = x.slot().unwrap();
        let parts = ops::split_columns(&tape, x, &widths).unwrap();
        let parts: Vec<Var> =
            parts.into_iter().zip(&shapes).map(|(part, shape)| part.reshape(shape).unwrap()).collect();
        let y = apply(&tape, &parts, &weights, &documents, None).unwrap();
        drop(parts);
        let ranges = ranges_of(layout);
        let function = |inputs: &[Vec<f64>]| {
            let mut first = 0;
            let mut all: Vec<Vec<f64>> = Vec::new();
            for width in widths {
                let rows = inputs[0].chunks_exact(total);
                all.push(rows.flat_map(|row| row[first..first + width].to_vec()).collect());
                first += width;
            }
            all.extend_from_slice(&weights_of[5..]);
            rule(&all, heads, &ranges)
        };
        assert_close("columns", &wide(y.tensor()), &function(&inputs), tolerance(dtype));
        let d_y = numbers("d_y", y.tensor().elements(), dtype);
        let slopes = tensor(device, dtype, y.tensor().shape(), &d_y);
        let mut gradients = tape.backward(&y, slopes).unwrap();
        let ours = [Some(wide(&gradients.take(slot).unwrap()))];
        assert_gradients("columns", &function, &inputs, &d_y, &ours, tolerance(dtype));
    }
}

fn gated_norms_and_their_gradients_agree_with_the_reference(device: &Device) {
    const EPSILON: f32 = 1e-5;
    for (index, [tokens, heads, width]) in
        [[0, 2, 4], [1, 1, 2], [3, 2, 7], [65, 3, 37], [90, 4, 32], [300, 2, 9]].into_iter().enumerate()
    {
        for (kind, &dtype) in types(device).iter().enumerate() {
            let (shape, count) = ([tokens, heads, width], tokens * heads * width);
            let what = format!("{dtype} {shape:?}");
            let inputs = vec![
                numbers("x", count, dtype),
                numbers("gate", count, dtype),
                numbers("w", width, DType::Bf16),
            ];
            let w = weight(device, (index + kind) % 2 == 0, DType::Bf16, &[width], &inputs[2]);
            let tape = Tape::recording();
            let [x, gate] = [0, 1].map(|i: usize| tape.leaf(tensor(device, dtype, &shape, &inputs[i])));
            let spare = if device.is_host() { 0 } else { 8 * (index % 2) };
            let y = ops::gated_rms_norm_with_spare(&tape, &x, &gate, &w, EPSILON, spare).unwrap();
            assert_eq!(y.tensor().shape(), [tokens, heads * width]);
            let function = |inputs: &[Vec<f64>]| gated_norm(inputs, f64::from(EPSILON));
            assert_close(&what, &wide(y.tensor()), &function(&inputs), tolerance(dtype));
            let again = y.save().get().unwrap();
            assert_eq!(bits(&again), bits(y.tensor()), "{what}: computed again");
            let d_y = numbers("d_y", count, dtype);
            let slopes = tensor(device, dtype, y.tensor().shape(), &d_y);
            let mut gradients = tape.backward(&y, slopes).unwrap();
            let ours = [arrived(&mut gradients, &x), arrived(&mut gradients, &gate), gradient_of(&w)];
            assert_gradients(&what, &function, &inputs, &d_y, &ours, tolerance(dtype));
        }
    }
}

/// Rows of arrays with so many columns each.
fn rows_of(inputs: &[Vec<f64>], tokens: usize, rows: Range<usize>) -> Vec<Vec<f64>> {
    let part = |values: &Vec<f64>| {
        let width = values.len() / tokens;
        values[rows.start * width..rows.end * width].to_vec()
    };
    inputs.iter().map(part).collect()
}

fn texts_in_parts_are_the_text_at_once(device: &Device) {
    let (tokens, heads, channels, taps): (usize, Heads, usize, usize) = (230, [2, 4, 9, 40], 6, 4);
    let whole = ranges_of((&[230], 0));
    for &dtype in types(device) {
        let inputs = rule_inputs(tokens, heads, dtype);
        let weights = [5, 6].map(|i: usize| weight(device, false, DType::F32, &[heads[1]], &inputs[i]));
        let x = numbers("x", tokens * channels, dtype);
        let taps_of = numbers("w", channels * taps, DType::F32);
        let w = weight(device, true, DType::F32, &[channels, taps], &taps_of);
        let expected = rule(&inputs, heads, &whole);
        let convolved = convolution(&x, &taps_of, channels, &whole);
        let tape = Tape::off();
        let mut state = DeltaState::new(device, [heads[1], heads[2], heads[3]]).unwrap();
        let mut before = ConvolutionState::new(device, dtype, channels, taps).unwrap();
        // Twice, from the start again; the second part is shorter than what a convolution holds, and padded.
        for _ in 0..2 {
            let (mut answers, mut sums, mut first) = (Vec::new(), Vec::new(), 0);
            for (count, padding) in [(65, 0), (2, 3), (10, 1), (1, 0), (1, 0), (1, 4), (20, 0), (130, 70)] {
                let rows = first..first + count;
                let place = |values: &[f64], shape: &[usize]| {
                    let mut values = values.to_vec();
                    values.resize(shape.iter().product(), 7.0);
                    Var::constant(tensor(device, dtype, shape, &values))
                };
                let segment =
                    Segment { query_start: 0, query_length: count, key_start: 0, key_length: first + count };
                let documents = Documents::new(device, &[segment], count + padding).unwrap();
                let parts = rows_of(&inputs[..5], tokens, rows.clone());
                let vars: Vec<Var> = parts
                    .iter()
                    .zip(shapes_of(count + padding, heads))
                    .map(|(values, shape)| place(values, &shape))
                    .collect();
                let y = apply(&tape, &vars, &weights, &documents, Some(&mut state)).unwrap();
                answers.extend_from_slice(&wide(y.tensor())[..count * heads[1] * heads[3]]);
                let x = place(&x[rows.start * channels..rows.end * channels], &[count + padding, channels]);
                let y = ops::short_convolution(&tape, &x, &w, &documents, Some(&mut before)).unwrap();
                sums.extend_from_slice(&wide(y.tensor())[..count * channels]);
                first += count;
            }
            assert_close(&format!("rule in parts, {dtype}"), &answers, &expected, tolerance(dtype));
            assert_close(&format!("convolution in parts, {dtype}"), &sums, &convolved, tolerance(dtype));
            state.reset();
            before.reset();
        }
    }
}

fn delta_steps_can_be_recorded(device: &Device) {
    let (tokens, heads, channels, taps): (usize, Heads, usize, usize) = (6, [1, 2, 8, 33], 5, 4);
    let whole = ranges_of((&[6], 0));
    let inputs = rule_inputs(tokens, heads, DType::F32);
    let weights = [5, 6].map(|i: usize| weight(device, false, DType::F32, &[heads[1]], &inputs[i]));
    let x = numbers("x", tokens * channels, DType::F32);
    let taps_of = numbers("w", channels * taps, DType::F32);
    let w = weight(device, false, DType::F32, &[channels, taps], &taps_of);
    let mut state = DeltaState::new(device, [heads[1], heads[2], heads[3]]).unwrap();
    let mut before = ConvolutionState::new(device, DType::F32, channels, taps).unwrap();
    let documents = Documents::single(device, 1).unwrap();
    let fresh = |shape: &[usize]| tensor(device, DType::F32, shape, &vec![0.5; shape.iter().product()]);
    let vars: Vec<Var> = shapes_of(1, heads).iter().map(|shape| Var::constant(fresh(shape))).collect();
    let row = Var::constant(fresh(&[1, channels]));
    let mut step = || -> crate::Result<[Tensor; 2]> {
        let tape = Tape::off();
        let answer = apply(&tape, &vars, &weights, &documents, Some(&mut state))?;
        let sum = ops::short_convolution(&tape, &row, &w, &documents, Some(&mut before))?;
        Ok([answer.into_tensor(), sum.into_tensor()])
    };
    step().unwrap();
    let Some((recording, results)) = device.record(&mut step).unwrap() else { return };
    state.reset();
    before.reset();
    let (mut answers, mut sums) = (Vec::new(), Vec::new());
    for token in 0..tokens {
        for (var, values) in vars.iter().zip(rows_of(&inputs[..5], tokens, token..token + 1)) {
            let values: Vec<f32> = values.iter().map(|&value| value as f32).collect();
            var.tensor().write_shared(&values);
        }
        let values: Vec<f32> = x[token * channels..][..channels].iter().map(|&value| value as f32).collect();
        row.tensor().write_shared(&values);
        recording.replay();
        answers.extend(wide(&results[0]));
        sums.extend(wide(&results[1]));
    }
    assert_close("recorded rule", &answers, &rule(&inputs, heads, &whole), F32_ERROR);
    let expected = convolution(&x, &taps_of, channels, &whole);
    assert_close("recorded convolution", &sums, &expected, F32_ERROR);
}

fn delta_documents_can_be_replaced(device: &Device) {
    let (first, second): (Layout, Layout) = ((&[3, 8, 1], 0), (&[7, 2], 1));
    let (mut documents, tokens) = documents_of(device, first);
    assert_eq!(documents.tokens(), tokens);
    let x = numbers("x", tokens * 3, DType::F32);
    let taps = numbers("w", 12, DType::F32);
    let w = weight(device, false, DType::F32, &[3, 4], &taps);
    let (segments, end) = segments_of(second);
    assert!(end < tokens);
    documents.set(&segments).unwrap();
    let input = Var::constant(tensor(device, DType::F32, &[tokens, 3], &x));
    let y = ops::short_convolution(&Tape::off(), &input, &w, &documents, None).unwrap();
    assert_close("replaced", &wide(y.tensor()), &convolution(&x, &taps, 3, &ranges_of(second)), F32_ERROR);
}

#[test]
fn delta_layers_have_the_same_bits_everywhere() {
    assert_same_bits_everywhere("delta", &|| {
        let device = Device::cpu();
        let (heads, layout): (Heads, Layout) = ([2, 4, 40, 70], RAGGED);
        let (documents, tokens) = documents_of(&device, layout);
        let mut results = Vec::new();
        for dtype in [DType::F32, DType::Bf16] {
            let inputs = rule_inputs(tokens, heads, dtype);
            let weights = [5, 6].map(|i: usize| weight(&device, true, DType::F32, &[4], &inputs[i]));
            let taps = weight(&device, true, DType::F32, &[280, 4], &numbers("w", 280 * 4, DType::F32));
            let gain = weight(&device, true, DType::F32, &[70], &numbers("gain", 70, DType::F32));
            let tape = Tape::recording();
            let mut leaves: Vec<Var> = shapes_of(tokens, heads)
                .iter()
                .zip(&inputs)
                .map(|(shape, values)| tape.leaf(tensor(&device, dtype, shape, values)))
                .collect();
            let values = tape.leaf(tensor(&device, dtype, &[tokens, 280], &inputs[2]));
            let convolved = ops::short_convolution(&tape, &values, &taps, &documents, None).unwrap();
            leaves[2] = convolved.reshape(&[tokens, 4, 70]).unwrap();
            let y = apply(&tape, &leaves, &weights, &documents, None).unwrap();
            let y = ops::gated_rms_norm(&tape, &y, &leaves[2], &gain, 1e-6).unwrap();
            let d_y = numbers("d_y", y.tensor().elements(), dtype);
            let d_y = tensor(&device, dtype, y.tensor().shape(), &d_y);
            let mut gradients = tape.backward(&y, d_y).unwrap();
            results.push(bits(y.tensor()));
            leaves[2] = values;
            results.extend(leaves.iter().map(|leaf| bits(&gradients.take(leaf.slot().unwrap()).unwrap())));
            let trained = weights.iter().chain([&taps, &gain]);
            results.extend(trained.map(|weight| bits(&parameter(weight).gradient().unwrap())));
        }
        results
    });
}

#[test]
fn delta_layers_refuse_what_does_not_fit() {
    let device = Device::cpu();
    let tape = Tape::off();
    let var = |dtype, shape: &[usize]| {
        Var::constant(tensor(&device, dtype, shape, &vec![0.5; shape.iter().product()]))
    };
    let frozen = |shape: &[usize]| Weight::Frozen(var(DType::F32, shape).into_tensor());
    let documents = Documents::single(&device, 3).unwrap();
    let heads = [2, 4, 8, 5];
    let good: Vec<Var> = shapes_of(3, heads).iter().map(|shape| var(DType::F32, shape)).collect();
    let weights = || [frozen(&[4]), frozen(&[4])];
    assert!(apply(&tape, &good, &weights(), &documents, None).is_ok());
    for (index, shape) in
        [(0, vec![3, 2, 7]), (1, vec![3, 1, 8]), (2, vec![3, 3, 5]), (3, vec![3, 2]), (4, vec![2, 4])]
    {
        let mut vars = good.clone();
        vars[index] = var(DType::F32, &shape);
        assert!(apply(&tape, &vars, &weights(), &documents, None).is_err(), "{index}");
        vars[index] = var(DType::Bf16, good[index].tensor().shape());
        assert!(apply(&tape, &vars, &weights(), &documents, None).is_err(), "type of {index}");
    }
    assert!(apply(&tape, &good, &[frozen(&[4]), frozen(&[3])], &documents, None).is_err());
    let odd: Vec<Var> = shapes_of(3, [2, 3, 8, 5]).iter().map(|shape| var(DType::F32, shape)).collect();
    assert!(apply(&tape, &odd, &[frozen(&[3]), frozen(&[3])], &documents, None).is_err());
    let two = documents_of(&device, (&[1, 2], 0)).0;
    let mut state = DeltaState::new(&device, [4, 8, 5]).unwrap();
    assert!(apply(&tape, &good, &weights(), &two, Some(&mut state)).is_err());
    assert!(apply(&Tape::recording(), &good, &weights(), &documents, Some(&mut state)).is_err());
    let mut other = DeltaState::new(&device, [4, 5, 8]).unwrap();
    assert!(apply(&tape, &good, &weights(), &documents, Some(&mut other)).is_err());
    assert!(other.copy_from(&state).is_err());
    let long = Documents::single(&device, 4).unwrap();
    assert!(apply(&tape, &good, &weights(), &long, None).is_err());

    let x = var(DType::F32, &[3, 6]);
    assert!(ops::short_convolution(&tape, &x, &frozen(&[5, 4]), &documents, None).is_err());
    assert!(ops::short_convolution(&tape, &x, &frozen(&[6, 17]), &documents, None).is_err());
    assert!(ops::short_convolution(&tape, &x, &frozen(&[6, 4]), &long, None).is_err());
    let mut before = ConvolutionState::new(&device, DType::Bf16, 6, 4).unwrap();
    assert!(ops::short_convolution(&tape, &x, &frozen(&[6, 4]), &documents, Some(&mut before)).is_err());
    let (rows, gain) = (var(DType::F32, &[3, 2, 4]), frozen(&[4]));
    assert!(ops::gated_rms_norm(&tape, &rows, &var(DType::F32, &[3, 2, 3]), &gain, 1e-6).is_err());
    assert!(ops::gated_rms_norm(&tape, &rows, &rows, &frozen(&[3]), 1e-6).is_err());
}
