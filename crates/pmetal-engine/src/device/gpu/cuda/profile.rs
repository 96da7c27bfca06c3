//! Where the time of a stretch of work goes, by kernel.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::staging::Event;
use super::stream::Stream;
use crate::device::KernelTime;
use crate::error::Result;

/// Events around every kernel since profiling was turned on.
pub(super) struct Profile {
    spans: Vec<(String, Event, Event)>,
}

impl Profile {
    pub(super) fn new() -> Self {
        Self { spans: Vec::new() }
    }

    /// An event before a kernel.
    pub(super) fn begin(stream: &Arc<Stream>) -> Result<Event> {
        let event = Event::new(stream, true)?;
        event.record();
        Ok(event)
    }

    /// Ends the span of a kernel.
    pub(super) fn end(&mut self, name: String, begin: Event, stream: &Arc<Stream>) -> Result<()> {
        let end = Self::begin(stream)?;
        self.spans.push((name, begin, end));
        Ok(())
    }

    /// Sums by name, the longest first.
    pub(super) fn finish(self) -> Result<Vec<KernelTime>> {
        let mut sums: BTreeMap<String, KernelTime> = BTreeMap::new();
        for (name, begin, end) in self.spans {
            end.wait()?;
            let seconds = f64::from(begin.milliseconds_to(&end)?) / 1e3;
            let new = || KernelTime { name: name.clone(), launches: 0, seconds: 0.0 };
            let sum = sums.entry(name.clone()).or_insert_with(new);
            sum.launches += 1;
            sum.seconds += seconds;
        }
        let mut sorted: Vec<KernelTime> = sums.into_values().collect();
        sorted.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
        Ok(sorted)
    }
}
