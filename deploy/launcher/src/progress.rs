//! What people see while a cluster starts: one bar a rank, or plain lines where there is no terminal.

use std::{
    collections::HashMap,
    io::IsTerminal,
    os::{linux::net::SocketAddrExt, unix::net as unix},
    time::Duration,
};

use anyhow::{Context, Result, bail};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use phalanx_proto::tls::Identity;
use phalanx_proto::v1::{DeploymentLoad, GroupState, RankState, WatchRequest, inference_client::InferenceClient};
use tokio::net::UnixDatagram;
use tonic::transport::Endpoint;

const RETRY: Duration = Duration::from_millis(50);

/// Where the gateway says that it is ready. Its HTTP door may ask for a key or a certificate that this process does not
/// have, so it is not asked there.
pub(crate) struct ReadySocket {
    socket: UnixDatagram,
    name: String,
}

impl ReadySocket {
    /// Binds a socket of which there is one for each HTTP port.
    ///
    /// # Errors
    /// When it cannot be bound.
    pub(crate) fn bind(port: u16) -> Result<Self> {
        let name = format!("phalanx-ready-{port}-{}", std::process::id());
        let bind = || {
            let socket = unix::UnixDatagram::bind_addr(&unix::SocketAddr::from_abstract_name(&name)?)?;
            socket.set_nonblocking(true)?;
            UnixDatagram::from_std(socket)
        };
        Ok(Self { socket: bind().with_context(|| format!("abstract socket {name}"))?, name })
    }

    /// As `NOTIFY_SOCKET` has it.
    pub(crate) fn address(&self) -> String {
        format!("@{}", self.name)
    }

    async fn ready(&self) -> Result<()> {
        let mut word = [0; 64];
        loop {
            let length = self.socket.recv(&mut word).await.context("waiting for the gateway")?;
            if word[..length].starts_with(b"READY=1") {
                return Ok(());
            }
        }
    }
}

/// Follows the coordinator until every deployment is ready and the gateway says so too.
pub(crate) async fn until_ready(coordinator: &str, tls: Option<&Identity>, gateway: &ReadySocket) -> Result<()> {
    let endpoint = Endpoint::from_shared(coordinator.to_owned())?;
    let endpoint = match tls {
        Some(identity) => identity.secure(endpoint)?,
        None => endpoint,
    };
    let mut client = loop {
        match endpoint.connect().await {
            Ok(channel) => break InferenceClient::new(channel),
            Err(_) => tokio::time::sleep(RETRY).await,
        }
    };
    let mut bars = Bars::new();
    let mut watch = client.watch(WatchRequest { interval_ms: 100 }).await?.into_inner();
    while let Some(capacity) = watch.message().await? {
        for deployment in &capacity.deployments {
            bars.show(deployment);
            if deployment.state() == GroupState::Failed {
                bail!("{}", deployment.detail);
            }
        }
        if capacity.deployments.iter().all(|deployment| deployment.state() == GroupState::Ready) {
            bars.finish();
            return gateway.ready().await;
        }
    }
    bail!("the coordinator ended while the cluster was starting")
}

struct Bars {
    all: Option<MultiProgress>,
    ranks: HashMap<u32, ProgressBar>,
    said: Option<GroupState>,
}

impl Bars {
    fn new() -> Self {
        let all = std::io::stderr().is_terminal().then(MultiProgress::new);
        Self { all, ranks: HashMap::new(), said: None }
    }

    fn show(&mut self, load: &DeploymentLoad) {
        match &self.all {
            Some(all) => {
                for rank in &load.ranks {
                    let bar = self.ranks.entry(rank.rank).or_insert_with(|| all.add(new_bar(rank)));
                    bar.set_length(rank.weight_bytes);
                    bar.set_position(rank.loaded_bytes);
                }
            }
            None => self.say(load),
        }
    }

    /// One line for each new state.
    fn say(&mut self, load: &DeploymentLoad) {
        if self.said != Some(load.state()) {
            self.said = Some(load.state());
            let state = load.state().as_str_name().trim_start_matches("GROUP_STATE_").to_ascii_lowercase();
            eprintln!("phalanx: {state} {}", load.detail);
        }
    }

    fn finish(&self) {
        for bar in self.ranks.values() {
            bar.finish_and_clear();
        }
    }
}

fn new_bar(rank: &RankState) -> ProgressBar {
    let template = "{prefix:>8} {bar:30} {bytes}/{total_bytes} {bytes_per_sec}";
    // The template is a constant; should it ever be malformed, the default style still shows the bar.
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(rank.weight_bytes).with_style(style).with_prefix(format!("rank {}", rank.rank))
}
