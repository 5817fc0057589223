//! What whole-cluster tests share: where the data lies, and a real cluster of real processes.

#![allow(clippy::panic, reason = "a panic is how a test fails")]

pub mod cluster;
pub mod etcd;
pub mod faults;
pub mod hosts;
pub mod load;
pub mod parts;
pub mod proxy;

use std::path::{Path, PathBuf};

/// The repository's root.
pub fn root() -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    std::fs::canonicalize(&root).unwrap_or(root)
}

/// Test data, copied into the repository so that a clone alone passes its tests.
pub fn data(name: &str) -> PathBuf {
    root().join("tests/data").join(name)
}

/// The interpreter with the packages of `tests/requirements.txt`.
///
/// # Panics
/// When the test command of the README has not prepared it.
pub fn python() -> PathBuf {
    let told = std::env::var_os("PHALANX_PYTHON").map(PathBuf::from);
    let python = told.unwrap_or_else(|| root().join("target/venv/bin/python"));
    assert!(python.exists(), "{} is missing: run the tests with tests/run, which prepares it", python.display());
    python
}

/// Whether figures are asked for at their full size (`PHALANX_FULL=1`); without it, each takes at most a few minutes.
pub fn full_size() -> bool {
    std::env::var_os("PHALANX_FULL").is_some_and(|value| !value.is_empty() && value != "0")
}
