//! Reading a model's `config.json`: typed fields with ranges, and a record of what was looked at.
//!
//! A field that nothing looked at may change the mathematics, so it is refused unless one of these holds: it is on the
//! list of names that say nothing about a forward pass, or that say something about training only; it is null, which
//! every reader takes for absent; it is an empty list or object. A `false` is refused like other values: `use_rope`
//! and `scale_embeddings` show that it may turn something off that is on without it. Fields that are harmless with
//! one value only, such as `logit_scale` with 1, are accepted with that value.

use std::cell::RefCell;
use std::collections::BTreeSet;

use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::spelling::nearest;

/// Sizes in a configuration stay below this, so that products of three of them fit 128 bits.
const LARGEST_SIZE: u64 = 1 << 31;

/// Unknown fields that one error lists.
const LISTED_FIELDS: usize = 5;

/// Fields that say nothing about the mathematics of a forward pass: names, versions, special tokens, training, how
/// other programs run and generate.
const WITHOUT_EFFECT: &[&str] = &[
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_commit_hash",
    "_experts_implementation",
    "_flash_attn_2_enabled",
    "_name_or_path",
    "architectures",
    "attention_dropout",
    "attn_implementation",
    "attn_pdrop",
    "auto_map",
    "bad_words_ids",
    "begin_suppress_tokens",
    "bos_token_id",
    "cache_implementation",
    "chunk_size_feed_forward",
    "cross_attention_hidden_size",
    "custom_pipelines",
    "decoder_start_token_id",
    "diversity_penalty",
    "do_sample",
    "dtype",
    "early_stopping",
    "embd_pdrop",
    "encoder_no_repeat_ngram_size",
    "eos_token_id",
    "exponential_decay_length_penalty",
    "finetuning_task",
    "for_llm_compressor",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "gradient_checkpointing",
    "hidden_dropout",
    "id2label",
    "initializer_range",
    "is_llama_config",
    "keys_to_ignore_at_inference",
    "label2id",
    "length_penalty",
    "max_length",
    "max_new_tokens",
    "max_sequence_length",
    "min_length",
    "model_max_length",
    "model_type",
    "neftune_noise_alpha",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_labels",
    "num_return_sequences",
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    "pad_token_id",
    "prefix",
    "pruned_heads",
    "problem_type",
    "remove_invalid_values",
    "repetition_penalty",
    "resid_pdrop",
    "return_dict",
    "return_dict_in_generate",
    "sep_token_id",
    "seq_length",
    "suppress_tokens",
    "task_specific_params",
    "temperature",
    "tf_legacy_loss",
    "tie_encoder_decoder",
    "tokenizer_class",
    "top_k",
    "top_p",
    "torch_dtype",
    "torchscript",
    "transformers.js_config",
    "transformers_version",
    "typical_p",
    "unk_token_id",
    "unsloth_fixed",
    "unsloth_version",
    "use_cache",
    "use_flash_attention",
    "use_flash_attn",
];

/// Whether a field that no reader asked for has the one value with which it changes nothing.
fn is_harmless(name: &str, value: &Value) -> bool {
    match name {
        "logit_scale" => value.as_f64() == Some(1.0),
        // By how many parts a product was divided: their sum is the same.
        "pretraining_tp" => value.is_number(),
        "rope_interleaved"
        | "use_sliding_window"
        | "use_mrope"
        | "use_qk_norm"
        | "is_encoder_decoder"
        | "add_cross_attention"
        | "use_bfloat16" => value.as_bool() == Some(false),
        // The tensors decide: a bias that is missing or left over is an error of its own.
        "attention_bias" | "mlp_bias" | "qkv_bias" | "lm_head_bias" => value.is_boolean(),
        "is_decoder" => value.is_boolean(),
        // How matrices are stored, which whoever reads them has checked.
        "quantization_config" => {
            let method = value.get("quant_method").and_then(Value::as_str);
            matches!(method, Some("fp8" | "mxfp4"))
        }
        _ => false,
    }
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Array(list) => list.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        _ => false,
    }
}

/// The fields of a `config.json`.
pub struct Config {
    fields: Map<String, Value>,
    seen: RefCell<BTreeSet<String>>,
}

impl Config {
    /// Wraps a parsed file.
    ///
    /// # Errors
    /// [`Error::Config`] when the value is not an object.
    pub fn new(value: Value) -> Result<Self> {
        match value {
            Value::Object(fields) => Ok(Self { fields, seen: RefCell::default() }),
            other => Err(Error::Config(format!("expected an object, found {}", kind(&other)))),
        }
    }

    /// A field, `None` when absent or null; marks it as looked at.
    pub fn get(&self, name: &str) -> Option<&Value> {
        self.seen.borrow_mut().insert(name.to_owned());
        self.fields.get(name).filter(|value| !value.is_null())
    }

    /// Marks fields as looked at whose values change nothing.
    pub fn pass_over(&self, names: &[&str]) {
        self.seen.borrow_mut().extend(names.iter().map(|&name| name.to_owned()));
    }

    /// Whether the file has the field, null included.
    pub fn has(&self, name: &str) -> bool {
        self.seen.borrow_mut().insert(name.to_owned());
        self.fields.contains_key(name)
    }

    /// A finite number above zero; `None` for null, `default` where the field is absent.
    ///
    /// # Errors
    /// As [`Self::positive`].
    pub fn nullable(&self, name: &str, default: Option<f64>) -> Result<Option<f64>> {
        match (self.has(name), self.get(name)) {
            (false, _) => Ok(default),
            (true, None) => Ok(None),
            (true, Some(_)) => self.positive(name, 1.0).map(Some),
        }
    }

    /// The model type that selects the family.
    ///
    /// # Errors
    /// [`Error::Config`] when the field is missing or no string.
    pub fn model_type(&self) -> Result<&str> {
        let value = self.get("model_type").ok_or_else(|| missing("model_type"))?;
        value.as_str().ok_or_else(|| wrong("model_type", value, "a string"))
    }

    /// A size of at least one.
    ///
    /// # Errors
    /// [`Error::Config`] when the field is missing, zero, negative, fractional or absurdly large.
    pub fn size(&self, name: &str) -> Result<usize> {
        self.optional_size(name)?.ok_or_else(|| missing(name))
    }

    /// As [`Self::size`], `None` when absent.
    ///
    /// # Errors
    /// As [`Self::size`], but for a missing field.
    pub fn optional_size(&self, name: &str) -> Result<Option<usize>> {
        match self.optional_count(name)? {
            Some(0) => {
                Err(Error::Config(format!("`{name}` is 0, expected a whole number from 1 to 2147483647")))
            }
            count => Ok(count),
        }
    }

    /// As [`Self::optional_size`], but zero is a value like others.
    ///
    /// # Errors
    /// [`Error::Config`] when the field is negative, fractional or absurdly large.
    pub fn optional_count(&self, name: &str) -> Result<Option<usize>> {
        let Some(value) = self.get(name) else { return Ok(None) };
        // Some writers store whole numbers as floats.
        let whole = value.as_u64().or_else(|| {
            value
                .as_f64()
                .filter(|number| number.fract() == 0.0 && *number >= 0.0)
                .map(|number| number as u64)
        });
        match whole {
            Some(size) if size < LARGEST_SIZE => Ok(Some(size as usize)),
            _ => Err(wrong(name, value, "a whole number up to 2147483647")),
        }
    }

    /// A finite number.
    ///
    /// # Errors
    /// [`Error::Config`] when the field is present and no finite number.
    pub fn number(&self, name: &str, default: f64) -> Result<f64> {
        let Some(value) = self.get(name) else { return Ok(default) };
        // The kernels compute in f32, where 1e300 would be infinite.
        let number = value.as_f64().filter(|number| (*number as f32).is_finite());
        number.ok_or_else(|| wrong(name, value, "a number within the range of f32"))
    }

    /// A finite number above zero.
    ///
    /// # Errors
    /// As [`Self::number`], and for zero and below.
    pub fn positive(&self, name: &str, default: f64) -> Result<f64> {
        let number = self.number(name, default)?;
        if number.is_finite() && number as f32 > 0.0 {
            return Ok(number);
        }
        Err(Error::Config(format!("`{name}` is {number}, it must be a number above zero")))
    }

    /// A truth value.
    ///
    /// # Errors
    /// [`Error::Config`] when the field is present and neither true nor false.
    pub fn flag(&self, name: &str, default: bool) -> Result<bool> {
        let Some(value) = self.get(name) else { return Ok(default) };
        value.as_bool().ok_or_else(|| wrong(name, value, "true or false"))
    }

    /// A string.
    ///
    /// # Errors
    /// [`Error::Config`] when the field is present and no string.
    pub fn text(&self, name: &str, default: &'static str) -> Result<String> {
        let Some(value) = self.get(name) else { return Ok(default.to_owned()) };
        value.as_str().map(str::to_owned).ok_or_else(|| wrong(name, value, "a string"))
    }

    /// An object as a configuration of its own, `None` when absent.
    ///
    /// # Errors
    /// [`Error::Config`] when the field is present and no object.
    pub fn object(&self, name: &str) -> Result<Option<Self>> {
        self.get(name)
            .map(|value| {
                if value.is_object() {
                    Self::new(value.clone())
                } else {
                    Err(wrong(name, value, "an object"))
                }
            })
            .transpose()
    }

    fn list(&self, name: &str) -> Result<Option<&[Value]>> {
        let Some(value) = self.get(name) else { return Ok(None) };
        let list = value.as_array().ok_or_else(|| wrong(name, value, "a list"))?;
        Ok(Some(list))
    }

    /// One entry per layer from a list of strings, `None` when absent.
    ///
    /// # Errors
    /// [`Error::Config`] when the list has another length or holds something else.
    pub fn layer_strings(&self, name: &str, layers: usize) -> Result<Option<Vec<String>>> {
        let Some(list) = self.list(name)? else { return Ok(None) };
        check_length(name, list, layers)?;
        let strings = list.iter().map(|entry| {
            entry.as_str().map(str::to_owned).ok_or_else(|| wrong(name, entry, "a list of strings"))
        });
        strings.collect::<Result<Vec<_>>>().map(Some)
    }

    /// One truth value per layer from a list of zeros and ones, `None` when absent or empty. Those beyond the last layer are of
    /// none.
    ///
    /// # Errors
    /// [`Error::Config`] when the list is too short or holds something else.
    pub fn layer_flags(&self, name: &str, layers: usize) -> Result<Option<Vec<bool>>> {
        let Some(list) = self.list(name)?.filter(|list| !list.is_empty()) else { return Ok(None) };
        let list = &list[..layers.min(list.len())];
        check_length(name, list, layers)?;
        let flags = list.iter().map(|entry| match (entry.as_u64(), entry.as_bool()) {
            (Some(0), _) | (_, Some(false)) => Ok(false),
            (Some(1), _) | (_, Some(true)) => Ok(true),
            _ => Err(wrong(name, entry, "a list of zeros and ones")),
        });
        flags.collect::<Result<Vec<_>>>().map(Some)
    }

    /// Numbers of layers, `None` when absent.
    ///
    /// # Errors
    /// [`Error::Config`] when the field holds anything else than whole numbers.
    pub fn layer_numbers(&self, name: &str, layers: usize) -> Result<Option<Vec<usize>>> {
        let Some(list) = self.list(name)? else { return Ok(None) };
        let numbers = list.iter().map(|entry| {
            let number = entry.as_u64().and_then(|number| usize::try_from(number).ok());
            number.ok_or_else(|| wrong(name, entry, "a list of whole numbers"))
        });
        // Numbers beyond the last layer name none.
        let numbers = numbers.collect::<Result<Vec<_>>>()?;
        Ok(Some(numbers.into_iter().filter(|&number| number < layers).collect()))
    }

    /// A list of finite positive numbers, `None` when absent.
    ///
    /// # Errors
    /// [`Error::Config`] when the field holds anything else.
    pub fn numbers(&self, name: &str) -> Result<Option<Vec<f64>>> {
        let Some(value) = self.get(name) else { return Ok(None) };
        let list = value.as_array().ok_or_else(|| wrong(name, value, "a list of numbers"))?;
        let numbers = list.iter().map(|entry| {
            entry
                .as_f64()
                .filter(|number| number.is_finite() && *number > 0.0)
                .ok_or_else(|| wrong(name, entry, "a list of numbers above zero"))
        });
        numbers.collect::<Result<Vec<_>>>().map(Some)
    }

    /// The names of all fields, in the order of the file.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.fields.keys().map(String::as_str)
    }

    /// Refuses fields that nothing looked at and that are not known to be without effect; call it last.
    ///
    /// # Errors
    /// [`Error::Config`] naming the first few of them with their values, and known names that are near.
    pub fn check_unread(&self) -> Result<()> {
        let seen = self.seen.borrow();
        let is_unknown = |name: &str, value: &Value| {
            !seen.contains(name)
                && !WITHOUT_EFFECT.contains(&name)
                && !is_empty(value)
                && !is_harmless(name, value)
        };
        let mut sentences = Vec::new();
        for (name, value) in self.fields.iter().filter(|(name, value)| is_unknown(name, value)) {
            let known = seen.iter().map(String::as_str).chain(WITHOUT_EFFECT.iter().copied());
            let hint =
                nearest(name, known).map(|near| format!(" (did you mean `{near}`?)")).unwrap_or_default();
            let (name, value) = (shortened(name), shortened(&value.to_string()));
            sentences.push(format!(
                "field `{name}` is {value}, which is not known and may change the model{hint}"
            ));
        }
        let more = sentences.len().saturating_sub(LISTED_FIELDS);
        sentences.truncate(LISTED_FIELDS);
        if more > 0 {
            sentences.push(format!("and {more} more"));
        }
        if sentences.is_empty() { Ok(()) } else { Err(Error::Config(sentences.join("; "))) }
    }
}

/// The beginning of a text from a file, without control characters.
fn shortened(text: &str) -> String {
    text.chars().take(60).flat_map(char::escape_debug).collect::<String>().replace("\\\"", "\"")
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a truth value",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

fn check_length(name: &str, list: &[Value], layers: usize) -> Result<()> {
    if list.len() == layers {
        return Ok(());
    }
    Err(Error::Config(format!("`{name}` has {} entries for {layers} layers", list.len())))
}

fn missing(name: &str) -> Error {
    Error::Config(format!("`{name}` is missing"))
}

fn wrong(name: &str, value: &Value, expected: &str) -> Error {
    let shown: String = value.to_string().chars().take(60).collect();
    Error::Config(format!("`{name}` is {shown}, expected {expected}"))
}
