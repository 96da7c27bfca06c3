use super::*;
use crate::ops;

on_every_device! {
    choices_and_their_weights_agree_with_the_reference,
    rows_are_ordered_by_expert_and_token,
    of_equal_logits_the_first_is_chosen_and_no_number_is_the_lowest,
    the_balance_of_experts_agrees_with_the_reference,
    a_balance_is_the_same_where_blocks_are_computed_again,
}

const ROUTERS: [(Router, bool); 7] = [
    (PLAIN, false),
    (Router { choices: 4, normalise: Some(0.0), ..PLAIN }, false),
    (Router { gate: Gate::Sigmoid, choices: 1, ..PLAIN }, false),
    (Router { choices: 3, ..PLAIN }, true),
    (
        Router {
            gate: Gate::Sigmoid,
            choices: 3,
            normalise: Some(1e-20),
            groups: Some(Groups { count: 4, chosen: 2 }),
            scale: 2.5,
        },
        true,
    ),
    (Router { groups: Some(Groups { count: 2, chosen: 1 }), ..PLAIN }, false),
    (Router { gate: Gate::Sigmoid, choices: 4, normalise: Some(0.25), ..PLAIN }, true),
];

fn choices_and_their_weights_agree_with_the_reference(device: &Device) {
    for (router, corrected) in ROUTERS {
        for (tokens, experts) in [(1, 8), (5, 12), (70, 36), (3, 256)] {
            for &dtype in types(device) {
                let what = format!("{router:?} {dtype} {tokens} of {experts}");
                let logits: Vec<f64> =
                    numbers("logits", tokens * experts, dtype).iter().map(|x| x * 4.0).collect();
                let correction = if corrected { numbers("correction", experts, DType::F32) } else { vec![] };
                let expected = chosen(&logits, experts, &router, &correction);
                let correction = corrected.then(|| tensor(device, DType::F32, &[experts], &correction));
                let tape = Tape::recording();
                let leaf = tape.leaf(tensor(device, dtype, &[tokens, experts], &logits));
                let routing = ops::route(&tape, &leaf, &router, correction.as_ref(), None).unwrap();
                assert_eq!(routing.chosen().to_vec::<u32>().unwrap(), expected, "{what}");
                let function = |inputs: &[Vec<f64>]| weights(&inputs[0], experts, &router, &expected);
                let inputs = [logits];
                assert_close(&what, &wide(routing.weights.tensor()), &function(&inputs), F32_ERROR);
                let d_weights = numbers("d_weights", tokens * router.choices, DType::F32);
                let shape = [tokens, router.choices];
                let arriving = tensor(device, DType::F32, &shape, &d_weights);
                let mut gradients = tape.backward(&routing.weights, arriving).unwrap();
                let ours = [arrived(&mut gradients, &leaf)];
                assert_gradients(&what, &function, &inputs, &d_weights, &ours, tolerance(dtype));
            }
        }
    }
}

fn rows_are_ordered_by_expert_and_token(device: &Device) {
    // Beyond the pairs that one group of threads ranks, and experts that nobody chose.
    for (tokens, experts, choices) in [(0, 4, 2), (1, 3, 3), (7, 40, 1), (300, 5, 4), (800, 130, 2)] {
        for name in ["any", "same", "late"] {
            let logits = loads(name, tokens, experts);
            let (_, routing) = routed(device, &Tape::off(), &logits, experts, choices, false);
            let chosen = chosen(&logits, experts, &Router { choices, ..PLAIN }, &[]);
            let plan = routing.plan();
            let read = |tensor: &Tensor| -> Vec<usize> {
                tensor.to_vec::<u32>().unwrap().into_iter().map(|index| index as usize).collect()
            };
            let expected = order(&chosen);
            assert_eq!(read(&plan.order), expected, "{name} {tokens} {experts} {choices}");
            let places = read(&plan.places);
            assert!(expected.iter().enumerate().all(|(row, &pair)| places[pair] == row));
            let below = |limit: usize| chosen.iter().filter(|&&expert| (expert as usize) < limit).count();
            assert_eq!(read(&plan.offsets), (0..=experts).map(below).collect::<Vec<_>>());
            let Some(tiles) = &plan.tiles else { continue };
            let mut next = 0;
            for tile in read(&tiles.tiles).chunks(3).filter(|tile| tile[2] > 0) {
                assert_eq!(tile[1], next, "tiles follow each other");
                assert!(tile[2] <= tiles.rows);
                let is_own = |row: usize| chosen[expected[row]] as usize == tile[0];
                assert!((tile[1]..tile[1] + tile[2]).all(is_own), "a tile is of one expert");
                next += tile[2];
            }
            assert_eq!(next, chosen.len());
        }
    }
}

fn of_equal_logits_the_first_is_chosen_and_no_number_is_the_lowest(device: &Device) {
    let nan = f64::NAN;
    let logits = [
        [1.0, 2.0, 2.0, 2.0, 0.0],
        [nan, -3.0, nan, -4.0, nan],
        [nan; 5],
        [f64::NEG_INFINITY, 0.0, f64::INFINITY, 0.0, nan],
        [0.0, -0.0, 0.0, -0.0, 0.0],
    ];
    let expected = [[1, 2, 3], [1, 3, 0], [0, 1, 2], [2, 1, 3], [0, 1, 2]];
    let values: Vec<f64> = logits.iter().flatten().copied().collect();
    let (_, routing) = routed(device, &Tape::off(), &values, 5, 3, false);
    let chosen = routing.chosen().to_vec::<u32>().unwrap();
    assert_eq!(chosen, expected.as_flattened());
    let grouped = Router { choices: 2, groups: Some(Groups { count: 2, chosen: 1 }), ..PLAIN };
    let values: Vec<f64> = [nan; 4].into_iter().chain([1.0, nan, 0.0, 2.0]).collect();
    let logits = Var::constant(tensor(device, DType::F32, &[2, 4], &values));
    let routing = ops::route(&Tape::off(), &logits, &grouped, None, None).unwrap();
    let chosen = routing.chosen().to_vec::<u32>().unwrap();
    assert!(chosen.chunks(2).all(|pair| pair[0] != pair[1] && pair.iter().all(|&x| x < 4)), "{chosen:?}");
}

/// `load_balancing_loss_func` of transformers, over layers of as many logits.
fn balance(
    layers: &[&[f64]],
    chosen: &[Vec<u32>],
    experts: usize,
    choices: usize,
    mask: Option<&[f64]>,
) -> f64 {
    let (mut shares, mut times, mut tokens) = (vec![0.0; experts], vec![0.0; experts], 0.0);
    for (logits, chosen) in layers.iter().zip(chosen) {
        for (token, logits) in logits.chunks(experts).enumerate() {
            let factor = mask.map_or(1.0, |mask| mask[token]);
            let scores = scores(Gate::Softmax, logits);
            shares.iter_mut().zip(scores).for_each(|(sum, score)| *sum += factor * score);
            for &expert in &chosen[token * choices..][..choices] {
                times[expert as usize] += factor;
            }
            tokens += factor;
        }
    }
    let products = shares.iter().zip(&times).map(|(share, times)| share / tokens * times / tokens);
    experts as f64 * products.sum::<f64>()
}

fn the_balance_of_experts_agrees_with_the_reference(device: &Device) {
    for (tokens, experts, choices) in [(1, 3, 2), (9, 40, 3), (150, 8, 2)] {
        for (masked, &dtype) in
            [false, true].into_iter().flat_map(|m| types(device).iter().map(move |t| (m, t)))
        {
            let what = format!("balance {tokens} {experts} {masked} {dtype}");
            let router = Router { choices, normalise: Some(0.0), ..PLAIN };
            let inputs: Vec<Vec<f64>> =
                ["first", "second"].map(|name| numbers(name, tokens * experts, dtype)).into();
            let mask: Vec<f64> = (0..tokens).map(|token| f64::from(u8::from(token % 3 != 1))).collect();
            let place = masked.then(|| tensor(device, DType::F32, &[tokens], &mask));
            let tape = Tape::recording();
            let balanced = balance_by(device, experts, place, 0.5);
            let leaves: Vec<Var> = inputs
                .iter()
                .map(|logits| tape.leaf(tensor(device, dtype, &[tokens, experts], logits)))
                .collect();
            let route = |leaf| ops::route(&tape, leaf, &router, None, Some(&balanced)).unwrap();
            let routings: Vec<Routing> = leaves.iter().map(route).collect();
            let chosen: Vec<Vec<u32>> =
                routings.iter().map(|routing| routing.chosen().to_vec().unwrap()).collect();
            let mask = masked.then_some(mask.as_slice());
            let function = |inputs: &[Vec<f64>]| {
                let layers: Vec<&[f64]> = inputs.iter().map(Vec::as_slice).collect();
                let weighed = weights(&inputs[1], experts, &router, &chosen[1]);
                [vec![balance(&layers, &chosen, experts, choices, mask)], weighed].concat()
            };
            let loss = balanced.loss().unwrap();
            assert_close(&what, &wide(&loss), &function(&inputs)[..1], F32_ERROR);
            // The last layer's weights want a gradient of their own, the first one's do not.
            let d_weights = numbers("d_weights", tokens * choices, DType::F32);
            let arriving = tensor(device, DType::F32, &[tokens, choices], &d_weights);
            let mut gradients = tape.backward(&routings[1].weights, arriving).unwrap();
            let ours: Vec<_> = leaves.iter().map(|leaf| arrived(&mut gradients, leaf)).collect();
            let d_out = [vec![0.5], d_weights].concat();
            assert_gradients(&what, &function, &inputs, &d_out, &ours, tolerance(dtype));
        }
    }
}

fn a_balance_is_the_same_where_blocks_are_computed_again(device: &Device) {
    let (tokens, experts) = (20, 6);
    let logits = numbers("logits", tokens * experts, DType::F32);
    let run = |again: bool| {
        let balanced = balance_by(device, experts, None, 2.0);
        let tape = Tape::recording();
        let leaf = tape.leaf(tensor(device, DType::F32, &[tokens, experts], &logits));
        let inner = balanced.clone();
        let block = move |tape: &Tape, x: Var| {
            let routing = ops::route(tape, &x, &PLAIN, None, Some(&inner))?;
            Ok(routing.weights)
        };
        let y =
            if again { tape.checkpoint(leaf.clone(), block) } else { block(&tape, leaf.clone()) }.unwrap();
        let d_y = tensor(device, DType::F32, &[tokens, 2], &numbers("d_y", 2 * tokens, DType::F32));
        let mut gradients = tape.backward(&y, d_y).unwrap();
        [bits(&gradients.take(leaf.slot().unwrap()).unwrap()), bits(&balanced.loss().unwrap())]
    };
    assert_eq!(run(true), run(false));
}

#[test]
fn the_choice_of_experts_has_the_same_bits_everywhere() {
    assert_same_bits_everywhere("route", &|| {
        let device = Device::cpu();
        let (tokens, experts) = (333, 37);
        let mut results = Vec::new();
        for gate in [Gate::Softmax, Gate::Sigmoid] {
            let tape = Tape::recording();
            let logits = numbers("logits", tokens * experts, DType::F32);
            let leaf = tape.leaf(tensor(&device, DType::F32, &[tokens, experts], &logits));
            let balanced = balance_by(&device, experts, None, 2.0);
            let router = Router { gate, choices: 5, normalise: Some(0.0), ..PLAIN };
            let balance = (gate == Gate::Softmax).then_some(&balanced);
            let routing = ops::route(&tape, &leaf, &router, None, balance).unwrap();
            let d = tensor(&device, DType::F32, &[tokens, 5], &numbers("d", tokens * 5, DType::F32));
            let mut gradients = tape.backward(&routing.weights, d).unwrap();
            results.push(bits(routing.weights.tensor()));
            results.push(bits(&gradients.take(leaf.slot().unwrap()).unwrap()));
            results.push(bits(&balanced.loss().unwrap()));
        }
        results
    });
}

#[test]
fn routers_that_cannot_choose_are_refused() {
    let device = Device::cpu();
    let logits = Var::constant(tensor(&device, DType::F32, &[2, 6], &[0.0; 12]));
    let groups = |count, chosen| Some(Groups { count, chosen });
    for router in [
        Router { choices: 0, ..PLAIN },
        Router { choices: 7, ..PLAIN },
        Router { choices: 33, ..PLAIN },
        Router { groups: groups(0, 0), ..PLAIN },
        Router { groups: groups(4, 2), ..PLAIN },
        Router { groups: groups(6, 2), ..PLAIN },
        Router { groups: groups(3, 4), ..PLAIN },
        Router { choices: 3, groups: groups(3, 1), ..PLAIN },
    ] {
        assert!(ops::route(&Tape::off(), &logits, &router, None, None).is_err(), "{router:?}");
    }
    let short = tensor(&device, DType::F32, &[5], &[0.0; 5]);
    assert!(ops::route(&Tape::off(), &logits, &PLAIN, Some(&short), None).is_err());
    let sigmoid = Router { gate: Gate::Sigmoid, ..PLAIN };
    for (router, experts, tokens) in [(sigmoid, 6, 2), (PLAIN, 5, 2), (PLAIN, 6, 3)] {
        let mask = tensor(&device, DType::F32, &[tokens], &vec![1.0; tokens]);
        let balanced = balance_by(&device, experts, Some(mask), 1.0);
        assert!(ops::route(&Tape::off(), &logits, &router, None, Some(&balanced)).is_err());
    }
}
