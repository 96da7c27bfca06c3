//! Kernels that work on rows.

use super::*;
use crate::device::{GateActivation, NormWeight, RopePairing, RopeRows};
use crate::random::RandomKey;

const KEY: RandomKey = RandomKey { seed: 0x1234_5678_9ABC_DEF0, step: 7, stream: 3 };

#[test]
fn norms_agree_with_the_processor() {
    for (dtype, width) in TYPES.into_iter().flat_map(|dtype| WIDTHS.map(|width| (dtype, width))) {
        for kind in [None, Some(NormWeight::Plain), Some(NormWeight::PlusOne)] {
            check(&format!("norm of {width}, {kind:?}"), dtype, &|run| norm(run, &[5, width], kind));
        }
    }
    check("norm of heads", DType::Bf16, &|run| norm(run, &[5, 3, 40], Some(NormWeight::Plain)));
    // Many rows, which fewer threads hold.
    check("norm of 70 rows", DType::Bf16, &|run| norm(run, &[70, 520], Some(NormWeight::Plain)));
    // More than one row of threads can hold.
    check("long norm", DType::Bf16, &|run| norm(run, &[2, 33_000], Some(NormWeight::Plain)));
}

fn norm(run: &Run<'_>, shape: &[usize], kind: Option<NormWeight>) -> Vec<Tensor> {
    let kernels = run.device.kernels();
    let width = shape[shape.len() - 1];
    let weight = kind.map(|_| run.dense(2, &[width]));
    let (weight, kind) = (weight.as_ref(), kind.unwrap_or(NormWeight::Plain));
    let (x, d_out) = (run.tensor(1, shape), run.tensor(3, shape));
    let (mut out, mut d_x, mut added) = (run.empty(shape), run.empty(shape), run.tensor(4, shape));
    kernels.rms_norm(&x, weight, kind, 1e-2, &mut out);
    kernels.rms_norm_backward(&x, weight, kind, 1e-2, &d_out, Some((&mut d_x, false)), None);
    let mut d_weight = run.floats(5, &[width]);
    let own = weight.map(|_| &mut d_weight);
    kernels.rms_norm_backward(&x, weight, kind, 1e-2, &d_out, Some((&mut added, true)), own);
    vec![out, d_x, added, d_weight]
}

#[test]
fn weight_gradients_of_many_rows_agree_with_the_processor() {
    check("norm of 150 rows", DType::F32, &|run| norm(run, &[150, 33], Some(NormWeight::Plain)));
}

#[test]
fn rotations_agree_with_the_processor() {
    for (dtype, width) in
        TYPES.into_iter().flat_map(|dtype| [2, 12, 64, 100, 256].map(|width| (dtype, width)))
    {
        for (pairing, half) in [
            (RopePairing::Halves, width / 2),
            (RopePairing::Neighbours, width / 2),
            (RopePairing::Halves, (width / 4).max(1)),
        ] {
            check(&format!("rope {width} {pairing:?} {half}"), dtype, &|run| {
                let shape = [4, 3, width];
                let (cosines, sines) = (run.floats(2, &[9, half]), run.floats(3, &[9, half]));
                let rows = run.indices(&[8, 0, 3, 3]);
                let angles = RopeRows { cosines: &cosines, sines: &sines, rows: &rows, pairing };
                let (mut forward, mut back) = (run.tensor(1, &shape), run.tensor(1, &shape));
                run.device.kernels().rope(&mut forward, &angles, false);
                run.device.kernels().rope(&mut back, &angles, true);
                vec![forward, back]
            });
        }
    }
}

#[test]
fn gated_activations_agree_with_the_processor() {
    for (dtype, width) in TYPES.into_iter().flat_map(|dtype| WIDTHS.map(|width| (dtype, width))) {
        for activation in [GateActivation::Silu, GateActivation::GeluTanh] {
            check(&format!("gated {width} {activation:?}"), dtype, &|run| {
                let shape = [3, width];
                let [gate, up, d_out] = [1, 2, 3].map(|seed| run.tensor(seed, &shape));
                let [mut out, mut d_gate, mut d_up] = [(); 3].map(|()| run.empty(&shape));
                let kernels = run.device.kernels();
                kernels.gated(activation, &gate, &up, &mut out);
                kernels.gated_backward(activation, &gate, &up, &d_out, &mut d_gate, &mut d_up);
                vec![out, d_gate, d_up]
            });
        }
    }
}

#[test]
fn embeddings_agree_with_the_processor() {
    let ids = [4_u32, 0, 4, 10, 2, 4, 0];
    for (dtype, width) in TYPES.into_iter().flat_map(|dtype| WIDTHS.map(|width| (dtype, width))) {
        check(&format!("embedding {width}"), dtype, &|run| {
            let (table, ids) = (run.dense(1, &[11, width]), run.indices(&ids));
            let mut out = run.empty(&[7, width]);
            let kernels = run.device.kernels();
            kernels.embedding(&ids, &table, 1.5, &mut out);
            let d_out = run.tensor(2, &[7, width]);
            let [mut all, mut some] = [3, 4].map(|seed| run.floats(seed, &[11, width]));
            kernels.embedding_backward(&ids, &d_out, 1.5, None, &mut all);
            kernels.embedding_backward(&ids, &d_out, 1.5, Some(4), &mut some);
            vec![out, all, some]
        });
    }
}

#[test]
fn sums_copies_and_choices_of_rows_agree_with_the_processor() {
    for (dtype, width) in TYPES.into_iter().flat_map(|dtype| WIDTHS.map(|width| (dtype, width))) {
        check(&format!("rows of {width}"), dtype, &|run| {
            let shape = [6, width];
            let kernels = run.device.kernels();
            let (x, other) = (run.tensor(1, &shape), run.tensor(2, &shape));
            let mut sum = run.tensor(3, &shape);
            kernels.add_assign(&mut sum, &x);
            let mut wide = run.floats(4, &shape);
            kernels.convert(&other, &mut wide);
            let mut narrow = run.empty(&shape);
            kernels.convert(&run.floats(5, &shape), &mut narrow);
            let mut scaled = run.floats(6, &shape);
            kernels.scale(&mut scaled, -0.7);
            let mut columns = run.floats(7, &[width]);
            kernels.sum_rows(&x, &mut columns);
            let mut gathered = run.empty(&[4, width]);
            kernels.gather_rows(&x, &run.indices(&[5, 0, 0, 3]), &mut gathered);
            let mut scattered = run.tensor(8, &shape);
            kernels.scatter_rows(&gathered, &run.indices(&[2, 5, 1, 0]), &mut scattered);
            vec![sum, wide, narrow, scaled, columns, gathered, scattered]
        });
    }
    check("sum of 150 rows", DType::F32, &|run| {
        let mut sums = run.floats(1, &[140]);
        run.device.kernels().sum_rows(&run.tensor(2, &[150, 140]), &mut sums);
        vec![sums]
    });
}

#[test]
fn random_numbers_and_dropped_elements_are_those_of_the_processor() {
    for (dtype, width) in TYPES.into_iter().flat_map(|dtype| WIDTHS.map(|width| (dtype, width))) {
        // Zeros show where the masks differ: nothing else is near to them.
        check_padded(&format!("dropout {width}"), dtype, &[0], &|run| {
            let kernels = run.device.kernels();
            let x = run.dense(1, &[5, width]);
            let (mut out, mut added) = (run.empty(&[5, width]), run.dense(2, &[5, width]));
            kernels.dropout(&x, 0.3, KEY, &mut out, false);
            kernels.dropout(&x, 0.3, KEY, &mut added, true);
            vec![out, added]
        });
    }
    let Some(emulator) = emulated(3) else { return };
    let [expected, actual] = [&Device::cpu(), &emulator].map(|device| {
        let mut out = Tensor::zeros(device, Category::Workspace, DType::F32, &[3, 700]).unwrap();
        device.kernels().uniform(KEY, 0.25, &mut out);
        let mut dropped = Tensor::zeros(device, Category::Workspace, DType::F32, &[3, 700]).unwrap();
        device.kernels().dropout(&out, 0.5, KEY, &mut dropped, false);
        [out, dropped].map(|tensor| tensor.to_vec::<f32>().unwrap())
    });
    assert_eq!(actual[0], expected[0]);
    let mask = |values: &[f32]| -> Vec<bool> { values.iter().map(|&value| value == 0.0).collect() };
    assert_eq!(mask(&actual[1]), mask(&expected[1]));
}
