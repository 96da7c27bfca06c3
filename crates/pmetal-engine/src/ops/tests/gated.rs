use super::*;
use crate::device::GateActivation;
use crate::{ops, reference};

on_every_device! {
    gated_activations_agree_with_the_reference,
    gated_activations_of_huge_inputs_are_finite,
    gelu_is_right_to_the_last_digits,
    a_gate_without_a_wish_for_its_gradient_gets_none,
}

const ACTIVATIONS: [GateActivation; 4] =
    [GateActivation::Silu, GateActivation::Gelu, GateActivation::GeluTanh, GateActivation::Sigmoid];

fn gates(count: usize, dtype: DType) -> Vec<f64> {
    // Up to 8, where both activations have become straight lines.
    numbers("gate", count, dtype).iter().map(|value| value * 8.0).collect()
}

fn gated_activations_agree_with_the_reference(device: &Device) {
    for (tokens, width) in [(0, 5), (1, 1), (3, 7), (65, 37), (130, 200)] {
        for (activation, &dtype) in
            ACTIVATIONS.into_iter().flat_map(|a| types(device).iter().map(move |t| (a, t)))
        {
            let what = format!("{activation:?} {dtype} {tokens} x {width}");
            let count = tokens * width;
            let inputs = vec![gates(count, dtype), numbers("up", count, dtype)];
            let d_y = numbers("d_y", count, dtype);
            let tape = Tape::recording();
            let shape = [tokens, width];
            let leaves: Vec<Var> =
                inputs.iter().map(|x| tape.leaf(tensor(device, dtype, &shape, x))).collect();
            let y = ops::gated(&tape, activation, &leaves[0], &leaves[1]).unwrap();
            let function = |inputs: &[Vec<f64>]| reference::gated(activation, &inputs[0], &inputs[1]);
            assert_close(&what, &wide(y.tensor()), &function(&inputs), tolerance(dtype));
            let mut gradients = tape.backward(&y, tensor(device, dtype, &shape, &d_y)).unwrap();
            let ours: Vec<_> = leaves.iter().map(|leaf| arrived(&mut gradients, leaf)).collect();
            assert_gradients(&what, &function, &inputs, &d_y, &ours, tolerance(dtype));
        }
    }
}

fn gated_activations_of_huge_inputs_are_finite(device: &Device) {
    let gate = [-1e30, -1e4, -100.0, -0.0, 0.0, 1e-30, 100.0, 1e4];
    for activation in ACTIVATIONS {
        let tape = Tape::recording();
        let gate = tape.leaf(tensor(device, DType::F32, &[1, 8], &gate));
        let up = tape.leaf(tensor(device, DType::F32, &[1, 8], &[2.0; 8]));
        let y = ops::gated(&tape, activation, &gate, &up).unwrap();
        let values = wide(y.tensor());
        assert!(values.iter().all(|value| value.is_finite()), "{activation:?}: {values:?}");
        let most = if activation == GateActivation::Sigmoid { 2.0 } else { 2e4 };
        assert_eq!((values[0], values[2], values[7]), (0.0, 0.0, most), "{activation:?}");
        let mut gradients = tape.backward(&y, tensor(device, DType::F32, &[1, 8], &[1.0; 8])).unwrap();
        for leaf in [&gate, &up] {
            let gradient = arrived(&mut gradients, leaf).unwrap();
            assert!(gradient[1..].iter().all(|value| value.is_finite()), "{activation:?}: {gradient:?}");
        }
    }
}

/// Where the tanh form is off by up to 5e-4.
fn gelu_is_right_to_the_last_digits(device: &Device) {
    let gate: Vec<f64> = (-12_500..=12_500).map(|step| f64::from(step as f32 * 1e-3)).collect();
    let shape = [1, gate.len()];
    let tape = Tape::recording();
    let leaf = tape.leaf(tensor(device, DType::F32, &shape, &gate));
    let ones = tensor(device, DType::F32, &shape, &vec![1.0; gate.len()]);
    let y = ops::gated(&tape, GateActivation::Gelu, &leaf, &Var::constant(ones)).unwrap();
    let values = wide(y.tensor());
    let slopes = tape
        .backward(&y, tensor(device, DType::F32, &shape, &vec![1.0; gate.len()]))
        .unwrap()
        .take(leaf.slot().unwrap())
        .unwrap();
    for ((x, value), slope) in gate.into_iter().zip(values).zip(wide(&slopes)) {
        let (share, density) = (reference::normal_share(x), reference::normal_density(x));
        let unit = 2.0_f64.powi(-24);
        assert!((value - x * share).abs() <= 9.0 * unit * (x * share).abs(), "{x}: {value}");
        // A sum of these two.
        let size = share + (x * density).abs();
        assert!((slope - share - x * density).abs() <= 10.0 * unit * size, "{x}: {slope}");
    }
}

fn a_gate_without_a_wish_for_its_gradient_gets_none(device: &Device) {
    for wanted in [[true, false], [false, true]] {
        let tape = Tape::recording();
        let x = numbers("x", 6, DType::F32);
        let vars = wanted.map(|wanted| input(&tape, wanted, tensor(device, DType::F32, &[2, 3], &x)));
        let y = ops::gated(&tape, GateActivation::Silu, &vars[0], &vars[1]).unwrap();
        let mut gradients = tape.backward(&y, tensor(device, DType::F32, &[2, 3], &[1.0; 6])).unwrap();
        let ours = vars.map(|var| arrived(&mut gradients, &var));
        let function = |inputs: &[Vec<f64>]| reference::gated(GateActivation::Silu, &inputs[0], &inputs[1]);
        assert_eq!(ours.each_ref().map(Option::is_some), wanted);
        assert_gradients("one-sided", &function, &[x.clone(), x], &[1.0; 6], &ours, F32_ERROR);
    }
}

#[test]
fn gated_activations_have_the_same_bits_everywhere() {
    assert_same_bits_everywhere("gated", &|| {
        let device = Device::cpu();
        let mut results = Vec::new();
        for (activation, dtype) in ACTIVATIONS.into_iter().flat_map(|a| [(a, DType::F32), (a, DType::Bf16)]) {
            let (shape, count) = ([131, 257], 131 * 257);
            let tape = Tape::recording();
            let gate = tape.leaf(tensor(&device, dtype, &shape, &gates(count, dtype)));
            let up = tape.leaf(tensor(&device, dtype, &shape, &numbers("up", count, dtype)));
            let y = ops::gated(&tape, activation, &gate, &up).unwrap();
            let d_y = tensor(&device, dtype, &shape, &numbers("d_y", count, dtype));
            let mut gradients = tape.backward(&y, d_y).unwrap();
            results.push(bits(y.tensor()));
            results.extend([gate, up].map(|var| bits(&gradients.take(var.slot().unwrap()).unwrap())));
        }
        results
    });
}

#[test]
fn inputs_that_differ_are_refused() {
    let device = Device::cpu();
    let var = |dtype, shape: [usize; 2]| Var::constant(tensor(&device, dtype, &shape, &[0.0; 6]));
    let gate = var(DType::F32, [2, 3]);
    for up in [var(DType::F32, [3, 2]), var(DType::Bf16, [2, 3])] {
        assert!(ops::gated(&Tape::off(), GateActivation::Silu, &gate, &up).is_err());
    }
}
