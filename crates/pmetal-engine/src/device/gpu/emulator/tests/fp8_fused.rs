//! Rounding to eight bits on the way out: the same bits as rounding afterwards, and read by who multiplies them.

use super::*;
use crate::device::gpu::runtime::Fp8Scaling;
use crate::device::{Finish, GateActivation, GradientCodes, NormWeight, ScaledRows};
use crate::ops::columns::join_columns;
use crate::ops::{
    GatedOptions, Linear, LinearGroup, LinearOptions, Lora, Spare, gated_with_spare, linear_group,
    rms_norm_with_spare,
};
use crate::{DType, Parameter, Tape, Var, Weight};

const SCALINGS: [Fp8Scaling; 3] = [Fp8Scaling::Rows, Fp8Scaling::RowsAndAddend, Fp8Scaling::Afterwards];

fn device(scaling: Fp8Scaling) -> Option<Device> {
    emulated(1).map(|_| Device::gpu(Arc::new(Emulator::with_fp8(1, scaling))))
}

fn tensor(device: &Device, dtype: DType, seed: u64, shape: &[usize]) -> Tensor {
    let values = numbers(seed, shape.iter().product());
    let x = Tensor::from_slice(device, Category::Workspace, shape, &values).unwrap();
    let mut out = Tensor::scratch(device, Category::Workspace, dtype, shape).unwrap();
    device.kernels().convert(&x, &mut out);
    out
}

fn bits(tensor: &Tensor) -> Vec<u32> {
    tensor.to_f32_vec().unwrap().into_iter().map(f32::to_bits).collect()
}

fn assert_rounded(context: &str, actual: &ScaledRows, x: &Tensor, factors: Option<&Tensor>) {
    let expected = x.device().kernels().fp8().unwrap().quantise_rows(x, factors).unwrap();
    let codes = |rows: &ScaledRows| rows.codes.to_vec::<u8>().unwrap();
    assert_eq!(bits(&actual.scales), bits(&expected.scales), "{context}: scales");
    assert!(codes(actual) == codes(&expected), "{context}: codes");
}

#[test]
fn a_norm_that_rounds_gives_the_row_and_the_codes_of_the_row() {
    let Some(device) = device(Fp8Scaling::Rows) else { return };
    let fp8 = device.kernels().fp8().unwrap();
    for dtype in [DType::F32, DType::Bf16] {
        for (rows, width) in [(3, 16), (5, 1000), (65, 4096)] {
            let x = tensor(&device, dtype, 1, &[rows, width]);
            let weight = tensor(&device, dtype, 2, &[width]);
            for (weight, kind) in [(None, NormWeight::Plain), (Some(&weight), NormWeight::PlusOne)] {
                let context = format!("{dtype}, {rows} x {width}");
                let [mut plain, mut out] = [0, 1].map(|_| {
                    let category = Category::Workspace;
                    Tensor::scratch_with_spare(&device, category, dtype, [rows, width], 8).unwrap()
                });
                device.kernels().rms_norm(&x, weight, kind, 1e-3, &mut plain);
                let rounded = fp8.rms_norm_rounded(&x, weight, kind, 1e-3, &mut out).unwrap().unwrap();
                assert_eq!(bits(&out), bits(&plain), "{context}");
                assert_rounded(&context, &rounded, &out, None);
            }
        }
    }
    let [x, mut out] = [1, 2].map(|seed| tensor(&device, DType::F32, seed, &[3, 20]));
    assert!(fp8.rms_norm_rounded(&x, None, NormWeight::Plain, 1e-3, &mut out).unwrap().is_none());
}

#[test]
fn gated_layers_that_round_give_results_and_gradients_with_their_codes() {
    let Some(device) = device(Fp8Scaling::Rows) else { return };
    let (kernels, fp8) = (device.kernels(), device.kernels().fp8().unwrap());
    for dtype in [DType::F32, DType::Bf16] {
        for (activation, columns) in
            [(GateActivation::Silu, 16), (GateActivation::GeluTanh, 1016), (GateActivation::Silu, 14_336)]
        {
            let context = format!("{dtype}, {columns} columns");
            let halves = || {
                let both = tensor(&device, dtype, 1, &[3, 2 * columns]);
                <[Tensor; 2]>::try_from(both.split_columns(&[columns; 2]).unwrap()).unwrap()
            };
            let [mut gate, mut up] = halves();
            let d_out = tensor(&device, dtype, 2, &[3, columns]);
            let [mut plain, mut out] = [3, 4].map(|seed| tensor(&device, dtype, seed, &[3, columns]));
            kernels.gated(activation, &gate, &up, &mut plain);
            let rounded = fp8.gated_rounded(activation, &gate, &up, &mut out).unwrap().unwrap();
            assert_eq!(bits(&out), bits(&plain), "{context}");
            assert_rounded(&context, &rounded, &out, None);

            let factors = tensor(&device, DType::F32, 5, &[2 * columns]);
            let rounded = fp8
                .gated_backward_rounded(activation, &mut gate, &mut up, &d_out, &factors)
                .unwrap()
                .unwrap();
            let [mut plain_gate, mut plain_up] = halves();
            assert!(kernels.gated_backward_in_place(activation, &mut plain_gate, &mut plain_up, &d_out));
            assert_eq!((bits(&gate), bits(&up)), (bits(&plain_gate), bits(&plain_up)), "{context}");
            let both = join_columns(vec![gate, up]).unwrap();
            assert_rounded(&context, &rounded, &both, Some(&factors));
        }
    }
    let [mut gate, mut up, d_out] = [1, 2, 3].map(|seed| tensor(&device, DType::F32, seed, &[3, 20]));
    let factors = tensor(&device, DType::F32, 4, &[40]);
    let silu = GateActivation::Silu;
    assert!(fp8.gated_backward_rounded(silu, &mut gate, &mut up, &d_out, &factors).unwrap().is_none());
}

const WIDTH: usize = 48;
const INNER: usize = 32;
/// More than products of few rows take.
const TOKENS: usize = 12;

fn group(device: &Device, dtype: DType, seed: u64, shapes: &[[usize; 2]], biased: bool) -> LinearGroup {
    let layer = |(index, &[features, width]): (usize, &[usize; 2])| {
        let seed = seed + 10 * index as u64;
        let trained = |seed, shape: &[usize]| {
            Weight::Trainable(Parameter::new("adapter", tensor(device, DType::F32, seed, shape)))
        };
        Linear {
            weight: Weight::Frozen(tensor(device, dtype, seed, &[features, width])),
            bias: biased.then(|| Weight::Frozen(tensor(device, DType::F32, seed + 1, &[features]))),
            lora: Some(Lora {
                a: trained(seed + 2, &[3, width]),
                b: trained(seed + 3, &[features, 3]),
                scale: 0.5,
                dropout: 0.0,
                stream: 0,
            }),
        }
    };
    let mut group = LinearGroup::new(shapes.iter().enumerate().map(layer).collect());
    assert!(group.quantise().unwrap());
    group.pack(dtype).unwrap();
    group
}

/// A feed-forward block's result, its input's gradient and those of its adapters.
fn block(device: &Device, dtype: DType, fuses: bool, repeats: bool) -> Vec<Vec<u32>> {
    let gate_up = group(device, dtype, 20, &[[INNER, WIDTH], [INNER, WIDTH]], false);
    let down = group(device, dtype, 60, &[[WIDTH, INNER]], true);
    let groups = [gate_up.clone(), down.clone()];
    let run = move |tape: &Tape, x: Var| {
        let spare = Spare { codes: fuses && gate_up.reads_codes(), ..Spare::default() };
        let normed = rms_norm_with_spare(tape, &x, None, NormWeight::Plain, 1e-3, spare)?;
        assert_eq!(normed.codes().is_some(), fuses);
        let halves = linear_group(tape, &normed, &gate_up, LinearOptions::default())?;
        drop(normed);
        let options = GatedOptions {
            spare: 0,
            codes: fuses && down.reads_codes(),
            gradient_factors: gate_up.gradient_factors().filter(|_| fuses),
            riding: None,
        };
        let product = gated_with_spare(tape, GateActivation::Silu, &halves[0], &halves[1], options)?;
        assert_eq!(product.codes().is_some(), fuses && !tape.is_again());
        drop(halves);
        let options = LinearOptions { residual: Some(&x), ends_block: true, ..LinearOptions::default() };
        Ok(linear_group(tape, &product, &down, options)?.remove(0))
    };
    let tape = Tape::recording();
    let leaf = tape.leaf(tensor(device, dtype, 1, &[TOKENS, WIDTH]));
    let slot = leaf.slot().unwrap();
    let out = if repeats { tape.checkpoint(leaf, run).unwrap() } else { run(&tape, leaf).unwrap() };
    let mut results = vec![bits(out.tensor())];
    let d_out = tensor(device, dtype, 2, &[TOKENS, WIDTH]);
    let mut gradients = tape.backward_of(out, d_out).unwrap();
    results.push(bits(&gradients.take(slot).unwrap()));
    for layer in groups.iter().flat_map(LinearGroup::layers) {
        let lora = layer.lora.as_ref().unwrap();
        results.extend([&lora.a, &lora.b].map(|a| bits(&a.parameter().unwrap().gradient().unwrap())));
    }
    results
}

#[test]
fn a_block_whose_producers_round_gives_the_same_bits() {
    for scaling in SCALINGS {
        let Some(device) = device(scaling) else { return };
        for dtype in [DType::F32, DType::Bf16] {
            let plain = block(&device, dtype, false, false);
            assert!(plain.iter().all(|values| values.iter().any(|value| *value != 0)));
            for repeats in [false, true] {
                let fused = block(&device, dtype, true, repeats);
                assert!(fused == plain, "{scaling:?}, {dtype}, repeats {repeats}");
            }
        }
    }
}

#[test]
fn codes_that_a_value_or_a_gradient_carries_are_what_is_multiplied() {
    let Some(device) = device(Fp8Scaling::RowsAndAddend) else { return };
    let fp8 = device.kernels().fp8().unwrap();
    let all = group(&device, DType::F32, 20, &[[INNER, WIDTH], [INNER, WIDTH]], false);
    let x = || tensor(&device, DType::F32, 1, &[TOKENS, WIDTH]);
    let other = || tensor(&device, DType::F32, 7, &[TOKENS, WIDTH]);
    let run = |codes: Option<ScaledRows>, gradient: Option<(usize, bool)>| {
        let tape = Tape::recording();
        let leaf = tape.leaf(x());
        let outputs =
            linear_group(&tape, &leaf.clone().with_codes(codes), &all, LinearOptions::default()).unwrap();
        let result = bits(outputs[1].tensor());
        // The gradient of another output, of which the codes are those of yet another.
        let joined = tensor(&device, DType::F32, 8, &[TOKENS, 2 * INNER]);
        let mut gradients = tape.no_gradients();
        let factors = all.gradient_factors().unwrap();
        let rows = fp8.quantise_rows(&joined, Some(&factors)).unwrap();
        let d_out = tensor(&device, DType::F32, 9, &[TOKENS, 2 * INNER]);
        for (index, part) in d_out.split_columns(&[INNER; 2]).unwrap().into_iter().enumerate() {
            let codes = gradient.map(|(shift, is_own)| GradientCodes {
                rows: rows.clone(),
                factors: if is_own { factors.clone() } else { factors.copy(Category::Workspace).unwrap() },
                first: index * INNER + shift,
            });
            gradients.add_with_codes(outputs[index].slot().unwrap(), part, codes).unwrap();
        }
        let mut gradients = tape.run_nodes(gradients).unwrap();
        (result, bits(&gradients.take(leaf.slot().unwrap()).unwrap()))
    };
    let (plain, plain_gradient) = run(None, None);
    let (same, same_gradient) = run(Some(fp8.quantise_rows(&x(), None).unwrap()), Some((INNER, true)));
    assert!(same == plain && same_gradient == plain_gradient, "codes of columns elsewhere are not read");
    let (changed, same_gradient) = run(Some(fp8.quantise_rows(&other(), None).unwrap()), Some((0, false)));
    assert!(changed != plain && same_gradient == plain_gradient, "nor those with other factors");
    assert!(run(None, Some((0, true))).1 != plain_gradient);
}

#[test]
fn what_is_added_to_a_gradient_takes_its_codes_away() {
    let Some(device) = device(Fp8Scaling::Rows) else { return };
    let tape = Tape::recording();
    let leaf = tape.leaf(tensor(&device, DType::F32, 1, &[2, 16]));
    let slot = leaf.slot().unwrap();
    let gradient = |seed| tensor(&device, DType::F32, seed, &[2, 16]);
    let codes = || {
        let rows = device.kernels().fp8().unwrap().quantise_rows(&gradient(2), None).unwrap();
        Some(GradientCodes { rows, factors: gradient(3), first: 0 })
    };
    let mut gradients = tape.no_gradients();
    gradients.add_with_codes(slot, gradient(2), codes()).unwrap();
    assert!(gradients.take_with_codes(slot).unwrap().1.is_some());
    gradients.add_with_codes(slot, gradient(2), codes()).unwrap();
    gradients.add_with_codes(slot, gradient(4), codes()).unwrap();
    assert!(gradients.take_with_codes(slot).unwrap().1.is_none());
}

#[test]
fn columns_hand_the_codes_of_their_gradients_on_where_they_are_of_all_of_them() {
    let Some(device) = device(Fp8Scaling::Rows) else { return };
    let fp8 = device.kernels().fp8().unwrap();
    let whole = tensor(&device, DType::F32, 1, &[2, 48]);
    let factors = tensor(&device, DType::F32, 2, &[48]);
    let rows = [1, 2].map(|_| fp8.quantise_rows(&whole, Some(&factors)).unwrap());
    // Each part's first column, and which codes it has, if any.
    for (parts, expected) in [
        ([(0, Some(0)), (32, Some(0))], Some(0)),
        ([(8, Some(0)), (40, Some(0))], Some(8)),
        ([(0, Some(0)), (16, Some(0))], None),
        ([(0, Some(0)), (32, Some(1))], None),
        ([(0, Some(0)), (32, None)], None),
        ([(0, None), (32, Some(0))], None),
    ] {
        let tape = Tape::recording();
        let leaf = tape.leaf(tensor(&device, DType::F32, 3, &[2, 48]));
        let slot = leaf.slot().unwrap();
        let outputs = crate::ops::split_columns(&tape, leaf, &[32, 16]).unwrap();
        let mut gradients = tape.no_gradients();
        let columns = whole.copy(Category::Workspace).unwrap().split_columns(&[32, 16]).unwrap();
        for ((output, part), (first, codes)) in outputs.iter().zip(columns).zip(parts) {
            let carried =
                |index: usize| GradientCodes { rows: rows[index].clone(), factors: factors.clone(), first };
            gradients.add_with_codes(output.slot().unwrap(), part, codes.map(carried)).unwrap();
        }
        let (gradient, codes) = tape.run_nodes(gradients).unwrap().take_with_codes(slot).unwrap();
        assert_eq!(bits(&gradient), bits(&whole));
        assert_eq!(codes.map(|codes| codes.first), expected, "{parts:?}");
    }
}

#[test]
fn a_residual_and_a_bias_go_with_the_adapter() {
    for scaling in SCALINGS {
        let Some(device) = device(scaling) else { return };
        let one = group(&device, DType::F32, 20, &[[INNER, WIDTH]], true);
        let tape = Tape::off();
        let x = Var::constant(tensor(&device, DType::F32, 1, &[TOKENS, WIDTH]));
        let residual = tensor(&device, DType::F32, 2, &[TOKENS, INNER]);
        let run = |residual: Option<&Var>| {
            let options = LinearOptions { residual, ..LinearOptions::default() };
            linear_group(&tape, &x, &one, options).unwrap().remove(0).tensor().to_f32_vec().unwrap()
        };
        let with = run(Some(&Var::constant(residual.clone())));
        let added = residual.to_f32_vec().unwrap();
        let expected: Vec<f32> = run(None).iter().zip(&added).map(|(a, b)| a + b).collect();
        assert_close(&format!("{scaling:?}"), &with, &expected, 1e-5);
        // Bias, base and adapter one by one.
        let lora = one.layers()[0].lora.as_ref().unwrap();
        let fp8 = device.kernels().fp8().unwrap();
        let rounded = fp8.quantise_rows(x.tensor(), None).unwrap();
        let mut base = tensor(&device, DType::F32, 3, &[TOKENS, INNER]);
        fp8.multiply(&rounded, &one.quantised_rows().unwrap(), &mut base, &Finish::STORE).unwrap();
        let [x, a, b] = [x.tensor().clone(), lora.a.value().clone(), lora.b.value().clone()]
            .map(|tensor| tensor.to_f32_vec().unwrap());
        let bias = one.layers()[0].bias.as_ref().unwrap().value().to_f32_vec().unwrap();
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
        let base = base.to_f32_vec().unwrap();
        let all: Vec<f32> = (0..TOKENS * INNER)
            .map(|i| {
                let (token, n) = (i / INNER, i % INNER);
                let row = &x[token * WIDTH..][..WIDTH];
                let reduced: Vec<f32> = a.chunks(WIDTH).map(|a| 0.5 * dot(row, a)).collect();
                base[i] + dot(&reduced, &b[n * 3..][..3]) + bias[n] + added[i]
            })
            .collect();
        assert_close(&format!("{scaling:?}, one by one"), &with, &all, 1e-5);
    }
}
