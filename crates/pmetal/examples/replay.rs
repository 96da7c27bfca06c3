//! Trains on the batches that another program trained on and compares the losses of every step.
//!
//!     cargo run --release --example replay -- MODEL ADAPTER BATCHES LOSSES [STEPS]
//!
//! MODEL is a folder or GGUF file, ADAPTER the PEFT folder that the other program began with, BATCHES one JSON row
//! {"ids": [...], "labels": [...]} a line, and LOSSES what tools/smollm2_reference.py writes: settings, losses and
//! gradient norms. Everything is computed in f32. Exits 1 when a loss differs by more than 1e-3 of itself.

use std::error::Error;
use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use pmetal::engine::{DType, Device};
use pmetal::lora;
use pmetal::models::TokenRun;
use pmetal::models::loader::{self, LoadOptions};
use pmetal::trainer::learner::{Learner, MicroBatch, OptimizerSettings};
use serde::Deserialize;

/// Largest difference of a loss as a share of it.
const TOLERANCE: f64 = 1e-3;

#[derive(Deserialize)]
struct Row {
    ids: Vec<u32>,
    /// Not shifted: the logits one position earlier score them.
    labels: Vec<i32>,
}

#[derive(Deserialize)]
struct Record {
    settings: Settings,
    losses: Vec<f64>,
    gradient_norms: Vec<f64>,
}

#[derive(Deserialize)]
struct Settings {
    lr: f64,
    betas: [f64; 2],
    eps: f64,
    weight_decay: f64,
    max_grad_norm: f64,
    rows_per_step: usize,
}

fn main() -> Result<ExitCode, Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let ([model, adapter, batches, losses], steps) = match arguments.as_slice() {
        [model, adapter, batches, losses] => ([model, adapter, batches, losses], usize::MAX),
        [model, adapter, batches, losses, steps] => ([model, adapter, batches, losses], steps.parse()?),
        _ => return Err("usage: replay MODEL ADAPTER BATCHES LOSSES [STEPS]".into()),
    };
    let record: Record = serde_json::from_str(&std::fs::read_to_string(losses)?)?;
    let rows = std::fs::read_to_string(batches)?
        .lines()
        .map(serde_json::from_str)
        .collect::<Result<Vec<Row>, _>>()?;
    let mut learner = learner(Path::new(model), Path::new(adapter), &record.settings)?;

    println!("{:>4} {:>11} {:>11} {:>10} {:>10}", "step", "ours", "theirs", "loss", "gradient");
    let (mut worst, mut worst_norm, mut tokens, start) = (0.0_f64, 0.0_f64, 0, Instant::now());
    let wanted = record.losses.len().min(steps);
    let steps = rows.chunks_exact(record.settings.rows_per_step).take(wanted);
    let expected = record.losses.iter().zip(&record.gradient_norms);
    let mut compared = 0;
    for (step, (rows, (&loss, &norm))) in steps.zip(expected).enumerate() {
        let report = learner.step(step, record.settings.lr, &[micro_batch(rows)])?;
        let (difference, of_norm) =
            ((report.loss - loss).abs() / loss, (report.gradient_norm - norm).abs() / norm);
        println!("{:>4} {:>11.6} {loss:>11.6} {difference:>10.2e} {of_norm:>10.2e}", step + 1, report.loss);
        worst = worst.max(difference);
        worst_norm = worst_norm.max(of_norm);
        tokens += report.tokens;
        compared += 1;
    }
    let rate = tokens as f64 / start.elapsed().as_secs_f64();
    println!(
        "{compared} of {wanted} steps: losses differ by at most {worst:.2e}, gradient norms by {worst_norm:.2e}"
    );
    println!("{rate:.1} tokens/s on {} threads", rayon::current_num_threads());
    Ok(if compared == wanted && wanted > 0 && worst <= TOLERANCE {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn learner(model: &Path, adapter: &Path, settings: &Settings) -> Result<Learner, Box<dyn Error>> {
    let (checkpoint, config) = loader::open(model)?;
    let options = LoadOptions { dtype: DType::F32, train_all: false };
    let mut decoder = loader::load(&checkpoint, &config, &Device::cpu(), options)?.decoder;
    lora::load(&mut decoder, adapter, true)?;
    let settings = OptimizerSettings {
        beta1: settings.betas[0],
        beta2: settings.betas[1],
        epsilon: settings.eps,
        weight_decay: settings.weight_decay,
        max_gradient_norm: settings.max_grad_norm,
        ..OptimizerSettings::default()
    };
    Ok(Learner::new(decoder, settings)?)
}

fn micro_batch(rows: &[Row]) -> MicroBatch {
    let lengths: Vec<usize> = rows.iter().map(|row| row.ids.len()).collect();
    let ids = rows.iter().flat_map(|row| row.ids.iter().copied()).collect();
    let labels = rows.iter().flat_map(|row| row.labels.iter().skip(1).copied().chain([-100])).collect();
    MicroBatch { run: TokenRun::documents(ids, &lengths), labels, rows: Vec::new() }
}
