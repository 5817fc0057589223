//! Calls to etcd: to which member, for how long, under whose name.

use std::{
    fmt,
    future::{Future, ready},
    path::{Path, PathBuf},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures::stream;
use tokio::time::timeout;
use tonic::{
    Code, Request, Response, Status,
    metadata::{Ascii, MetadataValue},
    transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity},
};

use super::wire::{
    AuthenticateRequest, LeaseGrantRequest, LeaseKeepAliveRequest, LeaseRevokeRequest, TxnRequest, TxnResponse,
    auth_client::AuthClient, kv_client::KvClient, lease_client::LeaseClient,
};

/// Longest wait for a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// Longest wait for one member's answer; the next one is asked then.
const CALL_TIMEOUT: Duration = Duration::from_secs(2);

/// Where etcd is and how to speak to it.
#[derive(Clone, Debug)]
pub struct EtcdConfig {
    /// Client addresses of its members, as `http://host:port` or `https://host:port`.
    pub endpoints: Vec<String>,
    /// What all keys begin with. Coordinators of different clusters may share an etcd under different ones.
    pub prefix: String,
    /// For `https` addresses.
    pub tls: Option<EtcdTls>,
    /// For an etcd that asks who is there.
    pub credentials: Option<Credentials>,
}

/// PEM files for a connection that is encrypted.
#[derive(Clone, Debug)]
pub struct EtcdTls {
    /// Certificate of the authority that etcd's certificate comes from.
    pub ca: PathBuf,
    /// This coordinator's own certificate and key, for an etcd that asks for them.
    pub identity: Option<(PathBuf, PathBuf)>,
}

/// A user of etcd.
#[derive(Clone)]
pub struct Credentials {
    /// Name.
    pub user: String,
    /// Password; shown nowhere.
    pub password: String,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials").field("user", &self.user).finish_non_exhaustive()
    }
}

/// What went wrong with etcd.
#[derive(Clone, Debug, thiserror::Error)]
pub enum EtcdError {
    /// What is configured cannot be used.
    #[error("{setting} is {found}, expected {expected}")]
    Setting {
        /// Which setting.
        setting: &'static str,
        /// Its value.
        found: String,
        /// What would do.
        expected: &'static str,
    },
    /// No member answers; this may pass.
    #[error("etcd at {endpoints} cannot be reached: {reason}")]
    Unreachable {
        /// All that were asked.
        endpoints: String,
        /// What the last one said.
        reason: String,
    },
    /// A member answers that it will not do this.
    #[error("etcd at {endpoint} refuses {call}: {reason}")]
    Refused {
        /// Who.
        endpoint: String,
        /// Which call.
        call: &'static str,
        /// Why.
        reason: String,
    },
    /// A key holds what only somebody else can have written.
    #[error("etcd's key {key} holds {found:?}, expected a number; write one above every epoch used so far")]
    Malformed {
        /// The key.
        key: String,
        /// Its beginning.
        found: String,
    },
}

/// Calls etcd's members in turn: the one that answered last is asked first.
pub(super) struct Client {
    members: Vec<(String, Channel)>,
    active: AtomicUsize,
    credentials: Option<Credentials>,
    /// What etcd gave for the credentials. It forgets when it restarts.
    token: Mutex<Option<MetadataValue<Ascii>>>,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("endpoints", &self.endpoints()).finish_non_exhaustive()
    }
}

impl Client {
    /// Prepares the connections; they are made when they are first used.
    ///
    /// # Errors
    /// When an address or a file cannot be used.
    pub(super) async fn new(config: &EtcdConfig) -> Result<Self, EtcdError> {
        if config.endpoints.is_empty() {
            return Err(setting("etcd", "empty", "at least one address"));
        }
        let tls = match &config.tls {
            Some(tls) => Some(tls_config(tls).await?),
            None => None,
        };
        let member = |address: &String| connect(address, tls.clone()).map(|channel| (address.clone(), channel));
        Ok(Self {
            members: config.endpoints.iter().map(member).collect::<Result<_, _>>()?,
            active: AtomicUsize::new(0),
            credentials: config.credentials.clone(),
            token: Mutex::new(None),
        })
    }

    /// Carries out a transaction.
    pub(super) async fn txn(&self, txn: TxnRequest) -> Result<TxnResponse, EtcdError> {
        self.call("a transaction", txn, |channel, txn| async move { KvClient::new(channel).txn(txn).await }).await
    }

    /// Takes out a lease and answers with its id.
    pub(super) async fn grant(&self, ttl: Duration) -> Result<i64, EtcdError> {
        let request = LeaseGrantRequest { ttl: ttl.as_secs() as i64, id: 0 };
        let grant = |channel, request| async move { LeaseClient::new(channel).lease_grant(request).await };
        self.call("a lease", request, grant).await.map(|granted| granted.id)
    }

    /// Prolongs a lease. False: there is no such lease.
    pub(super) async fn keep_alive(&self, id: i64) -> Result<bool, EtcdError> {
        // A stream for each, so that no broken one has to be mended: one every few seconds costs nothing.
        let prolong = |channel, request: Request<LeaseKeepAliveRequest>| async move {
            let request = request.map(|message| stream::once(ready(message)));
            let mut answers = LeaseClient::new(channel).lease_keep_alive(request).await?.into_inner();
            let answer = answers.message().await?;
            answer.map(Response::new).ok_or_else(|| Status::unavailable("it ended the stream without an answer"))
        };
        self.call("to prolong a lease", LeaseKeepAliveRequest { id }, prolong).await.map(|answer| answer.ttl > 0)
    }

    /// Ends a lease and with it the keys that go with it.
    pub(super) async fn revoke(&self, id: i64) -> Result<(), EtcdError> {
        let revoke = |channel, request| async move { LeaseClient::new(channel).lease_revoke(request).await };
        self.call("to end a lease", LeaseRevokeRequest { id }, revoke).await.map(|_| ())
    }

    fn endpoints(&self) -> String {
        let addresses: Vec<&str> = self.members.iter().map(|(address, _)| address.as_str()).collect();
        addresses.join(", ")
    }

    /// Asks one member after the other, until one answers.
    async fn call<M: Clone, R, F>(
        &self,
        call: &'static str,
        message: M,
        send: impl Fn(Channel, Request<M>) -> F,
    ) -> Result<R, EtcdError>
    where
        F: Future<Output = Result<Response<R>, Status>>,
    {
        let mut reason = String::new();
        for _ in &self.members {
            let index = self.active.load(Ordering::Relaxed) % self.members.len();
            let (endpoint, channel) = &self.members[index];
            match self.call_member(channel, &message, &send).await {
                Ok(answer) => return Ok(answer),
                Err(status) if is_refusal(status.code()) => {
                    let reason = with_sources(&status);
                    return Err(EtcdError::Refused { endpoint: endpoint.clone(), call, reason });
                }
                Err(status) => reason = with_sources(&status),
            }
            self.active.store(index + 1, Ordering::Relaxed);
        }
        Err(EtcdError::Unreachable { endpoints: self.endpoints(), reason })
    }

    async fn call_member<M: Clone, R, F>(
        &self,
        channel: &Channel,
        message: &M,
        send: &impl Fn(Channel, Request<M>) -> F,
    ) -> Result<R, Status>
    where
        F: Future<Output = Result<Response<R>, Status>>,
    {
        let once = async || {
            let mut request = Request::new(message.clone());
            if let Some(token) = self.token(channel).await? {
                request.metadata_mut().insert("token", token);
            }
            in_time(send(channel.clone(), request)).await
        };
        match once().await {
            Err(status) if self.credentials.is_some() && is_stale_token(&status) => {
                *self.token.lock().unwrap_or_else(PoisonError::into_inner) = None;
                once().await
            }
            outcome => outcome,
        }
    }

    /// The token for the credentials, if there are any.
    async fn token(&self, channel: &Channel) -> Result<Option<MetadataValue<Ascii>>, Status> {
        let Some(Credentials { user, password }) = &self.credentials else { return Ok(None) };
        let known = self.token.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if known.is_some() {
            return Ok(known);
        }
        let request = AuthenticateRequest { name: user.clone(), password: password.clone() };
        let answer = match in_time(AuthClient::new(channel.clone()).authenticate(request)).await {
            // An etcd that asks nobody who is there; so does one that has lost its data.
            Err(status) if status.message().contains("authentication is not enabled") => return Ok(None),
            answer => answer?,
        };
        let token = MetadataValue::try_from(answer.token.as_str());
        let token = token.map_err(|_| Status::unavailable("its token cannot be sent back"))?;
        Ok(self.token.lock().unwrap_or_else(PoisonError::into_inner).insert(token).clone().into())
    }
}

async fn in_time<R>(call: impl Future<Output = Result<Response<R>, Status>>) -> Result<R, Status> {
    let silent = |_| Status::deadline_exceeded(format!("no answer within {} s", CALL_TIMEOUT.as_secs()));
    timeout(CALL_TIMEOUT, call).await.map_err(silent)?.map(Response::into_inner)
}

/// Whether another member would answer the same.
fn is_refusal(code: Code) -> bool {
    matches!(
        code,
        Code::InvalidArgument
            | Code::PermissionDenied
            | Code::Unauthenticated
            | Code::FailedPrecondition
            | Code::Unimplemented
            | Code::OutOfRange
    )
}

/// Whether a new token may help: etcd has restarted, or its users have changed.
fn is_stale_token(status: &Status) -> bool {
    status.code() == Code::Unauthenticated || status.message().contains("revision of auth store is old")
}

/// tonic says "transport error"; what matters is beneath. Some layers only repeat the one below.
fn with_sources(status: &Status) -> String {
    let sources = std::iter::successors(std::error::Error::source(status), |error| error.source());
    sources.map(ToString::to_string).fold(status.message().to_owned(), |text, source| match text.contains(&source) {
        true => text,
        false => format!("{text}: {source}"),
    })
}

fn connect(address: &str, tls: Option<ClientTlsConfig>) -> Result<Channel, EtcdError> {
    let wrong = |expected| setting("etcd", format!("{address:?}"), expected);
    let endpoint = Endpoint::from_shared(address.to_owned()).map_err(|_| wrong("http://host:port"))?;
    let endpoint = endpoint.connect_timeout(CONNECT_TIMEOUT).tcp_nodelay(true);
    match (endpoint.uri().scheme_str(), tls) {
        (Some("http"), _) => Ok(endpoint.connect_lazy()),
        (Some("https"), None) => Err(wrong("--etcd-ca with an https address")),
        (Some("https"), Some(tls)) => match endpoint.tls_config(tls) {
            Ok(endpoint) => Ok(endpoint.connect_lazy()),
            Err(_) => Err(wrong("certificates and a key in PEM form")),
        },
        _ => Err(wrong("http://host:port or https://host:port")),
    }
}

async fn tls_config(tls: &EtcdTls) -> Result<ClientTlsConfig, EtcdError> {
    let config = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(read("etcd-ca", &tls.ca).await?));
    let Some((certificate, key)) = &tls.identity else { return Ok(config) };
    let identity = Identity::from_pem(read("etcd-cert", certificate).await?, read("etcd-key", key).await?);
    Ok(config.identity(identity))
}

async fn read(flag: &'static str, path: &Path) -> Result<Vec<u8>, EtcdError> {
    let unreadable = |error| setting(flag, format!("{}: {error}", path.display()), "a readable file in PEM form");
    tokio::fs::read(path).await.map_err(unreadable)
}

fn setting(setting: &'static str, found: impl Into<String>, expected: &'static str) -> EtcdError {
    EtcdError::Setting { setting, found: found.into(), expected }
}
