//! Datasets: from rows of a file to batches of tokens with targets.
//!
//! [`load`] reads the files, detects what the columns mean ([`Layout`]), renders and tokenises every row
//! ([`EncodeOptions`] says what is trained), applies the length policy and splits off what is evaluated.
//! [`BatchPlan`] turns the examples into batches, each a function of (data, seed, number) alone.

mod batch;
pub mod chat;
mod encode;
mod layout;
mod order;
mod packing;

use std::path::{Path, PathBuf};

use pmetal_formats::rows::{DatasetFiles, OnBadRow, Row, Rows, Skipped};
use rayon::prelude::*;
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};

pub use batch::{BatchOptions, BatchPlan, NO_TARGET, PackedBatch};
pub use chat::{ChatForm, ChatFormat};
pub use encode::{EncodeOptions, Example, Remarks, TrainOn};
pub use layout::{Content, Conversation, DETECTION_ROWS, Layout};
pub use order::Permutation;
pub use packing::first_fit_decreasing;

/// Rows that are encoded together, on all threads.
const CHUNK_ROWS: usize = 2048;
/// How many faults and how many rows without training are named.
const NAMED: usize = 20;

/// What happens to an example that is longer than `max_seq_len`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnLong {
    /// Its end is cut off.
    #[default]
    Truncate,
    /// It is left out.
    Drop,
    /// It is an error.
    Error,
}

/// How a dataset is read.
#[derive(Debug, Clone, PartialEq)]
pub struct DataOptions {
    /// What the columns mean; detected when not given.
    pub layout: Option<Layout>,
    /// How rows become examples.
    pub encode: EncodeOptions,
    /// What happens to rows that are broken or do not fit the layout.
    pub on_bad_row: OnBadRow,
    /// What happens to long examples.
    pub on_long: OnLong,
    /// The most tokens of an example; 0 for the length that 99.5 % of the examples do not exceed.
    pub max_seq_len: usize,
    /// The most tokens that the model takes.
    pub model_limit: Option<usize>,
    /// The share of the training examples that is evaluated instead, where the dataset has no file for that.
    pub eval_fraction: f64,
    /// Keys the split.
    pub seed: u64,
}

impl Default for DataOptions {
    fn default() -> Self {
        Self {
            layout: None,
            encode: EncodeOptions::default(),
            on_bad_row: OnBadRow::Error,
            on_long: OnLong::Truncate,
            max_seq_len: 0,
            model_limit: None,
            eval_fraction: 0.0,
            seed: 0,
        }
    }
}

/// What became of the rows of one part of a dataset.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PartReport {
    /// The file.
    pub path: PathBuf,
    /// Rows that were read, the skipped ones included.
    pub rows: usize,
    /// Rows that were left out because they are broken or do not fit.
    pub skipped: Skipped,
    /// Examples whose end was cut off.
    pub truncated: usize,
    /// Trained tokens that were cut off with it.
    pub trained_tokens_cut: usize,
    /// Examples that were left out because they are long.
    pub dropped_long: usize,
    /// Examples that were left out because no token of theirs is trained.
    pub without_training: usize,
    /// The lines of the first of these.
    pub without_training_lines: Vec<usize>,
    /// Examples that are left.
    pub examples: usize,
    /// Tokens of these.
    pub tokens: usize,
    /// Trained tokens of these.
    pub trained_tokens: usize,
    /// The longest row before any cut, in tokens.
    pub longest: usize,
}

/// Examples, and what happened on the way to them.
#[derive(Debug, Clone)]
pub struct Dataset {
    /// What is trained on.
    pub train: Vec<Example>,
    /// What is evaluated; empty when there is none.
    pub eval: Vec<Example>,
    /// What the columns mean.
    pub layout: Layout,
    /// The most tokens of an example.
    pub max_seq_len: usize,
    /// The training file, before examples were split off.
    pub train_report: PartReport,
    /// The evaluation file, where there is one.
    pub eval_report: Option<PartReport>,
    /// Lines for the user: what fell back, what was cut.
    pub notes: Vec<String>,
    /// sha256 over all ids and which are trained: another file, tokenizer, template or option gives another.
    pub fingerprint: String,
}

impl Dataset {
    /// One line, such as `chat (messages), 5120 rows, 3 skipped`.
    pub fn description(&self) -> String {
        let mut text = format!("{}, {} rows", self.layout, self.train_report.rows);
        if self.train_report.skipped.count > 0 {
            text.push_str(&format!(", {} skipped", self.train_report.skipped.count));
        }
        text
    }
}

/// Reads a dataset: a file, or a folder with `train.jsonl` and maybe `valid.jsonl`.
///
/// Rows are streamed; the token ids of all examples are held in memory.
///
/// # Errors
/// [`Error::Usage`] when options contradict each other; [`Error::Data`] naming file and line when rows cannot be used,
/// an example is too long for [`OnLong::Error`], or nothing at all is trained; what reading the files returns.
pub fn load(path: &Path, format: &ChatFormat<'_>, options: &DataOptions) -> Result<Dataset> {
    check(options)?;
    let files = DatasetFiles::resolve(path)?;
    let mut reader = Reader { format, options, layout: options.layout.clone(), remarks: Counted::default() };
    let (mut train, mut train_report) = reader.read(&files.train)?;
    let max_seq_len = window(&train, options);
    apply_lengths(&mut train, &mut train_report, max_seq_len, options)?;
    let (mut eval, mut eval_report) = (Vec::new(), None);
    if let Some(valid) = &files.valid {
        let (mut examples, mut report) = reader.read(valid)?;
        apply_lengths(&mut examples, &mut report, max_seq_len, options)?;
        eval = examples;
        eval_report = Some(report);
    } else if options.eval_fraction > 0.0 {
        (train, eval) = split(train, options.eval_fraction, options.seed)?;
    }
    let layout = reader.layout.clone().ok_or_else(|| Error::Data("the dataset holds no rows".to_owned()))?;
    let mut notes: Vec<String> = Vec::new();
    notes.extend(reader.form_note(&layout));
    notes.extend(reader.remarks.notes());
    for report in std::iter::once(&train_report).chain(&eval_report) {
        notes.extend(report_notes(report, max_seq_len));
    }
    let fingerprint = fingerprint(train.iter().chain(&eval));
    Ok(Dataset { train, eval, layout, max_seq_len, train_report, eval_report, notes, fingerprint })
}

fn check(options: &DataOptions) -> Result<()> {
    if !(0.0..1.0).contains(&options.eval_fraction) {
        let fraction = options.eval_fraction;
        return Err(Error::Usage(format!(
            "the evaluated share is {fraction}, it must be at least 0 and less than 1"
        )));
    }
    if let Some(limit) = options.model_limit
        && options.max_seq_len > limit
    {
        let length = options.max_seq_len;
        return Err(Error::Usage(format!("max_seq_len is {length}, the model takes at most {limit} tokens")));
    }
    if options.max_seq_len == 1 {
        return Err(Error::Usage("max_seq_len is 1, with which no token has a predecessor".to_owned()));
    }
    Ok(())
}

/// How often each remark was made.
#[derive(Default)]
struct Counted {
    history_rewritten: usize,
    prompt_differs: usize,
    boundary_merged: usize,
    built_in_form: usize,
}

impl Counted {
    fn add(&mut self, remarks: Remarks) {
        self.history_rewritten += usize::from(remarks.history_rewritten);
        self.prompt_differs += usize::from(remarks.prompt_differs);
        self.boundary_merged += usize::from(remarks.boundary_merged);
        self.built_in_form += usize::from(remarks.built_in_form);
    }

    fn notes(&self) -> Vec<String> {
        let lines = [
            (
                self.history_rewritten,
                "rows: the chat template renders earlier answers differently once others follow, so only the last answer is trained",
            ),
            (
                self.prompt_differs,
                "rows: the chat template's generation prompt is not what it writes before the answers; they are trained in the context that it writes",
            ),
            (
                self.boundary_merged,
                "rows: the prompt's tokens are not a beginning of the whole's; training starts where they part",
            ),
        ];
        lines.iter().filter(|(count, _)| *count > 0).map(|(count, text)| format!("{count} {text}")).collect()
    }
}

struct Reader<'a> {
    format: &'a ChatFormat<'a>,
    options: &'a DataOptions,
    layout: Option<Layout>,
    remarks: Counted,
}

impl Reader<'_> {
    fn form_note(&self, layout: &Layout) -> Option<String> {
        if self.remarks.built_in_form == 0 {
            return None;
        }
        self.format.note(matches!(layout, Layout::Instruction { .. }))
    }

    fn read(&mut self, path: &Path) -> Result<(Vec<Example>, PartReport)> {
        let mut rows = Rows::open_with(path, self.options.on_bad_row).map_err(rejected)?;
        let mut report = PartReport { path: path.to_owned(), ..PartReport::default() };
        let mut examples = Vec::new();
        loop {
            let chunk = rows.by_ref().take(CHUNK_ROWS).collect::<pmetal_formats::Result<Vec<Row>>>();
            let chunk = chunk.map_err(rejected)?;
            if chunk.is_empty() {
                break;
            }
            report.rows += chunk.len();
            let layout = match &self.layout {
                Some(layout) => layout.clone(),
                None => Layout::detect(&chunk)
                    .map_err(|message| Error::Data(format!("`{}`: {message}", path.display())))?,
            };
            self.layout = Some(layout.clone());
            self.encode_chunk(path, &layout, &chunk, &mut examples, &mut report)?;
        }
        report.rows += rows.skipped().count;
        let mut skipped = rows.skipped().clone();
        let room = NAMED.saturating_sub(skipped.messages.len());
        skipped.messages.extend(report.skipped.messages.drain(..).take(room));
        skipped.count += report.skipped.count;
        report.skipped = skipped;
        Ok((examples, report))
    }

    fn encode_chunk(
        &mut self,
        path: &Path,
        layout: &Layout,
        chunk: &[Row],
        examples: &mut Vec<Example>,
        report: &mut PartReport,
    ) -> Result<()> {
        let (format, options) = (self.format, self.options.encode);
        let encoded: Vec<_> = chunk
            .par_iter()
            .map(|row| layout.content(row).and_then(|content| encode::encode(format, &content, options)))
            .collect();
        let mut faults = Skipped::default();
        for (row, outcome) in chunk.iter().zip(encoded) {
            match outcome {
                Ok(encoded) => {
                    self.remarks.add(encoded.remarks);
                    examples.push(Example { ids: encoded.ids, trained: encoded.trained, line: row.line });
                }
                Err(fault) => faults.add(format!("`{}`, line {}: {fault}", path.display(), row.line)),
            }
        }
        if self.options.on_bad_row == OnBadRow::Error && faults.count > 0 {
            let unnamed = faults.count - faults.messages.len();
            let rest = if unnamed > 0 { format!("\n... and {unnamed} more rows") } else { String::new() };
            return Err(Error::Data(format!("{}{rest}", faults.messages.join("\n"))));
        }
        for message in faults.messages {
            report.skipped.add(message);
            faults.count -= 1;
        }
        report.skipped.count += faults.count;
        Ok(())
    }
}

/// A file that holds no rows is bad data; one that cannot be read may be good.
fn rejected(error: pmetal_formats::Error) -> Error {
    match error {
        error @ pmetal_formats::Error::Io { .. } => Error::Format(error),
        error => Error::Data(error.to_string()),
    }
}

/// The window: what the options say, or what holds 99.5 % of the examples, never more than the model takes.
fn window(examples: &[Example], options: &DataOptions) -> usize {
    if options.max_seq_len > 0 {
        return options.max_seq_len;
    }
    let mut lengths: Vec<usize> = examples.iter().map(|example| example.ids.len()).collect();
    lengths.sort_unstable();
    // Nearest rank; with an error for long examples, only what the model cannot take is long.
    let rank =
        if options.on_long == OnLong::Error { lengths.len() } else { (lengths.len() * 995).div_ceil(1000) };
    let length = lengths.get(rank.saturating_sub(1)).copied().unwrap_or(0);
    length.min(options.model_limit.unwrap_or(usize::MAX)).max(2)
}

/// Cuts, drops or refuses long examples, drops those without training, and counts what is left.
fn apply_lengths(
    examples: &mut Vec<Example>,
    report: &mut PartReport,
    limit: usize,
    options: &DataOptions,
) -> Result<()> {
    let path = report.path.display().to_string();
    let mut too_long = None;
    examples.retain_mut(|example| {
        let length = example.ids.len();
        report.longest = report.longest.max(length);
        if length > limit {
            match options.on_long {
                OnLong::Truncate => {
                    let before = example.trained_tokens();
                    example.ids.truncate(limit);
                    example.trained.truncate(limit);
                    report.truncated += 1;
                    report.trained_tokens_cut += before - example.trained_tokens();
                }
                OnLong::Drop => {
                    report.dropped_long += 1;
                    return false;
                }
                OnLong::Error => {
                    too_long.get_or_insert((example.line, length));
                    return false;
                }
            }
        }
        let trained = example.trained_tokens();
        if trained == 0 {
            report.without_training += 1;
            if report.without_training_lines.len() < NAMED {
                report.without_training_lines.push(example.line);
            }
            return false;
        }
        report.tokens += example.ids.len();
        report.trained_tokens += trained;
        true
    });
    report.examples = examples.len();
    if let Some((line, length)) = too_long {
        return Err(Error::Data(format!(
            "`{path}`, line {line}: the row has {length} tokens, at most {limit} are allowed"
        )));
    }
    if examples.is_empty() {
        return Err(Error::Data(format!(
            "`{path}`: nothing is trained: of {} rows {} were skipped, {} are too long and {} have no trained token",
            report.rows, report.skipped.count, report.dropped_long, report.without_training
        )));
    }
    Ok(())
}

fn report_notes(report: &PartReport, limit: usize) -> Vec<String> {
    let path = report.path.display();
    let mut notes = Vec::new();
    if report.skipped.count > 0 {
        let first = report.skipped.messages.first().map_or("", String::as_str);
        notes.push(format!(
            "`{path}`: {} rows were skipped, the first because: {first}",
            report.skipped.count
        ));
    }
    if report.truncated > 0 {
        notes.push(format!(
            "`{path}`: {} rows were cut to {limit} tokens (the longest has {}), losing {} trained tokens",
            report.truncated, report.longest, report.trained_tokens_cut
        ));
    }
    if report.dropped_long > 0 {
        notes.push(format!(
            "`{path}`: {} rows of more than {limit} tokens were left out",
            report.dropped_long
        ));
    }
    if report.without_training > 0 {
        let lines: Vec<String> = report.without_training_lines.iter().map(usize::to_string).collect();
        notes.push(format!(
            "`{path}`: {} rows have no trained token and were left out (lines {}{})",
            report.without_training,
            lines.join(", "),
            if report.without_training > lines.len() { ", ..." } else { "" }
        ));
    }
    notes
}

/// Moves a share of the examples, chosen by the seed, to evaluation; both parts keep the order of the file.
fn split(examples: Vec<Example>, fraction: f64, seed: u64) -> Result<(Vec<Example>, Vec<Example>)> {
    let count = ((examples.len() as f64 * fraction).ceil() as usize).max(1);
    if count >= examples.len() {
        return Err(Error::Data(format!(
            "{count} of {} examples would be evaluated, which leaves none to train on",
            examples.len()
        )));
    }
    let order = Permutation::new(seed, 0, "data.split", examples.len());
    let mut evaluated = vec![false; examples.len()];
    for position in 0..count {
        evaluated[order.at(position)] = true;
    }
    let (mut train, mut eval) = (Vec::with_capacity(examples.len() - count), Vec::with_capacity(count));
    for (example, evaluated) in examples.into_iter().zip(evaluated) {
        if evaluated { eval.push(example) } else { train.push(example) }
    }
    Ok((train, eval))
}

/// sha256 over the ids of the examples and which of them are trained.
fn fingerprint<'a>(examples: impl Iterator<Item = &'a Example>) -> String {
    let mut hasher = Sha256::new();
    let mut bytes = Vec::new();
    for example in examples {
        bytes.clear();
        bytes.extend_from_slice(&(example.ids.len() as u64).to_le_bytes());
        for (id, trained) in example.ids.iter().zip(&example.trained) {
            bytes.extend_from_slice(&id.to_le_bytes());
            bytes.push(u8::from(*trained));
        }
        hasher.update(&bytes);
    }
    hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}
