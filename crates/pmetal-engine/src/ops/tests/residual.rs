use super::*;
use crate::device::NormWeight;
use crate::{ops, reference};

on_every_device! {
    sums_with_a_factor_and_their_gradients_agree_with_the_reference,
    a_sum_takes_the_memory_of_a_branch_that_nobody_else_has,
    a_branch_that_is_computed_again_may_be_overwritten,
    gradients_that_stand_for_both_summands_are_not_overwritten,
}

fn sums_with_a_factor_and_their_gradients_agree_with_the_reference(device: &Device) {
    for (tokens, width) in [(0, 5), (1, 1), (3, 7), (16, 64), (65, 37)] {
        for (factor, &dtype) in
            [1.0, 0.22, -3.0].into_iter().flat_map(|factor| types(device).iter().map(move |t| (factor, t)))
        {
            for wanted in [[true, true], [true, false], [false, true]] {
                let what = format!("{factor} {dtype} {tokens} x {width}, {wanted:?}");
                let (shape, count) = ([tokens, width], tokens * width);
                let inputs = ["x", "y"].map(|name| numbers(name, count, dtype));
                let tape = Tape::recording();
                let var =
                    |index: usize| input(&tape, wanted[index], tensor(device, dtype, &shape, &inputs[index]));
                let vars = [var(0), var(1)];
                let z = ops::add_scaled(&tape, &vars[0], vars[1].clone(), factor).unwrap();
                let function = |inputs: &[Vec<f64>]| -> Vec<f64> {
                    let both = inputs[0].iter().zip(&inputs[1]);
                    both.map(|(x, y)| x + f64::from(factor) * y).collect()
                };
                assert_close(&what, &wide(z.tensor()), &function(&inputs), tolerance(dtype));
                // The branch had another handle.
                assert_eq!(wide(vars[1].tensor()), inputs[1], "{what}");
                let d_z = numbers("d_z", count, dtype);
                let mut gradients = tape.backward(&z, tensor(device, dtype, &shape, &d_z)).unwrap();
                let ours = vars.map(|var| arrived(&mut gradients, &var));
                assert_eq!(ours.each_ref().map(Option::is_some), wanted);
                assert_gradients(&what, &function, &inputs, &d_z, &ours, tolerance(dtype));
            }
        }
    }
}

fn a_sum_takes_the_memory_of_a_branch_that_nobody_else_has(device: &Device) {
    let (tape, values) = (Tape::recording(), numbers("x", 4096, DType::F32));
    let [x, y] = [0, 1].map(|_| tape.leaf(tensor(device, DType::F32, &[64, 64], &values)));
    let before = device.memory().report().live_bytes;
    let (x_slot, y_slot) = (x.slot().unwrap(), y.slot().unwrap());
    let z = ops::add_scaled(&tape, &x, y, 1.0).unwrap();
    assert_eq!(device.memory().report().live_bytes, before);
    let d_z = tensor(device, DType::F32, &[64, 64], &values);
    let mut gradients = tape.backward(&z, d_z).unwrap();
    let [d_x, d_y] = [x_slot, y_slot].map(|slot| gradients.take(slot).unwrap());
    assert!(d_x.shares_memory(&d_y));
}

fn a_branch_that_is_computed_again_may_be_overwritten(device: &Device) {
    let (shape, width, epsilon) = ([9, 24], 24, 1e-5);
    for &dtype in types(device) {
        let inputs = ["x", "b"].map(|name| numbers(name, 9 * 24, dtype));
        let tape = Tape::recording();
        let vars = inputs.each_ref().map(|values| tape.leaf(tensor(device, dtype, &shape, values)));
        let normed = ops::rms_norm(&tape, &vars[1], None, NormWeight::Plain, epsilon).unwrap();
        // Keeps the recipe of the norm, which is overwritten next.
        let gate = ops::gated(&tape, crate::device::GateActivation::Silu, &vars[0], &normed).unwrap();
        let sum = ops::add_scaled(&tape, &vars[0], normed, 0.5).unwrap();
        let y = ops::add_scaled(&tape, &gate, sum, -2.0).unwrap();
        let function = |inputs: &[Vec<f64>]| -> Vec<f64> {
            let normed = reference::rms_norm(&inputs[1], &[], width, NormWeight::Plain, f64::from(epsilon));
            let gate = reference::gated(crate::device::GateActivation::Silu, &inputs[0], &normed);
            let all = inputs[0].iter().zip(&normed).zip(gate);
            all.map(|((x, normed), gate)| gate - 2.0 * (x + 0.5 * normed)).collect()
        };
        assert_close("values", &wide(y.tensor()), &function(&inputs), 2.0 * tolerance(dtype));
        let d_y = numbers("d_y", 9 * 24, dtype);
        let mut gradients = tape.backward(&y, tensor(device, dtype, &shape, &d_y)).unwrap();
        let ours = vars.map(|var| arrived(&mut gradients, &var));
        assert_gradients("gradients", &function, &inputs, &d_y, &ours, 3.0 * tolerance(dtype));
    }
}

fn gradients_that_stand_for_both_summands_are_not_overwritten(device: &Device) {
    let (shape, width, epsilon) = ([5, 16], 16, 1e-5);
    let inputs = [numbers("x", 80, DType::F32)];
    let tape = Tape::recording();
    let x = tape.leaf(tensor(device, DType::F32, &shape, &inputs[0]));
    // The gradient of the sum is that of the branch and, at once, the first that x gets; the norm adds to it.
    let normed = ops::rms_norm(&tape, &x, None, NormWeight::Plain, epsilon).unwrap();
    let y = ops::add_scaled(&tape, &x, normed, 1.0).unwrap();
    let z = ops::add_scaled(&tape, &y.clone(), y, 1.0).unwrap();
    let function = |inputs: &[Vec<f64>]| -> Vec<f64> {
        let normed = reference::rms_norm(&inputs[0], &[], width, NormWeight::Plain, f64::from(epsilon));
        inputs[0].iter().zip(normed).map(|(x, normed)| 2.0 * (x + normed)).collect()
    };
    assert_close("values", &wide(z.tensor()), &function(&inputs), F32_ERROR);
    let d_z = numbers("d_z", 80, DType::F32);
    let mut gradients = tape.backward(&z, tensor(device, DType::F32, &shape, &d_z)).unwrap();
    let ours = [arrived(&mut gradients, &x)];
    assert_gradients("gradients", &function, &inputs, &d_z, &ours, F32_ERROR);
}

#[test]
fn summands_that_differ_are_refused() {
    let device = Device::cpu();
    let var = |dtype, shape: [usize; 2]| Var::constant(tensor(&device, dtype, &shape, &[0.0; 6]));
    let x = var(DType::F32, [2, 3]);
    for y in [var(DType::F32, [3, 2]), var(DType::Bf16, [2, 3])] {
        assert!(ops::add_scaled(&Tape::off(), &x, y, 1.0).is_err());
    }
}
