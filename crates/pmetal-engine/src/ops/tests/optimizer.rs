use super::*;
use crate::device::AdamWParameters;
use crate::error::Error;
use crate::ops::{self, AdamWState};
use crate::reference;

on_every_device! {
    five_steps_agree_with_pytorch_to_the_last_bits,
    fifty_steps_agree_with_an_f64_reference,
    a_parameter_that_no_gradient_reached_is_left_alone,
    a_step_keeps_the_value_that_somebody_still_holds,
}

const CONSTANTS: AdamWParameters = AdamWParameters {
    learning_rate: 1e-2,
    beta1: 0.9,
    beta2: 0.95,
    epsilon: 1e-8,
    weight_decay: 0.1,
    step: 1,
    gradient_scale: 1.0,
    max_norm: 0.0,
};

fn trained(device: &Device, values: &[f64]) -> Arc<Parameter> {
    Parameter::new("p", tensor(device, DType::F32, &[values.len()], values))
}

fn set_gradient(parameter: &Parameter, values: &[f64]) {
    parameter.clear_gradient();
    parameter
        .accumulate(|gradient| {
            let device = gradient.device().clone();
            let source = tensor(&device, DType::F32, gradient.shape(), values);
            device.kernels().add_assign(gradient, &source);
            Ok(())
        })
        .unwrap();
}

/// Printed by `torch.optim.AdamW(lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, foreach=False)` of
/// PyTorch 2.15 on the CPU after 5 steps of the gradients below: value, exp_avg, exp_avg_sq.
const PYTORCH: [[u32; 8]; 3] = [
    [0x3ef5bee5, 0xbf9f703d, 0x403e9c4f, 0x3ca76508, 0xbcacc328, 0xbcca2e15, 0x40210651, 0xc0df6f5f],
    [0x3c030552, 0x3c37731c, 0x3cdbdcf0, 0xbd865216, 0x3d13f099, 0x3d0996fa, 0xbd269057, 0x3d56c41e],
    [0x3cb3072e, 0x3ca91457, 0x3c979064, 0x3cd33974, 0x3c98558e, 0x3cbf4c7c, 0x3ca0aaa4, 0x3cac14a8],
];

fn five_steps_agree_with_pytorch_to_the_last_bits(device: &Device) {
    let parameter = trained(device, &[0.5, -1.25, 3.0, f64::from(1e-3_f32), -0.03125, 0.0, 2.5, -7.0]);
    let mut state = AdamWState::new(&parameter).unwrap();
    for step in 1..=5 {
        let gradient: Vec<f64> =
            (0..8).map(|index| f64::from((index * 7 + step as i32 * 13) % 17 - 8) / 16.0).collect();
        set_gradient(&parameter, &gradient);
        ops::adamw_step(&parameter, &mut state, &AdamWParameters { step, ..CONSTANTS }).unwrap();
    }
    for (ours, theirs) in [&parameter.value(), &state.first, &state.second].into_iter().zip(PYTORCH) {
        for (ours, theirs) in bits(ours).into_iter().zip(theirs) {
            // PyTorch's vector loops contract some products and sums.
            assert!(ours.abs_diff(theirs) <= 2, "{} is not {}", f32::from_bits(ours), f32::from_bits(theirs));
        }
    }
}

fn fifty_steps_agree_with_an_f64_reference(device: &Device) {
    let decayed = CONSTANTS;
    let clipped = AdamWParameters { weight_decay: 0.0, gradient_scale: 0.25, beta2: 0.999, ..CONSTANTS };
    // Longer than one task of the kernel.
    for (constants, count) in [(decayed, 1), (decayed, 37), (clipped, 20_003)] {
        let start = numbers("start", count, DType::F32);
        let parameter = trained(device, &start);
        let mut state = AdamWState::new(&parameter).unwrap();
        let exact = reference::AdamW {
            learning_rate: constants.learning_rate,
            betas: [constants.beta1, constants.beta2],
            epsilon: constants.epsilon,
            weight_decay: constants.weight_decay,
        };
        let (mut values, mut moments) = (start, vec![[0.0; 2]; count]);
        for step in 1..=50 {
            let gradient = numbers(&format!("gradient {step}"), count, DType::F32);
            set_gradient(&parameter, &gradient);
            ops::adamw_step(&parameter, &mut state, &AdamWParameters { step, ..constants }).unwrap();
            for ((value, moments), gradient) in values.iter_mut().zip(&mut moments).zip(gradient) {
                exact.step(step as i32, value, gradient * f64::from(constants.gradient_scale), moments);
            }
        }
        assert_close("value", &wide(&parameter.value()), &values, F32_ERROR);
        for (index, moment) in [&state.first, &state.second].into_iter().enumerate() {
            let expected: Vec<f64> = moments.iter().map(|moments| moments[index]).collect();
            assert_close("moment", &wide(moment), &expected, F32_ERROR);
        }
    }
}

fn a_parameter_that_no_gradient_reached_is_left_alone(device: &Device) {
    let parameter = trained(device, &[1.0, 2.0]);
    let mut state = AdamWState::new(&parameter).unwrap();
    ops::adamw_step(&parameter, &mut state, &CONSTANTS).unwrap();
    assert_eq!(wide(&parameter.value()), [1.0, 2.0]);
    assert_eq!(wide(&state.second), [0.0, 0.0]);
}

fn a_step_keeps_the_value_that_somebody_still_holds(device: &Device) {
    let parameter = trained(device, &[1.0, 2.0]);
    let mut state = AdamWState::new(&parameter).unwrap();
    set_gradient(&parameter, &[1.0, 1.0]);
    let held = parameter.value();
    ops::adamw_step(&parameter, &mut state, &CONSTANTS).unwrap();
    assert_eq!(wide(&held), [1.0, 2.0]);
    assert!(wide(&parameter.value())[0] < 1.0);
}

#[test]
fn the_state_of_another_parameter_is_refused() {
    let device = Device::cpu();
    let (parameter, other) = (trained(&device, &[1.0; 4]), trained(&device, &[1.0; 3]));
    set_gradient(&parameter, &[1.0; 4]);
    let mut state = AdamWState::new(&other).unwrap();
    let error = ops::adamw_step(&parameter, &mut state, &CONSTANTS).err().unwrap();
    assert!(matches!(error, Error::Shape { .. }), "{error}");
}

#[test]
fn optimizer_state_takes_twice_the_parameter() {
    let device = Device::cpu();
    let parameter = trained(&device, &[1.0; 100]);
    let state = AdamWState::new(&parameter).unwrap();
    assert_eq!(live(&device, Category::Optimizer), 2 * 4 * 100);
    drop(state);
    assert_eq!(live(&device, Category::Optimizer), 0);
}

#[test]
fn the_global_norm_is_that_of_all_gradients_together() {
    let device = Device::cpu();
    let parameters = [3, 40_001, 16].map(|count| trained(&device, &vec![0.0; count]));
    let mut squares = 0.0;
    for parameter in &parameters[..2] {
        let gradient = numbers("gradient", parameter.value().elements(), DType::F32);
        squares += gradient.iter().map(|value| value * value).sum::<f64>();
        set_gradient(parameter, &gradient);
    }
    let norm = ops::global_norm(&parameters).unwrap();
    assert!((norm - squares.sqrt()).abs() <= 1e-12 * norm, "{norm}");
    assert_eq!(ops::global_norm(&[]).unwrap(), 0.0);
    // Squares that f32 cannot hold.
    set_gradient(&parameters[2], &[1e30; 16]);
    assert_close("norm", &[ops::global_norm(&parameters[2..]).unwrap()], &[4.0 * f64::from(1e30_f32)], 1e-12);
}

#[test]
fn the_optimizer_has_the_same_bits_everywhere() {
    assert_same_bits_everywhere("adamw", &|| {
        let device = Device::cpu();
        let count = 50_021;
        let parameter = trained(&device, &numbers("start", count, DType::F32));
        let mut state = AdamWState::new(&parameter).unwrap();
        for step in 1..=3 {
            set_gradient(&parameter, &numbers(&format!("gradient {step}"), count, DType::F32));
            ops::adamw_step(&parameter, &mut state, &AdamWParameters { step, ..CONSTANTS }).unwrap();
        }
        let norm = ops::global_norm(std::slice::from_ref(&parameter)).unwrap().to_bits();
        let norm = vec![norm as u32, (norm >> 32) as u32];
        vec![bits(&parameter.value()), bits(&state.first), bits(&state.second), norm]
    });
}
