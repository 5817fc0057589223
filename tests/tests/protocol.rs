//! The epoch protocol as a model, explored completely by `spin`; and what it must find when a rule is left out.

use std::{
    fs,
    path::Path,
    process::{Command, Output},
    time::Instant,
};

use phalanx_tests::root;

fn run(directory: &Path, program: &str, args: &[&str]) -> String {
    let command = Command::new(program).args(args).current_dir(directory).output();
    let Output { status, stdout, stderr } =
        command.unwrap_or_else(|error| panic!("{program}: {error}; tests/run installs it"));
    let text = String::from_utf8_lossy(&stdout).into_owned() + &String::from_utf8_lossy(&stderr);
    assert!(status.success(), "{program} {args:?}: {text}");
    text
}

/// The number behind or in front of a word of the verifier's report.
fn figure(report: &str, line: &str, parse: fn(&str) -> Option<f64>) -> f64 {
    let found = report.lines().find(|text| text.contains(line)).and_then(parse);
    found.unwrap_or_else(|| panic!("no {line:?} in:\n{report}"))
}

/// Explores the model with these definitions; answers with the number of errors and of states.
fn verify(name: &str, definitions: &[&str]) -> (u64, f64) {
    let started = Instant::now();
    let directory = tempfile::tempdir().unwrap();
    let model = fs::read_to_string(root().join("tests/protocol/epoch.pml")).unwrap();
    fs::write(directory.path().join("epoch.pml"), model).unwrap();
    let at = directory.path();
    run(at, "spin", &[definitions, &["-a", "epoch.pml"]].concat());
    run(at, "cc", &["-O2", "-DCOLLAPSE", "-o", "pan", "pan.c"]);
    let report = run(at, "./pan", &["-m200000", "-n"]);
    assert!(!report.contains("max search depth too small"), "{report}");
    let errors = figure(&report, "errors: ", |line| line.rsplit("errors: ").next()?.trim().parse().ok());
    let states = figure(&report, "states, stored", |line| line.split_whitespace().next()?.parse().ok());
    println!("{name}: {errors} errors, {states} states, {:.1} s", started.elapsed().as_secs_f64());
    (errors as u64, states)
}

#[test]
fn the_protocol_keeps_every_collective_within_one_plan() {
    let (errors, states) = verify("as it is", &["-DMAXT=2"]);
    assert_eq!(errors, 0);
    assert!(states > 1e6, "only {states} states were explored");
}

#[test]
fn each_rule_is_needed() {
    for broken in ["REUSE", "NOFENCE", "NOSEQ"] {
        let (errors, _) = verify(broken, &["-DMAXT=2", &format!("-D{broken}")]);
        assert_eq!(errors, 1, "leaving out what {broken} leaves out must be found");
    }
}
