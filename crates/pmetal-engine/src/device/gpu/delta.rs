//! Linear-attention layers: `kernels/convolution.cpp`, `kernels/delta.cpp` and `kernels/delta_sweeps.cpp`.

use super::launch::{Kernel, lanes};
use super::runtime::Argument;
use super::{Gpu, SUM_PARTS, norm_rows};
use crate::device::{DeltaGradients, DeltaInputs, DeltaKernels, DeltaSizes, Documents};
use crate::error::{Error, Result};
use crate::memory::Category;
use crate::{DType, Tensor};

/// The widest head that threads hold.
const WIDEST: usize = 256;

/// Columns of a state that a group takes, and its threads.
const COLUMNS: usize = 32;
const THREADS: usize = 128;

/// Tokens of a channel that a thread convolves, and backward where the weight's gradient is summed over them.
const SPAN: usize = 16;
const SUMMED_SPAN: usize = 64;

/// What all passes read: normalised keys and queries, decays and rates.
struct Prepared {
    normed: Tensor,
    gates: Tensor,
}

fn workspace(like: &Tensor, shape: &[usize]) -> Result<Tensor> {
    Tensor::scratch(like.device(), Category::Workspace, DType::F32, shape)
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

    /// A pass over tokens: `rows` of the state are held by the threads of each of its columns.
    fn sweep(
        &self,
        inputs: &DeltaInputs<'_>,
        prepared: &Prepared,
        kernel: &'static str,
        rows: usize,
    ) -> Kernel {
        Kernel::new("delta_sweeps", kernel)
            .element(inputs.v.dtype())
            .number("STATE_ROWS", rows)
            .arguments(&[(&prepared.normed).into(), (&prepared.gates).into()])
            .arguments(&[inputs.documents.marks().into()])
    }

    /// Answers, or where there is room for them what was not recalled of values.
    fn answer(
        &self,
        inputs: &DeltaInputs<'_>,
        prepared: &Prepared,
        state: Option<&mut Tensor>,
        out: Option<&mut Tensor>,
        errors: Option<&Tensor>,
    ) {
        let DeltaSizes { tokens, key_heads, value_heads, key_width, value_width } = inputs.sizes();
        let (keeps_errors, has_state) = (errors.is_some().into(), state.is_some());
        let parts = if has_state { 1 } else { parts_of(tokens) };
        let out_pitch = out.as_deref().map_or(0, Tensor::pitch);
        let address = |tensor: Option<&mut Tensor>| Argument::Address(tensor.map_or(0, Tensor::address_mut));
        self.sweep(inputs, prepared, "delta_answer", key_width)
            .arguments(&[inputs.v.into(), address(out), errors.into(), address(state)])
            .sizes(&[tokens, key_heads, value_heads, value_width, inputs.v.pitch(), out_pitch, parts])
            .sizes(&[keeps_errors, has_state.into()])
            .launch(self.runtime.as_ref(), [value_width.div_ceil(COLUMNS), value_heads, parts], THREADS);
    }
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
        Kernel::new("convolution", "short_convolution")
            .element(x.dtype())
            .number("TAPS", weight.columns())
            .arguments(&[x.into(), weight.into(), documents.marks().into(), state.into(), (&mut *out).into()])
            .sizes(&[tokens, channels, x.pitch(), out.pitch(), SPAN, state.is_some().into()])
            .launch(self.runtime.as_ref(), [channels.div_ceil(128), tokens.div_ceil(SPAN), 1], 128);
    }

    fn move_convolution_state(&self, x: &Tensor, documents: &Documents, state: &mut Tensor) {
        let (held, channels) = (state.shape()[0], x.columns());
        if held == 0 {
            return;
        }
        Kernel::new("convolution", "move_convolution_state")
            .element(x.dtype())
            .number("TAPS", held + 1)
            .arguments(&[x.into(), documents.marks().into(), state.into()])
            .sizes(&[x.rows(), channels, x.pitch()])
            .launch(self.runtime.as_ref(), [channels.div_ceil(128), 1, 1], 128);
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
        Kernel::new("convolution", "short_convolution_back")
            .element(x.dtype())
            .number("TAPS", taps)
            .arguments(&[x.into(), weight.into(), documents.marks().into(), d_out.into()])
            .arguments(&[(&mut *d_x).into(), sums.as_ref().into()])
            .sizes(&[tokens, channels, x.pitch(), d_out.pitch(), d_x.pitch(), span, sums.is_some().into()])
            .launch(self.runtime.as_ref(), [channels.div_ceil(128), spans, 1], 128);
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
        self.check_heads(inputs.sizes())?;
        let prepared = self.prepare(inputs)?;
        self.answer(inputs, &prepared, state, Some(out), None);
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
        let [errors, recalled] = [(); 2].map(|()| workspace(d_out, &[tokens, value_heads, value_width]));
        let [answers, past, future] = [(); 3].map(|()| workspace(d_out, &[tokens, value_heads, key_width]));
        let (errors, recalled, answers, past, future) = (errors?, recalled?, answers?, past?, future?);
        let slopes = workspace(d_out, &[tokens, value_heads])?;
        let (runtime, parts, heads) =
            (self.runtime.as_ref(), parts_of(tokens), [tokens, key_heads, value_heads]);

        self.answer(inputs, &prepared, None, None, Some(&errors));
        self.sweep(inputs, &prepared, "delta_answer_back", key_width)
            .arguments(&[d_out.into(), (&recalled).into()])
            .sizes(&heads)
            .sizes(&[value_width, d_out.pitch(), parts])
            .launch(runtime, [value_width.div_ceil(COLUMNS), value_heads, parts], THREADS);
        let read = [Argument::from(d_out), (&errors).into(), (&recalled).into()];
        let grid = [key_width.div_ceil(COLUMNS), value_heads, parts];
        self.sweep(inputs, &prepared, "delta_rows", value_width)
            .arguments(&read)
            .arguments(&[(&answers).into(), (&past).into()])
            .sizes(&heads)
            .sizes(&[key_width, d_out.pitch(), parts])
            .launch(runtime, grid, THREADS);
        self.sweep(inputs, &prepared, "delta_rows_back", value_width)
            .arguments(&read)
            .arguments(&[(&future).into()])
            .sizes(&heads)
            .sizes(&[key_width, d_out.pitch(), parts])
            .launch(runtime, grid, THREADS);

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
        Kernel::new("delta", "gated_norm")
            .element(x.dtype())
            .arguments(&[x.into(), gate.into(), weight.into(), (&mut *out).into()])
            .sizes(&[width, inner, x.pitch(), gate.pitch(), out.pitch()])
            .arguments(&[Argument::F32(epsilon)])
            .launch(self.runtime.as_ref(), [rows, 1, 1], lanes(width));
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
        let scales = workspace(x, &[rows])?;
        let (d_x_pitch, d_gate_pitch) = (d_x.pitch(), d_gate.pitch());
        Kernel::new("delta", "gated_norm_back")
            .element(x.dtype())
            .arguments(&[x.into(), gate.into(), weight.into(), d_out.into()])
            .arguments(&[d_x.into(), d_gate.into(), (&scales).into()])
            .sizes(&[width, inner, x.pitch(), gate.pitch(), d_out.pitch(), d_x_pitch, d_gate_pitch])
            .arguments(&[Argument::F32(epsilon)])
            .launch(self.runtime.as_ref(), [rows, 1, 1], lanes(width));
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
