//! One optimizer step: forward, backward, checks, clipping, update.

use std::sync::Arc;

use pmetal_engine::device::AdamWParameters;
use pmetal_engine::ops::{self, AdamWState, Dropout};
use pmetal_engine::{Category, Parameter, Tape, Tensor};

use crate::error::{Error, Result};
use crate::models::{Decoder, Forward, TokenRun};

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
    /// Whether activations are computed again in the backward pass.
    pub checkpointing: bool,
    /// Keys dropout.
    pub seed: u64,
}

impl Default for OptimizerSettings {
    fn default() -> Self {
        Self {
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            weight_decay: 0.0,
            max_gradient_norm: 1.0,
            checkpointing: false,
            seed: 0,
        }
    }
}

/// What one step did.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepReport {
    /// Sum of the losses over the number of trained tokens, in nats.
    pub loss: f64,
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
        Ok(Self { decoder, parameters, states, settings })
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
    /// depend on how the tokens were divided into micro-batches. When the step fails, parameters and moments are
    /// those from before it.
    ///
    /// # Errors
    /// [`Error::Diverged`] when a loss or gradient is not finite, naming step, rows and parameter;
    /// [`Error::Data`] when nothing is trained in the whole step; out of memory.
    pub fn step(&mut self, step: usize, learning_rate: f64, batches: &[MicroBatch]) -> Result<StepReport> {
        let trained_tokens: usize = batches.iter().map(MicroBatch::trained_tokens).sum();
        if trained_tokens == 0 {
            return Err(Error::Data(format!("step {}: none of its tokens is trained", step + 1)));
        }
        let outcome = self.gradients(step, batches, trained_tokens);
        let report = outcome.and_then(|(loss, tokens)| {
            let gradient_norm = self.checked_norm(step, batches)?;
            Ok(StepReport { loss, gradient_norm, tokens, trained_tokens })
        });
        if let Ok(report) = &report {
            self.update(step, learning_rate, report.gradient_norm)?;
        }
        self.parameters.iter().for_each(|parameter| parameter.clear_gradient());
        report
    }

    fn gradients(&self, step: usize, batches: &[MicroBatch], trained_tokens: usize) -> Result<(f64, usize)> {
        let (mut sum, mut tokens) = (0.0, 0);
        for (index, batch) in batches.iter().enumerate() {
            let tape = Tape::recording();
            let forward = Forward {
                checkpointing: self.settings.checkpointing,
                dropout: Some(Dropout {
                    seed: self.settings.seed,
                    // Micro-batches of one step must not share a mask.
                    step: (step * batches.len() + index) as u32,
                }),
                ..Forward::default()
            };
            let scale = 1.0 / trained_tokens as f32;
            let (states, loss) = self.decoder.loss(&tape, &batch.run, &batch.labels, scale, forward)?;
            if !loss.sum.is_finite() {
                return Err(Error::Diverged(format!(
                    "step {}: the loss of {} is {}",
                    step + 1,
                    rows_text(&batch.rows),
                    loss.sum
                )));
            }
            sum += loss.sum;
            tokens += batch.run.ids.len();
            if let Some(d_hidden) = loss.d_hidden {
                tape.backward(&states, d_hidden)?;
            }
        }
        Ok((sum / trained_tokens as f64, tokens))
    }

    fn checked_norm(&self, step: usize, batches: &[MicroBatch]) -> Result<f64> {
        let norm = ops::global_norm(&self.parameters);
        if norm.is_finite() {
            return Ok(norm);
        }
        let bad = self
            .parameters
            .iter()
            .find(|parameter| !ops::global_norm(std::slice::from_ref(parameter)).is_finite());
        let rows: Vec<usize> = batches.iter().flat_map(|batch| batch.rows.iter().copied()).collect();
        Err(Error::Diverged(format!(
            "step {}: the gradient of `{}` is not finite for {}",
            step + 1,
            bad.map_or("the sum of all parameters", |parameter| parameter.name()),
            rows_text(&rows)
        )))
    }

    fn update(&mut self, step: usize, learning_rate: f64, norm: f64) -> Result<()> {
        let settings = &self.settings;
        let gradient_scale = clipping_scale(norm, settings.max_gradient_norm);
        for (parameter, state) in self.parameters.iter().zip(&mut self.states) {
            let name = parameter.name();
            let decays = !name.ends_with(".bias") && !name.contains("norm");
            let constants = AdamWParameters {
                learning_rate,
                beta1: settings.beta1,
                beta2: settings.beta2,
                epsilon: settings.epsilon,
                weight_decay: if decays { settings.weight_decay } else { 0.0 },
                step: step as u32 + 1,
                gradient_scale,
            };
            ops::adamw_step(parameter, state, &constants)?;
        }
        Ok(())
    }

    /// Sum of losses and number of trained tokens of a batch, without training.
    ///
    /// # Errors
    /// Out of memory; a token beyond the vocabulary.
    pub fn evaluate(&self, batch: &MicroBatch) -> Result<(f64, usize)> {
        let (_, loss) =
            self.decoder.loss(&Tape::off(), &batch.run, &batch.labels, 1.0, Forward::default())?;
        Ok((loss.sum, loss.tokens))
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

/// What gradients of a total norm are multiplied by so that it is at most `limit`; 1 where the limit is 0.
///
/// As `clip_grad_norm_` of PyTorch, whose denominator carries 1e-6.
pub fn clipping_scale(norm: f64, limit: f64) -> f32 {
    if limit > 0.0 { (limit / (norm + 1e-6)).min(1.0) as f32 } else { 1.0 }
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
