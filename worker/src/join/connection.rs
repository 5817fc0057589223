//! Dialling the coordinator.

use std::time::Duration;

use phalanx_proto::{
    fault::Fault,
    tls,
    v1::{self, cluster_client::ClusterClient, worker_event::Event},
};
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint};
use tracing::debug;

use super::Ground;
use crate::config::Config;

/// A coordinator's private door.
pub(super) type Client = ClusterClient<Channel>;

/// Longest wait for a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// Together 10 s: how long a silent coordinator goes unnoticed. Shorter ones gave false alarms on loaded machines.
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(5);
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(5);
/// Largest plan or result: many prompts of a full context at 3 bytes a token, or their log-probabilities.
const MAX_MESSAGE_BYTES: usize = 256 << 20;
/// Flow control lets one large plan through without waiting for the other side.
const WINDOW_BYTES: u32 = 4 << 20;
/// Longest wait for a coordinator to take the reason why there will be no worker.
const REPORT_TIMEOUT: Duration = Duration::from_secs(3);

/// Connects to a coordinator.
pub(super) async fn dial(ground: &Ground, config: &Config, coordinator: &str) -> Result<Client, String> {
    let endpoint = Endpoint::from(config.uri(coordinator)?)
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(KEEP_ALIVE_INTERVAL)
        .keep_alive_timeout(KEEP_ALIVE_TIMEOUT)
        .keep_alive_while_idle(true)
        .initial_stream_window_size(WINDOW_BYTES)
        .initial_connection_window_size(2 * WINDOW_BYTES);
    let secured = match &config.tls {
        Some(identity) => identity.secure(endpoint),
        None => Ok(endpoint),
    };
    let connected = async { (ground.dial)(secured?).await };
    let channel = connected.await.map_err(|error| with_sources(&error))?;
    let client = ClusterClient::new(channel);
    Ok(client.max_decoding_message_size(MAX_MESSAGE_BYTES).max_encoding_message_size(MAX_MESSAGE_BYTES))
}

/// tonic says "transport error"; what matters is beneath.
fn with_sources(error: &dyn std::error::Error) -> String {
    let sources = std::iter::successors(error.source(), |error| error.source());
    let text = sources.fold(error.to_string(), |text, source| format!("{text}: {source}"));
    match tls::advice(error) {
        Some(advice) => format!("{text}; {advice}"),
        None => text,
    }
}

/// Tells the coordinator that leads why this worker will not join. Once, and only if it can be reached.
pub(super) async fn report(ground: &Ground, config: &Config, fault: &Fault) {
    for coordinator in &config.coordinators {
        if report_to(ground, config, coordinator, fault).await {
            return;
        }
    }
}

/// Whether this coordinator took the fault.
async fn report_to(ground: &Ground, config: &Config, coordinator: &str, fault: &Fault) -> bool {
    let hello = v1::Hello {
        deployment: config.deployment.clone(),
        backend: config.backend.name().to_owned(),
        wanted_rank: config.rank,
        ..Default::default()
    };
    let telling = async {
        let mut client = dial(ground, config, coordinator).await?;
        let events = [Event::Hello(hello), fault_event(0, fault)].map(|event| v1::WorkerEvent { event: Some(event) });
        let attached = client.attach(tokio_stream::iter(events)).await.map_err(|status| status.to_string())?;
        let mut commands = attached.into_inner();
        // The stream ends when the coordinator has read ours to its end.
        while let Ok(Some(_)) = commands.message().await {}
        Ok::<(), String>(())
    };
    let outcome = timeout(REPORT_TIMEOUT, telling).await;
    match &outcome {
        Ok(Ok(())) => {}
        Ok(Err(reason)) => debug!(coordinator, reason, "the coordinator was not told of the fault"),
        Err(_) => debug!(coordinator, "the coordinator did not take the fault in time"),
    }
    matches!(outcome, Ok(Ok(())))
}

/// A fault as an event; `epoch` 0 is none.
pub(super) fn fault_event(epoch: u64, fault: &Fault) -> Event {
    Event::Fault(v1::WorkerFault { epoch, kind: fault.kind.name().to_owned(), message: fault.message.clone() })
}

/// Opens the step log of one epoch and feeds its plans to the device until either side ends it.
pub(super) async fn follow_steps(
    mut client: Client,
    results: tokio::sync::mpsc::Receiver<v1::StepMessage>,
    plans: tokio::sync::mpsc::Sender<v1::Plan>,
) -> Result<(), tonic::Status> {
    let mut log = client.steps(ReceiverStream::new(results)).await?.into_inner();
    while let Some(plan) = log.message().await? {
        if plans.send(plan).await.is_err() {
            break;
        }
    }
    Ok(())
}
