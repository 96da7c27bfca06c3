//! Levels of recomputation, and tensors that wait in the host's memory.

use std::rc::Rc;

use super::*;
use crate::device::{GateActivation, NormWeight};
use crate::error::{Error, Result};
use crate::ops::{
    GatedOptions, Linear, LinearGroup, LinearOptions, Lora, Spare, gated_with_spare, linear_group,
    rms_norm_with_spare,
};
use crate::{Parameter, Recompute, Tape, Var, Weight};

const TOKENS: usize = 7;
const WIDTH: usize = 16;
const INNER: usize = 24;
const BLOCKS: usize = 5;

/// A feed-forward layer with its residual.
struct Block {
    gate_up: LinearGroup,
    down: LinearGroup,
}

/// As a decoder has it: the gradient of a block's input is the result's gradient of the block before.
fn room(reader: &LinearGroup, gradient: usize) -> Spare {
    Spare { result: reader.spare(), gradient, codes: false, riding: reader.riding() }
}

fn group(run: &Run<'_>, seed: u64, shapes: &[[usize; 2]]) -> LinearGroup {
    let trained =
        |seed, shape: &[usize]| Weight::Trainable(Parameter::new("adapter", run.floats(seed, shape)));
    let layer = |(index, &[features, width]): (usize, &[usize; 2])| {
        let seed = seed + 10 * index as u64;
        Linear {
            weight: Weight::Frozen(run.dense(seed, &[features, width])),
            bias: None,
            lora: Some(Lora {
                a: trained(seed + 1, &[3, width]),
                b: trained(seed + 2, &[features, 3]),
                scale: 0.5,
                dropout: 0.0,
                stream: 0,
            }),
        }
    };
    let mut group = LinearGroup::new(shapes.iter().enumerate().map(layer).collect());
    group.pack(run.dtype).unwrap();
    group
}

impl Block {
    fn new(run: &Run<'_>, seed: u64) -> Self {
        let gate_up = group(run, seed, &[[INNER, WIDTH], [INNER, WIDTH]]);
        Self { gate_up, down: group(run, seed + 50, &[[WIDTH, INNER]]) }
    }

    fn forward(&self, tape: &Tape, x: &Var) -> Result<Var> {
        let normed = rms_norm_with_spare(
            tape,
            x,
            None,
            NormWeight::Plain,
            1e-3,
            room(&self.gate_up, self.down.spare()),
        )?;
        let halves = linear_group(tape, &normed, &self.gate_up, LinearOptions::default())?;
        drop(normed);
        let spare = self.down.spare();
        let options = GatedOptions { spare, riding: self.down.riding(), ..GatedOptions::default() };
        let product = gated_with_spare(tape, GateActivation::Silu, &halves[0], &halves[1], options)?;
        drop(halves);
        let options = LinearOptions { residual: Some(x), ends_block: true, ..LinearOptions::default() };
        Ok(linear_group(tape, &product, &self.down, options)?.remove(0))
    }

    fn gradients(&self) -> impl Iterator<Item = Tensor> {
        let layers = self.gate_up.layers().iter().chain(self.down.layers());
        let adapters = layers.filter_map(|layer| layer.lora.as_ref());
        adapters.flat_map(|lora| [&lora.a, &lora.b]).map(|a| a.parameter().unwrap().gradient().unwrap())
    }
}

/// Result, the input's gradient and those of all adapters, and the bytes of activations between the passes.
fn pass(device: &Device, dtype: DType, level: Recompute, offloads: bool) -> Result<(Vec<Vec<u32>>, usize)> {
    let run = Run { device, dtype, rounding: dtype, padding: 0, pads: RefCell::default() };
    let blocks: Vec<Rc<Block>> =
        (0..BLOCKS as u64).map(|index| Rc::new(Block::new(&run, 1000 * index))).collect();
    let tape = if level == Recompute::None { Tape::keeping_all() } else { Tape::recording() };
    let tape = if offloads { tape.putting_aside(device) } else { tape };
    let input = run.dense(7, &[TOKENS, WIDTH]).copy(Category::Activations)?;
    let leaf = tape.leaf(input);
    let slot = leaf.slot().unwrap();
    let mut y = leaf;
    for block in &blocks {
        let block = Rc::clone(block);
        y = match level {
            Recompute::Full => tape.checkpoint(y, move |tape, x| block.forward(tape, &x))?,
            _ => block.forward(&tape, &y)?,
        };
    }
    let kept = device.memory().report().live(Category::Activations);
    let bits = |tensor: &Tensor| -> Result<Vec<u32>> {
        Ok(tensor.to_f32_vec()?.into_iter().map(f32::to_bits).collect())
    };
    let mut results = vec![bits(y.tensor())?];
    let mut gradients = tape.backward_of(y, run.dense(8, &[TOKENS, WIDTH]))?;
    results.push(bits(&gradients.take(slot).unwrap())?);
    for gradient in blocks.iter().flat_map(|block| block.gradients()) {
        results.push(bits(&gradient)?);
    }
    device.synchronize()?;
    Ok((results, kept))
}

#[test]
fn every_level_gives_the_same_bits_and_tensors_put_aside_come_back_as_they_were() {
    for dtype in [DType::F32, DType::Bf16] {
        let Some(device) = emulated(3) else { return };
        let state = TOKENS * WIDTH * dtype.bytes();
        let (cheap, cheap_bytes) = pass(&device, dtype, Recompute::Cheap, false).unwrap();
        let (everything, every_byte) = pass(&device, dtype, Recompute::None, false).unwrap();
        let (full, full_bytes) = pass(&device, dtype, Recompute::Full, false).unwrap();
        let (aside, aside_bytes) = pass(&device, dtype, Recompute::Full, true).unwrap();
        assert!(cheap.iter().flatten().all(|&bits| f32::from_bits(bits).is_finite()));
        assert!(cheap == everything && cheap == full, "{dtype}: levels differ");
        assert!(cheap == aside, "{dtype}: what was put aside came back as something else");
        assert!(every_byte > cheap_bytes && cheap_bytes > full_bytes);
        // The result and the inputs of all blocks; the result and the inputs of the last two.
        assert_eq!((full_bytes, aside_bytes), ((BLOCKS + 1) * state, 3 * state), "{dtype}");
        assert_eq!(device.memory().report().live_bytes, 0);
    }
}

#[test]
fn memory_that_runs_out_in_the_middle_is_an_error_that_leaves_nothing_behind() {
    let Some(device) = emulated(4) else { return };
    let dtype = DType::Bf16;
    let (expected, _) = pass(&device, dtype, Recompute::Full, true).unwrap();
    let most = device.memory().report().peak_bytes;
    let mut refused = 0;
    for limit in (1..most).step_by(most / 97) {
        device.memory().set_limit(Some(limit));
        let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            pass(&device, dtype, Recompute::Full, true)
        }));
        // What is made before the passes is made by `unwrap`.
        if let Ok(outcome) = ended {
            let error = outcome.expect_err("a limit below the peak was not noticed");
            assert!(matches!(error, Error::OutOfMemory { .. }), "{error}");
            refused += 1;
        }
        assert_eq!(device.memory().report().live_bytes, 0);
        assert_eq!(device.memory().shortage().unwrap().limit_bytes, Some(limit));
    }
    assert!(refused > 10, "only {refused} limits were met in the passes");
    device.memory().set_limit(Some(most));
    assert!(pass(&device, dtype, Recompute::Full, true).unwrap().0 == expected);
}
