//! How the ranks of one formation find each other. The higher rank connects to the lower one and says which formation it
//! means; both prove that they know its secret; the lower one answers when all that it waits for are there, and refuses
//! whoever means another.
//!
//! ```text
//! guest → host   hello: epoch, rank, world size, challenge, digest of the list of ranks
//! guest ← host   challenge
//! guest → host   proof
//! guest ← host   welcome, proof   (or refused, reason)
//! ```
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
use super::rendezvous::Group;
use super::seal::Session;
use super::secret::{self, Nonce, PROOF_BYTES, Side};
use super::{Stop, io};

const MAGIC: [u8; 8] = *b"PHALANX2";
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
    /// Drawn for this connection.
    challenge: Nonce,
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
        bytes.extend(self.challenge);
        bytes.extend(self.digest.to_le_bytes());
        bytes
    }

    fn from_bytes(bytes: &[u8; Self::BYTES]) -> Option<Self> {
        let mut rest = bytes.strip_prefix(&MAGIC)?;
        Some(Self {
            epoch: u64::from_le_bytes(take(&mut rest)?),
            rank: u32::from_le_bytes(take(&mut rest)?),
            world_size: u32::from_le_bytes(take(&mut rest)?),
            challenge: take(&mut rest)?,
            digest: u64::from_le_bytes(take(&mut rest)?),
        })
    }

    /// Why `group` does not let in whoever has said and proved this, if it does not.
    fn objection(&self, group: &Group, awaited: &Range<usize>) -> Option<String> {
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

/// Introduces this rank on a fresh connection to `peer` and waits to be welcomed. Answers with what seals the connection.
pub(super) fn introduce<S: Stream>(
    stream: &mut S,
    group: &Group,
    peer: usize,
    patience: &Patience,
) -> Result<Session, CollectiveError> {
    let hello = Hello {
        epoch: group.epoch,
        rank: group.rank as u32,
        world_size: group.world_size() as u32,
        challenge: secret::random()?,
        digest: group.digest,
    };
    let (hello, secret) = (hello.to_bytes(), &group.ranks[peer].nonce);
    let failed = |error: std::io::Error| unreachable(group, peer, error);
    stream.set_read_timeout(Some(SLICE)).map_err(failed)?;
    stream.write_all(&hello).map_err(failed)?;
    let mut challenge = Nonce::default();
    read(stream, &mut challenge, group, peer, patience)?;
    stream.write_all(&secret::prove(Side::Guest, secret, &hello, &challenge)).map_err(failed)?;
    let mut answer = [0; 2];
    read(stream, &mut answer, group, peer, patience)?;
    let [verdict, length] = answer;
    if verdict == WELCOME {
        let mut proof = [0; PROOF_BYTES];
        read(stream, &mut proof, group, peer, patience)?;
        if secret::is_proof(Side::Host, secret, &hello, &challenge, &proof) {
            return Session::new(Side::Guest, secret, &hello, &challenge);
        }
        return Err(unreachable(group, peer, "whoever answers there does not know this formation's secret"));
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

/// Waits until all `awaited` ranks have introduced themselves at `listener`, then welcomes them. By rank, each with what
/// seals its connection.
pub(super) fn receive<L: Listener>(
    listener: &L,
    group: &Group,
    awaited: Range<usize>,
    patience: &Patience,
) -> Result<Vec<(L::Stream, Session)>, CollectiveError> {
    listener.set_nonblocking().map_err(|error| io("open the door of the collective", error))?;
    let mut unknown: Vec<Visitor<L::Stream>> = Vec::new();
    let mut known: BTreeMap<usize, Guest<L::Stream>> = BTreeMap::new();
    loop {
        // A rank that gave up and left is awaited again: it is not there, though it has been.
        known.retain(|_, guest| is_waiting(&mut guest.stream));
        let Some(missing) = awaited.clone().find(|rank| !known.contains_key(rank)) else { break };
        patience.check(group, missing)?;
        match listener.accept() {
            Ok(stream) => {
                if unknown.len() == MAX_UNKNOWN {
                    unknown.remove(0);
                }
                if stream.set_nonblocking(true).is_ok() {
                    unknown.push(Visitor { stream, heard: [0; HEARD_BYTES], filled: 0, challenge: None });
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
                Heard::Rank(rank, guest) => drop(known.insert(rank, *guest)),
                Heard::Stranger => {}
            }
        }
    }
    let mut streams = Vec::with_capacity(known.len());
    for (peer, Guest { mut stream, proof, session }) in known {
        let failed = |error: std::io::Error| unreachable(group, peer, error);
        stream.set_nonblocking(false).map_err(failed)?;
        stream.write_all(&[&[WELCOME, 0], &proof[..]].concat()).map_err(failed)?;
        streams.push((stream, session));
    }
    Ok(streams)
}

/// Whether a rank that has introduced itself is still there. It says nothing more before it is welcomed.
fn is_waiting<S: Stream>(stream: &mut S) -> bool {
    stream.read(&mut [0]).is_err_and(|error| is_passing(&error))
}

/// All that a visitor says: hello and proof.
const HEARD_BYTES: usize = Hello::BYTES + PROOF_BYTES;

/// Someone at the door.
struct Visitor<S> {
    stream: S,
    heard: [u8; HEARD_BYTES],
    filled: usize,
    /// What its proof has to answer, once its hello is whole.
    challenge: Option<Nonce>,
}

/// A rank that has proved to be one, and what will prove the same to it.
struct Guest<S> {
    stream: S,
    proof: [u8; PROOF_BYTES],
    session: Session,
}

enum Heard<S> {
    More(Visitor<S>),
    Rank(usize, Box<Guest<S>>),
    Stranger,
}

impl<S: Stream> Visitor<S> {
    fn listen(mut self, group: &Group, awaited: &Range<usize>) -> Heard<S> {
        let end = if self.challenge.is_none() { Hello::BYTES } else { HEARD_BYTES };
        match self.stream.read(&mut self.heard[self.filled..end]) {
            Ok(0) => return Heard::Stranger,
            Ok(count) => self.filled += count,
            Err(error) if is_passing(&error) => return Heard::More(self),
            Err(_) => return Heard::Stranger,
        }
        match self.challenge {
            _ if self.filled < end => Heard::More(self),
            None => self.ask(),
            Some(challenge) => self.judge(&challenge, group, awaited),
        }
    }

    /// Asks for a proof, whoever it is: what is asked is random and says nothing.
    fn ask(mut self) -> Heard<S> {
        let (Some(_), Ok(challenge)) = (self.hello(), secret::random()) else { return Heard::Stranger };
        self.challenge = Some(challenge);
        match self.stream.write_all(&challenge) {
            Ok(()) => Heard::More(self),
            Err(_) => Heard::Stranger,
        }
    }

    fn judge(mut self, challenge: &Nonce, group: &Group, awaited: &Range<usize>) -> Heard<S> {
        let Some(hello) = self.hello() else { return Heard::Stranger };
        let (said, proof) = self.heard.split_at(Hello::BYTES);
        let secret = &group.ranks[group.rank].nonce;
        // To one who does not know the secret nothing more is said.
        let objection = if secret::is_proof(Side::Guest, secret, said, challenge, proof) {
            hello.objection(group, awaited)
        } else {
            Some("wrong proof: this listener serves another formation".to_owned())
        };
        let Some(reason) = objection else {
            let proof = secret::prove(Side::Host, secret, said, challenge);
            let Ok(session) = Session::new(Side::Host, secret, said, challenge) else { return Heard::Stranger };
            return Heard::Rank(hello.rank as usize, Box::new(Guest { stream: self.stream, proof, session }));
        };
        // The reasons are short sentences of this file.
        let length = u8::try_from(reason.len()).unwrap_or(u8::MAX);
        let answer = [&[REFUSED, length], &reason.as_bytes()[..length.into()]].concat();
        // Whether a stranger hears why it is refused is the stranger's affair.
        let _ = self.stream.write_all(&answer);
        Heard::Stranger
    }

    fn hello(&self) -> Option<Hello> {
        self.heard.first_chunk().and_then(Hello::from_bytes)
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
