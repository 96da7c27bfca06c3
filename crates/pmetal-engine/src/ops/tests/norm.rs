use super::*;
use crate::device::NormWeight;
use crate::{ops, reference};

on_every_device! {
    rms_norm_and_its_gradients_agree_with_the_reference,
    a_norm_adds_to_a_gradient_that_has_arrived_and_to_its_weight_again,
}

const EPSILON: f32 = 1e-5;

/// Shapes: rows, heads of a row (0 = two-dimensional), width.
const SHAPES: [[usize; 3]; 7] =
    [[0, 0, 5], [1, 0, 1], [3, 0, 7], [65, 0, 37], [130, 0, 64], [65, 3, 20], [1100, 2, 9]];

fn shape_of([rows, heads, width]: [usize; 3]) -> Vec<usize> {
    if heads == 0 { vec![rows, width] } else { vec![rows, heads, width] }
}

fn rms_norm_and_its_gradients_agree_with_the_reference(device: &Device) {
    for (index, size) in SHAPES.into_iter().enumerate() {
        for variant in 0..3 * types(device).len() {
            let dtype = types(device)[variant / 3];
            let (kind, weighted) =
                [(NormWeight::Plain, true), (NormWeight::PlusOne, true), (NormWeight::Plain, false)]
                    [variant % 3];
            let trained = (index + variant) % 4 != 0;
            let (shape, width) = (shape_of(size), size[2]);
            let count = shape.iter().product();
            let what = format!("{kind:?} {weighted} {dtype} {shape:?}");
            let weight_count = if weighted { width } else { 0 };
            let inputs = vec![numbers("x", count, dtype), numbers("w", weight_count, DType::Bf16)];
            let w = weighted.then(|| weight(device, trained, DType::Bf16, &[width], &inputs[1]));
            let d_y = numbers("d_y", count, dtype);
            let tape = Tape::recording();
            let x = tape.leaf(tensor(device, dtype, &shape, &inputs[0]));
            let y = ops::rms_norm(&tape, &x, w.as_ref(), kind, EPSILON).unwrap();
            assert_eq!(y.tensor().shape(), shape);
            let function = |inputs: &[Vec<f64>]| {
                reference::rms_norm(&inputs[0], &inputs[1], width, kind, f64::from(EPSILON))
            };
            assert_close(&what, &wide(y.tensor()), &function(&inputs), tolerance(dtype));
            let mut gradients = tape.backward(&y, tensor(device, dtype, &shape, &d_y)).unwrap();
            let ours = [arrived(&mut gradients, &x), w.as_ref().and_then(gradient_of)];
            // A width of one has an input gradient of almost nothing; only its size relative to d_y is meaningful.
            let error = if width == 1 { 1.0 } else { tolerance(dtype) };
            assert_gradients(&what, &function, &inputs, &d_y, &ours, error);
        }
    }
}

fn a_norm_adds_to_a_gradient_that_has_arrived_and_to_its_weight_again(device: &Device) {
    let (shape, width) = ([33, 21], 21);
    for &dtype in types(device) {
        let inputs =
            vec![numbers("x", 33 * 21, dtype), numbers("w0", 21, DType::F32), numbers("w1", 21, DType::F32)];
        let weights = [1, 2].map(|index| weight(device, true, DType::F32, &[width], &inputs[index]));
        let tape = Tape::recording();
        let x = tape.leaf(tensor(device, dtype, &shape, &inputs[0]));
        // x has two users, and the first weight has two.
        let first = ops::rms_norm(&tape, &x, Some(&weights[0]), NormWeight::Plain, EPSILON).unwrap();
        let second = ops::rms_norm(&tape, &x, Some(&weights[1]), NormWeight::PlusOne, EPSILON).unwrap();
        let third = ops::rms_norm(&tape, &second, Some(&weights[0]), NormWeight::Plain, EPSILON).unwrap();
        let y = ops::gated(&tape, crate::device::GateActivation::Silu, &first, &third).unwrap();
        let function = |inputs: &[Vec<f64>]| {
            let epsilon = f64::from(EPSILON);
            let first = reference::rms_norm(&inputs[0], &inputs[1], width, NormWeight::Plain, epsilon);
            let second = reference::rms_norm(&inputs[0], &inputs[2], width, NormWeight::PlusOne, epsilon);
            let third = reference::rms_norm(&second, &inputs[1], width, NormWeight::Plain, epsilon);
            reference::gated(crate::device::GateActivation::Silu, &first, &third)
        };
        let d_y = numbers("d_y", 33 * 21, dtype);
        let mut gradients = tape.backward(&y, tensor(device, dtype, &shape, &d_y)).unwrap();
        let [w0, w1] = weights.each_ref().map(gradient_of);
        let ours = [arrived(&mut gradients, &x), w0, w1];
        let error = if dtype == DType::F32 { F32_ERROR } else { 2.0 * tolerance(dtype) };
        assert_gradients("two users", &function, &inputs, &d_y, &ours, error);
    }
}

#[test]
fn rms_norm_has_the_same_bits_everywhere() {
    assert_same_bits_everywhere("rms_norm", &|| {
        let device = Device::cpu();
        let mut results = Vec::new();
        for dtype in [DType::F32, DType::Bf16] {
            let (shape, count) = ([2100, 27], 2100 * 27);
            let w = weight(&device, true, DType::F32, &[27], &numbers("w", 27, DType::F32));
            let tape = Tape::recording();
            let x = tape.leaf(tensor(&device, dtype, &shape, &numbers("x", count, dtype)));
            let y = ops::rms_norm(&tape, &x, Some(&w), NormWeight::PlusOne, EPSILON).unwrap();
            let d_y = tensor(&device, dtype, &shape, &numbers("d_y", count, dtype));
            let mut gradients = tape.backward(&y, d_y).unwrap();
            results.push(bits(y.tensor()));
            results.push(bits(&gradients.take(x.slot().unwrap()).unwrap()));
            results.push(bits(&parameter(&w).gradient().unwrap()));
        }
        results
    });
}

#[test]
fn a_norm_weight_of_another_width_is_refused() {
    let device = Device::cpu();
    let x = Var::constant(tensor(&device, DType::F32, &[2, 3], &[1.0; 6]));
    let w = weight(&device, false, DType::F32, &[2], &[1.0; 2]);
    assert!(ops::rms_norm(&Tape::off(), &x, Some(&w), NormWeight::Plain, EPSILON).is_err());
}
