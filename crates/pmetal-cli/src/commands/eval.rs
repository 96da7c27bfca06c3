//! `pmetal eval`.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use clap::Args;
use pmetal::core::embedded;
use pmetal::eval::perplexity;
use pmetal::trainer::config::ConfigLayers;
use pmetal::trainer::prepare;
use serde_json::json;

use super::infer::load_model;
use super::{DeviceChoice, Precision};
use crate::style;

/// Arguments of `pmetal eval`.
#[derive(Args)]
pub(crate) struct EvalArguments {
    /// Model folder or GGUF file; without it, the base model that the adapter names, or the embedded model
    #[arg(long, value_name = "PATH")]
    model: Option<String>,
    /// Adapter folder, or a training run's folder
    #[arg(long, value_name = "DIR")]
    lora: Option<PathBuf>,
    /// Dataset file or folder
    #[arg(long, value_name = "PATH", default_value = embedded::DATASET_NAME)]
    dataset: String,
    /// Score at most this many examples; 0 = all
    #[arg(long, value_name = "N", default_value_t = 0)]
    max_examples: usize,
    /// Tokens of the longest example; 0 = automatic
    #[arg(long, value_name = "N", default_value_t = 0)]
    max_seq_len: usize,
    /// Type of activations
    #[arg(long, value_enum, default_value = "auto")]
    dtype: Precision,
    /// Where to compute
    #[arg(long, value_enum, default_value = "auto")]
    device: DeviceChoice,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Scores the trained tokens of a dataset.
pub(crate) fn run(arguments: EvalArguments) -> anyhow::Result<ExitCode> {
    let device = arguments.device.open()?;
    let model = load_model(arguments.model.as_deref(), arguments.lora.as_deref(), &device, arguments.dtype)?;
    let mut layers = ConfigLayers::new();
    layers.flag("model", &model.source.to_string());
    layers.flag("dataset", &arguments.dataset);
    layers.flag("max_seq_len", &arguments.max_seq_len.to_string());
    layers.flag("eval_fraction", "0");
    let mut dataset = prepare::read_dataset(layers.resolve()?.config(), &model)?;
    for note in &dataset.notes {
        eprintln!("{} {note}", style::yellow("note:"));
    }
    if arguments.max_examples > 0 {
        dataset.train.truncate(arguments.max_examples);
    }
    let start = Instant::now();
    let score = perplexity::score(&model.decoder, &dataset.train)?;
    let seconds = start.elapsed().as_secs_f64();
    if arguments.json {
        println!(
            "{}",
            json!({
                "loss": score.loss, "perplexity": score.loss.exp(), "scored_tokens": score.scored_tokens,
                "tokens": score.tokens, "examples": dataset.train.len(), "seconds": seconds,
            })
        );
    } else {
        println!(
            "loss {:.4}, perplexity {:.3} over {} tokens of {} examples ({:.0} tokens/s)",
            score.loss,
            score.loss.exp(),
            score.scored_tokens,
            dataset.train.len(),
            score.tokens as f64 / seconds.max(1e-9)
        );
    }
    Ok(ExitCode::SUCCESS)
}
