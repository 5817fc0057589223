//! A long mixed load leaves nothing behind: no memory, no descriptors, no sequences.
//!
//! Three minutes, or an hour at full size; `PHALANX_SOAK_S` sets another length in seconds.

use std::{
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
    load::{address, completion, descriptors, get, mix, post, raise_descriptor_limit, request_bytes, resident_bytes},
};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::JoinSet,
    time::sleep,
};

const CLIENTS: u64 = 6;
/// Memory is looked at this often.
const SAMPLE: Duration = Duration::from_millis(500);
/// Of each stretch of this many samples the lowest counts: what is in flight comes and goes, what leaks stays.
const STRETCH: usize = 20;
/// The contract's figure, in bytes an hour.
const MAX_SLOPE: f64 = 1e6;
/// Over less than this many seconds a slope says nothing: arenas and tables still fill. Then only the growth counts.
const SLOPE_AFTER: u64 = 900;
/// Most that a process may grow from warm-up to end, in bytes.
const MAX_GROWTH: f64 = 2e6;

fn chat(dice: u64) -> Value {
    let questions = ["What is the capital of France?", "Count from 1 to 10.", "대한민국의 수도는 어디야?", "Hello!"];
    let question = questions[dice as usize % questions.len()];
    json!({"messages": [{"role": "user", "content": question}], "max_tokens": 40, "stream": dice & 64 != 0})
}

/// Starts a stream and hangs up somewhere in it, or before it.
async fn hang_up(address: SocketAddr, dice: u64) {
    let Ok(mut stream) = TcpStream::connect(address).await else { return };
    let _ = stream.write_all(&request_bytes("/v1/completions", &completion(dice, 1 + dice % 200, 300, true))).await;
    let mut wanted = dice as usize % 6000;
    let mut buffer = [0; 512];
    while wanted > 0 {
        match stream.read(&mut buffer).await {
            Ok(read) if read > 0 => wanted = wanted.saturating_sub(read),
            _ => return,
        }
    }
}

/// One of everything that clients do; says what it was when the answer is not as it must be.
async fn something(address: SocketAddr, dice: u64) -> Result<(), String> {
    let expect = |what: &str, status: u16, answer: std::io::Result<phalanx_tests::load::Answer>| match answer {
        Ok(answer) if answer.status == status => Ok(()),
        other => Err(format!("{what}: {other:?}")),
    };
    match dice % 8 {
        0 | 1 => expect("chat", 200, post(address, "/v1/chat/completions", &chat(dice >> 8)).await),
        2 => {
            let body = completion(dice, 1 + (dice >> 8) % 600, 1 + (dice >> 20) % 60, false);
            expect("completion", 200, post(address, "/v1/completions", &body).await)
        }
        3 | 4 => {
            hang_up(address, dice >> 8).await;
            Ok(())
        }
        5 => expect("bad body", 400, post(address, "/v1/chat/completions", &json!({"messages": dice})).await),
        6 => expect("metrics", 200, get(address, "/metrics").await),
        _ => expect("tokenize", 200, post(address, "/tokenize", &json!({"prompt": "word ".repeat(200)})).await),
    }
}

async fn churn(address: SocketAddr, client: u64, stop: Arc<AtomicBool>, done: Arc<AtomicU64>) {
    let mut dice = mix(client);
    while !stop.load(Ordering::Relaxed) {
        dice = mix(dice);
        something(address, dice).await.unwrap_or_else(|problem| panic!("{problem}"));
        done.fetch_add(1, Ordering::Relaxed);
        sleep(Duration::from_millis((dice >> 50) % 20)).await;
    }
}

/// Least-squares slope through the lowest samples of each stretch, its standard error, both a second, and the growth
/// from the first to the last of them along the line.
fn trend(samples: &[f64]) -> (f64, f64, f64) {
    let lows: Vec<f64> =
        samples.chunks_exact(STRETCH).map(|stretch| stretch.iter().copied().fold(f64::INFINITY, f64::min)).collect();
    let step = SAMPLE.as_secs_f64() * STRETCH as f64;
    let count = lows.len() as f64;
    let (mid_x, mid_y) = ((count - 1.0) / 2.0, lows.iter().sum::<f64>() / count);
    let spread: f64 = (0..lows.len()).map(|x| (x as f64 - mid_x).powi(2)).sum();
    let slope = lows.iter().enumerate().map(|(x, y)| (x as f64 - mid_x) * (y - mid_y)).sum::<f64>() / spread;
    let miss = |(x, y): (usize, &f64)| (y - mid_y - slope * (x as f64 - mid_x)).powi(2);
    let error = (lows.iter().enumerate().map(miss).sum::<f64>() / (count - 2.0) / spread).sqrt();
    (slope / step, error / step, slope * (count - 1.0))
}

async fn quiet_descriptors(address: SocketAddr, pids: &[u32]) -> Vec<usize> {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let stats: Value = serde_json::from_str(&get(address, "/stats").await.unwrap().body).unwrap();
        if (stats["running"].as_u64(), stats["waiting"].as_u64()) == (Some(0), Some(0)) {
            break;
        }
        assert!(Instant::now() < deadline, "requests are left behind: {stats}");
        sleep(Duration::from_millis(100)).await;
    }
    sleep(Duration::from_secs(1)).await;
    pids.iter().map(|&pid| descriptors(pid)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_long_mixed_load_leaves_nothing_behind() {
    // A KV cache that the warm-up fills: its pages become resident as prefixes come to lie in them, which is no leak.
    let small = ["-tp", "2", "--kv-cache-memory-bytes", "32m"];
    let cluster = tokio::task::spawn_blocking(move || Cluster::start(&small)).await.unwrap();
    raise_descriptor_limit();
    let length = std::env::var("PHALANX_SOAK_S").ok().and_then(|seconds| seconds.parse().ok());
    let length: u64 = length.unwrap_or(if full_size() { 3600 } else { 180 });
    let warm_up = (length / 3).min(600);
    let roles = [" gateway ", " coordinator ", "--rank=0", "--rank=1"];
    let pids = roles.map(|role| phalanx_tests::load::child(&cluster, role));
    let address = address(&cluster);
    let done = Arc::new(AtomicU64::new(0));
    let start_churn = || {
        let (stop, mut clients) = (Arc::new(AtomicBool::new(false)), JoinSet::new());
        for client in 0..CLIENTS {
            clients.spawn(churn(address, client, Arc::clone(&stop), Arc::clone(&done)));
        }
        (stop, clients)
    };
    let (stop, clients) = start_churn();
    sleep(Duration::from_secs(warm_up)).await;
    stop.store(true, Ordering::Relaxed);
    clients.join_all().await;
    let before = quiet_descriptors(address, &pids).await;

    let (stop, clients) = start_churn();
    let mut samples = [const { Vec::new() }; 4];
    let until = Instant::now() + Duration::from_secs(length - warm_up);
    while Instant::now() < until {
        for (samples, &pid) in samples.iter_mut().zip(&pids) {
            samples.push(resident_bytes(pid) as f64);
        }
        sleep(SAMPLE).await;
    }
    stop.store(true, Ordering::Relaxed);
    clients.join_all().await;
    let after = quiet_descriptors(address, &pids).await;

    println!("{} actions of {CLIENTS} clients in {length} s", done.load(Ordering::Relaxed));
    for ((role, samples), open) in roles.iter().zip(&samples).zip(before.iter().zip(&after)) {
        let (slope, error, growth) = trend(samples);
        let (slope, error) = (slope * 3600.0, error * 3600.0);
        println!(
            "{role}: {:.1} MB, {:+.2} ± {:.2} MB/h ({growth:+.0} bytes in all), descriptors {} and {}",
            samples.last().unwrap() / 1e6,
            slope / 1e6,
            error / 1e6,
            open.0,
            open.1
        );
        let is_long = length - warm_up >= SLOPE_AFTER;
        assert!(!is_long || slope < MAX_SLOPE, "{role} grows by {slope:.0} ± {error:.0} bytes an hour");
        assert!(growth < MAX_GROWTH, "{role} has grown by {growth:.0} bytes");
        assert!(*open.1 <= open.0 + 1, "{role} has {} descriptors open, {} before", open.1, open.0);
    }
}
