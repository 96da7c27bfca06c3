use super::*;
use crate::device::DropoutMask;
use crate::error::Error;
use crate::ops::{self, Dropout, Linear, LinearOptions, Lora};
use crate::reference;

on_every_device! {
    a_linear_layer_with_everything_agrees_with_the_reference,
    every_combination_of_parts_and_of_wishes_for_gradients_agrees_with_the_reference,
    dropout_multiplies_forward_and_backward_by_the_same_mask,
    no_tokens_give_no_rows_and_zero_gradients,
    heads_side_by_side_are_one_input,
    a_bias_in_the_type_of_a_checkpoint_is_added,
    a_layer_used_twice_sums_its_gradients_and_its_inputs,
    dropout_depends_on_its_key_and_keeps_the_stated_fraction,
    a_probability_of_zero_or_no_source_turns_dropout_off,
    project_is_the_product_alone,
}

/// One layer with its input and everything that goes with it; inputs are x, W, b, A, B, residual.
struct Case {
    tokens: usize,
    width: usize,
    features: usize,
    rank: usize,
    dtype: DType,
    /// Which of the six inputs are there, and which of them are to receive a gradient.
    present: [bool; 6],
    wanted: [bool; 6],
    scale: f32,
    dropout: f32,
}

const LORA_SCALE: f32 = 0.75;
const STREAM: u32 = 9;
const SOURCE: Dropout = Dropout { seed: 11, step: 3, steps_before: None };

impl Case {
    fn new([tokens, width, features, rank]: [usize; 4], dtype: DType) -> Self {
        let present = [true, true, true, rank > 0, rank > 0, true];
        Self { tokens, width, features, rank, dtype, present, wanted: present, scale: 0.5, dropout: 0.0 }
    }

    fn shapes(&self) -> [Vec<usize>; 6] {
        let Self { tokens, width, features, rank, .. } = *self;
        [
            vec![tokens, width],
            vec![features, width],
            vec![features],
            vec![rank, width],
            vec![features, rank],
            vec![tokens, features],
        ]
    }

    /// Weights are rounded to bf16 for bf16 activations, so that the arithmetic can be exact about them.
    fn values(&self) -> Vec<Vec<f64>> {
        let names = ["x", "W", "b", "A", "B", "residual"];
        let pairs = names.into_iter().zip(self.shapes()).zip(self.present);
        pairs
            .map(
                |((name, shape), present)| {
                    if present { numbers(name, shape.iter().product(), self.dtype) } else { Vec::new() }
                },
            )
            .collect()
    }

    /// The mask by which the adapter's input is multiplied, from the kernel that the test of dropout looks at.
    fn mask(&self, device: &Device) -> Option<Vec<f64>> {
        (self.dropout > 0.0).then(|| {
            let shape = [self.tokens, self.width];
            let ones = tensor(device, DType::F32, &shape, &vec![1.0; self.tokens * self.width]);
            let mut out = Tensor::scratch(device, Category::Workspace, DType::F32, &shape).unwrap();
            let key = RandomKey { seed: SOURCE.seed, step: SOURCE.step, stream: STREAM };
            device.kernels().dropout(&ones, &DropoutMask::new(self.dropout, key), &mut out, false);
            wide(&out)
        })
    }

    fn function(&self, mask: Option<Vec<f64>>) -> impl Fn(&[Vec<f64>]) -> Vec<f64> + use<> {
        let (width, rank, scale) = (self.width, self.rank, f64::from(self.scale));
        move |inputs| {
            let lora_scale = f64::from(LORA_SCALE);
            let layer = reference::Linear { width, rank, scale, lora_scale, mask: mask.as_deref() };
            layer.forward(std::array::from_fn(|index| &inputs[index][..]))
        }
    }

    fn layer(&self, device: &Device, values: &[Vec<f64>]) -> Linear {
        let shapes = self.shapes();
        let make =
            |index: usize| weight(device, self.wanted[index], self.dtype, &shapes[index], &values[index]);
        Linear {
            weight: make(1),
            bias: self.present[2].then(|| make(2)),
            lora: (self.rank > 0).then(|| Lora {
                a: make(3),
                b: make(4),
                scale: LORA_SCALE,
                dropout: self.dropout,
                stream: STREAM,
            }),
        }
    }

    /// The result and the six gradients.
    fn run(&self, device: &Device, values: &[Vec<f64>], d_y: &[f64]) -> (Vec<f64>, Vec<Option<Vec<f64>>>) {
        let layer = self.layer(device, values);
        let tape = Tape::recording();
        let [x_shape, .., y_shape] = self.shapes();
        let x = input(&tape, self.wanted[0], tensor(device, self.dtype, &x_shape, &values[0]));
        let residual = self.present[5]
            .then(|| input(&tape, self.wanted[5], tensor(device, self.dtype, &y_shape, &values[5])));
        let options = LinearOptions {
            residual: residual.as_ref(),
            scale: self.scale,
            dropout: Some(&SOURCE),
            ..Default::default()
        };
        let y = ops::linear(&tape, &x, &layer, options).unwrap();
        assert_eq!(y.tensor().shape(), y_shape);
        let result = wide(y.tensor());
        let mut gradients = tape.backward(&y, tensor(device, self.dtype, &y_shape, d_y)).unwrap();
        let lora = layer.lora.as_ref();
        let weights = [
            gradient_of(&layer.weight),
            layer.bias.as_ref().and_then(gradient_of),
            lora.and_then(|lora| gradient_of(&lora.a)),
            lora.and_then(|lora| gradient_of(&lora.b)),
        ];
        let mut all = vec![arrived(&mut gradients, &x)];
        all.extend(weights);
        all.push(residual.and_then(|residual| arrived(&mut gradients, &residual)));
        (result, all)
    }

    fn check(&self, device: &Device) {
        let values = self.values();
        let what = format!(
            "{} {:?} present {:?} wanted {:?} dropout {}",
            self.dtype,
            [self.tokens, self.width, self.features, self.rank],
            self.present,
            self.wanted,
            self.dropout
        );
        let d_y = numbers("d_y", self.tokens * self.features, self.dtype);
        let function = self.function(self.mask(device));
        let (result, gradients) = self.run(device, &values, &d_y);
        let error = tolerance(self.dtype);
        assert_close(&what, &result, &function(&values), error);
        let received: Vec<bool> = gradients.iter().map(Option::is_some).collect();
        assert_eq!(received, self.wanted, "{what}");
        assert_gradients(&what, &function, &values, &d_y, &gradients, error);
    }
}

fn a_linear_layer_with_everything_agrees_with_the_reference(device: &Device) {
    for &dtype in types(device) {
        for size in
            [[1, 1, 1, 1], [1, 5, 7, 2], [3, 37, 33, 8], [65, 48, 31, 3], [7, 12, 150, 2], [130, 37, 64, 16]]
        {
            Case::new(size, dtype).check(device);
        }
    }
}

fn every_combination_of_parts_and_of_wishes_for_gradients_agrees_with_the_reference(device: &Device) {
    for bits in 0..256 {
        let is_set = |bit: usize| bits >> bit & 1 == 1;
        let rank = if is_set(0) { 2 } else { 0 };
        let mut case = Case::new([3, 5, 4, rank], DType::F32);
        case.present[2] = is_set(1);
        case.present[5] = is_set(2);
        for (bit, index) in [(3, 0), (4, 1), (5, 3), (6, 4)] {
            case.wanted[index] = case.present[index] && is_set(bit);
        }
        for index in [2, 5] {
            case.wanted[index] = case.present[index] && is_set(7);
        }
        case.dropout = if rank > 0 && is_set(4) { 0.4 } else { 0.0 };
        case.scale = if is_set(6) { 1.0 } else { -1.5 };
        case.check(device);
    }
}

fn dropout_multiplies_forward_and_backward_by_the_same_mask(device: &Device) {
    for &dtype in types(device) {
        for size in [[3, 7, 5, 2], [65, 37, 20, 8]] {
            let mut case = Case::new(size, dtype);
            case.dropout = 0.3;
            case.check(device);
        }
    }
}

fn no_tokens_give_no_rows_and_zero_gradients(device: &Device) {
    let case = Case::new([0, 5, 4, 2], DType::F32);
    let (result, gradients) = case.run(device, &case.values(), &[]);
    assert!(result.is_empty());
    for (gradient, shape) in gradients.into_iter().zip(case.shapes()) {
        assert_eq!(gradient.unwrap(), vec![0.0; shape.iter().product()]);
    }
}

fn heads_side_by_side_are_one_input(device: &Device) {
    let x = numbers("x", 3 * 8, DType::F32);
    let w = numbers("W", 5 * 8, DType::F32);
    let layer = Linear { weight: weight(device, false, DType::F32, &[5, 8], &w), bias: None, lora: None };
    let tape = Tape::recording();
    let heads = tape.leaf(tensor(device, DType::F32, &[3, 2, 4], &x));
    let y = ops::linear(&tape, &heads, &layer, LinearOptions::default()).unwrap();
    let plain = reference::Linear { width: 8, rank: 0, scale: 1.0, lora_scale: 0.0, mask: None };
    assert_close("heads", &wide(y.tensor()), &plain.forward([&x, &w, &[], &[], &[], &[]]), F32_ERROR);
    let d_y = tensor(device, DType::F32, &[3, 5], &numbers("d_y", 15, DType::F32));
    let mut gradients = tape.backward(&y, d_y).unwrap();
    assert_eq!(arrived(&mut gradients, &heads).unwrap().len(), 24);
}

fn a_bias_in_the_type_of_a_checkpoint_is_added(device: &Device) {
    let bias = [0.5, -2.0];
    for dtype in [DType::F32, DType::Bf16, DType::F16] {
        let layer = Linear {
            weight: weight(device, false, dtype, &[2, 1], &[0.0, 0.0]),
            bias: Some(weight(device, false, dtype, &[2], &bias)),
            lora: None,
        };
        let x = Var::constant(tensor(device, DType::F32, &[1, 1], &[1.0]));
        let y = ops::linear(&Tape::off(), &x, &layer, LinearOptions::default()).unwrap();
        assert_eq!(wide(y.tensor()), bias, "{dtype}");
    }
}

fn a_layer_used_twice_sums_its_gradients_and_its_inputs(device: &Device) {
    let (x, w) = (numbers("x", 7 * 5, DType::F32), numbers("W", 5 * 5, DType::F32));
    let layer = Linear { weight: weight(device, true, DType::F32, &[5, 5], &w), bias: None, lora: None };
    let tape = Tape::recording();
    let leaf = tape.leaf(tensor(device, DType::F32, &[7, 5], &x));
    let first = ops::linear(&tape, &leaf, &layer, LinearOptions::default()).unwrap();
    let options = LinearOptions { residual: Some(&leaf), ..LinearOptions::default() };
    let second = ops::linear(&tape, &first, &layer, options).unwrap();
    let options = LinearOptions { residual: Some(&leaf), ..LinearOptions::default() };
    // The input is its own residual here, so that one slot gets a product and then the whole gradient.
    let third = ops::linear(&tape, &leaf, &layer, options).unwrap();
    let y = ops::gated(&tape, crate::device::GateActivation::Silu, &second, &third).unwrap();
    let d_y = numbers("d_y", 35, DType::F32);
    let mut gradients = tape.backward(&y, tensor(device, DType::F32, &[7, 5], &d_y)).unwrap();
    let ours = [arrived(&mut gradients, &leaf), gradient_of(&layer.weight)];
    let function = |inputs: &[Vec<f64>]| {
        let layer = reference::Linear { width: 5, rank: 0, scale: 1.0, lora_scale: 0.0, mask: None };
        let (x, w) = (&inputs[0][..], &inputs[1][..]);
        let first = layer.forward([x, w, &[], &[], &[], &[]]);
        let second = layer.forward([&first, w, &[], &[], &[], x]);
        let third = layer.forward([x, w, &[], &[], &[], x]);
        reference::gated(crate::device::GateActivation::Silu, &second, &third)
    };
    assert_gradients("used twice", &function, &[x, w], &d_y, &ours, F32_ERROR);
}

#[test]
fn gradient_buffers_exist_for_trained_weights_alone() {
    let device = Device::cpu();
    let mut case = Case::new([9, 32, 48, 4], DType::Bf16);
    case.wanted = [true, false, false, true, true, true];
    let values = case.values();
    let layer = case.layer(&device, &values);
    let tape = Tape::recording();
    let x = tape.leaf(tensor(&device, case.dtype, &[9, 32], &values[0]));
    let y = ops::linear(&tape, &x, &layer, LinearOptions::default()).unwrap();
    assert_eq!(live(&device, Category::Gradients), 0);
    let d_y = tensor(&device, case.dtype, &[9, 48], &numbers("d_y", 9 * 48, case.dtype));
    let gradients = tape.backward(&y, d_y).unwrap();
    assert_eq!(live(&device, Category::Gradients), 4 * (4 * 32 + 48 * 4));
    assert_eq!(device.memory().report().peak(Category::Gradients), 4 * (4 * 32 + 48 * 4));
    drop(gradients);
    if let Some(lora) = &layer.lora {
        parameter(&lora.a).clear_gradient();
        parameter(&lora.b).clear_gradient();
    }
    assert_eq!(live(&device, Category::Gradients), 0);
}

#[test]
fn an_input_that_no_gradient_reads_is_not_kept() {
    let device = Device::cpu();
    let run = |wanted: [bool; 6]| {
        let mut case = Case::new([64, 32, 16, 4], DType::F32);
        case.wanted = wanted;
        let values = case.values();
        let layer = case.layer(&device, &values);
        let tape = Tape::recording();
        let before = live(&device, Category::Activations);
        let source = Tensor::zeros(&device, Category::Activations, DType::F32, &[64, 32]).unwrap();
        let x = tape.leaf(source);
        let y = ops::linear(&tape, &x, &layer, LinearOptions::default()).unwrap();
        drop(x);
        let kept = live(&device, Category::Activations) - before;
        drop(y);
        kept - 64 * 16 * 4
    };
    let (input_bytes, reduced_bytes) = (64 * 32 * 4, 64 * 4 * 4);
    assert_eq!(run([true, false, false, false, false, false]), reduced_bytes);
    assert_eq!(run([true, false, false, false, true, false]), reduced_bytes);
    assert_eq!(run([true, false, false, true, false, false]), input_bytes + reduced_bytes);
    assert_eq!(run([true, true, false, false, false, false]), input_bytes + reduced_bytes);
}

fn mask_of(device: &Device, probability: f32, key: RandomKey, count: usize) -> Vec<f64> {
    let ones = tensor(device, DType::F32, &[count], &vec![1.0; count]);
    let mut out = Tensor::scratch(device, Category::Workspace, DType::F32, &[count]).unwrap();
    device.kernels().dropout(&ones, &DropoutMask::new(probability, key), &mut out, false);
    wide(&out)
}

fn dropout_depends_on_its_key_and_keeps_the_stated_fraction(device: &Device) {
    let key = RandomKey { seed: 1, step: 2, stream: 3 };
    // Longer than a task of the kernel, and not a multiple of its groups of four.
    let count = 200_003;
    for probability in [0.05_f32, 0.5, 0.9] {
        let mask = mask_of(device, probability, key, count);
        assert!(mask == mask_of(device, probability, key, count));
        for other in
            [RandomKey { seed: 2, ..key }, RandomKey { step: 3, ..key }, RandomKey { stream: 4, ..key }]
        {
            assert!(mask != mask_of(device, probability, other, count), "{other:?}");
        }
        let (dropped, keep) = (f64::from(probability), 1.0 - f64::from(probability));
        let share = mask.iter().filter(|&&value| value != 0.0).count() as f64 / count as f64;
        let deviation = (dropped * keep / count as f64).sqrt();
        assert!((share - keep).abs() < 4.0 * deviation, "{share} of {count} kept at {probability}");
        assert!(mask.iter().all(|&value| value == 0.0 || (value * keep - 1.0).abs() < 1e-6));
        // The mask of a prefix is the prefix of the mask: element indices count, not tasks.
        assert_eq!(mask_of(device, probability, key, 20_001), mask[..20_001]);
    }
    assert!(mask_of(device, 0.0, key, 1000).iter().all(|&value| value == 1.0));
}

fn a_probability_of_zero_or_no_source_turns_dropout_off(device: &Device) {
    let mut case = Case::new([3, 7, 5, 2], DType::F32);
    let values = case.values();
    let d_y = numbers("d_y", 15, DType::F32);
    let plain = case.run(device, &values, &d_y);
    case.dropout = 0.5;
    let dropped = case.run(device, &values, &d_y);
    assert_ne!(plain.0, dropped.0);
    let tape = Tape::off();
    let x = Var::constant(tensor(device, DType::F32, &[3, 7], &values[0]));
    let residual = Var::constant(tensor(device, DType::F32, &[3, 5], &values[5]));
    let options = LinearOptions { residual: Some(&residual), scale: case.scale, ..Default::default() };
    let outside_training = ops::linear(&tape, &x, &case.layer(device, &values), options).unwrap();
    assert_eq!(wide(outside_training.tensor()), plain.0);
}

#[test]
fn a_linear_layer_has_the_same_bits_everywhere() {
    assert_same_bits_everywhere("linear", &|| {
        let device = Device::cpu();
        let mut results = Vec::new();
        for dtype in [DType::F32, DType::Bf16] {
            let mut case = Case::new([301, 131, 150, 8], dtype);
            case.dropout = 0.1;
            let d_y = numbers("d_y", 301 * 150, dtype);
            let (y, gradients) = case.run(&device, &case.values(), &d_y);
            let all = gradients.into_iter().flatten().chain([y]);
            results.extend(all.map(|values| values.iter().map(|&value| (value as f32).to_bits()).collect()));
        }
        results
    });
}

fn project_is_the_product_alone(device: &Device) {
    let (x, w) = (numbers("x", 3 * 7, DType::F32), numbers("W", 5 * 7, DType::F32));
    let mut out = Tensor::scratch(device, Category::Workspace, DType::F32, &[3, 5]).unwrap();
    let (left, right) = (tensor(device, DType::F32, &[3, 7], &x), tensor(device, DType::F32, &[5, 7], &w));
    ops::project(&left, &right, 1.0, &mut out).unwrap();
    let layer = reference::Linear { width: 7, rank: 0, scale: 1.0, lora_scale: 0.0, mask: None };
    assert_close("project", &wide(&out), &layer.forward([&x, &w, &[], &[], &[], &[]]), F32_ERROR);
    assert!(ops::project(&right, &right, 1.0, &mut out).is_err());
    assert!(ops::project(&left, &tensor(device, DType::F32, &[5, 6], &[0.0; 30]), 1.0, &mut out).is_err());
}

#[test]
fn parts_that_do_not_fit_are_refused() {
    let device = Device::cpu();
    let zeros = |shape: &[usize]| tensor(&device, DType::F32, shape, &vec![0.0; shape.iter().product()]);
    let frozen = |shape: &[usize]| Weight::Frozen(zeros(shape));
    let plain = || Linear { weight: frozen(&[4, 6]), bias: None, lora: None };
    let lora = |a: &[usize], b: &[usize]| {
        Some(Lora { a: frozen(a), b: frozen(b), scale: 1.0, dropout: 0.0, stream: 0 })
    };
    let run = |layer: Linear, x: &[usize], residual: Option<Tensor>| {
        let residual = residual.map(Var::constant);
        let options = LinearOptions { residual: residual.as_ref(), ..LinearOptions::default() };
        ops::linear(&Tape::off(), &Var::constant(zeros(x)), &layer, options).map(|_| ())
    };
    run(Linear { lora: lora(&[2, 6], &[4, 2]), ..plain() }, &[3, 6], Some(zeros(&[3, 4]))).unwrap();
    let narrow = tensor(&device, DType::Bf16, &[3, 4], &[0.0; 12]);
    assert!(matches!(run(plain(), &[3, 6], Some(narrow)), Err(Error::DType { .. })));
    let refused = [
        // As many elements as two rows of the right width.
        run(plain(), &[3, 4], None),
        run(plain(), &[2, 3], None),
        run(plain(), &[3, 6], Some(zeros(&[2, 4]))),
        run(Linear { bias: Some(frozen(&[3])), ..plain() }, &[3, 6], None),
        run(Linear { lora: lora(&[2, 5], &[4, 2]), ..plain() }, &[3, 6], None),
        run(Linear { lora: lora(&[2, 6], &[4, 3]), ..plain() }, &[3, 6], None),
        run(Linear { lora: lora(&[2, 6], &[3, 2]), ..plain() }, &[3, 6], None),
    ];
    for (index, outcome) in refused.into_iter().enumerate() {
        assert!(matches!(outcome, Err(Error::Shape { .. })), "case {index}: {outcome:?}");
    }
}
