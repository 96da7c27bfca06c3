use super::*;
use crate::device::GateActivation;
use crate::{ops, reference};

on_every_device! {
    columns_and_their_joined_gradients_agree_with_the_reference,
    columns_take_the_memory_of_the_whole_where_nobody_else_has_it,
    columns_of_what_others_hold_leave_it_as_it_is,
}

/// Columns `first .. first + count` of rows of a width.
fn columns(x: &[f64], width: usize, first: usize, count: usize) -> Vec<f64> {
    x.chunks_exact(width).flat_map(|row| row[first..first + count].to_vec()).collect()
}

fn columns_and_their_joined_gradients_agree_with_the_reference(device: &Device) {
    // The last part is used by nobody where there is one.
    for (tokens, half, rest) in [(0, 4, 0), (1, 1, 1), (3, 7, 0), (5, 8, 24), (65, 33, 2), (130, 40, 0)] {
        for &dtype in types(device) {
            let widths = [half, half, rest];
            let widths = if rest > 0 { &widths[..] } else { &widths[..2] };
            let total = 2 * half + rest;
            let what = format!("{dtype} {tokens} x {widths:?}");
            let inputs = vec![numbers("x", tokens * total, dtype)];
            let d_y = numbers("d_y", tokens * half, dtype);
            let tape = Tape::recording();
            let x = tape.leaf(tensor(device, dtype, &[tokens, total], &inputs[0]));
            let (slot, parts) = (x.slot().unwrap(), ops::split_columns(&tape, x, widths).unwrap());
            assert_eq!(parts.len(), widths.len());
            let y = ops::gated(&tape, GateActivation::Silu, &parts[0], &parts[1]).unwrap();
            let function = |inputs: &[Vec<f64>]| {
                let part = |index: usize| columns(&inputs[0], total, index * half, half);
                reference::gated(GateActivation::Silu, &part(0), &part(1))
            };
            assert_close(&what, &wide(y.tensor()), &function(&inputs), tolerance(dtype));
            let mut gradients = tape.backward(&y, tensor(device, dtype, &[tokens, half], &d_y)).unwrap();
            let ours = [Some(wide(&gradients.take(slot).unwrap()))];
            assert_gradients(&what, &function, &inputs, &d_y, &ours, tolerance(dtype));
        }
    }
}

fn columns_take_the_memory_of_the_whole_where_nobody_else_has_it(device: &Device) {
    if device.is_host() {
        return;
    }
    let tape = Tape::recording();
    let x = tape.leaf(tensor(device, DType::F32, &[4, 16], &numbers("x", 64, DType::F32)));
    let (slot, address) = (x.slot().unwrap(), x.tensor().address());
    let parts = ops::split_columns(&tape, x, &[8, 8]).unwrap();
    assert_eq!([0, 1].map(|index: usize| parts[index].tensor().address()), [address, address + 32]);
    let y = ops::gated(&tape, GateActivation::Silu, &parts[0], &parts[1]).unwrap();
    drop(parts);
    let d_y = tensor(device, DType::F32, &[4, 8], &numbers("d_y", 32, DType::F32));
    let mut gradients = tape.backward_of(y, d_y).unwrap();
    assert_eq!(gradients.take(slot).unwrap().address(), address);
}

fn columns_of_what_others_hold_leave_it_as_it_is(device: &Device) {
    let values = numbers("x", 30, DType::F32);
    for spare in [0, 8] {
        let tape = Tape::off();
        let x = tensor(device, DType::F32, &[5, 6], &values);
        let spare = if device.is_host() { 0 } else { spare };
        let (category, dtype) = (Category::Activations, DType::F32);
        let mut own = Tensor::scratch_with_spare(device, category, dtype, [5, 6], spare).unwrap();
        device.kernels().convert(&x, &mut own);
        let parts = ops::split_columns(&tape, Var::constant(own.clone()), &[1, 5]).unwrap();
        let [first, mut second]: [Tensor; 2] =
            parts.into_iter().map(Var::into_tensor).collect::<Vec<_>>().try_into().ok().unwrap();
        assert_eq!(wide(&first), columns(&values, 6, 0, 1));
        device.kernels().scale(&mut second, 0.0);
        assert_eq!(wide(&own), values);
    }
}

#[test]
fn widths_that_do_not_add_up_are_refused_and_one_is_the_input() {
    let device = Device::cpu();
    let tape = Tape::recording();
    let x = tape.leaf(tensor(&device, DType::F32, &[2, 6], &[1.0; 12]));
    for widths in [&[2, 3][..], &[], &[6, 6], &[usize::MAX - 1, 8]] {
        assert!(ops::split_columns(&tape, x.clone(), widths).is_err(), "{widths:?}");
    }
    let one = ops::split_columns(&tape, x.clone(), &[6]).unwrap();
    assert!(one.len() == 1 && one[0].slot() == x.slot());
    let cube = Var::constant(tensor(&device, DType::F32, &[2, 1, 6], &[1.0; 12]));
    assert!(ops::split_columns(&tape, cube, &[3, 3]).is_err());
}
