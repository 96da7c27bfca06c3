//! Weights of eight bits: rounding to the bit, products and their gradients against dequantised matrices.

use super::*;
use crate::device::gpu::runtime::Fp8Scaling;
use crate::device::{Finish, ScaledRows, e4m3_value};
use crate::ops::{Linear, LinearGroup, LinearOptions, Lora, linear_group};
use crate::{Parameter, Tape, Weight};

/// The code nearest to a number by trying all, the even one where two are as near.
fn nearest(value: f32) -> u8 {
    let sign = if value.is_sign_negative() { 0x80 } else { 0 };
    if value.is_nan() {
        return sign | 0x7f;
    }
    let distance = |code: u8| (f64::from(e4m3_value(code)) - f64::from(value.abs())).abs();
    let by_distance = |a: &u8, b: &u8| distance(*a).total_cmp(&distance(*b)).then((a & 1).cmp(&(b & 1)));
    sign | (0..0x7f_u8).min_by(by_distance).unwrap()
}

fn device(scaling: Fp8Scaling) -> Option<Device> {
    emulated(1).map(|_| Device::gpu(Arc::new(Emulator::with_fp8(1, scaling))))
}

fn rounded(device: &Device, shape: &[usize], values: &[f32]) -> (Vec<u8>, Vec<f32>) {
    let x = Tensor::from_slice(device, Category::Workspace, shape, values).unwrap();
    let rows = device.kernels().fp8().unwrap().quantise_rows(&x, None).unwrap();
    (rows.codes.to_vec().unwrap(), rows.scales.to_vec().unwrap())
}

#[test]
fn every_code_and_every_half_between_codes_rounds_to_the_even_neighbour() {
    let Some(device) = device(Fp8Scaling::Rows) else { return };
    let mut values = Vec::new();
    for code in 0..0x7f_u8 {
        let (here, next) = (e4m3_value(code), e4m3_value((code + 1).min(0x7e)));
        let half = (here + next) / 2.0;
        let near =
            [here, half, f32::from_bits(half.to_bits() + 1), f32::from_bits(half.to_bits().max(1) - 1)];
        values.extend(near.into_iter().filter(|value| *value <= 448.0).flat_map(|value| [value, -value]));
    }
    values.extend([1e-12, -1e-12, f32::from_bits(1), f32::NAN, -f32::NAN]);
    // Aligned rows are read by vectors, others one by one.
    for count in [values.len(), values.len().next_multiple_of(8)] {
        values.resize(count, 0.0);
        let (codes, scales) = rounded(&device, &[1, count], &values);
        assert_eq!(scales, [1.0], "the greatest size is 448");
        for (value, code) in values.iter().zip(codes) {
            assert_eq!(code, nearest(*value), "{value} ({:#x})", value.to_bits());
        }
    }
    assert_eq!((e4m3_value(1), e4m3_value(8), e4m3_value(0x7e)), (1.0 / 512.0, 1.0 / 64.0, 448.0));
    assert!(e4m3_value(0x7f).is_nan() && e4m3_value(0xff).is_nan());
}

#[test]
fn rows_are_scaled_by_their_greatest_size_and_what_is_not_finite_stays_so() {
    let Some(device) = device(Fp8Scaling::Rows) else { return };
    for columns in [16, 21, 40, 1000] {
        let mut values = numbers(columns as u64, 4 * columns);
        values[..columns].iter_mut().for_each(|value| *value *= 1e-3);
        values[columns..2 * columns].fill(0.0);
        values[2 * columns + 3] = f32::INFINITY;
        let (codes, scales) = rounded(&device, &[4, columns], &values);
        for row in [0, 3] {
            let own = &values[row * columns..][..columns];
            let greatest = own.iter().fold(0.0_f32, |most, value| most.max(value.abs()));
            assert_eq!(scales[row], 1.0 / (448.0 / greatest));
            let expected: Vec<u8> = own.iter().map(|value| nearest(value * (448.0 / greatest))).collect();
            assert_eq!(codes[row * columns..][..columns], expected, "{columns} columns");
        }
        assert!(codes[columns..2 * columns].iter().all(|code| *code == 0) && scales[1].is_finite());
        assert_eq!(codes[2 * columns + 3] & 0x7f, 0x7f, "infinity times a factor of zero is no number");
    }
}

#[test]
fn the_transpose_of_codes_has_every_code_in_its_place() {
    let Some(device) = device(Fp8Scaling::Rows) else { return };
    for [rows, columns] in [[16, 16], [48, 80], [128, 128], [272, 144], [80, 16]] {
        let values: Vec<u8> = (0..rows * columns).map(|i| (i * 7 + i / 251) as u8).collect();
        let codes = Tensor::from_slice(&device, Category::Workspace, &[rows, columns], &values).unwrap();
        let turned = device.kernels().fp8().unwrap().transpose_codes(&codes).unwrap();
        assert_eq!(turned.shape(), [columns, rows]);
        let expected: Vec<u8> = (0..rows * columns).map(|i| values[i % rows * columns + i / rows]).collect();
        assert_eq!(turned.to_vec::<u8>().unwrap(), expected, "{rows} x {columns}");
    }
}

const WIDTH: usize = 48;
const FEATURES: [usize; 2] = [32, 16];
const TOKENS: usize = 5;

fn layers(device: &Device) -> Vec<Linear> {
    let tensor = |seed, shape: &[usize]| {
        let values = numbers(seed, shape.iter().product());
        Tensor::from_slice(device, Category::Weights, shape, &values).unwrap()
    };
    let trained = |seed, shape: &[usize]| Weight::Trainable(Parameter::new("adapter", tensor(seed, shape)));
    let layer = |(index, &features): (usize, &usize)| {
        let seed = 10 * index as u64;
        let (a, b) = (trained(seed + 1, &[3, WIDTH]), trained(seed + 2, &[features, 3]));
        Linear {
            weight: Weight::Frozen(tensor(seed + 3, &[features, WIDTH])),
            bias: (index == 1).then(|| Weight::Frozen(tensor(seed + 4, &[features]))),
            lora: Some(Lora { a, b, scale: 0.5, dropout: 0.0, stream: 0 }),
        }
    };
    FEATURES.iter().enumerate().map(layer).collect()
}

/// Values of codes times the scales of their rows.
fn dequantised(rows: &ScaledRows) -> Vec<f32> {
    let (codes, scales) = (rows.codes.to_vec::<u8>().unwrap(), rows.scales.to_vec::<f32>().unwrap());
    let width = rows.codes.columns();
    codes.iter().enumerate().map(|(i, &code)| e4m3_value(code) * scales[i / width]).collect()
}

/// Results of the layers, the input's gradient and those of the adapters.
fn pass(device: &Device, group: &LinearGroup, x: &[f32], d_out: [&[f32]; 2]) -> Vec<Vec<f32>> {
    let tensor = |shape: &[usize], values: &[f32]| {
        Tensor::from_slice(device, Category::Workspace, shape, values).unwrap()
    };
    let tape = Tape::recording();
    let leaf = tape.leaf(tensor(&[TOKENS, WIDTH], x));
    let outputs = linear_group(&tape, &leaf, group, LinearOptions::default()).unwrap();
    let mut results: Vec<Vec<f32>> =
        outputs.iter().map(|output| output.tensor().to_f32_vec().unwrap()).collect();
    // The sum of out * d_out over a layer with the identity for a weight gives each layer its gradient.
    let mut joined = None;
    for (output, d_out) in outputs.iter().zip(d_out) {
        let weight =
            Weight::Frozen(tensor(&[1, output.tensor().columns()], &d_out[..output.tensor().columns()]));
        let layer = Linear { weight, bias: None, lora: None };
        let options = LinearOptions { residual: joined.as_ref(), ..LinearOptions::default() };
        joined = Some(crate::ops::linear(&tape, output, &layer, options).unwrap());
    }
    drop(outputs);
    let joined = joined.unwrap();
    let factors: Vec<f32> = (0..TOKENS).map(|token| 1.0 + token as f32).collect();
    let mut gradients = tape.backward(&joined, tensor(&[TOKENS, 1], &factors)).unwrap();
    results.push(gradients.take(leaf.slot().unwrap()).unwrap().to_f32_vec().unwrap());
    for lora in group.layers().iter().filter_map(|layer| layer.lora.as_ref()) {
        let gradient = |weight: &Weight| weight.parameter().unwrap().gradient().unwrap();
        results.extend([&lora.a, &lora.b].map(|weight| gradient(weight).to_f32_vec().unwrap()));
    }
    results
}

/// The results that codes give: base from the rounded input, adapter from the input itself, bias.
fn expected_results(device: &Device, weight: &ScaledRows, group: &LinearGroup, x: &[f32]) -> Vec<Vec<f32>> {
    let values = dequantised(weight);
    let (codes, scales) = rounded(device, &[TOKENS, WIDTH], x);
    let dot = |a: &mut dyn Iterator<Item = f32>, b: &[f32]| a.zip(b).map(|(a, b)| a * b).sum::<f32>();
    let mut first = 0;
    let mut all = Vec::new();
    for (layer, &features) in group.layers().iter().zip(&FEATURES) {
        let lora = layer.lora.as_ref().unwrap();
        let (a, b) = (lora.a.value().to_f32_vec().unwrap(), lora.b.value().to_f32_vec().unwrap());
        let bias = layer.bias.as_ref().map(|bias| bias.value().to_f32_vec().unwrap());
        let mut out = Vec::new();
        for token in 0..TOKENS {
            let own = &x[token * WIDTH..][..WIDTH];
            let codes = &codes[token * WIDTH..][..WIDTH];
            let reduced: Vec<f32> = a.chunks(WIDTH).map(|a| 0.5 * dot(&mut own.iter().copied(), a)).collect();
            for n in 0..features {
                let row = &values[(first + n) * WIDTH..][..WIDTH];
                let base = dot(&mut codes.iter().map(|&code| e4m3_value(code) * scales[token]), row);
                let adapter = dot(&mut reduced.iter().copied(), &b[n * 3..][..3]);
                out.push(base + adapter + bias.as_ref().map_or(0.0, |bias| bias[n]));
            }
        }
        first += features;
        all.push(out);
    }
    all
}

/// The gradient of x that codes give: d_out times the weights' scales is rounded, and so are the weights.
fn expected_d_input(
    device: &Device,
    weight: &ScaledRows,
    group: &LinearGroup,
    d_out: [&[f32]; 2],
) -> Vec<f32> {
    let features: usize = FEATURES.iter().sum();
    let scales = weight.scales.to_vec::<f32>().unwrap();
    let codes = weight.codes.to_vec::<u8>().unwrap();
    let row: Vec<f32> = d_out[0][..FEATURES[0]].iter().chain(&d_out[1][..FEATURES[1]]).copied().collect();
    let weighted: Vec<f32> = (0..TOKENS)
        .flat_map(|token| row.iter().zip(&scales).map(move |(d, scale)| d * (1.0 + token as f32) * scale))
        .collect();
    let (rounded_codes, rounded_scales) = rounded(device, &[TOKENS, features], &weighted);
    let mut all = vec![0.0; TOKENS * WIDTH];
    for token in 0..TOKENS {
        for output in 0..features {
            let d = e4m3_value(rounded_codes[token * features + output]) * rounded_scales[token];
            for i in 0..WIDTH {
                all[token * WIDTH + i] += d * e4m3_value(codes[output * WIDTH + i]);
            }
        }
        let mut first = 0;
        for (layer, &features) in group.layers().iter().zip(&FEATURES) {
            let lora = layer.lora.as_ref().unwrap();
            let (a, b) = (lora.a.value().to_f32_vec().unwrap(), lora.b.value().to_f32_vec().unwrap());
            for rank in 0..3 {
                let d: f32 =
                    (0..features).map(|n| row[first + n] * (1.0 + token as f32) * b[n * 3 + rank]).sum();
                (0..WIDTH).for_each(|i| all[token * WIDTH + i] += 0.5 * d * a[rank * WIDTH + i]);
            }
            first += features;
        }
    }
    all
}

#[test]
fn a_group_with_weights_of_eight_bits_computes_what_its_codes_mean() {
    for scaling in [Fp8Scaling::Rows, Fp8Scaling::RowsAndAddend, Fp8Scaling::Afterwards] {
        let Some(device) = device(scaling) else { return };
        let x = numbers(100, TOKENS * WIDTH);
        let d_out = [numbers(101, FEATURES[0]), numbers(102, FEATURES[1])];
        let d_out = [&d_out[0][..], &d_out[1][..]];

        let mut group = LinearGroup::new(layers(&device));
        assert!(group.quantise().unwrap());
        // Packed twice, as when adapters come after loading.
        group.pack(DType::F32).unwrap();
        let _ = group.layers_mut();
        group.pack(DType::F32).unwrap();
        assert_eq!(group.spare(), 0);
        let weight = group.quantised_rows().unwrap();
        let actual = pass(&device, &group, &x, d_out);

        // The same layers with the weights that the codes stand for, on the input that its codes stand for.
        let mut plain = layers(&device);
        let values = dequantised(&weight);
        let mut row = 0;
        for layer in &mut plain {
            let features = layer.weight.shape()[0];
            let part = &values[row * WIDTH..][..features * WIDTH];
            let shape = [features, WIDTH];
            layer.weight =
                Weight::Frozen(Tensor::from_slice(&device, Category::Weights, &shape, part).unwrap());
            row += features;
        }
        let plain = LinearGroup::new(plain);
        let reference = pass(&device, &plain, &x, d_out);
        let exact = pass(&device, &LinearGroup::new(layers(&device)), &x, d_out);

        let difference = |a: &[f32], b: &[f32]| {
            let of = |values: &mut dyn Iterator<Item = f32>| values.map(|x| x * x).sum::<f32>().sqrt();
            of(&mut a.iter().zip(b).map(|(a, b)| a - b)) / of(&mut b.iter().copied())
        };
        let expected = expected_results(&device, &weight, &group, &x);
        for index in 0..2 {
            assert_close(&format!("{scaling:?}, result {index}"), &actual[index], &expected[index], 1e-5);
            let error = difference(&actual[index], &exact[index]);
            assert!(error > 1e-4 && error < 0.05, "{scaling:?}: rounding changed result {index} by {error}");
        }
        let expected = expected_d_input(&device, &weight, &group, d_out);
        assert_close("gradient of the input", &actual[2], &expected, 1e-4);
        assert!(difference(&actual[2], &exact[2]) < 0.06);
        for index in 3..actual.len() {
            assert_close("gradient of an adapter", &actual[index], &reference[index], 1e-5);
        }
    }
}

#[test]
fn products_of_codes_have_scales_bias_and_addend() {
    for scaling in [Fp8Scaling::Rows, Fp8Scaling::RowsAndAddend, Fp8Scaling::Afterwards] {
        let Some(device) = device(scaling) else { return };
        let (rows, columns, inner) = (3, 32, 16);
        let tensor = |seed, shape: &[usize]| {
            let values = numbers(seed, shape.iter().product());
            Tensor::from_slice(&device, Category::Workspace, shape, &values).unwrap()
        };
        let fp8 = device.kernels().fp8().unwrap();
        let left = fp8.quantise_rows(&tensor(1, &[rows, inner]), None).unwrap();
        let right = fp8.quantise_rows(&tensor(2, &[columns, inner]), Some(&tensor(3, &[inner]))).unwrap();
        let (bias, addend) = (tensor(4, &[columns]), tensor(5, &[rows, columns]));
        let mut out = tensor(6, &[rows, columns]);
        let finish = Finish { bias: Some(&bias), residual: Some(&addend), ..Finish::STORE };
        fp8.multiply(&left, &right, &mut out, &finish).unwrap();
        let mut held = tensor(5, &[rows, columns]);
        let finish = Finish { bias: Some(&bias), ..Finish::ACCUMULATE };
        fp8.multiply(&left, &right, &mut held, &finish).unwrap();
        let (a, b) = (dequantised(&left), dequantised(&right));
        let (bias, addend) = (bias.to_f32_vec().unwrap(), addend.to_f32_vec().unwrap());
        let expected: Vec<f32> = (0..rows * columns)
            .map(|i| {
                let (row, column) = (i / columns, i % columns);
                let sum: f32 = (0..inner).map(|k| a[row * inner + k] * b[column * inner + k]).sum();
                sum + bias[column] + addend[i]
            })
            .collect();
        assert_close(&format!("{scaling:?}"), &out.to_f32_vec().unwrap(), &expected, 1e-5);
        assert_close(
            &format!("{scaling:?} onto what is there"),
            &held.to_f32_vec().unwrap(),
            &expected,
            1e-5,
        );
    }
}

#[test]
fn what_cannot_be_rounded_stays_or_is_refused() {
    let mut on_cpu = LinearGroup::new(layers(&Device::cpu()));
    let error = on_cpu.quantise().unwrap_err().to_string();
    assert!(error.contains("the processor has no products of 8-bit floats"), "{error}");
    let Some(device) = device(Fp8Scaling::Rows) else { return };
    let odd = Tensor::zeros(&device, Category::Weights, DType::F32, &[24, WIDTH]).unwrap();
    let mut group = LinearGroup::new(vec![Linear { weight: Weight::Frozen(odd), bias: None, lora: None }]);
    assert!(!group.quantise().unwrap());
    assert_eq!(group.layers()[0].weight.value().dtype(), DType::F32);
    let mut group = LinearGroup::new(layers(&device));
    group.quantise().unwrap();
    group.layers_mut()[0].lora.as_mut().unwrap().dropout = 0.1;
    assert!(group.pack(DType::F32).unwrap_err().to_string().contains("drop elements"));
}

#[test]
fn a_vector_is_aligned_when_its_address_is() {
    use crate::device::gpu::launch::is_aligned;
    let Some(device) = device(Fp8Scaling::Rows) else { return };
    let zeros = |shape: &[usize]| Tensor::zeros(&device, Category::Workspace, DType::F32, shape).unwrap();
    let (vector, matrix) = (zeros(&[24]), zeros(&[3, 24]));
    assert!(is_aligned(24, &[&vector, &matrix]));
    assert!(!is_aligned(20, &[&vector]));
    let odd = zeros(&[3, 27]).split_columns(&[24, 3]).unwrap().remove(0);
    assert!(!is_aligned(24, &[&vector, &odd]), "rows do not start at vectors");
}
