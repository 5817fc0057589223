//! Ranks as threads of the test, and what they sum.

use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use phalanx_worker::collective::host::{HostCollective, Link, Preparation, host_identity};
use phalanx_worker::collective::{AbortHandle, Collective};

use crate::{LOOPBACK, PATIENCE};

/// Far more than any work of these tests takes.
const STUCK: Duration = Duration::from_secs(60);

/// Opens the doors of `world_size` ranks that will meet by `link`.
pub(crate) fn prepare(link: Link, epoch: u64, world_size: usize) -> (Vec<Preparation>, Vec<Vec<u8>>) {
    let here = host_identity().unwrap();
    let preparations: Vec<_> = (0..world_size)
        .map(|rank| {
            // Ranks that do not name the same host use TCP.
            let host = if link == Link::Tcp { format!("{here} {rank}") } else { here.clone() };
            Preparation::new(epoch, rank as u64, &host, LOOPBACK).unwrap()
        })
        .collect();
    let all = preparations.iter().map(Preparation::rendezvous).collect();
    (preparations, all)
}

/// Forms a group, each rank on a thread of its own.
pub(crate) fn form_prepared(preparations: Vec<Preparation>, all: &[Vec<u8>]) -> Vec<HostCollective> {
    std::thread::scope(|scope| {
        let forming: Vec<_> = preparations
            .into_iter()
            .enumerate()
            .map(|(rank, preparation)| scope.spawn(move || preparation.form(rank, all, PATIENCE).unwrap()))
            .collect();
        forming.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

/// A group of `world_size` ranks.
pub(crate) fn form(link: Link, epoch: u64, world_size: usize) -> Vec<HostCollective> {
    let (preparations, all) = prepare(link, epoch, world_size);
    let group = form_prepared(preparations, &all);
    let expected = if world_size == 1 { Link::Alone } else { link };
    for (rank, collective) in group.iter().enumerate() {
        assert_eq!((collective.link(), collective.rank(), collective.world_size()), (expected, rank, world_size));
    }
    group
}

/// Does the same on all ranks at once. Results by rank. Ranks that wait for each other for ever are aborted, so that the
/// test fails instead of hanging.
pub(crate) fn together<T: Send>(
    group: &mut [HostCollective],
    work: impl Fn(&mut HostCollective) -> T + Sync,
) -> Vec<T> {
    let work = &work;
    let handles: Vec<_> = group.iter().map(Collective::abort_handle).collect();
    let (done, is_done) = mpsc::channel::<()>();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            if is_done.recv_timeout(STUCK) == Err(RecvTimeoutError::Timeout) {
                handles.iter().for_each(AbortHandle::abort);
            }
        });
        let working: Vec<_> = group.iter_mut().map(|collective| scope.spawn(move || work(collective))).collect();
        let results: Vec<_> = working.into_iter().map(|rank| rank.join()).collect();
        drop(done);
        results.into_iter().map(Result::unwrap).collect()
    })
}

/// SplitMix64.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    pub(crate) fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }
}

/// What `rank` brings to a sum: magnitudes far apart, so that any other order of addition gives other bits.
pub(crate) fn values(seed: u64, rank: usize, length: usize) -> Vec<f32> {
    let mut random = Random::new(seed << 8 | rank as u64);
    let value = |bits: u64| (bits as i32 as f32) * 2f32.powi((bits >> 32) as i32 % 20 - 40);
    (0..length).map(|_| value(random.next())).collect()
}

/// The sum that every rank must have.
pub(crate) fn sum_in_rank_order(seed: u64, world_size: usize, length: usize) -> Vec<f32> {
    let mut sum = values(seed, 0, length);
    for rank in 1..world_size {
        for (sum, value) in sum.iter_mut().zip(values(seed, rank, length)) {
            *sum += value;
        }
    }
    sum
}
