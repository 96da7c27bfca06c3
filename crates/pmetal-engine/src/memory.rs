//! Counting of device memory, live and peak, by what it is for.

use std::sync::atomic::{AtomicUsize, Ordering};

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
    /// Scratch memory of an operation.
    Workspace,
    /// Keys and values kept for decoding.
    Cache,
}

impl Category {
    /// All categories, in the order of reports.
    pub const ALL: [Self; 7] = [
        Self::Weights,
        Self::Parameters,
        Self::Gradients,
        Self::Optimizer,
        Self::Activations,
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
            Self::Workspace => "workspace",
            Self::Cache => "cache",
        }
    }
}

/// Counters of one device. All sizes are bytes of live tensors, not of the process.
#[derive(Debug, Default)]
pub struct MemoryTracker {
    live: [AtomicUsize; 7],
    peak: [AtomicUsize; 7],
    total: AtomicUsize,
    total_peak: AtomicUsize,
}

/// A reading of the counters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryReport {
    /// Category, live bytes, peak bytes.
    pub categories: Vec<(Category, usize, usize)>,
    /// Live bytes over all categories.
    pub live_bytes: usize,
    /// The highest sum over all categories that was live at one time.
    pub peak_bytes: usize,
}

impl MemoryReport {
    /// Live bytes of one category.
    pub fn live(&self, category: Category) -> usize {
        self.categories.iter().find(|entry| entry.0 == category).map_or(0, |entry| entry.1)
    }

    /// Peak bytes of one category.
    pub fn peak(&self, category: Category) -> usize {
        self.categories.iter().find(|entry| entry.0 == category).map_or(0, |entry| entry.2)
    }
}

impl MemoryTracker {
    pub(crate) fn allocated(&self, category: Category, bytes: usize) {
        let index = category as usize;
        let live = self.live[index].fetch_add(bytes, Ordering::Relaxed) + bytes;
        self.peak[index].fetch_max(live, Ordering::Relaxed);
        let total = self.total.fetch_add(bytes, Ordering::Relaxed) + bytes;
        self.total_peak.fetch_max(total, Ordering::Relaxed);
    }

    pub(crate) fn freed(&self, category: Category, bytes: usize) {
        self.live[category as usize].fetch_sub(bytes, Ordering::Relaxed);
        self.total.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// Live and peak bytes since the start or the last [`Self::reset_peak`].
    pub fn report(&self) -> MemoryReport {
        MemoryReport {
            categories: Category::ALL
                .iter()
                .map(|&category| {
                    let index = category as usize;
                    let live = self.live[index].load(Ordering::Relaxed);
                    (category, live, self.peak[index].load(Ordering::Relaxed))
                })
                .collect(),
            live_bytes: self.total.load(Ordering::Relaxed),
            peak_bytes: self.total_peak.load(Ordering::Relaxed),
        }
    }

    /// Sets every peak to what is live now.
    pub fn reset_peak(&self) {
        for (live, peak) in self.live.iter().zip(&self.peak) {
            peak.store(live.load(Ordering::Relaxed), Ordering::Relaxed);
        }
        self.total_peak.store(self.total.load(Ordering::Relaxed), Ordering::Relaxed);
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
    fn reports_name_every_category_once() {
        let report = MemoryTracker::default().report();
        assert!(report.categories.iter().map(|entry| entry.0).eq(Category::ALL));
        assert!(Category::ALL.iter().enumerate().all(|(index, &category)| category as usize == index));
    }
}
