//! Several coordinators around an etcd: members under leases, one leader by election, epochs that only the leader issues.
//!
//! | key | holds | goes with the lease |
//! | --- | --- | --- |
//! | `PREFIX/leader` | who leads: a number drawn at start, and an address | yes |
//! | `PREFIX/coordinators/ID` | a coordinator's address | yes |
//! | `PREFIX/epoch` | the last epoch | no |
//!
//! Who made the leader key leads. The next epoch is one transaction that holds only while that very key is there, so a
//! coordinator that was deposed without knowing it gets none. Being cut off from etcd deposes nobody: what runs goes on,
//! and should another one be elected meanwhile, its epochs are greater, and workers refuse the lower ones.
//! The key alone decides, not a lease's keep-alive: an etcd that comes back has all leases again, and one that has lost
//! its data has none of them, but nobody else leads then either.

mod client;

#[allow(unreachable_pub, clippy::all, clippy::allow_attributes_without_reason, reason = "generated code")]
mod wire {
    tonic::include_proto!("etcdserverpb");
}

use std::{
    hash::{BuildHasher, Hasher, RandomState},
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use phalanx_proto::ids::Epoch;
use tokio::{
    sync::watch,
    task::JoinHandle,
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

pub use self::client::{Credentials, EtcdConfig, EtcdError, EtcdTls};
use self::{
    client::Client,
    wire::{
        Compare, KeyValue, PutRequest, RangeRequest, RequestOp, TxnRequest, compare::CompareTarget,
        compare::TargetUnion, request_op, response_op,
    },
};
use super::{EpochError, Membership, Role, successor};

/// How long etcd keeps a coordinator that is silent, and how often one is heard (the contract's numbers).
const LEASE: Duration = Duration::from_secs(10);
const KEEP_ALIVE: Duration = Duration::from_secs(3);
/// How often the leader looks whether it still leads.
const LOOK: Duration = Duration::from_secs(1);
/// How often the others look, and everybody while etcd does not answer.
const LOOK_OFTEN: Duration = Duration::from_millis(500);
/// How long the leader's place must be seen empty before a coordinator that did not lead takes it. A leader that etcd
/// forgot takes it again sooner, and nothing is interrupted.
const VACANCY: Duration = Duration::from_secs(2);
/// Attempts to issue one epoch; only a rival's luck makes more than one necessary.
const ATTEMPTS: usize = 4;
/// Longest wait for etcd to hear that this coordinator leaves.
const FAREWELL: Duration = Duration::from_secs(2);

/// One of several coordinators.
#[derive(Debug)]
pub struct Etcd {
    shared: Arc<Shared>,
    stop: CancellationToken,
    campaign: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Debug)]
struct Shared {
    client: Client,
    leader_key: String,
    epoch_key: String,
    member_key: String,
    address: String,
    /// What this coordinator writes into the leader key. No other process ever writes the same.
    name: String,
    role: watch::Sender<Role>,
    standing: Mutex<Standing>,
}

/// What is known of this coordinator's place.
#[derive(Debug, Default)]
struct Standing {
    /// Revision at which its leader key was made, while it leads.
    elected: Option<i64>,
    /// The highest epoch seen in etcd or issued here. An etcd that lost its data may know less.
    last: Epoch,
    /// Why etcd could not be asked the last time.
    trouble: Option<EtcdError>,
}

/// The store's two facts.
struct View {
    leader: Option<KeyValue>,
    epoch: Epoch,
    /// When the epoch was written; 0 for never.
    epoch_revision: i64,
}

impl Etcd {
    /// Registers and begins to stand for election. `address` is where this coordinator listens.
    ///
    /// # Errors
    /// When the settings cannot be used or etcd refuses them. An etcd that does not answer is waited for.
    pub async fn start(config: &EtcdConfig, address: SocketAddr) -> Result<Self, EtcdError> {
        let prefix = config.prefix.trim_end_matches('/');
        // Keys of new hashers are drawn from the system's entropy.
        let id = RandomState::new().build_hasher().finish();
        let shared = Arc::new(Shared {
            client: Client::new(config).await?,
            leader_key: format!("{prefix}/leader"),
            epoch_key: format!("{prefix}/epoch"),
            member_key: format!("{prefix}/coordinators/{id:016x}"),
            address: address.to_string(),
            name: format!("{id:016x} {address}"),
            role: watch::Sender::new(Role::Waiting("it has not been elected yet".into())),
            standing: Mutex::default(),
        });
        let mut campaign = Campaign { shared: Arc::clone(&shared), lease: None, vacant_since: None };
        if let Err(refused @ (EtcdError::Refused { .. } | EtcdError::Malformed { .. })) = campaign.round().await {
            return Err(refused);
        }
        let stop = CancellationToken::new();
        let task = tokio::spawn(campaign.run(stop.clone()));
        Ok(Self { shared, stop, campaign: Mutex::new(Some(task)) })
    }
}

#[tonic::async_trait]
impl Membership for Etcd {
    fn role(&self) -> watch::Receiver<Role> {
        self.shared.role.subscribe()
    }

    async fn next_epoch(&self, seen: Epoch) -> Result<Epoch, EpochError> {
        let shared = &self.shared;
        for _ in 0..ATTEMPTS {
            let (elected, last) = {
                let standing = shared.standing();
                if let Some(trouble) = &standing.trouble {
                    // Whoever asks must not wait for an etcd that is known to be away.
                    return Err(trouble.clone().into());
                }
                (standing.elected.ok_or(EpochError::NotLeading)?, standing.last)
            };
            let view = shared.look().await?;
            let next = successor([view.epoch, last, seen])?;
            if shared.record(elected, view.epoch_revision, next).await? {
                let mut standing = shared.standing();
                standing.last = standing.last.max(next);
                return Ok(next);
            }
            debug!(epoch = next.0, "not issued: the leader key or the epoch has changed");
        }
        Err(EpochError::NotLeading)
    }

    async fn resign(&self) {
        self.stop.cancel();
        let campaign = self.campaign.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(campaign) = campaign
            && timeout(FAREWELL, campaign).await.is_err()
        {
            warn!("etcd was not told in time that this coordinator leaves; its lease will run out");
        }
    }
}

impl Shared {
    fn standing(&self) -> MutexGuard<'_, Standing> {
        self.standing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn look(&self) -> Result<View, EtcdError> {
        let success = vec![range(&self.leader_key), range(&self.epoch_key)];
        let answer = self.client.txn(TxnRequest { success, ..Default::default() }).await?;
        let mut found = answer.responses.into_iter().map(|response| match response.response {
            Some(response_op::Response::ResponseRange(range)) => range.kvs.into_iter().next(),
            _ => None,
        });
        let (leader, epoch) = (found.next().flatten(), found.next().flatten());
        let (epoch, epoch_revision) = match epoch {
            Some(kv) => (self.parse_epoch(&kv)?, kv.mod_revision),
            None => (Epoch(0), 0),
        };
        Ok(View { leader, epoch, epoch_revision })
    }

    fn parse_epoch(&self, kv: &KeyValue) -> Result<Epoch, EtcdError> {
        let text = String::from_utf8_lossy(&kv.value);
        let malformed =
            |_| EtcdError::Malformed { key: self.epoch_key.clone(), found: text.chars().take(64).collect() };
        text.parse().map(Epoch).map_err(malformed)
    }

    /// Writes the epoch, if this coordinator leads and nobody has written one since `epoch_revision`.
    async fn record(&self, elected: i64, epoch_revision: i64, epoch: Epoch) -> Result<bool, EtcdError> {
        let mut compare = self.leads(elected).to_vec();
        compare.push(equal(&self.epoch_key, CompareTarget::Mod, TargetUnion::ModRevision(epoch_revision)));
        let success = vec![put(&self.epoch_key, &epoch.to_string(), 0)];
        let answer = self.client.txn(TxnRequest { compare, success, ..Default::default() }).await?;
        Ok(answer.succeeded)
    }

    /// What holds while this coordinator leads. A revision alone may come again in an etcd that lost its data.
    fn leads(&self, elected: i64) -> [Compare; 2] {
        [
            equal(&self.leader_key, CompareTarget::Create, TargetUnion::CreateRevision(elected)),
            equal(&self.leader_key, CompareTarget::Value, TargetUnion::Value(self.name.clone().into_bytes())),
        ]
    }

    fn set_role(&self, role: Role) {
        self.role.send_if_modified(|known| {
            let changed = *known != role;
            *known = role;
            changed
        });
    }
}

/// The task that keeps the lease, stands for election, and notices the loss of it.
struct Campaign {
    shared: Arc<Shared>,
    /// Id, and when it was last prolonged.
    lease: Option<(i64, Instant)>,
    /// Since when every look has shown that nobody leads.
    vacant_since: Option<Instant>,
}

/// What to do about the leader's place.
#[derive(Debug, PartialEq, Eq)]
enum Next {
    /// It is ours, made at this revision.
    Lead(i64),
    /// It is ours, but goes with a lease that is not.
    Rebind(i64),
    /// It is free: take it.
    Take,
    /// It is free, but its last holder comes first.
    Pause,
    /// It is somebody else's.
    Follow(String),
}

impl Campaign {
    async fn run(mut self, stop: CancellationToken) {
        let shared = Arc::clone(&self.shared);
        loop {
            let role = shared.role.borrow().clone();
            let wait = match role {
                Role::Deposed(_) => return,
                Role::Leading if shared.standing().trouble.is_none() => LOOK,
                _ => LOOK_OFTEN,
            };
            tokio::select! {
                () = sleep(wait) => {}
                () = stop.cancelled() => break,
            }
            let round = stop.run_until_cancelled(self.round()).await;
            if let Some(Err(error)) = round {
                debug!(%error, "etcd");
            }
        }
        if let Some((lease, _)) = self.lease
            && let Err(error) = shared.client.revoke(lease).await
        {
            warn!(%error, "the lease was not given back; it will run out");
        }
    }

    /// Keeps the lease and looks at the leader's place once.
    async fn round(&mut self) -> Result<(), EtcdError> {
        let outcome = self.attempt().await;
        if outcome.is_err() {
            // What could not be seen does not count as empty.
            self.vacant_since = None;
        }
        let shared = &self.shared;
        let trouble = outcome.as_ref().err().cloned();
        let before = std::mem::replace(&mut shared.standing().trouble, trouble.clone());
        match (&before, &trouble) {
            (None, Some(error)) => warn!(%error, "etcd is lost; a running epoch goes on, a new one waits"),
            (Some(_), None) => info!("etcd is back"),
            _ => {}
        }
        let leads = *shared.role.borrow() == Role::Leading;
        match &outcome {
            Ok(role) => shared.set_role(role.clone()),
            // Whoever leads goes on.
            Err(_) if leads => {}
            Err(error) => shared.set_role(Role::Waiting(error.to_string())),
        }
        outcome.map(|_| ())
    }

    async fn attempt(&mut self) -> Result<Role, EtcdError> {
        let lease = self.hold_lease().await?;
        let shared = Arc::clone(&self.shared);
        let view = shared.look().await?;
        let led = {
            let mut standing = shared.standing();
            standing.last = standing.last.max(view.epoch);
            standing.elected.is_some()
        };
        if view.leader.is_some() {
            self.vacant_since = None;
        }
        let vacant_for = self.vacant_since.map(|since| since.elapsed());
        match next(view.leader.as_ref(), &shared.name, lease, led || vacant_for.is_some_and(|long| long >= VACANCY)) {
            Next::Lead(revision) => self.elected(revision),
            Next::Rebind(revision) => {
                let success = vec![put(&shared.leader_key, &shared.name, lease)];
                let compare = shared.leads(revision).to_vec();
                shared.client.txn(TxnRequest { compare, success, ..Default::default() }).await?;
                self.elected(revision);
            }
            Next::Take => return self.take(lease, led).await,
            Next::Pause => {
                self.vacant_since.get_or_insert_with(Instant::now);
                return Ok(Role::Waiting("nobody leads yet".into()));
            }
            Next::Follow(leader) if led => {
                // No epoch is even asked for any more.
                shared.standing().elected = None;
                warn!(leader, "deposed: another coordinator leads");
                return Ok(Role::Deposed(format!("{leader} does")));
            }
            Next::Follow(leader) => return Ok(Role::Waiting(format!("{leader} leads"))),
        }
        Ok(Role::Leading)
    }

    /// Makes the leader key, if it is still not there.
    async fn take(&mut self, lease: i64, led: bool) -> Result<Role, EtcdError> {
        let shared = &self.shared;
        let compare = vec![equal(&shared.leader_key, CompareTarget::Create, TargetUnion::CreateRevision(0))];
        let success = vec![put(&shared.leader_key, &shared.name, lease)];
        let answer = shared.client.txn(TxnRequest { compare, success, ..Default::default() }).await?;
        match (answer.succeeded, answer.header) {
            (true, Some(header)) => {
                self.elected(header.revision);
                Ok(Role::Leading)
            }
            // Somebody was faster; the next look says who.
            _ if led => Ok(Role::Leading),
            _ => Ok(Role::Waiting("another coordinator was elected just now".into())),
        }
    }

    fn elected(&self, revision: i64) {
        let before = self.shared.standing().elected.replace(revision);
        match before {
            Some(before) if before == revision => {}
            Some(_) => warn!(revision, "etcd had forgotten that this coordinator leads; it leads again"),
            None => info!(revision, "elected"),
        }
    }

    /// Prolongs the lease when it is time, takes out a new one when there is none, and answers with its id.
    async fn hold_lease(&mut self) -> Result<i64, EtcdError> {
        let shared = &self.shared;
        if let Some((id, prolonged)) = self.lease {
            if prolonged.elapsed() < KEEP_ALIVE {
                return Ok(id);
            }
            // Counted from before the call: etcd prolongs it later than that.
            let now = Instant::now();
            if shared.client.keep_alive(id).await? {
                self.lease = Some((id, now));
                return Ok(id);
            }
            info!(lease = id, "etcd does not know the lease any more");
            self.lease = None;
        }
        let now = Instant::now();
        let id = shared.client.grant(LEASE).await?;
        self.lease = Some((id, now));
        let success = vec![put(&shared.member_key, &shared.address, id)];
        shared.client.txn(TxnRequest { success, ..Default::default() }).await?;
        Ok(id)
    }
}

/// What to do, given what the leader key holds. `first`: whether this coordinator may take an empty place now.
fn next(leader: Option<&KeyValue>, name: &str, lease: i64, first: bool) -> Next {
    match leader {
        Some(kv) if kv.value == name.as_bytes() && kv.lease == lease => Next::Lead(kv.create_revision),
        Some(kv) if kv.value == name.as_bytes() => Next::Rebind(kv.create_revision),
        Some(kv) => {
            let name = String::from_utf8_lossy(&kv.value);
            let address = name.split_once(' ').map_or(name.as_ref(), |(_, address)| address);
            Next::Follow(address.chars().take(128).collect())
        }
        None if first => Next::Take,
        None => Next::Pause,
    }
}

fn equal(key: &str, target: CompareTarget, value: TargetUnion) -> Compare {
    // Equality is the default result.
    Compare { result: 0, target: target.into(), key: key.as_bytes().to_vec(), target_union: Some(value) }
}

fn range(key: &str) -> RequestOp {
    let request = RangeRequest { key: key.as_bytes().to_vec() };
    RequestOp { request: Some(request_op::Request::RequestRange(request)) }
}

fn put(key: &str, value: &str, lease: i64) -> RequestOp {
    let request = PutRequest { key: key.as_bytes().to_vec(), value: value.as_bytes().to_vec(), lease };
    RequestOp { request: Some(request_op::Request::RequestPut(request)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held(value: &str, lease: i64) -> KeyValue {
        KeyValue { value: value.into(), lease, create_revision: 7, ..Default::default() }
    }

    #[test]
    fn the_leader_key_alone_decides_who_leads() {
        let place = |leader: Option<&KeyValue>, first| next(leader, "1f 10.0.0.1:7000", 5, first);
        assert_eq!(place(Some(&held("1f 10.0.0.1:7000", 5)), false), Next::Lead(7));
        assert_eq!(place(Some(&held("1f 10.0.0.1:7000", 4)), false), Next::Rebind(7));
        // The same address in another life is somebody else.
        assert_eq!(place(Some(&held("2e 10.0.0.1:7000", 5)), true), Next::Follow("10.0.0.1:7000".into()));
        assert_eq!(place(None, true), Next::Take);
        assert_eq!(place(None, false), Next::Pause);
    }

    #[test]
    fn a_password_is_never_shown() {
        let credentials = Credentials { user: "phalanx".into(), password: "hush".into() };
        let config =
            EtcdConfig { endpoints: Vec::new(), prefix: "/p".into(), tls: None, credentials: Some(credentials) };
        let shown = format!("{config:?}");
        assert!(shown.contains("phalanx") && !shown.contains("hush"), "{shown}");
    }
}
