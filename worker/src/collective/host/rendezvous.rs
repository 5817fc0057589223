//! What a rank tells the others about itself before the group forms, and the group that all of it makes.

use std::net::SocketAddr;

use prost::Message;

use super::super::CollectiveError;
use super::secret::{self, Nonce};

/// Grows with every change of the rendezvous, the handshake or the frames, so that unlike builds refuse each other.
const VERSION: u32 = 2;
/// Largest group. Far above what the models divide over; it bounds memory and descriptors.
const MAX_RANKS: usize = 64;

/// The rendezvous as it travels; the coordinator passes it on without reading it.
#[derive(Clone, PartialEq, Message)]
struct Wire {
    #[prost(uint32, tag = "1")]
    version: u32,
    #[prost(uint64, tag = "2")]
    epoch: u64,
    #[prost(uint64, tag = "3")]
    incarnation: u64,
    #[prost(string, tag = "4")]
    host_id: String,
    #[prost(string, tag = "5")]
    address: String,
    #[prost(string, tag = "6")]
    socket_name: String,
    #[prost(bytes = "vec", tag = "7")]
    nonce: Vec<u8>,
}

/// Where one rank is found.
#[derive(Clone, PartialEq)]
pub(super) struct Rendezvous {
    pub(super) epoch: u64,
    incarnation: u64,
    host_id: String,
    /// Its TCP listener.
    pub(super) address: SocketAddr,
    socket_name: String,
    pub(super) nonce: Nonce,
}

impl Rendezvous {
    /// Draws the secrets of a new formation for the process `incarnation` that listens at `address`.
    pub(super) fn new(
        epoch: u64,
        incarnation: u64,
        host_id: &str,
        address: SocketAddr,
    ) -> Result<Self, CollectiveError> {
        // Names of sockets can be read by everyone on the host, so the name says nothing about the nonce.
        let socket_name = format!("phalanx-{epoch}-{incarnation:016x}-{:032x}", u128::from_ne_bytes(secret::random()?));
        Ok(Self { epoch, incarnation, host_id: host_id.to_owned(), address, socket_name, nonce: secret::random()? })
    }

    pub(super) fn to_bytes(&self) -> Vec<u8> {
        let wire = Wire {
            version: VERSION,
            epoch: self.epoch,
            incarnation: self.incarnation,
            host_id: self.host_id.clone(),
            address: self.address.to_string(),
            socket_name: self.socket_name.clone(),
            nonce: self.nonce.to_vec(),
        };
        wire.encode_to_vec()
    }

    fn from_bytes(bytes: &[u8]) -> Result<Self, String> {
        let wire = Wire::decode(bytes).map_err(|error| format!("it cannot be read: {error}"))?;
        if wire.version != VERSION {
            return Err(format!(
                "its version is {}, this build speaks {VERSION}; run one build on all ranks",
                wire.version
            ));
        }
        let address =
            wire.address.parse().map_err(|error| format!("its address {:?} is not one: {error}", wire.address))?;
        let nonce = wire.nonce.try_into().map_err(|nonce: Vec<u8>| format!("its nonce has {} bytes", nonce.len()))?;
        Ok(Self {
            epoch: wire.epoch,
            incarnation: wire.incarnation,
            host_id: wire.host_id,
            address,
            socket_name: wire.socket_name,
            nonce,
        })
    }

    /// The name of its local socket in the abstract namespace.
    pub(super) fn socket_name(&self) -> &str {
        &self.socket_name
    }
}

/// All ranks of one formation, seen from one of them.
pub(super) struct Group {
    pub(super) epoch: u64,
    pub(super) rank: usize,
    /// By rank.
    pub(super) ranks: Vec<Rendezvous>,
    /// Equal on ranks that were given the same list; it may be shown to anyone.
    pub(super) digest: u64,
}

impl Group {
    /// Puts together what all ranks have said; `own` is what this rank said.
    pub(super) fn new(own: &Rendezvous, rank: usize, all: &[Vec<u8>]) -> Result<Self, CollectiveError> {
        let wrong = |rank: usize, message: String| CollectiveError::Rendezvous { rank, message };
        if all.len() > MAX_RANKS {
            return Err(wrong(rank, format!("a group has at most {MAX_RANKS} ranks, not {}", all.len())));
        }
        let mut ranks: Vec<Rendezvous> = Vec::with_capacity(all.len());
        let mut list = Vec::new();
        for (peer, bytes) in all.iter().enumerate() {
            let found = Rendezvous::from_bytes(bytes).map_err(|message| wrong(peer, message))?;
            if found.epoch != own.epoch {
                return Err(wrong(
                    peer,
                    format!("it is of epoch {}, this rank forms epoch {}", found.epoch, own.epoch),
                ));
            }
            if let Some(twin) = ranks.iter().position(|other| other.nonce == found.nonce) {
                return Err(wrong(peer, format!("it is that of rank {twin} again")));
            }
            list.extend((bytes.len() as u64).to_le_bytes());
            list.extend(bytes);
            ranks.push(found);
        }
        if ranks.get(rank) != Some(own) {
            let message = format!("the one listed among {} ranks is not the one that this rank prepared", ranks.len());
            return Err(wrong(rank, message));
        }
        Ok(Self { epoch: own.epoch, rank, ranks, digest: secret::digest(&list) })
    }

    pub(super) fn world_size(&self) -> usize {
        self.ranks.len()
    }

    pub(super) fn on_one_host(&self) -> bool {
        self.ranks.windows(2).all(|pair| pair[0].host_id == pair[1].host_id)
    }
}
