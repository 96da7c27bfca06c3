//! Every group of kernels on every device, over widths that fill vectors, SIMD groups and rows of a group, and that do
//! not.

use super::*;
use crate::device::gpu::emulator::PLANTED;
use crate::device::{AdamWParameters, AttentionParameters, MaskKind, PairedGate, Sum};
use crate::testing::{emulator, on_every_device};

on_every_device! {
    products_agree,
    weight_gradients_agree,
    norms_agree,
    weight_gradients_of_many_rows_agree,
    layer_norms_agree,
    rotations_agree,
    gated_activations_agree,
    embeddings_agree,
    sums_copies_and_choices_of_rows_agree,
    columns_of_heads_agree,
    convolutions_agree,
    delta_rules_agree,
    gated_norms_agree,
    random_numbers_and_dropped_elements_agree,
    groups_of_heads_agree,
    windows_and_sinks_agree,
    caps_and_wide_heads_agree,
    chunks_and_all_keys_agree,
    choices_of_experts_agree, choices_of_keys_agree, products_of_experts_agree, rows_of_experts_agree,
    losses_agree,
    logits_of_no_number_make_the_loss_no_number,
    steps_over_many_tensors_agree,
    a_norm_that_is_not_finite_changes_nothing,
    the_self_test_passes,
}

const WIDTHS: [usize; 6] = [1, 7, 33, 64, 100, 513];
/// Columns between rows: none, odd, and as many as keep rows aligned.
const PADDINGS: [usize; 3] = [0, 3, 8];

fn types(device: &Device) -> &'static [DType] {
    if device.is_host() { &[DType::F32, DType::Bf16] } else { &[DType::F32, DType::Bf16, DType::F16] }
}

fn for_widths(device: &Device, check: impl Fn(DType, usize)) {
    for &dtype in types(device) {
        WIDTHS.into_iter().for_each(|width| check(dtype, width));
    }
}

/// A device computes what the plain loops compute, wherever rows lie; on the emulator to the bit in two orders of threads.
fn check_padded(device: &Device, what: &str, dtype: DType, paddings: &[usize], work: &Work<'_>) {
    let expected = expected(dtype, work).unwrap();
    let paddings = if device.is_host() { &paddings[..1] } else { paddings };
    for &padding in paddings {
        let what = format!("{what}, {dtype}, {padding} columns between rows");
        let actual = results(device, [dtype, dtype], padding, work).unwrap_or_else(|e| panic!("{what}: {e}"));
        let (error, [result, index]) = largest_error(&actual, &expected);
        let (ours, theirs) = (actual[result].get(index), expected[result].get(index));
        assert!(
            error <= tolerance(dtype),
            "{what}: error {error:.1e}: {ours:?} instead of {theirs:?} at {index} of result {result}"
        );
        if device.name() == "emulator" {
            let other = emulator(2).unwrap();
            let again = results(&other, [dtype, dtype], padding, work).unwrap();
            let bits = |all: &[Vec<f32>]| -> Vec<u32> { all.iter().flatten().map(|x| x.to_bits()).collect() };
            assert!(bits(&actual) == bits(&again), "{what}: another order of threads has other bits");
        }
    }
}

fn check(device: &Device, what: &str, dtype: DType, work: &Work<'_>) {
    check_padded(device, what, dtype, &PADDINGS, work);
}

fn weight_gradients_agree(device: &Device) {
    for &dtype in types(device) {
        for width in [1, 7, 33, 64, 130] {
            let work = |inputs: &Inputs<'_>| products::weight_gradients(inputs, width);
            check(device, "gradients of weights", dtype, &work);
        }
    }
}

fn products_agree(device: &Device) {
    for &dtype in types(device) {
        // What is over from large sizes is multiplied apart.
        let large = [[5, 133, 40], [5, 40, 131], [3, 67, 69]];
        let small = [[1, 1, 1], [1, 33, 40], [5, 1, 7], [3, 16, 8], [17, 40, 33], [64, 64, 64]];
        for size in small.into_iter().chain(large) {
            check(device, &format!("product {size:?}"), dtype, &|inputs| products::product(inputs, size));
        }
    }
}

fn norms_agree(device: &Device) {
    for_widths(device, |dtype, width| {
        for kind in [None, Some(NormWeight::Plain), Some(NormWeight::PlusOne)] {
            check(device, &format!("norm of {width}, {kind:?}"), dtype, &|inputs| {
                rows::norm(inputs, &[5, width], kind)
            });
        }
    });
    let plain = Some(NormWeight::Plain);
    check(device, "norm of heads", DType::Bf16, &|inputs| rows::norm(inputs, &[5, 3, 40], plain));
    // Many rows, which fewer threads hold.
    check(device, "norm of 70 rows", DType::Bf16, &|inputs| rows::norm(inputs, &[70, 520], plain));
    // More than one row of threads can hold.
    check(device, "long norm", DType::Bf16, &|inputs| rows::norm(inputs, &[2, 33_000], plain));
}

fn weight_gradients_of_many_rows_agree(device: &Device) {
    let plain = Some(NormWeight::Plain);
    check(device, "norm of 150 rows", DType::F32, &|inputs| rows::norm(inputs, &[150, 33], plain));
}

fn layer_norms_agree(device: &Device) {
    for_widths(device, |dtype, width| {
        // What is normed over one element, and its gradient, is zero up to whether products are rounded before they are
        // subtracted: there is no size to judge an error by.
        if width == 1 {
            return;
        }
        for own in [[false, false], [true, true], [true, false], [false, true]] {
            check(device, &format!("layer norm of {width}, {own:?}"), dtype, &|inputs| {
                rows::layer_norm(inputs, &[5, 3, width], own)
            });
        }
    });
    let all = [false, false];
    check(device, "layer norm of 70 rows", DType::Bf16, &|inputs| rows::layer_norm(inputs, &[70, 520], all));
    check(device, "layer norm of 150 rows", DType::F32, &|inputs| rows::layer_norm(inputs, &[150, 33], all));
    check(device, "long layer norm", DType::Bf16, &|inputs| rows::layer_norm(inputs, &[2, 33_000], all));
}

fn rotations_agree(device: &Device) {
    for &dtype in types(device) {
        for width in [2, 12, 64, 100, 256] {
            for (pairing, half) in [
                (RopePairing::Halves, width / 2),
                (RopePairing::Neighbours, width / 2),
                (RopePairing::Halves, (width / 4).max(1)),
            ] {
                check(device, &format!("rope {width} {pairing:?} {half}"), dtype, &|inputs| {
                    rows::rotation(inputs, width, pairing, half)
                });
            }
        }
    }
}

fn gated_activations_agree(device: &Device) {
    for_widths(device, |dtype, width| {
        for activation in
            [GateActivation::Silu, GateActivation::Gelu, GateActivation::GeluTanh, GateActivation::Sigmoid]
        {
            check(device, &format!("gated {width} {activation:?}"), dtype, &|inputs| {
                rows::gated(inputs, width, activation)
            });
        }
    });
}

fn embeddings_agree(device: &Device) {
    for_widths(device, |dtype, width| {
        check(device, &format!("embedding {width}"), dtype, &|inputs| rows::embedding(inputs, width));
    });
}

fn sums_copies_and_choices_of_rows_agree(device: &Device) {
    for_widths(device, |dtype, width| {
        check(device, &format!("rows of {width}"), dtype, &|inputs| rows::moved(inputs, width));
    });
    check(device, "sum of 150 rows", DType::F32, &rows::sum_of_many);
}

fn columns_of_heads_agree(device: &Device) {
    for_widths(device, |dtype, width| {
        check(device, &format!("heads of {width}"), dtype, &|inputs| rows::heads(inputs, width));
    });
    // More than one group for a token.
    check(device, "wide heads", DType::Bf16, &|inputs| rows::heads(inputs, 1000));
}

fn convolutions_agree(device: &Device) {
    for &dtype in types(device) {
        for (channels, taps) in [(1, 1), (33, 4), (64, 4), (300, 3)] {
            let what = format!("{taps} taps of {channels}");
            check(device, &what, dtype, &|inputs| delta::convolution(inputs, channels, taps));
        }
    }
}

fn delta_rules_agree(device: &Device) {
    for &dtype in types(device) {
        for (heads, widths) in [([1, 1], [2, 1]), ([2, 4], [9, 33]), ([2, 2], [64, 32]), ([1, 3], [128, 40])]
        {
            let what = format!("delta rule of {heads:?} x {widths:?}");
            check(device, &what, dtype, &|inputs| delta::rule(inputs, heads, widths));
        }
    }
    check(device, "wide delta rule", DType::F32, &|inputs| delta::rule(inputs, [1, 1], [256, 256]));
}

fn gated_norms_agree(device: &Device) {
    for_widths(device, |dtype, width| {
        let what = format!("gated norm of {width}");
        check(device, &what, dtype, &|inputs| delta::gated_norm(inputs, [5, 2, width]));
    });
    check(device, "gated norm of many rows", DType::F32, &|inputs| delta::gated_norm(inputs, [90, 3, 8]));
}

fn random_numbers_and_dropped_elements_agree(device: &Device) {
    for_widths(device, |dtype, width| {
        check_padded(device, &format!("dropout {width}"), dtype, &[0], &|inputs| {
            rows::dropped(inputs, width)
        });
    });
}

fn attention_agrees(device: &Device, parameters: AttentionParameters, kind: MaskKind, sinks: bool) {
    for &dtype in types(device) {
        check(device, &format!("{parameters:?}, {kind:?}, sinks {sinks}"), dtype, &|inputs| {
            attention::attend(inputs, &parameters, kind, sinks)
        });
    }
}

fn groups_of_heads_agree(device: &Device) {
    attention_agrees(device, attention::PLAIN, MaskKind::CAUSAL, false);
    attention_agrees(
        device,
        AttentionParameters { query_heads: 1, key_value_heads: 1, ..attention::PLAIN },
        MaskKind::CAUSAL,
        true,
    );
}

fn windows_and_sinks_agree(device: &Device) {
    attention_agrees(
        device,
        AttentionParameters { value_width: 12, ..attention::PLAIN },
        MaskKind { window: Some(3), ..MaskKind::CAUSAL },
        true,
    );
}

fn caps_and_wide_heads_agree(device: &Device) {
    let wide = AttentionParameters { key_width: 64, value_width: 100, scale: 0.3, ..attention::PLAIN };
    attention_agrees(device, AttentionParameters { softcap: Some(0.7), ..wide }, MaskKind::CAUSAL, false);
}

fn chunks_and_all_keys_agree(device: &Device) {
    let odd = AttentionParameters { query_heads: 3, key_value_heads: 3, ..attention::PLAIN };
    attention_agrees(device, odd, MaskKind { chunk: Some(2), ..MaskKind::CAUSAL }, true);
    let few = AttentionParameters { query_heads: 2, key_value_heads: 1, ..attention::PLAIN };
    attention_agrees(device, few, MaskKind { sees_ahead: true, ..MaskKind::CAUSAL }, false);
}

fn choices_of_experts_agree(device: &Device) {
    for &dtype in types(device) {
        for experts in [8, 12, 64, 260] {
            check(device, &format!("choices of {experts}"), dtype, &|inputs| {
                experts::routed(inputs, experts)
            });
        }
    }
}

fn rows_of_experts_agree(device: &Device) {
    for_widths(device, |dtype, width| {
        check(device, &format!("rows of experts of {width}"), dtype, &|inputs| experts::rows(inputs, width));
        for kind in [
            PairedGate::Halves(GateActivation::Silu),
            PairedGate::Halves(GateActivation::Gelu),
            PairedGate::Halves(GateActivation::GeluTanh),
            PairedGate::Clamped { slope: 1.702, limit: 0.5 },
        ] {
            check(device, &format!("{kind:?} of {width}"), dtype, &|inputs| {
                experts::paired(inputs, width, kind)
            });
        }
    });
}

fn products_of_experts_agree(device: &Device) {
    for &dtype in types(device) {
        for size in [[1, 1, 1], [33, 40, 2], [40, 72, 8]] {
            check(device, &format!("products of experts {size:?}"), dtype, &|inputs| {
                experts::products(inputs, size)
            });
        }
    }
    check_padded(device, "wide products of experts", DType::Bf16, &[0, 8], &|inputs| {
        experts::products(inputs, [72, 264, 64])
    });
}

fn choices_of_keys_agree(device: &Device) {
    for &dtype in types(device) {
        for sizes in [[1, 1, 1], [2, 33, 2], [4, 64, 4], [5, 100, 6], [3, 12, 99]] {
            check(device, &format!("choice {sizes:?}"), dtype, &|inputs| {
                attention::choice(inputs, MaskKind::CAUSAL, sizes)
            });
        }
        let parameters = AttentionParameters { value_width: 5, ..attention::PLAIN };
        let work = |inputs: &Inputs<'_>| attention::attend_chosen(inputs, &parameters, MaskKind::CAUSAL);
        check(device, "attention to chosen keys", dtype, &work);
    }
    let (capped, near) = (
        AttentionParameters { softcap: Some(0.9), ..attention::PLAIN },
        MaskKind { window: Some(4), ..MaskKind::CAUSAL },
    );
    check(device, "choice in a window", DType::F32, &|inputs| attention::choice(inputs, near, [3, 8, 2]));
    check(device, "chosen keys in a window", DType::F32, &|inputs| {
        attention::attend_chosen(inputs, &capped, near)
    });
}

fn losses_agree(device: &Device) {
    let plain = CrossEntropyParameters { logit_scale: 1.0, softcap: None, gradient_scale: 0.25 };
    let capped = CrossEntropyParameters { logit_scale: 6.0, softcap: Some(3.0), gradient_scale: 2.0 };
    for_widths(device, |dtype, width| {
        for parameters in [plain, capped] {
            check_padded(device, &format!("loss of {width}, {parameters:?}"), dtype, &[0], &|inputs| {
                steps::cross_entropy(inputs, width, &parameters)
            });
        }
    });
}

fn logits_of_no_number_make_the_loss_no_number(device: &Device) {
    for width in [64, 65] {
        let mut values = numbers(1, 2 * width);
        values[width + 3] = f32::NAN;
        let logits = Tensor::from_slice(device, Category::Workspace, &[2, width], &values).unwrap();
        let labels = Tensor::from_slice(device, Category::Workspace, &[2], &[1_i32, 5]).unwrap();
        let mut sum = Sum::new(device).unwrap();
        let parameters = CrossEntropyParameters { logit_scale: 1.0, softcap: None, gradient_scale: 1.0 };
        device.kernels().cross_entropy(logits, &labels, &parameters, &mut sum, DType::F32).unwrap();
        assert!(sum.read().unwrap().is_nan());
    }
}

fn steps_over_many_tensors_agree(device: &Device) {
    for &dtype in types(device) {
        // One by one; eight at a time over more than one piece; rows that eight does not divide.
        for first in [[7, 33], [24, 400], [40, 4], [32, 129]] {
            let work = |inputs: &Inputs<'_>| steps::stepped(inputs, first, steps::CONSTANTS, false, None);
            check(device, "a step", dtype, &work);
        }
    }
    for max_norm in [0.0, 0.5, 1e6] {
        let constants = AdamWParameters { max_norm, ..steps::CONSTANTS };
        check(device, "a clipped step", DType::F32, &|inputs| {
            steps::stepped(inputs, [7, 33], constants, true, None)
        });
    }
}

fn a_norm_that_is_not_finite_changes_nothing(device: &Device) {
    let constants = AdamWParameters { max_norm: 1.0, ..steps::CONSTANTS };
    for poison in [f32::NAN, f32::INFINITY] {
        let work = |inputs: &Inputs<'_>| steps::stepped(inputs, [7, 33], constants, true, Some(poison));
        check(device, "a refused step", DType::F32, &work);
        let values = results(device, [DType::F32; 2], 0, &work).unwrap();
        assert_eq!(values[0], numbers(0, 231));
    }
}

fn the_self_test_passes(device: &Device) {
    let outcomes = self_test(device);
    assert_eq!(outcomes.len(), 40);
    for outcome in &outcomes {
        assert!(outcome.passed(), "{outcome:?}");
    }
    // What is rounded to 8 bits is not what was computed.
    assert!(outcomes.iter().any(|outcome| outcome.largest_error > 1e-4), "{outcomes:?}");
}

#[test]
fn a_wrong_kernel_fails_the_test_of_its_group_alone() {
    let Some(device) = emulator(1) else { return };
    let mut unnoticed = Vec::new();
    for (group, right, wrong) in [
        ("embeddings", "sum += scale * widen(d_out", "sum += widen(d_out"),
        ("norms", "(squares / (float)width + epsilon", "(squares / (float)(width + 1) + epsilon"),
        ("layer norms", "d[n].v[j] - slopes - a[n].v[j]", "d[n].v[j] - a[n].v[j]"),
        ("layer norms", "GROUP_X % weight_heads * width", "0"),
        ("rotations", "b * cosine + a * sine", "b * cosine - a * sine"),
        ("attention", "p * (d_p - deltas[row]) * slope", "p * d_p * slope"),
        ("choice of keys", "maximum(simd_sum(products[n]), 0.0f)", "simd_sum(products[n])"),
        ("choice of keys", "before++ >= left", "before++ > left"),
        ("attention", "j = next_key(chosen, j + 1, end)", "++j"),
        ("attention", "if (chosen && !(chosen[", "if (0 && !(chosen["),
        ("attention", "slope) - top) * share", "slope) - top)"),
        ("activations", "= d.v[j] * u.v[j] * slope", "= d.v[j] * slope"),
        ("rows", "x + (ulong64)indices[GROUP_X] * pitch", "x + (ulong64)GROUP_X * pitch"),
        ("heads", "head < heads; ++head) sum += widen(x", "head < heads - 1; ++head) sum += widen(x"),
        ("heads", "head * rows + first + n", "head * rows + n"),
        ("heads", "parts[0][i] + parts[1][i]", "parts[0][i]"),
        (
            "convolutions",
            "waiting[TAPS - 1 - tap].v[c] += taps.factors[tap].v[c] * slope",
            "waiting[TAPS - 1 - tap].v[c] += taps.factors[TAPS - 1 - tap].v[c] * slope",
        ),
        ("delta rules", "sum -= tile[n * CHUNK + block + l] * scaled[l]", "sum -= 0.0f"),
        ("delta rules", "sums.v[i] -= product.v[i]", "sums.v[i] -= 0.0f"),
        ("delta rules", "store_sums(HERE sums, future, start, count, heads, KEY_WIDTH, first)", "continue"),
        ("delta rules", "sums[i] = factor * own[HELD_PLACE(i)]", "sums[i] = own[HELD_PLACE(i)]"),
        ("delta rules", "held[n] += keys[s * PADDED + n * PARTS + part] * update;", ""),
        ("gated norms", "a[n].v[j] *= w.v[j] * (", "a[n].v[j] *= ("),
        ("random numbers", "round < 10", "round < 9"),
        ("choices of experts", "score /= sum + epsilon", "score /= sum"),
        ("choices of experts", "slopes[i] - mean", "slopes[i]"),
        ("rows of experts", "(pair / choices) * pitch", "(pair / choices + 1) % 9 * pitch"),
        ("rows of experts", "scale * share * (1.0f - share) * product", "scale * share * product"),
        ("rows of experts", "gate <= limit ? shifted", "true ? shifted"),
        ("products of experts", "second_right + (ulong64)expert", "second_right + (ulong64)(expert & 3)"),
        ("products of experts", "+= scale * sums[i];", "+= sums[i];"),
        ("losses", "logarithm(sum) + top - target", "logarithm(sum) - target"),
        ("optimizer", "square_root(now.second) / control[7]", "square_root(now.second)"),
    ] {
        PLANTED.set(Some((right, wrong)));
        let outcomes = self_test(&device);
        PLANTED.set(None);
        let mut failed: Vec<&str> =
            outcomes.iter().filter(|outcome| !outcome.passed()).map(|outcome| outcome.kernels).collect();
        failed.dedup();
        if failed != [group] {
            unnoticed.push(format!("with `{wrong}` in {group} these fail: {failed:?}"));
        }
    }
    assert!(unnoticed.is_empty(), "{}", unnoticed.join("\n"));
}

#[test]
fn a_device_that_fails_is_no_device_that_agrees() {
    let Some(device) = emulator(1) else { return };
    // The end of a SIMD group's work is missing for some of its lanes.
    PLANTED.set(Some((
        "uint t = GROUP_X, head = GROUP_Y, heads",
        "if (THREAD == 3) return; uint t = GROUP_X, head = GROUP_Y, heads",
    )));
    let outcomes = self_test(&device);
    PLANTED.set(None);
    let attention = outcomes.iter().find(|outcome| outcome.kernels == "attention").unwrap();
    assert!(!attention.passed() && attention.largest_error.is_nan());
    assert!(attention.failure.as_ref().unwrap().contains("attention_forward"), "{attention:?}");
}
