//! The place of a text that grows by one token a step, in its device's memory.

use crate::device::{AttentionMask, MaskKind, Segment};
use crate::error::{Error, Result, expect_dtype, expect_shape};
use crate::memory::Category;
use crate::ops::SampleOptions;
use crate::{DType, Device, Tensor};

/// Tokens that a cursor remembers.
const LOG: usize = 1024;

/// Everything that changes from one token of a text to the next, in the memory of a device other than a CPU: a step that
/// reads it and ends with [`sample`] can be recorded once and replayed for every token without the host.
#[derive(Debug)]
pub struct Cursor {
    /// u32 \[1\]: the token that goes through the model next.
    pub(crate) token: Tensor,
    /// u32 \[1\]: its position in the text.
    pub(crate) position: Tensor,
    /// u32 \[kinds of masks\]: its row of caches.
    pub(crate) rows: Tensor,
    /// i32 \[kinds of masks, 2\]: first and end of the rows of caches that it sees.
    pub(crate) ranges: Tensor,
    /// u32 \[kinds of masks, 2\]: keys of a window and of a chunk; 0 = all.
    pub(crate) limits: Tensor,
    /// u32 \[kinds of masks\]: position of the token in the first row of caches.
    pub(crate) firsts: Tensor,
    /// u32 \[[`LOG`]\]: tokens that were chosen.
    pub(crate) log: Tensor,
    /// u32 \[1\]: how many were chosen.
    pub(crate) drawn: Tensor,
    /// u32 \[V\]: how often each token came, where penalties need it.
    pub(crate) counts: Option<Tensor>,
    kinds: Vec<MaskKind>,
}

impl Cursor {
    /// A cursor for a text whose layers have these kinds of causal masks.
    ///
    /// # Errors
    /// [`Error::Unsupported`] on a CPU, and for a window or chunks of no key; out of memory.
    pub fn new(device: &Device, kinds: &[MaskKind]) -> Result<Self> {
        if device.is_host() {
            let reason = "steps are computed by the host".to_owned();
            return Err(Error::Unsupported { operation: "cursor", device: device.name(), reason });
        }
        kinds.iter().try_for_each(|kind| kind.check(device))?;
        let zeros = |dtype, count| Tensor::zeros(device, Category::Workspace, dtype, &[count]);
        let size = |keys: Option<usize>| keys.map_or(0, |keys| u32::try_from(keys).unwrap_or(u32::MAX));
        let limits: Vec<u32> = kinds.iter().flat_map(|kind| [size(kind.window), size(kind.chunk)]).collect();
        Ok(Self {
            token: zeros(DType::U32, 1)?,
            position: zeros(DType::U32, 1)?,
            rows: zeros(DType::U32, kinds.len())?,
            ranges: zeros(DType::I32, 2 * kinds.len())?,
            limits: Tensor::from_slice(device, Category::Workspace, &[limits.len()], &limits)?,
            firsts: zeros(DType::U32, kinds.len())?,
            log: zeros(DType::U32, LOG)?,
            drawn: zeros(DType::U32, 1)?,
            counts: None,
            kinds: kinds.to_vec(),
        })
    }

    /// Puts it on a token that is not in the caches yet, after `drawn` draws. Caches of the layers of each kind of mask
    /// hold the text from a position of `firsts` on, one token a row. `counts` are those of [`crate::ops::choose`], the
    /// token included.
    ///
    /// # Errors
    /// [`Error::Range`] where caches do not hold what the token sees; out of memory.
    pub fn place(
        &mut self,
        (token, position): (u32, usize),
        firsts: &[usize],
        drawn: u32,
        counts: Option<&[u32]>,
    ) -> Result<()> {
        expect_shape("cursor", "firsts", &[firsts.len()], &[self.kinds.len()])?;
        let (mut visible, mut rows) = (Vec::new(), Vec::new());
        for (kind, &first) in self.kinds.iter().zip(firsts) {
            let seen = kind.first_key(position);
            if first > seen {
                let what = "first token of a cache";
                return Err(Error::Range { operation: "cursor", what, actual: first, limit: seen + 1 });
            }
            visible.extend([seen - first, position + 1 - first].map(|row| row as i32));
            rows.push((position - first) as u32);
        }
        let firsts: Vec<u32> = firsts.iter().map(|&first| first as u32).collect();
        self.token.write_shared(&[token]);
        self.position.write_shared(&[position as u32]);
        self.rows.write_shared(&rows);
        self.ranges.write_shared(&visible);
        self.firsts.write_shared(&firsts);
        self.drawn.write_shared(&[drawn]);
        match (counts, &self.counts) {
            (None, _) => self.counts = None,
            (Some(counts), Some(held)) if held.elements() == counts.len() => held.write_shared(counts),
            (Some(counts), _) => {
                let device = self.token.device();
                self.counts = Some(Tensor::from_slice(device, Category::Workspace, &[counts.len()], counts)?);
            }
        }
        Ok(())
    }

    /// The token, u32 \[1\], as an input of a step.
    pub fn token(&self) -> Tensor {
        self.token.clone()
    }

    /// The position, u32 \[1\], as an input of a step.
    pub fn position(&self) -> Tensor {
        self.position.clone()
    }

    /// The row of caches of a kind, u32 \[1\], as an input of a step.
    ///
    /// # Errors
    /// [`Error::Range`] for a kind that was not given to [`Self::new`].
    pub fn row(&self, kind: usize) -> Result<Tensor> {
        self.rows.slice_rows(kind, 1)
    }

    /// The mask of a kind, for caches of `rows` rows; for forward passes alone.
    ///
    /// # Errors
    /// [`Error::Range`] for a kind that was not given to [`Self::new`].
    pub fn mask(&self, kind: usize, rows: usize) -> Result<AttentionMask> {
        let one = |index| self.ranges.slice_rows(index, 1);
        let (begin, end) = (one(2 * kind)?, one(2 * kind + 1)?);
        let segment = Segment { query_start: 0, query_length: 1, key_start: 0, key_length: rows };
        Ok(AttentionMask {
            kind: self.kinds[kind],
            segments: [segment].into(),
            // Nobody reads which queries see a key in a forward pass.
            ranges: Some([begin.clone(), end.clone(), begin, end]),
            tokens: [1, rows],
            choice: None,
        })
    }

    /// The most tokens that [`Self::chosen`] can return.
    pub const MOST_CHOSEN: usize = LOG;

    /// Tokens of draws `first` .. `first + count`, `None` where no logit was fit to choose by; waits for them.
    ///
    /// # Errors
    /// [`Error::Range`] for more than are remembered; [`Error::Driver`] when the device failed.
    pub fn chosen(&self, first: u32, count: usize) -> Result<Vec<Option<u32>>> {
        if count > LOG {
            return Err(Error::Range { operation: "cursor", what: "tokens", actual: count, limit: LOG + 1 });
        }
        let start = first as usize % LOG;
        let head = count.min(LOG - start);
        let mut tokens = self.log.slice_rows(start, head)?.to_vec::<u32>()?;
        if count > head {
            tokens.extend(self.log.slice_rows(0, count - head)?.to_vec::<u32>()?);
        }
        Ok(tokens.into_iter().map(|token| (token != u32::MAX).then_some(token)).collect())
    }
}

/// Chooses the next token from logits f32 \[1, V\] as [`crate::ops::choose`] does, and moves the cursor on to it.
///
/// # Errors
/// [`Error::Shape`] or [`Error::DType`] for other logits; [`Error::Unsupported`] for a device without such kernels; out
/// of memory.
pub fn sample(logits: &Tensor, options: &SampleOptions, cursor: &Cursor) -> Result<()> {
    expect_dtype("sample", "logits", logits.dtype(), DType::F32)?;
    expect_shape("sample", "logits", logits.shape(), &[1, logits.columns()])?;
    if let Some(counts) = &cursor.counts {
        expect_shape("sample", "counts", counts.shape(), &[logits.columns()])?;
    }
    logits.device().kernels().sample(logits, options, cursor)
}
