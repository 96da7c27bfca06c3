//! `pmetal train`.

mod arguments;
mod watch;

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use pmetal::Error;
use pmetal::core::embedded;
use pmetal::formats::atomic::RunLock;
use pmetal::formats::fs::{Fs, RealFs};
use pmetal::trainer::artefacts;
use pmetal::trainer::config::{ConfigLayers, ResolvedConfig};
use pmetal::trainer::memory::advice;
use pmetal::trainer::prepare::{self, Prepared};
use pmetal::trainer::train_loop::{Event, Outcome, TrainingRun};

pub(crate) use arguments::TrainArguments;

use crate::failure::WithHint;
use crate::interrupt::Interrupts;
use crate::{memory, style};

/// What is suggested when neither model nor dataset is named: a minute's lesson for the embedded model.
const DEMONSTRATION: [(&str, &str); 11] = [
    ("model", embedded::NAME),
    ("dataset", embedded::DATASET_NAME),
    ("lora_r", "32"),
    ("lora_alpha", "64"),
    ("learning_rate", "4e-3"),
    ("batch_size", "8"),
    ("max_seq_len", "256"),
    ("max_steps", "400"),
    ("eval_every", "100"),
    ("sample_prompt", "ROMEO:"),
    ("sample_max_tokens", "120"),
];

/// Trains, or prints what would be trained.
pub(crate) fn run(arguments: TrainArguments) -> anyhow::Result<ExitCode> {
    let mut resolved = resolve(&arguments)?;
    for note in resolved.notes() {
        eprintln!("{} {note}", style::yellow("note:"));
    }
    super::set_up_threads(resolved.config().threads)?;
    let device = super::open_device(resolved.config().device, resolved.config().deterministic)?;
    let prepared = prepare::prepare(&mut resolved, &device)
        .map_err(|error| memory::explained(error, &device, Vec::new))?;
    let mut watcher = watch::Watcher::new(&arguments, resolved.config());
    watcher.header(&resolved, &prepared);
    if arguments.dry_run {
        return watch::dry_run(&arguments, &resolved, &prepared);
    }
    let fs: Arc<dyn Fs> = Arc::new(RealFs);
    let output = Path::new(&resolved.config().output).to_path_buf();
    fs.create_dir_all(&output).map_err(pmetal::formats::Error::io("create", &output)).map_err(Error::from)?;
    let _lock = RunLock::acquire(&output).map_err(Error::from)?;
    check_folder(&arguments, &fs, &output, &resolved)?;

    let interrupts = Interrupts::install();
    let Prepared { learner, batches, plan, description } = prepared;
    let total = plan.total_steps;
    let mut show = |event: Event<'_>| watcher.show(event, &description);
    let mut training =
        TrainingRun::open(&fs, plan, learner, &batches, arguments.resume, interrupts.flag(), &mut show)?;
    // Only now: a resumed run that is refused keeps its own file.
    let run_file = output.join(RUN_FILE);
    pmetal::formats::atomic::write_file(&*fs, &run_file, resolved.to_run_toml().as_bytes())
        .map_err(Error::from)?;
    artefacts::drop_samples_from(&*fs, &output, training.next_due_step())?;
    let outcome = training.run(&mut show);
    let learner = training.learner();
    let advice = || advice(resolved.config(), learner.decoder(), &description);
    let outcome = outcome.map_err(|error| memory::explained(error, &device, advice))?;
    match outcome {
        Outcome::Interrupted { step } => {
            watcher.interrupted(step, total, &arguments);
            Ok(ExitCode::from(interrupts.exit_code()))
        }
        Outcome::Finished { .. } => {
            let saved = artefacts::save(&*fs, &output, learner, &resolved, &description)?;
            watcher.finished(&saved, &resolved, &description)?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// Flags, `--set`, a file and suggestions as one configuration.
pub(crate) fn resolve(arguments: &TrainArguments) -> anyhow::Result<ResolvedConfig> {
    let mut layers = ConfigLayers::new();
    if let Some(file) = &arguments.config {
        layers.file(&RealFs, file)?;
    }
    arguments.set.iter().for_each(|assignment| layers.set(assignment));
    arguments.settings.iter().for_each(|(name, text)| layers.flag(name, text));
    if !layers.mentions("model") && !layers.mentions("dataset") {
        DEMONSTRATION.iter().for_each(|(name, text)| layers.suggest(name, text));
    }
    layers
        .resolve()
        .hint("`pmetal train --help` lists every setting; without any it trains the embedded model")
}

/// Every setting of a run, in its folder.
const RUN_FILE: &str = "run.toml";

/// Refuses to mix two runs in one folder, and clears it where one is to be replaced.
fn check_folder(
    arguments: &TrainArguments,
    fs: &Arc<dyn Fs>,
    output: &Path,
    resolved: &ResolvedConfig,
) -> anyhow::Result<()> {
    let run_file = output.join(RUN_FILE);
    if !arguments.resume && fs.exists(&run_file) {
        if !arguments.overwrite {
            let message = format!("`{}` holds a run already", output.display());
            return Err(Error::Usage(message))
                .hint("give another --output, --resume to go on with it, or --overwrite to replace it");
        }
        artefacts::remove_run(&**fs, output)?;
    }
    if arguments.resume && fs.exists(&run_file) {
        let mut layers = ConfigLayers::new();
        layers.file(&**fs, &run_file)?;
        let before = layers.resolve()?;
        let diff = before.config().diff_for_resume(resolved.config());
        if !diff.refused.is_empty() {
            let message = format!("the run in `{}` has another configuration:\n{diff}", output.display());
            return Err(Error::Usage(message))
                .hint("give the settings that the run began with, or another --output");
        }
    }
    Ok(())
}
