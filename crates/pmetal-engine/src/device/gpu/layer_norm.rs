//! LayerNorm.

use super::launch::{self, Kernel, lanes};
use super::runtime::Argument;
use super::{Gpu, SUM_PARTS, norm_rows};
use crate::device::{Held, LayerNorm};
use crate::{DType, Tensor};

/// How many heads have a weight of their own.
fn heads_of(weight: Option<&Tensor>, width: usize) -> usize {
    weight.map_or(1, |weight| (weight.elements() / width).max(1))
}

impl Gpu {
    pub(super) fn norm_layer(&self, x: &Tensor, norm: &LayerNorm<'_>, out: &mut Tensor) {
        let (rows, inner, width) = norm_rows(x);
        let threads = launch::lanes_of(rows, width);
        let LayerNorm { weight, bias, epsilon } = *norm;
        let all: Vec<&Tensor> = [x, &*out].into_iter().chain(weight).chain(bias).collect();
        let aligned = launch::is_aligned(width, &all);
        self.layer_norm_kernel("layer_norm", x, norm)
            .row(width, threads, aligned)
            .arguments(&[x.into(), weight.into(), bias.into(), (&mut *out).into()])
            .sizes(&[width, inner, heads_of(weight, width), heads_of(bias, width), x.pitch(), out.pitch()])
            .arguments(&[Argument::F32(epsilon)])
            .launch(self.runtime.as_ref(), [rows, 1, 1], threads);
    }

    pub(super) fn norm_layer_backward(
        &self,
        x: &Tensor,
        norm: &LayerNorm<'_>,
        d_out: &Tensor,
        d_x: Option<(&mut Tensor, Held<'_>)>,
        d_weights: [Option<&mut Tensor>; 2],
    ) {
        let (rows, inner, width) = norm_rows(x);
        let LayerNorm { weight, epsilon, .. } = *norm;
        if let Some((d_x, held)) = d_x {
            let accumulate = !matches!(held, Held::Nothing);
            let (held, held_pitch) = match held {
                Held::Other(other) => (Some(other), other.pitch()),
                Held::Nothing | Held::Itself => (None, d_x.pitch()),
            };
            let all: Vec<&Tensor> = [x, d_out, &*d_x].into_iter().chain(weight).chain(held).collect();
            let aligned = launch::is_aligned(width, &all);
            let held = Argument::Address(held.map_or(d_x.address(), Tensor::address));
            self.layer_norm_kernel("layer_norm_backward", x, norm)
                .row(width, lanes(width), aligned)
                .arguments(&[x.into(), weight.into(), d_out.into(), (&mut *d_x).into(), held])
                .sizes(&[width, inner, heads_of(weight, width)])
                .sizes(&[x.pitch(), d_out.pitch(), d_x.pitch(), held_pitch])
                .arguments(&[Argument::F32(epsilon), Argument::U32(accumulate.into())])
                .launch(self.runtime.as_ref(), [rows, 1, 1], lanes(width));
        }
        if d_weights.iter().any(Option::is_some) {
            self.layer_norm_weights(x, norm, d_out, d_weights);
        }
    }

    fn layer_norm_weights(
        &self,
        x: &Tensor,
        norm: &LayerNorm<'_>,
        d_out: &Tensor,
        d_weights: [Option<&mut Tensor>; 2],
    ) {
        let (rows, inner, width) = norm_rows(x);
        let no_memory = || self.runtime.fail("layer_norm_backward", "no memory is left for its partial sums");
        let Some(moments) = Self::scratch(x, DType::F32, &[2, rows]) else { return no_memory() };
        self.layer_norm_kernel("layer_norm_moments", x, norm)
            .row(width, lanes(width), false)
            .arguments(&[x.into(), (&moments).into()])
            .sizes(&[width, inner, x.pitch()])
            .arguments(&[Argument::F32(norm.epsilon)])
            .launch(self.runtime.as_ref(), [rows, 1, 1], lanes(width));
        for (index, sum) in d_weights.into_iter().enumerate() {
            let Some(sum) = sum else { continue };
            let (heads, columns) = (heads_of(Some(sum), width), sum.elements());
            let parts = (rows / heads).clamp(1, SUM_PARTS);
            let Some(sums) = Self::scratch(x, DType::F32, &[parts, columns]) else { return no_memory() };
            self.layer_norm_kernel("layer_norm_sums", x, norm)
                .row(width, lanes(width), false)
                .arguments(&[x.into(), d_out.into(), (&moments).into(), (&sums).into()])
                .sizes(&[rows, width, inner, heads, x.pitch(), d_out.pitch(), usize::from(index == 0)])
                .launch(self.runtime.as_ref(), [columns.div_ceil(128), parts, 1], 128);
            self.add_column_sums(&sums, parts, 1.0, sum);
        }
    }

    fn layer_norm_kernel(&self, name: &'static str, x: &Tensor, norm: &LayerNorm<'_>) -> Kernel {
        let dtype = |weight: Option<&Tensor>| weight.map_or(DType::F32, Tensor::dtype);
        Kernel::new("layer_norm", name).element(x.dtype()).weight(dtype(norm.weight)).bias(dtype(norm.bias))
    }
}
