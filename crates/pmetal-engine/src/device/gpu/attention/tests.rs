//! Against the reference, where there is a device. Without one every test says so and passes.

use std::sync::Arc;

use super::*;
use crate::device::gpu::cuda::{Cuda, CudaOptions};
use crate::device::gpu::runtime::{DeviceFacts, Runtime};
use crate::device::{Kernels, KeyChoice, MaskKind, Segment};
use crate::{Device, reference};

const PLAIN: AttentionParameters = AttentionParameters {
    query_heads: 8,
    key_value_heads: 2,
    key_width: 128,
    value_width: 128,
    scale: 0.2,
    softcap: None,
};

/// Devices that the choice of kernels is made for; all but the first are less than the device is.
#[derive(Clone, Copy, Debug)]
enum Like {
    Itself,
    A100,
    Small,
}

struct Case {
    parameters: AttentionParameters,
    kind: MaskKind,
    /// Keys and queries of each document.
    lengths: &'static [(usize, usize)],
    /// Rows before the first document.
    gap: usize,
    sinks: bool,
    /// Whether queries look at some of the keys that they see.
    chosen: bool,
    dtype: DType,
}

const CASE: Case = Case {
    parameters: PLAIN,
    kind: MaskKind::CAUSAL,
    lengths: &[(150, 150), (97, 97), (61, 61)],
    gap: 0,
    sinks: false,
    chosen: false,
    dtype: DType::Bf16,
};

/// Everything in f64: q, k, v, sinks and the gradient of the output.
struct Values {
    inputs: [Vec<f64>; 4],
    d_out: Vec<f64>,
}

/// out, log-sum-exp, d_q, d_k, d_v, d_sinks.
type Results = [Vec<f64>; 6];

impl Case {
    fn segments(&self) -> Vec<Segment> {
        let (mut query_start, mut key_start) = (self.gap, self.gap);
        let lengths = self.lengths.iter();
        lengths
            .map(|&(key_length, query_length)| {
                let segment = Segment { query_start, query_length, key_start, key_length };
                query_start += query_length;
                key_start += key_length;
                segment
            })
            .collect()
    }

    fn tokens(&self) -> [usize; 2] {
        let (keys, tokens) = self.lengths.iter().fold((0, 0), |sum, next| (sum.0 + next.0, sum.1 + next.1));
        [tokens + self.gap, keys + self.gap]
    }

    /// Whether a query looks at a key; some look at none.
    fn looks(&self, query: usize, key: usize) -> bool {
        !self.chosen || (!(query * key / 5 + 7 * query + 13 * key).is_multiple_of(3) && query % 50 != 7)
    }

    fn choice(&self, device: &Device) -> KeyChoice {
        let [tokens, keys] = self.tokens();
        let bit = |query: usize, key: usize| u32::from(key < keys && self.looks(query, key));
        let word = |query: usize, word: usize| {
            (0..32).map(|index| bit(query, 32 * word + index) << index).sum::<u32>()
        };
        let words = keys.div_ceil(32);
        let bits: Vec<u32> = (0..tokens * words).map(|index| word(index / words, index % words)).collect();
        let bits = Tensor::from_slice(device, Category::Workspace, &[tokens, words], &bits).unwrap();
        KeyChoice { bits, tokens: [tokens, keys] }
    }

    /// Columns of q, k and v.
    fn columns(&self) -> [usize; 3] {
        let p = &self.parameters;
        [p.query_heads * p.key_width, p.key_value_heads * p.key_width, p.key_value_heads * p.value_width]
    }

    fn values(&self) -> Values {
        let mut state = 0x9E37_79B9_7F4A_7C15_u64;
        let mut numbers = |count: usize| -> Vec<f64> {
            let next = |_| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                widen(narrow((state >> 40) as f32 / (1 << 23) as f32 - 1.0, self.dtype), self.dtype)
            };
            (0..count).map(next).collect()
        };
        let ([tokens, keys], [q, k, v]) = (self.tokens(), self.columns());
        let sinks = if self.sinks { self.parameters.query_heads } else { 0 };
        let inputs = [numbers(tokens * q), numbers(keys * k), numbers(keys * v), numbers(sinks)];
        let d_out = numbers(tokens * self.parameters.query_heads * self.parameters.value_width);
        Values { inputs, d_out }
    }
}

fn narrow(value: f32, dtype: DType) -> u16 {
    match dtype {
        DType::F16 => half::f16::from_f32(value).to_bits(),
        _ => half::bf16::from_f32(value).to_bits(),
    }
}

fn widen(bits: u16, dtype: DType) -> f64 {
    match dtype {
        DType::F16 => half::f16::from_bits(bits).to_f64(),
        _ => half::bf16::from_bits(bits).to_f64(),
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Scores of the keys that a query sees, and their derivatives by the plain products.
struct Row {
    /// Query and head.
    row: usize,
    head: usize,
    /// Key and head of each, its score and slope.
    visible: Vec<(usize, f64, f64)>,
    log: f64,
}

fn score_rows<'a>(case: &'a Case, values: &'a Values) -> impl Iterator<Item = Row> + 'a {
    let p = &case.parameters;
    let [q, k, _, sinks] = &values.inputs;
    let (heads, width) = (p.query_heads, p.key_width);
    let score = move |row: usize, key: usize| {
        let score = dot(&q[row * width..][..width], &k[key * width..][..width]) * f64::from(p.scale);
        match p.softcap.map(f64::from) {
            None => (key, score, f64::from(p.scale)),
            Some(cap) => {
                let tanh = (score / cap).tanh();
                (key, cap * tanh, (1.0 - tanh * tanh) * f64::from(p.scale))
            }
        }
    };
    case.segments().into_iter().flat_map(move |segment| {
        let all = (0..segment.query_length).flat_map(move |t| (0..heads).map(move |h| (t, h)));
        all.map(move |(query, head)| {
            let row = (segment.query_start + query) * heads + head;
            let key_row =
                |key: usize| (segment.key_start + key) * p.key_value_heads + head * p.key_value_heads / heads;
            let looks = |key: &usize| case.looks(segment.query_start + query, segment.key_start + key);
            let visible = segment.visible(case.kind, query).filter(looks);
            let visible: Vec<_> = visible.map(|key| score(row, key_row(key))).collect();
            let sink = sinks.get(head).map_or(0.0, |sink| sink.exp());
            let log = (sink + visible.iter().map(|(_, score, _)| score.exp()).sum::<f64>()).ln();
            Row { row, head, visible, log }
        })
    })
}

/// out and log-sum-exp, in f64.
fn expected_forward(case: &Case, values: &Values) -> [Vec<f64>; 2] {
    let p = &case.parameters;
    let [q, k, v, sinks] = &values.inputs;
    let mut out = reference::attention(p, case.kind, &case.segments(), [q, k, v, sinks]);
    // Rows of no document see their sinks alone.
    let log = |row: usize| sinks.get(row % p.query_heads).copied().unwrap_or(f64::NEG_INFINITY);
    let mut logs: Vec<f64> = (0..q.len() / p.key_width).map(log).collect();
    for Row { row, visible, log, .. } in score_rows(case, values) {
        logs[row] = log;
        if case.chosen {
            let out_row = &mut out[row * p.value_width..][..p.value_width];
            out_row.fill(0.0);
            for (key, score, _) in visible {
                let value = &v[key * p.value_width..][..p.value_width];
                out_row.iter_mut().zip(value).for_each(|(out, v)| *out += (score - log).exp() * v);
            }
        }
    }
    [out, logs]
}

/// d_q, d_k, d_v, d_sinks by the formulas, in f64, from the output that the backward pass is given: how that was rounded
/// decides gradients of rows that see few keys, where nearly equal numbers are subtracted.
fn expected_backward(case: &Case, values: &Values, out: &[f64]) -> [Vec<f64>; 4] {
    let (width, value_width) = (case.parameters.key_width, case.parameters.value_width);
    let [q, k, v, sinks] = &values.inputs;
    let mut gradients = [q, k, v, sinks].map(|values| vec![0.0; values.len()]);
    let add = |to: &mut [f64], factor: f64, from: &[f64]| {
        to.iter_mut().zip(from).for_each(|(to, from)| *to += factor * from);
    };
    for Row { row, head, visible, log } in score_rows(case, values) {
        let query_row = &q[row * width..][..width];
        let d_row = &values.d_out[row * value_width..][..value_width];
        let delta = dot(&out[row * value_width..][..value_width], d_row);
        for (key, score, slope) in visible {
            let share = (score - log).exp();
            let d_product = share * (dot(&v[key * value_width..][..value_width], d_row) - delta) * slope;
            add(&mut gradients[0][row * width..][..width], d_product, &k[key * width..][..width]);
            add(&mut gradients[1][key * width..][..width], d_product, query_row);
            add(&mut gradients[2][key * value_width..][..value_width], share, d_row);
        }
        if let Some(gradient) = gradients[3].get_mut(head) {
            *gradient -= (sinks[head] - log).exp() * delta;
        }
    }
    gradients
}

/// Matrices \[rows, columns\] side by side in one array, behind them 8 columns of NaN; `None` is all NaN.
fn side_by_side(
    device: &Device,
    dtype: DType,
    rows: usize,
    parts: &[(usize, Option<&[f64]>)],
) -> Vec<Tensor> {
    const NAN: u16 = 0xFFFF;
    let mut bits = Vec::new();
    for row in 0..rows {
        for &(columns, values) in parts {
            let part = |column: usize| {
                values.map_or(NAN, |values| narrow(values[row * columns + column] as f32, dtype))
            };
            bits.extend((0..columns).map(part));
        }
        bits.extend([NAN; 8]);
    }
    let mut widths: Vec<usize> = parts.iter().map(|part| part.0).collect();
    widths.push(8);
    let mut whole =
        Tensor::scratch(device, Category::Workspace, dtype, &[rows, widths.iter().sum()]).unwrap();
    whole.write_bytes(bytemuck::cast_slice(&bits));
    whole.split_columns(&widths).unwrap()
}

fn by_heads(tensor: &Tensor, width: usize) -> Tensor {
    tensor.reshape(&[tensor.rows(), tensor.columns() / width, width]).unwrap()
}

fn all(tensor: &Tensor) -> Vec<f64> {
    tensor.to_f32_vec().unwrap().into_iter().map(f64::from).collect()
}

fn floats(device: &Device, shape: &[usize], value: f32) -> Tensor {
    Tensor::from_slice(device, Category::Workspace, shape, &vec![value; shape.iter().product()]).unwrap()
}

/// What the device computes; d_sinks are added to ones.
fn computed(device: &Device, gpu: &Gpu, case: &Case, values: &Values) -> Results {
    let (p, dtype) = (&case.parameters, case.dtype);
    let ([tokens, keys], [q_columns, k_columns, v_columns]) = (case.tokens(), case.columns());
    let [q_values, k_values, v_values, sinks] = &values.inputs;
    let out_columns = p.query_heads * p.value_width;
    let reshaped = |mut parts: Vec<Tensor>, widths: &[usize]| -> Vec<Tensor> {
        parts.truncate(widths.len());
        parts.into_iter().zip(widths).map(|(part, &width)| by_heads(&part, width)).collect()
    };
    let queries = [(q_columns, Some(&q_values[..])), (out_columns, Some(&values.d_out[..]))];
    let of_queries = reshaped(side_by_side(device, dtype, tokens, &queries), &[p.key_width, p.value_width]);
    let of_keys = [(k_columns, Some(&k_values[..])), (v_columns, Some(&v_values[..]))];
    let of_keys = reshaped(side_by_side(device, dtype, keys, &of_keys), &[p.key_width, p.value_width]);
    let inputs = [&of_queries[0], &of_keys[0], &of_keys[1]];
    let mut out = side_by_side(device, dtype, tokens, &[(out_columns, None), (q_columns, None)]);
    let mut d_keys = side_by_side(device, dtype, keys, &[(k_columns, None), (v_columns, None)]);
    let pads = [out.pop().unwrap(), d_keys.pop().unwrap()];
    let mut of_outputs = reshaped(out, &[p.value_width, p.key_width]);
    let mut d_keys = reshaped(d_keys, &[p.key_width, p.value_width]);

    let mut logs = floats(device, &[tokens, p.query_heads], f32::NAN);
    let sink_values: Vec<f32> = sinks.iter().map(|&sink| sink as f32).collect();
    let shape = [p.query_heads];
    let sinks =
        case.sinks.then(|| Tensor::from_slice(device, Category::Workspace, &shape, &sink_values).unwrap());
    let mut mask = AttentionMask::new(device, case.kind, case.segments().into(), [tokens, keys]).unwrap();
    if case.chosen {
        mask = mask.with_choice(&case.choice(device)).unwrap();
    }
    let [out, d_q] = &mut of_outputs[..] else { unreachable!("two were made") };
    let [d_k, d_v] = &mut d_keys[..] else { unreachable!("two were made") };
    gpu.attention(p, &mask, inputs[0], inputs[1], inputs[2], sinks.as_ref(), out, &mut logs);
    let mut d_sinks = sinks.as_ref().map(|_| floats(device, &shape, 1.0));
    let d_inputs = [&mut *d_q, &mut *d_k, &mut *d_v];
    let (d_out, sinks) = (&of_queries[1], sinks.as_ref());
    gpu.attention_backward(p, &mask, inputs, sinks, out, &logs, d_out, d_inputs, d_sinks.as_mut());
    for pad in pads {
        assert!(all(&pad).iter().all(|value| value.is_nan()), "columns behind an output were written");
    }
    let d_sinks = d_sinks.map_or(Vec::new(), |sinks| all(&sinks).iter().map(|sum| sum - 1.0).collect());
    [all(out), all(&logs), all(d_q), all(d_k), all(d_v), d_sinks]
}

fn norm(values: &[f64]) -> f64 {
    values.iter().map(|value| value * value).sum::<f64>().sqrt()
}

/// Rows differ by two roundings of 8 bits at most, or by little beside what rows are on average.
fn assert_close(what: &str, actual: &[f64], expected: &[f64], width: usize) {
    assert_eq!(actual.len(), expected.len(), "{what}");
    let usual = norm(expected) / ((expected.len() / width).max(1) as f64).sqrt();
    let mut worst = (0.0, 0);
    for (row, (actual, expected)) in actual.chunks(width).zip(expected.chunks(width)).enumerate() {
        let difference: Vec<f64> = actual.iter().zip(expected).map(|(a, b)| a - b).collect();
        let error = norm(&difference) / (0.015 * norm(expected) + 0.005 * usual + 1e-12);
        let error = if error.is_nan() { f64::INFINITY } else { error };
        if error > worst.0 {
            worst = (error, row);
        }
    }
    assert!(worst.0 <= 1.0, "{what}: {:.2} times the error allowed at row {} of {width}", worst.0, worst.1);
}

fn check(case: &Case, likes: &[Like]) {
    let values = case.values();
    let wanted = expected_forward(case, &values);
    // Side by side, as most of the time goes into compiling.
    std::thread::scope(|scope| {
        for &like in likes {
            let (values, wanted) = (&values, &wanted);
            scope.spawn(move || check_on(case, like, values, wanted));
        }
    });
}

fn check_on(case: &Case, like: Like, values: &Values, [out, logs]: &[Vec<f64>; 2]) {
    let cuda = match Cuda::open(&CudaOptions::default()) {
        Ok(cuda) => cuda,
        Err(error) => return println!("skipped: no CUDA device ({error})"),
    };
    let runtime: Arc<dyn Runtime> = Arc::new(cuda);
    let device = Device::gpu(Arc::clone(&runtime));
    let facts = runtime.facts();
    let (capability, shared_bytes_per_block) = match like {
        Like::Itself => (facts.capability, facts.shared_bytes_per_block),
        Like::A100 => ((8, 0), 166_912),
        Like::Small => ((8, 9), 101_376),
    };
    if capability > facts.capability || shared_bytes_per_block > facts.shared_bytes_per_block {
        return println!("skipped: the device is less than {like:?}");
    }
    let p = &case.parameters;
    for deterministic in [false, true] {
        let mut gpu = Gpu::new(Arc::clone(&runtime));
        gpu.facts = DeviceFacts { capability, shared_bytes_per_block, deterministic, ..facts };
        let form = (case.shape().forward(&gpu.facts), case.shape().backward(&gpu.facts));
        let what = format!("{p:?} {:?} {like:?} {form:?} {deterministic}", case.lengths);
        let results = computed(&device, &gpu, case, values);
        assert_logs(&what, &results[1], logs);
        assert_close(&format!("out of {what}"), &results[0], out, p.value_width);
        let gradients = expected_backward(case, values, &results[0]);
        let widths = [p.key_width, p.key_width, p.value_width, p.query_heads];
        for (index, name) in ["d_q", "d_k", "d_v", "d_sinks"].into_iter().enumerate() {
            let what = format!("{name} of {what}");
            assert_close(&what, &results[index + 2], &gradients[index], widths[index]);
        }
        println!("agrees: {what}");
        if deterministic {
            let bits = |results: Results| results.map(|values| values.iter().map(|x| x.to_bits()).collect());
            let again: [Vec<u64>; 6] = bits(computed(&device, &gpu, case, values));
            assert_eq!(bits(results), again, "{what}: another run has other bits");
        }
    }
}

impl Case {
    fn shape(&self) -> Shape {
        let (p, [tokens, keys]) = (&self.parameters, self.tokens());
        Shape {
            tokens,
            keys,
            heads: p.query_heads,
            key_heads: p.key_value_heads,
            widths: [p.key_width, p.value_width],
            longest: self.lengths.iter().map(|lengths| lengths.1).max().unwrap_or(0),
            has_choice: self.chosen,
        }
    }
}

fn assert_logs(what: &str, actual: &[f64], expected: &[f64]) {
    for (row, (actual, expected)) in actual.iter().zip(expected).enumerate() {
        let is_close = actual == expected || (actual - expected).abs() <= 2e-3;
        assert!(is_close, "log-sum-exp of {what}: {actual} instead of {expected} at {row}");
    }
}

#[test]
fn documents_of_heads_in_groups_agree_with_the_reference() {
    check(&CASE, &[Like::Itself, Like::A100, Like::Small]);
}

#[test]
fn sinks_and_tokens_of_no_document_agree_with_the_reference() {
    let parameters =
        AttentionParameters { query_heads: 9, key_value_heads: 3, key_width: 64, value_width: 64, ..PLAIN };
    let lengths = &[(129, 129), (200, 200), (1, 1)];
    check(&Case { parameters, lengths, gap: 5, sinks: true, ..CASE }, &[Like::Itself, Like::A100]);
}

#[test]
fn many_narrow_heads_agree_with_the_reference() {
    let parameters =
        AttentionParameters { query_heads: 48, key_value_heads: 16, key_width: 64, value_width: 64, ..PLAIN };
    check(&Case { parameters, lengths: &[(120, 120), (300, 300)], ..CASE }, &[Like::Itself]);
}

#[test]
fn windows_and_caps_agree_with_the_reference() {
    let parameters =
        AttentionParameters { query_heads: 4, key_width: 96, value_width: 96, softcap: Some(2.0), ..PLAIN };
    let kind = MaskKind { window: Some(37), ..MaskKind::CAUSAL };
    check(&Case { parameters, kind, sinks: true, ..CASE }, &[Like::Itself, Like::A100]);
}

#[test]
fn chunks_of_the_widest_heads_agree_with_the_reference() {
    let parameters =
        AttentionParameters { query_heads: 4, key_width: 256, value_width: 256, scale: 0.1, ..PLAIN };
    let kind = MaskKind { chunk: Some(64), ..MaskKind::CAUSAL };
    check(&Case { parameters, kind, ..CASE }, &[Like::Itself, Like::A100, Like::Small]);
}

#[test]
fn values_narrower_than_keys_agree_with_the_reference() {
    let parameters = AttentionParameters { query_heads: 3, key_value_heads: 3, key_width: 192, ..PLAIN };
    check(&Case { parameters, gap: 2, ..CASE }, &[Like::Itself, Like::A100, Like::Small]);
}

#[test]
fn chosen_keys_agree_with_the_reference() {
    let latent = AttentionParameters { query_heads: 3, key_value_heads: 3, key_width: 192, ..PLAIN };
    for parameters in [PLAIN, latent] {
        check(&Case { parameters, gap: 2, chosen: true, ..CASE }, &[Like::Itself, Like::A100, Like::Small]);
    }
    let lengths = &[(400, 150), (33, 1)];
    check(&Case { lengths, chosen: true, sinks: true, ..CASE }, &[Like::Itself]);
}

#[test]
fn values_wider_than_keys_agree_with_the_reference() {
    let parameters = AttentionParameters { query_heads: 4, value_width: 192, ..PLAIN };
    check(&Case { parameters, ..CASE }, &[Like::Itself]);
}

#[test]
fn widths_between_the_sizes_of_tiles_agree_with_the_reference() {
    let parameters =
        AttentionParameters { query_heads: 6, key_width: 40, value_width: 24, scale: 0.4, ..PLAIN };
    check(&Case { parameters, gap: 1, ..CASE }, &[Like::Itself, Like::A100]);
}

#[test]
fn half_precision_without_order_agrees_with_the_reference() {
    let kind = MaskKind { sees_ahead: true, ..MaskKind::CAUSAL };
    check(&Case { kind, dtype: DType::F16, sinks: true, ..CASE }, &[Like::Itself, Like::A100]);
}

#[test]
fn the_last_queries_of_longer_documents_agree_with_the_reference() {
    let lengths = &[(400, 150), (33, 7)];
    check(&Case { lengths, ..CASE }, &[Like::Itself, Like::A100]);
}

#[test]
fn few_queries_over_many_keys_agree_with_the_reference() {
    check(&Case { lengths: &[(2500, 1)], ..CASE }, &[Like::Itself]);
    let parameters = AttentionParameters { query_heads: 20, key_value_heads: 1, ..PLAIN };
    check(&Case { parameters, lengths: &[(777, 5)], sinks: true, ..CASE }, &[Like::Itself]);
    let parameters = AttentionParameters { key_width: 72, softcap: Some(3.0), ..PLAIN };
    let kind = MaskKind { window: Some(100), ..MaskKind::CAUSAL };
    let lengths = &[(300, 1), (41, 1), (1, 1), (512, 1), (99, 1), (64, 1), (17, 1), (30, 1), (80, 1)];
    check(&Case { parameters, kind, lengths, gap: 1, ..CASE }, &[Like::Itself, Like::A100]);
}

#[test]
fn rows_at_odd_places_are_left_to_the_portable_kernels() {
    let parameters = AttentionParameters { key_width: 12, value_width: 20, ..PLAIN };
    check(&Case { parameters, sinks: true, ..CASE }, &[Like::Itself]);
}
