//! Against sums in f64, where there is a device. Without one the test says so and passes.

use half::bf16;

use super::*;
use crate::Device;

/// Numbers from -1 to 1 that bf16 holds.
fn numbers(seed: usize, count: usize) -> Vec<bf16> {
    let mut state = (seed as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    let next = |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bf16::from_f32((state >> 40) as f32 / (1 << 23) as f32 - 1.0)
    };
    (0..count).map(next).collect()
}

struct Case {
    left: Vec<bf16>,
    right: Vec<bf16>,
    columns: [usize; 2],
}

/// Columns of left and right: wide by thin and thin by wide, ragged, and none of both thin.
const COLUMNS: [[usize; 2]; 20] = [
    [300, 16],
    [48, 1000],
    [8, 8],
    [130, 64],
    [1, 40],
    [72, 5],
    [16, 128],
    [128, 24],
    [96, 80],
    [16, 2048],
    [2048, 16],
    [64, 64],
    [33, 200],
    [16, 16],
    [640, 32],
    [32, 640],
    [16, 257],
    [264, 8],
    [16, 96],
    [512, 16],
];

#[test]
fn gradients_are_sums_over_tokens_added_to_what_was_there() {
    let device = match Device::cuda(0, false) {
        Ok(device) => device,
        Err(error) => return println!("skipped: no CUDA device ({error})"),
    };
    for (count, tokens) in [(20, 1000), (1, 1), (3, 63), (2, 4096), (20, 130)] {
        let cases: Vec<Case> = COLUMNS[..count]
            .iter()
            .enumerate()
            .map(|(index, &columns)| Case {
                left: numbers(2 * index, tokens * columns[0]),
                right: numbers(2 * index + 1, tokens * columns[1]),
                columns,
            })
            .collect();
        let first = computed(&device, &cases, tokens);
        for (case, sums) in cases.iter().zip(&first) {
            check(case, tokens, sums);
        }
        assert_eq!(first, computed(&device, &cases, tokens), "a second run gives other bits");
    }
}

/// On a card of 132 multiprocessors the seven together have smaller tiles of tokens than one alone.
#[test]
fn gradients_do_not_depend_on_what_else_is_in_their_launch() {
    let device = match Device::cuda(0, false) {
        Ok(device) => device,
        Err(error) => return println!("skipped: no CUDA device ({error})"),
    };
    let (tokens, columns) = (1100, [16, 2048]);
    let case = |index: usize| Case {
        left: numbers(2 * index, tokens * columns[0]),
        right: numbers(2 * index + 1, tokens * columns[1]),
        columns,
    };
    let cases: Vec<Case> = (0..7).map(case).collect();
    let together = computed(&device, &cases, tokens);
    for (case, sums) in cases.iter().zip(&together) {
        check(case, tokens, sums);
        assert_eq!(&computed(&device, std::slice::from_ref(case), tokens)[0], sums);
    }
}

/// Results over tensors whose rows lie apart, from a gradient of ones.
fn computed(device: &Device, cases: &[Case], tokens: usize) -> Vec<Vec<f32>> {
    const APART: usize = 8;
    let place = |values: &[bf16], columns: usize| {
        let padded = (columns + APART).next_multiple_of(8);
        let mut rows = vec![bf16::NAN; tokens * padded];
        for (row, values) in rows.chunks_mut(padded).zip(values.chunks(columns)) {
            row[..columns].copy_from_slice(values);
        }
        let whole = Tensor::from_slice(device, Category::Workspace, &[tokens, padded], &rows);
        whole.and_then(|whole| whole.block([0, tokens], [0, columns])).expect("memory")
    };
    let sides: Vec<[Tensor; 2]> = cases
        .iter()
        .map(|case| [place(&case.left, case.columns[0]), place(&case.right, case.columns[1])])
        .collect();
    let ones = |case: &Case| {
        let values = vec![1.0_f32; case.columns[0] * case.columns[1]];
        Tensor::from_slice(device, Category::Gradients, &case.columns, &values).expect("memory")
    };
    let mut sums: Vec<Tensor> = cases.iter().map(ones).collect();
    let mut gradients: Vec<WeightGradient<'_>> = Vec::new();
    for ([left, right], out) in sides.iter().zip(&mut sums) {
        gradients.push(WeightGradient { left, right, out, scale: 0.5 });
    }
    device.kernels().add_weight_gradients(&mut gradients).expect("gradients");
    drop(gradients);
    sums.iter().map(|sum| sum.to_vec::<f32>().expect("a result")).collect()
}

fn check(case: &Case, tokens: usize, sums: &[f32]) {
    let [rows, columns] = case.columns;
    for (index, sum) in sums.iter().enumerate() {
        let (row, column) = (index / columns, index % columns);
        let product = |token: usize| {
            f64::from(case.left[token * rows + row].to_f32())
                * f64::from(case.right[token * columns + column].to_f32())
        };
        let exact = 1.0 + 0.5 * (0..tokens).map(product).sum::<f64>();
        let bound = 1e-6 * (tokens as f64).max(16.0);
        assert!(
            (f64::from(*sum) - exact).abs() <= bound,
            "{tokens} tokens, {rows} x {columns}, ({row}, {column}): {sum} instead of {exact}"
        );
    }
}
