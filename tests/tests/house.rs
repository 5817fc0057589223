//! The house rules that a machine can hold: file lengths, arrows between crates, doors of foreign crates, the places of
//! `unsafe`, nothing left unfinished.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");
/// Longest file, in lines before its unit tests.
const MAX_LINES: usize = 500;

fn sources() -> Vec<(String, String)> {
    let mut files = Vec::new();
    for room in ["proto", "coordinator", "worker", "gateway", "tests", "deploy/launcher"] {
        collect(&Path::new(ROOT).join(room), &mut files);
    }
    assert!(files.len() > 40, "only {} source files found below {ROOT}", files.len());
    files
}

fn collect(directory: &Path, files: &mut Vec<(String, String)>) {
    let mut entries: Vec<PathBuf> = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    entries.sort();
    for path in entries {
        if path.is_dir() {
            if path.file_name().is_none_or(|name| name != "target") {
                collect(&path, files);
            }
        } else if path.extension().is_some_and(|ext| ext == "rs" || ext == "cu") {
            let name = path.strip_prefix(ROOT).unwrap().display().to_string();
            files.push((name, fs::read_to_string(&path).unwrap()));
        }
    }
}

/// The part of a file before its unit tests.
fn product(text: &str) -> &str {
    text.split("\n#[cfg(test)]").next().unwrap()
}

#[track_caller]
fn assert_none(what: &str, found: Vec<String>) {
    assert!(found.is_empty(), "{what}:\n  {}", found.join("\n  "));
}

#[test]
fn files_fit_in_a_readers_head() {
    let long = |(name, text): &(String, String)| {
        let lines = product(text).lines().count();
        (lines > MAX_LINES).then(|| format!("{name}: {lines} lines, at most {MAX_LINES}"))
    };
    assert_none("files that tell more than one story", sources().iter().filter_map(long).collect());
}

#[test]
fn unsafe_stands_only_where_the_house_allows_it() {
    let allowed = [
        "worker/src/backend/cuda/",
        "worker/src/backend/cpu/simd/",
        "worker/src/collective/",
        // Loads compiled kernels and gives them memory with guard pages.
        "worker/tests/emulator/",
    ];
    let found = sources().into_iter().filter(|(name, text)| {
        let uses = text.lines().any(|line| {
            let code = line.trim_start();
            let word = |start: &str| code.starts_with(start) || code.contains(&format!(" {start}"));
            !code.starts_with("//")
                && (word("unsafe {") || word("unsafe fn") || word("unsafe impl") || word("unsafe extern"))
        });
        uses && !allowed.iter().any(|place| name.starts_with(place)) && name != "tests/tests/house.rs"
    });
    assert_none("unsafe outside its places", found.map(|(name, _)| name).collect());
}

#[test]
fn crates_point_only_where_the_design_says() {
    let arrows: [(&str, &[&str]); 6] = [
        ("proto", &[]),
        ("coordinator", &["phalanx-proto"]),
        ("worker", &["phalanx-proto"]),
        ("gateway", &["phalanx-proto"]),
        ("deploy/launcher", &["phalanx-coordinator", "phalanx-gateway", "phalanx-proto", "phalanx-worker"]),
        ("tests", &["phalanx-coordinator", "phalanx-gateway", "phalanx-proto", "phalanx-worker"]),
    ];
    for (room, allowed) in arrows {
        let manifest = fs::read_to_string(Path::new(ROOT).join(room).join("Cargo.toml")).unwrap();
        let ours = manifest.lines().filter_map(|line| {
            let name = line.split(['.', ' ', '=']).next().unwrap();
            (name.starts_with("phalanx-") && !line.starts_with("name")).then_some(name)
        });
        let wrong: BTreeSet<_> = ours.filter(|name| !allowed.contains(name)).collect();
        assert!(wrong.is_empty(), "{room} depends on {wrong:?}, allowed are {allowed:?}");
    }
}

#[test]
fn foreign_crates_stay_behind_their_doors() {
    let doors = [
        ("axum::", "gateway/"),
        ("etcd_client::", "coordinator/src/membership/etcd.rs"),
        ("candle_core::", "worker/src/"),
        ("cudarc::", "worker/src/backend/cuda/"),
        ("fancy_regex::", "gateway/src/tokenizer"),
    ];
    let mut found = Vec::new();
    for (name, text) in sources() {
        for (krate, door) in doors {
            let uses = text.lines().any(|line| !line.trim_start().starts_with("//") && line.contains(krate));
            if uses && !name.starts_with(door) && name != "tests/tests/house.rs" {
                found.push(format!("{name} uses {krate} (its door is {door})"));
            }
        }
    }
    assert_none("foreign crates outside their doors", found);
}

#[test]
fn the_engine_reads_no_clock_and_does_no_io() {
    let forbidden =
        ["tokio::", "std::fs", "std::net", "Instant::now", "SystemTime", "std::thread", "async fn", "tonic::"];
    let mut found = Vec::new();
    for (name, text) in sources().into_iter().filter(|(name, _)| name.starts_with("coordinator/src/engine")) {
        for word in forbidden {
            if product(&text).lines().any(|line| !line.trim_start().starts_with("//") && line.contains(word)) {
                found.push(format!("{name}: {word}"));
            }
        }
    }
    assert_none("I/O, clocks or async below the engine", found);
}

#[test]
fn nothing_is_left_unfinished() {
    // Spelled in two halves, so that this file does not find itself.
    let marks = [("TO", "DO"), ("FIX", "ME"), ("todo", "!("), ("unimple", "mented!("), ("#[ig", "nore")];
    let mut found = Vec::new();
    for (name, text) in sources() {
        for (number, line) in text.lines().enumerate() {
            if marks.iter().any(|(a, b)| line.contains(&format!("{a}{b}"))) {
                found.push(format!("{name}:{}: {}", number + 1, line.trim()));
            }
        }
    }
    assert_none("unfinished marks", found);
}

#[test]
fn the_top_level_is_the_designs() {
    let allowed = ["Cargo.toml", "Cargo.lock", "CONTRIBUTING.md", "LICENSE", "README.md", "clippy.toml", "coordinator"];
    let allowed: BTreeSet<_> = allowed
        .into_iter()
        .chain(["deny.toml", "deploy", "gateway", "proto", "rustfmt.toml", "target", "tests", "worker"])
        .collect();
    let found = fs::read_dir(ROOT).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let found = found.filter(|name| !name.starts_with('.') && !allowed.contains(name.as_str()));
    assert_none("files at the top level that the design does not name", found.collect());
}
