//! Kernel text to machine code, kept in a cache on disk.

use std::collections::HashMap;
use std::ffi::{CStr, CString, c_char};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

use super::bindings::*;
use super::discovery::{self, Loaded};
use super::disk::{self, DiskCache};
use super::stream::{Stream, failed};
use crate::device::gpu::runtime::ModuleText;
use crate::error::{Error, Result};

/// Blocks have this much dynamic shared memory without asking.
const DEFAULT_SHARED_BYTES: u32 = 48 << 10;

/// What the compiler is told to write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Target {
    /// Value of `--gpu-architecture`.
    architecture: String,
    /// Text that the driver compiles, because the compiler is older than the device.
    portable: bool,
}

/// The best target for a device among the architectures that the compiler knows (90 for 9.0).
pub(super) fn target((major, minor): (u32, u32), supported: &[u32]) -> Option<Target> {
    let device = major * 10 + minor;
    // Matrix instructions of Hopper exist in the code for exactly that chip alone.
    let suffix = if device == 90 { "a" } else { "" };
    if supported.contains(&device) {
        return Some(Target { architecture: format!("sm_{device}{suffix}"), portable: false });
    }
    let newest = supported.iter().copied().filter(|&other| other < device).max()?;
    Some(Target { architecture: format!("compute_{newest}"), portable: true })
}

/// NVRTC.
pub(super) struct Compiler {
    library: &'static Loaded<Nvrtc>,
    cache: DiskCache,
    target: Target,
    /// What the code depends on beside text and options.
    fingerprint: String,
}

impl Compiler {
    pub(super) fn new(capability: (u32, u32), driver: &str, cache: DiskCache) -> Result<Self> {
        let unsupported =
            |reason| Error::Unsupported { operation: "compiling kernels", device: "cuda", reason };
        let library = discovery::nvrtc().map_err(unsupported)?;
        let mut count = 0;
        // SAFETY: the call writes one integer.
        unsafe { (library.functions.nvrtcGetNumSupportedArchs)(&raw mut count) };
        let mut known = vec![0_i32; count.unsigned_abs() as usize];
        // SAFETY: the call writes as many integers as the one before it said.
        unsafe { (library.functions.nvrtcGetSupportedArchs)(known.as_mut_ptr()) };
        let known: Vec<u32> = known.iter().map(|architecture| architecture.unsigned_abs()).collect();
        let target = target(capability, &known).ok_or_else(|| {
            unsupported(format!(
                "the compiler knows compute capabilities {known:?}, the device has {capability:?}"
            ))
        })?;
        let fingerprint = format!("nvrtc {} driver {driver} {target:?}", library.version);
        Ok(Self { library, cache, target, fingerprint })
    }

    /// Machine code of a module, and whether it came from the cache. `fresh` ignores what the cache has.
    pub(super) fn code(
        &self,
        module: &ModuleText,
        defines: &[(&str, &str)],
        fresh: bool,
    ) -> Result<(Vec<u8>, bool)> {
        let text = module.texts.concat();
        let mut options = vec![
            format!("--gpu-architecture={}", self.target.architecture),
            "--std=c++17".to_owned(),
            "-default-device".to_owned(),
        ];
        options.extend(defines.iter().map(|(name, value)| format!("-D{name}={value}")));
        let joined = options.join("\n");
        let key = [self.fingerprint.as_bytes(), module.name.as_bytes(), joined.as_bytes(), text.as_bytes()];
        let file = format!("{}.bin", disk::hash(&key));
        if let Some(code) = self.cache.read(&file).filter(|code| !fresh && !code.is_empty()) {
            return Ok((code, true));
        }
        let code = self.compile(module.name, text, &options)?;
        self.cache.write(&file, &code);
        Ok((code, false))
    }

    fn compile(&self, name: &str, text: String, options: &[String]) -> Result<Vec<u8>> {
        let call = format!("compiling `{name}`");
        let no_zero = |_| failed(&call, "the text or an option has a zero byte");
        let text = CString::new(text).map_err(no_zero)?;
        let file = CString::new(format!("{name}.cu")).map_err(no_zero)?;
        let options: Vec<CString> = options
            .iter()
            .map(|option| CString::new(option.as_str()))
            .collect::<std::result::Result<_, _>>()
            .map_err(no_zero)?;
        let pointers: Vec<*const c_char> = options.iter().map(|option| option.as_ptr()).collect();
        let nvrtc = &self.library.functions;
        let mut program = Program { nvrtc, handle: Handle::NULL };
        let none = std::ptr::null();
        // SAFETY: both strings end in zero and the call copies them; no headers are passed.
        let status = unsafe {
            (nvrtc.nvrtcCreateProgram)(&raw mut program.handle, text.as_ptr(), file.as_ptr(), 0, none, none)
        };
        self.check(&call, status)?;
        // SAFETY: the program is alive, and so are the options, as many as the call is told.
        let status =
            unsafe { (nvrtc.nvrtcCompileProgram)(program.handle, pointers.len() as i32, pointers.as_ptr()) };
        if status != SUCCESS || cfg!(test) {
            let log =
                program.bytes(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog).unwrap_or_default();
            let log = String::from_utf8_lossy(&log);
            // Right, but each product waits for the one before: a tenth of a mixture's step was lost to a branch around them.
            let is_slow = log.contains("instructions are serialized");
            if status != SUCCESS || is_slow {
                return Err(failed(&call, log.trim_end_matches(['\0', '\n']).to_owned()));
            }
        }
        let code = if self.target.portable {
            program.bytes(nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX)
        } else {
            program.bytes(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN)
        };
        code.map_err(|status| self.check(&call, status).err().unwrap_or_else(|| failed(&call, "no code")))
    }

    fn check(&self, call: &str, status: i32) -> Result<()> {
        if status == SUCCESS {
            return Ok(());
        }
        // SAFETY: the call returns a string constant of the library for any status.
        let reason = unsafe { CStr::from_ptr((self.library.functions.nvrtcGetErrorString)(status)) };
        Err(failed(call, reason.to_string_lossy()))
    }
}

struct Program<'a> {
    nvrtc: &'a Nvrtc,
    handle: Handle,
}

impl Program<'_> {
    /// A result of the program; the status where there is none.
    fn bytes(
        &self,
        size: unsafe extern "C" fn(Handle, *mut usize) -> i32,
        get: unsafe extern "C" fn(Handle, *mut c_char) -> i32,
    ) -> std::result::Result<Vec<u8>, i32> {
        let mut length = 0;
        // SAFETY: the program is alive; the call writes one size.
        let status = unsafe { size(self.handle, &raw mut length) };
        if status != SUCCESS {
            return Err(status);
        }
        let mut bytes = vec![0_u8; length];
        // SAFETY: the call writes as many bytes as the one before it said.
        let status = unsafe { get(self.handle, bytes.as_mut_ptr().cast()) };
        if status == SUCCESS { Ok(bytes) } else { Err(status) }
    }
}

impl Drop for Program<'_> {
    fn drop(&mut self) {
        // SAFETY: the handle is null or of a program that nothing else uses.
        unsafe { (self.nvrtc.nvrtcDestroyProgram)(&raw mut self.handle) };
    }
}

/// A kernel that can be launched.
pub(super) struct Function {
    pub(super) handle: Handle,
    /// Sizes of its parameters; unknown where the driver cannot tell.
    pub(super) parameters: Option<Vec<usize>>,
    /// How much dynamic shared memory it may have so far.
    allowed_shared_bytes: u32,
}

struct Entry {
    module: &'static ModuleText,
    defines: Vec<(String, String)>,
    kernel: String,
    function: Function,
}

struct LoadedModule {
    module: &'static ModuleText,
    defines: Vec<(String, String)>,
    handle: Handle,
}

/// Modules and kernels of one device, by text, macros and name.
pub(super) struct Modules {
    stream: Arc<Stream>,
    compiler: Compiler,
    modules: Vec<LoadedModule>,
    functions: HashMap<u64, Vec<Entry>>,
    /// Modules that were compiled and that came from the cache.
    pub(super) compiled: usize,
    pub(super) from_cache: usize,
}

fn same_defines(left: &[(String, String)], right: &[(&str, &str)]) -> bool {
    left.len() == right.len()
        && left.iter().zip(right).all(|(left, right)| left.0 == right.0 && left.1 == right.1)
}

impl Modules {
    pub(super) fn new(stream: &Arc<Stream>, cache: DiskCache) -> Result<Self> {
        let compiler = Compiler::new(stream.device.capability, &stream.device.driver, cache)?;
        let (modules, functions) = (Vec::new(), HashMap::new());
        Ok(Self { stream: stream.clone(), compiler, modules, functions, compiled: 0, from_cache: 0 })
    }

    /// The kernel, compiled and loaded if need be, allowed to use this much dynamic shared memory.
    pub(super) fn function(
        &mut self,
        module: &'static ModuleText,
        defines: &[(&str, &str)],
        kernel: &str,
        shared_bytes: u32,
    ) -> Result<&Function> {
        let mut hasher = DefaultHasher::new();
        (std::ptr::from_ref(module) as usize, defines, kernel).hash(&mut hasher);
        let key = hasher.finish();
        let position = self.functions.get(&key).and_then(|entries| {
            entries.iter().position(|entry| {
                std::ptr::eq(entry.module, module)
                    && entry.kernel == kernel
                    && same_defines(&entry.defines, defines)
            })
        });
        let position = match position {
            Some(position) => position,
            None => {
                let function = self.look_up(module, defines, kernel)?;
                let entries = self.functions.entry(key).or_default();
                let defines = owned(defines);
                entries.push(Entry { module, defines, kernel: kernel.to_owned(), function });
                entries.len() - 1
            }
        };
        let entries = self.functions.entry(key).or_default();
        let function = &mut entries[position].function;
        if shared_bytes > function.allowed_shared_bytes {
            allow_shared(&self.stream, kernel, function, shared_bytes)?;
        }
        Ok(function)
    }

    fn look_up(
        &mut self,
        module: &'static ModuleText,
        defines: &[(&str, &str)],
        kernel: &str,
    ) -> Result<Function> {
        let handle = self.module(module, defines)?;
        let call = format!("kernel `{kernel}` of `{}`", module.name);
        let name = CString::new(kernel).map_err(|_| failed(&call, "the name has a zero byte"))?;
        let mut function = Handle::NULL;
        // SAFETY: the module is loaded and stays so; the name ends in zero; the call writes one handle.
        let status = self.stream.relaxed(|driver| unsafe {
            (driver.cuModuleGetFunction)(&raw mut function, handle, name.as_ptr())
        });
        self.stream.check(&call, status)?;
        let parameters = self.stream.parameters().map(|info| {
            let mut sizes = Vec::new();
            let (mut offset, mut size) = (0, 0);
            // SAFETY: the function is alive; the call writes two sizes, or fails for an index past the last.
            while unsafe { (info.cuFuncGetParamInfo)(function, sizes.len(), &raw mut offset, &raw mut size) }
                == SUCCESS
            {
                sizes.push(size);
            }
            sizes
        });
        Ok(Function { handle: function, parameters, allowed_shared_bytes: 0 })
    }

    fn module(&mut self, module: &'static ModuleText, defines: &[(&str, &str)]) -> Result<Handle> {
        let found = self
            .modules
            .iter()
            .find(|other| std::ptr::eq(other.module, module) && same_defines(&other.defines, defines));
        if let Some(found) = found {
            return Ok(found.handle);
        }
        let (code, cached) = self.compiler.code(module, defines, false)?;
        let handle = match self.load(module.name, &code) {
            // A file can be whole and still not be for this device.
            Err(_) if cached => {
                self.compiled += 1;
                self.load(module.name, &self.compiler.code(module, defines, true)?.0)?
            }
            loaded => {
                if cached {
                    self.from_cache += 1
                } else {
                    self.compiled += 1
                }
                loaded?
            }
        };
        self.modules.push(LoadedModule { module, defines: owned(defines), handle });
        Ok(handle)
    }

    fn load(&self, name: &str, code: &[u8]) -> Result<Handle> {
        // Text for the driver must end in zero; machine code does not mind one more byte.
        let image: Vec<u8> = code.iter().copied().chain([0]).collect();
        let mut handle = Handle::NULL;
        // SAFETY: the image is what the compiler wrote, checked against its hash, and ends in zero.
        let status = self
            .stream
            .relaxed(|driver| unsafe { (driver.cuModuleLoadData)(&raw mut handle, image.as_ptr().cast()) });
        self.stream.check(&format!("loading `{name}`"), status)?;
        Ok(handle)
    }
}

impl Drop for Modules {
    fn drop(&mut self) {
        let _ = self.stream.synchronize();
        for module in &self.modules {
            // SAFETY: loaded by this value; its kernels have finished and nobody else has its functions.
            unsafe { (self.stream.driver().cuModuleUnload)(module.handle) };
        }
    }
}

fn owned(defines: &[(&str, &str)]) -> Vec<(String, String)> {
    defines.iter().map(|&(name, value)| (name.to_owned(), value.to_owned())).collect()
}

fn allow_shared(stream: &Stream, kernel: &str, function: &mut Function, bytes: u32) -> Result<()> {
    let mut fixed = 0;
    // SAFETY: the function is alive; the call writes one integer.
    let status = unsafe {
        (stream.driver().cuFuncGetAttribute)(&raw mut fixed, FUNCTION_SHARED_BYTES, function.handle)
    };
    stream.check("cuFuncGetAttribute", status)?;
    let (total, limit) =
        (fixed.unsigned_abs() as usize + bytes as usize, stream.device.shared_bytes_per_block);
    if total > limit {
        return Err(failed(
            &format!("kernel `{kernel}`"),
            format!("it asks for {total} bytes of shared memory, a block can have {limit}"),
        ));
    }
    let allowed = bytes.max(DEFAULT_SHARED_BYTES.saturating_sub(fixed.unsigned_abs()));
    // SAFETY: the function is alive; the value was checked against the device's limit.
    let status = unsafe {
        (stream.driver().cuFuncSetAttribute)(
            function.handle,
            FUNCTION_MAX_DYNAMIC_SHARED_BYTES,
            allowed as i32,
        )
    };
    stream.check(&format!("kernel `{kernel}`"), status)?;
    function.allowed_shared_bytes = allowed;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_gets_its_own_code_or_text_of_the_newest_older_one() {
        let own =
            |architecture: &str| Some(Target { architecture: architecture.to_owned(), portable: false });
        let known = [75, 80, 86, 89, 90, 100, 120];
        assert_eq!(target((9, 0), &known), own("sm_90a"));
        assert_eq!(target((8, 0), &known), own("sm_80"));
        assert_eq!(target((12, 0), &known), own("sm_120"));
        let portable = Target { architecture: "compute_100".to_owned(), portable: true };
        assert_eq!(target((10, 3), &known), Some(portable));
        assert_eq!(target((7, 0), &known), None);
    }

    static TEXT: ModuleText = ModuleText {
        name: "sample",
        texts: &[
            "typedef ELEMENT element;\n",
            "extern \"C\" __global__ void twice(element* x) { x[threadIdx.x] *= FACTOR; }\n",
        ],
    };

    fn compiler(folder: &std::path::Path) -> Option<Compiler> {
        match Compiler::new((9, 0), "13.0", DiskCache::new(Some(folder.to_path_buf()))) {
            Ok(compiler) => Some(compiler),
            Err(error) => {
                println!("skipped: {error}");
                None
            }
        }
    }

    #[test]
    fn code_is_compiled_once_for_each_set_of_macros_and_kept_on_disk() {
        let folder = tempfile::tempdir().unwrap();
        let Some(compiler) = compiler(folder.path()) else { return };
        let float = [("ELEMENT", "float"), ("FACTOR", "2.0f")];
        let int = [("ELEMENT", "int"), ("FACTOR", "2")];
        let (first, cached) = compiler.code(&TEXT, &float, false).unwrap();
        assert!(!cached && first.starts_with(b"\x7fELF"));
        assert_eq!(compiler.code(&TEXT, &float, false).unwrap(), (first.clone(), true));
        assert!(!compiler.code(&TEXT, &float, true).unwrap().1);
        let (other, cached) = compiler.code(&TEXT, &int, false).unwrap();
        assert!(!cached && other != first);
        let file = std::fs::read_dir(folder.path()).unwrap().next().unwrap().unwrap().path();
        #[allow(clippy::disallowed_methods)]
        std::fs::OpenOptions::new().write(true).open(file).unwrap().set_len(100).unwrap();
        let cached = [float, int].map(|defines| compiler.code(&TEXT, &defines, false).unwrap().1);
        assert!(cached[0] != cached[1], "the truncated one is compiled again, the other is not: {cached:?}");
    }

    #[test]
    fn errors_of_the_compiler_name_module_line_and_cause() {
        let folder = tempfile::tempdir().unwrap();
        let Some(compiler) = compiler(folder.path()) else { return };
        let error =
            compiler.code(&TEXT, &[("ELEMENT", "nothing"), ("FACTOR", "1")], false).unwrap_err().to_string();
        assert!(error.contains("compiling `sample`") && error.contains("sample.cu(1)"), "{error}");
        assert!(error.contains("nothing"), "{error}");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
