//! The release's `tokenizer.json`, built from the rank file that the crate `tiktoken-rs` ships.
//!
//! The file is 28 MB, so it is not in the repository; it is built once into `target/tmp` and checked against its sha256.
#![allow(clippy::expect_used, clippy::panic, reason = "helpers of tests fail by panicking")]

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use base64::Engine as _;
use serde::Serialize;
use sha2::{Digest, Sha256};

/// What the built file must hash to: it is the release's, byte for byte.
const SHA256: &str = "0614fe83cadab421296e664e1f48f4261fa8fef6e03e63bb75c20f38e37d07d3";

const PATTERN: &str = concat!(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);

/// The special tokens that have a name of their own; the others from 199998 to 200018 are reserved ones.
const NAMES: [(u32, &str); 10] = [
    (199_998, "<|startoftext|>"),
    (199_999, "<|endoftext|>"),
    (200_002, "<|return|>"),
    (200_003, "<|constrain|>"),
    (200_005, "<|channel|>"),
    (200_006, "<|start|>"),
    (200_007, "<|end|>"),
    (200_008, "<|message|>"),
    (200_012, "<|call|>"),
    (200_018, "<|endofprompt|>"),
];

/// The path of the release's `tokenizer.json`, built if it is not there yet.
pub(crate) fn tokenizer_json() -> PathBuf {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join("o200k_harmony.tokenizer.json");
    if fs::read(&path).is_ok_and(|json| sha256(&json) == SHA256) {
        return path;
    }
    let json = build(&fs::read(rank_file()).expect("the rank file"));
    assert_eq!(sha256(&json), SHA256, "the tokenizer built here is not the release's");
    // Test processes run side by side: each writes a file of its own, and the last rename wins.
    let own = path.with_extension(format!("{}.part", std::process::id()));
    fs::write(&own, &json).expect("write the tokenizer");
    fs::rename(&own, &path).expect("put the tokenizer in its place");
    path
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// `assets/o200k_base.tiktoken` in the folder of the crate `tiktoken-rs`.
fn rank_file() -> PathBuf {
    let cargo = env!("CARGO");
    let version = Command::new(cargo).arg("-vV").output().expect("run cargo");
    let version = String::from_utf8(version.stdout).expect("cargo's version is text");
    let host = version.lines().find_map(|line| line.strip_prefix("host: ")).expect("cargo names its host");
    // Without the filter cargo would want the packages of every platform.
    let metadata = Command::new(cargo)
        .args(["metadata", "--format-version", "1", "--filter-platform", host, "--manifest-path"])
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml"))
        .output()
        .expect("run cargo metadata");
    assert!(metadata.status.success(), "cargo metadata: {}", String::from_utf8_lossy(&metadata.stderr));
    let metadata: serde_json::Value = serde_json::from_slice(&metadata.stdout).expect("cargo metadata is JSON");
    let packages = metadata["packages"].as_array().expect("packages");
    let package =
        packages.iter().find(|package| package["name"] == "tiktoken-rs").expect("tiktoken-rs is a dependency");
    let manifest = package["manifest_path"].as_str().expect("a path");
    Path::new(manifest).with_file_name("assets").join("o200k_base.tiktoken")
}

#[derive(Serialize)]
struct File {
    version: &'static str,
    truncation: (),
    padding: (),
    added_tokens: Vec<AddedToken>,
    normalizer: (),
    pre_tokenizer: serde_json::Value,
    post_processor: serde_json::Value,
    decoder: serde_json::Value,
    model: Model,
}

#[derive(Serialize)]
struct AddedToken {
    id: u32,
    content: String,
    single_word: bool,
    lstrip: bool,
    rstrip: bool,
    normalized: bool,
    special: bool,
}

#[derive(Serialize)]
struct Model {
    r#type: &'static str,
    dropout: (),
    unk_token: (),
    continuing_subword_prefix: (),
    end_of_word_suffix: (),
    fuse_unk: bool,
    byte_fallback: bool,
    ignore_merges: bool,
    vocab: serde_json::Map<String, serde_json::Value>,
    merges: Vec<[String; 2]>,
}

fn build(ranks: &[u8]) -> Vec<u8> {
    let mut tokens: Vec<(Vec<u8>, u32)> = ranks.split(|&byte| byte == b'\n').filter_map(parse_rank).collect();
    tokens.sort_by_key(|(_, rank)| *rank);
    assert!(tokens.iter().map(|(_, rank)| *rank).eq(0..199_998), "the ranks are 0 to 199997");
    let alphabet = alphabet();
    let spell = |bytes: &[u8]| bytes.iter().map(|&byte| alphabet[byte as usize]).collect::<String>();
    let level = |add_prefix_space, trim_offsets, use_regex| {
        serde_json::json!({
            "type": "ByteLevel",
            "add_prefix_space": add_prefix_space,
            "trim_offsets": trim_offsets,
            "use_regex": use_regex,
        })
    };
    let split =
        serde_json::json!({"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": false});
    let file = File {
        version: "1.0",
        truncation: (),
        padding: (),
        added_tokens: added_tokens(),
        normalizer: (),
        pre_tokenizer: serde_json::json!({"type": "Sequence", "pretokenizers": [split, level(false, true, false)]}),
        post_processor: level(true, false, true),
        decoder: level(true, true, true),
        model: Model {
            r#type: "BPE",
            dropout: (),
            unk_token: (),
            continuing_subword_prefix: (),
            end_of_word_suffix: (),
            fuse_unk: false,
            byte_fallback: false,
            ignore_merges: true,
            vocab: tokens.iter().map(|(bytes, rank)| (spell(bytes), (*rank).into())).collect(),
            merges: merges(&tokens).map(|(left, right)| [spell(left), spell(right)]).collect(),
        },
    };
    serde_json::to_vec_pretty(&file).expect("the tokenizer as JSON")
}

fn parse_rank(line: &[u8]) -> Option<(Vec<u8>, u32)> {
    let (token, rank) = std::str::from_utf8(line).ok()?.split_once(' ')?;
    let token = base64::engine::general_purpose::STANDARD.decode(token).expect("base64");
    Some((token, rank.trim().parse().expect("a rank")))
}

/// Every way to make a token of two others, in order of the token's rank, then of its parts' ranks.
fn merges(tokens: &[(Vec<u8>, u32)]) -> impl Iterator<Item = (&[u8], &[u8])> {
    let ranks: HashMap<&[u8], u32> = tokens.iter().map(|(bytes, rank)| (bytes.as_slice(), *rank)).collect();
    tokens.iter().flat_map(move |(token, _)| {
        let halves = (1..token.len()).map(|at| token.split_at(at));
        let mut known: Vec<_> =
            halves.filter_map(|(left, right)| Some(((*ranks.get(left)?, *ranks.get(right)?), (left, right)))).collect();
        known.sort_by_key(|(ranks, _)| *ranks);
        known.into_iter().map(|(_, halves)| halves)
    })
}

/// The character that each byte is written as: itself where it is printable, else the next one from U+0100.
fn alphabet() -> Vec<char> {
    let mut next = 0x100..;
    (0..=0xFF_u32)
        .map(|byte| match byte {
            0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF => byte,
            _ => next.next().expect("there are 68"),
        })
        .map(|code| char::from_u32(code).expect("all are characters"))
        .collect()
}

fn added_tokens() -> Vec<AddedToken> {
    let names: HashMap<_, _> = NAMES.into_iter().collect();
    let name = |id| names.get(&id).map_or_else(|| format!("<|reserved_{id}|>"), |&name| name.to_owned());
    (199_998..200_019)
        .map(|id| AddedToken {
            id,
            content: name(id),
            single_word: false,
            lstrip: false,
            rstrip: false,
            normalized: false,
            special: true,
        })
        .collect()
}
