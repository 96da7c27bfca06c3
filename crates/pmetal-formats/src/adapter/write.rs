//! The file that PEFT writes: every field, sorted, two spaces a level.

use serde_json::{Map, Value, json};

use super::{AdapterConfig, InitLoraWeights, ModuleNames};

/// The release whose fields are written.
const PEFT_VERSION: &str = "0.21.2";

pub(super) fn to_json(config: &AdapterConfig) -> String {
    let mut value = json!({
        "alora_invocation_tokens": null,
        "alpha_pattern": config.alpha_pattern.iter().map(|(key, alpha)| (key.clone(), number(*alpha))).collect::<Map<_, _>>(),
        "arrow_config": null,
        "auto_mapping": null,
        "base_model_name_or_path": config.base_model_name_or_path,
        "bias": "none",
        "corda_config": null,
        "ensure_weight_tying": false,
        "eva_config": null,
        "exclude_modules": config.exclude_modules.as_ref().map(names),
        "fan_in_fan_out": false,
        "inference_mode": config.inference_mode,
        "init_lora_weights": match config.init_lora_weights {
            InitLoraWeights::Kaiming => json!(true),
            InitLoraWeights::Gaussian => json!("gaussian"),
            InitLoraWeights::Random => json!(false),
        },
        "kasa_config": null,
        "layer_replication": null,
        "layers_pattern": if config.layers_pattern.is_empty() { Value::Null } else { json!(config.layers_pattern) },
        "layers_to_transform": config.layers_to_transform,
        "loftq_config": {},
        "lora_alpha": number(config.lora_alpha),
        "lora_bias": false,
        "lora_dropout": config.lora_dropout,
        "lora_ga_config": null,
        "megatron_config": null,
        "megatron_core": "megatron.core",
        "modules_to_save": null,
        "monteclora_config": null,
        "peft_type": "LORA",
        "peft_version": PEFT_VERSION,
        "qalora_group_size": 16,
        "r": config.r,
        "rank_pattern": config.rank_pattern.iter().map(|(key, rank)| (key.clone(), json!(rank))).collect::<Map<_, _>>(),
        "revision": config.revision,
        "target_modules": names(&config.target_modules),
        "target_parameters": if config.target_parameters.is_empty() { Value::Null } else { json!(config.target_parameters) },
        "task_type": config.task_type,
    });
    // In two halves: one literal of all fields is beyond the macro's recursion limit.
    if let Value::Object(map) = &mut value {
        for name in ["trainable_token_indices", "use_bdlora"] {
            map.insert(name.to_owned(), Value::Null);
        }
        for name in ["use_dora", "use_qalora"] {
            map.insert(name.to_owned(), json!(false));
        }
        map.insert("use_rslora".to_owned(), json!(config.use_rslora));
        map.insert("velora_config".to_owned(), Value::Null);
    }
    format!("{value:#}")
}

/// A number as Python prints it: whole ones without a fraction, which is what PEFT's field is declared as.
fn number(value: f64) -> Value {
    if value.fract() == 0.0 && value.abs() < 9e15 { json!(value as i64) } else { json!(value) }
}

fn names(names: &ModuleNames) -> Value {
    match names {
        ModuleNames::List(names) => json!(names),
        ModuleNames::Pattern(pattern) => json!(pattern),
        ModuleNames::AllLinear => json!("all-linear"),
    }
}
