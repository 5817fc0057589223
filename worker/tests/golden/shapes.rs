//! Checkpoints of other shapes, made on the spot: every division agrees with the whole model.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use phalanx_proto::{checkpoint::Checkpoint, ids::TokenId, layout::Parallelism};
use phalanx_worker::{
    backend::{cpu::CpuBackend, reference::ReferenceBackend},
    model::Model,
};

use crate::{
    Candidate,
    group::{ALONE, Division, run},
    session::{Session, Slice, argmax, distance},
};

/// Tokens of the prompt.
const PROMPT: usize = 70;
/// Tokens of it that are computed at a time.
const CHUNK: usize = 33;
/// Tokens that follow it.
const MORE: usize = 6;
/// Every answer's logits as one sequence, and where they come from.
type Answer = Vec<f32>;

/// The Python that `tests/run` names or has installed, else the system's.
fn python() -> PathBuf {
    let installed = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/venv/bin/python");
    let fallback = || if installed.exists() { installed } else { PathBuf::from("python3") };
    std::env::var_os("PHALANX_PYTHON").map_or_else(fallback, PathBuf::from)
}

/// Makes a checkpoint in `folder`.
fn make(folder: &Path, settings: &[&str]) -> PathBuf {
    let python = python();
    let tool = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/tools/make_checkpoint.py");
    let settings = settings.iter().flat_map(|setting| ["--set", setting]);
    let output = Command::new(&python)
        .arg(tool)
        .args(["--preset", "tiny", "--seed", "7", "--out"])
        .arg(folder)
        .args(settings)
        .output();
    let hint = "run the tests with tests/run, which installs Python and numpy into target/venv";
    let output = output.unwrap_or_else(|error| panic!("{}: {error}; {hint}", python.display()));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{} make_checkpoint.py failed; {hint}\n{said}", python.display());
    folder.to_owned()
}

/// Logits of the prompt's last tokens and of some decoded ones. What is fed does not depend on the logits, so that a
/// near tie cannot make two answers incomparable.
fn answer<B: Candidate>(checkpoint: &Path, division: Division) -> Answer {
    run(checkpoint, division, |model: Model<B>, end| {
        let vocab = model.geometry().vocab_size;
        let token = |i: usize| TokenId(((i * 7919 + 13) % vocab) as u32);
        let tokens: Vec<TokenId> = (0..PROMPT + MORE).map(token).collect();
        let mut session = Session::new(model, end, &[tokens.len()], CHUNK);
        let last: Vec<usize> = (PROMPT - 20..PROMPT).collect();
        let mut logits = session.prefill(0, &tokens[..PROMPT], CHUNK, &last);
        for token in tokens[PROMPT..].chunks(1) {
            logits.extend(session.step(&[Slice { sequence: 0, tokens: token, wanted: vec![0] }]));
        }
        logits
    })
}

fn agree(what: &str, vocab: usize, found: &Answer, expected: &Answer, tolerance: f32) {
    let distance = distance(found, expected);
    println!("{what}: largest difference {distance:.2e}");
    assert!(distance <= tolerance, "{what}: a logit differs by {distance}");
    let choices = |answer: &Answer| answer.chunks_exact(vocab).map(argmax).collect::<Vec<_>>();
    assert_eq!(choices(found), choices(expected), "{what}");
}

/// Makes a checkpoint and holds every division of it, on both backends, against the whole model on the reference.
fn divisions_agree(settings: &[&str], divisions: &[Division]) {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = make(folder.path(), settings);
    let vocab = Checkpoint::open(&checkpoint).unwrap().geometry.vocab_size;
    let expected = answer::<ReferenceBackend>(&checkpoint, ALONE);
    for &division in divisions {
        let found = answer::<ReferenceBackend>(&checkpoint, division);
        agree(&format!("reference {division:?}"), vocab, &found, &expected, ReferenceBackend::LOGIT_TOLERANCE);
    }
    for &division in [ALONE].iter().chain(divisions) {
        let found = answer::<CpuBackend>(&checkpoint, division);
        agree(&format!("cpu {division:?}"), vocab, &found, &expected, CpuBackend::LOGIT_TOLERANCE);
    }
}

fn tensor(world: usize) -> Division {
    (world, Parallelism::Tensor)
}

fn expert(world: usize) -> Division {
    (world, Parallelism::Expert)
}

#[test]
fn more_ranks_than_key_value_heads_agree() {
    let settings = ["num_attention_heads=8", "num_key_value_heads=2", "num_hidden_layers=2"];
    divisions_agree(&settings, &[tensor(4), expert(8)]);
}

#[test]
fn uneven_blocks_and_an_odd_vocabulary_agree() {
    let settings = ["intermediate_size=224", "hidden_size=96", "vocab_size=1021", "head_dim=32", "num_hidden_layers=3"];
    divisions_agree(&settings, &[tensor(2), tensor(4)]);
}

#[test]
fn odd_windows_and_odd_numbers_of_experts_agree() {
    let settings = ["sliding_window=37", "num_local_experts=5", "num_experts_per_tok=3", "num_hidden_layers=2"];
    divisions_agree(&settings, &[tensor(2), expert(2), expert(4)]);
}

#[test]
fn a_window_of_one_and_a_single_expert_agree() {
    let settings = ["sliding_window=1", "num_local_experts=1", "num_experts_per_tok=1", "num_hidden_layers=2"];
    divisions_agree(&settings, &[tensor(2)]);
}
