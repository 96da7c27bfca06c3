//! Kernels that work on rows.

use super::Inputs;
use crate::device::{
    DropoutMask, GateActivation, HeadCopy, HeadRows, Held, LayerNorm, NormWeight, RopePairing, RopeRows,
};
use crate::error::Result;
use crate::memory::Category;
use crate::random::RandomKey;
use crate::{DType, Tensor};

const KEY: RandomKey = RandomKey { seed: 0x1234_5678_9ABC_DEF0, step: 7, stream: 3 };

/// RMSNorm forward and backward, the latter stored and added; `None` has no weight.
pub(super) fn norm(inputs: &Inputs<'_>, shape: &[usize], kind: Option<NormWeight>) -> Result<Vec<Tensor>> {
    let kernels = inputs.device.kernels();
    let width = shape[shape.len() - 1];
    let weight = kind.map(|_| inputs.dense(2, &[width])).transpose()?;
    let (weight, kind) = (weight.as_ref(), kind.unwrap_or(NormWeight::Plain));
    let (x, d_out) = (inputs.tensor(1, shape)?, inputs.tensor(3, shape)?);
    let (mut out, mut d_x, mut added) =
        (inputs.empty(shape)?, inputs.empty(shape)?, inputs.tensor(4, shape)?);
    kernels.rms_norm(&x, weight, kind, 1e-2, &mut out);
    kernels.rms_norm_backward(&x, weight, kind, 1e-2, &d_out, Some((&mut d_x, Held::Nothing)), None);
    let mut d_weight = inputs.floats(5, &[width])?;
    let own = weight.map(|_| &mut d_weight);
    kernels.rms_norm_backward(&x, weight, kind, 1e-2, &d_out, Some((&mut added, Held::Itself)), own);
    let (held, mut apart) = (inputs.tensor(6, shape)?, inputs.empty(shape)?);
    let sum = Some((&mut apart, Held::Other(&held)));
    kernels.rms_norm_backward(&x, weight, kind, 1e-2, &d_out, sum, None);
    Ok(vec![out, d_x, added, apart, d_weight])
}

/// LayerNorm forward and backward, the latter stored and added; weight and bias for each head or for all.
pub(super) fn layer_norm(
    inputs: &Inputs<'_>,
    shape: &[usize],
    for_each_head: [bool; 2],
) -> Result<Vec<Tensor>> {
    let kernels = inputs.device.kernels();
    let own = for_each_head.map(|own| if own { &shape[1..] } else { &shape[shape.len() - 1..] });
    let (weight, bias) = (inputs.dense(2, own[0])?, inputs.floats(3, own[1])?);
    let norm = LayerNorm { weight: Some(&weight), bias: Some(&bias), epsilon: 1e-2 };
    let bare = LayerNorm { weight: None, bias: None, epsilon: 1e-2 };
    let (x, d_out) = (inputs.tensor(1, shape)?, inputs.tensor(4, shape)?);
    let (mut out, mut plain) = (inputs.empty(shape)?, inputs.empty(shape)?);
    kernels.layer_norm(&x, &norm, &mut out);
    kernels.layer_norm(&x, &bare, &mut plain);
    let (mut d_x, mut added) = (inputs.empty(shape)?, inputs.tensor(5, shape)?);
    let (held, mut apart) = (inputs.tensor(6, shape)?, inputs.empty(shape)?);
    kernels.layer_norm_backward(&x, &norm, &d_out, Some((&mut d_x, Held::Nothing)), [None, None]);
    let (mut d_weight, mut d_bias) = (inputs.floats(7, own[0])?, inputs.floats(8, own[1])?);
    let both = [Some(&mut d_weight), Some(&mut d_bias)];
    kernels.layer_norm_backward(&x, &norm, &d_out, Some((&mut added, Held::Itself)), both);
    let sum = Some((&mut apart, Held::Other(&held)));
    kernels.layer_norm_backward(&x, &bare, &d_out, sum, [None, None]);
    Ok(vec![out, plain, d_x, added, apart, d_weight, d_bias])
}

/// Rotations forth and back.
pub(super) fn rotation(
    inputs: &Inputs<'_>,
    width: usize,
    pairing: RopePairing,
    half: usize,
) -> Result<Vec<Tensor>> {
    let shape = [4, 3, width];
    let (cosines, sines) = (inputs.floats(2, &[9, half])?, inputs.floats(3, &[9, half])?);
    let rows = inputs.indices(&[8, 0, 3, 3])?;
    let angles = RopeRows { cosines: &cosines, sines: &sines, rows: &rows, pairing };
    let (mut forward, mut back) = (inputs.tensor(1, &shape)?, inputs.tensor(1, &shape)?);
    inputs.device.kernels().rope(&mut forward, &angles, false);
    inputs.device.kernels().rope(&mut back, &angles, true);
    Ok(vec![forward, back])
}

/// Gated activations forward and backward.
pub(super) fn gated(inputs: &Inputs<'_>, width: usize, activation: GateActivation) -> Result<Vec<Tensor>> {
    let shape = [3, width];
    let (gate, up, d_out) = (inputs.tensor(1, &shape)?, inputs.tensor(2, &shape)?, inputs.tensor(3, &shape)?);
    let (mut out, mut d_gate, mut d_up) =
        (inputs.empty(&shape)?, inputs.empty(&shape)?, inputs.empty(&shape)?);
    let kernels = inputs.device.kernels();
    kernels.gated(activation, &gate, &up, &mut out);
    kernels.gated_backward(activation, &gate, &up, &d_out, &mut d_gate, &mut d_up);
    Ok(vec![out, d_gate, d_up])
}

/// Embeddings and the gradient of their table, with and without an id that gets none.
pub(super) fn embedding(inputs: &Inputs<'_>, width: usize) -> Result<Vec<Tensor>> {
    let (table, ids) = (inputs.dense(1, &[11, width])?, inputs.indices(&[4, 0, 4, 10, 2, 4, 0])?);
    let mut out = inputs.empty(&[7, width])?;
    let kernels = inputs.device.kernels();
    kernels.embedding(&ids, &table, 1.5, &mut out);
    let d_out = inputs.tensor(2, &[7, width])?;
    let (mut all, mut some) = (inputs.floats(3, &[11, width])?, inputs.floats(4, &[11, width])?);
    kernels.embedding_backward(&ids, &d_out, 1.5, None, &mut all);
    kernels.embedding_backward(&ids, &d_out, 1.5, Some(4), &mut some);
    Ok(vec![out, all, some])
}

/// Sums, copies and choices of rows.
pub(super) fn moved(inputs: &Inputs<'_>, width: usize) -> Result<Vec<Tensor>> {
    let shape = [6, width];
    let kernels = inputs.device.kernels();
    let (x, other) = (inputs.tensor(1, &shape)?, inputs.tensor(2, &shape)?);
    let mut sum = inputs.tensor(3, &shape)?;
    kernels.add_assign(&mut sum, &x);
    let mut wide = inputs.floats(4, &shape)?;
    kernels.convert(&other, &mut wide);
    let mut narrow = inputs.empty(&shape)?;
    kernels.convert(&inputs.floats(5, &shape)?, &mut narrow);
    let mut scaled = inputs.floats(6, &shape)?;
    kernels.scale(&mut scaled, -0.7);
    let mut added = inputs.tensor(9, &shape)?;
    kernels.add_scaled(&x, -0.6, &mut added);
    let mut times = inputs.empty(&shape)?;
    kernels.scaled(&x, 1.7, &mut times);
    let mut capped = inputs.floats(10, &shape)?;
    kernels.softcap(&mut capped, 0.4);
    let mut columns = inputs.floats(7, &[width])?;
    kernels.sum_rows(&x, &mut columns);
    let mut gathered = inputs.empty(&[4, width])?;
    kernels.gather_rows(&x, &inputs.indices(&[5, 0, 0, 3])?, &mut gathered);
    let mut scattered = inputs.tensor(8, &shape)?;
    kernels.scatter_rows(&gathered, &inputs.indices(&[2, 5, 1, 0])?, &mut scattered);
    Ok(vec![sum, wide, narrow, scaled, added, times, capped, columns, gathered, scattered])
}

/// Columns of heads copied, from one head to all, and summed over heads.
pub(super) fn heads(inputs: &Inputs<'_>, width: usize) -> Result<Vec<Tensor>> {
    let kernels = inputs.device.kernels();
    let copy = |source: &Tensor, target: &mut Tensor, firsts| {
        let columns = HeadCopy::between(source, target, firsts, width);
        kernels.copy_heads(source, target, &columns);
    };
    let (x, one) = (inputs.tensor(1, &[4, 3, width + 8])?, inputs.tensor(2, &[4, 1, width])?);
    let (mut copied, mut odd) =
        (inputs.tensor(3, &[4, 3, width + 16])?, inputs.tensor(4, &[4, 3, width + 8])?);
    copy(&x, &mut copied, [8, 16]);
    copy(&x, &mut odd, [3, 0]);
    let mut repeated = inputs.tensor(5, &[4, 3, width + 8])?;
    copy(&one, &mut repeated, [0, 8]);
    let mut sum = inputs.empty(&[4, 1, width])?;
    kernels.sum_heads(&x, 8, &mut sum);
    // Two heads with four rows each, of which two are meant.
    let matrix = inputs.tensor(6, &[8, width])?;
    let (wide, narrow) = (inputs.dense(7, &[5, 2, width])?, inputs.dense(8, &[5, 2, 2])?);
    let (mut by_rows, mut by_columns) = (inputs.dense(9, &[5, 2, 2])?, inputs.dense(10, &[5, 2, width])?);
    let rows = HeadRows { matrix: &matrix, rows: 4, part: [1, 2], by_columns: false };
    kernels.head_products(&wide, &rows, &mut by_rows, true)?;
    let columns = HeadRows { by_columns: true, ..rows };
    kernels.head_products(&narrow, &columns, &mut by_columns, false)?;
    Ok(vec![copied, odd, repeated, sum, by_rows, by_columns])
}

/// The sum of many rows.
#[cfg(test)]
pub(super) fn sum_of_many(inputs: &Inputs<'_>) -> Result<Vec<Tensor>> {
    let mut sums = inputs.floats(1, &[140])?;
    inputs.device.kernels().sum_rows(&inputs.tensor(2, &[150, 140])?, &mut sums);
    Ok(vec![sums])
}

/// Uniform numbers, and dropout stored and added. Zeros show where the masks differ: nothing else is near to them.
pub(super) fn dropped(inputs: &Inputs<'_>, width: usize) -> Result<Vec<Tensor>> {
    let kernels = inputs.device.kernels();
    let shape = [5, width];
    let x = inputs.dense(1, &shape)?;
    let (mut out, mut added) = (inputs.dense(3, &shape)?, inputs.dense(2, &shape)?);
    kernels.dropout(&x, &DropoutMask::new(0.3, KEY), &mut out, false);
    // The same mask by a key of an earlier step and the number of steps since, which devices read when they run.
    let since = Tensor::from_slice(inputs.device, Category::Workspace, &[1], &[3_u32])?;
    let earlier = RandomKey { step: KEY.step - 3, ..KEY };
    let mask = DropoutMask { steps_before: Some(&since), ..DropoutMask::new(0.3, earlier) };
    let known = DropoutMask::new(0.3, KEY);
    kernels.dropout(&x, if inputs.device.is_host() { &known } else { &mask }, &mut added, true);
    let mut uniform = inputs.place(DType::F32, &shape, 0, &vec![f32::NAN; 5 * width])?;
    kernels.uniform(KEY, 0.25, &mut uniform);
    Ok(vec![out, added, uniform])
}
