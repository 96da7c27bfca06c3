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
    /// with full recomputation one residual input per layer, or of three layers where they wait in the host's memory,
    /// and the insides of one. To these comes the larger of two that never meet: the logits of one chunk with the hidden
    /// states that enter and leave it, or the gradients of the widest layer while it is passed.
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
        let inputs = if step.offloads { self.layers.len().min(3) } else { self.layers.len() };
        let kept: usize = match step.recompute {
            Recompute::Full => inputs * self.width + widest,
            Recompute::None | Recompute::Cheap => self.layers.iter().map(layer).sum(),
        };
        let inner = self.layers.iter().map(|layer| layer.feed_forward.width).max().unwrap_or(0);
        let passing = step.tokens * (3 * self.width + 2 * inner) * step.element_bytes;
        let chunk_rows = pmetal_engine::ops::logit_chunk_rows(step.on_host, self.vocabulary).min(step.tokens);
        let row = 4 * self.vocabulary + 2 * self.width * step.element_bytes;
        let loss = chunk_rows * row + step.tokens * self.width * step.element_bytes;
        step.tokens * kept * step.element_bytes + passing.max(loss)
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
