use std::cell::Cell;

/// A cache line, the unit of allocation, so that packed panels start on a line.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
struct Line([f32; 16]);

/// Memory that starts on a cache line and grows on demand; its content is unspecified between uses.
#[derive(Default)]
pub(in crate::device::cpu) struct Buffer(Vec<Line>);

impl Buffer {
    /// At least `count` elements; what they hold is left over from the last use.
    pub(in crate::device::cpu) fn elements<T: bytemuck::Pod>(&mut self, count: usize) -> &mut [T] {
        let lines = (count * size_of::<T>()).div_ceil(size_of::<Line>());
        if self.0.len() < lines {
            // Not copied over: the content is not kept, and old and new need not be alive at once.
            self.0 = Vec::new();
            self.0 = vec![Line([0.0; 16]); lines];
        }
        // SAFETY: the lines are initialised, cover `count` elements and are aligned to 64 bytes; any bits are a valid T.
        unsafe { std::slice::from_raw_parts_mut(self.0.as_mut_ptr().cast::<T>(), count) }
    }
}

/// Memory for packed operands, kept between calls.
#[derive(Default)]
pub struct Workspace {
    pub(in crate::device::cpu) left: Buffer,
    pub(in crate::device::cpu) right: Buffer,
    /// Sums of one chunk of the output that wait for the next chunk of K.
    pub(in crate::device::cpu) totals: Buffer,
    /// Sums of one tile of the output, where it cannot hold them itself.
    pub(in crate::device::cpu) tile: Buffer,
}

impl Workspace {
    /// An empty workspace; it grows with the products it serves, to 24 MiB at most.
    pub fn new() -> Self {
        Self::default()
    }
}

thread_local! {
    static WORKSPACE: Cell<Option<Box<Workspace>>> = const { Cell::new(None) };
    static TILE: Cell<Option<Box<Buffer>>> = const { Cell::new(None) };
}

/// Lends the thread's workspace. It is taken out meanwhile: a thread that waits for its workers may be given other
/// work that multiplies, and that finds none and makes its own.
pub(in crate::device::cpu) fn with_thread_workspace(use_it: impl FnOnce(&mut Workspace)) {
    let mut workspace = WORKSPACE.take().unwrap_or_default();
    use_it(&mut workspace);
    WORKSPACE.set(Some(workspace));
}

/// Lends the thread's tile buffer, likewise.
pub(in crate::device::cpu) fn with_thread_tile(use_it: impl FnOnce(&mut Buffer)) {
    let mut tile = TILE.take().unwrap_or_default();
    use_it(&mut tile);
    TILE.set(Some(tile));
}
