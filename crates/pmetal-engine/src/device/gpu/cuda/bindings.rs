//! The functions of NVIDIA's libraries that this crate calls, and the constants it passes.
//! Names and values from the CUDA 12 and 13 reference manuals (driver API, NVRTC, cuBLASLt).

use std::ffi::{c_char, c_void};

use libloading::Library;

/// A pointer that only the library looks behind: context, stream, event, graph, module, function, descriptor.
#[repr(transparent)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Handle(*mut c_void);

impl Handle {
    pub(super) const NULL: Self = Self(std::ptr::null_mut());
}

// SAFETY: the libraries allow every one of their handles to be used from any thread; this crate never looks behind one.
unsafe impl Send for Handle {}
// SAFETY: as above; calls that the libraries want serialised are made under a lock by their owners.
unsafe impl Sync for Handle {}

macro_rules! functions {
    ($table:ident { $($name:ident($($argument:ty),*) -> $result:ty;)* }) => {
        #[allow(non_snake_case)]
        pub(super) struct $table { $(pub(super) $name: unsafe extern "C" fn($($argument),*) -> $result,)* }

        impl $table {
            /// The functions, or the name of the first that the library lacks.
            pub(super) fn load(library: &'static Library) -> Result<Self, &'static str> {
                Ok(Self {
                    $($name: {
                        type Function = unsafe extern "C" fn($($argument),*) -> $result;
                        // SAFETY: the signature is the one that NVIDIA's manual gives for this name, and the library
                        // is never unloaded.
                        match unsafe { library.get::<Function>(concat!(stringify!($name), "\0").as_bytes()) } {
                            Ok(function) => *function,
                            Err(_) => return Err(stringify!($name)),
                        }
                    },)*
                })
            }
        }
    };
}

functions!(Driver {
    cuInit(u32) -> i32;
    cuDriverGetVersion(*mut i32) -> i32;
    cuGetErrorName(i32, *mut *const c_char) -> i32;
    cuGetErrorString(i32, *mut *const c_char) -> i32;
    cuDeviceGetCount(*mut i32) -> i32;
    cuDeviceGet(*mut i32, i32) -> i32;
    cuDeviceGetName(*mut c_char, i32, i32) -> i32;
    cuDeviceTotalMem_v2(*mut usize, i32) -> i32;
    cuDeviceGetAttribute(*mut i32, i32, i32) -> i32;
    cuDevicePrimaryCtxRetain(*mut Handle, i32) -> i32;
    cuCtxSetCurrent(Handle) -> i32;
    cuMemGetInfo_v2(*mut usize, *mut usize) -> i32;
    cuStreamCreate(*mut Handle, u32) -> i32;
    cuStreamDestroy_v2(Handle) -> i32;
    cuStreamSynchronize(Handle) -> i32;
    cuStreamWaitEvent(Handle, Handle, u32) -> i32;
    cuMemAlloc_v2(*mut u64, usize) -> i32;
    cuMemFree_v2(u64) -> i32;
    cuMemAllocHost_v2(*mut *mut c_void, usize) -> i32;
    cuMemFreeHost(*mut c_void) -> i32;
    cuMemcpyHtoDAsync_v2(u64, *const c_void, usize, Handle) -> i32;
    cuMemcpyDtoHAsync_v2(*mut c_void, u64, usize, Handle) -> i32;
    cuMemcpyDtoDAsync_v2(u64, u64, usize, Handle) -> i32;
    cuMemcpy2DAsync_v2(*const CopyRows, Handle) -> i32;
    cuMemsetD8Async(u64, u8, usize, Handle) -> i32;
    cuMemsetD2D8Async(u64, usize, u8, usize, usize, Handle) -> i32;
    cuModuleLoadData(*mut Handle, *const c_void) -> i32;
    cuModuleUnload(Handle) -> i32;
    cuModuleGetFunction(*mut Handle, Handle, *const c_char) -> i32;
    cuFuncSetAttribute(Handle, i32, i32) -> i32;
    cuFuncGetAttribute(*mut i32, i32, Handle) -> i32;
    cuLaunchKernel(Handle, u32, u32, u32, u32, u32, u32, u32, Handle, *mut *mut c_void, *mut *mut c_void) -> i32;
    cuTensorMapEncodeTiled(*mut EncodedMap, i32, u32, u64, *const u64, *const u64, *const u32, *const u32, i32, i32, i32, i32) -> i32;
    cuEventCreate(*mut Handle, u32) -> i32;
    cuEventDestroy_v2(Handle) -> i32;
    cuEventRecord(Handle, Handle) -> i32;
    cuEventSynchronize(Handle) -> i32;
    cuEventElapsedTime(*mut f32, Handle, Handle) -> i32;
    cuStreamBeginCapture_v2(Handle, i32) -> i32;
    cuStreamEndCapture(Handle, *mut Handle) -> i32;
    cuThreadExchangeStreamCaptureMode(*mut i32) -> i32;
    cuGraphInstantiateWithFlags(*mut Handle, Handle, u64) -> i32;
    cuGraphUpload(Handle, Handle) -> i32;
    cuGraphLaunch(Handle, Handle) -> i32;
    cuGraphExecDestroy(Handle) -> i32;
    cuGraphDestroy(Handle) -> i32;
    cuGraphGetNodes(Handle, *mut Handle, *mut usize) -> i32;
});

// Only drivers from CUDA 12.4 on have it, so it is loaded apart from the others.
functions!(ParameterInfo {
    cuFuncGetParamInfo(Handle, usize, *mut usize, *mut usize) -> i32;
});

functions!(Nvrtc {
    nvrtcVersion(*mut i32, *mut i32) -> i32;
    nvrtcGetErrorString(i32) -> *const c_char;
    nvrtcGetNumSupportedArchs(*mut i32) -> i32;
    nvrtcGetSupportedArchs(*mut i32) -> i32;
    nvrtcCreateProgram(*mut Handle, *const c_char, *const c_char, i32, *const *const c_char, *const *const c_char) -> i32;
    nvrtcDestroyProgram(*mut Handle) -> i32;
    nvrtcCompileProgram(Handle, i32, *const *const c_char) -> i32;
    nvrtcGetProgramLogSize(Handle, *mut usize) -> i32;
    nvrtcGetProgramLog(Handle, *mut c_char) -> i32;
    nvrtcGetCUBINSize(Handle, *mut usize) -> i32;
    nvrtcGetCUBIN(Handle, *mut c_char) -> i32;
    nvrtcGetPTXSize(Handle, *mut usize) -> i32;
    nvrtcGetPTX(Handle, *mut c_char) -> i32;
});

functions!(Blas {
    cublasLtGetVersion() -> usize;
    cublasLtCreate(*mut Handle) -> i32;
    cublasLtDestroy(Handle) -> i32;
    cublasLtMatmulDescCreate(*mut Handle, i32, i32) -> i32;
    cublasLtMatmulDescDestroy(Handle) -> i32;
    cublasLtMatmulDescSetAttribute(Handle, i32, *const c_void, usize) -> i32;
    cublasLtMatrixLayoutCreate(*mut Handle, i32, u64, u64, i64) -> i32;
    cublasLtMatrixLayoutDestroy(Handle) -> i32;
    cublasLtMatmulPreferenceCreate(*mut Handle) -> i32;
    cublasLtMatmulPreferenceDestroy(Handle) -> i32;
    cublasLtMatmulPreferenceSetAttribute(Handle, i32, *const c_void, usize) -> i32;
    cublasLtMatmulAlgoGetHeuristic(Handle, Handle, Handle, Handle, Handle, Handle, Handle, i32, *mut Candidate, *mut i32) -> i32;
    cublasLtMatmulAlgoCheck(Handle, Handle, Handle, Handle, Handle, Handle, *const Algorithm, *mut Candidate) -> i32;
    cublasLtMatmul(Handle, Handle, *const c_void, u64, Handle, u64, Handle, *const c_void, u64, Handle, u64, Handle, *const Algorithm, u64, usize, Handle) -> i32;
});

/// `CUDA_MEMCPY2D`.
#[repr(C)]
pub(super) struct CopyRows {
    pub(super) source_x_bytes: usize,
    pub(super) source_y: usize,
    pub(super) source_kind: u32,
    pub(super) source_host: *const c_void,
    pub(super) source_device: u64,
    pub(super) source_array: Handle,
    pub(super) source_pitch: usize,
    pub(super) target_x_bytes: usize,
    pub(super) target_y: usize,
    pub(super) target_kind: u32,
    pub(super) target_host: *mut c_void,
    pub(super) target_device: u64,
    pub(super) target_array: Handle,
    pub(super) target_pitch: usize,
    pub(super) row_bytes: usize,
    pub(super) rows: usize,
}

/// `CUtensorMap`: opaque.
#[repr(C, align(64))]
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct EncodedMap(pub(super) [u64; 16]);

/// `cublasLtMatmulAlgo_t`: opaque, and documented as safe to store as bytes for the same library version.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Algorithm(pub(super) [u64; 8]);

/// `cublasLtMatmulHeuristicResult_t`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Candidate {
    pub(super) algorithm: Algorithm,
    pub(super) workspace_bytes: usize,
    pub(super) state: i32,
    pub(super) waves: f32,
    pub(super) reserved: [i32; 4],
}

pub(super) const SUCCESS: i32 = 0;
pub(super) const OUT_OF_MEMORY: i32 = 2;
pub(super) const ATTRIBUTE_MULTIPROCESSORS: i32 = 16;
pub(super) const ATTRIBUTE_L2_BYTES: i32 = 38;
pub(super) const ATTRIBUTE_CAPABILITY_MAJOR: i32 = 75;
pub(super) const ATTRIBUTE_CAPABILITY_MINOR: i32 = 76;
pub(super) const ATTRIBUTE_SHARED_BYTES_OPT_IN: i32 = 97;

pub(super) const FUNCTION_SHARED_BYTES: i32 = 1;
pub(super) const FUNCTION_MAX_DYNAMIC_SHARED_BYTES: i32 = 8;

pub(super) const MAP_F16: i32 = 6;
pub(super) const MAP_BF16: i32 = 9;
pub(super) const MAP_INTERLEAVE_NONE: i32 = 0;
pub(super) const MAP_SWIZZLE_128: i32 = 3;
pub(super) const MAP_L2_PROMOTION_128: i32 = 2;
pub(super) const MAP_OUTSIDE_IS_ZERO: i32 = 0;

pub(super) const STREAM_NON_BLOCKING: u32 = 1;
pub(super) const EVENT_DISABLE_TIMING: u32 = 2;
pub(super) const MEMORY_DEVICE: u32 = 2;
pub(super) const CAPTURE_THREAD_LOCAL: i32 = 1;
pub(super) const CAPTURE_RELAXED: i32 = 2;

pub(super) const TYPE_F32: i32 = 0;
pub(super) const TYPE_F16: i32 = 2;
pub(super) const TYPE_BF16: i32 = 14;
pub(super) const TYPE_E4M3: i32 = 28;
pub(super) const COMPUTE_F32: i32 = 68;
pub(super) const COMPUTE_TF32: i32 = 77;
pub(super) const DESCRIPTOR_TRANSPOSE_A: i32 = 3;
pub(super) const DESCRIPTOR_TRANSPOSE_B: i32 = 4;
pub(super) const DESCRIPTOR_EPILOGUE: i32 = 7;
pub(super) const DESCRIPTOR_BIAS_POINTER: i32 = 8;
pub(super) const DESCRIPTOR_A_SCALE_POINTER: i32 = 17;
pub(super) const DESCRIPTOR_B_SCALE_POINTER: i32 = 18;
pub(super) const DESCRIPTOR_FAST_SUMS: i32 = 25;
pub(super) const DESCRIPTOR_BIAS_TYPE: i32 = 26;
pub(super) const DESCRIPTOR_A_SCALE_MODE: i32 = 31;
pub(super) const DESCRIPTOR_B_SCALE_MODE: i32 = 32;
/// A scale f32 for each row of an operand's result.
pub(super) const SCALE_ROWS: i32 = 3;
pub(super) const EPILOGUE_BIAS: u32 = 4;
pub(super) const PREFERENCE_WORKSPACE: i32 = 1;
pub(super) const PREFERENCE_REDUCTIONS: i32 = 3;
pub(super) const PREFERENCE_ALIGNMENT_A: i32 = 5;
/// Partial sums in f32 only: the other schemes add them up in the output's type.
pub(super) const REDUCTION_COMPUTE_TYPE: u32 = 2;
