//! The choice of the keys that queries look at, on the CPU: products of a block of queries with a block of keys at a time.

use std::ops::Range;

use rayon::prelude::*;

use super::simd::multiversion;
use super::{elements, gemm};
use crate::Tensor;
use crate::device::{Arithmetic, AttentionMask};

/// Queries whose scores are held at a time.
const ROWS: usize = 16;
/// Keys that are multiplied at a time.
const COLUMNS: usize = 1024;

multiversion! {
    /// Adds weight * max(product, 0) to each score.
    fn add_head(products: &[f32], weight: f32, scores: &mut [f32]) {
        for (score, &product) in scores.iter_mut().zip(products) {
            *score = weight.mul_add(product.max(0.0), *score);
        }
    }
}

/// A number whose order is that of scores: both zeros are one, and what is no number is the lowest.
fn ordered(score: f32) -> u32 {
    let score = if score.is_nan() { f32::NEG_INFINITY } else { score };
    // Plus zero where it is minus zero.
    let bits = (score + 0.0).to_bits();
    if bits >> 31 == 0 { bits | 1 << 31 } else { !bits }
}

/// Sets the bits of the best `count` of some keys, the first of equal ones.
fn choose(scores: &[f32], first_key: usize, count: usize, words: &mut [u32]) {
    let mut set = |index: usize| words[(first_key + index) / 32] |= 1 << ((first_key + index) % 32);
    if scores.len() <= count {
        return (0..scores.len()).for_each(set);
    }
    let rank = |(index, &score): (usize, &f32)| u64::from(ordered(score)) << 32 | u64::from(!(index as u32));
    let mut ranks: Vec<u64> = scores.iter().enumerate().map(rank).collect();
    ranks.select_nth_unstable_by(count - 1, |a, b| b.cmp(a));
    ranks[..count].iter().for_each(|&rank| set(!(rank as u32) as usize));
}

/// See [`crate::device::Kernels::choose_keys`].
pub(super) fn choose_keys(mask: &AttentionMask, inputs: [&Tensor; 3], count: usize, bits: &mut Tensor) {
    let words = bits.columns();
    let bits = bits.as_mut_slice::<u32>();
    bits.fill(0);
    for segment in mask.segments() {
        for first in (0..segment.query_length).step_by(ROWS) {
            let queries = first..segment.query_length.min(first + ROWS);
            let visible: Vec<_> = queries.clone().map(|query| segment.visible(mask.kind, query)).collect();
            // Both ends grow with the query.
            let seen = visible[0].start..visible[visible.len() - 1].end;
            let tokens = segment.query_start + queries.start..segment.query_start + queries.end;
            let scores = if visible.iter().all(|visible| visible.len() <= count) {
                vec![0.0; queries.len() * seen.len()]
            } else {
                scores(inputs, tokens.clone(), segment.key_start + seen.start..segment.key_start + seen.end)
            };
            let rows = bits[tokens.start * words..tokens.end * words].par_chunks_mut(words);
            rows.zip(scores.par_chunks(seen.len().max(1))).zip(visible).for_each(
                |((row, scores), visible)| {
                    let own = &scores[visible.start - seen.start..visible.end - seen.start];
                    choose(own, segment.key_start + visible.start, count, row);
                },
            );
        }
    }
}

/// The scores of some queries with some keys, f32 [queries, keys].
fn scores([q, k, weights]: [&Tensor; 3], queries: Range<usize>, keys: Range<usize>) -> Vec<f32> {
    let [tokens, heads, width] = [q.shape()[0], q.shape()[1], q.shape()[2]];
    let left = gemm::MatrixRef::row_major(elements(q), tokens * heads, width);
    let left = left.part(queries.start * heads..queries.end * heads, 0..width);
    let right = gemm::MatrixRef::row_major(elements(k), k.shape()[0], width);
    let weights = &weights.as_slice::<f32>()[queries.start * heads..queries.end * heads];
    let mut scores = vec![0.0; queries.len() * keys.len()];
    let mut products = vec![0.0; queries.len() * heads * keys.len().min(COLUMNS)];
    for first in keys.clone().step_by(COLUMNS) {
        let block = first..keys.end.min(first + COLUMNS);
        let products = &mut products[..queries.len() * heads * block.len()];
        let product = gemm::Product { left, right: right.part(block.clone(), 0..width).transposed() };
        let out = gemm::MatrixMut::row_major(&mut *products, queries.len() * heads, block.len());
        let arithmetic = Arithmetic::of(q.dtype());
        gemm::gemm(&[product], out, &gemm::Epilogue::default(), arithmetic);
        let columns = block.start - keys.start..block.end - keys.start;
        let by_query = products.par_chunks(heads * block.len()).zip(weights.par_chunks(heads));
        scores.par_chunks_mut(keys.len()).zip(by_query).for_each(|(scores, (products, weights))| {
            for (products, &weight) in products.chunks_exact(block.len()).zip(weights) {
                add_head(products, weight, &mut scores[columns.clone()]);
            }
        });
    }
    scores
}
