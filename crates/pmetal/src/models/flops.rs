//! The arithmetic that a step of training cannot do without.

use super::loader::{Need, needs};
use super::spec::{FeedForwardSpec, LatentSpec, LayerSpec, Projection, Spec};

/// Matrix products of the delta rule in a token and head: what is read from the state twice, and what is written to it.
const DELTA_PRODUCTS: usize = 3;

impl Spec {
    /// Floating-point operations of a forward and backward pass over documents of these lengths, a multiplication and an
    /// addition counted as two.
    ///
    /// Counted are products with weights that a token meets (forward, the gradient of the input and, where all weights are
    /// trained, that of the weight), attention between queries and the keys that they see (forward, and two and a half times
    /// that backward, with the scores that are computed again), the delta rule and the choice of keys, which has no backward
    /// pass and is made where a document has more keys than are chosen. Adapters, norms, activations and recomputed layers are
    /// not: what is slower for them has a smaller share of what a device can do.
    pub fn step_flops(&self, lengths: &[usize], trains_weights: bool) -> f64 {
        let tokens: usize = lengths.iter().sum();
        let passes = if trains_weights { 3 } else { 2 };
        let products = 2.0 * passes as f64 * tokens as f64 * self.active_weights() as f64;
        let layer = |layer: &LayerSpec| -> f64 {
            lengths.iter().map(|&length| mixing(layer, length)).sum::<f64>() + self.choice(layer, lengths)
        };
        products + self.layers.iter().map(layer).sum::<f64>()
    }

    /// The choice of keys in one layer: projections of all tokens if one document needs a choice, and scores of queries that see
    /// more keys than are chosen.
    fn choice(&self, layer: &LayerSpec, lengths: &[usize]) -> f64 {
        let Projection::Latent(LatentSpec { query_rank: Some(rank), indexer: Some(indexer), .. }) =
            layer.attention.projection
        else {
            return 0.0;
        };
        if lengths.iter().all(|&length| length <= indexer.count) {
            return 0.0;
        }
        let columns = indexer.heads * indexer.width;
        let weights = columns * rank + (indexer.width + indexer.heads) * self.width;
        let seen = lengths.iter().flat_map(|&length| seen_keys(layer, length));
        let scored: usize = seen.filter(|&keys| keys > indexer.count).sum();
        2.0 * (lengths.iter().sum::<usize>() * weights + scored * columns) as f64
    }

    /// Elements of the matrices that a token is multiplied by, forward and backward.
    fn active_weights(&self) -> u128 {
        let is_matrix = |need: &&Need| {
            need.shape.len() == 2 && !need.name.contains("norm") && !need.name.contains(".indexer.")
        };
        let needs = needs(self);
        let all: u128 = needs.iter().filter(is_matrix).map(Need::elements).sum();
        // Rows of the embedding are looked up; where it is the head too, they are multiplied by once.
        let embedding = if self.tied_head { 0 } else { elements(&[self.vocabulary, self.width]) };
        let experts = self.layers.iter().map(|layer| match &layer.feed_forward {
            FeedForwardSpec::Dense(_) => 0,
            FeedForwardSpec::Experts(part) => elements(&[part.router.choices, 3, part.width, self.width]),
        });
        all - embedding + experts.sum::<u128>()
    }
}

fn elements(shape: &[usize]) -> u128 {
    shape.iter().map(|&size| size as u128).product()
}

/// What passes between the tokens of a document in one layer, forward and backward.
fn mixing(layer: &LayerSpec, length: usize) -> f64 {
    if let Some(delta) = &layer.delta {
        let state = delta.value_heads * delta.key_width * delta.value_width;
        // Backward each product has two.
        return 3.0 * 2.0 * (DELTA_PRODUCTS * length * state) as f64;
    }
    let attention = &layer.attention;
    let most = attention.indexer().map_or(usize::MAX, |indexer| indexer.count);
    let pairs: usize = seen_keys(layer, length).map(|keys| keys.min(most)).sum();
    let widths = attention.query_heads * (attention.head_width + attention.value_width);
    3.5 * 2.0 * (pairs * widths) as f64
}

/// The keys that each query of a document sees.
fn seen_keys(layer: &LayerSpec, length: usize) -> impl Iterator<Item = usize> {
    let mask = layer.attention.mask;
    (0..length).map(move |position| position + 1 - mask.first_key(position))
}

#[cfg(test)]
mod tests {
    use super::Projection;
    use crate::models::{Config, Spec, families};

    fn spec(path: &str) -> Spec {
        let text = std::fs::read_to_string(format!("{}/../../{path}", env!("CARGO_MANIFEST_DIR"))).unwrap();
        families::read(&Config::new(serde_json::from_str(&text).unwrap()).unwrap()).unwrap()
    }

    #[test]
    fn a_dense_model_is_counted_as_by_hand() {
        let spec = spec("bench/gpu_sft/llama-3.1-8b.json");
        let (rows, tokens) = (2.0, 2048.0);
        let layer = 4096.0 * (2.0 * 4096.0 + 2.0 * 1024.0) + 3.0 * 4096.0 * 14336.0;
        let weights = 32.0 * layer + 128256.0 * 4096.0;
        let pairs = tokens * (tokens + 1.0) / 2.0;
        let attention = 32.0 * rows * 3.5 * 2.0 * pairs * 32.0 * (128.0 + 128.0);
        for (trains_weights, passes) in [(false, 2.0), (true, 3.0)] {
            let expected = 2.0 * passes * rows * tokens * weights + attention;
            let counted = spec.step_flops(&[2048, 2048], trains_weights);
            assert!((counted / expected - 1.0).abs() < 1e-12, "{counted:e} and {expected:e}");
        }
    }

    #[test]
    fn experts_and_windows_count_as_far_as_they_are_met() {
        // Both layers have experts of 24 columns for inputs of 32; more choices are more products.
        let mut mixtral = spec("fixtures/mixtral-window/config.json");
        let few = mixtral.step_flops(&[32], false);
        let mut added = 0.0;
        for layer in &mut mixtral.layers {
            if let super::FeedForwardSpec::Experts(part) = &mut layer.feed_forward {
                part.router.choices += 1;
                added += (4 * 32 * 3 * part.width * mixtral.width) as f64;
            }
        }
        assert!(added > 0.0);
        assert_eq!(mixtral.step_flops(&[32], false) - few, added);
        // With a window, a document of twice the tokens is less than twice the pairs and one more window.
        let windowed = |length| mixtral.layers.iter().map(|layer| super::mixing(layer, length)).sum::<f64>();
        let window = mixtral.layers[0].attention.mask.window.unwrap();
        let step = windowed(3 * window) - windowed(2 * window);
        assert_eq!(windowed(9 * window) - windowed(8 * window), step);
    }

    #[test]
    fn a_choice_of_keys_is_counted_forward_alone_and_where_it_is_made() {
        let chosen = spec("fixtures/deepseek-v32/config.json");
        let mut all = chosen.clone();
        for layer in &mut all.layers {
            if let Projection::Latent(latent) = &mut layer.attention.projection {
                latent.indexer = None;
            }
        }
        // Both layers choose 6 keys by 4 heads of 12, from latent vectors of 14 and inputs of 24: a token has
        // 4 12 14 + 12 24 + 4 24 = 1056 products with weights, a scored pair 4 12 = 48. Two heads of 14 + 9 attend: a pair that
        // is looked at counts 2 3.5 2 23 = 322.
        for (lengths, tokens, scored, unseen) in [
            (&[6][..], 0.0, 0.0, 0.0),
            (&[6, 3], 0.0, 0.0, 0.0),
            // Queries 6 and 7 of a document of 8 see 7 and 8 keys, and look at 6 of them.
            (&[8], 8.0, 15.0, 3.0),
            (&[8, 6], 14.0, 15.0, 3.0),
            (&[8, 7], 15.0, 22.0, 4.0),
        ] {
            let expected = 2.0 * (2.0 * tokens * 1056.0 + 2.0 * scored * 48.0 - unseen * 322.0);
            for trains_weights in [false, true] {
                let [with, without] = [&chosen, &all].map(|spec| spec.step_flops(lengths, trains_weights));
                assert_eq!(with - without, expected, "{lengths:?}, {trains_weights}");
            }
        }
    }

    #[test]
    fn every_fixture_has_arithmetic_that_grows_with_its_tokens() {
        let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures");
        for entry in std::fs::read_dir(root).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            let spec = spec(&format!("fixtures/{name}/config.json"));
            let [one, two] = [&[20][..], &[20, 20]].map(|lengths| spec.step_flops(lengths, false));
            assert!(one > 0.0 && two == 2.0 * one, "{name}");
        }
    }
}
