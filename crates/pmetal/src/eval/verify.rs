//! Comparing a model with numbers that another program computed for the same files.
//!
//! A fixture is a model folder with an `expected.safetensors` and perhaps an `adapter` folder. What may be in it:
//! `input_ids` \[B, T\] i64, `attention_mask` \[B, T\], `labels` \[B, T\] (-100 = not trained; scored by the logits
//! one position earlier), `logits` \[B, T, V\], `hidden.{i}` \[B, T, D\], `loss`, `grad.{tensor}`, `adapter.logits`,
//! `adapter.loss`, `adapter.grad.{tensor}`, `greedy` \[1, N\] after the first 8 ids of row 0, `dequant.{tensor}`,
//! `bf16.logits` \[B, T, V\] (the reference's own in bf16, whose error our bf16 logits may have twice).
//!
//! Losses and gradients include the loss that balances experts where the configuration asks for it (`output_router_logits`).
//!
//! In f32, logits are judged by their largest error as a share of their standard deviation. Hidden states are judged
//! row by row, the 2-norm of the error over that of the row: trained models hold a few tokens whose states are
//! hundreds of times as long as all others, whose rounding would drown a common measure.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use pmetal_engine::ops::CrossEntropy;
use pmetal_engine::{DType, Device, Parameter, Tape, Tensor, Var};
use pmetal_formats::checkpoint::Checkpoint;
use pmetal_formats::safetensors::SafetensorsFile;

use crate::error::{Error, Result};
use crate::generate::{Sampling, Session, StopRules};
use crate::lora::{self, experts::Stored};
use crate::models::loader::{self, LoadOptions};
use crate::models::{BalanceInputs, Decoder, Document, Forward, Spec, TokenRun};

/// Ids of row 0 that the greedy continuation starts from.
const GREEDY_PROMPT: usize = 8;
/// Largest error of logits and hidden states, as a share of their standard deviation, in f32.
const VALUE_TOLERANCE: f64 = 1e-4;
/// Largest relative error of a gradient tensor (2-norm), in f32.
const GRADIENT_TOLERANCE: f64 = 1e-3;
/// Largest relative error of a loss, in f32.
const LOSS_TOLERANCE: f64 = 1e-5;
/// Largest relative error (2-norm) of logits and hidden states with 16-bit activations. Random models of a few layers
/// amplify the rounding of 8 bits of mantissa to several percent, and its largest value has no useful bound: what is
/// good is told by `bf16.logits`, this only by how far a wrong computation is off.
const NARROW_VALUE_TOLERANCE: f64 = 0.1;
/// Largest relative error of a loss with 16-bit activations.
const NARROW_LOSS_TOLERANCE: f64 = 2e-2;
/// Largest relative error of a gradient tensor with 16-bit activations.
const NARROW_GRADIENT_TOLERANCE: f64 = 0.4;
/// By how much these three are larger where experts are chosen: rounding may choose others, and the gradients of what
/// chooses are small differences of large numbers.
const NARROW_CHOICE: f64 = 2.5;
/// How often the error of the reference's own bf16 logits ours may be, where the fixture holds those.
const NARROW_MULTIPLE: f64 = 2.0;
/// The quantity by which that is judged.
const NARROW_LOGITS: &str = "bf16.logits";

/// One compared quantity.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Comparison {
    /// Its name in the file.
    pub quantity: String,
    /// Largest absolute difference.
    pub max_abs_error: f64,
    /// The error that is judged: see `rule`.
    pub relative_error: f64,
    /// The largest relative error that passes.
    pub tolerance: f64,
    /// What the relative error is.
    pub rule: &'static str,
    /// Whether it passes.
    pub passed: bool,
}

/// What was compared for one fixture.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Report {
    /// The fixture's folder.
    pub fixture: String,
    /// Every quantity that the fixture holds.
    pub comparisons: Vec<Comparison>,
}

impl Report {
    /// Whether everything passed, and anything was compared at all.
    pub fn passed(&self) -> bool {
        !self.comparisons.is_empty() && self.comparisons.iter().all(|comparison| comparison.passed)
    }
}

/// Recomputes everything that a fixture holds and compares.
///
/// # Errors
/// When the fixture cannot be loaded or contradicts itself, or holds a quantity that this function does not know;
/// a wrong number is no error but a comparison that failed.
pub fn verify(folder: &Path, device: &Device, dtype: DType) -> Result<Report> {
    verify_model(folder, folder, device, dtype)
}

/// As [`verify`], of a model that lies elsewhere than the expected numbers: another form of the same weights.
///
/// # Errors
/// As [`verify`].
pub fn verify_model(model: &Path, folder: &Path, device: &Device, dtype: DType) -> Result<Report> {
    let (checkpoint, config) = loader::open(model)?;
    let load = |options| Ok(loader::load(&checkpoint, &config, device, options)?.decoder);
    compare(folder, &checkpoint, dtype, load)
}

/// As [`verify`] of hidden states, logits and loss alone, of a model that differs from the fixture's by what `change` does
/// to its specification: a fixture that does not notice is no proof of what was changed.
///
/// # Errors
/// As [`verify`].
pub fn verify_changed(folder: &Path, device: &Device, change: impl Fn(&mut Spec)) -> Result<Report> {
    let (checkpoint, config) = loader::open(folder)?;
    let mut spec = loader::spec_of(&checkpoint, &config)?;
    change(&mut spec);
    let decoder = loader::load_spec(&checkpoint, spec, device, DType::F32)?;
    let expected = Expected::open(folder)?;
    let (dtype, packed) = (DType::F32, BTreeSet::new());
    let mut check = Check { expected: &expected, dtype, packed, looser: 1.0, comparisons: Vec::new() };
    if let Some(batch) = expected.batch()? {
        check.values(&decoder, &batch, "")?;
        check.loss(&decoder, &batch, "")?;
    }
    Ok(Report { fixture: folder.display().to_string(), comparisons: check.comparisons })
}

/// Compares what a fixture holds with what a decoder computes, which is loaded frozen, then with all weights trained.
fn compare(
    folder: &Path,
    checkpoint: &Checkpoint,
    dtype: DType,
    load: impl Fn(LoadOptions) -> Result<Decoder>,
) -> Result<Report> {
    let expected = Expected::open(folder)?;
    let packed = loader::packed_weights(checkpoint);
    let mut check = Check { expected: &expected, dtype, packed, looser: 1.0, comparisons: Vec::new() };
    check.dequantised(checkpoint)?;
    let batch = expected.batch()?;

    let frozen = LoadOptions { dtype, train_all: false };
    let decoder = load(frozen)?;
    if !decoder.expert_matrices().is_empty() {
        check.looser = NARROW_CHOICE;
    }
    if let Some(batch) = &batch {
        check.values(&decoder, batch, "")?;
        check.loss(&decoder, batch, "")?;
        check.greedy(&decoder, batch)?;
        if expected.has_prefix("grad.") {
            let trained = LoadOptions { dtype, train_all: true };
            let decoder = load(trained)?;
            check.gradients(&decoder, batch, "", &BTreeMap::new())?;
        }
        if expected.has_prefix("adapter.") {
            let mut decoder = decoder;
            let parts = lora::read_for(&decoder, &folder.join("adapter"))?;
            let (_, experts) = lora::put(&mut decoder, parts, true)?;
            check.values(&decoder, batch, "adapter.")?;
            check.loss(&decoder, batch, "adapter.")?;
            check.gradients(&decoder, batch, "adapter.", &lora::stored_halves(&experts))?;
        }
    }
    let comparisons = check.comparisons;
    let known = |name: &str| {
        matches!(name, "input_ids" | "attention_mask" | "labels" | NARROW_LOGITS)
            || comparisons.iter().any(|comparison| comparison.quantity == name)
    };
    if let Some(name) =
        expected.file.tensors().iter().map(|info| info.name.as_str()).find(|name| !known(name))
    {
        return Err(Error::Checkpoint(format!(
            "{}: quantity `{name}` was not recomputed: its name or what it needs is not known",
            folder.display()
        )));
    }
    Ok(Report { fixture: folder.display().to_string(), comparisons })
}

/// The rows of a fixture as documents without their padding.
struct Batch {
    run: TokenRun,
    /// For each token of the run, its place in \[B, T\].
    places: Vec<usize>,
    /// For each token of the run, its target or -100.
    targets: Option<Vec<i32>>,
    first_row: Vec<u32>,
}

struct Expected {
    file: SafetensorsFile,
}

impl Expected {
    fn open(folder: &Path) -> Result<Self> {
        Ok(Self { file: SafetensorsFile::open(&folder.join("expected.safetensors"))? })
    }

    fn has(&self, name: &str) -> bool {
        self.file.info(name).is_some()
    }

    fn has_prefix(&self, prefix: &str) -> bool {
        self.file.tensors().iter().any(|info| info.name.starts_with(prefix))
    }

    fn integers(&self, name: &str) -> Result<Vec<i64>> {
        Ok(self.file.read_i64(name)?)
    }

    fn batch(&self) -> Result<Option<Batch>> {
        let Some(info) = self.file.info("input_ids") else { return Ok(None) };
        let [rows, length] = info.shape[..] else {
            return Err(Error::Checkpoint(format!(
                "`input_ids` has shape {:?}, expected [B, T]",
                info.shape
            )));
        };
        let ids = self.integers("input_ids")?;
        let optional = |name: &str| -> Result<Option<Vec<i64>>> {
            let Some(info) = self.file.info(name) else { return Ok(None) };
            if info.shape != [rows, length] {
                return Err(Error::Checkpoint(format!(
                    "`{name}` has shape {:?}, `input_ids` has [{rows}, {length}]",
                    info.shape
                )));
            }
            self.integers(name).map(Some)
        };
        let mask = optional("attention_mask")?.unwrap_or_else(|| vec![1; rows * length]);
        let labels = optional("labels")?;
        let (mut run, mut places) = (TokenRun { ids: Vec::new(), documents: Vec::new() }, Vec::new());
        let mut targets = labels.as_ref().map(|_| Vec::new());
        for row in 0..rows {
            let real: Vec<usize> = (0..length).filter(|t| mask[row * length + t] != 0).collect();
            let (Some(&first), Some(&last)) = (real.first(), real.last()) else { continue };
            if last + 1 - first != real.len() {
                return Err(Error::Checkpoint(format!("`attention_mask` of row {row} has a hole")));
            }
            run.documents.push(Document { tokens: real.len(), first_position: first, rope_length: length });
            for t in first..=last {
                places.push(row * length + t);
                let id = ids[row * length + t];
                run.ids.push(
                    u32::try_from(id)
                        .map_err(|_| Error::Checkpoint(format!("`input_ids` holds {id} in row {row}")))?,
                );
                if let (Some(targets), Some(labels)) = (&mut targets, &labels) {
                    targets.push(if t < last { labels[row * length + t + 1] as i32 } else { -100 });
                }
            }
        }
        let first_row = ids[..length.min(GREEDY_PROMPT)].iter().map(|&id| id as u32).collect();
        Ok(Some(Batch { run, places, targets, first_row }))
    }
}

struct Check<'a> {
    expected: &'a Expected,
    dtype: DType,
    /// Weights that are stored as blocks, which the reference does not train.
    packed: BTreeSet<String>,
    /// Factor on tolerances of 16-bit activations.
    looser: f64,
    comparisons: Vec<Comparison>,
}

impl Check<'_> {
    fn narrow(&self) -> bool {
        self.dtype != DType::F32
    }

    fn record(
        &mut self,
        quantity: String,
        rule: &'static str,
        max_abs_error: f64,
        relative_error: f64,
        tolerance: f64,
    ) {
        let passed = relative_error <= tolerance;
        self.comparisons.push(Comparison {
            quantity,
            max_abs_error,
            relative_error,
            tolerance,
            rule,
            passed,
        });
    }

    /// Compares rows of a \[T, W\] tensor with the rows of the expected \[B, T, W\] where there is no padding.
    fn rows(&mut self, quantity: String, actual: &Tensor, places: &[usize]) -> Result<()> {
        let wanted = self.expected.file.read_f32(&quantity)?;
        let (width, values) = (actual.columns(), actual.to_f32_vec()?);
        let whole =
            self.expected.file.info(&quantity).map_or(0, |info| info.shape.last().copied().unwrap_or(0));
        if whole != width || places.iter().any(|place| (place + 1) * width > wanted.len()) {
            return Err(Error::Checkpoint(format!(
                "`{quantity}` has rows of {whole}, the model gives {width}"
            )));
        }
        let kept: Vec<f64> = places
            .iter()
            .flat_map(|place| &wanted[place * width..(place + 1) * width])
            .map(|&value| f64::from(value))
            .collect();
        let differences = || values.iter().zip(&kept).map(|(a, b)| f64::from(*a) - b);
        // `max` would drop a NaN, which must fail.
        let error = largest(differences().map(f64::abs));
        let ratio = |off: &[f64], of: &[f64]| {
            let squares = |values: &[f64]| values.iter().map(|value| value * value).sum::<f64>();
            (squares(off) / squares(of)).sqrt()
        };
        let off: Vec<f64> = differences().collect();
        if self.narrow() {
            self.record(
                quantity,
                "2-norm of error / 2-norm",
                error,
                ratio(&off, &kept),
                NARROW_VALUE_TOLERANCE * self.looser,
            );
        } else if quantity.ends_with("logits") {
            let mean = kept.iter().sum::<f64>() / kept.len() as f64;
            let variance = kept.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / kept.len() as f64;
            let rule = "max error / standard deviation";
            self.record(quantity, rule, error, error / variance.sqrt(), VALUE_TOLERANCE);
        } else {
            let rows = off.chunks(width).zip(kept.chunks(width)).map(|(off, row)| ratio(off, row));
            self.record(
                quantity,
                "2-norm of error / 2-norm, worst row",
                error,
                largest(rows),
                VALUE_TOLERANCE,
            );
        }
        Ok(())
    }

    fn values(&mut self, decoder: &Decoder, batch: &Batch, prefix: &str) -> Result<()> {
        let logits = format!("{prefix}logits");
        if !self.expected.has(&logits) && !self.expected.has_prefix("hidden.") {
            return Ok(());
        }
        let mut hidden: BTreeMap<usize, Tensor> = BTreeMap::new();
        let mut observe = |index: usize, states: &Tensor| {
            hidden.insert(index, states.clone());
        };
        let forward = Forward { observer: Some(&mut observe), ..Forward::default() };
        let states = decoder.hidden(&Tape::off(), &batch.run, forward)?.into_tensor();
        for (index, states) in hidden {
            let quantity = format!("{prefix}hidden.{index}");
            if self.expected.has(&quantity) {
                self.rows(quantity, &states, &batch.places)?;
            }
        }
        if self.expected.has(&logits) {
            let ours = decoder.logits(&states)?;
            if self.narrow() && prefix.is_empty() && self.expected.has(NARROW_LOGITS) {
                self.beside_reference(&logits, &ours, &batch.places)?;
            }
            self.rows(logits, &ours, &batch.places)?;
        }
        Ok(())
    }

    /// Compares the error of our 16-bit logits with the error of the reference's, both against its f32 logits.
    fn beside_reference(&mut self, logits: &str, ours: &Tensor, places: &[usize]) -> Result<()> {
        let (exact, theirs) =
            (self.expected.file.read_f32(logits)?, self.expected.file.read_f32(NARROW_LOGITS)?);
        let (width, ours) = (ours.columns(), ours.to_f32_vec()?);
        let whole = places.iter().map(|place| (place + 1) * width).max().unwrap_or(0);
        if exact.len() != theirs.len() || whole > exact.len() {
            return Err(Error::Checkpoint(format!(
                "`{NARROW_LOGITS}` has {} values, `{logits}` has {}",
                theirs.len(),
                exact.len()
            )));
        }
        let kept = |values: &[f32]| -> Vec<f64> {
            places
                .iter()
                .flat_map(|place| &values[place * width..(place + 1) * width])
                .map(|&v| f64::from(v))
                .collect()
        };
        let (exact, theirs) = (kept(&exact), kept(&theirs));
        let our_error = largest(ours.iter().zip(&exact).map(|(a, b)| (f64::from(*a) - b).abs()));
        let their_error = largest(theirs.iter().zip(&exact).map(|(a, b)| (a - b).abs()));
        let rule = "max error / the reference's max error in bf16";
        self.record(NARROW_LOGITS.to_owned(), rule, our_error, our_error / their_error, NARROW_MULTIPLE);
        Ok(())
    }

    fn loss(&mut self, decoder: &Decoder, batch: &Batch, prefix: &str) -> Result<()> {
        let quantity = format!("{prefix}loss");
        let (true, Some(targets)) = (self.expected.has(&quantity), &batch.targets) else { return Ok(()) };
        let wanted = f64::from(self.expected.file.read_f32(&quantity)?.first().copied().unwrap_or(f32::NAN));
        let (_, loss, balance) = loss_of(decoder, &Tape::off(), batch, targets, 1.0)?;
        let error = (loss.sum.read()? / loss.tokens as f64 + balance - wanted).abs();
        let tolerance = if self.narrow() { NARROW_LOSS_TOLERANCE } else { LOSS_TOLERANCE };
        self.record(quantity, "error / loss", error, error / wanted.abs(), tolerance);
        Ok(())
    }

    /// Gradients of all parameters; `stored` tells of those that files hold otherwise.
    fn gradients(
        &mut self,
        decoder: &Decoder,
        batch: &Batch,
        prefix: &str,
        stored: &BTreeMap<String, Stored>,
    ) -> Result<()> {
        let prefix = format!("{prefix}grad.");
        let (true, Some(targets)) = (self.expected.has_prefix(&prefix), &batch.targets) else {
            return Ok(());
        };
        let trained = targets.iter().filter(|target| **target >= 0).count();
        let tape = Tape::recording();
        let scale = 1.0 / trained.max(1) as f32;
        let (states, loss, _) = loss_of(decoder, &tape, batch, targets, scale)?;
        if let Some(d_hidden) = loss.d_hidden {
            tape.backward(&states, d_hidden)?;
        }
        let parameters = decoder.parameters();
        let mut unlisted = Vec::new();
        for parameter in &parameters {
            let values = match parameter.gradient() {
                Some(gradient) => gradient.to_f32_vec()?,
                None => vec![0.0; parameter.value().elements()],
            };
            let tensors = match stored.get(parameter.name()) {
                Some(stored) => stored.gradients(&values),
                None => vec![(parameter.name().to_owned(), values)],
            };
            let quantities = tensors.into_iter().map(|(name, values)| (format!("{prefix}{name}"), values));
            let listed: Vec<_> = quantities.filter(|(quantity, _)| self.expected.has(quantity)).collect();
            if listed.is_empty() && !self.packed.contains(parameter.name()) {
                unlisted.push(parameter);
            }
            for (quantity, values) in listed {
                self.gradient(quantity, &values)?;
            }
        }
        let size = |parameter: &Parameter| -> Result<f64> {
            let values = parameter.gradient().map_or_else(|| Ok(Vec::new()), |g| g.to_f32_vec())?;
            Ok(values.iter().map(|&value| f64::from(value).powi(2)).sum::<f64>().sqrt())
        };
        // What the reference does not list gets no gradient there: ours may be what is left of sums that cancel.
        let all = parameters.iter().map(|parameter| size(parameter)).collect::<Result<Vec<_>>>()?;
        let usual = all.iter().sum::<f64>() / all.len().max(1) as f64;
        for parameter in unlisted {
            let (name, error) = (parameter.name(), size(parameter)?);
            let rule = "2-norm / mean 2-norm, not in the fixture";
            let tolerance = if self.narrow() { NARROW_LOSS_TOLERANCE } else { VALUE_TOLERANCE };
            self.record(format!("{prefix}{name}"), rule, error, error / usual, tolerance);
        }
        Ok(())
    }

    fn gradient(&mut self, quantity: String, actual: &[f32]) -> Result<()> {
        let wanted = self.expected.file.read_f32(&quantity)?;
        if actual.len() != wanted.len() {
            return Err(Error::Checkpoint(format!(
                "`{quantity}` has {} values, not {}",
                wanted.len(),
                actual.len()
            )));
        }
        let pairs = || actual.iter().zip(&wanted).map(|(a, b)| (f64::from(*a), f64::from(*b)));
        let error = pairs().map(|(a, b)| (a - b).powi(2)).sum::<f64>().sqrt();
        let norm = pairs().map(|(_, b)| b * b).sum::<f64>().sqrt();
        let relative = if norm == 0.0 { error } else { error / norm };
        let narrow = NARROW_GRADIENT_TOLERANCE * self.looser;
        let tolerance = if self.narrow() { narrow } else { GRADIENT_TOLERANCE };
        self.record(
            quantity,
            "2-norm of error / 2-norm",
            largest(pairs().map(|(a, b)| (a - b).abs())),
            relative,
            tolerance,
        );
        Ok(())
    }

    fn greedy(&mut self, decoder: &Decoder, batch: &Batch) -> Result<()> {
        if !self.expected.has("greedy") {
            return Ok(());
        }
        let wanted = self.expected.integers("greedy")?;
        let mut session = Session::new(decoder)?;
        let logits = session.extend(&batch.first_row)?;
        let rules = StopRules { tokens: Vec::new(), max_tokens: wanted.len() };
        let mut same = 0;
        session.generate(logits, &Sampling::default(), &rules, |token| {
            let is_same = i64::from(token) == wanted[same];
            same += usize::from(is_same);
            Ok(is_same)
        })?;
        let different = wanted.len() - same;
        let share = different as f64 / wanted.len().max(1) as f64;
        // 16-bit rounding may swap near-equal tokens; it is shown, not judged.
        let tolerance = if self.narrow() { 1.0 } else { 0.0 };
        self.record(
            "greedy".to_owned(),
            "share of tokens from the first difference on",
            share,
            share,
            tolerance,
        );
        Ok(())
    }

    fn dequantised(&mut self, checkpoint: &Checkpoint) -> Result<()> {
        let names: Vec<String> = self.expected.file.tensors().iter().map(|info| info.name.clone()).collect();
        for quantity in names.iter().filter(|name| name.starts_with("dequant.")) {
            let wanted = self.expected.file.read_f32(quantity)?;
            let actual = checkpoint.read_f32(&quantity["dequant.".len()..])?;
            let same = wanted.len() == actual.len()
                && wanted.iter().zip(&actual).all(|(a, b)| a.to_bits() == b.to_bits() || a == b);
            let error =
                largest(wanted.iter().zip(&actual).map(|(a, b)| (f64::from(*a) - f64::from(*b)).abs()));
            self.record(quantity.clone(), "any bit differs", error, if same { 0.0 } else { 1.0 }, 0.0);
        }
        Ok(())
    }
}

/// The states, the loss of a batch whose gradient is multiplied by `scale`, and what balances experts, its coefficient
/// included, which the reference adds to the mean of the loss.
fn loss_of(
    decoder: &Decoder,
    tape: &Tape,
    batch: &Batch,
    targets: &[i32],
    scale: f32,
) -> Result<(Var, CrossEntropy, f64)> {
    let tokens = batch.run.ids.len();
    let inputs = decoder.balance_inputs(tokens, tokens, 1.0)?;
    let balance = inputs.as_ref().map(BalanceInputs::begin).transpose()?;
    let forward = Forward { balance: balance.clone(), ..Forward::default() };
    let (states, loss) = decoder.loss(tape, &batch.run, targets, scale, forward)?;
    let added = match inputs.zip(balance) {
        Some((inputs, balance)) => {
            f64::from(inputs.coefficient()) * f64::from(balance.loss()?.to_f32_vec()?[0])
        }
        None => 0.0,
    };
    Ok((states, loss, added))
}

/// The largest of some numbers; NaN if one of them is.
fn largest(values: impl Iterator<Item = f64>) -> f64 {
    values.fold(0.0, |largest: f64, value| if value.is_nan() || value > largest { value } else { largest })
}
