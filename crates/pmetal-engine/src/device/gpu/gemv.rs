//! Products of a few rows, which are as fast as their weights can be read.

use super::launch::Kernel;
use super::runtime::{Argument, Runtime};
use crate::device::{Finish, Operand};
use crate::{DType, Tensor};

/// The most rows that the kernel takes.
const MOST_ROWS: usize = 8;

/// More rows than this are faster on matrix units, where operands are of one narrow type.
const MOST_NARROW_ROWS: usize = 4;

/// SIMD groups of a group, as the kernel has it.
const GROUPS: usize = 8;

/// One launch of the kernel for few rows.
pub(super) struct Gemv<'a> {
    /// x, w, inner size: one or two of them.
    products: Vec<(&'a Tensor, &'a Tensor, usize)>,
    finish: Finish<'a>,
    rows: usize,
    features: usize,
}

/// How the work is divided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Form {
    /// Rows that the kernel is compiled for.
    rows: usize,
    /// Columns of the result for each SIMD group.
    features: usize,
    /// SIMD groups that divide the inner dimension.
    splits: usize,
    /// Vectors under way for each column.
    depth: usize,
}

impl Form {
    fn new(rows: usize, inner: usize) -> Self {
        let rows = rows.next_power_of_two();
        let steps = inner.div_ceil(256);
        // As timed on an H200 for sizes from 2048 to 28672; x is read once for all columns of a SIMD group.
        let features = if rows == 1 { 2 } else { 4 };
        let splits = steps.next_power_of_two().min(if rows > 2 { 4 } else { GROUPS });
        Self { rows, features, splits, depth: 1 }
    }

    /// Columns of the result for each group.
    fn columns(&self) -> usize {
        self.features * GROUPS / self.splits
    }
}

/// Elements between the rows that a product sees: all leading dimensions are rows.
fn pitch(tensor: &Tensor) -> usize {
    if tensor.shape().len() == 2 { tensor.pitch() } else { tensor.columns() }
}

fn is_float(dtype: DType) -> bool {
    matches!(dtype, DType::F32 | DType::Bf16 | DType::F16)
}

impl<'a> Gemv<'a> {
    /// The launch for some products, if the kernel does such ones.
    pub(super) fn of(
        products: &[(Operand<'a>, Operand<'a>)],
        out: &Tensor,
        finish: &Finish<'a>,
    ) -> Option<Self> {
        let (rows, features) = (out.rows(), out.columns());
        let (first_left, first_right) = products.first()?;
        let alike = |(left, right): &(Operand<'_>, Operand<'_>)| {
            !left.transposed
                && right.transposed
                && left.tensor.dtype() == first_left.tensor.dtype()
                && right.tensor.dtype() == first_right.tensor.dtype()
        };
        let types = [first_left.tensor.dtype(), first_right.tensor.dtype(), out.dtype()];
        let is_bias = |bias: &Tensor| bias.dtype() == DType::F32;
        let is_narrow = types[0] == types[1] && types[0].bytes() == 2;
        let is_wanted = (1..=if is_narrow { MOST_NARROW_ROWS } else { MOST_ROWS }).contains(&rows)
            && features > 0
            && products.len() <= 2
            && products.iter().all(alike)
            && types.into_iter().all(is_float)
            && finish.bias.is_none_or(is_bias)
            && !(finish.accumulate && finish.residual.is_some())
            && products.iter().all(|(left, _)| left.tensor.columns() > 0);
        is_wanted.then(|| Self {
            products: products.iter().map(|(l, r)| (l.tensor, r.tensor, l.tensor.columns())).collect(),
            finish: *finish,
            rows,
            features,
        })
    }

    pub(super) fn launch(&self, runtime: &dyn Runtime, out: &mut Tensor) {
        let (x, w, inner) = self.products[0];
        let (x2, w2, inner2) =
            self.products.get(1).copied().map_or((None, None, 0), |(x, w, inner)| (Some(x), Some(w), inner));
        let form = Form::new(self.rows, inner);
        let is_aligned =
            |tensor: &Tensor| pitch(tensor).is_multiple_of(8) && tensor.address().is_multiple_of(16);
        let aligned = inner.is_multiple_of(8)
            && inner2.is_multiple_of(8)
            && [Some(x), Some(w), x2, w2].into_iter().flatten().all(is_aligned);
        let (out_pitch, own) = (pitch(out), out.address_mut());
        let (residual, residual_pitch) = match self.finish.residual {
            Some(residual) => (residual.address(), pitch(residual)),
            None => (if self.finish.accumulate { own } else { 0 }, out_pitch),
        };
        let pitch_of = |tensor: Option<&Tensor>| tensor.map_or(0, pitch);
        Kernel::new("gemv", "gemv")
            .source(x.dtype())
            .weight(w.dtype())
            .element(out.dtype())
            .aligned(aligned)
            .number("ROWS", form.rows)
            .number("FEATURES", form.features)
            .number("SPLITS", form.splits)
            .number("DEPTH", form.depth)
            .arguments(&[x.into(), w.into(), x2.into(), w2.into(), self.finish.bias.into()])
            .arguments(&[Argument::Address(residual), Argument::Address(own)])
            .sizes(&[self.rows, self.features, inner, pitch(x), pitch(w)])
            .sizes(&[inner2, pitch_of(x2), pitch_of(w2), residual_pitch, out_pitch])
            .arguments(&[Argument::F32(self.finish.scale)])
            .launch(runtime, [self.features.div_ceil(form.columns()), 1, 1], 32 * GROUPS);
    }
}
