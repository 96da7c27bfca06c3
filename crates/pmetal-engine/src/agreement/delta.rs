//! Kernels of linear-attention layers.

use super::Inputs;
use crate::Tensor;
use crate::device::{DeltaGradients, DeltaInputs, Documents, Segment};
use crate::error::Result;

/// Documents of which one is in two parts of the tokens and has two chunks. Short ones: gradients of decays are sums over the rest
/// of a document.
const DOCUMENTS: [usize; 5] = [3, 24, 9, 70, 10];

/// Documents with padding behind them.
fn documents(inputs: &Inputs<'_>, lengths: &[usize], padding: usize) -> Result<Documents> {
    let mut start = 0;
    let segments = lengths.iter().map(|&length| {
        let segment =
            Segment { query_start: start, query_length: length, key_start: start, key_length: length };
        start += length + padding;
        segment
    });
    let segments: Vec<Segment> = segments.collect();
    Documents::new(inputs.device, &segments, start)
}

/// Convolutions forward and backward, and after other tokens.
pub(super) fn convolution(inputs: &Inputs<'_>, channels: usize, taps: usize) -> Result<Vec<Tensor>> {
    let kernels = inputs.device.kernels().delta();
    let documents = documents(inputs, &[1, 2, 90], 1)?;
    let shape = [documents.tokens(), channels];
    let (x, d_out) = (inputs.tensor(1, &shape)?, inputs.tensor(2, &shape)?);
    let (weight, mut d_weight) = (inputs.floats(3, &[channels, taps])?, inputs.floats(4, &[channels, taps])?);
    let (mut out, mut d_x, mut frozen) =
        (inputs.empty(&shape)?, inputs.empty(&shape)?, inputs.empty(&shape)?);
    kernels.short_convolution(&x, &weight, &documents, None, &mut out);
    kernels.short_convolution_backward(&x, &weight, &documents, &d_out, &mut d_x, Some(&mut d_weight))?;
    kernels.short_convolution_backward(&x, &weight, &documents, &d_out, &mut frozen, None)?;
    let mut results = vec![out, d_x, frozen, d_weight];
    let mut state = inputs.dense(5, &[taps - 1, channels])?;
    for (seed, length) in [(6, 1), (7, 17)] {
        let documents = self::documents(inputs, &[length], 2)?;
        let shape = [documents.tokens(), channels];
        let (x, mut out) = (inputs.tensor(seed, &shape)?, inputs.empty(&shape)?);
        kernels.short_convolution(&x, &weight, &documents, Some(&state), &mut out);
        kernels.move_convolution_state(&x, &documents, &mut state);
        results.push(out);
    }
    results.push(state);
    Ok(results)
}

/// The gated delta rule forward and backward, and after other tokens: `heads` are key heads and value heads, `widths` those
/// of a key and of a value.
pub(super) fn rule(inputs: &Inputs<'_>, heads: [usize; 2], widths: [usize; 2]) -> Result<Vec<Tensor>> {
    let kernels = inputs.device.kernels().delta();
    let [a_log, dt_bias] = [1, 2].map(|seed| inputs.floats(seed, &[heads[1]]));
    let (a_log, dt_bias) = (a_log?, dt_bias?);
    let mut results = Vec::new();
    for (lengths, has_state) in [(&DOCUMENTS[..], false), (&[20][..], true), (&[5], true)] {
        let documents = documents(inputs, lengths, 2)?;
        let tokens = documents.tokens();
        let shapes =
            [vec![tokens, heads[0], widths[0]], vec![tokens, heads[1], widths[1]], vec![tokens, heads[1]]];
        let [keys, values, gates] = shapes.each_ref().map(Vec::as_slice);
        let (q, k, v) = (inputs.tensor(3, keys)?, inputs.tensor(4, keys)?, inputs.tensor(5, values)?);
        let (beta, a) = (inputs.tensor(6, gates)?, inputs.tensor(7, gates)?);
        let given = DeltaInputs {
            q: &q,
            k: &k,
            v: &v,
            beta_logits: &beta,
            a_logits: &a,
            a_log: &a_log,
            dt_bias: &dt_bias,
            documents: &documents,
        };
        let mut out = inputs.empty(values)?;
        if has_state {
            let mut state = inputs.floats(8, &[heads[1], widths[0], widths[1]])?;
            kernels.gated_delta(&given, Some(&mut state), &mut out)?;
            results.extend([out, state]);
            continue;
        }
        kernels.gated_delta(&given, None, &mut out)?;
        let d_out = inputs.tensor(9, values)?;
        let (mut d_q, mut d_k, mut d_v) = (inputs.empty(keys)?, inputs.empty(keys)?, inputs.empty(values)?);
        let (mut d_beta, mut d_a) = (inputs.empty(gates)?, inputs.empty(gates)?);
        let [d_a_log, d_dt_bias] = [10, 11].map(|seed| inputs.floats(seed, &[heads[1]]));
        let (mut d_a_log, mut d_dt_bias) = (d_a_log?, d_dt_bias?);
        let gradients = DeltaGradients {
            q: &mut d_q,
            k: &mut d_k,
            v: &mut d_v,
            beta_logits: &mut d_beta,
            a_logits: &mut d_a,
            a_log: Some(&mut d_a_log),
            dt_bias: Some(&mut d_dt_bias),
        };
        kernels.gated_delta_backward(&given, &d_out, gradients)?;
        results.extend([out, d_q, d_k, d_v, d_beta, d_a, d_a_log, d_dt_bias]);
    }
    Ok(results)
}

/// RMSNorm with a gate, forward and backward.
pub(super) fn gated_norm(inputs: &Inputs<'_>, shape: [usize; 3]) -> Result<Vec<Tensor>> {
    let kernels = inputs.device.kernels().delta();
    let (x, gate) = (inputs.tensor(1, &shape)?, inputs.tensor(2, &shape)?);
    let (weight, mut d_weight) = (inputs.floats(3, &[shape[2]])?, inputs.floats(4, &[shape[2]])?);
    let rows = [shape[0], shape[1] * shape[2]];
    let (mut out, d_out) = (inputs.empty(&rows)?, inputs.tensor(5, &rows)?);
    kernels.gated_rms_norm(&x, &gate, &weight, 1e-2, &mut out);
    let (mut d_x, mut d_gate) = (inputs.empty(&shape)?, inputs.empty(&shape)?);
    let given = [&x, &gate, &weight];
    kernels.gated_rms_norm_backward(given, 1e-2, &d_out, [&mut d_x, &mut d_gate], Some(&mut d_weight))?;
    Ok(vec![out, d_x, d_gate, d_weight])
}
