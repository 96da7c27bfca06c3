//! `pmetal infer`.

use std::io::{BufRead, IsTerminal, Read, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::Context;
use clap::Args;
use pmetal::core::{Model, ModelSource, embedded};
use pmetal::engine::Device;
use pmetal::generate::text::{OutputFilter, Piece};
use pmetal::generate::{Finish, Sampling, Session, StopRules};
use pmetal::{Error, lora};
use serde_json::{Value, json};

use super::{DeviceChoice, Precision};
use crate::failure::WithHint;
use crate::style;

/// Arguments of `pmetal infer`.
#[derive(Args)]
pub(crate) struct InferArguments {
    /// Model folder or GGUF file; without it, the base model that the adapter names, or the embedded model
    #[arg(long, value_name = "PATH")]
    model: Option<String>,
    /// Adapter folder, or a training run's folder
    #[arg(long, value_name = "DIR")]
    lora: Option<PathBuf>,
    /// Text to continue; `-` reads it from standard input
    #[arg(long, value_name = "TEXT")]
    prompt: Option<String>,
    /// Treat the prompt as a user's message and keep the conversation going
    #[arg(long)]
    chat: bool,
    /// System message of the chat
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Show what the model thinks before it answers
    #[arg(long)]
    show_thinking: bool,
    /// Divisor of the logits; 0 takes the most likely token [default: the model's own]
    #[arg(long, value_name = "X")]
    temperature: Option<f64>,
    /// Draw from this many most likely tokens; 0 = all [default: the model's own]
    #[arg(long, value_name = "N")]
    top_k: Option<usize>,
    /// Draw from the fewest tokens that reach this probability [default: the model's own]
    #[arg(long, value_name = "P")]
    top_p: Option<f64>,
    /// Leave out tokens less likely than this times the most likely [default: the model's own]
    #[arg(long, value_name = "P")]
    min_p: Option<f64>,
    /// Make tokens that occurred less likely; 1 = off [default: the model's own]
    #[arg(long, value_name = "X")]
    repetition_penalty: Option<f64>,
    /// Subtract this from the logit of every token that was generated
    #[arg(long, value_name = "X", default_value_t = 0.0, allow_negative_numbers = true)]
    presence_penalty: f64,
    /// Subtract this for each time that a token was generated
    #[arg(long, value_name = "X", default_value_t = 0.0, allow_negative_numbers = true)]
    frequency_penalty: f64,
    /// Most tokens to generate
    #[arg(long, value_name = "N", default_value_t = 256)]
    max_tokens: usize,
    /// Keys the draws: equal seeds give equal texts
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Text that ends the answer; may be given several times
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    /// Type of activations
    #[arg(long, value_enum, default_value = "auto")]
    dtype: Precision,
    /// Where to compute
    #[arg(long, value_enum, default_value = "auto")]
    device: DeviceChoice,
    /// Launch the kernels of every token one by one instead of replaying a recording (a CUDA graph)
    #[arg(long)]
    no_cuda_graph: bool,
    /// Print one JSON object with the text and counts instead of streaming it
    #[arg(long)]
    json: bool,
}

impl InferArguments {
    fn sampling(&self, defaults: &Sampling) -> pmetal::Result<Sampling> {
        let sampling = Sampling {
            temperature: self.temperature.unwrap_or(defaults.temperature),
            top_k: self.top_k.unwrap_or(defaults.top_k),
            top_p: self.top_p.unwrap_or(defaults.top_p),
            min_p: self.min_p.unwrap_or(defaults.min_p),
            repetition_penalty: self.repetition_penalty.unwrap_or(defaults.repetition_penalty),
            presence_penalty: self.presence_penalty,
            frequency_penalty: self.frequency_penalty,
            seed: self.seed,
        };
        sampling.check()?;
        Ok(sampling)
    }
}

/// A folder given by the user: an adapter, or a run that holds one.
pub(crate) fn adapter_folder(path: &std::path::Path) -> pmetal::Result<PathBuf> {
    let nested = path.join("adapter");
    let folder = if nested.join(lora::CONFIG_FILE).is_file() { nested } else { path.to_path_buf() };
    if folder.join(lora::CONFIG_FILE).is_file() {
        return Ok(folder);
    }
    Err(Error::Usage(format!(
        "there is no adapter in `{}`: {} is missing",
        path.display(),
        lora::CONFIG_FILE
    )))
}

/// Loads a model with an adapter on it; the adapter names its base model when the user does not.
pub(crate) fn load_model(
    model: Option<&str>,
    adapter: Option<&std::path::Path>,
    device: &Device,
    precision: Precision,
) -> anyhow::Result<Model> {
    let folder = adapter.map(adapter_folder).transpose()?;
    let named = match (model, &folder) {
        (Some(model), _) => Some(model.to_owned()),
        (None, Some(folder)) => lora::base_model_of(folder)?,
        (None, None) => None,
    };
    let source = ModelSource::parse(named.as_deref().unwrap_or(embedded::NAME));
    let loaded = Model::load(&source, device, precision.dtype(device)?, false);
    let mut model = loaded.hint("--model takes a folder in Hugging Face layout or a .gguf file")?;
    if let Some(folder) = &folder {
        lora::load(&mut model.decoder, folder, false)?;
    }
    for note in &model.notes {
        eprintln!("{} {note}", style::yellow("note:"));
    }
    Ok(model)
}

/// Generates, or chats until the input ends.
pub(crate) fn run(arguments: InferArguments) -> anyhow::Result<ExitCode> {
    let device = arguments.device.open()?;
    let model = load_model(arguments.model.as_deref(), arguments.lora.as_deref(), &device, arguments.dtype)?;
    let sampling = arguments.sampling(&model.text.generation.sampling)?;
    let prompt = match arguments.prompt.as_deref() {
        Some("-") => {
            let mut text = String::new();
            std::io::stdin()
                .read_to_string(&mut text)
                .context("cannot read the prompt from standard input")?;
            Some(text)
        }
        other => other.map(str::to_owned),
    };
    let mut session = Session::new(&model.decoder)?;
    session.record_steps(!arguments.no_cuda_graph);
    let mut speaker = Speaker { arguments: &arguments, model: &model, session, sampling };
    if arguments.chat {
        return chat_loop(&mut speaker, prompt);
    }
    let prompt = match prompt {
        Some(prompt) => prompt,
        None if matches!(model.source, ModelSource::Embedded) => "Once upon a time".to_owned(),
        None => {
            return Err(Error::Usage("there is no text to continue".to_owned()))
                .hint("give --prompt TEXT, or --chat");
        }
    };
    let ids = model.text.tokenizer.encode_prompt(&prompt)?;
    if !arguments.json {
        print!("{prompt}");
    }
    speaker.answer(&ids, &prompt, true)?;
    Ok(ExitCode::SUCCESS)
}

/// One model that talks.
struct Speaker<'a> {
    arguments: &'a InferArguments,
    model: &'a Model,
    session: Session<'a>,
    sampling: Sampling,
}

impl Speaker<'_> {
    /// Continues a prompt, streaming to stdout, and returns the visible text. What the prompt shares with the
    /// text before it is not computed again. `reads_on` says that the text follows the prompt's without a border, so
    /// that a space between them belongs to it.
    fn answer(&mut self, ids: &[u32], prompt: &str, reads_on: bool) -> anyhow::Result<String> {
        let shared = self.session.ids().iter().zip(ids).take_while(|(a, b)| a == b).count();
        // At least one token must go through the model to have logits.
        let kept = shared.min(ids.len().saturating_sub(1));
        self.session.truncate(kept);
        let start = Instant::now();
        let logits = self.session.extend(&ids[kept..])?;
        let prefill_seconds = start.elapsed().as_secs_f64();

        let rules = StopRules {
            tokens: self.model.text.generation.stop_tokens.clone(),
            max_tokens: self.arguments.max_tokens,
        };
        let mut filter = OutputFilter::new(&self.arguments.stop, prompt);
        let mut stream = self.model.text.tokenizer.decode_stream(true);
        if reads_on {
            // Decoders drop the space of a first token.
            for &id in ids {
                stream.push(id)?;
            }
        }
        let (mut visible, mut thought, mut generated) = (String::new(), String::new(), 0);
        let quiet = self.arguments.json;
        let show_thinking = self.arguments.show_thinking;
        let mut show = |pieces: Vec<Piece>| -> std::io::Result<()> {
            let mut out = std::io::stdout().lock();
            for piece in pieces {
                if piece.thinking { &mut thought } else { &mut visible }.push_str(&piece.text);
                match (quiet, piece.thinking) {
                    (true, _) => {}
                    (false, true) if show_thinking => write!(out, "{}", style::faint_out(&piece.text))?,
                    (false, true) => {}
                    (false, false) => write!(out, "{}", piece.text)?,
                }
            }
            out.flush()
        };
        let start = Instant::now();
        let finish = self.session.generate(logits, &self.sampling, &rules, |token| {
            generated += 1;
            let pieces = stream.push(token)?.map(|text| filter.push(&text)).unwrap_or_default();
            show(pieces)
                .map_err(|error| Error::Usage(format!("cannot write to standard output: {error}")))?;
            Ok(!filter.stopped())
        })?;
        if let Some(rest) = stream.finish()? {
            show(filter.push(&rest))?;
        }
        show(filter.finish())?;
        let seconds = start.elapsed().as_secs_f64();
        if quiet {
            let finish = if finish == Finish::Stopped { "stop" } else { "length" };
            println!(
                "{}",
                json!({
                    "text": visible, "thinking": thought, "finish_reason": finish,
                    "prompt_tokens": ids.len(), "generated_tokens": generated,
                    "prefill_seconds": prefill_seconds, "decode_seconds": seconds,
                })
            );
        } else {
            println!();
            if std::io::stderr().is_terminal() {
                let rate = f64::from(generated) / seconds.max(1e-9);
                eprintln!("{}", style::faint(&format!("{generated} tokens, {rate:.1} tokens/s")));
            }
        }
        Ok(visible)
    }
}

fn chat_loop(speaker: &mut Speaker<'_>, first: Option<String>) -> anyhow::Result<ExitCode> {
    let mut messages: Vec<Value> = Vec::new();
    if let Some(system) = &speaker.arguments.system {
        messages.push(json!({ "role": "system", "content": system }));
    }
    let interactive = std::io::stdin().is_terminal() && first.is_none();
    let mut lines = std::io::stdin().lock().lines();
    let once = first.is_some() && !std::io::stdin().is_terminal();
    let mut next = first;
    loop {
        let text = match next.take() {
            Some(text) => text,
            None => {
                if interactive || std::io::stdin().is_terminal() {
                    eprint!("{} ", style::bold("you:"));
                }
                match lines.next() {
                    Some(line) => line.context("cannot read standard input")?,
                    None => return Ok(ExitCode::SUCCESS),
                }
            }
        };
        if text.trim().is_empty() {
            continue;
        }
        if text.trim() == "/exit" {
            return Ok(ExitCode::SUCCESS);
        }
        messages.push(json!({ "role": "user", "content": text }));
        let prompt = speaker.model.text.chat_prompt(&Value::Array(messages.clone()))?;
        let answer = speaker.answer(&prompt.ids, &prompt.text, false)?;
        messages.push(json!({ "role": "assistant", "content": answer.trim() }));
        if once {
            return Ok(ExitCode::SUCCESS);
        }
    }
}
