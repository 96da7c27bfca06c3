#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;
use std::ops::Range;

use half::bf16;

use super::Epilogue;
use super::convert::{Element, round_to_bf16};
#[cfg(target_arch = "x86_64")]
use super::convert::{narrowed, narrowed_avx512};
use super::level::SimdLevel;
use super::matrix::{ElementsMut, MatrixMut};
use super::tasks::Shared;

/// The output without its lifetime, so that tasks can write disjoint parts of it.
#[derive(Clone, Copy)]
enum Elements {
    F32(Shared<f32>),
    Bf16(Shared<bf16>),
}

/// The output and what happens to sums before they are stored there.
pub(super) struct Output<'a> {
    elements: Elements,
    stride: usize,
    epilogue: &'a Epilogue<'a>,
    level: SimdLevel,
    /// Whether the output is so large, and only written, that it had better go past the caches.
    is_streamed: bool,
}

/// Bytes from which on an output does not stay in the second-level caches of a few cores until it is read.
#[cfg(target_arch = "x86_64")]
const STREAMED_BYTES: usize = 16 << 20;

/// Makes what this thread stored past the caches visible before what it stores next.
#[cfg(target_arch = "x86_64")]
pub(super) fn finish_streams() {
    // SAFETY: every processor with vectors of the stores has the fence.
    unsafe { _mm_sfence() };
}

/// Columns that are finished at a time.
const WIDTH: usize = 16;

impl<'a> Output<'a> {
    /// The output, finished with the instructions of the level, which is available.
    pub(super) fn new(level: SimdLevel, out: &mut MatrixMut<'_>, epilogue: &'a Epilogue<'a>) -> Self {
        let elements = match &mut out.elements {
            ElementsMut::F32(values) => Elements::F32(Shared(values.as_mut_ptr())),
            ElementsMut::Bf16(values) => Elements::Bf16(Shared(values.as_mut_ptr())),
        };
        Output { elements, stride: out.row_stride, epilogue, level, is_streamed: false }
    }

    /// The same, past the caches if that pays, where the caller calls [`finish_streams`] on each thread at the end.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn streamed(self, rows: usize) -> Self {
        let is_large = rows.saturating_mul(self.stride) >= STREAMED_BYTES / size_of::<f32>();
        let is_streamed = match self.elements {
            Elements::F32(_) => is_large && self.level.has_avx512() && !self.epilogue.accumulate,
            Elements::Bf16(_) => false,
        };
        Output { is_streamed, ..self }
    }

    /// Rows of the output, if sums can be kept there until they are finished.
    pub(super) fn as_sums(&self) -> Option<(Shared<f32>, usize)> {
        match self.elements {
            Elements::F32(out) if !self.epilogue.accumulate && !self.is_streamed => Some((out, self.stride)),
            _ => None,
        }
    }

    /// Whether sums that are kept in the output need no finish.
    pub(super) fn is_plain(&self) -> bool {
        self.epilogue.scale == 1.0 && self.epilogue.bias.is_none()
    }

    /// Applies the epilogue to finished sums, row i of which starts at `sums + i * stride`.
    ///
    /// # Safety
    /// The rows and columns lie within the output and belong to the calling task; the sums may be read, and may be the
    /// output itself.
    pub(super) unsafe fn finish(
        &self,
        rows: Range<usize>,
        columns: Range<usize>,
        sums: *const f32,
        stride: usize,
    ) {
        for (i, row) in rows.enumerate() {
            let sums = sums.wrapping_add(i * stride);
            let mut done = 0;
            #[cfg(target_arch = "x86_64")]
            if self.level.has_avx512() {
                done = columns.len() / WIDTH * WIDTH;
                // SAFETY: granted by the caller; the level is only chosen where the processor has it.
                unsafe { self.finish_whole_avx512(row, columns.start, sums, done) };
            } else if self.level.has_avx2() {
                done = columns.len() / WIDTH * WIDTH;
                // SAFETY: granted by the caller; the level is only chosen where the processor has it.
                unsafe { self.finish_whole(row, columns.start, sums, done) };
            }
            while done < columns.len() {
                let count = WIDTH.min(columns.len() - done);
                let mut values = [0.0f32; WIDTH];
                // SAFETY: granted by the caller; a copy, because the sums may be the output.
                unsafe {
                    std::ptr::copy_nonoverlapping(sums.add(done), values.as_mut_ptr(), count);
                    self.finish_values(row, columns.start + done, &mut values[..count]);
                }
                done += count;
            }
        }
    }

    /// Does what [`Output::finish_values`] does for the first `count` columns, a multiple of [`WIDTH`].
    ///
    /// # Safety
    /// As for [`Output::finish`]; the processor has AVX2 and F16C.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn finish_whole(&self, row: usize, column: usize, sums: *const f32, count: usize) {
        let Epilogue { scale, bias, accumulate } = *self.epilogue;
        let bias = bias.map(|bias| bias[column..column + count].as_ptr());
        let factor = _mm256_set1_ps(scale);
        for start in (0..count).step_by(WIDTH) {
            let mut values = [_mm256_setzero_ps(); WIDTH / 8];
            let at = row * self.stride + column + start;
            for (i, value) in values.iter_mut().enumerate() {
                let lane = start + 8 * i;
                // SAFETY: granted by the caller, and the bias was seen to be long enough.
                unsafe {
                    *value = _mm256_loadu_ps(sums.add(lane));
                    if scale != 1.0 {
                        *value = _mm256_mul_ps(*value, factor);
                    }
                    if let Some(bias) = bias {
                        *value = _mm256_add_ps(*value, _mm256_loadu_ps(bias.add(lane)));
                    }
                    if accumulate {
                        let before = match self.elements {
                            Elements::F32(out) => f32::load(out.get().add(at + 8 * i)),
                            Elements::Bf16(out) => bf16::load(out.get().add(at + 8 * i)),
                        };
                        *value = _mm256_add_ps(*value, before);
                    }
                }
            }
            // SAFETY: granted by the caller; the sums were read above, should they be the output.
            unsafe {
                match self.elements {
                    Elements::F32(out) => {
                        for (i, &value) in values.iter().enumerate() {
                            _mm256_storeu_ps(out.get().add(at + 8 * i), value);
                        }
                    }
                    Elements::Bf16(out) => {
                        for (i, &[low, high]) in values.as_chunks::<2>().0.iter().enumerate() {
                            let narrow = narrowed(low, high);
                            _mm256_storeu_si256(out.get().add(at + 16 * i).cast(), narrow);
                        }
                    }
                }
            }
        }
    }

    /// Does what [`Output::finish_whole`] does.
    ///
    /// # Safety
    /// As for [`Output::finish`]; the processor has AVX-512 F, BW, DQ and VL.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
    unsafe fn finish_whole_avx512(&self, row: usize, column: usize, sums: *const f32, count: usize) {
        let Epilogue { scale, bias, accumulate } = *self.epilogue;
        let bias = bias.map(|bias| bias[column..column + count].as_ptr());
        let factor = _mm512_set1_ps(scale);
        for lane in (0..count).step_by(WIDTH) {
            let at = row * self.stride + column + lane;
            // SAFETY: granted by the caller, and the bias was seen to be long enough; the sums are read before the output
            // is written, should they be the same.
            unsafe {
                let mut values = _mm512_loadu_ps(sums.add(lane));
                if scale != 1.0 {
                    values = _mm512_mul_ps(values, factor);
                }
                if let Some(bias) = bias {
                    values = _mm512_add_ps(values, _mm512_loadu_ps(bias.add(lane)));
                }
                match self.elements {
                    Elements::F32(out) => {
                        let out = out.get().add(at);
                        if accumulate {
                            values = _mm512_add_ps(values, _mm512_loadu_ps(out));
                        }
                        if self.is_streamed && (out as usize).is_multiple_of(64) {
                            _mm512_stream_ps(out, values);
                        } else {
                            _mm512_storeu_ps(out, values);
                        }
                    }
                    Elements::Bf16(out) => {
                        let out = out.get().add(at).cast::<__m256i>();
                        if accumulate {
                            let bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(out));
                            values =
                                _mm512_add_ps(values, _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits)));
                        }
                        _mm256_storeu_si256(out, narrowed_avx512(values));
                    }
                }
            }
        }
    }

    /// Asks for rows of the output that are about to be written, so that they are at hand once their sums are.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn prefetch(&self, rows: Range<usize>, columns: Range<usize>) {
        if self.is_streamed {
            return;
        }
        let (first, last) = (columns.start, columns.end.saturating_sub(1));
        for row in rows {
            let address = |column: usize| match self.elements {
                Elements::F32(out) => out.get().wrapping_add(row * self.stride + column).cast::<i8>(),
                Elements::Bf16(out) => out.get().wrapping_add(row * self.stride + column).cast::<i8>(),
            };
            // SAFETY: a prefetch reads nothing.
            unsafe {
                _mm_prefetch::<_MM_HINT_ET0>(address(first));
                if (address(first) as usize ^ address(last) as usize) >= 64 {
                    _mm_prefetch::<_MM_HINT_ET0>(address(last));
                }
            }
        }
    }

    /// Applies the epilogue to finished sums of a row.
    ///
    /// # Safety
    /// The elements from `column` on lie within the output's row and belong to the calling task.
    pub(super) unsafe fn finish_values(&self, row: usize, column: usize, values: &mut [f32]) {
        let Epilogue { scale, bias, accumulate } = *self.epilogue;
        let count = values.len();
        if scale != 1.0 {
            for value in values.iter_mut() {
                *value *= scale;
            }
        }
        if let Some(bias) = bias {
            for (value, &bias) in values.iter_mut().zip(&bias[column..][..count]) {
                *value += bias;
            }
        }
        let at = row * self.stride + column;
        match self.elements {
            Elements::F32(out) => {
                // SAFETY: granted by the caller.
                let out = unsafe { std::slice::from_raw_parts_mut(out.get().add(at), values.len()) };
                if accumulate {
                    for (value, &out) in values.iter_mut().zip(out.iter()) {
                        *value += out;
                    }
                }
                out.copy_from_slice(values);
            }
            Elements::Bf16(out) => {
                // SAFETY: granted by the caller.
                let out = unsafe { std::slice::from_raw_parts_mut(out.get().add(at), values.len()) };
                if accumulate {
                    for (value, &out) in values.iter_mut().zip(out.iter()) {
                        *value += out.widen();
                    }
                }
                for (out, &value) in out.iter_mut().zip(values.iter()) {
                    *out = round_to_bf16(value);
                }
            }
        }
    }
}
