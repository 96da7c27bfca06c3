//! Matrix products by cuBLASLt; the algorithm of a problem is chosen once, by trying the library's best guesses.

mod fp8;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use super::bindings::*;
use super::discovery::{self, Loaded};
use super::disk::{self, DiskCache};
use super::graph::{Executable, begin_recording};
use super::problem::{Layout, Problem, read_choices, write_choices};
use super::staging::Event;
use super::stream::{Stream, failed};
use crate::device::gpu::runtime::Gemm;
use crate::error::{Error, Result};

/// How many of the library's guesses are timed.
const CANDIDATES: usize = 24;
/// What the timing of one candidate may take, in milliseconds, beyond its smallest number of runs.
const TRIAL_MS: f32 = 2.0;
const WORKSPACE_ALIGNMENT: u32 = 256;

fn unsupported(reason: String) -> Error {
    Error::Unsupported { operation: "matrix product", device: "cuda", reason }
}

/// A descriptor that is destroyed with its owner.
struct Owned {
    handle: Handle,
    destroy: unsafe extern "C" fn(Handle) -> i32,
}

impl Drop for Owned {
    fn drop(&mut self) {
        // SAFETY: made by the matching create call; nothing else has it. Enqueued work does not refer to it.
        unsafe { (self.destroy)(self.handle) };
    }
}

/// Descriptors of a problem and how to compute it.
struct Plan {
    operation: Owned,
    a: Owned,
    b: Owned,
    out: Owned,
    algorithm: Algorithm,
    /// Whether the algorithm was timed or read, so that it need not be chosen again outside a capture.
    settled: bool,
}

/// Addresses and factors of one product.
#[derive(Clone, Copy)]
struct Call {
    a: u64,
    b: u64,
    out: u64,
    /// What is added when `accumulate`.
    addend: u64,
    scale: f32,
    accumulate: bool,
}

/// The library with its plans.
pub(super) struct Products {
    stream: Arc<Stream>,
    library: &'static Loaded<Blas>,
    handle: Owned,
    workspace: u64,
    workspace_bytes: usize,
    plans: HashMap<Problem, Plan>,
    choices: BTreeMap<String, Algorithm>,
    cache: DiskCache,
    file: String,
    /// Take the library's first guess: timing can end differently from run to run.
    untimed: bool,
    /// Problems whose candidates were timed.
    pub(super) timed: usize,
}

fn status(call: &str, status: i32) -> Result<()> {
    let reason = match status {
        SUCCESS => return Ok(()),
        1 => "the library is not initialised",
        3 => "an allocation failed",
        7 => "an argument is invalid",
        8 => "the device lacks a feature",
        13 => "the kernel did not run",
        15 => return Err(unsupported("the library has no kernel for it".to_owned())),
        _ => "the library failed",
    };
    Err(failed(call, format!("{reason} (status {status})")))
}

impl Products {
    pub(super) fn new(stream: &Arc<Stream>, cache: DiskCache, untimed: bool) -> Result<Self> {
        let library = discovery::blas().map_err(unsupported)?;
        let mut handle = Handle::NULL;
        // SAFETY: the device's context is made current; the call writes one handle.
        let created = stream.relaxed(|_| unsafe { (library.functions.cublasLtCreate)(&raw mut handle) });
        status("cublasLtCreate", created)?;
        let handle = Owned { handle, destroy: library.functions.cublasLtDestroy };
        let workspace_bytes = if stream.device.capability.0 >= 9 { 64 << 20 } else { 32 << 20 };
        let mut workspace = 0;
        // SAFETY: the call writes one address.
        let allocated =
            stream.relaxed(|driver| unsafe { (driver.cuMemAlloc_v2)(&raw mut workspace, workspace_bytes) });
        stream.check("allocating the workspace of matrix products", allocated)?;
        // SAFETY: the call takes nothing.
        let version = unsafe { (library.functions.cublasLtGetVersion)() };
        // Choices that were made otherwise are made again.
        let device =
            format!("{} {version} {} {CANDIDATES}", stream.device.name, stream.device.multiprocessors);
        let file = format!("products-{}.txt", disk::hash(&[device.as_bytes()]));
        let text = cache.read(&file).and_then(|bytes| String::from_utf8(bytes).ok()).unwrap_or_default();
        Ok(Self {
            stream: stream.clone(),
            library,
            handle,
            workspace,
            workspace_bytes,
            plans: HashMap::new(),
            choices: read_choices(&text).collect(),
            cache,
            file,
            untimed,
            timed: 0,
        })
    }

    /// Enqueues a product; `scratch` lends and takes back memory for trials.
    pub(super) fn multiply(
        &mut self,
        gemm: &Gemm,
        scratch: &dyn Fn(usize) -> Option<u64>,
        give: &dyn Fn(u64, usize),
    ) -> Result<()> {
        let problem = Problem::new(gemm).map_err(unsupported)?;
        let call = Call {
            a: gemm.right.address,
            b: gemm.left.address,
            out: gemm.out.address,
            addend: gemm.addend.unwrap_or(gemm.out.address),
            scale: gemm.scale,
            accumulate: gemm.accumulate || gemm.addend.is_some(),
        };
        let mut plan = match self.plans.remove(&problem) {
            Some(plan) => plan,
            None => self.plan(&problem)?,
        };
        if let Some((address, _)) = gemm.bias.filter(|_| problem.bias) {
            self.set(&plan.operation, DESCRIPTOR_BIAS_POINTER, &address)?;
        }
        if !plan.settled {
            self.settle(&problem, &mut plan, call, scratch, give)?;
        }
        let result = self.run(&plan, call, &plan.algorithm);
        self.plans.insert(problem, plan);
        result
    }

    fn set<T>(&self, operation: &Owned, attribute: i32, value: &T) -> Result<()> {
        let (pointer, bytes) = (std::ptr::from_ref(value).cast(), size_of::<T>());
        // SAFETY: the descriptor is alive; the call copies the value, whose size it checks.
        let set = unsafe {
            (self.library.functions.cublasLtMatmulDescSetAttribute)(
                operation.handle,
                attribute,
                pointer,
                bytes,
            )
        };
        status("cublasLtMatmulDescSetAttribute", set)
    }

    fn layout(&self, layout: &Layout, kind: i32) -> Result<Owned> {
        let blas = &self.library.functions;
        let mut handle = Handle::NULL;
        // SAFETY: the call writes one handle.
        let created = unsafe {
            (blas.cublasLtMatrixLayoutCreate)(
                &raw mut handle,
                kind,
                layout.rows,
                layout.columns,
                layout.pitch,
            )
        };
        status("cublasLtMatrixLayoutCreate", created)?;
        Ok(Owned { handle, destroy: blas.cublasLtMatrixLayoutDestroy })
    }

    fn plan(&self, problem: &Problem) -> Result<Plan> {
        self.plan_with(problem, |_| Ok(()))
    }

    /// `describe` adds to the operation before algorithms are looked at.
    fn plan_with(&self, problem: &Problem, describe: impl FnOnce(&Owned) -> Result<()>) -> Result<Plan> {
        let blas = &self.library.functions;
        let mut handle = Handle::NULL;
        // SAFETY: the call writes one handle.
        let created = unsafe { (blas.cublasLtMatmulDescCreate)(&raw mut handle, problem.compute, TYPE_F32) };
        status("cublasLtMatmulDescCreate", created)?;
        let operation = Owned { handle, destroy: blas.cublasLtMatmulDescDestroy };
        self.set(&operation, DESCRIPTOR_TRANSPOSE_A, &i32::from(problem.a.transposed))?;
        self.set(&operation, DESCRIPTOR_TRANSPOSE_B, &i32::from(problem.b.transposed))?;
        if problem.row_scales {
            self.set(&operation, DESCRIPTOR_A_SCALE_MODE, &SCALE_ROWS)?;
            self.set(&operation, DESCRIPTOR_B_SCALE_MODE, &SCALE_ROWS)?;
        }
        if problem.operand_type == TYPE_E4M3 {
            self.set(&operation, DESCRIPTOR_FAST_SUMS, &i8::from(fp8::FAST_SUMS))?;
        }
        describe(&operation)?;
        if problem.bias {
            self.set(&operation, DESCRIPTOR_EPILOGUE, &EPILOGUE_BIAS)?;
            self.set(&operation, DESCRIPTOR_BIAS_TYPE, &problem.out_type)?;
        }
        let mut plan = Plan {
            operation,
            a: self.layout(&problem.a, problem.operand_type)?,
            b: self.layout(&problem.b, problem.operand_type)?,
            out: self.layout(&problem.out, problem.out_type)?,
            algorithm: Algorithm::default(),
            settled: false,
        };
        if let Some(known) =
            self.choices.get(&problem.key()).filter(|known| !self.untimed && self.valid(&plan, known))
        {
            (plan.algorithm, plan.settled) = (*known, true);
        }
        Ok(plan)
    }

    /// Whether the library still accepts a stored algorithm for this problem.
    fn valid(&self, plan: &Plan, algorithm: &Algorithm) -> bool {
        let mut result = Candidate::default();
        // SAFETY: the descriptors are alive; the call reads the algorithm and writes one result.
        let checked = unsafe {
            (self.library.functions.cublasLtMatmulAlgoCheck)(
                self.handle.handle,
                plan.operation.handle,
                plan.a.handle,
                plan.b.handle,
                plan.out.handle,
                plan.out.handle,
                algorithm,
                &raw mut result,
            )
        };
        checked == SUCCESS && result.workspace_bytes <= self.workspace_bytes
    }

    /// The library's guesses, best first, of which every one can compute this problem.
    fn candidates(&self, problem: &Problem, plan: &Plan) -> Result<Vec<Candidate>> {
        let blas = &self.library.functions;
        let alike = problem.canonical();
        let [a, b] = [&alike.a, &alike.b].map(|layout| self.layout(layout, problem.operand_type));
        let (a, b, out) = (a?, b?, self.layout(&alike.out, problem.out_type)?);
        let mut handle = Handle::NULL;
        // SAFETY: the call writes one handle.
        status("cublasLtMatmulPreferenceCreate", unsafe {
            (blas.cublasLtMatmulPreferenceCreate)(&raw mut handle)
        })?;
        let preference = Owned { handle, destroy: blas.cublasLtMatmulPreferenceDestroy };
        let put = |attribute: i32, value: *const std::ffi::c_void, bytes: usize| {
            // SAFETY: the preference is alive; the call copies `bytes` bytes of a value that is.
            let set = unsafe {
                (blas.cublasLtMatmulPreferenceSetAttribute)(preference.handle, attribute, value, bytes)
            };
            status("cublasLtMatmulPreferenceSetAttribute", set)
        };
        put(PREFERENCE_WORKSPACE, std::ptr::from_ref(&self.workspace_bytes).cast(), size_of::<usize>())?;
        put(PREFERENCE_REDUCTIONS, std::ptr::from_ref(&REDUCTION_COMPUTE_TYPE).cast(), size_of::<u32>())?;
        let alignments = [&problem.a, &problem.b, &problem.out, &problem.out].map(|layout| layout.alignment);
        for (attribute, alignment) in (PREFERENCE_ALIGNMENT_A..).zip(&alignments) {
            put(attribute, std::ptr::from_ref(alignment).cast(), size_of::<u32>())?;
        }
        let (mut found, mut count) = ([Candidate::default(); CANDIDATES], 0);
        // SAFETY: all descriptors are alive; the call writes at most as many results as it is told there is room for.
        let searched = unsafe {
            (blas.cublasLtMatmulAlgoGetHeuristic)(
                self.handle.handle,
                plan.operation.handle,
                a.handle,
                b.handle,
                out.handle,
                out.handle,
                preference.handle,
                CANDIDATES as i32,
                found.as_mut_ptr(),
                &raw mut count,
            )
        };
        status("cublasLtMatmulAlgoGetHeuristic", searched)?;
        let runs = |one: &Candidate| one.state == SUCCESS && self.valid(plan, &one.algorithm);
        let found: Vec<Candidate> = found.into_iter().take(count.max(0) as usize).filter(runs).collect();
        if found.is_empty() {
            return Err(unsupported(format!("the library has no kernel for {}", problem.key())));
        }
        Ok(found)
    }

    /// Chooses the algorithm. While a capture records nothing can be timed, so the first guess serves until later.
    fn settle(
        &mut self,
        problem: &Problem,
        plan: &mut Plan,
        call: Call,
        scratch: &dyn Fn(usize) -> Option<u64>,
        give: &dyn Fn(u64, usize),
    ) -> Result<()> {
        let candidates = self.candidates(problem, plan)?;
        plan.algorithm = candidates[0].algorithm;
        if self.stream.capturing() {
            return Ok(());
        }
        plan.settled = true;
        if self.untimed || candidates.len() == 1 {
            return Ok(());
        }
        // Trials never touch the real output, which a product may have to add to. The scratch is as aligned.
        let bytes = problem.out_bytes();
        let Some(out) = scratch(bytes + WORKSPACE_ALIGNMENT as usize) else { return Ok(()) };
        let aligned = out + call.out % u64::from(WORKSPACE_ALIGNMENT);
        let trial = Call { out: aligned, ..call };
        let best = self.fastest(plan, trial, &candidates);
        give(out, bytes + WORKSPACE_ALIGNMENT as usize);
        if let Some(best) = best? {
            plan.algorithm = best;
            self.timed += 1;
            self.remember(problem.key(), best);
        }
        Ok(())
    }

    fn fastest(&self, plan: &Plan, call: Call, candidates: &[Candidate]) -> Result<Option<Algorithm>> {
        let events = (Event::new(&self.stream, true)?, Event::new(&self.stream, true)?);
        let between = |work: &dyn Fn() -> Result<()>| -> Result<f32> {
            events.0.record();
            work()?;
            events.1.record();
            events.1.wait()?;
            events.0.milliseconds_to(&events.1)
        };
        // The host takes longer to enqueue a small product than the device to compute it, so that many are replayed at once.
        let time = |algorithm: &Algorithm, runs: u32| -> Result<f32> {
            let all = || (0..runs).try_for_each(|_| self.run(plan, call, algorithm));
            begin_recording(&self.stream)?;
            let recorded = all();
            let work = Executable::end(&self.stream);
            recorded?;
            let work = work?;
            let replay = || {
                work.launch();
                Ok(())
            };
            replay()?;
            Ok(between(&replay)?.min(between(&replay)?) / runs as f32)
        };
        let mut best: Option<(f32, Algorithm)> = None;
        for candidate in candidates {
            // A guess that the library cannot run after all is no choice; the first run loads the kernel.
            if self.run(plan, call, &candidate.algorithm).is_err() {
                continue;
            }
            let first = between(&|| self.run(plan, call, &candidate.algorithm))?;
            if best.is_some_and(|best| first > 2.0 * best.0 + 0.02) {
                continue;
            }
            let runs = (TRIAL_MS / first.max(0.001)).clamp(2.0, 20.0) as u32;
            let milliseconds = time(&candidate.algorithm, runs)?;
            if best.is_none_or(|best| milliseconds < best.0) {
                best = Some((milliseconds, candidate.algorithm));
            }
        }
        Ok(best.map(|best| best.1))
    }

    /// Keeps a choice, together with what other processes have found meanwhile.
    fn remember(&mut self, key: String, algorithm: Algorithm) {
        let text =
            self.cache.read(&self.file).and_then(|bytes| String::from_utf8(bytes).ok()).unwrap_or_default();
        for (key, algorithm) in read_choices(&text) {
            self.choices.entry(key).or_insert(algorithm);
        }
        self.choices.insert(key, algorithm);
        self.cache.write(&self.file, write_choices(self.choices.iter()).as_bytes());
    }

    fn run(&self, plan: &Plan, call: Call, algorithm: &Algorithm) -> Result<()> {
        let beta = if call.accumulate { 1.0_f32 } else { 0.0 };
        self.stream.driver();
        // SAFETY: the descriptors are alive and describe the memory that the caller vouches for; factors are read
        // during the call; the workspace is as large as every algorithm was allowed to need, and one stream uses it.
        let enqueued = unsafe {
            (self.library.functions.cublasLtMatmul)(
                self.handle.handle,
                plan.operation.handle,
                std::ptr::from_ref(&call.scale).cast(),
                call.a,
                plan.a.handle,
                call.b,
                plan.b.handle,
                std::ptr::from_ref(&beta).cast(),
                call.addend,
                plan.out.handle,
                call.out,
                plan.out.handle,
                algorithm,
                self.workspace,
                self.workspace_bytes,
                self.stream.handle,
            )
        };
        status("cublasLtMatmul", enqueued)
    }
}

impl Drop for Products {
    fn drop(&mut self) {
        // SAFETY: allocated by this value; freeing waits for the work that uses it.
        unsafe { (self.stream.driver().cuMemFree_v2)(self.workspace) };
    }
}
