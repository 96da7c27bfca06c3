//! Times of one layer as large as Qwen3-30B-A3B's; run by name on a machine with a device.

use std::time::Instant;

use super::*;
use crate::device::GateActivation;
use crate::random::RandomKey;
use crate::{Parameter, Tape, Weight, ops};

const TOKENS: usize = 4096;
const WIDTH: usize = 2048;
const FEATURES: usize = 768;
const EXPERTS: usize = 128;
const CHOICES: usize = 8;
const RANK: usize = 16;

const ROUTER: ops::Router = ops::Router {
    gate: ops::Gate::Softmax,
    choices: CHOICES,
    normalise: Some(0.0),
    groups: None,
    scale: 1.0,
};

fn random(device: &Device, dtype: DType, shape: &[usize], bound: f32) -> Tensor {
    let mut tensor = Tensor::scratch(device, Category::Weights, dtype, shape).expect("memory");
    let key = RandomKey { seed: shape.iter().product::<usize>() as u64, step: 0, stream: 1 };
    device.kernels().uniform(key, bound, &mut tensor);
    tensor
}

fn layer(device: &Device, width: usize, features: usize) -> ops::ExpertLinear {
    let trained = |shape: &[usize]| {
        Weight::Trainable(Parameter::new("adapter", random(device, DType::F32, shape, 0.05)))
    };
    ops::ExpertLinear {
        weight: Weight::Frozen(random(device, DType::Bf16, &[EXPERTS, features, width], 0.05)),
        transposed: false,
        bias: None,
        lora: Some(ops::ExpertLora {
            a: trained(&[EXPERTS, RANK, width]),
            b: trained(&[EXPERTS, features, RANK]),
            scale: 2.0,
        }),
    }
}

fn seconds(device: &Device, count: usize, mut work: impl FnMut()) -> f64 {
    (0..5).for_each(|_| work());
    device.synchronize().expect("a device");
    let start = Instant::now();
    (0..count).for_each(|_| work());
    device.synchronize().expect("a device");
    start.elapsed().as_secs_f64() / count as f64
}

#[test]
#[ignore = "measures"]
fn times_of_a_large_layer() {
    let Some(device) = device() else { return };
    let (gate_up, down) = (layer(&device, WIDTH, 2 * FEATURES), layer(&device, FEATURES, WIDTH));
    let x = random(&device, DType::Bf16, &[TOKENS, WIDTH], 1.0);
    let logits = random(&device, DType::F32, &[TOKENS, EXPERTS], 1.0);
    let step = || -> crate::Result<()> {
        let tape = Tape::recording();
        let (input, logits) = (tape.leaf(x.clone()), tape.leaf(logits.clone()));
        let routing = ops::route(&tape, &logits, &ROUTER, None, None)?;
        let rows = ops::gather(&tape, &input, &routing, ops::Weighting::Output)?;
        let gates = ops::expert_linear(&tape, &rows, &gate_up, &routing)?;
        let hidden = ops::gated_pair(&tape, &gates, ops::PairedGate::Halves(GateActivation::Silu))?;
        let y = ops::expert_linear(&tape, &hidden, &down, &routing)?;
        let options = ops::SumOptions { residual: Some(&input), ..ops::SumOptions::default() };
        let out = ops::combine(&tape, &y, &routing, ops::Weighting::Output, options)?;
        tape.backward(&out, x.clone()).map(|_| ())
    };
    let whole = seconds(&device, 10, || step().expect("a step"));
    println!("a step of the layer, forward and backward: {:.3} ms", whole * 1e3);
    let ((), times) = device.profile(|| (0..5).try_for_each(|_| step())).expect("a profile");
    for time in times {
        let each = time.seconds * 1e6 / time.launches as f64;
        println!("{each:9.1} us x {:3}  {}", time.launches / 5, time.name);
    }
}

#[test]
#[ignore = "measures"]
fn times_of_products_of_experts() {
    let Some(device) = device() else { return };
    let kernels = device.kernels().experts();
    let logits = random(&device, DType::F32, &[TOKENS, EXPERTS], 1.0);
    let mut weights = random(&device, DType::F32, &[TOKENS, CHOICES], 1.0);
    let shape = [TOKENS, CHOICES];
    let mut chosen = Tensor::scratch(&device, Category::Workspace, DType::U32, &shape).expect("memory");
    kernels.choose_experts(&logits, &ROUTER, None, &mut weights, &mut chosen);
    let plan = kernels.plan_experts(chosen, EXPERTS).expect("a plan");
    let rows = TOKENS * CHOICES;
    for (n, k, turned) in [(1536, 2048, true), (2048, 768, true), (2048, 1536, false), (768, 2048, false)] {
        let shape = if turned { [EXPERTS, n, k] } else { [EXPERTS, k, n] };
        let stack = random(&device, DType::Bf16, &shape, 0.05);
        let left = random(&device, DType::Bf16, &[rows, k], 1.0);
        let mut out = random(&device, DType::Bf16, &[rows, n], 1.0);
        for by_warpgroups in [true, false] {
            FORCED.set(Some(by_warpgroups));
            let each = seconds(&device, 50, || {
                let product = (&left, Operand { tensor: &stack, transposed: turned });
                let arithmetic = crate::device::Arithmetic::of(DType::Bf16);
                let finish = ExpertFinish::STORE;
                let outcome = kernels.multiply_experts(&[product], &plan, &finish, &mut out, arithmetic);
                outcome.expect("a product");
            });
            FORCED.set(None);
            let rate = 2.0 * (rows * n * k) as f64 / each / 1e12;
            let what = format!("N {n} K {k} turned {turned}, by warpgroups {by_warpgroups}");
            println!("{what}: {:.1} us, {rate:.0} TFLOP/s", each * 1e6);
        }
    }
}
