//! Losses and the optimizer's step.

use super::*;
use crate::device::{AdamWControl, AdamWEntry, AdamWParameters, CrossEntropyParameters, Sum};

#[test]
fn cross_entropy_agrees_with_the_processor() {
    let plain = CrossEntropyParameters { logit_scale: 1.0, softcap: None, gradient_scale: 0.25 };
    let capped = CrossEntropyParameters { logit_scale: 6.0, softcap: Some(3.0), gradient_scale: 2.0 };
    for (dtype, width) in TYPES.into_iter().flat_map(|dtype| WIDTHS.map(|width| (dtype, width))) {
        for parameters in [plain, capped] {
            check_padded(&format!("loss of {width}, {parameters:?}"), dtype, &[0], &|run| {
                let labels = [0, -100, width as i32 - 1, width as i32 / 2];
                let labels = Tensor::from_slice(run.device, Category::Workspace, &[4], &labels).unwrap();
                let mut sum = Sum::new(run.device).unwrap();
                let logits = run.floats(1, &[4, width]);
                let kernels = run.device.kernels();
                let slopes =
                    kernels.cross_entropy(logits, &labels, &parameters, &mut sum, run.dtype).unwrap();
                let sum = [sum.read().unwrap() as f32];
                let sum = Tensor::from_slice(run.device, Category::Workspace, &[1], &sum).unwrap();
                vec![slopes, sum]
            });
        }
    }
}

#[test]
fn logits_of_no_number_make_the_loss_no_number() {
    let Some(device) = emulated(1) else { return };
    for width in [64, 65] {
        let mut values = numbers(1, 2 * width);
        values[width + 3] = f32::NAN;
        let logits = Tensor::from_slice(&device, Category::Workspace, &[2, width], &values).unwrap();
        let labels = Tensor::from_slice(&device, Category::Workspace, &[2], &[1_i32, 5]).unwrap();
        let mut sum = Sum::new(&device).unwrap();
        let parameters = CrossEntropyParameters { logit_scale: 1.0, softcap: None, gradient_scale: 1.0 };
        device.kernels().cross_entropy(logits, &labels, &parameters, &mut sum, DType::F32).unwrap();
        assert!(sum.read().unwrap().is_nan());
    }
}

const CONSTANTS: AdamWParameters = AdamWParameters {
    learning_rate: 1e-2,
    beta1: 0.9,
    beta2: 0.99,
    epsilon: 1e-8,
    weight_decay: 0.1,
    step: 3,
    gradient_scale: 0.5,
    max_norm: 0.0,
};

/// Values, moments and shadows after a step on three tensors, one of which is several pieces long.
fn stepped(run: &Run<'_>, constants: AdamWParameters, clips: bool, poison: Option<f32>) -> Vec<Tensor> {
    stepped_of([7, 33], run, constants, clips, poison)
}

/// [`stepped`] with a shape of the first tensor, which has the shadow.
fn stepped_of(
    first: [usize; 2],
    run: &Run<'_>,
    constants: AdamWParameters,
    clips: bool,
    poison: Option<f32>,
) -> Vec<Tensor> {
    let shapes = [first.to_vec(), vec![9001], vec![5], vec![4104]];
    let mut tensors: Vec<[Tensor; 4]> = Vec::new();
    for (index, shape) in shapes.iter().enumerate() {
        let [value, gradient, first] = [0, 1, 2].map(|part| run.floats(10 * index as u64 + part, shape));
        let squares: Vec<f32> =
            numbers(10 * index as u64 + 3, value.elements()).iter().map(|x| x.abs() + 0.1).collect();
        let second = Tensor::from_slice(run.device, Category::Workspace, shape, &squares).unwrap();
        tensors.push([value, gradient, first, second]);
    }
    if let Some(poison) = poison {
        let mut gradient = numbers(1, 231);
        gradient[230] = poison;
        tensors[0][1].write_slice(&gradient);
    }
    let mut sum = Sum::new(run.device).unwrap();
    let kernels = run.device.kernels();
    kernels.sum_of_squares(&tensors.iter().map(|parts| &parts[1]).collect::<Vec<_>>(), &mut sum);
    let control = AdamWControl::new(run.device, constants).unwrap();
    let mut shadow = run.tensor(9, &first);
    let mut shadows = Some(&mut shadow).filter(|_| !run.device.is_host());
    let mut entries: Vec<AdamWEntry<'_>> = tensors
        .iter_mut()
        .enumerate()
        .map(|(index, [value, gradient, first, second])| AdamWEntry {
            value,
            gradient,
            first,
            second,
            decays: index != 1,
            shadow: shadows.take(),
        })
        .collect();
    kernels.adamw(&mut entries, &control, clips.then_some(&sum));
    drop(entries);
    let mut results = Vec::new();
    // The copy for products follows the value, but where nothing changed.
    if poison.is_none() {
        results.push(if run.device.is_host() { tensors[0][0].clone() } else { shadow });
    }
    for [value, _, first, second] in tensors {
        results.extend([value, first, second]);
    }
    if poison.is_none() {
        let sum = [sum.read().unwrap() as f32];
        results.push(Tensor::from_slice(run.device, Category::Workspace, &[1], &sum).unwrap());
    }
    results
}

#[test]
fn steps_over_many_tensors_agree_with_the_processor() {
    for dtype in TYPES {
        check("a step", dtype, &|run| stepped(run, CONSTANTS, false, None));
        // Eight elements at a time, over more than one piece; rows that eight does not divide.
        for first in [[24, 400], [40, 4], [32, 129]] {
            check("a step by vectors", dtype, &|run| stepped_of(first, run, CONSTANTS, false, None));
        }
    }
    for max_norm in [0.0, 0.5, 1e6] {
        let constants = AdamWParameters { max_norm, ..CONSTANTS };
        check("a clipped step", DType::F32, &|run| stepped(run, constants, true, None));
    }
}

#[test]
fn a_device_goes_with_the_last_tensor_on_it() {
    if !has_compiler() {
        return println!("skipped: no C++ compiler");
    }
    let emulator = Arc::new(Emulator::new(1));
    let device = Device::gpu(Arc::clone(&emulator) as Arc<dyn super::Runtime>);
    let run = Run {
        device: &device,
        dtype: DType::F32,
        rounding: DType::F32,
        padding: 0,
        pads: RefCell::default(),
    };
    drop(stepped(&run, CONSTANTS, true, None));
    drop(run);
    drop(device);
    assert_eq!(Arc::strong_count(&emulator), 1, "the device's kernels keep it alive");
    assert!(lock(&emulator.memory).is_empty(), "memory is left behind");
}

#[test]
fn a_norm_that_is_not_finite_changes_nothing() {
    let constants = AdamWParameters { max_norm: 1.0, ..CONSTANTS };
    let Some(device) = emulated(1) else { return };
    for poison in [f32::NAN, f32::INFINITY] {
        check("a refused step", DType::F32, &|run| stepped(run, constants, true, Some(poison)));
        let run = Run {
            device: &device,
            dtype: DType::F32,
            rounding: DType::F32,
            padding: 0,
            pads: RefCell::default(),
        };
        let value = &stepped(&run, constants, true, Some(poison))[0];
        assert_eq!(value.to_vec::<f32>().unwrap(), numbers(0, 231));
    }
}
