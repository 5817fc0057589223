//! Finds CUDA's libraries when the program runs, so that one binary works with and without them.
//!
//! None is linked. Each is looked for by its file names, the preferred name first in every place: directories named in
//! `PHALANX_LIBRARY_PATH`, the executable's own and `../lib` beside it, the system's loader (which knows
//! `LD_LIBRARY_PATH`), the usual places of toolkit and driver, and the packages of the active Python environment.

#![allow(unsafe_code, reason = "opening a library runs its initializers")]

use std::{
    env, fmt, fs,
    path::{Path, PathBuf},
};

use libloading::{
    Library,
    os::unix::{Library as UnixLibrary, RTLD_GLOBAL, RTLD_NOW},
};
use thiserror::Error;

/// Names directories that are searched before all others, separated by colons.
pub const PATH_VARIABLE: &str = "PHALANX_LIBRARY_PATH";

/// A library that may be on this machine.
#[derive(Clone, Copy, Debug)]
pub struct Wanted {
    /// What people call it.
    pub name: &'static str,
    /// Its file names, the preferred one first.
    pub files: &'static [&'static str],
    /// Files without which it does not work, by the start of their names; they lie beside it and are loaded before it.
    pub companions: &'static [&'static str],
    /// How to get it.
    pub advice: &'static str,
}

/// The driver's library, which comes with the kernel module.
pub const DRIVER: Wanted = Wanted {
    name: "NVIDIA's driver",
    files: &["libcuda.so.1"],
    companions: &[],
    advice: "install the driver (525 or newer), or start the container with --gpus all",
};

/// The compiler of kernels. Version 12 comes first: its cubins load on every driver of CUDA 12 and 13, while those of
/// version 13 need a driver of 13.
pub const NVRTC: Wanted = Wanted {
    name: "NVRTC",
    files: &["libnvrtc.so.12", "libnvrtc.so.13"],
    companions: &["libnvrtc-builtins.so."],
    advice: "pip install nvidia-cuda-nvrtc-cu12==12.9.86 in the active environment",
};

/// Collectives between GPUs.
pub const NCCL: Wanted = Wanted {
    name: "NCCL",
    files: &["libnccl.so.2"],
    companions: &[],
    advice: "pip install nvidia-nccl-cu12 in the active environment",
};

/// Why a library cannot be used.
#[derive(Debug, Error)]
pub enum LibraryError {
    /// It is nowhere.
    #[error("{name} was not found: no {files} in {places}; {advice}, or name its directory in {PATH_VARIABLE}")]
    Missing {
        /// What people call it.
        name: &'static str,
        /// The file names that were tried.
        files: String,
        /// Where it was looked for.
        places: String,
        /// How to get it.
        advice: &'static str,
    },
    /// It is there and cannot be loaded.
    #[error("{name} cannot be loaded from {path}: {message}; {advice}, or name another directory in {PATH_VARIABLE}")]
    Broken {
        /// What people call it.
        name: &'static str,
        /// The file.
        path: String,
        /// What the loader said.
        message: String,
        /// How to get it.
        advice: &'static str,
    },
    /// It lacks a function: it is another version than its name says, or too old.
    #[error("{path} has no function {function}: {message}")]
    Function {
        /// The file.
        path: String,
        /// The function's name.
        function: &'static str,
        /// What the loader said.
        message: String,
    },
}

/// A loaded library.
#[derive(Debug)]
pub struct Loaded {
    library: Library,
    /// Stay loaded as long as it.
    _companions: Vec<Library>,
    /// Its file, as far as the system tells.
    pub path: PathBuf,
}

impl Loaded {
    /// The address of a function as the value of type `T`, which must be a pointer to a function of that type.
    ///
    /// # Errors
    /// When the library has no such function.
    ///
    /// # Safety
    /// The function has the type `T`, and what is returned is not called once the library is dropped.
    pub unsafe fn function<T: Copy>(&self, name: &'static str) -> Result<T, LibraryError> {
        // SAFETY: the caller vouches for the type.
        let symbol = unsafe { self.library.get::<T>(name) };
        let missing = |error: libloading::Error| LibraryError::Function {
            path: self.path.display().to_string(),
            function: name,
            message: error.to_string(),
        };
        Ok(*symbol.map_err(missing)?)
    }
}

/// What the search depends on, so that tests can put it together.
#[derive(Clone, Debug, Default)]
pub struct Surroundings {
    /// Value of [`PATH_VARIABLE`].
    pub library_path: Option<PathBuf>,
    /// The running program.
    pub executable: Option<PathBuf>,
    /// The active Python environment.
    pub virtual_environment: Option<PathBuf>,
    /// The root of the file system; `/` outside tests.
    pub root: PathBuf,
}

impl Surroundings {
    /// This process's.
    pub fn of_process() -> Self {
        let variable = |name: &str| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        Self {
            library_path: variable(PATH_VARIABLE),
            executable: env::current_exe().ok(),
            virtual_environment: variable("VIRTUAL_ENV"),
            root: PathBuf::from("/"),
        }
    }
}

/// A place where libraries may lie.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// A directory.
    Directory(PathBuf),
    /// Wherever the system's loader looks: `LD_LIBRARY_PATH`, its cache, `/lib` and `/usr/lib`.
    System,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Directory(path) => write!(f, "{}", path.display()),
            Self::System => f.write_str("the system's library path"),
        }
    }
}

/// Every place that is searched, in order. Directories that do not exist are left out, unless they were asked for.
pub fn places(surroundings: &Surroundings) -> Vec<Place> {
    let mut places = Vec::new();
    if let Some(path) = &surroundings.library_path {
        places.extend(env::split_paths(path).filter(|path| !path.as_os_str().is_empty()).map(Place::Directory));
    }
    let existing = |path: PathBuf| path.is_dir().then_some(Place::Directory(path));
    if let Some(own) = surroundings.executable.as_deref().and_then(Path::parent) {
        places.push(Place::Directory(own.to_owned()));
        places.extend(existing(own.join("../lib")));
    }
    places.push(Place::System);
    let local = surroundings.root.join("usr/local");
    let toolkits = entries(&local, |name| name.starts_with("cuda")).into_iter().rev();
    places.extend(toolkits.filter_map(|toolkit| existing(toolkit.join("lib64"))));
    // Where container runtimes and Windows' Linux put the driver.
    places.extend(existing(local.join("nvidia/lib64")));
    places.extend(existing(surroundings.root.join("usr/lib/wsl/lib")));
    if let Some(environment) = &surroundings.virtual_environment {
        for python in entries(&environment.join("lib"), |name| name.starts_with("python")) {
            let packages = entries(&python.join("site-packages/nvidia"), |_| true);
            places.extend(packages.into_iter().filter_map(|package| existing(package.join("lib"))));
        }
    }
    places
}

/// A directory's entries of these names, sorted; none if it cannot be read.
fn entries(directory: &Path, wanted: impl Fn(&str) -> bool) -> Vec<PathBuf> {
    let Ok(found) = fs::read_dir(directory) else { return Vec::new() };
    let of_name = |path: &PathBuf| path.file_name().and_then(|name| name.to_str()).is_some_and(&wanted);
    let mut found: Vec<PathBuf> = found.filter_map(|entry| Some(entry.ok()?.path())).filter(of_name).collect();
    found.sort();
    found
}

/// Loads a library from where it is found first in this process's surroundings.
///
/// # Errors
/// When it is nowhere, or nothing that is there can be loaded.
pub fn open(wanted: &Wanted) -> Result<Loaded, LibraryError> {
    open_in(wanted, &places(&Surroundings::of_process()))
}

/// Loads a library from the first of these places that has it. A preferred file name in a later place goes before
/// another one in an earlier place.
///
/// # Errors
/// As [`open`].
pub fn open_in(wanted: &Wanted, places: &[Place]) -> Result<Loaded, LibraryError> {
    let mut broken = None;
    for file in wanted.files {
        for place in places {
            let (path, companions) = match place {
                Place::Directory(directory) => (directory.join(file), companions(wanted, directory)),
                Place::System => (PathBuf::from(file), Vec::new()),
            };
            let by_name = *place == Place::System;
            if !by_name && !path.exists() {
                continue;
            }
            let companions = companions.iter().filter_map(|path| load(path).ok()).collect();
            match load(&path) {
                Ok(library) => {
                    let path = if by_name { loaded_file(file).unwrap_or(path) } else { path };
                    return Ok(Loaded { library, _companions: companions, path });
                }
                // The loader names the file itself unless it is the very one that is missing.
                Err(message) if by_name && message.starts_with(&format!("{file}: cannot open shared object")) => {}
                Err(message) => broken = broken.or(Some((path, message))),
            }
        }
    }
    let Wanted { name, advice, .. } = *wanted;
    if let Some((path, message)) = broken {
        return Err(LibraryError::Broken { name, path: path.display().to_string(), message, advice });
    }
    let places: Vec<String> = places.iter().map(ToString::to_string).collect();
    Err(LibraryError::Missing { name, files: wanted.files.join(" or "), places: places.join(", "), advice })
}

fn companions(wanted: &Wanted, directory: &Path) -> Vec<PathBuf> {
    let is_companion = |name: &str| wanted.companions.iter().any(|start| name.starts_with(start));
    entries(directory, is_companion)
}

/// Loads one file. Its symbols are visible to libraries that come later, since companions are found by them.
fn load(path: &Path) -> Result<Library, String> {
    // SAFETY: CUDA's libraries may be loaded at any time; whoever can place others in the directories searched, or set
    // the variables that name them, can as well replace this program.
    let library = unsafe { UnixLibrary::open(Some(path), RTLD_NOW | RTLD_GLOBAL) };
    library.map(Library::from).map_err(|error| {
        let source = std::error::Error::source(&error).map(ToString::to_string);
        source.unwrap_or_else(|| error.to_string())
    })
}

/// The file of that name that this process has mapped.
fn loaded_file(file: &str) -> Option<PathBuf> {
    let maps = fs::read_to_string("/proc/self/maps").ok()?;
    // libcuda.so.1 is a link to libcuda.so.535.54.03: the mapping shows the latter.
    let stem = file.split_once(".so").map_or(file, |(stem, _)| stem);
    let start = format!("{stem}.so");
    let of_name =
        |path: &&Path| path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with(&start));
    let paths = maps.lines().filter_map(|line| line.find('/').map(|at| Path::new(&line[at..])));
    paths.filter(of_name).map(Path::to_path_buf).next()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A library that every Linux has, under a name that none has.
    const LIBM: &str = "libm.so.6";

    fn wanted(files: &'static [&'static str]) -> Wanted {
        Wanted { name: "the library", files, companions: &[], advice: "do without" }
    }

    fn link_libm(at: &Path) {
        let here = Loaded { library: load(Path::new(LIBM)).unwrap(), _companions: Vec::new(), path: LIBM.into() };
        let file = loaded_file(LIBM).unwrap();
        fs::create_dir_all(at.parent().unwrap()).unwrap();
        std::os::unix::fs::symlink(file, at).unwrap();
        drop(here);
    }

    #[test]
    fn places_are_searched_from_the_most_to_the_least_explicit() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        let made = |path: &str| {
            fs::create_dir_all(root.join(path)).unwrap();
            Place::Directory(root.join(path))
        };
        let own = made("opt/phalanx/bin");
        made("opt/phalanx/lib");
        let (old, new) = (made("usr/local/cuda-12.4/lib64"), made("usr/local/cuda-12.9/lib64"));
        let wsl = made("usr/lib/wsl/lib");
        let nccl = made("venv/lib/python3.12/site-packages/nvidia/nccl/lib");
        let nvrtc = made("venv/lib/python3.12/site-packages/nvidia/cuda_nvrtc/lib");
        let surroundings = Surroundings {
            library_path: Some("/first:/second".into()),
            executable: Some(root.join("opt/phalanx/bin/phalanx")),
            virtual_environment: Some(root.join("venv")),
            root: root.to_owned(),
        };
        let lib = Place::Directory(root.join("opt/phalanx/bin/../lib"));
        let [first, second] = ["/first", "/second"].map(|path| Place::Directory(path.into()));
        let expected = [first, second, own, lib, Place::System, new, old, wsl, nvrtc, nccl];
        assert_eq!(places(&surroundings), expected);
        let nothing = Surroundings { root: root.join("empty"), ..Surroundings::default() };
        assert_eq!(places(&nothing), [Place::System]);
    }

    #[test]
    fn what_is_missing_is_named_with_the_places_and_the_remedy() {
        let wanted = wanted(&["libphalanx-none.so.2", "libphalanx-none.so.1"]);
        let error = open_in(&wanted, &[Place::Directory("/nowhere".into()), Place::System]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the library was not found: no libphalanx-none.so.2 or libphalanx-none.so.1 in /nowhere, the system's \
             library path; do without, or name its directory in PHALANX_LIBRARY_PATH"
        );
    }

    #[test]
    fn a_file_that_is_no_library_is_named() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("libphalanx-broken.so"), "no library").unwrap();
        let error =
            open_in(&wanted(&["libphalanx-broken.so"]), &[Place::Directory(directory.path().into())]).unwrap_err();
        assert!(matches!(error, LibraryError::Broken { .. }), "{error}");
        assert!(error.to_string().contains("libphalanx-broken.so"), "{error}");
    }

    #[test]
    fn the_preferred_name_wins_over_the_earlier_place_unless_it_is_broken() {
        let directory = tempfile::tempdir().unwrap();
        let [early, late] = ["early", "late"].map(|name| directory.path().join(name));
        link_libm(&early.join("libphalanx-m.so.1"));
        fs::create_dir_all(&late).unwrap();
        fs::write(late.join("libphalanx-m.so.2"), "no library").unwrap();
        let places = [Place::Directory(early.clone()), Place::Directory(late.clone())];
        let both = wanted(&["libphalanx-m.so.2", "libphalanx-m.so.1"]);
        assert_eq!(open_in(&both, &places).unwrap().path, early.join("libphalanx-m.so.1"));
        fs::remove_file(late.join("libphalanx-m.so.2")).unwrap();
        link_libm(&late.join("libphalanx-m.so.2"));
        assert_eq!(open_in(&both, &places).unwrap().path, late.join("libphalanx-m.so.2"));
    }

    #[test]
    fn the_systems_loader_tells_the_file_and_functions_are_found_by_name() {
        let found = open_in(&wanted(&[LIBM]), &[Place::System]).unwrap();
        assert!(found.path.is_absolute(), "{}", found.path.display());
        // SAFETY: C's cosine has this type.
        let cosine = unsafe { found.function::<unsafe extern "C" fn(f64) -> f64>("cos") }.unwrap();
        // SAFETY: it may be called with any value.
        assert_eq!(unsafe { cosine(0.0) }, 1.0);
        // SAFETY: nothing is called.
        let missing = unsafe { found.function::<unsafe extern "C" fn()>("phalanx_none") }.unwrap_err();
        assert!(missing.to_string().contains("has no function phalanx_none"), "{missing}");
    }
}
