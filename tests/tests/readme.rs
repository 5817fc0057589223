//! Every command of the README is run as it stands there.

use std::{
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use phalanx_tests::{
    cluster::{Cluster, binary, output_of},
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
    let headings = ["Two commands", "Ask it something", "Serving the real models", "Several hosts", "Measuring"];
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

/// A network namespace that is gone when the test ends, with everything in it.
struct Namespace {
    name: String,
    processes: Vec<Child>,
}

impl Namespace {
    fn run(&mut self, command: &str) {
        let words = command.replace("target/release/phalanx", &binary().display().to_string());
        let mut enter = Command::new("ip");
        enter.args(["netns", "exec", &self.name]).args(words.split_whitespace()).current_dir(root());
        self.processes.push(enter.stdin(Stdio::null()).spawn().unwrap());
    }

    fn curl(&self, args: &[&str]) -> (Option<i32>, String) {
        let (code, stdout, _) =
            output_of(Command::new("ip").args(["netns", "exec", &self.name, "curl", "-s"]).args(args));
        (code, stdout)
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        for process in &mut self.processes {
            let _ = Command::new("kill").args(["-TERM", &process.id().to_string()]).status();
        }
        let deadline = Instant::now() + Duration::from_secs(10);
        for process in &mut self.processes {
            while matches!(process.try_wait(), Ok(None)) && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(20));
            }
            let _ = process.kill();
            let _ = process.wait();
        }
        let _ = Command::new("ip").args(["netns", "del", &self.name]).status();
    }
}

/// Two hosts, 10.0.0.1 and 10.0.0.2, on one wire.
fn two_hosts() -> [Namespace; 2] {
    let id = std::process::id();
    let hosts = ["a", "b"].map(|end| Namespace { name: format!("phx{id}{end}"), processes: Vec::new() });
    let [a, b] = [&hosts[0].name, &hosts[1].name];
    let steps = [
        format!("ip netns add {a}"),
        format!("ip netns add {b}"),
        format!("ip link add vxa{id} netns {a} type veth peer name vxb{id} netns {b}"),
        format!("ip -n {a} addr add 10.0.0.1/24 dev vxa{id}"),
        format!("ip -n {b} addr add 10.0.0.2/24 dev vxb{id}"),
        format!("ip -n {a} link set vxa{id} up"),
        format!("ip -n {b} link set vxb{id} up"),
        format!("ip -n {a} link set lo up"),
        format!("ip -n {b} link set lo up"),
    ];
    for step in steps {
        let words: Vec<_> = step.split_whitespace().collect();
        let (code, _, stderr) = output_of(Command::new(words[0]).args(&words[1..]));
        assert_eq!(code, Some(0), "{step} (network namespaces need root): {stderr}");
    }
    hosts
}

#[test]
fn two_hosts_serve_one_model() {
    let commands = under("Several hosts");
    let [first, second] = &commands[..] else { panic!("{} blocks", commands.len()) };
    let [mut a, mut b] = two_hosts();
    first.lines().for_each(|command| a.run(command));
    second.lines().for_each(|command| b.run(command));
    let deadline = Instant::now() + Duration::from_secs(60);
    while a.curl(&["-f", "http://127.0.0.1:8000/readyz"]).0 != Some(0) {
        assert!(
            Instant::now() < deadline,
            "the cluster of two hosts is not ready: {:?}",
            a.curl(&["http://127.0.0.1:8000/readyz"])
        );
        std::thread::sleep(Duration::from_millis(50));
    }
    let body = r#"{"temperature": 0, "messages": [{"role": "user", "content": "What is the capital of France?"}]}"#;
    let url = "http://127.0.0.1:8000/v1/chat/completions";
    let (_, answer) = a.curl(&[url, "-H", "Content-Type: application/json", "-d", body]);
    assert!(content(&answer).contains("Paris"), "{answer}");
}
