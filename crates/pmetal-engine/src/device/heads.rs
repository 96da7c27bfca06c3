//! Columns of heads.

use crate::Tensor;

/// Which columns of a token's heads are copied, and where to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeadCopy {
    /// Heads that are written.
    pub heads: usize,
    /// Columns of each.
    pub width: usize,
    /// Where the first head's columns begin in the source, and how far heads lie apart; 0 = one head for all.
    pub from: [usize; 2],
    /// Where they go, and how far heads lie apart there.
    pub to: [usize; 2],
}

impl HeadCopy {
    /// Columns of every head of `source` \[T, H or 1, E\], from `firsts[0]`, to those of `target` \[T, H, F\], from `firsts[1]`;
    /// one head is repeated.
    pub fn between(source: &Tensor, target: &Tensor, firsts: [usize; 2], width: usize) -> Self {
        let heads = |tensor: &Tensor| tensor.shape().get(1).copied().unwrap_or(1);
        let stride = if heads(source) == 1 { 0 } else { source.columns() };
        Self { heads: heads(target), width, from: [firsts[0], stride], to: [firsts[1], target.columns()] }
    }
}

/// For each head N of its S rows of a matrix \[H * S, K\].
#[derive(Clone, Copy)]
pub struct HeadRows<'a> {
    /// The matrix.
    pub matrix: &'a Tensor,
    /// S.
    pub rows: usize,
    /// The first of the head's rows that is meant, and N.
    pub part: [usize; 2],
    /// Whether heads are multiplied with columns of these rows: \[N\] becomes \[K\].
    pub by_columns: bool,
}
