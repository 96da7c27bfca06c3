//! Tokens chosen by the device against those chosen by the host, which must be the same.

use super::*;
use crate::device::MaskKind;
use crate::ops::{Cursor, SEEN, SampleOptions, choose, sample};

const GREEDY: SampleOptions = SampleOptions {
    temperature: 0.0,
    top_k: 0,
    top_p: 1.0,
    min_p: 0.0,
    repetition_penalty: 1.0,
    presence_penalty: 0.0,
    frequency_penalty: 0.0,
    seed: 0x1234_5678_9ABC,
};

/// All keys, a window, a chunk that ends between two steps, and both, of which one or the other leaves fewer keys.
const KINDS: [MaskKind; 5] = [
    MaskKind::CAUSAL,
    MaskKind { window: Some(6), ..MaskKind::CAUSAL },
    MaskKind { chunk: Some(3), ..MaskKind::CAUSAL },
    MaskKind { window: Some(6), chunk: Some(5), ..MaskKind::CAUSAL },
    MaskKind { window: Some(2), chunk: Some(5), ..MaskKind::CAUSAL },
];

fn every_option() -> Vec<SampleOptions> {
    let warm = SampleOptions { temperature: 0.8, ..GREEDY };
    vec![
        GREEDY,
        warm,
        SampleOptions { top_k: 1, ..warm },
        SampleOptions { top_k: 40, ..warm },
        SampleOptions { top_k: 1_000_000, ..warm },
        SampleOptions { top_p: 0.9, ..warm },
        SampleOptions { top_p: 0.0, ..warm },
        SampleOptions { min_p: 0.2, temperature: 1.7, ..warm },
        SampleOptions { top_k: 50, top_p: 0.7, min_p: 0.05, ..warm },
        SampleOptions { repetition_penalty: 1.3, presence_penalty: 0.5, frequency_penalty: 0.1, ..GREEDY },
        SampleOptions { repetition_penalty: 0.7, frequency_penalty: -0.3, top_p: 0.95, ..warm },
        SampleOptions { temperature: 1e-45, ..warm },
    ]
}

/// Logits of a kind: spread out, near each other, with many equal ones, with tokens that are ruled out.
fn logits(kind: usize, seed: u64, vocabulary: usize) -> Vec<f32> {
    let spread = |x: f32| match kind {
        0 => x * 12.0,
        1 => x * 0.01,
        2 => (x * 3.0).round(),
        _ if x < 0.0 => f32::NEG_INFINITY,
        _ => x * x * 30.0,
    };
    numbers(seed, vocabulary).into_iter().map(spread).collect()
}

#[test]
fn the_device_chooses_the_tokens_that_the_host_chooses() {
    let Some(device) = emulated(5) else { return };
    for (index, vocabulary) in [1, 7, 1000, 2048, 5003].into_iter().enumerate() {
        for (number, options) in every_option().into_iter().enumerate() {
            let kind = (index + number) % 4;
            let mut counts: Vec<u32> = numbers(number as u64, vocabulary)
                .iter()
                .map(|x| if *x > 0.9 { SEEN | 3 } else { 0 })
                .collect();
            let mut cursor = Cursor::new(&device, &KINDS).unwrap();
            let held = options.has_penalties().then_some(&counts[..]);
            // Caches of some kinds have let go of what is not seen any more.
            let firsts = [0, 0, 2, 0, 3];
            cursor.place((0, 4), &firsts, 17, held).unwrap();
            assert_eq!(cursor.ranges.to_vec::<i32>().unwrap(), [0, 5, 0, 5, 1, 3, 0, 5, 0, 2]);
            let mut expected = Vec::new();
            for step in 0..3 {
                let values = logits(kind, 100 * step + number as u64, vocabulary);
                let held = options.has_penalties().then_some(&counts[..]);
                let token = choose(&values, held, 17 + step as u32, &options);
                if let Some(token) = token {
                    counts[token as usize] = (counts[token as usize] + 1) | SEEN;
                }
                expected.push(token);
                let tensor =
                    Tensor::from_slice(&device, Category::Workspace, &[1, vocabulary], &values).unwrap();
                sample(&tensor, &options, &cursor).unwrap();
            }
            let what = format!("{vocabulary} logits of kind {kind}, {options:?}");
            assert_eq!(cursor.chosen(17, 3).unwrap(), expected, "{what}");
            let last = expected[2].unwrap_or(0);
            assert_eq!(cursor.token().to_vec::<u32>().unwrap(), [last], "{what}");
            assert_eq!(cursor.position().to_vec::<u32>().unwrap(), [7]);
            assert_eq!(cursor.rows.to_vec::<u32>().unwrap(), [7, 7, 5, 7, 4]);
            assert_eq!(cursor.ranges.to_vec::<i32>().unwrap(), [0, 8, 2, 8, 4, 6, 5, 8, 3, 5]);
        }
    }
}

#[test]
fn many_logits_are_drawn_by_their_weights() {
    let Some(device) = emulated(6) else { return };
    let vocabulary = 140_000;
    for kind in [0, 2] {
        let values = logits(kind, 3, vocabulary);
        let options = SampleOptions { temperature: 1.0, top_k: 900, top_p: 0.8, ..GREEDY };
        let tensor = Tensor::from_slice(&device, Category::Workspace, &[1, vocabulary], &values).unwrap();
        let mut cursor = Cursor::new(&device, &[MaskKind::CAUSAL]).unwrap();
        cursor.place((0, 0), &[0], 0, None).unwrap();
        sample(&tensor, &options, &cursor).unwrap();
        assert_eq!(cursor.chosen(0, 1).unwrap(), [choose(&values, None, 0, &options)], "kind {kind}");
    }
}

#[test]
fn logits_that_are_not_fit_are_told() {
    let Some(device) = emulated(7) else { return };
    for (bad, options) in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY]
        .into_iter()
        .flat_map(|bad| [GREEDY, SampleOptions { temperature: 1.0, top_k: 2, ..GREEDY }].map(|o| (bad, o)))
    {
        let mut values = vec![if bad.is_nan() { 1.0 } else { f32::NEG_INFINITY }; 3000];
        values[2500] = bad;
        let tensor = Tensor::from_slice(&device, Category::Workspace, &[1, 3000], &values).unwrap();
        let mut cursor = Cursor::new(&device, &[MaskKind::CAUSAL]).unwrap();
        cursor.place((9, 0), &[0], 1023, None).unwrap();
        sample(&tensor, &options, &cursor).unwrap();
        assert_eq!(choose(&values, None, 1023, &options), None);
        assert_eq!(cursor.chosen(1023, 1).unwrap(), [None], "{bad}");
        assert_eq!(cursor.token().to_vec::<u32>().unwrap(), [0]);
    }
}

#[test]
fn more_tokens_than_are_remembered_are_refused() {
    let Some(device) = emulated(8) else { return };
    let cursor = Cursor::new(&device, &[MaskKind::CAUSAL]).unwrap();
    assert!(cursor.chosen(0, Cursor::MOST_CHOSEN + 1).is_err());
    assert!(Cursor::new(&Device::cpu(), &[MaskKind::CAUSAL]).is_err());
    let mut cursor = Cursor::new(&device, &KINDS).unwrap();
    let gone = cursor.place((0, 10), &[0, 0, 10, 0, 0], 0, None).unwrap_err().to_string();
    assert!(gone.contains("first token of a cache"), "{gone}");
}
