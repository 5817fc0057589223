//! `phalanx doctor` on a machine whose GPUs, if it has any, are hidden.

use std::process::Command;

use phalanx_tests::{
    cluster::{binary, output_of},
    root,
};
use serde_json::Value;

fn doctor(args: &[&str]) -> (Option<i32>, String) {
    let mut command = Command::new(binary());
    // An empty list hides every device from a driver that is there.
    command.arg("doctor").args(args).env("CUDA_VISIBLE_DEVICES", "").current_dir(root());
    let (code, stdout, stderr) = output_of(&mut command);
    assert_eq!(stderr, "", "{args:?}");
    (code, stdout)
}

#[test]
fn without_a_gpu_it_says_so_and_that_cpus_serve() {
    let (code, text) = doctor(&[]);
    assert_eq!(code, Some(3), "{text}");
    assert!(text.contains("no GPU can be used") && text.contains("libcuda.so.1"), "{text}");
    assert!(text.trim_end().ends_with("no GPU; ready to serve with --backend cpu"), "{text}");
    let (code, json) = doctor(&["--json", "nano"]);
    let report: Value = serde_json::from_str(&json).unwrap();
    assert_eq!((code, &report["verdict"], &report["gpu"]), (Some(3), &"cpu".into(), &"absent".into()), "{json}");
    assert_eq!((&report["devices"], &report["problems"]), (&Value::Array(vec![]), &Value::Array(vec![])), "{json}");
    assert!(report["model"]["layers"].as_u64().is_some_and(|layers| layers > 0), "{json}");
}

#[test]
fn a_checkpoint_that_is_not_whole_is_a_problem() {
    // Headers alone: the weights are not there.
    let (code, text) = doctor(&["tests/data/headers/gpt-oss-20b"]);
    assert_eq!(code, Some(1), "{text}");
    assert!(text.contains("problem ") && text.contains(".safetensors"), "{text}");
    let (code, text) = doctor(&["no-such-model"]);
    assert_eq!(code, Some(1), "{text}");
    assert!(text.contains("no-such-model"), "{text}");
}

#[test]
fn a_library_that_cannot_be_loaded_is_named() {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("libcuda.so.1"), "no library").unwrap();
    let mut command = Command::new(binary());
    command.arg("doctor").env("PHALANX_LIBRARY_PATH", directory.path());
    let (code, text, _) = output_of(&mut command);
    let named = text.contains(&format!("{}/libcuda.so.1", directory.path().display()));
    // A machine that has a driver elsewhere uses that one.
    assert!(named && code == Some(1) || !text.contains("no GPU can be used"), "{text}");
}
