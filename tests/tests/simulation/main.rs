//! The whole cluster in one thread and in virtual time: the real coordinator, the real worker with its executor, and
//! clients that do what the gateway does, over a simulated network that breaks.
//!
//! A seed decides what is asked for and what breaks when: requests, latencies, crashes, partitions, delayed messages. A
//! seed that fails is named; `PHALANX_SEED=n` runs that one alone, `PHALANX_SEED=n..m` some, `PHALANX_FULL=1` runs 10,000
//! of them. The order in which tasks run that are ready at the same moment is tokio's, which draws it anew each time unless
//! it is built with `--cfg tokio_unstable`: a seed that failed once may have to be run more than once. The trace that is
//! printed tells whether two runs were the same.

#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests fail by panicking, as tests do")]

mod client;
mod device;
// The collective between threads that the worker's own tests use.
#[allow(dead_code, reason = "the simulation starts its threads by itself")]
#[path = "../../../worker/tests/in_process/mod.rs"]
mod in_process;
mod network;
mod room;
mod world;

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use crate::world::{Outcome, simulate};

/// The bundled model.
fn model_dir() -> PathBuf {
    phalanx_tests::root().join("deploy/models/nano")
}

/// Seeds to run.
fn seeds() -> Vec<u64> {
    match std::env::var("PHALANX_SEED") {
        Ok(seeds) => match seeds.split_once("..") {
            Some((from, to)) => (from.parse().unwrap()..to.parse().unwrap()).collect(),
            None => vec![seeds.parse().unwrap()],
        },
        Err(_) => (0..if phalanx_tests::full_size() { 10_000 } else { 200 }).collect(),
    }
}

#[test]
fn every_seed_keeps_every_promise() {
    let (start, seeds) = (Instant::now(), seeds());
    let (mut all, mut broken) = (Outcome::default(), Vec::new());
    for &seed in &seeds {
        let outcome = simulate(seed, true);
        for problem in &outcome.problems {
            println!("seed {seed}: {problem}");
        }
        if !outcome.problems.is_empty() {
            broken.push(seed);
        }
        all.add(&outcome);
    }
    println!(
        "{} seeds in {:.1?}: {} requests finished, {} left, {} given up; {} resumed streams, {} steps, {} faults, {} \
         failed epochs, {:.0?} simulated, trace {:016x}",
        seeds.len(),
        start.elapsed(),
        all.finished,
        all.left,
        all.given_up,
        all.resumes,
        all.steps,
        all.faults,
        all.failed_epochs,
        all.simulated,
        all.trace
    );
    assert!(broken.is_empty(), "promises are broken by seeds {broken:?}: run one with PHALANX_SEED=n");
    let enough = all.finished > seeds.len() && all.failed_epochs as usize >= seeds.len() / 4;
    assert!(enough || seeds.len() < 100, "too little has happened");
}

#[test]
fn nothing_is_resumed_where_nothing_breaks() {
    let outcome = simulate(1, false);
    assert!(outcome.problems.is_empty(), "{:?}", outcome.problems);
    assert_eq!((outcome.resumes, outcome.failed_epochs, outcome.given_up), (0, 0, 0));
    assert!(outcome.simulated < Duration::from_secs(60));
}
