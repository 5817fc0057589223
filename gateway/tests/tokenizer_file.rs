//! What `tokenizer.json` may look like, and what is said of those that cannot be run.
#![allow(clippy::expect_used, clippy::panic, reason = "helpers of tests fail by panicking")]

mod common;

use std::path::Path;

use phalanx_gateway::tokenizer::{Tokenizer, TokenizerError};
use serde_json::{Value, json};

fn nano() -> Value {
    let json = std::fs::read(common::nano_tokenizer_json()).expect("nano's tokenizer");
    serde_json::from_slice(&json).expect("JSON")
}

fn load(file: &Value) -> Result<Tokenizer, TokenizerError> {
    Tokenizer::from_json(&serde_json::to_vec(file).expect("JSON"), "test.json")
}

#[test]
fn merges_written_as_strings_mean_the_same() {
    let mut file = nano();
    for merge in file["model"]["merges"].as_array_mut().expect("merges") {
        let text = format!("{} {}", merge[0].as_str().expect("left"), merge[1].as_str().expect("right"));
        *merge = text.into();
    }
    let text = "Hello, what is the capital of France? 대한민국";
    assert_eq!(load(&file).expect("loads").encode_ordinary(text), common::NANO.encode_ordinary(text));
}

#[test]
fn a_pattern_with_other_look_around_runs_too() {
    let mut file = nano();
    let pattern = file["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"].as_str().expect("a pattern").to_owned();
    file["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = format!("(?=never)x|{pattern}").into();
    let text = "Hello,   what is   the\n\n capital? ";
    assert_eq!(load(&file).expect("loads").encode_ordinary(text), common::NANO.encode_ordinary(text));
}

#[test]
fn kinds_that_cannot_be_run_are_refused_with_what_was_found() {
    let cases: [(&str, Value, &str); 12] = [
        ("/model/type", json!("Unigram"), "its model is of type Unigram"),
        ("/model/dropout", json!(0.1), "drops merges at random"),
        ("/model/end_of_word_suffix", json!("</w>"), r#"with "</w>""#),
        ("/normalizer", json!({"type": "NFC"}), "a normalizer of type NFC"),
        ("/decoder", json!({"type": "WordPiece"}), "a decoder of type WordPiece"),
        ("/pre_tokenizer", json!({"type": "Metaspace"}), "pre-tokenizer of type Metaspace"),
        ("/pre_tokenizer", Value::Null, "it has no pre-tokenizer"),
        ("/pre_tokenizer/pretokenizers/0/behavior", json!("Removed"), "Removed"),
        ("/pre_tokenizer/pretokenizers/0/pattern", json!({"String": " "}), r#"the literal " ""#),
        ("/pre_tokenizer/pretokenizers/0/pattern/Regex", json!("("), "does not compile"),
        ("/added_tokens/0/special", json!(false), "is not special"),
        ("/added_tokens/0/id", json!(4_000_000_000_u32), "has the id 4000000000"),
    ];
    for (place, value, expected) in cases {
        let mut file = nano();
        *file.pointer_mut(place).expect(place) = value;
        let error = load(&file).expect_err(place).to_string();
        assert!(error.contains(expected) && error.contains("test.json"), "{place}: {error}");
    }
}

#[test]
fn broken_tables_are_refused_with_the_entry() {
    let mut file = nano();
    file["model"]["merges"][0] = json!(["zz", "zzz"]);
    assert!(load(&file).expect_err("no such token").to_string().contains("its merge 0 names"));

    let mut file = nano();
    file["model"]["merges"][0] = json!(["an"]);
    assert!(load(&file).expect_err("half a merge").to_string().contains("two tokens"));

    let mut file = nano();
    file["model"]["vocab"]["안"] = json!(3);
    assert!(load(&file).expect_err("not byte-level").to_string().contains("'안' is not byte-level"));

    let mut file = nano();
    file["model"]["vocab"].as_object_mut().expect("an object").shift_remove("a");
    let error = load(&file).expect_err("a byte is missing").to_string();
    assert!(error.contains("no token for byte 0x61") || error.contains("which is no token"), "{error}");
}

#[test]
fn a_missing_or_cut_file_is_named() {
    let missing = Tokenizer::from_file(Path::new("/nowhere/tokenizer.json")).expect_err("missing").to_string();
    assert!(missing.contains("/nowhere/tokenizer.json"), "{missing}");
    let json = std::fs::read(common::nano_tokenizer_json()).expect("nano's tokenizer");
    let cut = Tokenizer::from_json(&json[..json.len() / 2], "cut.json").expect_err("cut").to_string();
    assert!(cut.contains("cut.json") && cut.contains("line"), "{cut}");
}
