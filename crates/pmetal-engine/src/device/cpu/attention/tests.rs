use half::bf16;

use super::*;

/// A small generator, so that the tests need no other crate.
struct Random(u64);

impl Random {
    fn values(&mut self, count: usize) -> Vec<f32> {
        let next = |_| {
            self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            ((self.0 >> 40) as f32) / (1u64 << 23) as f32 - 1.0
        };
        (0..count).map(next).collect()
    }
}

#[derive(Clone)]
struct Case {
    name: &'static str,
    p: AttentionParameters,
    kind: MaskKind,
    segments: Vec<Segment>,
    tokens: (usize, usize),
    has_sinks: bool,
}

const PLAIN: AttentionParameters = AttentionParameters {
    query_heads: 3,
    key_value_heads: 1,
    key_width: 20,
    value_width: 20,
    scale: 0.7,
    softcap: None,
};

/// Documents of the given numbers of queries and keys, with a token between them that belongs to none.
fn case(
    name: &'static str,
    (p, kind): (AttentionParameters, MaskKind),
    lengths: &[(usize, usize)],
    has_sinks: bool,
) -> Case {
    let (mut query, mut key) = (0, 0);
    let mut segments = Vec::new();
    for &(query_length, key_length) in lengths {
        segments.push(Segment { query_start: query, query_length, key_start: key, key_length });
        (query, key) = (query + query_length + 1, key + key_length + 1);
    }
    Case { name, p, kind, segments, tokens: (query, key), has_sinks }
}

fn cases() -> Vec<Case> {
    let wide =
        AttentionParameters { query_heads: 4, key_value_heads: 2, key_width: 64, value_width: 48, ..PLAIN };
    let (plain, wide) = ((PLAIN, MaskKind::CAUSAL), (wide, MaskKind::CAUSAL));
    let windowed = |keys| MaskKind { window: Some(keys), ..MaskKind::CAUSAL };
    let chunked = MaskKind { chunk: Some(50), ..MaskKind::CAUSAL };
    let capped = |cap| AttentionParameters { softcap: Some(cap), ..PLAIN };
    vec![
        case("causal", plain, &[(1, 1), (37, 37), (230, 230)], false),
        case("value width unlike key width", wide, &[(130, 130), (20, 20)], false),
        case("window", (PLAIN, windowed(37)), &[(210, 210), (9, 9)], false),
        case("window of one", (PLAIN, windowed(1)), &[(40, 40)], false),
        case("chunk", (PLAIN, chunked), &[(230, 230), (33, 33)], false),
        case(
            "chunk without causality",
            (PLAIN, MaskKind { sees_ahead: true, ..chunked }),
            &[(230, 230)],
            false,
        ),
        case("softcap", (capped(1.5), MaskKind::CAUSAL), &[(130, 130)], false),
        case("sinks", plain, &[(110, 110), (3, 3)], true),
        case("sinks, softcap and window", (capped(2.0), windowed(37)), &[(140, 140)], true),
        case("queries after a prefix", plain, &[(20, 130), (100, 117)], false),
        case("few queries with many keys", plain, &[(1, 301), (8, 97), (3, 3)], false),
        case("few queries, window and sinks", (PLAIN, windowed(37)), &[(2, 301), (5, 41)], true),
        case("few queries, chunk and softcap", (capped(1.0), chunked), &[(8, 121)], false),
        case(
            "not causal",
            (wide.0, MaskKind { sees_ahead: true, ..MaskKind::CAUSAL }),
            &[(70, 101), (120, 30)],
            false,
        ),
        case("queries that see nothing", plain, &[(30, 12), (8, 2), (120, 0)], false),
        case("queries that see only sinks", plain, &[(30, 12), (4, 0)], true),
    ]
}

struct Tensors {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    sinks: Vec<f32>,
    d_out: Vec<f32>,
}

impl Case {
    fn tensors(&self) -> Tensors {
        let mut random = Random(self.name.len() as u64);
        let (queries, keys, p) = (self.tokens.0, self.tokens.1, &self.p);
        Tensors {
            q: random.values(queries * p.query_heads * p.key_width),
            k: random.values(keys * p.key_value_heads * p.key_width),
            v: random.values(keys * p.key_value_heads * p.value_width),
            sinks: random.values(p.query_heads),
            d_out: random.values(queries * p.query_heads * p.value_width),
        }
    }

    fn inputs<'a>(&'a self, tensors: &'a Tensors) -> Inputs<'a> {
        Inputs {
            parameters: &self.p,
            kind: self.kind,
            segments: &self.segments,
            q: Elements::F32(&tensors.q),
            k: Elements::F32(&tensors.k),
            v: Elements::F32(&tensors.v),
            sinks: self.has_sinks.then_some(&tensors.sinks),
            chosen: None,
        }
    }
}

/// Whether the query sees the key, written without ranges.
fn sees(kind: MaskKind, segment: &Segment, query: usize, key: usize) -> bool {
    let position = query as i64 + segment.key_length as i64 - segment.query_length as i64;
    let key = key as i64;
    (kind.sees_ahead || key <= position)
        && kind.window.is_none_or(|window| position - (window as i64) < key && key <= position)
        && kind.chunk.is_none_or(|chunk| position.div_euclid(chunk as i64) == key.div_euclid(chunk as i64))
}

#[derive(Default)]
struct Results {
    out: Vec<f64>,
    lse: Vec<f64>,
    dq: Vec<f64>,
    dk: Vec<f64>,
    dv: Vec<f64>,
    d_sinks: Vec<f64>,
}

fn dot(left: &[f64], right: &[f64]) -> f64 {
    left.iter().zip(right).map(|(left, right)| left * right).sum()
}

fn add(out: &mut [f64], factor: f64, values: &[f64]) {
    out.iter_mut().zip(values).for_each(|(out, value)| *out += factor * value);
}

/// Attention and its gradients with whole rows in f64.
fn reference(case: &Case, t: &Tensors) -> Results {
    let p = &case.p;
    let wide = |values: &[f32]| values.iter().map(|&value| f64::from(value)).collect::<Vec<_>>();
    let (q, k, v, d_out) = (wide(&t.q), wide(&t.k), wide(&t.v), wide(&t.d_out));
    let mut r = Results {
        out: vec![0.0; d_out.len()],
        lse: vec![f64::NEG_INFINITY; case.tokens.0 * p.query_heads],
        dq: vec![0.0; q.len()],
        dk: vec![0.0; k.len()],
        dv: vec![0.0; v.len()],
        d_sinks: vec![0.0; p.query_heads],
    };
    for segment in &case.segments {
        for (query, head) in (0..segment.query_length).flat_map(|i| (0..p.query_heads).map(move |h| (i, h))) {
            let row = (segment.query_start + query) * p.query_heads + head;
            let group = head * p.key_value_heads / p.query_heads;
            let at = |key: usize| (segment.key_start + key) * p.key_value_heads + group;
            let q_row = &q[row * p.key_width..][..p.key_width];
            let seen: Vec<_> =
                (0..segment.key_length).filter(|&key| sees(case.kind, segment, query, key)).collect();
            let raw: Vec<_> = seen
                .iter()
                .map(|&j| f64::from(p.scale) * dot(q_row, &k[at(j) * p.key_width..][..p.key_width]))
                .collect();
            let cap = p.softcap.map(f64::from);
            let scores: Vec<_> = raw.iter().map(|&s| cap.map_or(s, |cap| cap * (s / cap).tanh())).collect();
            let mut denominator = scores.iter().map(|score| score.exp()).sum::<f64>();
            denominator += if case.has_sinks { f64::from(t.sinks[head]).exp() } else { 0.0 };
            if denominator == 0.0 {
                continue;
            }
            r.lse[row] = denominator.ln();
            let d_row = &d_out[row * p.value_width..][..p.value_width];
            let mut delta = 0.0;
            for (&j, score) in seen.iter().zip(&scores) {
                let weight = score.exp() / denominator;
                let v_row = &v[at(j) * p.value_width..][..p.value_width];
                add(&mut r.out[row * p.value_width..][..p.value_width], weight, v_row);
                add(&mut r.dv[at(j) * p.value_width..][..p.value_width], weight, d_row);
                delta += weight * dot(d_row, v_row);
            }
            for ((&j, score), raw) in seen.iter().zip(&scores).zip(&raw) {
                let v_row = &v[at(j) * p.value_width..][..p.value_width];
                let mut d_score =
                    score.exp() / denominator * (dot(d_row, v_row) - delta) * f64::from(p.scale);
                d_score *= cap.map_or(1.0, |cap| 1.0 - (raw / cap).tanh().powi(2));
                add(
                    &mut r.dq[row * p.key_width..][..p.key_width],
                    d_score,
                    &k[at(j) * p.key_width..][..p.key_width],
                );
                add(&mut r.dk[at(j) * p.key_width..][..p.key_width], d_score, q_row);
            }
            if case.has_sinks {
                r.d_sinks[head] -= f64::from(t.sinks[head]).exp() / denominator * delta;
            }
        }
    }
    r
}

fn poisoned(count: usize) -> Vec<f32> {
    vec![f32::NAN; count]
}

#[derive(Clone, PartialEq)]
struct Computed {
    out: Vec<f32>,
    lse: Vec<f32>,
    dq: Vec<f32>,
    dk: Vec<f32>,
    dv: Vec<f32>,
    d_sinks: Vec<f32>,
}

impl Computed {
    fn bits(&self) -> Vec<u32> {
        let all = [&self.out, &self.lse, &self.dq, &self.dk, &self.dv, &self.d_sinks];
        all.into_iter().flatten().map(|value| value.to_bits()).collect()
    }
}

fn compute(level: SimdLevel, threads: usize, case: &Case, t: &Tensors) -> Computed {
    let mut c = Computed {
        out: poisoned(t.d_out.len()),
        lse: poisoned(case.tokens.0 * case.p.query_heads),
        dq: poisoned(t.q.len()),
        dk: poisoned(t.k.len()),
        dv: poisoned(t.v.len()),
        d_sinks: poisoned(t.sinks.len()),
    };
    let inputs = case.inputs(t);
    forward_at(level, threads, &inputs, ElementsMut::F32(&mut c.out), &mut c.lse);
    let saved = Saved { out: Elements::F32(&c.out), lse: &c.lse, d_out: Elements::F32(&t.d_out) };
    let gradients = Gradients {
        dq: ElementsMut::F32(&mut c.dq),
        dk: ElementsMut::F32(&mut c.dk),
        dv: ElementsMut::F32(&mut c.dv),
        d_sinks: Some(&mut c.d_sinks),
    };
    backward_at(level, threads, &inputs, &saved, gradients);
    c
}

fn assert_close(name: &str, what: &str, actual: &[f32], expected: &[f64], tolerance: f64) {
    assert_eq!(actual.len(), expected.len());
    for (index, (&actual, &expected)) in actual.iter().zip(expected).enumerate() {
        let is_close = (f64::from(actual) - expected).abs() <= tolerance * (1.0 + expected.abs());
        let is_equal = f64::from(actual) == expected;
        assert!(is_close || is_equal, "{name}: {what}[{index}] is {actual}, not {expected}");
    }
}

fn levels() -> impl Iterator<Item = SimdLevel> {
    SimdLevel::ALL.into_iter().filter(|level| level.is_available())
}

#[test]
fn results_and_gradients_agree_with_an_f64_reference() {
    for case in cases() {
        let tensors = case.tensors();
        let expected = reference(&case, &tensors);
        for threads in [1, 64] {
            let actual = compute(SimdLevel::current(), threads, &case, &tensors);
            let pairs = [
                ("out", &actual.out, &expected.out),
                ("lse", &actual.lse, &expected.lse),
                ("dq", &actual.dq, &expected.dq),
                ("dk", &actual.dk, &expected.dk),
                ("dv", &actual.dv, &expected.dv),
                ("d_sinks", &actual.d_sinks, &expected.d_sinks),
            ];
            for (what, actual, expected) in pairs {
                assert_close(case.name, what, actual, expected, 4e-6);
            }
        }
    }
}

#[test]
fn results_have_the_same_bits_at_every_level_and_for_any_number_of_threads() {
    for case in cases() {
        let tensors = case.tensors();
        let expected = compute(SimdLevel::Portable, 1, &case, &tensors).bits();
        for level in levels() {
            for threads in [1, 2, 5, 64] {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads.min(5)).build().unwrap();
                let actual = pool.install(|| compute(level, threads, &case, &tensors).bits());
                assert!(actual == expected, "{}: {level:?}, {threads} threads", case.name);
            }
        }
    }
}

/// The sum of out times d_out, which the gradients are of.
fn objective(case: &Case, tensors: &Tensors) -> f64 {
    let out = reference(case, tensors).out;
    out.iter().zip(&tensors.d_out).map(|(out, &d_out)| out * f64::from(d_out)).sum()
}

#[test]
fn gradients_agree_with_finite_differences() {
    let small =
        AttentionParameters { query_heads: 2, key_value_heads: 1, key_width: 5, value_width: 3, ..PLAIN };
    let capped = AttentionParameters { softcap: Some(1.2), ..small };
    let near = MaskKind { window: Some(6), ..MaskKind::CAUSAL };
    for case in [
        case("small", (small, MaskKind::CAUSAL), &[(9, 12), (4, 4)], true),
        case("capped", (capped, near), &[(10, 10)], true),
    ] {
        let mut tensors = case.tensors();
        let actual = compute(SimdLevel::current(), 1, &case, &tensors);
        let all = [(0, actual.dq), (1, actual.dk), (2, actual.dv), (3, actual.d_sinks)];
        for (which, gradients) in all {
            for (index, &gradient) in gradients.iter().enumerate() {
                let mut moved = |step: f32| {
                    let values = match which {
                        0 => &mut tensors.q,
                        1 => &mut tensors.k,
                        2 => &mut tensors.v,
                        _ => &mut tensors.sinks,
                    };
                    let before = values[index];
                    values[index] = before + step;
                    let moved = f64::from(values[index]);
                    let result = objective(&case, &tensors);
                    match which {
                        0 => tensors.q[index] = before,
                        1 => tensors.k[index] = before,
                        2 => tensors.v[index] = before,
                        _ => tensors.sinks[index] = before,
                    }
                    (result, moved)
                };
                let (above, below) = (moved(1e-3), moved(-1e-3));
                let expected = (above.0 - below.0) / (above.1 - below.1);
                let error = (f64::from(gradient) - expected).abs();
                assert!(error < 2e-5, "{}: {which}[{index}] is {gradient}, not {expected}", case.name);
            }
        }
    }
}

#[test]
fn documents_do_not_touch_each_other() {
    let case = case("documents", (PLAIN, MaskKind::CAUSAL), &[(100, 100), (150, 150), (7, 90)], true);
    let mut tensors = case.tensors();
    let before = compute(SimdLevel::current(), 1, &case, &tensors);
    let (segment, p) = (case.segments[1], case.p);
    let keys = scaled(&segment.keys(), p.key_value_heads * p.key_width);
    let queries = scaled(&segment.queries(), p.query_heads * p.key_width);
    tensors.k[keys.clone()].iter_mut().for_each(|value| *value = f32::NAN);
    tensors.q[queries.clone()].iter_mut().for_each(|value| *value = f32::INFINITY);
    let after = compute(SimdLevel::current(), 1, &case, &tensors);
    let same = |before: &[f32], after: &[f32], changed: &Range<usize>| {
        before
            .iter()
            .zip(after)
            .enumerate()
            .all(|(i, (x, y))| changed.contains(&i) || x.to_bits() == y.to_bits())
    };
    assert!(same(&before.dq, &after.dq, &queries) && !same(&before.dq, &after.dq, &(0..0)));
    assert!(same(&before.dk, &after.dk, &keys));
    assert!(same(&before.out, &after.out, &queries));
    assert!(same(&before.lse, &after.lse, &scaled(&segment.queries(), p.query_heads)));
}

#[test]
fn bf16_tensors_agree_with_their_f32_copies() {
    for case in cases() {
        let mut tensors = case.tensors();
        let narrow = |values: &mut Vec<f32>| {
            let narrow: Vec<_> = values.iter().map(|&value| bf16::from_f32(value)).collect();
            *values = narrow.iter().map(|value| value.to_f32()).collect();
            narrow
        };
        let (q, k, v) = (narrow(&mut tensors.q), narrow(&mut tensors.k), narrow(&mut tensors.v));
        let d_out = narrow(&mut tensors.d_out);
        // A matrix unit rounds weights to bf16.
        let level = levels().filter(|&level| level != SimdLevel::Avx512Amx).last().unwrap();
        let expected = compute(level, 1, &case, &tensors);
        let elements = (Elements::Bf16(&q), Elements::Bf16(&k), Elements::Bf16(&v));
        let inputs = Inputs { q: elements.0, k: elements.1, v: elements.2, ..case.inputs(&tensors) };
        let mut out = vec![bf16::NAN; d_out.len()];
        let mut lse = poisoned(expected.lse.len());
        forward_at(level, 1, &inputs, ElementsMut::Bf16(&mut out), &mut lse);
        let rounded = |values: &[f32]| values.iter().map(|&value| bf16::from_f32(value)).collect::<Vec<_>>();
        assert!(out == rounded(&expected.out) && lse == expected.lse, "{}", case.name);
        let (mut dq, mut dk, mut dv) =
            (vec![bf16::NAN; q.len()], vec![bf16::NAN; k.len()], vec![bf16::NAN; v.len()]);
        let saved = Saved { out: Elements::F32(&expected.out), lse: &lse, d_out: Elements::Bf16(&d_out) };
        let gradients = Gradients {
            dq: ElementsMut::Bf16(&mut dq),
            dk: ElementsMut::Bf16(&mut dk),
            dv: ElementsMut::Bf16(&mut dv),
            d_sinks: None,
        };
        backward_at(level, 1, &inputs, &saved, gradients);
        assert!(dq == rounded(&expected.dq) && dk == rounded(&expected.dk), "{}", case.name);
        assert!(dv == rounded(&expected.dv), "{}", case.name);
    }
}

#[cfg(target_arch = "x86_64")]
mod tiles {
    use super::*;
    use crate::device::cpu::gemm::amx::tests::Model;
    use crate::device::cpu::gemm::amx::{Amx, Tiles};

    /// What the passes give for bf16 copies of the tensors, multiplied by `T`.
    fn compute_by<T: Tiles>(threads: usize, case: &Case, t: &Tensors) -> Computed {
        let narrow = |values: &[f32]| values.iter().map(|&value| bf16::from_f32(value)).collect::<Vec<_>>();
        let [q, k, v, d_out] = [&t.q, &t.k, &t.v, &t.d_out].map(|values| narrow(values));
        let elements = (Elements::Bf16(&q), Elements::Bf16(&k), Elements::Bf16(&v));
        let inputs = Inputs { q: elements.0, k: elements.1, v: elements.2, ..case.inputs(t) };
        // The passes leave tokens of no document alone.
        let mut c = Computed {
            out: vec![0.0; d_out.len()],
            lse: vec![f32::NEG_INFINITY; case.tokens.0 * case.p.query_heads],
            dq: vec![0.0; q.len()],
            dk: vec![0.0; k.len()],
            dv: vec![0.0; v.len()],
            d_sinks: vec![0.0; t.sinks.len()],
        };
        forward::run_tiles::<T>(T::LEVEL, threads, &inputs, &mut ElementsMut::F32(&mut c.out), &mut c.lse);
        let saved = Saved { out: Elements::F32(&c.out), lse: &c.lse, d_out: Elements::Bf16(&d_out) };
        let mut gradients = Gradients {
            dq: ElementsMut::F32(&mut c.dq),
            dk: ElementsMut::F32(&mut c.dk),
            dv: ElementsMut::F32(&mut c.dv),
            d_sinks: Some(&mut c.d_sinks),
        };
        backward::with_pass(T::LEVEL, threads, &inputs, &saved, &mut gradients, |pass| {
            pass.run_tasks::<super::super::tiles::TileBlocks<T>>();
        });
        c
    }

    fn assert_near(name: &str, what: &str, actual: &[f32], expected: &[f64], tolerance: f64) {
        let norm =
            |values: &mut dyn Iterator<Item = f64>| values.map(|value| value * value).sum::<f64>().sqrt();
        let pairs =
            || actual.iter().zip(expected).filter(|(actual, expected)| f64::from(**actual) != **expected);
        let error = norm(&mut pairs().map(|(&actual, &expected)| f64::from(actual) - expected));
        let size = norm(&mut expected.iter().copied().filter(|value| value.is_finite()));
        assert!(error <= tolerance * size + 1e-5, "{name}: {what} is off by {error} of {size}");
    }

    fn check<T: Tiles>() {
        for case in cases() {
            let mut tensors = case.tensors();
            for values in [&mut tensors.q, &mut tensors.k, &mut tensors.v, &mut tensors.d_out] {
                values.iter_mut().for_each(|value| *value = bf16::from_f32(*value).to_f32());
            }
            let expected = reference(&case, &tensors);
            let alone = compute_by::<T>(1, &case, &tensors);
            for (what, actual, expected, tolerance) in [
                ("out", &alone.out, &expected.out, 3e-3),
                ("lse", &alone.lse, &expected.lse, 1e-6),
                ("dq", &alone.dq, &expected.dq, 4e-3),
                ("dk", &alone.dk, &expected.dk, 4e-3),
                ("dv", &alone.dv, &expected.dv, 3e-3),
                ("d_sinks", &alone.d_sinks, &expected.d_sinks, 1e-2),
            ] {
                assert_near(case.name, what, actual, expected, tolerance);
            }
            for threads in [2, 64] {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads.min(3)).build().unwrap();
                let together = pool.install(|| compute_by::<T>(threads, &case, &tensors));
                assert!(together.bits() == alone.bits(), "{}: {threads} threads", case.name);
            }
        }
    }

    #[test]
    fn blocks_of_tiles_agree_with_an_f64_reference_for_any_number_of_threads() {
        if SimdLevel::Avx2.is_available() {
            check::<Model>();
        }
        if SimdLevel::Avx512Amx.is_available() {
            check::<Amx>();
        }
    }
}
