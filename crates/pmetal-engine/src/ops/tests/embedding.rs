use super::*;
use crate::error::Error;
use crate::{ops, reference};

on_every_device! {
    embedding_agrees_with_the_reference,
    gradients_of_repeated_ids_are_summed,
    the_row_of_the_padding_id_gets_no_gradient,
}

fn ids(device: &Device, count: usize, vocabulary: usize) -> (Tensor, Vec<u32>) {
    let key = RandomKey { seed: 5, step: 0, stream: 0 };
    let ids: Vec<u32> = (0..count as u64).map(|index| key.word(index) % vocabulary as u32).collect();
    (Tensor::from_slice(device, Category::Activations, &[count], &ids).unwrap(), ids)
}

fn embedding_agrees_with_the_reference(device: &Device) {
    for (tokens, vocabulary, width) in [(0, 3, 5), (1, 1, 1), (3, 7, 16), (65, 11, 37), (130, 300, 24)] {
        for table_type in [DType::F32, DType::Bf16, DType::F16] {
            for &dtype in types(device) {
                let table = numbers("table", vocabulary * width, table_type);
                let (id_tensor, id_values) = ids(device, tokens, vocabulary);
                let frozen = weight(device, false, table_type, &[vocabulary, width], &table);
                let y = ops::embedding(&Tape::off(), &id_tensor, &frozen, 1.5, None, dtype).unwrap();
                assert_eq!(y.tensor().shape(), [tokens, width]);
                let expected = reference::embedding(&id_values, &table, width, 1.5);
                assert_close("embedding", &wide(y.tensor()), &expected, tolerance(dtype));
            }
        }
    }
}

fn gradients_of_repeated_ids_are_summed(device: &Device) {
    for (tokens, vocabulary, width) in [(1, 1, 1), (3, 7, 5), (65, 11, 37), (130, 300, 24)] {
        for &dtype in types(device) {
            let table = numbers("table", vocabulary * width, DType::F32);
            let (id_tensor, id_values) = ids(device, tokens, vocabulary);
            let trained = weight(device, true, DType::F32, &[vocabulary, width], &table);
            let d_y = numbers("d_y", tokens * width, dtype);
            for repeat in 1..=2 {
                let tape = Tape::recording();
                let y = ops::embedding(&tape, &id_tensor, &trained, 0.5, None, dtype).unwrap();
                tape.backward(&y, tensor(device, dtype, &[tokens, width], &d_y)).unwrap();
                let gradient =
                    gradient_of(&trained).map(|g| g.iter().map(|g| g / f64::from(repeat)).collect());
                let function = |inputs: &[Vec<f64>]| reference::embedding(&id_values, &inputs[0], width, 0.5);
                // The table's gradient is summed in f32 whatever the activations are.
                assert_gradients(
                    "embedding",
                    &function,
                    std::slice::from_ref(&table),
                    &d_y,
                    &[gradient],
                    F32_ERROR,
                );
            }
        }
    }
}

#[test]
fn embedding_has_the_same_bits_everywhere() {
    assert_same_bits_everywhere("embedding", &|| {
        let device = Device::cpu();
        let (id_tensor, _) = ids(&device, 700, 41);
        let table = weight(&device, true, DType::F32, &[41, 53], &numbers("table", 41 * 53, DType::F32));
        let tape = Tape::recording();
        let y = ops::embedding(&tape, &id_tensor, &table, 0.3, None, DType::Bf16).unwrap();
        let d_y = tensor(&device, DType::Bf16, &[700, 53], &numbers("d_y", 700 * 53, DType::Bf16));
        tape.backward(&y, d_y).unwrap();
        vec![bits(y.tensor()), bits(&parameter(&table).gradient().unwrap())]
    });
}

#[test]
fn ids_beyond_the_table_are_refused() {
    let device = Device::cpu();
    let table = weight(&device, false, DType::F32, &[4, 2], &[0.0; 8]);
    let bad = Tensor::from_slice(&device, Category::Activations, &[2], &[3_u32, 4]).unwrap();
    let error = ops::embedding(&Tape::off(), &bad, &table, 1.0, None, DType::F32).err().unwrap();
    assert!(matches!(error, Error::Range { actual: 4, limit: 4, .. }), "{error}");
    let signed = Tensor::from_slice(&device, Category::Activations, &[1], &[1_i32]).unwrap();
    let error = ops::embedding(&Tape::off(), &signed, &table, 1.0, None, DType::F32).err().unwrap();
    assert!(matches!(error, Error::DType { actual: DType::I32, .. }), "{error}");
}

fn the_row_of_the_padding_id_gets_no_gradient(device: &Device) {
    let ids = Tensor::from_slice(device, Category::Activations, &[3], &[1_u32, 2, 1]).unwrap();
    let value = Tensor::zeros(device, Category::Parameters, DType::F32, &[3, 2]).unwrap();
    let table = Weight::Trainable(crate::Parameter::new("table", value));
    let tape = Tape::recording();
    let y = ops::embedding(&tape, &ids, &table, 1.0, Some(1), DType::F32).unwrap();
    let slope = Tensor::from_slice(device, Category::Activations, &[3, 2], &[1.0_f32; 6]).unwrap();
    tape.backward(&y, slope).unwrap();
    let gradient = table.parameter().unwrap().gradient().unwrap();
    assert_eq!(gradient.to_f32_vec().unwrap(), [0.0, 0.0, 0.0, 0.0, 1.0, 1.0]);
}
