//! A coordinator on loopback, its workers, and a client.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use futures::StreamExt;
use phalanx_coordinator::{Config, DeploymentConfig, Limits, run};
use phalanx_proto::{
    checkpoint::Checkpoint,
    v1::{self, GroupState, generate_event::Event, inference_client::InferenceClient},
};
use tokio::{net::TcpListener, task::JoinHandle, time::timeout};
use tokio_util::sync::CancellationToken;
use tonic::{Status, Streaming, transport::Channel};

use crate::worker::{Nature, Worker};

/// Nothing in these tests takes longer, even on a loaded machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);
pub(crate) const MODEL: &str = "gpt-oss-20b";
/// Longest sequence in these tests.
pub(crate) const CONTEXT: usize = 256;

pub(crate) struct Cluster {
    pub(crate) address: SocketAddr,
    pub(crate) client: InferenceClient<Channel>,
    pub(crate) shutdown: CancellationToken,
    pub(crate) run: JoinHandle<anyhow::Result<()>>,
    digest: u64,
    next_incarnation: u64,
}

/// Limits for tests: short where a test waits for them, long elsewhere.
pub(crate) fn limits() -> Limits {
    Limits { step_deadline_per_token: Some(Duration::ZERO), ..Limits::default() }
}

pub(crate) fn deployment(world_size: usize) -> DeploymentConfig {
    let headers = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/data/headers").join(MODEL);
    DeploymentConfig {
        max_model_len: Some(CONTEXT),
        max_num_seqs: 8,
        max_num_batched_tokens: 64,
        max_num_queued_reqs: 64,
        ..DeploymentConfig::new(headers, MODEL, world_size)
    }
}

impl Cluster {
    /// A coordinator without workers.
    pub(crate) async fn start(deployment: DeploymentConfig, limits: Limits) -> Self {
        Self::start_with(Config { deployments: vec![deployment], limits, ..Config::default() }).await
    }

    pub(crate) async fn start_with(config: Config) -> Self {
        let digest = Checkpoint::open(&config.deployments[0].model_dir).unwrap().digest;
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let shutdown = CancellationToken::new();
        let run = tokio::spawn(run(config, listener, shutdown.clone()));
        let channel = Channel::from_shared(format!("http://{address}")).unwrap().connect().await.unwrap();
        let client = InferenceClient::new(channel);
        Self { address, client, shutdown, run, digest, next_incarnation: 1 }
    }

    /// A coordinator with a ready group of `world_size` workers.
    pub(crate) async fn ready(world_size: usize, limits: Limits) -> (Self, Vec<Worker>) {
        let mut cluster = Self::start(deployment(world_size), limits).await;
        let workers = (0..world_size as u32).map(|rank| cluster.worker(Some(rank))).collect();
        cluster.wait_for(|load| load.state() == GroupState::Ready).await;
        (cluster, workers)
    }

    /// What a good worker says of itself.
    pub(crate) fn nature(&mut self, wanted_rank: Option<u32>) -> Nature {
        let incarnation = self.next_incarnation;
        self.next_incarnation += 1;
        let hello = v1::Hello {
            incarnation,
            deployment: MODEL.into(),
            host: "here".into(),
            device: "toy".into(),
            backend: "cpu".into(),
            wanted_rank,
            checkpoint_digest: self.digest,
            ..Default::default()
        };
        Nature { hello, free_bytes: 100 << 20, load_fault: None }
    }

    pub(crate) fn worker(&mut self, wanted_rank: Option<u32>) -> Worker {
        let nature = self.nature(wanted_rank);
        Worker::spawn(self.address, nature)
    }

    /// Waits until the group's load satisfies `condition`.
    pub(crate) async fn wait_for(&self, condition: impl Fn(&v1::DeploymentLoad) -> bool) -> v1::DeploymentLoad {
        let mut last = None;
        let watch = async {
            let request = v1::WatchRequest { interval_ms: 10 };
            let mut loads = self.client.clone().watch(request).await.unwrap().into_inner();
            while let Some(capacity) = loads.message().await.unwrap() {
                let load = capacity.deployments.into_iter().next().unwrap();
                if condition(&load) {
                    return load;
                }
                last = Some(load);
            }
            panic!("watch ended");
        };
        let found = timeout(PATIENCE, watch).await;
        found.unwrap_or_else(|_| panic!("condition not reached, last was {last:?}"))
    }

    pub(crate) async fn generate(&self, request: v1::GenerateRequest) -> Result<Streaming<v1::GenerateEvent>, Status> {
        let generated = timeout(PATIENCE, self.client.clone().generate(request)).await;
        generated.expect("an answer in time").map(tonic::Response::into_inner)
    }

    /// Runs a request to its end.
    pub(crate) async fn complete(&self, request: v1::GenerateRequest) -> Result<Completion, Status> {
        read(self.generate(request).await?).await
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

#[derive(Debug)]
pub(crate) struct Completion {
    pub(crate) admitted: v1::Admitted,
    pub(crate) tokens: Vec<u32>,
    pub(crate) finished: v1::Finished,
}

/// Reads a stream to its end and checks its form: admitted, tokens, one terminal event.
pub(crate) async fn read(stream: Streaming<v1::GenerateEvent>) -> Result<Completion, Status> {
    let mut stream = stream;
    let (mut admitted, mut tokens, mut finished) = (None, Vec::new(), None);
    while let Some(item) = timeout(PATIENCE, stream.next()).await.expect("a stream that ends") {
        assert!(finished.is_none(), "nothing follows the end");
        match item?.event.unwrap() {
            Event::Admitted(event) => assert!(admitted.replace(event).is_none(), "admitted once"),
            Event::Tokens(chunk) => tokens.extend(chunk.tokens.iter().map(|token| token.id)),
            Event::Finished(event) => finished = Some(event),
        }
    }
    let finished = finished.expect("a terminal event");
    Ok(Completion { admitted: admitted.unwrap_or_default(), tokens, finished })
}

/// A greedy request of `max_tokens` tokens.
pub(crate) fn request(prompt: &[u32], max_tokens: u32) -> v1::GenerateRequest {
    let sampling = v1::Sampling { temperature: Some(0.0), ..Default::default() };
    let (prompt, sampling) = (prompt.to_vec(), Some(sampling));
    v1::GenerateRequest { prompt, max_tokens: Some(max_tokens), sampling, ..Default::default() }
}
