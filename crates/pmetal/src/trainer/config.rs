//! The configuration of a training run: one table of settings, from which flags, files and documentation follow.
//!
//! A value comes from a flag, else from `--set key=value`, else from a file, else from the table. [`ConfigLayers`]
//! collects all that is wrong before it reports; [`ResolvedConfig`] knows where each value came from and writes the
//! `run.toml` that repeats the run.

mod checkpointing;
mod layers;
mod resume;
mod table;
mod value;

pub use layers::{ConfigLayers, Origin, ResolvedConfig};
pub use resume::{Change, ResumeDiff};
pub use table::{Effect, Field, Group};
pub use value::{Setting, Value};

use pmetal_engine::Recompute;

use table::{Said, settings};
use value::choice_setting;

choice_setting! {
    /// How the loss is made.
    Method {
        /// Supervised fine-tuning: cross-entropy on the rows of a dataset.
        Sft = "sft",
    }
}

choice_setting! {
    /// Which weights are trained.
    Tuning {
        /// Low-rank matrices beside frozen weights.
        Lora = "lora",
        /// All weights.
        Full = "full" | "full_finetune",
    }
}

choice_setting! {
    /// How the learning rate falls after the warm-up.
    LearningRateSchedule {
        /// Not at all.
        Constant = "constant" | "constant_with_warmup",
        /// Along a line.
        Linear = "linear",
        /// Along half a cosine wave.
        Cosine = "cosine" | "cosine_with_min_lr",
    }
}

choice_setting! {
    /// Which turns of a conversation have a loss.
    TrainOn {
        /// Every turn of the assistant.
        Assistant = "assistant",
        /// The last turn of the assistant.
        Last = "last",
        /// Every token.
        All = "all",
    }
}

choice_setting! {
    /// What happens to a row that is longer than a sequence.
    OnLong {
        /// Its end is cut off, and the rows are counted.
        Truncate = "truncate",
        /// It is left out, and the rows are counted.
        Drop = "drop",
        /// Training does not start.
        Error = "error" | "raise",
    }
}

choice_setting! {
    /// The type of activations.
    Precision {
        /// What suits the device.
        Auto = "auto",
        /// 32 bits.
        F32 = "f32" | "fp32" | "float32",
        /// 16 bits with the range of 32.
        Bf16 = "bf16" | "bfloat16",
    }
}

choice_setting! {
    /// How frozen weights are kept.
    BasePrecision {
        /// In the type of activations on a GPU, as stored on a CPU.
        Auto = "auto",
        /// In 8-bit floats (e4m3) with a scale for each output.
        Fp8 = "fp8" | "e4m3" | "float8",
    }
}

choice_setting! {
    /// Where the computation runs.
    DeviceChoice {
        /// Metal on a Mac, CUDA where there is a GPU, else the CPU.
        Auto = "auto",
        /// The processor.
        Cpu = "cpu",
        /// An NVIDIA GPU.
        Cuda = "cuda" | "gpu",
        /// An Apple GPU.
        Metal = "metal" | "mps",
    }
}

settings! {
    /// Folder of the model to start from, in Hugging Face layout, or a GGUF file.
    model: String = String::new(), ModelAndData, Content,
        ["base_model", "model_name_or_path", "base_model_name_or_path", "model_id"];
    /// File with the rows to train on (JSONL or JSON), or a folder with train, valid and test files.
    dataset: String = String::new(), ModelAndData, Content, ["data", "train_file", "dataset_path"];
    /// Folder for everything that the run writes.
    output: String = "output".to_owned(), ModelAndData, Nothing, ["output_dir", "adapter_path"],
        "must not be empty" => |path| !path.is_empty();
    /// How the loss is made: sft.
    method: Method = Method::Sft, ModelAndData, Numbers, ["stage"];
    /// Which weights are trained: lora (matrices of low rank beside frozen weights) or full (all).
    tuning: Tuning = Tuning::Lora, ModelAndData, Numbers, ["fine_tune_type", "finetuning_type", "adapter"];
    /// Which tokens of a conversation have a loss: assistant (all its turns), last (its last turn) or all.
    train_on: TrainOn = TrainOn::Assistant, ModelAndData, Numbers, [];
    /// Tokens of the longest sequence; 0 = the 99.5th percentile of the rows, at most what the model allows.
    max_seq_len: usize = 0, ModelAndData, Numbers,
        ["sequence_len", "cutoff_len", "max_seq_length", "max_length"],
        "must be at most 16777216" => |length| *length <= 1 << 24;
    /// What happens to longer rows: truncate, drop or error.
    on_long: OnLong = OnLong::Truncate, ModelAndData, Numbers, ["excess_length_strategy"];

    /// Rank R of the LoRA matrices.
    lora_r: usize = 16, Lora, Numbers, ["r", "rank", "lora_rank"],
        "must be from 1 to 16384" => |rank| (1..=16384).contains(rank);
    /// LoRA alpha: the product of the matrices is scaled by alpha / R, with lora_rslora by alpha / sqrt(R).
    lora_alpha: f64 = 32.0, Lora, Numbers, ["alpha"],
        "must be above 0 and at most 1e6" => |alpha| *alpha > 0.0 && *alpha <= 1e6;
    /// Probability with which an input of the LoRA matrices is dropped in training.
    lora_dropout: f64 = 0.0, Lora, Numbers, ["dropout"],
        "must be from 0 to less than 1" => |rate| (0.0..1.0).contains(rate);
    /// Scale by alpha / sqrt(R) instead of alpha / R.
    lora_rslora: bool = false, Lora, Numbers, ["use_rslora", "rslora", "peft_use_rslora"];
    /// Names of the linear layers that get matrices; all-linear = all but the output head.
    lora_target_modules: Vec<String> = vec!["all-linear".to_owned()], Lora, Numbers,
        ["target_modules", "lora_target"],
        "must name at least one module" => |names| !names.is_empty() && names.iter().all(|name| !name.is_empty());

    /// Highest learning rate.
    learning_rate: f64 = 2e-4, Optimizer, Numbers, ["lr"],
        "must be above 0 and at most 1000" => |rate| *rate > 0.0 && *rate <= 1e3;
    /// How the learning rate falls after the warm-up: constant, linear or cosine.
    schedule: LearningRateSchedule = LearningRateSchedule::Cosine, Optimizer, Numbers,
        ["lr_scheduler_type", "lr_scheduler", "lr_schedule"];
    /// Learning rate at the end of the run, as a fraction of the highest.
    min_lr_ratio: f64 = 0.1, Optimizer, Numbers, ["min_lr_rate", "cosine_min_lr_ratio", "lr_min_ratio"],
        "must be from 0 to 1" => |ratio| (0.0..=1.0).contains(ratio);
    /// Fraction of the run in which the learning rate climbs from zero.
    warmup_ratio: f64 = 0.03, Optimizer, Numbers, [],
        "must be from 0 to 1" => |ratio| (0.0..=1.0).contains(ratio);
    /// Optimizer steps in which the learning rate climbs from zero; 0 = as warmup_ratio says.
    warmup_steps: u64 = 0, Optimizer, Numbers, ["warmup", "num_warmup_steps"];
    /// Decay of weights by AdamW, in units of the learning rate.
    weight_decay: f64 = 0.0, Optimizer, Numbers, [],
        "must be from 0 to 1000" => |decay| (0.0..=1e3).contains(decay);
    /// Memory of AdamW's mean of gradients.
    beta1: f64 = 0.9, Optimizer, Numbers, ["adam_beta1"],
        "must be from 0 to less than 1" => |beta| (0.0..1.0).contains(beta);
    /// Memory of AdamW's mean of squared gradients.
    beta2: f64 = 0.999, Optimizer, Numbers, ["adam_beta2"],
        "must be from 0 to less than 1" => |beta| (0.0..1.0).contains(beta);
    /// What AdamW adds to the square root that it divides by.
    eps: f64 = 1e-8, Optimizer, Numbers, ["adam_epsilon", "epsilon", "adam_eps"],
        "must be above 0 and at most 1" => |eps| *eps > 0.0 && *eps <= 1.0;
    /// Norm that the gradients of all weights together are clipped to; 0 = no clipping.
    max_grad_norm: f64 = 1.0, Optimizer, Numbers, ["gradient_clipping", "max_gradient_norm", "grad_clip"],
        "must be from 0 to 1e9" => |norm| (0.0..=1e9).contains(norm);

    /// Sequences in one forward pass; 0 = as many as make about 2048 tokens, with accumulation to 8192 a step.
    batch_size: usize = 0, Batches, Numbers,
        ["micro_batch_size", "per_device_train_batch_size", "train_batch_size"],
        "must be at most 1048576" => |size| *size <= 1 << 20;
    /// Forward passes whose gradients make one optimizer step.
    gradient_accumulation_steps: usize = 1, Batches, Numbers, ["grad_accumulation_steps", "accumulation_steps"],
        "must be from 1 to 1048576" => |steps| (1..=1 << 20).contains(steps);
    /// Passes over the rows.
    epochs: f64 = 1.0, Batches, Numbers, ["num_epochs", "num_train_epochs"],
        "must be above 0 and at most 1e6" => |epochs| *epochs > 0.0 && *epochs <= 1e6;
    /// Optimizer steps of the run; 0 = as many as the epochs take.
    max_steps: u64 = 0, Batches, Numbers, ["iters"];
    /// Put several rows into one sequence; they do not see one another.
    packing: bool = true, Batches, Numbers, ["sample_packing", "use_sequence_packing"];
    /// What is computed again instead of kept, for less memory and the same numbers: none; cheap (norms and gated
    /// products); full (all but the inputs of layers, which takes about a quarter longer).
    gradient_checkpointing: Recompute = Recompute::Cheap, Batches, Nothing,
        ["grad_checkpoint", "use_gradient_checkpointing"];
    /// With gradient_checkpointing = "full" on a GPU: keep the inputs of layers in the host's memory, copied beside the
    /// computation.
    offload_activations: bool = false, Batches, Nothing, ["activation_offloading", "offload_activation"];

    /// File with rows to evaluate on; empty = a part of the dataset.
    eval_dataset: String = String::new(), Reports, Numbers, ["validation_file", "eval_file"];
    /// Fraction of the dataset that is kept from training to evaluate on; 0 = none.
    eval_fraction: f64 = 0.02, Reports, Numbers, ["val_set_size", "val_size", "eval_split"],
        "must be from 0 to 0.9" => |fraction| (0.0..=0.9).contains(fraction);
    /// Examples that an evaluation scores, from the beginning of what is kept for it; 0 = all.
    eval_max_examples: usize = 0, Reports, Nothing, ["max_eval_samples"];
    /// Optimizer steps from one evaluation to the next; 0 = a tenth of the run.
    eval_every: u64 = 0, Reports, Nothing, ["eval_steps", "steps_per_eval"];
    /// Optimizer steps from one checkpoint to the next; 0 = a tenth of the run.
    save_every: u64 = 0, Reports, Nothing, ["save_steps"];
    /// Checkpoints to keep, counted from the last.
    save_keep: usize = 3, Reports, Nothing, ["save_total_limit", "keep_last"],
        "must be at least 1" => |count| *count >= 1;
    /// Optimizer steps from one report of the loss to the next.
    log_every: u64 = 1, Reports, Nothing, ["logging_steps", "steps_per_report"],
        "must be at least 1" => |steps| *steps >= 1;
    /// Text that the model answers now and then during the run; empty = no samples.
    sample_prompt: String = String::new(), Reports, Nothing, [];
    /// Optimizer steps from one sample to the next; 0 = a tenth of the run.
    sample_every: u64 = 0, Reports, Nothing, [];
    /// Longest sample in tokens.
    sample_max_tokens: usize = 64, Reports, Nothing, [],
        "must be from 1 to 1048576" => |tokens| (1..=1 << 20).contains(tokens);

    /// Seed of everything random: LoRA matrices, order of rows, dropout, the evaluation split.
    seed: u64 = 0, Machine, Numbers, ["random_seed"];
    /// Type of activations: auto, f32 or bf16.
    dtype: Precision = Precision::Auto, Machine, Numbers, ["torch_dtype", "precision"];
    /// How frozen weights are kept: auto (in the type of activations on a GPU, as stored on a CPU) or fp8 (in 8 bits with a
    /// scale for each output; NVIDIA GPUs of compute capability 8.9 and higher).
    base_precision: BasePrecision = BasePrecision::Auto, Machine, Numbers, ["base_dtype"];
    /// Where the computation runs: auto, cpu, cuda or metal.
    device: DeviceChoice = DeviceChoice::Auto, Machine, Numbers, [];
    /// Give the same bits in every run on a GPU, at some cost in speed.
    deterministic: bool = false, Machine, Numbers, [];
    /// Launch the kernels of every training step one by one on an NVIDIA GPU instead of replaying them as one CUDA graph.
    no_cuda_graph: bool = false, Machine, Nothing, [];
    /// Most memory that tensors may take on the device, in GiB; 0 = what it has. A run that needs more ends with exit code 4.
    memory_limit_gib: f64 = 0.0, Machine, Nothing, ["memory_limit", "max_memory"],
        "must be from 0 to 1e6" => |limit| (0.0..=1e6).contains(limit);
    /// Threads of the CPU; 0 = one for each core. The numbers do not depend on it.
    threads: usize = 0, Machine, Nothing, ["num_threads"],
        "must be at most 4096" => |threads| *threads <= 4096;
}

/// A setting that another one makes meaningless.
struct Shadowed {
    name: &'static str,
    by: &'static str,
    because: &'static str,
}

impl TrainConfig {
    /// Settings without effect, given the values of others.
    fn shadowed(&self) -> Vec<Shadowed> {
        let no_evaluation = self.eval_dataset.is_empty() && self.eval_fraction == 0.0;
        let rules: [(bool, &'static str, &'static str, &'static [&'static str]); 9] = [
            (
                self.tuning == Tuning::Full,
                "tuning",
                "is \"full\"",
                &["lora_r", "lora_alpha", "lora_dropout", "lora_rslora", "lora_target_modules"],
            ),
            (
                self.schedule == LearningRateSchedule::Constant,
                "schedule",
                "is \"constant\"",
                &["min_lr_ratio"],
            ),
            (self.warmup_steps > 0, "warmup_steps", "is set", &["warmup_ratio"]),
            (self.max_steps > 0, "max_steps", "is set", &["epochs"]),
            (!self.eval_dataset.is_empty(), "eval_dataset", "is set", &["eval_fraction"]),
            (no_evaluation, "eval_fraction", "is 0", &["eval_max_examples", "eval_every"]),
            (
                self.gradient_checkpointing != Recompute::Full,
                "gradient_checkpointing",
                "is not \"full\"",
                &["offload_activations"],
            ),
            (self.device == DeviceChoice::Cpu, "device", "is \"cpu\"", &["offload_activations"]),
            (
                self.sample_prompt.is_empty(),
                "sample_prompt",
                "is empty",
                &["sample_every", "sample_max_tokens"],
            ),
        ];
        let holding = rules.into_iter().filter(|rule| rule.0);
        let shadowed = holding.flat_map(|(_, by, because, names)| {
            names.iter().map(move |&name| Shadowed { name, by, because })
        });
        shadowed.collect()
    }

    /// All settings by name, for the header of `metrics.jsonl` and for `--json`.
    pub fn to_json(&self) -> serde_json::Value {
        let values = FIELDS.iter().filter_map(|field| {
            let value = self.value(field.name)?;
            Some((field.name.to_owned(), serde_json::Value::from(&value)))
        });
        serde_json::Value::Object(values.collect())
    }
}

/// The text of `docs/settings.md`: every setting with its type, default, other spellings and meaning.
pub fn settings_markdown() -> String {
    let mut text = "# Settings\n\nA setting is a flag (`--lora-r 8`), a key of a TOML or JSON file (`lora_r = 8`, or `r = 8` \
                    under `[lora]`), or `--set lora_r=8`.\nA flag beats `--set`, which beats a file, which beats the \
                    default. Settings marked * may change when a run is resumed.\n"
        .to_owned();
    let mut group = None;
    for field in FIELDS {
        if group != Some(field.group) {
            group = Some(field.group);
            let heading = field.group.heading();
            text.push_str(&format!(
                "\n## {heading}\n\n| key | default | type | meaning |\n|---|---|---|---|\n"
            ));
        }
        let star = if field.effect == Effect::Numbers { "" } else { " *" };
        let spellings: Vec<String> = field.aliases.iter().map(|alias| format!("`{alias}`")).collect();
        let also =
            if spellings.is_empty() { String::new() } else { format!(" Also: {}.", spellings.join(", ")) };
        let Field { name, help, .. } = field;
        let (default, kind) = (field.default_text(), field.kind());
        text.push_str(&format!("| `{name}`{star} | `{default}` | {kind} | {help}{also} |\n"));
    }
    text
}

#[cfg(test)]
mod tests;
