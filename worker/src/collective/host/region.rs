//! The memory that the ranks of one host share: where everything lies in it. Raw pointers stay in this file.
//!
//! ```text
//! control  magic, epoch, world size | gate | arrived | sleepers     each on cache lines of its own
//! calls    [world_size, 2]          what each rank says it is doing
//! slots    [world_size, 2]          what each rank contributes; SLOT_BYTES each
//! sums     [2]                      where the ranks put together a long sum; SLOT_BYTES each
//! ```
//! Slots, calls and sums are doubled: a rank may fill one while a slower rank still reads the other.

#![allow(unsafe_code, reason = "memory that other processes write is reached through pointers")]

use std::fs::File;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use memmap2::{MmapOptions, MmapRaw};
use rustix::fs::{MemfdFlags, SealFlags};

use super::super::CollectiveError;
use super::call::Call;
use super::io;

/// What a rank can contribute between two barriers. It holds the activations of 91 tokens of the released models: one
/// piece for any decode step, few pieces for a prefill. A group takes `2 * (world_size + 1)` such parts of memory.
pub(super) const SLOT_BYTES: usize = 1 << 20;

const MAGIC: u64 = u64::from_le_bytes(*b"PHALANXM");
/// Two lines of 64 bytes, because processors fetch them in pairs.
const LINE: usize = 128;
const PAGE: usize = 4096;
const GATE: usize = LINE;
const ARRIVED: usize = 2 * LINE;
const SLEEPERS: usize = 3 * LINE;
const CALLS: usize = 4 * LINE;

/// A part of the region that holds data.
#[derive(Clone, Copy)]
pub(super) enum Area {
    /// What `rank` contributes. Only `rank` writes it.
    Slot { rank: usize, buffer: usize },
    /// The sum that the ranks put together. Each writes its own chunk.
    Sum { buffer: usize },
}

/// The mapped memory of one formation.
pub(super) struct Region {
    memory: MmapRaw,
    world_size: usize,
}

impl Region {
    /// Makes the memory of a new formation and the descriptor by which the other ranks map it.
    pub(super) fn create(epoch: u64, world_size: usize) -> Result<(Self, OwnedFd), CollectiveError> {
        let bytes = Self::bytes(world_size);
        let failed = |error: std::io::Error| io(format!("reserve {bytes} bytes of shared memory"), error);
        let name = format!("phalanx-collective-{epoch}");
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = File::from(rustix::fs::memfd_create(name, flags).map_err(|error| failed(error.into()))?);
        file.set_len(bytes as u64).map_err(failed)?;
        // No rank can cut off memory that another has mapped, which would kill that one with SIGBUS.
        rustix::fs::fcntl_add_seals(&file, Self::seals()).map_err(|error| failed(error.into()))?;
        let region = Self::map(&file, world_size).map_err(failed)?;
        for (word, value) in region.identity().into_iter().zip([MAGIC, epoch, world_size as u64]) {
            word.store(value, Ordering::Release);
        }
        Ok((region, file.into()))
    }

    /// Maps the memory that rank 0 made.
    pub(super) fn open(descriptor: OwnedFd, epoch: u64, world_size: usize) -> Result<Self, CollectiveError> {
        let failed = |message: String| io(format!("map the shared memory of epoch {epoch}"), message);
        let file = File::from(descriptor);
        let length = file.metadata().map_err(|error| failed(error.to_string()))?.len();
        let expected = Self::bytes(world_size) as u64;
        if length != expected {
            return Err(failed(format!("it has {length} bytes, expected {expected}")));
        }
        let seals = rustix::fs::fcntl_get_seals(&file).map_err(|error| failed(error.to_string()))?;
        if !seals.contains(Self::seals()) {
            return Err(failed("it could be cut off later".to_owned()));
        }
        let region = Self::map(&file, world_size).map_err(|error| failed(error.to_string()))?;
        let found = region.identity().map(|word| word.load(Ordering::Acquire));
        if found != [MAGIC, epoch, world_size as u64] {
            return Err(failed(format!("it is that of another formation: {found:?}")));
        }
        Ok(region)
    }

    fn map(file: &File, world_size: usize) -> std::io::Result<Self> {
        let memory = MmapOptions::new().len(Self::bytes(world_size)).map_raw(file)?;
        Ok(Self { memory, world_size })
    }

    fn seals() -> SealFlags {
        SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL
    }

    fn bytes(world_size: usize) -> usize {
        Self::slots(world_size) + (world_size + 1) * 2 * SLOT_BYTES
    }

    /// Where the slots begin.
    fn slots(world_size: usize) -> usize {
        (CALLS + world_size * 2 * LINE).next_multiple_of(PAGE)
    }

    pub(super) fn world_size(&self) -> usize {
        self.world_size
    }

    /// Opens once a barrier is complete, and for good when the group is aborted; ranks sleep on it.
    pub(super) fn gate(&self) -> &AtomicU32 {
        self.word32(GATE)
    }

    /// Ranks that have come to the present barrier.
    pub(super) fn arrived(&self) -> &AtomicU32 {
        self.word32(ARRIVED)
    }

    /// At least as many as there are ranks asleep on the gate.
    pub(super) fn sleepers(&self) -> &AtomicU32 {
        self.word32(SLEEPERS)
    }

    fn identity(&self) -> [&AtomicU64; 3] {
        [0, 8, 16].map(|at| self.word64(at))
    }

    /// The words of the [`Call`] of `rank`.
    pub(super) fn call(&self, rank: usize, buffer: usize) -> [&AtomicU64; Call::BYTES / 8] {
        let start = CALLS + (rank * 2 + buffer) * LINE;
        [0, 8, 16].map(|at| self.word64(start + at))
    }

    fn word32(&self, at: usize) -> &AtomicU32 {
        let word = self.memory.as_mut_ptr().wrapping_add(at).cast();
        // SAFETY: `at` is a multiple of 4 within the control part, the mapping is aligned to a page and lives as long as
        // `self`, and every rank reaches this word only as an atomic.
        unsafe { AtomicU32::from_ptr(word) }
    }

    fn word64(&self, at: usize) -> &AtomicU64 {
        let word = self.memory.as_mut_ptr().wrapping_add(at).cast();
        // SAFETY: as in `word32`; `at` is a multiple of 8.
        unsafe { AtomicU64::from_ptr(word) }
    }

    /// The first byte of `area`.
    fn start(&self, area: Area) -> *mut u8 {
        let index = match area {
            Area::Slot { rank, buffer } => rank * 2 + buffer,
            Area::Sum { buffer } => self.world_size * 2 + buffer,
        };
        self.memory.as_mut_ptr().wrapping_add(Self::slots(self.world_size) + index * SLOT_BYTES)
    }

    /// The bytes `range` of `area`.
    ///
    /// # Safety
    /// `range` lies within [`SLOT_BYTES`], the area's rank and buffer exist, and no rank writes to the range while the slice
    /// lives.
    pub(super) unsafe fn bytes_of(&self, area: Area, range: Range<usize>) -> &[u8] {
        let start = self.start(area).wrapping_add(range.start);
        // SAFETY: within the mapping, which lives as long as `self`; the rest is the caller's promise.
        unsafe { std::slice::from_raw_parts(start, range.len()) }
    }

    /// The bytes `range` of `area`, to be written.
    ///
    /// # Safety
    /// As for [`bytes_of`](Self::bytes_of), and no rank reads the range while the slice lives.
    #[allow(clippy::mut_from_ref, reason = "the memory belongs to all ranks; who may write where is the protocol's")]
    pub(super) unsafe fn bytes_mut(&self, area: Area, range: Range<usize>) -> &mut [u8] {
        let start = self.start(area).wrapping_add(range.start);
        // SAFETY: as in `bytes_of`.
        unsafe { std::slice::from_raw_parts_mut(start, range.len()) }
    }

    /// The floats `range` of `area`.
    ///
    /// # Safety
    /// As for [`bytes_of`](Self::bytes_of), with `4 * range` for the bytes.
    pub(super) unsafe fn floats(&self, area: Area, range: Range<usize>) -> &[f32] {
        let start = self.start(area).cast::<f32>().wrapping_add(range.start);
        // SAFETY: areas begin at pages, so floats are aligned; any bits are a float; the rest as in `bytes_of`.
        unsafe { std::slice::from_raw_parts(start, range.len()) }
    }

    /// The floats `range` of `area`, to be written.
    ///
    /// # Safety
    /// As for [`bytes_mut`](Self::bytes_mut), with `4 * range` for the bytes.
    #[allow(clippy::mut_from_ref, reason = "the memory belongs to all ranks; who may write where is the protocol's")]
    pub(super) unsafe fn floats_mut(&self, area: Area, range: Range<usize>) -> &mut [f32] {
        let start = self.start(area).cast::<f32>().wrapping_add(range.start);
        // SAFETY: as in `floats`.
        unsafe { std::slice::from_raw_parts_mut(start, range.len()) }
    }
}
