//! `pmetal bench`.

mod infer;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::Context;
use clap::{Args, Subcommand};
use pmetal::engine::device::KernelTime;
use pmetal::engine::random::RandomKey;
use pmetal::engine::{DType, Device, MemoryReport, Recompute};
use pmetal::formats::adapter::AdapterConfig;
use pmetal::models::loader::{self, LoadOptions};
use pmetal::models::{BaseStorage, Config, TokenRun};
use pmetal::trainer::config::Setting;
use pmetal::trainer::learner::{Learner, MicroBatch, OptimizerSettings};

use super::{BasePrecision, DeviceChoice, Precision};
use crate::memory;

/// Arguments of `pmetal bench`.
#[derive(Args)]
pub(crate) struct BenchArguments {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Time training steps of any configuration on random tokens, without a checkpoint
    Train(TrainBench),
    /// Time the generation of tokens by any configuration, without a checkpoint
    Infer(infer::InferBench),
}

#[derive(Args)]
struct TrainBench {
    /// A model's config.json
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Use random weights (the only kind that this command knows)
    #[arg(long, required = true)]
    random_weights: bool,
    /// Rows per step
    #[arg(long, default_value_t = 4)]
    batch_size: usize,
    /// Tokens per row
    #[arg(long, default_value_t = 512)]
    max_seq_len: usize,
    /// Timed steps, after two that are not
    #[arg(long, default_value_t = 5)]
    steps: usize,
    /// Rank of the adapters on all linear layers
    #[arg(long, default_value_t = 16)]
    lora_r: usize,
    /// Train all weights instead of adapters
    #[arg(long)]
    full: bool,
    /// What is computed again instead of kept: none, cheap or full
    #[arg(long, value_name = "LEVEL", default_value = "cheap", default_missing_value = "full")]
    #[arg(num_args = 0..=1, require_equals = true, value_parser = <Recompute as Setting>::from_text)]
    gradient_checkpointing: Recompute,
    /// Keep the inputs of layers in the host's memory (with full recomputation, GPUs only)
    #[arg(long)]
    offload_activations: bool,
    /// Launch kernels one by one instead of replaying steps as a graph
    #[arg(long)]
    no_cuda_graph: bool,
    /// Most memory that tensors may take, in GiB; 0 = what the device has
    #[arg(long, default_value_t = 0.0)]
    memory_limit_gib: f64,
    /// Type of activations
    #[arg(long, value_enum, default_value = "auto")]
    dtype: Precision,
    /// How frozen weights are kept
    #[arg(long, value_enum, default_value = "auto")]
    base_precision: BasePrecision,
    /// Where to compute
    #[arg(long, value_enum, default_value = "auto")]
    device: DeviceChoice,
    /// Print on stderr what each kernel of one more step takes (GPUs only)
    #[arg(long)]
    profile: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(arguments: BenchArguments) -> anyhow::Result<ExitCode> {
    match arguments.what {
        What::Train(arguments) => train(&arguments),
        What::Infer(arguments) => infer::run(&arguments),
    }
}

/// Steps that warm caches and pools up before the clock starts.
const WARM_UP_STEPS: usize = 2;

/// Refuses sizes with which there is nothing to time.
fn check(arguments: &TrainBench) -> pmetal::Result<()> {
    let least = [
        ("batch-size", arguments.batch_size, 1),
        ("max-seq-len", arguments.max_seq_len, 2),
        ("steps", arguments.steps, 1),
        ("lora-r", arguments.lora_r, 1),
    ];
    match least.into_iter().find(|(_, value, least)| value < least) {
        Some((name, value, least)) => {
            Err(pmetal::Error::Usage(format!("--{name} is {value}, it must be at least {least}")))
        }
        None => Ok(()),
    }
}

fn train(arguments: &TrainBench) -> anyhow::Result<ExitCode> {
    check(arguments)?;
    let config = read_config(&arguments.config)?;
    let device = arguments.device.open()?;
    if arguments.memory_limit_gib > 0.0 {
        device.memory().set_limit(Some((arguments.memory_limit_gib * (1_u64 << 30) as f64) as usize));
    }
    let dtype = arguments.dtype.dtype(&device)?;
    let base = arguments.base_precision.storage(arguments.full, &device, dtype)?;
    let measured = measure(arguments, &config, &device, (dtype, base));
    let (facts, report) = measured.map_err(|error| memory::explained(error, &device, Vec::new))?;
    if arguments.json {
        println!("{facts}");
    } else {
        println!("{:.1} tokens/s", facts["tokens_per_second"].as_f64().unwrap_or_default());
        let median = facts["step_seconds_median"].as_f64().unwrap_or_default();
        println!("{median:.3} s a step (median of {})", arguments.steps);
        let flops = facts["flops_per_second"].as_f64().unwrap_or_default();
        println!("{:.3} TFLOP/s of what a step cannot do without", flops / 1e12);
        print!("{}", memory::table(&report));
    }
    Ok(ExitCode::SUCCESS)
}

/// Times steps; what was found as JSON, and the memory that is held between steps and was at the peak.
fn measure(
    arguments: &TrainBench,
    config: &Config,
    device: &Device,
    (dtype, base): (DType, BaseStorage),
) -> pmetal::Result<(serde_json::Value, MemoryReport)> {
    let options = LoadOptions { dtype, train_all: arguments.full };
    let mut decoder = loader::random_base(config, device, options, base, 0)?;
    if !arguments.full {
        let mut adapter = AdapterConfig::all_linear(arguments.lora_r, 2.0 * arguments.lora_r as f64);
        pmetal::lora::experts::target(&mut adapter, &decoder);
        pmetal::lora::attach(&mut decoder, &adapter, 0)?;
    }
    let (vocabulary, parameters) = (decoder.spec.vocabulary, decoder.spec.parameter_count());
    let flops = decoder.spec.step_flops(&vec![arguments.max_seq_len; arguments.batch_size], arguments.full);
    let first_losses = match base {
        BaseStorage::Typed => None,
        BaseStorage::Fp8 => {
            let batch = random_batch(arguments.batch_size, arguments.max_seq_len, vocabulary, 0);
            Some(loader::losses_beside_random(&decoder, config, 0, &batch.run, &batch.labels)?)
        }
    };
    if let Some([rounded, original]) = first_losses {
        eprintln!("fp8 base: loss {rounded:.4} instead of {original:.4} on the first batch");
    }
    let loading_peak_bytes = device.memory().report().peak_bytes;
    let weight_bytes = device.memory().report().live(pmetal::engine::Category::Weights);
    let settings = OptimizerSettings {
        recompute: arguments.gradient_checkpointing,
        offloads: arguments.offload_activations,
        records: !arguments.no_cuda_graph,
        ..OptimizerSettings::default()
    };
    let mut learner = Learner::new(decoder, settings)?;
    let (mut seconds, mut loss) = (Vec::new(), f64::NAN);
    for step in 0..WARM_UP_STEPS + arguments.steps {
        let batch = random_batch(arguments.batch_size, arguments.max_seq_len, vocabulary, step);
        let start = Instant::now();
        loss = learner.step(step, 1e-4, std::slice::from_ref(&batch))?.loss;
        if step >= WARM_UP_STEPS {
            seconds.push(start.elapsed().as_secs_f64());
        }
    }
    if arguments.profile {
        profile(arguments, &mut learner, vocabulary)?;
    }
    seconds.sort_by(f64::total_cmp);
    let median = seconds[seconds.len() / 2];
    let tokens = arguments.batch_size * arguments.max_seq_len;
    let memory = device.memory().report();
    let at_peak: serde_json::Map<String, serde_json::Value> = memory
        .categories
        .iter()
        .map(|entry| (entry.category.name().to_owned(), entry.at_peak_bytes.into()))
        .collect();
    let facts = serde_json::json!({
        "tokens_per_second": tokens as f64 / median,
        "step_seconds_median": median,
        "step_seconds_least": seconds[0],
        "step_flops": flops,
        "flops_per_second": flops / median,
        "peak_bytes": memory.peak_bytes,
        "peak_bytes_by_category": at_peak,
        "peak_rss_bytes": pmetal::trainer::resident_peak_bytes(),
        "dtype": dtype.name(),
        "weight_bytes": weight_bytes,
        "loading_peak_bytes": loading_peak_bytes,
        "first_losses": first_losses,
        "instructions": pmetal::engine::device::SimdLevel::current().name(),
        "threads": rayon::current_num_threads(),
        "batch_size": arguments.batch_size,
        "sequence_length": arguments.max_seq_len,
        "parameters": parameters as u64,
        "loss": loss,
    });
    Ok((facts, memory))
}

/// Prints on stderr what each kernel of one more step takes.
fn profile(arguments: &TrainBench, learner: &mut Learner, vocabulary: usize) -> pmetal::Result<()> {
    learner.forget_recording();
    let device = learner.decoder().device().clone();
    let batch = random_batch(arguments.batch_size, arguments.max_seq_len, vocabulary, 0);
    let step = WARM_UP_STEPS + arguments.steps;
    let (_, times) = device.profile(|| learner.step(step, 1e-4, std::slice::from_ref(&batch)))?;
    print_profile(&times);
    Ok(())
}

fn read_config(path: &Path) -> anyhow::Result<Config> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read `{}`", path.display()))?;
    let value = serde_json::from_str(&text).with_context(|| format!("`{}` is not JSON", path.display()))?;
    Ok(Config::new(value)?)
}

fn print_profile(times: &[KernelTime]) {
    let total: f64 = times.iter().map(|time| time.seconds).sum();
    let launches: usize = times.iter().map(|time| time.launches).sum();
    eprintln!("{:9.3} ms in {launches} kernels", total * 1e3);
    for time in times {
        eprintln!("{:9.3} ms {:5} x {}", time.seconds * 1e3, time.launches, time.name);
    }
}

/// Rows of random tokens, every one trained but the last of each row.
fn random_batch(rows: usize, length: usize, vocabulary: usize, step: usize) -> MicroBatch {
    let key = RandomKey { seed: 1, step: step as u32, stream: 0 };
    let ids: Vec<u32> = (0..(rows * length) as u64).map(|i| key.word(i) % vocabulary as u32).collect();
    let label = |t: usize| if (t + 1).is_multiple_of(length) { -100 } else { ids[t + 1] as i32 };
    let labels = (0..ids.len()).map(label).collect();
    MicroBatch { run: TokenRun::documents(ids, &vec![length; rows]), labels, rows: Vec::new() }
}
