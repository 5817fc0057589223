//! What several of the gateway's tests need.
#![allow(clippy::expect_used, clippy::panic, reason = "helpers of tests fail by panicking")]
#![allow(dead_code, reason = "each test binary uses its own part of this")]

pub(crate) mod o200k;

use std::{
    path::{Path, PathBuf},
    sync::{Arc, LazyLock},
};

use phalanx_gateway::tokenizer::Tokenizer;
use proptest::{prelude::ProptestConfig, test_runner::RngSeed};

/// The release's tokenizer, loaded once a test process.
pub(crate) static O200K: LazyLock<Arc<Tokenizer>> =
    LazyLock::new(|| Arc::new(Tokenizer::from_file(&o200k::tokenizer_json()).expect("the release's tokenizer loads")));

/// The bundled small model's tokenizer.
pub(crate) static NANO: LazyLock<Arc<Tokenizer>> =
    LazyLock::new(|| Arc::new(Tokenizer::from_file(&nano_tokenizer_json()).expect("nano's tokenizer loads")));

/// So many random cases, the same ones in every run.
pub(crate) fn cases(cases: u32) -> ProptestConfig {
    ProptestConfig { cases, rng_seed: RngSeed::Fixed(20), failure_persistence: None, ..ProptestConfig::default() }
}

/// Where the bundled small model's tokenizer lies.
pub(crate) fn nano_tokenizer_json() -> PathBuf {
    repository().join("deploy/models/nano/tokenizer.json")
}

/// The text of a file of test data.
pub(crate) fn golden(name: &str) -> String {
    let path = repository().join("tests/data/golden").join(name);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the gateway lies in the repository")
}
