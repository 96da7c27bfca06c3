//! Row-major arrays in a device's memory.

mod columns;

use std::sync::Arc;

use crate::dtype::Scalar;
use crate::error::{Error, Result, expect_dtype, expect_shape};
use crate::memory::Category;
use crate::{DType, Device};

/// A row-major array. Cloning shares the memory; writing needs the only handle to it. Contiguous, but for what
/// [`Self::split_columns`] gives.
#[derive(Clone)]
pub struct Tensor {
    dtype: DType,
    shape: Vec<usize>,
    buffer: Arc<Buffer>,
    /// First element, in elements of `dtype`.
    offset: usize,
    /// Columns of a wider array, when it is not contiguous.
    part: Option<columns::Part>,
}

/// Memory of one device, counted while it lives.
pub(crate) struct Buffer {
    memory: Memory,
    category: Category,
    device: Device,
}

/// Where a tensor's bytes are.
pub(crate) enum Memory {
    /// In the program's own memory.
    Host(AlignedBytes),
    /// In a device's memory, which only its kernels read and write.
    Remote {
        /// The first byte, as the device counts.
        address: u64,
        /// Size.
        bytes: usize,
    },
}

impl Memory {
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::Host(bytes) => bytes.len(),
            Self::Remote { bytes, .. } => *bytes,
        }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.device.memory().freed(self.category, self.memory.len());
        self.device.recycle(std::mem::replace(&mut self.memory, Memory::Host(AlignedBytes::default())));
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
        tensor.fill(0);
        Ok(tensor)
    }

    /// A tensor whose values are unspecified; every element must be written before it is read.
    /// Debug builds fill it with NaN so that a kernel that forgets an element is found.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] when the device has no room.
    pub fn scratch(device: &Device, category: Category, dtype: DType, shape: &[usize]) -> Result<Self> {
        let out_of_memory = |requested_bytes| device.memory().refuse(category, requested_bytes);
        let bytes = shape
            .iter()
            .try_fold(dtype.bytes(), |product, &size| product.checked_mul(size))
            .ok_or_else(|| out_of_memory(usize::MAX))?;
        let room = device.memory().has_room_for(bytes);
        let storage = room.then(|| device.allocate(bytes)).flatten().ok_or_else(|| out_of_memory(bytes))?;
        device.memory().allocated(category, storage.len());
        let buffer = Arc::new(Buffer { memory: storage, category, device: device.clone() });
        let mut tensor = Self { dtype, shape: shape.to_vec(), buffer, offset: 0, part: None };
        if cfg!(debug_assertions) {
            tensor.fill(0xFF);
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
        tensor.write_bytes(bytemuck::cast_slice(values));
        Ok(tensor)
    }

    fn fill(&mut self, byte: u8) {
        match self.buffer.memory {
            Memory::Host(_) => self.bytes_mut().fill(byte),
            Memory::Remote { .. } => {
                assert!(self.is_contiguous(), "invariant: only contiguous tensors are filled");
                let (address, length) = (self.address_mut(), self.byte_length());
                self.device().remote().fill(address, byte, length);
            }
        }
    }

    /// Sets every element to zero.
    pub fn fill_zero(&mut self) {
        self.fill(0);
    }

    /// Overwrites the memory by elements in the machine's byte order.
    ///
    /// # Panics
    /// When the number of bytes is not [`Self::byte_length`], and when another handle shares the memory.
    pub fn write_bytes(&mut self, bytes: &[u8]) {
        assert_eq!(bytes.len(), self.byte_length(), "invariant: a tensor is written as a whole");
        match self.buffer.memory {
            Memory::Host(_) => self.bytes_mut().copy_from_slice(bytes),
            Memory::Remote { .. } => {
                let address = self.address_mut();
                self.device().remote().upload(bytes, address);
            }
        }
    }

    /// Overwrites a device's memory that others hold handles to as well: for those who know that work in the order of the
    /// device is to read the new elements.
    pub(crate) fn write_shared<T: Scalar>(&self, values: &[T]) {
        assert!(
            T::DTYPE == self.dtype && values.len() == self.elements() && self.part.is_none(),
            "invariant: a tensor is written as a whole"
        );
        self.device().remote().upload(bytemuck::cast_slice(values), self.address());
    }

    /// [`Self::write_bytes`] of elements.
    ///
    /// # Panics
    /// As [`Self::write_bytes`], and when `T` is not the tensor's element type.
    pub fn write_slice<T: Scalar>(&mut self, values: &[T]) {
        assert_eq!(T::DTYPE, self.dtype, "invariant: the caller chose its type by dtype()");
        self.write_bytes(bytemuck::cast_slice(values));
    }

    /// Lets `read` put elements into the memory, in the machine's byte order.
    ///
    /// # Errors
    /// What `read` returns.
    ///
    /// # Panics
    /// When another handle shares the memory.
    pub fn read_from<E>(
        &mut self,
        read: impl FnOnce(&mut [u8]) -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        match self.buffer.memory {
            Memory::Host(_) => read(self.bytes_mut()),
            Memory::Remote { .. } => {
                let mut bytes = vec![0; self.byte_length()];
                read(&mut bytes)?;
                self.write_bytes(&bytes);
                Ok(())
            }
        }
    }

    /// Whether the elements are in the program's own memory.
    pub fn is_host(&self) -> bool {
        matches!(self.buffer.memory, Memory::Host(_))
    }

    /// The first element's address in a device's memory.
    ///
    /// # Panics
    /// For a host tensor: a fault of the calling kernel.
    pub(crate) fn address(&self) -> u64 {
        match self.buffer.memory {
            Memory::Remote { address, .. } => address + (self.offset * self.dtype.bytes()) as u64,
            Memory::Host(_) => unreachable!("invariant: a kernel is given tensors of its own device"),
        }
    }

    /// [`Self::address`], to write there.
    ///
    /// # Panics
    /// As [`Self::address`], and when another handle shares the memory.
    pub(crate) fn address_mut(&mut self) -> u64 {
        assert!(self.is_unique(), "invariant: only fresh or unique tensors are written");
        self.address()
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

    /// The same memory under another shape; columns of a wider array are copied when the number of rows changes.
    ///
    /// # Errors
    /// [`Error::Shape`] when the number of elements differs; out of memory for a copy.
    pub fn reshape(&self, shape: &[usize]) -> Result<Self> {
        if shape.iter().product::<usize>() != self.elements() {
            return Err(Error::Shape {
                operation: "reshape",
                what: "input",
                actual: self.shape.clone(),
                expected: shape.to_vec(),
            });
        }
        let rows = |shape: &[usize]| shape.first().copied().unwrap_or(1);
        if self.part.is_some() && rows(shape) != rows(&self.shape) {
            return Ok(Self { shape: shape.to_vec(), ..self.copy(self.buffer.category)? });
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
        let mut shape = self.shape.clone();
        shape[0] = count;
        Ok(Self { shape, offset: self.offset + start * self.pitch(), ..self.clone() })
    }

    /// Lets `write` have rows `start .. start + count` of the outermost dimension as a tensor of their own.
    ///
    /// # Errors
    /// [`Error::Range`] when the rows are not all there; what `write` returns.
    pub fn with_rows_mut<T>(
        &mut self,
        start: usize,
        count: usize,
        write: impl FnOnce(&mut Self) -> Result<T>,
    ) -> Result<T> {
        let part = self.slice_rows(start, count)?;
        let (shape, offset) = (part.shape.clone(), part.offset);
        drop(part);
        // Moved, not shared: who writes must hold the only handle.
        let whole = (std::mem::replace(&mut self.shape, shape), std::mem::replace(&mut self.offset, offset));
        let outcome = write(self);
        (self.shape, self.offset) = whole;
        outcome
    }

    /// Lets `write` have a contiguous tensor under another shape of as many elements.
    ///
    /// # Errors
    /// [`Error::Shape`] when the number of elements differs.
    pub fn with_shape<T>(&mut self, shape: &[usize], write: impl FnOnce(&mut Self) -> T) -> Result<T> {
        let other = self.reshape(shape)?.shape;
        let own = std::mem::replace(&mut self.shape, other);
        let outcome = write(self);
        self.shape = own;
        Ok(outcome)
    }

    /// The elements of a host tensor.
    ///
    /// # Panics
    /// When `T` is not the tensor's element type: a fault of the calling kernel.
    pub fn as_slice<T: Scalar>(&self) -> &[T] {
        assert_eq!(T::DTYPE, self.dtype, "invariant: the kernel chose its type by dtype()");
        assert!(self.part.is_none(), "invariant: only contiguous tensors are viewed as slices");
        let start = self.offset * self.dtype.bytes();
        bytemuck::cast_slice(&self.host_bytes()[start..start + self.byte_length()])
    }

    /// The whole buffer of a host tensor.
    fn host_bytes(&self) -> &[u8] {
        match &self.buffer.memory {
            Memory::Host(bytes) => bytes.as_slice(),
            Memory::Remote { .. } => unreachable!("invariant: only host tensors are viewed as slices"),
        }
    }

    /// The elements of a host tensor, to write.
    ///
    /// # Panics
    /// As [`Self::as_slice`], and when another handle shares the memory: see [`Self::into_unique`].
    pub fn as_mut_slice<T: Scalar>(&mut self) -> &mut [T] {
        assert_eq!(T::DTYPE, self.dtype, "invariant: the kernel chose its type by dtype()");
        bytemuck::cast_slice_mut(self.bytes_mut())
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        assert!(self.part.is_none(), "invariant: only contiguous tensors are viewed as slices");
        let range = self.offset * self.dtype.bytes()..self.offset * self.dtype.bytes() + self.byte_length();
        let buffer =
            Arc::get_mut(&mut self.buffer).expect("invariant: only fresh or unique tensors are written");
        match &mut buffer.memory {
            Memory::Host(bytes) => &mut bytes.as_mut_slice()[range],
            Memory::Remote { .. } => unreachable!("invariant: only host tensors are viewed as slices"),
        }
    }

    /// Whether both are in the same memory.
    pub fn shares_memory(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.buffer, &other.buffer)
    }

    /// Whether no other handle shares the memory.
    pub fn is_unique(&self) -> bool {
        match &self.part {
            None => Arc::strong_count(&self.buffer) == 1,
            Some(part) => part.is_unique(),
        }
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
        copy.copy_bytes(0, self);
        Ok(copy)
    }

    /// Overwrites bytes from `start` by all of a tensor on the same device.
    fn copy_bytes(&mut self, start: usize, source: &Self) {
        if source.part.is_some() || self.part.is_some() {
            return self.copy_pitched(start, source);
        }
        let length = source.byte_length();
        match self.buffer.memory {
            Memory::Host(_) => {
                let first = source.offset * source.dtype.bytes();
                let bytes = &source.host_bytes()[first..first + length];
                self.bytes_mut()[start..start + length].copy_from_slice(bytes);
            }
            Memory::Remote { .. } => {
                let target = self.address_mut() + start as u64;
                self.device().remote().copy(source.address(), target, length);
            }
        }
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
        self.copy_bytes(start * row_elements * self.dtype.bytes(), source);
        Ok(())
    }

    /// All elements, copied to the host; waits for a device that is still computing them.
    ///
    /// # Errors
    /// [`Error::Driver`] when the device failed.
    ///
    /// # Panics
    /// When `T` is not the tensor's element type.
    pub fn to_vec<T: Scalar>(&self) -> Result<Vec<T>> {
        if self.is_host() && self.part.is_none() {
            return Ok(self.as_slice::<T>().to_vec());
        }
        assert_eq!(T::DTYPE, self.dtype, "invariant: the caller chose its type by dtype()");
        if self.part.is_some() {
            return self.copy(Category::Workspace)?.to_vec();
        }
        let mut values = vec![T::zeroed(); self.elements()];
        self.device().remote().download(self.address(), bytemuck::cast_slice_mut(&mut values))?;
        Ok(values)
    }

    /// All elements as f32 on the host.
    ///
    /// # Errors
    /// [`Error::Driver`] when the device failed.
    pub fn to_f32_vec(&self) -> Result<Vec<f32>> {
        Ok(match self.dtype {
            DType::F32 => self.to_vec::<f32>()?,
            DType::Bf16 => self.to_vec::<half::bf16>()?.iter().map(|value| value.to_f32()).collect(),
            DType::F16 => self.to_vec::<half::f16>()?.iter().map(|value| value.to_f32()).collect(),
            DType::E4m3 => self.to_vec::<u8>()?.into_iter().map(crate::device::e4m3_value).collect(),
            DType::U32 => self.to_vec::<u32>()?.iter().map(|&value| value as f32).collect(),
            DType::I32 => self.to_vec::<i32>()?.iter().map(|&value| value as f32).collect(),
        })
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
