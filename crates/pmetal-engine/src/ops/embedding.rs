//! Rows of a table by token id.

use crate::error::{Error, Result, expect_dtype, expect_shape};
use crate::memory::Category;
use crate::{DType, Tape, Tensor, Var, Weight};

/// `scale * table[ids]`: ids u32 \[T\], table \[V, D\], result \[T, D\] of type `dtype`.
///
/// Bytes: the result twice. The gradient is computed only for a trainable table, in f32; the row of `padding`
/// gets none, as with PyTorch's `padding_idx`.
///
/// # Errors
/// [`Error::Range`] for an id that is not below V, which ids in a device's memory must have been checked for by
/// [`check_ids`]; [`Error::DType`] for ids that are not u32; out of memory.
pub fn embedding(
    tape: &Tape,
    ids: &Tensor,
    table: &Weight,
    scale: f32,
    padding: Option<u32>,
    dtype: DType,
) -> Result<Var> {
    expect_dtype("embedding", "ids", ids.dtype(), DType::U32)?;
    let value = table.value();
    let (vocabulary, width) = (value.rows(), value.columns());
    if ids.is_host() {
        check_ids(ids.as_slice(), vocabulary)?;
    }
    let device = value.device().clone();
    let mut out = Tensor::scratch(&device, Category::Activations, dtype, &[ids.elements(), width])?;
    device.kernels().embedding(ids, &value, scale, &mut out);
    let Some(parameter) = table.parameter().cloned() else {
        return Ok(tape.push(out, false, |_| Box::new(|_| Ok(()))));
    };
    let ids = ids.clone();
    Ok(tape.push(out, true, |slot| {
        Box::new(move |gradients| {
            let Some(d_out) = gradients.take(slot) else { return Ok(()) };
            parameter.accumulate(|d_table| {
                device.kernels().embedding_backward(&ids, &d_out, scale, padding, d_table);
                Ok(())
            })
        })
    }))
}

/// Checks that all ids are rows of a table.
///
/// # Errors
/// [`Error::Range`] for the first that is not below `vocabulary`.
pub fn check_ids(ids: &[u32], vocabulary: usize) -> Result<()> {
    match ids.iter().find(|&&id| id as usize >= vocabulary) {
        None => Ok(()),
        Some(&id) => Err(Error::Range {
            operation: "embedding",
            what: "token id",
            actual: id as usize,
            limit: vocabulary,
        }),
    }
}

/// Writes row i of x \[T, ..\] to row `rows[i]` of `out` \[N, ..\]; rows u32 \[T\], below N where they are in a device's
/// memory.
///
/// # Errors
/// [`Error::Shape`] or [`Error::DType`] when the rows are of another kind; [`Error::Range`] for a row that is not there.
pub fn scatter_rows(x: &Tensor, rows: &Tensor, out: &mut Tensor) -> Result<()> {
    let count = |tensor: &Tensor| tensor.shape().first().copied().unwrap_or(1);
    let width = |tensor: &Tensor| tensor.shape().get(1..).unwrap_or_default().iter().product::<usize>();
    expect_dtype("scatter_rows", "rows", rows.dtype(), DType::U32)?;
    expect_dtype("scatter_rows", "input", x.dtype(), out.dtype())?;
    expect_shape("scatter_rows", "rows", rows.shape(), &[count(x)])?;
    expect_shape("scatter_rows", "input", &[width(x)], &[width(out)])?;
    if rows.is_host() {
        check_ids(rows.as_slice(), count(out))?;
    }
    let x = x.reshape(&[count(x), width(x)])?;
    out.with_shape(&[count(out), width(out)], |out| x.device().kernels().scatter_rows(&x, rows, out))
}
