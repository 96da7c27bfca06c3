//! What a person sees of a run: a header, progress, samples, and what to do next.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use pmetal::formats::fs::RealFs;
use pmetal::trainer::artefacts::{self, Saved};
use pmetal::trainer::config::{Origin, ResolvedConfig, TrainConfig};
use pmetal::trainer::memory;
use pmetal::trainer::metrics::StepRecord;
use pmetal::trainer::prepare::{Description, Prepared};
use pmetal::trainer::train_loop::Event;
use serde_json::json;

use super::TrainArguments;
use crate::{output, style};

/// Without a terminal, a line at most this often.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// Shows a run.
pub(super) struct Watcher {
    quiet: bool,
    json: bool,
    bar: Option<ProgressBar>,
    last_line: Option<Instant>,
    output: PathBuf,
    prompt: String,
    sample_tokens: usize,
    total: usize,
    latest: Option<StepRecord>,
    first_loss: Option<f64>,
    peak_bytes: usize,
}

impl Watcher {
    pub(super) fn new(arguments: &TrainArguments, config: &TrainConfig) -> Self {
        Self {
            quiet: arguments.quiet,
            json: arguments.json,
            bar: None,
            last_line: None,
            output: PathBuf::from(&config.output),
            prompt: config.sample_prompt.clone(),
            sample_tokens: config.sample_max_tokens,
            total: 0,
            latest: None,
            first_loss: None,
            peak_bytes: 0,
        }
    }

    /// Says something above the progress bar.
    fn say(&self, text: &str) {
        if self.quiet {
            return;
        }
        match &self.bar {
            Some(bar) => bar.suspend(|| eprintln!("{text}")),
            None => eprintln!("{text}"),
        }
    }

    /// The block that a run begins with.
    pub(super) fn header(&mut self, resolved: &ResolvedConfig, prepared: &Prepared) {
        self.total = prepared.plan.total_steps;
        for note in &prepared.description.notes {
            self.say(&format!("{} {note}", style::yellow("note:")));
        }
        if !self.quiet {
            let rows: Vec<Vec<String>> = facts(resolved, prepared)
                .into_iter()
                .map(|(name, value)| vec![format!("{name:<10}"), value])
                .collect();
            eprint!("\n{}", output::table(&rows));
            eprintln!();
        }
        if !self.quiet && !self.json && std::io::stderr().is_terminal() {
            let bar = ProgressBar::with_draw_target(Some(self.total as u64), ProgressDrawTarget::stderr());
            let look = "{bar:24} {pos}/{len}  {msg}  {eta} left";
            if let Ok(style) = ProgressStyle::with_template(look) {
                bar.set_style(style.progress_chars("=> "));
            }
            self.bar = Some(bar);
        }
    }

    /// Shows one event.
    pub(super) fn show(&mut self, event: Event<'_>, description: &Description) -> pmetal::Result<()> {
        match event {
            Event::Step(record) => self.step(record),
            Event::Evaluation(record) => {
                self.fact(json!({ "event": "eval", "step": record.step, "eval_loss": record.eval_loss }));
                let text = format!("held-out loss {:.4} after {} steps", record.eval_loss, record.step);
                self.say(&style::bold(&text));
            }
            Event::Sample(step, learner) => {
                let text = artefacts::sample(learner, description, &self.prompt, self.sample_tokens)?;
                artefacts::record_sample(&RealFs, &self.output, step, &self.prompt, &text)?;
                self.fact(json!({ "event": "sample", "step": step, "prompt": self.prompt, "text": text }));
                let heading = match step {
                    0 => "sample before training".to_owned(),
                    _ => format!("sample after {step} steps"),
                };
                let body: String =
                    format!("{}{text}", self.prompt).lines().map(|line| format!("  {line}\n")).collect();
                self.say(&format!("{}\n{}", style::bold(&heading), body.trim_end()));
            }
            Event::Checkpoint(step, path) => {
                self.fact(json!({ "event": "checkpoint", "step": step, "path": path }));
            }
            Event::Note(text) => self.say(&format!("{} {text}", style::yellow("note:"))),
        }
        Ok(())
    }

    /// A line of JSON, where they are asked for.
    fn fact(&self, value: serde_json::Value) {
        if self.json {
            println!("{value}");
        }
    }

    fn step(&mut self, record: &StepRecord) {
        self.first_loss.get_or_insert(record.loss);
        self.latest = Some(record.clone());
        self.peak_bytes = record.peak_bytes as usize;
        let mut fact = json!({
            "event": "step", "step": record.step, "loss": record.loss, "lr": record.lr,
            "grad_norm": record.grad_norm, "tokens_per_second": record.tokens_per_second,
            "peak_bytes": record.peak_bytes,
        });
        let mut balance = String::new();
        if let Some(loss) = record.balance_loss {
            fact["balance_loss"] = json!(loss);
            balance = format!("  balance {loss:.4}");
        }
        self.fact(fact);
        let text = format!(
            "loss {:.4}{balance}  lr {:.2e}  norm {:.3}  {:.0} tokens/s  {}",
            record.loss,
            record.lr,
            record.grad_norm,
            record.tokens_per_second,
            output::bytes(self.peak_bytes),
        );
        match &self.bar {
            Some(bar) => {
                bar.set_position(record.step);
                bar.set_message(text);
            }
            None => {
                let due = self.last_line.is_none_or(|last| last.elapsed() >= LINE_EVERY);
                if due || record.step as usize == self.total {
                    self.last_line = Some(Instant::now());
                    let done = record.step as f64;
                    let left = record.elapsed_s / done.max(1.0) * (self.total as f64 - done);
                    self.say(&format!(
                        "step {:>5}/{}  {text}  {} left",
                        record.step,
                        self.total,
                        output::duration(left)
                    ));
                }
            }
        }
    }

    /// Says how to go on with a run that was stopped.
    pub(super) fn interrupted(&mut self, step: usize, total: usize, arguments: &TrainArguments) {
        if let Some(bar) = self.bar.take() {
            bar.abandon();
        }
        let mut again: Vec<String> = std::env::args().map(|argument| quoted(&argument)).collect();
        if !arguments.resume {
            again.push("--resume".to_owned());
        }
        match step {
            0 => self.say("stopped before the first step"),
            _ => self.say(&format!("stopped after {step} of {total} steps; a checkpoint is written")),
        }
        self.say(&format!("go on with:  {}", style::green(&again.join(" "))));
    }

    /// Says what came out of a finished run and how to use it.
    pub(super) fn finished(
        &mut self,
        saved: &Saved,
        resolved: &ResolvedConfig,
        description: &Description,
    ) -> anyhow::Result<()> {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
        let flag = if saved.is_adapter { "--lora" } else { "--model" };
        let prompt = match (&description.text.template, resolved.config().sample_prompt.as_str()) {
            (Some(_), _) => "--chat".to_owned(),
            (None, "") => "--prompt \"...\"".to_owned(),
            (None, prompt) => format!("--prompt {} --temperature 0.8", quoted(prompt)),
        };
        let talk =
            format!("{} infer {flag} {} {prompt}", program(), quoted(&saved.folder.display().to_string()));
        if let Some(record) = &self.latest {
            self.say(&format!(
                "\nloss {:.4} -> {:.4} in {} steps, {}; {:.0} tokens/s, {} at the peak",
                self.first_loss.unwrap_or(f64::NAN),
                record.loss,
                record.step,
                output::duration(record.elapsed_s),
                record.tokens as f64 / record.elapsed_s.max(1e-9),
                output::bytes(self.peak_bytes),
            ));
        }
        let what = if saved.is_adapter { "adapter" } else { "model" };
        self.say(&format!("{what}:  {}", style::cyan(&saved.folder.display().to_string())));
        self.say(&format!("picture:  {}", style::cyan(&self.output.join("loss.svg").display().to_string())));
        self.say(&format!("talk to it:  {}", style::green(&talk)));
        self.fact(json!({ "event": "finished", "folder": saved.folder, "command": talk }));
        Ok(())
    }
}

/// The program as the user called it.
fn program() -> String {
    std::env::args().next().map_or_else(|| "pmetal".to_owned(), |name| quoted(&name))
}

/// An argument as a shell takes it.
fn quoted(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:,@%+".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        text.to_owned()
    } else {
        format!("'{}'", text.replace('\'', r"'\''"))
    }
}

fn facts(resolved: &ResolvedConfig, prepared: &Prepared) -> Vec<(&'static str, String)> {
    let (config, description, plan) = (resolved.config(), &prepared.description, &prepared.plan);
    let trained = description.trained_parameters;
    let share = 100.0 * trained as f64 / description.parameters as f64;
    let tuning = match &description.adapter {
        Some(adapter) => format!(
            "LoRA r {}, alpha {} (scale {:.3}), {} modules, {} parameters ({share:.2} %)",
            adapter.r,
            adapter.lora_alpha,
            if adapter.use_rslora {
                adapter.lora_alpha / (adapter.r as f64).sqrt()
            } else {
                adapter.lora_alpha / adapter.r as f64
            },
            description.adapted_modules,
            output::grouped(trained as u128),
        ),
        None => format!("all weights, {} parameters", output::grouped(trained as u128)),
    };
    let automatic =
        |name: &str| if *resolved.origin(name) == Origin::Automatic { " (automatic)" } else { "" };
    let packing = match config.packing {
        true => format!("packed, {:.1} % filled", 100.0 * description.fill_ratio),
        false => "not packed".to_owned(),
    };
    let (trained_tokens, tokens) = description.epoch_tokens;
    vec![
        (
            "model",
            format!(
                "{} ({}, {} parameters)",
                description.source,
                description.family,
                output::grouped(description.parameters)
            ),
        ),
        ("training", tuning),
        ("data", format!("{}: {}", config.dataset, description.dataset)),
        (
            "examples",
            format!(
                "{} to train on, {} held out; {} of {} tokens trained",
                description.examples.0,
                description.examples.1,
                output::grouped(trained_tokens as u128),
                output::grouped(tokens as u128)
            ),
        ),
        (
            "batches",
            format!(
                "{} x {} tokens{}{}, accumulation {}, {packing}",
                config.batch_size,
                config.max_seq_len,
                automatic("max_seq_len"),
                automatic("batch_size"),
                config.gradient_accumulation_steps
            ),
        ),
        ("steps", format!("{} ({} an epoch)", plan.total_steps, description.steps_per_epoch)),
        (
            "rate",
            format!(
                "{:e}, {}, {} warm-up steps",
                config.learning_rate,
                config_name(config, "schedule"),
                plan.schedule.warmup_steps
            ),
        ),
        (
            "machine",
            format!(
                "cpu, {} threads, {}, {} activations",
                rayon::current_num_threads(),
                pmetal::engine::device::SimdLevel::current().name(),
                description.dtype
            ),
        ),
        ("output", config.output.clone()),
    ]
}

fn config_name(config: &TrainConfig, field: &str) -> String {
    config.value(field).map(|value| value.to_string().trim_matches('"').to_owned()).unwrap_or_default()
}

/// What a dry run prints besides the header: memory that is held and that a step will need.
pub(super) fn dry_run(
    arguments: &TrainArguments,
    resolved: &ResolvedConfig,
    prepared: &Prepared,
) -> anyhow::Result<ExitCode> {
    let config = resolved.config();
    let table = memory::estimate(config, prepared.learner.decoder(), &prepared.description);
    let total: usize = table.iter().map(|row| row.1).sum();
    if arguments.json {
        let memory: serde_json::Map<String, serde_json::Value> =
            table.iter().map(|(name, bytes)| (name.replace(' ', "_"), json!(bytes))).collect();
        println!(
            "{}",
            json!({
                "total_steps": prepared.plan.total_steps, "memory_bytes": memory, "memory_total_bytes": total,
                "config": config.to_json(),
            })
        );
    } else {
        let mut rows: Vec<Vec<String>> =
            table.iter().map(|(name, size)| vec![(*name).to_owned(), output::bytes(*size)]).collect();
        rows.push(vec!["in all".to_owned(), output::bytes(total)]);
        println!("memory (estimate)\n{}", output::table(&rows));
    }
    Ok(ExitCode::SUCCESS)
}
