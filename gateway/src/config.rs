//! The gateway's configuration, with a named maximum for everything that could grow or wait.

use std::{path::PathBuf, sync::Arc, time::Duration};

use phalanx_proto::tls::Identity;
use tokio::sync::Notify;

pub use crate::date::CurrentDate;
use crate::profiles::Profiles;
pub use crate::{
    access::{Digest, KeyError, KeySource, NotAKey, new_key},
    tls::TlsFiles,
};

/// Under which names reasoning is sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ReasoningField {
    /// `reasoning` and `reasoning_content`.
    #[default]
    Both,
    /// `reasoning` only.
    Reasoning,
    /// `reasoning_content` only.
    ReasoningContent,
}

impl std::str::FromStr for ReasoningField {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "both" => Ok(Self::Both),
            "reasoning" => Ok(Self::Reasoning),
            "reasoning_content" => Ok(Self::ReasoningContent),
            other => {
                Err(ConfigError(format!("reasoning field {other:?} is not `both`, `reasoning` or `reasoning_content`")))
            }
        }
    }
}

/// A configuration that cannot be used; every reason in one message.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ConfigError(pub(crate) String);

/// Largest sizes and counts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of a request's body.
    pub body_bytes: usize,
    /// Open connections; more are refused with 503.
    pub connections: usize,
    /// Requests that are generating or waiting; more are refused with 429.
    pub requests: usize,
    /// Events of one stream that its client has not read yet.
    pub stream_events: usize,
    /// HTTP/2 streams of one connection.
    pub http2_streams: u32,
    /// Times that one request's generation is taken up again after a fault.
    pub resumes: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            body_bytes: 4 << 20,
            connections: 16_384,
            requests: 4096,
            stream_events: 256,
            http2_streams: 256,
            resumes: 3,
        }
    }
}

/// Longest waits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// Until a request's header is whole; also the idle time of a connection.
    pub header: Duration,
    /// Until a request's body is whole.
    pub body: Duration,
    /// Until the coordinator is connected.
    pub connect: Duration,
    /// How long a new request waits for a coordinator that was ready before.
    pub ready: Duration,
    /// How long a stream may stand still because of faults before it is given up.
    pub stall: Duration,
    /// How long a client may leave its stream unread.
    pub unread: Duration,
    /// Idle time after which a stream gets a comment.
    pub keep_alive: Duration,
    /// A whole request whose client names no time of its own.
    pub request: Duration,
    /// How long running requests may go on after the shutdown began.
    pub drain: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            header: Duration::from_secs(10),
            body: Duration::from_secs(30),
            connect: Duration::from_secs(3),
            ready: Duration::from_secs(20),
            stall: Duration::from_secs(120),
            unread: Duration::from_secs(30),
            keep_alive: Duration::from_secs(10),
            request: Duration::from_secs(3600),
            drain: Duration::from_secs(30),
        }
    }
}

/// Everything that a gateway is told.
#[derive(Clone, Debug)]
pub struct Config {
    /// Addresses of coordinators, as `http://host:port`, or `https://host:port` with `coordinator_tls`; the first that
    /// answers is used, the others when it is lost.
    pub coordinators: Vec<String>,
    /// Certificate to show to coordinators, which must show one of the same authority. Absent: plain connections.
    pub coordinator_tls: Option<Arc<Identity>>,
    /// Directory with the model's `tokenizer.json`.
    pub model_dir: PathBuf,
    /// Names under which the model is served, the first of which is shown. Empty: the coordinator's name.
    pub served_names: Vec<String>,
    /// Which date the model is told.
    pub current_date: CurrentDate,
    /// Under which names reasoning is sent.
    pub reasoning_field: ReasoningField,
    /// Named settings.
    pub profiles: Profiles,
    /// Seed of requests that name none. Absent: each draws its own.
    pub seed: Option<i64>,
    /// Whether metrics are also given under vLLM's names.
    pub vllm_metrics: bool,
    /// Largest sizes and counts.
    pub limits: Limits,
    /// Longest waits.
    pub timeouts: Timeouts,
    /// Who may ask.
    pub keys: KeySource,
    /// Certificate of the HTTP door. Absent: plain HTTP.
    pub tls: Option<TlsFiles>,
    /// Notified when the files of keys and certificates are to be read again.
    pub reload: Arc<Notify>,
    /// Where to say `READY=1` once requests can be answered: a Unix socket's path, or an abstract name after `@`, as
    /// systemd's `NOTIFY_SOCKET` has it.
    pub notify_socket: Option<String>,
}

impl Config {
    /// The defaults for one coordinator and one model.
    pub fn new(coordinator: impl Into<String>, model_dir: impl Into<PathBuf>) -> Self {
        Self {
            coordinators: vec![coordinator.into()],
            coordinator_tls: None,
            model_dir: model_dir.into(),
            served_names: Vec::new(),
            current_date: CurrentDate::default(),
            reasoning_field: ReasoningField::default(),
            profiles: Profiles::default(),
            seed: None,
            vllm_metrics: true,
            limits: Limits::default(),
            timeouts: Timeouts::default(),
            keys: KeySource::default(),
            tls: None,
            reload: Arc::default(),
            notify_socket: None,
        }
    }

    /// Checks what a type cannot.
    ///
    /// # Errors
    /// Names everything that is wrong.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let mut wrong = Vec::new();
        if self.coordinators.is_empty() {
            wrong.push("no coordinator is named; give at least one address".to_owned());
        }
        let scheme = if self.coordinator_tls.is_some() { "https" } else { "http" };
        for address in &self.coordinators {
            let is_address = tonic::transport::Endpoint::from_shared(address.clone()).is_ok();
            if !is_address || address.split_once("://").is_none_or(|(found, _)| found != scheme) {
                wrong.push(format!("coordinator {address:?} is not an address as {scheme}://host:port"));
            }
        }
        if let Some(name) = self.served_names.iter().find(|name| name.is_empty() || name.chars().any(char::is_control))
        {
            wrong.push(format!("served name {name:?} is empty or unprintable"));
        }
        let Limits { body_bytes, connections, requests, stream_events, http2_streams, .. } = self.limits;
        let sizes = [body_bytes, connections, requests, stream_events, http2_streams as usize];
        if sizes.contains(&0) {
            wrong.push("a limit is 0; only `resumes` may be".to_owned());
        }
        let Timeouts { header, body, connect, keep_alive, request, .. } = self.timeouts;
        if [header, body, connect, keep_alive, request].contains(&Duration::ZERO) {
            wrong.push("a timeout is 0; only `ready`, `stall`, `unread` and `drain` may be".to_owned());
        }
        if wrong.is_empty() { Ok(()) } else { Err(ConfigError(wrong.join("; "))) }
    }
}
