//! Scores by matrix units against the plain loops, and their times.

use std::cell::RefCell;
use std::sync::Arc;

use super::*;
use crate::agreement::{Inputs, numbers, round};
use crate::device::{MaskKind, Segment, Store};
use crate::{Device, testing};

/// Documents of so many keys and of queries at their end, from a token on, in a window, and how their keys are scored.
struct Case {
    documents: &'static [(usize, usize)],
    gap: usize,
    window: Option<usize>,
    heads: usize,
    width: usize,
    /// Columns between rows.
    padding: usize,
    /// The first query that is asked for, and how many keys are chosen.
    first: usize,
    count: usize,
}

const CASE: Case = Case {
    documents: &[(40, 40)],
    gap: 0,
    window: None,
    heads: 2,
    width: 32,
    padding: 0,
    first: 0,
    count: 3,
};

/// Ends of tiles of queries and keys, of SIMD groups and of rows that are ragged; documents within and across tiles.
const CASES: [Case; 8] = [
    CASE,
    Case { documents: &[(1, 1)], heads: 1, count: 1, ..CASE },
    Case { documents: &[(33, 33), (1, 1), (70, 70)], gap: 3, width: 128, padding: 8, ..CASE },
    Case { documents: &[(300, 40), (9, 9)], gap: 1, heads: 3, width: 64, first: 5, ..CASE },
    Case { documents: &[(520, 3)], heads: 5, width: 96, padding: 24, count: 519, ..CASE },
    Case { documents: &[(130, 130)], window: Some(37), heads: 1, count: 20, ..CASE },
    // Nobody chooses among so few keys, in the first tile of queries or in both.
    Case { documents: &[(64, 64)], count: 40, ..CASE },
    Case { documents: &[(64, 64)], count: 64, ..CASE },
];

fn gpu_of(device: &Device) -> Gpu {
    let Store::Remote(runtime) = &device.0.store else { panic!("the device is a processor") };
    Gpu::new(Arc::clone(runtime))
}

impl Case {
    fn mask(&self, device: &Device) -> AttentionMask {
        let (mut query_start, mut key_start) = (self.gap, self.gap);
        let segments = self.documents.iter().map(|&(key_length, query_length)| {
            let segment = Segment { query_start, query_length, key_start, key_length };
            query_start += query_length;
            key_start += key_length;
            segment
        });
        let segments: Arc<[Segment]> = segments.collect();
        let kind = MaskKind { window: self.window, ..MaskKind::CAUSAL };
        AttentionMask::new(device, kind, segments, [query_start, key_start]).unwrap()
    }

    /// Queries, keys and weights; what belongs to no document is no number.
    fn inputs(&self, device: &Device, dtype: DType, [tokens, keys]: [usize; 2]) -> [Tensor; 3] {
        let inputs = Inputs { device, dtype, rounding: dtype, padding: 0, pads: RefCell::default() };
        let place = |dtype: DType, seed: u64, shape: &[usize], padding: usize| {
            let row: usize = shape[1..].iter().product();
            let mut values = numbers(seed, shape.iter().product());
            values.iter_mut().for_each(|value| *value = round(*value, dtype));
            values[..self.gap * row].fill(f32::NAN);
            inputs.place(dtype, shape, padding, &values).unwrap()
        };
        [
            place(dtype, 1, &[tokens, self.heads, self.width], self.padding),
            place(dtype, 2, &[keys, self.width], self.padding),
            place(DType::F32, 3, &[tokens, self.heads], self.padding),
        ]
    }

    /// How many queries are asked for: but for the last, so that there is one behind them.
    fn rows(&self, tokens: usize) -> usize {
        (tokens - self.first).max(2) - 1
    }

    /// Scores and the rest of a tile of rows, no numbers where none were written, by matrix units or by the plain loops.
    fn scores(&self, device: &Device, dtype: DType, by_units: bool) -> Vec<f32> {
        let (gpu, mask) = (gpu_of(device), self.mask(device));
        let [tokens, keys] = mask.tokens;
        let inputs = self.inputs(device, dtype, mask.tokens);
        let inputs = inputs.each_ref();
        assert!(gpu.scores_by_units(inputs), "{dtype} heads of {} are not for units", self.width);
        let rows = self.rows(tokens);
        let shape = [rows.next_multiple_of(32), keys];
        let poison = vec![f32::NAN; shape[0] * keys];
        let scores = Tensor::from_slice(device, Category::Workspace, &shape, &poison).unwrap();
        gpu.score_keys(&mask, inputs, [self.first, rows, self.count], by_units, &scores);
        scores.to_vec::<f32>().unwrap()
    }

    fn check(&self, device: &Device, dtype: DType) {
        let mask = self.mask(device);
        let [tokens, keys] = mask.tokens;
        let [tiled, plain] = [true, false].map(|by_units| self.scores(device, dtype, by_units));
        let mut seen = vec![0..0; tokens + 32];
        for segment in mask.segments() {
            for query in 0..segment.query_length {
                let own = segment.visible(mask.kind, query);
                seen[segment.query_start + query] =
                    segment.key_start + own.start..segment.key_start + own.end;
            }
        }
        seen[self.first + self.rows(tokens)..].fill(0..0);
        for (index, (tiled, plain)) in tiled.into_iter().zip(plain).enumerate() {
            let (query, key) = (self.first + index / keys, index % keys);
            let own = &seen[query];
            let what = format!("query {query}, key {key} of {own:?}: {:?}, {dtype}", self.documents);
            if own.len() > self.count && own.contains(&key) {
                let close = 2e-6 * (self.heads * self.width) as f32;
                assert!((tiled - plain).abs() <= close, "{what}: {tiled} by units, {plain} by loops");
            } else if !own.contains(&key) {
                assert!(tiled.is_nan(), "{what}: {tiled} was written");
            }
        }
    }
}

mod scores_by_matrix_units_are_those_of_plain_loops {
    use super::*;

    #[test]
    fn emulator() {
        for (seed, case) in CASES.iter().enumerate() {
            let Some(device) = testing::emulator(seed as u64 + 1) else { return };
            case.check(&device, if seed % 3 == 1 { DType::F16 } else { DType::Bf16 });
        }
    }

    #[test]
    fn cuda() {
        let Some(device) = testing::cuda("scores by matrix units") else { return };
        for (case, dtype) in CASES.iter().flat_map(|case| [(case, DType::Bf16), (case, DType::F16)]) {
            case.check(&device, dtype);
        }
    }
}

#[test]
fn odd_rows_wide_heads_and_f32_are_left_to_plain_loops() {
    let Some(device) = testing::emulator(1) else { return };
    let gpu = gpu_of(&device);
    for (dtype, width, padding, by_units) in [
        (DType::Bf16, 128, 0, true),
        (DType::F16, 64, 8, true),
        (DType::F32, 128, 0, false),
        (DType::Bf16, 128, 4, false),
        (DType::Bf16, 48, 0, false),
        (DType::Bf16, 160, 0, false),
    ] {
        let inputs = Case { width, padding, ..CASE }.inputs(&device, dtype, [4, 4]);
        assert_eq!(gpu.scores_by_units(inputs.each_ref()), by_units, "{dtype} {width} {padding}");
    }
}

#[test]
#[ignore = "measures"]
fn times_of_scores() {
    let Some(device) = testing::cuda("times of scores") else { return };
    let gpu = gpu_of(&device);
    let four = [(2048, 2048); 4];
    for (documents, count) in [(&four[..], 0), (&four, 512), (&[(8192, 8192)], 0), (&[(8192, 8192)], 2048)] {
        let documents: &'static [(usize, usize)] = Vec::leak(documents.to_vec());
        let case = Case { documents, heads: 64, width: 128, count, ..CASE };
        let mask = case.mask(&device);
        let inputs = case.inputs(&device, DType::Bf16, mask.tokens);
        let [tokens, keys] = mask.tokens;
        let scores = Tensor::scratch(&device, Category::Workspace, DType::F32, &[2048, keys]).unwrap();
        let seen = documents.iter().flat_map(|&(keys, _)| 1..=keys).filter(|&keys| keys > count);
        let flops = 2.0 * (seen.sum::<usize>() * case.heads * case.width) as f64;
        for by_units in [true, false] {
            let work = || {
                for first in (0..tokens).step_by(2048) {
                    gpu.score_keys(&mask, inputs.each_ref(), [first, 2048, count], by_units, &scores);
                }
            };
            (0..3).for_each(|_| work());
            device.synchronize().unwrap();
            let start = std::time::Instant::now();
            (0..10).for_each(|_| work());
            device.synchronize().unwrap();
            let each = start.elapsed().as_secs_f64() / 10.0;
            let what = format!("{} documents of {}, {count} chosen", documents.len(), documents[0].0);
            println!("{what}, by units {by_units}: {:.3} ms, {:.0} TFLOP/s", each * 1e3, flops / each / 1e12);
        }
    }
}
