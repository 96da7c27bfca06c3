//! Tensors of a forward pass that wait for its backward pass in the host's memory.
//!
//! A device copies them there and back on a stream of its own, beside its other work. What was put aside last is wanted
//! first. The two that were put aside last stay where they are as well: their copies are under way, and the backward pass
//! begins with them. In the backward pass the next tensor comes back while the work on the one before goes on.

use std::cell::RefCell;

use crate::device::gpu::runtime::HostCopy;
use crate::error::Result;
use crate::memory::Category;
use crate::{DType, Device, Tensor};

/// Tensors that stay on the device while their copies are under way.
const UNDER_WAY: usize = 2;

/// Tensors that were put aside, in order.
pub(crate) struct Aside {
    device: Device,
    entries: RefCell<Vec<Entry>>,
}

/// Where a tensor is kept.
pub(crate) enum Kept {
    /// On the device.
    Here(Tensor),
    /// At a place of an [`Aside`].
    Aside(usize),
}

/// One tensor.
struct Entry {
    // Dropped first: it makes the device's work wait for a copy before the tensor's memory goes to somebody else.
    copy: Box<dyn HostCopy>,
    tensor: Option<Tensor>,
    dtype: DType,
    shape: Vec<usize>,
}

impl Aside {
    pub(crate) fn new(device: &Device) -> Self {
        Self { device: device.clone(), entries: RefCell::default() }
    }

    /// Starts to copy a tensor, which nobody may write any more, to the host's memory.
    ///
    /// # Errors
    /// [`crate::Error::Driver`] where the device cannot get such memory.
    pub(crate) fn put(&self, tensor: Tensor) -> Result<Kept> {
        if !tensor.is_contiguous() || tensor.elements() == 0 {
            return Ok(Kept::Here(tensor));
        }
        let mut copy = self.device.remote().host_copy(tensor.byte_length())?;
        copy.store(tensor.address());
        let (dtype, shape) = (tensor.dtype(), tensor.shape().to_vec());
        let mut entries = self.entries.borrow_mut();
        entries.push(Entry { copy, tensor: Some(tensor), dtype, shape });
        let place = entries.len() - 1;
        if let Some(oldest) = place.checked_sub(UNDER_WAY) {
            entries[oldest].copy.join();
            entries[oldest].tensor = None;
        }
        Ok(Kept::Aside(place))
    }

    /// Gives back the tensor that was put aside last of those that are left, and starts to bring back the one before.
    ///
    /// # Errors
    /// Out of memory.
    pub(crate) fn take(&self, place: usize) -> Result<Tensor> {
        let mut entries = self.entries.borrow_mut();
        entries.truncate(place + 1);
        let mut entry = entries.pop().expect("invariant: a place is taken once, the last one first");
        entry.bring_back(&self.device)?;
        entry.copy.join();
        let tensor = entry.tensor.take().expect("invariant: it was brought back");
        if let Some(next) = entries.last_mut() {
            next.bring_back(&self.device)?;
        }
        Ok(tensor)
    }
}

impl Entry {
    /// Starts to copy it back, if it is not there.
    fn bring_back(&mut self, device: &Device) -> Result<()> {
        if self.tensor.is_none() {
            let mut tensor = Tensor::scratch(device, Category::Activations, self.dtype, &self.shape)?;
            self.copy.fetch(tensor.address_mut());
            self.tensor = Some(tensor);
        }
        Ok(())
    }
}
