//! The gated delta rule.

use super::{check, single};
use crate::device::{DeltaGradients, DeltaInputs, Documents};
use crate::error::{Error, Result, expect_dtype, expect_shape};
use crate::memory::Category;
use crate::{DType, Device, Tape, Tensor, Var, Weight};

/// What the tokens of a document so far have left: f32 \[H, D, E\].
#[derive(Debug)]
pub struct DeltaState(Tensor);

impl DeltaState {
    /// The state before a document: zeros for \[H, D, E\] = value heads, key width, value width.
    ///
    /// # Errors
    /// Out of memory.
    pub fn new(device: &Device, shape: [usize; 3]) -> Result<Self> {
        Ok(Self(Tensor::zeros(device, Category::Cache, DType::F32, &shape)?))
    }

    /// Goes back to before the document, in the same memory.
    pub fn reset(&mut self) {
        self.0.fill_zero();
    }

    /// Becomes what another state of its sizes is, in the same memory.
    ///
    /// # Errors
    /// [`Error::Shape`] where the other's sizes differ.
    pub fn copy_from(&mut self, other: &Self) -> Result<()> {
        expect_shape("gated_delta", "state", other.0.shape(), self.0.shape())?;
        self.0.device().clone().kernels().convert(&other.0, &mut self.0);
        Ok(())
    }
}

/// What the gated delta rule computes from, all of one type: T tokens, G key heads, H value heads (a multiple of G), D key
/// width, E value width.
#[derive(Clone, Copy)]
pub struct DeltaInputVars<'a> {
    /// \[T, G, D\].
    pub q: &'a Var,
    /// \[T, G, D\].
    pub k: &'a Var,
    /// \[T, H, E\].
    pub v: &'a Var,
    /// \[T, H\].
    pub beta_logits: &'a Var,
    /// \[T, H\].
    pub a_logits: &'a Var,
}

/// Gated delta rule (Yang, Kautz and Hatamizadeh, arXiv 2412.06464): for every value head a state S \[D, E\] that begins
/// at zero with each document, or where `state` says, and o_t = S_t^T q_t \[T, H, E\] with
/// S_t = e^g S_(t-1) + k (b (v - (e^g S_(t-1))^T k))^T.
///
/// Here q and k are divided by sqrt(sum of squares + 1e-6), q by sqrt(D) too, each shared by H / G consecutive value heads;
/// b = sigmoid(`beta_logits`), g = -e^`a_log` softplus(`a_logits` + `dt_bias`), `a_log` and `dt_bias` \[H\]; all in f32.
///
/// Keeps its inputs alone; both passes take f32 workspace of some times their size, on GPUs also for a state of every 64
/// tokens, in the backward pass two. Flops: 7 T H D E forward and 26 T H D E backward on CPUs, 10 and 25 on GPUs. Padding gives zeros and gets none. A state goes with a tape that
/// does not record and one document at the first token; it then becomes that behind the document's last token.
///
/// # Errors
/// [`Error::Shape`] or [`Error::DType`] when inputs disagree; [`Error::Other`] for documents of other rows, or that do not
/// go with a state; [`Error::Unsupported`] for heads that cannot be shared, or wider than the device's kernels hold; out
/// of memory.
pub fn gated_delta(
    tape: &Tape,
    inputs: DeltaInputVars<'_>,
    a_log: &Weight,
    dt_bias: &Weight,
    documents: &Documents,
    state: Option<&mut DeltaState>,
) -> Result<Var> {
    let DeltaInputVars { q, k, v, beta_logits, a_logits } = inputs;
    let vars = [q, k, v, beta_logits, a_logits];
    let tensors = vars.map(|var| var.tensor().clone());
    check_shapes(&tensors)?;
    let [tokens, heads, width] = [0, 1, 2].map(|index| tensors[2].shape()[index]);
    let weights = [single(a_log)?, single(dt_bias)?];
    for (name, weight) in ["a_log", "dt_bias"].into_iter().zip(&weights) {
        expect_shape("gated_delta", name, weight.shape(), &[heads])?;
    }
    let device = tensors[0].device().clone();
    check("gated_delta", tape, documents, (tokens, &device), state.is_some())?;
    let state = match state {
        Some(state) => {
            let expected = [heads, tensors[0].columns(), width];
            expect_shape("gated_delta", "state", state.0.shape(), &expected)?;
            Some(&mut state.0)
        }
        None => None,
    };
    let shape = [tokens, heads, width];
    let mut out = Tensor::scratch(&device, Category::Activations, tensors[0].dtype(), &shape)?;
    device.kernels().delta().gated_delta(&described(&tensors, &weights, documents), state, &mut out)?;

    let slots = vars.map(Var::slot);
    let parameters = [a_log, dt_bias].map(|weight| weight.parameter().cloned());
    let wanted = slots.iter().any(Option::is_some) || parameters.iter().any(Option::is_some);
    let documents = documents.clone();
    Ok(tape.push(out, wanted, |slot| {
        Box::new(move |gradients| {
            let Some(d_out) = gradients.take(slot) else { return Ok(()) };
            let d_out = d_out.reshape(&shape)?;
            let [q, k, v, beta_logits, a_logits] = &tensors;
            // Together where their inputs are, so that columns need not be joined.
            let [d_q, d_k, d_v] = Tensor::scratch_alike(Category::Activations, [q, k, v])?;
            let [d_beta, d_a] = Tensor::scratch_alike(Category::Activations, [beta_logits, a_logits])?;
            let mut fresh = [d_q, d_k, d_v, d_beta, d_a];
            let mut run = |[d_a_log, d_dt_bias]: [Option<&mut Tensor>; 2]| {
                let [q, k, v, beta_logits, a_logits] = &mut fresh;
                let (a_log, dt_bias) = (d_a_log, d_dt_bias);
                let fresh = DeltaGradients { q, k, v, beta_logits, a_logits, a_log, dt_bias };
                let inputs = described(&tensors, &weights, &documents);
                device.kernels().delta().gated_delta_backward(&inputs, &d_out, fresh)
            };
            match &parameters {
                [None, None] => run([None, None])?,
                [Some(one), None] => one.accumulate(|sum| run([Some(sum), None]))?,
                [None, Some(other)] => other.accumulate(|sum| run([None, Some(sum)]))?,
                [Some(one), Some(other)] => {
                    one.accumulate(|first| other.accumulate(|second| run([Some(first), Some(second)])))?;
                }
            }
            for (slot, gradient) in slots.into_iter().zip(fresh) {
                if let Some(slot) = slot {
                    gradients.add(slot, gradient)?;
                }
            }
            Ok(())
        })
    }))
}

fn described<'a>(
    [q, k, v, beta_logits, a_logits]: &'a [Tensor; 5],
    [a_log, dt_bias]: &'a [Tensor; 2],
    documents: &'a Documents,
) -> DeltaInputs<'a> {
    DeltaInputs { q, k, v, beta_logits, a_logits, a_log, dt_bias, documents }
}

fn check_shapes(tensors: &[Tensor; 5]) -> Result<()> {
    let [q, k, v, beta_logits, a_logits] = tensors;
    let size = |tensor: &Tensor, index: usize| tensor.shape().get(index).copied().unwrap_or(1);
    let (tokens, key_heads, heads) = (size(q, 0), size(q, 1), size(v, 1));
    let expected = [
        ("q", q, vec![tokens, key_heads, size(q, 2)]),
        ("k", k, q.shape().to_vec()),
        ("v", v, vec![tokens, heads, size(v, 2)]),
        ("beta_logits", beta_logits, vec![tokens, heads]),
        ("a_logits", a_logits, vec![tokens, heads]),
    ];
    for (name, tensor, shape) in expected {
        expect_shape("gated_delta", name, tensor.shape(), &shape)?;
        expect_dtype("gated_delta", name, tensor.dtype(), q.dtype())?;
    }
    if key_heads == 0 || heads % key_heads != 0 || q.columns() == 0 || v.columns() == 0 {
        let reason = format!(
            "{heads} value heads of {} are not shared by {key_heads} key heads of {}",
            v.columns(),
            q.columns()
        );
        return Err(Error::Unsupported { operation: "gated_delta", device: q.device().name(), reason });
    }
    Ok(())
}
