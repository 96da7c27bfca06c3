use super::*;
use crate::ops;

on_every_device! { capped_logits_agree_with_the_reference }

fn capped_logits_agree_with_the_reference(device: &Device) {
    for (rows, columns) in [(0, 3), (1, 1), (1, 5003), (3, 64), (7, 333)] {
        for cap in [0.5_f32, 30.0] {
            // Up to 2 and to 120 caps, where nothing but the sign is left.
            let inputs: Vec<f64> =
                numbers("logits", rows * columns, DType::Bf16).iter().map(|x| x * 60.0).collect();
            let mut logits = tensor(device, DType::F32, &[rows, columns], &inputs);
            ops::softcap(&mut logits, cap);
            let cap = f64::from(cap);
            let expected: Vec<f64> = inputs.iter().map(|x| cap * (x / cap).tanh()).collect();
            assert_close(&format!("{rows} x {columns}"), &wide(&logits), &expected, 1e-6);
        }
    }
}
