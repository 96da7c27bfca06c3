use std::sync::Arc;

use super::*;
use crate::device::{AttentionMask, AttentionParameters, MaskKind, Segment};
use crate::error::Error;
use crate::{ops, reference};

on_every_device! {
    attention_and_its_gradients_agree_with_the_reference,
    attention_over_many_tokens_agrees_with_the_reference,
    queries_are_the_last_of_their_keys,
    tokens_of_no_segment_get_zeros_and_give_none,
    no_tokens_need_no_attention,
    documents_do_not_see_each_other,
}

const PLAIN: AttentionParameters = AttentionParameters {
    query_heads: 2,
    key_value_heads: 2,
    key_width: 8,
    value_width: 8,
    scale: 0.6,
    softcap: None,
};

/// Documents one after another; each is a number of keys, and of queries at its end.
fn documents(lengths: &[(usize, usize)]) -> Vec<Segment> {
    let (mut query_start, mut key_start) = (0, 0);
    lengths
        .iter()
        .map(|&(key_length, query_length)| {
            let segment = Segment { query_start, query_length, key_start, key_length };
            query_start += query_length;
            key_start += key_length;
            segment
        })
        .collect()
}

struct Run {
    out: Vec<f64>,
    gradients: Vec<Option<Vec<f64>>>,
}

fn shapes(p: &AttentionParameters, tokens: usize, keys: usize) -> [Vec<usize>; 3] {
    [
        vec![tokens, p.query_heads, p.key_width],
        vec![keys, p.key_value_heads, p.key_width],
        vec![keys, p.key_value_heads, p.value_width],
    ]
}

fn run(
    device: &Device,
    (p, kind): (&AttentionParameters, MaskKind),
    segments: &[Segment],
    dtype: DType,
    inputs: &[Vec<f64>],
    d_y: &[f64],
) -> Run {
    let tokens = inputs[0].len() / (p.query_heads * p.key_width);
    let keys = inputs[1].len() / (p.key_value_heads * p.key_width);
    let tape = Tape::recording();
    let leaves: Vec<Var> = shapes(p, tokens, keys)
        .iter()
        .zip(inputs)
        .map(|(shape, values)| tape.leaf(tensor(device, dtype, shape, values)))
        .collect();
    let sinks =
        (!inputs[3].is_empty()).then(|| weight(device, true, DType::F32, &[p.query_heads], &inputs[3]));
    let segments: Arc<[Segment]> = segments.into();
    let vars = [&leaves[0], &leaves[1], &leaves[2]];
    let rows = [vars[0].tensor().shape()[0], vars[1].tensor().shape()[0]];
    let mask = AttentionMask::new(device, kind, segments, rows).unwrap();
    let y = ops::attention(&tape, p, &mask, vars, sinks.as_ref()).unwrap();
    let d_out = tensor(device, dtype, &[tokens, p.query_heads, p.value_width], d_y);
    let out = wide(y.tensor());
    let mut gradients = tape.backward(&y, d_out).unwrap();
    let mut gradients: Vec<_> = leaves.iter().map(|leaf| arrived(&mut gradients, leaf)).collect();
    gradients.push(sinks.as_ref().and_then(gradient_of));
    Run { out, gradients }
}

fn inputs(p: &AttentionParameters, tokens: usize, keys: usize, sinks: bool, dtype: DType) -> Vec<Vec<f64>> {
    let sinks = if sinks { p.query_heads } else { 0 };
    let counts = shapes(p, tokens, keys).map(|shape| shape.iter().product());
    let mut inputs: Vec<_> =
        ["q", "k", "v"].into_iter().zip(counts).map(|(name, count)| numbers(name, count, dtype)).collect();
    inputs.push(numbers("sinks", sinks, DType::F32));
    inputs
}

fn check(
    device: &Device,
    (p, kind, sinks): (AttentionParameters, MaskKind, bool),
    lengths: &[(usize, usize)],
    dtype: DType,
) {
    let what = format!("{p:?} {kind:?} {lengths:?} sinks {sinks} {dtype}");
    let segments = documents(lengths);
    let (keys, tokens) = lengths.iter().fold((0, 0), |sum, next| (sum.0 + next.0, sum.1 + next.1));
    let inputs = inputs(&p, tokens, keys, sinks, dtype);
    let d_y = numbers("d_y", tokens * p.query_heads * p.value_width, dtype);
    let function = |inputs: &[Vec<f64>]| {
        reference::attention(&p, kind, &segments, std::array::from_fn(|index| &inputs[index][..]))
    };
    let Run { out, gradients } = run(device, (&p, kind), &segments, dtype, &inputs, &d_y);
    assert_close(&what, &out, &function(&inputs), tolerance(dtype));
    // A gradient is a difference of two products that were rounded.
    let error = 2.0 * tolerance(dtype);
    assert_gradients(&what, &function, &inputs, &d_y, &gradients, error);
}

fn windowed(keys: usize) -> MaskKind {
    MaskKind { window: Some(keys), ..MaskKind::CAUSAL }
}

fn variants() -> Vec<(AttentionParameters, MaskKind, bool)> {
    vec![
        (PLAIN, MaskKind::CAUSAL, false),
        (PLAIN, MaskKind { sees_ahead: true, ..MaskKind::CAUSAL }, false),
        (AttentionParameters { query_heads: 6, key_value_heads: 2, ..PLAIN }, MaskKind::CAUSAL, false),
        (
            AttentionParameters {
                query_heads: 3,
                key_value_heads: 1,
                key_width: 12,
                value_width: 5,
                ..PLAIN
            },
            MaskKind::CAUSAL,
            true,
        ),
        (PLAIN, windowed(4), false),
        (PLAIN, windowed(1), true),
        (PLAIN, MaskKind { chunk: Some(5), ..MaskKind::CAUSAL }, false),
        (AttentionParameters { softcap: Some(0.7), scale: 1.3, ..PLAIN }, MaskKind::CAUSAL, false),
        (
            AttentionParameters { softcap: Some(1.5), query_heads: 4, key_width: 17, ..PLAIN },
            windowed(20),
            true,
        ),
    ]
}

fn attention_and_its_gradients_agree_with_the_reference(device: &Device) {
    for variant in variants() {
        for lengths in [&[(1, 1)][..], &[(3, 3)], &[(9, 9), (1, 1), (5, 5)]] {
            check(device, variant, lengths, DType::F32);
        }
        for &dtype in types(device) {
            check(device, variant, &[(9, 9), (6, 6)], dtype);
        }
    }
}

fn attention_over_many_tokens_agrees_with_the_reference(device: &Device) {
    for (index, variant) in variants().into_iter().enumerate() {
        let dtype = types(device)[index % types(device).len()];
        let lengths: &[(usize, usize)] = match (is_slow(device), index % 3) {
            (false, 0) => &[(130, 130)],
            (false, _) => &[(65, 65), (20, 20)],
            (true, _) => &[(33, 33), (12, 12)],
        };
        check(device, variant, lengths, dtype);
    }
}

fn queries_are_the_last_of_their_keys(device: &Device) {
    for variant in variants().into_iter().filter(|(_, kind, _)| !kind.sees_ahead) {
        check(device, variant, &[(7, 1)], DType::F32);
        check(device, variant, &[(70, 3), (4, 2)], DType::F32);
        check(device, variant, &[(5, 0), (6, 4)], DType::F32);
    }
}

fn tokens_of_no_segment_get_zeros_and_give_none(device: &Device) {
    let segments = [Segment { query_start: 2, query_length: 3, key_start: 2, key_length: 3 }];
    for &dtype in types(device) {
        let inputs = inputs(&PLAIN, 7, 7, false, dtype);
        let Run { out, gradients } = run(
            device,
            (&PLAIN, MaskKind::CAUSAL),
            &segments,
            dtype,
            &inputs,
            &numbers("d_y", 7 * 16, dtype),
        );
        for values in [out].into_iter().chain(gradients.into_iter().flatten()) {
            assert!(
                values[..2 * 16].iter().chain(&values[5 * 16..]).all(|&value| value == 0.0),
                "{values:?}"
            );
            assert!(values[2 * 16..5 * 16].iter().any(|&value| value != 0.0), "{values:?}");
        }
    }
}

fn no_tokens_need_no_attention(device: &Device) {
    let Run { out, gradients } = run(
        device,
        (&PLAIN, MaskKind::CAUSAL),
        &[],
        DType::F32,
        &inputs(&PLAIN, 0, 0, false, DType::F32),
        &[],
    );
    assert!(out.is_empty() && gradients.into_iter().flatten().all(|gradient| gradient.is_empty()));
}

fn documents_do_not_see_each_other(device: &Device) {
    let lengths = [(6, 6), (4, 4)];
    let inputs = inputs(&PLAIN, 10, 10, false, DType::F32);
    let d_y = numbers("d_y", 160, DType::F32);
    let together = run(device, (&PLAIN, MaskKind::CAUSAL), &documents(&lengths), DType::F32, &inputs, &d_y);
    let part = |values: &[f64]| values[6 * 16..].to_vec();
    let second: Vec<_> =
        inputs.iter().map(|values| if values.is_empty() { vec![] } else { part(values) }).collect();
    let alone =
        run(device, (&PLAIN, MaskKind::CAUSAL), &documents(&lengths[1..]), DType::F32, &second, &part(&d_y));
    assert_close("second document", &part(&together.out), &alone.out, 1e-6);
    for (together, alone) in together.gradients.iter().zip(&alone.gradients).take(3) {
        assert_close("its gradient", &part(together.as_ref().unwrap()), alone.as_ref().unwrap(), 1e-6);
    }
}

#[test]
fn attention_has_the_same_bits_everywhere() {
    assert_same_bits_everywhere("attention", &|| {
        let parameters = AttentionParameters { query_heads: 4, ..PLAIN };
        let inputs = inputs(&parameters, 140, 140, true, DType::F32);
        let d_y = numbers("d_y", 140 * 4 * 8, DType::F32);
        let result = run(
            &Device::cpu(),
            (&parameters, windowed(50)),
            &documents(&[(100, 100), (40, 40)]),
            DType::F32,
            &inputs,
            &d_y,
        );
        let all = result.gradients.into_iter().flatten().chain([result.out]);
        all.map(|values| values.iter().map(|&value| (value as f32).to_bits()).collect()).collect()
    });
}

#[test]
fn parameters_and_segments_that_do_not_fit_are_refused() {
    let device = Device::cpu();
    let attend =
        |(p, kind): (AttentionParameters, MaskKind), segment: Segment, k_type: DType, sinks: usize| {
            let var = |dtype, heads: usize| {
                Var::constant(tensor(&device, dtype, &[4, heads, 8], &vec![0.0; 4 * heads * 8]))
            };
            let (q, k) = (var(DType::F32, p.query_heads), var(k_type, p.key_value_heads));
            let sinks = weight(&device, false, DType::F32, &[sinks], &vec![0.0; sinks]);
            let segments: Arc<[Segment]> = [segment].into();
            let mask = AttentionMask::new(&device, kind, segments, [4, 4])?;
            ops::attention(&Tape::off(), &p, &mask, [&q, &k, &k], Some(&sinks)).map(|_| ())
        };
    let whole = Segment { query_start: 0, query_length: 4, key_start: 0, key_length: 4 };
    let plain = (PLAIN, MaskKind::CAUSAL);
    attend(plain, whole, DType::F32, 2).unwrap();
    let outcomes = [
        attend(plain, Segment { query_start: 1, ..whole }, DType::F32, 2),
        attend(plain, Segment { key_start: usize::MAX, ..whole }, DType::F32, 2),
        attend(plain, Segment { key_length: 3, ..whole }, DType::F32, 2),
    ];
    assert!(outcomes.iter().all(|outcome| matches!(outcome, Err(Error::Range { .. }))), "{outcomes:?}");
    let outcomes = [
        attend((AttentionParameters { query_heads: 3, ..PLAIN }, MaskKind::CAUSAL), whole, DType::F32, 3),
        attend((PLAIN, windowed(0)), whole, DType::F32, 2),
        attend((PLAIN, MaskKind { chunk: Some(0), ..MaskKind::CAUSAL }), whole, DType::F32, 2),
    ];
    assert!(outcomes.iter().all(|outcome| matches!(outcome, Err(Error::Unsupported { .. }))), "{outcomes:?}");
    assert!(matches!(attend(plain, whole, DType::F32, 1), Err(Error::Shape { .. })));
    assert!(matches!(attend(plain, whole, DType::Bf16, 2), Err(Error::DType { .. })));
}
