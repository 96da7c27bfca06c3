//! Trains an adapter for a few steps on random tokens and writes it with the logits that it gives, for
//! tools/check_adapter.py to compare with what peft makes of the folder.
//!
//!     cargo run --example peft_interchange -- MODEL OUT lora|rslora|patterns
//!
//! OUT/adapter is written by the code that ends a training run; OUT/logits.safetensors holds `input_ids` \[B, T\]
//! and `adapter.logits` \[B, T, V\] of the trained model as it is in memory.

use std::collections::BTreeMap;
use std::error::Error;
use std::path::Path;

use pmetal::engine::random::RandomKey;
use pmetal::engine::{DType, Device, Tape};
use pmetal::formats::adapter::{AdapterConfig, ModuleNames};
use pmetal::formats::atomic::{self, DirectoryCommit};
use pmetal::formats::fs::RealFs;
use pmetal::formats::safetensors::{TensorView, write_safetensors};
use pmetal::lora;
use pmetal::models::loader::{self, LoadOptions};
use pmetal::models::{Decoder, Forward, TokenRun};
use pmetal::trainer::artefacts;
use pmetal::trainer::learner::{Learner, MicroBatch, OptimizerSettings};

const STEPS: usize = 8;
const ROWS: usize = 2;
const LENGTH: usize = 24;
/// High, so that a few steps move the logits by much more than the tolerance.
const LEARNING_RATE: f64 = 2e-2;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [model, out, case] = arguments.as_slice() else {
        return Err("usage: peft_interchange MODEL OUT lora|rslora|patterns".into());
    };
    let (checkpoint, config) = loader::open(Path::new(model))?;
    let options = LoadOptions { dtype: DType::F32, train_all: false };
    let mut decoder = loader::load(&checkpoint, &config, &Device::cpu(), options)?.decoder;
    let adapter = adapter(case)?;
    lora::attach(&mut decoder, &adapter, 7)?;

    let mut learner = Learner::new(decoder, OptimizerSettings::default())?;
    let vocabulary = learner.decoder().spec.vocabulary;
    for step in 0..STEPS {
        let ids = random_ids(vocabulary, step);
        let label = |t: usize| if (t + 1).is_multiple_of(LENGTH) { -100 } else { ids[t + 1] as i32 };
        let labels = (0..ids.len()).map(label).collect();
        let run = TokenRun::documents(ids.clone(), &[LENGTH; ROWS]);
        let report = learner.step(step, LEARNING_RATE, &[MicroBatch { run, labels, rows: Vec::new() }])?;
        eprintln!("step {}: loss {:.4}", step + 1, report.loss);
    }

    let out = Path::new(out);
    std::fs::create_dir_all(out)?;
    let mut commit = DirectoryCommit::begin(&RealFs, &out.join("adapter"))?;
    artefacts::write_adapter(&mut commit, learner.decoder(), &adapter)?;
    commit.commit()?;
    write_logits(learner.decoder(), &out.join("logits.safetensors"))
}

fn adapter(case: &str) -> Result<AdapterConfig, String> {
    let mut config = AdapterConfig::all_linear(4, 6.0);
    match case {
        "lora" => {}
        "rslora" => config.use_rslora = true,
        "patterns" => {
            config.target_modules =
                ModuleNames::List(vec!["q_proj".into(), "o_proj".into(), "up_proj".into()]);
            config.rank_pattern = vec![("o_proj".into(), 3)];
            config.alpha_pattern = vec![("q_proj".into(), 5.0)];
            config.lora_dropout = 0.1;
        }
        other => return Err(format!("case `{other}` is none of lora, rslora, patterns")),
    }
    Ok(config)
}

fn random_ids(vocabulary: usize, step: usize) -> Vec<u32> {
    let key = RandomKey { seed: 3, step: step as u32, stream: 0 };
    (0..(ROWS * LENGTH) as u64).map(|i| key.word(i) % vocabulary as u32).collect()
}

fn write_logits(decoder: &Decoder, path: &Path) -> Result<(), Box<dyn Error>> {
    let ids = random_ids(decoder.spec.vocabulary, STEPS);
    let run = TokenRun::documents(ids.clone(), &[LENGTH; ROWS]);
    let states = decoder.hidden(&Tape::off(), &run, Forward::default())?.into_tensor();
    let logits = decoder.logits(&states)?.to_f32_vec()?;
    let ids: Vec<u8> = ids.iter().flat_map(|&id| i64::from(id).to_le_bytes()).collect();
    let logits: Vec<u8> = logits.iter().flat_map(|value| value.to_le_bytes()).collect();
    let tensors = [
        TensorView {
            name: "input_ids",
            dtype: pmetal::formats::DType::I64,
            shape: &[ROWS, LENGTH],
            data: &ids,
        },
        TensorView {
            name: "adapter.logits",
            dtype: pmetal::formats::DType::F32,
            shape: &[ROWS, LENGTH, decoder.spec.vocabulary],
            data: &logits,
        },
    ];
    atomic::write_file_with(&RealFs, path, |writer| write_safetensors(writer, &tensors, &BTreeMap::new()))?;
    Ok(())
}
