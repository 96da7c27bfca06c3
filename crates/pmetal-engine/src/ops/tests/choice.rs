use std::sync::Arc;

use super::*;
use crate::device::{AttentionMask, AttentionParameters, KeyChoice, MaskKind, Segment};
use crate::error::Error;
use crate::{ops, reference};

on_every_device! {
    the_best_keys_are_chosen,
    of_equal_scores_the_first_keys_are_chosen,
    attention_to_chosen_keys_and_its_gradients_agree_with_the_reference,
    a_choice_of_all_keys_changes_nothing,
    many_keys_are_chosen_from,
    zeros_of_both_signs_are_equal_and_no_number_is_the_lowest,
}

const PLAIN: AttentionParameters = AttentionParameters {
    query_heads: 2,
    key_value_heads: 2,
    key_width: 8,
    value_width: 5,
    scale: 0.6,
    softcap: None,
};

/// Documents one after another, each of a number of keys and of queries at its end; then a row of none.
fn documents(lengths: &[(usize, usize)]) -> (Arc<[Segment]>, [usize; 2]) {
    let (mut query_start, mut key_start) = (0, 0);
    let segments = lengths.iter().map(|&(key_length, query_length)| {
        let segment = Segment { query_start, query_length, key_start, key_length };
        query_start += query_length;
        key_start += key_length;
        segment
    });
    (segments.collect(), [query_start + 1, key_start + 1])
}

/// The keys that each query looks at.
fn keys_of(choice: &KeyChoice) -> Vec<Vec<usize>> {
    let words = choice.bits().to_vec::<u32>().unwrap();
    let keys = |row: &[u32]| (0..32 * row.len()).filter(|key| row[key / 32] >> (key % 32) & 1 == 1).collect();
    words.chunks(choice.bits().columns()).map(keys).collect()
}

/// What an indexer has: queries, keys and weights.
struct Indexer {
    heads: usize,
    values: [Vec<f64>; 3],
    tensors: [Tensor; 3],
}

impl Indexer {
    fn new(
        device: &Device,
        dtype: DType,
        [tokens, keys]: [usize; 2],
        [heads, width]: [usize; 2],
        change: impl Fn(f64) -> f64,
    ) -> Self {
        let shapes = [vec![tokens, heads, width], vec![keys, width], vec![tokens, heads]];
        let types = [dtype, dtype, DType::F32];
        let names = ["indexer q", "indexer k", "indexer weights"];
        let values: [Vec<f64>; 3] = std::array::from_fn(|index| {
            let count = shapes[index].iter().product();
            numbers(names[index], count, types[index]).into_iter().map(&change).collect()
        });
        let tensors =
            std::array::from_fn(|index| tensor(device, types[index], &shapes[index], &values[index]));
        Self { heads, values, tensors }
    }

    fn choose(&self, mask: &AttentionMask, count: usize) -> KeyChoice {
        ops::choose_keys(mask, self.tensors.each_ref(), count).unwrap()
    }

    fn best(&self, kind: MaskKind, segments: &[Segment], count: usize) -> Vec<Vec<(usize, f64)>> {
        let sizes = [self.tensors[0].shape()[0], self.heads, count];
        reference::best_keys(kind, segments, self.values.each_ref().map(|values| &values[..]), sizes)
    }
}

const LENGTHS: [&[(usize, usize)]; 4] =
    [&[(1, 1)], &[(9, 9), (1, 1), (5, 5)], &[(40, 40)], &[(70, 3), (4, 2)]];

fn the_best_keys_are_chosen(device: &Device) {
    for lengths in LENGTHS {
        let (segments, rows) = documents(lengths);
        for (window, count) in [(None, 1), (None, 4), (Some(6), 3), (None, 100)] {
            let kind = MaskKind { window, ..MaskKind::CAUSAL };
            let mask = AttentionMask::new(device, kind, Arc::clone(&segments), rows).unwrap();
            for &dtype in types(device) {
                let indexer = Indexer::new(device, dtype, rows, [3, 33], |value| value);
                let chosen = keys_of(&indexer.choose(&mask, count));
                let all = indexer.best(kind, &segments, usize::MAX);
                for (query, (chosen, all)) in chosen.iter().zip(&all).enumerate() {
                    let what = format!("query {query}, {lengths:?}, {window:?}, {count}, {dtype}");
                    assert_eq!(chosen.len(), count.min(all.len()), "{what}");
                    let score = |key: &usize| all.iter().find(|(other, _)| other == key).expect(&what).1;
                    let lowest = chosen.iter().map(score).fold(f64::INFINITY, f64::min);
                    let rest = all.iter().filter(|(key, _)| !chosen.contains(key)).map(|(_, score)| *score);
                    // Sums that differ by what f32 rounds may be in either order.
                    assert!(
                        rest.fold(f64::NEG_INFINITY, f64::max) <= lowest + 1e-5,
                        "{what}: {chosen:?} of {all:?}"
                    );
                }
            }
        }
    }
}

fn of_equal_scores_the_first_keys_are_chosen(device: &Device) {
    for lengths in LENGTHS {
        let (segments, rows) = documents(lengths);
        let mask = AttentionMask::new(device, MaskKind::CAUSAL, Arc::clone(&segments), rows).unwrap();
        for (&dtype, count) in types(device).iter().flat_map(|dtype| [1, 5, 17].map(|count| (dtype, count))) {
            let indexer = Indexer::new(device, dtype, rows, [2, 3], f64::round);
            let chosen = keys_of(&indexer.choose(&mask, count));
            let expected = indexer.best(MaskKind::CAUSAL, &segments, count);
            let mut equal = false;
            for (chosen, expected) in chosen.into_iter().zip(expected) {
                equal |= expected.windows(2).any(|pair| pair[0].1 == pair[1].1);
                let mut expected: Vec<usize> = expected.into_iter().map(|(key, _)| key).collect();
                expected.sort_unstable();
                assert_eq!(chosen, expected, "{lengths:?}, {count}, {dtype}");
            }
            assert!(equal || count == 1 || rows[1] < 5, "no scores were equal: {lengths:?}, {count}");
        }
    }
}

fn zeros_of_both_signs_are_equal_and_no_number_is_the_lowest(device: &Device) {
    let (segments, rows) = documents(&[(6, 1)]);
    let mask = AttentionMask::new(device, MaskKind::CAUSAL, segments, rows).unwrap();
    let tensor = |shape: &[usize], values: &[f64]| tensor(device, DType::F32, shape, values);
    let q = tensor(&[2, 1, 1], &[1.0, 1.0]);
    let plain = [-1.0, 2.0, -1.0, -1.0, 1.0, -1.0, 9.0];
    // Products with the weight that are rounded to zero, from below.
    let small = [1e-30, 1e-30, -1.0, 1e30, 1e-30, -1.0, 9.0];
    for (keys, weight, count, expected) in [
        (plain, -1.0, 2, vec![0, 2]),
        (plain, -1.0, 5, vec![0, 2, 3, 4, 5]),
        (small, -1e-30, 1, vec![0]),
        (small, -1e-30, 4, vec![0, 1, 2, 4]),
        // The score of every key that is looked at is no number.
        (plain, f64::NAN, 3, vec![0, 1, 2]),
        (plain, f64::INFINITY, 1, vec![1]),
        // Infinity times zero.
        (plain, f64::INFINITY, 3, vec![0, 1, 4]),
    ] {
        let k = tensor(&[7, 1], &keys);
        let weights = tensor(&[2, 1], &[weight, 0.0]);
        let choice = ops::choose_keys(&mask, [&q, &k, &weights], count).unwrap();
        assert_eq!(keys_of(&choice), [expected, vec![]], "weight {weight}, {count} keys");
    }
}

fn many_keys_are_chosen_from(device: &Device) {
    let keys = if is_slow(device) { 9000 } else { 20_000 };
    let (segments, rows) = documents(&[(keys, 2)]);
    let mask = AttentionMask::new(device, MaskKind::CAUSAL, Arc::clone(&segments), rows).unwrap();
    let indexer = Indexer::new(device, DType::F32, rows, [1, 2], |value| (value * 4.0).round());
    for count in [1, 700, keys - 1] {
        let chosen = keys_of(&indexer.choose(&mask, count));
        for (chosen, expected) in chosen.into_iter().zip(indexer.best(MaskKind::CAUSAL, &segments, count)) {
            let mut expected: Vec<usize> = expected.into_iter().map(|(key, _)| key).collect();
            expected.sort_unstable();
            assert!(chosen == expected, "{count} of {keys} keys");
        }
    }
}

/// Attention to what an indexer chooses, or to all keys, and the gradients of q, k, v and sinks.
fn attend(
    device: &Device,
    p: &AttentionParameters,
    mask: &AttentionMask,
    dtype: DType,
    inputs: &[Vec<f64>],
) -> (Vec<f64>, Vec<Option<Vec<f64>>>) {
    let tape = Tape::recording();
    let [tokens, keys] = mask.tokens;
    let shapes = [
        [tokens, p.query_heads, p.key_width],
        [keys, p.key_value_heads, p.key_width],
        [keys, p.key_value_heads, p.value_width],
    ];
    let leaves =
        shapes.iter().zip(inputs).map(|(shape, values)| tape.leaf(tensor(device, dtype, shape, values)));
    let leaves: Vec<Var> = leaves.collect();
    let sinks = weight(device, true, DType::F32, &[p.query_heads], &inputs[3]);
    let vars = [&leaves[0], &leaves[1], &leaves[2]];
    let y = ops::attention(&tape, p, mask, vars, Some(&sinks)).unwrap();
    let shape = [tokens, p.query_heads, p.value_width];
    let d_y = tensor(device, dtype, &shape, &numbers("d_y", shape.iter().product(), dtype));
    let out = wide(y.tensor());
    let mut gradients = tape.backward(&y, d_y).unwrap();
    let mut gradients: Vec<_> = leaves.iter().map(|leaf| arrived(&mut gradients, leaf)).collect();
    gradients.push(gradient_of(&sinks));
    (out, gradients)
}

fn attention_inputs(p: &AttentionParameters, [tokens, keys]: [usize; 2], dtype: DType) -> Vec<Vec<f64>> {
    vec![
        numbers("q", tokens * p.query_heads * p.key_width, dtype),
        numbers("k", keys * p.key_value_heads * p.key_width, dtype),
        numbers("v", keys * p.key_value_heads * p.value_width, dtype),
        numbers("sinks", p.query_heads, DType::F32),
    ]
}

fn attention_to_chosen_keys_and_its_gradients_agree_with_the_reference(device: &Device) {
    let wide = AttentionParameters { query_heads: 4, key_width: 24, value_width: 17, ..PLAIN };
    let capped = AttentionParameters { softcap: Some(0.7), ..PLAIN };
    // Heads that kernels on matrix units would take.
    let even = AttentionParameters { key_width: 64, value_width: 64, ..PLAIN };
    let near = MaskKind { window: Some(9), ..MaskKind::CAUSAL };
    type Case<'a> = (AttentionParameters, MaskKind, &'a [(usize, usize)], usize, DType);
    let cases: [Case<'_>; 9] = [
        (even, MaskKind::CAUSAL, &[(30, 30), (9, 9)], 3, DType::Bf16),
        (even, MaskKind::CAUSAL, &[(60, 1)], 7, DType::Bf16),
        (PLAIN, MaskKind::CAUSAL, &[(1, 1)], 1, DType::F32),
        (PLAIN, MaskKind::CAUSAL, &[(9, 9), (12, 12)], 1, DType::F32),
        (wide, MaskKind::CAUSAL, &[(13, 13), (1, 1), (20, 20)], 3, DType::F32),
        (capped, near, &[(19, 19), (6, 6)], 4, DType::F32),
        (wide, MaskKind::CAUSAL, &[(7, 7)], 50, DType::Bf16),
        (wide, MaskKind::CAUSAL, &[(37, 37), (11, 11)], 5, DType::Bf16),
        // Few queries of many keys.
        (wide, MaskKind::CAUSAL, &[(120, 3), (40, 2)], 6, DType::F32),
    ];
    for (p, kind, lengths, count, dtype) in cases {
        compare(device, (&p, kind), lengths, count, dtype);
    }
    if !is_slow(device) {
        // Blocks of queries that look at no key of some blocks of keys.
        compare(device, (&PLAIN, MaskKind::CAUSAL), &[(230, 230), (50, 50)], 2, DType::F32);
        compare(device, (&wide, MaskKind::CAUSAL), &[(130, 130)], 60, DType::Bf16);
    }
}

fn compare(
    device: &Device,
    (p, kind): (&AttentionParameters, MaskKind),
    lengths: &[(usize, usize)],
    count: usize,
    dtype: DType,
) {
    let what = format!("{p:?} {kind:?} {lengths:?}, {count} keys, {dtype}");
    let (segments, rows) = documents(lengths);
    let mask = AttentionMask::new(device, kind, Arc::clone(&segments), rows).unwrap();
    let choice = Indexer::new(device, dtype, rows, [2, 5], |value| value).choose(&mask, count);
    let (inputs, keys) = (attention_inputs(p, rows, dtype), keys_of(&choice));
    let mask = mask.with_choice(&choice).unwrap();
    let (out, gradients) = attend(device, p, &mask, dtype, &inputs);
    let function = |inputs: &[Vec<f64>]| {
        let inputs = std::array::from_fn(|index| &inputs[index][..]);
        reference::attention_where(p, kind, &segments, inputs, &|query, key| keys[query].contains(&key))
    };
    assert_close(&what, &out, &function(&inputs), tolerance(dtype));
    let d_y = numbers("d_y", out.len(), dtype);
    assert_gradients(&what, &function, &inputs, &d_y, &gradients, 2.0 * tolerance(dtype));
}

fn a_choice_of_all_keys_changes_nothing(device: &Device) {
    let (segments, rows) = documents(&[(20, 20), (7, 7)]);
    let mask = AttentionMask::new(device, MaskKind::CAUSAL, segments, rows).unwrap();
    let choice = Indexer::new(device, DType::F32, rows, [2, 5], |value| value).choose(&mask, 20);
    let inputs = attention_inputs(&PLAIN, rows, DType::F32);
    let all = attend(device, &PLAIN, &mask, DType::F32, &inputs);
    let chosen = attend(device, &PLAIN, &mask.with_choice(&choice).unwrap(), DType::F32, &inputs);
    assert!(all == chosen, "the numbers of a choice of all keys are others");
}

#[test]
fn a_choice_has_the_same_bits_everywhere() {
    assert_same_bits_everywhere("choice of keys", &|| {
        let device = Device::cpu();
        let (segments, rows) = documents(&[(100, 100), (40, 40)]);
        let mask = AttentionMask::new(&device, MaskKind::CAUSAL, segments, rows).unwrap();
        let choice = Indexer::new(&device, DType::F32, rows, [4, 20], |value| value).choose(&mask, 9);
        let inputs = attention_inputs(&PLAIN, rows, DType::F32);
        let (out, gradients) =
            attend(&device, &PLAIN, &mask.with_choice(&choice).unwrap(), DType::F32, &inputs);
        let all = gradients.into_iter().flatten().chain([out]);
        let mut bits: Vec<Vec<u32>> =
            all.map(|values| values.iter().map(|&value| (value as f32).to_bits()).collect()).collect();
        bits.push(choice.bits().to_vec().unwrap());
        bits
    });
}

#[test]
fn inputs_that_do_not_fit_a_choice_are_refused() {
    let device = Device::cpu();
    let (segments, rows) = documents(&[(3, 3)]);
    let mask = AttentionMask::new(&device, MaskKind::CAUSAL, segments, rows).unwrap();
    let zeros = |dtype, shape: &[usize]| Tensor::zeros(&device, Category::Workspace, dtype, shape).unwrap();
    let choose = |q: &[usize], k: &[usize], weights: &[usize], types: [DType; 3], count| {
        let (q, k, weights) = (zeros(types[0], q), zeros(types[1], k), zeros(types[2], weights));
        ops::choose_keys(&mask, [&q, &k, &weights], count)
    };
    let all = [DType::F32; 3];
    let choice = choose(&[4, 2, 3], &[4, 3], &[4, 2], all, 1).unwrap();
    for outcome in [
        choose(&[5, 2, 3], &[4, 3], &[4, 2], all, 1),
        choose(&[4, 6], &[4, 3], &[4, 2], all, 1),
        choose(&[4, 2, 3], &[3, 3], &[4, 2], all, 1),
        choose(&[4, 2, 3], &[4, 3], &[4, 3], all, 1),
    ] {
        assert!(matches!(outcome, Err(Error::Shape { .. })), "{outcome:?}");
    }
    let (half, narrow) = (DType::Bf16, [4, 2, 3]);
    for types in [[half, DType::F32, DType::F32], [half, half, half]] {
        assert!(matches!(choose(&narrow, &[4, 3], &[4, 2], types, 1), Err(Error::DType { .. })));
    }
    let outcome = choose(&narrow, &[4, 3], &[4, 2], all, 0);
    assert!(matches!(outcome, Err(Error::Unsupported { .. })), "{outcome:?}");
    let (segments, rows) = documents(&[(4, 4)]);
    let other = AttentionMask::new(&device, MaskKind::CAUSAL, segments, rows).unwrap();
    assert!(matches!(other.with_choice(&choice), Err(Error::Shape { .. })));
}
