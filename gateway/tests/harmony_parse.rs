//! Parsing against `openai-harmony` 0.0.8 on well-formed text, and against good sense on malformed text.
#![allow(clippy::expect_used, clippy::panic, reason = "helpers of tests fail by panicking")]

mod common;

use phalanx_gateway::harmony::{Ending, Event, Harmony, Parsed, ParsedMessage, RepairKind, cli};
use serde_json::{Value, json};

fn harmony() -> Harmony {
    Harmony::new(common::O200K.clone()).expect("it has the control tokens")
}

fn vectors() -> Vec<Value> {
    let vectors: Value = serde_json::from_str(&common::golden("harmony_vectors.json")).expect("JSON");
    vectors["parse"].as_array().expect("parse vectors").clone()
}

fn tokens(vector: &Value) -> Vec<u32> {
    serde_json::from_value(vector["tokens"].clone()).expect("token ids")
}

/// A message as the library writes it.
fn as_library(message: &ParsedMessage) -> Value {
    let header = &message.header;
    let mut value = json!({
        "role": header.author.role(),
        "name": header.author.name(),
        "content": [{"type": "text", "text": message.content}],
    });
    let fields = [
        ("channel", header.channel.map(|channel| channel.name().to_owned())),
        ("recipient", header.recipient.clone()),
        ("content_type", header.content_type.as_ref().map(ToString::to_string)),
    ];
    for (key, field) in fields {
        if let Some(field) = field {
            value[key] = field.into();
        }
    }
    value
}

/// A message in one line: `channel to=recipient type|content|ending`.
fn line(message: &ParsedMessage) -> String {
    let header = &message.header;
    let mut line = header.channel.map_or("-", |channel| channel.name()).to_owned();
    if header.author.role() != "assistant" {
        line = format!("{} {line}", header.author.name().unwrap_or(header.author.role()));
    }
    if let Some(recipient) = &header.recipient {
        line += &format!(" to={recipient}");
    }
    if let Some(of) = &header.content_type {
        line += &format!(" {of}");
    }
    let ending = match message.ending {
        Ending::End => "end",
        Ending::Return => "return",
        Ending::Call => "call",
        Ending::Cut => "cut",
    };
    format!("{line}|{}|{ending}", message.content)
}

fn parse_text(text: &str, functions: &[&str]) -> Parsed {
    let ids = common::O200K.encode_with_special(text);
    harmony().parse(&ids, functions.iter().map(|&name| name.to_owned()).collect())
}

fn lines(parsed: &Parsed) -> Vec<String> {
    parsed.messages.iter().map(line).collect()
}

/// How each malformed vector is read, and what is noted.
fn readings() -> Vec<(&'static str, Vec<&'static str>, Vec<RepairKind>)> {
    use RepairKind as R;
    let refusal = "final|I'm sorry, but I can't help with that.|return";
    vec![
        ("missing_message_token", vec!["commentary|Hello|end"], vec![R::MissingMessage]),
        (
            "missing_message_token_first",
            vec!["final|I must refuse|end", "analysis|We must refuse|end", refusal],
            vec![R::MissingMessage],
        ),
        (
            "missing_message_token_channel",
            vec!["analysis|I must refuse|end", "analysis|We must refuse|end", refusal],
            vec![R::MissingMessage],
        ),
        (
            "missing_message_token_tool",
            vec![
                "final|... Let's use the tool.|end",
                "commentary to=functions.get_weather json|{\"location\": \"Tokyo\"}|call",
            ],
            vec![R::MissingMessage],
        ),
        ("empty_completion", vec![], vec![]),
        ("only_return", vec![], vec![R::StrayControl]),
        ("text_without_any_header", vec!["final|Hello there|return"], vec![R::MissingMessage]),
        ("unknown_channel", vec!["analysis|x|end"], vec![R::Channel]),
        ("empty_channel", vec!["-|x|end"], vec![R::Channel]),
        ("two_channels", vec!["final|x|end"], vec![R::DoubledHeader]),
        ("text_after_return", vec!["final|x|return", "final| more|cut"], vec![R::MissingStart]),
        ("tokens_between_messages", vec!["analysis|x|end", "final| oops|cut", "final|y|return"], vec![R::MissingStart]),
        ("start_inside_content", vec!["analysis|x|cut", "final|y|return"], vec![R::MissingEnd]),
        ("channel_inside_content", vec!["final|a|cut", "analysis|b|return"], vec![R::MissingEnd, R::MissingStart]),
        ("message_twice", vec!["final|ab|return"], vec![R::StrayControl]),
        ("endoftext_inside_content", vec!["final|ab|return"], vec![R::StrayControl]),
        ("constrain_in_content", vec!["final|ab|return"], vec![R::StrayControl]),
        ("unknown_role", vec!["analysis|x|end", "final|y|return"], vec![R::Role]),
        ("missing_role", vec!["analysis|x|end", "final|y|return"], vec![R::Role]),
        ("recipient_space_after_eq", vec!["commentary to=functions.f json|{}|call"], vec![R::Recipient]),
        ("recipient_glued_json", vec!["commentary to=functions.f json|{}|call"], vec![R::Recipient]),
        ("constrain_as_recipient", vec!["commentary <|constrain|>json|{}|call"], vec![R::ContentType]),
        ("three_words_in_header", vec!["commentary to=functions.f json|{}|call"], vec![R::HeaderText]),
        ("final_with_json_type", vec!["final <|constrain|>json|{\"a\":1}|return"], vec![R::ContentType]),
        ("id_outside_vocabulary", vec!["-|a\u{FFFD}b|end"], vec![R::UnknownToken]),
    ]
}

#[test]
fn malformed_vectors_are_read_for_what_they_mean() {
    let vectors = vectors();
    for (name, messages, repairs) in readings() {
        let vector = vectors.iter().find(|vector| vector["name"] == name).expect(name);
        let parsed = harmony().parse(&tokens(vector), Vec::new());
        assert_eq!(lines(&parsed), messages, "{name}");
        let kinds: Vec<_> = parsed.repairs.iter().map(|repair| repair.kind).collect();
        assert_eq!(kinds, repairs, "{name}: {:?}", parsed.repairs);
    }
}

#[test]
fn well_formed_vectors_are_read_as_the_library_reads_them() {
    let malformed: Vec<_> = readings().into_iter().map(|(name, ..)| name).collect();
    let mut count = 0;
    for vector in vectors() {
        let name = vector["name"].as_str().expect("a name");
        if malformed.contains(&name) {
            continue;
        }
        count += 1;
        let parsed = harmony().parse(&tokens(&vector), Vec::new());
        let messages: Vec<_> = parsed.messages.iter().map(as_library).collect();
        assert_eq!(json!(messages), vector["strict"]["messages"], "{name}");
        let text_is_whole = !name.contains("utf8") && name != "reserved_token_in_content";
        assert!(parsed.repairs.is_empty() || !text_is_whole, "{name}: {:?}", parsed.repairs);
        if !messages.iter().any(|message| message.to_string().contains('\u{FFFD}')) {
            expect_the_librarys_deltas(name, &vector);
        }
    }
    assert_eq!(count + malformed.len(), 53);
}

/// Token by token the same text comes out, and the same header stands when it does.
fn expect_the_librarys_deltas(name: &str, vector: &Value) {
    let mut parser = harmony().parser(Vec::new());
    let mut header = None;
    let steps = vector["events_strict"].as_array().expect("events");
    for (at, (id, step)) in tokens(vector).into_iter().zip(steps).enumerate() {
        let mut delta = String::new();
        for event in parser.push(id) {
            match event {
                Event::Start(of) => header = Some(of),
                Event::Text(text) => delta.push_str(&text),
                Event::End(_) => header = None,
            }
        }
        assert_eq!(delta, step[4].as_str().unwrap_or_default(), "{name}: token {at}");
        if let Some(header) = header.as_ref().filter(|_| !delta.is_empty()) {
            let channel = header.channel.map(|channel| channel.name());
            assert_eq!(json!([channel, header.recipient]), json!([step[1], step[2]]), "{name}: token {at}");
        }
    }
}

#[test]
fn more_ways_to_break_a_header_are_read_for_what_they_mean() {
    let cases: [(&str, &[&str]); 24] = [
        ("<|channel|>commentary?<|message|>x<|end|>", &["commentary|x|end"]),
        ("<|channel|>Final<|message|>x<|return|>", &["final|x|return"]),
        ("<|channel|>answer<|message|>x<|return|>", &["final|x|return"]),
        ("<|channel|>tools to=functions.f<|message|>{}<|call|>", &["commentary to=functions.f|{}|call"]),
        (
            "<|channel|>analysis<|message|>t<|end|>assistant<|channel|>final<|message|>y<|return|>",
            &["analysis|t|end", "final|y|return"],
        ),
        (
            "<|channel|>analysis<|message|>t<|end|><|channel|>final<|message|>y<|return|>",
            &["analysis|t|end", "final|y|return"],
        ),
        (
            "<|channel|>analysis<|message|>t<|channel|>final<|message|>y<|return|>",
            &["analysis|t|cut", "final|y|return"],
        ),
        ("<|channel|>final<|message|>use <|channel|>news<|return|>", &["final|use news|return"]),
        ("<|channel|>final<|message|>use <|channel|>", &["final|use |cut"]),
        ("<|start|>assistant<|start|>assistant<|channel|>final<|message|>y<|return|>", &["final|y|return"]),
        ("<|channel|>final<|start|>assistant<|channel|>final<|message|>y<|return|>", &["final|y|return"]),
        ("<|channel|>final<|return|>", &["final||return"]),
        ("<|channel|>analysis We need<|message|> to think<|end|>", &["analysis|We need to think|end"]),
        ("I think so. <|channel|>final<|message|>Yes<|return|>", &["final|I think so. |cut", "final|Yes|return"]),
        (
            "<|channel|>commentary functions.f <|constrain|>json<|message|>{}<|call|>",
            &["commentary to=functions.f <|constrain|>json|{}|call"],
        ),
        (" to=functions.f commentary json<|message|>{}<|call|>", &["commentary to=functions.f json|{}|call"]),
        (
            "<|channel|>commentary to=functions.f <|constrain|>json{\"a\":1}<|call|>",
            &["commentary to=functions.f <|constrain|>json|{\"a\":1}|call"],
        ),
        ("<|start|>assistantfinal<|message|>x<|return|>", &["final|x|return"]),
        (
            "<|start|>get_weather to=assistant<|channel|>commentary<|message|>1<|end|>",
            &["get_weather commentary to=assistant|1|end"],
        ),
        ("<|start|>functions.f<|message|>1<|end|>", &["functions.f -|1|end"]),
        ("<|channel|>analysis a b c<|channel|>final<|message|>x<|return|>", &["analysis|a b c|cut", "final|x|return"]),
        // Cut anywhere in a header, nothing comes out.
        ("<|channel|>ana", &[]),
        ("<|channel|>commentary to=functions.get", &[]),
        ("<|channel|>analysis<|message|>t<|end|><|start|>assist", &["analysis|t|end"]),
    ];
    for (text, expected) in cases {
        assert_eq!(lines(&parse_text(text, &[])), expected, "{text}");
    }
}

#[test]
fn known_functions_tell_names_from_what_is_glued_to_them() {
    let cases: [(&str, &[&str], &str); 5] = [
        ("to_json", &["to_json"], "commentary to=functions.to_json|{}|call"),
        ("parsejson", &["parsejson", "parse"], "commentary to=functions.parsejson|{}|call"),
        ("get_json", &[], "commentary to=functions.get_json|{}|call"),
        ("get_json", &["get_"], "commentary to=functions.get_ json|{}|call"),
        ("weathercommentary", &["weather"], "commentary to=functions.weather|{}|call"),
    ];
    for (name, functions, expected) in cases {
        let text = format!("<|channel|>commentary to=functions.{name}<|message|>{{}}<|call|>");
        assert_eq!(lines(&parse_text(&text, functions)), [expected], "{name} among {functions:?}");
    }
}

#[test]
fn a_long_answer_without_a_header_streams_once_it_cannot_be_one() {
    let text = "I am sorry, but I cannot help with that, because it would hurt somebody.";
    let ids = common::O200K.encode_with_special(text);
    let mut parser = harmony().parser(Vec::new());
    let early = ids.iter().take(ids.len() - 3).flat_map(|&id| parser.push(id)).collect::<Vec<_>>();
    assert!(matches!(early.first(), Some(Event::Start(_))), "{early:?}");
    assert_eq!(lines(&harmony().parse(&ids, Vec::new())), [format!("final|{text}|cut")]);
}

#[test]
fn a_header_of_nothing_but_space_gives_way_to_the_answer_behind_it() {
    let text = format!("<|start|>{}Seoul is the capital of the Republic of Korea.", " \n".repeat(2000));
    let ids = common::O200K.encode_with_special(&text);
    let mut parser = harmony().parser(Vec::new());
    let mut events: Vec<Event> = ids.iter().flat_map(|&id| parser.push(id)).collect();
    events.extend(parser.finish());
    assert!(matches!(events.first(), Some(Event::Start(_))), "text begins with its message: {events:?}");
    let said: Vec<String> = harmony().parse(&ids, Vec::new()).messages.into_iter().map(|m| m.content).collect();
    assert!(said.concat().contains("Seoul is the capital of the Republic of Korea."), "{said:?}");
}

#[test]
fn calls_are_told_from_results() {
    let parsed = parse_text("<|channel|>commentary to=functions.f<|message|>{}<|call|>", &[]);
    assert_eq!(parsed.messages[0].header.called_function(), Some("f"));
    let parsed = parse_text("<|channel|>analysis to=browser.search code<|message|>{}<|call|>", &[]);
    assert_eq!(parsed.messages[0].header.called_function(), Some("browser.search"));
    let parsed = parse_text("<|start|>functions.f to=assistant<|channel|>commentary<|message|>1<|end|>", &[]);
    assert_eq!(parsed.messages[0].header.called_function(), None);
}

#[test]
fn the_command_line_parses_text_and_tokens_alike() {
    let text = concat!(
        "<|channel|>analysis<|message|>t<|end|>",
        "<|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|> x",
    );
    let ids = common::O200K.encode_with_special(text);
    let parse = |input: Value| {
        let output = cli::parse_json(&harmony(), &input.to_string()).expect("it parses");
        serde_json::to_value(output).expect("JSON")
    };
    let expected = json!({
        "messages": [
            {"channel": "analysis", "recipient": null, "content_type": null, "content": "t", "complete": true},
            {
                "channel": "commentary", "recipient": "functions.f", "content_type": "<|constrain|>json",
                "content": "{}", "complete": true
            },
            {"channel": "final", "recipient": null, "content_type": null, "content": " x", "complete": false},
        ],
        "repairs": [{"at": ids.len(), "kind": "missing_start", "text": ""}],
    });
    assert_eq!(parse(json!({"text": text})), expected);
    assert_eq!(parse(json!({"token_ids": ids})), expected);
    let error = cli::parse_json(&harmony(), "{\"tokens\": []}").expect_err("neither").to_string();
    assert!(error.contains("token_ids"), "{error}");
}
