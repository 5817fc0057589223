//! The compiler and the disassembler, from the Python environment of the tests.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use phalanx_worker::backend::cuda::{
    library::{self, NVRTC, Place, Surroundings},
    nvrtc::Nvrtc,
};

/// The one that `tests/requirements.txt` names: registers and instructions are its choice.
const NVRTC_VERSION: (u32, u32) = (12, 9);
const HINT: &str = "run the tests with tests/run, which installs tests/requirements.txt into target/venv";

/// The environment of the Python that `tests/run` names or has installed, else of the system's.
pub(crate) fn environment() -> PathBuf {
    let installed = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/venv/bin/python");
    let fallback = || if installed.exists() { installed } else { PathBuf::from("python3") };
    let python = std::env::var_os("PHALANX_PYTHON").map_or_else(fallback, PathBuf::from);
    let output = Command::new(&python).args(["-c", "import sys; print(sys.prefix)"]).output();
    let output = output.unwrap_or_else(|error| panic!("{}: {error}; {HINT}", python.display()));
    PathBuf::from(String::from_utf8(output.stdout).unwrap().trim())
}

/// Where the environment's libraries lie, and nowhere else: another compiler would choose other instructions.
fn places() -> Vec<Place> {
    let surroundings = Surroundings { virtual_environment: Some(environment()), ..Surroundings::default() };
    library::places(&surroundings).into_iter().filter(|place| *place != Place::System).collect()
}

/// The compiler.
pub(crate) fn nvrtc() -> Nvrtc {
    let library = library::open_in(&NVRTC, &places()).unwrap_or_else(|error| panic!("{error}\n{HINT}"));
    let nvrtc = Nvrtc::of(library).unwrap();
    assert_eq!(nvrtc.version, NVRTC_VERSION, "{}; {HINT}", nvrtc.path.display());
    nvrtc
}

/// The disassembler.
pub(crate) fn nvdisasm() -> PathBuf {
    let directories = places().into_iter().filter_map(|place| match place {
        Place::Directory(path) => Some(path),
        Place::System => None,
    });
    // A package has `bin` beside `lib`, or alone.
    let packages = directories.filter_map(|lib| Some(lib.parent()?.parent()?.to_owned()));
    let mut packages: Vec<PathBuf> = packages.collect();
    packages.dedup();
    let found = packages.iter().flat_map(|packages| std::fs::read_dir(packages).unwrap()).find_map(|package| {
        let path = package.unwrap().path().join("bin/nvdisasm");
        path.is_file().then_some(path)
    });
    found.unwrap_or_else(|| panic!("no nvdisasm in {packages:?}; {HINT}"))
}
