//! From logits to the next token.

use pmetal_engine::ops::{SEEN, SampleOptions, choose};

use crate::error::{Error, Result};

/// How the next token is chosen. The order is: repetition, presence and frequency penalties; temperature;
/// top-k; top-p; min-p; then one draw. A temperature of zero takes the most likely token after the penalties.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// Divisor of the logits; 0 = greedy.
    pub temperature: f64,
    /// Keep this many most likely tokens; 0 = all.
    pub top_k: usize,
    /// Keep the smallest set of most likely tokens whose probabilities reach this sum; 1 = all.
    pub top_p: f64,
    /// Drop tokens less likely than this times the most likely one; 0 = none.
    pub min_p: f64,
    /// Divides positive and multiplies negative logits of tokens seen before (Keskar et al., arXiv 1909.05858);
    /// prompt included; 1 = off.
    pub repetition_penalty: f64,
    /// Subtracted once from the logit of each token generated before.
    pub presence_penalty: f64,
    /// Subtracted for each time that a token was generated before.
    pub frequency_penalty: f64,
    /// Keys the draws: equal seeds give equal texts.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            seed: 0,
        }
    }
}

impl Sampling {
    /// Checks every number's range.
    ///
    /// # Errors
    /// [`Error::Usage`] naming the first one outside its range.
    pub fn check(&self) -> Result<()> {
        let ranges = [
            ("temperature", self.temperature, 0.0, 100.0),
            ("top-p", self.top_p, 0.0, 1.0),
            ("min-p", self.min_p, 0.0, 1.0),
            ("repetition penalty", self.repetition_penalty, 0.01, 100.0),
            ("presence penalty", self.presence_penalty, -100.0, 100.0),
            ("frequency penalty", self.frequency_penalty, -100.0, 100.0),
        ];
        for (name, value, low, high) in ranges {
            if !(low..=high).contains(&value) {
                return Err(Error::Usage(format!("{name} is {value}, it must be from {low} to {high}")));
            }
        }
        Ok(())
    }

    /// Chooses the next token; `history` is prompt and text so far, of which the last `generated` were generated. The
    /// rules are those of [`choose`], by which devices with memory of their own choose as well.
    ///
    /// # Errors
    /// [`Error::Diverged`] when a logit is not a number or none is finite.
    pub fn choose(&self, logits: &[f32], history: &[u32], generated: usize) -> Result<u32> {
        let options = self.options();
        let counts = options.has_penalties().then(|| counts_of(logits.len(), history, generated));
        choose(logits, counts.as_deref(), generated as u32, &options).ok_or_else(|| not_finite(history.len()))
    }

    /// The same for devices.
    pub fn options(&self) -> SampleOptions {
        SampleOptions {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            presence_penalty: self.presence_penalty,
            frequency_penalty: self.frequency_penalty,
            seed: self.seed,
        }
    }
}

/// Why there is no next token.
pub(super) fn not_finite(tokens: usize) -> Error {
    Error::Diverged(format!("the logits of token {tokens} are not finite"))
}

/// Which tokens are in a text, and how often each was generated.
pub(super) fn counts_of(vocabulary: usize, history: &[u32], generated: usize) -> Vec<u32> {
    let mut counts = vec![0; vocabulary];
    let prompt = history.len().saturating_sub(generated);
    for (index, &token) in history.iter().enumerate() {
        if let Some(count) = counts.get_mut(token as usize) {
            *count = (*count + u32::from(index >= prompt)) | SEEN;
        }
    }
    counts
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frequencies(sampling: &Sampling, logits: &[f32], draws: u64) -> Vec<f64> {
        let mut counts = vec![0.0; logits.len()];
        for seed in 0..draws {
            let sampling = Sampling { seed, ..sampling.clone() };
            counts[sampling.choose(logits, &[], 0).unwrap() as usize] += 1.0 / draws as f64;
        }
        counts
    }

    fn close(actual: &[f64], expected: &[f64]) {
        for (index, (a, b)) in actual.iter().zip(expected).enumerate() {
            assert!((a - b).abs() < 0.006, "token {index}: {actual:?} against {expected:?}");
        }
    }

    const LN_2: f32 = std::f32::consts::LN_2;
    /// Weights 1, 1/2, 1/4, 1/8.
    const LOGITS: [f32; 4] = [0.0, -LN_2, -2.0 * LN_2, -3.0 * LN_2];

    #[test]
    fn draws_follow_the_softmax() {
        let sampling = Sampling { temperature: 1.0, ..Sampling::default() };
        close(&frequencies(&sampling, &LOGITS, 100_000), &[8.0 / 15.0, 4.0 / 15.0, 2.0 / 15.0, 1.0 / 15.0]);
    }

    #[test]
    fn temperature_sharpens_before_anything_is_cut() {
        let sampling = Sampling { temperature: 0.5, ..Sampling::default() };
        close(&frequencies(&sampling, &LOGITS, 100_000), &[64.0 / 85.0, 16.0 / 85.0, 4.0 / 85.0, 1.0 / 85.0]);
    }

    #[test]
    fn top_k_keeps_the_most_likely() {
        let sampling = Sampling { temperature: 1.0, top_k: 2, ..Sampling::default() };
        close(&frequencies(&sampling, &LOGITS, 100_000), &[2.0 / 3.0, 1.0 / 3.0, 0.0, 0.0]);
    }

    #[test]
    fn top_p_keeps_the_smallest_set_that_reaches_the_sum() {
        let sampling = Sampling { temperature: 1.0, top_p: 0.6, ..Sampling::default() };
        close(&frequencies(&sampling, &LOGITS, 100_000), &[2.0 / 3.0, 1.0 / 3.0, 0.0, 0.0]);
        let exact = Sampling { temperature: 1.0, top_p: 0.5, ..Sampling::default() };
        close(&frequencies(&exact, &LOGITS, 10_000), &[1.0, 0.0, 0.0, 0.0]);
    }

    #[test]
    fn min_p_is_relative_to_the_most_likely() {
        let sampling = Sampling { temperature: 1.0, min_p: 0.2, ..Sampling::default() };
        close(&frequencies(&sampling, &LOGITS, 100_000), &[4.0 / 7.0, 2.0 / 7.0, 1.0 / 7.0, 0.0]);
    }

    #[test]
    fn penalties_count_what_they_say() {
        let repetition = Sampling { repetition_penalty: 2.0, ..Sampling::default() };
        assert_eq!(repetition.choose(&[3.0, 2.0, -1.0], &[0, 0], 0).unwrap(), 1);
        let presence = Sampling { presence_penalty: 1.5, ..Sampling::default() };
        assert_eq!(presence.choose(&[3.0, 2.0], &[0], 0).unwrap(), 0, "the prompt does not count");
        assert_eq!(presence.choose(&[3.0, 2.0], &[0], 1).unwrap(), 1);
        let frequency = Sampling { frequency_penalty: 0.6, ..Sampling::default() };
        assert_eq!(frequency.choose(&[3.0, 2.0], &[0], 1).unwrap(), 0);
        assert_eq!(frequency.choose(&[3.0, 2.0], &[0, 0], 2).unwrap(), 1);
    }

    #[test]
    fn equal_seeds_give_equal_draws_and_the_draw_moves_with_the_text() {
        let sampling = Sampling { temperature: 1.0, seed: 7, ..Sampling::default() };
        let draw = |position| sampling.choose(&[0.0; 64], &[], position).unwrap();
        let first: Vec<u32> = (0..32).map(draw).collect();
        assert_eq!(first, (0..32).map(draw).collect::<Vec<_>>());
        assert!(first.iter().any(|token| *token != first[0]));
    }

    #[test]
    fn logits_that_are_not_numbers_are_refused() {
        assert!(Sampling::default().choose(&[f32::NAN, 1.0], &[], 0).is_err());
        assert!(Sampling::default().choose(&[f32::NEG_INFINITY; 3], &[], 0).is_err());
    }
}
