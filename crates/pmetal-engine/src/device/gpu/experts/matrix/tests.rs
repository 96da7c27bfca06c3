//! Against sums in f64, where there is a device. Without one the tests say so and pass.

mod times;

use half::{bf16, f16};

use super::*;
use crate::Device;
use crate::memory::Category;

fn device() -> Option<Device> {
    match Device::cuda(0, false) {
        Ok(device) => Some(device),
        Err(error) => {
            println!("skipped: no CUDA device ({error})");
            None
        }
    }
}

/// Numbers from -1 to 1 that the type holds.
fn numbers(seed: usize, count: usize, dtype: DType) -> Vec<f32> {
    let mut state = (seed as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    let next = |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        crate::agreement::round((state >> 40) as f32 / (1 << 23) as f32 - 1.0, dtype)
    };
    (0..count).map(next).collect()
}

fn place(device: &Device, dtype: DType, shape: &[usize], values: &[f32]) -> Tensor {
    let category = Category::Workspace;
    match dtype {
        DType::Bf16 => {
            let values: Vec<bf16> = values.iter().map(|&x| bf16::from_f32(x)).collect();
            Tensor::from_slice(device, category, shape, &values)
        }
        DType::F16 => {
            let values: Vec<f16> = values.iter().map(|&x| f16::from_f32(x)).collect();
            Tensor::from_slice(device, category, shape, &values)
        }
        _ => Tensor::from_slice(device, category, shape, values),
    }
    .expect("memory")
}

/// Rows as [`place`] puts them, with 8 columns of no number between them.
fn apart(device: &Device, dtype: DType, [rows, columns]: [usize; 2], values: &[f32]) -> Tensor {
    let padded: Vec<f32> =
        values.chunks(columns).flat_map(|row| row.iter().copied().chain([f32::NAN; 8])).collect();
    let whole = place(device, dtype, &[rows, columns + 8], &padded);
    whole.split_columns(&[columns, 8]).expect("columns").swap_remove(0)
}

/// Tokens, experts and choices that give tiles of 16, 64 and 128 rows, with ragged ends and experts without rows.
const LOADS: [[usize; 3]; 4] = [[1, 6, 3], [20, 5, 1], [90, 7, 3], [333, 3, 2]];

fn plan(device: &Device, [tokens, experts, choices]: [usize; 3]) -> (RoutingPlan, Vec<usize>) {
    let chosen: Vec<u32> = (0..tokens)
        .flat_map(|token| (0..choices).map(move |choice| ((token * token / 3 + choice) % experts) as u32))
        .map(|expert| if expert == 1 && choices == 1 { 0 } else { expert })
        .collect();
    let tensor =
        Tensor::from_slice(device, Category::Workspace, &[tokens, choices], &chosen).expect("memory");
    let plan = device.kernels().experts().plan_experts(tensor, experts).expect("a plan");
    let mut of_rows: Vec<usize> = chosen.iter().map(|&expert| expert as usize).collect();
    of_rows.sort_unstable();
    (plan, of_rows)
}

fn assert_near(what: &str, actual: &[f32], expected: &[f64], error: f64) {
    let largest = expected.iter().fold(0.0_f64, |largest, value| largest.max(value.abs()));
    assert_eq!(actual.len(), expected.len());
    for (index, (&actual, &expected)) in actual.iter().zip(expected).enumerate() {
        let close = (f64::from(actual) - expected).abs() <= error * largest;
        assert!(close, "{what}: {actual} instead of {expected} at {index}");
    }
}

fn tolerance(dtype: DType) -> f64 {
    if dtype == DType::F16 { 1e-3 } else { 6e-3 }
}

/// x \[P, K\] times the stack of each row's expert.
fn product_of(x: &[f32], stack: &[f32], of_rows: &[usize], [k, n]: [usize; 2], turned: bool) -> Vec<f64> {
    let mut out = Vec::with_capacity(of_rows.len() * n);
    for (x, &expert) in x.chunks(k).zip(of_rows) {
        let own = &stack[expert * k * n..][..k * n];
        let at = |i: usize, column: usize| own[if turned { column * k + i } else { i * n + column }];
        let sum = |column| (0..k).map(|i| f64::from(x[i]) * f64::from(at(i, column))).sum::<f64>();
        out.extend((0..n).map(sum));
    }
    out
}

#[test]
fn tiles_of_experts_are_multiplied_as_sums_in_f64() {
    let Some(device) = device() else { return };
    multiply_tiles(&device);
    FORCED.set(Some(false));
    multiply_tiles(&device);
    FORCED.set(None);
}

fn multiply_tiles(device: &Device) {
    let kernels = device.kernels().experts();
    for (load, [k, n, rank]) in
        LOADS.into_iter().flat_map(|l| [[8, 16, 8], [200, 264, 16], [64, 128, 72]].map(|s| (l, s)))
    {
        let (plan, of_rows) = plan(device, load);
        let (rows, experts) = (of_rows.len(), load[1]);
        for (variant, dtype) in (0..4).flat_map(|v| [(v, DType::Bf16), (v, DType::F16)]) {
            let (turned, second_turned) = (variant & 1 == 1, variant & 2 == 2);
            let what = format!("{load:?} {k} {n} {rank} {dtype} {turned} {second_turned}");
            let values = |seed, count| numbers(seed, count, dtype);
            let (x, w, y, v) = (
                values(1, rows * k),
                values(2, experts * k * n),
                values(3, rows * rank),
                values(4, experts * rank * n),
            );
            let bias = numbers(5, experts * n, DType::F32);
            let held = values(6, rows * n);
            let stack_shape = |k, turned| if turned { [experts, n, k] } else { [experts, k, n] };
            let left = apart(device, dtype, [rows, k], &x);
            let second = apart(device, dtype, [rows, rank], &y);
            let stack = place(device, dtype, &stack_shape(k, turned), &w);
            // As a trained adapter, in f32.
            let second_stack = place(device, DType::F32, &stack_shape(rank, second_turned), &v);
            let bias_tensor = place(device, DType::F32, &[experts, n], &bias);
            let operand = |tensor, transposed| Operand { tensor, transposed };
            let products =
                [(&left, operand(&stack, turned)), (&second, operand(&second_stack, second_turned))];
            let run = |count: usize, finish: &ExpertFinish<'_>| {
                let mut out = apart(device, dtype, [rows, n], &held);
                let arithmetic = crate::device::Arithmetic::of(dtype);
                kernels
                    .multiply_experts(&products[..count], &plan, finish, &mut out, arithmetic)
                    .expect("products");
                out.to_f32_vec().expect("results")
            };
            let main = product_of(&x, &w, &of_rows, [k, n], turned);
            let low = product_of(&y, &v, &of_rows, [rank, n], second_turned);
            let one = ExpertFinish { scale: 0.5, bias: Some(&bias_tensor), accumulate: false };
            let of_expert = |index: usize| f64::from(bias[of_rows[index / n] * n + index % n]);
            let expected: Vec<f64> =
                main.iter().enumerate().map(|(index, sum)| 0.5 * sum + of_expert(index)).collect();
            assert_near(&what, &run(1, &one), &expected, tolerance(dtype));
            let both = ExpertFinish { accumulate: true, ..ExpertFinish::STORE };
            let parts = main.iter().zip(&low).zip(&held);
            let expected: Vec<f64> = parts.map(|((main, low), held)| main + low + f64::from(*held)).collect();
            let sums = run(2, &both);
            assert_near(&what, &sums, &expected, tolerance(dtype));
            assert!(sums == run(2, &both), "{what}: a second run gives other bits");
        }
    }
}

#[test]
fn a_block_multiplies_more_tiles_than_one() {
    let Some(device) = device() else { return };
    let ([k, n], load, dtype) = ([72, 1544], [1200, 7, 3], DType::Bf16);
    let (plan, of_rows) = plan(&device, load);
    let rows = of_rows.len();
    let (x, w) = (numbers(1, rows * k, dtype), numbers(2, load[1] * k * n, dtype));
    let (left, stack) = (apart(&device, dtype, [rows, k], &x), place(&device, dtype, &[load[1], k, n], &w));
    let tiles = plan.tiles.as_ref().expect("tiles").tiles.rows();
    assert!(tiles * n.div_ceil(256) > 200, "no block has several of {tiles} tiles");
    let mut out = Tensor::scratch(&device, Category::Workspace, dtype, &[rows, n]).expect("memory");
    let product = (&left, Operand { tensor: &stack, transposed: false });
    let arithmetic = crate::device::Arithmetic::of(dtype);
    let kernels = device.kernels().experts();
    kernels
        .multiply_experts(&[product], &plan, &ExpertFinish::STORE, &mut out, arithmetic)
        .expect("products");
    let expected = product_of(&x, &w, &of_rows, [k, n], false);
    assert_near("many tiles", &out.to_f32_vec().expect("results"), &expected, tolerance(dtype));
}

#[test]
fn gradients_of_experts_are_sums_over_their_rows() {
    let Some(device) = device() else { return };
    let kernels = device.kernels().experts();
    for (load, [m, n]) in
        LOADS.into_iter().flat_map(|l| [[8, 136], [264, 16], [40, 33], [200, 72], [128, 256]].map(|s| (l, s)))
    {
        let (plan, of_rows) = plan(&device, load);
        for dtype in [DType::Bf16, DType::F16] {
            let what = format!("gradient {load:?} {m} {n} {dtype}");
            let rows = of_rows.len();
            let (x, y) = (numbers(1, rows * m, dtype), numbers(2, rows * n, dtype));
            let left = apart(&device, dtype, [rows, m], &x);
            // Rows of 33 columns lie 40 apart.
            let wide = n.next_multiple_of(8) + 8;
            let padded: Vec<f32> = y
                .chunks(n)
                .flat_map(|row| row.iter().copied().chain(std::iter::repeat_n(f32::NAN, wide - n)))
                .collect();
            let whole = place(&device, dtype, &[rows, wide], &padded);
            let right = whole.split_columns(&[n, wide - n]).expect("columns").swap_remove(0);
            let held = numbers(3, load[1] * m * n, DType::F32);
            let run = || {
                let mut out = place(&device, DType::F32, &[load[1], m, n], &held);
                kernels.add_expert_gradients(&left, &right, &plan, 0.5, &mut out).expect("gradients");
                out.to_f32_vec().expect("results")
            };
            let mut expected: Vec<f64> = held.iter().map(|&value| f64::from(value)).collect();
            for (row, &expert) in of_rows.iter().enumerate() {
                for i in 0..m {
                    let factor = 0.5 * f64::from(x[row * m + i]);
                    let sums = &mut expected[(expert * m + i) * n..][..n];
                    sums.iter_mut().zip(&y[row * n..]).for_each(|(sum, &y)| *sum += factor * f64::from(y));
                }
            }
            let sums = run();
            assert_near(&what, &sums, &expected, 1e-5);
            assert!(sums == run(), "{what}: a second run gives other bits");
        }
    }
}
