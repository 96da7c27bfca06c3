//! Linear layers of one input as one product, and columns as tensors.

use super::*;
use crate::device::NormWeight;
use crate::ops::columns::join_columns;
use crate::ops::{
    Linear, LinearGroup, LinearOptions, Lora, Spare, linear_group, rms_norm, rms_norm_with_spare,
};
use crate::{Parameter, Tape, Var, Weight};

const WIDTH: usize = 24;
const FEATURES: [usize; 3] = [16, 8, 10];

fn layers(run: &Run<'_>) -> Vec<Linear> {
    let trained =
        |seed, shape: &[usize]| Weight::Trainable(Parameter::new("adapter", run.floats(seed, shape)));
    let layer = |index: usize| {
        let (seed, features) = (10 * index as u64, FEATURES[index]);
        let lora = Lora {
            a: trained(seed + 1, &[3, WIDTH]),
            b: trained(seed + 2, &[features, 3]),
            scale: 0.5,
            dropout: 0.0,
            stream: index as u32,
        };
        Linear {
            weight: Weight::Frozen(run.dense(seed + 3, &[features, WIDTH])),
            bias: (index == 1).then(|| Weight::Frozen(run.floats(seed + 4, &[features]))),
            // The last layer has no adapter.
            lora: (index < 2).then_some(lora),
        }
    };
    (0..3).map(layer).collect()
}

/// Norm, then three layers; results, the input's gradient and those of the adapters.
fn pass(run: &Run<'_>, packs: bool, rows: usize) -> Vec<Tensor> {
    let mut group = LinearGroup::new(layers(run));
    if packs {
        group.pack(run.dtype).unwrap();
        assert_eq!(group.spare(), if run.device.is_host() { 0 } else { 8 });
    }
    let tape = Tape::recording();
    let leaf = tape.leaf(run.dense(100, &[rows, WIDTH]));
    let normed = if packs {
        let spare = Spare { result: group.spare(), riding: group.riding(), ..Spare::default() };
        crate::ops::rms_norm_with_spare(&tape, &leaf, None, NormWeight::Plain, 1e-3, spare).unwrap()
    } else {
        rms_norm(&tape, &leaf, None, NormWeight::Plain, 1e-3).unwrap()
    };
    let outputs = linear_group(&tape, &normed, &group, LinearOptions::default()).unwrap();
    drop(normed);
    let mut results: Vec<Tensor> =
        outputs.iter().map(|output| output.tensor().copy(Category::Workspace).unwrap()).collect();
    let joined = merged(&tape, outputs);
    let d_out = run.dense(101, &[rows, 8]);
    let mut gradients = tape.backward(&joined, d_out).unwrap();
    results.push(gradients.take(leaf.slot().unwrap()).unwrap());
    for lora in group.layers().iter().filter_map(|layer| layer.lora.as_ref()) {
        results.extend([&lora.a, &lora.b].map(|weight| weight.parameter().unwrap().gradient().unwrap()));
    }
    results
}

/// A value \[T, 8\] that all three results flow into.
fn merged(tape: &Tape, outputs: Vec<Var>) -> Var {
    let device = outputs[0].tensor().device().clone();
    let onto = |output: &Var, seed: u64, residual: Option<&Var>| {
        let columns = output.tensor().columns();
        let dtype = output.tensor().dtype();
        let run = Run { device: &device, dtype, rounding: DType::Bf16, padding: 0, pads: RefCell::default() };
        let weight = Weight::Frozen(run.dense(seed, &[8, columns]));
        let layer = Linear { weight, bias: None, lora: None };
        let options = LinearOptions { residual, ..LinearOptions::default() };
        crate::ops::linear(tape, output, &layer, options).unwrap()
    };
    let first = onto(&outputs[0], 200, None);
    let second = onto(&outputs[1], 201, Some(&first));
    onto(&outputs[2], 202, Some(&second))
}

/// One layer and its residual under a norm whose gradient has columns to spare; what [`pass`] returns.
fn residual_pass(run: &Run<'_>, spare: usize) -> Vec<Tensor> {
    const ROWS: usize = 9;
    let trained =
        |seed, shape: &[usize]| Weight::Trainable(Parameter::new("adapter", run.floats(seed, shape)));
    let (a, b) = (trained(1, &[5, WIDTH]), trained(2, &[16, 5]));
    let lora = Lora { a, b, scale: 0.5, dropout: 0.0, stream: 0 };
    let weight = Weight::Frozen(run.dense(3, &[16, WIDTH]));
    let mut group = LinearGroup::new(vec![Linear { weight, bias: None, lora: Some(lora) }]);
    group.pack(run.dtype).unwrap();
    let tape = Tape::recording();
    let (leaf, states) = (tape.leaf(run.dense(4, &[ROWS, WIDTH])), tape.leaf(run.dense(5, &[ROWS, 16])));
    let options = LinearOptions { residual: Some(&states), ..LinearOptions::default() };
    let output = linear_group(&tape, &leaf, &group, options).unwrap().remove(0);
    let spare = Spare { gradient: spare, ..Spare::default() };
    let normed = rms_norm_with_spare(&tape, &output, None, NormWeight::Plain, 1e-3, spare).unwrap();
    let mut gradients = tape.backward(&normed, run.dense(6, &[ROWS, 16])).unwrap();
    let mut results: Vec<Tensor> =
        [&leaf, &states].map(|var| gradients.take(var.slot().unwrap()).unwrap().contiguous().unwrap()).into();
    let lora = group.layers()[0].lora.as_ref().unwrap();
    results.extend([&lora.a, &lora.b].map(|weight| weight.parameter().unwrap().gradient().unwrap()));
    results
}

/// Two groups of one input, next to which is what the first of them made of it, with the norm if it rides there; gradients of
/// the input and of all adapters.
fn shared_pass(run: &Run<'_>, tape: &Tape, rides: bool) -> Vec<Tensor> {
    const ROWS: usize = 9;
    let group = |seed: u64| {
        let trained =
            |seed, shape: &[usize]| Weight::Trainable(Parameter::new("adapter", run.floats(seed, shape)));
        let (a, b) = (trained(seed, &[5, WIDTH]), trained(seed + 1, &[16, 5]));
        let lora = Lora { a, b, scale: 0.5, dropout: 0.0, stream: 0 };
        let weight = Weight::Frozen(run.dense(seed + 2, &[16, WIDTH]));
        let mut group = LinearGroup::new(vec![Linear { weight, bias: None, lora: Some(lora) }]);
        group.pack(run.dtype).unwrap();
        group
    };
    let groups = [group(1), group(11)];
    let leaf = tape.leaf(run.dense(4, &[ROWS, WIDTH]));
    let riding = groups[0].riding().filter(|_| rides);
    let spare = Spare { result: groups[0].spare(), riding, ..Spare::default() };
    let normed = rms_norm_with_spare(tape, &leaf, None, NormWeight::Plain, 1e-3, spare).unwrap();
    assert_eq!(normed.riding().is_some(), rides && !run.device.is_host());
    let first = linear_group(tape, &normed, &groups[0], LinearOptions::default()).unwrap().remove(0);
    let options = LinearOptions { residual: Some(&first), ..LinearOptions::default() };
    let both = linear_group(tape, &normed, &groups[1], options).unwrap().remove(0);
    let mut results = vec![both.tensor().copy(Category::Workspace).unwrap()];
    let mut gradients = tape.backward(&both, run.dense(6, &[ROWS, 16])).unwrap();
    results.push(gradients.take(leaf.slot().unwrap()).unwrap().contiguous().unwrap());
    for lora in groups.iter().filter_map(|group| group.layers()[0].lora.as_ref()) {
        results.extend([&lora.a, &lora.b].map(|weight| weight.parameter().unwrap().gradient().unwrap()));
    }
    results
}

/// A layer between a norm and a residual whose gradient is columns of a wider matrix; gradients of input and adapter.
fn waiting_pass(run: &Run<'_>) -> Vec<Tensor> {
    // Small enough that the slope does not ride in the columns to spare.
    const SHAPE: [usize; 2] = [3, 16];
    let trained =
        |seed, shape: &[usize]| Weight::Trainable(Parameter::new("adapter", run.floats(seed, shape)));
    let (a, b) = (trained(1, &[5, 16]), trained(2, &[16, 5]));
    let lora = Lora { a, b, scale: 0.5, dropout: 0.0, stream: 0 };
    let weight = Weight::Frozen(run.dense(3, &[16, 16]));
    let mut group = LinearGroup::new(vec![Linear { weight, bias: None, lora: Some(lora) }]);
    group.pack(run.dtype).unwrap();
    let tape = Tape::recording();
    let leaf = tape.leaf(run.dense(4, &SHAPE));
    let normed = rms_norm(&tape, &leaf, None, NormWeight::Plain, 1e-3).unwrap();
    let options = LinearOptions { residual: Some(&leaf), ..LinearOptions::default() };
    let output = linear_group(&tape, &normed, &group, options).unwrap().remove(0);
    let mut d_out = run.dense(6, &SHAPE);
    if !run.device.is_host() {
        let dense = d_out;
        let category = Category::Activations;
        d_out = Tensor::scratch_with_spare(run.device, category, dense.dtype(), SHAPE, 8).unwrap();
        run.device.kernels().convert(&dense, &mut d_out);
    }
    let mut gradients = tape.backward(&output, d_out).unwrap();
    let mut results = vec![gradients.take(leaf.slot().unwrap()).unwrap().contiguous().unwrap()];
    let lora = group.layers()[0].lora.as_ref().unwrap();
    results.extend([&lora.a, &lora.b].map(|weight| weight.parameter().unwrap().gradient().unwrap()));
    results
}

#[test]
fn a_gradient_that_waits_reads_what_the_residual_gradient_was() {
    for dtype in [DType::F32, DType::Bf16] {
        check_padded("a residual's gradient", dtype, &[0], &waiting_pass);
    }
}

#[test]
fn a_second_group_does_not_overwrite_what_the_first_has_put_next_to_their_input() {
    for dtype in [DType::F32, DType::Bf16] {
        for rides in [false, true] {
            let kept = |run: &Run<'_>| shared_pass(run, &Tape::keeping_all(), rides);
            check_padded("two groups of one input", dtype, &[0], &kept);
            let again = |run: &Run<'_>| shared_pass(run, &Tape::recording(), rides);
            check_padded("two groups of one input, computed again", dtype, &[0], &again);
        }
    }
}

#[test]
fn the_slope_of_an_adapter_rides_in_columns_that_the_gradient_has_to_spare() {
    for dtype in [DType::F32, DType::Bf16] {
        // None, as many as the adapter takes, and others.
        for spare in [0, 8, 16] {
            check_padded(&format!("{spare} columns to spare"), dtype, &[0], &|run| residual_pass(run, spare));
        }
    }
}

#[test]
fn a_packed_group_computes_what_its_layers_compute() {
    for dtype in [DType::F32, DType::Bf16] {
        // Few rows take another way through the adapters than more.
        for (packs, rows) in [(false, 5), (true, 3), (true, 5)] {
            check_padded(&format!("group of {rows}, packed {packs}"), dtype, &[0], &|run| {
                pass(run, packs, rows)
            });
        }
    }
}

#[test]
fn columns_are_tensors_of_their_own_and_join_without_a_copy() {
    let Some(device) = emulated(1) else { return };
    let values = numbers(1, 6 * 21);
    let whole = Tensor::from_slice(&device, Category::Workspace, &[6, 21], &values).unwrap();
    let address = whole.address();
    let mut parts = whole.split_columns(&[8, 3, 10]).unwrap();
    for part in &mut parts {
        device.kernels().scale(part, 2.0);
    }
    let middle: Vec<f32> =
        (0..6).flat_map(|row| values[21 * row + 8..][..3].iter().map(|x| 2.0 * x)).collect();
    assert_eq!(parts[1].to_vec::<f32>().unwrap(), middle);
    let copies: Vec<Tensor> = parts.iter().map(|part| part.copy(Category::Workspace).unwrap()).collect();
    let doubled: Vec<f32> = values.iter().map(|x| 2.0 * x).collect();
    let joined = join_columns(parts).unwrap();
    assert_eq!((joined.address(), joined.to_vec::<f32>().unwrap()), (address, doubled.clone()));
    let fresh = join_columns(copies).unwrap();
    assert_ne!(fresh.address(), address);
    assert_eq!(fresh.to_vec::<f32>().unwrap(), doubled);
}

#[test]
fn rows_with_gaps_are_copied_to_rows_with_none_and_back() {
    for dtype in [DType::F32, DType::Bf16, DType::F16] {
        check("copied rows", dtype, &|run| {
            let (source, mut there, mut back) =
                (run.tensor(1, &[6, 21]), run.dense(2, &[6, 21]), run.empty(&[6, 21]));
            run.device.kernels().convert(&source, &mut there);
            run.device.kernels().convert(&there, &mut back);
            vec![there, back]
        });
    }
}
