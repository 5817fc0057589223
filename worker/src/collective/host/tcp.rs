//! Sums and exchanges over a connection between every two ranks.
//!
//! A short sum: every rank sends its values to all others and adds up for itself, one trip. A long one: every rank sends
//! each other rank that one's chunk, adds up its own and sends the result to all, two trips but only
//! `2 (world_size - 1) / world_size` of the bytes out and in. Either way each element is added in the order of ranks, so
//! the bits are the same.
//!
//! Everything is sealed, the call apart from the payload, so that a rank that calls something else is noticed before its
//! payload has come.
//!
//! All connections are served at once, so two ranks that send each other more than the network holds do not wait for each
//! other for ever.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;

use super::super::{AbortHandle, Collective, CollectiveError};
use super::call::{Call, Operation};
use super::handshake::{self, Patience};
use super::rendezvous::Group;
use super::seal::{Session, TAG_BYTES};
use super::{MAX_GATHER_BYTES, add, chunk, io};

/// Up to here every rank sends everything to all: the second trip costs more than the bytes.
const ONE_SHOT_BYTES: usize = 32 << 10;
/// Floats that are summed over all ranks before going on to the next.
const SUM_BLOCK: usize = 1024;
/// Where the payload begins in a frame: after the sealed call.
const PAYLOAD: usize = Call::BYTES + TAG_BYTES;
/// A waiting rank looks at the abort switch this often even if no connection stirs.
const RECHECK: Timespec = Timespec { tv_sec: 0, tv_nsec: 50_000_000 };

/// One rank's end of a group of several hosts.
pub(super) struct Mesh {
    links: Arc<Links>,
    rank: usize,
    epoch: u64,
    calls: u64,
    // After any error the ranks no longer know where they are.
    failed: bool,
    /// By rank; none with this rank itself.
    sessions: Vec<Option<Session>>,
    /// By rank; this rank's own stays empty.
    outgoing: Vec<Outgoing>,
    /// By rank; this rank's own stays empty.
    incoming: Vec<Incoming>,
}

/// The connections, by rank; none to this rank itself.
struct Links {
    streams: Vec<Option<TcpStream>>,
    aborted: AtomicBool,
    addresses: Vec<String>,
}

/// A call followed by its payload, each followed by its tag, on its way to a peer.
#[derive(Default)]
struct Outgoing {
    frame: Vec<u8>,
    sent: usize,
}

/// A call followed by its payload, as far as it has come from a peer.
#[derive(Default)]
struct Incoming {
    frame: Vec<u8>,
    filled: usize,
    // None before the peer's call has been read and compared.
    checked: Option<Call>,
    opened: bool,
}

impl Mesh {
    /// Connects to the lower ranks, then receives the higher ones.
    pub(super) fn form(group: &Group, listener: &TcpListener, patience: &Patience) -> Result<Self, CollectiveError> {
        let world_size = group.world_size();
        let mut streams: Vec<Option<TcpStream>> = Vec::with_capacity(world_size);
        let mut sessions: Vec<Option<Session>> = Vec::with_capacity(world_size);
        for peer in 0..group.rank {
            let mut stream = handshake::dial(group, peer, patience)?;
            sessions.push(Some(handshake::introduce(&mut stream, group, peer, patience)?));
            streams.push(Some(stream));
        }
        streams.push(None);
        sessions.push(None);
        for (stream, session) in handshake::receive(listener, group, group.rank + 1..world_size, patience)? {
            streams.push(Some(stream));
            sessions.push(Some(session));
        }
        for (peer, stream) in peers(&streams) {
            // A rank waits for every frame, so none may wait for a fuller packet.
            let ready = stream.set_nodelay(true).and_then(|()| stream.set_nonblocking(true));
            ready.map_err(|error| handshake::unreachable(group, peer, error))?;
        }
        let addresses = group.ranks.iter().map(|rank| rank.address.to_string()).collect();
        Ok(Self {
            links: Arc::new(Links { streams, aborted: AtomicBool::new(false), addresses }),
            rank: group.rank,
            epoch: group.epoch,
            calls: 0,
            failed: false,
            sessions,
            outgoing: (0..world_size).map(|_| Outgoing::default()).collect(),
            incoming: (0..world_size).map(|_| Incoming::default()).collect(),
        })
    }

    fn begin(&mut self, operation: Operation, length: usize) -> Result<Call, CollectiveError> {
        if self.failed {
            return Err(CollectiveError::Aborted { epoch: self.epoch });
        }
        self.calls += 1;
        Ok(Call { operation, length: length as u64, number: self.calls })
    }

    fn others(&self) -> impl Iterator<Item = usize> + use<> {
        let own = self.rank;
        (0..self.world_size()).filter(move |&peer| peer != own)
    }

    fn sum_at_once(&mut self, call: Call, values: &mut [f32]) -> Result<(), CollectiveError> {
        for peer in self.others() {
            self.outgoing[peer].load_floats(call, values);
            self.incoming[peer].expect(size_of_val(values));
        }
        self.exchange(call)?;
        self.sum_incoming(values);
        Ok(())
    }

    fn sum_by_chunks(&mut self, call: Call, values: &mut [f32]) -> Result<(), CollectiveError> {
        let world_size = self.world_size();
        let mine = chunk(values.len(), self.rank, world_size);
        for peer in self.others() {
            self.outgoing[peer].load_floats(call, &values[chunk(values.len(), peer, world_size)]);
            self.incoming[peer].expect(mine.len() * size_of::<f32>());
        }
        self.exchange(call)?;
        self.sum_incoming(&mut values[mine.clone()]);
        for peer in self.others() {
            self.outgoing[peer].load_floats(call, &values[mine.clone()]);
            self.incoming[peer].expect(chunk(values.len(), peer, world_size).len() * size_of::<f32>());
        }
        self.exchange(call)?;
        for peer in self.others() {
            let theirs = chunk(values.len(), peer, world_size);
            decode(self.incoming[peer].payload(), &mut values[theirs]);
        }
        Ok(())
    }

    /// Adds what has come to this rank's own `values`, in the order of ranks.
    fn sum_incoming(&self, values: &mut [f32]) {
        let mut sum = [0.0; SUM_BLOCK];
        let mut part = [0.0; SUM_BLOCK];
        for (block, values) in values.chunks_mut(SUM_BLOCK).enumerate() {
            let bytes = block * SUM_BLOCK * size_of::<f32>()..;
            let (sum, part) = (&mut sum[..values.len()], &mut part[..values.len()]);
            for rank in 0..self.world_size() {
                let target = if rank == 0 { &mut *sum } else { &mut *part };
                if rank == self.rank {
                    target.copy_from_slice(values);
                } else {
                    decode(&self.incoming[rank].payload()[bytes.clone()], target);
                }
                if rank > 0 {
                    add(sum, part);
                }
            }
            values.copy_from_slice(sum);
        }
    }

    /// Sends every frame that is loaded and receives one from every peer.
    fn exchange(&mut self, call: Call) -> Result<(), CollectiveError> {
        let result = self.exchange_frames(call);
        self.failed = result.is_err();
        result
    }

    fn exchange_frames(&mut self, call: Call) -> Result<(), CollectiveError> {
        let links = Arc::clone(&self.links);
        for (outgoing, session) in self.outgoing.iter_mut().zip(&mut self.sessions) {
            if let Some(session) = session {
                outgoing.seal(session)?;
            }
        }
        loop {
            let (mut busy, mut idle) = (false, true);
            // To all before from any: a rank that stops at a peer's mismatch has told every peer what it called itself.
            for (peer, stream) in peers(&links.streams) {
                idle &= !self.outgoing[peer].send(stream).map_err(|error| self.broken(peer, error))?;
                busy |= !self.outgoing[peer].is_done();
            }
            for (peer, stream) in peers(&links.streams) {
                idle &= !self.incoming[peer].receive(stream).map_err(|error| self.broken(peer, error))?;
                if let Some(session) = &mut self.sessions[peer] {
                    self.incoming[peer].check(session, call, peer)?;
                }
                busy |= !self.incoming[peer].is_done();
            }
            if links.aborted.load(Ordering::SeqCst) {
                return Err(CollectiveError::Aborted { epoch: self.epoch });
            }
            if !busy {
                return Ok(());
            }
            if idle {
                self.wait(&links)?;
            }
        }
    }

    /// Sleeps until a connection that still has something to do stirs.
    fn wait(&self, links: &Links) -> Result<(), CollectiveError> {
        let interest = |peer: usize| {
            let mut interest = PollFlags::empty();
            interest.set(PollFlags::OUT, !self.outgoing[peer].is_done());
            interest.set(PollFlags::IN, !self.incoming[peer].is_done());
            interest
        };
        // A connection without interest would still wake this rank when its peer hangs up, again and again.
        let mut waiting: Vec<PollFd<'_>> = peers(&links.streams)
            .filter(|&(peer, _)| !interest(peer).is_empty())
            .map(|(peer, stream)| PollFd::new(stream, interest(peer)))
            .collect();
        match rustix::event::poll(&mut waiting, Some(&RECHECK)) {
            Ok(_) | Err(Errno::INTR | Errno::AGAIN) => Ok(()),
            Err(error) => Err(io("wait for the other ranks", error)),
        }
    }

    /// What a broken connection means: an abort on this rank shuts all of them down.
    fn broken(&self, peer: usize, error: std::io::Error) -> CollectiveError {
        if self.links.aborted.load(Ordering::SeqCst) {
            return CollectiveError::Aborted { epoch: self.epoch };
        }
        let address = self.links.addresses[peer].clone();
        CollectiveError::Unreachable { rank: peer, address, message: error.to_string() }
    }
}

impl Collective for Mesh {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.links.streams.len()
    }

    fn all_reduce_sum(&mut self, values: &mut [f32]) -> Result<(), CollectiveError> {
        let call = self.begin(Operation::AllReduceSum, values.len())?;
        if size_of_val(values) <= ONE_SHOT_BYTES {
            self.sum_at_once(call, values)
        } else {
            self.sum_by_chunks(call, values)
        }
    }

    fn all_gather(&mut self, mine: &[u8]) -> Result<Vec<Vec<u8>>, CollectiveError> {
        let call = self.begin(Operation::AllGather, mine.len())?;
        for peer in self.others() {
            self.outgoing[peer].load(call, mine.len()).extend_from_slice(mine);
            // As long as the peer's call says.
            self.incoming[peer].expect(0);
        }
        self.exchange(call)?;
        let part = |rank: usize| if rank == self.rank { mine } else { self.incoming[rank].payload() };
        Ok((0..self.world_size()).map(|rank| part(rank).to_vec()).collect())
    }

    fn abort_handle(&self) -> AbortHandle {
        // A handle that outlives the collective must not keep its connections open: their end is what peers notice.
        let links = Arc::downgrade(&self.links);
        AbortHandle::new(move || {
            let Some(links) = links.upgrade() else { return };
            links.aborted.store(true, Ordering::SeqCst);
            for (_, stream) in peers(&links.streams) {
                // It fails when the peer has hung up, and then there is nothing to end.
                let _ = stream.shutdown(Shutdown::Both);
            }
        })
    }
}

impl Outgoing {
    /// Begins a frame of `call`; the payload of `bytes` is to be appended.
    fn load(&mut self, call: Call, bytes: usize) -> &mut Vec<u8> {
        self.sent = 0;
        self.frame.clear();
        self.frame.reserve(PAYLOAD + bytes + TAG_BYTES);
        self.frame.extend(call.to_words().into_iter().flat_map(u64::to_le_bytes));
        self.frame.resize(PAYLOAD, 0);
        &mut self.frame
    }

    /// Seals what has been loaded.
    fn seal(&mut self, session: &mut Session) -> Result<(), CollectiveError> {
        let (call, payload) = self.frame.split_at_mut(PAYLOAD);
        let (call, tag) = call.split_at_mut(Call::BYTES);
        tag.copy_from_slice(&session.seal(call)?);
        let tag = session.seal(payload)?;
        self.frame.extend(tag);
        Ok(())
    }

    fn load_floats(&mut self, call: Call, values: &[f32]) {
        let frame = self.load(call, size_of_val(values));
        let start = frame.len();
        frame.resize(start + size_of_val(values), 0);
        for (bytes, value) in frame[start..].chunks_exact_mut(size_of::<f32>()).zip(values) {
            bytes.copy_from_slice(&value.to_le_bytes());
        }
    }

    fn is_done(&self) -> bool {
        self.sent == self.frame.len()
    }

    /// Sends what the connection takes. Whether that was anything.
    fn send(&mut self, mut stream: &TcpStream) -> std::io::Result<bool> {
        let before = self.sent;
        while !self.is_done() {
            match stream.write(&self.frame[self.sent..]) {
                Ok(count) => self.sent += count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(self.sent > before)
    }
}

impl Incoming {
    /// Makes room for a call and `bytes` of payload.
    fn expect(&mut self, bytes: usize) {
        self.frame.resize(PAYLOAD + bytes + TAG_BYTES, 0);
        (self.filled, self.checked, self.opened) = (0, None, false);
    }

    fn is_done(&self) -> bool {
        self.opened
    }

    /// Takes what has come, up to the end of the frame. Whether that was anything.
    fn receive(&mut self, mut stream: &TcpStream) -> std::io::Result<bool> {
        let before = self.filled;
        while self.filled < self.frame.len() {
            match stream.read(&mut self.frame[self.filled..]) {
                Ok(0) => return Err(std::io::Error::new(ErrorKind::UnexpectedEof, "it closed the connection")),
                Ok(count) => self.filled += count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(self.filled > before)
    }

    /// Opens and compares the call once it has come, and then the payload.
    fn check(&mut self, session: &mut Session, call: Call, rank: usize) -> Result<(), CollectiveError> {
        if self.checked.is_none() && self.filled >= PAYLOAD {
            self.check_call(session, call, rank)?;
        }
        if self.checked.is_some() && !self.opened && self.filled == self.frame.len() {
            self.opened = session.open(&mut self.frame[PAYLOAD..]);
            return if self.opened { Ok(()) } else { Err(tampered(rank)) };
        }
        Ok(())
    }

    /// Makes room for the payload of a gather, whose length only the peer knows.
    fn check_call(&mut self, session: &mut Session, call: Call, rank: usize) -> Result<(), CollectiveError> {
        if !session.open(&mut self.frame[..PAYLOAD]) {
            return Err(tampered(rank));
        }
        let mut words = [0; Call::BYTES / 8];
        for (word, bytes) in words.iter_mut().zip(self.frame.as_chunks().0) {
            *word = u64::from_le_bytes(*bytes);
        }
        let found = call.check(rank, words)?;
        if found.operation == Operation::AllGather {
            if found.length > MAX_GATHER_BYTES as u64 {
                let expected = format!("at most {MAX_GATHER_BYTES} bytes");
                return Err(CollectiveError::Mismatch { rank, found: found.to_string(), expected });
            }
            self.frame.resize(PAYLOAD + found.length as usize + TAG_BYTES, 0);
        }
        self.checked = Some(found);
        Ok(())
    }

    fn payload(&self) -> &[u8] {
        &self.frame[PAYLOAD..self.frame.len() - TAG_BYTES]
    }
}

fn tampered(rank: usize) -> CollectiveError {
    io(format!("read from rank {rank}"), "what came is not what it sent")
}

fn decode(bytes: &[u8], values: &mut [f32]) {
    for (value, bytes) in values.iter_mut().zip(bytes.as_chunks().0) {
        *value = f32::from_le_bytes(*bytes);
    }
}

fn peers(streams: &[Option<TcpStream>]) -> impl Iterator<Item = (usize, &TcpStream)> {
    streams.iter().enumerate().filter_map(|(peer, stream)| Some((peer, stream.as_ref()?)))
}
