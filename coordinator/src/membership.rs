//! Which coordinator leads, and where epochs come from. The uniqueness of epochs is the one fact about a group that must
//! outlive its coordinator.
//!
//! | module | holds |
//! | --- | --- |
//! | [`embedded`] | one coordinator, which always leads; the last epoch in a file, or nowhere |
//! | [`etcd`] | several coordinators, one of which leads by election; epochs from guarded transactions |

pub mod embedded;
pub mod etcd;

use std::{fmt, net::SocketAddr, path::PathBuf, sync::Arc};

use phalanx_proto::{
    fault::{Fault, FaultKind},
    ids::Epoch,
};
use thiserror::Error;
use tokio::sync::watch;

use self::{embedded::Embedded, etcd::Etcd};

/// Where a coordinator learns whether it leads, and gets its epochs.
#[derive(Clone, Debug, Default)]
pub enum MembershipConfig {
    /// One coordinator, whose epochs are forgotten with it. Workers that outlive it say which they have seen.
    #[default]
    Memory,
    /// One coordinator, whose last epoch is kept in this directory.
    Directory(PathBuf),
    /// Any number of coordinators around an etcd.
    Etcd(etcd::EtcdConfig),
}

/// What a coordinator may do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Role {
    /// Nothing, until it is elected. Says who leads meanwhile, or why nobody can be elected.
    Waiting(String),
    /// Everything.
    Leading,
    /// Nothing any more: another one leads.
    Deposed(String),
}

/// A group of coordinators, of which one leads.
#[tonic::async_trait]
pub trait Membership: fmt::Debug + Send + Sync {
    /// What this coordinator may do, now and from now on.
    fn role(&self) -> watch::Receiver<Role>;

    /// The next epoch: greater than all that were issued and than `seen`, the highest that any worker knows.
    /// When it returns, the number is recorded and will never be issued again.
    ///
    /// # Errors
    /// When it cannot be recorded, or this coordinator does not lead; then nothing was issued that anybody may use.
    async fn next_epoch(&self, seen: Epoch) -> Result<Epoch, EpochError>;

    /// Lets another coordinator lead, now rather than when this one is missed.
    async fn resign(&self);
}

/// Takes part in the membership. `address` is where this coordinator listens, for people and for the others.
///
/// # Errors
/// When what it is told cannot be used: files, locks, credentials. A store that is away for now is waited for.
pub async fn start(config: &MembershipConfig, address: SocketAddr) -> anyhow::Result<Arc<dyn Membership>> {
    Ok(match config {
        MembershipConfig::Memory => Arc::new(Embedded::in_memory()),
        MembershipConfig::Directory(directory) => Arc::new(Embedded::open(directory.clone()).await?),
        MembershipConfig::Etcd(config) => Arc::new(Etcd::start(config, address).await?),
    })
}

impl Role {
    /// What those are told who come to a coordinator that does not lead. They may go to another one.
    ///
    /// # Errors
    /// Unless it leads.
    pub fn check(&self) -> Result<(), Fault> {
        match self {
            Self::Leading => Ok(()),
            Self::Waiting(why) => Err(Fault::new(FaultKind::NotReady, format!("this coordinator waits: {why}"))),
            Self::Deposed(why) => Err(Fault::new(FaultKind::NotReady, format!("this coordinator ends: {why}"))),
        }
    }
}

/// Why a coordinator had to end at once. It may be started again, and will wait then.
#[derive(Debug, Error)]
#[error("this coordinator no longer leads: {0}")]
pub struct Deposed(pub String);

/// Why no epoch could be issued.
#[derive(Debug, Error)]
pub enum EpochError {
    /// The file or its directory cannot be used.
    #[error("{action} {path}: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Another coordinator works with the same directory.
    #[error("{path} is locked: another coordinator uses this state directory; stop it or choose another directory")]
    Locked {
        /// The lock file.
        path: PathBuf,
    },
    /// The file does not hold a number.
    #[error(
        "{path} holds {found:?}, expected a number; if it was damaged, write a number above every epoch used so far"
    )]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Its beginning.
        found: String,
    },
    /// The store cannot be asked now; running epochs go on.
    #[error("{0}; what runs goes on, and a new epoch waits until etcd answers")]
    Etcd(#[from] etcd::EtcdError),
    /// Somebody else may issue epochs, this coordinator may not.
    #[error("this coordinator does not lead")]
    NotLeading,
    /// Numbers ran out, or a worker claims to have seen an absurd one.
    #[error("epoch {0} has no successor")]
    Exhausted(Epoch),
}

/// The epoch after all of `known`.
///
/// # Errors
/// When there is none.
fn successor(known: impl IntoIterator<Item = Epoch>) -> Result<Epoch, EpochError> {
    let highest = known.into_iter().max().unwrap_or_default();
    highest.0.checked_add(1).map(Epoch).ok_or(EpochError::Exhausted(highest))
}
