use super::*;
use crate::device::RopePairing;
use crate::error::Error;
use crate::ops::{self, RopeTable};
use crate::reference;

on_every_device! {
    rope_and_its_gradient_agree_with_the_reference,
    a_norm_that_was_turned_in_place_is_not_computed_again_without_the_turn,
}

const PAIRINGS: [RopePairing; 2] = [RopePairing::Halves, RopePairing::Neighbours];

/// Cosines and sines that belong to no angle, as some families scale them.
fn tables(tokens: usize, half: usize) -> [Vec<f64>; 2] {
    [numbers("cosines", tokens * half, DType::F32), numbers("sines", tokens * half, DType::F32)]
}

fn upload(device: &Device, tokens: usize, half: usize, pairing: RopePairing) -> RopeTable {
    let [cosines, sines] = tables(tokens, half).map(|v| v.iter().map(|&x| x as f32).collect::<Vec<_>>());
    RopeTable::new(device, tokens, half, &cosines, &sines, pairing).unwrap()
}

fn rope_and_its_gradient_agree_with_the_reference(device: &Device) {
    // Tokens, heads, head width, pairs that turn: all of a head, part of it, none.
    for size in [[0, 2, 8, 4], [1, 1, 2, 1], [3, 3, 10, 5], [65, 2, 24, 7], [130, 3, 34, 17], [3, 2, 6, 0]] {
        for (pairing, &dtype) in PAIRINGS.into_iter().flat_map(|p| types(device).iter().map(move |t| (p, t)))
        {
            let [tokens, heads, width, half] = size;
            let (shape, count) = ([tokens, heads, width], tokens * heads * width);
            let what = format!("{pairing:?} {dtype} {size:?}");
            let [cosines, sines] = tables(tokens, half);
            let inputs = vec![numbers("x", count, dtype)];
            let d_y = numbers("d_y", count, dtype);
            let tape = Tape::recording();
            let x = tape.leaf(tensor(device, dtype, &shape, &inputs[0]));
            let table = upload(device, tokens, half, pairing);
            let y = ops::rope(&tape, x.clone(), &table).unwrap();
            let function = |inputs: &[Vec<f64>]| {
                reference::rope(&inputs[0], [heads, width, half], &cosines, &sines, pairing)
            };
            assert_close(&what, &wide(y.tensor()), &function(&inputs), tolerance(dtype));
            assert_close("the input", &wide(x.tensor()), &inputs[0], 0.0);
            let mut gradients = tape.backward(&y, tensor(device, dtype, &shape, &d_y)).unwrap();
            let ours = [arrived(&mut gradients, &x)];
            assert_gradients(&what, &function, &inputs, &d_y, &ours, tolerance(dtype));
        }
    }
}

#[test]
fn rope_turns_the_only_handle_in_place() {
    let device = Device::cpu();
    let x = tensor(&device, DType::F32, &[4, 2, 6], &numbers("x", 48, DType::F32));
    let table = upload(&device, 4, 3, RopePairing::Halves);
    device.memory().reset_peak();
    let before = device.memory().report().peak_bytes;
    let y = ops::rope(&Tape::recording(), Var::constant(x), &table).unwrap();
    assert_eq!(device.memory().report().peak_bytes, before);
    let again = ops::rope(&Tape::recording(), y.clone(), &table).unwrap();
    assert!(device.memory().report().peak_bytes > before);
    assert_ne!(bits(again.tensor()), bits(y.tensor()));
}

fn a_norm_that_was_turned_in_place_is_not_computed_again_without_the_turn(device: &Device) {
    // The norm's result can be recomputed from its input; after the turn that recipe would be wrong.
    let inputs = vec![numbers("x", 3 * 4, DType::F32), numbers("w", 2 * 4, DType::F32)];
    let w = weight(device, true, DType::F32, &[2, 4], &inputs[1]);
    let tape = Tape::recording();
    let x = tape.leaf(tensor(device, DType::F32, &[3, 1, 4], &inputs[0]));
    let kind = crate::device::NormWeight::Plain;
    let normed = ops::rms_norm(&tape, &x, None, kind, 1e-5).unwrap();
    let turned = ops::rope(&tape, normed, &upload(device, 3, 2, RopePairing::Halves)).unwrap();
    let layer = ops::Linear { weight: w.clone(), bias: None, lora: None };
    let y = ops::linear(&tape, &turned, &layer, ops::LinearOptions::default()).unwrap();
    drop(turned);
    let d_y = numbers("d_y", 6, DType::F32);
    let mut gradients = tape.backward(&y, tensor(device, DType::F32, &[3, 2], &d_y)).unwrap();
    let ours = [arrived(&mut gradients, &x), gradient_of(&w)];
    let function = |inputs: &[Vec<f64>]| {
        let [cosines, sines] = tables(3, 2);
        let normed = reference::rms_norm(&inputs[0], &[], 4, kind, f64::from(1e-5_f32));
        let turned = reference::rope(&normed, [1, 4, 2], &cosines, &sines, RopePairing::Halves);
        let layer = reference::Linear { width: 4, rank: 0, scale: 1.0, lora_scale: 0.0, mask: None };
        layer.forward([&turned, &inputs[1], &[], &[], &[], &[]])
    };
    assert_gradients("norm, rope, linear", &function, &inputs, &d_y, &ours, F32_ERROR);
}

#[test]
fn rope_has_the_same_bits_everywhere() {
    assert_same_bits_everywhere("rope", &|| {
        let device = Device::cpu();
        let mut results = Vec::new();
        for (pairing, dtype) in PAIRINGS.into_iter().flat_map(|p| [(p, DType::F32), (p, DType::Bf16)]) {
            let x = tensor(&device, dtype, &[67, 3, 46], &numbers("x", 67 * 3 * 46, dtype));
            let table = upload(&device, 67, 23, pairing);
            results.push(bits(ops::rope(&Tape::off(), Var::constant(x), &table).unwrap().tensor()));
        }
        results
    });
}

#[test]
fn tables_that_do_not_fit_are_refused() {
    let device = Device::cpu();
    let x = || Var::constant(tensor(&device, DType::F32, &[2, 1, 4], &[1.0; 8]));
    let few = ops::rope(&Tape::off(), x(), &upload(&device, 1, 2, RopePairing::Halves)).err().unwrap();
    assert!(matches!(few, Error::Shape { .. }), "{few}");
    let wide = ops::rope(&Tape::off(), x(), &upload(&device, 2, 3, RopePairing::Halves)).err().unwrap();
    assert!(matches!(wide, Error::Range { actual: 6, limit: 5, .. }), "{wide}");
}
