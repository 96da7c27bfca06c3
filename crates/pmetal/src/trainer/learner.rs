//! One optimizer step: forward, backward, checks, clipping, update.

use std::sync::Arc;

use pmetal_engine::device::{AdamWControl, AdamWParameters, Recording, Sum};
use pmetal_engine::ops::{self, AdamWState, Dropout, Targets};
use pmetal_engine::{Category, Device, Error as EngineError, Parameter, Recompute, Tape, Tensor};

use crate::error::{Error, Result};
use crate::models::inputs::padded_labels;
use crate::models::{BalanceInputs, Decoder, Forward, Inputs, TokenRun};

/// Tokens of one forward pass with their targets.
#[derive(Debug, Clone)]
pub struct MicroBatch {
    /// Documents in one flat run.
    pub run: TokenRun,
    /// For each token the id that should follow, -100 where nothing is trained.
    pub labels: Vec<i32>,
    /// Rows of the dataset that the documents came from, for messages.
    pub rows: Vec<usize>,
}

impl MicroBatch {
    /// Tokens that are trained.
    pub fn trained_tokens(&self) -> usize {
        self.labels.iter().filter(|label| **label >= 0).count()
    }
}

/// Constants of the optimizer that do not change from step to step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct OptimizerSettings {
    /// Decay rate of the first moment.
    pub beta1: f64,
    /// Decay rate of the second moment.
    pub beta2: f64,
    /// Added to the denominator.
    pub epsilon: f64,
    /// Decoupled weight decay of everything but biases and norms.
    pub weight_decay: f64,
    /// Largest 2-norm of all gradients together; 0 = no clipping.
    pub max_gradient_norm: f64,
    /// What of a layer is kept for the backward pass.
    pub recompute: Recompute,
    /// Whether the inputs of layers wait in the host's memory, with [`Recompute::Full`] and on a device that can copy
    /// beside its other work.
    pub offloads: bool,
    /// Keys dropout.
    pub seed: u64,
    /// Whether steps are recorded and replayed on a device that can (a CUDA graph).
    pub records: bool,
}

impl Default for OptimizerSettings {
    fn default() -> Self {
        Self {
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            weight_decay: 0.0,
            max_gradient_norm: 1.0,
            recompute: Recompute::default(),
            offloads: false,
            seed: 0,
            records: true,
        }
    }
}

/// What one step did.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepReport {
    /// Sum of the losses over the number of trained tokens, in nats, with what balances experts.
    pub loss: f64,
    /// The loss that balances experts, before its coefficient; absent where there is none.
    pub balance_loss: Option<f64>,
    /// 2-norm of all gradients before clipping.
    pub gradient_norm: f64,
    /// Tokens that went through the model.
    pub tokens: usize,
    /// Tokens that were trained.
    pub trained_tokens: usize,
}

/// A decoder with its optimizer state.
pub struct Learner {
    decoder: Decoder,
    parameters: Vec<Arc<Parameter>>,
    states: Vec<AdamWState>,
    settings: OptimizerSettings,
    /// On devices other than a CPU, micro-batches are filled up to this many tokens, so that all have one shape.
    padded_tokens: usize,
    /// Tokens of the micro-batches of the last step that was not replayed.
    last_shape: Option<Vec<usize>>,
    recorded: Option<RecordedStep>,
    replayed_steps: usize,
}

/// What one optimizer step reads, in the device's memory.
struct StepInputs {
    batches: Vec<BatchInputs>,
    control: AdamWControl,
    masks: Masks,
}

/// What one micro-batch reads, in the device's memory.
struct BatchInputs {
    inputs: Arc<Inputs>,
    targets: Targets,
    balance: Option<BalanceInputs>,
}

impl BatchInputs {
    /// Gradients are those of sums over trained tokens until the optimizer divides, so a micro-batch's balance, which is a
    /// mean already, counts as often as it has trained tokens.
    fn new(decoder: &Decoder, batch: &MicroBatch, rows: usize) -> Result<Self> {
        let inputs = Arc::new(decoder.inputs(&batch.run, rows, None)?);
        let targets = decoder.targets(&batch.labels, rows)?;
        let balance = decoder.balance_inputs(batch.run.ids.len(), rows, batch.trained_tokens() as f32)?;
        Ok(Self { inputs, targets, balance })
    }

    /// Takes on another micro-batch in the same memory; false when that does not hold it.
    fn overwrite(&mut self, decoder: &Decoder, batch: &MicroBatch) -> Result<bool> {
        let Some(inputs) = Arc::get_mut(&mut self.inputs) else { return Ok(false) };
        if !decoder.overwrite_inputs(inputs, &batch.run)? {
            return Ok(false);
        }
        self.targets.set(&padded_labels(&batch.labels, inputs.rows()), decoder.spec.vocabulary)?;
        if let Some(balance) = &mut self.balance {
            balance.set(batch.run.ids.len(), batch.trained_tokens() as f32);
        }
        Ok(true)
    }
}

/// What masks of dropout depend on beside the micro-batch.
struct Masks {
    /// Micro-batches of all steps before.
    batches_before: u32,
    /// The same, u32 \[1\], where recordings read it.
    on_device: Option<Tensor>,
}

impl Masks {
    fn new(device: &Device, batches_before: u32) -> Result<Self> {
        let upload = || Tensor::from_slice(device, Category::Workspace, &[1], &[batches_before]);
        let on_device = if device.is_host() { None } else { Some(upload()?) };
        Ok(Self { batches_before, on_device })
    }

    fn set(&mut self, batches_before: u32) {
        self.batches_before = batches_before;
        if let Some(tensor) = &mut self.on_device {
            tensor.write_bytes(&batches_before.to_ne_bytes());
        }
    }

    /// Micro-batches of one step must not share a mask.
    fn of(&self, seed: u64, index: u32) -> Dropout {
        let before = if self.on_device.is_some() { 0 } else { self.batches_before };
        Dropout { seed, step: before.wrapping_add(index), steps_before: self.on_device.clone() }
    }
}

impl StepInputs {
    fn new(
        decoder: &Decoder,
        batches: &[MicroBatch],
        padded: &[usize],
        constants: AdamWParameters,
        batches_before: u32,
    ) -> Result<Self> {
        let each = batches.iter().zip(padded).map(|(batch, &rows)| BatchInputs::new(decoder, batch, rows));
        let control = AdamWControl::new(decoder.device(), constants)?;
        let masks = Masks::new(decoder.device(), batches_before)?;
        Ok(Self { batches: each.collect::<Result<_>>()?, control, masks })
    }
}

/// What one optimizer step sums up, where it was computed.
struct DeviceSums {
    /// Loss of each micro-batch.
    losses: Vec<Sum>,
    /// What balances experts, f32 \[1\] of each micro-batch, where something does.
    balances: Vec<Tensor>,
    /// Squares of all gradients.
    squares: Sum,
}

/// [`DeviceSums`] on the host.
struct StepSums {
    losses: Vec<f64>,
    balances: Vec<f64>,
    squares: f64,
}

impl DeviceSums {
    fn read(&self) -> Result<StepSums> {
        let losses = self.losses.iter().map(Sum::read).collect::<std::result::Result<_, _>>()?;
        let balances = self.balances.iter().map(|balance| Ok(f64::from(balance.to_vec::<f32>()?[0])));
        Ok(StepSums { losses, balances: balances.collect::<Result<_>>()?, squares: self.squares.read()? })
    }
}

/// A step that the device repeats by itself on whatever its inputs hold.
struct RecordedStep {
    recording: Recording,
    inputs: StepInputs,
    sums: DeviceSums,
}

impl RecordedStep {
    /// Puts other batches into the memory that the recording reads; false when they are of another shape.
    fn overwrite(
        &mut self,
        decoder: &Decoder,
        batches: &[MicroBatch],
        constants: AdamWParameters,
        batches_before: u32,
    ) -> Result<bool> {
        if batches.len() != self.inputs.batches.len() {
            return Ok(false);
        }
        for (batch, inputs) in batches.iter().zip(&mut self.inputs.batches) {
            if !inputs.overwrite(decoder, batch)? {
                return Ok(false);
            }
        }
        self.inputs.control.set(constants);
        self.inputs.masks.set(batches_before);
        Ok(true)
    }
}

impl Learner {
    /// Wraps a decoder that has something to train.
    ///
    /// # Errors
    /// [`Error::Usage`] when nothing is trainable; out of memory for the moments.
    pub fn new(decoder: Decoder, settings: OptimizerSettings) -> Result<Self> {
        let parameters = decoder.parameters();
        if parameters.is_empty() {
            return Err(Error::Usage(
                "nothing is trainable: the model has neither adapters nor parameters".into(),
            ));
        }
        let states = parameters
            .iter()
            .map(|parameter| AdamWState::new(parameter))
            .collect::<std::result::Result<_, _>>()?;
        let (last_shape, recorded) = (None, None);
        Ok(Self {
            decoder,
            parameters,
            states,
            settings,
            padded_tokens: 0,
            last_shape,
            recorded,
            replayed_steps: 0,
        })
    }

    /// Drops the recording of a step, so that the next one launches its kernels one by one.
    pub fn forget_recording(&mut self) {
        self.recorded = None;
        self.last_shape = None;
    }

    /// Fills micro-batches up to this many tokens on devices other than a CPU, so that steps are of one shape.
    pub fn pad_to(&mut self, tokens: usize) {
        self.padded_tokens = tokens;
    }

    /// Steps so far that were a recording's, not launched kernel by kernel.
    pub fn replayed_steps(&self) -> usize {
        self.replayed_steps
    }

    /// The decoder.
    pub fn decoder(&self) -> &Decoder {
        &self.decoder
    }

    /// Gives the decoder back without the optimizer.
    pub fn into_decoder(self) -> Decoder {
        self.decoder
    }

    /// What is trained, in the order of [`Self::state_tensors`].
    pub fn parameters(&self) -> &[Arc<Parameter>] {
        &self.parameters
    }

    /// One optimizer step over some micro-batches; `step` counts from 0.
    ///
    /// The loss is the sum over trained tokens divided by their number in the whole step, so that it does not
    /// depend on how the tokens were divided into micro-batches. What balances experts is computed for each micro-batch over
    /// its tokens, as `transformers` does for each forward pass, and its mean is taken with the numbers of trained tokens as
    /// weights: the step's loss is so the mean of what `transformers` gives for its micro-batches. When the step fails, parameters and moments are
    /// those from before it. On a device that records work, a step of a shape that came before is replayed at once.
    ///
    /// # Errors
    /// [`Error::Diverged`] when a loss or gradient is not finite, naming step, rows and parameter;
    /// [`Error::Data`] when nothing is trained in the whole step; out of memory.
    pub fn step(&mut self, step: usize, learning_rate: f64, batches: &[MicroBatch]) -> Result<StepReport> {
        let trained_tokens: usize = batches.iter().map(MicroBatch::trained_tokens).sum();
        if trained_tokens == 0 {
            return Err(Error::Data(format!("step {}: none of its tokens is trained", step + 1)));
        }
        let constants = self.constants(step, learning_rate, trained_tokens);
        let device = self.decoder.device().clone();
        device.memory().forget_shortage();
        let outcome = self.replay_or_compute(step, batches, constants);
        let outcome = outcome.map_err(|error| out_of_memory(&device, error));
        let outcome = outcome.and_then(|sums| self.report(step, batches, &sums, trained_tokens));
        self.parameters.iter().for_each(|parameter| parameter.clear_gradient());
        outcome
    }

    fn replay_or_compute(
        &mut self,
        step: usize,
        batches: &[MicroBatch],
        constants: AdamWParameters,
    ) -> Result<StepSums> {
        let batches_before = (step * batches.len()) as u32;
        if let Some(recorded) = &mut self.recorded
            && recorded.overwrite(&self.decoder, batches, constants, batches_before)?
        {
            recorded.recording.replay();
            self.replayed_steps += 1;
            return recorded.sums.read();
        }
        let device = self.decoder.device().clone();
        let padded: Vec<usize> = batches
            .iter()
            .map(|batch| if device.is_host() { 0 } else { self.padded_tokens }.max(batch.run.ids.len()))
            .collect();
        let inputs = StepInputs::new(&self.decoder, batches, &padded, constants, batches_before)?;
        let sums = self.compute(&inputs)?.read()?;
        let records = !device.is_host() && self.settings.records;
        let is_known = self.last_shape.as_ref() == Some(&padded);
        self.last_shape = Some(padded);
        if records && is_known && self.recorded.is_none() {
            // The second step of a shape: what it needs was compiled and allocated, and what follows is alike.
            let recorded = device.record(|| self.compute(&inputs))?;
            self.recorded = recorded.map(|(recording, sums)| RecordedStep { recording, inputs, sums });
        }
        Ok(sums)
    }

    /// Computes gradients and updates parameters; nothing is read back from a device.
    fn compute(&mut self, inputs: &StepInputs) -> Result<DeviceSums> {
        let device = self.decoder.device().clone();
        let (mut losses, mut balances) = (Vec::with_capacity(inputs.batches.len()), Vec::new());
        for (index, batch) in inputs.batches.iter().enumerate() {
            let tape = match self.settings.recompute {
                Recompute::None => Tape::keeping_all(),
                Recompute::Full if self.settings.offloads => Tape::recording().putting_aside(&device),
                Recompute::Cheap | Recompute::Full => Tape::recording(),
            };
            let balance = batch.balance.as_ref().map(BalanceInputs::begin).transpose()?;
            let forward = Forward {
                recompute: self.settings.recompute,
                dropout: Some(inputs.masks.of(self.settings.seed, index as u32)),
                balance: balance.clone(),
                ..Forward::default()
            };
            // The number of trained tokens divides once, in the optimizer.
            let (states, loss) = self.decoder.loss_of(&tape, &batch.inputs, &batch.targets, 1.0, forward)?;
            if let Some(balance) = balance {
                balances.push(balance.loss()?);
            }
            if let Some(d_hidden) = loss.d_hidden {
                tape.backward_of(states, d_hidden)?;
            }
            losses.push(loss.sum);
        }
        let squares = ops::sum_of_squares(&device, &self.parameters)?;
        let is_bad = |loss: &Sum| loss.read().is_ok_and(|loss| !loss.is_finite());
        if device.is_host() && losses.iter().any(is_bad) {
            return Ok(DeviceSums { losses, balances, squares });
        }
        let decays = |parameter: &Parameter| {
            !parameter.name().ends_with(".bias") && !parameter.name().contains("norm")
        };
        ops::adamw(&self.parameters, &mut self.states, &inputs.control, Some(&squares), decays)?;
        Ok(DeviceSums { losses, balances, squares })
    }

    fn report(
        &self,
        step: usize,
        batches: &[MicroBatch],
        sums: &StepSums,
        trained_tokens: usize,
    ) -> Result<StepReport> {
        for (batch, loss) in batches.iter().zip(&sums.losses) {
            if !loss.is_finite() {
                let rows = rows_text(&batch.rows);
                return Err(Error::Diverged(format!("step {}: the loss of {rows} is {loss}", step + 1)));
            }
        }
        let gradient_norm = sums.squares.sqrt() / trained_tokens as f64;
        if !gradient_norm.is_finite() {
            return Err(self.bad_gradient(step, batches));
        }
        let mut loss = sums.losses.iter().sum::<f64>() / trained_tokens as f64;
        let weighed = batches.iter().zip(&sums.balances);
        let balanced: f64 = weighed.map(|(batch, balance)| batch.trained_tokens() as f64 * balance).sum();
        let balance_loss = self.decoder.spec.balance().map(|balance| {
            let mean = balanced / trained_tokens as f64;
            loss += f64::from(balance.coefficient) * mean;
            mean
        });
        let tokens = batches.iter().map(|batch| batch.run.ids.len()).sum();
        Ok(StepReport { loss, balance_loss, gradient_norm, tokens, trained_tokens })
    }

    fn constants(&self, step: usize, learning_rate: f64, trained_tokens: usize) -> AdamWParameters {
        let settings = &self.settings;
        AdamWParameters {
            learning_rate,
            beta1: settings.beta1,
            beta2: settings.beta2,
            epsilon: settings.epsilon,
            weight_decay: settings.weight_decay,
            step: step as u32 + 1,
            gradient_scale: 1.0 / trained_tokens as f32,
            max_norm: settings.max_gradient_norm,
        }
    }

    fn bad_gradient(&self, step: usize, batches: &[MicroBatch]) -> Error {
        let is_bad = |parameter: &Parameter| match parameter.last_gradient().map(|held| held.to_f32_vec()) {
            Some(Ok(values)) => values.iter().any(|value| !value.is_finite()),
            Some(Err(_)) | None => false,
        };
        let bad = self.parameters.iter().find(|parameter| is_bad(parameter));
        let rows: Vec<usize> = batches.iter().flat_map(|batch| batch.rows.iter().copied()).collect();
        Error::Diverged(format!(
            "step {}: the gradient of `{}` is not finite for {}",
            step + 1,
            bad.map_or("the sum of all parameters", |parameter| parameter.name()),
            rows_text(&rows)
        ))
    }

    /// Sum of losses and number of trained tokens of a batch, without training and without what balances experts.
    ///
    /// # Errors
    /// Out of memory; a token beyond the vocabulary.
    pub fn evaluate(&self, batch: &MicroBatch) -> Result<(f64, usize)> {
        let device = self.decoder.device();
        device.memory().forget_shortage();
        let score = || -> Result<(f64, usize)> {
            let (_, loss) =
                self.decoder.loss(&Tape::off(), &batch.run, &batch.labels, 1.0, Forward::default())?;
            Ok((loss.sum.read()?, loss.tokens))
        };
        score().map_err(|error| out_of_memory(device, error))
    }

    /// Everything that a resumed run needs: parameters and both moments, by name, f32.
    pub fn state_tensors(&self) -> Vec<(String, Tensor)> {
        let mut tensors = Vec::with_capacity(3 * self.parameters.len());
        for (parameter, state) in self.parameters.iter().zip(&self.states) {
            tensors.push((format!("value.{}", parameter.name()), parameter.value()));
            tensors.push((format!("first.{}", parameter.name()), state.first.clone()));
            tensors.push((format!("second.{}", parameter.name()), state.second.clone()));
        }
        tensors
    }

    /// Puts back what [`Self::state_tensors`] gave; `read` returns the values of a name.
    ///
    /// # Errors
    /// What `read` returns; [`Error::Checkpoint`] when a tensor has another size.
    pub fn restore(&mut self, mut read: impl FnMut(&str) -> Result<Vec<f32>>) -> Result<()> {
        // Recorded work would go on with the tensors that are replaced.
        self.recorded = None;
        for (parameter, state) in self.parameters.iter().zip(&mut self.states) {
            let like = parameter.value();
            let mut tensor = |kind: &str, category: Category| -> Result<Tensor> {
                let name = format!("{kind}.{}", parameter.name());
                let values = read(&name)?;
                if values.len() != like.elements() {
                    return Err(Error::Checkpoint(format!(
                        "checkpoint tensor `{name}` has {} values, the model needs {}",
                        values.len(),
                        like.elements()
                    )));
                }
                Ok(Tensor::from_slice(like.device(), category, like.shape(), &values)?)
            };
            let value = tensor("value", Category::Parameters)?;
            state.first = tensor("first", Category::Optimizer)?;
            state.second = tensor("second", Category::Optimizer)?;
            parameter.set_value(value);
        }
        Ok(())
    }
}

/// Where scratch memory for a kernel was refused, the device fails later, at another place.
fn out_of_memory(device: &Device, error: Error) -> Error {
    match (device.memory().shortage(), error) {
        (Some(shortage), Error::Engine(EngineError::Driver { .. })) => Error::Engine(shortage.to_error()),
        (_, error) => error,
    }
}

/// "row 7" or "rows 7, 8, 9 and 3 more", counted from 1.
fn rows_text(rows: &[usize]) -> String {
    let listed: Vec<String> = rows.iter().take(8).map(|row| (row + 1).to_string()).collect();
    let more = rows.len().saturating_sub(listed.len());
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    match rows.len() {
        0 => "a batch of no dataset".to_owned(),
        1 => format!("row {}", listed[0]),
        _ => format!("rows {}{more}", listed.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pmetal_engine::DType;

    #[test]
    fn a_failure_behind_refused_memory_is_called_what_it_is() {
        let device = Device::cpu();
        let failure = || {
            Error::Engine(EngineError::Driver {
                device: "cuda",
                call: "attention_backward".to_owned(),
                reason: "no memory is left".to_owned(),
            })
        };
        assert!(matches!(out_of_memory(&device, failure()), Error::Engine(EngineError::Driver { .. })));
        device.memory().set_limit(Some(10));
        assert!(Tensor::zeros(&device, Category::Workspace, DType::F32, &[3]).is_err());
        let error = out_of_memory(&device, failure());
        assert_eq!(error.to_string(), "out of memory: 12 bytes for workspace on top of 0 bytes in use");
        let other = out_of_memory(&device, Error::Diverged("step 3".to_owned()));
        assert!(matches!(other, Error::Diverged(_)));
    }
}
