//! Passes over the tokens of one document and head with a state in the first cache.
//!
//! The state S \[D, E\] of a value head decays, then learns its error: S' = a S, u = v - S'^T k, S = S' + k (b u)^T, and
//! answers o = S^T q. Backward, with F the gradient that comes from the tokens behind, w = b u and c = b R^T k:
//! R = F + q do^T; c; that of the S before is a (R - k c^T); dv = c, d_b = u (R^T k), dq = S do = S' do + k (w do),
//! dk = R w - S' c = F w - S' c + q (w do). The gradient of log a is the sum, over this token and all behind it, of
//! q dq - v dv, as multiplying S and all values before a token by a factor is the same as decaying by it; without what
//! cancels exactly that is q (S' do) - k (S' c) - k (F w), whose terms are as small as decays make them. So two passes over
//! columns give u and c, and two over rows give the parts of dq and dk; no state is kept.

use crate::device::cpu::simd::multiversion;

/// Columns or rows of the state that a pass takes at a time.
pub(super) const LANES: usize = 64;

type Lane = [f32; LANES];

/// A part of the state: LANES columns or rows of it, side by side.
pub(super) type Block = [Lane];

#[inline(always)]
fn load(values: &[f32]) -> Lane {
    let mut lane = [0.0; LANES];
    lane[..values.len()].copy_from_slice(values);
    lane
}

/// What all passes read: keys and queries \[L, D\], and decay and rate of each token.
#[derive(Clone, Copy)]
pub(super) struct Text<'a> {
    pub(super) keys: &'a [f32],
    pub(super) queries: &'a [f32],
    pub(super) gates: &'a [[f32; 2]],
    pub(super) width: usize,
}

/// Columns of an array \[L, width\], at most [`LANES`].
#[derive(Clone, Copy)]
pub(super) struct Columns {
    pub(super) first: usize,
    pub(super) count: usize,
    pub(super) width: usize,
}

impl Columns {
    /// All columns of a width, in parts.
    pub(super) fn of(width: usize) -> impl Iterator<Item = Self> {
        (0..width).step_by(LANES).map(move |first| Self { first, count: LANES.min(width - first), width })
    }

    #[inline(always)]
    fn at(self, token: usize) -> std::ops::Range<usize> {
        let start = token * self.width + self.first;
        start..start + self.count
    }
}

multiversion! {
    /// Columns of S, forward: writes o, and u where there is room for it.
    pub(super) fn answer(block: &mut Block, text: Text<'_>, columns: Columns, values: &[f32], errors: &mut [f32], out: &mut [f32]) {
        let rows = text.keys.chunks_exact(text.width).zip(text.queries.chunks_exact(text.width));
        for (token, ((keys, queries), &[decay, rate])) in rows.zip(text.gates).enumerate() {
            let mut recalled = [0.0; LANES];
            for (row, &key) in block.iter_mut().zip(keys) {
                for (state, sum) in row.iter_mut().zip(&mut recalled) {
                    *state *= decay;
                    *sum = state.mul_add(key, *sum);
                }
            }
            let mut update = load(&values[columns.at(token)]);
            for (update, recalled) in update.iter_mut().zip(&recalled) {
                *update -= recalled;
            }
            if let Some(errors) = errors.get_mut(columns.at(token)) {
                errors.copy_from_slice(&update[..columns.count]);
            }
            for update in &mut update {
                *update *= rate;
            }
            let mut answer = [0.0; LANES];
            for ((row, &key), &query) in block.iter_mut().zip(keys).zip(queries) {
                for ((state, sum), update) in row.iter_mut().zip(&mut answer).zip(&update) {
                    *state = update.mul_add(key, *state);
                    *sum = state.mul_add(query, *sum);
                }
            }
            if let Some(out) = out.get_mut(columns.at(token)) {
                out.copy_from_slice(&answer[..columns.count]);
            }
        }
    }
}

multiversion! {
    /// Columns of R, backward: writes R^T k.
    pub(super) fn answer_back(block: &mut Block, text: Text<'_>, columns: Columns, d_out: &[f32], recalled: &mut [f32]) {
        let rows = text.keys.chunks_exact(text.width).zip(text.queries.chunks_exact(text.width));
        for (token, ((keys, queries), &[decay, rate])) in rows.zip(text.gates).enumerate().rev() {
            let slopes = load(&d_out[columns.at(token)]);
            let mut sums = [0.0; LANES];
            for ((row, &key), &query) in block.iter_mut().zip(keys).zip(queries) {
                for ((state, sum), slope) in row.iter_mut().zip(&mut sums).zip(&slopes) {
                    *state = slope.mul_add(query, *state);
                    *sum = state.mul_add(key, *sum);
                }
            }
            recalled[columns.at(token)].copy_from_slice(&sums[..columns.count]);
            for sum in &mut sums {
                *sum *= -rate;
            }
            for (row, &key) in block.iter_mut().zip(keys) {
                for (state, sum) in row.iter_mut().zip(&sums) {
                    *state = decay * sum.mul_add(key, *state);
                }
            }
        }
    }
}

/// What passes over rows read: \[L, E\].
#[derive(Clone, Copy)]
pub(super) struct Slopes<'a> {
    /// do.
    pub(super) d_out: &'a [f32],
    /// w.
    pub(super) updates: &'a [f32],
    /// c.
    pub(super) d_values: &'a [f32],
    pub(super) width: usize,
}

multiversion! {
    /// Rows of S, forward: writes S' do and -S' c.
    pub(super) fn rows(block: &mut Block, text: Text<'_>, columns: Columns, slopes: Slopes<'_>, answers: &mut [f32], past: &mut [f32]) {
        for (token, &[decay, _]) in text.gates.iter().enumerate() {
            let keys = load(&text.keys[columns.at(token)]);
            let row = token * slopes.width..(token + 1) * slopes.width;
            let (d_out, updates) = (&slopes.d_out[row.clone()], &slopes.updates[row.clone()]);
            let d_values = &slopes.d_values[row];
            let (mut queries, mut recalled) = ([0.0; LANES], [0.0; LANES]);
            for (((states, &d_out), &update), &d_value) in block.iter_mut().zip(d_out).zip(updates).zip(d_values) {
                for lane in 0..LANES {
                    let before = states[lane] * decay;
                    queries[lane] = before.mul_add(d_out, queries[lane]);
                    recalled[lane] = before.mul_add(-d_value, recalled[lane]);
                    states[lane] = keys[lane].mul_add(update, before);
                }
            }
            answers[columns.at(token)].copy_from_slice(&queries[..columns.count]);
            past[columns.at(token)].copy_from_slice(&recalled[..columns.count]);
        }
    }
}

multiversion! {
    /// Rows of R, backward: writes F w.
    pub(super) fn rows_back(block: &mut Block, text: Text<'_>, columns: Columns, slopes: Slopes<'_>, future: &mut [f32]) {
        for (token, &[decay, _]) in text.gates.iter().enumerate().rev() {
            let keys = load(&text.keys[columns.at(token)]);
            let queries = load(&text.queries[columns.at(token)]);
            let row = token * slopes.width..(token + 1) * slopes.width;
            let (d_out, updates) = (&slopes.d_out[row.clone()], &slopes.updates[row.clone()]);
            let mut sums = [0.0; LANES];
            for (((states, &d_out), &update), &d_value) in
                block.iter_mut().zip(d_out).zip(updates).zip(&slopes.d_values[row])
            {
                for lane in 0..LANES {
                    sums[lane] = states[lane].mul_add(update, sums[lane]);
                    let state = queries[lane].mul_add(d_out, states[lane]);
                    states[lane] = decay * keys[lane].mul_add(-d_value, state);
                }
            }
            future[columns.at(token)].copy_from_slice(&sums[..columns.count]);
        }
    }
}

multiversion! {
    /// The sum of products.
    pub(super) fn dot(left: &[f32], right: &[f32]) -> f32 {
        crate::device::cpu::simd::lane_sum((left, right, left), |x, y, _, sum| x.mul_add(y, sum))
    }
}
