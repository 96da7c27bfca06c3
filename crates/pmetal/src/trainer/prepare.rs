//! From a configuration to everything that a run needs: model, data, plan.

use std::path::{Path, PathBuf};

use pmetal_engine::{Device, Recompute};
use pmetal_formats::adapter::{AdapterConfig, ModuleNames};

use super::checkpoint::Identity;
use super::config::{
    DeviceChoice, LearningRateSchedule, OnLong, Origin, ResolvedConfig, TrainConfig, TrainOn, Tuning,
};
use super::learner::{Learner, MicroBatch, OptimizerSettings};
use super::schedule::{Decay, Schedule, warmup_steps};
use super::train_loop::{Batches, Every, RunPlan};
use crate::core::device::{activation_type, base_storage};
use crate::core::{Model, ModelSource, ModelText, OpenedModel, embedded, now_unix_s};
use crate::data::{
    self, BatchOptions, BatchPlan, ChatFormat, DataOptions, Dataset, EncodeOptions, PackedBatch,
};
use crate::error::{Error, Result};
use crate::lora;
use crate::models::loader::losses_beside_checkpoint;
use crate::models::{BaseStorage, Decoder, LoadOptions, TokenRun};

/// Tokens of an optimizer step that an automatic batch size and accumulation aim at.
const STEP_TOKENS: usize = 8192;
/// Tokens of one forward pass that an automatic batch size aims at: enough to keep the arithmetic units busy, few
/// enough for a small machine's memory.
const PASS_TOKENS: usize = 2048;
/// Parts of a run after which evaluations, checkpoints and samples come on their own.
const PARTS: usize = 10;
/// Bytes of a GiB.
const GIB: f64 = (1_u64 << 30) as f64;

/// Everything that a run needs.
pub struct Prepared {
    /// The model with what is trained in it.
    pub learner: Learner,
    /// The data.
    pub batches: DatasetBatches,
    /// What the run does.
    pub plan: RunPlan,
    /// What the user is told, and what the run's files record.
    pub description: Description,
}

/// Facts about a run.
pub struct Description {
    /// The base model.
    pub source: ModelSource,
    /// Text to ids and back, and what ends a text.
    pub text: ModelText,
    /// The model family.
    pub family: &'static str,
    /// Parameters of the base model.
    pub parameters: u128,
    /// Parameters that are trained.
    pub trained_parameters: usize,
    /// The adapter's configuration; absent when all weights are trained.
    pub adapter: Option<AdapterConfig>,
    /// Linear layers with an adapter.
    pub adapted_modules: usize,
    /// Type of activations.
    pub dtype: pmetal_engine::DType,
    /// The dataset in one line.
    pub dataset: String,
    /// Examples to train on and to evaluate on.
    pub examples: (usize, usize),
    /// Trained tokens and all tokens of an epoch.
    pub epoch_tokens: (usize, usize),
    /// Longest example.
    pub max_seq_len: usize,
    /// Share of packed windows that holds tokens.
    pub fill_ratio: f64,
    /// Tokens of the fullest forward pass.
    pub most_tokens: usize,
    /// Optimizer steps of an epoch.
    pub steps_per_epoch: usize,
    /// Lines for the user.
    pub notes: Vec<String>,
}

/// The batches of a dataset.
pub struct DatasetBatches {
    dataset: Dataset,
    plan: BatchPlan,
    accumulation: usize,
    evaluation: Vec<MicroBatch>,
}

impl Batches for DatasetBatches {
    fn step(&self, step: usize) -> Result<Vec<MicroBatch>> {
        let (epoch, batches) = self.plan.batches_of_step(step, self.accumulation);
        let examples = &self.dataset.train;
        Ok(batches.map(|batch| micro_batch(self.plan.batch(examples, epoch, batch), examples)).collect())
    }

    fn evaluation(&self) -> &[MicroBatch] {
        &self.evaluation
    }
}

fn micro_batch(packed: PackedBatch, examples: &[data::Example]) -> MicroBatch {
    let lengths: Vec<usize> =
        packed.document_starts.windows(2).map(|pair| (pair[1] - pair[0]) as usize).collect();
    // Lines count from 1; messages add one to a row's index.
    let rows = packed.examples.iter().map(|&index| examples[index].line.saturating_sub(1)).collect();
    MicroBatch { run: TokenRun::documents(packed.ids, &lengths), labels: packed.labels, rows }
}

/// Loads model and data and fills in what the configuration left to the program.
///
/// # Errors
/// What loading returns; [`Error::Usage`] for settings that the model or the data cannot follow.
pub fn prepare(resolved: &mut ResolvedConfig, device: &Device) -> Result<Prepared> {
    let config = resolved.config().clone();
    let limit = (config.memory_limit_gib > 0.0).then_some((config.memory_limit_gib * GIB) as usize);
    device.memory().set_limit(limit);
    let dtype = activation_type(config.dtype, device)?;
    let source = ModelSource::parse(&config.model);
    let full = config.tuning == Tuning::Full;
    let base = base_storage(&config, device, dtype)?;
    let options = LoadOptions { dtype, train_all: full };
    let mut model = Model::load_base(&source, device, options, base)?;
    let mut notes = model.notes.clone();
    let adapter = (!full).then(|| {
        let mut adapter = adapter_config(&config, &source);
        if !lora::experts::target(&mut adapter, &model.decoder) {
            notes.push("experts get no adapters, because `lora_dropout` is not for them".to_owned());
        }
        adapter
    });
    let adapted = match &adapter {
        Some(adapter) => lora::attach(&mut model.decoder, adapter, config.seed)?.len(),
        None => 0,
    };
    let mut dataset = read_dataset(&config, &model)?;
    if config.eval_max_examples > 0 {
        dataset.eval.truncate(config.eval_max_examples);
    }
    resolved.set_automatic("max_seq_len", &dataset.max_seq_len)?;
    let (plan, evaluation) = batch_plans(resolved, &dataset)?;
    let config = resolved.config().clone();
    let steps_per_epoch = plan.steps_per_epoch(config.gradient_accumulation_steps);
    let total_steps = match config.max_steps {
        0 => ((config.epochs * steps_per_epoch as f64).ceil() as usize).max(1),
        steps => steps as usize,
    };
    notes.extend(dataset.notes.iter().cloned());
    let offloads = config.offload_activations && config.gradient_checkpointing == Recompute::Full;
    if offloads && !device.can_put_aside() && config.device != DeviceChoice::Cpu {
        notes.push(format!("`offload_activations` has no effect on `{}`", device.name()));
    }
    if let Some(balance) = model.decoder.spec.balance() {
        let coefficient = balance.coefficient;
        notes.push(format!(
            "`output_router_logits`: the loss includes {coefficient} times the loss that balances experts"
        ));
    }
    let accumulation = config.gradient_accumulation_steps;
    let batches = DatasetBatches { dataset, plan, accumulation, evaluation };
    if base == BaseStorage::Fp8 {
        notes.push(first_loss_note(&source, &model.decoder, &batches)?);
    }
    let (dataset, plan) = (&batches.dataset, &batches.plan);
    let description = Description {
        source,
        family: model.decoder.spec.family,
        parameters: model.decoder.spec.parameter_count(),
        trained_parameters: model.decoder.parameters().iter().map(|p| p.value().elements()).sum(),
        adapter,
        adapted_modules: adapted,
        dtype,
        dataset: dataset.description(),
        examples: (dataset.train.len(), dataset.eval.len()),
        epoch_tokens: epoch_tokens(dataset),
        max_seq_len: dataset.max_seq_len,
        fill_ratio: plan.fill_ratio(),
        most_tokens: plan.most_tokens(),
        steps_per_epoch,
        notes,
        text: model.text,
    };
    let identity = Identity {
        config_hash: config.config_hash(),
        dataset_fingerprint: dataset.fingerprint.clone(),
        base_model_hash: model.fingerprint,
    };
    let run = run_plan(&config, total_steps, identity);
    let settings = OptimizerSettings {
        beta1: config.beta1,
        beta2: config.beta2,
        epsilon: config.eps,
        weight_decay: config.weight_decay,
        max_gradient_norm: config.max_grad_norm,
        recompute: config.gradient_checkpointing,
        offloads: config.offload_activations,
        seed: config.seed,
        records: !config.no_cuda_graph,
    };
    let mut learner = Learner::new(model.decoder, settings)?;
    learner.pad_to(description.most_tokens);
    Ok(Prepared { learner, batches, plan: run, description })
}

/// What eight bits cost: the loss of the first batch beside that of the weights as they are in the files.
fn first_loss_note(source: &ModelSource, decoder: &Decoder, batches: &DatasetBatches) -> Result<String> {
    let opened = OpenedModel::open(source)?;
    let first = batches.step(0)?;
    let first = first.first().ok_or_else(|| Error::Usage("the dataset gives no batch".to_owned()))?;
    let [rounded, original] =
        losses_beside_checkpoint(decoder, &opened.checkpoint, &first.run, &first.labels)?;
    Ok(format!("fp8 base: loss {rounded:.4} instead of {original:.4} on the first batch"))
}

fn adapter_config(config: &TrainConfig, source: &ModelSource) -> AdapterConfig {
    let targets = match &config.lora_target_modules[..] {
        [one] if one == "all-linear" => ModuleNames::AllLinear,
        // One entry with the marks of a pattern is PEFT's regex form.
        [one] if one.contains(['*', '(', '[', '\\', '|', '^', '$', '+', '?']) => {
            ModuleNames::Pattern(one.clone())
        }
        names => ModuleNames::List(names.to_vec()),
    };
    let mut adapter = AdapterConfig::new(config.lora_r, config.lora_alpha, targets);
    adapter.lora_dropout = config.lora_dropout;
    adapter.use_rslora = config.lora_rslora;
    adapter.base_model_name_or_path = Some(absolute(source));
    adapter
}

/// A name of the base model that holds in any working directory.
fn absolute(source: &ModelSource) -> String {
    match source {
        ModelSource::Embedded => embedded::NAME.to_owned(),
        ModelSource::Path(path) => {
            std::path::absolute(path).unwrap_or_else(|_| path.clone()).display().to_string()
        }
    }
}

/// The options by which a configuration reads its dataset.
pub fn data_options(config: &TrainConfig, context_length: usize) -> DataOptions {
    DataOptions {
        encode: EncodeOptions {
            train_on: match config.train_on {
                TrainOn::Assistant => data::TrainOn::Assistant,
                TrainOn::Last => data::TrainOn::Last,
                TrainOn::All => data::TrainOn::All,
            },
            ..EncodeOptions::default()
        },
        on_long: match config.on_long {
            OnLong::Truncate => data::OnLong::Truncate,
            OnLong::Drop => data::OnLong::Drop,
            OnLong::Error => data::OnLong::Error,
        },
        max_seq_len: config.max_seq_len,
        model_limit: Some(context_length),
        eval_fraction: if config.eval_dataset.is_empty() { config.eval_fraction } else { 0.0 },
        seed: config.seed,
        ..DataOptions::default()
    }
}

/// Reads the dataset that a configuration names with a model's tokenizer and template.
///
/// # Errors
/// As [`data::load`].
pub fn read_dataset(config: &TrainConfig, model: &Model) -> Result<Dataset> {
    let variables = serde_json::Map::new();
    let (tokenizer, template) = (&model.text.tokenizer, model.text.template.as_ref());
    let format = ChatFormat::new(tokenizer, template, &variables, now_unix_s())?;
    let mut options = data_options(config, model.decoder.spec.context_length);
    let unpacked;
    let path: &Path = if config.dataset == embedded::DATASET_NAME && !Path::new(&config.dataset).exists() {
        unpacked = embedded::Dataset::new()?;
        unpacked.path()
    } else {
        Path::new(&config.dataset)
    };
    if !path.exists() {
        return Err(Error::Usage(format!("there is no dataset at `{}`", path.display())));
    }
    let mut dataset = data::load(path, &format, &options)?;
    if path != Path::new(&config.dataset) {
        // The user knows the embedded data by its name, not by where it was unpacked.
        let unpacked = format!("{}/train.jsonl", path.display());
        dataset.notes.iter_mut().for_each(|note| *note = note.replace(&unpacked, &config.dataset));
    }
    if !config.eval_dataset.is_empty() {
        if !Path::new(&config.eval_dataset).exists() {
            return Err(Error::Usage(format!("there is no dataset at `{}`", config.eval_dataset)));
        }
        options.max_seq_len = dataset.max_seq_len;
        let held_out = data::load(Path::new(&config.eval_dataset), &format, &options)?;
        dataset.eval = held_out.train;
        dataset.eval_report = Some(held_out.train_report);
        dataset.fingerprint = format!("{}+{}", dataset.fingerprint, held_out.fingerprint);
    }
    Ok(dataset)
}

fn batch_plans(resolved: &mut ResolvedConfig, dataset: &Dataset) -> Result<(BatchPlan, Vec<MicroBatch>)> {
    let config = resolved.config();
    let lengths: Vec<usize> = dataset.train.iter().map(|example| example.ids.len()).collect();
    let mut options = BatchOptions {
        batch_size: config.batch_size,
        max_seq_len: dataset.max_seq_len,
        packing: config.packing,
        seed: config.seed,
        shuffle: true,
    };
    if config.batch_size == 0 {
        let row = match config.packing {
            true => dataset.max_seq_len,
            false => lengths.iter().sum::<usize>() / lengths.len().max(1),
        };
        options.batch_size = (PASS_TOKENS / row.max(1)).clamp(1, lengths.len().max(1));
        let passes = STEP_TOKENS.div_ceil(options.batch_size * row.max(1));
        let accumulates_itself = *resolved.origin("gradient_accumulation_steps") == Origin::Default;
        resolved.set_automatic("batch_size", &options.batch_size)?;
        if accumulates_itself {
            // No more passes than the data has batches for.
            let batches = BatchPlan::new(&lengths, options)?.batches_per_epoch();
            resolved.set_automatic("gradient_accumulation_steps", &passes.min(batches).max(1))?;
        }
    }
    let plan = BatchPlan::new(&lengths, options)?;
    if dataset.eval.is_empty() {
        return Ok((plan, Vec::new()));
    }
    let lengths: Vec<usize> = dataset.eval.iter().map(|example| example.ids.len()).collect();
    let held_out = BatchPlan::new(&lengths, BatchOptions { shuffle: false, ..options })?;
    let evaluation = (0..held_out.batches_per_epoch())
        .map(|batch| micro_batch(held_out.batch(&dataset.eval, 0, batch), &dataset.eval))
        .collect();
    Ok((plan, evaluation))
}

fn epoch_tokens(dataset: &Dataset) -> (usize, usize) {
    let trained = dataset.train.iter().map(data::Example::trained_tokens).sum();
    let all = dataset.train.iter().map(|example| example.ids.len()).sum();
    (trained, all)
}

fn run_plan(config: &TrainConfig, total_steps: usize, identity: Identity) -> RunPlan {
    let steps = total_steps as u64;
    let warmup = match config.warmup_steps {
        0 => warmup_steps(config.warmup_ratio, steps),
        steps => steps,
    };
    let part = |every: u64| match every {
        0 => Every(total_steps.div_ceil(PARTS)),
        every => Every(every as usize),
    };
    RunPlan {
        output: PathBuf::from(&config.output),
        total_steps,
        schedule: Schedule {
            decay: match config.schedule {
                LearningRateSchedule::Constant => Decay::Constant,
                LearningRateSchedule::Linear => Decay::Linear,
                LearningRateSchedule::Cosine => Decay::Cosine,
            },
            base: config.learning_rate,
            min_ratio: config.min_lr_ratio,
            warmup_steps: warmup,
            total_steps: steps,
        },
        evaluate: part(config.eval_every),
        sample: if config.sample_prompt.is_empty() { Every(0) } else { part(config.sample_every) },
        save: part(config.save_every),
        report: Every(config.log_every as usize),
        keep_checkpoints: config.save_keep,
        identity,
        header: config.to_json(),
    }
}
