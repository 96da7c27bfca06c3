//! Norms and AdamW over many tensors in one launch.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use super::Gpu;
use super::launch::Kernel;
use super::runtime::{Argument, Runtime};
use crate::device::{AdamWControl, AdamWEntry, AdamWParameters, Sum};
use crate::error::{Error, Result};
use crate::memory::Category;
use crate::{DType, Tensor};

/// Numbers that describe one tensor, as in `kernels/optimizer.cpp`.
const ENTRY: usize = 9;

/// Elements that one group takes, as there.
const PIECE: usize = 4096;

/// Descriptions of tensors that are in a device's memory already, by their numbers.
#[derive(Default)]
pub(super) struct Tables(Mutex<HashMap<Vec<u64>, Arc<Table>>>);

/// At most this many descriptions are kept; a training run needs two.
const MOST_TABLES: usize = 8;

/// Not tensors, which would keep their device alive from within.
struct Table {
    entries: Words,
    pieces: Words,
    count: usize,
}

/// Numbers in a device's memory.
struct Words {
    runtime: Arc<dyn Runtime>,
    address: u64,
    bytes: usize,
}

impl Words {
    fn upload(runtime: &Arc<dyn Runtime>, values: &[u32]) -> Result<Self> {
        let bytes = size_of_val(values);
        let address = runtime.allocate(bytes).ok_or(Error::OutOfMemory {
            category: Category::Workspace.name(),
            requested_bytes: bytes,
            live_bytes: 0,
        })?;
        runtime.upload(bytemuck::cast_slice(values), address);
        Ok(Self { runtime: Arc::clone(runtime), address, bytes })
    }
}

impl Drop for Words {
    fn drop(&mut self) {
        self.runtime.free(self.address, self.bytes);
    }
}

impl Tables {
    fn get(&self, runtime: &Arc<dyn Runtime>, numbers: Vec<u64>) -> Result<Arc<Table>> {
        let mut tables = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(table) = tables.get(&numbers) {
            return Ok(Arc::clone(table));
        }
        if tables.len() >= MOST_TABLES {
            tables.clear();
        }
        let mut pieces: Vec<u32> = Vec::new();
        for (index, entry) in numbers.chunks_exact(ENTRY).enumerate() {
            let count = (entry[4] as usize).div_ceil(PIECE) as u32;
            pieces.extend((0..count).flat_map(|piece| [index as u32, piece]));
        }
        let words: &[u32] = bytemuck::cast_slice(&numbers);
        let (entries, pieces_there) = (Words::upload(runtime, words)?, Words::upload(runtime, &pieces)?);
        let table = Table { entries, pieces: pieces_there, count: pieces.len() / 2 };
        let table = Arc::new(table);
        tables.insert(numbers, Arc::clone(&table));
        Ok(table)
    }
}

/// The constants of a step in the order of `kernels/optimizer.cpp`.
pub(crate) fn control_values(constants: &AdamWParameters) -> [f32; 9] {
    // Corrections in f64, as the step count makes powers that f32 loses.
    let step = f64::from(constants.step);
    let rate = constants.learning_rate;
    [
        constants.gradient_scale,
        constants.max_norm as f32,
        (rate * constants.weight_decay) as f32,
        (1.0 - constants.beta1) as f32,
        constants.beta2 as f32,
        (1.0 - constants.beta2) as f32,
        (rate / (1.0 - constants.beta1.powf(step))) as f32,
        (1.0 - constants.beta2.powf(step)).sqrt() as f32,
        constants.epsilon as f32,
    ]
}

/// The flags of an entry; 8 divides `unit` where 8 divides all that it was made of.
fn flags(decays: bool, unit: usize, addresses: &[u64]) -> u64 {
    const DECAYS: u64 = 1;
    const VECTORS: u64 = 2;
    let is_aligned = unit.is_multiple_of(8) && addresses.iter().all(|address| address.is_multiple_of(16));
    (if decays { DECAYS } else { 0 }) | (if is_aligned { VECTORS } else { 0 })
}

impl Gpu {
    pub(super) fn add_squares(&self, tensors: &[&Tensor], sum: &mut Sum) {
        let (Some(first), Some(total)) = (tensors.first(), &mut sum.device) else { return };
        let describe = |tensor: &&Tensor| {
            let flags = flags(false, tensor.elements(), &[tensor.address()]);
            [0, tensor.address(), 0, 0, tensor.elements() as u64, 0, 1, 0, flags]
        };
        let table = self.tables.get(&self.runtime, tensors.iter().flat_map(describe).collect());
        let partial = table.and_then(|table| {
            let shape = [table.count];
            Ok((Tensor::scratch(first.device(), Category::Workspace, DType::F32, &shape)?, table))
        });
        let (partial, table) = match partial {
            Ok(partial) => partial,
            Err(error) => return self.runtime.fail("sum_of_squares", &error.to_string()),
        };
        Kernel::new("optimizer", "squares")
            .element(DType::F32)
            .arguments(&[
                Argument::Address(table.entries.address),
                Argument::Address(table.pieces.address),
                (&partial).into(),
            ])
            .launch(self.runtime.as_ref(), [table.count, 1, 1], 256);
        self.add_values("optimizer", "add_squares", &partial, total);
    }

    pub(super) fn step(&self, entries: &mut [AdamWEntry<'_>], control: &AdamWControl, squares: Option<&Sum>) {
        if entries.is_empty() {
            return;
        }
        let Some(constants) = &control.device else { return };
        // All copies for products are of one type.
        let shadows = entries.iter().filter_map(|entry| entry.shadow.as_ref());
        let shadow_type = shadows.map(|shadow| shadow.dtype()).next().unwrap_or(DType::F32);
        let describe = |entry: &mut AdamWEntry<'_>| {
            let shadow = entry.shadow.as_mut();
            // What has no gaps is one row.
            let (address, columns, pitch) = shadow.map_or((0, 1, 1), |shadow| match shadow.is_contiguous() {
                true => (shadow.address_mut(), shadow.elements(), shadow.elements()),
                false => (shadow.address_mut(), shadow.columns(), shadow.pitch()),
            });
            let (value, gradient) = (entry.value.address_mut(), entry.gradient.address());
            let (first, second) = (entry.first.address_mut(), entry.second.address_mut());
            let elements = entry.value.elements();
            // A vector of the copy must not go over the end of a row.
            let unit = if address == 0 { elements } else { elements | columns | pitch };
            let flags = flags(entry.decays, unit, &[value, gradient, first, second, address]);
            [value, gradient, first, second, elements as u64, address, columns as u64, pitch as u64, flags]
        };
        let table = match self.tables.get(&self.runtime, entries.iter_mut().flat_map(describe).collect()) {
            Ok(table) => table,
            Err(error) => return self.runtime.fail("adamw", &error.to_string()),
        };
        let norm = squares.and_then(|squares| squares.device.as_ref());
        Kernel::new("optimizer", "adamw")
            .element(shadow_type)
            .arguments(&[
                Argument::Address(table.entries.address),
                Argument::Address(table.pieces.address),
                constants.into(),
                norm.into(),
            ])
            .arguments(&[Argument::U32(norm.is_some().into())])
            .launch(self.runtime.as_ref(), [table.count, 1, 1], 256);
    }
}
