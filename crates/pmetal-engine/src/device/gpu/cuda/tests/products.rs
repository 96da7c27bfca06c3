//! Products against sums in f64, and their speed.

use super::*;

fn rounded(values: &mut [f32], dtype: DType) -> Vec<u8> {
    match dtype {
        DType::Bf16 => values
            .iter_mut()
            .flat_map(|x| {
                let y = bf16::from_f32(*x);
                *x = y.to_f32();
                y.to_le_bytes()
            })
            .collect(),
        DType::F16 => values
            .iter_mut()
            .flat_map(|x| {
                let y = f16::from_f32(*x);
                *x = y.to_f32();
                y.to_le_bytes()
            })
            .collect(),
        _ => bytemuck::cast_slice(values).to_vec(),
    }
}

fn decoded(bytes: &[u8], dtype: DType) -> Vec<f32> {
    let halves = || bytes.chunks_exact(2).map(|two| [two[0], two[1]]);
    match dtype {
        DType::Bf16 => halves().map(|two| bf16::from_le_bytes(two).to_f32()).collect(),
        DType::F16 => halves().map(|two| f16::from_le_bytes(two).to_f32()).collect(),
        _ => bytes
            .chunks_exact(4)
            .map(|four| f32::from_le_bytes([four[0], four[1], four[2], four[3]]))
            .collect(),
    }
}

struct Case {
    shape: [usize; 3],
    transposed: [bool; 2],
    padding: [usize; 3],
    operands: DType,
    out: DType,
    bias: Option<DType>,
    accumulate: bool,
    tf32: bool,
    shift: usize,
}

/// Relative error of a product; what lies between the rows must stay.
fn error_of(cuda: &Cuda, case: &Case, seed: &mut u64) -> crate::Result<f64> {
    let [m, n, k] = case.shape;
    let stored = |rows: usize, columns: usize, transposed: bool| {
        if transposed { (columns, rows) } else { (rows, columns) }
    };
    let mut place = |rows: usize, columns: usize, transposed: bool, padding: usize, dtype: DType| {
        let (rows, columns) = stored(rows, columns, transposed);
        let mut values = random((rows * (columns + padding)).max(1), seed);
        let bytes = rounded(&mut values, dtype);
        let address = cuda.allocate(bytes.len() + 256).unwrap() + (case.shift * dtype.bytes()) as u64;
        cuda.upload(&bytes, address);
        (Matrix { address, pitch: columns + padding, transposed }, values)
    };
    let (left, left_values) = place(m, k, case.transposed[0], case.padding[0], case.operands);
    let (right, right_values) = place(k, n, case.transposed[1], case.padding[1], case.operands);
    let (out, before) = place(m, n, false, case.padding[2], case.out);
    let bias = case.bias.map(|dtype| (place(1, n, false, 0, dtype), dtype));
    let gemm = Gemm {
        rows: m,
        columns: n,
        inner: k,
        left,
        right,
        operands: case.operands,
        out,
        out_dtype: case.out,
        bias: bias.as_ref().map(|((matrix, _), dtype)| (matrix.address, *dtype)),
        scale: 0.5,
        accumulate: case.accumulate,
        addend: None,
        tf32: case.tf32,
    };
    cuda.gemm(&gemm)?;
    let mut bytes = vec![0; before.len() * case.out.bytes()];
    cuda.download(out.address, &mut bytes)?;
    let after = decoded(&bytes, case.out);
    for (matrix, dtype) in [(left, case.operands), (right, case.operands), (out, case.out)] {
        cuda.free(matrix.address - (case.shift * dtype.bytes()) as u64, 0);
    }
    let at = |matrix: &Matrix, values: &[f32], row: usize, column: usize| {
        let (row, column) = if matrix.transposed { (column, row) } else { (row, column) };
        f64::from(values[row * matrix.pitch + column])
    };
    let (mut difference, mut size) = (0.0, 0.0);
    for row in 0..m {
        for column in 0..out.pitch {
            let index = row * out.pitch + column;
            if column >= n {
                assert_eq!(after[index].to_bits(), before[index].to_bits(), "between the rows");
                continue;
            }
            let sum: f64 =
                (0..k).map(|i| at(&left, &left_values, row, i) * at(&right, &right_values, i, column)).sum();
            let expected = 0.5 * sum
                + if case.accumulate { f64::from(before[index]) } else { 0.0 }
                + bias.as_ref().map_or(0.0, |((_, values), _)| f64::from(values[column]));
            difference += (f64::from(after[index]) - expected).powi(2);
            size += expected.powi(2);
        }
    }
    if let Some(((matrix, _), dtype)) = bias {
        cuda.free(matrix.address - (case.shift * dtype.bytes()) as u64, 0);
    }
    assert!(!difference.is_nan());
    Ok((difference / size.max(1e-30)).sqrt())
}

fn limit(case: &Case) -> f64 {
    match (case.out, case.operands, case.tf32) {
        (DType::Bf16, ..) => 4e-3,
        (DType::F16, ..) => 5e-4,
        (_, DType::F32, true) => 1e-3,
        _ => 2e-6,
    }
}

#[test]
fn products_agree_with_sums_in_f64_for_every_layout_and_type() {
    let Some((cuda, _folder)) = device() else { return };
    let types = [
        (DType::F32, DType::F32, false),
        (DType::F32, DType::F32, true),
        (DType::Bf16, DType::Bf16, false),
        (DType::Bf16, DType::F32, false),
        (DType::F16, DType::F16, false),
        (DType::F16, DType::F32, true),
    ];
    let shapes = [
        [1, 1, 1],
        [3, 5, 7],
        [64, 16, 128],
        [33, 96, 250],
        [128, 130, 17],
        [17, 1, 300],
        [1, 257, 64],
        [4, 6, 0],
        [0, 4, 4],
    ];
    let (mut seed, mut worst, mut count) = (3, 0.0_f64, 0);
    for (index, shape) in shapes.into_iter().enumerate() {
        for (kind, (operands, out, tf32)) in types.into_iter().enumerate() {
            for flags in 0..4 {
                let variant = index + kind + flags;
                let case = Case {
                    shape,
                    transposed: [flags & 1 != 0, flags & 2 != 0],
                    padding: [variant % 3, [0, 8, 1][(variant / 2) % 3], (variant / 3) % 2 * 3],
                    operands,
                    out,
                    bias: [None, Some(out), Some(DType::F32)][(variant / 2) % 3],
                    accumulate: variant % 2 == 1,
                    tf32,
                    shift: [0, 1, 8][variant % 3],
                };
                let error = error_of(&cuda, &case, &mut seed).unwrap();
                assert!(
                    error <= limit(&case),
                    "{error:e}: {shape:?} {operands} {out} {tf32} {flags} {variant}"
                );
                worst = worst.max(error / limit(&case));
                count += 1;
            }
        }
    }
    cuda.synchronize().unwrap();
    println!("{count} products, worst error {worst:.2} of its limit, {:?}", cuda.counts());
    assert_eq!(cuda.pool_report().live, 0);
}

fn plain(shape: [usize; 3], accumulate: bool) -> Case {
    Case {
        shape,
        transposed: [false, true],
        padding: [0; 3],
        operands: DType::Bf16,
        out: DType::Bf16,
        bias: None,
        accumulate,
        tf32: false,
        shift: 0,
    }
}

#[test]
fn a_choice_of_algorithm_is_kept_on_disk_and_never_needed_for_the_same_bits() {
    let Some((cuda, folder)) = device() else { return };
    let (first, second) = (plain([192, 320, 256], false), plain([192, 320, 256], true));
    for case in [&first, &second, &first] {
        error_of(&cuda, case, &mut 5).unwrap();
    }
    let timed = cuda.counts().timed_products;
    assert!(timed <= 2);
    let again = open(folder.path()).unwrap();
    error_of(&again, &first, &mut 5).unwrap();
    assert_eq!(again.counts().timed_products, 0);
    println!("{timed} timed, then none");
    let options = CudaOptions { deterministic: true, ..CudaOptions::default() };
    let fixed = Cuda::open(&options).unwrap();
    error_of(&fixed, &first, &mut 5).unwrap();
    assert_eq!(fixed.counts().timed_products, 0);
}

#[test]
fn unsupported_products_are_errors_that_keep_nothing() {
    let Some((cuda, _folder)) = device() else { return };
    let mixed = Case { out: DType::F16, ..plain([4, 4, 4], false) };
    let error = error_of(&cuda, &mixed, &mut 1).unwrap_err().to_string();
    assert!(error.contains("bf16 operands with a f16 output"), "{error}");
    cuda.synchronize().unwrap();
}

/// Speed is printed, not judged: it depends on the device.
#[test]
fn rates_of_large_products_are_printed() {
    let Some((cuda, _folder)) = device() else { return };
    let mut seed = 11;
    let shapes: [([usize; 3], [bool; 2], &str); 7] = [
        ([8192, 8192, 8192], [false, true], "8192^3"),
        ([4096, 4096, 4096], [false, true], "q_proj"),
        ([4096, 14336, 4096], [false, true], "up_proj"),
        ([4096, 4096, 14336], [false, true], "down_proj"),
        ([4096, 14336, 4096], [false, false], "d_x of down"),
        ([4096, 16, 4096], [false, true], "LoRA x A^T"),
        ([16, 4096, 4096], [true, false], "LoRA dA = TN"),
    ];
    for (shape, transposed, name) in shapes {
        let [m, n, k] = shape;
        let place = |rows: usize, columns: usize, seed: &mut u64| {
            let bytes = rounded(&mut random(rows * columns, seed), DType::Bf16);
            let address = cuda.allocate(bytes.len()).unwrap();
            cuda.upload(&bytes, address);
            address
        };
        let pitch = |rows: usize, columns: usize, transposed: bool| if transposed { rows } else { columns };
        let (left, right) = (place(m, k, &mut seed), place(k, n, &mut seed));
        let out = cuda.allocate(m * n * 4).unwrap();
        for (out_dtype, accumulate) in [(DType::Bf16, false), (DType::F32, true)] {
            let gemm = Gemm {
                rows: m,
                columns: n,
                inner: k,
                left: Matrix { address: left, pitch: pitch(m, k, transposed[0]), transposed: transposed[0] },
                right: Matrix {
                    address: right,
                    pitch: pitch(k, n, transposed[1]),
                    transposed: transposed[1],
                },
                operands: DType::Bf16,
                out: Matrix { address: out, pitch: n, transposed: false },
                out_dtype,
                bias: None,
                scale: 1.0,
                accumulate,
                addend: None,
                tf32: false,
            };
            let clock = std::time::Instant::now();
            cuda.gemm(&gemm).unwrap();
            cuda.synchronize().unwrap();
            let choice_ms = clock.elapsed().as_secs_f64() * 1e3;
            let mut times: Vec<f32> = (0..5)
                .map(|_| {
                    let begin = cuda.event().unwrap();
                    (0..20).for_each(|_| cuda.gemm(&gemm).unwrap());
                    let end = cuda.event().unwrap();
                    end.wait().unwrap();
                    begin.milliseconds_to(&end).unwrap() / 20.0
                })
                .collect();
            times.sort_by(f32::total_cmp);
            let rate = 2e-9 * (m * n * k) as f64 / f64::from(times[2]);
            println!(
                "RATE {name}: {shape:?} out {out_dtype} add {accumulate}: {:.4} ms, {rate:.0} TFLOP/s, choice {choice_ms:.0} ms",
                times[2]
            );
        }
        for address in [left, right, out] {
            cuda.free(address, 0);
        }
    }
}
