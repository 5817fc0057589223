//! The collective of ranks that compute on CPUs: shared memory within a host, TCP between hosts.
//!
//! | file | holds |
//! | --- | --- |
//! | `rendezvous` | what a rank tells the others about itself, and the group that all of it makes |
//! | `handshake` | how the ranks of one formation find each other and refuse everyone else |
//! | `secret`, `seal` | how they prove that they belong to it, and keep their connections to themselves |
//! | `shared_memory`, `region` | sums through memory that all ranks map; every `unsafe` block is in these two |
//! | `tcp` | sums over a full mesh of connections |
//! | `call` | what a rank says it is doing, so that a rank doing something else is noticed |
//!
//! A group forms in two phases, because nobody knows the others' addresses before everyone has opened its door:
//! each rank makes a [`Preparation`] and hands out its [`rendezvous`](Preparation::rendezvous); once a rank has those of
//! all ranks it calls [`form`](Preparation::form). Every formation has its own memory, connections and secrets, so a rank
//! left over from an older epoch can neither disturb a newer one nor be disturbed by it.
//!
//! Nothing here has a name in a file system: the memory is anonymous and handed over through a socket of the abstract
//! namespace, so ranks that are killed at any moment leave nothing behind.

mod call;
mod handshake;
mod region;
mod rendezvous;
mod seal;
mod secret;
mod shared_memory;
mod tcp;

use std::net::{IpAddr, TcpListener};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use self::handshake::Patience;
use self::rendezvous::{Group, Rendezvous};
use self::shared_memory::SharedMemory;
use self::tcp::Mesh;
use super::{AbortHandle, Alone, Collective, CollectiveError};

/// Longest byte string a rank may contribute to one [`all_gather`](Collective::all_gather).
pub const MAX_GATHER_BYTES: usize = 256 << 20;

/// Names this host and its network: equal for processes that can reach each other's sockets and memory, which is to say
/// for those under the same boot of the same kernel and in the same network namespace.
///
/// # Errors
/// When `/proc` does not say.
pub fn host_identity() -> Result<String, CollectiveError> {
    const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
    const NETWORK: &str = "/proc/self/ns/net";
    let boot = std::fs::read_to_string(BOOT_ID).map_err(|error| io(format!("read {BOOT_ID}"), error))?;
    let network = std::fs::read_link(NETWORK).map_err(|error| io(format!("read {NETWORK}"), error))?;
    Ok(format!("{} {}", boot.trim(), network.display()))
}

/// One rank's open door before its group forms.
pub struct Preparation {
    own: Rendezvous,
    // Both doors are open, since the way is known only when all rendezvous are.
    tcp: TcpListener,
    local: UnixListener,
    stop: Arc<Stop>,
}

impl Preparation {
    /// Opens the doors of this process for the formation `epoch`. `host_id` is [`host_identity`]; `bind_ip` is the address
    /// of this host at which the other ranks reach it.
    ///
    /// # Errors
    /// When `bind_ip` is not one particular address of this host, or a socket cannot be opened.
    pub fn new(epoch: u64, incarnation: u64, host_id: &str, bind_ip: IpAddr) -> Result<Self, CollectiveError> {
        let opening = || format!("open the collective's listener on {bind_ip}");
        if bind_ip.is_unspecified() {
            return Err(io(opening(), "other ranks cannot connect to it; give an address of this host"));
        }
        let tcp = TcpListener::bind((bind_ip, 0)).map_err(|error| io(opening(), error))?;
        let address = tcp.local_addr().map_err(|error| io(opening(), error))?;
        let own = Rendezvous::new(epoch, incarnation, host_id, address)?;
        let local = SocketAddr::from_abstract_name(own.socket_name())
            .and_then(|name| UnixListener::bind_addr(&name))
            .map_err(|error| io(format!("open the local socket {}", own.socket_name()), error))?;
        Ok(Self { own, tcp, local, stop: Arc::new(Stop::new()) })
    }

    /// What the other ranks need to find this one. It holds a secret of this formation: it goes to them and nowhere else.
    pub fn rendezvous(&self) -> Vec<u8> {
        self.own.to_bytes()
    }

    /// The handle that ends a [`form`](Self::form) in progress; it stays good for the collective that comes of it.
    /// A handle that is kept keeps the shared memory mapped.
    pub fn abort_handle(&self) -> AbortHandle {
        self.stop.handle()
    }

    /// Waits for the other ranks and joins them. `all` is every rank's rendezvous, by rank. Ranks of one host meet in
    /// shared memory, others over TCP.
    ///
    /// # Errors
    /// When the rendezvous do not fit together, a rank is missing after `timeout`, or the abort handle was used.
    pub fn form(self, rank: usize, all: &[Vec<u8>], timeout: Duration) -> Result<HostCollective, CollectiveError> {
        let group = Group::new(&self.own, rank, all)?;
        let patience = Patience::new(timeout, Arc::clone(&self.stop));
        let (transport, link): (Box<dyn Collective>, _) = if group.world_size() == 1 {
            (Box::new(Alone), Link::Alone)
        } else if group.on_one_host() {
            (Box::new(SharedMemory::form(&group, &self.local, &patience)?), Link::SharedMemory)
        } else {
            (Box::new(Mesh::form(&group, &self.tcp, &patience)?), Link::Tcp)
        };
        self.stop.hand_over(transport.abort_handle());
        let collective = HostCollective { transport, link, epoch: group.epoch, stop: self.stop };
        collective.check_abort()?;
        Ok(collective)
    }
}

/// How the ranks of a group reach each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Link {
    /// There is only one rank.
    Alone,
    /// Through memory that all of them map.
    SharedMemory,
    /// Over a mesh of connections.
    Tcp,
}

/// One rank's end of a group whose ranks compute on CPUs.
///
/// After an error other than a mistake in its own arguments the group is over: form a new one under a new epoch.
/// The values of an interrupted sum are unspecified.
pub struct HostCollective {
    transport: Box<dyn Collective>,
    link: Link,
    epoch: u64,
    stop: Arc<Stop>,
}

impl HostCollective {
    /// How the ranks reach each other.
    pub fn link(&self) -> Link {
        self.link
    }
}

impl Collective for HostCollective {
    fn rank(&self) -> usize {
        self.transport.rank()
    }

    fn world_size(&self) -> usize {
        self.transport.world_size()
    }

    fn check_abort(&self) -> Result<(), CollectiveError> {
        if self.stop.is_aborted() { Err(CollectiveError::Aborted { epoch: self.epoch }) } else { Ok(()) }
    }

    fn all_reduce_sum(&mut self, values: &mut [f32]) -> Result<(), CollectiveError> {
        self.check_abort()?;
        self.transport.all_reduce_sum(values)
    }

    fn all_gather(&mut self, mine: &[u8]) -> Result<Vec<Vec<u8>>, CollectiveError> {
        self.check_abort()?;
        if mine.len() > MAX_GATHER_BYTES {
            let what = format!("all_gather of {} bytes", mine.len());
            return Err(io(what, format!("a rank may contribute at most {MAX_GATHER_BYTES}")));
        }
        self.transport.all_gather(mine)
    }

    fn abort_handle(&self) -> AbortHandle {
        self.stop.handle()
    }
}

/// The one abort switch of a formation, from preparation to its end, so that no abort falls between the two phases.
struct Stop {
    aborted: AtomicBool,
    transport: OnceLock<AbortHandle>,
}

impl Stop {
    fn new() -> Self {
        Self { aborted: AtomicBool::new(false), transport: OnceLock::new() }
    }

    fn handle(self: &Arc<Self>) -> AbortHandle {
        let stop = Arc::clone(self);
        AbortHandle::new(move || {
            // Sequentially consistent, like `hand_over`: either this sees the transport or that sees the flag.
            stop.aborted.store(true, Ordering::SeqCst);
            if let Some(transport) = stop.transport.get() {
                transport.abort();
            }
        })
    }

    fn hand_over(&self, transport: AbortHandle) {
        let transport = self.transport.get_or_init(|| transport);
        if self.is_aborted() {
            transport.abort();
        }
    }

    fn is_aborted(&self) -> bool {
        self.aborted.load(Ordering::SeqCst)
    }
}

fn io(what: impl Into<String>, message: impl ToString) -> CollectiveError {
    CollectiveError::Io { what: what.into(), message: message.to_string() }
}

/// The part of `length` elements that `rank` of `world_size` sums: consecutive, about equal, and cut at cache lines of 16
/// floats so that two ranks never write to one line.
fn chunk(length: usize, rank: usize, world_size: usize) -> std::ops::Range<usize> {
    const LINE: usize = 16;
    let lines = length.div_ceil(LINE);
    let bound = |rank: usize| (lines * rank / world_size * LINE).min(length);
    bound(rank)..bound(rank + 1)
}

fn add(sum: &mut [f32], part: &[f32]) {
    for (sum, part) in sum.iter_mut().zip(part) {
        *sum += part;
    }
}
