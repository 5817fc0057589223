//! The protocol of `kernels/all_reduce.cu` in every interleaving, and with every value that a weakly ordered load may
//! give, of two ranks over three calls, explored by loom.
//!
//! This is a copy of the protocol over loom's atomics: a kernel cannot run under loom, and under the emulator only some
//! interleavings happen, none of them weakly ordered. Slots are loaded and stored without any order of their own, so only
//! flags make them right. A rank's own slot is left out, since nobody else sees it. Each rule is also broken once, and
//! that must be found.

#![allow(missing_docs, reason = "tests have no users")]

use loom::{
    model::Builder,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    thread,
};

/// How the protocol is done, or broken.
#[derive(Clone, Copy)]
struct Rules {
    /// Slots by the parity of the call, or one for all.
    buffers: u32,
    /// Raises the flag when the data is there.
    data_before_flag: bool,
    release: Ordering,
    acquire: Ordering,
    /// After a failed call a rank touches no peer any more.
    stays_dead: bool,
    /// Number of the first call, less one; both ranks' counters begin here.
    start: u32,
    /// Calls that each rank makes.
    steps: u32,
}

const RIGHT: Rules = Rules {
    buffers: 2,
    data_before_flag: true,
    release: Ordering::Release,
    acquire: Ordering::Acquire,
    stays_dead: true,
    start: 0,
    steps: 3,
};

/// Where ranks fail, two calls show it all: the one that fails, and the one that must not happen any more. A third takes
/// a hundred times as long to explore.
const FAILING: Rules = Rules { steps: 2, ..RIGHT };

/// What a rank exports: a slot and a flag for each parity, written by its only peer.
struct Region {
    slots: [AtomicU32; 2],
    flags: [AtomicU32; 2],
}

struct World {
    regions: [Region; 2],
    /// For each rank, whether it is to give up waiting: its abort word is set, or its deadline has passed, which is the
    /// same to the protocol.
    give_up: [AtomicU32; 2],
}

impl World {
    fn new(rules: Rules) -> Self {
        let region = || Region { slots: [0, 0].map(AtomicU32::new), flags: [rules.start; 2].map(AtomicU32::new) };
        Self { regions: [region(), region()], give_up: [0, 0].map(AtomicU32::new) }
    }
}

fn given(rank: usize, step: u32) -> u32 {
    100 * (rank as u32 + 1) + step
}

fn push(peer: &Region, index: usize, wanted: u32, value: u32, rules: Rules) {
    if rules.data_before_flag {
        peer.slots[index].store(value, Ordering::Relaxed);
    }
    peer.flags[index].store(wanted, rules.release);
    if !rules.data_before_flag {
        peer.slots[index].store(value, Ordering::Relaxed);
    }
}

/// Whether the flag was reached.
fn wait(own: &Region, index: usize, wanted: u32, give_up: &AtomicU32, rules: Rules) -> bool {
    loop {
        if own.flags[index].load(rules.acquire).wrapping_sub(wanted) as i32 >= 0 {
            return true;
        }
        if give_up.load(Ordering::Acquire) != 0 {
            return false;
        }
        thread::yield_now();
    }
}

/// One rank's launches.
fn run(world: &World, rank: usize, rules: Rules) {
    let (own, peer) = (&world.regions[rank], &world.regions[1 - rank]);
    let (mut calls, mut failed) = (rules.start, false);
    for step in 1..=rules.steps {
        if failed && rules.stays_dead {
            return;
        }
        let wanted = calls.wrapping_add(1);
        let index = (wanted % rules.buffers) as usize;
        push(peer, index, wanted, given(rank, step), rules);
        if wait(own, index, wanted, &world.give_up[rank], rules) {
            let received = own.slots[index].load(Ordering::Relaxed);
            assert_eq!(received, given(1 - rank, step), "rank {rank} read something else in step {step}");
            calls = wanted;
        } else {
            failed = true;
        }
    }
}

/// Explores everything. With `failing`, a third thread lets both ranks give up, at any moment and not at the same one.
fn explore(rules: Rules, failing: bool) {
    let mut model = Builder::new();
    // No bound: every interleaving.
    model.preemption_bound = None;
    model.max_branches = 10_000;
    model.check(move || {
        let world = Arc::new(World::new(rules));
        let other = Arc::clone(&world);
        let peer = thread::spawn(move || run(&other, 1, rules));
        let other = Arc::clone(&world);
        let end = failing
            .then(|| thread::spawn(move || other.give_up.iter().for_each(|word| word.store(1, Ordering::Release))));
        run(&world, 0, rules);
        peer.join().unwrap();
        if let Some(end) = end {
            end.join().unwrap();
        }
    });
}

#[test]
fn every_rank_reads_what_its_peer_gave_in_that_call() {
    explore(RIGHT, false);
}

#[test]
fn the_same_holds_when_the_counter_wraps() {
    explore(Rules { start: u32::MAX - 1, ..RIGHT }, false);
}

#[test]
fn whatever_ends_in_the_middle_the_calls_that_ended_well_are_right() {
    explore(FAILING, true);
}

#[test]
#[should_panic(expected = "read something else")]
fn one_buffer_is_found_to_be_too_few() {
    explore(Rules { buffers: 1, ..RIGHT }, false);
}

#[test]
#[should_panic(expected = "read something else")]
fn a_flag_raised_before_its_data_is_found() {
    explore(Rules { data_before_flag: false, ..RIGHT }, false);
}

#[test]
#[should_panic(expected = "read something else")]
fn a_flag_raised_without_release_is_found() {
    explore(Rules { release: Ordering::Relaxed, ..RIGHT }, false);
}

#[test]
#[should_panic(expected = "read something else")]
fn a_flag_looked_at_without_acquire_is_found() {
    explore(Rules { acquire: Ordering::Relaxed, ..RIGHT }, false);
}

#[test]
#[should_panic(expected = "read something else")]
fn a_rank_that_pushes_on_after_it_failed_is_found() {
    explore(Rules { stays_dead: false, ..FAILING }, true);
}
