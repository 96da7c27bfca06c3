//! Linear-attention layers: `kernels/convolution.cpp`, `kernels/delta.cpp`, `kernels/delta_chunks.cpp` and
//! `kernels/delta_steps.cpp`.

use super::launch::{Kernel, is_aligned};
use super::runtime::Argument;
use super::{Gpu, SUM_PARTS, norm_rows};
use crate::device::{DeltaGradients, DeltaInputs, DeltaKernels, DeltaSizes, Documents};
use crate::error::{Error, Result};
use crate::memory::Category;
use crate::{DType, Tensor};

/// The widest head that a group holds.
const WIDEST: usize = 256;

/// Threads of the groups that hold parts of states, and the columns of a state that one of those takes that go token by token.
const THREADS: usize = 128;
const COLUMNS: usize = 32;

/// Tokens of a chunk, and so few of them that one after another is faster.
const CHUNK: usize = 64;
const FEW_TOKENS: usize = 16;

/// Tokens of a channel that a thread convolves, and backward where the weight's gradient is summed over them; with the three behind
/// them, which a gradient reads of four taps, a multiple of those that are asked for at one time.
const SPAN: usize = 29;
const SUMMED_SPAN: usize = 61;

/// What all passes read: normalised keys and queries, decays and rates.
struct Prepared {
    normed: Tensor,
    gates: Tensor,
}

fn workspace(like: &Tensor, shape: &[usize]) -> Result<Tensor> {
    Tensor::scratch(like.device(), Category::Workspace, DType::F32, shape)
}

/// How products of activations of a type are rounded by matrix units: not at all, to 11 bits, or to twice as many. Sums over
/// tokens gather what is rounded, so f16, which has 11 bits itself, would show it.
fn rounding_of(dtype: DType) -> usize {
    match dtype {
        DType::Bf16 => 1,
        DType::F16 => 2,
        _ => 0,
    }
}

/// What a pass forward over chunks leaves.
struct Learned {
    spans: Tensor,
    coupling: Tensor,
    errors: Tensor,
    states: Tensor,
}

/// The grid of kernels for chunks and heads.
fn chunks_of(sizes: DeltaSizes) -> [usize; 3] {
    [sizes.tokens.div_ceil(CHUNK), sizes.value_heads, 1]
}

/// Parts of the tokens whose documents groups of their own take.
fn parts_of(tokens: usize) -> usize {
    tokens.div_ceil(64).clamp(1, 32)
}

impl Gpu {
    fn check_heads(&self, sizes: DeltaSizes) -> Result<()> {
        let widest = sizes.key_width.max(sizes.value_width);
        if widest <= WIDEST {
            return Ok(());
        }
        let reason = format!("heads of {widest} are wider than {WIDEST}");
        Err(Error::Unsupported { operation: "gated_delta", device: self.runtime.name(), reason })
    }

    fn prepare(&self, inputs: &DeltaInputs<'_>) -> Result<Prepared> {
        let sizes = inputs.sizes();
        let DeltaSizes { tokens, key_heads, value_heads, key_width, .. } = sizes;
        let normed = workspace(inputs.q, &[2, tokens, key_heads, key_width])?;
        let gates = workspace(inputs.q, &[tokens, value_heads, 2])?;
        let all = [inputs.q, inputs.k, inputs.beta_logits, inputs.a_logits];
        Kernel::new("delta", "delta_prepare")
            .element(inputs.q.dtype())
            .arguments(&all.map(Argument::from))
            .arguments(&[inputs.a_log.into(), inputs.dt_bias.into(), inputs.documents.marks().into()])
            .arguments(&[(&normed).into(), (&gates).into()])
            .sizes(&[tokens, key_heads, value_heads, key_width])
            .sizes(&all.map(Tensor::pitch))
            .launch(self.runtime.as_ref(), [tokens, 1, 1], 256);
        Ok(Prepared { normed, gates })
    }

    /// Columns of a state that a group takes from chunk to chunk: more of them read keys less often, where there is room.
    fn slice(&self, sizes: DeltaSizes) -> usize {
        if self.facts.capability >= (8, 0) && sizes.key_width <= 128 { 32 } else { 16 }
    }

    /// A kernel over chunks that reads rows of these tensors by tiles.
    fn chunked(
        &self,
        inputs: &DeltaInputs<'_>,
        prepared: &Prepared,
        spans: &Tensor,
        kernel: &'static str,
        tiled: &[&Tensor],
    ) -> Kernel {
        let (sizes, dtype) = (inputs.sizes(), inputs.v.dtype());
        Kernel::new("delta_chunks", kernel)
            .element(dtype)
            .number("ROUNDED", rounding_of(dtype))
            .aligned(sizes.key_width.is_multiple_of(8) && is_aligned(sizes.value_width, tiled))
            .number("KEY_WIDTH", sizes.key_width)
            .number("SLICE", self.slice(sizes))
            .arguments(&[(&prepared.normed).into(), (&prepared.gates).into()])
            .arguments(&[inputs.documents.marks().into(), spans.into()])
    }

    /// What tokens of chunks have to do with each other, and what is learned from them.
    fn learn(
        &self,
        inputs: &DeltaInputs<'_>,
        prepared: &Prepared,
        state: Option<&mut Tensor>,
    ) -> Result<Learned> {
        let sizes = inputs.sizes();
        let DeltaSizes { tokens, key_heads, value_heads, key_width, value_width } = sizes;
        let spans = workspace(inputs.v, &[tokens, value_heads, 2])?;
        let coupling = workspace(inputs.v, &[tokens, value_heads, CHUNK])?;
        let errors = workspace(inputs.v, &[tokens, value_heads, value_width])?;
        let states = workspace(inputs.v, &[tokens.div_ceil(CHUNK), value_heads, key_width, value_width])?;
        let (runtime, has_state) = (self.runtime.as_ref(), state.is_some());
        let parts = if has_state { 1 } else { parts_of(tokens) };
        self.chunked(inputs, prepared, &spans, "delta_couple", &[])
            .arguments(&[(&coupling).into()])
            .sizes(&[tokens, key_heads, value_heads])
            .launch(runtime, chunks_of(sizes), THREADS);
        self.chunked(inputs, prepared, &spans, "delta_scan", &[])
            .arguments(&[(&coupling).into(), inputs.v.into(), (&errors).into(), (&states).into()])
            .arguments(&[Argument::Address(state.map_or(0, Tensor::address_mut))])
            .sizes(&[tokens, key_heads, value_heads, value_width, inputs.v.pitch(), parts, has_state.into()])
            .launch(runtime, [value_width.div_ceil(self.slice(sizes)), value_heads, parts], THREADS);
        Ok(Learned { spans, coupling, errors, states })
    }

    /// The rule token by token.
    fn answer_tokens(
        &self,
        inputs: &DeltaInputs<'_>,
        prepared: &Prepared,
        state: Option<&mut Tensor>,
        out: &mut Tensor,
    ) {
        let DeltaSizes { tokens, key_heads, value_heads, key_width, value_width } = inputs.sizes();
        let has_state = state.is_some();
        let (out_pitch, state) = (out.pitch(), Argument::Address(state.map_or(0, Tensor::address_mut)));
        Kernel::new("delta_steps", "delta_answer")
            .element(inputs.v.dtype())
            .number("STATE_ROWS", key_width)
            .arguments(&[(&prepared.normed).into(), (&prepared.gates).into()])
            .arguments(&[inputs.documents.marks().into(), inputs.v.into(), out.into(), state])
            .sizes(&[tokens, key_heads, value_heads, value_width, inputs.v.pitch(), out_pitch])
            .sizes(&[has_state.into()])
            .launch(self.runtime.as_ref(), [value_width.div_ceil(COLUMNS), value_heads, 1], THREADS);
    }
}

/// A kernel over channels of rows of one type, and its groups along them.
fn convolution(
    kernel: &'static str,
    taps: usize,
    channels: usize,
    rows: &[Option<&Tensor>],
) -> (Kernel, usize) {
    let mut rows = rows.iter().flatten();
    let dtype = rows.clone().next().map_or(DType::F32, |first| first.dtype());
    let in_pairs =
        |x: &&Tensor| x.pitch().is_multiple_of(2) && x.address().is_multiple_of(2 * dtype.bytes() as u64);
    let paired = channels.is_multiple_of(2) && rows.all(in_pairs);
    let kernel =
        Kernel::new("convolution", kernel).element(dtype).number("TAPS", taps).define("IN_PAIRS", paired);
    (kernel, channels.div_ceil(if paired { 256 } else { 128 }))
}

impl DeltaKernels for Gpu {
    fn short_convolution(
        &self,
        x: &Tensor,
        weight: &Tensor,
        documents: &Documents,
        state: Option<&Tensor>,
        out: &mut Tensor,
    ) {
        let (tokens, channels) = (x.rows(), x.columns());
        let (kernel, across) =
            convolution("short_convolution", weight.columns(), channels, &[Some(x), state, Some(&*out)]);
        kernel
            .arguments(&[x.into(), weight.into(), documents.marks().into(), state.into(), (&mut *out).into()])
            .sizes(&[tokens, channels, x.pitch(), out.pitch(), SPAN, state.is_some().into()])
            .launch(self.runtime.as_ref(), [across, tokens.div_ceil(SPAN), 1], 128);
    }

    fn move_convolution_state(&self, x: &Tensor, documents: &Documents, state: &mut Tensor) {
        let (held, channels) = (state.shape()[0], x.columns());
        if held == 0 {
            return;
        }
        let (kernel, across) =
            convolution("move_convolution_state", held + 1, channels, &[Some(x), Some(&*state)]);
        kernel
            .arguments(&[x.into(), documents.marks().into(), state.into()])
            .sizes(&[x.rows(), channels, x.pitch()])
            .launch(self.runtime.as_ref(), [across, 1, 1], 128);
    }

    fn short_convolution_backward(
        &self,
        x: &Tensor,
        weight: &Tensor,
        documents: &Documents,
        d_out: &Tensor,
        d_x: &mut Tensor,
        d_weight: Option<&mut Tensor>,
    ) -> Result<()> {
        let (tokens, channels, taps) = (x.rows(), x.columns(), weight.columns());
        let span = if d_weight.is_some() { SUMMED_SPAN } else { SPAN };
        let spans = tokens.div_ceil(span);
        let sums = d_weight.is_some().then(|| workspace(x, &[spans, channels * taps])).transpose()?;
        let (kernel, across) =
            convolution("short_convolution_back", taps, channels, &[Some(x), Some(d_out), Some(&*d_x)]);
        kernel
            .arguments(&[x.into(), weight.into(), documents.marks().into(), d_out.into()])
            .arguments(&[(&mut *d_x).into(), sums.as_ref().into()])
            .sizes(&[tokens, channels, x.pitch(), d_out.pitch(), d_x.pitch(), span, sums.is_some().into()])
            .launch(self.runtime.as_ref(), [across, spans, 1], 128);
        if let (Some(sums), Some(d_weight)) = (sums, d_weight) {
            self.add_column_sums(&sums, spans, 1.0, d_weight);
        }
        Ok(())
    }

    fn gated_delta(
        &self,
        inputs: &DeltaInputs<'_>,
        state: Option<&mut Tensor>,
        out: &mut Tensor,
    ) -> Result<()> {
        let sizes = inputs.sizes();
        self.check_heads(sizes)?;
        let prepared = self.prepare(inputs)?;
        if sizes.tokens <= FEW_TOKENS {
            self.answer_tokens(inputs, &prepared, state, out);
            return Ok(());
        }
        let has_state = state.is_some();
        let learned = self.learn(inputs, &prepared, state)?;
        let out_pitch = out.pitch();
        self.chunked(inputs, &prepared, &learned.spans, "delta_outputs", &[])
            .arguments(&[(&learned.errors).into(), (&learned.states).into(), out.into()])
            .sizes(&[sizes.tokens, sizes.key_heads, sizes.value_heads, sizes.value_width, out_pitch])
            .sizes(&[has_state.into()])
            .launch(self.runtime.as_ref(), chunks_of(sizes), THREADS);
        Ok(())
    }

    fn gated_delta_backward(
        &self,
        inputs: &DeltaInputs<'_>,
        d_out: &Tensor,
        gradients: DeltaGradients<'_>,
    ) -> Result<()> {
        let sizes = inputs.sizes();
        let DeltaSizes { tokens, key_heads, value_heads, key_width, value_width } = sizes;
        self.check_heads(sizes)?;
        let prepared = self.prepare(inputs)?;
        let Learned { spans, coupling, errors, states } = self.learn(inputs, &prepared, None)?;
        let slopes = workspace(d_out, states.shape())?;
        let recalled = workspace(d_out, &[tokens, value_heads, value_width])?;
        let (runtime, parts, heads) =
            (self.runtime.as_ref(), parts_of(tokens), [tokens, key_heads, value_heads]);
        self.chunked(inputs, &prepared, &spans, "delta_outputs_back", &[d_out])
            .arguments(&[d_out.into(), (&recalled).into()])
            .sizes(&heads)
            .sizes(&[value_width, d_out.pitch()])
            .launch(runtime, chunks_of(sizes), THREADS);
        self.chunked(inputs, &prepared, &spans, "delta_scan_back", &[d_out])
            .arguments(&[(&coupling).into(), d_out.into(), (&recalled).into(), (&slopes).into()])
            .sizes(&heads)
            .sizes(&[value_width, d_out.pitch(), parts])
            .launch(runtime, [value_width.div_ceil(self.slice(sizes)), value_heads, parts], THREADS);
        drop(coupling);
        let [answers, past, future] = [(); 3].map(|()| workspace(d_out, &[tokens, value_heads, key_width]));
        let (answers, past, future) = (answers?, past?, future?);
        self.chunked(inputs, &prepared, &spans, "delta_rows", &[d_out])
            .arguments(&[d_out.into(), (&errors).into(), (&recalled).into()])
            .arguments(&[(&states).into(), (&slopes).into()])
            .arguments(&[(&answers).into(), (&past).into(), (&future).into()])
            .sizes(&heads)
            .sizes(&[value_width, d_out.pitch()])
            .launch(runtime, chunks_of(sizes), THREADS);
        drop((states, slopes));
        let slopes = workspace(d_out, &[tokens, value_heads])?;

        let DeltaGradients { q, k, v, beta_logits, a_logits, a_log, dt_bias } = gradients;
        let marks = Argument::from(inputs.documents.marks());
        let given = [inputs.q, inputs.k, d_out];
        let pitches = [q.pitch(), k.pitch(), v.pitch(), beta_logits.pitch()];
        Kernel::new("delta", "delta_inputs_back")
            .element(inputs.q.dtype())
            .arguments(&given.map(Argument::from))
            .arguments(&[marks, (&prepared.normed).into(), (&prepared.gates).into()])
            .arguments(&[(&errors).into(), (&recalled).into()])
            .arguments(&[(&answers).into(), (&past).into(), (&future).into()])
            .arguments(&[q.into(), k.into(), v.into(), beta_logits.into(), (&slopes).into()])
            .sizes(&heads)
            .sizes(&[key_width, value_width])
            .sizes(&given.map(Tensor::pitch))
            .sizes(&pitches)
            .launch(runtime, [tokens, 1, 1], 256);
        let (d_pitch, trained) = (a_logits.pitch(), [a_log.is_some(), dt_bias.is_some()]);
        let sums = [a_log, dt_bias].map(|sum| Argument::Address(sum.map_or(0, Tensor::address_mut)));
        let grid = if tokens == 0 { 0 } else { value_heads };
        Kernel::new("delta", "delta_gates_back")
            .element(inputs.q.dtype())
            .arguments(&[
                (&slopes).into(),
                inputs.a_logits.into(),
                inputs.a_log.into(),
                inputs.dt_bias.into(),
            ])
            .arguments(&[marks, a_logits.into()])
            .arguments(&sums)
            .sizes(&[tokens, value_heads, inputs.a_logits.pitch(), d_pitch])
            .sizes(&trained.map(usize::from))
            .launch(runtime, [grid, 1, 1], 256);
        Ok(())
    }

    fn gated_rms_norm(&self, x: &Tensor, gate: &Tensor, weight: &Tensor, epsilon: f32, out: &mut Tensor) {
        let (rows, inner, width) = norm_rows(x);
        let lanes = row_lanes(width);
        Kernel::new("delta", "gated_norm")
            .element(x.dtype())
            .aligned(is_aligned(width, &[x, gate, weight, out]))
            .number("LANES", lanes)
            .number("VECTORS", width.div_ceil(8 * lanes))
            .arguments(&[x.into(), gate.into(), weight.into(), (&mut *out).into()])
            .sizes(&[rows, width, inner, x.pitch(), gate.pitch(), out.pitch()])
            .arguments(&[Argument::F32(epsilon)])
            .launch(self.runtime.as_ref(), [rows.div_ceil(128 / lanes), 1, 1], 128);
    }

    fn gated_rms_norm_backward(
        &self,
        [x, gate, weight]: [&Tensor; 3],
        epsilon: f32,
        d_out: &Tensor,
        [d_x, d_gate]: [&mut Tensor; 2],
        d_weight: Option<&mut Tensor>,
    ) -> Result<()> {
        let (rows, inner, width) = norm_rows(x);
        let lanes = row_lanes(width);
        let scales = workspace(x, &[rows])?;
        let (d_x_pitch, d_gate_pitch) = (d_x.pitch(), d_gate.pitch());
        Kernel::new("delta", "gated_norm_back")
            .element(x.dtype())
            .aligned(is_aligned(width, &[x, gate, weight, d_out, d_x, d_gate]))
            .number("LANES", lanes)
            .number("VECTORS", width.div_ceil(8 * lanes))
            .arguments(&[x.into(), gate.into(), weight.into(), d_out.into()])
            .arguments(&[d_x.into(), d_gate.into(), (&scales).into()])
            .sizes(&[rows, width, inner, x.pitch(), gate.pitch(), d_out.pitch(), d_x_pitch, d_gate_pitch])
            .arguments(&[Argument::F32(epsilon)])
            .launch(self.runtime.as_ref(), [rows.div_ceil(128 / lanes), 1, 1], 128);
        let Some(d_weight) = d_weight else { return Ok(()) };
        let parts = rows.clamp(1, SUM_PARTS);
        let sums = workspace(x, &[parts, width])?;
        Kernel::new("delta", "gated_norm_sums")
            .element(x.dtype())
            .arguments(&[x.into(), gate.into(), d_out.into(), (&scales).into(), (&sums).into()])
            .sizes(&[rows, parts, width, inner, x.pitch(), gate.pitch(), d_out.pitch()])
            .launch(self.runtime.as_ref(), [width.div_ceil(128), parts, 1], 128);
        self.add_column_sums(&sums, parts, 1.0, d_weight);
        Ok(())
    }
}

/// Lanes that hold a row of a gated norm by eight columns.
fn row_lanes(width: usize) -> usize {
    if width <= 128 { 16 } else { 32 }
}
