//! Two decoder blocks built from the operations: what only shows when they work together.

use std::rc::Rc;
use std::sync::Arc;

use super::*;
use crate::device::{
    AttentionMask, AttentionParameters, CrossEntropyParameters, GateActivation, MaskKind, NormWeight,
    RopePairing, Segment,
};
use crate::error::{Error, Result};
use crate::ops::{self, Dropout, Linear, LinearOptions, Lora, RopeTable};
use crate::{Recompute, reference};

on_every_device! {
    gradients_of_two_blocks_agree_with_the_reference,
    dropout_of_another_step_gives_other_gradients,
    a_second_backward_pass_adds_to_every_gradient,
    a_step_of_training_lowers_the_loss,
    every_level_of_recomputation_gives_the_same_bits_and_keeps_what_it_says,
}

const ATTENTION: AttentionParameters = AttentionParameters {
    query_heads: 4,
    key_value_heads: 2,
    key_width: 6,
    value_width: 6,
    scale: 0.4,
    softcap: None,
};
const WIDTH: usize = 24;
const INNER: usize = 40;
const RANK: usize = 4;
const VOCABULARY: usize = 51;
const EPSILON: f32 = 1e-5;
const LENGTHS: [usize; 2] = [21, 12];
const TOKENS: usize = LENGTHS[0] + LENGTHS[1];
/// Output and input width of q, k, v, o, gate, up, down.
const SHAPES: [[usize; 2]; 7] =
    [[24, WIDTH], [12, WIDTH], [12, WIDTH], [WIDTH, 24], [INNER, WIDTH], [INNER, WIDTH], [WIDTH, INNER]];

struct Block {
    norms: [Weight; 2],
    query_norm: Weight,
    linears: [Linear; 7],
    table: RopeTable,
    segments: Arc<[Segment]>,
    /// The step whose masks are used.
    dropout: Option<u32>,
}

/// Which weights are trained.
#[derive(Clone, Copy, PartialEq)]
enum Trained {
    Adapters,
    Everything,
    Nothing,
}

fn segments() -> Arc<[Segment]> {
    let first = Segment { query_start: 0, query_length: LENGTHS[0], key_start: 0, key_length: LENGTHS[0] };
    let (start, length) = (LENGTHS[0], LENGTHS[1]);
    Arc::new([
        first,
        Segment { query_start: start, query_length: length, key_start: start, key_length: length },
    ])
}

fn table(device: &Device) -> RopeTable {
    let [cosines, sines] = angles().map(|v| v.iter().map(|&x| x as f32).collect::<Vec<_>>());
    RopeTable::new(device, TOKENS, 3, &cosines, &sines, RopePairing::Halves).unwrap()
}

fn angles() -> [Vec<f64>; 2] {
    [numbers("cosines", TOKENS * 3, DType::F32), numbers("sines", TOKENS * 3, DType::F32)]
}

/// The values of one block's weights: two norms, the query norm, then W, A, B of every linear layer.
fn values(index: usize, dtype: DType) -> Vec<Vec<f64>> {
    let name = |what: &str| format!("block {index} {what}");
    let mut all = vec![
        numbers(&name("norm 0"), WIDTH, dtype),
        numbers(&name("norm 1"), WIDTH, dtype),
        numbers(&name("query norm"), ATTENTION.key_width, dtype),
    ];
    for (linear, [features, width]) in SHAPES.into_iter().enumerate() {
        let shapes = [features * width, RANK * width, features * RANK];
        for (part, count) in ["W", "A", "B"].into_iter().zip(shapes) {
            all.push(numbers(&name(&format!("{part} {linear}")), count, dtype));
        }
    }
    all
}

fn build(device: &Device, index: usize, dtype: DType, trained: Trained, dropout: Option<u32>) -> Block {
    let values = values(index, dtype);
    let full = trained == Trained::Everything;
    let linears = std::array::from_fn(|linear| {
        let [features, width] = SHAPES[linear];
        let [w, a, b] = [0, 1, 2].map(|part| &values[3 + 3 * linear + part]);
        let adapter = |shape, values| weight(device, trained != Trained::Nothing, dtype, shape, values);
        Linear {
            weight: weight(device, full, dtype, &[features, width], w),
            bias: None,
            lora: Some(Lora {
                a: adapter(&[RANK, width], a),
                b: adapter(&[features, RANK], b),
                scale: 0.5,
                dropout: 0.2,
                stream: (10 * index + linear) as u32,
            }),
        }
    });
    Block {
        norms: [0, 1].map(|norm| weight(device, full, dtype, &[WIDTH], &values[norm])),
        query_norm: weight(device, full, dtype, &[ATTENTION.key_width], &values[2]),
        linears,
        table: table(device),
        segments: segments(),
        dropout,
    }
}

impl Block {
    fn parameters(&self) -> Vec<Arc<Parameter>> {
        let linears = self.linears.iter().flat_map(|linear| {
            let lora = linear.lora.as_ref().unwrap();
            [&linear.weight, &lora.a, &lora.b]
        });
        let all = self.norms.iter().chain([&self.query_norm]).chain(linears);
        all.filter_map(Weight::parameter).cloned().collect()
    }

    fn linear(&self, tape: &Tape, x: &Var, index: usize, residual: Option<&Var>) -> Result<Var> {
        let ends_block = index + 1 == SHAPES.len();
        let dropout = self.dropout.map(|step| Dropout { seed: 4, step, steps_before: None });
        let options = LinearOptions { residual, scale: 1.0, dropout: dropout.as_ref(), ends_block };
        ops::linear(tape, x, &self.linears[index], options)
    }

    fn forward(&self, tape: &Tape, x: &Var) -> Result<Var> {
        let normed = ops::rms_norm(tape, x, Some(&self.norms[0]), NormWeight::Plain, EPSILON)?;
        let q = self.linear(tape, &normed, 0, None)?.reshape(&[TOKENS, 4, 6])?;
        let q = ops::rms_norm(tape, &q, Some(&self.query_norm), NormWeight::PlusOne, EPSILON)?;
        let q = ops::rope(tape, q, &self.table)?;
        let k = self.linear(tape, &normed, 1, None)?.reshape(&[TOKENS, 2, 6])?;
        let k = ops::rope(tape, k, &self.table)?;
        let v = self.linear(tape, &normed, 2, None)?.reshape(&[TOKENS, 2, 6])?;
        drop(normed);
        let rows = [TOKENS, TOKENS];
        let mask =
            AttentionMask::new(q.tensor().device(), MaskKind::CAUSAL, Arc::clone(&self.segments), rows)?;
        let attended = ops::attention(tape, &ATTENTION, &mask, [&q, &k, &v], None)?;
        let middle = self.linear(tape, &attended, 3, Some(x))?;
        let normed = ops::rms_norm(tape, &middle, Some(&self.norms[1]), NormWeight::Plain, EPSILON)?;
        let gate = self.linear(tape, &normed, 4, None)?;
        let up = self.linear(tape, &normed, 5, None)?;
        let gated = ops::gated(tape, GateActivation::Silu, &gate, &up)?;
        self.linear(tape, &gated, 6, Some(&middle))
    }
}

/// The reference of one block without dropout, from the values in the order of [`values`].
fn reference_block(x: &[f64], values: &[Vec<f64>]) -> Vec<f64> {
    let epsilon = f64::from(EPSILON);
    let [cosines, sines] = angles();
    let linear = |x: &[f64], index: usize, residual: &[f64]| {
        let [w, a, b] = [0, 1, 2].map(|part| &values[3 + 3 * index + part][..]);
        let width = SHAPES[index][1];
        let layer = reference::Linear { width, rank: RANK, scale: 1.0, lora_scale: 0.5, mask: None };
        layer.forward([x, w, &[], a, b, residual])
    };
    let rope = |x: &[f64], heads| reference::rope(x, [heads, 6, 3], &cosines, &sines, RopePairing::Halves);
    let normed = reference::rms_norm(x, &values[0], WIDTH, NormWeight::Plain, epsilon);
    let q = reference::rms_norm(&linear(&normed, 0, &[]), &values[2], 6, NormWeight::PlusOne, epsilon);
    let (q, k, v) = (rope(&q, 4), rope(&linear(&normed, 1, &[]), 2), linear(&normed, 2, &[]));
    let attended = reference::attention(&ATTENTION, MaskKind::CAUSAL, &segments(), [&q, &k, &v, &[]]);
    let middle = linear(&attended, 3, x);
    let normed = reference::rms_norm(&middle, &values[1], WIDTH, NormWeight::Plain, epsilon);
    let gated = reference::gated(GateActivation::Silu, &linear(&normed, 4, &[]), &linear(&normed, 5, &[]));
    linear(&gated, 6, &middle)
}

struct Outcome {
    y: Tensor,
    d_x: Option<Tensor>,
    parameters: Vec<Arc<Parameter>>,
    /// Activations that were live between forward and backward pass, beyond the input.
    kept_bytes: usize,
}

struct Setup {
    dtype: DType,
    trained: Trained,
    /// The step whose masks are used.
    dropout: Option<u32>,
    recompute: Recompute,
    /// Whether the input's gradient is wanted.
    leaf: bool,
}

const SETUP: Setup = Setup {
    dtype: DType::F32,
    trained: Trained::Adapters,
    dropout: Some(2),
    recompute: Recompute::Cheap,
    leaf: true,
};

fn run(device: &Device, setup: &Setup, passes: usize) -> Outcome {
    let blocks: Vec<_> =
        (0..2).map(|i| Rc::new(build(device, i, setup.dtype, setup.trained, setup.dropout))).collect();
    let parameters = blocks.iter().flat_map(|block| block.parameters()).collect();
    let x = tensor(device, setup.dtype, &[TOKENS, WIDTH], &numbers("x", TOKENS * WIDTH, setup.dtype));
    let d_y = tensor(device, setup.dtype, &[TOKENS, WIDTH], &numbers("d_y", TOKENS * WIDTH, setup.dtype));
    let d_y = d_y.copy(Category::Activations).unwrap();
    let mut outcome = None;
    for _ in 0..passes {
        let tape = match setup.recompute {
            Recompute::None => Tape::keeping_all(),
            _ => Tape::recording(),
        };
        let leaf = input(&tape, setup.leaf, x.clone());
        let mut y = leaf.clone();
        for block in &blocks {
            y = if setup.recompute == Recompute::Full {
                let block = Rc::clone(block);
                tape.checkpoint(y, move |tape, x| block.forward(tape, &x)).unwrap()
            } else {
                block.forward(&tape, &y).unwrap()
            };
        }
        let kept_bytes = live(device, Category::Activations) - d_y.byte_length();
        let mut gradients = tape.backward(&y, d_y.clone()).unwrap();
        let d_x = leaf.slot().and_then(|slot| gradients.take(slot));
        outcome = Some((y.into_tensor(), d_x, kept_bytes));
    }
    // The caller's gradient is not what the backward pass works in.
    assert_eq!(wide(&d_y), numbers("d_y", TOKENS * WIDTH, setup.dtype));
    let (y, d_x, kept_bytes) = outcome.unwrap();
    Outcome { y, d_x, parameters, kept_bytes }
}

fn gradient_bits(outcome: &Outcome) -> Vec<Vec<u32>> {
    let gradients = outcome.parameters.iter().map(|parameter| bits(&parameter.gradient().unwrap()));
    gradients.chain([bits(&outcome.y)]).chain(outcome.d_x.as_ref().map(bits)).collect()
}

fn gradients_of_two_blocks_agree_with_the_reference(device: &Device) {
    let setup = Setup { trained: Trained::Everything, dropout: None, ..SETUP };
    let outcome = run(device, &setup, 1);
    let mut inputs = vec![numbers("x", TOKENS * WIDTH, DType::F32)];
    inputs.extend((0..2).flat_map(|index| values(index, DType::F32)));
    let function = |inputs: &[Vec<f64>]| {
        let (first, second) = inputs[1..].split_at(24);
        reference_block(&reference_block(&inputs[0], first), second)
    };
    assert_close("two blocks", &wide(&outcome.y), &function(&inputs), F32_ERROR);
    let mut gradients = vec![outcome.d_x.as_ref().map(wide)];
    gradients.extend(outcome.parameters.iter().map(|parameter| parameter.gradient().as_ref().map(wide)));
    let d_y = numbers("d_y", TOKENS * WIDTH, DType::F32);
    assert_gradients_of(3, "two blocks", &function, &inputs, &d_y, &gradients, 1e-4);
}

fn every_level_of_recomputation_gives_the_same_bits_and_keeps_what_it_says(device: &Device) {
    for dtype in [DType::F32, DType::Bf16] {
        for trained in [Trained::Adapters, Trained::Everything] {
            for leaf in [false, true] {
                let plain = Setup { dtype, trained, leaf, ..SETUP };
                let run_at = |recompute: Recompute| {
                    let outcome = run(device, &Setup { recompute, ..plain }, 1);
                    (gradient_bits(&outcome), outcome.kept_bytes)
                };
                let cheap = run_at(Recompute::Cheap);
                let full = run_at(Recompute::Full);
                let everything = run_at(Recompute::None);
                for other in [&full, &everything] {
                    assert!(cheap.0 == other.0, "{dtype} leaf {leaf}");
                }
                // Results of both blocks; the input is counted among the weights here.
                assert_eq!(full.1, 2 * TOKENS * WIDTH * dtype.bytes());
                assert!(cheap.1 > 5 * full.1);
                // Two norms and a gated product of each block.
                let again = 2 * TOKENS * (2 * WIDTH + INNER) * dtype.bytes();
                assert_eq!(everything.1, cheap.1 + again);
            }
        }
    }
}

fn dropout_of_another_step_gives_other_gradients(device: &Device) {
    let first = gradient_bits(&run(device, &SETUP, 1));
    assert!(first == gradient_bits(&run(device, &SETUP, 1)));
    let other = Setup { dropout: Some(3), ..SETUP };
    assert!(first != gradient_bits(&run(device, &other, 1)));
    assert!(first != gradient_bits(&run(device, &Setup { dropout: None, ..SETUP }, 1)));
}

#[test]
fn two_blocks_have_the_same_bits_everywhere() {
    for dtype in [DType::F32, DType::Bf16] {
        assert_same_bits_everywhere("two blocks", &|| {
            let setup = Setup { dtype, trained: Trained::Everything, ..SETUP };
            gradient_bits(&run(&Device::cpu(), &setup, 1))
        });
    }
}

fn a_second_backward_pass_adds_to_every_gradient(device: &Device) {
    let setup = Setup { trained: Trained::Everything, ..SETUP };
    let (once, twice) = (run(device, &setup, 1), run(device, &setup, 2));
    for (once, twice) in once.parameters.iter().zip(&twice.parameters) {
        let doubled: Vec<f64> = wide(&once.gradient().unwrap()).iter().map(|value| 2.0 * value).collect();
        assert_eq!(wide(&twice.gradient().unwrap()), doubled);
    }
}

#[test]
fn gradients_take_exactly_the_bytes_of_what_is_trained() {
    for (trained, dtype) in [(Trained::Adapters, DType::Bf16), (Trained::Everything, DType::F32)] {
        let device = Device::cpu();
        let outcome = run(&device, &Setup { trained, dtype, ..SETUP }, 2);
        let elements: usize = outcome.parameters.iter().map(|parameter| parameter.value().elements()).sum();
        let report = device.memory().report();
        assert!(elements > 0);
        assert_eq!(report.live(Category::Gradients), 4 * elements);
        assert_eq!(report.peak(Category::Gradients), 4 * elements);
        // What is left of the activations: the result and the input's gradient.
        assert_eq!(report.live(Category::Activations), 2 * TOKENS * WIDTH * dtype.bytes());
        assert_eq!(report.live(Category::Workspace), 0);
        drop(outcome);
        assert_eq!(device.memory().report().live_bytes, 0);
    }
}

#[test]
fn nothing_is_kept_for_blocks_in_which_nothing_is_trained() {
    let device = Device::cpu();
    let outcome = run(&device, &Setup { trained: Trained::Nothing, leaf: false, ..SETUP }, 1);
    assert_eq!(outcome.kept_bytes, TOKENS * WIDTH * 4);
    assert_eq!(device.memory().report().peak(Category::Gradients), 0);
}

#[test]
fn the_result_of_a_norm_is_computed_again_instead_of_kept() {
    let device = Device::cpu();
    let block = build(&device, 0, DType::F32, Trained::Adapters, None);
    let tape = Tape::recording();
    let x = Tensor::zeros(&device, Category::Activations, DType::F32, &[TOKENS, WIDTH]).unwrap();
    let x = tape.leaf(x);
    let normed = ops::rms_norm(&tape, &x, Some(&block.norms[0]), NormWeight::Plain, EPSILON).unwrap();
    let y = block.linear(&tape, &normed, 1, None).unwrap();
    drop(normed);
    assert_eq!(live(&device, Category::Activations), TOKENS * (WIDTH + 12 + RANK) * 4);
    drop((x, y));
}

fn a_step_of_training_lowers_the_loss(device: &Device) {
    let block = build(device, 0, DType::F32, Trained::Everything, None);
    let ids: Vec<u32> = (0..TOKENS as u32).map(|token| token * 7 % VOCABULARY as u32).collect();
    let labels: Vec<i32> = ids.iter().map(|&id| ((id + 3) % VOCABULARY as u32) as i32).collect();
    let targets = ops::Targets::new(device, &labels, VOCABULARY).unwrap();
    let id_tensor = Tensor::from_slice(device, Category::Activations, &[TOKENS], &ids).unwrap();
    let shape = [VOCABULARY, WIDTH];
    // One table for both ends, as in models with tied embeddings.
    let tied = weight(device, true, DType::F32, &shape, &numbers("tied", VOCABULARY * WIDTH, DType::F32));
    let mut parameters = block.parameters();
    parameters.push(parameter(&tied));
    let mut states: Vec<_> = parameters.iter().map(|p| ops::AdamWState::new(p).unwrap()).collect();
    let loss_parameters =
        CrossEntropyParameters { logit_scale: 1.0, softcap: None, gradient_scale: 1.0 / TOKENS as f32 };
    let mut losses = Vec::new();
    for step in 1..=12 {
        let tape = Tape::recording();
        let x = ops::embedding(&tape, &id_tensor, &tied, 1.0, None, DType::F32).unwrap();
        let hidden = block.forward(&tape, &x).unwrap();
        let loss = ops::linear_cross_entropy(&tape, &hidden, &tied, &targets, &loss_parameters).unwrap();
        tape.backward(&hidden, loss.d_hidden.unwrap()).unwrap();
        losses.push(loss.sum.read().unwrap() / loss.tokens as f64);
        let constants = crate::device::AdamWParameters {
            learning_rate: 2e-2,
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            weight_decay: 0.0,
            step,
            gradient_scale: (1.0 / ops::global_norm(&parameters).unwrap().max(1.0)) as f32,
            max_norm: 0.0,
        };
        for (parameter, state) in parameters.iter().zip(&mut states) {
            ops::adamw_step(parameter, state, &constants).unwrap();
            parameter.clear_gradient();
        }
    }
    assert!(losses[11] < 0.5 * losses[0], "{losses:?}");
}

#[test]
fn a_result_of_another_record_is_refused() {
    let device = Device::cpu();
    let x = tensor(&device, DType::F32, &[2, 2], &[1.0; 4]);
    let tape = Tape::recording();
    let leaf = tape.leaf(x.clone());
    let y = ops::rms_norm(&tape, &leaf, None, NormWeight::Plain, EPSILON).unwrap();
    let short = tensor(&device, DType::F32, &[2], &[1.0; 2]);
    assert!(matches!(tape.backward(&y, short).err().unwrap(), Error::Shape { .. }));
    tape.backward(&y, x.clone()).unwrap();
    assert!(matches!(tape.backward(&y, x.clone()).err().unwrap(), Error::Range { .. }));
    assert!(tape.backward(&Var::constant(x.clone()), x).unwrap().take(0).is_none());
}

#[test]
fn an_error_inside_a_block_comes_out_of_the_checkpoint() {
    let device = Device::cpu();
    let x = tensor(&device, DType::F32, &[2, 2], &[1.0; 4]);
    let tape = Tape::recording();
    let outcome = tape.checkpoint(tape.leaf(x), |_, _| Err(Error::Other("refused".to_owned())));
    assert_eq!(outcome.err().unwrap().to_string(), "refused");
}
