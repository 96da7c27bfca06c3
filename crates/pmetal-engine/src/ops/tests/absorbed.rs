use std::sync::Arc;

use super::*;
use crate::device::{AttentionMask, AttentionParameters, MaskKind, Segment};
use crate::ops::{Linear, Lora};
use crate::{ops, reference};

on_every_device! {
    queries_of_latent_vectors_see_what_expanded_heads_show,
    wide_heads_agree_with_the_reference,
}

/// H, N, V, R, rank of an adapter, tokens and keys.
const SIZES: [[usize; 7]; 6] = [
    [2, 6, 9, 10, 0, 3, 12],
    [3, 5, 4, 7, 2, 1, 9],
    [2, 8, 16, 16, 3, 5, 5],
    [1, 3, 2, 5, 1, 9, 40],
    // One head of keys for all that is wider than plain kernels take, in rows of eight elements and in others.
    [4, 16, 8, 264, 8, 2, 20],
    [2, 7, 3, 531, 3, 6, 11],
];

/// `x w^T` of rows.
fn product(x: &[f64], w: &[f64], width: usize) -> Vec<f64> {
    let dot = |(x, w): (&[f64], &[f64])| x.iter().zip(w).map(|(x, w)| x * w).sum::<f64>();
    x.chunks(width).flat_map(|x| w.chunks(width).map(move |w| dot((x, w)))).collect()
}

fn queries_of_latent_vectors_see_what_expanded_heads_show(device: &Device) {
    for (sizes, &dtype) in
        SIZES.iter().flat_map(|sizes| types(device).iter().map(move |dtype| (sizes, dtype)))
    {
        let &[heads, unturned, value, rank, lora, tokens, keys] = sizes;
        let (what, features) = (format!("{sizes:?} {dtype}"), heads * (unturned + value));
        let turned = 8;
        let [q, latents] = [("q", tokens * heads * (unturned + turned)), ("latents", keys * (rank + turned))]
            .map(|(name, count)| numbers(name, count, dtype));
        let [w, a, b] = [("w", features * rank), ("a", lora * rank), ("b", features * lora)]
            .map(|(name, count)| numbers(name, count, dtype));
        let scale = 0.75;
        // Keys and values of heads, as they would be made.
        let mut merged = w.clone();
        for (index, value) in merged.iter_mut().enumerate() {
            let (row, column) = (index / rank, index % rank);
            *value +=
                f64::from(scale) * (0..lora).map(|r| b[row * lora + r] * a[r * rank + column]).sum::<f64>();
        }
        let (mut k, mut v) = (Vec::new(), Vec::new());
        for latent in latents.chunks(rank + turned) {
            for head in product(&latent[..rank], &merged, rank).chunks(unturned + value) {
                k.extend_from_slice(&head[..unturned]);
                k.extend_from_slice(&latent[rank..]);
                v.extend_from_slice(&head[unturned..]);
            }
        }
        let plain = AttentionParameters {
            query_heads: heads,
            key_value_heads: heads,
            key_width: unturned + turned,
            value_width: value,
            scale: 0.1,
            softcap: None,
        };
        let segments = [Segment { query_start: 0, query_length: tokens, key_start: 0, key_length: keys }];
        let expected = reference::attention(&plain, MaskKind::CAUSAL, &segments, [&q, &k, &v, &[]]);

        let frozen = |shape: &[usize], values: &[f64]| weight(device, false, dtype, shape, values);
        let adapter = || Lora {
            a: frozen(&[lora, rank], &a),
            b: frozen(&[features, lora], &b),
            scale,
            dropout: 0.0,
            stream: 0,
        };
        let lora = (lora > 0).then(adapter);
        let layer = Linear { weight: frozen(&[features, rank], &w), bias: None, lora };
        let tape = Tape::off();
        let constant = |shape: &[usize], values: &[f64]| Var::constant(tensor(device, dtype, shape, values));
        let q = constant(&[tokens, heads, unturned + turned], &q);
        let parts = ops::split_heads(&tape, &q, &[unturned, turned]).unwrap();
        let own = ops::absorb_queries(parts[0].tensor(), &layer, [unturned, value]).unwrap();
        let q = ops::join_heads(&tape, &[&Var::constant(own), &parts[1]]).unwrap();
        let held = constant(&[keys, 1, rank + turned], &latents);
        let width = rank + turned;
        let one = AttentionParameters { key_value_heads: 1, key_width: width, value_width: width, ..plain };
        let mask = AttentionMask::new(device, MaskKind::CAUSAL, Arc::new(segments), [tokens, keys]).unwrap();
        let out = ops::attention(&tape, &one, &mask, [&q, &held, &held], None).unwrap();
        let out = ops::split_heads(&tape, &out, &[rank, turned]).unwrap();
        let out = ops::expand_results(out[0].tensor(), &layer, [unturned, value]).unwrap();
        assert_eq!(out.shape(), [tokens, heads, value]);
        // Queries, means and results are rounded.
        assert_close(&what, &wide(&out), &expected, 3.0 * tolerance(dtype));
    }
}

fn wide_heads_agree_with_the_reference(device: &Device) {
    let wide_one = AttentionParameters {
        query_heads: 3,
        key_value_heads: 1,
        key_width: 260,
        value_width: 24,
        scale: 0.05,
        softcap: None,
    };
    let segment = |query_start, query_length, key_start, key_length| Segment {
        query_start,
        query_length,
        key_start,
        key_length,
    };
    // A row of no document, then two documents of which some keys are held from before.
    let segments = [segment(1, 3, 2, 9), segment(4, 2, 11, 70)];
    let (tokens, keys) = (7, 81);
    for (parameters, kind) in [
        (wide_one, MaskKind::CAUSAL),
        (
            AttentionParameters { key_width: 300, value_width: 257, ..wide_one },
            MaskKind { window: Some(5), ..MaskKind::CAUSAL },
        ),
        (
            AttentionParameters { softcap: Some(0.8), value_width: 264, ..wide_one },
            MaskKind { chunk: Some(4), ..MaskKind::CAUSAL },
        ),
    ] {
        for (&dtype, chooses) in types(device).iter().flat_map(|dtype| [(dtype, false), (dtype, true)]) {
            let p = &parameters;
            let q = numbers("q", tokens * p.query_heads * p.key_width, dtype);
            let k = numbers("k", keys * p.key_width, dtype);
            let v = numbers("v", keys * p.value_width, dtype);
            let sinks = numbers("sinks", p.query_heads, DType::F32);
            let place = |shape: &[usize], values: &[f64]| tensor(device, dtype, shape, values);
            let mask = AttentionMask::new(device, kind, Arc::new(segments), [tokens, keys]).unwrap();
            let (mask, chosen) = if chooses {
                let scores = [place(&[tokens, 1, 4], &numbers("iq", tokens * 4, dtype))];
                let index_keys = place(&[keys, 4], &numbers("ik", keys * 4, dtype));
                let weights = tensor(device, DType::F32, &[tokens, 1], &[1.0; 7]);
                let choice = ops::choose_keys(&mask, [&scores[0], &index_keys, &weights], 3).unwrap();
                let words = choice.bits().to_vec::<u32>().unwrap();
                (mask.with_choice(&choice).unwrap(), Some((words, choice.bits().columns())))
            } else {
                (mask, None)
            };
            let sees = |query: usize, key: usize| {
                let bit = |(words, row): &(Vec<u32>, usize)| words[query * row + key / 32] >> (key % 32) & 1;
                chosen.as_ref().is_none_or(|chosen| bit(chosen) == 1)
            };
            let expected = reference::attention_where(p, kind, &segments, [&q, &k, &v, &sinks], &sees);
            let q = Var::constant(place(&[tokens, p.query_heads, p.key_width], &q));
            let k = Var::constant(place(&[keys, 1, p.key_width], &k));
            let v = Var::constant(place(&[keys, 1, p.value_width], &v));
            let sinks = weight(device, false, DType::F32, &[p.query_heads], &sinks);
            let out = ops::attention(&Tape::off(), p, &mask, [&q, &k, &v], Some(&sinks)).unwrap();
            let what = format!("{p:?} {kind:?} {dtype} {chooses}");
            assert_close(&what, &wide(out.tensor()), &expected, 2.0 * tolerance(dtype));
        }
    }
}
