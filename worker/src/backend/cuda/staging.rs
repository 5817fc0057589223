//! Page-locked memory through which bytes travel to the device.
//!
//! A copy from ordinary memory would make the host wait; from page-locked memory it goes on by itself. So bytes are
//! copied into a ring first, and what was copied there is overwritten only once its event says that it has arrived.

#![allow(unsafe_code, reason = "page-locked memory and the driver's calls on it")]

use std::{collections::VecDeque, os::raw::c_void, ptr, sync::Arc};

use cudarc::driver::sys;

use super::{
    calls::check,
    context::Context,
    driver::{Address, DriverError},
};

/// Bytes of the ring: a few pieces of a tensor that is being loaded, so that reading the next one and copying the last
/// ones overlap.
const RING_BYTES: usize = 64 << 20;
/// A longer upload goes in pieces of this size.
pub(super) const PIECE_BYTES: usize = RING_BYTES / 4;
/// Places in the ring begin at multiples of this.
const ALIGNMENT: usize = 256;
/// Uploads under way. With this many small ones the ring would rather wait than keep ever more events.
const MAX_FLIGHTS: usize = 256;

/// Which bytes of a ring are under way. `T` tells when they have arrived.
///
/// Positions grow for ever; position `p` lies at `p % capacity`.
#[derive(Debug)]
struct Ring<T> {
    capacity: u64,
    /// The first position that nobody has had yet.
    next: u64,
    /// First positions of what is under way, in the order of departure.
    flights: VecDeque<(u64, T)>,
}

/// Bytes of a ring that may be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Span {
    begin: u64,
    offset: usize,
}

impl<T> Ring<T> {
    fn new(capacity: usize) -> Self {
        Self { capacity: capacity as u64, next: 0, flights: VecDeque::new() }
    }

    /// Room for `bytes` in one piece, at most the capacity, after `arrive` has waited for what is still under way there.
    fn reserve<E>(&mut self, bytes: usize, mut arrive: impl FnMut(T) -> Result<(), E>) -> Result<Span, E> {
        let bytes = bytes.next_multiple_of(ALIGNMENT) as u64;
        debug_assert!(bytes <= self.capacity, "{bytes} bytes in a ring of {}", self.capacity);
        let left = self.capacity - self.next % self.capacity;
        let begin = if bytes <= left { self.next } else { self.next + left };
        let end = begin + bytes;
        while let Some(&(first, _)) = self.flights.front()
            && (first + self.capacity < end || self.flights.len() >= MAX_FLIGHTS)
        {
            let Some((_, flight)) = self.flights.pop_front() else { break };
            arrive(flight)?;
        }
        self.next = end;
        Ok(Span { begin, offset: (begin % self.capacity) as usize })
    }

    /// Bytes of a span have departed.
    fn depart(&mut self, span: Span, flight: T) {
        self.flights.push_back((span.begin, flight));
    }
}

/// Page-locked memory of the host.
pub(super) struct Pinned {
    context: Arc<Context>,
    start: *mut u8,
    bytes: usize,
}

// SAFETY: memory that belongs to this value alone; the pointer is used under a lock or by its owner.
unsafe impl Send for Pinned {}

impl Pinned {
    /// Locks `bytes` of memory.
    pub(super) fn new(context: &Arc<Context>, bytes: usize) -> Result<Self, DriverError> {
        context.bind()?;
        let mut start: *mut c_void = ptr::null_mut();
        // SAFETY: a place for the address; the context is current.
        check("cuMemHostAlloc", unsafe { sys::cuMemHostAlloc(&raw mut start, bytes, 0) })?;
        Ok(Self { context: Arc::clone(context), start: start.cast(), bytes })
    }

    /// Bytes of it.
    pub(super) fn len(&self) -> usize {
        self.bytes
    }

    /// Queues a copy of the first `bytes` from the device.
    pub(super) fn receive(&mut self, from: Address, bytes: usize) -> Result<(), DriverError> {
        debug_assert!(bytes <= self.bytes, "{bytes} bytes into {}", self.bytes);
        // SAFETY: the range lies within this memory, which stays until the stream has finished (see `Drop`).
        let code = unsafe { sys::cuMemcpyDtoHAsync_v2(self.start.cast(), from.0, bytes, self.context.stream) };
        check("cuMemcpyDtoHAsync", code)
    }

    /// Copies out what was received. The stream has finished.
    pub(super) fn read(&self, to: &mut [u8]) {
        debug_assert!(to.len() <= self.bytes, "{} bytes of {}", to.len(), self.bytes);
        // SAFETY: the range lies within this memory, the two do not overlap, and nobody writes to it now.
        unsafe { ptr::copy_nonoverlapping(self.start, to.as_mut_ptr(), to.len()) };
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // A copy may still be under way. If the device is broken, nothing is: both may fail, and then the memory goes
        // with the process.
        if self.context.bind().is_ok() && self.context.synchronize().is_ok() {
            // SAFETY: allocated by `new`, freed this once, and no copy is under way.
            unsafe { sys::cuMemFreeHost(self.start.cast()) };
        }
    }
}

/// An event of the driver, which is waited for.
struct Event(sys::CUevent);

// SAFETY: the driver's events may be used by any thread.
unsafe impl Send for Event {}

impl Event {
    fn new() -> Result<Self, DriverError> {
        let mut event = ptr::null_mut();
        let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32;
        // SAFETY: a place for the handle; the context is current.
        check("cuEventCreate", unsafe { sys::cuEventCreate(&raw mut event, flags) })?;
        Ok(Self(event))
    }

    fn wait(&self) -> Result<(), DriverError> {
        // SAFETY: the event lives.
        check("cuEventSynchronize", unsafe { sys::cuEventSynchronize(self.0) })
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: created by `new`, destroyed this once.
        unsafe { sys::cuEventDestroy_v2(self.0) };
    }
}

/// The ring of uploads.
pub(super) struct Staging {
    ring: Ring<Event>,
    /// Events that wait to be used again.
    spare: Vec<Event>,
    memory: Pinned,
}

impl Staging {
    /// A ring in page-locked memory.
    pub(super) fn new(context: &Arc<Context>) -> Result<Self, DriverError> {
        let memory = Pinned::new(context, RING_BYTES)?;
        Ok(Self { ring: Ring::new(RING_BYTES), spare: Vec::new(), memory })
    }

    /// Queues a copy of at most [`PIECE_BYTES`] to the device; they may be overwritten on return.
    pub(super) fn send(&mut self, to: Address, piece: &[u8]) -> Result<(), DriverError> {
        debug_assert!(piece.len() <= PIECE_BYTES, "{} bytes at once", piece.len());
        let spare = &mut self.spare;
        let span = self.ring.reserve(piece.len(), |event| {
            let waited = event.wait();
            spare.push(event);
            waited
        })?;
        // SAFETY: the span lies within the ring, and what was under way from there has arrived.
        let at = unsafe { self.memory.start.add(span.offset) };
        // SAFETY: as above; `piece` is another memory.
        unsafe { ptr::copy_nonoverlapping(piece.as_ptr(), at, piece.len()) };
        let stream = self.memory.context.stream;
        let event = self.spare.pop().map_or_else(Event::new, Ok)?;
        // SAFETY: the span stays as it is until the event, recorded next, has happened.
        check("cuMemcpyHtoDAsync", unsafe {
            sys::cuMemcpyHtoDAsync_v2(to.0, at.cast_const().cast(), piece.len(), stream)
        })?;
        // SAFETY: event and stream live.
        check("cuEventRecord", unsafe { sys::cuEventRecord(event.0, stream) })?;
        self.ring.depart(span, event);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reserves and departs; the flights that were waited for.
    fn send(ring: &mut Ring<u32>, bytes: usize, flight: u32) -> (usize, Vec<u32>) {
        let mut arrived = Vec::new();
        let span = ring
            .reserve(bytes, |flight| {
                arrived.push(flight);
                Ok::<(), ()>(())
            })
            .unwrap();
        ring.depart(span, flight);
        (span.offset, arrived)
    }

    #[test]
    fn a_span_waits_for_just_what_lies_there() {
        let mut ring = Ring::new(4 * ALIGNMENT);
        assert_eq!(send(&mut ring, 1, 0), (0, vec![]));
        assert_eq!(send(&mut ring, 2 * ALIGNMENT, 1), (ALIGNMENT, vec![]));
        assert_eq!(send(&mut ring, ALIGNMENT, 2), (3 * ALIGNMENT, vec![]));
        assert_eq!(send(&mut ring, ALIGNMENT, 3), (0, vec![0]), "the first place again");
        assert_eq!(send(&mut ring, ALIGNMENT, 4), (ALIGNMENT, vec![1]));
        assert_eq!(
            send(&mut ring, 3 * ALIGNMENT, 5),
            (0, vec![2, 3, 4]),
            "what does not fit before the end starts anew"
        );
        assert_eq!(send(&mut ring, 4 * ALIGNMENT, 6), (0, vec![5]));
    }

    #[test]
    fn many_small_uploads_keep_a_bounded_number_of_events() {
        let mut ring = Ring::new(RING_BYTES);
        for flight in 0..10_000 {
            let (_, arrived) = send(&mut ring, 4, flight);
            assert_eq!(arrived.len(), usize::from(flight as usize >= MAX_FLIGHTS));
        }
        assert_eq!(ring.flights.len(), MAX_FLIGHTS);
    }

    #[test]
    fn spans_never_overlap_what_is_under_way() {
        let capacity = 16 * ALIGNMENT;
        let mut ring = Ring::new(capacity);
        let mut under_way: VecDeque<(u32, usize, usize)> = VecDeque::new();
        let mut state = 1_u32;
        for flight in 0..20_000 {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let bytes = (state >> 8) as usize % capacity + 1;
            let (offset, arrived) = send(&mut ring, bytes, flight);
            for arrived in arrived {
                assert_eq!(under_way.pop_front().map(|(flight, ..)| flight), Some(arrived), "in order");
            }
            assert!(offset + bytes <= capacity, "{bytes} bytes at {offset}");
            let free = |&(_, at, length): &(u32, usize, usize)| at + length <= offset || offset + bytes <= at;
            assert!(under_way.iter().all(free), "flight {flight}: {bytes} bytes at {offset}, {under_way:?}");
            under_way.push_back((flight, offset, bytes));
        }
    }
}
