//! The Harmony parser is total: for every row of tokens it gives well-formed events, the same whole and piecemeal, and
//! no word of the model is lost.
//!
//! An input is a little program: each byte is a control token, a word of headers, a marker that must be found again, a
//! raw byte, any id, or a letter.

#![no_main]

use std::sync::{Arc, LazyLock};

use libfuzzer_sys::fuzz_target;
use phalanx_gateway::{
    harmony::{Control, Event, Harmony, Parsed},
    tokenizer::Tokenizer,
};

const TOKENIZER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../deploy/models/nano/tokenizer.json");
const CONTROLS: [Control; 7] = [
    Control::Start,
    Control::End,
    Control::Message,
    Control::Channel,
    Control::Constrain,
    Control::Return,
    Control::Call,
];
const WORDS: [&str; 24] = [
    "assistant",
    "user",
    "developer",
    "system",
    "analysis",
    "final",
    "commentary",
    "thoughts",
    " to=",
    " to=functions.f",
    "to=functions.get_weather",
    "functions.g",
    "functions",
    ".",
    "json",
    " json",
    " code",
    "<|constrain|>",
    " ",
    "\n",
    "  ",
    "?",
    "{\"city\": \"Paris\"}",
    "get_weather",
];
const FIRST_WORD: usize = 7;
const MARKER: usize = FIRST_WORD + WORDS.len();
const RAW_BYTE: usize = MARKER + 1;
const ANY_ID: usize = MARKER + 2;
const MAX_INPUT: usize = 4096;

struct Nano {
    harmony: Harmony,
    /// The token of each byte.
    bytes: Vec<u32>,
}

static NANO: LazyLock<Nano> = LazyLock::new(|| {
    let tokenizer = Arc::new(Tokenizer::from_file(TOKENIZER.as_ref()).expect("the bundled tokenizer"));
    let of_byte = |byte: u8| (0..3072).find(|&id| tokenizer.token_bytes(id) == Some(&[byte])).expect("a token a byte");
    let bytes = (0..=u8::MAX).map(of_byte).collect();
    Nano { harmony: Harmony::new(tokenizer).expect("control tokens"), bytes }
});

/// The tokens that an input stands for, and the markers among them.
fn program(data: &[u8]) -> (Vec<u32>, Vec<String>) {
    let Nano { harmony, bytes } = &*NANO;
    let (mut ids, mut markers) = (Vec::new(), Vec::new());
    let mut rest = data.iter().copied();
    while let Some(code) = rest.next() {
        match usize::from(code) {
            at if at < FIRST_WORD => ids.push(harmony.id(CONTROLS[at])),
            at if at < MARKER => ids.extend(harmony.tokenizer().encode_ordinary(WORDS[at - FIRST_WORD])),
            MARKER => {
                let marker = format!("Qj{}jQ", markers.len());
                ids.extend(harmony.tokenizer().encode_ordinary(&format!(" {marker}")));
                markers.push(marker);
            }
            RAW_BYTE => ids.extend(free(bytes[usize::from(rest.next().unwrap_or_default())])),
            ANY_ID => {
                let [low, high] = [rest.next().unwrap_or_default(), rest.next().unwrap_or_default()];
                ids.extend(free(u32::from(u16::from_le_bytes([low, high]))));
            }
            at => ids.extend(free(bytes[at])),
        }
    }
    (ids, markers)
}

/// A token, unless a marker could be spelled with it by other means than a marker.
fn free(id: u32) -> Option<u32> {
    let bytes = NANO.harmony.tokenizer().token_bytes(id).unwrap_or_default();
    (!bytes.contains(&b'Q')).then_some(id)
}

fn said(parsed: &Parsed) -> (String, String) {
    let mut text = String::new();
    for message in &parsed.messages {
        let header = &message.header;
        let of = header.content_type.as_ref().map(ToString::to_string);
        for field in [header.author.name(), header.recipient.as_deref(), of.as_deref(), Some(&message.content)] {
            text.extend(field.into_iter().chain(["\n"]));
        }
    }
    (text, parsed.repairs.iter().flat_map(|repair| [repair.text.as_str(), "\n"]).collect())
}

fuzz_target!(|data: &[u8]| {
    if data.len() > MAX_INPUT {
        return;
    }
    let (ids, markers) = program(data);
    let functions = vec!["get_weather".to_owned(), "f".to_owned()];
    let parsed = NANO.harmony.parse(&ids, functions.clone());
    let (messages, repairs) = said(&parsed);
    for marker in &markers {
        let times = messages.matches(marker.as_str()).count();
        assert!(times == 1 || (times == 0 && repairs.contains(marker)), "{marker} is {times} times in {parsed:?}");
    }
    let mut parser = NANO.harmony.parser(functions);
    let mut events: Vec<Event> = ids.iter().flat_map(|&id| parser.push(id)).collect();
    events.extend(parser.finish());
    let (mut open, mut text, mut starts) = (false, String::new(), 0);
    for event in &events {
        match event {
            Event::Start(_) => {
                assert!(!std::mem::replace(&mut open, true), "a message begins within another");
                starts += 1;
            }
            Event::Text(piece) => {
                assert!(open && !piece.is_empty(), "text outside of a message, or none");
                text.push_str(piece);
            }
            Event::End(_) => assert!(std::mem::replace(&mut open, false), "the end of no message"),
        }
    }
    assert!(!open, "a message was left open");
    assert_eq!(starts, parsed.messages.len());
    let whole: String = parsed.messages.iter().map(|message| message.content.as_str()).collect();
    assert_eq!(text, whole, "piecemeal and whole differ");
});
