use super::*;
use crate::device::GateActivation;
use crate::ops::{self, ExpertLinear, ExpertLora, PairedGate, SumOptions, Weighting};

on_every_device! {
    layers_of_experts_agree_with_the_reference,
    a_mixture_is_the_same_where_it_is_computed_again,
    copies_of_adapters_follow_what_is_learned,
}

/// Sizes of a layer: tokens, experts, choices, width, features, rank (0 = no adapter).
type Sizes = [usize; 6];

const SIZES: [Sizes; 8] = [
    [1, 1, 1, 3, 2, 0],
    [3, 7, 2, 5, 9, 2],
    [40, 5, 3, 16, 24, 8],
    [70, 3, 1, 33, 70, 3],
    [9, 12, 4, 64, 8, 16],
    [130, 4, 2, 24, 16, 4],
    // More rows of one expert than a task of the processor takes.
    [290, 2, 1, 8, 8, 0],
    // More columns than it sums at a time.
    [3, 2, 1, 1, 600, 0],
];

/// x, W, b, A and B, empty where absent.
fn reference(
    sizes: Sizes,
    inputs: &[Vec<f64>],
    chosen: &[u32],
    transposed: bool,
    lora_scale: f64,
) -> Vec<f64> {
    let [_, _, _, width, features, rank] = sizes;
    let mut out = Vec::new();
    for (row, pair) in order(chosen).into_iter().enumerate() {
        let (expert, x) = (chosen[pair] as usize, &inputs[0][row * width..][..width]);
        let w = |n: usize, d: usize| {
            let at = if transposed { d * features + n } else { n * width + d };
            inputs[1][expert * width * features + at]
        };
        let a =
            |r: usize| -> f64 { (0..width).map(|d| x[d] * inputs[3][(expert * rank + r) * width + d]).sum() };
        let reduced: Vec<f64> = (0..rank).map(a).collect();
        for n in 0..features {
            let main: f64 = (0..width).map(|d| x[d] * w(n, d)).sum();
            let low: f64 =
                (0..rank).map(|r| reduced[r] * inputs[4][(expert * features + n) * rank + r]).sum();
            out.push(main + lora_scale * low + inputs[2].get(expert * features + n).unwrap_or(&0.0));
        }
    }
    out
}

/// One layer with all of its gradients.
fn check_layer(device: &Device, sizes: Sizes, dtype: DType, variant: usize) {
    let [tokens, experts, choices, width, features, rank] = sizes;
    let (transposed, biased, w_trained) = (variant % 2 == 1, !variant.is_multiple_of(3), variant % 4 >= 2);
    let what = format!("{sizes:?} {dtype}, variant {variant}");
    let rows = tokens * choices;
    let w_type = if w_trained { DType::F32 } else { dtype };
    let inputs = [
        numbers("x", rows * width, dtype),
        numbers("w", experts * width * features, if dtype == DType::F32 { w_type } else { dtype }),
        numbers("bias", if biased { experts * features } else { 0 }, dtype),
        numbers("a", experts * rank * width, dtype),
        numbers("b", experts * features * rank, dtype),
    ];
    let w_shape = if transposed { [experts, width, features] } else { [experts, features, width] };
    let layer = ExpertLinear {
        weight: weight(device, w_trained, dtype, &w_shape, &inputs[1]),
        transposed,
        bias: biased
            .then(|| weight(device, variant.is_multiple_of(2), dtype, &[experts, features], &inputs[2])),
        lora: (rank > 0).then(|| ExpertLora {
            a: weight(device, variant != 1, dtype, &[experts, rank, width], &inputs[3]),
            b: weight(device, variant != 2, dtype, &[experts, features, rank], &inputs[4]),
            scale: 0.5,
        }),
    };
    let tape = Tape::recording();
    let logits = loads(["any", "same", "late"][variant % 3], tokens, experts);
    let (_, routing) = routed(device, &tape, &logits, experts, choices, false);
    let chosen = routing.chosen().to_vec::<u32>().unwrap();
    let x = tape.leaf(tensor(device, dtype, &[rows, width], &inputs[0]));
    // Two uses of the layer and of x, so that all gradients are added to some that are there.
    let [once, again] = [0, 1].map(|_| ops::expert_linear(&tape, &x, &layer, &routing).unwrap());
    assert_eq!(once.tensor().shape(), [rows, features]);
    let y = ops::gated(&tape, GateActivation::Silu, &once, &again).unwrap();
    let function = |inputs: &[Vec<f64>]| {
        let y = reference(sizes, inputs, &chosen, transposed, 0.5);
        crate::reference::gated(GateActivation::Silu, &y, &y)
    };
    let error = if dtype == DType::F32 { F32_ERROR } else { 2.0 * tolerance(dtype) };
    assert_close(&what, &wide(y.tensor()), &function(&inputs), error);
    let d_y = numbers("d_y", rows * features, dtype);
    let mut gradients = tape.backward(&y, tensor(device, dtype, &[rows, features], &d_y)).unwrap();
    let lora = layer.lora.as_ref();
    let ours = [
        arrived(&mut gradients, &x),
        gradient_of(&layer.weight),
        layer.bias.as_ref().and_then(gradient_of),
        lora.and_then(|lora| gradient_of(&lora.a)),
        lora.and_then(|lora| gradient_of(&lora.b)),
    ];
    assert_eq!(ours[1].is_some(), w_trained, "{what}");
    let small = if is_slow(device) { 6 } else { 30 };
    assert_gradients_of(small, &what, &function, &inputs, &d_y, &ours, error);
}

fn layers_of_experts_agree_with_the_reference(device: &Device) {
    for (index, sizes) in SIZES.into_iter().enumerate() {
        for (number, &dtype) in types(device).iter().enumerate() {
            for variant in 0..4 {
                if !is_slow(device) || (variant + index + number) % 2 == 0 {
                    check_layer(device, sizes, dtype, variant);
                }
            }
        }
    }
}

/// A whole mixture with trained adapters and routers.
struct Mixture {
    router: Weight,
    gate_up: ExpertLinear,
    down: ExpertLinear,
}

const TOKENS: usize = 45;
const WIDTH: usize = 24;
const EXPERTS: usize = 6;
const FEATURES: usize = 16;

impl Mixture {
    fn new(device: &Device, dtype: DType) -> Self {
        let layer = |name: &str, width: usize, features: usize| {
            let values = |part: &str, count: usize| numbers(&format!("{name} {part}"), count, DType::Bf16);
            let stack = |part: &str, trained, shape: [usize; 3]| {
                weight(device, trained, dtype, &shape, &values(part, shape.iter().product()))
            };
            ExpertLinear {
                weight: stack("w", false, [EXPERTS, features, width]),
                transposed: false,
                bias: None,
                lora: Some(ExpertLora {
                    a: stack("a", true, [EXPERTS, 4, width]),
                    b: stack("b", true, [EXPERTS, features, 4]),
                    scale: 0.5,
                }),
            }
        };
        let router = numbers("router", EXPERTS * WIDTH, DType::F32);
        Self {
            router: weight(device, true, dtype, &[EXPERTS, WIDTH], &router),
            gate_up: layer("gate_up", WIDTH, 2 * FEATURES),
            down: layer("down", FEATURES, WIDTH),
        }
    }

    fn forward(&self, tape: &Tape, x: &Var, balance: &ops::Balance) -> crate::Result<Var> {
        let router = ops::Linear { weight: self.router.clone(), bias: None, lora: None };
        let normed = ops::rms_norm(tape, x, None, crate::device::NormWeight::Plain, 1e-5)?;
        let logits = ops::linear(tape, &normed, &router, ops::LinearOptions::default())?;
        let routing = ops::route(tape, &logits, &PLAIN, None, Some(balance))?;
        let rows = ops::gather(tape, &normed, &routing, Weighting::Output)?;
        let gate_up = ops::expert_linear(tape, &rows, &self.gate_up, &routing)?;
        let hidden = ops::gated_pair(tape, &gate_up, PairedGate::Halves(GateActivation::Silu))?;
        let y = ops::expert_linear(tape, &hidden, &self.down, &routing)?;
        let options = SumOptions { residual: Some(x), ends_block: true, ..SumOptions::default() };
        ops::combine(tape, &y, &routing, Weighting::Output, options)
    }

    fn gradients(&self) -> Vec<Vec<u32>> {
        let lora = [&self.gate_up, &self.down].map(|layer| layer.lora.as_ref().unwrap());
        let all = lora.into_iter().flat_map(|lora| [&lora.a, &lora.b]).chain([&self.router]);
        all.map(|weight| bits(&parameter(weight).gradient().unwrap())).collect()
    }
}

/// Results of a mixture on a tape, its block computed again or not.
fn run(device: &Device, dtype: DType, tape: &Tape, again: bool) -> Vec<Vec<u32>> {
    let mixture = std::rc::Rc::new(Mixture::new(device, dtype));
    let balance = balance_by(device, EXPERTS, None, 0.1);
    let x = tape.leaf(tensor(device, dtype, &[TOKENS, WIDTH], &numbers("x", TOKENS * WIDTH, dtype)));
    let y = if again {
        let (inner, balance) = (std::rc::Rc::clone(&mixture), balance.clone());
        tape.checkpoint(x.clone(), move |tape, x| inner.forward(tape, &x, &balance)).unwrap()
    } else {
        mixture.forward(tape, &x, &balance).unwrap()
    };
    let d_y = tensor(device, dtype, &[TOKENS, WIDTH], &numbers("d_y", TOKENS * WIDTH, dtype));
    let y_bits = bits(y.tensor());
    let mut gradients = tape.backward(&y, d_y).unwrap();
    let d_x = bits(&gradients.take(x.slot().unwrap()).unwrap());
    let mut results = vec![y_bits, d_x, bits(&balance.loss().unwrap())];
    results.extend(mixture.gradients());
    results
}

fn a_mixture_is_the_same_where_it_is_computed_again(device: &Device) {
    for &dtype in types(device) {
        let kept = run(device, dtype, &Tape::keeping_all(), false);
        assert!(kept.iter().flatten().all(|&bits| f32::from_bits(bits).is_finite()), "{dtype}");
        assert!(run(device, dtype, &Tape::recording(), false) == kept, "{dtype}, cheap");
        assert!(run(device, dtype, &Tape::recording(), true) == kept, "{dtype}, full");
    }
}

fn copies_of_adapters_follow_what_is_learned(device: &Device) {
    for &dtype in types(device) {
        let mut mixture = Mixture::new(device, dtype);
        let pack = |mixture: &Mixture| {
            for layer in [&mixture.gate_up, &mixture.down] {
                layer.pack(dtype).unwrap();
            }
        };
        pack(&mixture);
        let (balance, tape) = (balance_by(device, EXPERTS, None, 0.1), Tape::recording());
        let x = tape.leaf(tensor(device, dtype, &[TOKENS, WIDTH], &numbers("x", TOKENS * WIDTH, dtype)));
        let y = mixture.forward(&tape, &x, &balance).unwrap();
        let before = bits(y.tensor());
        tape.backward(&y, tensor(device, dtype, &[TOKENS, WIDTH], &numbers("d", TOKENS * WIDTH, dtype)))
            .unwrap();
        let constants = crate::device::AdamWParameters {
            learning_rate: 0.1,
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            weight_decay: 0.0,
            step: 1,
            gradient_scale: 1.0,
            max_norm: 0.0,
        };
        for lora in [&mut mixture.gate_up, &mut mixture.down].map(|layer| layer.lora.as_mut().unwrap()) {
            for weight in [&mut lora.a, &mut lora.b] {
                let learned = parameter(weight);
                let mut state = ops::AdamWState::new(&learned).unwrap();
                ops::adamw_step(&learned, &mut state, &constants).unwrap();
            }
        }
        let forward = |mixture: &Mixture| {
            bits(mixture.forward(&Tape::off(), &x, &balance_by(device, EXPERTS, None, 0.1)).unwrap().tensor())
        };
        let after = forward(&mixture);
        assert!(after != before, "{dtype}: nothing was learned");
        // The same values as new parameters.
        for lora in [&mut mixture.gate_up, &mut mixture.down].map(|layer| layer.lora.as_mut().unwrap()) {
            for weight in [&mut lora.a, &mut lora.b] {
                let value = parameter(weight).value().copy(Category::Parameters).unwrap();
                *weight = Weight::Trainable(Parameter::new("again", value));
            }
        }
        pack(&mixture);
        assert!(forward(&mixture) == after, "{dtype}: copies are not what was learned");
    }
}

#[test]
fn rows_that_were_gathered_again_are_gone_when_they_get_their_gradient() {
    let device = Device::cpu();
    let (tokens, width) = (64, 256);
    let tape = Tape::recording();
    let (_, routing) = routed(&device, &tape, &loads("any", tokens, 4), 4, 2, false);
    let values = |name: &str, count: usize| numbers(name, count, DType::F32);
    let layer = ExpertLinear {
        weight: weight(&device, true, DType::F32, &[4, 2, width], &values("w", 8 * width)),
        transposed: false,
        bias: None,
        lora: None,
    };
    let x = tape.leaf(tensor(&device, DType::F32, &[tokens, width], &values("x", tokens * width)));
    let rows = ops::gather(&tape, &x, &routing, Weighting::Output).unwrap();
    let y = ops::expert_linear(&tape, &rows, &layer, &routing).unwrap();
    drop(rows);
    let d_y = tensor(&device, DType::F32, &[2 * tokens, 2], &values("d_y", 4 * tokens));
    let memory = device.memory();
    memory.reset_peak();
    let before = memory.report().peak_bytes;
    tape.backward(&y, d_y).unwrap();
    let (most, rows) = (memory.report().peak_bytes - before, 2 * tokens * width * 4);
    // The rows' gradient, that of x, which has half as many, and the weight's.
    assert!(most > rows && most < 2 * rows, "{most} bytes beside rows of {rows}");
}

#[test]
fn layers_of_experts_have_the_same_bits_everywhere() {
    assert_same_bits_everywhere("a mixture", &|| run(&Device::cpu(), DType::F32, &Tape::recording(), false));
}

#[test]
fn rows_beyond_one_task_are_multiplied_alike_on_any_number_of_threads() {
    let device = Device::cpu();
    let compute = |dtype| {
        let tape = Tape::recording();
        // One expert has more rows than a task takes, others a few or none.
        let logits = loads("same", 700, 9);
        let (_, routing) = routed(&device, &tape, &logits, 9, 2, false);
        let layer = ExpertLinear {
            weight: weight(&device, true, dtype, &[9, 40, 64], &numbers("w", 9 * 40 * 64, DType::Bf16)),
            transposed: false,
            bias: None,
            lora: None,
        };
        let x = tape.leaf(tensor(&device, dtype, &[1400, 64], &numbers("x", 1400 * 64, dtype)));
        let y = ops::expert_linear(&tape, &x, &layer, &routing).unwrap();
        let d_y = tensor(&device, dtype, &[1400, 40], &numbers("d_y", 1400 * 40, dtype));
        let mut gradients = tape.backward(&y, d_y).unwrap();
        let d_x = bits(&gradients.take(x.slot().unwrap()).unwrap());
        [bits(y.tensor()), d_x, bits(&parameter(&layer.weight).gradient().unwrap())]
    };
    for dtype in [DType::F32, DType::Bf16] {
        let pool = |threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let alone = pool(1).install(|| compute(dtype));
        for threads in [2, 3, 16] {
            assert!(pool(threads).install(|| compute(dtype)) == alone, "{dtype}, {threads} threads");
        }
    }
}

#[test]
fn layers_of_other_sizes_are_refused() {
    let device = Device::cpu();
    let (_, routing) = routed(&device, &Tape::off(), &loads("any", 3, 4), 4, 2, false);
    let x = Var::constant(tensor(&device, DType::F32, &[6, 5], &[0.0; 30]));
    let frozen = |shape: &[usize]| {
        let count = shape.iter().product::<usize>();
        weight(&device, false, DType::F32, shape, &vec![0.0; count])
    };
    let layer = |shape: &[usize], transposed| ExpertLinear {
        weight: frozen(shape),
        transposed,
        bias: None,
        lora: None,
    };
    let lora = |a: &[usize], b: &[usize]| ExpertLora { a: frozen(a), b: frozen(b), scale: 1.0 };
    let fits = layer(&[4, 7, 5], false);
    assert!(ops::expert_linear(&Tape::off(), &x, &fits, &routing).is_ok());
    for wrong in [
        layer(&[4, 7, 5], true),
        layer(&[3, 7, 5], false),
        layer(&[28, 5], false),
        ExpertLinear { bias: Some(frozen(&[4, 6])), ..fits.clone() },
        ExpertLinear { lora: Some(lora(&[8, 5], &[4, 7, 2])), ..fits.clone() },
        ExpertLinear { lora: Some(lora(&[4, 2, 5], &[4, 2, 7])), ..fits.clone() },
    ] {
        assert!(ops::expert_linear(&Tape::off(), &x, &wrong, &routing).is_err(), "{wrong:?}");
    }
}
