//! Choosing the next token of a text, by rules that every device follows to the bit.
//!
//! A token's score is its logit after the penalties, in f32. Its distance from the best score is `(best - score) * f` with
//! `f = log2(e) / temperature`, cut to multiples of 2^-24, and the largest number from 2^8 on. Its weight is 2^(38 -
//! distance), by integers, so that sums of weights have no order. Token i has the place (i / 8 mod 1024, i / 8192, i mod 8):
//! threads that take eight neighbours in turn go through places in order. Tokens are ordered by distance, then by place.
//! top-k keeps the first of them; top-p the fewest first ones whose weights reach its share of what top-k kept; min-p
//! those that weigh enough. One 32-bit word of the key, as a share of the weights that are kept, points at a token in the
//! order of places.

use crate::random::{RandomKey, stream_of};

/// Marks a token that is in the text in the counts of [`choose`]; the other bits count how often it was generated.
pub const SEEN: u32 = 1 << 31;

/// How the next token is chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SampleOptions {
    /// Divisor of the scores; 0 takes the best, of equals the first.
    pub temperature: f64,
    /// Keep this many tokens; 0 = all.
    pub top_k: usize,
    /// Keep the fewest tokens that have this share; 1 = all.
    pub top_p: f64,
    /// Drop tokens that weigh less than this times the best; 0 = none.
    pub min_p: f64,
    /// Divides positive and multiplies other logits of tokens in the text.
    pub repetition_penalty: f64,
    /// Subtracted once from the logits of generated tokens.
    pub presence_penalty: f64,
    /// Subtracted for each time that a token was generated.
    pub frequency_penalty: f64,
    /// Keys the draws.
    pub seed: u64,
}

/// [`SampleOptions`] as the devices compute with them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct SampleConstants {
    pub(crate) is_greedy: bool,
    pub(crate) factor: f32,
    /// Within the vocabulary, or 0.
    pub(crate) top_k: u32,
    /// In 2^-32; 2^32 = all.
    pub(crate) top_p: u64,
    pub(crate) least_weight: u64,
    pub(crate) penalties: [f32; 3],
    pub(crate) key: RandomKey,
}

impl SampleOptions {
    /// Whether choosing reads the counts of tokens.
    pub fn has_penalties(&self) -> bool {
        self.repetition_penalty != 1.0 || self.presence_penalty != 0.0 || self.frequency_penalty != 0.0
    }

    pub(crate) fn constants(&self, vocabulary: usize) -> SampleConstants {
        let is_cut = (1..vocabulary).contains(&self.top_k);
        SampleConstants {
            is_greedy: self.temperature == 0.0,
            // Finite, so that the best score has distance zero.
            factor: (std::f64::consts::LOG2_E / self.temperature).min(1e30) as f32,
            top_k: if is_cut { self.top_k as u32 } else { 0 },
            top_p: (self.top_p.clamp(0.0, 1.0) * 2_f64.powi(32)).round() as u64,
            least_weight: (self.min_p.clamp(0.0, 1.0) * WEIGHT_OF_BEST as f64).ceil() as u64,
            penalties: [self.repetition_penalty, self.presence_penalty, self.frequency_penalty]
                .map(|penalty| penalty as f32),
            key: RandomKey { seed: self.seed, step: 0, stream: stream_of("sampler") },
        }
    }
}

const WEIGHT_OF_BEST: u64 = 1 << 38;

fn distance_of(score: f32, best: f32, factor: f32) -> u32 {
    let distance = (best - score) * factor;
    if distance < 255.999_98 { (distance * 16_777_216.0) as u32 } else { u32::MAX }
}

fn weight_of(distance: u32) -> u64 {
    /// ln(2)^k / k! in 2^-32, from k = 8 down.
    const SERIES: [u32; 8] =
        [5676, 65_510, 661_577, 5_726_720, 41_309_550, 238_388_332, 1_031_764_991, 2_977_044_472];
    let (whole, part) = (distance >> 24, distance << 8);
    if whole > 38 {
        return 0;
    }
    let high = |sum: u32| ((u64::from(part) * u64::from(sum)) >> 32) as u32;
    let sum = SERIES.into_iter().fold(437_u32, |sum, term| term - high(sum));
    (((1 << 32) - u64::from(high(sum))) << 6) >> whole
}

fn share_of(sum: u64, share: u64) -> u64 {
    (sum >> 32) * share + (((sum & 0xffff_ffff) * share) >> 32)
}

/// The next token after `logits`; `drawn` counts the draws of a text, and `counts` says for each token whether and how
/// often it is in the text. `None` where a logit is not a number or none is finite.
pub fn choose(logits: &[f32], counts: Option<&[u32]>, drawn: u32, options: &SampleOptions) -> Option<u32> {
    let constants = options.constants(logits.len());
    let scores = match counts {
        Some(counts) => {
            let pairs = logits.iter().zip(counts);
            pairs.map(|(&logit, &count)| penalised(logit, count, constants.penalties)).collect()
        }
        None => logits.to_vec(),
    };
    if scores.iter().any(|score| score.is_nan()) {
        return None;
    }
    let better = |best: (usize, f32), (token, &score)| if score > best.1 { (token, score) } else { best };
    let (token, best) = scores.iter().enumerate().fold((0, f32::NEG_INFINITY), better);
    if !best.is_finite() {
        return None;
    }
    if constants.is_greedy {
        return Some(token as u32);
    }
    let distances: Vec<u32> =
        scores.iter().map(|&score| distance_of(score, best, constants.factor)).collect();
    Some(draw(&distances, drawn, &constants))
}

fn penalised(logit: f32, count: u32, [repetition, presence, frequency]: [f32; 3]) -> f32 {
    let mut score = logit;
    if count > 0 {
        score = if score > 0.0 { score / repetition } else { score * repetition };
    }
    let generated = count & !SEEN;
    if generated > 0 {
        score -= presence;
    }
    if frequency != 0.0 {
        (0..generated).for_each(|_| score -= frequency);
    }
    score
}

/// Threads that share the tokens.
const THREADS: usize = 1024;

/// Tokens by their places.
fn in_order(vocabulary: usize) -> impl Iterator<Item = usize> + Clone {
    let vectors = move |thread: usize| (8 * thread..vocabulary).step_by(8 * THREADS);
    (0..THREADS).flat_map(vectors).flat_map(move |first| first..vocabulary.min(first + 8))
}

/// A number by which tokens are ordered.
fn rank(place: usize, distance: u32) -> u64 {
    u64::from(distance) << 32 | place as u64
}

fn draw(distances: &[u32], drawn: u32, constants: &SampleConstants) -> u32 {
    let mut last = u64::MAX;
    if constants.top_k > 0 || constants.top_p < 1 << 32 {
        let each = in_order(distances.len()).enumerate();
        let mut ranks: Vec<u64> = each.map(|(place, token)| rank(place, distances[token])).collect();
        if constants.top_k > 0 {
            let count = constants.top_k as usize;
            ranks.select_nth_unstable(count - 1);
            ranks.truncate(count);
        }
        ranks.sort_unstable();
        let weight = |rank: u64| weight_of((rank >> 32) as u32);
        if constants.top_p < 1 << 32 {
            let total = ranks.iter().map(|&rank| weight(rank)).sum();
            let need = share_of(total, constants.top_p).max(1);
            let mut sum = 0;
            let reached = ranks.iter().position(|&rank| {
                sum += weight(rank);
                sum >= need
            });
            ranks.truncate(reached.map_or(ranks.len(), |index| index + 1));
        }
        last = ranks.last().copied().unwrap_or(last);
    }
    let left = |(place, token): (usize, usize)| {
        let distance = distances[token];
        let weight = if rank(place, distance) <= last { weight_of(distance) } else { 0 };
        (token as u32, if weight >= constants.least_weight { weight } else { 0 })
    };
    let each = || in_order(distances.len()).enumerate().map(left);
    let total = each().map(|(_, weight)| weight).sum();
    let target = share_of(total, constants.key.block(drawn.into())[0].into());
    let mut sum = 0;
    let mut pointed = each().skip_while(|(_, weight)| {
        sum += weight;
        sum <= target
    });
    pointed.next().map_or(0, |(token, _)| token)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_are_powers_of_two() {
        for distance in (0..40 << 24).step_by(99_991) {
            let exact = 2_f64.powf(38.0 - f64::from(distance) / f64::from(1 << 24));
            let weight = weight_of(distance) as f64;
            assert!((weight - exact).abs() <= 1.0 + exact * 2e-8, "{distance}: {weight}, not {exact}");
        }
        assert_eq!([0, 1 << 24, u32::MAX].map(weight_of), [1 << 38, 1 << 37, 0]);
        assert!(
            (0..1 << 24).step_by(997).is_sorted_by_key(|distance| std::cmp::Reverse(weight_of(distance)))
        );
    }

    #[test]
    fn shares_of_large_sums_are_exact() {
        for (sum, share) in [(0, 5), (1 << 57, 1 << 31), ((1 << 57) + 12_345, 3_999_999_999), (7, 1 << 32)] {
            assert_eq!(u128::from(share_of(sum, share)), (u128::from(sum) * u128::from(share)) >> 32);
        }
    }
}
