//! The loss that balances experts: which configurations ask for it, and what it is a part of in training.
#![allow(clippy::unwrap_used, clippy::panic, clippy::disallowed_methods)] // tests prepare files as they like, and may panic

mod support;

use pmetal::engine::random::RandomKey;
use pmetal::engine::{DType, Device, Recompute, Tape};
use pmetal::eval::verify::verify_changed;
use pmetal::lora;
use pmetal::models::loader::{self, LoadOptions};
use pmetal::models::spec::FeedForwardSpec;
use pmetal::models::{BalanceInputs, Config, Decoder, Forward, Spec, TokenRun, families};
use pmetal::trainer::learner::{Learner, MicroBatch, OptimizerSettings, StepReport};
use serde_json::{Value, json};
use support::{fixture, read_json};

const MODEL: &str = "mixtral-balance";

fn spec_of(name: &str, change: impl Fn(&mut serde_json::Map<String, Value>)) -> Spec {
    let mut config = read_json(&fixture(name).join("config.json"));
    change(config.as_object_mut().unwrap());
    families::read(&Config::new(config).unwrap()).unwrap()
}

#[test]
fn a_balance_is_asked_for_by_output_router_logits_with_the_coefficient_of_the_configuration() {
    for name in ["mixtral", "qwen2-moe", "qwen3-moe", "qwen3-next", "granitemoe", "gpt-oss"] {
        let coefficient = |fields: Value| {
            let spec = spec_of(name, |config| {
                config.remove("router_aux_loss_coef");
                config.extend(fields.as_object().unwrap().clone());
            });
            spec.balance().map(|balance| balance.coefficient)
        };
        assert_eq!(coefficient(json!({ "output_router_logits": false })), None, "{name}");
        assert_eq!(coefficient(json!({ "output_router_logits": true })), Some(0.001), "{name}");
        let both = json!({ "output_router_logits": true, "router_aux_loss_coef": 0.25 });
        assert_eq!(coefficient(both), Some(0.25), "{name}");
    }
    // transformers computes no such loss for this one, whose experts are chosen by a sigmoid.
    let spec = spec_of("llama4-text", |config| {
        config.insert("output_router_logits".to_owned(), true.into());
    });
    assert_eq!(spec.balance(), None);
}

#[test]
fn a_loss_without_its_balance_or_with_another_coefficient_is_noticed() {
    for factor in [None, Some(0.99), Some(1.01)] {
        let change = |spec: &mut Spec| {
            for layer in &mut spec.layers {
                if let FeedForwardSpec::Experts(part) = &mut layer.feed_forward {
                    part.balance = part.balance.zip(factor).map(|(old, factor)| old * factor);
                }
            }
        };
        let report = verify_changed(&fixture(MODEL), &Device::cpu(), change).unwrap();
        let missed: Vec<&str> =
            report.comparisons.iter().filter(|c| !c.passed).map(|c| c.quantity.as_str()).collect();
        assert_eq!(missed, ["loss"], "{factor:?}");
    }
}

/// One document, of whose tokens about that share is trained.
fn batch(number: u32, length: usize, share: f32) -> MicroBatch {
    let key = RandomKey { seed: 5, step: number, stream: 0 };
    let ids: Vec<u32> = (0..length as u64).map(|index| key.word(index) % 64).collect();
    let is_trained = |t: usize| t + 1 < length && (t == 0 || key.uniform(100 + t as u64) < share);
    let labels = (0..length).map(|t| if is_trained(t) { ids[t + 1] as i32 } else { -100 }).collect();
    MicroBatch { run: TokenRun::single(&ids), labels, rows: vec![number as usize] }
}

fn decoder(device: &Device, train_all: bool) -> Decoder {
    let (checkpoint, config) = loader::open(&fixture(MODEL)).unwrap();
    let options = LoadOptions { dtype: DType::F32, train_all };
    let mut decoder = loader::load(&checkpoint, &config, device, options).unwrap().decoder;
    if !train_all {
        lora::load(&mut decoder, &fixture(MODEL).join("adapter"), true).unwrap();
    }
    decoder
}

fn learner(device: &Device, settings: OptimizerSettings) -> Learner {
    Learner::new(decoder(device, true), OptimizerSettings { max_gradient_norm: 0.0, ..settings }).unwrap()
}

/// The report of a first step, and all gradients: AdamW's first moment is a tenth of them.
fn first_step(learner: &mut Learner, batches: &[MicroBatch]) -> (StepReport, Vec<f32>) {
    let report = learner.step(0, 1e-3, batches).unwrap();
    let moments = learner.state_tensors().into_iter().filter(|(name, _)| name.starts_with("first."));
    (report, moments.flat_map(|(_, tensor)| tensor.to_f32_vec().unwrap()).collect())
}

fn relative_error(actual: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(actual.len(), expected.len());
    let squares = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>();
    let pairs = || actual.iter().zip(expected);
    let error = squares(&mut pairs().map(|(a, b)| f64::from(*a) - f64::from(*b)));
    (error / squares(&mut pairs().map(|(_, b)| f64::from(*b)))).sqrt()
}

fn batches() -> Vec<MicroBatch> {
    vec![batch(0, 19, 0.9), batch(1, 11, 0.3), batch(2, 26, 0.6)]
}

/// What `transformers` gives for one forward pass: the mean of the loss, with 0.6 times the balance, the balance alone, and
/// a tenth of all gradients.
fn reference(batch: &MicroBatch) -> (f64, f64, Vec<f32>) {
    let decoder = decoder(&Device::cpu(), true);
    let tokens = batch.run.ids.len();
    let inputs = decoder.balance_inputs(tokens, tokens, 1.0).unwrap();
    let balance = inputs.as_ref().map(BalanceInputs::begin).unwrap().unwrap();
    let forward = Forward { balance: Some(balance.clone()), ..Forward::default() };
    let (tape, scale) = (Tape::recording(), 1.0 / batch.trained_tokens() as f32);
    let (states, loss) = decoder.loss(&tape, &batch.run, &batch.labels, scale, forward).unwrap();
    tape.backward(&states, loss.d_hidden.unwrap()).unwrap();
    let balance = f64::from(balance.loss().unwrap().to_f32_vec().unwrap()[0]);
    let mean = loss.sum.read().unwrap() / loss.tokens as f64;
    let gradients = decoder.parameters().into_iter().flat_map(|parameter| {
        let gradient = parameter.gradient().unwrap().to_f32_vec().unwrap();
        gradient.into_iter().map(|value| 0.1 * value)
    });
    (mean + f64::from(0.6_f32) * balance, balance, gradients.collect())
}

#[test]
fn the_loss_of_a_step_is_the_mean_of_its_micro_batches_by_their_trained_tokens() {
    let batches = batches();
    let step = |batches: &[MicroBatch]| {
        first_step(&mut learner(&Device::cpu(), OptimizerSettings::default()), batches)
    };
    let (whole, gradients) = step(&batches);
    let (mut loss, mut balance, mut sum) = (0.0, 0.0, vec![0.0; gradients.len()]);
    let close = |a: f64, b: f64| (a - b).abs() < 1e-6 * b;
    for batch in &batches {
        let (expected, balanced, wanted) = reference(batch);
        let (report, own) = step(std::slice::from_ref(batch));
        assert!(close(report.loss, expected), "{} and {expected}", report.loss);
        assert!(balanced > 1.0 && close(report.balance_loss.unwrap(), balanced), "{balanced}");
        let error = relative_error(&own, &wanted);
        assert!(error < 1e-5, "gradients differ by {error:.1e}");
        let part = batch.trained_tokens() as f64 / whole.trained_tokens as f64;
        loss += part * expected;
        balance += part * balanced;
        sum.iter_mut().zip(wanted).for_each(|(sum, own)| *sum += part as f32 * own);
    }
    assert!(close(whole.loss, loss), "{} and {loss}", whole.loss);
    assert!(close(whole.balance_loss.unwrap(), balance), "{balance}");
    let error = relative_error(&gradients, &sum);
    assert!(error < 1e-5, "gradients differ by {error:.1e}");
}

#[test]
fn evaluation_leaves_the_balance_out() {
    let device = Device::cpu();
    let (mut learner, batch) = (learner(&device, OptimizerSettings::default()), batch(0, 19, 0.9));
    let (sum, tokens) = learner.evaluate(&batch).unwrap();
    let report = learner.step(0, 1e-3, &[batch]).unwrap();
    let text = report.loss - f64::from(0.6_f32) * report.balance_loss.unwrap();
    assert!((sum / tokens as f64 - text).abs() < 1e-6 * text, "{} and {text}", sum / tokens as f64);
}

#[test]
fn a_model_that_asks_for_no_balance_reports_none() {
    let (checkpoint, config) = loader::open(&fixture("mixtral")).unwrap();
    let options = LoadOptions { dtype: DType::F32, train_all: true };
    let decoder = loader::load(&checkpoint, &config, &Device::cpu(), options).unwrap().decoder;
    let mut learner = Learner::new(decoder, OptimizerSettings::default()).unwrap();
    assert_eq!(learner.step(0, 1e-3, &batches()).unwrap().balance_loss, None);
}

/// Three steps of two micro-batches whose lengths and trained tokens change: all reports and the state after them, in bits.
fn three_steps(mut learner: Learner) -> (Vec<StepReport>, Vec<u32>) {
    let steps = [[23, 17], [9, 25], [25, 12], [4, 20]].iter().enumerate();
    let reports = steps.map(|(step, lengths)| {
        let batch = |index: usize| batch((2 * step + index) as u32, lengths[index], [0.9, 0.4][index]);
        learner.step(step, 1e-2, &[batch(0), batch(1)]).unwrap()
    });
    let reports = reports.collect();
    let bits = |tensor: pmetal::engine::Tensor| tensor.to_f32_vec().unwrap().into_iter().map(f32::to_bits);
    (reports, learner.state_tensors().into_iter().flat_map(|(_, tensor)| bits(tensor)).collect())
}

#[test]
fn the_balance_is_the_same_to_the_bit_at_every_level_of_recomputation() {
    let run = |recompute| {
        three_steps(learner(&Device::cpu(), OptimizerSettings { recompute, ..OptimizerSettings::default() }))
    };
    let cheap = run(Recompute::Cheap);
    assert!(run(Recompute::Full) == cheap);
    assert!(run(Recompute::None) == cheap);
}

#[test]
fn padding_and_replayed_steps_change_nothing_of_the_balance() {
    let Some(device) = Device::emulator(1) else {
        eprintln!("skipped: no C++ compiler");
        return;
    };
    for recompute in [Recompute::Cheap, Recompute::Full] {
        let run = |device: &Device, records: bool| {
            let settings = OptimizerSettings { recompute, records, ..OptimizerSettings::default() };
            let mut learner = learner(device, settings);
            learner.pad_to(26);
            three_steps(learner)
        };
        let (replayed, launched) = (run(&device, true), run(&device, false));
        assert!(replayed == launched, "{:?} and {:?}", replayed.0, launched.0);
        // The processor computes without padding.
        for (ours, other) in run(&Device::cpu(), true).0.iter().zip(&launched.0) {
            let close = |a: f64, b: f64| (a - b).abs() < 1e-5 * b;
            let (own, others) = (ours.balance_loss.unwrap(), other.balance_loss.unwrap());
            assert!(close(ours.loss, other.loss) && close(own, others), "{ours:?} and {other:?}");
            assert!((ours.gradient_norm / other.gradient_norm - 1.0).abs() < 1e-4, "{ours:?} and {other:?}");
        }
    }
}

#[test]
fn adapters_feel_the_balance_through_the_states_while_the_router_is_frozen() {
    let device = Device::cpu();
    let gradients = |balanced: bool| {
        let mut decoder = decoder(&device, false);
        if !balanced {
            for layer in &mut decoder.spec.layers {
                if let FeedForwardSpec::Experts(part) = &mut layer.feed_forward {
                    part.balance = None;
                }
            }
        }
        assert!(decoder.parameters().iter().all(|parameter| parameter.name().contains(".lora_")));
        let settings = OptimizerSettings { max_gradient_norm: 0.0, ..OptimizerSettings::default() };
        first_step(&mut Learner::new(decoder, settings).unwrap(), &batches()).1
    };
    assert!(relative_error(&gradients(false), &gradients(true)) > 1e-3);
}
