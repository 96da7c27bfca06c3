use super::*;
use crate::device::CrossEntropyParameters;
use crate::error::Error;
use crate::ops::loss::in_chunks;
use crate::ops::{self, CrossEntropy, Targets};
use crate::reference;

on_every_device! {
    cross_entropy_and_its_gradients_agree_with_the_reference,
    chunks_change_neither_the_loss_nor_its_gradients,
    no_gradient_is_computed_when_nothing_records,
    huge_logits_give_a_finite_loss,
}

const PLAIN: CrossEntropyParameters =
    CrossEntropyParameters { logit_scale: 1.0, softcap: None, gradient_scale: 1.0 };

/// Labels of which every third is not trained.
fn labels(tokens: usize, vocabulary: usize) -> Vec<i32> {
    let key = RandomKey { seed: 8, step: 0, stream: 0 };
    (0..tokens)
        .map(|token| if token % 3 == 2 { -100 } else { (key.word(token as u64) % vocabulary as u32) as i32 })
        .collect()
}

/// [`ops::linear_cross_entropy`] of [`PLAIN`] with labels as a batch gives them.
fn plain(tape: &Tape, hidden: &Var, weight: &Weight, labels: &[i32]) -> crate::Result<CrossEntropy> {
    let targets = Targets::new(hidden.tensor().device(), labels, weight.shape()[0])?;
    ops::linear_cross_entropy(tape, hidden, weight, &targets, &PLAIN)
}

struct Head {
    loss: CrossEntropy,
    hidden: Var,
    weight: Weight,
    tape: Tape,
}

fn head(
    device: &Device,
    dtype: DType,
    [x, w]: [&[f64]; 2],
    labels: &[i32],
    parameters: &CrossEntropyParameters,
    chunk_rows: Option<usize>,
) -> Head {
    let width = x.len() / labels.len();
    let tape = Tape::recording();
    let hidden = tape.leaf(tensor(device, dtype, &[labels.len(), width], x));
    let weight = weight(device, true, DType::F32, &[w.len() / width, width], w);
    let targets = Targets::new(device, labels, weight.shape()[0]).unwrap();
    let loss = match chunk_rows {
        Some(rows) => in_chunks(&tape, &hidden, &weight, &targets, parameters, rows),
        None => ops::linear_cross_entropy(&tape, &hidden, &weight, &targets, parameters),
    };
    Head { loss: loss.unwrap(), hidden, weight, tape }
}

fn cross_entropy_and_its_gradients_agree_with_the_reference(device: &Device) {
    let scaled = CrossEntropyParameters { logit_scale: 0.25, softcap: None, gradient_scale: 0.5 };
    let capped = CrossEntropyParameters { logit_scale: 2.0, softcap: Some(1.5), gradient_scale: 0.125 };
    for size in [[1, 1, 1], [1, 5, 2], [3, 7, 33], [65, 37, 50], [130, 16, 301]] {
        for (index, parameters) in [PLAIN, scaled, capped].into_iter().enumerate() {
            for &dtype in types(device) {
                let [tokens, width, vocabulary] = size;
                let what = format!("{dtype} {size:?} {parameters:?}");
                let x = numbers("x", tokens * width, dtype).iter().map(|value| value * 2.0).collect();
                let inputs: Vec<Vec<f64>> = vec![x, numbers("W", vocabulary * width, dtype)];
                let labels = labels(tokens, vocabulary);
                let chunk = if index == 1 { Some(7) } else { None };
                let Head { loss, hidden, weight, tape } =
                    head(device, dtype, [&inputs[0], &inputs[1]], &labels, &parameters, chunk);
                let (scale, cap) = (f64::from(parameters.logit_scale), parameters.softcap.map(f64::from));
                let function = |inputs: &[Vec<f64>]| {
                    vec![reference::cross_entropy(&inputs[0], &inputs[1], width, &labels, scale, cap)]
                };
                assert_close(&what, &[loss.sum.read().unwrap()], &function(&inputs), F32_ERROR);
                assert_eq!(loss.tokens, labels.iter().filter(|&&label| label != -100).count());
                let mut gradients = tape.backward(&hidden, loss.d_hidden.unwrap()).unwrap();
                let ours = [arrived(&mut gradients, &hidden), gradient_of(&weight)];
                let d_loss = [f64::from(parameters.gradient_scale)];
                // With one word in the vocabulary every gradient is zero.
                assert_gradients(&what, &function, &inputs, &d_loss, &ours, tolerance(dtype));
            }
        }
    }
}

fn chunks_change_neither_the_loss_nor_its_gradients(device: &Device) {
    let (tokens, width, vocabulary) = (131, 24, 1003);
    let inputs = [numbers("x", tokens * width, DType::F32), numbers("W", vocabulary * width, DType::F32)];
    let labels = labels(tokens, vocabulary);
    let run = |rows: Option<usize>| {
        let head = head(device, DType::F32, [&inputs[0], &inputs[1]], &labels, &PLAIN, rows);
        (
            head.loss.sum.read().unwrap(),
            wide(&head.loss.d_hidden.unwrap()),
            gradient_of(&head.weight).unwrap(),
        )
    };
    let whole = run(None);
    for rows in [1, 2, 7, 88, 1000] {
        let chunked = run(Some(rows));
        // Products of few rows sum in another order than those of many.
        // A GPU adds the losses of a chunk in f32.
        let error = if device.is_host() { 1e-8 } else { 1e-6 };
        assert_close("loss", &[chunked.0], &[whole.0], error);
        assert_close("d_hidden", &chunked.1, &whole.1, 1e-6);
        assert_close("d_weight", &chunked.2, &whole.2, 1e-6);
    }
}

#[test]
fn workspace_stays_within_one_chunk() {
    let device = Device::cpu();
    let (tokens, width, vocabulary) = (120, 24, 1003);
    let inputs = [numbers("x", tokens * width, DType::Bf16), numbers("W", vocabulary * width, DType::Bf16)];
    let peak = |rows| {
        device.memory().reset_peak();
        let before = live(&device, Category::Workspace);
        let labels = labels(tokens, vocabulary);
        let head = head(&device, DType::Bf16, [&inputs[0], &inputs[1]], &labels, &PLAIN, Some(rows));
        assert_eq!(live(&device, Category::Workspace), before);
        drop(head);
        let report = device.memory().report();
        report.peak(Category::Workspace) + report.peak(Category::Logits) - before
    };
    // f32 logits, hidden states and their gradient in bf16, and each row's place and label.
    for rows in [1, 8, 80] {
        assert_eq!(peak(rows), rows * (4 * vocabulary + 2 * 2 * width + 2 * 4));
    }
}

#[test]
fn logits_of_a_large_vocabulary_take_at_most_48_mebibytes() {
    let device = Device::cpu();
    let (tokens, width, vocabulary) = (1100, 2, 40_000);
    let x = numbers("x", tokens * width, DType::F32);
    let w = numbers("W", vocabulary * width, DType::F32);
    let labels = vec![7; tokens];
    let tape = Tape::off();
    let hidden = Var::constant(tensor(&device, DType::F32, &[tokens, width], &x));
    let weight = weight(&device, false, DType::Bf16, &[vocabulary, width], &w);
    let loss = plain(&tape, &hidden, &weight, &labels).unwrap();
    let peak = device.memory().report().peak(Category::Logits);
    assert!(loss.sum.read().unwrap().is_finite() && loss.d_hidden.is_none());
    assert!(peak > 40 << 20 && peak <= 48 << 20, "{peak}");
}

#[test]
fn labels_that_are_not_trained_cost_nothing() {
    let device = Device::cpu();
    let inputs = [numbers("x", 5 * 4, DType::F32), numbers("W", 9 * 4, DType::F32)];
    device.memory().reset_peak();
    let head = head(&device, DType::F32, [&inputs[0], &inputs[1]], &[-100; 5], &PLAIN, None);
    assert_eq!((head.loss.sum.read().unwrap(), head.loss.tokens), (0.0, 0));
    assert_eq!(device.memory().report().peak(Category::Workspace), 0);
    assert_eq!(wide(&head.loss.d_hidden.unwrap()), [0.0; 20]);
    assert!(parameter(&head.weight).gradient().is_none());
    let (tape, none) =
        (Tape::recording(), Tensor::zeros(&device, Category::Activations, DType::F32, &[0, 4]));
    let loss = plain(&tape, &tape.leaf(none.unwrap()), &head.weight, &[]).unwrap();
    assert_eq!((loss.sum.read().unwrap(), loss.tokens, loss.d_hidden.unwrap().elements()), (0.0, 0, 0));
}

fn no_gradient_is_computed_when_nothing_records(device: &Device) {
    let inputs = [numbers("x", 5 * 4, DType::F32), numbers("W", 9 * 4, DType::F32)];
    let weight = weight(device, true, DType::F32, &[9, 4], &inputs[1]);
    let hidden = Var::constant(tensor(device, DType::F32, &[5, 4], &inputs[0]));
    let labels = labels(5, 9);
    let loss = plain(&Tape::off(), &hidden, &weight, &labels).unwrap();
    let expected = reference::cross_entropy(&inputs[0], &inputs[1], 4, &labels, 1.0, None);
    assert_close("loss", &[loss.sum.read().unwrap()], &[expected], F32_ERROR);
    assert!(loss.d_hidden.is_none() && parameter(&weight).gradient().is_none());
    // While recording, hidden states without a slot get none, and the head's weight gets its own.
    let loss = plain(&Tape::recording(), &hidden, &weight, &labels).unwrap();
    assert!(loss.d_hidden.is_none() && parameter(&weight).gradient().is_some());
}

fn huge_logits_give_a_finite_loss(device: &Device) {
    let head = head(device, DType::F32, [&[1e4, 1.0], &[1.0, -1.0, 0.5]], &[1, 0], &PLAIN, None);
    assert_close(
        "loss",
        &[head.loss.sum.read().unwrap()],
        &[2e4 + (1.0 + (-2.0_f64).exp() + (-0.5_f64).exp()).ln()],
        1e-6,
    );
    assert!(wide(&head.loss.d_hidden.unwrap()).iter().all(|value| value.is_finite()));
}

#[test]
fn cross_entropy_has_the_same_bits_everywhere() {
    assert_same_bits_everywhere("cross-entropy", &|| {
        let device = Device::cpu();
        let inputs = [numbers("x", 60 * 20, DType::F32), numbers("W", 333 * 20, DType::F32)];
        let capped = CrossEntropyParameters { logit_scale: 2.0, softcap: Some(3.0), gradient_scale: 0.1 };
        let head = head(&device, DType::F32, [&inputs[0], &inputs[1]], &labels(60, 333), &capped, Some(13));
        let sum = head.loss.sum.read().unwrap().to_bits();
        vec![
            vec![sum as u32, (sum >> 32) as u32],
            bits(&head.loss.d_hidden.unwrap()),
            bits(&parameter(&head.weight).gradient().unwrap()),
        ]
    });
}

#[test]
fn labels_beyond_the_vocabulary_are_refused() {
    let device = Device::cpu();
    let weight = weight(&device, false, DType::F32, &[9, 4], &[0.0; 36]);
    let hidden = Var::constant(tensor(&device, DType::F32, &[2, 4], &[0.0; 8]));
    let run = |labels: &[i32]| plain(&Tape::off(), &hidden, &weight, labels).err();
    let error = run(&[0, 9]).unwrap();
    assert!(matches!(error, Error::Range { actual: 9, limit: 9, .. }), "{error}");
    assert!(matches!(run(&[0]).unwrap(), Error::Shape { .. }));
    let error = run(&[0, -1]).unwrap().to_string();
    assert_eq!(error, "linear_cross_entropy: label 1 is -1, expected -100 or a number below 9");
}
