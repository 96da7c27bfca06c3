//! Which keys a query looks at (DeepSeek-V3.2: the lightning indexer).

use crate::device::{AttentionMask, KeyChoice};
use crate::error::{Error, Result, expect_dtype, expect_shape};
use crate::memory::Category;
use crate::{DType, Tensor};

/// For each query the `count` keys of the highest scores, the first of equal ones, or all keys where it sees no more:
/// `score[t, s] = sum_h weights[t, h] max(q[t, h] . k[s], 0)` in f32 over the keys that the mask shows; q \[T, H, E\],
/// k \[Tk, E\], weights f32 \[T, H\]. What is no number counts as the lowest score.
///
/// Give it to attention by [`AttentionMask::with_choice`]. Without a gradient. Shapes depend on those of the inputs alone
/// and nothing is read back, so that a device can record it. Cost: 2 H E flops for each visible pair of a query that sees
/// more than `count` keys, T Tk / 8 bytes that stay, and at most 64 MiB or the scores of one query as workspace.
///
/// # Errors
/// [`Error::Shape`] or [`Error::DType`] for inputs that do not belong together or to the mask; [`Error::Unsupported`]
/// for a choice of no key; out of memory.
pub fn choose_keys(mask: &AttentionMask, [q, k, weights]: [&Tensor; 3], count: usize) -> Result<KeyChoice> {
    let [tokens, keys] = mask.tokens;
    let &[_, heads, width] = q.shape() else {
        let (actual, expected) = (q.shape().to_vec(), vec![tokens, 0, 0]);
        return Err(Error::Shape { operation: "choose_keys", what: "q", actual, expected });
    };
    expect_shape("choose_keys", "q", q.shape(), &[tokens, heads, width])?;
    expect_shape("choose_keys", "k", k.shape(), &[keys, width])?;
    expect_shape("choose_keys", "weights", weights.shape(), &[tokens, heads])?;
    expect_dtype("choose_keys", "k", k.dtype(), q.dtype())?;
    expect_dtype("choose_keys", "weights", weights.dtype(), DType::F32)?;
    let device = q.device();
    if count == 0 || heads == 0 || width == 0 {
        let reason = format!("{count} keys are to be chosen by {heads} heads of {width} elements");
        return Err(Error::Unsupported { operation: "choose_keys", device: device.name(), reason });
    }
    let shape = [tokens, keys.div_ceil(32)];
    let mut bits = Tensor::scratch(device, Category::Activations, DType::U32, &shape)?;
    if bits.elements() > 0 {
        device.kernels().choose_keys(mask, [q, k, weights], count, &mut bits)?;
    }
    Ok(KeyChoice { bits, tokens: mask.tokens })
}
