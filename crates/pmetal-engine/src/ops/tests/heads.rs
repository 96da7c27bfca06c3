use super::*;
use crate::ops;

on_every_device! {
    heads_divided_and_put_together_agree_with_the_reference,
    heads_among_other_columns_are_divided_too,
    parts_of_all_heads_are_put_side_by_side,
    gradients_of_columns_lie_side_by_side,
}

/// Heads \[T, H, E\] of parts, each with its heads (1 = for all) and its first column and width within its own heads.
fn joined(parts: &[(&[f64], usize, usize, [usize; 2])], tokens: usize, heads: usize) -> Vec<f64> {
    let mut out = Vec::new();
    for (token, head) in (0..tokens).flat_map(|token| (0..heads).map(move |head| (token, head))) {
        for (values, own, width, [first, count]) in parts {
            let row = token * own + if *own == 1 { 0 } else { head };
            out.extend_from_slice(&values[row * width + first..][..*count]);
        }
    }
    out
}

/// Tokens, heads, the widths of a head's parts and of one that all heads share.
const SIZES: [(usize, usize, [usize; 3], usize); 6] = [
    (0, 2, [3, 4, 1], 5),
    (1, 1, [1, 1, 1], 1),
    (5, 3, [8, 16, 8], 8),
    (7, 4, [5, 9, 2], 3),
    (33, 2, [16, 1, 3], 7),
    (2, 20, [64, 128, 8], 64),
];

fn heads_divided_and_put_together_agree_with_the_reference(device: &Device) {
    for (tokens, heads, widths, shared) in SIZES {
        for &dtype in types(device) {
            let own: usize = widths.iter().sum();
            let what = format!("{dtype} {tokens} x {heads} x {widths:?} with {shared}");
            let inputs =
                vec![numbers("x", tokens * heads * own, dtype), numbers("shared", tokens * shared, dtype)];
            let tape = Tape::recording();
            let x = tape.leaf(tensor(device, dtype, &[tokens, heads, own], &inputs[0]));
            let all = tape.leaf(tensor(device, dtype, &[tokens, 1, shared], &inputs[1]));
            // The last part is used by nobody, the second twice.
            let parts = ops::split_heads(&tape, &x, &widths).unwrap();
            let y = ops::join_heads(&tape, &[&parts[1], &all, &parts[0], &parts[1]]).unwrap();
            let [first, second, _] = widths;
            let function = |inputs: &[Vec<f64>]| {
                let part = |start, count| (&inputs[0][..], heads, own, [start, count]);
                let shared = (&inputs[1][..], 1, shared, [0, shared]);
                let parts = [part(first, second), shared, part(0, first), part(first, second)];
                joined(&parts, tokens, heads)
            };
            assert_eq!(y.tensor().shape(), [tokens, heads, first + 2 * second + shared]);
            assert_eq!(wide(y.tensor()), function(&inputs), "{what}");
            let d_y = numbers("d_y", y.tensor().elements(), dtype);
            let slopes = tensor(device, dtype, y.tensor().shape(), &d_y);
            let mut gradients = tape.backward(&y, slopes).unwrap();
            let ours = [&x, &all].map(|leaf| arrived(&mut gradients, leaf));
            assert_gradients(&what, &function, &inputs, &d_y, &ours, tolerance(dtype));
        }
    }
}

fn heads_among_other_columns_are_divided_too(device: &Device) {
    let (tokens, heads, width, shared) = (6, 3, 24, 8);
    let total = heads * width + shared;
    for &dtype in types(device) {
        let inputs = vec![numbers("x", tokens * total, dtype)];
        let tape = Tape::recording();
        let x = tape.leaf(tensor(device, dtype, &[tokens, total], &inputs[0]));
        let slot = x.slot().unwrap();
        let columns = ops::split_columns(&tape, x, &[heads * width, shared]).unwrap();
        let shapes = [[tokens, heads, width], [tokens, 1, shared]];
        let vars: Vec<Var> =
            columns.into_iter().zip(shapes).map(|(var, shape)| var.reshape(&shape).unwrap()).collect();
        let parts = ops::split_heads(&tape, &vars[0], &[16, 8]).unwrap();
        let y = ops::join_heads(&tape, &[&parts[1], &vars[1], &parts[0]]).unwrap();
        let function = |inputs: &[Vec<f64>]| {
            let rows = inputs[0].chunks_exact(total);
            let own: Vec<f64> = rows.clone().flat_map(|row| row[..heads * width].to_vec()).collect();
            let rest: Vec<f64> = rows.flat_map(|row| row[heads * width..].to_vec()).collect();
            let part = |start, count| (&own[..], heads, width, [start, count]);
            joined(&[part(16, 8), (&rest, 1, shared, [0, shared]), part(0, 16)], tokens, heads)
        };
        assert_eq!(wide(y.tensor()), function(&inputs), "{dtype}");
        let d_y = numbers("d_y", y.tensor().elements(), dtype);
        let mut gradients = tape.backward(&y, tensor(device, dtype, y.tensor().shape(), &d_y)).unwrap();
        let ours = [Some(wide(&gradients.take(slot).unwrap()))];
        assert_gradients("columns", &function, &inputs, &d_y, &ours, tolerance(dtype));
    }
}

fn parts_of_all_heads_are_put_side_by_side(device: &Device) {
    for (tokens, heads, widths) in [(1, 1, [1, 2, 3, 4]), (5, 3, [8, 16, 8, 24]), (9, 2, [3, 1, 7, 5])] {
        for &dtype in types(device) {
            let own: usize = widths.iter().sum();
            let what = format!("{dtype} {tokens} x {heads} x {widths:?}");
            let inputs = vec![numbers("x", tokens * heads * own, dtype)];
            let [a, b, c, d] = widths;
            // Columns of a token: those of a part for all heads, then the next.
            let side_by_side = |inputs: &[Vec<f64>], token: usize, parts: &[[usize; 2]]| -> Vec<f64> {
                let of_head = |head: usize| &inputs[0][(token * heads + head) * own..][..own];
                let part = |&[first, width]: &[usize; 2]| {
                    (0..heads)
                        .flat_map(move |head| of_head(head)[first..][..width].to_vec())
                        .collect::<Vec<_>>()
                };
                parts.iter().flat_map(part).collect()
            };
            let arrays = [vec![[0, a], [a, b], [a + b, c]], vec![[a + b + c, d]]];
            for (index, parts) in arrays.iter().enumerate() {
                let tape = Tape::recording();
                let x = tape.leaf(tensor(device, dtype, &[tokens, heads, own], &inputs[0]));
                let results = ops::ungroup_heads(&tape, &[(&x, &[&[a, b, c], &[d]])]).unwrap();
                let function = |inputs: &[Vec<f64>]| -> Vec<f64> {
                    (0..tokens).flat_map(|token| side_by_side(inputs, token, parts)).collect()
                };
                let y = &results[index];
                assert_eq!(wide(y.tensor()), function(&inputs), "{what}");
                let d_y = numbers("d_y", y.tensor().elements(), dtype);
                let slopes = tensor(device, dtype, y.tensor().shape(), &d_y);
                let mut gradients = tape.backward(y, slopes).unwrap();
                let ours = [arrived(&mut gradients, &x)];
                assert_gradients(&what, &function, &inputs, &d_y, &ours, tolerance(dtype));
            }
        }
    }
}

fn gradients_of_columns_lie_side_by_side(device: &Device) {
    let (tokens, heads, widths) = (9, 2, [12, 16, 5]);
    for &dtype in types(device) {
        let columns = widths.map(|width| heads * width);
        let total: usize = columns.iter().sum();
        let tape = Tape::recording();
        let x = tape.leaf(tensor(device, dtype, &[tokens, total], &numbers("x", tokens * total, dtype)));
        let slot = x.slot().unwrap();
        let parts = ops::split_columns(&tape, x, &columns).unwrap();
        let parts: Vec<Var> = parts
            .into_iter()
            .zip(widths)
            .map(|(part, width)| part.reshape(&[tokens, heads, width]).unwrap())
            .collect();
        let arrays: [&[&[usize]]; 3] = [&[&[4], &[8]], &[&[16]], &[&[2, 3]]];
        let inputs: Vec<(&Var, &[&[usize]])> = parts.iter().zip(arrays).collect();
        let alone = |part: Var| {
            let shape = [tokens, 1, part.tensor().columns()];
            part.reshape(&shape).unwrap()
        };
        let results: Vec<Var> = ops::ungroup_heads(&tape, &inputs).unwrap().into_iter().map(alone).collect();
        let y = ops::join_heads(&tape, &results.iter().collect::<Vec<_>>()).unwrap();
        let d_y = numbers("d_y", tokens * total, dtype);
        let mut gradients = tape.backward(&y, tensor(device, dtype, y.tensor().shape(), &d_y)).unwrap();
        let ours = wide(&gradients.take(slot).unwrap());
        // Where each column of the result comes from.
        let mut sources = Vec::new();
        let mut first = 0;
        for (arrays, width) in arrays.iter().zip(widths) {
            let mut own = 0;
            for &part in arrays.concat().iter() {
                for head in 0..heads {
                    sources.extend((0..part).map(|column| first + head * width + own + column));
                }
                own += part;
            }
            first += heads * width;
        }
        let mut expected = vec![0.0; tokens * total];
        for token in 0..tokens {
            for (column, source) in sources.iter().enumerate() {
                expected[token * total + source] = d_y[token * total + column];
            }
        }
        assert_eq!(ours, expected, "{dtype}");
    }
}

#[test]
fn sums_over_heads_have_the_same_bits_everywhere() {
    assert_same_bits_everywhere("join_heads", &|| {
        let device = Device::cpu();
        let mut results = Vec::new();
        for dtype in [DType::F32, DType::Bf16] {
            let (tokens, heads, width) = (70, 5, 37);
            let tape = Tape::recording();
            let own = numbers("own", tokens * heads * 3, dtype);
            let own = Var::constant(tensor(&device, dtype, &[tokens, heads, 3], &own));
            let all =
                tape.leaf(tensor(&device, dtype, &[tokens, 1, width], &numbers("x", tokens * width, dtype)));
            let y = ops::join_heads(&tape, &[&own, &all]).unwrap();
            let d_y = numbers("d_y", y.tensor().elements(), dtype);
            let d_y = tensor(&device, dtype, y.tensor().shape(), &d_y);
            let mut gradients = tape.backward(&y, d_y).unwrap();
            results.push(bits(&gradients.take(all.slot().unwrap()).unwrap()));
        }
        results
    });
}

#[test]
fn parts_that_do_not_fit_are_refused() {
    let device = Device::cpu();
    let tape = Tape::off();
    let var = |dtype, shape: &[usize]| {
        Var::constant(tensor(&device, dtype, shape, &vec![0.0; shape.iter().product()]))
    };
    let x = var(DType::F32, &[2, 3, 4]);
    for widths in [&[2, 3][..], &[], &[usize::MAX, 5]] {
        assert!(ops::split_heads(&tape, &x, widths).is_err(), "{widths:?}");
    }
    assert!(ops::split_heads(&tape, &var(DType::F32, &[2, 12]), &[6, 6]).is_err());
    assert!(ops::join_heads(&tape, &[]).is_err());
    for other in [
        var(DType::F32, &[2, 2, 4]),
        var(DType::F32, &[3, 3, 4]),
        var(DType::Bf16, &[2, 3, 4]),
        var(DType::F32, &[2, 12]),
    ] {
        assert!(ops::join_heads(&tape, &[&x, &other]).is_err(), "{other:?}", other = other.tensor());
    }
}
