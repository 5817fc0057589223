//! Streams that are known by heart, over a cluster whose ranks are killed and stopped.
//!
//! A [`Target`] is a `phalanx serve` that can be watched. A [`Question`] is a request with the answer that it gets when
//! nothing disturbs it. [`Lanes`] ask questions all the time and compare every answer, token by token.

use std::{
    collections::BTreeMap,
    path::Path,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use phalanx_proto::v1::{DeploymentLoad, GroupState, Totals, WatchRequest, inference_client::InferenceClient};
use serde_json::{Value, json};
use tokio::{
    sync::watch,
    task::JoinHandle,
    time::{sleep, timeout},
};
use tonic::transport::Channel;

use crate::cluster::{Cluster, binary};

/// Nothing here takes longer, even on a loaded machine.
const PATIENCE: Duration = Duration::from_secs(120);
/// Longest time a cluster may take to its ready line.
const START_TIMEOUT: Duration = Duration::from_secs(60);
/// Where completions are asked for.
pub const COMPLETIONS: &str = "/v1/completions";

/// Spreads the bits of a counter: random enough for tests, and the same in every run.
pub fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// The duration below which `share` of all lie. Sorts.
pub fn percentile(all: &mut [Duration], share: f64) -> Duration {
    all.sort_unstable();
    let place = (all.len() as f64 * share).ceil() as usize;
    all.get(place.max(1) - 1).copied().unwrap_or_default()
}

/// Sends a signal by name, such as `STOP`.
///
/// # Panics
/// When there is no such process.
pub fn signal(pid: u32, name: &str) {
    let sent = Command::new("kill").args([&format!("-{name}"), &pid.to_string()]).status();
    assert!(sent.is_ok_and(|status| status.success()), "process {pid} took no {name}");
}

/// What a coordinator says of its only deployment, as of lately.
pub struct Watcher {
    loads: watch::Receiver<DeploymentLoad>,
    task: JoinHandle<()>,
}

impl Watcher {
    /// Follows the coordinator at `address`, also over its restarts.
    pub fn follow(address: &str) -> Self {
        let (sender, loads) = watch::channel(DeploymentLoad::default());
        let address = address.to_owned();
        let task = tokio::spawn(async move {
            loop {
                let Ok(mut client) = InferenceClient::connect(address.clone()).await else {
                    sleep(Duration::from_millis(20)).await;
                    continue;
                };
                let Ok(capacities) = client.watch(WatchRequest { interval_ms: 5 }).await else { continue };
                let mut capacities = capacities.into_inner();
                while let Ok(Some(capacity)) = capacities.message().await {
                    for load in capacity.deployments {
                        sender.send_replace(load);
                    }
                }
            }
        });
        Self { loads, task }
    }

    /// The last word.
    pub fn load(&self) -> DeploymentLoad {
        self.loads.borrow().clone()
    }

    /// The last word's totals.
    pub fn totals(&self) -> Totals {
        self.load().totals.unwrap_or_default()
    }

    /// Waits for a load of which `holds` is true; answers with when it was told.
    ///
    /// # Panics
    /// When it does not come.
    pub async fn until(&self, what: &str, holds: impl Fn(&DeploymentLoad) -> bool) -> (Instant, DeploymentLoad) {
        let mut loads = self.loads.clone();
        let found =
            timeout(PATIENCE, async { loads.wait_for(|load| holds(load)).await.map(|load| load.clone()) }).await;
        match found {
            Ok(Ok(load)) => (Instant::now(), load),
            _ => panic!("{what}: not within {PATIENCE:?}, the last word was {:?}", self.load()),
        }
    }

    /// Waits for steps of an epoch after `epoch`.
    pub async fn until_ready_after(&self, epoch: u64) -> Instant {
        self.until("a new epoch", |load| load.state() == GroupState::Ready && load.epoch > epoch).await.0
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A cluster to disturb.
pub struct Target {
    /// Its processes.
    pub cluster: Cluster,
    /// What its coordinator says.
    pub watch: Watcher,
    /// Where its coordinator listens.
    pub grpc: String,
    /// A client of its gateway.
    pub http: reqwest::Client,
}

/// How a rank is disturbed.
#[derive(Clone, Copy, Debug)]
pub struct Blow {
    /// Which rank.
    pub rank: u64,
    /// By which signal.
    pub signal: &'static str,
}

/// What a blow led to.
#[derive(Clone, Copy, Debug)]
pub struct Wound {
    /// When it fell.
    pub struck: Instant,
    /// From then until the epoch was given up.
    pub noticed: Duration,
    /// When steps ran again.
    pub ready: Instant,
}

impl Target {
    /// Starts `phalanx serve` with two ranks and `args`.
    ///
    /// # Panics
    /// When it does not become ready.
    pub async fn start(args: &[&str]) -> Self {
        Self::start_program(&binary(), args).await
    }

    /// Starts another copy of the program.
    ///
    /// # Panics
    /// When it does not become ready.
    pub async fn start_program(program: &Path, args: &[&str]) -> Self {
        let free = std::net::TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr());
        let port = free.unwrap_or_else(|error| panic!("no free port: {error}")).port().to_string();
        let mut command = Command::new(program);
        command.args(["serve", "-tp", "2", "--port", "0", "--grpc-port", &port]).args(args);
        let cluster = Cluster::launch(command, START_TIMEOUT);
        let grpc = format!("http://127.0.0.1:{port}");
        let watch = Watcher::follow(&grpc);
        watch.until("ready", |load| load.state() == GroupState::Ready).await;
        Self { cluster, watch, grpc, http: reqwest::Client::new() }
    }

    /// A client of its coordinator.
    ///
    /// # Panics
    /// When it cannot be reached.
    pub async fn inference(&self) -> InferenceClient<Channel> {
        InferenceClient::connect(self.grpc.clone()).await.unwrap_or_else(|error| panic!("{}: {error}", self.grpc))
    }

    /// Process id of a rank's worker, as soon as there is one.
    ///
    /// # Panics
    /// When there is none for long.
    pub async fn worker(&self, rank: u64) -> u32 {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let [pid] = self.cluster.children(&format!("--rank={rank}"))[..] {
                return pid;
            }
            assert!(Instant::now() < deadline, "rank {rank} has no process");
            sleep(Duration::from_millis(10)).await;
        }
    }

    /// Strikes a rank and waits until the group steps again.
    pub async fn strike(&self, blow: Blow) -> Wound {
        let pid = self.worker(blow.rank).await;
        let before = self.watch.load();
        let failures = self.watch.totals().failed_epochs;
        let struck = Instant::now();
        signal(pid, blow.signal);
        let failed = |load: &DeploymentLoad| load.totals.is_some_and(|totals| totals.failed_epochs > failures);
        let noticed = self.watch.until("a failed epoch", failed).await.0 - struck;
        let ready = self.watch.until_ready_after(before.epoch).await;
        Wound { struck, noticed, ready }
    }

    /// Asks a streamed question. `on_tokens` is told after each event how many tokens there are.
    pub async fn stream(&self, body: &Value, on_tokens: impl FnMut(usize)) -> Answer {
        stream(&self.http, &format!("{}{COMPLETIONS}", self.cluster.url), body, on_tokens).await
    }

    /// Asks a question that is answered in one piece.
    ///
    /// # Panics
    /// When the answer cannot be read.
    pub async fn post(&self, body: &Value) -> (u16, Value) {
        let answer = self.http.post(format!("{}{COMPLETIONS}", self.cluster.url)).json(body).send().await;
        let answer = answer.unwrap_or_else(|error| panic!("{body}: {error}"));
        let status = answer.status().as_u16();
        (status, answer.json().await.unwrap_or_else(|error| panic!("{body}: {error}")))
    }
}

/// One choice of an answer, put together from its chunks.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Choice {
    /// Its text.
    pub text: String,
    /// Its tokens.
    pub token_ids: Vec<u64>,
    /// Log-probabilities of its tokens, each with the alternatives.
    pub logprobs: Vec<Value>,
    /// Why it ended; more than one reason is a mistake.
    pub finish: Vec<String>,
}

/// A streamed answer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Answer {
    /// Its status; the rest is empty unless it is 200.
    pub status: u16,
    /// By index.
    pub choices: BTreeMap<u64, Choice>,
    /// Tokens of prompt and completion.
    pub usage: (u64, u64),
    /// Prompt tokens from the prefix cache; they differ from run to run.
    pub cached: u64,
    /// The event that ended it, if it was an error.
    pub error: Option<Value>,
    /// Times that `[DONE]` came.
    pub done: usize,
    /// Comments that came while there was nothing to tell.
    pub keep_alives: usize,
}

impl Answer {
    /// Tokens of all choices.
    pub fn tokens(&self) -> usize {
        self.choices.values().map(|choice| choice.token_ids.len()).sum()
    }

    /// What must be equal whenever the same is asked: everything but where the prompt came from and how long it took.
    pub fn essence(&self) -> Self {
        Self { cached: 0, keep_alives: 0, ..self.clone() }
    }

    fn take(&mut self, event: &Value) {
        if let Some(error) = event.get("error") {
            assert!(self.error.replace(error.clone()).is_none(), "two errors: {event}");
            return;
        }
        for part in event["choices"].as_array().into_iter().flatten() {
            let choice = self.choices.entry(part["index"].as_u64().unwrap_or(u64::MAX)).or_default();
            choice.text.push_str(part["text"].as_str().unwrap_or_default());
            choice.token_ids.extend(part["token_ids"].as_array().into_iter().flatten().filter_map(Value::as_u64));
            let logprobs = &part["logprobs"];
            let tokens = logprobs["token_logprobs"].as_array().into_iter().flatten();
            let tops = logprobs["top_logprobs"].as_array().into_iter().flatten();
            choice.logprobs.extend(tokens.zip(tops).map(|(token, top)| json!([token, top])));
            choice.finish.extend(part["finish_reason"].as_str().map(str::to_owned));
        }
        let usage = &event["usage"];
        if usage.is_object() {
            let count = |name: &str| usage[name].as_u64().unwrap_or(u64::MAX);
            self.usage = (count("prompt_tokens"), count("completion_tokens"));
            self.cached = usage["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap_or(0);
        }
    }
}

/// Asks for a stream and reads it to its end. Anything after its end is a mistake, and so is a line that is no event.
///
/// # Panics
/// When the gateway cannot be reached, or the stream is malformed or stands still.
pub async fn stream(http: &reqwest::Client, url: &str, body: &Value, mut on_tokens: impl FnMut(usize)) -> Answer {
    let mut body = body.clone();
    body["stream"] = json!(true);
    body["stream_options"] = json!({"include_usage": true});
    body["return_token_ids"] = json!(true);
    let sent = http.post(url).json(&body).send().await;
    let mut response = sent.unwrap_or_else(|error| panic!("{body}: {error}"));
    let mut answer = Answer { status: response.status().as_u16(), ..Default::default() };
    let mut unread = Vec::new();
    loop {
        let chunk = timeout(PATIENCE, response.chunk()).await.unwrap_or_else(|_| panic!("{body}: nothing more came"));
        let Some(bytes) = chunk.unwrap_or_else(|error| panic!("{body}: {error}")) else { break };
        unread.extend_from_slice(&bytes);
        while let Some(end) = unread.windows(2).position(|pair| pair == b"\n\n") {
            let event: Vec<u8> = unread.drain(..end + 2).collect();
            let event = String::from_utf8_lossy(&event[..end]).into_owned();
            assert!(answer.done == 0 && answer.error.is_none(), "{event} follows the end");
            match event.strip_prefix("data: ") {
                Some("[DONE]") => answer.done += 1,
                Some(data) => {
                    answer.take(&serde_json::from_str(data).unwrap_or_else(|error| panic!("{error}: {data}")));
                    on_tokens(answer.tokens());
                }
                None if event.starts_with(':') => answer.keep_alives += 1,
                None => panic!("no event: {event:?}"),
            }
        }
    }
    if answer.status == 200 {
        assert!(unread.is_empty(), "the stream breaks off within an event: {}", String::from_utf8_lossy(&unread));
    } else {
        answer.error = serde_json::from_slice::<Value>(&unread).ok().map(|body| body["error"].clone());
    }
    answer
}

/// A request and what it must get.
#[derive(Clone, Debug)]
pub struct Question {
    /// The request.
    pub body: Value,
    /// Its answer when nothing disturbs it.
    pub answer: Answer,
}

/// The body of the `index`th question: its own prompt, and one of several ways to choose tokens, all repeatable.
pub fn body_of(index: u64, max_tokens: u64) -> Value {
    let length = 5 + mix(index) % 150;
    let prompt: Vec<u64> = (0..length).map(|place| mix(index << 32 | place) % 3000).collect();
    let mut body = json!({"prompt": prompt, "max_tokens": max_tokens, "ignore_eos": true});
    let settings = match index % 4 {
        0 => json!({"temperature": 0}),
        1 => json!({"temperature": 1.0, "top_p": 0.9, "seed": index}),
        2 => json!({"temperature": 0, "presence_penalty": 0.7, "frequency_penalty": 0.4}),
        _ => json!({"temperature": 1.3, "top_k": 50, "seed": index, "repetition_penalty": 1.2, "logprobs": 2}),
    };
    body.as_object_mut().into_iter().for_each(|body| body.extend(settings.as_object().cloned().unwrap_or_default()));
    body
}

/// Questions with their answers, each asked alone.
///
/// # Panics
/// When one is not answered in full.
pub async fn questions(target: &Target, count: u64, max_tokens: u64) -> Vec<Question> {
    let mut questions = Vec::new();
    for index in 0..count {
        let body = body_of(index, max_tokens);
        let answer = target.stream(&body, |_| {}).await.essence();
        assert_eq!((answer.usage.1, answer.tokens() as u64, answer.done), (max_tokens, max_tokens, 1), "{body}");
        questions.push(Question { body, answer });
    }
    questions
}

/// Streams that go on all the time, one question after the other.
pub struct Lanes {
    stop: Arc<AtomicBool>,
    /// When each lane's last tokens came.
    last: Vec<watch::Receiver<Instant>>,
    tasks: Vec<JoinHandle<u64>>,
}

impl Lanes {
    /// Starts `count` lanes; every answer is compared, and a difference is a panic that [`Lanes::finish`] hands on.
    pub fn start(target: &Target, questions: &[Question], count: u64) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (mut last, mut tasks) = (Vec::new(), Vec::new());
        for lane in 0..count {
            let (sender, receiver) = watch::channel(Instant::now());
            let (http, url) = (target.http.clone(), format!("{}{COMPLETIONS}", target.cluster.url));
            let (stop, questions) = (Arc::clone(&stop), questions.to_vec());
            last.push(receiver);
            tasks.push(tokio::spawn(async move {
                let mut asked = 0;
                while !stop.load(Ordering::Relaxed) {
                    let choice = mix(lane << 32 | asked) as usize % questions.len();
                    let Question { body, answer: expected } = &questions[choice];
                    let answer = stream(&http, &url, body, |_| {
                        sender.send_replace(Instant::now());
                    })
                    .await;
                    assert_eq!(answer.essence(), *expected, "lane {lane}, question {choice}");
                    asked += 1;
                }
                asked
            }));
        }
        Self { stop, last, tasks }
    }

    /// When each lane got its next tokens after `moment`.
    ///
    /// # Panics
    /// When one gets none.
    pub async fn next_after(&self, moment: Instant) -> Vec<Instant> {
        let mut all = Vec::new();
        for (lane, last) in self.last.iter().enumerate() {
            let mut last = last.clone();
            let next = timeout(PATIENCE, async { last.wait_for(|at| *at > moment).await.map(|at| *at) }).await;
            match next {
                Ok(Ok(at)) => all.push(at),
                _ => panic!("lane {lane} got nothing for {PATIENCE:?} or ended"),
            }
        }
        all
    }

    /// Lets every lane finish its answer; gives the number of answers.
    ///
    /// # Panics
    /// With what went wrong on a lane.
    pub async fn finish(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        let mut answers = 0;
        for task in self.tasks {
            answers += task.await.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()));
        }
        answers
    }
}
