//! Where NVIDIA's libraries are: the driver's in the system's search path, the others there, in a toolkit or in the
//! wheels of a Python environment. Only files are looked at; no program is run.

use std::collections::HashSet;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use libloading::Library;

use super::bindings::{Blas, Driver, Nvrtc, ParameterInfo};
use crate::error::{Error, Result};

/// The oldest CUDA whose libraries are used.
const OLDEST_MAJOR: u32 = 12;
/// The newest whose file names are tried; anything newer is found by its name without a version.
const NEWEST_MAJOR: u32 = 15;

/// One of NVIDIA's libraries, as found.
#[derive(Debug, Clone)]
pub struct CudaLibrary {
    /// A name such as `cublasLt`.
    pub name: &'static str,
    /// The file, or its name where the system's search path found it.
    pub path: Option<PathBuf>,
    /// Its version, such as `13.1`.
    pub version: Option<String>,
    /// What is wrong and how to get it; absent when the library works.
    pub problem: Option<String>,
}

/// A library that works.
pub(super) struct Loaded<T> {
    pub(super) functions: T,
    pub(super) path: PathBuf,
    /// 1000 * major + 10 * minor.
    pub(super) version: u32,
}

/// What a search may look at.
pub(super) struct Environment<'a> {
    pub(super) variable: &'a dyn Fn(&str) -> Option<OsString>,
    /// `/`, or a folder that stands for it in tests.
    pub(super) root: PathBuf,
}

impl Environment<'_> {
    fn path(&self, name: &str) -> Option<PathBuf> {
        (self.variable)(name).filter(|value| !value.is_empty()).map(PathBuf::from)
    }

    fn paths(&self, name: &str) -> Vec<PathBuf> {
        (self.variable)(name).map(|value| std::env::split_paths(&value).collect()).unwrap_or_default()
    }
}

/// The folders inside `folder` whose name starts with `prefix`, the last in order first: newer versions win.
fn subfolders(folder: &Path, prefix: &str) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    let named = |path: &PathBuf| {
        path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with(prefix))
    };
    let mut found: Vec<PathBuf> =
        entries.flatten().map(|entry| entry.path()).filter(named).filter(|path| path.is_dir()).collect();
    found.sort();
    found.reverse();
    found
}

/// The folders of a Python installation in which packages are.
fn package_folders(prefix: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for library in ["lib", "lib64", "local/lib"] {
        for python in subfolders(&prefix.join(library), "python3") {
            found.push(python.join("site-packages"));
            found.push(python.join("dist-packages"));
        }
    }
    found.push(prefix.join("Lib").join("site-packages"));
    found
}

/// The Python installations at hand, by prefix.
fn python_prefixes(environment: &Environment<'_>) -> Vec<PathBuf> {
    let mut prefixes: Vec<PathBuf> =
        ["VIRTUAL_ENV", "CONDA_PREFIX"].iter().filter_map(|name| environment.path(name)).collect();
    for folder in environment.paths("PATH") {
        let python = folder.join(if cfg!(windows) { "python.exe" } else { "python3" });
        if !python.is_file() {
            continue;
        }
        prefixes.extend(folder.parent().map(Path::to_path_buf));
        let target = std::fs::canonicalize(&python).ok();
        prefixes
            .extend(target.as_deref().and_then(Path::parent).and_then(Path::parent).map(Path::to_path_buf));
    }
    if let Some(home) = environment.path("HOME") {
        prefixes.push(home.join(".local"));
        let pyenv = environment.path("PYENV_ROOT").unwrap_or_else(|| home.join(".pyenv"));
        prefixes.extend(subfolders(&pyenv.join("versions"), ""));
    }
    prefixes
}

/// Every folder that may hold the libraries, best first, each once.
pub(super) fn folders(environment: &Environment<'_>) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let toolkits: Vec<PathBuf> = ["CUDA_HOME", "CUDA_PATH"]
        .iter()
        .filter_map(|name| environment.path(name))
        .chain(subfolders(&environment.root.join("usr/local"), "cuda"))
        .collect();
    for toolkit in toolkits {
        for inside in ["lib64", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib", "lib", "bin", "bin/x64"]
        {
            found.push(toolkit.join(inside));
        }
    }
    found.extend(environment.paths("LD_LIBRARY_PATH"));
    let prefixes = python_prefixes(environment);
    for prefix in &prefixes {
        for packages in package_folders(prefix) {
            for package in subfolders(&packages.join("nvidia"), "") {
                found.extend([package.join("lib"), package.join("bin"), package.join("bin").join("x86_64")]);
            }
        }
    }
    found.extend(environment.path("CONDA_PREFIX").map(|prefix| prefix.join("lib")));
    let mut seen = HashSet::new();
    found.retain(|folder| folder.is_dir() && seen.insert(folder.clone()));
    found
}

/// File names of a library, newest first, that a driver of this CUDA version can run.
fn file_names(library: &str, newest: u32) -> Vec<String> {
    let majors = (OLDEST_MAJOR..=newest).rev();
    if cfg!(windows) {
        let suffix = if library == "nvrtc" { "0_0" } else { "" };
        return majors.map(|major| format!("{library}64_{major}{suffix}.dll")).collect();
    }
    let mut names: Vec<String> = majors.map(|major| format!("lib{library}.so.{major}")).collect();
    names.push(format!("lib{library}.so"));
    names
}

/// What to try to open, in order: the system's search path, then files that exist.
fn candidates(names: &[String], folders: &[PathBuf]) -> Vec<PathBuf> {
    let files = folders.iter().flat_map(|folder| names.iter().map(move |name| folder.join(name)));
    names.iter().map(PathBuf::from).chain(files.filter(|path| path.is_file())).collect()
}

/// Opens the first candidate whose functions load and whose version is within the limits.
fn open<T>(
    name: &str,
    remedy: &str,
    candidates: &[PathBuf],
    newest: u32,
    load: impl Fn(&'static Library) -> std::result::Result<(T, u32), String>,
) -> std::result::Result<Loaded<T>, String> {
    let mut reasons = Vec::new();
    for candidate in candidates {
        // SAFETY: opening runs the library's initialisers; these are NVIDIA's, which do nothing but register state.
        let Ok(library) = (unsafe { Library::new(candidate) }) else {
            if candidate.is_absolute() {
                reasons.push(format!("{} does not open", candidate.display()));
            }
            continue;
        };
        // Function pointers into it live as long as the process.
        match load(Box::leak(Box::new(library))) {
            Ok((_, version)) if version < 1000 * OLDEST_MAJOR || version >= 1000 * (newest + 1) => {
                let has = format!("{}.{}", version / 1000, version % 1000 / 10);
                reasons.push(format!(
                    "{} is of CUDA {has}, needed is {OLDEST_MAJOR} to {newest}",
                    candidate.display()
                ));
            }
            Ok((functions, version)) => {
                return Ok(Loaded { functions, path: resolved(candidate), version });
            }
            Err(reason) => reasons.push(format!("{}: {reason}", candidate.display())),
        }
    }
    let reasons = if reasons.is_empty() { "not found".to_owned() } else { reasons.join("; ") };
    Err(format!("{name}: {reasons}; {remedy}"))
}

/// The file behind a name that the system's search path resolved, where the system tells.
fn resolved(candidate: &Path) -> PathBuf {
    let maps = if candidate.is_absolute() { None } else { std::fs::read_to_string("/proc/self/maps").ok() };
    let name = candidate.to_string_lossy();
    let found = maps.as_deref().and_then(|maps| {
        maps.lines().filter_map(|line| line.find('/').map(|at| &line[at..])).find(|path| {
            Path::new(path)
                .file_name()
                .is_some_and(|file| file.to_string_lossy().starts_with(name.trim_end_matches(".1")))
        })
    });
    found.map_or_else(|| candidate.to_path_buf(), PathBuf::from)
}

fn missing(symbol: &str) -> String {
    format!("it has no `{symbol}`")
}

/// The driver's functions.
pub(super) struct DriverFunctions {
    pub(super) calls: Driver,
    pub(super) parameters: Option<ParameterInfo>,
}

/// The driver, opened once.
pub(super) fn driver() -> std::result::Result<&'static Loaded<DriverFunctions>, String> {
    static DRIVER: OnceLock<std::result::Result<Loaded<DriverFunctions>, String>> = OnceLock::new();
    DRIVER
        .get_or_init(|| {
            let names = if cfg!(windows) { &["nvcuda.dll"][..] } else { &["libcuda.so.1", "libcuda.so"] };
            let candidates: Vec<PathBuf> = names.iter().map(PathBuf::from).collect();
            let remedy = "install NVIDIA's driver, 525 or newer";
            open("the CUDA driver (libcuda)", remedy, &candidates, u32::MAX / 1000 - 1, |library| {
                let calls = Driver::load(library).map_err(missing)?;
                let mut version = 0;
                // SAFETY: the call writes one integer to valid memory.
                let status = unsafe { (calls.cuDriverGetVersion)(&raw mut version) };
                if status != super::bindings::SUCCESS {
                    return Err(format!("it does not tell its version (status {status})"));
                }
                let parameters = ParameterInfo::load(library).ok();
                Ok((DriverFunctions { calls, parameters }, version.unsigned_abs()))
            })
        })
        .as_ref()
        .map_err(Clone::clone)
}

/// The newest CUDA whose libraries the driver runs; without a driver any will do.
fn newest() -> u32 {
    driver().map_or(NEWEST_MAJOR, |driver| driver.version / 1000)
}

fn toolkit_candidates(library: &str) -> Vec<PathBuf> {
    let variable = |name: &str| std::env::var_os(name);
    let environment = Environment { variable: &variable, root: PathBuf::from("/") };
    candidates(&file_names(library, newest().min(NEWEST_MAJOR)), &folders(&environment))
}

/// The compiler, opened once.
pub(super) fn nvrtc() -> std::result::Result<&'static Loaded<Nvrtc>, String> {
    static NVRTC: OnceLock<std::result::Result<Loaded<Nvrtc>, String>> = OnceLock::new();
    NVRTC
        .get_or_init(|| {
            let remedy =
                "install it with `pip install nvidia-cuda-nvrtc` (CUDA 13) or `nvidia-cuda-nvrtc-cu12`";
            open(
                "the kernel compiler (libnvrtc)",
                remedy,
                &toolkit_candidates("nvrtc"),
                newest(),
                |library| {
                    let functions = Nvrtc::load(library).map_err(missing)?;
                    let (mut major, mut minor) = (0, 0);
                    // SAFETY: the call writes two integers to valid memory.
                    unsafe { (functions.nvrtcVersion)(&raw mut major, &raw mut minor) };
                    let version = major.unsigned_abs() * 1000 + minor.unsigned_abs() * 10;
                    Ok((functions, version))
                },
            )
        })
        .as_ref()
        .map_err(Clone::clone)
}

/// The matrix product library, opened once.
pub(super) fn blas() -> std::result::Result<&'static Loaded<Blas>, String> {
    static BLAS: OnceLock<std::result::Result<Loaded<Blas>, String>> = OnceLock::new();
    BLAS.get_or_init(|| {
        let remedy = "install it with `pip install nvidia-cublas` (CUDA 13) or `nvidia-cublas-cu12`";
        open("matrix products (libcublasLt)", remedy, &toolkit_candidates("cublasLt"), newest(), |library| {
            let functions = Blas::load(library).map_err(missing)?;
            // SAFETY: the call takes nothing and returns a number such as 120804 or 130101.
            let version = unsafe { (functions.cublasLtGetVersion)() } as u32;
            Ok((functions, version / 10_000 * 1000 + version % 10_000 / 100 * 10))
        })
    })
    .as_ref()
    .map_err(Clone::clone)
}

/// All three libraries.
///
/// # Errors
/// [`Error::Unsupported`] that names each one missing and how to get it.
pub(super) fn require()
-> Result<(&'static Loaded<DriverFunctions>, &'static Loaded<Nvrtc>, &'static Loaded<Blas>)> {
    match (driver(), nvrtc(), blas()) {
        (Ok(driver), Ok(nvrtc), Ok(blas)) => Ok((driver, nvrtc, blas)),
        (driver, nvrtc, blas) => {
            let reasons: Vec<String> =
                [driver.err(), nvrtc.err(), blas.err()].into_iter().flatten().collect();
            Err(Error::Unsupported { operation: "computing", device: "cuda", reason: reasons.join("\n") })
        }
    }
}

/// Where each of NVIDIA's libraries was found, or why not. Opens them; never fails.
pub fn cuda_libraries() -> Vec<CudaLibrary> {
    fn entry<T>(name: &'static str, loaded: std::result::Result<&Loaded<T>, String>) -> CudaLibrary {
        match loaded {
            Ok(loaded) => CudaLibrary {
                name,
                path: Some(loaded.path.clone()),
                version: Some(format!("{}.{}", loaded.version / 1000, loaded.version % 1000 / 10)),
                problem: None,
            },
            Err(problem) => CudaLibrary { name, path: None, version: None, problem: Some(problem) },
        }
    }
    vec![entry("cuda", driver()), entry("nvrtc", nvrtc()), entry("cublasLt", blas())]
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;
    use std::fs;

    fn with_folders(paths: &[&str]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for path in paths {
            fs::create_dir_all(root.path().join(path)).unwrap();
        }
        root
    }

    fn search(root: &Path, variables: &[(&str, &str)]) -> Vec<String> {
        let resolve = |value: &str| {
            let parts = value.split(':').map(|part| root.join(part));
            std::env::join_paths(parts).unwrap()
        };
        let table: HashMap<&str, OsString> =
            variables.iter().map(|&(name, value)| (name, resolve(value))).collect();
        let variable = |name: &str| table.get(name).cloned();
        let environment = Environment { variable: &variable, root: root.to_path_buf() };
        folders(&environment)
            .iter()
            .map(|path| path.strip_prefix(root).unwrap().to_string_lossy().into_owned())
            .collect()
    }

    #[test]
    fn toolkits_come_before_the_search_path_and_wheels_and_newer_ones_before_older() {
        let root = with_folders(&[
            "usr/local/cuda-12.4/lib64",
            "usr/local/cuda-13.0/targets/x86_64-linux/lib",
            "usr/local/cubes/lib64",
            "own/lib64",
            "ld/one",
            "venv/lib/python3.12/site-packages/nvidia/cu13/lib",
            "venv/lib/python3.12/site-packages/nvidia/cublas/lib",
            "venv/lib/python3.12/site-packages/other/lib",
        ]);
        let found = search(
            root.path(),
            &[("CUDA_HOME", "own"), ("LD_LIBRARY_PATH", "ld/one:ld/none"), ("VIRTUAL_ENV", "venv")],
        );
        let expected = [
            "own/lib64",
            "usr/local/cuda-13.0/targets/x86_64-linux/lib",
            "usr/local/cuda-12.4/lib64",
            "ld/one",
            "venv/lib/python3.12/site-packages/nvidia/cublas/lib",
            "venv/lib/python3.12/site-packages/nvidia/cu13/lib",
        ];
        let mut sorted = (found.clone(), expected.map(str::to_owned).to_vec());
        sorted.0.sort();
        sorted.1.sort();
        assert_eq!(sorted.0, sorted.1);
        assert_eq!(found[..4], expected[..4]);
    }

    #[test]
    #[cfg(unix)]
    fn wheels_of_the_python_in_the_path_are_found_through_its_link() {
        let root = with_folders(&[
            "bin",
            "real/bin",
            "real/lib/python3.11/site-packages/nvidia/cuda_nvrtc/lib",
            "home/.pyenv/versions/3.10/lib/python3.10/site-packages/nvidia/cu12/lib",
        ]);
        fs::create_dir_all(root.path().join("empty")).unwrap();
        let python = tempfile::NamedTempFile::new_in(root.path().join("real/bin")).unwrap();
        python.persist(root.path().join("real/bin/python3.11")).unwrap();
        std::os::unix::fs::symlink(root.path().join("real/bin/python3.11"), root.path().join("bin/python3"))
            .unwrap();
        let canonical = fs::canonicalize(root.path()).unwrap();
        let found = search(&canonical, &[("PATH", "empty:bin"), ("HOME", "home")]);
        assert_eq!(
            found,
            [
                "real/lib/python3.11/site-packages/nvidia/cuda_nvrtc/lib",
                "home/.pyenv/versions/3.10/lib/python3.10/site-packages/nvidia/cu12/lib",
            ]
        );
    }

    #[test]
    fn an_empty_machine_has_no_folders() {
        let root = with_folders(&[]);
        assert!(search(root.path(), &[("HOME", "home"), ("PATH", "bin")]).is_empty());
    }

    #[test]
    #[cfg(not(windows))]
    fn versions_that_the_driver_cannot_run_are_not_tried() {
        assert_eq!(file_names("nvrtc", 12), ["libnvrtc.so.12", "libnvrtc.so"]);
        assert_eq!(file_names("cublasLt", 13), ["libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so"]);
    }

    #[test]
    fn names_are_tried_before_files_and_only_files_that_exist() {
        let root = with_folders(&["a", "b"]);
        let file = tempfile::NamedTempFile::new_in(root.path().join("b")).unwrap();
        let path = root.path().join("b/libx.so");
        file.persist(&path).unwrap();
        let names = ["libx.so.9".to_owned(), "libx.so".to_owned()];
        let found = candidates(&names, &[root.path().join("a"), root.path().join("b")]);
        assert_eq!(found, [PathBuf::from("libx.so.9"), PathBuf::from("libx.so"), path]);
    }

    #[test]
    fn a_file_that_is_no_library_is_named_with_the_remedy() {
        let root = with_folders(&[]);
        let path = root.path().join("libx.so");
        tempfile::NamedTempFile::new_in(root.path()).unwrap().persist(&path).unwrap();
        let load = |_: &'static Library| Ok(((), 12_000));
        let error = open("x", "get it", std::slice::from_ref(&path), 13, load).err().unwrap();
        assert_eq!(error, format!("x: {} does not open; get it", path.display()));
        let error = open("x", "get it", &[PathBuf::from("libx-none.so")], 13, load).err().unwrap();
        assert_eq!(error, "x: not found; get it");
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn a_library_without_the_functions_or_of_a_wrong_version_is_refused() {
        let path = [PathBuf::from("libc.so.6")];
        let error =
            open("x", "get it", &path, 13, |library| Nvrtc::load(library).map(|x| (x, 0)).map_err(missing));
        assert_eq!(error.err().unwrap(), "x: libc.so.6: it has no `nvrtcVersion`; get it");
        let error = open("x", "get it", &path, 12, |_| Ok(((), 13_010))).err().unwrap();
        assert_eq!(error, "x: libc.so.6 is of CUDA 13.1, needed is 12 to 12; get it");
        assert!(open("x", "get it", &path, 12, |_| Ok(((), 12_090))).is_ok());
    }

    #[test]
    fn the_report_has_every_library_and_no_panic() {
        let report = cuda_libraries();
        assert_eq!(
            report.iter().map(|library| library.name).collect::<Vec<_>>(),
            ["cuda", "nvrtc", "cublasLt"]
        );
        for library in &report {
            assert_ne!(library.path.is_some(), library.problem.is_some(), "{library:?}");
        }
        if let Err(error) = require() {
            assert!(error.to_string().contains("install"), "{error}");
        }
    }
}
