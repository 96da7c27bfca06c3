//! What a run leaves in its folder: the adapter or the model, a loss picture, a model card, samples.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use pmetal_formats::DType;
use pmetal_formats::adapter::AdapterConfig;
use pmetal_formats::atomic::{self, DirectoryCommit};
use pmetal_formats::fs::Fs;
use pmetal_formats::safetensors::{SafetensorsWriter, TensorSpec};

use super::config::ResolvedConfig;
use super::learner::Learner;
use super::prepare::Description;
use super::{metrics, plot};
use crate::core::OpenedModel;
use crate::error::{Error, Result};
use crate::generate::{Sampling, Session, StopRules};
use crate::lora;
use crate::models::Decoder;

/// Names that a run writes into its folder.
const RUN_FILES: [&str; 6] =
    ["run.toml", "metrics.jsonl", "samples.jsonl", "loss.svg", "README.md", "env.json"];
/// More than this is no file of samples.
const SAMPLES_LIMIT_BYTES: u64 = 1 << 30;
const RUN_FOLDERS: [&str; 3] = ["checkpoints", "adapter", "model"];

/// Where a finished run's results lie.
pub struct Saved {
    /// The folder of the adapter, or of the model when all weights were trained.
    pub folder: PathBuf,
    /// Whether it is an adapter.
    pub is_adapter: bool,
}

/// Removes what an earlier run left, and nothing else.
///
/// # Errors
/// When something cannot be removed.
pub fn remove_run(fs: &dyn Fs, output: &Path) -> Result<()> {
    for name in RUN_FILES {
        let path = output.join(name);
        if fs.exists(&path) {
            fs.remove_file(&path).map_err(pmetal_formats::Error::io("remove", &path))?;
        }
    }
    for name in RUN_FOLDERS {
        let path = output.join(name);
        if fs.exists(&path) {
            atomic::remove_directory(fs, &path)?;
        }
    }
    Ok(())
}

/// Writes the results of a finished run.
///
/// # Errors
/// What writing returns; each folder appears complete or not at all.
pub fn save(
    fs: &dyn Fs,
    output: &Path,
    learner: &Learner,
    resolved: &ResolvedConfig,
    description: &Description,
) -> Result<Saved> {
    let saved = match &description.adapter {
        Some(config) => {
            let folder = output.join("adapter");
            let mut commit = DirectoryCommit::begin(fs, &folder)?;
            write_adapter(&mut commit, learner.decoder(), config)?;
            commit.write("README.md", model_card(resolved, description).as_bytes())?;
            commit.commit()?;
            Saved { folder, is_adapter: true }
        }
        None => {
            let folder = output.join("model");
            let mut commit = DirectoryCommit::begin(fs, &folder)?;
            let tensors: Vec<_> =
                learner.parameters().iter().map(|p| (p.name().to_owned(), p.value())).collect();
            write_tensors(&mut commit, "model.safetensors", &tensors)?;
            for (name, bytes) in OpenedModel::open(&description.source)?.side_files()? {
                commit.write(&name, &bytes)?;
            }
            commit.commit()?;
            Saved { folder, is_adapter: false }
        }
    };
    let records = metrics::read(fs, &output.join("metrics.jsonl"))?;
    let title = format!("{} on {}", description.source, resolved.config().dataset);
    atomic::write_file(fs, &output.join("loss.svg"), plot::loss_svg(&records, &title).as_bytes())?;
    let environment = serde_json::json!({
        "version": env!("CARGO_PKG_VERSION"),
        "architecture": std::env::consts::ARCH,
        "operating_system": std::env::consts::OS,
        "instructions": pmetal_engine::device::SimdLevel::current().name(),
        "threads": rayon::current_num_threads(),
        "peak_rss_bytes": super::resident_peak_bytes(),
    });
    atomic::write_file(fs, &output.join("env.json"), format!("{environment:#}\n").as_bytes())?;
    Ok(saved)
}

/// Writes the two files of an adapter folder as PEFT names them.
///
/// # Errors
/// What writing returns.
pub fn write_adapter(
    commit: &mut DirectoryCommit<'_>,
    decoder: &Decoder,
    config: &AdapterConfig,
) -> Result<()> {
    write_tensors(commit, lora::WEIGHTS_FILE, &lora::tensors(decoder)?)?;
    commit.write(lora::CONFIG_FILE, lora::config_to_write(decoder, config)?.to_json().as_bytes())?;
    Ok(())
}

/// Names and shapes of tensors, as f32.
pub(super) fn specs_of(tensors: &[(String, pmetal_engine::Tensor)]) -> Vec<TensorSpec> {
    let spec = |(name, tensor): &(String, pmetal_engine::Tensor)| TensorSpec {
        name: name.clone(),
        dtype: DType::F32,
        shape: tensor.shape().to_vec(),
    };
    tensors.iter().map(spec).collect()
}

/// Writes a safetensors file of f32 values, one tensor at a time.
pub(super) fn stream_tensors(
    writer: &mut dyn std::io::Write,
    tensors: &[(String, pmetal_engine::Tensor)],
    metadata: &BTreeMap<String, String>,
) -> pmetal_formats::Result<()> {
    let mut stream = SafetensorsWriter::begin(writer, specs_of(tensors), metadata)?;
    while let Some(next) = stream.next_tensor() {
        let tensor = tensors.iter().find(|(name, _)| *name == next.name).map(|(_, tensor)| tensor);
        let values = tensor.map(pmetal_engine::Tensor::to_f32_vec).transpose().map_err(|error| {
            let what = format!("tensor `{}`", next.name);
            pmetal_formats::Error::Write { what, source: std::io::Error::other(error) }
        })?;
        let values = values.unwrap_or_default();
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        stream.write_tensor(&bytes)?;
    }
    stream.finish()
}

fn write_tensors(
    commit: &mut DirectoryCommit<'_>,
    file: &str,
    tensors: &[(String, pmetal_engine::Tensor)],
) -> Result<()> {
    let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    commit.write_with(file, |writer| stream_tensors(writer, tensors, &metadata))?;
    Ok(())
}

fn model_card(resolved: &ResolvedConfig, description: &Description) -> String {
    let base = match &description.adapter {
        Some(adapter) => adapter.base_model_name_or_path.clone().unwrap_or_default(),
        None => description.source.to_string(),
    };
    format!(
        "---\nlibrary_name: peft\nbase_model: {base}\ntags:\n- lora\n- pmetal\n---\n\n\
         # Adapter of {base}\n\nTrained with PMetal {} on `{}` ({}).\n\n\
         ## Settings\n\n```toml\n{}```\n",
        env!("CARGO_PKG_VERSION"),
        resolved.config().dataset,
        description.dataset,
        resolved.to_run_toml(),
    )
}

/// What the model says to the configured prompt, most likely tokens only, so that samples can be compared.
///
/// # Errors
/// [`Error::Usage`] for a prompt without tokens; out of memory.
pub fn sample(
    learner: &Learner,
    description: &Description,
    prompt: &str,
    max_tokens: usize,
) -> Result<String> {
    let text = &description.text;
    let ids = match &text.template {
        Some(_) => {
            let messages = serde_json::json!([{ "role": "user", "content": prompt }]);
            text.chat_prompt(&messages)?.ids
        }
        None => text.tokenizer.encode_prompt(prompt)?,
    };
    let mut session = Session::new(learner.decoder())?;
    let logits = session.extend(&ids)?;
    let rules = StopRules { tokens: text.generation.stop_tokens.clone(), max_tokens };
    let mut generated = Vec::new();
    session.generate(logits, &Sampling::default(), &rules, |token| {
        generated.push(token);
        Ok(true)
    })?;
    let answer = text.tokenizer.decode(&generated, true)?;
    if text.template.is_some() {
        return Ok(answer);
    }
    // Decoders drop the space of a first token, which belongs between the prompt and what follows it.
    let head = text.tokenizer.decode(&ids, true)?;
    let whole = text.tokenizer.decode(&[ids, generated].concat(), true)?;
    Ok(whole.strip_prefix(&head).map_or(answer, str::to_owned))
}

/// Appends a sample to `samples.jsonl`.
///
/// # Errors
/// When the file cannot be written.
pub fn record_sample(fs: &dyn Fs, output: &Path, step: usize, prompt: &str, text: &str) -> Result<()> {
    let path = output.join("samples.jsonl");
    let line = serde_json::json!({ "step": step, "prompt": prompt, "text": text });
    let mut file = fs.open_append(&path).map_err(pmetal_formats::Error::io("open", &path))?;
    let written = std::io::Write::write_all(&mut file, format!("{line}\n").as_bytes());
    written.map_err(|error| Error::Format(pmetal_formats::Error::io("append to", &path)(error)))
}

/// Removes from `samples.jsonl` what was generated at a step or later, since a resumed run does it again.
///
/// # Errors
/// When the file cannot be read or rewritten.
pub fn drop_samples_from(fs: &dyn Fs, output: &Path, step: usize) -> Result<()> {
    let path = output.join("samples.jsonl");
    if !fs.exists(&path) {
        return Ok(());
    }
    let bytes = fs.read(&path, SAMPLES_LIMIT_BYTES).map_err(pmetal_formats::Error::io("read", &path))?;
    let is_kept = |line: &&[u8]| {
        let sample: Option<serde_json::Value> = serde_json::from_slice(line).ok();
        let made_at = sample.as_ref().and_then(|sample| sample.get("step")?.as_u64());
        made_at.is_some_and(|made_at| made_at < step as u64)
    };
    // A line without its end was torn by a kill.
    let kept: Vec<u8> = bytes
        .split_inclusive(|&byte| byte == b'\n')
        .filter(|line| line.ends_with(b"\n"))
        .filter(is_kept)
        .flatten()
        .copied()
        .collect();
    if kept.len() < bytes.len() {
        atomic::write_file(fs, &path, &kept)?;
    }
    Ok(())
}
