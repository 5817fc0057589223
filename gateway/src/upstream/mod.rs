//! The coordinator as the gateway sees it: what it serves and how it fares, and one stream of tokens per choice.
//!
//! - `fleet`: the state that a standing `Watch` keeps fresh;
//! - `generation`: one `Generate` stream that outlives the loss of its coordinator;
//! - here: connections, and which of several coordinators is used.

mod fleet;
mod generation;

use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicUsize, Ordering},
    },
    time::Duration,
};

use phalanx_proto::{
    fault::{Fault, FaultKind},
    trace,
    v1::{Capacity, GenerateEvent, GenerateRequest, WatchRequest, inference_client::InferenceClient},
};
use tokio::{sync::watch, time::timeout};
use tokio_util::sync::CancellationToken;
use tonic::{
    Request, Streaming,
    transport::{Channel, Endpoint},
};
use tracing::{Span, info, warn};

use crate::config::{Config, Timeouts};
pub(crate) use fleet::{Fleet, state_name};
pub(crate) use generation::Generation;

/// Answers of the coordinator are small but for log-probabilities of a whole prompt, in bytes.
const MAX_MESSAGE_BYTES: usize = 64 << 20;
/// Pings that find out that a coordinator no longer answers. Seconds, since a loaded machine answers late.
const PING: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(5));
/// First and longest pause between attempts.
const PAUSE: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));

/// Connections to the coordinators.
pub(crate) struct Upstream {
    clients: Vec<InferenceClient<Channel>>,
    /// The one in use.
    active: AtomicUsize,
    fleet: watch::Sender<Fleet>,
    budget: RetryBudget,
    timeouts: Timeouts,
    resumes: u32,
}

impl Upstream {
    /// Prepares the connections; they are made when they are first used.
    ///
    /// # Errors
    /// When an address is malformed.
    pub(crate) fn new(config: &Config) -> Result<Self, tonic::transport::Error> {
        let client_of = |address: &String| {
            let endpoint = Endpoint::from_shared(address.clone())?
                .connect_timeout(config.timeouts.connect)
                .http2_keep_alive_interval(PING.0)
                .keep_alive_timeout(PING.1)
                .keep_alive_while_idle(true)
                .tcp_nodelay(true);
            let endpoint = match &config.coordinator_tls {
                Some(identity) => identity.secure(endpoint)?,
                None => endpoint,
            };
            Ok(InferenceClient::new(endpoint.connect_lazy()).max_decoding_message_size(MAX_MESSAGE_BYTES))
        };
        Ok(Self {
            clients: config.coordinators.iter().map(client_of).collect::<Result<_, tonic::transport::Error>>()?,
            active: AtomicUsize::new(0),
            fleet: watch::Sender::new(Fleet::new(config.coordinators.len() > 1)),
            budget: RetryBudget::default(),
            timeouts: config.timeouts.clone(),
            resumes: config.limits.resumes,
        })
    }

    /// What the coordinator said last.
    pub(crate) fn fleet(&self) -> Fleet {
        self.fleet.borrow().clone()
    }

    /// Waits until something can be generated.
    pub(crate) async fn became_ready(&self) {
        // The sender lives as long as `self`, so waiting ends only with a group that is ready.
        let _ = self.fleet.subscribe().wait_for(Fleet::is_ready).await;
    }

    /// Keeps a `Watch` open until `shutdown`, at the next coordinator when one is lost.
    pub(crate) async fn follow(self: Arc<Self>, shutdown: CancellationToken) {
        let mut pause = Pause::default();
        loop {
            let fault = tokio::select! {
                () = shutdown.cancelled() => return,
                fault = self.follow_one(&mut pause) => fault,
            };
            if self.fleet.borrow().reachable {
                warn!(error = %fault, "coordinator lost");
            }
            self.fleet.send_modify(|fleet| fleet.lost(&fault));
            self.active.store((self.active_index() + 1) % self.clients.len().max(1), Ordering::Relaxed);
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = pause.wait() => {}
            }
        }
    }

    async fn follow_one(&self, pause: &mut Pause) -> Fault {
        let mut client = match self.client() {
            Ok(client) => client,
            Err(fault) => return fault,
        };
        let request = WatchRequest { interval_ms: 0 };
        let mut stream = match timeout(self.timeouts.stall, client.watch(request)).await {
            Ok(Ok(response)) => response.into_inner(),
            Ok(Err(status)) => return Fault::from(&status),
            Err(_) => return silent("watch", self.timeouts.stall),
        };
        loop {
            match stream.message().await {
                Ok(Some(capacity)) => {
                    *pause = Pause::default();
                    self.learn(capacity);
                }
                Ok(None) => return Fault::new(FaultKind::NotReady, "the coordinator ended its watch stream"),
                Err(status) => return Fault::from(&status),
            }
        }
    }

    fn learn(&self, capacity: Capacity) {
        let was_ready = self.fleet.borrow().is_ready();
        self.fleet.send_modify(|fleet| fleet.learn(capacity));
        let is_ready = self.fleet.borrow().is_ready();
        if is_ready != was_ready {
            info!(ready = is_ready, "coordinator state");
        }
    }

    fn active_index(&self) -> usize {
        self.active.load(Ordering::Relaxed)
    }

    fn client(&self) -> Result<InferenceClient<Channel>, Fault> {
        let client = self.clients.get(self.active_index()).cloned();
        client.ok_or_else(|| Fault::new(FaultKind::NotReady, "no coordinator is configured"))
    }

    /// Opens one stream of tokens, without any retry.
    async fn generate(&self, request: GenerateRequest, span: &Span) -> Result<Streaming<GenerateEvent>, Fault> {
        let mut request = Request::new(request);
        trace::inject(span, request.metadata_mut());
        match timeout(self.timeouts.stall, self.client()?.generate(request)).await {
            Ok(Ok(response)) => Ok(response.into_inner()),
            Ok(Err(status)) => Err(Fault::from(&status)),
            Err(_) => Err(silent("generate", self.timeouts.stall)),
        }
    }

    /// Waits until a group is ready, as long as that may be soon: not while the first one still loads.
    async fn ready(&self, wait: Duration) -> Result<(), Fault> {
        let mut fleet = self.fleet.subscribe();
        let decided = fleet.wait_for(|fleet| fleet.is_ready() || !fleet.may_be_ready_soon());
        match timeout(wait, decided).await {
            Ok(Ok(fleet)) if fleet.is_ready() => Ok(()),
            _ => Err(self.fleet.borrow().not_ready()),
        }
    }
}

fn silent(call: &str, waited: Duration) -> Fault {
    Fault::new(FaultKind::NotReady, format!("the coordinator did not answer {call} for {} s", waited.as_secs()))
}

/// Pauses between attempts that grow until something works.
struct Pause(Duration);

impl Default for Pause {
    fn default() -> Self {
        Self(PAUSE.0)
    }
}

impl Pause {
    async fn wait(&mut self) {
        tokio::time::sleep(self.0).await;
        self.0 = (self.0 * 2).min(PAUSE.1);
    }
}

/// Lets one request in ten be tried again, so that retries never become the load.
struct RetryBudget {
    /// Tenths of a retry.
    tenths: AtomicU32,
}

impl RetryBudget {
    const COST: u32 = 10;
    const MOST: u32 = 1000;

    /// Counts a request.
    fn deposit(&self) {
        let add = |tenths: u32| Some((tenths + 1).min(Self::MOST));
        let _always_some = self.tenths.fetch_update(Ordering::Relaxed, Ordering::Relaxed, add);
    }

    /// Takes a retry, if there is one left.
    fn withdraw(&self) -> bool {
        let take = |tenths: u32| tenths.checked_sub(Self::COST);
        self.tenths.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).is_ok()
    }
}

impl Default for RetryBudget {
    /// Ten retries, so that a gateway that just started can retry at all.
    fn default() -> Self {
        Self { tenths: AtomicU32::new(10 * Self::COST) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_request_in_ten_may_be_retried() {
        let budget = RetryBudget::default();
        let retries = (0..1000).filter(|_| {
            budget.deposit();
            budget.withdraw()
        });
        assert_eq!(retries.count(), 10 + 1000 / 10);
    }
}
