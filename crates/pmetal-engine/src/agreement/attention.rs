//! Attention over documents.

use std::sync::Arc;

use super::{Inputs, numbers};
use crate::device::{AttentionMask, AttentionParameters, KeyChoice, MaskKind, Segment};
use crate::error::Result;
use crate::memory::Category;
use crate::{DType, Tensor, ops};

/// Two heads to a key head, of a width that is in no vector.
pub(super) const PLAIN: AttentionParameters = AttentionParameters {
    query_heads: 4,
    key_value_heads: 2,
    key_width: 7,
    value_width: 7,
    scale: 0.8,
    softcap: None,
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

fn mask(inputs: &Inputs<'_>, kind: MaskKind) -> Result<AttentionMask> {
    AttentionMask::new(inputs.device, kind, segments(), [TOKENS; 2])
}

/// Attention forward and backward.
pub(super) fn attend(
    inputs: &Inputs<'_>,
    p: &AttentionParameters,
    kind: MaskKind,
    has_sinks: bool,
) -> Result<Vec<Tensor>> {
    attend_with(inputs, p, has_sinks, &mask(inputs, kind)?)
}

fn attend_with(
    inputs: &Inputs<'_>,
    p: &AttentionParameters,
    has_sinks: bool,
    mask: &AttentionMask,
) -> Result<Vec<Tensor>> {
    let kernels = inputs.device.kernels();
    let q_shape = [TOKENS, p.query_heads, p.key_width];
    let k_shape = [TOKENS, p.key_value_heads, p.key_width];
    let v_shape = [TOKENS, p.key_value_heads, p.value_width];
    let out_shape = [TOKENS, p.query_heads, p.value_width];
    let (q, k, v) = (inputs.tensor(1, &q_shape)?, inputs.tensor(2, &k_shape)?, inputs.tensor(3, &v_shape)?);
    let sinks = has_sinks.then(|| inputs.floats(4, &[p.query_heads])).transpose()?;
    let mut out = inputs.empty(&out_shape)?;
    let mut logs = inputs.floats(5, &[TOKENS, p.query_heads])?;
    kernels.attention(p, mask, &q, &k, &v, sinks.as_ref(), &mut out, &mut logs);
    // Any output will do for the backward pass, but that of a row of no document is zero; one that both devices have to
    // the bit compares better.
    let (given, d_out) = (inputs.tensor_without(6, &out_shape, LONE)?, inputs.tensor(7, &out_shape)?);
    let (mut d_q, mut d_k, mut d_v) =
        (inputs.empty(&q_shape)?, inputs.empty(&k_shape)?, inputs.empty(&v_shape)?);
    let mut d_sinks = inputs.floats(8, &[p.query_heads])?;
    let d_inputs = [&mut d_q, &mut d_k, &mut d_v];
    let own = has_sinks.then_some(&mut d_sinks);
    kernels.attention_backward(p, mask, [&q, &k, &v], sinks.as_ref(), &given, &logs, &d_out, d_inputs, own);
    // What is kept for a row of no document is a device's own affair.
    let (before, behind) = (logs.slice_rows(0, LONE)?, logs.slice_rows(LONE + 1, TOKENS - LONE - 1)?);
    Ok(vec![out, before, behind, d_q, d_k, d_v, d_sinks])
}

/// Attention to keys that are given, of which some queries have none.
pub(super) fn attend_chosen(
    inputs: &Inputs<'_>,
    p: &AttentionParameters,
    kind: MaskKind,
) -> Result<Vec<Tensor>> {
    attend_with(inputs, p, true, &chosen(inputs, kind)?)
}

fn chosen(inputs: &Inputs<'_>, kind: MaskKind) -> Result<AttentionMask> {
    let words: Vec<u32> = (0..TOKENS as u32).map(|query| 0x5b6d_3590 ^ (query * 0x1357)).collect();
    let bits = Tensor::from_slice(inputs.device, Category::Workspace, &[TOKENS, 1], &words)?;
    mask(inputs, kind)?.with_choice(&KeyChoice { bits, tokens: [TOKENS; 2] })
}

/// Attention forward of heads that share one key head of a great width, to all keys or those that are given.
pub(super) fn attend_wide(inputs: &Inputs<'_>, p: &AttentionParameters) -> Result<Vec<Tensor>> {
    let p = &AttentionParameters { key_value_heads: 1, key_width: 264, value_width: 257, scale: 0.1, ..*p };
    let (q, k) = (
        inputs.tensor(1, &[TOKENS, p.query_heads, p.key_width])?,
        inputs.tensor(2, &[TOKENS, 1, p.key_width])?,
    );
    let v = inputs.tensor(3, &[TOKENS, 1, p.value_width])?;
    let sinks = inputs.floats(4, &[p.query_heads])?;
    let mut results = Vec::new();
    let kind = MaskKind::CAUSAL;
    for mask in [mask(inputs, kind)?, chosen(inputs, kind)?] {
        let mut out = inputs.empty(&[TOKENS, p.query_heads, p.value_width])?;
        let mut logs = inputs.floats(5, &[TOKENS, p.query_heads])?;
        inputs.device.kernels().attention(p, &mask, &q, &k, &v, Some(&sinks), &mut out, &mut logs);
        let (before, behind) = (logs.slice_rows(0, LONE)?, logs.slice_rows(LONE + 1, TOKENS - LONE - 1)?);
        results.extend([out, before, behind]);
    }
    Ok(results)
}

/// Whether each key is chosen by each query, as zeros and ones: `count` keys by `heads` heads of a width.
pub(super) fn choice(
    inputs: &Inputs<'_>,
    kind: MaskKind,
    [heads, width, count]: [usize; 3],
) -> Result<Vec<Tensor>> {
    let mask = mask(inputs, kind)?;
    // Small whole numbers, whose sums are exact in any order, so that all devices choose alike and meet equal scores.
    let whole = |dtype: DType, seed: u64, shape: &[usize]| {
        let values = numbers(seed, shape.iter().product());
        let values: Vec<f32> = values.into_iter().map(|value| (2.0 * value).round()).collect();
        inputs.place(dtype, shape, inputs.padding, &values)
    };
    let q = whole(inputs.dtype, 9, &[TOKENS, heads, width])?;
    let k = whole(inputs.dtype, 10, &[TOKENS, width])?;
    let weights = whole(DType::F32, 11, &[TOKENS, heads])?;
    let choice = ops::choose_keys(&mask, [&q, &k, &weights], count)?;
    let (words, row) = (choice.bits().to_vec::<u32>()?, choice.bits().columns());
    let bit = |query: usize, key: usize| (words[query * row + key / 32] >> (key % 32) & 1) as f32;
    let bits: Vec<f32> = (0..TOKENS * TOKENS).map(|index| bit(index / TOKENS, index % TOKENS)).collect();
    Ok(vec![Tensor::from_slice(inputs.device, Category::Workspace, &[TOKENS, TOKENS], &bits)?])
}
