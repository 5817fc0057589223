//! What a person asks and what the model answers stands in no log, metric, span, file or command line, also when things
//! go wrong.

use std::{
    fs,
    path::Path,
    process::Command,
    sync::{Arc, Mutex},
    time::Duration,
};

use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
    trace_service_server::{TraceService, TraceServiceServer},
};
use phalanx_tests::{
    cluster::{Cluster, binary},
    load::{address, get, post, request_bytes},
};
use serde_json::{Value, json};
use tokio::{io::AsyncWriteExt, net::TcpStream, time::sleep};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status, transport::Server};

/// Stands in every prompt. The model repeats it, since it spells words.
const MARKER: &str = "qzxmarkerxzq";

/// Everything that was sent to the trace receiver, as text.
#[derive(Clone, Default)]
struct Spans(Arc<Mutex<String>>);

#[tonic::async_trait]
impl TraceService for Spans {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        self.0.lock().unwrap().push_str(&format!("{:?}\n", request.into_inner()));
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

fn chat(stream: bool) -> Value {
    let text = format!("Spell the word {MARKER}.");
    json!({"messages": [{"role": "user", "content": text}], "max_tokens": 120, "stream": stream, "user": "someone"})
}

/// Requests that are answered, refused in every way, given up by their clients, and interrupted by a lost rank and by a
/// lost coordinator.
async fn trouble(cluster: &Cluster) {
    let address = address(cluster);
    let path = "/v1/chat/completions";
    assert_eq!(post(address, path, &chat(false)).await.unwrap().status, 200);
    assert!(post(address, path, &chat(true)).await.unwrap().is_finished_stream());
    let mut wrong = chat(false);
    for (field, value) in [
        ("temperature", json!(9)),
        ("logit_bias", json!({"99999999": 1})),
        ("max_tokens", json!(100_000_000)),
        ("tools", json!([{"type": "function", "function": {"name": "bad name", "description": MARKER}}])),
        ("messages", json!([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": MARKER}}]}])),
        ("messages", json!([{"role": MARKER, "content": MARKER}])),
    ] {
        wrong[field] = value;
        let status = post(address, path, &wrong).await.unwrap().status;
        assert_eq!(status, 400, "{field}");
        wrong = chat(false);
    }
    let broken = format!("{}{MARKER}", request_bytes(path, &chat(false)).escape_ascii());
    for bytes in [broken.into_bytes(), request_bytes(path, &chat(true))] {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(&bytes).await.unwrap();
        sleep(Duration::from_millis(30)).await;
    }
    let body = format!("{{\"messages\": [{{\"role\": \"user\", \"content\": \"{MARKER}\" ");
    let not_json = Value::String(body);
    assert_eq!(post(address, path, &not_json).await.unwrap().status, 400);
    assert_eq!(post(address, "/tokenize", &json!({"prompt": MARKER})).await.unwrap().status, 200);
    for role in ["--rank=1", " coordinator "] {
        let streams: Vec<_> = (0..4)
            .map(|_| tokio::spawn(async move { post(address, "/v1/chat/completions", &chat(true)).await }))
            .collect();
        sleep(Duration::from_millis(15)).await;
        for pid in cluster.children(role) {
            Command::new("kill").args(["-KILL", &pid.to_string()]).status().unwrap();
        }
        for stream in streams {
            let _ = stream.await.unwrap();
        }
    }
}

/// Looks for the marker in a tree of files.
fn find_in_files(directory: &Path, found: &mut Vec<String>) {
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            find_in_files(&path, found);
        } else if contains(&fs::read(&path).unwrap()) {
            found.push(path.display().to_string());
        }
    }
}

fn contains(bytes: &[u8]) -> bool {
    bytes.windows(MARKER.len()).any(|window| window.eq_ignore_ascii_case(MARKER.as_bytes()))
}

/// Runs a cluster through trouble, logging at `level`, and names everything in which the marker stands.
async fn leaks(level: &'static str) -> Vec<String> {
    let directory = tempfile::tempdir().unwrap();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let spans = Spans::default();
    let server = Server::builder().add_service(TraceServiceServer::new(spans.clone()));
    tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
    let state = directory.path().join("state");
    fs::create_dir(&state).unwrap();
    // The shell only says where the log goes: it becomes the cluster.
    let mut command = Command::new("sh");
    command.args(["-c", "exec \"$0\" \"$@\" 2>log"]).arg(binary()).args(["serve", "-tp", "2", "--port", "0"]);
    command.args(["--log", level, "--otlp-traces-endpoint", &endpoint]).arg("--state-dir").arg(&state);
    command.current_dir(directory.path());
    let launch = move || Cluster::launch(command, Duration::from_secs(60));
    let mut cluster = tokio::task::spawn_blocking(launch).await.unwrap();
    trouble(&cluster).await;
    let mut found = Vec::new();
    for page in ["/metrics", "/stats", "/readyz", "/v1/models"] {
        if contains(get(address(&cluster), page).await.unwrap().body.as_bytes()) {
            found.push(page.to_owned());
        }
    }
    for pid in cluster.children("") {
        let arguments = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        found.extend(contains(&[arguments, environment].concat()).then(|| format!("process {pid}")));
    }
    // Stopping sends what is left of the spans.
    let banner = tokio::task::spawn_blocking(move || {
        cluster.stop();
        cluster.banner.clone()
    });
    found.extend(contains(banner.await.unwrap().as_bytes()).then(|| "standard output".to_owned()));
    sleep(Duration::from_millis(500)).await;
    let spans = spans.0.lock().unwrap().clone();
    assert!(spans.contains("chat nano"), "no spans came: {spans}");
    found.extend(contains(spans.as_bytes()).then(|| "spans".to_owned()));
    find_in_files(directory.path(), &mut found);
    let log = fs::read_to_string(directory.path().join("log")).unwrap();
    println!("--log {level}: {} bytes of log, {} bytes of spans", log.len(), spans.len());
    assert!(!log.is_empty(), "the troubles left no line of log");
    for line in log.lines().filter(|line| contains(line.as_bytes())).take(5) {
        println!("{line}");
    }
    found
}

#[tokio::test(flavor = "multi_thread")]
async fn no_prompt_stands_in_any_log_metric_span_or_file() {
    assert_eq!(leaks("warn").await, Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn no_prompt_stands_there_when_everything_is_logged() {
    assert_eq!(leaks("debug").await, Vec::<String>::new());
}
