//! Any row of tokens, however malformed, has one answer, and stop strings and log-probabilities fit it.

use std::{path::Path, sync::Arc, sync::LazyLock};

use phalanx_proto::v1::Token;
use proptest::{
    prelude::*,
    test_runner::{RngSeed, TestRunner},
};

use super::*;
use crate::{harmony::Harmony, openai::reply::TextLogprobs, tokenizer::Tokenizer};

static NANO: LazyLock<Harmony> = LazyLock::new(|| {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/models/nano/tokenizer.json");
    Harmony::new(Arc::new(Tokenizer::from_file(&path).unwrap())).unwrap()
});

/// What a client has when a choice is over.
#[derive(Clone, Debug, Default, PartialEq)]
struct Answer {
    reasoning: String,
    content: String,
    calls: Vec<(String, String)>,
    logprob_bytes: Vec<u8>,
    reason: Option<FinishReason>,
}

fn token(id: u32) -> Token {
    Token { id, logprob: Some(-1.0), top: Vec::new() }
}

fn settings() -> ChatSettings {
    ChatSettings {
        functions: vec!["get_weather".into()],
        parallel_calls: true,
        include_reasoning: true,
        logprobs: true,
        ..ChatSettings::default()
    }
}

/// Assembles tokens that arrive in groups of these sizes, and puts the pieces together as a client does.
fn chat(settings: ChatSettings, ids: &[u32], groups: &[usize]) -> Answer {
    let mut assembler = ChatAssembler::new(NANO.clone(), settings);
    let mut answer = Answer::default();
    let mut rest = ids;
    let mut sizes = groups.iter().copied().cycle();
    while !rest.is_empty() && !assembler.has_stopped() {
        let (group, after) = rest.split_at(sizes.next().unwrap_or(1).clamp(1, rest.len()));
        let mut pieces = Vec::new();
        group.iter().for_each(|&id| assembler.push(&token(id), &mut pieces));
        pieces.into_iter().for_each(|piece| answer.take(piece));
        rest = after;
    }
    let mut pieces = Vec::new();
    assembler.finish(&mut pieces);
    pieces.into_iter().for_each(|piece| answer.take(piece));
    answer.reason = Some(assembler.finish_reason(false));
    answer
}

impl Answer {
    fn take(&mut self, piece: ChatPiece) {
        match piece {
            ChatPiece::Reasoning(text) => self.reasoning.push_str(&text),
            ChatPiece::Content { text, logprobs } => {
                self.content.push_str(&text);
                self.logprob_bytes.extend(logprobs.into_iter().flat_map(|entry| entry.bytes));
            }
            ChatPiece::Call { index, name, .. } => {
                assert_eq!(index as usize, self.calls.len());
                self.calls.push((name, String::new()));
            }
            ChatPiece::Arguments { index, text } => {
                assert_eq!(index as usize + 1, self.calls.len());
                self.calls.last_mut().unwrap().1.push_str(&text);
            }
        }
    }
}

/// Control tokens, words of headers, and text with characters of several bytes, in any order.
fn tokens() -> impl Strategy<Value = Vec<u32>> {
    let tokenizer = NANO.tokenizer();
    let words = [
        "analysis",
        "final",
        "commentary",
        " to=functions.get_weather",
        "json",
        "assistant",
        "{\"a\": ",
        "뷁 값",
        "tree",
    ];
    let controls = ["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|return|>", "<|call|>"];
    let mut pieces: Vec<Vec<u32>> = words.iter().map(|word| tokenizer.encode_ordinary(word)).collect();
    pieces.extend(controls.iter().map(|name| vec![tokenizer.special(name).unwrap()]));
    // Whole headers, so that well-formed messages are common too.
    let headers = [
        "<|channel|>analysis<|message|>",
        "<|channel|>final<|message|>",
        "<|end|><|start|>assistant<|channel|>final<|message|>",
        "<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>",
    ];
    pieces.extend(headers.iter().map(|text| tokenizer.encode_with_special(text)));
    let any = prop_oneof![prop::sample::select(pieces), (0u32..3050).prop_map(|id| vec![id])];
    prop::collection::vec(any, 0..24).prop_map(|pieces| pieces.concat())
}

fn check<S: Strategy>(strategy: S, test: impl Fn(S::Value) -> Result<(), TestCaseError>) {
    let config =
        ProptestConfig { cases: 2000, rng_seed: RngSeed::Fixed(7), failure_persistence: None, ..Default::default() };
    TestRunner::new(config).run(&strategy, test).unwrap();
}

#[test]
fn any_grouping_gives_the_same_answer() {
    let stops = prop::collection::vec(prop::sample::select(vec!["tree", "값", " ", "e", "\": "]), 0..3);
    let groups = prop::collection::vec(1usize..9, 1..8);
    check((tokens(), stops, groups, any::<bool>()), |(ids, stops, groups, parallel_calls)| {
        let stop: Vec<String> = stops.iter().map(|&stop| stop.to_owned()).collect();
        let with = || ChatSettings { stop: stop.clone(), parallel_calls, ..settings() };
        let one_by_one = chat(with(), &ids, &[1]);
        prop_assert_eq!(&chat(with(), &ids, &groups), &one_by_one);
        prop_assert_eq!(&chat(with(), &ids, &[usize::MAX]), &one_by_one);
        Ok(())
    });
}

#[test]
fn no_text_is_lost_and_a_stop_string_only_shortens_the_content() {
    check(tokens(), |ids| {
        let answer = chat(settings(), &ids, &[1]);
        let parsed = NANO.parse(&ids, vec!["get_weather".into()]);
        let length: usize = parsed.messages.iter().map(|message| message.content.len()).sum();
        let calls: usize = answer.calls.iter().map(|(_, arguments)| arguments.len()).sum();
        prop_assert_eq!(answer.reasoning.len() + answer.content.len() + calls, length);
        let stopped = chat(ChatSettings { stop: vec!["e".into()], ..settings() }, &ids, &[1]);
        prop_assert!(answer.content.starts_with(&stopped.content));
        prop_assert!(answer.reasoning.starts_with(&stopped.reasoning));
        Ok(())
    });
}

#[test]
fn logprobs_are_those_of_the_content() {
    let tokenizer = NANO.tokenizer();
    check("[a-z 가-힣]{0,40}", |text| {
        let body = format!("<|channel|>final<|message|>{text}<|return|>");
        let ids = tokenizer.encode_with_special(&body);
        let answer = chat(settings(), &ids, &[1]);
        prop_assert_eq!(&answer.content, &text);
        prop_assert_eq!(answer.logprob_bytes, text.as_bytes());
        let stopped = chat(ChatSettings { stop: vec!["값".into(), "e".into()], ..settings() }, &ids, &[1]);
        // A token that the cut goes through is reported whole.
        let shown = stopped.logprob_bytes.len();
        prop_assert!(shown >= stopped.content.len() && text.as_bytes().starts_with(&stopped.logprob_bytes));
        Ok(())
    });
}

#[test]
fn bare_text_keeps_every_character_and_its_offsets() {
    let tokenizer = Arc::clone(NANO.tokenizer());
    check(("[a-z 가-힣]{0,40}", 1usize..9), |(text, group)| {
        let settings = TextSettings { skip_special_tokens: true, logprobs: true, ..TextSettings::default() };
        let mut assembler = TextAssembler::new(Arc::clone(&tokenizer), settings);
        let (mut found, mut lists) = (String::new(), TextLogprobs::default());
        let ids = tokenizer.encode_ordinary(&text);
        for ids in ids.chunks(group).chain([&[][..]]) {
            let mut pieces = Vec::new();
            ids.iter().for_each(|&id| assembler.push(&token(id), &mut pieces));
            if ids.is_empty() {
                assembler.finish(&mut pieces);
            }
            for piece in pieces {
                found.push_str(&piece.text);
                lists.extend(piece.logprobs.unwrap_or_default());
            }
        }
        prop_assert_eq!(&found, &text);
        prop_assert_eq!(lists.tokens.len(), ids.len());
        let whole: usize = text.chars().count();
        prop_assert!(lists.text_offset.is_sorted() && lists.text_offset.iter().all(|&offset| offset <= whole));
        Ok(())
    });
}
