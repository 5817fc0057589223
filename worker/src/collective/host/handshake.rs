//! How the ranks of one formation find each other. The higher rank connects to the lower one and says which formation it
//! means; the lower one answers when all that it waits for are there, and refuses whoever means another.
//!
//! A door stands open to everything that can reach it, so a stranger must not be able to hold up a formation: whoever
//! connects and stays silent or talks nonsense is shown out while the others are served.

use std::collections::BTreeMap;
use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::ops::Range;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::super::CollectiveError;
use super::rendezvous::{Group, Nonce};
use super::{Stop, io};

const MAGIC: [u8; 8] = *b"PHALANX1";
const WELCOME: u8 = 0;
const REFUSED: u8 = 1;
/// How long one blocking wait lasts before the abort switch and the deadline are looked at again.
const SLICE: Duration = Duration::from_millis(10);
/// Longest wait of the door between two looks at its visitors.
const DOOR_NAP: Duration = Duration::from_millis(1);
/// Visitors whose hello is still incomplete; the oldest goes when one more comes.
const MAX_UNKNOWN: usize = 128;

/// How long a formation may still take.
pub(super) struct Patience {
    // None if it lies beyond what the clock can say.
    deadline: Option<Instant>,
    timeout: Duration,
    stop: Arc<Stop>,
}

impl Patience {
    pub(super) fn new(timeout: Duration, stop: Arc<Stop>) -> Self {
        Self { deadline: Instant::now().checked_add(timeout), timeout, stop }
    }

    /// Fails when the formation was aborted or its time is up; `peer` is the rank waited for.
    fn check(&self, group: &Group, peer: usize) -> Result<(), CollectiveError> {
        if self.stop.is_aborted() {
            return Err(CollectiveError::Aborted { epoch: group.epoch });
        }
        if self.deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            return Err(unreachable(group, peer, format!("nothing came within {} ms", self.timeout.as_millis())));
        }
        Ok(())
    }
}

/// A connection between two ranks.
pub(super) trait Stream: Read + Write + Sized {
    fn set_nonblocking(&self, nonblocking: bool) -> std::io::Result<()>;
    fn set_read_timeout(&self, timeout: Option<Duration>) -> std::io::Result<()>;
}

/// A rank's open door.
pub(super) trait Listener {
    type Stream: Stream;
    fn set_nonblocking(&self) -> std::io::Result<()>;
    fn accept(&self) -> std::io::Result<Self::Stream>;
}

macro_rules! door {
    ($listener:ty, $stream:ty) => {
        impl Stream for $stream {
            fn set_nonblocking(&self, nonblocking: bool) -> std::io::Result<()> {
                Self::set_nonblocking(self, nonblocking)
            }
            fn set_read_timeout(&self, timeout: Option<Duration>) -> std::io::Result<()> {
                Self::set_read_timeout(self, timeout)
            }
        }
        impl Listener for $listener {
            type Stream = $stream;
            fn set_nonblocking(&self) -> std::io::Result<()> {
                Self::set_nonblocking(self, true)
            }
            fn accept(&self) -> std::io::Result<$stream> {
                Self::accept(self).map(|(stream, _)| stream)
            }
        }
    };
}
door!(TcpListener, TcpStream);
door!(UnixListener, UnixStream);

/// What the connecting rank says first.
struct Hello {
    epoch: u64,
    rank: u32,
    world_size: u32,
    /// The one of the rank it connects to.
    nonce: Nonce,
    digest: u64,
}

impl Hello {
    const BYTES: usize = MAGIC.len() + 8 + 4 + 4 + size_of::<Nonce>() + 8;

    fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(Self::BYTES);
        bytes.extend(MAGIC);
        bytes.extend(self.epoch.to_le_bytes());
        bytes.extend(self.rank.to_le_bytes());
        bytes.extend(self.world_size.to_le_bytes());
        bytes.extend(self.nonce);
        bytes.extend(self.digest.to_le_bytes());
        bytes
    }

    fn from_bytes(bytes: &[u8; Self::BYTES]) -> Option<Self> {
        let mut rest = bytes.strip_prefix(&MAGIC)?;
        Some(Self {
            epoch: u64::from_le_bytes(take(&mut rest)?),
            rank: u32::from_le_bytes(take(&mut rest)?),
            world_size: u32::from_le_bytes(take(&mut rest)?),
            nonce: take(&mut rest)?,
            digest: u64::from_le_bytes(take(&mut rest)?),
        })
    }

    /// Why `group` does not let in whoever says this, if it does not. To one who does not know the nonce it says no more.
    fn objection(&self, group: &Group, awaited: &Range<usize>) -> Option<String> {
        if self.nonce != group.ranks[group.rank].nonce {
            return Some("wrong nonce: this listener serves another formation".to_owned());
        }
        if self.epoch != group.epoch {
            return Some(format!("this rank forms epoch {}, not {}", group.epoch, self.epoch));
        }
        if self.digest != group.digest || self.world_size as usize != group.world_size() {
            return Some("the two ranks were given different lists of ranks".to_owned());
        }
        if !awaited.contains(&(self.rank as usize)) {
            return Some(format!("rank {} is not awaited by rank {}", self.rank, group.rank));
        }
        None
    }
}

fn take<const N: usize>(rest: &mut &[u8]) -> Option<[u8; N]> {
    let (head, tail) = rest.split_first_chunk()?;
    *rest = tail;
    Some(*head)
}

/// Introduces this rank on a fresh connection to `peer` and waits to be welcomed.
pub(super) fn introduce<S: Stream>(
    stream: &mut S,
    group: &Group,
    peer: usize,
    patience: &Patience,
) -> Result<(), CollectiveError> {
    let hello = Hello {
        epoch: group.epoch,
        rank: group.rank as u32,
        world_size: group.world_size() as u32,
        nonce: group.ranks[peer].nonce,
        digest: group.digest,
    };
    let failed = |error: std::io::Error| unreachable(group, peer, error);
    stream.set_read_timeout(Some(SLICE)).map_err(failed)?;
    stream.write_all(&hello.to_bytes()).map_err(failed)?;
    let mut answer = [0; 2];
    read(stream, &mut answer, group, peer, patience)?;
    let [verdict, length] = answer;
    if verdict == WELCOME {
        return Ok(());
    }
    let mut reason = vec![0; length.into()];
    read(stream, &mut reason, group, peer, patience)?;
    Err(unreachable(group, peer, format!("it refuses this rank: {}", String::from_utf8_lossy(&reason))))
}

fn read<S: Stream>(
    stream: &mut S,
    bytes: &mut [u8],
    group: &Group,
    peer: usize,
    patience: &Patience,
) -> Result<(), CollectiveError> {
    let mut filled = 0;
    while filled < bytes.len() {
        patience.check(group, peer)?;
        match stream.read(&mut bytes[filled..]) {
            Ok(0) => return Err(unreachable(group, peer, "it closed the connection")),
            Ok(count) => filled += count,
            Err(error) if is_passing(&error) => {}
            Err(error) => return Err(unreachable(group, peer, error)),
        }
    }
    Ok(())
}

/// Waits until all `awaited` ranks have introduced themselves at `listener`, then welcomes them. By rank.
pub(super) fn receive<L: Listener>(
    listener: &L,
    group: &Group,
    awaited: Range<usize>,
    patience: &Patience,
) -> Result<Vec<L::Stream>, CollectiveError> {
    listener.set_nonblocking().map_err(|error| io("open the door of the collective", error))?;
    let mut unknown: Vec<Visitor<L::Stream>> = Vec::new();
    let mut known: BTreeMap<usize, L::Stream> = BTreeMap::new();
    loop {
        // A rank that gave up and left is awaited again: it is not there, though it has been.
        known.retain(|_, stream| is_waiting(stream));
        let Some(missing) = awaited.clone().find(|rank| !known.contains_key(rank)) else { break };
        patience.check(group, missing)?;
        match listener.accept() {
            Ok(stream) => {
                if unknown.len() == MAX_UNKNOWN {
                    unknown.remove(0);
                }
                if stream.set_nonblocking(true).is_ok() {
                    unknown.push(Visitor { stream, hello: [0; Hello::BYTES], filled: 0 });
                }
            }
            Err(error) if is_passing(&error) || error.kind() == ErrorKind::ConnectionAborted => {
                std::thread::sleep(DOOR_NAP);
            }
            Err(error) => return Err(io("accept a rank of the collective", error)),
        }
        for visitor in std::mem::take(&mut unknown) {
            match visitor.listen(group, &awaited) {
                Heard::More(visitor) => unknown.push(visitor),
                Heard::Rank(rank, stream) => drop(known.insert(rank, stream)),
                Heard::Stranger => {}
            }
        }
    }
    let mut streams = Vec::with_capacity(known.len());
    for (peer, mut stream) in known {
        let failed = |error: std::io::Error| unreachable(group, peer, error);
        stream.set_nonblocking(false).map_err(failed)?;
        stream.write_all(&[WELCOME, 0]).map_err(failed)?;
        streams.push(stream);
    }
    Ok(streams)
}

/// Whether a rank that has introduced itself is still there. It says nothing more before it is welcomed.
fn is_waiting<S: Stream>(stream: &mut S) -> bool {
    stream.read(&mut [0]).is_err_and(|error| is_passing(&error))
}

/// Someone at the door.
struct Visitor<S> {
    stream: S,
    hello: [u8; Hello::BYTES],
    filled: usize,
}

enum Heard<S> {
    More(Visitor<S>),
    Rank(usize, S),
    Stranger,
}

impl<S: Stream> Visitor<S> {
    fn listen(mut self, group: &Group, awaited: &Range<usize>) -> Heard<S> {
        match self.stream.read(&mut self.hello[self.filled..]) {
            Ok(0) => return Heard::Stranger,
            Ok(count) => self.filled += count,
            Err(error) if is_passing(&error) => return Heard::More(self),
            Err(_) => return Heard::Stranger,
        }
        if self.filled < Hello::BYTES {
            return Heard::More(self);
        }
        let Some(hello) = Hello::from_bytes(&self.hello) else { return Heard::Stranger };
        let Some(reason) = hello.objection(group, awaited) else {
            return Heard::Rank(hello.rank as usize, self.stream);
        };
        // The reasons are short sentences of this file.
        let length = u8::try_from(reason.len()).unwrap_or(u8::MAX);
        let answer = [&[REFUSED, length], &reason.as_bytes()[..length.into()]].concat();
        // Whether a stranger hears why it is refused is the stranger's affair.
        let _ = self.stream.write_all(&answer);
        Heard::Stranger
    }
}

/// Connects to the TCP listener of `peer`.
pub(super) fn dial(group: &Group, peer: usize, patience: &Patience) -> Result<TcpStream, CollectiveError> {
    // A connection attempt cannot be interrupted, so a host that swallows packets is asked again and again.
    const ATTEMPT: Duration = Duration::from_millis(200);
    loop {
        patience.check(group, peer)?;
        match TcpStream::connect_timeout(&group.ranks[peer].address, ATTEMPT) {
            Ok(stream) => return Ok(stream),
            Err(error) if is_passing(&error) => {}
            Err(error) => return Err(unreachable(group, peer, error)),
        }
    }
}

/// Repeats `attempt` while all it says is that nothing has come yet.
pub(super) fn patiently<T>(
    group: &Group,
    peer: usize,
    patience: &Patience,
    mut attempt: impl FnMut() -> std::io::Result<T>,
) -> Result<T, CollectiveError> {
    loop {
        patience.check(group, peer)?;
        match attempt() {
            Ok(value) => return Ok(value),
            Err(error) if is_passing(&error) => {}
            Err(error) => return Err(unreachable(group, peer, error)),
        }
    }
}

fn is_passing(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted)
}

pub(super) fn unreachable(group: &Group, peer: usize, message: impl ToString) -> CollectiveError {
    let address = if group.on_one_host() {
        format!("local socket {}", group.ranks[peer].socket_name())
    } else {
        group.ranks[peer].address.to_string()
    };
    CollectiveError::Unreachable { rank: peer, address, message: message.to_string() }
}
