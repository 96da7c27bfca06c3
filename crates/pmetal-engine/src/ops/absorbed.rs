//! Keys and values of heads that a linear layer would make from one latent vector, without making them.
//!
//! The score of a query with such a key is that of the latent vector with the query times the layer's rows for keys, and
//! a mean of such values is that of latent vectors times the rows for values. So few queries are taken to the latent
//! vectors, which are one head of keys and values for all heads of queries, and their results back (DeepSeek-V2, arXiv
//! 2405.04434, section 2.1.2). Without gradients.

use crate::device::{Arithmetic, Finish, HeadRows, Operand};
use crate::error::{Result, expect_shape};
use crate::memory::Category;
use crate::ops::Linear;
use crate::{Tensor, Weight};

/// Queries \[T, H, R\] of latent vectors, from q \[T, H, N\] of keys that `layer` \[H (N + V), R\] makes from these, each
/// head's rows for keys before those for values. An adapter of the layer takes part. Flops: 2 T H N R.
///
/// # Errors
/// [`crate::Error::Shape`] when sizes disagree; out of memory.
pub fn absorb_queries(q: &Tensor, layer: &Linear, [unturned, value]: [usize; 2]) -> Result<Tensor> {
    let (weight, [tokens, heads]) = (layer.weight.value(), tokens_and_heads(q));
    let rank = weight.columns();
    check(q, &weight, [heads, unturned, value], unturned)?;
    let part = |matrix| HeadRows { matrix, rows: unturned + value, part: [0, unturned], by_columns: true };
    let (device, kernels) = (q.device(), q.device().kernels());
    let scratch = |width| Tensor::scratch(device, Category::Activations, q.dtype(), &[tokens, heads, width]);
    let mut out = scratch(rank)?;
    kernels.head_products(q, &part(&weight), &mut out, false)?;
    let Some(lora) = &layer.lora else { return Ok(out) };
    let [a, b] = [&lora.a, &lora.b].map(Weight::value);
    let mut reduced = scratch(b.columns())?;
    kernels.head_products(q, &part(&b), &mut reduced, false)?;
    let product = (Operand::plain(&reduced), Operand::plain(&a));
    let finish = Finish { scale: lora.scale, ..Finish::ACCUMULATE };
    kernels.matmul(&[product], &mut out, &finish, Arithmetic::of(q.dtype()))?;
    Ok(out)
}

/// What heads give, \[T, H, V\], from means x \[T, H, R\] of latent vectors; the rest as [`absorb_queries`]. Flops: 2 T H V R.
///
/// # Errors
/// As [`absorb_queries`].
pub fn expand_results(x: &Tensor, layer: &Linear, [unturned, value]: [usize; 2]) -> Result<Tensor> {
    let (weight, [tokens, heads]) = (layer.weight.value(), tokens_and_heads(x));
    check(x, &weight, [heads, unturned, value], weight.columns())?;
    let part =
        |matrix| HeadRows { matrix, rows: unturned + value, part: [unturned, value], by_columns: false };
    let (device, kernels) = (x.device(), x.device().kernels());
    let scratch = |width| Tensor::scratch(device, Category::Activations, x.dtype(), &[tokens, heads, width]);
    let mut out = scratch(value)?;
    kernels.head_products(x, &part(&weight), &mut out, false)?;
    let Some(lora) = &layer.lora else { return Ok(out) };
    let [a, b] = [&lora.a, &lora.b].map(Weight::value);
    let mut reduced = scratch(b.columns())?;
    let product = (Operand::plain(x), Operand::transposed(&a));
    kernels.matmul(&[product], &mut reduced, &Finish::scaled(lora.scale), Arithmetic::of(x.dtype()))?;
    kernels.head_products(&reduced, &part(&b), &mut out, true)?;
    Ok(out)
}

fn tokens_and_heads(x: &Tensor) -> [usize; 2] {
    [0, 1].map(|index| x.shape().get(index).copied().unwrap_or(1))
}

fn check(x: &Tensor, weight: &Tensor, [heads, unturned, value]: [usize; 3], width: usize) -> Result<()> {
    let [tokens, _] = tokens_and_heads(x);
    expect_shape("absorbed heads", "input", x.shape(), &[tokens, heads, width])?;
    expect_shape("absorbed heads", "weight", weight.shape(), &[heads * (unturned + value), weight.columns()])
}
