use super::*;
use crate::ops::Spare;
use crate::tape::Saved;
use crate::{ops, reference};

on_every_device! {
    layer_norm_and_its_gradients_agree_with_the_reference,
    a_layer_norm_is_computed_again_and_adds_to_a_gradient_that_has_arrived,
    a_mean_far_from_zero_leaves_the_variance_exact,
    rows_to_spare_change_nothing,
}

const EPSILON: f32 = 1e-5;

/// Shapes: rows, heads of a row (0 = two-dimensional), width.
const SHAPES: [[usize; 3]; 8] =
    [[0, 0, 5], [1, 0, 1], [3, 0, 7], [65, 0, 37], [70, 0, 64], [65, 3, 20], [5, 2, 64], [1100, 2, 9]];

/// Whether there is a weight and a bias, and whether each head has its own where there are heads.
const VARIANTS: [[(bool, bool); 2]; 5] = [
    [(true, false), (false, false)],
    [(true, true), (false, false)],
    [(true, true), (true, false)],
    [(true, false), (true, true)],
    [(false, false), (true, true)],
];

fn norm(tape: &Tape, x: &Var, weights: [&Option<Weight>; 2]) -> Var {
    let [weight, bias] = weights.map(Option::as_ref);
    ops::layer_norm(tape, x, weight, bias, EPSILON, Spare::default()).unwrap()
}

fn layer_norm_and_its_gradients_agree_with_the_reference(device: &Device) {
    for (index, [rows, heads, width]) in SHAPES.into_iter().enumerate() {
        for number in 0..VARIANTS.len() * types(device).len() {
            let dtype = types(device)[number / VARIANTS.len()];
            let variant = VARIANTS[number % VARIANTS.len()];
            if is_slow(device) && rows > 100 && dtype != DType::F32 {
                continue;
            }
            let shape = if heads == 0 { vec![rows, width] } else { vec![rows, heads, width] };
            let what = format!("{variant:?} {dtype} {shape:?}");
            let count: usize = shape.iter().product();
            let own =
                |for_each_head: bool| if for_each_head { &shape[1..] } else { &shape[shape.len() - 1..] };
            let mut inputs = vec![numbers("x", count, dtype)];
            let weights = [0, 1].map(|which| {
                let (exists, for_each_head) = variant[which];
                let shape = own(for_each_head);
                let count = if exists { shape.iter().product() } else { 0 };
                inputs.push(numbers(["w", "b"][which], count, DType::Bf16));
                // The types differ now and then.
                let trained = (index + number + which) % 3 != 0;
                exists.then(|| weight(device, trained, DType::Bf16, shape, &inputs[which + 1]))
            });
            let d_y = numbers("d_y", count, dtype);
            let tape = Tape::recording();
            let x = tape.leaf(tensor(device, dtype, &shape, &inputs[0]));
            let y = norm(&tape, &x, weights.each_ref());
            assert_eq!(y.tensor().shape(), shape);
            let function = |inputs: &[Vec<f64>]| {
                reference::layer_norm(&inputs[0], &inputs[1], &inputs[2], width, f64::from(EPSILON))
            };
            assert_close(&what, &wide(y.tensor()), &function(&inputs), tolerance(dtype));
            let mut gradients = tape.backward(&y, tensor(device, dtype, &shape, &d_y)).unwrap();
            let [d_weight, d_bias] = weights.each_ref().map(|weight| weight.as_ref().and_then(gradient_of));
            let ours = [arrived(&mut gradients, &x), d_weight, d_bias];
            // Rows of one element have no variance, and thus no gradient.
            let error = if width == 1 { 1.0 } else { tolerance(dtype) };
            assert_gradients(&what, &function, &inputs, &d_y, &ours, error);
        }
    }
}

fn a_layer_norm_is_computed_again_and_adds_to_a_gradient_that_has_arrived(device: &Device) {
    let (shape, width) = ([33, 21], 21);
    for &dtype in types(device) {
        let inputs =
            vec![numbers("x", 33 * 21, dtype), numbers("w", 21, DType::F32), numbers("b", 21, DType::F32)];
        let weights = [1, 2].map(|index| Some(weight(device, true, DType::F32, &[width], &inputs[index])));
        let [w, b] = weights.each_ref();
        let tape = Tape::recording();
        let x = tape.leaf(tensor(device, dtype, &shape, &inputs[0]));
        // x has two users, and the weight has two.
        let (first, second) = (norm(&tape, &x, [w, b]), norm(&tape, &x, [&None, b]));
        let third = norm(&tape, &second, [w, &None]);
        assert!([&first, &second, &third].iter().all(|var| matches!(var.save(), Saved::Again(_))));
        let y = ops::gated(&tape, crate::device::GateActivation::Silu, &first, &third).unwrap();
        let function = |inputs: &[Vec<f64>]| {
            let norm =
                |x: &[f64], w: &[f64], b: &[f64]| reference::layer_norm(x, w, b, width, f64::from(EPSILON));
            let first = norm(&inputs[0], &inputs[1], &inputs[2]);
            let third = norm(&norm(&inputs[0], &[], &inputs[2]), &inputs[1], &[]);
            reference::gated(crate::device::GateActivation::Silu, &first, &third)
        };
        let d_y = numbers("d_y", 33 * 21, dtype);
        let mut gradients = tape.backward(&y, tensor(device, dtype, &shape, &d_y)).unwrap();
        let [d_w, d_b] = weights.each_ref().map(|weight| weight.as_ref().and_then(gradient_of));
        let ours = [arrived(&mut gradients, &x), d_w, d_b];
        let error = if dtype == DType::F32 { F32_ERROR } else { 2.0 * tolerance(dtype) };
        assert_gradients("two users", &function, &inputs, &d_y, &ours, error);
    }
}

fn a_mean_far_from_zero_leaves_the_variance_exact(device: &Device) {
    for width in [64, 37] {
        let values = numbers("x", 3 * width, DType::F32);
        let values: Vec<f64> = values.iter().map(|x| f64::from((64.0 + 0.5 * x) as f32)).collect();
        let x = Var::constant(tensor(device, DType::F32, &[3, width], &values));
        let y = norm(&Tape::off(), &x, [&None, &None]);
        let expected = reference::layer_norm(&values, &[], &[], width, f64::from(EPSILON));
        // The mean is rounded to 2^-18 of it, which is this much of the deviation.
        assert_close("far", &wide(y.tensor()), &expected, 1e-4);
    }
}

fn rows_to_spare_change_nothing(device: &Device) {
    for shape in [&[6, 40][..], &[6, 2, 20]] {
        let values = numbers("x", 240, DType::F32);
        let spare = Spare { result: 8, gradient: 8, ..Spare::default() };
        let results = [Spare::default(), spare].map(|spare| {
            // Only devices have them, as those who ask for them know.
            let spare = if device.is_host() { Spare::default() } else { spare };
            let tape = Tape::recording();
            let x = tape.leaf(tensor(device, DType::F32, shape, &values));
            let y = ops::layer_norm(&tape, &x, None, None, EPSILON, spare).unwrap();
            let again = y.save().get().unwrap();
            let d_y = tensor(device, DType::F32, shape, &numbers("d_y", 240, DType::F32));
            let mut gradients = tape.backward(&y, d_y).unwrap();
            [bits(y.tensor()), bits(&again), bits(&gradients.take(x.slot().unwrap()).unwrap())]
        });
        assert_eq!(results[0], results[1]);
    }
}

#[test]
fn layer_norm_has_the_same_bits_everywhere() {
    assert_same_bits_everywhere("layer_norm", &|| {
        let device = Device::cpu();
        let mut results = Vec::new();
        for dtype in [DType::F32, DType::Bf16] {
            let (shape, count) = ([1100, 2, 27], 1100 * 54);
            let weights = ["w", "b"].map(|name| {
                Some(weight(&device, true, DType::F32, &[2, 27], &numbers(name, 54, DType::F32)))
            });
            let tape = Tape::recording();
            let x = tape.leaf(tensor(&device, dtype, &shape, &numbers("x", count, dtype)));
            let y = norm(&tape, &x, weights.each_ref());
            let d_y = tensor(&device, dtype, &shape, &numbers("d_y", count, dtype));
            let mut gradients = tape.backward(&y, d_y).unwrap();
            results.push(bits(y.tensor()));
            results.push(bits(&gradients.take(x.slot().unwrap()).unwrap()));
            results
                .extend(weights.iter().flatten().map(|weight| bits(&parameter(weight).gradient().unwrap())));
        }
        results
    });
}

#[test]
fn weights_of_another_shape_are_refused() {
    let device = Device::cpu();
    for (shape, own) in
        [(&[2, 3][..], &[2][..]), (&[2, 3], &[2, 3]), (&[2, 4, 3], &[3, 4]), (&[2, 4, 3], &[12])]
    {
        let x = Var::constant(tensor(&device, DType::F32, shape, &vec![1.0; shape.iter().product()]));
        let w = weight(&device, false, DType::F32, own, &vec![1.0; own.iter().product()]);
        for [weight, bias] in [[Some(&w), None], [None, Some(&w)]] {
            let refused = ops::layer_norm(&Tape::off(), &x, weight, bias, EPSILON, Spare::default());
            assert!(refused.is_err(), "{own:?} for {shape:?}");
        }
    }
}
