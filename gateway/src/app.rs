//! What all handlers share.

use std::{
    sync::Arc,
    time::{Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::Context as _;
use phalanx_proto::v1::DeploymentLoad;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;

use crate::{
    config::Config,
    harmony::Harmony,
    instruments::Instruments,
    openai::error::ApiError,
    stats::Stats,
    tokenizer::Tokenizer,
    upstream::{Fleet, Upstream},
};

/// The state of one gateway.
pub(crate) struct App {
    pub(crate) config: Config,
    pub(crate) harmony: Harmony,
    pub(crate) upstream: Arc<Upstream>,
    pub(crate) instruments: Arc<Instruments>,
    pub(crate) stats: Arc<Stats>,
    /// Requests that may still begin.
    slots: Arc<Semaphore>,
    /// Cancelled when the gateway takes nothing new.
    pub(crate) draining: CancellationToken,
    /// Cancelled when what still runs must end.
    pub(crate) deadline: CancellationToken,
    /// Seconds since 1970.
    pub(crate) started: u64,
}

/// A model that a request may use.
#[derive(Clone, Debug)]
pub(crate) struct Served {
    /// The name that was asked for, or the first one.
    pub(crate) name: String,
    pub(crate) load: DeploymentLoad,
}

impl App {
    /// Loads the tokenizer and prepares the connections.
    ///
    /// # Errors
    /// When configuration or tokenizer cannot be used.
    pub(crate) async fn new(config: Config, draining: CancellationToken) -> anyhow::Result<Self> {
        config.validate()?;
        let path = config.model_dir.join("tokenizer.json");
        let tokenizer = tokio::task::spawn_blocking(move || Tokenizer::from_file(&path)).await??;
        Ok(Self {
            harmony: Harmony::new(Arc::new(tokenizer))?,
            upstream: Arc::new(Upstream::new(&config).context("coordinator address")?),
            instruments: Arc::new(Instruments::new(config.vllm_metrics)),
            stats: Arc::new(Stats::new(Instant::now())?),
            slots: Arc::new(Semaphore::new(config.limits.requests.min(Semaphore::MAX_PERMITS))),
            draining,
            deadline: CancellationToken::new(),
            started: unix_seconds(),
            config,
        })
    }

    /// A place among the running requests, held until it is dropped.
    ///
    /// # Errors
    /// 429 when all are taken, 503 when the gateway is leaving.
    pub(crate) fn admit(&self) -> Result<OwnedSemaphorePermit, ApiError> {
        if self.draining.is_cancelled() {
            return Err(ApiError::unavailable("draining", "The gateway is shutting down; try another one."));
        }
        let most = self.config.limits.requests;
        let full = |_| ApiError::too_many_requests(format!("{most} requests are running already; try again soon."));
        Arc::clone(&self.slots).try_acquire_owned().map_err(full)
    }

    /// The name that labels and lists show, when it is not the coordinator's.
    pub(crate) fn served_as(&self) -> Option<&str> {
        self.config.served_names.first().map(String::as_str)
    }

    /// The model that a request means; without a name, the first one.
    ///
    /// # Errors
    /// 404 for an unknown name, 503 while nothing is known of any model.
    pub(crate) fn model(&self, asked: Option<&str>) -> Result<Served, ApiError> {
        let fleet = self.upstream.fleet();
        let Some(first) = fleet.deployments.first() else {
            return Err(ApiError::unavailable("not_ready", capitalized(&fleet.not_ready().message)));
        };
        let Some(asked) = asked else {
            let name = self.names(&fleet).into_iter().next().unwrap_or_default();
            return Ok(Served { name, load: first.clone() });
        };
        let found = if self.config.served_names.iter().any(|name| is_same_model(name, asked)) {
            Some(first)
        } else {
            fleet.deployments.iter().find(|load| is_same_model(model_of(load), asked))
        };
        match found {
            Some(load) => Ok(Served { name: asked.to_owned(), load: load.clone() }),
            None => Err(ApiError::model_not_found(asked, &self.names(&fleet))),
        }
    }

    /// The names to show: the configured ones, else the coordinator's.
    pub(crate) fn names(&self, fleet: &Fleet) -> Vec<String> {
        if !self.config.served_names.is_empty() {
            return self.config.served_names.clone();
        }
        fleet.deployments.iter().map(|load| model_of(load).to_owned()).collect()
    }
}

fn model_of(load: &DeploymentLoad) -> &str {
    load.deployment.as_ref().map_or("", |deployment| &deployment.model)
}

/// `gpt-oss-20b` and `openai/gpt-oss-20b` are one model.
fn is_same_model(left: &str, right: &str) -> bool {
    let short = |name: &'_ str| name.strip_prefix("openai/").unwrap_or(name).to_owned();
    short(left) == short(right)
}

/// Messages to people begin with a capital letter and end with a full stop; faults do neither.
pub(crate) fn capitalized(text: &str) -> String {
    let mut characters = text.chars();
    let first = characters.next().map(|first| first.to_uppercase().to_string()).unwrap_or_default();
    let end = if text.ends_with('.') { "" } else { "." };
    format!("{first}{}{end}", characters.as_str())
}

/// Now, in seconds since 1970.
pub(crate) fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}
