//! What all handlers share.

use std::{
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::Context as _;
use phalanx_proto::v1::DeploymentLoad;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;

use crate::{
    access::{Access, Tenant},
    config::Config,
    harmony::Harmony,
    instruments::Instruments,
    openai::error::ApiError,
    shared_page::SharedPage,
    stats::Stats,
    tokenizer::Tokenizer,
    upstream::{Fleet, Upstream},
};

/// The state of one gateway.
pub(crate) struct App {
    pub(crate) config: Config,
    pub(crate) access: Access,
    pub(crate) harmony: Harmony,
    pub(crate) upstream: Arc<Upstream>,
    pub(crate) instruments: Arc<Instruments>,
    pub(crate) metrics_page: SharedPage,
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
    /// Loads keys and tokenizer and prepares the connections.
    ///
    /// # Errors
    /// When configuration, keys or tokenizer cannot be used.
    pub(crate) async fn new(config: Config, draining: CancellationToken) -> anyhow::Result<Self> {
        config.validate()?;
        let access = Access::load(config.keys.clone()).await?;
        let path = config.model_dir.join("tokenizer.json");
        let tokenizer = tokio::task::spawn_blocking(move || Tokenizer::from_file(&path)).await??;
        Ok(Self {
            access,
            harmony: Harmony::new(Arc::new(tokenizer))?,
            upstream: Arc::new(Upstream::new(&config).context("coordinator address")?),
            instruments: Arc::new(Instruments::new(config.vllm_metrics)),
            metrics_page: SharedPage::default(),
            stats: Arc::new(Stats::new(Instant::now())?),
            slots: Arc::new(Semaphore::new(config.limits.requests.min(Semaphore::MAX_PERMITS))),
            draining,
            deadline: CancellationToken::new(),
            started: unix_seconds(),
            config,
        })
    }

    /// A place among the running requests, held until it is dropped. Asked for before anything that costs time, so that
    /// a refusal is fast however great the load.
    ///
    /// # Errors
    /// 429 when all are taken or the coordinator's queue is known to be full, 503 when the gateway is leaving.
    pub(crate) fn admit(&self) -> Result<OwnedSemaphorePermit, ApiError> {
        if self.draining.is_cancelled() {
            return Err(ApiError::unavailable("draining", "The gateway is shutting down; try another one."));
        }
        if let Some(wait) = full_queue(&self.upstream.fleet()) {
            let text = "The server has as many requests waiting as it accepts; try again soon.";
            return Err(ApiError::too_many_requests(text).retry_after(Some(wait)));
        }
        let most = self.config.limits.requests;
        let full = |_| ApiError::too_many_requests(format!("{most} requests are running already; try again soon."));
        Arc::clone(&self.slots).try_acquire_owned().map_err(full)
    }

    /// The name that labels and lists show, when it is not the coordinator's.
    pub(crate) fn served_as(&self) -> Option<&str> {
        self.config.served_names.first().map(String::as_str)
    }

    /// The model that a request means; without a name, the first one that its key may use.
    ///
    /// # Errors
    /// 404 for an unknown name, 403 for a model that the key may not use, 503 while nothing is known of any model.
    pub(crate) fn model(&self, asked: Option<&str>, tenant: Option<&Tenant>) -> Result<Served, ApiError> {
        let fleet = self.upstream.fleet();
        if fleet.deployments.is_empty() {
            return Err(ApiError::unavailable("not_ready", capitalized(&fleet.not_ready().message)));
        }
        let allowed = self.names_for(&fleet, tenant);
        let name = asked.or(allowed.first().map(String::as_str));
        let Some(name) = name else {
            let first = self.names(&fleet).into_iter().next().unwrap_or_default();
            return Err(ApiError::model_not_allowed(&first));
        };
        let Some(load) = self.find(&fleet, name) else {
            return Err(ApiError::model_not_found(name, &allowed));
        };
        if tenant.is_some_and(|tenant| !tenant.may_use(name)) {
            return Err(ApiError::model_not_allowed(name));
        }
        Ok(Served { name: name.to_owned(), load: load.clone() })
    }

    fn find<'f>(&self, fleet: &'f Fleet, name: &str) -> Option<&'f DeploymentLoad> {
        if self.config.served_names.iter().any(|served| is_same_model(served, name)) {
            return fleet.deployments.first();
        }
        fleet.deployments.iter().find(|load| is_same_model(model_of(load), name))
    }

    /// The names to show to the owner of a key.
    pub(crate) fn names_for(&self, fleet: &Fleet, tenant: Option<&Tenant>) -> Vec<String> {
        let mut names = self.names(fleet);
        names.retain(|name| tenant.is_none_or(|tenant| tenant.may_use(name)));
        names
    }

    /// All names: the configured ones, else the coordinator's.
    pub(crate) fn names(&self, fleet: &Fleet) -> Vec<String> {
        if !self.config.served_names.is_empty() {
            return self.config.served_names.clone();
        }
        fleet.deployments.iter().map(|load| model_of(load).to_owned()).collect()
    }
}

/// When a place in the queue is likely free, if every group said last that it takes nothing more. A coordinator says so
/// up to ten times a second; until it does, it refuses by itself.
fn full_queue(fleet: &Fleet) -> Option<Duration> {
    let soonest = fleet.deployments.iter().map(|load| load.retry_after_ms).min()?;
    // 0 says that there is a place now.
    (fleet.is_ready() && soonest > 0).then(|| Duration::from_millis(soonest))
}

fn model_of(load: &DeploymentLoad) -> &str {
    load.deployment.as_ref().map_or("", |deployment| &deployment.model)
}

/// `gpt-oss-20b` and `openai/gpt-oss-20b` are one model.
pub(crate) fn is_same_model(left: &str, right: &str) -> bool {
    fn short(name: &str) -> &str {
        name.strip_prefix("openai/").unwrap_or(name)
    }
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
