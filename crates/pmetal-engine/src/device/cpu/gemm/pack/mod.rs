//! Copies of operands in the order in which the kernels read them: panels of a few lanes (rows of the left operand or
//! columns of the right one), k by k.

#[cfg(target_arch = "x86_64")]
mod avx2;

use super::convert::{Element, Packed, round_to_bf16};
use super::level::SimdLevel;
use super::matrix::{Elements, MatrixRef};

/// Where the packed copy of one panel goes: `width` lanes of the range `k` of the concatenated K axis.
pub(in crate::device::cpu) struct Panel<'a, P> {
    /// K rounded up to the packed group, times the width.
    pub(in crate::device::cpu) packed: &'a mut [P],
    pub(in crate::device::cpu) width: usize,
    pub(in crate::device::cpu) first_lane: usize,
    pub(in crate::device::cpu) k: std::ops::Range<usize>,
    /// Whether values are rounded to bf16 even if they are packed wider.
    pub(in crate::device::cpu) round: bool,
    pub(in crate::device::cpu) level: SimdLevel,
}

/// Packs one panel from `sources` [lanes, K_i], concatenated along K. Lanes and k beyond the matrices are zeros, whose
/// products only reach sums that nobody reads, or add zero.
pub(in crate::device::cpu) fn pack<'s, P: Packed>(
    sources: impl Iterator<Item = MatrixRef<'s>>,
    mut panel: Panel<'_, P>,
) {
    let mut start = 0;
    let length = panel.k.len();
    for source in sources {
        let end = start + source.columns;
        let from = panel.k.start.max(start);
        let to = panel.k.end.min(end);
        if from < to {
            let lanes = panel.width.min(source.rows - panel.first_lane);
            let part = source.part(panel.first_lane..panel.first_lane + lanes, from - start..to - start);
            let at = from - panel.k.start;
            match part.elements {
                Elements::F32(values) => pack_part(values, part, &mut panel, at),
                Elements::Bf16(values) => pack_part(values, part, &mut panel, at),
                Elements::F16(values) => pack_part(values, part, &mut panel, at),
            }
        }
        start = end;
    }
    if !length.is_multiple_of(P::GROUP) {
        for lane in 0..panel.width {
            panel.packed[(length / P::GROUP * panel.width + lane) * P::GROUP + length % P::GROUP] =
                P::zeroed();
        }
    }
}

/// Packs `part` from column `at` of the panel on.
fn pack_part<E: Element, P: Packed>(values: &[E], part: MatrixRef<'_>, panel: &mut Panel<'_, P>, at: usize) {
    let mut done = 0;
    #[cfg(target_arch = "x86_64")]
    if panel.level.has_avx2() {
        // SAFETY: the level is only chosen where the processor has AVX2, FMA and F16C.
        done = unsafe { avx2::pack_part(values, part, panel, at) };
    }
    let width = panel.width;
    for k in done..part.columns {
        let column = at + k;
        let base = column / P::GROUP * width * P::GROUP + column % P::GROUP;
        for lane in 0..width {
            let mut value = 0.0;
            if lane < part.rows {
                value = values[part.offset + lane * part.row_stride + k * part.column_stride].widen();
                if panel.round && P::GROUP == 1 {
                    value = round_to_bf16(value).widen();
                }
            }
            panel.packed[base + lane * P::GROUP] = P::pack(value);
        }
    }
}
