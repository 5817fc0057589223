//! `phalanx serve` as a user meets it: the first answer, what is refused and how, and that nothing is left behind.

use std::{net::TcpListener, path::Path, process::Command};

use phalanx_tests::{
    cluster::{Cluster, binary, output_of},
    root,
};
use serde_json::{Value, json};

fn post(url: &str, body: &Value) -> Value {
    let text = body.to_string();
    let headers = ["-H", "Content-Type: application/json", "-d", text.as_str()];
    let (code, stdout, stderr) = output_of(Command::new("curl").args(["-sS", url]).args(headers));
    assert_eq!(code, Some(0), "{stderr}");
    serde_json::from_str(&stdout).unwrap_or_else(|error| panic!("{error}: {stdout}"))
}

fn ask(cluster: &Cluster, question: &str) -> String {
    let body = json!({"messages": [{"role": "user", "content": question}], "temperature": 0});
    let answer = post(&format!("{}/v1/chat/completions", cluster.url), &body);
    answer["choices"][0]["message"]["content"].as_str().unwrap_or_else(|| panic!("{answer}")).to_owned()
}

#[test]
fn the_printed_curl_answers_with_paris_also_streamed_and_in_korean() {
    let mut cluster = Cluster::start(&[]);
    let curl = cluster.banner.split("\ntry: ").nth(1).unwrap().trim().to_owned();
    let (code, stdout, stderr) = output_of(Command::new("sh").args(["-c", &curl]));
    assert_eq!(code, Some(0), "{stderr}");
    let answer: Value = serde_json::from_str(&stdout).unwrap();
    assert!(answer["choices"][0]["message"]["content"].as_str().unwrap().contains("Paris"), "{answer}");

    let streamed = curl.replace("curl -s", "curl -sN").replace("\"messages\"", "\"stream\": true, \"messages\"");
    let (_, stdout, _) = output_of(Command::new("sh").args(["-c", &streamed]));
    let events: Vec<&str> = stdout.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
    assert_eq!(events.last(), Some(&"[DONE]"), "{stdout}");
    let chunks = events[..events.len() - 1].iter().map(|event| serde_json::from_str::<Value>(event).unwrap());
    let text: String =
        chunks.filter_map(|chunk| Some(chunk["choices"][0]["delta"]["content"].as_str()?.to_owned())).collect();
    assert!(text.contains("Paris"), "{stdout}");

    assert!(ask(&cluster, "대한민국의 수도는 어디야?").contains("서울"));
    assert_eq!(cluster.stop(), Some(0));
}

#[test]
fn a_seed_for_all_makes_sampling_repeatable() {
    let cluster = Cluster::start(&["--seed", "7"]);
    let body = json!({"prompt": [3059, 304, 3061, 779], "max_tokens": 24, "temperature": 1.5, "ignore_eos": true});
    let sample = || post(&format!("{}/v1/completions", cluster.url), &body)["choices"][0]["text"].clone();
    let first = sample();
    assert!(first.as_str().is_some_and(|text| !text.is_empty()) && first == sample(), "{first}");
}

#[test]
fn children_are_named_by_role_and_rank_and_all_end_with_the_cluster() {
    let mut cluster = Cluster::start(&["-tp", "2"]);
    let children = [" coordinator ", " gateway ", "--rank=0", "--rank=1"].map(|role| cluster.children(role));
    assert!(children.iter().all(|pids| pids.len() == 1), "{children:?}");
    assert_eq!(cluster.stop(), Some(0));
    for pid in children.iter().flatten() {
        assert!(!Path::new(&format!("/proc/{pid}")).exists(), "process {pid} outlived its cluster");
    }
}

#[test]
fn children_end_when_the_supervisor_is_killed() {
    let cluster = Cluster::start(&["-tp", "2"]);
    let children = cluster.children("");
    assert_eq!(children.len(), 4);
    Command::new("kill").args(["-KILL", &cluster.pid().to_string()]).status().unwrap();
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(5);
    for pid in children {
        while is_running(pid) {
            assert!(std::time::Instant::now() < deadline, "process {pid} outlived its supervisor");
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
    }
}

/// Whether the process exists and is not merely waiting to be reaped.
fn is_running(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(')').next().is_some_and(|rest| !rest.trim().is_empty() && !rest.trim().starts_with('Z'))
}

fn refused(args: &[&str]) -> String {
    let (code, _, stderr) = output_of(Command::new(binary()).args(args));
    assert_ne!(code, Some(0), "{args:?} was accepted");
    assert!(!stderr.contains("panicked"), "{stderr}");
    stderr
}

#[test]
fn what_cannot_run_is_refused_in_a_clear_line() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let line = refused(&["serve", "--port", &port]);
    assert!(line.contains(&port) && line.contains("--port"), "{line}");
    let line = refused(&["serve", "-tp", "3", "--port", "0"]);
    assert!(line.contains("[1, 2, 4]"), "the sizes that fit are named: {line}");
    let line = refused(&["serve", "--load-format", "dummy", "--port", "0"]);
    assert!(line.contains("--load-format"), "{line}");
    let line = refused(&["serve", "--data-parallel-size", "2", "--port", "0"]);
    assert!(line.contains("--data-parallel-size 2"), "{line}");
    let line = refused(&["serve", "no-such-model", "--port", "0"]);
    assert!(line.contains("no-such-model") && line.contains("--model-dir"), "{line}");
    let line = refused(&["serve", "--host", "0.0.0.0", "--port", "0"]);
    assert!(line.contains("--insecure-bind"), "{line}");
    let line = refused(&["serve", "--kv-cache-memory-bytes", "1k", "--port", "0"]);
    assert!(line.to_lowercase().contains("kv cache"), "{line}");
}

#[test]
fn a_machine_without_gpu_is_told_in_one_line_what_it_lacks() {
    // Where there is a driver, it shows no device.
    let run = |args: &[&str]| output_of(Command::new(binary()).args(args).env("CUDA_VISIBLE_DEVICES", ""));
    for args in [["serve", "--backend", "cuda", "--port", "0"], ["worker", "--backend", "cuda", "--rank", "0"]] {
        let (code, stdout, stderr) = run(&args);
        assert_eq!((code, stdout.as_str()), (Some(78), ""), "{args:?}: {stderr}");
        assert_eq!(stderr.lines().count(), 1, "{args:?}: {stderr}");
        assert!(stderr.contains("no GPU can be used") && stderr.contains("libcuda.so.1"), "{args:?}: {stderr}");
    }
}

#[test]
fn a_broken_checkpoint_is_refused_before_ready_with_the_tensor_named() {
    let model = tempfile::tempdir().unwrap();
    for file in ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(root().join("deploy/models/nano").join(file), model.path().join(file)).unwrap();
    }
    let weights = std::fs::read(root().join("deploy/models/nano/model.safetensors")).unwrap();
    std::fs::write(model.path().join("model.safetensors"), &weights[..weights.len() - 1000]).unwrap();
    let line = refused(&["serve", model.path().to_str().unwrap(), "--port", "0"]);
    assert!(line.contains("model.safetensors") && line.contains("tensor") && line.contains("truncated"), "{line}");
}

#[test]
fn sixteen_requests_at_once_get_the_tokens_each_gets_alone() {
    let cluster = Cluster::start(&["-tp", "2", "--no-enable-prefix-caching"]);
    let url = format!("{}/v1/completions", cluster.url);
    let bodies: Vec<Value> = (0..16_u64)
        .map(|request| {
            let length = 5 + (request * 37) % 150;
            let prompt: Vec<u64> = (0..length).map(|i| (request * 7919 + i * 104_729) % 3000).collect();
            json!({"prompt": prompt, "max_tokens": 24, "temperature": 0, "ignore_eos": true, "return_token_ids": true})
        })
        .collect();
    let tokens =
        |answer: Value| answer["choices"][0]["token_ids"].as_array().unwrap_or_else(|| panic!("{answer}")).clone();
    let alone: Vec<_> = bodies.iter().map(|body| tokens(post(&url, body))).collect();
    assert!(alone.iter().all(|tokens| tokens.len() == 24));
    let together = std::thread::scope(|scope| {
        let threads: Vec<_> = bodies.iter().map(|body| scope.spawn(|| tokens(post(&url, body)))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
    });
    assert_eq!(alone, together);
}
