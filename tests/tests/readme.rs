//! Every command of the README is run as it stands there.

use std::{
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use phalanx_tests::{
    cluster::{Cluster, binary, output_of},
    hosts::TwoHosts,
    parts::Parts,
    root,
};
use serde_json::Value;

/// A fenced `sh` block and the heading it stands under.
struct Block {
    heading: String,
    text: String,
}

fn blocks() -> Vec<Block> {
    let readme = std::fs::read_to_string(root().join("README.md")).unwrap();
    let (mut blocks, mut heading, mut open) = (Vec::new(), String::new(), None::<String>);
    for line in readme.lines() {
        match (&mut open, line) {
            (None, "```sh") => open = Some(String::new()),
            (Some(text), "```") => {
                blocks.push(Block { heading: heading.clone(), text: std::mem::take(text) });
                open = None;
            }
            (Some(text), line) => text.push_str(&format!("{line}\n")),
            (None, line) => {
                if let Some(title) = line.strip_prefix("## ") {
                    title.clone_into(&mut heading);
                }
            }
        }
    }
    blocks
}

fn under(heading: &str) -> Vec<String> {
    let found: Vec<_> = blocks().into_iter().filter(|b| b.heading == heading).map(|b| b.text).collect();
    assert!(!found.is_empty(), "the README has no commands under {heading:?}");
    found
}

/// Runs a block in a directory of its own; standard output and error.
fn run_in(directory: &Path, text: &str) -> (String, String) {
    let text = text.replace("target/release/phalanx", &binary().display().to_string());
    let (code, stdout, stderr) = output_of(Command::new("sh").args(["-ec", &text]).current_dir(directory));
    assert_eq!(code, Some(0), "{text}\n{stdout}\n{stderr}");
    (stdout, stderr)
}

/// Runs a block in the repository, with the README's address and binary replaced by the ones under test.
fn run(text: &str, cluster: &Cluster) -> String {
    let text = text
        .replace("http://127.0.0.1:8000", &cluster.url)
        .replace("phalanx bench --concurrency", &format!("phalanx bench --url {} --concurrency", cluster.url))
        .replace("target/release/phalanx", &binary().display().to_string());
    let mut shell = Command::new("sh");
    shell.args(["-ec", &text]).current_dir(root()).env("PHALANX_URL", &cluster.url);
    let (code, stdout, stderr) = output_of(&mut shell);
    assert_eq!(code, Some(0), "{text}\n{stdout}\n{stderr}");
    stdout
}

fn content(answer: &str) -> String {
    let answer: Value = serde_json::from_str(answer).unwrap_or_else(|error| panic!("{error}: {answer}"));
    answer["choices"][0]["message"]["content"].as_str().unwrap_or_default().to_owned()
}

#[test]
fn every_block_is_covered_by_a_test() {
    let headings =
        ["Two commands", "Ask it something", "Serving the real models", "Several hosts", "Keys and HTTPS", "Measuring"];
    let missing: Vec<_> =
        blocks().into_iter().filter(|b| !headings.contains(&b.heading.as_str())).map(|b| b.text).collect();
    assert!(missing.is_empty(), "commands that no test runs: {missing:?}");
    assert_eq!(under("Two commands"), ["cargo run --release -- serve\n", "tests/run\n"]);
}

#[test]
fn the_first_command_starts_a_cluster() {
    let block = &under("Two commands")[0];
    let mut words = block.split_whitespace();
    let mut command = Command::new(words.next().unwrap());
    command.args(words).args(["--port", "0"]).current_dir(root());
    // What cargo tells a test about itself would make cargo run build scripts anew, and with them half of everything.
    let of_a_package = |name: &str| name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_");
    for (name, _) in std::env::vars_os().filter(|(name, _)| of_a_package(&name.to_string_lossy())) {
        command.env_remove(name);
    }
    let mut cluster = Cluster::launch(command, Duration::from_secs(600));
    assert!(cluster.banner.contains("ready: nano on 2 cpu rank(s)"), "{}", cluster.banner);
    assert_eq!(cluster.stop(), Some(0));
}

#[test]
fn what_it_is_asked_is_answered() {
    let cluster = Cluster::start(&["--current-date", "none"]);
    let asked = under("Ask it something");
    let [paris, korean, tool, profile, stats, chat] = &asked[..] else { panic!("{} blocks", asked.len()) };
    assert!(content(&run(paris, &cluster)).contains("Paris"));
    let streamed = run(korean, &cluster);
    assert!(streamed.trim_end().ends_with("data: [DONE]") && streamed.contains("\"usage\":{"), "{streamed}");
    let call: Value = serde_json::from_str(&run(tool, &cluster)).unwrap();
    assert_eq!(call["choices"][0]["message"]["tool_calls"][0]["function"]["name"], "get_weather", "{call}");
    assert!(!content(&run(profile, &cluster)).is_empty());
    let stats: Value = serde_json::from_str(&run(stats, &cluster)).unwrap();
    assert_eq!((&stats["model_id"], &stats["backend"]), (&"nano".into(), &"cpu".into()), "{stats}");
    assert_eq!(stats["parallelism"], "tp2", "{stats}");
    assert!(stats.to_string().contains("latency_first"), "the profile that ran is named: {stats}");
    assert!(run(chat, &cluster).contains("Tuesday"));
}

#[test]
fn the_plan_of_the_120b_model_is_shown() {
    let cluster = Cluster::start(&[]);
    let table = run(&under("Serving the real models")[0], &cluster);
    assert!(table.contains("gpt-oss-120b") && table.lines().count() > 5, "{table}");
}

#[test]
fn both_benchmarks_run() {
    let cluster = Cluster::start(&[]);
    let text = &under("Measuring")[0];
    let (serving, engine) = text.trim().split_once('\n').unwrap();
    let printed = run(serving, &cluster);
    assert!(printed.contains("out tok/s") && printed.lines().count() >= 4, "{printed}");
    let printed = run(engine, &cluster);
    assert!(printed.contains("bandwidth"), "{printed}");
}

/// Starts each line of a block on a host; the name of its subcommand is the process's name there.
fn start_lines(parts: &mut Parts, hosts: &TwoHosts, host: usize, block: &str, tls: &str) {
    for line in block.lines() {
        let arguments = line.strip_prefix("target/release/phalanx ").unwrap();
        let arguments = arguments.replace("--tls tls", &format!("--tls {tls}"));
        let name = format!("{host}-{}", arguments.split_whitespace().next().unwrap());
        let mut command = hosts.phalanx(host, &arguments);
        command.current_dir(root());
        parts.launch(&name, command);
    }
}

#[test]
fn two_hosts_serve_one_model() {
    let commands = under("Several hosts");
    let [authority, first, second] = &commands[..] else { panic!("{} blocks", commands.len()) };
    let directory = tempfile::tempdir().unwrap();
    run_in(directory.path(), authority);
    let tls = directory.path().join("tls").display().to_string();
    let hosts = TwoHosts::new();
    let mut parts = Parts::default();
    start_lines(&mut parts, &hosts, 0, first, &tls);
    start_lines(&mut parts, &hosts, 1, second, &tls);
    let curl = |args: &[&str]| {
        let (code, stdout, _) = output_of(hosts.command(0, "curl").arg("-s").args(args));
        (code, stdout)
    };
    let deadline = Instant::now() + Duration::from_secs(60);
    while curl(&["-f", "http://127.0.0.1:8000/readyz"]).0 != Some(0) {
        let readiness = curl(&["http://127.0.0.1:8000/readyz"]);
        assert!(Instant::now() < deadline, "the cluster of two hosts is not ready: {readiness:?}");
        std::thread::sleep(Duration::from_millis(50));
    }
    let body = r#"{"temperature": 0, "messages": [{"role": "user", "content": "What is the capital of France?"}]}"#;
    let url = "http://127.0.0.1:8000/v1/chat/completions";
    let (_, answer) = curl(&[url, "-H", "Content-Type: application/json", "-d", body]);
    assert!(content(&answer).contains("Paris"), "{answer}");
}

#[test]
fn the_keys_that_are_made_open_the_gateway() {
    let directory = tempfile::tempdir().unwrap();
    let (_, stderr) = run_in(directory.path(), &under("Keys and HTTPS")[0]);
    let keys: Vec<&str> = stderr.split_whitespace().filter(|word| word.starts_with("sk-")).collect();
    assert_eq!(keys.len(), 2, "{stderr}");
    let file = directory.path().join("keys.yaml");
    assert!(!std::fs::read_to_string(&file).unwrap().contains("sk-"), "the file keeps no key");
    let cluster = Cluster::start(&["--api-key-file", &file.display().to_string()]);
    let status = |key: &str| {
        let mut curl = Command::new("curl");
        curl.args(["-s", "-o", "/dev/null", "-w", "%{http_code}", "-H", &format!("Authorization: Bearer {key}")]);
        output_of(curl.arg(format!("{}/v1/models", cluster.url))).1
    };
    assert_eq!([status(keys[0]), status(keys[1]), status("sk-wrong")], ["200", "200", "401"]);
}
