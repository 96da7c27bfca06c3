//! What only a device can show. Without one every test says so and passes.

use std::path::Path;

use half::{bf16, f16};

use super::*;
use crate::device::gpu::runtime::Matrix;

fn open(folder: &Path) -> Option<Cuda> {
    let options = CudaOptions { cache: Some(folder.to_path_buf()), ..CudaOptions::default() };
    match Cuda::open(&options) {
        Ok(cuda) => Some(cuda),
        Err(error) => {
            println!("skipped: no CUDA device ({error})");
            None
        }
    }
}

fn device() -> Option<(Cuda, tempfile::TempDir)> {
    let folder = tempfile::tempdir().unwrap();
    open(folder.path()).map(|cuda| (cuda, folder))
}

static KERNELS: ModuleText = ModuleText {
    name: "tests",
    texts: &[
        "extern \"C\" __global__ void add(float* x, float by, unsigned n) {\n",
        "  unsigned i = blockIdx.x * blockDim.x + threadIdx.x; if (i < n) x[i] += by * FACTOR; }\n",
        "extern \"C\" __global__ void last(float* out, int n) { extern __shared__ float y[];\n",
        "  for (int i = threadIdx.x; i < n; i += blockDim.x) y[i] = i; __syncthreads();\n",
        "  if (threadIdx.x == 0) *out = y[n - 1]; }\n",
        "extern \"C\" __global__ void crash(float* x, float, unsigned) { x[1ull << 44] = FACTOR; }\n",
    ],
};

fn add(address: u64, by: f32, elements: u32, arguments: usize, factor: &str, kernel: &str) -> impl Fn(&Cuda) {
    let all = [Argument::Address(address), Argument::F32(by), Argument::U32(elements)];
    let (factor, kernel) = (factor.to_owned(), kernel.to_owned());
    move |cuda| {
        cuda.launch(&Launch {
            module: &KERNELS,
            defines: &[("FACTOR", &factor)],
            kernel: &kernel,
            grid: [elements.div_ceil(128), 1, 1],
            block: [128, 1, 1],
            shared_bytes: 0,
            arguments: &all[..arguments],
        });
    }
}

fn floats(cuda: &Cuda, address: u64, elements: usize) -> Vec<f32> {
    let mut out = vec![f32::NAN; elements];
    cuda.download(address, bytemuck::cast_slice_mut(&mut out)).unwrap();
    out
}

fn random(count: usize, seed: &mut u64) -> Vec<f32> {
    (0..count)
        .map(|_| {
            *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (*seed >> 40) as f32 / (1_u64 << 23) as f32 - 1.0
        })
        .collect()
}

#[test]
fn device_facts_are_those_of_a_gpu() {
    let Some((cuda, _folder)) = device() else { return };
    println!("{:?}\n{:?}", cuda.device(), cuda_libraries());
    assert_eq!(cuda_devices().unwrap()[0], *cuda.device());
    let (free, total) = cuda.memory().unwrap();
    assert!(free <= total && total <= cuda.device().memory_bytes);
    assert!(cuda.device().multiprocessors > 0 && cuda.device().shared_bytes_per_block >= 48 << 10);
}

#[test]
fn bytes_come_back_through_every_kind_of_copy() {
    let Some((cuda, _folder)) = device() else { return };
    let mut seed = 1;
    for bytes in [0, 1, 3, 4096, (8 << 20) - 1, (8 << 20) + 5, 75 << 20] {
        let address = cuda.allocate(bytes + 16).unwrap();
        let data: Vec<u8> = random(bytes, &mut seed).iter().map(|x| x.to_bits() as u8).collect();
        let mut back = vec![0; bytes];
        cuda.upload(&data, address);
        cuda.download(address, &mut back).unwrap();
        assert!(data == back, "{bytes}");
        let other = cuda.allocate(bytes + 16).unwrap();
        cuda.fill(other, 0xab, bytes + 16);
        cuda.copy(address, other + 5, bytes);
        back.resize(bytes + 16, 0);
        cuda.download(other, &mut back).unwrap();
        assert!(back[5..][..bytes] == data && back[4] == 0xab && back[bytes + 5] == 0xab);
        cuda.free(address, bytes + 16);
        cuda.free(other, bytes + 16);
    }
    // Many small ones wrap around the ring of slots before the device has read the first.
    let address = cuda.allocate(64 << 20).unwrap();
    let data: Vec<u8> = random(64 << 20, &mut seed).iter().map(|x| x.to_bits() as u8).collect();
    for (index, part) in data.chunks(300_000).enumerate() {
        cuda.upload(part, address + index as u64 * 300_000);
    }
    let mut back = vec![0; data.len()];
    cuda.download(address, &mut back).unwrap();
    assert!(back == data);
    assert_eq!(cuda.pool_report().live, 64 << 20);
}

#[test]
fn rows_are_copied_at_odd_pitches() {
    let Some((cuda, _folder)) = device() else { return };
    let mut seed = 2;
    for (source_pitch, target_pitch, width, rows) in
        [(7, 13, 5, 9), (4096, 2050, 2050, 700), (6, 6, 6, 4), (9, 8, 8, 1)]
    {
        let data: Vec<u8> =
            random(source_pitch * rows, &mut seed).iter().map(|x| x.to_bits() as u8).collect();
        let [source, target] = [source_pitch, target_pitch].map(|pitch| cuda.allocate(pitch * rows).unwrap());
        cuda.upload(&data, source);
        cuda.fill(target, 9, target_pitch * rows);
        cuda.copy_rows((source, source_pitch), (target, target_pitch), width, rows);
        let mut back = vec![0; target_pitch * rows];
        cuda.download(target, &mut back).unwrap();
        for (row, line) in back.chunks(target_pitch).enumerate() {
            assert_eq!(line[..width], data[row * source_pitch..][..width]);
            assert!(line[width..].iter().all(|&byte| byte == 9));
        }
    }
}

#[test]
fn memory_that_is_not_there_is_refused_and_what_is_freed_can_be_had_again() {
    let Some((cuda, _folder)) = device() else { return };
    assert_eq!(cuda.allocate(1 << 50), None);
    let half = cuda.memory().unwrap().0 / 10 * 6;
    for _ in 0..3 {
        // The second segment of this size does not fit beside the first: it must be given back.
        for bytes in [half, half + (64 << 20)] {
            let address = cuda.allocate(bytes).unwrap();
            assert_eq!(address % 256, 0);
            cuda.fill(address + bytes as u64 - 256, 1, 256);
            cuda.free(address, bytes);
        }
        assert!(cuda.trim() >= half);
    }
    cuda.synchronize().unwrap();
    assert_eq!(
        cuda.pool_report(),
        PoolReport { peak_live: cuda.pool_report().peak_live, ..PoolReport::default() }
    );
    cuda.free(512, 1);
    let error = cuda.synchronize().unwrap_err().to_string();
    assert!(error.contains("1 bytes at 0x200 are not allocated"), "{error}");
}

#[test]
fn kernels_run_and_code_is_compiled_once_then_read_from_disk() {
    let Some((cuda, folder)) = device() else { return };
    let run = |cuda: &Cuda| {
        let address = cuda.allocate(4000).unwrap();
        cuda.fill(address, 0, 4000);
        add(address, 1.5, 1000, 3, "1.0f", "add")(cuda);
        add(address, 1.5, 1000, 3, "3.0f", "add")(cuda);
        add(address, 1.5, 0, 3, "3.0f", "add")(cuda);
        assert!(floats(cuda, address, 1000).iter().all(|&x| x == 6.0));
        cuda.launch(&Launch {
            module: &KERNELS,
            defines: &[("FACTOR", "1.0f")],
            kernel: "last",
            grid: [1; 3],
            block: [256, 1, 1],
            shared_bytes: 90_000,
            arguments: &[Argument::Address(address), Argument::U32(22_500)],
        });
        assert_eq!(floats(cuda, address, 2), [22_499.0, 6.0]);
        (cuda.counts().compiled_modules, cuda.counts().cached_modules)
    };
    assert_eq!(run(&cuda), (2, 0));
    assert_eq!(run(&open(folder.path()).unwrap()), (0, 2));
}

#[test]
fn the_first_failure_is_named_and_kept() {
    let folder = tempfile::tempdir().unwrap();
    let failure = |kernel: &str, factor: &str, arguments: usize| {
        let cuda = open(folder.path())?;
        let address = cuda.allocate(64).unwrap();
        add(address, 1.0, 1, arguments, factor, kernel)(&cuda);
        add(address, 1.0, 1, 3, "1.0f", "add")(&cuda);
        let error = cuda.synchronize().unwrap_err().to_string();
        assert_eq!(cuda.download(address, &mut [0; 4]).unwrap_err().to_string(), error);
        println!("{error}");
        Some(error)
    };
    let Some(error) = failure("absent", "1.0f", 3) else { return };
    assert!(error.contains("kernel `absent` of `tests`") && error.contains("not found"), "{error}");
    let error = failure("add", "1.0f +* ", 3).unwrap();
    assert!(error.contains("compiling `tests`") && error.contains("tests.cu(2)"), "{error}");
    let error = failure("add", "1.0f", 2).unwrap();
    assert!(error.contains("[8, 4]") && error.contains("[8, 4, 4]"), "{error}");
}

#[test]
#[ignore = "a crash ends the process's context: run it alone"]
fn a_kernel_that_crashes_is_an_error_of_everything_after_it_and_no_panic() {
    let Some((cuda, _folder)) = device() else { return };
    let address = cuda.allocate(64).unwrap();
    add(address, 1.0, 1, 3, "1.0f", "crash")(&cuda);
    let error = cuda.synchronize().unwrap_err().to_string();
    println!("{error}");
    assert!(error.contains("work on the device failed") && error.contains("illegal"), "{error}");
    assert_eq!(cuda.download(address, &mut [0; 4]).unwrap_err().to_string(), error);
    assert!(cuda.begin_capture().is_err() && cuda.pinned(1).is_err());
    assert_eq!(cuda.allocate(1 << 30), None);
    drop(cuda);
    assert!(Cuda::open(&CudaOptions::default()).is_err());
}

#[test]
fn rates_of_copies_are_printed() {
    let Some((cuda, _folder)) = device() else { return };
    let bytes = 1 << 30;
    let mut host = vec![3_u8; bytes];
    let address = cuda.allocate(bytes).unwrap();
    for round in 0..3 {
        let clock = std::time::Instant::now();
        cuda.upload(&host, address);
        cuda.synchronize().unwrap();
        let upload_s = clock.elapsed().as_secs_f64();
        cuda.download(address, &mut host).unwrap();
        let download_s = clock.elapsed().as_secs_f64() - upload_s;
        let rate = |seconds: f64| bytes as f64 / seconds / 1e9;
        println!(
            "RATE copies, round {round}: up {:.1} GB/s, down {:.1} GB/s",
            rate(upload_s),
            rate(download_s)
        );
    }
}

#[test]
fn a_captured_graph_repeats_its_work_on_memory_of_its_own() {
    let Some((cuda, _folder)) = device() else { return };
    let mut input = cuda.pinned(4096).unwrap();
    let mut result = cuda.pinned(4096).unwrap();
    let x = cuda.allocate(4096).unwrap();
    let work = |result: &mut PinnedBuffer| {
        let scratch = cuda.allocate(40 << 20).unwrap();
        cuda.upload_pinned(&input, scratch);
        add(scratch, 1.0, 1024, 3, "1.0f", "add")(&cuda);
        let product = Gemm {
            rows: 32,
            columns: 32,
            inner: 32,
            left: Matrix { address: scratch, pitch: 32, transposed: false },
            right: Matrix { address: scratch, pitch: 32, transposed: true },
            operands: DType::F32,
            out: Matrix { address: x, pitch: 32, transposed: false },
            out_dtype: DType::F32,
            bias: None,
            scale: 1.0,
            accumulate: true,
            addend: None,
            tf32: false,
        };
        cuda.gemm(&product).unwrap();
        cuda.free(scratch, 40 << 20);
        cuda.download_pinned(x, result);
    };
    cuda.fill(x, 0, 4096);
    work(&mut result);
    cuda.synchronize().unwrap();
    let expected = result.as_slice().to_vec();
    assert_eq!(bytemuck::cast_slice::<u8, f32>(&expected), [32.0_f32; 1024]);

    cuda.begin_capture().unwrap();
    assert!(cuda.begin_capture().is_err());
    // 900 MiB were never taken before: the pool must grow while the capture records.
    let grown = cuda.allocate(900 << 20).unwrap();
    cuda.fill(grown, 0, 4096);
    work(&mut result);
    let graph = cuda.end_capture().unwrap();
    assert_eq!(floats(&cuda, x, 1024), [32.0; 1024], "recording runs nothing");
    println!("{} nodes, {:?}", graph.nodes(), cuda.pool_report());
    assert!(graph.nodes() >= 5);
    cuda.free(grown, 900 << 20);
    let other = cuda.allocate(40 << 20).unwrap();
    cuda.fill(other, 7, 40 << 20);
    for step in 1..4 {
        graph.launch();
        cuda.synchronize().unwrap();
        let value = 32.0 * (1.0 + step as f32);
        assert_eq!(bytemuck::cast_slice::<u8, f32>(result.as_slice()), [value; 1024]);
    }
    let mut back = vec![0; 40 << 20];
    cuda.download(other, &mut back).unwrap();
    assert!(back.iter().all(|&byte| byte == 7), "a replay wrote memory of somebody else");
    assert!(cuda.pool_report().held >= 900 << 20);
    drop(graph);
    assert_eq!(cuda.pool_report().held, 0);

    cuda.begin_capture().unwrap();
    cuda.upload(&[1], x);
    assert!(cuda.download(x, &mut [0]).is_err());
    let error = cuda.end_capture().err().unwrap().to_string();
    assert!(error.contains("pinned"), "{error}");
    input.as_mut_slice()[0] = 0;
}

#[test]
fn launches_and_replays_are_timed() {
    let Some((cuda, _folder)) = device() else { return };
    let address = cuda.allocate(4096).unwrap();
    let step = add(address, 1.0, 1024, 3, "1.0f", "add");
    step(&cuda);
    cuda.synchronize().unwrap();
    let timed = |work: &dyn Fn()| {
        let begin = cuda.event().unwrap();
        let clock = std::time::Instant::now();
        work();
        let host = clock.elapsed().as_secs_f64() * 1e6 / 2000.0;
        let end = cuda.event().unwrap();
        end.wait().unwrap();
        (host, f64::from(begin.milliseconds_to(&end).unwrap()) * 1e3 / 2000.0)
    };
    let launches = || (0..2000).for_each(|_| step(&cuda));
    launches();
    println!("us a launch (host, device): {:?}", timed(&launches));
    cuda.begin_capture().unwrap();
    launches();
    let graph = cuda.end_capture().unwrap();
    graph.launch();
    println!("us a node of a graph (host, device): {:?}", timed(&|| graph.launch()));
}

mod products;
