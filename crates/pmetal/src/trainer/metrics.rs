//! `metrics.jsonl`: one JSON object a line, in the order of events.
//!
//! The first record is the header; `step` records follow, with an `eval` record after the step that it was made at.
//! A resumed run first drops every record beyond its checkpoint, so the file ends up the same as that of a run that
//! was never interrupted, except for what depends on the clock: `tokens_per_second` and `elapsed_s` (and `peak_bytes`,
//! which starts again with the process).

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use pmetal_formats::fs::{FileHandle, Fs};
use pmetal_formats::{Error as FormatError, atomic};
use serde::{Deserialize, Deserializer, Serialize};

use crate::error::{Error, Result};

/// A run of a million reports has about 300 MB; more is no metrics file.
const LIMIT_BYTES: u64 = 1 << 30;

/// The first record.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Header {
    /// The version of the program that began the run.
    pub version: String,
    /// The resolved configuration, by key.
    pub config: serde_json::Value,
}

/// One report of training. Sums and means are over the optimizer steps since the last report.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StepRecord {
    /// Optimizer steps that were finished; the first report of a run that reports each step has 1.
    pub step: u64,
    /// Mean loss per trained token, with what balances experts. Written as null when not finite.
    #[serde(deserialize_with = "null_is_nan")]
    pub loss: f64,
    /// The loss that balances experts, before its coefficient: of each micro-batch, weighed by its trained tokens. Only where
    /// the model's configuration asks for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub balance_loss: Option<f64>,
    /// Learning rate of the last step.
    pub lr: f64,
    /// Norm of all gradients before clipping, at the last step. Written as null when not finite.
    #[serde(deserialize_with = "null_is_nan")]
    pub grad_norm: f64,
    /// All tokens, trained or not and without padding, per second of wall-clock time.
    pub tokens_per_second: f64,
    /// Tokens that had a loss, since the beginning of the run.
    pub trained_tokens: u64,
    /// Tokens without padding, since the beginning of the run.
    pub tokens: u64,
    /// Most memory that the device held at once, since the process began.
    pub peak_bytes: u64,
    /// Seconds of training, those before an interruption included.
    pub elapsed_s: f64,
}

/// The result of one evaluation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EvalRecord {
    /// Optimizer steps that were finished.
    pub step: u64,
    /// Mean loss per trained token of the evaluation rows. Written as null when not finite.
    #[serde(deserialize_with = "null_is_nan")]
    pub eval_loss: f64,
}

/// A line of the file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum Record {
    /// Always the first line, and only that.
    Header(Header),
    /// A report of training.
    Step(StepRecord),
    /// An evaluation.
    Eval(EvalRecord),
}

impl Record {
    fn step(&self) -> u64 {
        match self {
            Self::Header(_) => 0,
            Self::Step(record) => record.step,
            Self::Eval(record) => record.step,
        }
    }
}

/// JSON has no NaN; a null where a number belongs is how serde_json writes one.
fn null_is_nan<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<f64, D::Error> {
    Ok(Option::<f64>::deserialize(deserializer)?.unwrap_or(f64::NAN))
}

/// What a checkpoint says of the evaluation that was due at its step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Due {
    /// It was made, or none was due.
    Done,
    /// It is to be made by the run that goes on.
    Again,
}

/// Appends records to `metrics.jsonl`. Each is one `write`, so a killed process leaves at most one torn line.
pub struct MetricsWriter {
    file: Box<dyn FileHandle>,
    path: PathBuf,
}

impl MetricsWriter {
    /// Starts the file of a new run; one that exists is replaced.
    ///
    /// # Errors
    /// [`Error::Format`] when it cannot be written.
    pub fn create(fs: Arc<dyn Fs>, path: &Path, header: Header) -> Result<Self> {
        let line = to_line(&Record::Header(header))?;
        atomic::write_file(&*fs, path, line.as_bytes())?;
        Self::append(&*fs, path)
    }

    /// Goes on with the file of a run that is resumed from a checkpoint of `step` finished steps.
    ///
    /// Keeps the header and the records up to and including that step, evaluations at it where they are done, and
    /// rewrites the file atomically if anything else is in it: later records, or a line that was torn by a kill and
    /// what follows it. Without a readable header the file is started again. Returns the number of bytes dropped too.
    ///
    /// # Errors
    /// [`Error::Format`] when the file cannot be read or rewritten.
    pub fn resume(fs: Arc<dyn Fs>, path: &Path, header: Header, step: u64, due: Due) -> Result<(Self, u64)> {
        if !fs.exists(path) {
            return Ok((Self::create(fs, path, header)?, 0));
        }
        let bytes = fs.read(path, LIMIT_BYTES).map_err(FormatError::io("read", path))?;
        let mut kept = Vec::with_capacity(bytes.len());
        for (line, record) in complete_records(&bytes) {
            let is_made_again =
                due == Due::Again && matches!(&record, Record::Eval(eval) if eval.step == step);
            if record.step() <= step && !is_made_again {
                kept.extend_from_slice(line);
            }
        }
        if kept.is_empty() {
            return Ok((Self::create(fs, path, header)?, bytes.len() as u64));
        }
        if kept != bytes {
            atomic::write_file(&*fs, path, &kept)?;
        }
        Ok((Self::append(&*fs, path)?, (bytes.len() - kept.len()) as u64))
    }

    fn append(fs: &dyn Fs, path: &Path) -> Result<Self> {
        let file = fs.open_append(path).map_err(FormatError::io("open", path))?;
        Ok(Self { file, path: path.to_owned() })
    }

    /// Appends a record and hands it to the operating system.
    ///
    /// # Errors
    /// [`Error::Format`] when the file takes no more bytes.
    pub fn write(&mut self, record: &Record) -> Result<()> {
        let line = to_line(record)?;
        let written = self.file.write_all(line.as_bytes()).and_then(|()| self.file.flush());
        Ok(written.map_err(FormatError::io("append to", &self.path))?)
    }

    /// Returns once all records would survive a loss of power; called before a checkpoint is committed.
    ///
    /// # Errors
    /// [`Error::Format`] when the file cannot be synced.
    pub fn sync(&mut self) -> Result<()> {
        Ok(self.file.sync_all().map_err(FormatError::io("sync", &self.path))?)
    }
}

/// The records of a file that may still be written: up to the first line that is torn or unreadable.
///
/// # Errors
/// [`Error::Format`] when the file cannot be read.
pub fn read(fs: &dyn Fs, path: &Path) -> Result<Vec<Record>> {
    let bytes = fs.read(path, LIMIT_BYTES).map_err(FormatError::io("read", path))?;
    Ok(complete_records(&bytes).map(|(_, record)| record).collect())
}

/// Lines with their line ends, and what they say, up to the first that is not whole; the first must be a header.
fn complete_records(bytes: &[u8]) -> impl Iterator<Item = (&[u8], Record)> {
    bytes.split_inclusive(|&byte| byte == b'\n').enumerate().map_while(|(index, line)| {
        let record: Record = serde_json::from_slice(line.strip_suffix(b"\n")?).ok()?;
        (matches!(record, Record::Header(_)) == (index == 0)).then_some((line, record))
    })
}

fn to_line(record: &Record) -> Result<String> {
    let mut line = serde_json::to_string(record)
        .map_err(|error| Error::Usage(format!("a metrics record cannot be written: {error}")))?;
    line.push('\n');
    Ok(line)
}

#[cfg(test)]
mod tests {
    use pmetal_formats::fs::RealFs;
    use pmetal_formats::fs::fault::{Fault, FaultFs};

    use super::*;

    fn header() -> Header {
        Header { version: "0.1.0".into(), config: serde_json::json!({ "seed": 0 }) }
    }

    fn step(step: u64) -> Record {
        Record::Step(StepRecord {
            step,
            loss: 1.0 / step as f64,
            balance_loss: step.is_multiple_of(2).then_some(2.5),
            lr: 2e-4,
            grad_norm: 0.1,
            tokens_per_second: 1234.5,
            trained_tokens: step * 10,
            tokens: step * 20,
            peak_bytes: 1 << 20,
            elapsed_s: step as f64,
        })
    }

    fn eval(step: u64) -> Record {
        Record::Eval(EvalRecord { step, eval_loss: 2.0 })
    }

    fn write_all(fs: Arc<dyn Fs>, path: &Path) -> Result<()> {
        let mut writer = MetricsWriter::create(fs, path, header())?;
        for record in [step(1), step(2), eval(2), step(3), step(4), eval(4)] {
            writer.write(&record)?;
        }
        writer.sync()
    }

    #[test]
    fn records_read_back_and_losses_that_are_not_finite_stay_so() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let mut writer = MetricsWriter::create(Arc::new(RealFs), &path, header()).unwrap();
        writer.write(&step(7)).unwrap();
        writer.write(&Record::Eval(EvalRecord { step: 7, eval_loss: f64::INFINITY })).unwrap();
        let found = read(&RealFs, &path).unwrap();
        assert_eq!(found[..2], [Record::Header(header()), step(7)]);
        assert!(matches!(&found[2], Record::Eval(record) if record.step == 7 && record.eval_loss.is_nan()));
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.starts_with(r#"{"kind":"header","version":"0.1.0","config":{"seed":0}}"#), "{text}");
    }

    #[test]
    fn resuming_drops_what_lies_beyond_the_checkpoint() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        write_all(Arc::new(RealFs), &path).unwrap();
        let whole = std::fs::read(&path).unwrap();
        let (mut writer, dropped) =
            MetricsWriter::resume(Arc::new(RealFs), &path, header(), 2, Due::Done).unwrap();
        assert!(dropped > 0);
        assert_eq!(read(&RealFs, &path).unwrap(), [Record::Header(header()), step(1), step(2), eval(2)]);
        for record in [step(3), step(4), eval(4)] {
            writer.write(&record).unwrap();
        }
        assert_eq!(std::fs::read(&path).unwrap(), whole, "as if it had never been interrupted");
        assert_eq!(MetricsWriter::resume(Arc::new(RealFs), &path, header(), 4, Due::Done).unwrap().1, 0);
        MetricsWriter::resume(Arc::new(RealFs), &path, header(), 4, Due::Again).unwrap();
        let kept = read(&RealFs, &path).unwrap();
        assert_eq!(kept[3..], [eval(2), step(3), step(4)], "an evaluation that is to be made again");
    }

    #[test]
    fn a_kill_at_every_operation_loses_at_most_a_torn_line() {
        let folder = tempfile::tempdir().unwrap();
        let whole_path = folder.path().join("whole");
        write_all(Arc::new(RealFs), &whole_path).unwrap();
        let whole = std::fs::read(&whole_path).unwrap();
        for at in 1..100 {
            let path = folder.path().join(format!("{at}"));
            let fs = FaultFs::with_fault(at, Fault::Kill);
            let result = write_all(Arc::new(fs.clone()), &path);
            if !fs.fired() {
                assert!(at > 10);
                return result.unwrap();
            }
            let kept = if path.exists() { read(&RealFs, &path).unwrap().len() } else { 0 };
            let (mut writer, _) =
                MetricsWriter::resume(Arc::new(RealFs), &path, header(), 100, Due::Done).unwrap();
            let all = [step(1), step(2), eval(2), step(3), step(4), eval(4)];
            for record in &all[kept.saturating_sub(1)..] {
                writer.write(record).unwrap();
            }
            assert_eq!(std::fs::read(&path).unwrap(), whole, "killed at operation {at}");
        }
        panic!("writing does not end");
    }

    #[test]
    fn a_file_without_a_header_is_started_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        for content in ["", "\n", "{}", "nonsense\n", "{\"kind\":\"eval\",\"step\":1,\"eval_loss\":1}\n"] {
            std::fs::write(&path, content).unwrap();
            let (_, dropped) =
                MetricsWriter::resume(Arc::new(RealFs), &path, header(), 5, Due::Done).unwrap();
            assert_eq!(dropped, content.len() as u64);
            assert_eq!(read(&RealFs, &path).unwrap(), [Record::Header(header())]);
        }
    }
}
