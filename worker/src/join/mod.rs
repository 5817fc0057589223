//! Joins a coordinator, one of several perhaps, and does what it says for as long as it lives.
//!
//! The worker decides nothing. It keeps its weights when the coordinator goes away and offers them to the next one; it
//! accepts an epoch only if that is greater than any it has seen and meant for this process.
//!
//! | file | holds |
//! | --- | --- |
//! | `worker` | what outlives a connection: checkpoint, device thread, resident shard, highest epoch |
//! | `connection` | dialling, and telling a coordinator why there will be no worker |
//! | `session` | one attachment to a coordinator: its commands and the device's events |

mod connection;
mod session;
mod worker;

use std::{pin::Pin, sync::Arc, time::Duration};

use phalanx_proto::{checkpoint::Checkpoint, fault::Fault};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Endpoint, Error};
use tracing::{info, warn};

use self::{
    session::{End, Session},
    worker::Worker,
};
use crate::{config::Config, executor::Device};

/// Wait before dialling again, doubled with each failure.
const FIRST_BACKOFF: Duration = Duration::from_millis(100);
/// Longest wait before dialling again.
const LONGEST_BACKOFF: Duration = Duration::from_secs(2);

/// A connection under way.
pub type Dialling = Pin<Box<dyn Future<Output = Result<Channel, Error>> + Send>>;

/// What a worker stands on: the network and the device. Tests put simulated ones in their place.
#[derive(Clone)]
pub struct Ground {
    /// Connects to an endpoint.
    pub dial: Arc<dyn Fn(Endpoint) -> Dialling + Send + Sync>,
    /// Starts the device for a checkpoint, with the bytes that weights and KV cache may take.
    #[allow(clippy::type_complexity, reason = "it is named by this field")]
    pub device: Arc<dyn Fn(&Config, Checkpoint, u64) -> Result<Device, Fault> + Send + Sync>,
}

impl Default for Ground {
    /// The system's network and the device that the configuration names.
    fn default() -> Self {
        let dial = |endpoint: Endpoint| -> Dialling { Box::pin(async move { endpoint.connect().await }) };
        Self { dial: Arc::new(dial), device: Arc::new(worker::start_device) }
    }
}

/// Runs a worker until it is told to leave or `shutdown` is cancelled.
///
/// # Errors
/// When the configuration, the checkpoint or the device cannot be used, or loading fails. The coordinator is told the
/// reason, if it can be reached.
pub async fn run(config: Config, shutdown: CancellationToken) -> anyhow::Result<()> {
    run_on(Ground::default(), config, shutdown).await
}

/// Like [`run`], on another ground.
///
/// # Errors
/// Like [`run`].
pub async fn run_on(ground: Ground, config: Config, shutdown: CancellationToken) -> anyhow::Result<()> {
    let outcome = shutdown.run_until_cancelled(work(&ground, &config)).await;
    Ok(outcome.unwrap_or(Ok(()))?)
}

async fn work(ground: &Ground, config: &Config) -> Result<(), Fault> {
    let mut worker = match open(ground, config).await {
        Ok(worker) => worker,
        Err(fault) => {
            connection::report(ground, config, &fault).await;
            return Err(fault);
        }
    };
    let (mut turn, mut failures, mut backoff) = (0, 0, FIRST_BACKOFF);
    loop {
        let coordinator = &config.coordinators[turn % config.coordinators.len()];
        let end = match connection::dial(ground, config, coordinator).await {
            Err(reason) => End::Refused(reason),
            Ok(client) => Session::attach(&mut worker, client).await?,
        };
        let reason = match end {
            End::Left(reason) if config.coordinators.len() == 1 => {
                info!(reason, "told to leave");
                return Ok(());
            }
            // Of several coordinators, another one takes over from the one that shuts down.
            End::Left(reason) | End::Lost(reason) => {
                (failures, backoff) = (0, FIRST_BACKOFF);
                reason
            }
            End::Refused(reason) => reason,
        };
        (turn, failures) = (turn + 1, failures + 1);
        // Everyone is asked once before anyone is asked again.
        if failures % config.coordinators.len() > 0 {
            info!(coordinator, reason, "trying the next coordinator");
            continue;
        }
        let retry_ms = backoff.as_millis() as u64;
        warn!(coordinator, reason, retry_ms, "no coordinator");
        sleep(backoff).await;
        backoff = LONGEST_BACKOFF.min(backoff * 2);
    }
}

async fn open(ground: &Ground, config: &Config) -> Result<Worker, Fault> {
    config.check()?;
    let (opening, device) = (config.clone(), Arc::clone(&ground.device));
    // Reading headers and the tokenizer blocks.
    let opened = tokio::task::spawn_blocking(move || Worker::open(&opening, &*device)).await;
    opened.unwrap_or_else(|error| Err(worker::bug(format!("opening the checkpoint: {error}"))))
}
