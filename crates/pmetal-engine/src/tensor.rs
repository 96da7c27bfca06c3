//! Contiguous row-major arrays in a device's memory.

use std::sync::Arc;

use crate::dtype::Scalar;
use crate::error::{Error, Result, expect_dtype, expect_shape};
use crate::memory::Category;
use crate::{DType, Device};

/// A contiguous row-major array. Cloning shares the memory; writing needs the only handle to it.
#[derive(Clone)]
pub struct Tensor {
    dtype: DType,
    shape: Vec<usize>,
    buffer: Arc<Buffer>,
    /// First element, in elements of `dtype`.
    offset: usize,
}

/// Memory of one device, counted while it lives.
pub(crate) struct Buffer {
    bytes: AlignedBytes,
    category: Category,
    device: Device,
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.device.memory().freed(self.category, self.bytes.length);
        self.device.recycle(std::mem::take(&mut self.bytes));
    }
}

/// Initialised bytes at an address that is a multiple of 64.
pub(crate) struct AlignedBytes {
    pointer: *mut u8,
    length: usize,
}

// SAFETY: the bytes are owned by this value alone and carry no thread affinity.
unsafe impl Send for AlignedBytes {}
// SAFETY: shared access only reads.
unsafe impl Sync for AlignedBytes {}

const ALIGNMENT: usize = 64;

impl Default for AlignedBytes {
    fn default() -> Self {
        Self { pointer: std::ptr::without_provenance_mut(ALIGNMENT), length: 0 }
    }
}

impl AlignedBytes {
    /// Zeroed bytes, or `None` when the allocator refuses.
    pub(crate) fn zeroed(length: usize) -> Option<Self> {
        if length == 0 {
            return Some(Self::default());
        }
        let layout = std::alloc::Layout::from_size_align(length, ALIGNMENT).ok()?;
        // SAFETY: the layout has a size above zero.
        let pointer = unsafe { std::alloc::alloc_zeroed(layout) };
        if pointer.is_null() { None } else { Some(Self { pointer, length }) }
    }

    pub(crate) fn len(&self) -> usize {
        self.length
    }

    pub(crate) fn as_slice(&self) -> &[u8] {
        // SAFETY: `length` initialised bytes are owned behind the pointer.
        unsafe { std::slice::from_raw_parts(self.pointer, self.length) }
    }

    pub(crate) fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `&mut self` makes the access exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.pointer, self.length) }
    }
}

impl Drop for AlignedBytes {
    fn drop(&mut self) {
        if self.length == 0 {
            return;
        }
        if let Ok(layout) = std::alloc::Layout::from_size_align(self.length, ALIGNMENT) {
            // SAFETY: `zeroed` allocated with this very layout.
            unsafe { std::alloc::dealloc(self.pointer, layout) };
        }
    }
}

impl Tensor {
    /// A tensor of zeros.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] when the device has no room.
    pub fn zeros(device: &Device, category: Category, dtype: DType, shape: &[usize]) -> Result<Self> {
        let mut tensor = Self::scratch(device, category, dtype, shape)?;
        tensor.bytes_mut().fill(0);
        Ok(tensor)
    }

    /// A tensor whose values are unspecified; every element must be written before it is read.
    /// Debug builds fill it with NaN so that a kernel that forgets an element is found.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] when the device has no room.
    pub fn scratch(device: &Device, category: Category, dtype: DType, shape: &[usize]) -> Result<Self> {
        let out_of_memory = |requested_bytes| Error::OutOfMemory {
            category: category.name(),
            requested_bytes,
            live_bytes: device.memory().report().live_bytes,
        };
        let bytes = shape
            .iter()
            .try_fold(dtype.bytes(), |product, &size| product.checked_mul(size))
            .ok_or_else(|| out_of_memory(usize::MAX))?;
        let storage = device.allocate(bytes).ok_or_else(|| out_of_memory(bytes))?;
        device.memory().allocated(category, storage.len());
        let buffer = Arc::new(Buffer { bytes: storage, category, device: device.clone() });
        let mut tensor = Self { dtype, shape: shape.to_vec(), buffer, offset: 0 };
        if cfg!(debug_assertions) {
            tensor.bytes_mut().fill(0xFF);
        }
        Ok(tensor)
    }

    /// A tensor holding a copy of `values`.
    ///
    /// # Errors
    /// [`Error::Shape`] when the shape's product is not the number of values; [`Error::OutOfMemory`].
    pub fn from_slice<T: Scalar>(
        device: &Device,
        category: Category,
        shape: &[usize],
        values: &[T],
    ) -> Result<Self> {
        if shape.iter().product::<usize>() != values.len() {
            return Err(Error::Shape {
                operation: "from_slice",
                what: "values",
                actual: vec![values.len()],
                expected: shape.to_vec(),
            });
        }
        let mut tensor = Self::scratch(device, category, T::DTYPE, shape)?;
        tensor.as_mut_slice::<T>().copy_from_slice(values);
        Ok(tensor)
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Sizes, outermost first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Product of all sizes but the last.
    pub fn rows(&self) -> usize {
        self.shape[..self.shape.len().saturating_sub(1)].iter().product()
    }

    /// The last size.
    pub fn columns(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Bytes that the elements take.
    pub fn byte_length(&self) -> usize {
        self.elements() * self.dtype.bytes()
    }

    /// The device whose memory this is.
    pub fn device(&self) -> &Device {
        &self.buffer.device
    }

    /// The same memory under another shape.
    ///
    /// # Errors
    /// [`Error::Shape`] when the number of elements differs.
    pub fn reshape(&self, shape: &[usize]) -> Result<Self> {
        if shape.iter().product::<usize>() != self.elements() {
            return Err(Error::Shape {
                operation: "reshape",
                what: "input",
                actual: self.shape.clone(),
                expected: shape.to_vec(),
            });
        }
        Ok(Self { shape: shape.to_vec(), ..self.clone() })
    }

    /// Rows `start .. start + count` of the outermost dimension, sharing the memory.
    ///
    /// # Errors
    /// [`Error::Range`] when the rows are not all there.
    pub fn slice_rows(&self, start: usize, count: usize) -> Result<Self> {
        let rows = self.shape.first().copied().unwrap_or(1);
        let end = start.saturating_add(count);
        if end > rows || self.shape.is_empty() {
            return Err(Error::Range {
                operation: "slice_rows",
                what: "end row",
                actual: end,
                limit: rows + 1,
            });
        }
        let row_elements: usize = self.shape[1..].iter().product();
        let mut shape = self.shape.clone();
        shape[0] = count;
        Ok(Self { shape, offset: self.offset + start * row_elements, ..self.clone() })
    }

    /// The elements of a host tensor.
    ///
    /// # Panics
    /// When `T` is not the tensor's element type: a fault of the calling kernel.
    pub fn as_slice<T: Scalar>(&self) -> &[T] {
        assert_eq!(T::DTYPE, self.dtype, "invariant: the kernel chose its type by dtype()");
        let start = self.offset * self.dtype.bytes();
        bytemuck::cast_slice(&self.buffer.bytes.as_slice()[start..start + self.byte_length()])
    }

    /// The elements of a host tensor, to write.
    ///
    /// # Panics
    /// As [`Self::as_slice`], and when another handle shares the memory: see [`Self::into_unique`].
    pub fn as_mut_slice<T: Scalar>(&mut self) -> &mut [T] {
        assert_eq!(T::DTYPE, self.dtype, "invariant: the kernel chose its type by dtype()");
        bytemuck::cast_slice_mut(self.bytes_mut())
    }

    /// The memory of a host tensor, to be filled with elements in the machine's byte order.
    ///
    /// # Panics
    /// When another handle shares the memory.
    pub fn as_mut_bytes(&mut self) -> &mut [u8] {
        self.bytes_mut()
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        let range = self.offset * self.dtype.bytes()..self.offset * self.dtype.bytes() + self.byte_length();
        let buffer =
            Arc::get_mut(&mut self.buffer).expect("invariant: only fresh or unique tensors are written");
        &mut buffer.bytes.as_mut_slice()[range]
    }

    /// Whether no other handle shares the memory.
    pub fn is_unique(&self) -> bool {
        Arc::strong_count(&self.buffer) == 1
    }

    /// A handle that may be written: itself when unique, else a copy.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] when a copy is needed and there is no room.
    pub fn into_unique(self) -> Result<Self> {
        if self.is_unique() {
            return Ok(self);
        }
        self.copy(self.buffer.category)
    }

    /// A copy in fresh memory.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub fn copy(&self, category: Category) -> Result<Self> {
        let mut copy = Self::scratch(self.device(), category, self.dtype, &self.shape)?;
        let start = self.offset * self.dtype.bytes();
        let source = &self.buffer.bytes.as_slice()[start..start + self.byte_length()];
        copy.bytes_mut().copy_from_slice(source);
        Ok(copy)
    }

    /// Overwrites rows of the outermost dimension, from `start`, by those of `source`.
    ///
    /// # Errors
    /// [`Error::Range`] when the rows do not fit; [`Error::Shape`] or [`Error::DType`] when they are of another kind.
    pub fn write_rows(&mut self, start: usize, source: &Self) -> Result<()> {
        expect_dtype("write_rows", "source", source.dtype, self.dtype)?;
        let (rows, added) =
            (self.shape.first().copied().unwrap_or(1), source.shape.first().copied().unwrap_or(1));
        let row_shape = self.shape.get(1..).unwrap_or_default();
        let row_elements = row_shape.iter().product::<usize>();
        if source.elements() != added * row_elements {
            let expected = [&[added], row_shape].concat();
            expect_shape("write_rows", "source", &source.shape, &expected)?;
        }
        let end = start.saturating_add(added);
        if end > rows {
            return Err(Error::Range {
                operation: "write_rows",
                what: "end row",
                actual: end,
                limit: rows + 1,
            });
        }
        let row_bytes = row_elements * self.dtype.bytes();
        let offset = source.offset * source.dtype.bytes();
        let bytes = &source.buffer.bytes.as_slice()[offset..offset + source.byte_length()];
        self.bytes_mut()[start * row_bytes..end * row_bytes].copy_from_slice(bytes);
        Ok(())
    }

    /// All elements as f32 on the host.
    pub fn to_f32_vec(&self) -> Vec<f32> {
        match self.dtype {
            DType::F32 => self.as_slice::<f32>().to_vec(),
            DType::Bf16 => self.as_slice::<half::bf16>().iter().map(|value| value.to_f32()).collect(),
            DType::F16 => self.as_slice::<half::f16>().iter().map(|value| value.to_f32()).collect(),
            DType::U32 => self.as_slice::<u32>().iter().map(|&value| value as f32).collect(),
            DType::I32 => self.as_slice::<i32>().iter().map(|&value| value as f32).collect(),
        }
    }
}

impl std::fmt::Debug for Tensor {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "Tensor({} {:?})", self.dtype, self.shape)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counting(device: &Device, shape: &[usize]) -> Tensor {
        let values: Vec<u32> = (0..shape.iter().product::<usize>() as u32).collect();
        Tensor::from_slice(device, Category::Activations, shape, &values).unwrap()
    }

    #[test]
    fn a_slice_of_rows_shares_the_memory_of_the_whole() {
        let device = Device::cpu();
        let whole = counting(&device, &[5, 2, 3]);
        let before = device.memory().report().live_bytes;
        let part = whole.slice_rows(1, 3).unwrap().slice_rows(1, 1).unwrap();
        assert_eq!(part.shape(), [1, 2, 3]);
        assert_eq!(part.as_slice::<u32>(), [12, 13, 14, 15, 16, 17]);
        assert_eq!(device.memory().report().live_bytes, before);
        assert!(!whole.is_unique());
        assert_eq!(part.copy(Category::Workspace).unwrap().as_slice::<u32>()[0], 12);
        assert_eq!(part.into_unique().unwrap().as_slice::<u32>()[5], 17);
        assert!(whole.is_unique());
        assert_eq!(whole.slice_rows(5, 0).unwrap().elements(), 0);
        for (start, count) in [(4, 2), (6, 0), (1, usize::MAX)] {
            assert!(matches!(whole.slice_rows(start, count), Err(Error::Range { limit: 6, .. })));
        }
    }

    #[test]
    fn rows_are_written_where_they_belong_or_refused() {
        let device = Device::cpu();
        let mut target = counting(&device, &[4, 3]);
        let source = counting(&device, &[9, 3]).slice_rows(6, 2).unwrap();
        target.write_rows(1, &source).unwrap();
        assert_eq!(target.as_slice::<u32>(), [0, 1, 2, 18, 19, 20, 21, 22, 23, 9, 10, 11]);
        assert!(matches!(target.write_rows(3, &source), Err(Error::Range { actual: 5, limit: 5, .. })));
        assert!(matches!(target.write_rows(0, &counting(&device, &[1, 4])), Err(Error::Shape { .. })));
        let floats = Tensor::zeros(&device, Category::Activations, DType::F32, &[1, 3]).unwrap();
        assert!(matches!(target.write_rows(0, &floats), Err(Error::DType { .. })));
    }

    #[test]
    fn shapes_that_do_not_hold_the_elements_are_refused() {
        let device = Device::cpu();
        let tensor = counting(&device, &[2, 6]);
        assert_eq!(tensor.reshape(&[3, 4]).unwrap().rows(), 3);
        assert!(matches!(tensor.reshape(&[3, 5]), Err(Error::Shape { .. })));
        let short = Tensor::from_slice(&device, Category::Weights, &[2, 2], &[1.0_f32; 3]);
        assert!(matches!(short, Err(Error::Shape { .. })));
    }

    #[test]
    fn more_memory_than_there_is_is_an_error() {
        let device = Device::cpu();
        for shape in [[usize::MAX, 2], [1 << 60, 1]] {
            let error = Tensor::scratch(&device, Category::Weights, DType::F32, &shape).err().unwrap();
            assert!(matches!(error, Error::OutOfMemory { .. }), "{error}");
        }
        assert_eq!(device.memory().report().live_bytes, 0);
    }

    #[test]
    fn scratch_memory_is_poisoned_in_debug_builds_and_zeros_are_zero_in_reused_memory() {
        let device = Device::cpu();
        // Large enough for the pool.
        let shape = [1 << 15];
        for _ in 0..2 {
            let scratch = Tensor::scratch(&device, Category::Workspace, DType::F32, &shape).unwrap();
            let poisoned = scratch.as_slice::<f32>().iter().all(|value| value.is_nan());
            assert!(poisoned || !cfg!(debug_assertions));
            drop(scratch);
            let zeros = Tensor::zeros(&device, Category::Workspace, DType::F32, &shape).unwrap();
            assert!(zeros.as_slice::<f32>().iter().all(|&value| value == 0.0));
        }
    }

    #[test]
    #[should_panic(expected = "only fresh or unique tensors are written")]
    fn shared_memory_is_never_written() {
        let mut tensor = counting(&Device::cpu(), &[2]);
        let _other = tensor.clone();
        tensor.as_mut_slice::<u32>()[0] = 9;
    }
}
