//! The fields of `adapter_config.json`, one by one.

use std::path::Path;

use serde_json::{Map, Value};

use super::{AdapterConfig, InitLoraWeights, ModuleNames};
use crate::rows::parse_checked;
use crate::{Error, Result};

/// Fields that say nothing about the numbers of a trained adapter.
///
/// `auto_mapping`, `peft_version`: how Python finds its classes. `runtime_config`: PEFT drops it when it reads.
/// `megatron_core`: only read with `megatron_config`. `qalora_group_size`: only read with `use_qalora`.
/// `loftq_config`, `eva_config`, `corda_config`, `lora_ga_config`: only read with the `init_lora_weights` of the same name.
const WITHOUT_EFFECT: [&str; 9] = [
    "auto_mapping",
    "peft_version",
    "runtime_config",
    "megatron_core",
    "qalora_group_size",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
];

/// Fields that change what an adapter computes and that are honoured only at their default, which is null, false or
/// empty.
const REFUSED_UNLESS_EMPTY: [&str; 15] = [
    "alora_invocation_tokens",
    "arrow_config",
    "ensure_weight_tying",
    "fan_in_fan_out",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "megatron_config",
    "modules_to_save",
    "monteclora_config",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
    "velora_config",
];

struct Fields<'a> {
    path: &'a Path,
    map: Map<String, Value>,
}

pub(super) fn parse(path: &Path, bytes: &[u8]) -> Result<AdapterConfig> {
    let value = parse_checked(bytes).map_err(|(place, message)| Error::malformed(path, place, message))?;
    let Value::Object(map) = value else {
        return Err(Error::malformed(path, "", "an adapter configuration must be a JSON object"));
    };
    let mut fields = Fields { path, map };
    fields.refuse_other_kinds()?;
    let mut config = AdapterConfig::new(8, 8.0, ModuleNames::AllLinear);
    config.r = fields.rank("r")?.unwrap_or(8);
    config.lora_alpha = fields.number("lora_alpha")?.unwrap_or(8.0);
    config.lora_dropout = fields.number("lora_dropout")?.unwrap_or(0.0);
    config.target_modules = fields.module_names("target_modules", true)?.ok_or_else(|| {
        let message = "`target_modules` is missing or null; PEFT guesses it from the kind of model, here it must say which modules have adapters";
        Error::unsupported(path, message)
    })?;
    config.target_parameters = match fields.take("target_parameters") {
        None => Vec::new(),
        Some(value) => fields.to_strings("target_parameters", &value)?,
    };
    config.exclude_modules = fields.module_names("exclude_modules", false)?;
    config.use_rslora = fields.flag("use_rslora")?.unwrap_or(false);
    config.rank_pattern =
        fields.pattern("rank_pattern", |fields, name, value| fields.to_rank(name, value))?;
    config.alpha_pattern =
        fields.pattern("alpha_pattern", |fields, name, value| fields.to_number(name, value))?;
    config.layers_to_transform = fields.layers()?;
    config.layers_pattern = match fields.take("layers_pattern") {
        None => Vec::new(),
        Some(Value::String(text)) if text.is_empty() => Vec::new(),
        Some(Value::String(text)) => vec![text],
        Some(value) => fields.to_strings("layers_pattern", &value)?,
    };
    config.init_lora_weights = fields.initialisation()?;
    config.base_model_name_or_path = fields.text("base_model_name_or_path")?;
    config.revision = fields.text("revision")?;
    config.task_type = fields.text("task_type")?;
    config.inference_mode = fields.flag("inference_mode")?.unwrap_or(false);
    fields.refuse_the_rest()?;
    Ok(config)
}

impl Fields<'_> {
    /// A field's value; null is the same as absent, as it is for PEFT.
    fn take(&mut self, name: &str) -> Option<Value> {
        self.map.shift_remove(name).filter(|value| !value.is_null())
    }

    fn refuse<T>(&self, message: String) -> Result<T> {
        Err(Error::unsupported(self.path, message))
    }

    fn wrong_type<T>(&self, name: &str, expected: &str, value: &Value) -> Result<T> {
        Err(Error::malformed(self.path, "", format!("`{name}` must be {expected}, it is {}", shown(value))))
    }

    fn refuse_other_kinds(&mut self) -> Result<()> {
        match self.take("peft_type") {
            Some(Value::String(kind)) if kind == "LORA" => {}
            Some(value) => {
                return self.refuse(format!("`peft_type` is {}, only \"LORA\" is read", shown(&value)));
            }
            None => return self.refuse("`peft_type` is missing, it must be \"LORA\"".to_owned()),
        }
        match self.take("bias") {
            None => {}
            Some(Value::String(bias)) if bias == "none" => {}
            Some(value) => {
                return self.refuse(format!("`bias` is {}, only \"none\" is honoured", shown(&value)));
            }
        }
        match self.map.get("task_type") {
            None | Some(Value::Null) => Ok(()),
            Some(Value::String(task)) if task == "CAUSAL_LM" => Ok(()),
            Some(value) => {
                self.refuse(format!("`task_type` is {}, only \"CAUSAL_LM\" is read", shown(value)))
            }
        }
    }

    fn to_number(&self, name: &str, value: &Value) -> Result<f64> {
        match value.as_f64() {
            Some(number) => Ok(number),
            None => self.wrong_type(name, "a number", value),
        }
    }

    fn to_rank(&self, name: &str, value: &Value) -> Result<usize> {
        match value.as_u64().and_then(|rank| usize::try_from(rank).ok()) {
            Some(rank) => Ok(rank),
            None => self.wrong_type(name, "a positive whole number", value),
        }
    }

    fn to_strings(&self, name: &str, value: &Value) -> Result<Vec<String>> {
        let Value::Array(items) = value else { return self.wrong_type(name, "a list of strings", value) };
        items
            .iter()
            .map(|item| match item {
                Value::String(text) => Ok(text.clone()),
                other => self.wrong_type(name, "a list of strings", other),
            })
            .collect()
    }

    fn number(&mut self, name: &str) -> Result<Option<f64>> {
        self.take(name).map(|value| self.to_number(name, &value)).transpose()
    }

    fn rank(&mut self, name: &str) -> Result<Option<usize>> {
        self.take(name).map(|value| self.to_rank(name, &value)).transpose()
    }

    fn flag(&mut self, name: &str) -> Result<Option<bool>> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(flag)),
            Some(value) => self.wrong_type(name, "true or false", &value),
        }
    }

    fn text(&mut self, name: &str) -> Result<Option<String>> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(value) => self.wrong_type(name, "a string", &value),
        }
    }

    fn module_names(&mut self, name: &str, all_linear: bool) -> Result<Option<ModuleNames>> {
        Ok(match self.take(name) {
            None => None,
            Some(Value::String(text)) if all_linear && text.to_lowercase() == "all-linear" => {
                Some(ModuleNames::AllLinear)
            }
            Some(Value::String(text)) if text.is_empty() && !all_linear => None,
            Some(Value::String(text)) => Some(ModuleNames::Pattern(text)),
            Some(value) => match self.to_strings(name, &value)? {
                names if names.is_empty() && !all_linear => None,
                names => Some(ModuleNames::List(names)),
            },
        })
    }

    fn pattern<T>(
        &mut self,
        name: &str,
        convert: impl Fn(&Self, &str, &Value) -> Result<T>,
    ) -> Result<Vec<(String, T)>> {
        match self.take(name) {
            None => Ok(Vec::new()),
            Some(Value::Object(map)) => map
                .into_iter()
                .map(|(key, value)| {
                    let value = convert(self, &format!("{name}.{key}"), &value)?;
                    Ok((key, value))
                })
                .collect(),
            Some(value) => self.wrong_type(name, "an object", &value),
        }
    }

    fn layers(&mut self) -> Result<Option<Vec<u64>>> {
        let name = "layers_to_transform";
        let Some(value) = self.take(name) else { return Ok(None) };
        let index = |value: &Value| match value.as_u64() {
            Some(index) => Ok(index),
            None => self.wrong_type(name, "a layer's number or a list of them", value),
        };
        match &value {
            // PEFT takes an empty list for all layers.
            Value::Array(items) if items.is_empty() => Ok(None),
            Value::Array(items) => items.iter().map(index).collect::<Result<_>>().map(Some),
            other => index(other).map(|index| Some(vec![index])),
        }
    }

    fn initialisation(&mut self) -> Result<InitLoraWeights> {
        match self.take("init_lora_weights") {
            None | Some(Value::Bool(true)) => Ok(InitLoraWeights::Kaiming),
            Some(Value::Bool(false)) => Ok(InitLoraWeights::Random),
            Some(Value::String(kind)) if kind == "gaussian" => Ok(InitLoraWeights::Gaussian),
            // Most of the others (PiSSA, OLoRA, LoftQ, CorDA, LoRA-GA) change the base model's weights.
            Some(value) => self.refuse(format!(
                "`init_lora_weights` is {}, only true, false and \"gaussian\" are honoured",
                shown(&value)
            )),
        }
    }

    fn refuse_the_rest(&mut self) -> Result<()> {
        for name in WITHOUT_EFFECT {
            self.map.shift_remove(name);
        }
        for name in REFUSED_UNLESS_EMPTY {
            match self.map.shift_remove(name) {
                Some(value) if !is_empty(&value) => {
                    return self.refuse(format!("`{name}` is {}, which is not supported", shown(&value)));
                }
                _ => {}
            }
        }
        match self.map.keys().next() {
            None => Ok(()),
            Some(name) => self.refuse(format!(
                "the field `{name}` is not one of PEFT 0.21, and what it asks for is unknown"
            )),
        }
    }
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(items) => items.is_empty(),
        Value::Object(map) => map.is_empty(),
        Value::Bool(true) | Value::Number(_) | Value::String(_) => false,
    }
}

/// A value for a message, cut to 80 characters.
fn shown(value: &Value) -> String {
    let text = value.to_string();
    let head: String = text.chars().take(80).collect();
    if head.len() < text.len() { format!("{head}...") } else { head }
}
