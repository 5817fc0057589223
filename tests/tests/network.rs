//! What bad networks do to a cluster: late, silent, half-open and very slow connections, and a wire that is cut between
//! two hosts. Nothing is lost or doubled, nothing hangs, and what is only slow raises no alarm.

use std::{
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use phalanx_proto::v1::{GenerateRequest, inference_client::InferenceClient};
use phalanx_tests::{
    cluster::{binary, output_of},
    full_size,
    hosts::TwoHosts,
    parts::{Parts, failed_epochs, generate, request, until, until_ready},
    proxy::{Proxy, Weather},
};
use serde_json::{Value, json};
use tokio::task::JoinHandle;
use tonic::transport::Channel;

type Client = InferenceClient<Channel>;

/// Longest time until a silent rank is noticed while it has work: a step's deadline and a margin.
const NOTICED: Duration = Duration::from_millis(5500);
/// Longest time that anything here may take; what takes longer hangs.
const PATIENCE: Duration = Duration::from_secs(60);

async fn connect(address: impl std::fmt::Display) -> Client {
    InferenceClient::connect(format!("http://{address}")).await.unwrap()
}

/// Runs requests one after the other, undisturbed.
async fn undisturbed(client: &Client, requests: &[GenerateRequest]) -> Vec<Vec<u32>> {
    let mut answers = Vec::new();
    for request in requests {
        answers.push(generate(client.clone(), request.clone(), |_| {}).await.unwrap());
    }
    answers
}

/// Requests under way at once, and how many tokens have come for each.
struct Load {
    tasks: Vec<JoinHandle<Result<Vec<u32>, tonic::Status>>>,
    seen: Vec<Arc<AtomicUsize>>,
}

impl Load {
    fn start(client: &Client, requests: &[GenerateRequest]) -> Self {
        let seen: Vec<_> = requests.iter().map(|_| Arc::new(AtomicUsize::new(0))).collect();
        let tasks = requests.iter().zip(&seen).map(|(request, seen)| {
            let (client, request, seen) = (client.clone(), request.clone(), Arc::clone(seen));
            tokio::spawn(generate(client, request, move |tokens| seen.store(tokens, Ordering::Relaxed)))
        });
        Self { tasks: tasks.collect(), seen }
    }

    /// Waits until every stream has got `tokens`.
    async fn all_have(&self, tokens: usize) {
        let deadline = Instant::now() + PATIENCE;
        while self.seen.iter().any(|seen| seen.load(Ordering::Relaxed) < tokens) {
            assert!(Instant::now() < deadline, "streams stand at {:?}", self.seen);
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    fn is_running(&self) -> bool {
        self.tasks.iter().any(|task| !task.is_finished())
    }

    async fn answers(self) -> Vec<Vec<u32>> {
        let mut answers = Vec::new();
        for task in self.tasks {
            answers.push(tokio::time::timeout(PATIENCE, task).await.expect("a stream hangs").unwrap().unwrap());
        }
        answers
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn delay_and_loss_between_coordinator_and_workers_raise_no_alarm() {
    let mut parts = Parts::default();
    let coordinator = parts.coordinator("");
    let proxy = Proxy::to(coordinator);
    for rank in 0..2 {
        parts.worker(&format!("worker {rank}"), rank, &proxy.address.to_string(), "");
    }
    let client = connect(coordinator).await;
    until_ready(&client).await;
    let requests: Vec<_> = (0..4).map(|index| request(index, 24)).collect();
    let expected = undisturbed(&client, &requests).await;
    proxy.set(Weather::Slow { delay: Duration::from_millis(200), jitter: Duration::from_millis(50), loss: 0.01 });
    let start = Instant::now();
    let answers = Load::start(&client, &requests).answers().await;
    let under_load = start.elapsed();
    // Longer than any keep-alive: an idle group must not be taken for a dead one either.
    tokio::time::sleep(Duration::from_secs(12)).await;
    let load = until_ready(&client).await;
    println!("4 streams of 24 tokens over 200 ms each way: {under_load:.1?}, {} epochs failed", failed_epochs(&load));
    assert_eq!(answers, expected);
    assert_eq!((failed_epochs(&load), load.epoch), (0, 1), "a false alarm: {load:?}");
    assert!(under_load > Duration::from_secs(1), "the delay was not on the way: {under_load:?}");
}

/// One rank's connection stops working under load; a spare worker takes the rank and every stream goes on.
async fn a_rank_falls_silent(weather: Weather) {
    let mut parts = Parts::default();
    let coordinator = parts.coordinator("");
    let proxy = Proxy::to(coordinator);
    parts.worker("worker 0", 0, &coordinator.to_string(), "");
    parts.worker("worker 1", 1, &proxy.address.to_string(), "");
    let client = connect(coordinator).await;
    until_ready(&client).await;
    // One too many now; it asks again until a rank is free.
    parts.worker("spare", 1, &coordinator.to_string(), "");
    let requests: Vec<_> = (0..8).map(|index| request(index, 1200)).collect();
    let expected = undisturbed(&client, &requests).await;
    let load = Load::start(&client, &requests);
    load.all_have(10).await;
    assert!(load.is_running(), "the streams were over before the fault");
    proxy.set(weather);
    let start = Instant::now();
    let noticed = until(&client, PATIENCE, |load| failed_epochs(load) > 0).await;
    let noticed_after = start.elapsed();
    let answers = load.answers().await;
    let done_after = start.elapsed();
    let end = until_ready(&client).await;
    println!(
        "{weather:?}: noticed after {noticed_after:.2?}, all streams complete after {done_after:.2?}, {}",
        noticed.detail
    );
    assert!(noticed_after <= NOTICED, "noticed only after {noticed_after:?}");
    assert_eq!(answers, expected, "no token lost, doubled or different");
    assert!(end.epoch > 1 && proxy.passed() > 0, "{end:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_black_hole_before_a_worker_is_noticed_and_its_streams_go_on_elsewhere() {
    a_rank_falls_silent(Weather::BlackHole).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_byte_a_second_before_a_worker_is_as_good_as_silence() {
    a_rank_falls_silent(Weather::Trickle).await;
}

/// Posts a completion; status and body. Curl ends it after a minute, and then the status is 0.
fn post(url: &str, body: &Value) -> (u16, String) {
    let limit = PATIENCE.as_secs().to_string();
    let mut curl = Command::new("curl");
    curl.args(["-s", "-m", &limit, "-w", "\n%{http_code}", "-H", "Content-Type: application/json"]);
    let (_, out, _) = output_of(curl.args(["-d", &body.to_string(), &format!("{url}/v1/completions")]));
    let (body, status) = out.rsplit_once('\n').unwrap_or_default();
    (status.trim().parse().unwrap_or(0), body.to_owned())
}

async fn post_later(url: &str, body: &Value) -> JoinHandle<(u16, String)> {
    let (url, body) = (url.to_owned(), body.clone());
    tokio::task::spawn_blocking(move || post(&url, &body))
}

fn completion(tokens: u32) -> Value {
    json!({"prompt": [3059, 304, 3061, 779], "max_tokens": tokens, "temperature": 0, "ignore_eos": true, "return_token_ids": true})
}

fn token_ids(answer: &str) -> Vec<u64> {
    let answer: Value = serde_json::from_str(answer).unwrap_or_else(|error| panic!("{error}: {answer}"));
    let ids = answer["choices"][0]["token_ids"].as_array().unwrap_or_else(|| panic!("{answer}")).clone();
    ids.iter().filter_map(Value::as_u64).collect()
}

/// Waits until the gateway says that it is ready; how long that took.
async fn until_served(gateway: &str) -> Duration {
    let (start, url) = (Instant::now(), format!("{gateway}/readyz"));
    loop {
        let (code, ..) = output_of(Command::new("curl").args(["-sf", "-m", "2", "-o", "/dev/null", &url]));
        if code == Some(0) {
            return start.elapsed();
        }
        assert!(start.elapsed() < PATIENCE, "the gateway is not ready");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// A proxy before the coordinator of a group that is ready.
async fn before_a_ready_group(parts: &mut Parts) -> Proxy {
    let coordinator = parts.coordinator("");
    for rank in 0..2 {
        parts.worker(&format!("worker {rank}"), rank, &coordinator.to_string(), "");
    }
    until_ready(&connect(coordinator).await).await;
    Proxy::to(coordinator)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_half_open_coordinator_is_a_503_at_once_and_a_pause_for_a_stream() {
    let mut parts = Parts::default();
    let proxy = before_a_ready_group(&mut parts).await;
    proxy.set(Weather::HalfOpen);
    let gateway = parts.gateway(&format!("http://{}", proxy.address), "");
    let start = Instant::now();
    let (status, body) = post(&gateway, &completion(8));
    let refused_after = start.elapsed();
    assert!(status == 503 && refused_after < Duration::from_secs(2), "{status} after {refused_after:?}: {body}");

    proxy.set(Weather::Clear);
    proxy.cut();
    until_served(&gateway).await;
    let expected = token_ids(&post(&gateway, &completion(1500)).1);
    let stream = post_later(&gateway, &completion(1500)).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(!stream.is_finished(), "the stream was over before the fault");
    proxy.set(Weather::HalfOpen);
    proxy.cut();
    tokio::time::sleep(Duration::from_secs(2)).await;
    proxy.set(Weather::Clear);
    // What was opened meanwhile stays dead: the gateway's own pings have to find that out.
    let start = Instant::now();
    let (status, body) = stream.await.unwrap();
    println!(
        "half-open: refused after {refused_after:.2?}; a stream went on {:.2?} after it was over",
        start.elapsed()
    );
    assert_eq!(status, 200, "{body}");
    assert_eq!(token_ids(&body), expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn one_byte_a_second_before_the_gateway_hangs_nobody() {
    let mut parts = Parts::default();
    let proxy = before_a_ready_group(&mut parts).await;
    let gateway = parts.gateway(&format!("http://{}", proxy.address), "");
    until_served(&gateway).await;
    let expected = token_ids(&post(&gateway, &completion(1500)).1);
    let stream = post_later(&gateway, &completion(1500)).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    proxy.set(Weather::Trickle);
    let start = Instant::now();
    let (status, body) = post(&gateway, &completion(8));
    let answered_after = start.elapsed();
    assert!(matches!(status, 503 | 504), "{status} after {answered_after:?}: {body}");
    println!("one byte a second: {status} after {answered_after:.1?}");
    proxy.set(Weather::Clear);
    let served_after = until_served(&gateway).await;
    let (status, body) = stream.await.unwrap();
    println!("ready again {served_after:.1?} after it was over");
    assert_eq!(status, 200, "{body}");
    assert_eq!(token_ids(&body), expected, "the stream goes on when the network does");
}

/// A coordinator, a rank and a gateway on one host and a rank on another, with TLS between them.
struct Apart {
    // The processes end before their hosts do.
    _parts: Parts,
    hosts: TwoHosts,
    _authority: tempfile::TempDir,
}

impl Apart {
    fn start() -> Self {
        let (mut parts, hosts, authority) = (Parts::default(), TwoHosts::new(), tempfile::tempdir().unwrap());
        let tls = authority.path().join("tls").display().to_string();
        let (code, _, stderr) = output_of(Command::new(binary()).args(["ca", &tls, "--host", "10.0.0.1"]));
        assert_eq!(code, Some(0), "{stderr}");
        let server = format!("--tls {tls} --coordinator https://10.0.0.1:7000");
        let mut start = |name: &str, host, args: String| parts.launch(name, hosts.phalanx(host, &args));
        start("coordinator", 0, format!("coordinator nano -tp 2 --listen 10.0.0.1:7000 --tls {tls}"));
        start("worker 0", 0, format!("worker nano --rank 0 --threads 1 {server}"));
        start("worker 1", 1, format!("worker nano --rank 1 --threads 1 {server}"));
        start("gateway", 0, format!("gateway nano --port 8000 {server}"));
        let cluster = Self { _parts: parts, hosts, _authority: authority };
        let deadline = Instant::now() + PATIENCE;
        while !cluster.post(&completion(1), &[]).contains("token_ids") {
            assert!(Instant::now() < deadline, "not ready: {}", cluster.post(&completion(1), &[]));
            std::thread::sleep(Duration::from_millis(100));
        }
        cluster
    }

    /// Posts a completion on the gateway's host, with more arguments of curl; answers with the body.
    fn post(&self, body: &Value, more: &[&str]) -> String {
        let mut curl = self.hosts.command(0, "curl");
        curl.args(["-sN", "-m", "150", "-H", "Content-Type: application/json", "-d", &body.to_string()]).args(more);
        output_of(curl.arg("http://127.0.0.1:8000/v1/completions")).1
    }
}

#[test]
fn streams_over_two_hosts_live_through_a_cut_wire() {
    let cluster = Apart::start();
    let bodies: Vec<Value> = (1..=4).map(|index| completion(300 * index)).collect();
    let expected: Vec<_> = bodies.iter().map(|body| token_ids(&cluster.post(body, &[]))).collect();
    let (answers, after) = std::thread::scope(|scope| {
        let cluster = &cluster;
        let streams: Vec<_> = bodies.iter().map(|body| scope.spawn(|| cluster.post(body, &[]))).collect();
        std::thread::sleep(Duration::from_millis(200));
        cluster.hosts.cut();
        assert!(streams.iter().any(|stream| !stream.is_finished()), "the streams were over before the cut");
        std::thread::sleep(Duration::from_secs(7));
        assert!(streams.iter().any(|stream| !stream.is_finished()), "a group without its second rank went on");
        cluster.hosts.mend();
        let mended = Instant::now();
        let answers: Vec<_> = streams.into_iter().map(|stream| token_ids(&stream.join().unwrap())).collect();
        (answers, mended.elapsed())
    });
    println!("4 streams complete {after:.1?} after a cut of 7 s");
    assert_eq!(answers, expected);
}

/// At full size the coordinator's own limit of two minutes ends them, else a deadline that the requests name.
#[test]
fn streams_over_a_wire_that_stays_cut_end_with_one_error() {
    let (header, limit): (&[&str], _) = match full_size() {
        true => (&[], Duration::from_secs(120)),
        false => (&["-H", "x-request-timeout-ms: 8000"], Duration::from_secs(8)),
    };
    let cluster = Apart::start();
    let mut body = completion(100_000);
    body["stream"] = json!(true);
    let start = Instant::now();
    let answers: Vec<String> = std::thread::scope(|scope| {
        let (cluster, body) = (&cluster, &body);
        let streams: Vec<_> = (0..4).map(|_| scope.spawn(|| cluster.post(body, header))).collect();
        std::thread::sleep(Duration::from_secs(1));
        cluster.hosts.cut();
        streams.into_iter().map(|stream| stream.join().unwrap()).collect()
    });
    let after = start.elapsed();
    println!("4 streams over a wire that stays cut ended after {after:.1?}");
    for answer in answers {
        let events: Vec<_> = answer.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
        let errors = events.iter().filter(|event| event.contains("\"error\"")).count();
        assert!(events.len() > 1 && errors == 1, "{} events, {errors} errors: {:?}", events.len(), events.last());
        assert!(events.last().unwrap().contains("\"error\""), "nothing comes after the error: {:?}", events.last());
    }
    assert!(after < limit + Duration::from_secs(15), "{after:?}");
}
