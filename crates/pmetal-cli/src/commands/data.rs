//! `pmetal data`.

use std::process::ExitCode;

use clap::{Args, Subcommand, ValueEnum};
use pmetal::core::{Model, ModelSource, embedded};
use pmetal::data::{Dataset, Example};
use pmetal::engine::{DType, Device};
use pmetal::trainer::config::{ConfigLayers, TrainConfig};
use pmetal::trainer::prepare;
use serde_json::json;

use crate::style;

/// Arguments of `pmetal data`.
#[derive(Args)]
pub(crate) struct DataArguments {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Print rows as the model will see them, with what is trained
    Show(Show),
}

#[derive(Args)]
struct Show {
    /// Model whose tokenizer and chat template are used
    #[arg(long, value_name = "PATH", default_value = embedded::NAME)]
    model: String,
    /// Dataset file or folder
    #[arg(long, value_name = "PATH", default_value = embedded::DATASET_NAME)]
    dataset: String,
    /// First example, counted from 1
    #[arg(long, value_name = "N", default_value_t = 1)]
    row: usize,
    /// How many examples to print
    #[arg(long, value_name = "N", default_value_t = 3)]
    count: usize,
    /// Which tokens of a conversation have a loss
    #[arg(long, value_enum, default_value = "assistant")]
    train_on: Trained,
    /// Tokens of the longest example; 0 = automatic
    #[arg(long, value_name = "N", default_value_t = 0)]
    max_seq_len: usize,
    /// What happens to longer examples
    #[arg(long, value_enum, default_value = "truncate")]
    on_long: Long,
    /// Print one JSON object per example, with ids and labels
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Trained {
    Assistant,
    Last,
    All,
}

#[derive(Clone, Copy, ValueEnum)]
enum Long {
    Truncate,
    Drop,
    Error,
}

pub(crate) fn run(arguments: DataArguments) -> anyhow::Result<ExitCode> {
    match arguments.what {
        What::Show(arguments) => show(&arguments),
    }
}

impl Show {
    /// The part of a training configuration that decides how rows are read.
    fn config(&self) -> anyhow::Result<TrainConfig> {
        let mut layers = ConfigLayers::new();
        let named = |value: &dyn std::fmt::Debug| format!("{value:?}").to_lowercase();
        let train_on = self.train_on.to_possible_value().map(|value| value.get_name().to_owned());
        let on_long = self.on_long.to_possible_value().map(|value| value.get_name().to_owned());
        let settings = [
            ("model", self.model.clone()),
            ("dataset", self.dataset.clone()),
            ("train_on", train_on.unwrap_or_default()),
            ("on_long", on_long.unwrap_or_default()),
            ("max_seq_len", named(&self.max_seq_len)),
            ("eval_fraction", "0".to_owned()),
        ];
        settings.iter().for_each(|(name, text)| layers.flag(name, text));
        Ok(layers.resolve()?.config().clone())
    }
}

fn show(arguments: &Show) -> anyhow::Result<ExitCode> {
    let config = arguments.config()?;
    let source = ModelSource::parse(&arguments.model);
    let model = Model::load(&source, &Device::cpu(), DType::F32, false)?;
    let dataset = prepare::read_dataset(&config, &model)?;
    for note in &dataset.notes {
        eprintln!("{} {note}", style::yellow("note:"));
    }
    eprintln!("detected: {}", dataset.description());
    let first = arguments.row.saturating_sub(1);
    for (number, example) in dataset.train.iter().enumerate().skip(first).take(arguments.count) {
        if arguments.json {
            println!("{}", as_json(number, example, &model)?);
        } else {
            print_example(number, example, &dataset, &model)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Ids, and labels in the convention of Hugging Face: -100 where nothing is trained, else the token itself.
fn as_json(number: usize, example: &Example, model: &Model) -> anyhow::Result<serde_json::Value> {
    let labels: Vec<i64> = example
        .ids
        .iter()
        .zip(&example.trained)
        .enumerate()
        .map(|(position, (&id, &trained))| if trained && position > 0 { i64::from(id) } else { -100 })
        .collect();
    Ok(json!({
        "row": number + 1,
        "line": example.line,
        "ids": example.ids,
        "labels": labels,
        "tokens": example.ids.len(),
        "trained_tokens": example.trained_tokens(),
        "text": model.text.tokenizer.decode(&example.ids, false)?,
    }))
}

fn print_example(number: usize, example: &Example, dataset: &Dataset, model: &Model) -> anyhow::Result<()> {
    println!(
        "row {} (line {}): {} tokens of at most {}, {} trained",
        number + 1,
        example.line,
        example.ids.len(),
        dataset.max_seq_len,
        example.trained_tokens()
    );
    // Runs of tokens with the same fate, so that the text stays readable.
    let mut start = 0;
    while start < example.ids.len() {
        let trained = example.trained[start] && start > 0;
        let same = |&index: &usize| (example.trained[index] && index > 0) == trained;
        let end = (start..example.ids.len()).find(|index| !same(index)).unwrap_or(example.ids.len());
        let text = model.text.tokenizer.decode(&example.ids[start..end], false)?;
        let mark = if trained { "trained" } else { "context" };
        for line in text.split('\n') {
            let line = if trained { style::green_out(line) } else { style::faint_out(line) };
            println!("  {mark} | {line}");
        }
        start = end;
    }
    println!();
    Ok(())
}
