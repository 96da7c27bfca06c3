//! Caps on logits.

use crate::Tensor;

/// `cap * tanh(x / cap)` in place, in f32 inside, without a gradient: logits of inference. Losses have
/// [`crate::device::CrossEntropyParameters::softcap`].
///
/// # Panics
/// When another handle shares the memory.
pub fn softcap(logits: &mut Tensor, cap: f32) {
    let device = logits.device().clone();
    device.kernels().softcap(logits, cap);
}
