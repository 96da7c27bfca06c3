//! `pmetal bench`.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::Context;
use clap::{Args, Subcommand};
use pmetal::engine::random::RandomKey;
use pmetal::formats::adapter::AdapterConfig;
use pmetal::models::loader::{self, LoadOptions};
use pmetal::models::{BaseStorage, Config, TokenRun};
use pmetal::trainer::learner::{Learner, MicroBatch, OptimizerSettings};

use super::{BasePrecision, DeviceChoice, Precision};
use crate::output;

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
    /// Compute activations again in the backward pass
    #[arg(long)]
    gradient_checkpointing: bool,
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
    let text = std::fs::read_to_string(&arguments.config)
        .with_context(|| format!("cannot read `{}`", arguments.config.display()))?;
    let value = serde_json::from_str(&text)
        .with_context(|| format!("`{}` is not JSON", arguments.config.display()))?;
    let config = Config::new(value)?;
    let device = arguments.device.open()?;
    let dtype = arguments.dtype.dtype(&device)?;
    let options = LoadOptions { dtype, train_all: arguments.full };
    let base = arguments.base_precision.storage(arguments.full, &device, dtype)?;
    let mut decoder = loader::random_base(&config, &device, options, base, 0)?;
    if !arguments.full {
        let adapter = AdapterConfig::all_linear(arguments.lora_r, 2.0 * arguments.lora_r as f64);
        pmetal::lora::attach(&mut decoder, &adapter, 0)?;
    }
    let (vocabulary, parameters) = (decoder.spec.vocabulary, decoder.spec.parameter_count());
    let first_losses = match base {
        BaseStorage::Typed => None,
        BaseStorage::Fp8 => {
            let batch = random_batch(arguments.batch_size, arguments.max_seq_len, vocabulary, 0);
            Some(loader::losses_beside_random(&decoder, &config, 0, &batch.run, &batch.labels)?)
        }
    };
    if let Some([rounded, original]) = first_losses {
        eprintln!("fp8 base: loss {rounded:.4} instead of {original:.4} on the first batch");
    }
    let loading_peak_bytes = device.memory().report().peak_bytes;
    let weight_bytes = device.memory().report().live(pmetal::engine::Category::Weights);
    let settings =
        OptimizerSettings { checkpointing: arguments.gradient_checkpointing, ..OptimizerSettings::default() };
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
        learner.forget_recording();
        let batch = random_batch(arguments.batch_size, arguments.max_seq_len, vocabulary, 0);
        let step = WARM_UP_STEPS + arguments.steps;
        let work = || learner.step(step, 1e-4, std::slice::from_ref(&batch));
        let (_, times) = device.profile(work)?;
        let total: f64 = times.iter().map(|time| time.seconds).sum();
        eprintln!(
            "{:9.3} ms in {} kernels",
            total * 1e3,
            times.iter().map(|time| time.launches).sum::<usize>()
        );
        for time in &times {
            eprintln!("{:9.3} ms {:5} x {}", time.seconds * 1e3, time.launches, time.name);
        }
    }
    seconds.sort_by(f64::total_cmp);
    let median = seconds[seconds.len() / 2];
    let tokens = arguments.batch_size * arguments.max_seq_len;
    let report = serde_json::json!({
        "tokens_per_second": tokens as f64 / median,
        "step_seconds_median": median,
        "step_seconds_least": seconds[0],
        "peak_bytes": device.memory().report().peak_bytes,
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
    if arguments.json {
        println!("{report}");
    } else {
        println!("{:.1} tokens/s", tokens as f64 / median);
        println!("{median:.3} s a step (median of {})", seconds.len());
        println!("{} at the peak, tensors", output::bytes(device.memory().report().peak_bytes));
    }
    Ok(ExitCode::SUCCESS)
}

/// Rows of random tokens, every one trained but the last of each row.
fn random_batch(rows: usize, length: usize, vocabulary: usize, step: usize) -> MicroBatch {
    let key = RandomKey { seed: 1, step: step as u32, stream: 0 };
    let ids: Vec<u32> = (0..(rows * length) as u64).map(|i| key.word(i) % vocabulary as u32).collect();
    let label = |t: usize| if (t + 1).is_multiple_of(length) { -100 } else { ids[t + 1] as i32 };
    let labels = (0..ids.len()).map(label).collect();
    MicroBatch { run: TokenRun::documents(ids, &vec![length; rows]), labels, rows: Vec::new() }
}
