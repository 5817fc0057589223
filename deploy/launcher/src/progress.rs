//! What people see while a cluster starts: one bar a rank, or plain lines where there is no terminal.

use std::{collections::HashMap, io::IsTerminal, net::SocketAddr, time::Duration};

use anyhow::{Result, bail};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use phalanx_proto::v1::{DeploymentLoad, GroupState, RankState, WatchRequest, inference_client::InferenceClient};

const RETRY: Duration = Duration::from_millis(50);

/// Follows the coordinator until every deployment is ready and the gateway says so too.
pub(crate) async fn until_ready(coordinator: &str, gateway: SocketAddr) -> Result<()> {
    let mut client = loop {
        match InferenceClient::connect(coordinator.to_owned()).await {
            Ok(client) => break client,
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
            return until_gateway_ready(gateway).await;
        }
    }
    bail!("the coordinator ended while the cluster was starting")
}

async fn until_gateway_ready(gateway: SocketAddr) -> Result<()> {
    let http = reqwest::Client::new();
    loop {
        if let Ok(answer) = http.get(format!("http://{gateway}/readyz")).send().await
            && answer.status().is_success()
        {
            return Ok(());
        }
        tokio::time::sleep(RETRY).await;
    }
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
