//! What the runner reports.

use half::{bf16, f16};

use super::*;

static FAULTY: ModuleText = ModuleText {
    name: "faulty",
    texts: &[
        "",
        include_str!("../../../../../kernels/common.cpp"),
        "
KERNEL(half_returns)(GIVEN_POSITION GLOBAL float* out) {
    if (THREAD >= 32) return;
    BARRIER();
    out[THREAD] = 1.0f;
}
KERNEL(lane_is_missing)(GIVEN_POSITION GLOBAL float* out) {
    if (THREAD == 5) return;
    out[THREAD] = simd_sum(1.0f);
}
KERNEL(misaligned)(GIVEN_POSITION GLOBAL float* out) { store_eight(load_eight(out + THREAD), out); }
KERNEL(shared_is_fresh)(GIVEN_POSITION GLOBAL float* out) {
    SHARED float scratch[64];
    out[GROUP_X * THREADS + THREAD] = scratch[THREAD];
    scratch[THREAD] = 1.0f;
}
KERNEL(unordered)(GIVEN_POSITION GLOBAL float* out) {
    SHARED float scratch[2];
    if (THREAD % 32 == 0) scratch[THREAD / 32] = 1.0f;
    if (THREAD == 0) out[GROUP_X] = scratch[1];
}
KERNEL(used_again)(GIVEN_POSITION GLOBAL float* out) {
    SHARED float scratch[2];
    if (THREAD % 32 == 0) scratch[THREAD / 32] = 1.0f;
    BARRIER();
    float other = scratch[1 - THREAD / 32];
    if (THREAD % 32 == 0) scratch[THREAD / 32] = 2.0f;
    if (THREAD == 0) out[GROUP_X] = other;
}
KERNEL(shared_by_both)(GIVEN_POSITION GLOBAL float* out) {
    SHARED float scratch[1];
    if (THREAD == 0 || THREAD == 32) scratch[0] = (float)THREAD;
    float nothing = simd_sum(0.0f);
    if (THREAD == 0) out[GROUP_X] = scratch[0] + nothing;
}
KERNEL(rounds)(GIVEN_POSITION const GLOBAL float* x, GLOBAL bf16* low, GLOBAL f16* half, GLOBAL float* back) {
    uint i = GROUP_X * THREADS + THREAD;
    narrow(x[i], low + i);
    narrow(x[i], half + i);
    back[i] = widen(half[i]);
}
",
    ],
};

/// Runs one group of 64 threads, or more, on 512 bytes of floats for each argument.
fn run(emulator: &Emulator, kernel: &str, arguments: &[u64], groups: u32) -> Result<()> {
    let arguments: Vec<Argument> = arguments.iter().map(|&address| Argument::Address(address)).collect();
    emulator.launch(&Launch {
        module: &FAULTY,
        defines: &[],
        kernel,
        grid: [groups, 1, 1],
        block: [64, 1, 1],
        shared_bytes: 0,
        arguments: &arguments,
    });
    emulator.synchronize()
}

fn floats(emulator: &Emulator, address: u64, count: usize) -> Vec<f32> {
    let mut values = vec![0.0_f32; count];
    emulator.download(address, bytemuck::cast_slice_mut(&mut values)).unwrap();
    values
}

#[test]
fn faults_of_kernels_are_errors_that_name_the_thread() {
    if !has_compiler() {
        return println!("skipped: no C++ compiler");
    }
    let cases = [
        ("half_returns", "it has returned while others wait at a barrier"),
        ("lane_is_missing", "thread 5 of group (0, 0, 0): it is not at the shuffle of its SIMD group"),
        ("misaligned", "16 bytes divide"),
        ("absent", "dlsym"),
    ];
    for (kernel, expected) in cases {
        let emulator = Emulator::new(1);
        let address = emulator.allocate(512).unwrap();
        let error = run(&emulator, kernel, &[address], 1).unwrap_err().to_string();
        assert!(error.contains(kernel) && error.contains(expected), "{error}");
        emulator.free(address, 512);
        // The module is of use after a fault.
        let emulator = Emulator::new(2);
        let address = emulator.allocate(512).unwrap();
        run(&emulator, "shared_is_fresh", &[address], 2).unwrap();
        assert!(floats(&emulator, address, 128).iter().all(|value| value.is_nan()));
        emulator.free(address, 512);
    }
    let error = run(&Emulator::new(1), "rounds", &[0], 1).unwrap_err().to_string();
    assert!(error.contains("its parameters are aaaa, it was given a"), "{error}");
}

#[test]
fn what_lacks_a_barrier_depends_on_the_seed() {
    if !has_compiler() {
        return println!("skipped: no C++ compiler");
    }
    // Read too early; written again too early; written by another between a write and its read.
    type IsMissed = fn(f32) -> bool;
    let cases: [(_, IsMissed, _); 3] = [
        ("unordered", f32::is_nan, 30..70),
        ("used_again", |value| value == 2.0, 30..70),
        ("shared_by_both", |value| value == 32.0, 10..40),
    ];
    for (kernel, is_missed, expected) in cases {
        let emulator = Emulator::new(1);
        let address = emulator.allocate(512).unwrap();
        run(&emulator, kernel, &[address], 100).unwrap();
        let missed = floats(&emulator, address, 100).into_iter().filter(|&value| is_missed(value)).count();
        assert!(expected.contains(&missed), "{kernel}: {missed} of 100 groups");
        emulator.free(address, 512);
    }
}

#[test]
fn narrow_types_round_as_the_processor_does() {
    if !has_compiler() {
        return println!("skipped: no C++ compiler");
    }
    let mut values: Vec<f32> = (0..=u16::MAX)
        .flat_map(|bits| {
            let below = f16::from_bits(bits).to_f32();
            let middle = f32::midpoint(below, f16::from_bits(bits.wrapping_add(1)).to_f32());
            [
                below,
                middle,
                f32::from_bits(middle.to_bits() ^ 1),
                f32::from_bits(u32::from(bits) << 16 | 0x8000),
            ]
        })
        .collect();
    values.extend([65519.9, 65520.0, f32::MAX, f32::NAN, -f32::NAN, f32::MIN_POSITIVE]);
    values.resize(values.len().next_multiple_of(64), -0.0);
    let emulator = Emulator::new(1);
    let bytes = 4 * values.len();
    let addresses = [(); 4].map(|()| emulator.allocate(bytes).unwrap());
    emulator.upload(bytemuck::cast_slice(&values), addresses[0]);
    run(&emulator, "rounds", &addresses, values.len() as u32 / 64).unwrap();
    let mut halves = [vec![0_u16; values.len()], vec![0_u16; values.len()]];
    for (halves, &address) in halves.iter_mut().zip(&addresses[1..]) {
        emulator.download(address, bytemuck::cast_slice_mut(halves)).unwrap();
    }
    let back = floats(&emulator, addresses[3], values.len());
    for (index, &value) in values.iter().enumerate() {
        let (low, half) = (bf16::from_bits(halves[0][index]), f16::from_bits(halves[1][index]));
        if value.is_nan() {
            assert!(low.is_nan() && half.is_nan() && back[index].is_nan(), "{:x}", value.to_bits());
            continue;
        }
        assert_eq!(low.to_bits(), bf16::from_f32(value).to_bits(), "{value}");
        assert_eq!(half.to_bits(), f16::from_f32(value).to_bits(), "{value}");
        assert_eq!(back[index].to_bits(), half.to_f32().to_bits(), "{value}");
    }
    addresses.iter().for_each(|&address| emulator.free(address, bytes));
}
