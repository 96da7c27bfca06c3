//! Against numbers that transformers 5.23 computed from the same logits, by `load_balancing_loss_func`,
//! `DeepseekV3TopkRouter`, `GptOssTopKRouter`, `Llama4Router` and `GptOssExperts`.

use super::*;
use crate::ops::{self, PairedGate};

on_every_device! {
    routers_choose_and_weigh_as_those_of_transformers,
    the_balance_and_its_gradient_are_those_of_transformers,
    the_clamped_pair_is_that_of_transformers,
}

const TOKENS: usize = 6;
const EXPERTS: usize = 8;

/// 2 sin(a i + b).
fn waves(count: usize, a: f64, b: f64) -> Vec<f64> {
    (0..count).map(|i| f64::from((2.0 * (a * i as f64 + b).sin()) as f32)).collect()
}

fn logits(device: &Device, a: f64, b: f64) -> Tensor {
    tensor(device, DType::F32, &[TOKENS, EXPERTS], &waves(TOKENS * EXPERTS, a, b))
}

fn routers_choose_and_weigh_as_those_of_transformers(device: &Device) {
    let correction: Vec<f64> =
        waves(EXPERTS, 0.9, 0.2).iter().map(|value| value * f64::from(0.2_f32)).collect();
    let correction = tensor(device, DType::F32, &[EXPERTS], &correction);
    let deepseek = Router {
        gate: Gate::Sigmoid,
        choices: 3,
        normalise: Some(1e-20),
        groups: Some(Groups { count: 4, chosen: 2 }),
        scale: 2.5,
    };
    let gpt_oss = Router { choices: 3, normalise: Some(0.0), ..PLAIN };
    let llama4 = Router { gate: Gate::Sigmoid, choices: 1, ..PLAIN };
    let logits = Var::constant(logits(device, 0.7, 0.1));
    let check = |router: &Router, correction, chosen: &[u32], weights: &[f64]| {
        let routing = ops::route(&Tape::off(), &logits, router, correction, None).unwrap();
        // In the order of experts, as the other router's choices are not sorted.
        let sorted = |chosen: &[u32], weights: &[f64]| {
            let mut pairs: Vec<(usize, u32, f64)> = chosen
                .iter()
                .zip(weights)
                .enumerate()
                .map(|(pair, (&expert, &weight))| (pair / router.choices, expert, weight))
                .collect();
            pairs.sort_by_key(|pair| (pair.0, pair.1));
            let (experts, weights): (Vec<_>, Vec<_>) = pairs.into_iter().map(|pair| (pair.1, pair.2)).unzip();
            (experts, weights)
        };
        let own = sorted(&routing.chosen().to_vec::<u32>().unwrap(), &wide(routing.weights.tensor()));
        let expected = sorted(chosen, weights);
        assert_eq!(own.0, expected.0, "{router:?}");
        assert_close(&format!("{router:?}"), &own.1, &expected.1, 1e-6);
    };
    check(
        &deepseek,
        Some(&correction),
        &[1, 2, 3, 1, 2, 3, 2, 3, 4, 2, 3, 7, 2, 6, 7, 0, 1, 7],
        &[
            0.800499, 0.8724928, 0.8270082, 0.6200907, 0.9014645, 0.9784449, 0.6259218, 0.9005787, 0.9734994,
            0.455475, 1.0052131, 1.039312, 0.1793015, 1.1999747, 1.1207238, 0.844245, 0.3865366, 1.2692184,
        ],
    );
    check(
        &gpt_oss,
        None,
        &[2, 3, 1, 3, 4, 2, 4, 5, 3, 5, 6, 4, 6, 7, 5, 7, 6, 5],
        &[
            0.4432068, 0.3036997, 0.2530935, 0.4437563, 0.2974253, 0.2588185, 0.4441584, 0.2912164,
            0.2646251, 0.4444125, 0.285076, 0.2705114, 0.4445182, 0.2790068, 0.276475, 0.5462071, 0.3471755,
            0.1066173,
        ],
    );
    let scores = [0.88027, 0.8804908, 0.880652, 0.8807536, 0.8807958, 0.8807786];
    check(&llama4, None, &[2, 3, 4, 5, 6, 7], &scores);
}

fn the_balance_and_its_gradient_are_those_of_transformers(device: &Device) {
    let mask = tensor(device, DType::F32, &[TOKENS], &[1.0, 1.0, 0.0, 1.0, 0.0, 1.0]);
    let all = [
        -0.000611324,
        -0.000587682,
        -0.002352158,
        0.002173808,
        0.007241823,
        -0.028953925,
        0.020734085,
        0.002355374,
    ];
    let some = [
        -0.001111931,
        -0.00013612,
        -0.002508611,
        0.007171768,
        -0.00408213,
        -0.052664001,
        0.0546587,
        -0.001327696,
    ];
    for (mask, loss, fourth) in [(None, 2.127_287_9, all), (Some(mask), 2.101_740_6, some)] {
        let tape = Tape::recording();
        let balance = balance_by(device, EXPERTS, mask, 1.0);
        let leaves = [logits(device, 0.7, 0.1), logits(device, 1.3, 0.4)].map(|logits| tape.leaf(logits));
        let route = |leaf| ops::route(&tape, leaf, &PLAIN, None, Some(&balance)).unwrap();
        let [_first, second] = leaves.each_ref().map(route);
        assert_close("balance", &wide(&balance.loss().unwrap()), &[loss], 1e-6);
        let nothing = tensor(device, DType::F32, &[TOKENS, 2], &[0.0; 2 * TOKENS]);
        let mut gradients = tape.backward(&second.weights, nothing).unwrap();
        let gradient = arrived(&mut gradients, &leaves[0]).unwrap();
        assert_close("its gradient", &gradient[3 * EXPERTS..][..EXPERTS], &fourth, 2e-6);
    }
}

fn the_clamped_pair_is_that_of_transformers(device: &Device) {
    let gate_up = Var::constant(logits(device, 1.3, 0.4).reshape(&[3, 16]).unwrap());
    let kind = PairedGate::Clamped { slope: 1.702, limit: 1.5 };
    let out = ops::gated_pair(&Tape::off(), &gate_up, kind).unwrap();
    let expected = [
        1.5384138, -0.087189, -0.2844051, 1.1824923, -0.0067675, 3.4262693, 0.0785651, -0.3721741, 0.0335068,
        -0.0641129, 2.9037745, 0.0627633, 0.5957015, -0.2683993, -0.1814525, 1.7819976, 0.0202476, 2.5418625,
        0.0331255, -0.3972664, 0.5879669, -0.0326892, 3.3693159, 0.0778916,
    ];
    assert_close("pair", &wide(out.tensor()), &expected, 1e-6);
}
