//! The training loop: validate, sample, checkpoint, then one step, always in that order.
//!
//! Everything that a step depends on is a pure function of the configuration, the data and the step's number, so a
//! run that was killed goes on from its newest checkpoint to the same bits.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use pmetal_formats::fs::Fs;
use pmetal_formats::safetensors::SafetensorsWriter;
use serde::{Deserialize, Serialize};

use super::artefacts::{specs_of, stream_tensors};
use super::checkpoint::{Checkpoint, CheckpointStore, Identity, Latest, NewFile};
use super::learner::{Learner, MicroBatch};
use super::metrics::{Due, EvalRecord, Header, MetricsWriter, Record, StepRecord};
use super::schedule::Schedule;
use crate::error::{Error, Result};

/// The file of a checkpoint that holds parameters and moments.
const STATE_FILE: &str = "training.safetensors";

/// Where the batches of a run come from.
pub trait Batches {
    /// The micro-batches of an optimizer step, counted from 0; the same ones whenever it is asked.
    ///
    /// # Errors
    /// When the data cannot give them.
    fn step(&self, step: usize) -> Result<Vec<MicroBatch>>;

    /// The batches of the evaluation split; empty when there is none.
    fn evaluation(&self) -> &[MicroBatch];
}

/// How often something happens, in optimizer steps; it also happens after the last one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Every(pub usize);

impl Every {
    fn is_due(self, step: usize, total: usize) -> bool {
        self.0 > 0 && (step == total || step.is_multiple_of(self.0))
    }
}

/// What a run does, resolved to numbers.
pub struct RunPlan {
    /// The run's folder.
    pub output: PathBuf,
    /// Optimizer steps of the whole run.
    pub total_steps: usize,
    /// Learning rate by step.
    pub schedule: Schedule,
    /// When the evaluation split is scored.
    pub evaluate: Every,
    /// When a sample is generated.
    pub sample: Every,
    /// When a checkpoint is written; never at step 0.
    pub save: Every,
    /// When a step is reported.
    pub report: Every,
    /// Checkpoints that are kept.
    pub keep_checkpoints: usize,
    /// What checkpoints belong to.
    pub identity: Identity,
    /// The resolved configuration for the first record of `metrics.jsonl`.
    pub header: serde_json::Value,
}

/// What happens during a run, for whoever shows it.
pub enum Event<'a> {
    /// A report of training.
    Step(&'a StepRecord),
    /// The evaluation split was scored.
    Evaluation(&'a EvalRecord),
    /// It is time for a sample after this many steps.
    Sample(usize, &'a Learner),
    /// A checkpoint was written.
    Checkpoint(usize, PathBuf),
    /// Something that the user should know.
    Note(String),
}

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Outcome {
    /// All steps are done.
    Finished {
        /// Loss of the last reported step.
        loss: f64,
    },
    /// It was asked to stop, and wrote a checkpoint.
    Interrupted {
        /// Steps that are done.
        step: usize,
    },
}

/// What a checkpoint carries besides tensors.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
struct Progress {
    tokens: u64,
    trained_tokens: u64,
    elapsed_s: f64,
    /// What the next report covers already.
    window: Window,
    /// Whether the run was stopped before the evaluation and the sample that were due at this step were made.
    #[serde(default)]
    is_cut_short: bool,
}

/// Sums since the last report.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
struct Window {
    /// Loss times trained tokens.
    loss: f64,
    /// What balances experts, times trained tokens.
    #[serde(default)]
    balance_loss: Option<f64>,
    trained_tokens: usize,
    tokens: usize,
    seconds: f64,
}

/// A run in progress.
pub struct TrainingRun<'a> {
    plan: RunPlan,
    learner: Learner,
    batches: &'a dyn Batches,
    store: CheckpointStore,
    metrics: MetricsWriter,
    progress: Progress,
    first_step: usize,
    next_due_step: usize,
    interrupted: Arc<AtomicBool>,
}

impl<'a> TrainingRun<'a> {
    /// Starts a run, or goes on with one from its newest valid checkpoint when `resume` is set; where there is none
    /// yet, that is a start. `interrupted` makes the run write a checkpoint and end after the step or the evaluation
    /// batch at hand.
    ///
    /// # Errors
    /// [`Error::Usage`] when the checkpoint belongs to another configuration, dataset or base model; what reading
    /// and writing the run's folder return.
    pub fn open(
        fs: &Arc<dyn Fs>,
        plan: RunPlan,
        mut learner: Learner,
        batches: &'a dyn Batches,
        resume: bool,
        interrupted: Arc<AtomicBool>,
        watch: &mut dyn FnMut(Event<'_>) -> Result<()>,
    ) -> Result<Self> {
        let store = CheckpointStore::open(Arc::clone(fs), &plan.output)?;
        // A process that was killed leaves halves of the files beside the checkpoints, too.
        pmetal_formats::atomic::clean(&**fs, &plan.output)?;
        let header = Header { version: env!("CARGO_PKG_VERSION").to_owned(), config: plan.header.clone() };
        let path = plan.output.join("metrics.jsonl");
        let found = if resume { store.latest()? } else { Latest::default() };
        for skipped in &found.skipped {
            watch(Event::Note(format!(
                "checkpoint `{}` is passed over: {}",
                skipped.path.display(),
                skipped.reason
            )))?;
        }
        let (mut progress, mut first_step) = (Progress::default(), 0);
        let metrics = match &found.checkpoint {
            Some(checkpoint) => {
                check_identity(checkpoint, &plan.identity)?;
                restore(&mut learner, checkpoint)?;
                progress = checkpoint.state()?;
                first_step = checkpoint.manifest.step as usize;
                watch(Event::Note(format!("resumed from step {first_step}")))?;
                let due = if progress.is_cut_short { Due::Again } else { Due::Done };
                MetricsWriter::resume(Arc::clone(fs), &path, header, checkpoint.manifest.step, due)?.0
            }
            None => MetricsWriter::create(Arc::clone(fs), &path, header)?,
        };
        let is_done_here = found.checkpoint.is_some() && !progress.is_cut_short;
        let next_due_step = first_step + usize::from(is_done_here);
        Ok(Self { plan, learner, batches, store, metrics, progress, first_step, next_due_step, interrupted })
    }

    /// Runs to the end, or until it is interrupted.
    ///
    /// # Errors
    /// [`Error::Diverged`] when a loss or gradient is not finite, before anything is changed by it; what the data,
    /// the device, the disk or `watch` return. The last checkpoint is intact then.
    pub fn run(&mut self, watch: &mut dyn FnMut(Event<'_>) -> Result<()>) -> Result<Outcome> {
        let total = self.plan.total_steps;
        let mut loss = f64::NAN;
        for step in self.first_step..=total {
            // What was due at the checkpoint that the run resumed from was done before it was written, unless it says
            // otherwise.
            let is_done_here = step + 1 == self.next_due_step();
            if !is_done_here {
                self.progress.is_cut_short = !self.validate(step, watch)?;
                if !self.progress.is_cut_short {
                    self.sample(step, watch)?;
                }
            }
            let is_asked_to = step < total && self.interrupted.load(Ordering::Relaxed);
            let stop = is_asked_to || self.progress.is_cut_short;
            if !is_done_here && step > 0 && (stop || self.plan.save.is_due(step, total)) {
                self.checkpoint(step, watch)?;
            }
            if stop {
                return Ok(Outcome::Interrupted { step });
            }
            if step == total {
                break;
            }
            loss = self.one_step(step, watch)?;
        }
        self.metrics.sync()?;
        Ok(Outcome::Finished { loss })
    }

    /// The first step at which evaluation and sample were yet to be made when the run was opened: 0, or what the
    /// checkpoint that it goes on from says.
    pub fn next_due_step(&self) -> usize {
        self.next_due_step
    }

    /// The learner, for what is to be done with it after the run.
    pub fn learner(&self) -> &Learner {
        &self.learner
    }

    /// Scores the evaluation split where that is due; `false` when it was interrupted and nothing is known.
    fn validate(&mut self, step: usize, watch: &mut dyn FnMut(Event<'_>) -> Result<()>) -> Result<bool> {
        let batches = self.batches.evaluation();
        if batches.is_empty() || !self.plan.evaluate.is_due(step, self.plan.total_steps) {
            return Ok(true);
        }
        let (mut sum, mut tokens) = (0.0, 0);
        for batch in batches {
            // Before each batch: an evaluation may take longer than the time in which a machine is taken away.
            if self.interrupted.load(Ordering::Relaxed) {
                return Ok(false);
            }
            let (loss, trained) = self.learner.evaluate(batch)?;
            sum += loss;
            tokens += trained;
        }
        let record = EvalRecord { step: step as u64, eval_loss: sum / tokens.max(1) as f64 };
        self.metrics.write(&Record::Eval(record.clone()))?;
        watch(Event::Evaluation(&record))?;
        Ok(true)
    }

    fn sample(&mut self, step: usize, watch: &mut dyn FnMut(Event<'_>) -> Result<()>) -> Result<()> {
        if !self.plan.sample.is_due(step, self.plan.total_steps) {
            return Ok(());
        }
        watch(Event::Sample(step, &self.learner))
    }

    fn checkpoint(&mut self, step: usize, watch: &mut dyn FnMut(Event<'_>) -> Result<()>) -> Result<()> {
        self.metrics.sync()?;
        let tensors = self.learner.state_tensors();
        let metadata = BTreeMap::new();
        let bytes = SafetensorsWriter::file_bytes(&specs_of(&tensors), &metadata)?;
        let file = NewFile::streamed(STATE_FILE, bytes, |writer| stream_tensors(writer, &tensors, &metadata));
        let path = self.store.save(step as u64, &self.plan.identity, vec![file], &self.progress)?;
        self.store.prune(self.plan.keep_checkpoints.max(1), &[])?;
        watch(Event::Checkpoint(step, path))
    }

    fn one_step(&mut self, step: usize, watch: &mut dyn FnMut(Event<'_>) -> Result<()>) -> Result<f64> {
        let start = Instant::now();
        let batches = self.batches.step(step)?;
        let rate = self.plan.schedule.learning_rate(step as u64);
        let report = self.learner.step(step, rate, &batches)?;
        let seconds = start.elapsed().as_secs_f64();
        self.progress.tokens += report.tokens as u64;
        self.progress.trained_tokens += report.trained_tokens as u64;
        self.progress.elapsed_s += seconds;
        let window = &mut self.progress.window;
        window.loss += report.loss * report.trained_tokens as f64;
        if let Some(balance_loss) = report.balance_loss {
            *window.balance_loss.get_or_insert(0.0) += balance_loss * report.trained_tokens as f64;
        }
        window.trained_tokens += report.trained_tokens;
        window.tokens += report.tokens;
        window.seconds += seconds;
        let done = step + 1;
        if self.plan.report.is_due(done, self.plan.total_steps) {
            let window = std::mem::take(&mut self.progress.window);
            let record = StepRecord {
                step: done as u64,
                loss: window.loss / window.trained_tokens as f64,
                balance_loss: window.balance_loss.map(|sum| sum / window.trained_tokens as f64),
                lr: rate,
                grad_norm: report.gradient_norm,
                tokens_per_second: window.tokens as f64 / window.seconds.max(1e-9),
                trained_tokens: self.progress.trained_tokens,
                tokens: self.progress.tokens,
                peak_bytes: self.learner.decoder().device().memory().report().peak_bytes as u64,
                elapsed_s: self.progress.elapsed_s,
            };
            self.metrics.write(&Record::Step(record.clone()))?;
            watch(Event::Step(&record))?;
        }
        Ok(report.loss)
    }
}

fn check_identity(checkpoint: &Checkpoint, identity: &Identity) -> Result<()> {
    let found = &checkpoint.manifest.identity;
    let parts = [
        ("configuration", &found.config_hash, &identity.config_hash),
        ("dataset", &found.dataset_fingerprint, &identity.dataset_fingerprint),
        ("base model", &found.base_model_hash, &identity.base_model_hash),
    ];
    for (what, found, wanted) in parts {
        if found != wanted {
            return Err(Error::Usage(format!(
                "checkpoint `{}` was made with another {what}; a run can only go on with the one it began with",
                checkpoint.path.display()
            )));
        }
    }
    Ok(())
}

fn restore(learner: &mut Learner, checkpoint: &Checkpoint) -> Result<()> {
    // The bytes are hashed once more while they are read, before any is used.
    checkpoint.read(STATE_FILE)?;
    let file = pmetal_formats::safetensors::SafetensorsFile::open(&checkpoint.path.join(STATE_FILE))?;
    learner.restore(|name| Ok(file.read_f32(name)?))
}
