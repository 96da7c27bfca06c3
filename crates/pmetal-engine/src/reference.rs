//! What the operations mean, in f64 and as slowly as it takes to be obvious. Only the tests use this.
//!
//! Written from the published formulas; nothing here knows how a kernel works. Gradients are not written down:
//! tests take finite differences of these functions.

use crate::device::{AttentionParameters, GateActivation, MaskKind, NormWeight, RopePairing, Segment};

fn dot(left: &[f64], right: &[f64]) -> f64 {
    left.iter().zip(right).map(|(left, right)| left * right).sum()
}

/// x \[T, D\] times the transpose of w \[N, D\].
fn times_transposed(x: &[f64], w: &[f64], width: usize) -> Vec<f64> {
    x.chunks_exact(width).flat_map(|row| w.chunks_exact(width).map(|other| dot(row, other))).collect()
}

/// scale * table\[ids\].
pub(crate) fn embedding(ids: &[u32], table: &[f64], width: usize, scale: f64) -> Vec<f64> {
    ids.iter().flat_map(|&id| table[id as usize * width..][..width].iter().map(|x| x * scale)).collect()
}

/// A linear layer with everything that may go with it.
pub(crate) struct Linear<'a> {
    pub(crate) width: usize,
    pub(crate) rank: usize,
    pub(crate) scale: f64,
    pub(crate) lora_scale: f64,
    /// What the adapter's input is multiplied with, element by element.
    pub(crate) mask: Option<&'a [f64]>,
}

impl Linear<'_> {
    /// residual + scale (x W^T + b + s (mask x) A^T B^T); a rank of zero has no adapter, empty slices are absent.
    pub(crate) fn forward(&self, [x, w, bias, a, b, residual]: [&[f64]; 6]) -> Vec<f64> {
        let features = w.len() / self.width;
        let mut y = times_transposed(x, w, self.width);
        if self.rank > 0 {
            let dropped: Vec<f64> = match self.mask {
                Some(mask) => x.iter().zip(mask).map(|(x, mask)| x * mask).collect(),
                None => x.to_vec(),
            };
            let reduced = times_transposed(&dropped, a, self.width);
            for (y, part) in y.iter_mut().zip(times_transposed(&reduced, b, self.rank)) {
                *y += self.lora_scale * part;
            }
        }
        for (index, y) in y.iter_mut().enumerate() {
            *y = self.scale * (*y + bias.get(index % features).unwrap_or(&0.0))
                + residual.get(index).unwrap_or(&0.0);
        }
        y
    }
}

/// x / sqrt(mean(x^2) + epsilon) times w or 1 + w; an empty w is absent.
pub(crate) fn rms_norm(x: &[f64], w: &[f64], width: usize, kind: NormWeight, epsilon: f64) -> Vec<f64> {
    let factor = |column: usize| match (w.is_empty(), kind) {
        (true, _) => 1.0,
        (false, NormWeight::Plain) => w[column],
        (false, NormWeight::PlusOne) => 1.0 + w[column],
    };
    x.chunks_exact(width)
        .flat_map(|row| {
            let rms = (dot(row, row) / width as f64 + epsilon).sqrt();
            row.iter().enumerate().map(move |(column, x)| x / rms * factor(column)).collect::<Vec<_>>()
        })
        .collect()
}

/// (x - mean) / sqrt(variance + epsilon) w + b of rows of a width; w and b are repeated, empty ones are absent.
pub(crate) fn layer_norm(x: &[f64], w: &[f64], b: &[f64], width: usize, epsilon: f64) -> Vec<f64> {
    let normed = x.chunks_exact(width).flat_map(|row| {
        let mean = row.iter().sum::<f64>() / width as f64;
        let rest: Vec<f64> = row.iter().map(|x| x - mean).collect();
        let deviation = (dot(&rest, &rest) / width as f64 + epsilon).sqrt();
        rest.into_iter().map(move |x| x / deviation)
    });
    let at = |weight: &[f64], index: usize| weight.get(index % weight.len().max(1)).copied();
    let all = normed.enumerate();
    all.map(|(index, x)| x * at(w, index).unwrap_or(1.0) + at(b, index).unwrap_or(0.0)).collect()
}

/// Turns pair i of every head of token t by the angle whose cosine and sine are at \[t, i\].
pub(crate) fn rope(
    x: &[f64],
    [heads, width, half]: [usize; 3],
    cosines: &[f64],
    sines: &[f64],
    pairing: RopePairing,
) -> Vec<f64> {
    let mut y = x.to_vec();
    for (row, head) in y.chunks_exact_mut(width).enumerate() {
        for pair in 0..half {
            let (first, second) = match pairing {
                RopePairing::Halves => (pair, pair + half),
                RopePairing::Neighbours => (2 * pair, 2 * pair + 1),
            };
            let angle = row / heads * half + pair;
            let (a, b) = (head[first], head[second]);
            head[first] = cosines[angle] * a - sines[angle] * b;
            head[second] = sines[angle] * a + cosines[angle] * b;
        }
    }
    y
}

fn is_visible(kind: MaskKind, position: usize, key: usize) -> bool {
    let causal = kind.sees_ahead || key <= position;
    let near = kind.window.is_none_or(|window| key > position || position - key < window);
    let same_chunk = kind.chunk.is_none_or(|chunk| key / chunk == position / chunk);
    causal && near && same_chunk
}

/// The keys of each query, by rows of tensors: of those that it sees the best `count`, the first of equal ones.
pub(crate) fn best_keys(
    kind: MaskKind,
    segments: &[Segment],
    [q, k, weights]: [&[f64]; 3],
    [tokens, heads, count]: [usize; 3],
) -> Vec<Vec<(usize, f64)>> {
    let width = q.len() / (tokens * heads);
    let mut best = vec![Vec::new(); tokens];
    for segment in segments {
        for query in 0..segment.query_length {
            let (row, position) =
                (segment.query_start + query, segment.key_length - segment.query_length + query);
            let score = |key: usize| -> f64 {
                let head = |head: usize| {
                    let at = row * heads + head;
                    weights[at] * dot(&q[at * width..][..width], &k[key * width..][..width]).max(0.0)
                };
                (0..heads).map(head).sum()
            };
            let seen = (0..segment.key_length).filter(|&key| is_visible(kind, position, key));
            let mut scores: Vec<(usize, f64)> =
                seen.map(|key| segment.key_start + key).map(|key| (key, score(key))).collect();
            scores.sort_by(|a, b| b.1.total_cmp(&a.1));
            scores.truncate(count);
            best[row] = scores;
        }
    }
    best
}

/// Attention of every segment on its own; an empty `sinks` is absent. Queries are the last positions of the keys.
pub(crate) fn attention(
    parameters: &AttentionParameters,
    kind: MaskKind,
    segments: &[Segment],
    inputs: [&[f64]; 4],
) -> Vec<f64> {
    attention_where(parameters, kind, segments, inputs, &|_, _| true)
}

/// [`attention`] to those keys alone that `looks` names, by rows of queries and of keys.
pub(crate) fn attention_where(
    parameters: &AttentionParameters,
    kind: MaskKind,
    segments: &[Segment],
    [q, k, v, sinks]: [&[f64]; 4],
    looks: &dyn Fn(usize, usize) -> bool,
) -> Vec<f64> {
    let (heads, groups) = (parameters.query_heads, parameters.key_value_heads);
    let (width, value_width) = (parameters.key_width, parameters.value_width);
    let mut out = vec![0.0; q.len() / width * value_width];
    for segment in segments {
        for (query, head) in (0..segment.query_length).flat_map(|t| (0..heads).map(move |h| (t, h))) {
            let position = segment.key_length - segment.query_length + query;
            let row = (segment.query_start + query) * heads + head;
            let key_row = |key: usize| (segment.key_start + key) * groups + head * groups / heads;
            let scores: Vec<(usize, f64)> = (0..segment.key_length)
                .filter(|&key| is_visible(kind, position, key))
                .filter(|&key| looks(segment.query_start + query, segment.key_start + key))
                .map(|key| {
                    let product = dot(&q[row * width..][..width], &k[key_row(key) * width..][..width]);
                    let score = product * f64::from(parameters.scale);
                    let cap = parameters.softcap.map(f64::from);
                    (key, cap.map_or(score, |cap| cap * (score / cap).tanh()))
                })
                .collect();
            let sink = sinks.get(head).map_or(0.0, |sink| sink.exp());
            let sum = sink + scores.iter().map(|(_, score)| score.exp()).sum::<f64>();
            for (key, score) in scores {
                let share = score.exp() / sum;
                let value = &v[key_row(key) * value_width..][..value_width];
                for (out, value) in out[row * value_width..].iter_mut().zip(value) {
                    *out += share * value;
                }
            }
        }
    }
    out
}

/// activation(gate) * up.
pub(crate) fn gated(activation: GateActivation, gate: &[f64], up: &[f64]) -> Vec<f64> {
    let activate = |x: f64| match activation {
        GateActivation::Silu => x / (1.0 + (-x).exp()),
        GateActivation::Sigmoid => 1.0 / (1.0 + (-x).exp()),
        GateActivation::Gelu => x * normal_share(x),
        GateActivation::GeluTanh => {
            let factor = (2.0 / std::f64::consts::PI).sqrt();
            0.5 * x * (1.0 + (factor * (x + 0.044715 * x.powi(3))).tanh())
        }
    };
    gate.iter().zip(up).map(|(&gate, up)| activate(gate) * up).collect()
}

/// The density of the normal distribution.
pub(crate) fn normal_density(x: f64) -> f64 {
    (-0.5 * x * x).exp() / (2.0 * std::f64::consts::PI).sqrt()
}

/// Share of the normal distribution that is below x: a series of positive terms near the middle, else Laplace's continued
/// fraction of the tail.
pub(crate) fn normal_share(x: f64) -> f64 {
    let size = x.abs();
    let tail = if size < 2.0 {
        let terms = (1..60).scan(size, |term, n| {
            let this = *term;
            *term *= size * size / f64::from(2 * n + 1);
            Some(this)
        });
        0.5 - normal_density(size) * terms.sum::<f64>()
    } else {
        normal_density(size) / (1..300).rev().fold(size, |below, n| size + f64::from(n) / below)
    };
    if x < 0.0 { tail } else { 1.0 - tail }
}

/// Sum over trained tokens of -log softmax(cap(scale x W^T))\[label\].
pub(crate) fn cross_entropy(
    x: &[f64],
    w: &[f64],
    width: usize,
    labels: &[i32],
    logit_scale: f64,
    softcap: Option<f64>,
) -> f64 {
    let loss = |(row, &label): (&[f64], &i32)| {
        if label == -100 {
            return 0.0;
        }
        let logits: Vec<f64> = times_transposed(row, w, width)
            .into_iter()
            .map(|logit| logit * logit_scale)
            .map(|logit| softcap.map_or(logit, |cap| cap * (logit / cap).tanh()))
            .collect();
        logits.iter().map(|logit| logit.exp()).sum::<f64>().ln() - logits[label as usize]
    };
    x.chunks_exact(width).zip(labels).map(loss).sum()
}

/// Algorithm 2 of Loshchilov and Hutter (arXiv 1711.05101), for one element after another.
pub(crate) struct AdamW {
    pub(crate) learning_rate: f64,
    pub(crate) betas: [f64; 2],
    pub(crate) epsilon: f64,
    pub(crate) weight_decay: f64,
}

impl AdamW {
    /// One step, counted from 1, on a value and its two moments.
    pub(crate) fn step(&self, step: i32, value: &mut f64, gradient: f64, moments: &mut [f64; 2]) {
        let [beta1, beta2] = self.betas;
        *value -= self.learning_rate * self.weight_decay * *value;
        moments[0] = beta1 * moments[0] + (1.0 - beta1) * gradient;
        moments[1] = beta2 * moments[1] + (1.0 - beta2) * gradient * gradient;
        let mean = moments[0] / (1.0 - beta1.powi(step));
        let square = moments[1] / (1.0 - beta2.powi(step));
        *value -= self.learning_rate * mean / (square.sqrt() + self.epsilon);
    }
}
