use super::*;
use crate::device::GateActivation;
use crate::ops::{self, PairedGate, SumOptions, Weighting};

on_every_device! {
    rows_go_to_experts_and_back_as_the_reference_says,
    rows_are_gated_as_the_reference_says,
    gated_pairs_agree_with_the_reference,
    a_pair_at_its_limits_passes_its_gradient,
    converted_numbers_bring_their_gradient_back,
}

const SHAPES: [[usize; 4]; 4] = [[1, 1, 1, 1], [3, 7, 2, 1], [40, 16, 5, 3], [9, 33, 8, 4]];

/// Sums over choices of weight times a function of the row that each expert gets.
fn mixed(
    inputs: &[Vec<f64>],
    [width, experts, choices]: [usize; 3],
    chosen: &[u32],
    weighting: Weighting,
    scale: f64,
) -> Vec<f64> {
    let router = Router { choices, ..PLAIN };
    let weights = weights(&inputs[1], experts, &router, chosen);
    let mut out = inputs[2].clone();
    // Every expert gives the same here; layers of experts have their own test.
    for (pair, &weight) in weights.iter().enumerate() {
        let token = pair / choices;
        for column in 0..width {
            let x = inputs[0][token * width + column];
            // Something that is not linear, so that it matters where the weight is.
            let value = match weighting {
                Weighting::Input => activate(weight * x, weight * x),
                Weighting::Output => weight * activate(x, x),
            };
            out[token * width + column] += scale * value;
        }
    }
    out
}

fn activate(gate: f64, up: f64) -> f64 {
    gate / (1.0 + (-gate).exp()) * up
}

fn rows_go_to_experts_and_back_as_the_reference_says(device: &Device) {
    for [tokens, width, experts, choices] in SHAPES {
        for (index, &dtype) in types(device).iter().enumerate() {
            for weighting in [Weighting::Input, Weighting::Output] {
                let what = format!("{weighting:?} {dtype} {tokens} {width} {experts} {choices}");
                let scale = [1.0, 0.5, 0.25][index];
                let logits = loads(["any", "same", "late"][index], tokens, experts);
                let shape = [tokens, width];
                let inputs = [
                    numbers("x", tokens * width, dtype),
                    logits.clone(),
                    numbers("residual", tokens * width, dtype),
                ];
                let tape = Tape::recording();
                let x = tape.leaf(tensor(device, dtype, &shape, &inputs[0]));
                let residual = tape.leaf(tensor(device, dtype, &shape, &inputs[2]));
                let (leaf, routing) = routed(device, &tape, &logits, experts, choices, true);
                let chosen = routing.chosen().to_vec::<u32>().unwrap();
                let rows = ops::gather(&tape, &x, &routing, weighting).unwrap();
                assert_eq!(rows.tensor().shape(), [tokens * choices, width]);
                let hidden = ops::gated(&tape, GateActivation::Silu, &rows, &rows).unwrap();
                let options =
                    SumOptions { residual: Some(&residual), scale: scale as f32, ..SumOptions::default() };
                let y = ops::combine(&tape, &hidden, &routing, weighting, options).unwrap();
                let function =
                    |inputs: &[Vec<f64>]| mixed(inputs, [width, experts, choices], &chosen, weighting, scale);
                let error = 2.0 * tolerance(dtype);
                assert_close(&what, &wide(y.tensor()), &function(&inputs), error);
                let d_y = numbers("d_y", tokens * width, dtype);
                let mut gradients = tape.backward(&y, tensor(device, dtype, &shape, &d_y)).unwrap();
                let ours = [&x, &leaf, &residual].map(|leaf| arrived(&mut gradients, leaf));
                assert_gradients(&what, &function, &inputs, &d_y, &ours, error);
            }
        }
    }
}

fn rows_are_gated_as_the_reference_says(device: &Device) {
    for (tokens, width) in [(1, 1), (5, 7), (66, 40)] {
        for &dtype in types(device) {
            for (with_residual, logit_type) in [(true, dtype), (false, DType::F32)] {
                let what = format!("gate {tokens} {width} {dtype} {logit_type} {with_residual}");
                let count = tokens * width;
                let residuals = if with_residual { numbers("residual", count, dtype) } else { vec![] };
                let inputs = [numbers("y", count, dtype), numbers("l", tokens, dtype), residuals];
                let tape = Tape::recording();
                let leaf = |dtype, width, values| tape.leaf(tensor(device, dtype, &[tokens, width], values));
                let (y, logits) = (leaf(dtype, width, &inputs[0]), leaf(logit_type, 1, &inputs[1]));
                let residual = with_residual.then(|| leaf(dtype, width, &inputs[2]));
                let options = SumOptions { residual: residual.as_ref(), scale: 0.5, ends_block: true };
                let out = ops::gate_rows(&tape, &y, &logits, options).unwrap();
                let function = |inputs: &[Vec<f64>]| -> Vec<f64> {
                    let gated = |(index, y): (usize, &f64)| {
                        let share = 1.0 / (1.0 + (-inputs[1][index / width]).exp());
                        0.5 * share * y + inputs[2].get(index).unwrap_or(&0.0)
                    };
                    inputs[0].iter().enumerate().map(gated).collect()
                };
                assert_close(&what, &wide(out.tensor()), &function(&inputs), tolerance(dtype));
                let d_out = numbers("d_out", count, dtype);
                let mut gradients =
                    tape.backward(&out, tensor(device, dtype, &[tokens, width], &d_out)).unwrap();
                let ours = [Some(&y), Some(&logits), residual.as_ref()]
                    .map(|leaf| leaf.and_then(|leaf| arrived(&mut gradients, leaf)));
                assert_gradients(&what, &function, &inputs, &d_out, &ours, tolerance(dtype));
            }
        }
    }
}

const KINDS: [PairedGate; 5] = [
    PairedGate::Halves(GateActivation::Silu),
    PairedGate::Halves(GateActivation::Gelu),
    PairedGate::Halves(GateActivation::Sigmoid),
    PairedGate::Halves(GateActivation::GeluTanh),
    PairedGate::Clamped { slope: 1.702, limit: 4.0 },
];

fn paired(kind: PairedGate, gate_up: &[f64], width: usize) -> Vec<f64> {
    let row = |row: &[f64]| -> Vec<f64> {
        match kind {
            PairedGate::Halves(activation) => {
                crate::reference::gated(activation, &row[..width], &row[width..])
            }
            PairedGate::Clamped { slope, limit } => {
                let (slope, limit) = (f64::from(slope), f64::from(limit));
                let one = |pair: &[f64]| {
                    let (gate, up) = (pair[0].min(limit), pair[1].clamp(-limit, limit));
                    (up + 1.0) * gate / (1.0 + (-slope * gate).exp())
                };
                row.chunks(2).map(one).collect()
            }
        }
    };
    gate_up.chunks(2 * width).flat_map(row).collect()
}

fn gated_pairs_agree_with_the_reference(device: &Device) {
    for (rows, width) in [(0, 3), (1, 1), (3, 7), (20, 40), (3, 2056)] {
        for (kind, &dtype) in KINDS.into_iter().flat_map(|kind| types(device).iter().map(move |t| (kind, t)))
        {
            let what = format!("{kind:?} {dtype} {rows} x {width}");
            // Beyond the limits; none is at one.
            let values: Vec<f64> =
                numbers("gate_up", 2 * rows * width, dtype).iter().map(|value| value * 8.0).collect();
            let inputs = [values];
            let tape = Tape::recording();
            let leaf = tape.leaf(tensor(device, dtype, &[rows, 2 * width], &inputs[0]));
            let y = ops::gated_pair(&tape, &leaf, kind).unwrap();
            let function = |inputs: &[Vec<f64>]| paired(kind, &inputs[0], width);
            assert_close(&what, &wide(y.tensor()), &function(&inputs), tolerance(dtype));
            let d_y = numbers("d_y", rows * width, dtype);
            let mut gradients = tape.backward(&y, tensor(device, dtype, &[rows, width], &d_y)).unwrap();
            let ours = [arrived(&mut gradients, &leaf)];
            let near = |value: &&f64| (value.abs() - 4.0).abs() < 1e-3;
            if inputs[0].iter().find(near).is_none() || !matches!(kind, PairedGate::Clamped { .. }) {
                assert_gradients_of(20, &what, &function, &inputs, &d_y, &ours, tolerance(dtype));
            }
        }
    }
}

fn a_pair_at_its_limits_passes_its_gradient(device: &Device) {
    let kind = PairedGate::Clamped { slope: 1.702, limit: 7.0 };
    let tape = Tape::recording();
    // Gate and up at, within and beyond the limits; a gate has no limit below.
    let values = [7.0, 7.0, 7.5, -7.0, -9.0, 7.5, 1.0, -7.5];
    let leaf = tape.leaf(tensor(device, DType::F32, &[1, 8], &values));
    let y = ops::gated_pair(&tape, &leaf, kind).unwrap();
    let d_y = tensor(device, DType::F32, &[1, 4], &[1.0; 4]);
    let gradient = arrived(&mut tape.backward(&y, d_y).unwrap(), &leaf).unwrap();
    let is_zero: Vec<bool> = gradient.iter().map(|&value| value == 0.0).collect();
    assert_eq!(is_zero, [false, false, true, false, false, true, false, true], "{gradient:?}");
}

fn converted_numbers_bring_their_gradient_back(device: &Device) {
    let x = numbers("x", 12, DType::Bf16);
    let tape = Tape::recording();
    let leaf = tape.leaf(tensor(device, DType::Bf16, &[4, 3], &x));
    let single = ops::convert(&tape, &leaf, DType::F32).unwrap();
    assert_eq!((single.tensor().dtype(), wide(single.tensor())), (DType::F32, x.clone()));
    let mut gradients = tape.backward(&single, tensor(device, DType::F32, &[4, 3], &x)).unwrap();
    let gradient = gradients.take(leaf.slot().unwrap()).unwrap();
    assert_eq!((gradient.dtype(), wide(&gradient)), (DType::Bf16, x));
}

#[test]
fn rows_of_experts_have_the_same_bits_everywhere() {
    assert_same_bits_everywhere("rows of experts", &|| {
        let device = Device::cpu();
        let mut results = Vec::new();
        for dtype in [DType::F32, DType::Bf16] {
            let (shape, count) = ([67, 53], 67 * 53);
            let tape = Tape::recording();
            let x = tape.leaf(tensor(&device, dtype, &shape, &numbers("x", count, dtype)));
            let (leaf, routing) = routed(&device, &tape, &loads("any", 67, 9), 9, 4, true);
            let rows = ops::gather(&tape, &x, &routing, Weighting::Input).unwrap();
            let hidden = ops::gated(&tape, GateActivation::Silu, &rows, &rows).unwrap();
            let y = ops::combine(&tape, &hidden, &routing, Weighting::Output, SumOptions::default()).unwrap();
            let d_y = tensor(&device, dtype, &shape, &numbers("d_y", count, dtype));
            let mut gradients = tape.backward(&y, d_y).unwrap();
            results.push(bits(y.tensor()));
            results.extend([x, leaf].map(|var| bits(&gradients.take(var.slot().unwrap()).unwrap())));
        }
        results
    });
}

#[test]
fn rows_of_other_routings_are_refused() {
    let device = Device::cpu();
    let (_, routing) = routed(&device, &Tape::off(), &loads("any", 3, 4), 4, 2, false);
    let var = |rows: usize| Var::constant(tensor(&device, DType::F32, &[rows, 2], &vec![0.0; 2 * rows]));
    let tape = Tape::off();
    assert!(ops::gather(&tape, &var(2), &routing, Weighting::Output).is_err());
    assert!(ops::combine(&tape, &var(3), &routing, Weighting::Output, SumOptions::default()).is_err());
    let residual = var(2);
    let options = SumOptions { residual: Some(&residual), ..SumOptions::default() };
    assert!(ops::combine(&tape, &var(6), &routing, Weighting::Output, options).is_err());
    assert!(ops::gate_rows(&tape, &var(3), &var(3), SumOptions::default()).is_err());
}
