//! What distinguishes one decoder from another, as a value.

use pmetal_engine::Recompute;
use pmetal_engine::device::MaskKind;
use pmetal_engine::device::{GateActivation, NormWeight};
use pmetal_engine::ops::{PairedGate, Router, Weighting};

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
    /// Added to the mean square, or the variance, in every norm.
    pub norm_epsilon: f32,
    /// What every norm with a weight computes.
    pub norm: NormKind,
    /// Factor on embeddings.
    pub embedding_scale: f32,
    /// Factor on what attention and feed-forward add to the residual stream.
    pub residual_scale: f32,
    /// Factor on logits.
    pub logit_scale: f32,
    /// Logits become `cap * tanh(logits / cap)`, after their factor.
    pub logit_softcap: Option<f32>,
    /// Rotary embeddings; layers refer to them by index.
    pub ropes: Vec<Rope>,
    /// One entry per layer.
    pub layers: Vec<LayerSpec>,
    /// Whether the output head is the embedding.
    pub tied_head: bool,
    /// Layers after the last that predict further tokens; checkpoints may hold them, and they are passed over.
    pub further_layers: usize,
}

/// What a norm computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormKind {
    /// RMSNorm with a weight.
    Rms(NormWeight),
    /// LayerNorm with a weight and no bias.
    Layer,
}

/// One decoder layer.
#[derive(Debug, Clone)]
pub struct LayerSpec {
    /// Its attention.
    pub attention: AttentionSpec,
    /// The gated delta rule, in place of attention.
    pub delta: Option<DeltaSpec>,
    /// Its feed-forward part.
    pub feed_forward: FeedForwardSpec,
    /// Its norms.
    pub norms: LayerNorms,
}

impl LayerSpec {
    /// Columns that attention, or what is in its place, keeps.
    fn mixed_columns(&self) -> usize {
        let Some(delta) = &self.delta else { return self.attention.kept_columns() };
        2 * delta.widths().iter().sum::<usize>() + 3 * delta.value_heads * delta.value_width
    }
}

/// Where a layer has norms over D, by the names that checkpoints have for them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerNorms {
    /// What attention reads.
    pub before_attention: Option<&'static str>,
    /// What attention adds to the residual stream.
    pub after_attention: Option<&'static str>,
    /// What the feed-forward part reads.
    pub before_feed_forward: Option<&'static str>,
    /// What the feed-forward part adds to the residual stream.
    pub after_feed_forward: Option<&'static str>,
    /// Whether the feed-forward part reads what attention reads, and both are added at once.
    pub parallel: bool,
}

impl LayerNorms {
    /// Before attention and before the feed-forward part.
    pub const BEFORE: Self = Self {
        before_attention: Some("input_layernorm"),
        after_attention: None,
        before_feed_forward: Some("post_attention_layernorm"),
        after_feed_forward: None,
        parallel: false,
    };
}

/// Grouped-query attention.
#[derive(Debug, Clone)]
pub struct AttentionSpec {
    /// H.
    pub query_heads: usize,
    /// K; divides H.
    pub key_value_heads: usize,
    /// E of queries and keys.
    pub head_width: usize,
    /// E of values.
    pub value_width: usize,
    /// How queries, keys and values come from the input.
    pub projection: Projection,
    /// Whether the layers that read the input have biases.
    pub input_bias: bool,
    /// Whether the output projection has a bias.
    pub output_bias: bool,
    /// The norm that q and k go through.
    pub head_norm: HeadNorm,
    /// Factor on the scores.
    pub scale: f32,
    /// Scores become `cap * tanh(scores / cap)`.
    pub softcap: Option<f32>,
    /// Whether queries come with a gate of the result, head by head.
    pub output_gate: bool,
    /// Whether each head has a score of its own that nothing belongs to.
    pub sinks: bool,
    /// Which keys a query sees.
    pub mask: MaskKind,
    /// Index into [`Spec::ropes`] for queries and keys; `None` for no rotation.
    pub rope: Option<usize>,
    /// Index into [`Spec::ropes`] of a factor on queries by position.
    pub temperature: Option<usize>,
}

impl AttentionSpec {
    /// Columns of queries, keys, values and the result, and of what they are made from.
    fn kept_columns(&self) -> usize {
        let heads = self.query_heads + self.key_value_heads;
        let latent = match self.projection {
            Projection::Apart | Projection::Fused => 0,
            Projection::Latent(latent) => 2 * (latent.query_rank.unwrap_or(0) + latent.key_value_rank),
        };
        heads * (self.head_width + self.value_width) + latent
    }
}

/// Linear attention by the gated delta rule (Yang, Kautz and Hatamizadeh, arXiv 2412.06464).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeltaSpec {
    /// G: heads of queries and keys.
    pub key_heads: usize,
    /// H: heads of values; a multiple of G.
    pub value_heads: usize,
    /// Width of a head of queries and keys.
    pub key_width: usize,
    /// Width of a head of values.
    pub value_width: usize,
    /// Tokens that the convolution before it sees.
    pub taps: usize,
    /// Whether projections are two, with the rows of each key head together.
    pub grouped: bool,
}

impl DeltaSpec {
    /// Columns of queries, of keys and of values.
    pub fn widths(&self) -> [usize; 3] {
        let keys = self.key_heads * self.key_width;
        [keys, keys, self.value_heads * self.value_width]
    }
}

/// How queries, keys and values come from the input.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Projection {
    /// By a linear layer each.
    Apart,
    /// By one linear layer, `qkv_proj`.
    Fused,
    /// Through narrow latent vectors (DeepSeek-V2, arXiv 2405.04434).
    Latent(LatentSpec),
}

/// Multi-head latent attention. The first part of a head of queries and keys knows no positions, the rest is rotated; of
/// keys all heads share the rotated part.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LatentSpec {
    /// Width of what queries are made from; `None` where they are made from the input.
    pub query_rank: Option<usize>,
    /// Width of what keys and values are made from.
    pub key_value_rank: usize,
    /// Elements of a head that are rotated.
    pub rotated_width: usize,
    /// Epsilon of the norms of both.
    pub norm_epsilon: f32,
    /// What chooses the keys that a query looks at; all that it sees where there is none.
    pub indexer: Option<IndexerSpec>,
}

/// A choice of keys by heads of its own, which is never trained (DeepSeek-V3.2): queries from the latent vector of queries,
/// keys of one head from the input. The first part of a head, as wide as the layer's own, is rotated.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct IndexerSpec {
    /// Heads of queries.
    pub heads: usize,
    /// Elements of a head.
    pub width: usize,
    /// Keys that a query looks at.
    pub count: usize,
    /// Epsilon of the norm of keys.
    pub norm_epsilon: f32,
}

/// The norm that queries and keys go through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HeadNorm {
    /// None.
    None,
    /// The model's norm over E, before the rotation, with one weight \[E\] for all heads.
    Shared,
    /// The model's norm over E, before the rotation, with weights \[H, E\].
    Each,
    /// The model's norm over H * E, before the rotation.
    Joint,
    /// RMSNorm over E without a weight, after the rotation.
    Rotated,
}

/// What follows attention in a layer.
#[derive(Debug, Clone)]
pub enum FeedForwardSpec {
    /// One gated layer for all tokens.
    Dense(DenseSpec),
    /// Some of many for each token.
    Experts(Box<ExpertsSpec>),
}

/// A gated feed-forward layer.
#[derive(Debug, Clone)]
pub struct DenseSpec {
    /// Its module in checkpoints.
    pub path: &'static str,
    /// F.
    pub width: usize,
    /// Applied to the gate.
    pub activation: GateActivation,
    /// Whether gate and up are one linear layer, `gate_up_proj`.
    pub fused: bool,
    /// Whether its projections have biases.
    pub bias: bool,
}

/// A mixture of experts.
#[derive(Debug, Clone)]
pub struct ExpertsSpec {
    /// The module in checkpoints that holds them.
    pub path: &'static str,
    /// The module of the layer that scores them.
    pub router_path: &'static str,
    /// X.
    pub count: usize,
    /// F of each.
    pub width: usize,
    /// What is between their two products.
    pub gate: PairedGate,
    /// How a token's experts are chosen and weighed.
    pub router: Router,
    /// Whether scores have biases.
    pub router_bias: bool,
    /// Whether scores are computed in f32 whatever the activations are.
    pub wide_router: bool,
    /// Whether the checkpoint corrects scores for the choice alone.
    pub correction: bool,
    /// Where the weights of the choice are applied.
    pub weighting: Weighting,
    /// Whether matrices are stored as \[X, D, N\].
    pub transposed: bool,
    /// Whether PEFT takes the results of its matrices for inputs, and the other way round.
    pub swapped_adapters: bool,
    /// Whether experts have biases.
    pub bias: bool,
    /// What every token goes through besides.
    pub shared: Option<SharedSpec>,
    /// Factor on the loss that balances the load, where the configuration asks for one.
    pub balance: Option<f32>,
}

/// The loss that balances the load of all experts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BalanceSpec {
    /// X.
    pub experts: usize,
    /// Its factor in the loss that is trained.
    pub coefficient: f32,
}

/// An expert for all tokens.
#[derive(Debug, Clone)]
pub struct SharedSpec {
    /// Its layer.
    pub dense: DenseSpec,
    /// The module whose sigmoid it is multiplied by.
    pub gate: Option<&'static str>,
}

impl FeedForwardSpec {
    /// The dense layer, to be changed; `None` for a mixture of experts.
    pub fn dense_mut(&mut self) -> Option<&mut DenseSpec> {
        match self {
            Self::Dense(dense) => Some(dense),
            Self::Experts(_) => None,
        }
    }

    /// Columns that are computed for each token between the two products: F, or that of all its experts.
    pub fn active_width(&self) -> usize {
        match self {
            Self::Dense(dense) => dense.width,
            Self::Experts(experts) => {
                let shared = experts.shared.as_ref().map_or(0, |shared| shared.dense.width);
                experts.router.choices * experts.width + shared
            }
        }
    }
}

impl Spec {
    /// Every kind of mask that layers have.
    pub fn mask_kinds(&self) -> Vec<MaskKind> {
        let mut kinds = Vec::new();
        for layer in &self.layers {
            if !kinds.contains(&layer.attention.mask) {
                kinds.push(layer.attention.mask);
            }
        }
        kinds
    }

    /// F of the first layer that has no experts; 0 where there is none.
    pub(super) fn inner(&self) -> usize {
        self.first_dense().map_or(0, |dense| dense.width)
    }

    /// The activation of that layer.
    pub(super) fn activation(&self) -> GateActivation {
        self.first_dense().map_or(GateActivation::Silu, |dense| dense.activation)
    }

    fn first_dense(&self) -> Option<&DenseSpec> {
        self.layers.iter().find_map(|layer| match &layer.feed_forward {
            FeedForwardSpec::Dense(dense) => Some(dense),
            FeedForwardSpec::Experts(_) => None,
        })
    }

    /// The loss that balances experts, where the configuration asks for one; it is a part of the loss of training, not of
    /// that of evaluation.
    pub fn balance(&self) -> Option<BalanceSpec> {
        self.layers.iter().find_map(|layer| match &layer.feed_forward {
            FeedForwardSpec::Experts(part) => {
                part.balance.map(|coefficient| BalanceSpec { experts: part.count, coefficient })
            }
            FeedForwardSpec::Dense(_) => None,
        })
    }

    /// Parameters of the model, tied weights counted once.
    pub fn parameter_count(&self) -> u128 {
        let elements = |shape: &[usize]| shape.iter().map(|&size| size as u128).product::<u128>();
        super::loader::needs(self).iter().map(|need| elements(&need.shape)).sum()
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
            // What is normed before it is added is kept as well.
            let after = [layer.norms.after_attention, layer.norms.after_feed_forward];
            let streams = 2 + after.into_iter().flatten().count();
            let own = streams * self.width + layer.mixed_columns() + 2 * layer.feed_forward.active_width();
            let again = match step.recompute {
                Recompute::None => 2 * self.width + layer.feed_forward.active_width(),
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
        let inner = self.layers.iter().map(|layer| layer.feed_forward.active_width()).max().unwrap_or(0);
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
