//! Products with adapters that ride on kernels over rows.

#[cfg(test)]
mod tests;

use super::launch::{self, Kernel};
use super::runtime::{Argument, DeviceFacts, ModuleText};
use super::{Gpu, shift};
use crate::device::{GateActivation, Held, NormWeight, Riding, RowKernel, Share};
use crate::{DType, Tensor};

macro_rules! texts {
    ($($file:literal),*) => {
        &[$(include_str!(concat!("../../../kernels/", $file))),*]
    };
}

static NORM: ModuleText = ModuleText {
    name: "norm_riding",
    texts: texts!("prelude/cuda.h", "common.cpp", "cuda/tiles.cuh", "cuda/riding.cuh", "cuda/norm_riding.cu"),
};

static GATED: ModuleText = ModuleText {
    name: "gated_riding",
    texts: texts!(
        "prelude/cuda.h",
        "common.cpp",
        "gated.cpp",
        "cuda/tiles.cuh",
        "cuda/riding.cuh",
        "cuda/gated_riding.cu"
    ),
};

/// As in the kernels' texts.
const BLOCK_ROWS: usize = 16;

/// Columns of A whose part lanes hold in registers.
const MOST_RANKS: usize = 64;

/// Bytes of A that all blocks together read at most: beyond that, a product by itself is faster (27 MiB gain, 28 lose).
const MOST_BYTES: usize = 27 << 20;

/// Rows that are fewer leave most of the device idle.
const FEW_ROWS: usize = 64;

/// Whether a kernel with a product on it is there for rows like those of x, and faster than two kernels.
pub(super) fn rides(facts: &DeviceFacts, on: RowKernel, x: &Tensor, a: &Tensor) -> bool {
    let (rows, [ranks, width]) = (x.rows(), [a.rows(), a.columns()]);
    let most_width = match on {
        RowKernel::Norm => 1024,
        RowKernel::Gated => 2048,
    };
    let read = rows.div_ceil(BLOCK_ROWS) * ranks * width * x.dtype().bytes();
    facts.capability >= (8, 0)
        && matches!(x.dtype(), DType::Bf16 | DType::F16)
        && x.dtype() == a.dtype()
        && rows > FEW_ROWS
        && width.is_multiple_of(8)
        && width <= most_width
        && ranks.is_multiple_of(16)
        && (16..=MOST_RANKS).contains(&ranks)
        && read <= MOST_BYTES
}

/// Dynamic shared memory of a forward kernel of so many warps.
fn shared_bytes(width: usize, ranks: usize, warps: usize) -> usize {
    (BLOCK_ROWS * ((2 * width).next_multiple_of(128) + 64)).max(64 * warps * ranks)
}

fn rows(tensor: &Tensor) -> usize {
    tensor.rows().div_ceil(BLOCK_ROWS)
}

impl Gpu {
    fn riding_kernel(
        &self,
        module: &'static ModuleText,
        name: &'static str,
        x: &Tensor,
        a: &Tensor,
    ) -> Kernel {
        Kernel::of(module, name)
            .element(x.dtype())
            .define("HALVES_F16", x.dtype() == DType::F16)
            .number("ROW_WIDTH", a.columns())
            .number("RANKS", a.rows())
    }

    fn norm_kernel(&self, name: &'static str, x: &Tensor, weight: Option<&Tensor>, a: &Tensor) -> Kernel {
        self.riding_kernel(&NORM, name, x, a).weight(weight.map_or(DType::F32, Tensor::dtype))
    }

    fn gated_kernel(
        &self,
        name: &'static str,
        activation: GateActivation,
        gate: &Tensor,
        a: &Tensor,
    ) -> Kernel {
        self.riding_kernel(&GATED, name, gate, a).activation(activation).aligned(true)
    }

    /// A norm with the product next to it; false where there is no kernel for these.
    pub(super) fn norm_riding(
        &self,
        x: &Tensor,
        weight: Option<&Tensor>,
        (kind, epsilon): (NormWeight, f32),
        Riding { a, scale }: &Riding,
        out: &mut Tensor,
    ) -> bool {
        let all: Vec<&Tensor> = [x, a, &*out].into_iter().chain(weight).collect();
        if !rides(&self.facts, RowKernel::Norm, x, a) || !launch::is_aligned(a.columns(), &all) {
            return false;
        }
        self.norm_kernel("rms_norm_riding", x, weight, a)
            .arguments(&[x.into(), weight.into(), (&mut *out).into(), a.into()])
            .sizes(&[x.rows(), x.pitch(), out.pitch(), a.pitch()])
            .arguments(&[Argument::F32(epsilon), Argument::F32(shift(kind))])
            .arguments(&[Argument::U32(weight.is_some().into()), Argument::F32(*scale)])
            .shared(shared_bytes(a.columns(), a.rows(), 8))
            .launch(self.runtime.as_ref(), [rows(x), 1, 1], 256);
        true
    }

    /// A norm's gradient for `d_out` with its share; false where there is no kernel for these.
    pub(super) fn norm_backward_riding(
        &self,
        x: &Tensor,
        weight: Option<&Tensor>,
        (kind, epsilon): (NormWeight, f32),
        (d_out, Share { d, riding: Riding { a, scale } }): (&Tensor, &Share),
        (d_x, held): (&mut Tensor, Held<'_>),
    ) -> bool {
        let accumulate = !matches!(held, Held::Nothing);
        let other = if let Held::Other(other) = held { Some(other) } else { None };
        let all: Vec<&Tensor> = [x, a, d, d_out, &*d_x].into_iter().chain(weight).chain(other).collect();
        if !rides(&self.facts, RowKernel::Norm, x, a) || !launch::is_aligned(a.columns(), &all) {
            return false;
        }
        let held_pitch = other.map_or(d_x.pitch(), Tensor::pitch);
        let held = Argument::Address(other.map_or(d_x.address(), Tensor::address));
        self.norm_kernel("rms_norm_backward_riding", x, weight, a)
            .arguments(&[x.into(), weight.into(), d_out.into(), d.into(), a.into(), (&mut *d_x).into(), held])
            .sizes(&[x.rows(), x.pitch(), d_out.pitch(), d.pitch(), a.pitch(), d_x.pitch(), held_pitch])
            .arguments(&[Argument::F32(epsilon), Argument::F32(shift(kind))])
            .arguments(&[Argument::U32(weight.is_some().into()), Argument::U32(accumulate.into())])
            .arguments(&[Argument::F32(*scale)])
            .launch(self.runtime.as_ref(), [rows(x), 1, 1], a.columns().div_ceil(64) * 32);
        true
    }

    /// A gated product with the adapters' next to it; false where there is no kernel for these.
    pub(super) fn gate_riding(
        &self,
        activation: GateActivation,
        [gate, up]: [&Tensor; 2],
        Riding { a, scale }: &Riding,
        out: &mut Tensor,
    ) -> bool {
        let shared = shared_bytes(a.columns(), a.rows(), 16);
        let fits =
            rides(&self.facts, RowKernel::Gated, gate, a) && shared <= self.facts.shared_bytes_per_block;
        if !fits || !launch::is_aligned(a.columns(), &[gate, up, a, out]) {
            return false;
        }
        self.gated_kernel("gated_riding", activation, gate, a)
            .arguments(&[gate.into(), up.into(), (&mut *out).into(), a.into()])
            .sizes(&[gate.rows(), gate.pitch(), up.pitch(), out.pitch(), a.pitch()])
            .arguments(&[Argument::F32(*scale)])
            .shared(shared)
            .launch(self.runtime.as_ref(), [rows(gate), 1, 1], 512);
        true
    }

    /// The gradients of gate and up in their places for `d_out` with its share; false where there is no kernel for these.
    pub(super) fn gate_gradients_riding(
        &self,
        activation: GateActivation,
        [gate, up]: [&mut Tensor; 2],
        (d_out, Share { d, riding: Riding { a, scale } }): (&Tensor, &Share),
    ) -> bool {
        let is_aligned = launch::is_aligned(a.columns(), &[&*gate, &*up, d_out, d, a]);
        if !rides(&self.facts, RowKernel::Gated, gate, a) || !is_aligned {
            return false;
        }
        let places = [Argument::Address(gate.address_mut()), Argument::Address(up.address_mut())];
        self.gated_kernel("gated_backward_riding", activation, gate, a)
            .arguments(&places)
            .arguments(&[d_out.into(), d.into(), a.into()])
            .arguments(&places)
            .sizes(&[gate.rows(), gate.pitch(), up.pitch(), d_out.pitch(), d.pitch(), a.pitch()])
            .sizes(&[gate.pitch(), up.pitch()])
            .arguments(&[Argument::F32(*scale)])
            .launch(self.runtime.as_ref(), [rows(gate), a.columns().div_ceil(512), 1], 256);
        true
    }
}
