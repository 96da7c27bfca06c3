use half::{bf16, f16};

use super::*;

/// A small generator, so that the tests need no other crate.
struct Random(u64);

impl Random {
    fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        ((self.0 >> 40) as f32) / (1u64 << 23) as f32 - 1.0
    }

    fn values(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.next()).collect()
    }
}

#[derive(Clone, Debug)]
enum Owned {
    F32(Vec<f32>),
    Bf16(Vec<bf16>),
    F16(Vec<f16>),
}

impl Owned {
    fn new(kind: usize, values: Vec<f32>) -> Self {
        match kind {
            0 => Owned::F32(values),
            1 => Owned::Bf16(values.into_iter().map(bf16::from_f32).collect()),
            _ => Owned::F16(values.into_iter().map(f16::from_f32).collect()),
        }
    }

    fn elements(&self) -> Elements<'_> {
        match self {
            Owned::F32(values) => Elements::F32(values),
            Owned::Bf16(values) => Elements::Bf16(values),
            Owned::F16(values) => Elements::F16(values),
        }
    }
}

fn at(matrix: &MatrixRef<'_>, i: usize, j: usize) -> f64 {
    let index = matrix.offset + i * matrix.row_stride + j * matrix.column_stride;
    match matrix.elements {
        Elements::F32(values) => f64::from(values[index]),
        Elements::Bf16(values) => values[index].to_f64(),
        Elements::F16(values) => values[index].to_f64(),
    }
}

/// The sum of products and the sum of their magnitudes, which bounds the rounding error.
fn reference(products: &[Product<'_>], i: usize, j: usize, round: bool) -> (f64, f64) {
    let rounded = |value: f64| if round { bf16::from_f32(value as f32).to_f64() } else { value };
    let (mut sum, mut magnitude) = (0.0, 0.0);
    for product in products {
        for k in 0..product.left.columns {
            let term = rounded(at(&product.left, i, k)) * rounded(at(&product.right, k, j));
            sum += term;
            magnitude += term.abs();
        }
    }
    (sum, magnitude)
}

fn levels() -> Vec<SimdLevel> {
    SimdLevel::ALL.into_iter().filter(|level| level.is_available()).collect()
}

fn multiply(
    level: SimdLevel,
    products: &[Product<'_>],
    out: MatrixMut<'_>,
    epilogue: &Epilogue<'_>,
    arithmetic: Arithmetic,
    threads: usize,
) {
    gemm_at(level, products, out, epilogue, arithmetic, &mut Workspace::new(), threads);
}

/// A view of [rows, columns] in one of the layouts, and the elements that it needs.
fn layout(kind: usize, rows: usize, columns: usize) -> (usize, usize, usize) {
    let (row_stride, column_stride) = match kind {
        0 => (columns, 1),
        1 => (1, rows),
        2 => (columns + 3, 1),
        3 => (1, rows + 5),
        _ => (2 * columns + 1, 2),
    };
    (row_stride, column_stride, rows.max(1) * row_stride + columns.max(1) * column_stride)
}

/// Shapes around every tile and block edge, with every layout and dtype in turn.
fn cases() -> Vec<(usize, usize, usize)> {
    let mut cases =
        vec![(0, 3, 3), (3, 0, 3), (3, 3, 0), (1, 1, 1), (8, 70, 576), (9, 33, 321), (2, 5, 4096)];
    for m in [1, 2, 5, 6, 7, 12, 13, 25] {
        for n in [1, 15, 16, 17, 31, 33, 48] {
            for k in [1, 2, 7, 63, 330] {
                cases.push((m, n, k));
            }
        }
    }
    cases.extend([(150, 270, 37), (301, 45, 650), (17, 600, 2700), (70, 49, 5500)]);
    cases
}

#[test]
fn every_level_agrees_with_an_f64_reference_for_all_layouts_and_dtypes() {
    for (index, &(m, n, k)) in cases().iter().enumerate() {
        let mut random = Random(index as u64);
        let second_k = if index % 3 == 0 { 16 + index % 5 } else { 0 };
        let mut sources = Vec::new();
        for (rows, columns, salt) in [(m, k, 0), (k, n, 1), (m, second_k, 2), (second_k, n, 3)] {
            let (row_stride, column_stride, count) = layout((index * 7 + salt * 3) % 5, rows, columns);
            let owned = Owned::new((index / 2 + salt) % 3, random.values(count));
            sources.push((owned, rows, columns, row_stride, column_stride));
        }
        let views: Vec<_> = sources
            .iter()
            .map(|(owned, m, n, r, c)| MatrixRef::new(owned.elements(), *m, *n, *r, *c))
            .collect();
        let mut products = vec![Product { left: views[0], right: views[1] }];
        if second_k > 0 {
            products.push(Product { left: views[2], right: views[3] });
        }
        let bias = random.values(n);
        for (variant, level) in levels().into_iter().enumerate() {
            let variant = index + variant;
            for arithmetic in [Arithmetic::F32, Arithmetic::Bf16] {
                let epilogue = Epilogue {
                    scale: [1.0, 0.37][variant % 2],
                    bias: (variant % 3 == 0).then_some(&bias[..]),
                    accumulate: variant % 4 == 1,
                };
                check(level, &products, &epilogue, arithmetic, variant % 5 == 2, (m, n));
            }
        }
    }
}

fn check(
    level: SimdLevel,
    products: &[Product<'_>],
    epilogue: &Epilogue<'_>,
    arithmetic: Arithmetic,
    narrow: bool,
    (m, n): (usize, usize),
) {
    let stride = n + 3;
    let before = if epilogue.accumulate { 0.5 } else { f32::NAN };
    let mut wide = vec![before; m * stride];
    let mut half = vec![bf16::from_f32(before); m * stride];
    let out = if narrow {
        MatrixMut::new(&mut half[..], m, n, stride)
    } else {
        MatrixMut::new(&mut wide[..], m, n, stride)
    };
    multiply(level, products, out, epilogue, arithmetic, 1);
    for i in 0..m {
        for j in 0..stride {
            let value = if narrow { half[i * stride + j].to_f64() } else { f64::from(wide[i * stride + j]) };
            if j >= n {
                assert!(value.is_nan() == before.is_nan(), "wrote beyond the columns");
                continue;
            }
            let error = |round: bool| {
                let (sum, magnitude) = reference(products, i, j, round);
                let mut expected = f64::from(epilogue.scale) * sum;
                expected += epilogue.bias.map_or(0.0, |bias| f64::from(bias[j]));
                expected += if epilogue.accumulate { 0.5 } else { 0.0 };
                let rounding = if narrow { expected.abs() / 256.0 } else { 0.0 };
                (value - expected).abs() - rounding - 2e-6 * (magnitude + 1.0)
            };
            // Operands may be rounded in bf16 arithmetic, but then all of them.
            let excess =
                error(false).min(if arithmetic == Arithmetic::Bf16 { error(true) } else { f64::MAX });
            assert!(
                excess <= 0.0,
                "{level:?} {arithmetic:?} {m} x {n} at ({i}, {j}): {value} is off by {excess}"
            );
        }
    }
}

/// The bits of a product of f32.
fn bits(
    level: SimdLevel,
    arithmetic: Arithmetic,
    (m, n, k): (usize, usize, usize),
    threads: usize,
    accumulate: bool,
) -> Vec<u32> {
    let mut random = Random((m * 31 + n * 7 + k) as u64);
    let (left, right) = (random.values(m * k), random.values(n * k));
    let mut out = random.values(m * n);
    let product = Product {
        left: MatrixRef::row_major(&left[..], m, k),
        right: MatrixRef::row_major(&right[..], n, k).transposed(),
    };
    let epilogue = Epilogue { scale: 0.3, bias: None, accumulate };
    multiply(level, &[product], MatrixMut::row_major(&mut out[..], m, n), &epilogue, arithmetic, threads);
    out.into_iter().map(f32::to_bits).collect()
}

#[test]
fn f32_products_have_the_same_bits_at_every_level() {
    for shape in [(1, 50, 333), (4, 64, 576), (8, 17, 1000), (13, 37, 700), (40, 100, 2700), (50, 70, 64)] {
        for accumulate in [false, true] {
            let portable = bits(SimdLevel::Portable, Arithmetic::F32, shape, 1, accumulate);
            for level in levels() {
                let bits = bits(level, Arithmetic::F32, shape, 1, accumulate);
                assert!(bits == portable, "{level:?} at {shape:?}");
            }
        }
    }
}

/// Few rows, one and several chunks of K, many tiles, and more columns than one task of the narrowest kind takes.
#[test]
fn products_have_the_same_bits_for_any_number_of_threads() {
    let shapes =
        [(1, 2000, 333), (8, 700, 576), (300, 290, 200), (90, 300, 1700), (16, 576, 700), (40, 90, 3200)];
    for arithmetic in [Arithmetic::F32, Arithmetic::Bf16] {
        let alone = shapes.map(|shape| bits(SimdLevel::current(), arithmetic, shape, 1, false));
        for threads in [2, 3, 7] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            for (shape, alone) in shapes.into_iter().zip(&alone) {
                let together = pool.install(|| bits(SimdLevel::current(), arithmetic, shape, threads, false));
                assert!(together == *alone, "{threads} threads at {shape:?} in {arithmetic:?}");
            }
        }
    }
}
