//! Counting of device memory, live and peak, by what it is for.

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::error::Error;

/// What a buffer is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Category {
    /// Frozen weights.
    Weights,
    /// Trainable parameters.
    Parameters,
    /// Gradients of trainable parameters.
    Gradients,
    /// Optimizer state.
    Optimizer,
    /// Values of the forward pass and their gradients.
    Activations,
    /// Logits of the tokens that the head computes at one time.
    Logits,
    /// Scratch memory of an operation.
    Workspace,
    /// Keys and values kept for decoding.
    Cache,
}

impl Category {
    /// All categories, in the order of reports.
    pub const ALL: [Self; 8] = [
        Self::Weights,
        Self::Parameters,
        Self::Gradients,
        Self::Optimizer,
        Self::Activations,
        Self::Logits,
        Self::Workspace,
        Self::Cache,
    ];

    /// The name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Weights => "weights",
            Self::Parameters => "parameters",
            Self::Gradients => "gradients",
            Self::Optimizer => "optimizer",
            Self::Activations => "activations",
            Self::Logits => "logits",
            Self::Workspace => "workspace",
            Self::Cache => "cache",
        }
    }
}

/// How many categories there are.
const CATEGORIES: usize = Category::ALL.len();

/// Counters of one device. All sizes are bytes of live tensors, not of the process.
#[derive(Debug, Default)]
pub struct MemoryTracker(Mutex<Counters>);

#[derive(Debug, Default)]
struct Counters {
    live: [usize; CATEGORIES],
    peak: [usize; CATEGORIES],
    /// What was live when the sum was highest.
    at_peak: [usize; CATEGORIES],
    total: usize,
    total_peak: usize,
    limit: Option<usize>,
    shortage: Option<Shortage>,
}

/// One category of a [`MemoryReport`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CategoryBytes {
    /// What the memory is for.
    pub category: Category,
    /// Bytes now.
    pub live_bytes: usize,
    /// Bytes at the time when the sum over all categories was highest.
    pub at_peak_bytes: usize,
    /// The most that this category alone had at one time.
    pub peak_bytes: usize,
}

/// A reading of the counters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryReport {
    /// In the order of [`Category::ALL`].
    pub categories: Vec<CategoryBytes>,
    /// Live bytes over all categories.
    pub live_bytes: usize,
    /// The highest sum over all categories that was live at one time.
    pub peak_bytes: usize,
}

/// An allocation that was refused, and what was live when it was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shortage {
    /// What it was for.
    pub category: Category,
    /// Its size.
    pub requested_bytes: usize,
    /// The limit that it would have exceeded; `None` when the device itself had no more.
    pub limit_bytes: Option<usize>,
    /// The counters at that time.
    pub report: MemoryReport,
}

impl Shortage {
    /// The error that tells of it.
    pub fn to_error(&self) -> Error {
        Error::OutOfMemory {
            category: self.category.name(),
            requested_bytes: self.requested_bytes,
            live_bytes: self.report.live_bytes,
        }
    }
}

impl MemoryReport {
    /// Live bytes of one category.
    pub fn live(&self, category: Category) -> usize {
        self.categories[category as usize].live_bytes
    }

    /// Peak bytes of one category.
    pub fn peak(&self, category: Category) -> usize {
        self.categories[category as usize].peak_bytes
    }

    /// Bytes of one category at the time when the sum was highest.
    pub fn at_peak(&self, category: Category) -> usize {
        self.categories[category as usize].at_peak_bytes
    }
}

impl Counters {
    fn report(&self) -> MemoryReport {
        let categories = Category::ALL.iter().enumerate().map(|(index, &category)| CategoryBytes {
            category,
            live_bytes: self.live[index],
            at_peak_bytes: self.at_peak[index],
            peak_bytes: self.peak[index],
        });
        MemoryReport { categories: categories.collect(), live_bytes: self.total, peak_bytes: self.total_peak }
    }
}

impl MemoryTracker {
    fn counters(&self) -> MutexGuard<'_, Counters> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn allocated(&self, category: Category, bytes: usize) {
        let mut counters = self.counters();
        let index = category as usize;
        counters.live[index] += bytes;
        counters.peak[index] = counters.peak[index].max(counters.live[index]);
        counters.total += bytes;
        if counters.total > counters.total_peak {
            counters.total_peak = counters.total;
            counters.at_peak = counters.live;
        }
    }

    pub(crate) fn freed(&self, category: Category, bytes: usize) {
        let mut counters = self.counters();
        counters.live[category as usize] -= bytes;
        counters.total -= bytes;
    }

    /// Whether so many bytes more are within the limit.
    pub(crate) fn has_room_for(&self, bytes: usize) -> bool {
        let counters = self.counters();
        counters.limit.is_none_or(|limit| counters.total.saturating_add(bytes) <= limit)
    }

    /// Keeps what was live when an allocation was refused, and returns the error that says so.
    pub(crate) fn refuse(&self, category: Category, requested_bytes: usize) -> Error {
        let mut counters = self.counters();
        let limit_bytes =
            counters.limit.filter(|&limit| counters.total.saturating_add(requested_bytes) > limit);
        let shortage = Shortage { category, requested_bytes, limit_bytes, report: counters.report() };
        let error = shortage.to_error();
        counters.shortage = Some(shortage);
        error
    }

    /// Refuses allocations with which more than this would be live at one time; `None` = what the device has.
    pub fn set_limit(&self, bytes: Option<usize>) {
        self.counters().limit = bytes;
    }

    /// The limit of [`Self::set_limit`].
    pub fn limit(&self) -> Option<usize> {
        self.counters().limit
    }

    /// The last allocation that was refused, since the start or [`Self::forget_shortage`].
    pub fn shortage(&self) -> Option<Shortage> {
        self.counters().shortage.clone()
    }

    /// Forgets what was refused so far.
    pub fn forget_shortage(&self) {
        self.counters().shortage = None;
    }

    /// Live and peak bytes since the start or the last [`Self::reset_peak`].
    pub fn report(&self) -> MemoryReport {
        self.counters().report()
    }

    /// Sets every peak to what is live now.
    pub fn reset_peak(&self) {
        let mut counters = self.counters();
        (counters.peak, counters.at_peak) = (counters.live, counters.live);
        counters.total_peak = counters.total;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DType, Device, Tensor};

    #[test]
    fn live_and_peak_bytes_are_counted_by_category() {
        let device = Device::cpu();
        let tensor = |category, elements| Tensor::zeros(&device, category, DType::Bf16, &[elements]).unwrap();
        let weights = tensor(Category::Weights, 100);
        let cache = tensor(Category::Cache, 7);
        drop(tensor(Category::Weights, 50));
        let second_handle = weights.slice_rows(0, 1).unwrap();
        drop(weights);
        let report = device.memory().report();
        assert_eq!((report.live(Category::Weights), report.peak(Category::Weights)), (200, 300));
        assert_eq!((report.live(Category::Cache), report.live(Category::Optimizer)), (14, 0));
        assert_eq!((report.live_bytes, report.peak_bytes), (214, 314));
        drop(second_handle);
        device.memory().reset_peak();
        let report = device.memory().report();
        assert_eq!((report.peak(Category::Weights), report.live_bytes, report.peak_bytes), (0, 14, 14));
        drop(cache);
        assert_eq!(device.memory().report().live_bytes, 0);
        assert_eq!(Device::cpu().memory().report().peak_bytes, 0);
    }

    #[test]
    fn the_peak_is_told_by_what_it_was_made_of() {
        let device = Device::cpu();
        let tensor = |category, elements| Tensor::zeros(&device, category, DType::F32, &[elements]).unwrap();
        let weights = tensor(Category::Weights, 10);
        drop(tensor(Category::Workspace, 5));
        let activations = tensor(Category::Activations, 8);
        drop(activations);
        let _logits = tensor(Category::Logits, 6);
        let report = device.memory().report();
        let at_peak = Category::ALL.map(|category| report.at_peak(category));
        assert_eq!(at_peak, [40, 0, 0, 0, 32, 0, 0, 0]);
        assert_eq!(at_peak.iter().sum::<usize>(), report.peak_bytes);
        assert_eq!((report.peak(Category::Workspace), report.peak(Category::Logits)), (20, 24));
        drop(weights);
        device.memory().reset_peak();
        assert_eq!(device.memory().report().at_peak(Category::Logits), 24);
    }

    #[test]
    fn what_exceeds_the_limit_is_refused_and_remembered() {
        let device = Device::cpu();
        let tensor = |category, elements| Tensor::zeros(&device, category, DType::F32, &[elements]);
        let memory = device.memory();
        memory.set_limit(Some(100));
        let held = tensor(Category::Weights, 20).unwrap();
        assert!(memory.shortage().is_none());
        let fits = tensor(Category::Workspace, 5).unwrap();
        let error = tensor(Category::Logits, 1).err().unwrap();
        let words = "out of memory: 4 bytes for logits on top of 100 bytes in use";
        assert_eq!(error.to_string(), words);
        drop((held, fits));
        let shortage = memory.shortage().unwrap();
        assert_eq!((shortage.category, shortage.requested_bytes), (Category::Logits, 4));
        assert_eq!((shortage.limit_bytes, shortage.report.live_bytes), (Some(100), 100));
        assert_eq!(shortage.report.live(Category::Workspace), 20);
        assert_eq!(shortage.to_error().to_string(), words);
        memory.forget_shortage();
        memory.set_limit(None);
        drop(tensor(Category::Logits, 1000).unwrap());
        assert!(memory.shortage().is_none() && memory.limit().is_none());
        assert!(tensor(Category::Logits, 1 << 60).is_err());
        assert_eq!(memory.shortage().unwrap().limit_bytes, None);
    }

    #[test]
    fn reports_name_every_category_once() {
        let report = MemoryTracker::default().report();
        assert!(report.categories.iter().map(|entry| entry.category).eq(Category::ALL));
        assert!(Category::ALL.iter().enumerate().all(|(index, &category)| category as usize == index));
    }
}
