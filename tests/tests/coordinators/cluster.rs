//! Two clusters of single processes: one coordinator under `phalanx serve`, and two coordinators around an etcd.

use std::{
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use phalanx_proto::v1::{DeploymentLoad, WatchRequest, inference_client::InferenceClient};
use phalanx_tests::{
    etcd::{Etcd, free_port},
    faults::{Answer, COMPLETIONS, Question, body_of, mix, signal, stream},
    parts::Parts,
};
use serde_json::Value;
use tokio::{
    sync::watch,
    task::JoinHandle,
    time::{sleep, timeout},
};
use tonic::Status;

/// Nothing here takes longer, even on a loaded machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(90);
/// Tokens of one answer: long enough that a blow meets it half way.
const TOKENS: u64 = 400;
/// What a worker says once it has loaded its weights.
const LOADED: &str = "shard loaded";

/// The door for HTTP.
#[derive(Clone)]
pub(crate) struct Front {
    http: reqwest::Client,
    pub(crate) url: String,
}

impl Front {
    fn new(port: u16) -> Self {
        Self { http: reqwest::Client::new(), url: format!("http://127.0.0.1:{port}") }
    }

    pub(crate) async fn ready(&self) {
        let deadline = Instant::now() + PATIENCE;
        let ready =
            async || self.http.get(format!("{}/readyz", self.url)).send().await.is_ok_and(|a| a.status() == 200);
        while !ready().await {
            assert!(Instant::now() < deadline, "{} is not ready", self.url);
            sleep(Duration::from_millis(20)).await;
        }
    }

    /// Asks for a stream.
    pub(crate) async fn stream(&self, body: &Value, on_tokens: impl FnMut(usize)) -> Answer {
        stream(&self.http, &format!("{}{COMPLETIONS}", self.url), body, on_tokens).await
    }

    /// Asks for an answer in one piece; gives its status and tokens.
    pub(crate) async fn post(&self, body: &Value) -> (u16, Vec<u64>) {
        let mut body = body.clone();
        body["return_token_ids"] = true.into();
        let answer = self.http.post(format!("{}{COMPLETIONS}", self.url)).json(&body).send().await.unwrap();
        let status = answer.status().as_u16();
        let answer: Value = answer.json().await.unwrap();
        let ids = answer["choices"][0]["token_ids"].as_array().into_iter().flatten().filter_map(Value::as_u64);
        (status, ids.collect())
    }

    /// Questions with their answers, each asked while nothing is disturbed.
    pub(crate) async fn questions(&self, count: u64) -> Vec<Question> {
        let mut questions = Vec::new();
        for index in 0..count {
            let body = body_of(index, TOKENS);
            let answer = self.stream(&body, |_| {}).await.essence();
            assert_eq!((answer.tokens() as u64, answer.done), (TOKENS, 1), "{body}");
            questions.push(Question { body, answer });
        }
        questions
    }
}

/// Eight streams that go on all the time and compare every answer.
pub(crate) struct Lanes {
    stop: Arc<AtomicBool>,
    /// When each lane's last tokens came, and how many answers it has had.
    last: Vec<watch::Receiver<(Instant, u64)>>,
    tasks: Vec<JoinHandle<(u64, Duration)>>,
}

/// Blows that one request may live through: its gateway takes it up again three times, as the contract says.
pub(crate) const BLOWS: u64 = 3;

impl Lanes {
    pub(crate) const COUNT: u64 = 8;

    pub(crate) fn start(front: &Front, questions: &[Question]) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (mut last, mut tasks) = (Vec::new(), Vec::new());
        for lane in 0..Self::COUNT {
            let (sender, receiver) = watch::channel((Instant::now(), 0));
            last.push(receiver);
            tasks.push(tokio::spawn(run_lane(lane, front.clone(), questions.to_vec(), sender, Arc::clone(&stop))));
        }
        Self { stop, last, tasks }
    }

    /// Waits until every lane has got tokens after `moment`; gives how long the last one waited.
    pub(crate) async fn all_go_on_after(&self, moment: Instant) -> Duration {
        let heard = self.all_until("got nothing", |(at, _), _| at > moment).await;
        heard.into_iter().map(|at| at - moment).max().unwrap_or_default()
    }

    /// Waits until every lane has begun with a new question.
    pub(crate) async fn all_begin_anew(&self) {
        self.all_until("did not finish its answer", |(_, answers), before| answers > before).await;
    }

    /// Waits for every lane until its last word, beside the answers it had before, is as wanted.
    async fn all_until(&self, trouble: &str, wanted: impl Fn((Instant, u64), u64) -> bool) -> Vec<Instant> {
        let before: Vec<u64> = self.last.iter().map(|last| last.borrow().1).collect();
        let mut all = Vec::new();
        for (lane, (last, before)) in self.last.iter().zip(before).enumerate() {
            let mut last = last.clone();
            let next = timeout(PATIENCE, async { last.wait_for(|now| wanted(*now, before)).await.map(|now| now.0) });
            match next.await {
                Ok(Ok(at)) => all.push(at),
                _ => panic!("lane {lane} {trouble} for {PATIENCE:?}, or ended"),
            }
        }
        all
    }

    /// Lets every lane finish its answer; gives the number of answers and the longest pause between two events.
    pub(crate) async fn finish(self) -> (u64, Duration) {
        self.stop.store(true, Ordering::Relaxed);
        let (mut answers, mut longest) = (0, Duration::ZERO);
        for task in self.tasks {
            let (own, pause) = task.await.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()));
            (answers, longest) = (answers + own, longest.max(pause));
        }
        (answers, longest)
    }
}

async fn run_lane(
    lane: u64,
    front: Front,
    questions: Vec<Question>,
    heard: watch::Sender<(Instant, u64)>,
    stop: Arc<AtomicBool>,
) -> (u64, Duration) {
    let (mut asked, mut longest) = (0, Duration::ZERO);
    while !stop.load(Ordering::Relaxed) {
        let choice = mix(lane << 32 | asked) as usize % questions.len();
        let Question { body, answer: expected } = &questions[choice];
        let mut before = Instant::now();
        let hear = |_| {
            let now = Instant::now();
            longest = longest.max(now - before);
            before = now;
            heard.send_replace((now, asked));
        };
        let answer = front.stream(body, hear).await;
        assert_eq!(answer.essence(), *expected, "lane {lane}, question {choice}");
        asked += 1;
    }
    (asked, longest)
}

/// What a coordinator says of its only deployment.
pub(crate) async fn load_at(address: &str) -> Result<DeploymentLoad, Status> {
    let connected = InferenceClient::connect(format!("http://{address}")).await;
    let mut client = connected.map_err(|error| Status::unavailable(error.to_string()))?;
    let mut watch = client.watch(WatchRequest { interval_ms: 0 }).await?.into_inner();
    let capacity = watch.message().await?.ok_or_else(|| Status::unavailable("the stream ended"))?;
    Ok(capacity.deployments.into_iter().next().unwrap_or_default())
}

/// Waits until the coordinator says what is wanted.
pub(crate) async fn until(address: &str, wanted: impl Fn(&DeploymentLoad) -> bool) -> DeploymentLoad {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let load = load_at(address).await;
        if let Ok(load) = &load
            && wanted(load)
        {
            return load.clone();
        }
        assert!(Instant::now() < deadline, "{address} does not come to say what is wanted, but {load:?}");
        sleep(Duration::from_millis(50)).await;
    }
}

/// `phalanx serve` with two ranks.
pub(crate) struct Served {
    pub(crate) parts: Parts,
    pub(crate) front: Front,
    pid: u32,
    state: tempfile::TempDir,
}

impl Served {
    pub(crate) async fn start() -> Self {
        let (port, state, mut parts) = (free_port(), tempfile::tempdir().unwrap(), Parts::default());
        let args = format!(
            "serve nano -tp 2 --port {port} --state-dir {} --log warn,phalanx_worker=info",
            state.path().display()
        );
        let pid = parts.start("serve", &args);
        let front = Front::new(port);
        front.ready().await;
        Self { parts, front, pid, state }
    }

    /// Process ids of the children with this in their command line.
    pub(crate) fn children(&self, role: &str) -> Vec<u32> {
        let output = Command::new("pgrep").args(["-P", &self.pid.to_string(), "-f", "--", role]).output().unwrap();
        String::from_utf8_lossy(&output.stdout).lines().map(|line| line.parse().unwrap()).collect()
    }

    /// Kills the coordinator once there is one, and says when.
    pub(crate) async fn kill_coordinator(&self) -> Instant {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let [pid] = self.children(" coordinator ")[..] {
                let struck = Instant::now();
                signal(pid, "KILL");
                return struck;
            }
            assert!(Instant::now() < deadline, "there is no coordinator");
            sleep(Duration::from_millis(5)).await;
        }
    }

    /// The last epoch on disk.
    pub(crate) fn epoch(&self) -> u64 {
        std::fs::read_to_string(self.state.path().join("epoch")).unwrap().trim().parse().unwrap()
    }

    /// Times that a worker has loaded its weights.
    pub(crate) fn loads(&self) -> usize {
        self.parts.log("serve").matches(LOADED).count()
    }
}

/// An etcd, two coordinators, two workers and a gateway, each a process of its own.
pub(crate) struct Pair {
    pub(crate) etcd: Etcd,
    pub(crate) parts: Parts,
    pub(crate) front: Front,
    /// Address, process id, and how often each was started.
    coordinators: [(String, u32, u32); 2],
    /// Name and process id, in the order in which they were started.
    workers: Vec<(String, u32)>,
}

impl Pair {
    pub(crate) async fn start() -> Self {
        let (etcd, port) = (Etcd::start(), free_port());
        let coordinators = [(); 2].map(|()| (format!("127.0.0.1:{}", free_port()), 0, 0));
        let mut pair =
            Self { etcd, parts: Parts::default(), front: Front::new(port), coordinators, workers: Vec::new() };
        for index in 0..2 {
            pair.start_coordinator(index);
        }
        for rank in 0..2 {
            pair.start_worker(rank);
        }
        let gateway = format!("gateway nano --port {port} --coordinator {} --log warn", pair.addresses());
        pair.parts.start("gateway", &gateway);
        pair.front.ready().await;
        pair
    }

    fn addresses(&self) -> String {
        self.coordinators.iter().map(|(address, ..)| address.as_str()).collect::<Vec<_>>().join(",")
    }

    pub(crate) fn address(&self, index: usize) -> &str {
        &self.coordinators[index].0
    }

    pub(crate) fn pid(&self, index: usize) -> u32 {
        self.coordinators[index].1
    }

    /// Name of a coordinator's present process, and of its log.
    pub(crate) fn name(&self, index: usize) -> String {
        format!("coordinator-{index}-{}", self.coordinators[index].2)
    }

    pub(crate) fn start_coordinator(&mut self, index: usize) {
        self.coordinators[index].2 += 1;
        let args = format!(
            "coordinator nano -tp 2 --listen {} --etcd {} --log warn,phalanx_coordinator=info",
            self.address(index),
            self.etcd.url()
        );
        let name = self.name(index);
        self.coordinators[index].1 = self.parts.start(&name, &args);
    }

    fn start_worker(&mut self, rank: u32) {
        let name = format!("worker-{rank}-{}", self.workers.len());
        let pid = self.parts.worker(&name, rank, &self.addresses(), "--log warn,phalanx_worker=info");
        self.workers.push((name, pid));
    }

    /// Kills the worker that was started first for a rank, and starts another one.
    pub(crate) fn replace_worker(&mut self, rank: u32) {
        signal(self.workers[rank as usize].1, "KILL");
        self.start_worker(rank);
    }

    /// Times that a worker has loaded its weights.
    pub(crate) fn loads(&self) -> usize {
        self.workers.iter().map(|(name, _)| self.parts.log(name).matches(LOADED).count()).sum()
    }

    /// The coordinator that leads and says so.
    pub(crate) async fn leader(&self) -> usize {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let named = self.etcd.get("/phalanx/leader").unwrap_or_default();
            for (index, (address, ..)) in self.coordinators.iter().enumerate() {
                if named.ends_with(address) && load_at(address).await.is_ok() {
                    return index;
                }
            }
            assert!(Instant::now() < deadline, "nobody leads; etcd says {named:?}");
            sleep(Duration::from_millis(50)).await;
        }
    }

    pub(crate) async fn load(&self) -> DeploymentLoad {
        load_at(self.address(self.leader().await)).await.unwrap()
    }
}
