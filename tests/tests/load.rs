//! Load that clients bring on purpose or by accident: slow ones, too many of them, and the end in the middle of it.

use std::{
    io::ErrorKind,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use phalanx_tests::{
    cluster::Cluster,
    full_size,
    load::{
        Answer, address, child, completion, descriptors, get, mix, percentile, post, raise_descriptor_limit,
        request_bytes, resident_bytes,
    },
};
use serde_json::{Value, json};
use tokio::{
    io::AsyncWriteExt,
    net::{TcpSocket, TcpStream},
    task::JoinSet,
    time::{sleep, timeout},
};

async fn start(args: &'static [&'static str]) -> Cluster {
    tokio::task::spawn_blocking(move || Cluster::start(args)).await.unwrap()
}

// --- slow clients ---------------------------------------------------------------------------------------------------

/// All slow clients must be gone this long after the last of them came.
const SHED_WITHIN: Duration = Duration::from_secs(40);
/// More memory than this must all of them together not take.
const MAX_MORE_BYTES: u64 = 256 << 20;
/// Good requests that are measured before, and while the slow clients are there.
const GOOD_REQUESTS: usize = 400;

/// What a good client asks: some 12 tokens.
fn question() -> Value {
    json!({"messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0})
}

async fn good_times(address: SocketAddr, count: usize) -> Vec<Duration> {
    let mut times = Vec::with_capacity(count);
    for _ in 0..count {
        let answer = post(address, "/v1/chat/completions", &question()).await.unwrap();
        assert_eq!(answer.status, 200, "a good request was refused: {}", answer.body);
        times.push(answer.took);
    }
    times
}

/// Where slow clients live: on a thread that runs when nobody else wants to. Real ones are on other machines; here they
/// share its cores with the server that they attack, and what they take of those is not what is to be measured.
fn elsewhere() -> tokio::runtime::Runtime {
    let last = || assert!(rustix::process::setpriority_process(None, 19).is_ok());
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).on_thread_start(last).enable_all().build().unwrap()
}

/// Behaves badly until the server ends the connection.
async fn misbehave(address: SocketAddr, kind: usize) {
    let socket = TcpSocket::new_v4().unwrap();
    // What a client does not read is to pile up at the server, not in this client's own buffer.
    socket.set_recv_buffer_size(4096).unwrap();
    let Ok(mut stream) = socket.connect(address).await else { return };
    match kind % 3 {
        0 => drip(stream, b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nx-slow: ").await,
        1 => {
            let head = "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json";
            drip(stream, format!("{head}\r\ncontent-length: 100000\r\n\r\n").as_bytes()).await;
        }
        // Of those that do not read, a few leave a long stream unread, and some so many pages that no buffer holds them. A
        // stream costs the engine what it costs it when it is read, so that more of them would be load and not slowness.
        _ if kind % 300 == 2 && kind < 2000 => {
            let long = completion(kind as u64, 4, 400, true);
            let _ = stream.write_all(&request_bytes("/v1/completions", &long)).await;
            never_read(stream).await;
        }
        _ => {
            let count = if kind % 30 == 5 { 200 } else { 1 };
            let pages = "GET /metrics HTTP/1.1\r\nhost: localhost\r\n\r\n".repeat(count);
            let _ = timeout(SHED_WITHIN, stream.write_all(pages.as_bytes())).await;
            never_read(stream).await;
        }
    }
}

/// One byte a second, until nobody takes it.
async fn drip(mut stream: TcpStream, beginning: &[u8]) {
    let mut sent = stream.write_all(beginning).await;
    while sent.is_ok() {
        sleep(Duration::from_secs(1)).await;
        sent = stream.write_all(b"a").await;
    }
}

/// Holds the connection without reading for longer than the server may.
async fn never_read(stream: TcpStream) {
    sleep(SHED_WITHIN + Duration::from_secs(20)).await;
    drop(stream);
}

/// The largest sum of the memory of these processes until `stop`.
async fn peak_bytes(pids: Vec<u32>, stop: Arc<AtomicBool>) -> u64 {
    let mut peak = 0;
    while !stop.load(Ordering::Relaxed) {
        peak = peak.max(pids.iter().map(|&pid| resident_bytes(pid)).sum());
        sleep(Duration::from_millis(200)).await;
    }
    peak
}

#[tokio::test(flavor = "multi_thread")]
async fn slow_clients_are_shed_and_good_requests_do_not_notice_them() {
    let count = if full_size() { 10_000 } else { 2000 };
    let cluster = start(&["-tp", "2"]).await;
    raise_descriptor_limit();
    let (address, gateway) = (address(&cluster), child(&cluster, " gateway "));
    let pids = vec![gateway, child(&cluster, " coordinator ")];
    good_times(address, 50).await;
    let idle = good_times(address, GOOD_REQUESTS).await;
    let (before, open) = (pids.iter().map(|&pid| resident_bytes(pid)).sum::<u64>(), descriptors(gateway));

    let stop = Arc::new(AtomicBool::new(false));
    let peak = tokio::spawn(peak_bytes(pids, Arc::clone(&stop)));
    let (elsewhere, mut slow) = (elsewhere(), JoinSet::new());
    for kind in 0..count {
        slow.spawn_on(misbehave(address, kind), elsewhere.handle());
        if kind % 50 == 0 {
            sleep(Duration::from_millis(10)).await;
        }
    }
    let last_came = Instant::now();
    while descriptors(gateway) < open + count * 9 / 10 && last_came.elapsed() < Duration::from_secs(5) {
        sleep(Duration::from_millis(20)).await;
    }
    let held = descriptors(gateway) - open;
    let mut busy = Vec::new();
    while busy.len() < GOOD_REQUESTS {
        busy.extend(good_times(address, 20).await);
    }
    let measured_until = last_came.elapsed();
    while descriptors(gateway) > open + 2 && last_came.elapsed() < SHED_WITHIN + Duration::from_secs(5) {
        sleep(Duration::from_millis(100)).await;
    }
    let (shed, left) = (last_came.elapsed(), descriptors(gateway).saturating_sub(open));
    let idle_again = good_times(address, GOOD_REQUESTS).await;
    stop.store(true, Ordering::Relaxed);
    let more = peak.await.unwrap().saturating_sub(before);
    slow.abort_all();
    elsewhere.shutdown_background();

    let p99 = |times: &[Duration]| percentile(times, 0.99).as_secs_f64() * 1e3;
    println!(
        "{count} slow clients, {held} held at once: good p99 {:.1} ms in the first {:.1} s, idle {:.1} ms before and {:.1} ms after; \
         {left} left after {:.1} s; {} MB more",
        p99(&busy),
        measured_until.as_secs_f64(),
        p99(&idle),
        p99(&idle_again),
        shed.as_secs_f64(),
        more >> 20
    );
    assert!(held > count / 2, "only {held} of {count} slow clients were there at once");
    assert!(left <= 2 && shed <= SHED_WITHIN, "{left} connections left after {shed:?}");
    assert!(more < MAX_MORE_BYTES, "{more} bytes more");
    let allowed = 2.0 * p99(&idle).max(p99(&idle_again));
    assert!(p99(&busy) < allowed, "good requests' p99 is {:.1} ms, allowed are {allowed:.1}", p99(&busy));
}

// --- too many -------------------------------------------------------------------------------------------------------

/// Tokens of each answer: long enough that work, not connections, is the limit.
const LONG: u64 = 192;
/// Sequences at once, and as many may wait.
const AT_ONCE: u64 = 16;

/// Requests of one phase: how many were answered, and how long the refusals took.
#[derive(Default)]
struct Tally {
    answered: AtomicU64,
    refused: std::sync::Mutex<Vec<Duration>>,
    strange: std::sync::Mutex<Vec<String>>,
}

impl Tally {
    async fn one(&self, address: SocketAddr, seed: u64, until: Instant) {
        let answer = post(address, "/v1/completions", &completion(seed, 16, LONG, false)).await;
        match answer {
            Ok(answer) if answer.status == 200 => {
                // What ends behind the phase is not of it.
                self.answered.fetch_add(u64::from(Instant::now() < until), Ordering::Relaxed);
            }
            Ok(answer) if answer.status == 429 && answer.head.contains("retry-after: ") => {
                self.refused.lock().unwrap().push(answer.took);
            }
            other => self.strange.lock().unwrap().push(format!("{other:?}")),
        }
    }
}

/// As many clients as there is room for, each with its next request as soon as it has its answer.
async fn peak_rate(address: SocketAddr, clients: u64, length: Duration) -> f64 {
    let (tally, until) = (Arc::new(Tally::default()), Instant::now() + length);
    let mut set = JoinSet::new();
    for client in 0..clients {
        let tally = Arc::clone(&tally);
        set.spawn(async move {
            let mut seed = client << 32;
            while Instant::now() < until {
                seed += 1;
                tally.one(address, seed, until).await;
            }
        });
    }
    set.join_all().await;
    assert!(tally.strange.lock().unwrap().is_empty(), "{:?}", tally.strange.lock().unwrap());
    tally.answered.load(Ordering::Relaxed) as f64 / length.as_secs_f64()
}

/// A stream of new clients at this rate, whatever becomes of those before.
async fn flood(address: SocketAddr, rate: f64, length: Duration) -> (f64, Vec<Duration>, Vec<String>) {
    let (tally, began) = (Arc::new(Tally::default()), Instant::now());
    let until = began + length;
    let mut set = JoinSet::new();
    let mut sent = 0_u64;
    while Instant::now() < until {
        let due = (began.elapsed().as_secs_f64() * rate) as u64;
        while sent < due {
            sent += 1;
            let tally = Arc::clone(&tally);
            set.spawn(async move { tally.one(address, 1 << 60 | sent, until).await });
        }
        sleep(Duration::from_millis(2)).await;
    }
    set.join_all().await;
    let answered = tally.answered.load(Ordering::Relaxed) as f64 / length.as_secs_f64();
    let (refused, strange) = (tally.refused.lock().unwrap().clone(), tally.strange.lock().unwrap().clone());
    (answered, refused, strange)
}

#[tokio::test(flavor = "multi_thread")]
async fn twenty_times_the_load_costs_no_goodput_and_refusals_are_fast() {
    let cluster = start(&["-tp", "2", "--max-num-seqs", "16", "--max-num-queued-reqs", "16"]).await;
    raise_descriptor_limit();
    let address = address(&cluster);
    let length = Duration::from_secs(if full_size() { 60 } else { 15 });
    peak_rate(address, AT_ONCE, Duration::from_secs(3)).await;
    // With a queue that is never empty, as in the flood.
    let peak = peak_rate(address, 2 * AT_ONCE, length).await;
    let (goodput, refused, strange) = flood(address, 20.0 * peak, length).await;
    let again = peak_rate(address, 2 * AT_ONCE, length).await;
    let p99 = percentile(&refused, 0.99);
    println!(
        "peak {peak:.1} and {again:.1} answers/s; with {:.0}/s offered {goodput:.1} answers/s, {} refusals, p50 {:?}, p99 {p99:?}",
        20.0 * peak,
        refused.len(),
        percentile(&refused, 0.5)
    );
    assert!(strange.is_empty(), "neither answered nor refused with 429 and Retry-After: {:?}", &strange[..1]);
    assert!(p99 < Duration::from_millis(20), "refusals take {p99:?}");
    assert!(goodput >= 0.95 * peak.min(again), "goodput {goodput:.1}/s of {peak:.1}/s");
    assert_eq!(get(address, "/readyz").await.unwrap().status, 200);
}

// --- the end --------------------------------------------------------------------------------------------------------

fn is_running(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(')').next().is_some_and(|rest| !rest.trim().is_empty() && !rest.trim().starts_with('Z'))
}

/// Whether a request was refused before its answer began: with 503, or because nobody listened any more.
fn is_refused(answer: &std::io::Result<Answer>) -> bool {
    match answer {
        Ok(answer) if answer.status == 503 => answer.head.contains("retry-after: "),
        // The connection was closed without a byte.
        Ok(answer) => answer.status == 0 && answer.body.is_empty(),
        Err(error) => matches!(error.kind(), ErrorKind::ConnectionRefused | ErrorKind::ConnectionReset),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_told_to_stop_under_load_finishes_every_stream() {
    let rounds = if full_size() { 50 } else { 5 };
    let (mut finished, mut refused) = (0, 0);
    for round in 0..rounds {
        let mut cluster = start(&["-tp", "2", "--max-num-seqs", "8"]).await;
        let (address, children) = (address(&cluster), cluster.children(""));
        let mut streams = JoinSet::new();
        // More than run at once, so that some are still waiting, and some tokens to go for each.
        for stream in 0..24_u64 {
            let dice = mix(round << 8 | stream);
            let body = completion(dice, 1 + dice % 64, 50 + dice % 400, true);
            streams.spawn(async move { post(address, "/v1/completions", &body).await });
        }
        sleep(Duration::from_millis(mix(round) % 600)).await;
        let stopped = tokio::task::spawn_blocking(move || (cluster.stop(), cluster));
        // They come too late and are told so, or find nobody.
        let late = post(address, "/v1/completions", &completion(round, 4, 400, true)).await;
        for answer in streams.join_all().await {
            match answer {
                Ok(answer) if answer.is_finished_stream() => finished += 1,
                // One that had not begun when the signal came may be refused, but never cut.
                Ok(answer) if answer.status == 503 && answer.head.contains("retry-after: ") => refused += 1,
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => refused += 1,
                other => panic!("round {round}: a stream was cut: {other:?}"),
            }
        }
        let late_is_whole = is_refused(&late) || late.as_ref().is_ok_and(Answer::is_finished_stream);
        assert!(late_is_whole, "round {round}: a late stream was cut: {late:?}");
        let (code, _cluster) = stopped.await.unwrap();
        assert_eq!(code, Some(0), "round {round}");
        let orphans: Vec<_> = children.into_iter().filter(|&pid| is_running(pid)).collect();
        assert!(orphans.is_empty(), "round {round}: {orphans:?} outlived their cluster");
    }
    println!(
        "{rounds} stops under load: {finished} streams finished, {refused} refused before they began, 0 cut, 0 orphans"
    );
    assert!(finished >= rounds * 8, "{finished} streams in {rounds} rounds are no load");
}
