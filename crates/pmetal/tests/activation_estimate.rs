//! The estimate of a step's activations is near what the processor's allocator counts.
#![allow(clippy::unwrap_used)]

use pmetal::engine::{Category, DType, Device, Recompute};
use pmetal::formats::adapter::AdapterConfig;
use pmetal::lora;
use pmetal::models::loader::{self, LoadOptions};
use pmetal::models::{Config, StepShape, TokenRun};
use pmetal::trainer::learner::{Learner, MicroBatch, OptimizerSettings};
use serde_json::{Value, json};

const RANK: usize = 4;

/// Of what was counted, to both sides.
const TOLERANCE: f64 = 0.11;

/// Peak bytes of activations of a step, and the estimate.
fn measured(config: &Value, tokens: usize, recompute: Recompute, train_all: bool) -> (usize, usize) {
    let (device, config) = (Device::cpu(), Config::new(config.clone()).unwrap());
    let options = LoadOptions { dtype: DType::F32, train_all };
    let mut decoder = loader::random(&config, &device, options, 0).unwrap();
    if !train_all {
        let mut adapter = AdapterConfig::all_linear(RANK, 8.0);
        assert!(lora::experts::target(&mut adapter, &decoder));
        lora::attach(&mut decoder, &adapter, 0).unwrap();
    }
    let spec = decoder.spec.clone();
    let adapter_ranks = decoder.adapter_columns().div_ceil(spec.layers.len());
    let settings = OptimizerSettings { recompute, ..OptimizerSettings::default() };
    let mut learner = Learner::new(decoder, settings).unwrap();
    let ids: Vec<u32> = (0..tokens as u32).map(|t| t * 7 % 64).collect();
    let labels = (0..tokens).map(|t| if t + 1 < tokens { ids[t + 1] as i32 } else { -100 }).collect();
    let batch = MicroBatch { run: TokenRun::single(&ids), labels, rows: vec![0] };
    learner.step(0, 1e-3, &[batch]).unwrap();
    let step =
        StepShape { tokens, element_bytes: 4, adapter_ranks, recompute, offloads: false, on_host: true };
    (device.memory().report().peak(Category::Activations), spec.activation_bytes(&step))
}

fn config(model_type: &str, fields: Value) -> Value {
    let mut config = json!({
        "model_type": model_type, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 64, "hidden_act": "silu",
        "max_position_embeddings": 1024, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": true,
    });
    config.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    config
}

/// Latent attention and experts; with a choice of eight keys in the later version.
fn deepseek(model_type: &str) -> Value {
    let mut fields = json!({
        "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "n_shared_experts": 1,
        "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 24, "kv_lora_rank": 16,
        "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16, "num_key_value_heads": 4, "head_dim": 8,
    });
    if model_type == "deepseek_v32" {
        let indexer = json!({ "index_n_heads": 2, "index_head_dim": 16, "index_topk": 8 });
        fields.as_object_mut().unwrap().extend(indexer.as_object().unwrap().clone());
    }
    config(model_type, fields)
}

#[test]
fn the_estimate_is_near_what_the_allocator_counts() {
    let models = [
        config("llama", json!({})),
        config(
            "mixtral",
            json!({ "num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 160 }),
        ),
        config(
            "qwen3_moe",
            json!({ "num_experts": 16, "num_experts_per_tok": 6, "moe_intermediate_size": 24 }),
        ),
        config(
            "qwen2_moe",
            json!({
                "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 40, "shared_expert_intermediate_size": 72,
            }),
        ),
        config(
            "qwen3_next",
            json!({
                "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24,
                "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
                "linear_value_head_dim": 16, "full_attention_interval": 3,
            }),
        ),
        config(
            "gpt_oss",
            json!({ "num_local_experts": 8, "num_experts_per_tok": 2, "num_key_value_heads": 2 }),
        ),
        deepseek("deepseek_v3"),
        deepseek("deepseek_v32"),
    ];
    let mut wrong = Vec::new();
    for model in &models {
        let levels = [Recompute::None, Recompute::Cheap, Recompute::Full];
        let cases =
            levels.into_iter().flat_map(|level| [(level, 64, false), (level, 256, false), (level, 96, true)]);
        for (recompute, tokens, train_all) in cases {
            let (counted, estimated) = measured(model, tokens, recompute, train_all);
            let error = estimated as f64 / counted as f64 - 1.0;
            let name = &model["model_type"];
            let line = format!(
                "{name} {recompute:?} {tokens} {train_all}: {counted}, estimated {:+.1} %",
                100.0 * error
            );
            println!("{line}");
            if error.abs() > TOLERANCE {
                wrong.push(line);
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn a_choice_of_keys_keeps_a_bit_for_each_query_and_key() {
    for tokens in [64, 256] {
        let [with, without] = ["deepseek_v32", "deepseek_v3"]
            .map(|model_type| measured(&deepseek(model_type), tokens, Recompute::None, false));
        assert_eq!(with.0 - without.0, 3 * tokens * tokens / 8);
        assert_eq!(with.1 - without.1, 3 * tokens * tokens / 8);
    }
}
