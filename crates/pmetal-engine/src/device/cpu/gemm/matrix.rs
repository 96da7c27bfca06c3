use std::ops::Range;

use half::{bf16, f16};

/// Numbers that a matrix view reads.
#[derive(Clone, Copy, Debug)]
pub enum Elements<'a> {
    /// 32-bit floats.
    F32(&'a [f32]),
    /// The upper half of 32-bit floats.
    Bf16(&'a [bf16]),
    /// IEEE half precision.
    F16(&'a [f16]),
}

impl Elements<'_> {
    /// How many there are.
    pub fn len(&self) -> usize {
        match self {
            Elements::F32(values) => values.len(),
            Elements::Bf16(values) => values.len(),
            Elements::F16(values) => values.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl<'a> From<&'a [f32]> for Elements<'a> {
    fn from(values: &'a [f32]) -> Self {
        Elements::F32(values)
    }
}

impl<'a> From<&'a [bf16]> for Elements<'a> {
    fn from(values: &'a [bf16]) -> Self {
        Elements::Bf16(values)
    }
}

impl<'a> From<&'a [f16]> for Elements<'a> {
    fn from(values: &'a [f16]) -> Self {
        Elements::F16(values)
    }
}

/// Numbers that a matrix view writes.
#[derive(Debug)]
pub enum ElementsMut<'a> {
    /// 32-bit floats.
    F32(&'a mut [f32]),
    /// The upper half of 32-bit floats; rounded to nearest, ties to even.
    Bf16(&'a mut [bf16]),
}

impl ElementsMut<'_> {
    /// How many there are.
    pub fn len(&self) -> usize {
        match self {
            ElementsMut::F32(values) => values.len(),
            ElementsMut::Bf16(values) => values.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl<'a> From<&'a mut [f32]> for ElementsMut<'a> {
    fn from(values: &'a mut [f32]) -> Self {
        ElementsMut::F32(values)
    }
}

impl<'a> From<&'a mut [bf16]> for ElementsMut<'a> {
    fn from(values: &'a mut [bf16]) -> Self {
        ElementsMut::Bf16(values)
    }
}

/// A matrix that is read; element (i, j) is at `i * row_stride + j * column_stride`.
#[derive(Clone, Copy, Debug)]
pub struct MatrixRef<'a> {
    pub(in crate::device::cpu) elements: Elements<'a>,
    /// First element of the view; parts of a matrix share the elements.
    pub(super) offset: usize,
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) row_stride: usize,
    pub(super) column_stride: usize,
}

impl<'a> MatrixRef<'a> {
    /// Views `elements` with any strides, zero included. Elements that do not reach are a bug of the caller.
    pub fn new(
        elements: impl Into<Elements<'a>>,
        rows: usize,
        columns: usize,
        row_stride: usize,
        column_stride: usize,
    ) -> Self {
        let elements = elements.into();
        let needed = extent(rows, columns, row_stride, column_stride);
        assert!(
            needed.is_some_and(|needed| needed <= elements.len()),
            "invariant: {} elements do not hold {rows} x {columns} at strides {row_stride}, {column_stride}",
            elements.len()
        );
        MatrixRef { elements, offset: 0, rows, columns, row_stride, column_stride }
    }

    /// Views `elements` as contiguous rows.
    pub fn row_major(elements: impl Into<Elements<'a>>, rows: usize, columns: usize) -> Self {
        Self::new(elements, rows, columns, columns, 1)
    }

    /// The same elements with rows and columns exchanged.
    pub fn transposed(self) -> Self {
        MatrixRef {
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
            ..self
        }
    }

    /// The rows and columns of the given ranges.
    pub fn part(self, rows: Range<usize>, columns: Range<usize>) -> Self {
        assert!(
            rows.start <= rows.end && rows.end <= self.rows,
            "invariant: rows {rows:?} are not within {}",
            self.rows
        );
        assert!(
            columns.start <= columns.end && columns.end <= self.columns,
            "invariant: columns {columns:?} are not within {}",
            self.columns
        );
        let empty = rows.is_empty() || columns.is_empty();
        let offset =
            if empty { 0 } else { rows.start * self.row_stride + columns.start * self.column_stride };
        MatrixRef { offset: self.offset + offset, rows: rows.len(), columns: columns.len(), ..self }
    }

    /// The elements from the view's first on, and the elements between its rows.
    pub(in crate::device::cpu) fn first_and_stride(self) -> (Elements<'a>, usize) {
        let elements = match self.elements {
            Elements::F32(values) => Elements::F32(&values[self.offset..]),
            Elements::Bf16(values) => Elements::Bf16(&values[self.offset..]),
            Elements::F16(values) => Elements::F16(&values[self.offset..]),
        };
        (elements, self.row_stride)
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn columns(&self) -> usize {
        self.columns
    }
}

/// A matrix that is written; element (i, j) is at `i * row_stride + j`.
#[derive(Debug)]
pub struct MatrixMut<'a> {
    pub(in crate::device::cpu) elements: ElementsMut<'a>,
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) row_stride: usize,
}

impl<'a> MatrixMut<'a> {
    /// Views `elements` as rows `row_stride` apart. Rows that overlap or do not fit are a bug of the caller.
    pub fn new(elements: impl Into<ElementsMut<'a>>, rows: usize, columns: usize, row_stride: usize) -> Self {
        let elements = elements.into();
        assert!(
            rows <= 1 || row_stride >= columns,
            "invariant: rows of {columns} columns overlap at a stride of {row_stride}"
        );
        assert!(
            extent(rows, columns, row_stride, 1).is_some_and(|needed| needed <= elements.len()),
            "invariant: {} elements do not hold {rows} x {columns} at a stride of {row_stride}",
            elements.len()
        );
        MatrixMut { elements, rows, columns, row_stride }
    }

    /// Views `elements` as contiguous rows.
    pub fn row_major(elements: impl Into<ElementsMut<'a>>, rows: usize, columns: usize) -> Self {
        Self::new(elements, rows, columns, columns)
    }
}

fn extent(rows: usize, columns: usize, row_stride: usize, column_stride: usize) -> Option<usize> {
    if rows == 0 || columns == 0 {
        return Some(0);
    }
    let last_row = (rows - 1).checked_mul(row_stride)?;
    let last_column = (columns - 1).checked_mul(column_stride)?;
    last_row.checked_add(last_column)?.checked_add(1)
}
