//! What distinguishes one decoder from another, as a value.

use pmetal_engine::Recompute;
use pmetal_engine::device::{GateActivation, NormWeight};

use super::rope::Rope;

/// A decoder-only language model: everything that its forward pass and its checkpoint depend on.
#[derive(Debug, Clone)]
pub struct Spec {
    /// The `model_type` that it was made from.
    pub family: &'static str,
    /// V: rows of the embedding.
    pub vocabulary: usize,
    /// Token whose row of the embedding receives no gradient from the input side.
    pub padding_id: Option<u32>,
    /// D: width of the residual stream.
    pub width: usize,
    /// Longest document that the model was made for.
    pub context_length: usize,
    /// Added to the mean square in every RMSNorm.
    pub norm_epsilon: f32,
    /// How RMSNorm uses its weight.
    pub norm_weight: NormWeight,
    /// Rotary embeddings; layers refer to them by index.
    pub ropes: Vec<Rope>,
    /// One entry per layer.
    pub layers: Vec<LayerSpec>,
    /// Whether the output head is the embedding.
    pub tied_head: bool,
}

/// One decoder layer.
#[derive(Debug, Clone)]
pub struct LayerSpec {
    /// Its attention.
    pub attention: AttentionSpec,
    /// Its feed-forward part.
    pub feed_forward: FeedForwardSpec,
}

/// Grouped-query attention.
#[derive(Debug, Clone)]
pub struct AttentionSpec {
    /// H.
    pub query_heads: usize,
    /// K; divides H.
    pub key_value_heads: usize,
    /// E.
    pub head_width: usize,
    /// Whether q, k and v have biases.
    pub input_bias: bool,
    /// Whether the output projection has a bias.
    pub output_bias: bool,
    /// Whether q and k go through an RMSNorm over E before the rotation.
    pub head_norm: bool,
    /// Factor on the scores.
    pub scale: f32,
    /// A query sees itself and this many minus one tokens before it.
    pub window: Option<usize>,
    /// Index into [`Spec::ropes`]; `None` for no rotation.
    pub rope: Option<usize>,
}

/// A gated feed-forward layer.
#[derive(Debug, Clone)]
pub struct FeedForwardSpec {
    /// F.
    pub width: usize,
    /// Applied to the gate.
    pub activation: GateActivation,
    /// Whether its three projections have biases.
    pub bias: bool,
}

impl Spec {
    /// Parameters of the model, tied weights counted once.
    pub fn parameter_count(&self) -> u128 {
        let linear = |inputs: usize, outputs: usize, bias: bool| {
            inputs as u128 * outputs as u128 + if bias { outputs as u128 } else { 0 }
        };
        let (width, table) = (self.width, self.vocabulary as u128 * self.width as u128);
        let layers: u128 = self
            .layers
            .iter()
            .map(|layer| {
                let (attention, forward) = (&layer.attention, &layer.feed_forward);
                let queries = attention.query_heads * attention.head_width;
                let keys = attention.key_value_heads * attention.head_width;
                linear(width, queries, attention.input_bias)
                    + 2 * linear(width, keys, attention.input_bias)
                    + linear(queries, width, attention.output_bias)
                    + if attention.head_norm { 2 * attention.head_width as u128 } else { 0 }
                    + 2 * linear(width, forward.width, forward.bias)
                    + linear(forward.width, width, forward.bias)
                    + 2 * width as u128
            })
            .sum();
        layers + width as u128 + if self.tied_head { table } else { 2 * table }
    }

    /// Estimate of the activations that a training step over `tokens` tokens holds at its peak.
    ///
    /// Counted per layer and token are two residual inputs, q, k, v, the attention's output, gate, up and what the
    /// adapters keep (the sum of their ranks in a layer); without any recomputation also two norms and the gated product;
    /// with full recomputation one residual input per layer, or of two layers where the others wait in the host's memory,
    /// and the insides of one while it is passed. To these comes the larger of two that never meet: the logits of one chunk
    /// with the hidden states that enter and leave it, or the gradients of the widest layer while it is passed (the middle of
    /// its feed-forward part three times on a CPU, once on other devices, which turn gate and up into their gradients).
    pub fn activation_bytes(&self, step: &StepShape) -> usize {
        let layer = |layer: &LayerSpec| {
            let heads = 2 * layer.attention.query_heads + 2 * layer.attention.key_value_heads;
            let own = 2 * self.width + heads * layer.attention.head_width + 2 * layer.feed_forward.width;
            let again = match step.recompute {
                Recompute::None => 2 * self.width + layer.feed_forward.width,
                Recompute::Cheap | Recompute::Full => 0,
            };
            own + again + step.adapter_ranks
        };
        let widest = self.layers.iter().map(layer).max().unwrap_or(0);
        let inputs = if step.offloads { self.layers.len().min(2) } else { self.layers.len() };
        let bytes = |per_token: usize| step.tokens * per_token * step.element_bytes;
        // What is there from the forward to the backward pass, and what comes to it with the layer that is passed.
        let (kept, insides) = match step.recompute {
            Recompute::Full => (bytes(inputs * self.width), bytes(widest.saturating_sub(self.width))),
            Recompute::None | Recompute::Cheap => (bytes(self.layers.iter().map(layer).sum()), 0),
        };
        let inner = self.layers.iter().map(|layer| layer.feed_forward.width).max().unwrap_or(0);
        let passing = if step.on_host { 3 * (self.width + inner) } else { 2 * self.width + inner };
        let chunk_rows = pmetal_engine::ops::logit_chunk_rows(step.on_host, self.vocabulary).min(step.tokens);
        let row = 4 * self.vocabulary + 2 * self.width * step.element_bytes;
        let loss = chunk_rows * row + bytes(self.width);
        kept + (insides + bytes(passing)).max(loss)
    }
}

/// What the memory of a training step depends on besides the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepShape {
    /// Tokens of one forward pass.
    pub tokens: usize,
    /// Size of an activation.
    pub element_bytes: usize,
    /// Sum of the ranks of a layer's adapters.
    pub adapter_ranks: usize,
    /// What of a layer is kept for the backward pass.
    pub recompute: Recompute,
    /// Whether the inputs of layers wait in the host's memory.
    pub offloads: bool,
    /// Whether a CPU computes it.
    pub on_host: bool,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::{Config, families};

    #[test]
    fn the_estimate_is_near_what_was_measured_on_a_gpu() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../bench/gpu_sft");
        // MiB of activations and logits at the peak of a bf16 step over 4 rows of 2048 tokens, adapters of rank 16 on all
        // linear layers: `scripts/gpu-check` on an H200.
        let (none, cheap, full) = (Recompute::None, Recompute::Cheap, Recompute::Full);
        let measured = [
            ("llama-3.2-1b", none, false, 9858.5),
            ("llama-3.2-1b", cheap, false, 6794.5),
            ("llama-3.2-1b", full, false, 1043.5),
            ("llama-3.2-1b", full, true, 595.5),
            ("llama-3.1-8b", full, false, 3012.0),
            ("llama-3.1-8b", full, true, 1092.0),
        ];
        for (name, recompute, offloads, mebibytes) in measured {
            let text = std::fs::read_to_string(format!("{folder}/{name}.json")).unwrap();
            let spec = families::read(&Config::new(serde_json::from_str(&text).unwrap()).unwrap()).unwrap();
            let step = StepShape {
                tokens: 4 * 2048,
                element_bytes: 2,
                adapter_ranks: 7 * 16,
                recompute,
                offloads,
                on_host: false,
            };
            let estimate = spec.activation_bytes(&step) as f64 / (1 << 20) as f64;
            let error = estimate / mebibytes - 1.0;
            println!("{name} {recompute:?} {offloads}: {estimate:.0} MiB, {:.1} %", 100.0 * error);
            assert!(error.abs() <= 0.1, "{name} {recompute:?} {offloads}: {estimate} of {mebibytes} MiB");
        }
    }
}
