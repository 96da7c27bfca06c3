//! Reverse-mode differentiation over the operations of [`crate::ops`].
//!
//! An operation that is being recorded pushes a node: a closure that owns exactly what its backward pass
//! reads. The backward pass pops nodes, so that everything is freed as soon as it was read. Gradients of
//! trainable parameters are summed in place in the [`crate::Parameter`]s; gradients of activations live in
//! numbered slots until their node takes them. An operation none of whose inputs has a slot and that
//! trains nothing records nothing.

use std::cell::{OnceCell, RefCell};
use std::rc::Rc;
use std::sync::Arc;

use crate::aside::{Aside, Kept};
use crate::device::{GradientCodes, Held, Riding, ScaledRows, Share, WeightGradient};
use crate::error::{Error, Result};
use crate::memory::Category;
use crate::{Device, Parameter, Tensor};

type Backward = Box<dyn FnOnce(&mut Gradients) -> Result<()>>;

/// What a forward pass keeps of its blocks for the backward pass. Losses and gradients are the same to the bit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Recompute {
    /// All that the backward pass reads; nothing is computed twice.
    None,
    /// Results of products and of attention, with its log-sum-exps; norms and gated products are computed again.
    #[default]
    Cheap,
    /// A block's input; the rest of the block is computed again.
    Full,
}

/// The record of a forward pass; single-threaded, as the kernels are parallel inside.
#[derive(Default)]
pub struct Tape {
    record: Option<RefCell<Record>>,
    /// Whether results with a recipe are kept all the same.
    keeps_all: bool,
    /// Whether this is the second pass over a block, whose result is known.
    is_again: bool,
    aside: Option<Rc<Aside>>,
}

#[derive(Default)]
struct Record {
    nodes: Vec<Backward>,
    slots: usize,
}

/// A value of the forward pass, with its place in the record when gradients flow to it.
#[derive(Clone)]
pub struct Var {
    tensor: Tensor,
    slot: Option<usize>,
    recipe: Option<Rc<Recipe>>,
    /// The value in eight bits, where whoever computed it was asked to round it as well.
    codes: Option<ScaledRows>,
    /// Adapters whose product with the value lies in the columns that it has to spare. Whoever computed it adds their share
    /// to its gradient.
    riding: Option<Riding>,
}

/// How to compute a value again from values that are kept anyway, instead of keeping it.
pub struct Recipe {
    compute: Box<dyn Fn() -> Result<Tensor>>,
    memo: OnceCell<Tensor>,
}

/// What a backward pass keeps of one input.
#[derive(Clone)]
pub enum Saved {
    /// The value itself.
    Value(Tensor),
    /// A recipe shared by all users of the value; the result is kept until the last user is gone.
    Again(Rc<Recipe>),
}

impl Saved {
    /// The value, computed again when it was not kept.
    ///
    /// # Errors
    /// Out of memory, or what the recipe's operation returns.
    pub fn get(&self) -> Result<Tensor> {
        match self {
            Self::Value(tensor) => Ok(tensor.clone()),
            Self::Again(recipe) => {
                if let Some(tensor) = recipe.memo.get() {
                    return Ok(tensor.clone());
                }
                let tensor = (recipe.compute)()?;
                Ok(recipe.memo.get_or_init(|| tensor).clone())
            }
        }
    }
}

impl Var {
    /// The value.
    pub fn tensor(&self) -> &Tensor {
        &self.tensor
    }

    /// Takes the value out.
    pub fn into_tensor(self) -> Tensor {
        self.tensor
    }

    /// Where gradients for this value go; `None` when nothing wants them.
    pub fn slot(&self) -> Option<usize> {
        self.slot
    }

    /// A value that needs no gradient.
    pub fn constant(tensor: Tensor) -> Self {
        Self { tensor, slot: None, recipe: None, codes: None, riding: None }
    }

    /// The same value under another shape.
    ///
    /// # Errors
    /// [`crate::Error::Shape`] when the number of elements differs.
    pub fn reshape(self, shape: &[usize]) -> Result<Self> {
        Ok(Self { tensor: self.tensor.reshape(shape)?, recipe: None, codes: None, riding: None, ..self })
    }

    /// Forgets how the value can be computed again, for users that overwrite it in place.
    pub fn detached_recipe(self) -> Self {
        Self { recipe: None, codes: None, riding: None, ..self }
    }

    /// The same value, with what it is in eight bits.
    pub(crate) fn with_codes(self, codes: Option<ScaledRows>) -> Self {
        Self { codes, ..self }
    }

    /// The same value, with a product in its spare columns.
    pub(crate) fn with_riding(self, riding: Option<Riding>) -> Self {
        Self { riding, ..self }
    }

    pub(crate) fn riding(&self) -> Option<&Riding> {
        self.riding.as_ref()
    }

    pub(crate) fn codes(&self) -> Option<&ScaledRows> {
        self.codes.as_ref()
    }

    /// What a backward pass should keep of this value.
    pub(crate) fn save(&self) -> Saved {
        match &self.recipe {
            Some(recipe) => Saved::Again(Rc::clone(recipe)),
            None => Saved::Value(self.tensor.clone()),
        }
    }
}

/// Gradients of activations during a backward pass.
pub struct Gradients {
    slots: Vec<Option<Arrived>>,
    pending: Vec<Pending>,
}

/// A gradient in its slot.
#[derive(Clone)]
struct Arrived {
    gradient: Tensor,
    /// What it is in eight bits; lost when something is added to it.
    codes: Option<GradientCodes>,
    /// What is to be added to it.
    share: Option<Share>,
}

/// A gradient of a weight that is still to be computed, see [`WeightGradient`].
struct Pending {
    parameter: Arc<Parameter>,
    left: Tensor,
    right: Tensor,
    scale: f32,
}

/// Gradients of weights that wait for each other at most.
const MOST_PENDING: usize = 16;

/// Bytes of activations that they keep at most when an operation's backward pass ends.
const MOST_PENDING_BYTES: usize = 48 << 20;

impl Gradients {
    fn new(slots: usize) -> Self {
        Self { slots: vec![None; slots], pending: Vec::new() }
    }

    /// Adds `scale * left^T right` to a parameter's gradient, now or together with others before the backward pass ends.
    /// Whoever is done calls [`Self::settle_weights`]. Slots may hold either matrix, as nothing here overwrites what is
    /// still to be read; who overwrites one elsewhere calls [`Self::finish_weights`] first.
    ///
    /// # Errors
    /// What the product returns.
    pub(crate) fn add_weight(
        &mut self,
        parameter: &Arc<Parameter>,
        left: Tensor,
        right: Tensor,
        scale: f32,
    ) -> Result<()> {
        if self.pending.iter().any(|pending| Arc::ptr_eq(&pending.parameter, parameter)) {
            self.finish_weights()?;
        }
        let is_host = left.is_host();
        self.pending.push(Pending { parameter: Arc::clone(parameter), left, right, scale });
        if is_host || self.pending.len() == MOST_PENDING {
            self.finish_weights()?;
        }
        Ok(())
    }

    /// Computes the gradients of weights that are pending, unless they keep few bytes.
    ///
    /// # Errors
    /// What the products return.
    pub(crate) fn settle_weights(&mut self) -> Result<()> {
        let bytes = |pending: &Pending| pending.left.byte_length() + pending.right.byte_length();
        let held: usize = self.pending.iter().map(bytes).sum();
        if held > MOST_PENDING_BYTES { self.finish_weights() } else { Ok(()) }
    }

    /// Computes the gradients of weights that are pending.
    ///
    /// # Errors
    /// What the products return.
    pub(crate) fn finish_weights(&mut self) -> Result<()> {
        let pending = std::mem::take(&mut self.pending);
        let Some(device) = pending.first().map(|first| first.left.device().clone()) else { return Ok(()) };
        let mut sums = Vec::with_capacity(pending.len());
        for one in &pending {
            sums.push(one.parameter.take_gradient()?);
        }
        let describe = |(one, out)| {
            let Pending { left, right, scale, .. }: &Pending = one;
            WeightGradient { left, right, out, scale: *scale }
        };
        let mut gradients: Vec<_> = pending.iter().zip(&mut sums).map(describe).collect();
        let outcome = device.kernels().add_weight_gradients(&mut gradients);
        drop(gradients);
        pending.iter().zip(sums).for_each(|(one, sum)| one.parameter.put_gradient(sum));
        outcome
    }

    /// Takes the gradient that has arrived in a slot.
    pub fn take(&mut self, slot: usize) -> Option<Tensor> {
        self.take_with_codes(slot).map(|arrived| arrived.0)
    }

    /// [`Self::take`], with what the gradient is in eight bits where that is known.
    pub(crate) fn take_with_codes(&mut self, slot: usize) -> Option<(Tensor, Option<GradientCodes>)> {
        let arrived = self.slots.get_mut(slot).and_then(Option::take)?;
        assert!(arrived.share.is_none(), "only who says that a product rides on its value is given a share");
        Some((arrived.gradient, arrived.codes))
    }

    /// [`Self::take`] by who said [`Var::with_riding`], with what is not in the gradient yet.
    pub(crate) fn take_with_share(&mut self, slot: usize) -> Option<(Tensor, Option<Share>)> {
        let arrived = self.slots.get_mut(slot).and_then(Option::take)?;
        Some((arrived.gradient, arrived.share))
    }

    /// [`Self::add`] to a value's slot for which [`Var::riding`] is known, with what is not in the gradient yet.
    ///
    /// # Errors
    /// As [`Self::add`].
    pub(crate) fn add_with_share(&mut self, slot: usize, mut gradient: Tensor, share: Share) -> Result<()> {
        if self.slots[slot].is_some() {
            share.add_to(&mut gradient)?;
            return self.add(slot, gradient);
        }
        self.slots[slot] = Some(Arrived { gradient, codes: None, share: Some(share) });
        Ok(())
    }

    /// Adds a slot's share to its gradient before somebody else adds to that.
    fn settle_share(&mut self, slot: usize) -> Result<()> {
        match self.slots[slot].as_mut().and_then(|arrived| arrived.share.take().zip(Some(arrived))) {
            Some((share, arrived)) => share.add_to(&mut arrived.gradient),
            None => Ok(()),
        }
    }

    /// [`Self::add`] of a gradient of which it is known what it is in eight bits.
    ///
    /// # Errors
    /// As [`Self::add`].
    pub(crate) fn add_with_codes(
        &mut self,
        slot: usize,
        gradient: Tensor,
        codes: Option<GradientCodes>,
    ) -> Result<()> {
        if self.slots[slot].is_some() {
            return self.add(slot, gradient);
        }
        self.slots[slot] = Some(Arrived { gradient, codes, share: None });
        Ok(())
    }

    /// Adds a finished gradient to a slot.
    ///
    /// # Errors
    /// Out of memory when the slot's tensor is shared and must be copied first.
    pub fn add(&mut self, slot: usize, gradient: Tensor) -> Result<()> {
        self.settle_share(slot)?;
        let sum = match self.take(slot) {
            None => gradient,
            Some(held) => {
                if self.is_pending(&held) || self.is_pending(&gradient) {
                    self.finish_weights()?;
                }
                // Write into whichever of the two nobody else reads.
                let (mut target, source) = if held.is_unique() || !gradient.is_unique() {
                    (held.into_unique()?, gradient)
                } else {
                    (gradient, held)
                };
                let device = target.device().clone();
                device.kernels().add_assign(&mut target, &source);
                target
            }
        };
        self.slots[slot] = Some(Arrived { gradient: sum, codes: None, share: None });
        Ok(())
    }

    /// Lets an operation write into a slot's gradient directly; the flag says whether it must add to it.
    /// A fresh gradient takes device and element type from `like`, and its rows have `spare` more columns but on a CPU.
    ///
    /// # Errors
    /// What `write` returns, or out of memory.
    pub fn add_with(
        &mut self,
        slot: usize,
        (like, shape, spare): (&Tensor, &[usize], usize),
        write: impl FnOnce(&mut Tensor, bool) -> Result<()>,
    ) -> Result<()> {
        self.settle_share(slot)?;
        let (mut target, accumulate) = match self.take(slot) {
            Some(held) => {
                if self.is_pending(&held) {
                    self.finish_weights()?;
                }
                (held.into_unique()?.reshape(shape)?, true)
            }
            None => (fresh_gradient(like, shape, spare)?, false),
        };
        write(&mut target, accumulate)?;
        self.slots[slot] = Some(Arrived { gradient: target, codes: None, share: None });
        Ok(())
    }

    /// [`Self::add_with`] for an operation that can put the sum elsewhere: gradients of weights that are still to be
    /// computed from what the slot holds need not be computed for its sake.
    ///
    /// # Errors
    /// As [`Self::add_with`].
    pub(crate) fn add_onto(
        &mut self,
        slot: usize,
        (like, shape, spare): (&Tensor, &[usize], usize),
        write: impl FnOnce(&mut Tensor, Held<'_>) -> Result<()>,
    ) -> Result<()> {
        self.settle_share(slot)?;
        match self.slots[slot].take() {
            Some(held) if self.is_pending(&held.gradient) => {
                let mut sum = fresh_gradient(like, shape, spare)?;
                write(&mut sum, Held::Other(&held.gradient.reshape(shape)?))?;
                self.slots[slot] = Some(Arrived { gradient: sum, codes: None, share: None });
                Ok(())
            }
            other => {
                self.slots[slot] = other;
                self.add_with(slot, (like, shape, spare), |target, accumulate| {
                    write(target, if accumulate { Held::Itself } else { Held::Nothing })
                })
            }
        }
    }

    /// Whether a gradient of a weight is still to be computed from this memory. Counting handles does not tell, as blocks
    /// of columns have their own.
    fn is_pending(&self, tensor: &Tensor) -> bool {
        let reads = |read: &Tensor| read.shares_memory(tensor);
        self.pending.iter().any(|pending| reads(&pending.left) || reads(&pending.right))
    }
}

fn fresh_gradient(like: &Tensor, shape: &[usize], spare: usize) -> Result<Tensor> {
    let (device, dtype, category) = (like.device(), like.dtype(), Category::Activations);
    match shape {
        &[rows, width] if spare > 0 && !like.is_host() => {
            Tensor::scratch_with_spare(device, category, dtype, [rows, width], spare)
        }
        _ => Tensor::scratch(device, category, dtype, shape),
    }
}

impl Tape {
    /// A tape that records.
    pub fn recording() -> Self {
        Self { record: Some(RefCell::default()), ..Self::default() }
    }

    /// A tape that records and keeps also what could cheaply be computed again: [`Recompute::None`].
    pub fn keeping_all() -> Self {
        Self { keeps_all: true, ..Self::recording() }
    }

    /// Lets [`Self::checkpoint`] keep the inputs of blocks in the host's memory, where the device copies beside its
    /// other work; elsewhere nothing changes.
    pub fn putting_aside(self, device: &Device) -> Self {
        Self { aside: device.can_put_aside().then(|| Rc::new(Aside::new(device))), ..self }
    }

    /// Whether a block is being computed again for the sake of its gradients, so that nobody reads its result.
    pub(crate) fn is_again(&self) -> bool {
        self.is_again
    }

    /// A tape that records nothing: inference.
    pub fn off() -> Self {
        Self::default()
    }

    /// Whether operations are recorded.
    pub fn is_recording(&self) -> bool {
        self.record.is_some()
    }

    /// Marks a value as one whose gradient is wanted.
    pub fn leaf(&self, tensor: Tensor) -> Var {
        let slot = self.record.as_ref().map(|record| record.borrow_mut().new_slot());
        Var { tensor, slot, recipe: None, codes: None, riding: None }
    }

    /// Wraps an operation's output. `wanted` says whether any input has a slot or anything is trained;
    /// `backward` builds the node, given the output's slot.
    pub(crate) fn push(&self, tensor: Tensor, wanted: bool, backward: impl FnOnce(usize) -> Backward) -> Var {
        let slot = self.record.as_ref().filter(|_| wanted).map(|record| {
            let mut record = record.borrow_mut();
            let slot = record.new_slot();
            record.nodes.push(backward(slot));
            slot
        });
        Var { tensor, slot, recipe: None, codes: None, riding: None }
    }

    /// [`Self::push`] of an operation with several outputs.
    pub(crate) fn push_all(
        &self,
        tensors: Vec<Tensor>,
        wanted: bool,
        backward: impl FnOnce(Vec<usize>) -> Backward,
    ) -> Vec<Var> {
        let slots: Option<Vec<usize>> = self.record.as_ref().filter(|_| wanted).map(|record| {
            let mut record = record.borrow_mut();
            let slots: Vec<usize> = tensors.iter().map(|_| record.new_slot()).collect();
            let node = backward(slots.clone());
            record.nodes.push(node);
            slots
        });
        let var = |(index, tensor)| Var {
            tensor,
            slot: slots.as_ref().map(|slots| slots[index]),
            recipe: None,
            codes: None,
            riding: None,
        };
        tensors.into_iter().enumerate().map(var).collect()
    }

    /// Says how a value that is cheap to compute again can be had, so that later operations need not keep it.
    pub(crate) fn with_recipe(&self, var: Var, compute: impl Fn() -> Result<Tensor> + 'static) -> Var {
        if self.keeps_all || (var.slot.is_none() && !self.is_recording()) {
            return var;
        }
        let recipe = Some(Rc::new(Recipe { compute: Box::new(compute), memo: OnceCell::new() }));
        Var { recipe, ..var }
    }

    /// Runs the backward pass from `output`, whose gradient is `gradient`, and empties the tape.
    /// Returns the gradients that leaves have received, by slot.
    ///
    /// # Errors
    /// [`Error::Range`] when the output is not of this record, [`Error::Shape`] when the gradient is not of its size;
    /// what a node returns: parameters may then hold part of the gradient.
    pub fn backward(&self, output: &Var, gradient: Tensor) -> Result<Gradients> {
        self.check_root(output, &gradient)?;
        self.run_backward(output.slot, gradient)
    }

    /// [`Self::backward`] that lets go of the output first.
    ///
    /// # Errors
    /// As [`Self::backward`].
    pub fn backward_of(&self, output: Var, gradient: Tensor) -> Result<Gradients> {
        self.check_root(&output, &gradient)?;
        let slot = output.slot;
        drop(output);
        self.run_backward(slot, gradient)
    }

    fn check_root(&self, output: &Var, gradient: &Tensor) -> Result<()> {
        if gradient.elements() != output.tensor.elements() {
            return Err(Error::Shape {
                operation: "backward",
                what: "gradient",
                actual: gradient.shape().to_vec(),
                expected: output.tensor.shape().to_vec(),
            });
        }
        let slots = self.record.as_ref().map_or(0, |record| record.borrow().slots);
        if let Some(slot) = output.slot.filter(|&slot| slot >= slots) {
            let what = "output's place in the record";
            return Err(Error::Range { operation: "backward", what, actual: slot, limit: slots });
        }
        Ok(())
    }

    fn run_backward(&self, root: Option<usize>, gradient: Tensor) -> Result<Gradients> {
        let mut gradients = self.no_gradients();
        match root {
            Some(slot) => gradients.slots[slot] = Some(Arrived { gradient, codes: None, share: None }),
            None => drop(gradient),
        }
        self.run_nodes(gradients)
    }

    /// Slots for the gradients of all that was recorded so far.
    pub(crate) fn no_gradients(&self) -> Gradients {
        Gradients::new(self.record.as_ref().map_or(0, |record| record.borrow().slots))
    }

    /// The backward pass from gradients that have arrived.
    pub(crate) fn run_nodes(&self, mut gradients: Gradients) -> Result<Gradients> {
        let mut nodes = self.record.as_ref().map(RefCell::take).unwrap_or_default().nodes;
        while let Some(node) = nodes.pop() {
            node(&mut gradients)?;
        }
        gradients.finish_weights()?;
        Ok(gradients)
    }

    /// Runs `block` on `input` and keeps nothing but the input: the backward pass runs the block again.
    /// The block must be a pure function of its input and of parameters (randomness keyed by counters). The second run
    /// may leave out a result that [`crate::ops::LinearOptions::ends_block`] marks.
    ///
    /// # Errors
    /// What the block returns; out of memory.
    pub fn checkpoint(&self, input: Var, block: impl Fn(&Tape, Var) -> Result<Var> + 'static) -> Result<Var> {
        if !self.is_recording() {
            return block(self, input);
        }
        let input_slot = input.slot;
        let aside = self.aside.clone();
        // The copy begins before the block, so that it takes place beside it.
        let kept = match &aside {
            Some(aside) => aside.put(input.tensor.clone())?,
            None => Kept::Here(input.tensor.clone()),
        };
        let output = block(&Tape::off(), Var::constant(input.into_tensor()))?;
        Ok(self.push(output.into_tensor(), true, |slot| {
            Box::new(move |gradients| {
                let kept = match (kept, &aside) {
                    (Kept::Aside(place), Some(aside)) => aside.take(place)?,
                    (Kept::Here(tensor), _) => tensor,
                    (Kept::Aside(_), None) => {
                        unreachable!("invariant: only a tape that puts aside has places")
                    }
                };
                let Some(d_output) = gradients.take(slot) else { return Ok(()) };
                let inner = Tape { is_again: true, ..Tape::recording() };
                let leaf = match input_slot {
                    Some(_) => inner.leaf(kept),
                    None => Var::constant(kept),
                };
                let leaf_slot = leaf.slot;
                let again = block(&inner, leaf)?;
                let mut inner_gradients = inner.backward_of(again, d_output)?;
                let d_input = leaf_slot.and_then(|slot| inner_gradients.take(slot));
                match (input_slot, d_input) {
                    (Some(slot), Some(d_input)) => gradients.add(slot, d_input),
                    _ => Ok(()),
                }
            })
        }))
    }
}

impl Record {
    fn new_slot(&mut self) -> usize {
        self.slots += 1;
        self.slots - 1
    }
}
