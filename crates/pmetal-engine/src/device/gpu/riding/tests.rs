//! Against the kernels without the products, where there is a device. Without one the tests say so and pass.

use half::bf16;

use super::*;
use crate::Device;
use crate::memory::Category;

/// Rows, columns and ranks: a model's, ragged ones, and the most.
const SHAPES: [[usize; 3]; 3] = [[2048, 576, 48], [65, 200, 16], [130, 1024, 64]];

fn device() -> Option<Device> {
    match Device::cuda(0, false) {
        Ok(device) => Some(device),
        Err(error) => {
            println!("skipped: no CUDA device ({error})");
            None
        }
    }
}

/// Numbers from -1 to 1 in rows that lie apart.
fn numbers(device: &Device, seed: u64, [rows, columns]: [usize; 2]) -> Tensor {
    let mut state = (seed + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    let next = |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bf16::from_f32((state >> 40) as f32 / (1 << 23) as f32 - 1.0)
    };
    let values: Vec<bf16> = (0..rows * columns).map(next).collect();
    let dense = Tensor::from_slice(device, Category::Workspace, &[rows, columns], &values).expect("memory");
    let mut apart = room(device, [rows, columns], 8);
    device.kernels().convert(&dense, &mut apart);
    apart
}

fn room(device: &Device, shape: [usize; 2], spare: usize) -> Tensor {
    Tensor::scratch_with_spare(device, Category::Workspace, DType::Bf16, shape, spare).expect("memory")
}

fn adapter(device: &Device, [ranks, width]: [usize; 2]) -> Riding {
    Riding { a: numbers(device, 3, [ranks, width]), scale: 0.5 }
}

fn bits(tensor: &Tensor) -> Vec<bf16> {
    tensor.to_vec::<bf16>().expect("a result")
}

/// Both were rounded to 16 bits at the end, and one in the middle too.
fn assert_close(actual: &Tensor, expected: &Tensor, what: &str) {
    for (index, (a, b)) in bits(actual).iter().zip(bits(expected)).enumerate() {
        let (a, b) = (a.to_f32(), b.to_f32());
        assert!((a - b).abs() <= 0.02 + 0.016 * b.abs(), "{what}, element {index}: {a} instead of {b}");
    }
}

#[test]
fn a_product_that_rides_on_a_norm_is_that_of_its_result() {
    let Some(device) = device() else { return };
    for [rows, width, ranks] in SHAPES {
        let (x, riding) = (numbers(&device, 1, [rows, width]), adapter(&device, [ranks, width]));
        let weight =
            numbers(&device, 2, [1, width]).contiguous().expect("memory").reshape(&[width]).expect("a row");
        let (norm, weight) = ((NormWeight::PlusOne, 1e-3), Some(&weight));
        let [mut fused, mut apart] = [0; 2].map(|_| room(&device, [rows, width], ranks));
        assert!(device.kernels().rms_norm_riding(&x, weight, norm, &riding, &mut fused));
        device.kernels().rms_norm(&x, weight, norm.0, norm.1, &mut apart);
        riding.put_beside(&apart).expect("a product");
        assert_eq!(bits(&fused), bits(&apart), "{rows} x {width}");
        let [fused, apart] = [&fused, &apart].map(|rows| rows.spare_columns().expect("room").0);
        assert_close(&fused, &apart, "the product");

        let (d_out, d) = (numbers(&device, 4, [rows, width]), numbers(&device, 5, [rows, ranks]));
        let (other, share) = (numbers(&device, 6, [rows, width]), Share { d, riding });
        for held in [Held::Nothing, Held::Other(&other)] {
            let [mut fused, mut apart] = [0; 2].map(|_| room(&device, [rows, width], 16));
            let kernels = device.kernels();
            assert!(kernels.rms_norm_backward_riding(&x, weight, norm, (&d_out, &share), (&mut fused, held)));
            let mut whole = numbers(&device, 4, [rows, width]);
            share.add_to(&mut whole).expect("a product");
            kernels.rms_norm_backward(&x, weight, norm.0, norm.1, &whole, Some((&mut apart, held)), None);
            assert_close(&fused, &apart, "the norm's gradient");
        }
    }
}

#[test]
fn a_product_that_rides_on_a_gated_layer_is_that_of_its_result() {
    let Some(device) = device() else { return };
    let activations = [GateActivation::Silu, GateActivation::Gelu, GateActivation::GeluTanh];
    for ([rows, width, ranks], activation) in SHAPES.into_iter().zip(activations) {
        let halves = || [7, 8].map(|seed| numbers(&device, seed, [rows, width]));
        let ([gate, up], riding) = (halves(), adapter(&device, [ranks, width]));
        let [mut fused, mut apart] = [0; 2].map(|_| room(&device, [rows, width], ranks));
        let kernels = device.kernels();
        assert!(kernels.gated_riding(activation, [&gate, &up], &riding, &mut fused));
        kernels.gated(activation, &gate, &up, &mut apart);
        riding.put_beside(&apart).expect("a product");
        assert_eq!(bits(&fused), bits(&apart), "{rows} x {width}");
        let [fused, apart] = [&fused, &apart].map(|rows| rows.spare_columns().expect("room").0);
        assert_close(&fused, &apart, "the product");

        let (d_out, d) = (numbers(&device, 4, [rows, width]), numbers(&device, 5, [rows, ranks]));
        let share = Share { d, riding };
        let [[mut gate, mut up], [mut other_gate, mut other_up]] = [halves(), halves()];
        assert!(kernels.gated_backward_riding(activation, [&mut gate, &mut up], (&d_out, &share)));
        let mut whole = numbers(&device, 4, [rows, width]);
        share.add_to(&mut whole).expect("a product");
        assert!(kernels.gated_backward_in_place(activation, &mut other_gate, &mut other_up, &whole));
        assert_close(&gate, &other_gate, "the gate's gradient");
        assert_close(&up, &other_up, "the other gradient");
    }
}
