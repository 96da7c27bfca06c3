//! A row-major matrix product in the terms of a column-major library: the transpose of the output is the product of
//! the transposes in the other order, and a row-major matrix read by columns is its transpose already.

use super::bindings::{Algorithm, COMPUTE_F32, COMPUTE_TF32, TYPE_BF16, TYPE_E4M3, TYPE_F16, TYPE_F32};
use crate::DType;
use crate::device::gpu::runtime::{Gemm, Matrix};

/// A matrix as the library sees it: columns are contiguous.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Layout {
    pub(super) rows: u64,
    pub(super) columns: u64,
    pub(super) pitch: i64,
    pub(super) transposed: bool,
    /// Bytes that divide the address and the distance of columns, at most [`WIDEST_LOAD`].
    pub(super) alignment: u32,
}

impl Layout {
    /// The layout of every matrix of this shape and alignment.
    fn canonical(&self, element_bytes: u32) -> Self {
        let unit = u64::from((self.alignment / element_bytes).max(1));
        Self { pitch: self.rows.next_multiple_of(unit) as i64, ..*self }
    }
}

/// Bytes that kernels bring in at once at most: what is aligned better is not read faster.
const WIDEST_LOAD: u32 = 16;

/// Everything that a product's descriptors depend on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Problem {
    pub(super) a: Layout,
    pub(super) b: Layout,
    pub(super) out: Layout,
    pub(super) operand_type: i32,
    pub(super) out_type: i32,
    pub(super) compute: i32,
    /// Whether the library adds a bias, which then has the output's type.
    pub(super) bias: bool,
    pub(super) accumulate: bool,
    /// Whether rows of both operands have scales.
    pub(super) row_scales: bool,
}

/// The library's number of an element type.
pub(super) fn type_number(dtype: DType) -> Option<i32> {
    match dtype {
        DType::F32 => Some(TYPE_F32),
        DType::F16 => Some(TYPE_F16),
        DType::Bf16 => Some(TYPE_BF16),
        DType::E4m3 => Some(TYPE_E4M3),
        DType::U32 | DType::I32 => None,
    }
}

fn layout(matrix: &Matrix, rows: usize, columns: usize, element_bytes: u32) -> Layout {
    let (stored_rows, stored_columns) = if matrix.transposed { (columns, rows) } else { (rows, columns) };
    let pitch = matrix.pitch.max(stored_columns) as u64;
    let both = matrix.address | (pitch * u64::from(element_bytes)) | u64::from(WIDEST_LOAD);
    Layout {
        rows: stored_columns as u64,
        columns: stored_rows as u64,
        pitch: pitch as i64,
        transposed: matrix.transposed,
        alignment: 1 << both.trailing_zeros(),
    }
}

fn element_bytes(kind: i32) -> u32 {
    match kind {
        TYPE_F32 => 4,
        TYPE_E4M3 => 1,
        _ => 2,
    }
}

impl Problem {
    /// The problem of a product with the dimensions swapped, or the name of what the library does not take.
    pub(super) fn new(gemm: &Gemm) -> Result<Self, String> {
        let types = || format!("{} operands with a {} output", gemm.operands, gemm.out_dtype);
        let (operand_type, out_type) = match (type_number(gemm.operands), type_number(gemm.out_dtype)) {
            (Some(TYPE_E4M3), _) | (_, Some(TYPE_E4M3)) => return Err(types()),
            (Some(operands), Some(out)) if out == operands || out == TYPE_F32 => (operands, out),
            _ => return Err(types()),
        };
        Self::typed(gemm, operand_type, out_type)
    }

    /// The problem of a product of e4m3 whose rows have scales or not.
    pub(super) fn scaled(gemm: &Gemm, row_scales: bool) -> Result<Self, String> {
        let out_type = match gemm.out_dtype {
            DType::Bf16 => TYPE_BF16,
            DType::F32 => TYPE_F32,
            other => return Err(format!("{} operands with a {other} output", gemm.operands)),
        };
        Ok(Self { row_scales, ..Self::typed(gemm, TYPE_E4M3, out_type)? })
    }

    fn typed(gemm: &Gemm, operand_type: i32, out_type: i32) -> Result<Self, String> {
        for (what, matrix, rows, columns) in [
            ("left", &gemm.left, gemm.rows, gemm.inner),
            ("right", &gemm.right, gemm.inner, gemm.columns),
            ("out", &gemm.out, gemm.rows, gemm.columns),
        ] {
            let width = if matrix.transposed { rows } else { columns };
            if matrix.pitch < width {
                return Err(format!("{what} has a pitch of {} elements for rows of {width}", matrix.pitch));
            }
        }
        let tf32 = gemm.tf32 && operand_type == TYPE_F32;
        let (operand_bytes, out_bytes) = (element_bytes(operand_type), element_bytes(out_type));
        let out = Matrix { transposed: false, ..gemm.out };
        Ok(Self {
            a: layout(&gemm.right, gemm.inner, gemm.columns, operand_bytes),
            b: layout(&gemm.left, gemm.rows, gemm.inner, operand_bytes),
            out: layout(&out, gemm.rows, gemm.columns, out_bytes),
            operand_type,
            out_type,
            compute: if tf32 { COMPUTE_TF32 } else { COMPUTE_F32 },
            bias: gemm.bias.is_some_and(|bias| bias.1 == gemm.out_dtype),
            accumulate: gemm.accumulate || gemm.addend.is_some(),
            row_scales: false,
        })
    }

    /// What the choice of an algorithm depends on: the same for operands whose rows lie nearer together or further apart,
    /// because another algorithm rounds in another way, and whether a value is kept with columns to spare or computed
    /// again without them must not show.
    pub(super) fn canonical(&self) -> Self {
        let (operand_bytes, out_bytes) = (element_bytes(self.operand_type), element_bytes(self.out_type));
        Self {
            a: self.a.canonical(operand_bytes),
            b: self.b.canonical(operand_bytes),
            out: self.out.canonical(out_bytes),
            ..*self
        }
    }

    /// Bytes that the output spans.
    pub(super) fn out_bytes(&self) -> usize {
        self.out.columns as usize * self.out.pitch as usize * element_bytes(self.out_type) as usize
    }

    /// One word that tells it from every other whose algorithm is chosen apart.
    pub(super) fn key(&self) -> String {
        let one = |x: &Layout| {
            format!("{}x{}{}@{}", x.rows, x.columns, if x.transposed { "t" } else { "n" }, x.alignment)
        };
        let flags = (u8::from(self.bias), u8::from(self.accumulate));
        format!(
            "{}:{}:{}:{}>{}:{}:b{}:a{}{}",
            one(&self.a),
            one(&self.b),
            one(&self.out),
            self.operand_type,
            self.out_type,
            self.compute,
            flags.0,
            flags.1,
            if self.row_scales { ":r" } else { "" }
        )
    }
}

/// Lines of (key, algorithm in hexadecimal), as kept on disk.
pub(super) fn write_choices<'a>(choices: impl Iterator<Item = (&'a String, &'a Algorithm)>) -> String {
    choices
        .map(|(key, algorithm)| {
            let words: String = algorithm.0.iter().map(|word| format!("{word:016x}")).collect();
            format!("{key} {words}\n")
        })
        .collect()
}

/// The lines of [`write_choices`]; others are passed over.
pub(super) fn read_choices(text: &str) -> impl Iterator<Item = (String, Algorithm)> {
    text.lines().filter_map(|line| {
        let (key, words) = line.split_once(' ')?;
        let mut algorithm = Algorithm::default();
        if words.len() != 128 || !words.is_ascii() {
            return None;
        }
        for (word, digits) in algorithm.0.iter_mut().zip(words.as_bytes().chunks(16)) {
            *word = u64::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?;
        }
        Some((key.to_owned(), algorithm))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::{BTreeMap, HashSet};

    fn sample() -> Gemm {
        Gemm {
            rows: 5,
            columns: 7,
            inner: 3,
            left: Matrix { address: 4096, pitch: 10, transposed: false },
            right: Matrix { address: 4096 + 32, pitch: 11, transposed: true },
            operands: DType::Bf16,
            out: Matrix { address: 4096 + 2, pitch: 12, transposed: false },
            out_dtype: DType::F32,
            bias: None,
            scale: 1.0,
            accumulate: false,
            addend: None,
            tf32: true,
        }
    }

    /// The library's definition, column-major, with matrices in one memory of f64.
    fn library(problem: &Problem, [a, b]: [&[f64]; 2], out: &mut [f64]) {
        let read = |memory: &[f64], layout: &Layout, row: u64, column: u64| {
            let (row, column) = if layout.transposed { (column, row) } else { (row, column) };
            assert!(row < layout.rows && column < layout.columns);
            memory[(column as i64 * layout.pitch) as usize + row as usize]
        };
        let inner = if problem.a.transposed { problem.a.rows } else { problem.a.columns };
        for column in 0..problem.out.columns {
            for row in 0..problem.out.rows {
                let sum =
                    (0..inner).map(|k| read(a, &problem.a, row, k) * read(b, &problem.b, k, column)).sum();
                out[(column as i64 * problem.out.pitch) as usize + row as usize] = sum;
            }
        }
    }

    #[test]
    fn swapped_operands_give_the_row_major_product_for_every_transposition() {
        for flags in 0..4 {
            let mut gemm = sample();
            (gemm.left.transposed, gemm.right.transposed) = (flags & 1 != 0, flags & 2 != 0);
            let values =
                |count: usize, step: f64| (0..count).map(|i| (i as f64 * step).sin()).collect::<Vec<f64>>();
            let (left, right) = (values(200, 0.7), values(200, 1.3));
            let problem = Problem::new(&gemm).unwrap();
            let mut out = vec![0.0; 5 * 12];
            library(&problem, [&right, &left], &mut out);
            let at = |memory: &[f64], matrix: &Matrix, row: usize, column: usize| {
                let (row, column) = if matrix.transposed { (column, row) } else { (row, column) };
                memory[row * matrix.pitch + column]
            };
            for row in 0..5 {
                for column in 0..7 {
                    let expected: f64 = (0..3)
                        .map(|k| at(&left, &gemm.left, row, k) * at(&right, &gemm.right, k, column))
                        .sum();
                    assert!((out[row * 12 + column] - expected).abs() < 1e-12);
                }
            }
        }
    }

    #[test]
    fn every_part_of_a_problem_is_in_its_key() {
        type Change = fn(&mut Gemm);
        let changes: [Change; 14] = [
            |_| {},
            |gemm| gemm.rows = 6,
            |gemm| gemm.columns = 8,
            |gemm| gemm.inner = 2,
            |gemm| gemm.left.pitch = 13,
            |gemm| gemm.right.pitch = 12,
            |gemm| gemm.left.transposed = true,
            |gemm| gemm.right.transposed = false,
            |gemm| gemm.out.address += 2,
            |gemm| gemm.out_dtype = DType::Bf16,
            |gemm| gemm.bias = Some((0, DType::F32)),
            |gemm| gemm.accumulate = true,
            |gemm| gemm.operands = DType::F16,
            |gemm| gemm.operands = DType::F32,
        ];
        let mut keys = HashSet::new();
        for change in changes {
            let mut gemm = sample();
            change(&mut gemm);
            assert!(keys.insert(Problem::new(&gemm).unwrap().key()), "{gemm:?}");
        }
        for row_scales in [false, true] {
            assert!(keys.insert(Problem::scaled(&sample(), row_scales).unwrap().key()), "{row_scales}");
        }
        let without: [Change; 5] = [
            |gemm| gemm.left.address += 16,
            |gemm| gemm.left.pitch += 4,
            |gemm| gemm.right.pitch += 2,
            |gemm| gemm.out.pitch += 8,
            |gemm| gemm.scale = 3.0,
        ];
        let first = Problem::new(&sample()).unwrap();
        for change in without {
            let mut gemm = sample();
            change(&mut gemm);
            let problem = Problem::new(&gemm).unwrap();
            assert_eq!((problem.key(), problem.canonical()), (first.key(), first.canonical()), "{gemm:?}");
        }
    }

    #[test]
    fn what_lies_closest_together_is_the_canonical_layout() {
        let rows = |pitch, address, transposed, bytes| {
            let matrix = Matrix { address, pitch, transposed };
            let layout = layout(&matrix, 4, 10, bytes).canonical(bytes);
            (layout.pitch, layout.alignment)
        };
        assert_eq!(rows(17, 4096, false, 4), (10, 4));
        assert_eq!(rows(64, 4096, false, 2), (16, 16));
        assert_eq!(rows(64, 4096 + 4, false, 2), (10, 4));
        assert_eq!(rows(64, 4096, true, 1), (16, 16));
    }

    #[test]
    fn what_the_library_does_not_multiply_is_refused() {
        let refused = |change: fn(&mut Gemm)| {
            let mut gemm = sample();
            change(&mut gemm);
            Problem::new(&gemm).unwrap_err()
        };
        assert_eq!(refused(|gemm| gemm.out_dtype = DType::F16), "bf16 operands with a f16 output");
        assert_eq!(refused(|gemm| gemm.operands = DType::E4m3), "e4m3 operands with a f32 output");
        assert_eq!(refused(|gemm| gemm.operands = DType::U32), "u32 operands with a f32 output");
        assert_eq!(refused(|gemm| gemm.left.pitch = 2), "left has a pitch of 2 elements for rows of 3");
    }

    #[test]
    fn choices_survive_the_disk_and_damaged_lines_are_passed_over() {
        let mut choices = BTreeMap::new();
        choices.insert("one".to_owned(), Algorithm([1, 2, 3, u64::MAX, 5, 6, 7, 8]));
        choices.insert("two".to_owned(), Algorithm([9; 8]));
        let text = write_choices(choices.iter());
        assert_eq!(read_choices(&text).collect::<BTreeMap<_, _>>(), choices);
        let damaged = text.replacen("one 0", "one x", 1) + "three 12\n\nfour";
        assert_eq!(read_choices(&damaged).map(|choice| choice.0).collect::<Vec<_>>(), ["two"]);
    }
}
