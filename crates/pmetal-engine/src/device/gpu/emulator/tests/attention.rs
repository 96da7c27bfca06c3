//! Attention over documents.

use super::*;
use crate::device::{AttentionMask, AttentionParameters, Segment};

const PLAIN: AttentionParameters = AttentionParameters {
    query_heads: 4,
    key_value_heads: 2,
    key_width: 7,
    value_width: 7,
    scale: 0.8,
    softcap: None,
    window: None,
    chunk: None,
    causal: true,
};

/// Two documents and a row of none.
fn segments() -> Arc<[Segment]> {
    let segment = |start, length| Segment {
        query_start: start,
        query_length: length,
        key_start: start,
        key_length: length,
    };
    [segment(0, 6), segment(7, 4)].into()
}

const TOKENS: usize = 11;
/// The row of no document.
const LONE: usize = 6;

fn attend(run: &Run<'_>, p: &AttentionParameters, has_sinks: bool) -> Vec<Tensor> {
    let kernels = run.device.kernels();
    let mask = AttentionMask::new(run.device, p, segments(), [TOKENS; 2]).unwrap();
    let q_shape = [TOKENS, p.query_heads, p.key_width];
    let k_shape = [TOKENS, p.key_value_heads, p.key_width];
    let v_shape = [TOKENS, p.key_value_heads, p.value_width];
    let out_shape = [TOKENS, p.query_heads, p.value_width];
    let (q, k, v) = (run.tensor(1, &q_shape), run.tensor(2, &k_shape), run.tensor(3, &v_shape));
    let sinks = has_sinks.then(|| run.floats(4, &[p.query_heads]));
    let mut out = run.empty(&out_shape);
    let mut logs = run.floats(5, &[TOKENS, p.query_heads]);
    kernels.attention(p, &mask, &q, &k, &v, sinks.as_ref(), &mut out, &mut logs);
    // Any output will do for the backward pass, but that of a row of no document is zero; one that both devices have to
    // the bit compares better.
    let (given, d_out) = (run.tensor_without(6, &out_shape, LONE), run.tensor(7, &out_shape));
    let [mut d_q, mut d_k, mut d_v] = [q_shape, k_shape, v_shape].map(|shape| run.empty(&shape));
    let mut d_sinks = run.floats(8, &[p.query_heads]);
    let d_inputs = [&mut d_q, &mut d_k, &mut d_v];
    let own = has_sinks.then_some(&mut d_sinks);
    kernels.attention_backward(p, &mask, [&q, &k, &v], sinks.as_ref(), &given, &logs, &d_out, d_inputs, own);
    vec![out, logs, d_q, d_k, d_v, d_sinks]
}

fn agrees(parameters: AttentionParameters, sinks: bool) {
    for dtype in TYPES {
        check(&format!("{parameters:?}, sinks {sinks}"), dtype, &|run| attend(run, &parameters, sinks));
    }
}

#[test]
fn groups_of_heads_agree_with_the_processor() {
    agrees(PLAIN, false);
}

#[test]
fn windows_and_sinks_agree_with_the_processor() {
    agrees(AttentionParameters { window: Some(3), value_width: 12, ..PLAIN }, true);
}

#[test]
fn caps_and_wide_heads_agree_with_the_processor() {
    agrees(
        AttentionParameters { softcap: Some(0.7), key_width: 64, value_width: 100, scale: 0.3, ..PLAIN },
        false,
    );
}

#[test]
fn chunks_and_all_keys_agree_with_the_processor() {
    agrees(AttentionParameters { chunk: Some(2), query_heads: 3, key_value_heads: 3, ..PLAIN }, true);
    agrees(AttentionParameters { causal: false, query_heads: 2, key_value_heads: 1, ..PLAIN }, false);
}
