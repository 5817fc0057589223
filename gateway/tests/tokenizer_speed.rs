//! The release's tokenizer is ready in under two seconds and encodes a 400 KB prompt in under 0.3 s.
//!
//! On an idle machine both take a tenth of that or less (`cargo bench --bench tokenizer`), so a busy one passes too.
#![allow(clippy::expect_used, clippy::panic, reason = "helpers of tests fail by panicking")]

mod common;

use std::time::{Duration, Instant};

use phalanx_gateway::tokenizer::Tokenizer;

const PROMPT_BYTES: usize = 400_000;

fn best_of_three(mut work: impl FnMut()) -> Duration {
    let timed = (0..3).map(|_| {
        let start = Instant::now();
        work();
        start.elapsed()
    });
    timed.min().expect("three runs")
}

#[test]
fn the_releases_tokenizer_loads_in_under_two_seconds() {
    let path = common::o200k::tokenizer_json();
    let took = best_of_three(|| drop(Tokenizer::from_file(&path).expect("it loads")));
    assert!(took < Duration::from_secs(2), "{took:?}");
}

#[test]
fn a_prompt_of_400_kb_encodes_in_under_300_ms() {
    let texts = [
        fill("The ranks of a group are replicas of one deterministic state machine, driven by one log. "),
        fill("대한민국의 수도는 서울이며, 인구는 약 940만 명이다. "),
        fill(include_str!("../src/tokenizer/mod.rs")),
    ];
    for text in texts {
        expect_encoded_within(Duration::from_millis(300), &text);
    }
}

#[test]
fn a_word_of_400_kb_is_no_way_to_keep_the_encoder_busy() {
    // Merging that is quadratic in the word's length takes minutes for these.
    for word in ["a", "etaoinshrdlu", " ", "=-"] {
        expect_encoded_within(Duration::from_secs(2), &fill(word));
    }
}

fn fill(piece: &str) -> String {
    piece.repeat(PROMPT_BYTES / piece.len() + 1)
}

fn expect_encoded_within(limit: Duration, text: &str) {
    let took = best_of_three(|| drop(common::O200K.encode_ordinary(text)));
    assert!(took < limit, "{took:?} for {:?}…", text.chars().take(20).collect::<String>());
}
