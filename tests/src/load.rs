//! A small HTTP client for load: one connection a request, raw bytes where a test needs a client that behaves badly, and
//! the figures of processes that load leaves its marks on.

use std::{
    io,
    net::SocketAddr,
    time::{Duration, Instant},
};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

use crate::cluster::Cluster;

/// Longest time that an answer may take.
const PATIENCE: Duration = Duration::from_secs(120);

/// An answer, whole.
#[derive(Clone, Debug, Default)]
pub struct Answer {
    /// HTTP status; 0 if the connection ended before one came.
    pub status: u16,
    /// The header's lines.
    pub head: String,
    /// The body without its chunks' frames.
    pub body: String,
    /// Whether the body came to its own end: its last chunk, or as many bytes as announced.
    pub is_whole: bool,
    /// From the first byte sent to the last one read.
    pub took: Duration,
}

impl Answer {
    /// The `data:` of each event of a stream.
    pub fn events(&self) -> Vec<&str> {
        self.body.lines().filter_map(|line| line.strip_prefix("data: ")).collect()
    }

    /// Whether this is a stream that came to its end without an error.
    pub fn is_finished_stream(&self) -> bool {
        let events = self.events();
        let finished = events.iter().any(|event| event.contains("\"finish_reason\":\""));
        let failed = events.iter().any(|event| event.starts_with("{\"error\""));
        self.status == 200 && self.is_whole && finished && !failed && events.last() == Some(&"[DONE]")
    }

    fn parse(bytes: &[u8], took: Duration) -> Self {
        let text = String::from_utf8_lossy(bytes);
        let Some((head, body)) = text.split_once("\r\n\r\n") else { return Self { took, ..Self::default() } };
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or_default();
        let head = head.to_ascii_lowercase();
        let (body, is_whole) = if head.contains("transfer-encoding: chunked") {
            unchunked(body)
        } else {
            let length = head.split("content-length: ").nth(1).and_then(|rest| rest.lines().next()?.parse().ok());
            (body.to_owned(), length == Some(body.len()))
        };
        Self { status, head, body, is_whole, took }
    }
}

/// The content of chunks, and whether the last one came.
fn unchunked(mut rest: &str) -> (String, bool) {
    let mut body = String::new();
    while let Some((length, after)) = rest.split_once("\r\n") {
        match usize::from_str_radix(length, 16) {
            Ok(0) => return (body, true),
            Ok(length) if after.is_char_boundary(length) && length <= after.len() => {
                body.push_str(&after[..length]);
                rest = after[length..].trim_start_matches("\r\n");
            }
            _ => break,
        }
    }
    (body, false)
}

/// Where a cluster listens.
///
/// # Panics
/// When its address is none.
pub fn address(cluster: &Cluster) -> SocketAddr {
    let text = cluster.url.trim_start_matches("http://");
    text.parse().unwrap_or_else(|error| panic!("{text}: {error}"))
}

/// The bytes of a request.
pub fn request_bytes(path: &str, body: &Value) -> Vec<u8> {
    let body = body.to_string();
    let head = "host: localhost\r\nconnection: close\r\ncontent-type: application/json";
    format!("POST {path} HTTP/1.1\r\n{head}\r\ncontent-length: {}\r\n\r\n{body}", body.len()).into_bytes()
}

/// Sends a body and reads the whole answer.
///
/// # Errors
/// When the connection fails before an answer, or nothing comes for two minutes.
pub async fn post(address: SocketAddr, path: &str, body: &Value) -> io::Result<Answer> {
    exchange(address, &request_bytes(path, body)).await
}

/// Asks for a page and reads the whole answer.
///
/// # Errors
/// As [`post`].
pub async fn get(address: SocketAddr, path: &str) -> io::Result<Answer> {
    let request = format!("GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n");
    exchange(address, request.as_bytes()).await
}

async fn exchange(address: SocketAddr, request: &[u8]) -> io::Result<Answer> {
    let started = Instant::now();
    let mut bytes = Vec::new();
    let whole = async {
        let mut stream = TcpStream::connect(address).await?;
        stream.write_all(request).await?;
        // A reset after the answer is the server's way to end a connection whose request it did not read.
        match stream.read_to_end(&mut bytes).await {
            Err(error) if bytes.is_empty() => Err(error),
            _ => Ok(()),
        }
    };
    timeout(PATIENCE, whole).await??;
    Ok(Answer::parse(&bytes, started.elapsed()))
}

/// A completion of exactly `max_tokens` tokens after a prompt of `prompt_tokens` that differs with `seed`.
pub fn completion(seed: u64, prompt_tokens: u64, max_tokens: u64, stream: bool) -> Value {
    let prompt: Vec<u64> = (0..prompt_tokens).map(|at| mix(seed.wrapping_mul(7919) ^ at) % 3000).collect();
    json!({"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": true, "stream": stream})
}

/// A number that looks random; equal for equal `x`.
pub fn mix(mut x: u64) -> u64 {
    x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// The value below which this share of the times lies.
///
/// # Panics
/// When there are none.
pub fn percentile(times: &[Duration], share: f64) -> Duration {
    let mut sorted = times.to_vec();
    sorted.sort_unstable();
    let at = (sorted.len() as f64 * share).ceil() as usize;
    sorted.get(at.clamp(1, sorted.len().max(1)) - 1).copied().unwrap_or_else(|| panic!("no times were measured"))
}

/// Memory of a process that is not shared with a file, in bytes; 0 if it is gone.
pub fn resident_bytes(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
    line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or_default() * 1024
}

/// Number of open descriptors of a process; 0 if it is gone.
pub fn descriptors(pid: u32) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count)
}

/// The one child of a cluster that plays a role, such as ` gateway `.
///
/// # Panics
/// When there is none or more than one.
pub fn child(cluster: &Cluster, role: &str) -> u32 {
    match cluster.children(role).as_slice() {
        [pid] => *pid,
        other => panic!("children that are{role}: {other:?}"),
    }
}

/// Lets this process open as many files as it may, for tests with thousands of connections.
///
/// # Panics
/// When the system refuses.
pub fn raise_descriptor_limit() {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    let raised = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum });
    raised.unwrap_or_else(|error| panic!("descriptors: {error}"));
}
