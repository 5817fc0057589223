//! Sums and exchanges through memory that all ranks of a host map.
//!
//! A rank *publishes*: it fills its own slot and says what it is doing. It comes to the *barrier*, and when all ranks have,
//! it reads the slots of all. Publications alternate between two buffers. That is why one barrier a publication is enough:
//! a rank that publishes for the third time has passed the second barrier, to which nobody comes before having read what
//! was published first.
//!
//! A short sum is added up by every rank for itself (one barrier). A long one is cut into pieces; of each piece every rank
//! adds up one chunk and all copy the result (two barriers, of which one is shared with the next piece). Either way each
//! element is added in the order of ranks, so the bits are the same.

#![allow(unsafe_code, reason = "the slices of the shared region are bound to the protocol of this file")]

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use rustix::event::Timespec;
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
};
use rustix::thread::futex;

use super::super::{AbortHandle, Collective, CollectiveError};
use super::call::{Call, Operation};
use super::handshake::{self, Patience};
use super::region::{Area, Region, SLOT_BYTES};
use super::rendezvous::Group;
use super::{add, chunk, io};

/// Up to here every rank sums everything: the second barrier costs more than reading the slots of all.
const ONE_SHOT_BYTES: usize = 64 << 10;
const SLOT_FLOATS: usize = SLOT_BYTES / size_of::<f32>();
/// Floats that are summed over all ranks before going on to the next, so that the sum stays in the first-level cache.
const SUM_BLOCK: usize = 2048;

/// The gate counts barriers above its lowest bit, which is set for good when the group is aborted.
const ABORTED: u32 = 1;
const BARRIER: u32 = 2;
/// How long a rank looks at the gate before it sleeps. Longer than the ranks of one step usually lie apart, shorter than a
/// scheduler's turn.
const SPIN: Duration = Duration::from_micros(50);
/// A sleeping rank looks at the gate this often even if nobody wakes it.
const RECHECK: Timespec = Timespec { tv_sec: 0, tv_nsec: 50_000_000 };

/// One rank's end of a group within one host.
pub(super) struct SharedMemory {
    region: Arc<Region>,
    rank: usize,
    epoch: u64,
    calls: u64,
    publications: usize,
    // Ranks that must share cores sleep at once, to leave them to those that still compute.
    spins: bool,
    // After any error the ranks no longer know where they are.
    failed: bool,
}

impl SharedMemory {
    /// Rank 0 makes the memory and hands it to the others, each of which asks for it at rank 0's local socket.
    pub(super) fn form(group: &Group, listener: &UnixListener, patience: &Patience) -> Result<Self, CollectiveError> {
        let world_size = group.world_size();
        let region = if group.rank == 0 {
            let (region, descriptor) = Region::create(group.epoch, world_size)?;
            // Sockets of one host need no seal, and only the descriptor goes over them.
            let peers = handshake::receive(listener, group, 1..world_size, patience)?;
            for (peer, (stream, _)) in (1..).zip(&peers) {
                send_descriptor(stream, &descriptor).map_err(|error| handshake::unreachable(group, peer, error))?;
            }
            region
        } else {
            let mut stream = SocketAddr::from_abstract_name(group.ranks[0].socket_name())
                .and_then(|name| UnixStream::connect_addr(&name))
                .map_err(|error| handshake::unreachable(group, 0, error))?;
            handshake::introduce(&mut stream, group, 0, patience)?;
            let descriptor = handshake::patiently(group, 0, patience, || receive_descriptor(&stream))?;
            Region::open(descriptor, group.epoch, world_size)?
        };
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Ok(Self {
            region: Arc::new(region),
            rank: group.rank,
            epoch: group.epoch,
            calls: 0,
            publications: 0,
            spins: cores >= world_size,
            failed: false,
        })
    }

    fn begin(&mut self, operation: Operation, length: usize) -> Result<Call, CollectiveError> {
        if self.failed {
            return Err(self.aborted());
        }
        self.calls += 1;
        Ok(Call { operation, length: length as u64, number: self.calls })
    }

    fn aborted(&self) -> CollectiveError {
        CollectiveError::Aborted { epoch: self.epoch }
    }

    /// The buffer of the publication that comes next.
    fn turn(&mut self) -> usize {
        self.publications = self.publications.wrapping_add(1);
        self.publications % 2
    }

    fn publish_floats(&mut self, values: &[f32]) -> usize {
        let buffer = self.turn();
        let area = Area::Slot { rank: self.rank, buffer };
        // SAFETY: callers pass at most SLOT_FLOATS; only this rank writes its slot, and since this buffer was last published
        // every rank has come to a later barrier, which it does only after reading it.
        let slot = unsafe { self.region.floats_mut(area, 0..values.len()) };
        slot.copy_from_slice(values);
        buffer
    }

    fn publish_bytes(&mut self, bytes: &[u8]) -> usize {
        let buffer = self.turn();
        let area = Area::Slot { rank: self.rank, buffer };
        // SAFETY: as in `publish_floats`; callers pass at most SLOT_BYTES.
        let slot = unsafe { self.region.bytes_mut(area, 0..bytes.len()) };
        slot.copy_from_slice(bytes);
        buffer
    }

    /// Says what was published, waits for all ranks to say so too, and compares. The lengths of all, by rank.
    fn agree(&self, call: Call, buffer: usize) -> Result<Vec<u64>, CollectiveError> {
        for (word, value) in self.region.call(self.rank, buffer).into_iter().zip(call.to_words()) {
            word.store(value, Ordering::Relaxed);
        }
        self.barrier()?;
        let length = |rank| {
            let words = self.region.call(rank, buffer).map(|word| word.load(Ordering::Relaxed));
            call.check(rank, words).map(|found| found.length)
        };
        (0..self.world_size()).map(length).collect()
    }

    /// Waits until all ranks have come here.
    fn barrier(&self) -> Result<(), CollectiveError> {
        let gate = self.region.gate();
        let before = gate.load(Ordering::Acquire);
        if before & ABORTED != 0 {
            return Err(self.aborted());
        }
        // Releases what this rank has published and, in the last to come, acquires what the others have.
        let arrived = self.region.arrived().fetch_add(1, Ordering::AcqRel) + 1;
        if (arrived as usize) < self.world_size() {
            return self.wait_for(gate, before);
        }
        // Nobody comes to the next barrier before this one's gate is open.
        self.region.arrived().store(0, Ordering::Relaxed);
        gate.fetch_add(BARRIER, Ordering::SeqCst);
        // A rank counts itself among the sleepers before the kernel compares the gate: it is seen here, or sees the gate.
        if self.region.sleepers().load(Ordering::SeqCst) > 0 {
            wake_all(gate);
        }
        Ok(())
    }

    /// Waits until the barrier that found the gate at `before` is complete. A barrier that is complete counts even if the
    /// group has been aborted since, so that all ranks see the same outcome of it as far as possible.
    fn wait_for(&self, gate: &AtomicU32, before: u32) -> Result<(), CollectiveError> {
        let spin_until = self.spins.then(|| Instant::now() + SPIN);
        loop {
            let now = gate.load(Ordering::Acquire);
            if now & !ABORTED != before & !ABORTED {
                return Ok(());
            }
            if now & ABORTED != 0 {
                return Err(self.aborted());
            }
            if spin_until.is_some_and(|until| Instant::now() < until) {
                std::hint::spin_loop();
                continue;
            }
            self.region.sleepers().fetch_add(1, Ordering::SeqCst);
            let woken = futex::wait(gate, futex::Flags::empty(), now, Some(&RECHECK));
            self.region.sleepers().fetch_sub(1, Ordering::SeqCst);
            match woken {
                Ok(()) | Err(Errno::AGAIN | Errno::INTR | Errno::TIMEDOUT) => {}
                Err(error) => return Err(io("wait for the other ranks", error)),
            }
        }
    }

    fn sum_at_once(&mut self, call: Call, values: &mut [f32]) -> Result<(), CollectiveError> {
        let buffer = self.publish_floats(values);
        self.agree(call, buffer)?;
        self.sum_slots(buffer, 0..values.len(), values);
        Ok(())
    }

    fn sum_in_pieces(&mut self, call: Call, values: &mut [f32]) -> Result<(), CollectiveError> {
        let mut rest = values.chunks_mut(SLOT_FLOATS).peekable();
        let mut buffer = match rest.peek() {
            Some(first) => self.publish_floats(first),
            None => self.turn(),
        };
        self.agree(call, buffer)?;
        while let Some(piece) = rest.next() {
            let mine = chunk(piece.len(), self.rank, self.world_size());
            let sum = Area::Sum { buffer };
            // SAFETY: within the piece, which fits a slot. No two ranks have the same chunk, and the sum that last stood in
            // this buffer was copied by every rank before it came to the barrier behind us.
            let target = unsafe { self.region.floats_mut(sum, mine.clone()) };
            self.sum_slots(buffer, mine, target);
            let next = rest.peek().map(|piece| self.publish_floats(piece));
            self.barrier()?;
            // SAFETY: every rank has written its chunk before the barrier, and writes here again only after one to which
            // this rank comes when it has copied.
            piece.copy_from_slice(unsafe { self.region.floats(sum, 0..piece.len()) });
            buffer = next.unwrap_or(buffer);
        }
        Ok(())
    }

    fn gather_in_pieces(&mut self, call: Call, mine: &[u8]) -> Result<Vec<Vec<u8>>, CollectiveError> {
        let mut parts = vec![Vec::new(); self.world_size()];
        let mut start = 0;
        loop {
            let piece = &mine[start.min(mine.len())..(start + SLOT_BYTES).min(mine.len())];
            let buffer = self.publish_bytes(piece);
            let lengths = self.agree(call, buffer)?;
            for (rank, (part, &length)) in parts.iter_mut().zip(&lengths).enumerate() {
                let piece = (length as usize).saturating_sub(start).min(SLOT_BYTES);
                // SAFETY: at most SLOT_BYTES; as in `sum_slots`, `rank` does not write here before this rank has come to
                // another barrier.
                part.extend_from_slice(unsafe { self.region.bytes_of(Area::Slot { rank, buffer }, 0..piece) });
            }
            start += SLOT_BYTES;
            if lengths.iter().all(|&length| length as usize <= start) {
                return Ok(parts);
            }
        }
    }

    /// Adds up `range` of what all ranks have published, in the order of ranks.
    fn sum_slots(&self, buffer: usize, range: Range<usize>, sum: &mut [f32]) {
        for (block, sum) in sum.chunks_mut(SUM_BLOCK).enumerate() {
            let start = range.start + block * SUM_BLOCK;
            for rank in 0..self.world_size() {
                // SAFETY: within what every rank has published for this call, as `agree` has compared. It was written before
                // the last barrier, and is written again only after one to which this rank has not come.
                let part = unsafe { self.region.floats(Area::Slot { rank, buffer }, start..start + sum.len()) };
                if rank == 0 {
                    sum.copy_from_slice(part);
                } else {
                    add(sum, part);
                }
            }
        }
    }
}

impl Collective for SharedMemory {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.region.world_size()
    }

    fn all_reduce_sum(&mut self, values: &mut [f32]) -> Result<(), CollectiveError> {
        let call = self.begin(Operation::AllReduceSum, values.len())?;
        let result = if size_of_val(values) <= ONE_SHOT_BYTES {
            self.sum_at_once(call, values)
        } else {
            self.sum_in_pieces(call, values)
        };
        self.failed = result.is_err();
        result
    }

    fn all_gather(&mut self, mine: &[u8]) -> Result<Vec<Vec<u8>>, CollectiveError> {
        let call = self.begin(Operation::AllGather, mine.len())?;
        let result = self.gather_in_pieces(call, mine);
        self.failed = result.is_err();
        result
    }

    fn abort_handle(&self) -> AbortHandle {
        let region = Arc::clone(&self.region);
        AbortHandle::new(move || {
            region.gate().fetch_or(ABORTED, Ordering::SeqCst);
            wake_all(region.gate());
        })
    }
}

fn wake_all(gate: &AtomicU32) {
    // It fails only for an address that is not mapped.
    let _ = futex::wake(gate, futex::Flags::empty(), i32::MAX as u32);
}

fn send_descriptor(stream: &UnixStream, descriptor: &OwnedFd) -> std::io::Result<()> {
    let descriptors = [descriptor.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    control.push(SendAncillaryMessage::ScmRights(&descriptors));
    rustix::net::sendmsg(stream, &[IoSlice::new(&[0])], &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}

fn receive_descriptor(stream: &UnixStream) -> std::io::Result<OwnedFd> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    rustix::net::recvmsg(stream, &mut [IoSliceMut::new(&mut byte)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let descriptor = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    descriptor.ok_or_else(|| std::io::Error::other("it sent no memory"))
}
