//! Attention: which kernels compute it.

mod matrix;
#[cfg(test)]
mod tests;
mod wide;

use super::Gpu;
use super::launch::Kernel;
use super::runtime::{Argument, ModuleText, TensorMap};
use crate::device::{AttentionMask, AttentionParameters};
use crate::error::Result;
use crate::memory::Category;
use crate::{DType, Tensor};
use matrix::{Backward, Forward, Shape, Tile};

/// What forward and backward read.
pub(super) struct Inputs<'a> {
    parameters: &'a AttentionParameters,
    /// First key and end of each query, first query and end of each key.
    ranges: &'a [Tensor; 4],
    q: &'a Tensor,
    k: &'a Tensor,
    v: &'a Tensor,
    sinks: Option<&'a Tensor>,
    /// Bits of the keys that queries look at, of those that they see.
    chosen: Option<&'a Tensor>,
    /// The most queries of a document.
    longest: usize,
}

impl<'a> Inputs<'a> {
    pub(super) fn new(
        parameters: &'a AttentionParameters,
        mask: &'a AttentionMask,
        [q, k, v]: [&'a Tensor; 3],
        sinks: Option<&'a Tensor>,
    ) -> Self {
        let ranges = mask.ranges.as_ref().expect("invariant: a mask is made on the device of its tensors");
        let longest = mask.segments().iter().map(|segment| segment.query_length).max().unwrap_or(0);
        let chosen = mask.choice.as_ref().map(|choice| &choice.bits);
        Self { parameters, ranges, q, k, v, sinks, chosen, longest }
    }

    fn tokens(&self) -> [usize; 2] {
        [self.q, self.k].map(|tensor| tensor.shape().first().copied().unwrap_or(1))
    }

    fn scalars(&self) -> [Argument; 2] {
        [Argument::F32(self.parameters.scale), Argument::F32(self.parameters.softcap.unwrap_or(0.0))]
    }

    /// Words of a row of chosen keys.
    fn chosen_words(&self) -> usize {
        self.chosen.map_or(0, Tensor::columns)
    }

    fn head_sizes(&self) -> [usize; 3] {
        let p = self.parameters;
        [p.query_heads / p.key_value_heads, p.key_width, p.value_width]
    }

    fn shape(&self) -> Shape {
        let (p, [tokens, keys]) = (self.parameters, self.tokens());
        Shape {
            tokens,
            keys,
            heads: p.query_heads,
            key_heads: p.key_value_heads,
            widths: [p.key_width, p.value_width],
            longest: self.longest,
            has_choice: self.chosen.is_some(),
        }
    }

    /// A kernel on matrix units for these heads.
    fn kernel(&self, module: &'static ModuleText, name: &'static str) -> Kernel {
        let p = self.parameters;
        Kernel::of(module, name)
            .number("HEAD_WIDTH", p.key_width)
            .number("VALUE_WIDTH", p.value_width)
            .define("HALVES_F16", self.q.dtype() == DType::F16)
            .define("ATTENTION_SOFTCAP", self.has_softcap())
            .define("ATTENTION_CHOICE", self.chosen.is_some())
    }

    fn has_softcap(&self) -> bool {
        self.parameters.softcap.is_some_and(|cap| cap > 0.0)
    }

    /// What kernels that know a choice of keys end with.
    fn choice(&self) -> [Argument; 2] {
        [self.chosen.into(), Argument::U32(self.chosen_words() as u32)]
    }

    /// Sizes that all kernels on matrix units are given.
    fn sizes(&self) -> [usize; 4] {
        let [tokens, keys] = self.tokens();
        [tokens, keys, self.parameters.query_heads, self.parameters.key_value_heads]
    }

    /// Whether kernels on matrix units can read these tensors and the others that come with them.
    fn is_aligned(&self, others: &[&Tensor]) -> bool {
        let is_aligned = |tensor: &&Tensor| {
            tensor.dtype() == self.q.dtype()
                && tensor.pitch().is_multiple_of(8)
                && tensor.address().is_multiple_of(16)
        };
        matches!(self.q.dtype(), DType::Bf16 | DType::F16)
            && self.parameters.scale > 0.0
            && [self.q, self.k, self.v].iter().chain(others).all(is_aligned)
    }
}

/// An address and a pitch.
fn rows(tensor: &Tensor) -> [Argument; 2] {
    [tensor.into(), Argument::U32(tensor.pitch() as u32)]
}

fn rows_mut(tensor: &mut Tensor) -> [Argument; 2] {
    let pitch = tensor.pitch() as u32;
    [tensor.into(), Argument::U32(pitch)]
}

/// Boxes of a tensor \[rows, heads, width\].
fn boxes(tensor: &Tensor, box_rows: usize) -> Argument {
    let shape = tensor.shape();
    let [rows, heads, width] = [shape[0], shape[1], shape[2]];
    let (address, dtype, pitch) = (tensor.address(), tensor.dtype(), tensor.pitch());
    Argument::TensorMap(TensorMap { address, dtype, width, heads, head_pitch: width, rows, pitch, box_rows })
}

/// What the backward kernels on matrix units keep between them, f32 but for the bounds.
struct Workspace {
    logs: Tensor,
    deltas: Tensor,
    /// i32, for the copy engine.
    bounds: Option<Tensor>,
    /// Sums of the queries' gradients, by atomics.
    sums: Option<Tensor>,
}

impl Workspace {
    fn new(like: &Tensor, shape: &Shape, form: Backward, deterministic: bool) -> Result<Self> {
        let (heads, tokens) = (shape.heads, shape.padded_tokens());
        let scratch =
            |dtype, shape: &[usize]| Tensor::scratch(like.device(), Category::Workspace, dtype, shape);
        let is_hopper = matches!(form, Backward::Hopper { .. });
        let bounds = is_hopper.then(|| scratch(DType::I32, &[2, tokens])).transpose()?;
        let columns = shape.sum_columns(form);
        let sums = (!deterministic).then(|| scratch(DType::F32, &[heads, tokens, columns])).transpose()?;
        let [logs, deltas] = [scratch(DType::F32, &[heads, tokens])?, scratch(DType::F32, &[heads, tokens])?];
        Ok(Self { logs, deltas, bounds, sums })
    }
}

impl Gpu {
    pub(super) fn attend(&self, inputs: &Inputs<'_>, out: &mut Tensor, log_sum_exp: &mut Tensor) {
        let shape = inputs.shape();
        let has_form = shape.has_kernels(&self.facts) && inputs.is_aligned(&[out]);
        let form = if has_form { shape.forward(&self.facts) } else { None };
        let result = match form {
            Some(Forward::Decode) => self.attend_decode(inputs, &shape, out, log_sum_exp),
            Some(Forward::Hopper { consumers }) => {
                self.attend_hopper(inputs, &shape, consumers, out, log_sum_exp)
            }
            Some(Forward::Plain) => {
                self.attend_matrix(inputs, &shape, out, log_sum_exp);
                Ok(())
            }
            None if inputs.is_wide() => self.attend_wide(inputs, out, log_sum_exp),
            None => {
                self.attend_portable(inputs, out, log_sum_exp);
                Ok(())
            }
        };
        if let Err(error) = result {
            self.runtime.fail("attention", &error.to_string());
        }
    }

    fn attend_matrix(&self, inputs: &Inputs<'_>, shape: &Shape, out: &mut Tensor, log_sum_exp: &mut Tensor) {
        let [key_begin, key_end, ..] = inputs.ranges;
        inputs
            .kernel(&matrix::FORWARD, "attention_forward")
            .arguments(&[rows(inputs.q), rows(inputs.k), rows(inputs.v), rows_mut(out)].concat())
            .arguments(&[log_sum_exp.into(), key_begin.into(), key_end.into(), inputs.sinks.into()])
            .sizes(&inputs.sizes())
            .arguments(&inputs.scalars())
            .arguments(&inputs.choice())
            .shared(shape.forward_shared())
            .launch(
                self.runtime.as_ref(),
                [shape.heads, shape.tokens.div_ceil(128), 1],
                shape.forward_threads(),
            );
    }

    fn attend_hopper(
        &self,
        inputs: &Inputs<'_>,
        shape: &Shape,
        consumers: usize,
        out: &mut Tensor,
        log_sum_exp: &mut Tensor,
    ) -> Result<()> {
        let counters = self.counters.address(out)?;
        let [key_begin, key_end, ..] = inputs.ranges;
        let keys = shape.forward_keys();
        let work = shape.heads * shape.tokens.div_ceil(64 * consumers);
        inputs
            .kernel(&matrix::FORWARD_HOPPER, "attention_forward_hopper")
            .number("FORWARD_CONSUMERS", consumers)
            .arguments(&[boxes(inputs.q, 64), boxes(inputs.k, keys), boxes(inputs.v, keys)])
            .arguments(&rows_mut(out))
            .arguments(&[log_sum_exp.into(), key_begin.into(), key_end.into(), inputs.sinks.into()])
            .arguments(&[Argument::Address(counters)])
            .sizes(&inputs.sizes())
            .arguments(&inputs.scalars())
            .shared(shape.forward_hopper_shared(consumers))
            .launch(
                self.runtime.as_ref(),
                [work.min(self.facts.multiprocessors), 1, 1],
                128 * (consumers + 1),
            );
        Ok(())
    }

    fn attend_decode(
        &self,
        inputs: &Inputs<'_>,
        shape: &Shape,
        out: &mut Tensor,
        log_sum_exp: &mut Tensor,
    ) -> Result<()> {
        let [key_begin, key_end, ..] = inputs.ranges;
        let (grid, value_width) = (shape.decode_grid(&self.facts), inputs.parameters.value_width);
        let [splits, ..] = grid;
        let parts = [splits, shape.tokens, shape.heads, value_width + 1];
        let parts = Tensor::scratch(out.device(), Category::Workspace, DType::F32, &parts)?;
        inputs
            .kernel(&matrix::DECODE, "attention_decode")
            .arguments(&[rows(inputs.q), rows(inputs.k), rows(inputs.v)].concat())
            .arguments(&[(&parts).into(), key_begin.into(), key_end.into()])
            .sizes(&inputs.sizes())
            .arguments(&inputs.scalars())
            .shared(shape.decode_shared())
            .launch(self.runtime.as_ref(), grid, 128);
        inputs
            .kernel(&matrix::DECODE, "attention_decode_combine")
            .arguments(&[(&parts).into()])
            .sizes(&[splits])
            .arguments(&rows_mut(out))
            .arguments(&[log_sum_exp.into(), inputs.sinks.into()])
            .sizes(&[shape.heads])
            .launch(self.runtime.as_ref(), [shape.heads, shape.tokens, 1], value_width.div_ceil(64) * 32);
        Ok(())
    }

    fn attend_portable(&self, inputs: &Inputs<'_>, out: &mut Tensor, log_sum_exp: &mut Tensor) {
        let [tokens, _] = inputs.tokens();
        let [key_begin, key_end, ..] = inputs.ranges;
        Kernel::new("attention", "attention_forward")
            .element(inputs.q.dtype())
            .arguments(&[inputs.q.into(), inputs.k.into(), inputs.v.into(), (&mut *out).into()])
            .arguments(&[log_sum_exp.into(), key_begin.into(), key_end.into(), inputs.sinks.into()])
            .arguments(&[inputs.chosen.into()])
            .sizes(&inputs.head_sizes())
            .sizes(&[inputs.q.pitch(), inputs.k.pitch(), inputs.v.pitch(), out.pitch()])
            .arguments(&inputs.scalars())
            .sizes(&[inputs.chosen_words()])
            .launch(self.runtime.as_ref(), [tokens, inputs.parameters.query_heads, 1], 32);
    }

    pub(super) fn attend_backward(
        &self,
        inputs: &Inputs<'_>,
        saved: [&Tensor; 3],
        d_inputs: [&mut Tensor; 3],
        d_sinks: Option<&mut Tensor>,
    ) {
        let shape = inputs.shape();
        let [out, _, d_out] = saved;
        let [d_q, d_k, d_v] = &d_inputs;
        let has_form = shape.has_kernels(&self.facts) && inputs.is_aligned(&[out, d_out, d_q, d_k, d_v]);
        let form = if has_form { shape.backward(&self.facts) } else { None };
        let result = match form {
            Some(form) => self.attend_backward_matrix(inputs, &shape, form, saved, d_inputs, d_sinks),
            None if inputs.is_wide() => Err(inputs.too_wide(self.runtime.name())),
            None => self.attend_backward_portable(inputs, saved, d_inputs, d_sinks),
        };
        if let Err(error) = result {
            self.runtime.fail("attention_backward", &error.to_string());
        }
    }

    fn attend_backward_matrix(
        &self,
        inputs: &Inputs<'_>,
        shape: &Shape,
        (form, tile): (Backward, Tile),
        [out, log_sum_exp, d_out]: [&Tensor; 3],
        [d_q, d_k, d_v]: [&mut Tensor; 3],
        d_sinks: Option<&mut Tensor>,
    ) -> Result<()> {
        let pass = BackwardPass {
            gpu: self,
            inputs,
            shape,
            form,
            tile,
            d_out,
            work: Workspace::new(out, shape, form, self.facts.deterministic)?,
        };
        let [key_begin, key_end, ..] = inputs.ranges;
        pass.kernel("attention_backward_prepare")
            .arguments(&[rows(out), rows(d_out)].concat())
            .arguments(&[log_sum_exp.into(), key_begin.into(), key_end.into()])
            .arguments(&[(&pass.work.logs).into(), (&pass.work.deltas).into()])
            .arguments(&[pass.work.bounds.as_ref().into(), pass.work.sums.as_ref().into()])
            .sizes(&[shape.tokens, shape.heads])
            .launch(self.runtime.as_ref(), [shape.heads, shape.padded_tokens() / 64, 1], 256);
        match form {
            Backward::Hopper { cluster, consumers } => pass.keys_hopper(cluster, consumers, d_k, d_v),
            Backward::Plain => pass.keys(d_k, d_v),
        }
        match &pass.work.sums {
            Some(sums) => pass.convert(sums, d_q),
            None => pass.queries(d_q),
        }
        if let (Some(sinks), Some(d_sinks)) = (inputs.sinks, d_sinks) {
            pass.kernel("attention_backward_sinks")
                .arguments(&[sinks.into(), (&pass.work.logs).into(), (&pass.work.deltas).into()])
                .arguments(&[d_sinks.into()])
                .sizes(&[shape.tokens])
                .launch(self.runtime.as_ref(), [shape.heads, 1, 1], 256);
        }
        Ok(())
    }

    fn attend_backward_portable(
        &self,
        inputs: &Inputs<'_>,
        [out, log_sum_exp, d_out]: [&Tensor; 3],
        [d_q, d_k, d_v]: [&mut Tensor; 3],
        d_sinks: Option<&mut Tensor>,
    ) -> Result<()> {
        let p = inputs.parameters;
        let [tokens, keys] = inputs.tokens();
        let [key_begin, key_end, query_begin, query_end] = inputs.ranges;
        let shape = [tokens, p.query_heads];
        let deltas = Tensor::scratch(out.device(), Category::Workspace, DType::F32, &shape)?;
        let dtype = inputs.q.dtype();
        let by_query = [tokens, p.query_heads, 1];
        Kernel::new("attention", "attention_delta")
            .element(dtype)
            .arguments(&[out.into(), d_out.into(), (&deltas).into()])
            .sizes(&[p.value_width, out.pitch(), d_out.pitch()])
            .launch(self.runtime.as_ref(), by_query, 32);
        let read = [
            inputs.q.into(),
            inputs.k.into(),
            inputs.v.into(),
            d_out.into(),
            log_sum_exp.into(),
            (&deltas).into(),
            key_begin.into(),
            key_end.into(),
            inputs.chosen.into(),
        ];
        let pitches = [inputs.q.pitch(), inputs.k.pitch(), inputs.v.pitch(), d_out.pitch()];
        Kernel::new("attention", "attention_d_query")
            .element(dtype)
            .arguments(&read)
            .arguments(&[(&mut *d_q).into()])
            .sizes(&inputs.head_sizes())
            .sizes(&pitches)
            .sizes(&[d_q.pitch()])
            .arguments(&inputs.scalars())
            .sizes(&[inputs.chosen_words()])
            .launch(self.runtime.as_ref(), by_query, 32);
        Kernel::new("attention", "attention_d_key")
            .element(dtype)
            .arguments(&read)
            .arguments(&[query_begin.into(), query_end.into(), (&mut *d_k).into(), (&mut *d_v).into()])
            .sizes(&inputs.head_sizes())
            .sizes(&pitches)
            .sizes(&[d_k.pitch(), d_v.pitch()])
            .arguments(&inputs.scalars())
            .sizes(&[inputs.chosen_words()])
            .launch(self.runtime.as_ref(), [keys, p.key_value_heads, 1], 32);
        if let (Some(sinks), Some(d_sinks)) = (inputs.sinks, d_sinks) {
            Kernel::new("attention", "attention_d_sinks")
                .element(dtype)
                .arguments(&[sinks.into(), log_sum_exp.into(), (&deltas).into(), d_sinks.into()])
                .sizes(&[tokens])
                .launch(self.runtime.as_ref(), [p.query_heads, 1, 1], 256);
        }
        Ok(())
    }
}

/// What the launches of a backward pass on matrix units share.
struct BackwardPass<'a> {
    gpu: &'a Gpu,
    inputs: &'a Inputs<'a>,
    shape: &'a Shape,
    form: Backward,
    tile: Tile,
    d_out: &'a Tensor,
    work: Workspace,
}

impl BackwardPass<'_> {
    fn kernel(&self, name: &'static str) -> Kernel {
        match self.form {
            Backward::Hopper { cluster, consumers } => self
                .inputs
                .kernel(&matrix::BACKWARD_HOPPER, name)
                .number("BACKWARD_CLUSTER", cluster)
                .number("BACKWARD_CONSUMERS", consumers),
            Backward::Plain => self.plain_kernel(name),
        }
    }

    fn plain_kernel(&self, name: &'static str) -> Kernel {
        self.inputs
            .kernel(&matrix::BACKWARD, name)
            .number("BACKWARD_KEYS", self.tile.keys)
            .number("BACKWARD_QUERIES", self.tile.queries)
            .number("BACKWARD_STAGES", self.tile.stages)
    }

    fn keys_hopper(&self, cluster: usize, consumers: usize, d_k: &mut Tensor, d_v: &mut Tensor) {
        let (inputs, queries) = (self.inputs, self.shape.backward_queries(consumers));
        let keys = 64 * consumers;
        let name = match self.work.sums {
            Some(_) => "attention_backward_hopper",
            None => "attention_backward_hopper_keys",
        };
        let [.., query_begin, query_end] = inputs.ranges;
        let grid = [self.shape.key_heads * cluster, self.shape.keys.div_ceil(keys), self.shape.sweeps()];
        self.kernel(name)
            .arguments(&[boxes(inputs.q, queries), boxes(inputs.k, keys), boxes(inputs.v, keys)])
            .arguments(&[boxes(self.d_out, queries)])
            .arguments(&[rows_mut(d_k), rows_mut(d_v)].concat())
            .arguments(&[(&self.work.logs).into(), (&self.work.deltas).into()])
            .arguments(&[self.work.bounds.as_ref().into(), self.work.sums.as_ref().into()])
            .arguments(&[query_begin.into(), query_end.into()])
            .sizes(&inputs.sizes())
            .arguments(&inputs.scalars())
            .shared(self.shape.backward_hopper_shared(consumers))
            .launch(self.gpu.runtime.as_ref(), grid, 128 * (consumers + 1));
    }

    fn keys(&self, d_k: &mut Tensor, d_v: &mut Tensor) {
        let (inputs, keys) = (self.inputs, self.tile.keys);
        let name = match self.work.sums {
            Some(_) => "attention_backward",
            None => "attention_backward_keys",
        };
        let ranges: Vec<Argument> = inputs.ranges.iter().map(Argument::from).collect();
        self.kernel(name)
            .arguments(&[rows(inputs.q), rows(inputs.k), rows(inputs.v), rows(self.d_out)].concat())
            .arguments(&[rows_mut(d_k), rows_mut(d_v)].concat())
            .arguments(&[(&self.work.logs).into(), (&self.work.deltas).into()])
            .arguments(&[self.work.sums.as_ref().into()])
            .arguments(&ranges)
            .sizes(&inputs.sizes())
            .arguments(&inputs.scalars())
            .arguments(&inputs.choice())
            .shared(self.shape.backward_shared(self.tile))
            .launch(
                self.gpu.runtime.as_ref(),
                [self.shape.key_heads, self.shape.keys.div_ceil(keys), 1],
                2 * keys,
            );
    }

    /// Sums by atomics to the queries' gradients.
    fn convert(&self, sums: &Tensor, d_q: &mut Tensor) {
        let (heads, tokens) = (self.shape.heads, self.shape.padded_tokens());
        let (name, grid, threads) = match self.form {
            Backward::Hopper { .. } => {
                let pieces = self.shape.pieces()[0];
                ("attention_backward_hopper_convert", [heads, tokens / 64, pieces], 128)
            }
            Backward::Plain => {
                let Tile { keys, queries, .. } = self.tile;
                ("attention_backward_convert", [heads, tokens / queries, 1], 2 * keys)
            }
        };
        self.kernel(name)
            .arguments(&[sums.into()])
            .arguments(&rows_mut(d_q))
            .sizes(&[self.shape.tokens, heads])
            .arguments(&self.inputs.scalars()[..1])
            .launch(self.gpu.runtime.as_ref(), grid, threads);
    }

    /// The queries' gradients on their own, in an order that never changes.
    fn queries(&self, d_q: &mut Tensor) {
        let inputs = self.inputs;
        let [key_begin, key_end, ..] = inputs.ranges;
        self.plain_kernel("attention_backward_queries")
            .arguments(&[rows(inputs.q), rows(inputs.k), rows(inputs.v), rows(self.d_out)].concat())
            .arguments(&rows_mut(d_q))
            .arguments(&[(&self.work.logs).into(), (&self.work.deltas).into()])
            .arguments(&[key_begin.into(), key_end.into()])
            .sizes(&inputs.sizes())
            .arguments(&inputs.scalars())
            .arguments(&inputs.choice())
            .shared(self.shape.queries_shared(self.tile))
            .launch(self.gpu.runtime.as_ref(), [self.shape.heads, self.shape.tokens.div_ceil(64), 1], 128);
    }
}
