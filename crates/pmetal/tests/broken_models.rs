//! What distinguishes the families is noticed when it is taken away: each case below changes the specification of a
//! fixture's model, and the comparison with the reference's numbers must fail.
#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests are tests")]

mod support;

use pmetal::engine::Device;
use pmetal::engine::device::{GateActivation, NormWeight, RopePairing};
use pmetal::engine::ops::{Gate, PairedGate, Weighting};
use pmetal::eval::verify::verify_changed;
use pmetal::models::Spec;
use pmetal::models::spec::{
    AttentionSpec, ExpertsSpec, FeedForwardSpec, HeadNorm, IndexerSpec, NormKind, Projection,
};
use rayon::prelude::*;
use support::fixture;

/// The piece of mathematics, a fixture that has it, and how it is taken away.
type Case = (&'static str, &'static str, fn(&mut Spec));

fn attention(spec: &mut Spec, change: impl Fn(&mut AttentionSpec)) {
    spec.layers.iter_mut().for_each(|layer| change(&mut layer.attention));
}

fn experts(spec: &mut Spec, change: impl Fn(&mut ExpertsSpec)) {
    for layer in &mut spec.layers {
        if let FeedForwardSpec::Experts(part) = &mut layer.feed_forward {
            change(part);
        }
    }
}

fn indexer(spec: &mut Spec, change: impl Fn(IndexerSpec) -> Option<IndexerSpec>) {
    attention(spec, |attention| {
        if let Projection::Latent(latent) = &mut attention.projection {
            latent.indexer = latent.indexer.and_then(&change);
        }
    });
}

fn pairs_as_halves(spec: &mut Spec) {
    spec.ropes.iter_mut().for_each(|rope| rope.pairing = RopePairing::Halves);
}

const CASES: &[Case] = &[
    ("sinks", "gpt-oss", |spec| attention(spec, |a| a.sinks = false)),
    ("the soft cap of scores", "gemma2", |spec| attention(spec, |a| a.softcap = None)),
    ("the soft cap of logits", "gemma2", |spec| spec.logit_softcap = None),
    ("the norm's plus one", "gemma3-text", |spec| spec.norm = NormKind::Rms(NormWeight::Plain)),
    ("norms of queries and keys", "qwen3", |spec| attention(spec, |a| a.head_norm = HeadNorm::None)),
    ("norms of queries and keys, each head its own", "cohere-qk-norm", |spec| {
        attention(spec, |a| a.head_norm = HeadNorm::None);
    }),
    ("norms of queries and keys, all heads together", "olmo2", |spec| {
        attention(spec, |a| a.head_norm = HeadNorm::None);
    }),
    ("norms of queries and keys after the rotation", "llama4-text", |spec| {
        attention(spec, |a| a.head_norm = HeadNorm::None);
    }),
    ("the mean that LayerNorm subtracts", "cohere", |spec| spec.norm = NormKind::Rms(NormWeight::Plain)),
    ("neighbours as pairs", "cohere", pairs_as_halves),
    ("neighbours as pairs of a part of each head", "glm4", pairs_as_halves),
    ("neighbours as pairs of latent attention", "deepseek-v3", pairs_as_halves),
    ("the part of a head that is not rotated", "phi4-mini", |spec| spec.ropes[0].rotated_width = 4),
    ("layers without rotation", "smollm3", |spec| attention(spec, |a| a.rope = Some(0))),
    ("layers without rotation, among windows", "cohere2", |spec| attention(spec, |a| a.rope = Some(0))),
    ("windows", "gemma2", |spec| attention(spec, |a| a.mask.window = None)),
    ("the chunks of the mask", "llama4-text", |spec| attention(spec, |a| a.mask.chunk = None)),
    ("temperature", "llama4-text", |spec| attention(spec, |a| a.temperature = None)),
    ("the second rotation", "gemma3-text", |spec| {
        attention(spec, |a| a.rope = Some(0));
    }),
    ("the factor on embeddings", "granite", |spec| spec.embedding_scale = 1.0),
    ("the factor on residuals", "granite", |spec| spec.residual_scale = 1.0),
    ("the factor on logits", "granite", |spec| spec.logit_scale = 1.0),
    ("the factor on scores", "granite", |spec| attention(spec, |a| a.scale = 1.0)),
    ("the norm after attention", "gemma2", |spec| {
        spec.layers.iter_mut().for_each(|layer| layer.norms.after_attention = None);
    }),
    ("the norm after the feed-forward part", "olmo2", |spec| {
        spec.layers.iter_mut().for_each(|layer| layer.norms.after_feed_forward = None);
    }),
    ("renormalised weights of experts", "mixtral", |spec| experts(spec, |e| e.router.normalise = None)),
    ("renormalised weights of experts, whatever the file says", "qwen3-5-moe-text", |spec| {
        experts(spec, |e| e.router.normalise = None);
    }),
    ("the exact GELU", "gemma2-gelu", |spec| {
        spec.layers.iter_mut().for_each(|layer| {
            let dense = layer.feed_forward.dense_mut().unwrap();
            dense.activation = GateActivation::GeluTanh;
        });
    }),
    ("weights of experts as they are", "qwen2-moe", |spec| experts(spec, |e| e.router.normalise = Some(0.0))),
    ("the softmax after the choice", "granitemoe", |spec| experts(spec, |e| e.router.normalise = None)),
    ("the sigmoid of scores", "deepseek-v3", |spec| experts(spec, |e| e.router.gate = Gate::Softmax)),
    ("the correction of the choice", "deepseek-v3", |spec| experts(spec, |e| e.correction = false)),
    ("groups of experts", "deepseek-v3", |spec| experts(spec, |e| e.router.groups = None)),
    ("the factor on weights of experts", "deepseek-v3", |spec| experts(spec, |e| e.router.scale = 1.0)),
    ("the choice of keys", "deepseek-v32", |spec| indexer(spec, |_| None)),
    ("the number of chosen keys", "deepseek-v32-bias", |spec| {
        indexer(spec, |own| Some(IndexerSpec { count: own.count + 1, ..own }));
    }),
    ("experts whose input is weighted", "llama4-text", |spec| {
        experts(spec, |e| e.weighting = Weighting::Output);
    }),
    ("the shared expert", "llama4-text", |spec| experts(spec, |e| e.shared = None)),
    ("the shared expert whose gate and up are one layer", "granitemoeshared", |spec| {
        experts(spec, |e| e.shared = None);
    }),
    ("the exact GELU of experts", "granitemoeshared-gelu", |spec| {
        experts(spec, |e| e.gate = PairedGate::Halves(GateActivation::GeluTanh));
    }),
    ("the gate of the shared expert", "qwen2-moe", |spec| {
        experts(spec, |e| e.shared.iter_mut().for_each(|shared| shared.gate = None));
    }),
    ("biases of experts", "gpt-oss", |spec| experts(spec, |e| e.bias = false)),
    ("biases of the router", "gpt-oss", |spec| experts(spec, |e| e.router_bias = false)),
    ("limits of the clamped gate", "gpt-oss", |spec| {
        experts(spec, |e| e.gate = PairedGate::Clamped { slope: 1.702, limit: 7.0 });
    }),
];

#[test]
fn every_piece_of_mathematics_is_noticed_when_it_is_gone() {
    let unnoticed: Vec<String> = CASES
        .par_iter()
        .filter_map(|(piece, name, change)| {
            let report = verify_changed(&fixture(name), &Device::cpu(), change)
                .unwrap_or_else(|error| panic!("{name} without {piece}: {error}"));
            let noticed = report.comparisons.iter().any(|c| !c.passed && c.quantity == "logits");
            (!noticed).then(|| format!("{name} does not notice that {piece} is gone"))
        })
        .collect();
    assert!(unnoticed.is_empty(), "{}", unnoticed.join("\n"));
}
