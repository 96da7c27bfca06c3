//! Columns of a wider array as tensors of their own.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::{Buffer, Memory, Tensor};
use crate::error::{Error, Result};
use crate::memory::Category;
use crate::{DType, Device};

/// What sets a tensor of columns apart from a contiguous one.
#[derive(Clone)]
pub(super) struct Part {
    /// Elements from one row of the outermost dimension to the next.
    pitch: usize,
    /// Shared by all handles to these columns; other columns of the same array are other memory.
    handles: Arc<Handles>,
    /// Columns after these that belong to them, for what is to be multiplied together with them.
    spare: usize,
}

/// What all handles to the same columns share.
#[derive(Default)]
struct Handles {
    /// Whether somebody reads what the spare columns hold for as long as these columns exist.
    keeps_spare: AtomicBool,
}

impl Part {
    pub(super) fn is_unique(&self) -> bool {
        Arc::strong_count(&self.handles) == 1
    }
}

impl Tensor {
    /// Elements from one row of the outermost dimension to the next.
    pub fn pitch(&self) -> usize {
        match &self.part {
            Some(part) => part.pitch,
            None => self.shape.get(1..).unwrap_or_default().iter().product(),
        }
    }

    /// The tensor itself, or a copy without gaps between rows.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub fn contiguous(&self) -> Result<Self> {
        if self.part.is_none() { Ok(self.clone()) } else { self.copy(Category::Workspace) }
    }

    /// Views the memory of a matrix as one of a narrower type, whose rows start where its rows start.
    pub(crate) fn narrowed_rows(self, dtype: DType) -> Self {
        if dtype == self.dtype {
            return self;
        }
        let ratio = self.dtype.bytes() / dtype.bytes();
        let part = Part { pitch: self.pitch() * ratio, handles: Arc::default(), spare: 0 };
        Self { dtype, offset: self.offset * ratio, part: Some(part), ..self }
    }

    /// Whether rows follow each other without a gap.
    pub fn is_contiguous(&self) -> bool {
        let row = || self.shape.get(1..).unwrap_or_default().iter().product::<usize>();
        self.part.as_ref().is_none_or(|part| part.pitch == row())
    }

    /// Divides a matrix \[T, sum of widths\] into matrices \[T, width\] that share its memory. Each may be written by
    /// who holds the only handle to it, as they do not overlap.
    ///
    /// # Errors
    /// [`Error::Shape`] when the widths do not add up to the columns; out of memory when the whole is shared and must be
    /// copied.
    pub fn split_columns(self, widths: &[usize]) -> Result<Vec<Self>> {
        let (rows, pitch) = (self.rows(), self.columns());
        if widths.iter().sum::<usize>() != pitch || self.shape.len() != 2 || self.part.is_some() {
            let expected = vec![rows, widths.iter().sum()];
            return Err(Error::Shape {
                operation: "split_columns",
                what: "input",
                actual: self.shape,
                expected,
            });
        }
        if widths.len() == 1 {
            return Ok(vec![self]);
        }
        let whole = self.into_unique()?;
        let mut offset = whole.offset;
        let part = |&width: &usize| {
            let part = Some(Part { pitch, handles: Arc::default(), spare: 0 });
            let tensor = Self {
                dtype: whole.dtype,
                shape: vec![rows, width],
                buffer: Arc::clone(&whole.buffer),
                offset,
                part,
            };
            offset += width;
            tensor
        };
        Ok(widths.iter().map(part).collect())
    }

    /// A scratch matrix \[T, width\] whose rows have room for `spare` more columns.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub fn scratch_with_spare(
        device: &Device,
        category: Category,
        dtype: DType,
        [rows, width]: [usize; 2],
        spare: usize,
    ) -> Result<Self> {
        let whole = Self::scratch(device, category, dtype, &[rows, width + spare])?;
        if spare == 0 {
            return Ok(whole);
        }
        let part = Some(Part { pitch: width + spare, handles: Arc::default(), spare });
        Ok(Self { shape: vec![rows, width], part, ..whole })
    }

    /// A scratch tensor of this shape whose rows, if it is a matrix, have as many columns to spare.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub(crate) fn scratch_like(&self, category: Category) -> Result<Self> {
        match (self.shape.as_slice(), &self.part) {
            (&[rows, width], Some(part)) => {
                Self::scratch_with_spare(self.device(), category, self.dtype, [rows, width], part.spare)
            }
            (shape, _) => Self::scratch(self.device(), category, self.dtype, shape),
        }
    }

    /// The spare columns as a matrix \[T, spare\], and these columns together with them. They belong to whoever holds
    /// these columns: only one of the users of a tensor may write them at a time, and nobody after [`Self::keep_spare`].
    pub(crate) fn spare_columns(&self) -> Option<(Self, Self)> {
        let is_free = |part: &&Part| part.spare > 0 && !part.handles.keeps_spare.load(Ordering::Relaxed);
        let part = self.part.as_ref().filter(is_free)?;
        let rows = self.shape.first().copied().unwrap_or(1);
        let width: usize = self.shape[1..].iter().product();
        let view = |offset, width| Self {
            shape: vec![rows, width],
            offset,
            part: Some(Part { pitch: part.pitch, handles: Arc::default(), spare: 0 }),
            ..self.clone()
        };
        Some((view(self.offset + width, part.spare), view(self.offset, width + part.spare)))
    }

    /// Says that the spare columns are read later, so that nobody gets them any more.
    pub(crate) fn keep_spare(&self) {
        if let Some(part) = &self.part {
            part.handles.keeps_spare.store(true, Ordering::Relaxed);
        }
    }

    /// Rows and columns, each as first and count, of a matrix that stays shared: a view to read, or to write by whoever
    /// knows that nobody else uses these elements.
    ///
    /// # Errors
    /// [`Error::Range`] when they are not all there.
    pub(crate) fn block(&self, rows: [usize; 2], columns: [usize; 2]) -> Result<Self> {
        let [first, count] = columns;
        if self.shape.len() != 2 || first.saturating_add(count) > self.columns() {
            let (actual, limit) = (first.saturating_add(count), self.columns() + 1);
            return Err(Error::Range { operation: "block", what: "end column", actual, limit });
        }
        let part = Part { pitch: self.pitch(), handles: Arc::default(), spare: 0 };
        let rows = self.slice_rows(rows[0], rows[1])?;
        let shape = vec![rows.shape[0], count];
        Ok(Self { shape, offset: rows.offset + first, part: Some(part), ..rows })
    }

    /// Two tensors of heads \[T, H, E\] that lie side by side in one matrix as one \[T, H1 + H2, E\], to be written by who
    /// holds the only handles to both; `None` where they do not, or on a host.
    pub(crate) fn beside(&self, other: &Self) -> Option<Self> {
        let (part, heads) = (self.part.as_ref()?, self.shape.get(1)?);
        let is_alike = self.shape.len() == 3
            && other.shape.len() == 3
            && (self.shape[0], self.shape[2]) == (other.shape[0], other.shape[2])
            && self.dtype == other.dtype
            && other.part.as_ref().is_some_and(|other| other.pitch == part.pitch);
        let is_next =
            Arc::ptr_eq(&self.buffer, &other.buffer) && self.offset + heads * self.shape[2] == other.offset;
        let is_ours = !self.is_host() && self.is_unique() && other.is_unique();
        (is_alike && is_next && is_ours).then(|| Self {
            shape: vec![self.shape[0], heads + other.shape[1], self.shape[2]],
            part: Some(Part { pitch: part.pitch, handles: Arc::default(), spare: 0 }),
            ..self.clone()
        })
    }

    /// Whether the tensors are all columns of one matrix, in order.
    fn are_columns_of_one(parts: &[&Self]) -> bool {
        let Some(first) = parts.first() else { return false };
        let mut offset = first.offset;
        let adjacent = parts.iter().all(|tensor| {
            let here = tensor.offset == offset
                && Arc::ptr_eq(&tensor.buffer, &first.buffer)
                && tensor.dtype == first.dtype
                && tensor.shape.first() == first.shape.first()
                && tensor.pitch() == first.pitch();
            offset += tensor.shape.get(1..).unwrap_or_default().iter().product::<usize>();
            here
        });
        adjacent && offset - first.offset == first.pitch()
    }

    /// The matrix \[T, sum of widths\] that these columns were divided from, if they are all of it and nobody else holds a part
    /// of it.
    pub(crate) fn rejoined_columns(parts: &[Self]) -> Option<Self> {
        let all: Vec<&Self> = parts.iter().collect();
        let first = parts.first()?;
        let is_whole = Self::are_columns_of_one(&all)
            && parts.iter().all(Self::is_unique)
            && Arc::strong_count(&first.buffer) == parts.len();
        let shape = vec![first.shape.first().copied().unwrap_or(1), first.pitch()];
        is_whole.then(|| Self { shape, part: None, ..first.clone() })
    }

    /// Whether the tensors are all columns of one matrix of a device, in order: others of their widths are then best made
    /// [`Self::side_by_side`].
    pub(crate) fn are_side_by_side(parts: &[&Self]) -> bool {
        parts.len() > 1 && !parts[0].is_host() && Self::are_columns_of_one(parts)
    }

    /// Scratch matrices \[T, width\] divided from one.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub(crate) fn side_by_side(
        (device, category, dtype): (&Device, Category, DType),
        rows: usize,
        widths: &[usize],
    ) -> Result<Vec<Self>> {
        Self::scratch(device, category, dtype, &[rows, widths.iter().sum()])?.split_columns(widths)
    }

    /// Scratch tensors of the shapes of `like`, divided from one matrix if those are.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub fn scratch_alike<const COUNT: usize>(
        category: Category,
        like: [&Self; COUNT],
    ) -> Result<[Self; COUNT]> {
        let tensors = Self::all_alike(category, &like)?;
        Ok(tensors.try_into().expect("invariant: one tensor for each"))
    }

    fn all_alike(category: Category, like: &[&Self]) -> Result<Vec<Self>> {
        let fresh = |tensor: &&Self| Self::scratch(tensor.device(), category, tensor.dtype, &tensor.shape);
        if like.len() < 2 || !Self::are_columns_of_one(like) {
            return like.iter().map(fresh).collect();
        }
        let rows = like[0].shape.first().copied().unwrap_or(1);
        let widths: Vec<usize> = like.iter().map(|tensor| tensor.shape[1..].iter().product()).collect();
        let parts = Self::side_by_side((like[0].device(), category, like[0].dtype), rows, &widths)?;
        parts.into_iter().zip(like).map(|(part, like)| part.reshape(&like.shape)).collect()
    }

    /// Copies rows that are not next to each other.
    pub(super) fn copy_pitched(&mut self, start: usize, source: &Self) {
        let row_bytes = |tensor: &Self| {
            tensor.shape.get(1..).unwrap_or_default().iter().product::<usize>() * tensor.dtype.bytes()
        };
        // A part is copied row by row; a contiguous side may have been reshaped.
        let bytes = if source.part.is_some() { row_bytes(source) } else { row_bytes(self) };
        if bytes == 0 {
            return;
        }
        let rows = source.byte_length() / bytes;
        let pitch =
            |tensor: &Self| if tensor.part.is_some() { tensor.pitch() * tensor.dtype.bytes() } else { bytes };
        let (source_pitch, target_pitch) = (pitch(source), pitch(self));
        assert!(start == 0 || self.part.is_none(), "invariant: columns are written as a whole");
        match &source.buffer.memory {
            Memory::Remote { .. } => {
                let target = self.address_mut() + start as u64;
                let (source, target) = ((source.address(), source_pitch), (target, target_pitch));
                self.device().remote().copy_rows(source, target, bytes, rows);
            }
            Memory::Host(_) => {
                let from = source.host_bytes();
                let (first, into) =
                    (source.offset * source.dtype.bytes(), self.offset * self.dtype.bytes() + start);
                assert!(self.part.is_none(), "invariant: columns of host tensors are only read");
                let buffer: &mut Buffer = Arc::get_mut(&mut self.buffer)
                    .expect("invariant: only fresh or unique tensors are written");
                let Memory::Host(target) = &mut buffer.memory else { return };
                for row in 0..rows {
                    let (from_row, into_row) = (first + row * source_pitch, into + row * target_pitch);
                    target.as_mut_slice()[into_row..into_row + bytes]
                        .copy_from_slice(&from[from_row..from_row + bytes]);
                }
            }
        }
    }
}
