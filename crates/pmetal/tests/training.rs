//! Steps of training: how a batch is divided changes nothing, documents do not see each other, and the optimizer,
//! clipping and the loss agree with PyTorch.
#![allow(clippy::unwrap_used, clippy::panic)] // a test that fails may panic, also in its helpers

mod support;

use std::io::Write;

use pmetal::engine::device::{AdamWParameters, CrossEntropyParameters};
use pmetal::engine::ops::{self, AdamWState};
use pmetal::engine::random::RandomKey;
use pmetal::engine::{Category, DType, Device, Parameter, Recompute, Tape, Tensor, Weight};
use pmetal::formats::adapter::AdapterConfig;
use pmetal::lora;
use pmetal::models::loader::{self, LoadOptions};
use pmetal::models::{Decoder, Forward, TokenRun};
use pmetal::trainer::learner::{Learner, MicroBatch, OptimizerSettings};
use rayon::prelude::*;

/// Makes tests `NAME::cpu`, `NAME::emulator` (GPU kernels on the host) and `NAME::cuda` of functions that take a device.
/// What is not there is said past the test runner, which keeps what tests that pass have printed.
macro_rules! on_every_device {
    ($($name:ident),+ $(,)?) => {$(
        mod $name {
            #[test]
            fn cpu() {
                super::$name(&super::Device::cpu());
            }

            #[test]
            fn emulator() {
                match super::Device::emulator(1) {
                    Some(device) => super::$name(&device),
                    None => super::skipped(module_path!(), "emulator", "no C++ compiler"),
                }
            }

            #[test]
            fn cuda() {
                match super::Device::cuda(0, true) {
                    Ok(device) => super::$name(&device),
                    Err(error) => super::skipped(module_path!(), "cuda", &error.to_string()),
                }
            }
        }
    )+};
}

on_every_device! {
    packed_rows_train_as_if_each_were_alone,
    a_document_does_not_see_the_others,
    every_step_has_masks_of_its_own_also_when_it_is_replayed,
    recomputed_activations_give_the_same_bits,
    steps_whose_documents_had_no_choice_of_keys_are_not_replayed_for_longer_ones,
    steps_are_replayed_whatever_documents_they_have,
}

fn skipped(test: &str, device: &str, reason: &str) {
    let line = format!("skipped: {test}::{device}: {}\n", reason.lines().next().unwrap_or_default());
    std::io::stderr().write_all(line.as_bytes()).unwrap();
}

/// Every fixture; the emulator has time for some: all keys, windows and norms of heads, a choice of keys, experts, and
/// states that go from token to token.
fn models(device: &Device) -> Vec<String> {
    if device.name() == "emulator" {
        return ["llama2", "qwen3-window", "deepseek-v32", "qwen3-next"].map(str::to_owned).to_vec();
    }
    // Adapters that name each expert are not trained; both models are there with adapters that do not.
    support::fixture_names().into_iter().filter(|name| !name.ends_with("-by-expert")).collect()
}

/// Calls a test with each model in each type; a processor's cores share them.
fn for_every_model(device: &Device, test: impl Fn(&str, DType) + Sync) {
    let cases =
        models(device).into_iter().flat_map(|name| types(device).iter().map(move |&t| (name.clone(), t)));
    let cases: Vec<(String, DType)> = cases.collect();
    // All that fail are named, each with its reason as far as it was printed.
    let fails = |(name, dtype): &(String, DType)| {
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| test(name, *dtype)));
        outcome.is_err().then(|| format!("{name}, {dtype}"))
    };
    let failed: Vec<String> = match device.is_host() {
        true => cases.par_iter().filter_map(fails).collect(),
        false => cases.iter().filter_map(fails).collect(),
    };
    assert!(failed.is_empty(), "wrong: {}", failed.join("; "));
}

/// On a GPU also bf16, whose attention runs on its matrix units.
fn types(device: &Device) -> &'static [DType] {
    if device.name() == "cuda" { &[DType::F32, DType::Bf16] } else { &[DType::F32] }
}

fn decoder(name: &str, train_all: bool) -> Decoder {
    decoder_on(&Device::cpu(), DType::F32, name, train_all)
}

fn decoder_on(device: &Device, dtype: DType, name: &str, train_all: bool) -> Decoder {
    let folder = support::fixture(name);
    let (checkpoint, config) = loader::open(&folder).unwrap();
    let options = LoadOptions { dtype, train_all };
    let mut decoder = loader::load(&checkpoint, &config, device, options).unwrap().decoder;
    if !train_all {
        // Random A and B, so that every gradient has a value.
        lora::load(&mut decoder, &folder.join("adapter"), true).unwrap();
    }
    decoder
}

/// A row: its tokens and its targets, of which only some are trained.
#[derive(Clone)]
struct Row {
    ids: Vec<u32>,
    labels: Vec<i32>,
}

/// Eight rows of unequal lengths, longer and shorter than the windows, with unequal shares of trained tokens; row 5
/// trains nothing.
fn rows() -> Vec<Row> {
    let lengths = [31, 3, 17, 9, 26, 12, 2, 21];
    let rows = lengths.iter().enumerate().map(|(number, &length)| {
        let key = RandomKey { seed: 11, step: number as u32, stream: 0 };
        let ids: Vec<u32> = (0..length as u64).map(|index| key.word(index) % 64).collect();
        let share = [0.9, 1.0, 0.2, 0.6, 0.05, 0.0, 1.0, 0.5][number];
        let label = |t: usize| {
            let trained = t + 1 < length && (t == 0 || key.uniform(100 + t as u64) < share) && share > 0.0;
            if trained { ids[t + 1] as i32 } else { -100 }
        };
        let labels = (0..length).map(label).collect();
        Row { ids, labels }
    });
    rows.collect()
}

/// Rows as the documents of one forward pass.
fn packed(rows: &[Row]) -> MicroBatch {
    let ids = rows.iter().flat_map(|row| row.ids.iter().copied()).collect();
    let lengths: Vec<usize> = rows.iter().map(|row| row.ids.len()).collect();
    let labels = rows.iter().flat_map(|row| row.labels.iter().copied()).collect();
    MicroBatch { run: TokenRun::documents(ids, &lengths), labels, rows: (0..rows.len()).collect() }
}

type Gradients = Vec<(String, Vec<f32>)>;

/// Loss and all gradients of the first step on the processor.
fn gradients(name: &str, train_all: bool, batches: &[MicroBatch]) -> (f64, Gradients) {
    gradients_of(decoder(name, train_all), batches)
}

/// Loss and all gradients of the first step: AdamW's first moment is a tenth of them.
fn gradients_of(decoder: Decoder, batches: &[MicroBatch]) -> (f64, Gradients) {
    let settings = OptimizerSettings { max_gradient_norm: 0.0, ..OptimizerSettings::default() };
    let mut learner = Learner::new(decoder, settings).unwrap();
    let report = learner.step(0, 1e-3, batches).unwrap();
    let moments = learner.state_tensors().into_iter().filter(|(name, _)| name.starts_with("first."));
    (report.loss, moments.map(|(name, tensor)| (name, tensor.to_f32_vec().unwrap())).collect())
}

/// 2-norm of the difference over the 2-norm, over all tensors together.
fn relative_error(actual: &[(String, Vec<f32>)], expected: &[(String, Vec<f32>)]) -> f64 {
    let (mut error, mut norm) = (0.0, 0.0);
    for ((_, actual), (_, expected)) in actual.iter().zip(expected) {
        for (a, b) in actual.iter().zip(expected) {
            error += (f64::from(*a) - f64::from(*b)).powi(2);
            norm += f64::from(*b).powi(2);
        }
    }
    assert!(norm > 0.0, "all gradients are zero");
    (error / norm).sqrt()
}

#[test]
fn loss_and_gradients_do_not_depend_on_how_rows_are_divided() {
    for (name, train_all) in [("llama2", false), ("mistral-window", false), ("qwen3-window", true)] {
        let rows = rows();
        let (loss, expected) = gradients(name, train_all, &[packed(&rows)]);
        for size in [4, 2, 1] {
            let batches: Vec<MicroBatch> = rows.chunks(size).map(packed).collect();
            let (other, actual) = gradients(name, train_all, &batches);
            assert!((other - loss).abs() <= 1e-6 * loss, "{name}, {size} rows: {other} and {loss}");
            let error = relative_error(&actual, &expected);
            assert!(error <= 1e-6, "{name}, {size} rows: gradients differ by {error:.2e}");
        }
    }
}

#[test]
fn a_mean_of_means_would_be_another_loss() {
    let rows = rows();
    let (loss, _) = gradients("llama2", false, &[packed(&rows)]);
    let trained = rows.iter().filter(|row| row.labels.iter().any(|&label| label >= 0));
    let losses: Vec<f64> =
        trained.map(|row| gradients("llama2", false, &[packed(std::slice::from_ref(row))]).0).collect();
    let mean = losses.iter().sum::<f64>() / losses.len() as f64;
    assert!((mean - loss).abs() > 1e-2 * loss, "the rows are too alike to tell: {mean} and {loss}");
}

fn packed_rows_train_as_if_each_were_alone(device: &Device) {
    for_every_model(device, |name, dtype| {
        // The load of experts is balanced over all tokens of a forward pass, which is no sum over rows.
        if name == "mixtral-balance" {
            return;
        }
        let rows = rows();
        let gradients =
            |batches: &[MicroBatch]| gradients_of(decoder_on(device, dtype, name, false), batches);
        let alone: Vec<MicroBatch> = rows.chunks(1).map(packed).collect();
        let (expected_loss, expected) = gradients(&alone);
        let mut turned = rows.clone();
        turned.reverse();
        // Products of few rows sum in another order than those of many. In f32 that tells right from wrong; with 8 bits of
        // mantissa random models make a few percent of it.
        let [of_loss, of_gradients] = if dtype == DType::F32 { [1e-6, 1e-5] } else { [2e-3, 5e-2] };
        for order in [&rows, &turned] {
            let (loss, actual) = gradients(&[packed(order)]);
            let what = format!("{name}, {dtype}");
            assert!((loss - expected_loss).abs() <= of_loss * loss, "{what}: {loss} and {expected_loss}");
            let error = relative_error(&actual, &expected);
            assert!(error <= of_gradients, "{what}: gradients differ by {error:.2e}");
        }
    });
}

fn a_document_does_not_see_the_others(device: &Device) {
    for_every_model(device, |name, dtype| {
        let decoder = decoder_on(device, dtype, name, false);
        let logits = |rows: &[Row]| {
            let states = decoder.hidden(&Tape::off(), &packed(rows).run, Forward::default()).unwrap();
            decoder.logits(&states.into_tensor()).unwrap().to_f32_vec().unwrap()
        };
        let (rows, width) = (rows(), decoder.spec.vocabulary);
        let before = logits(&rows);
        let mut start = 0;
        for changed in 0..rows.len() {
            let end = start + rows[changed].ids.len();
            // The first, and the last token of the document.
            for place in [0, rows[changed].ids.len() - 1] {
                let mut other = rows.clone();
                other[changed].ids[place] = (other[changed].ids[place] + 17) % 64;
                let after = logits(&other);
                let same = |t: usize| {
                    (t * width..(t + 1) * width).all(|i| before[i].to_bits() == after[i].to_bits())
                };
                for t in (0..before.len() / width).filter(|t| !(start..end).contains(t)) {
                    assert!(same(t), "{name}, {dtype}: token {t} sees document {changed}");
                }
                assert!(!same(start + place), "{name}, {dtype}: document {changed} does not see itself");
            }
            start = end;
        }
    });
}

/// With dropout, which has layers computed one by one, and without.
fn recomputed_activations_give_the_same_bits(device: &Device) {
    let steps = if device.name() == "emulator" { 1 } else { 3 };
    let states = |name: &str, dtype, recompute, probability| -> Vec<(String, Vec<u32>)> {
        let mut decoder = decoder_on(device, dtype, name, false);
        decoder
            .change_linears(|_, linear| {
                linear.lora.iter_mut().for_each(|lora| lora.dropout = probability);
                Ok(())
            })
            .unwrap();
        let settings = OptimizerSettings { recompute, ..OptimizerSettings::default() };
        let mut learner = Learner::new(decoder, settings).unwrap();
        for step in 0..steps {
            learner.step(step, 1e-2, &rows().chunks(3).map(packed).collect::<Vec<_>>()).unwrap();
        }
        let bits = |tensor: Tensor| tensor.to_f32_vec().unwrap().into_iter().map(f32::to_bits).collect();
        learner.state_tensors().into_iter().map(|(name, tensor)| (name, bits(tensor))).collect()
    };
    for_every_model(device, |name, dtype| {
        for probability in [0.0, 0.3] {
            let [none, cheap, full] = LEVELS.map(|recompute| states(name, dtype, recompute, probability));
            assert!(none == cheap, "{name}, {dtype}, dropout of {probability}: none is not cheap");
            assert!(cheap == full, "{name}, {dtype}, dropout of {probability}: cheap is not full");
        }
    });
}

/// Without learning anything, only the masks of dropout change from step to step.
fn every_step_has_masks_of_its_own_also_when_it_is_replayed(device: &Device) {
    let losses_of = |records: bool, probability: f32| -> Vec<u64> {
        let mut decoder = decoder_on(device, DType::F32, "llama2", false);
        decoder
            .change_linears(|_, linear| {
                linear.lora.iter_mut().for_each(|lora| lora.dropout = probability);
                Ok(())
            })
            .unwrap();
        let settings = OptimizerSettings { records, ..OptimizerSettings::default() };
        let mut learner = Learner::new(decoder, settings).unwrap();
        let batches: Vec<MicroBatch> = rows()[1..4].chunks(2).map(packed).collect();
        let loss = |step| learner.step(step, 0.0, &batches).unwrap().loss.to_bits();
        (0..4).map(loss).collect()
    };
    let (replayed, plain) = (losses_of(true, 0.4), losses_of(false, 0.4));
    assert_eq!(replayed, plain);
    let mut different = plain.clone();
    different.sort_unstable();
    different.dedup();
    assert_eq!(different.len(), plain.len(), "steps share masks");
    assert!(losses_of(true, 0.0).windows(2).all(|two| two[0] == two[1]));
}

fn steps_whose_documents_had_no_choice_of_keys_are_not_replayed_for_longer_ones(device: &Device) {
    let document = |length: usize, seed: u32| {
        let ids: Vec<u32> = (0..length as u32).map(|t| (t * 7 + seed) % 64).collect();
        let labels = (0..length).map(|t| if t + 1 < length { ids[t + 1] as i32 } else { -100 }).collect();
        Row { ids, labels }
    };
    // As many tokens each time; the last has more keys than are chosen.
    let short: Vec<Row> = (0..6).map(|seed| document(4, seed)).collect();
    let batches = [packed(&short), packed(&short), packed(&short), packed(&[document(24, 3)])];
    let losses_of = |records: bool| -> Vec<u64> {
        let decoder = decoder_on(device, DType::F32, "deepseek-v32", false);
        let settings = OptimizerSettings { records, ..OptimizerSettings::default() };
        let mut learner = Learner::new(decoder, settings).unwrap();
        let step =
            |(step, batch)| learner.step(step, 1e-2, std::slice::from_ref(batch)).unwrap().loss.to_bits();
        batches.iter().enumerate().map(step).collect()
    };
    assert_eq!(losses_of(true), losses_of(false));
}

/// A recording reads the angles that it was made with: longer documents find the same, and so do those that come after others
/// of another epoch.
fn steps_are_replayed_whatever_documents_they_have(device: &Device) {
    let document = |length: usize| {
        let ids: Vec<u32> = (0..length as u32).map(|t| t * 7 % 64).collect();
        let labels = (0..length).map(|t| if t + 1 < length { ids[t + 1] as i32 } else { -100 }).collect();
        Row { ids, labels }
    };
    let run = |name: &str, lengths: &[&[usize]], padded: usize, records: bool| -> (Vec<u64>, usize) {
        let decoder = decoder_on(device, DType::F32, name, false);
        let settings = OptimizerSettings { records, ..OptimizerSettings::default() };
        let mut learner = Learner::new(decoder, settings).unwrap();
        learner.pad_to(padded);
        let step = |(step, lengths): (usize, &&[usize])| {
            let batch = packed(&lengths.iter().map(|&length| document(length)).collect::<Vec<_>>());
            learner.step(step, 1e-2, &[batch]).unwrap().loss.to_bits()
        };
        let losses = lengths.iter().enumerate().map(step).collect();
        (losses, learner.replayed_steps())
    };
    // Angles of the second change behind twelve tokens.
    let longer: [&[usize]; 4] = [&[20, 30], &[20, 20], &[70], &[66, 20]];
    let other: [&[usize]; 5] = [&[10, 8], &[9], &[20], &[4, 12], &[11]];
    for (name, lengths, padded, count) in
        [("llama2", &longer[..], 96, 2), ("phi3-longrope", &other[..], 24, 2)]
    {
        let ((replayed, replays), (plain, none)) =
            (run(name, lengths, padded, true), run(name, lengths, padded, false));
        assert_eq!(replayed, plain, "{name}");
        assert_eq!((replays, none), (if device.is_host() { 0 } else { count }, 0), "{name}");
    }
}

const LEVELS: [Recompute; 3] = [Recompute::None, Recompute::Cheap, Recompute::Full];

/// Peak bytes of activations of one step over 64 tokens with that many layers.
fn activation_peak(layers: usize, recompute: Recompute) -> usize {
    let config = serde_json::json!({
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64,
        "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
        "tie_word_embeddings": true,
    });
    let (device, config) = (Device::cpu(), pmetal::models::Config::new(config).unwrap());
    let options = LoadOptions { dtype: DType::F32, train_all: false };
    let mut decoder = loader::random(&config, &device, options, 0).unwrap();
    lora::attach(&mut decoder, &AdapterConfig::all_linear(4, 8.0), 0).unwrap();
    let settings = OptimizerSettings { recompute, ..OptimizerSettings::default() };
    let mut learner = Learner::new(decoder, settings).unwrap();
    let ids: Vec<u32> = (0..64).map(|t| t * 7 % 64).collect();
    let labels = (0..64).map(|t| if t < 63 { ids[t + 1] as i32 } else { -100 }).collect();
    let batch = MicroBatch { run: TokenRun::single(&ids), labels, rows: vec![0] };
    learner.step(0, 1e-3, &[batch]).unwrap();
    device.memory().report().peak(Category::Activations)
}

#[test]
fn recomputation_keeps_one_state_for_each_layer() {
    let state = 64 * 32 * 4;
    let [few, more, most] = [4, 16, 32].map(|layers| activation_peak(layers, Recompute::Full));
    assert_eq!(more - few, 12 * state, "bytes of 12 more layers");
    assert_eq!(most - more, 16 * state, "bytes of 16 more layers");
    let [few, most] = [4, 32].map(|layers| activation_peak(layers, Recompute::Cheap));
    assert!(most - few > 28 * 4 * state, "without its recomputation a layer keeps more than four states");
    // Two norms as wide as a state, and a gated product that is twice as wide.
    let all = activation_peak(32, Recompute::None) - activation_peak(4, Recompute::None);
    assert_eq!(all - (most - few), 28 * 4 * state);
}

#[derive(serde::Deserialize)]
struct Golden<T> {
    cases: Vec<T>,
}

fn golden<T: serde::de::DeserializeOwned>(text: &str, at_least: usize) -> Vec<T> {
    let golden: Golden<T> = serde_json::from_str(text).unwrap();
    assert!(golden.cases.len() >= at_least);
    golden.cases
}

fn parameter(name: &str, values: &[f32]) -> std::sync::Arc<Parameter> {
    let tensor = Tensor::from_slice(&Device::cpu(), Category::Parameters, &[values.len()], values).unwrap();
    Parameter::new(name, tensor)
}

fn set_gradient(parameter: &Parameter, values: &[f32]) {
    parameter.clear_gradient();
    let fill = |gradient: &mut Tensor| {
        gradient.as_mut_slice::<f32>().copy_from_slice(values);
        Ok(())
    };
    parameter.accumulate(fill).unwrap();
}

#[derive(serde::Deserialize)]
struct AdamWCase {
    betas: [f64; 2],
    eps: f64,
    lr: Vec<f64>,
    tensors: Vec<AdamWTensor>,
}

#[derive(serde::Deserialize)]
struct AdamWTensor {
    name: String,
    weight_decay: f64,
    start: Vec<f32>,
    gradients: Vec<Vec<f32>>,
    after: Vec<Vec<f32>>,
}

#[test]
fn fifty_steps_of_adamw_end_where_those_of_pytorch_end() {
    for case in golden::<AdamWCase>(include_str!("data/adamw.json"), 2) {
        for tensor in case.tensors {
            let parameter = parameter(&tensor.name, &tensor.start);
            let mut state = AdamWState::new(&parameter).unwrap();
            assert_eq!(tensor.after.len(), 50);
            for (step, rate) in case.lr.iter().enumerate() {
                set_gradient(&parameter, &tensor.gradients[step]);
                let constants = AdamWParameters {
                    learning_rate: *rate,
                    beta1: case.betas[0],
                    beta2: case.betas[1],
                    epsilon: case.eps,
                    weight_decay: tensor.weight_decay,
                    step: step as u32 + 1,
                    gradient_scale: 1.0,
                    max_norm: 0.0,
                };
                ops::adamw_step(&parameter, &mut state, &constants).unwrap();
                for (ours, theirs) in parameter.value().to_f32_vec().unwrap().iter().zip(&tensor.after[step])
                {
                    let error = (ours - theirs).abs();
                    assert!(error <= 1e-6, "{} after step {step}: {ours} and {theirs}", tensor.name);
                }
            }
        }
    }
}

#[derive(serde::Deserialize)]
struct ClippingCase {
    title: String,
    max_norm: f64,
    total_norm: f64,
    gradients: Vec<Vec<f32>>,
    clipped: Vec<Vec<f32>>,
}

/// Constants of which only the largest norm matters.
fn clipping(max_norm: f64) -> AdamWParameters {
    AdamWParameters {
        learning_rate: 0.0,
        beta1: 0.0,
        beta2: 0.0,
        epsilon: 0.0,
        weight_decay: 0.0,
        step: 1,
        gradient_scale: 1.0,
        max_norm,
    }
}

#[test]
fn gradients_are_clipped_as_pytorch_clips_them() {
    for case in golden::<ClippingCase>(include_str!("data/clipping.json"), 5) {
        let parameters: Vec<_> = case.gradients.iter().map(|values| parameter("p", values)).collect();
        for (parameter, values) in parameters.iter().zip(&case.gradients) {
            set_gradient(parameter, values);
        }
        let norm = ops::global_norm(&parameters).unwrap();
        let title = &case.title;
        assert!(
            (norm - case.total_norm).abs() <= 1e-6 * case.total_norm,
            "{title}: {norm}, {}",
            case.total_norm
        );
        let scale = clipping(case.max_norm).clipped_scale(Some(norm * norm)).unwrap();
        for (ours, theirs) in case.gradients.iter().flatten().zip(case.clipped.iter().flatten()) {
            let error = (ours * scale - theirs).abs();
            assert!(error <= 1e-6 * theirs.abs(), "{title}: {} and {theirs}", ours * scale);
        }
    }
}

#[test]
fn a_limit_of_zero_clips_nothing() {
    assert_eq!(clipping(0.0).clipped_scale(Some(1e18)), Some(1.0));
    assert_eq!(clipping(1.0).clipped_scale(Some(f64::NAN)), None);
}

#[derive(serde::Deserialize)]
struct CrossEntropyCase {
    title: String,
    shape: [usize; 3],
    logits: Vec<f32>,
    labels: Vec<i32>,
    loss_sum: f64,
    trained_tokens: usize,
    gradients: Vec<f32>,
}

#[test]
fn cross_entropy_and_its_gradient_are_those_of_pytorch() {
    for case in golden::<CrossEntropyCase>(include_str!("data/cross_entropy.json"), 5) {
        let [rows, tokens, width] = case.shape;
        let device = Device::cpu();
        let tensor = |shape: &[usize], values: &[f32]| {
            Tensor::from_slice(&device, Category::Activations, shape, values).unwrap()
        };
        // With the identity as head, hidden states are logits.
        let identity: Vec<f32> =
            (0..width * width).map(|i| if i / width == i % width { 1.0 } else { 0.0 }).collect();
        let head = Weight::Frozen(tensor(&[width, width], &identity));
        let target = |i: usize| if (i + 1).is_multiple_of(tokens) { -100 } else { case.labels[i + 1] };
        let labels: Vec<i32> = (0..rows * tokens).map(target).collect();
        let tape = Tape::recording();
        let hidden = tape.leaf(tensor(&[rows * tokens, width], &case.logits));
        let parameters = CrossEntropyParameters { logit_scale: 1.0, softcap: None, gradient_scale: 1.0 };
        let targets = ops::Targets::new(&device, &labels, width).unwrap();
        let loss = ops::linear_cross_entropy(&tape, &hidden, &head, &targets, &parameters).unwrap();
        let title = &case.title;
        assert_eq!(loss.tokens, case.trained_tokens, "{title}");
        let sum = loss.sum.read().unwrap();
        let error = (sum - case.loss_sum).abs();
        assert!(error <= 1e-6 * case.loss_sum.max(1.0), "{title}: {sum} and {}", case.loss_sum);
        for (ours, theirs) in loss.d_hidden.unwrap().to_f32_vec().unwrap().iter().zip(&case.gradients) {
            assert!((ours - theirs).abs() <= 1e-6, "{title}: gradient {ours} and {theirs}");
        }
    }
}

#[test]
fn layers_that_are_read_one_by_one_give_the_loss_of_the_whole_model() {
    let batch = packed(&rows());
    for_every_model(&Device::cpu(), |name, _| {
        let folder = support::fixture(name);
        let (checkpoint, config) = loader::open(&folder).unwrap();
        let options = LoadOptions { dtype: DType::F32, train_all: false };
        let mut decoder = loader::load(&checkpoint, &config, &Device::cpu(), options).unwrap().decoder;
        let losses = |decoder: &Decoder| {
            loader::losses_beside_checkpoint(decoder, &checkpoint, &batch.run, &batch.labels).unwrap()
        };
        let [whole, one_by_one] = losses(&decoder);
        assert_eq!(whole, one_by_one, "{name}");
        assert!(whole > 1.0, "{name}: {whole}");
        // Adapters count in the first alone.
        lora::load(&mut decoder, &folder.join("adapter"), true).unwrap();
        let [adapted, again] = losses(&decoder);
        assert_eq!(again, one_by_one, "{name}");
        assert_ne!(adapted, again, "{name}");
    });
}
