//! `pmetal bench infer`.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use clap::Args;
use pmetal::engine::random::RandomKey;
use pmetal::engine::{Category, DType, Device, Tensor, Weight};
use pmetal::generate::{Sampling, Session, StopRules};
use pmetal::models::Decoder;
use pmetal::models::loader::{self, LoadOptions};
use pmetal::models::spec::FeedForwardSpec;

use super::{print_profile, read_config};
use crate::commands::{DeviceChoice, Precision};

#[derive(Args)]
pub(super) struct InferBench {
    /// A model's config.json
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Use random weights (the only kind that this command knows)
    #[arg(long, required = true)]
    random_weights: bool,
    /// Tokens of the prompt
    #[arg(long, default_value_t = 128)]
    prompt_tokens: usize,
    /// Tokens that are generated
    #[arg(long, default_value_t = 128)]
    new_tokens: usize,
    /// Times that the text is continued, after one that is not timed
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Divisor of the logits; 0 takes the most likely token
    #[arg(long, default_value_t = 0.0)]
    temperature: f64,
    /// Draw from this many most likely tokens; 0 = all
    #[arg(long, default_value_t = 0)]
    top_k: usize,
    /// Draw from the fewest tokens that reach this probability
    #[arg(long, default_value_t = 1.0)]
    top_p: f64,
    /// Type of activations
    #[arg(long, value_enum, default_value = "auto")]
    dtype: Precision,
    /// Where to compute
    #[arg(long, value_enum, default_value = "auto")]
    device: DeviceChoice,
    /// Launch the kernels of every token one by one
    #[arg(long)]
    no_cuda_graph: bool,
    /// Print on stderr what each kernel takes, by the token (GPUs only)
    #[arg(long)]
    profile: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

impl InferBench {
    /// Refuses sizes with which there is nothing to time.
    fn check(&self) -> pmetal::Result<()> {
        let least = [
            ("prompt-tokens", self.prompt_tokens, 1),
            ("new-tokens", self.new_tokens, 2),
            ("rounds", self.rounds, 1),
        ];
        match least.into_iter().find(|(_, value, least)| value < least) {
            Some((name, value, least)) => {
                Err(pmetal::Error::Usage(format!("--{name} is {value}, it must be at least {least}")))
            }
            None => self.sampling().check(),
        }
    }

    fn sampling(&self) -> Sampling {
        let (temperature, top_k, top_p) = (self.temperature, self.top_k, self.top_p);
        Sampling { temperature, top_k, top_p, ..Sampling::default() }
    }
}

pub(super) fn run(arguments: &InferBench) -> anyhow::Result<ExitCode> {
    arguments.check()?;
    let device = arguments.device.open()?;
    let dtype = arguments.dtype.dtype(&device)?;
    let options = LoadOptions { dtype, train_all: false };
    let decoder = loader::random(&read_config(&arguments.config)?, &device, options, 0)?;
    let key = RandomKey { seed: 1, step: 0, stream: 0 };
    let vocabulary = decoder.spec.vocabulary as u32;
    let prompt: Vec<u32> = (0..arguments.prompt_tokens as u64).map(|i| key.word(i) % vocabulary).collect();
    let mut session = Session::new(&decoder)?;
    session.record_steps(!arguments.no_cuda_graph);
    let mut rounds = Vec::with_capacity(arguments.rounds);
    for _ in 0..=arguments.rounds {
        rounds.push(timed_round(&mut session, &prompt, arguments)?);
    }
    let mut timed = rounds.split_off(1);
    timed.sort_by(|a, b| a.decode_seconds.total_cmp(&b.decode_seconds));
    let median = timed[timed.len() / 2];
    if arguments.profile {
        session.record_steps(false);
        let (_, times) = device.profile(|| timed_round(&mut session, &prompt, arguments))?;
        print_profile(&times);
    }
    drop(session);
    let tokens_per_second = (arguments.new_tokens - 1) as f64 / median.decode_seconds;
    let weight_bytes = bytes_of_a_token(&decoder);
    let bandwidth = copy_bandwidth(&device)?;
    let share = tokens_per_second * weight_bytes as f64 / bandwidth;
    let report = serde_json::json!({
        "tokens_per_second": tokens_per_second,
        "prompt_tokens_per_second": arguments.prompt_tokens as f64 / median.prompt_seconds,
        "milliseconds_per_token": 1e3 / tokens_per_second,
        "weight_bytes_per_token": weight_bytes,
        "copy_bytes_per_second": bandwidth,
        "share_of_bandwidth": share,
        "dtype": dtype.name(),
        "prompt_tokens": arguments.prompt_tokens,
        "new_tokens": arguments.new_tokens,
        "graph": !arguments.no_cuda_graph && !device.is_host(),
        "last_token": median.last_token,
    });
    if arguments.json {
        println!("{report}");
    } else {
        println!("{tokens_per_second:.1} tokens/s (median of {})", timed.len());
        println!("{:.3} ms a token, {:.1} MB of weights", 1e3 / tokens_per_second, weight_bytes as f64 / 1e6);
        println!("{:.0} % of the {:.0} GB/s that a copy moves", share * 100.0, bandwidth / 1e9);
    }
    Ok(ExitCode::SUCCESS)
}

/// How long a text took.
#[derive(Debug, Clone, Copy)]
struct Round {
    prompt_seconds: f64,
    /// From the first token to the last.
    decode_seconds: f64,
    last_token: u32,
}

fn timed_round(session: &mut Session<'_>, prompt: &[u32], arguments: &InferBench) -> anyhow::Result<Round> {
    session.truncate(0);
    let start = Instant::now();
    let logits = session.extend(prompt)?;
    let prompt_seconds = start.elapsed().as_secs_f64();
    let rules = StopRules { tokens: Vec::new(), max_tokens: arguments.new_tokens };
    let (mut first, mut last_token) = (None, 0);
    session.generate(logits, &arguments.sampling(), &rules, |token| {
        first.get_or_insert_with(Instant::now);
        last_token = token;
        Ok(true)
    })?;
    let decode_seconds = first.map_or(f64::NAN, |first| first.elapsed().as_secs_f64());
    Ok(Round { prompt_seconds, decode_seconds, last_token })
}

/// Bytes of weights that go through the device for one token: of an embedding that is not the head, one row, and of experts
/// those that are chosen.
fn bytes_of_a_token(decoder: &Decoder) -> usize {
    let weights = decoder.weights();
    let has_head = weights.iter().any(|(name, _)| name == "lm_head.weight");
    let is_read = |name: &str| !has_head || name != "model.embed_tokens.weight";
    let layers = decoder.spec.layers.iter().enumerate();
    let experts: Vec<(String, [usize; 2])> = layers
        .filter_map(|(index, layer)| match &layer.feed_forward {
            FeedForwardSpec::Dense(_) => None,
            FeedForwardSpec::Experts(part) => {
                Some((format!("model.layers.{index}.{}.", part.path), [part.router.choices, part.count]))
            }
        })
        .collect();
    let bytes = |(name, weight): &(String, &Weight)| {
        let of = experts.iter().find(|(prefix, _)| name.starts_with(prefix));
        let [chosen, all] = of.map_or([1, 1], |(_, numbers)| *numbers);
        weight.value().byte_length() * chosen / all
    };
    weights.iter().filter(|(name, _)| is_read(name)).map(bytes).sum()
}

/// Bytes a second that the device reads and writes when it copies.
fn copy_bandwidth(device: &Device) -> anyhow::Result<f64> {
    const COPIES: usize = 10;
    // More than any cache holds.
    let bytes: usize = if device.is_host() { 64 << 20 } else { 256 << 20 };
    let source = Tensor::zeros(device, Category::Workspace, DType::F32, &[bytes / 4])?;
    let mut seconds = f64::INFINITY;
    for _ in 0..3 {
        drop(source.copy(Category::Workspace)?);
        device.synchronize()?;
        let start = Instant::now();
        for _ in 0..COPIES {
            drop(source.copy(Category::Workspace)?);
        }
        device.synchronize()?;
        seconds = seconds.min(start.elapsed().as_secs_f64());
    }
    Ok((2 * bytes * COPIES) as f64 / seconds)
}
