//! Times loading the release's tokenizer and encoding 400 KB of prose, code, Korean and hostile text.
//!
//! `cargo bench -p phalanx-gateway --bench tokenizer` prints one line each; the targets are under 2 s to load and under
//! 0.3 s to encode.

#[path = "../tests/common/o200k.rs"]
mod o200k;

use std::{
    hint::black_box,
    time::{Duration, Instant},
};

use phalanx_gateway::tokenizer::Tokenizer;

const PROMPT_BYTES: usize = 400_000;

fn best_of<T>(runs: usize, mut work: impl FnMut() -> T) -> Duration {
    let timed = (0..runs).map(|_| {
        let start = Instant::now();
        black_box(work());
        start.elapsed()
    });
    timed.min().unwrap_or_default()
}

fn prompt(of: &str) -> String {
    of.chars()
        .cycle()
        .scan(0, |len, c| {
            *len += c.len_utf8();
            (*len <= PROMPT_BYTES).then_some(c)
        })
        .collect()
}

fn letters(alphabet: &[u8]) -> String {
    let mut state = 1_u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        char::from(alphabet[(state >> 33) as usize % alphabet.len()])
    };
    (0..PROMPT_BYTES).map(|_| next()).collect()
}

fn main() {
    let path = o200k::tokenizer_json();
    println!("load: {:?}", best_of(3, || Tokenizer::from_file(&path)));
    let tokenizer = match Tokenizer::from_file(&path) {
        Ok(tokenizer) => tokenizer,
        Err(error) => return eprintln!("{error}"),
    };
    let texts = [
        ("prose", prompt("The ranks of a group are replicas of one deterministic state machine, driven by one log. ")),
        ("code", prompt(include_str!("../src/tokenizer/mod.rs"))),
        ("korean", prompt("대한민국의 수도는 서울이며, 인구는 약 940만 명이다. ")),
        ("one word of one letter", letters(b"a")),
        ("one word of random letters", letters(b"etaoinshrdlucmfw")),
        ("spaces", letters(b" ")),
        ("digits and signs", letters(b"0123456789+-*/=()<>!?.,;:")),
    ];
    for (name, text) in texts {
        let took = best_of(3, || tokenizer.encode_ordinary(&text));
        println!("encode {name}: {} bytes, {} tokens, {took:?}", text.len(), tokenizer.encode_ordinary(&text).len());
    }
}
