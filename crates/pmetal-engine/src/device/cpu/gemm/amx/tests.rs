//! The packing, the plan and the epilogue, with the tiles multiplied by a loop, so that they are tested where no
//! processor has the instructions; the instructions themselves are tested with all levels, where there are any.

use half::bf16;

use super::super::{Arithmetic, Elements, Epilogue, MatrixMut, MatrixRef, SimdLevel, Workspace, gemm_at};
use super::*;

/// What the tiles do, in the order of k.
pub(in crate::device::cpu) struct Model;

impl Tiles for Model {
    const LEVEL: SimdLevel = SimdLevel::Avx2;

    unsafe fn begin() {}

    unsafe fn end() {}

    unsafe fn multiply(steps: usize, left: Left, right: *const u8, sums: Sums, used: (usize, usize)) {
        let rounded = |lanes: usize| if lanes > 16 { 32 } else { 16 };
        for i in 0..rounded(used.0) {
            for j in 0..rounded(used.1) {
                // SAFETY: granted by the caller.
                unsafe {
                    let out = sums.pointer.add(i * sums.stride + j);
                    let mut sum = if sums.add { *out } else { 0.0 };
                    for k in 0..steps * STEP {
                        let (step, within) = (k / STEP, k % STEP);
                        let row = left.pointer.add(i * left.row_stride + step * left.step_stride);
                        let a = row.cast::<bf16>().add(within).read_unaligned();
                        let pairs = right.add(step * 2048 + within / 2 * 128 + j * 4);
                        let b = pairs.cast::<bf16>().add(within % 2).read_unaligned();
                        sum += a.to_f32() * b.to_f32();
                    }
                    *out = sum;
                }
            }
        }
    }
}

fn has_packing() -> bool {
    SimdLevel::Avx2.is_available()
}

/// Small integers, whose products and sums are exact in any order.
fn integers(count: usize, seed: usize) -> Vec<f32> {
    (0..count).map(|i| ((i * 7 + i / 13 * 5 + seed * 3) % 9) as f32 - 4.0).collect()
}

fn bf16s(values: &[f32]) -> Vec<bf16> {
    values.iter().map(|&value| bf16::from_f32(value)).collect()
}

fn run_model(
    products: &[Product<'_>],
    out: MatrixMut<'_>,
    epilogue: &Epilogue<'_>,
    workspace: &mut Workspace,
    threads: usize,
) {
    run::<Model>(Call { products, out, epilogue, workspace, threads });
}

/// A view of [rows, columns] over values of [rows, columns] stored by rows or by columns.
fn view(elements: Elements<'_>, rows: usize, columns: usize, by_rows: bool) -> MatrixRef<'_> {
    if by_rows {
        MatrixRef::row_major(elements, rows, columns)
    } else {
        MatrixRef::row_major(elements, columns, rows).transposed()
    }
}

#[test]
fn sums_are_exact_for_all_layouts_dtypes_and_edges() {
    if !has_packing() {
        return;
    }
    let shapes = [
        (1, 1, 1),
        (16, 16, 32),
        (32, 32, 64),
        (33, 17, 31),
        (64, 16, 96),
        (70, 40, 130),
        (16, 100, 70),
        (97, 65, 33),
        (600, 33, 64),
        (530, 70, 40),
        (40, 33, 3200),
        (40, 70, 4100),
        (600, 20, 3104),
        (16, 576, 700),
        (300, 16, 2048),
        (70, 32, 5000),
        (1100, 200, 170),
    ];
    let mut workspace = Workspace::new();
    for (index, (m, n, k)) in shapes.into_iter().enumerate() {
        for layout in 0..8 {
            let second = if layout % 2 == index % 2 { 16 } else { 0 };
            let sources: Vec<_> = [m * k, k * n, m * second, second * n]
                .into_iter()
                .enumerate()
                .map(|(salt, count)| integers(count, salt + index))
                .collect();
            let narrow: Vec<_> = sources.iter().map(|values| bf16s(values)).collect();
            let pick = |i: usize, narrowed: bool| {
                if narrowed { Elements::Bf16(&narrow[i]) } else { Elements::F32(&sources[i]) }
            };
            let (left_rows, right_rows) = (layout & 1 == 0, layout & 2 == 0);
            let mut products = vec![Product {
                left: view(pick(0, layout & 4 == 0), m, k, left_rows),
                right: view(pick(1, layout & 3 != 0), k, n, right_rows),
            }];
            if second > 0 {
                products.push(Product {
                    left: view(pick(2, layout & 2 == 0), m, second, right_rows),
                    right: view(pick(3, layout & 1 == 0), second, n, left_rows),
                });
            }
            let bias = integers(n, 9);
            let epilogue = Epilogue {
                scale: [1.0, 0.5][layout % 2],
                bias: (layout % 3 == 0).then_some(&bias[..]),
                accumulate: layout % 4 == 1,
            };
            let stride = n + 3;
            let mut out = vec![1.0f32; m * stride];
            run_model(&products, MatrixMut::new(&mut out[..], m, n, stride), &epilogue, &mut workspace, 2);
            let mut expected = vec![1.0f32; m * stride];
            let out_view = MatrixMut::new(&mut expected[..], m, n, stride);
            let level = SimdLevel::Avx2;
            gemm_at(level, &products, out_view, &epilogue, Arithmetic::F32, &mut workspace, 1);
            assert!(out == expected, "{m} x {n} x {k}, layout {layout}");
        }
    }
}

#[test]
fn bits_do_not_depend_on_the_number_of_threads() {
    if !has_packing() {
        return;
    }
    for (m, n, k) in [(40, 200, 3200), (16, 200, 3200), (600, 90, 100), (2000, 16, 64), (1500, 70, 90)] {
        let (left, right) = (integers(m * k, 1), integers(k * n, 2));
        let left: Vec<f32> = left.iter().enumerate().map(|(i, value)| value / (1 + i % 7) as f32).collect();
        let left = bf16s(&left);
        let product = Product {
            left: MatrixRef::row_major(&left[..], m, k),
            right: MatrixRef::row_major(&right[..], k, n),
        };
        let bits = |threads: usize| {
            let mut out = vec![bf16::ZERO; m * n];
            let view = MatrixMut::row_major(&mut out[..], m, n);
            run_model(&[product], view, &Epilogue::default(), &mut Workspace::new(), threads);
            out
        };
        let alone = bits(1);
        for threads in [2, 5] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            assert!(pool.install(|| bits(threads)) == alone, "{threads} threads at {m} x {n} x {k}");
        }
    }
}

#[test]
fn values_are_rounded_to_the_nearest_bf16_when_they_are_packed() {
    if !has_packing() {
        return;
    }
    let values: Vec<f32> = (0..64 * 40).map(|i| ((i * 37 % 1001) as f32 - 500.0) * 1.001e-3).collect();
    let identity: Vec<f32> = (0..40 * 40).map(|i| if i / 40 == i % 40 { 1.0 } else { 0.0 }).collect();
    for by_rows in [false, true] {
        let left = view(Elements::F32(&values), 64, 40, by_rows);
        let product = Product { left, right: MatrixRef::row_major(&identity[..], 40, 40) };
        let mut out = vec![0.0f32; 64 * 40];
        let view = MatrixMut::row_major(&mut out[..], 64, 40);
        run_model(&[product], view, &Epilogue::default(), &mut Workspace::new(), 1);
        for (at, &value) in out.iter().enumerate() {
            let source = if by_rows { at } else { at % 40 * 64 + at / 40 };
            assert_eq!(value, bf16::from_f32(values[source]).to_f32());
        }
    }
}
