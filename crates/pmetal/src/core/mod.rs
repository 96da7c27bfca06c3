//! A model as people name it: a folder, a GGUF file or the embedded one, with everything that belongs to it.

pub mod device;
pub mod embedded;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use pmetal_engine::{DType, Device};
use pmetal_formats::chat_template::{ChatTemplate, EncodedChat};
use pmetal_formats::checkpoint::Checkpoint;
use pmetal_formats::tokenizer::{GgufTokenizer, Tokenizer};
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use crate::data::ChatFormat;
use crate::error::{Error, Result};
use crate::generate::Sampling;
use crate::models::loader::{self, BaseStorage, LoadOptions};
use crate::models::{Config, Decoder};

/// Side files beyond this are no configuration.
const SIDE_FILE_BYTES: u64 = 64 << 20;

/// Where a model comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ModelSource {
    /// The model inside the program: [`embedded::NAME`].
    Embedded,
    /// A Hugging Face folder or a GGUF file.
    Path(PathBuf),
}

impl ModelSource {
    /// `stories260k`, where no such file exists, is the embedded model; anything else is a path.
    pub fn parse(text: &str) -> Self {
        if text == embedded::NAME && !Path::new(text).exists() {
            Self::Embedded
        } else {
            Self::Path(PathBuf::from(text))
        }
    }
}

impl std::fmt::Display for ModelSource {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Embedded => formatter.write_str(embedded::NAME),
            Self::Path(path) => write!(formatter, "{}", path.display()),
        }
    }
}

/// What a model's own files say about generating.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GenerationDefaults {
    /// Sampling as `generation_config.json` has it; greedy where it says nothing.
    pub sampling: Sampling,
    /// Every token that ends a text: of the generation config, the config and the tokenizer.
    pub stop_tokens: Vec<u32>,
}

/// A model's files, opened but not loaded.
pub struct OpenedModel {
    /// The tensors.
    pub checkpoint: Checkpoint,
    /// The parsed configuration.
    pub config: Config,
    /// The configuration as it was in the file, or as a GGUF file's metadata amount to.
    pub config_value: Value,
    /// Keeps the embedded model's files for as long as they are open.
    _unpacked: Option<embedded::Unpacked>,
}

/// Files beside the weights that belong to a model.
const SIDE_FILES: [&str; 7] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
];

impl OpenedModel {
    /// Opens a model's files.
    ///
    /// # Errors
    /// [`Error::Usage`] when there is nothing at the path; what reading returns; [`Error::Config`].
    pub fn open(source: &ModelSource) -> Result<Self> {
        let unpacked = match source {
            ModelSource::Embedded => Some(embedded::Unpacked::new()?),
            ModelSource::Path(_) => None,
        };
        let path = match (&unpacked, source) {
            (Some(unpacked), _) => unpacked.path(),
            (None, ModelSource::Path(path)) => path,
            (None, ModelSource::Embedded) => Path::new(embedded::NAME),
        };
        if !path.exists() {
            return Err(Error::Usage(format!("there is no model at `{}`", path.display())));
        }
        let checkpoint = Checkpoint::open(path)?;
        let config_value = checkpoint.config()?;
        let config = Config::new(config_value.clone())?;
        Ok(Self { checkpoint, config, config_value, _unpacked: unpacked })
    }

    /// The tokenizer that belongs to the model.
    ///
    /// # Errors
    /// What reading it returns.
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        Ok(match self.checkpoint.gguf() {
            Some(file) => {
                let fields = GgufTokenizer::from_metadata(file.metadata())
                    .map_err(|error| error.in_file(self.checkpoint.path()))?;
                Tokenizer::from_gguf_fields(self.checkpoint.path(), &fields)?
            }
            None => Tokenizer::from_folder(self.checkpoint.path())?,
        })
    }

    /// Configuration, tokenizer and template files as a folder of this model would hold them.
    ///
    /// # Errors
    /// What reading them returns.
    pub fn side_files(&self) -> Result<Vec<(String, Vec<u8>)>> {
        if self.checkpoint.gguf().is_some() {
            let config = format!("{:#}\n", self.config_value);
            let mut files = vec![("config.json".to_owned(), config.into_bytes())];
            files.extend(self.tokenizer()?.to_files()?);
            return Ok(files);
        }
        let mut files = Vec::new();
        for name in SIDE_FILES {
            let Some(mut text) = self.checkpoint.read_text_file(name, SIDE_FILE_BYTES)? else { continue };
            // Whatever is written beside it is written as plain numbers.
            if name == "config.json" && self.config_value.get("quantization_config").is_some() {
                let mut config = self.config_value.clone();
                config.as_object_mut().map(|fields| fields.remove("quantization_config"));
                text = format!("{config:#}\n");
            }
            files.push((name.to_owned(), text.into_bytes()));
        }
        Ok(files)
    }
}

/// Everything about a model that is text: what turns words into ids and back, and how it wants to be sampled.
pub struct ModelText {
    /// Text to ids.
    pub tokenizer: Tokenizer,
    /// Messages to text, if the model was made for chat.
    pub template: Option<ChatTemplate>,
    /// How it wants to be sampled.
    pub generation: GenerationDefaults,
}

impl ModelText {
    /// The text and ids after which the model should answer a list of messages.
    ///
    /// # Errors
    /// When the template refuses the messages, or the tokenizer fails.
    pub fn chat_prompt(&self, messages: &Value) -> Result<EncodedChat> {
        let variables = Map::new();
        let format = ChatFormat::new(&self.tokenizer, self.template.as_ref(), &variables, now_unix_s())?;
        format.prompt(messages, None)
    }
}

/// Seconds since 1970, for templates that print today's date.
pub fn now_unix_s() -> i64 {
    let elapsed = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    elapsed.map_or(0, |elapsed| i64::try_from(elapsed.as_secs()).unwrap_or(i64::MAX))
}

/// A loaded model.
pub struct Model {
    /// What it was loaded from.
    pub source: ModelSource,
    /// The weights.
    pub decoder: Decoder,
    /// Tokenizer, template and generation defaults.
    pub text: ModelText,
    /// sha256 of the configuration and of every tensor's name, type, shape and first bytes.
    pub fingerprint: String,
    /// Lines for the user.
    pub notes: Vec<String>,
}

impl Model {
    /// Loads weights, tokenizer, template and defaults.
    ///
    /// # Errors
    /// As [`loader::load`]; when there is no tokenizer; when the template does not compile.
    pub fn load(source: &ModelSource, device: &Device, dtype: DType, train_all: bool) -> Result<Self> {
        Self::load_base(source, device, LoadOptions { dtype, train_all }, BaseStorage::Typed)
    }

    /// [`Self::load`] with a choice of how frozen matrices are kept.
    ///
    /// # Errors
    /// As [`loader::load_base`] and [`Self::load`].
    pub fn load_base(
        source: &ModelSource,
        device: &Device,
        options: LoadOptions,
        base: BaseStorage,
    ) -> Result<Self> {
        let opened = OpenedModel::open(source)?;
        let (checkpoint, value) = (&opened.checkpoint, &opened.config_value);
        let loaded = loader::load_base(checkpoint, &opened.config, device, options, base)?;
        let tokenizer = opened.tokenizer()?;
        let mut notes = loaded.notes;
        let vocabulary = loaded.decoder.spec.vocabulary;
        if tokenizer.vocabulary_size() > vocabulary {
            notes.push(format!(
                "the tokenizer has {} tokens, the model {vocabulary}: text that needs the others fails",
                tokenizer.vocabulary_size()
            ));
        }
        let template = match &tokenizer.chat_templates().default {
            Some(source) => Some(ChatTemplate::compile(source)?),
            None => None,
        };
        let generation = generation_defaults(checkpoint, value, &tokenizer)?;
        Ok(Self {
            source: source.clone(),
            decoder: loaded.decoder,
            text: ModelText { tokenizer, template, generation },
            fingerprint: fingerprint(checkpoint, value)?,
            notes,
        })
    }
}

fn fingerprint(checkpoint: &Checkpoint, config: &Value) -> Result<String> {
    /// Bytes from the start of each tensor; enough to tell any two trainings apart.
    const SAMPLED: usize = 256;
    let mut hasher = Sha256::new();
    hasher.update(config.to_string());
    let names: BTreeSet<&str> = checkpoint.names().collect();
    for name in names {
        let Some(info) = checkpoint.info(name) else { continue };
        hasher.update(format!("{name} {:?} {:?}", info.dtype, info.shape));
        let sampled = usize::try_from(info.bytes).unwrap_or(SAMPLED).min(SAMPLED);
        hasher.update(checkpoint.read_start(name, sampled)?);
    }
    Ok(hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

fn generation_defaults(
    checkpoint: &Checkpoint,
    config: &Value,
    tokenizer: &Tokenizer,
) -> Result<GenerationDefaults> {
    let text = checkpoint.read_text_file("generation_config.json", SIDE_FILE_BYTES)?;
    let file: Value = match &text {
        Some(text) => serde_json::from_str(text)
            .map_err(|error| Error::Config(format!("generation_config.json: {error}")))?,
        None => Value::Null,
    };
    let number = |name: &str| file.get(name).and_then(Value::as_f64);
    let mut sampling = Sampling::default();
    if file.get("do_sample").and_then(Value::as_bool).unwrap_or(false) {
        sampling.temperature = number("temperature").unwrap_or(1.0);
        sampling.top_k = number("top_k").map_or(50, |k| k as usize);
        sampling.top_p = number("top_p").unwrap_or(1.0);
        sampling.min_p = number("min_p").unwrap_or(0.0);
    }
    sampling.repetition_penalty = number("repetition_penalty").unwrap_or(1.0);
    sampling.check()?;
    let mut stop_tokens = BTreeSet::new();
    for value in [file.get("eos_token_id"), config.get("eos_token_id")].into_iter().flatten() {
        let listed = value.as_array().map_or(std::slice::from_ref(value), Vec::as_slice);
        stop_tokens.extend(listed.iter().filter_map(Value::as_u64).filter_map(|id| u32::try_from(id).ok()));
    }
    stop_tokens.extend(tokenizer.eos());
    Ok(GenerationDefaults { sampling, stop_tokens: stop_tokens.into_iter().collect() })
}
