//! What holds for every row of tokens and for every conversation.
#![allow(clippy::expect_used, clippy::panic, reason = "helpers of tests fail by panicking")]

mod common;

use std::sync::LazyLock;

use phalanx_gateway::harmony::{
    Author, Channel, Content, ContentType, Control, Conversation, Ending, Event, Harmony, Message, Parsed, Purpose,
    RecipientPlace, RenderOptions,
};
use proptest::prelude::*;

static NANO: LazyLock<Harmony> = LazyLock::new(|| Harmony::new(common::NANO.clone()).expect("control tokens"));

/// A piece of a model's output.
#[derive(Debug, Clone)]
enum Piece {
    /// A control token, well placed or not.
    Control(Control),
    /// A word that belongs into headers.
    HeaderWord(&'static str),
    /// A word that occurs once and must be found again.
    Marker,
    /// Bytes of an incomplete or impossible character.
    Bytes(Vec<u8>),
    /// Any id at all.
    Id(u32),
}

fn piece() -> impl Strategy<Value = Piece> {
    use Control as C;
    let control =
        prop::sample::select(vec![C::Start, C::End, C::Message, C::Channel, C::Constrain, C::Return, C::Call]);
    let word = prop::sample::select(vec![
        "assistant",
        "user",
        "analysis",
        "final",
        "commentary",
        " to=",
        " to=functions.f",
        "json",
        " json",
        " ",
        "\n",
        "?",
        "functions.g",
        "final ",
        "thoughts",
    ]);
    prop_oneof![
        6 => control.prop_map(Piece::Control),
        5 => word.prop_map(Piece::HeaderWord),
        5 => Just(Piece::Marker),
        1 => prop::collection::vec(0x80..=0xFF_u8, 1..4).prop_map(Piece::Bytes),
        1 => prop_oneof![0..3072_u32, any::<u32>()].prop_map(Piece::Id),
    ]
}

/// The tokens of the pieces, and the markers among them.
fn tokens(pieces: &[Piece]) -> (Vec<u32>, Vec<String>) {
    let tokenizer = NANO.tokenizer();
    let byte_ids: Vec<u32> = (0..=255).map(byte_id).collect();
    let mut ids = Vec::new();
    let mut markers = Vec::new();
    for piece in pieces {
        match piece {
            Piece::Control(control) => ids.push(NANO.id(*control)),
            Piece::HeaderWord(word) => ids.extend(tokenizer.encode_ordinary(word)),
            Piece::Marker => {
                let marker = format!("Qj{}jQ", markers.len());
                ids.extend(tokenizer.encode_ordinary(&format!(" {marker}")));
                markers.push(marker);
            }
            Piece::Bytes(bytes) => ids.extend(bytes.iter().map(|&byte| byte_ids[byte as usize])),
            Piece::Id(id) => ids.push(*id),
        }
    }
    (ids, markers)
}

fn byte_id(byte: u8) -> u32 {
    let tokenizer = NANO.tokenizer();
    (0..3072).find(|&id| tokenizer.token_bytes(id) == Some(&[byte])).expect("every byte is a token")
}

/// Everything that the messages say, and everything that the repairs say, for finding text in them.
fn all_text(parsed: &Parsed) -> (String, String) {
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

fn events(ids: &[u32]) -> Vec<Event> {
    let mut parser = NANO.parser(Vec::new());
    let mut events: Vec<_> = ids.iter().flat_map(|&id| parser.push(id)).collect();
    events.extend(parser.finish());
    events
}

fn message() -> impl Strategy<Value = Message> {
    let text = prop_oneof!["\\PC{0,20}", "[ \n]{0,3}[a-z]{1,5}[ \n]{0,3}", Just("<|end|><|start|>".to_owned())];
    let channel = prop::sample::select(Channel::ALL.to_vec());
    let spoken = (channel, text.clone()).prop_map(|(channel, text)| Message::assistant(channel, text));
    let place = prop::sample::select(vec![RecipientPlace::BehindRole, RecipientPlace::BehindChannel]);
    let of =
        prop::option::of(any::<bool>().prop_map(|constrained| ContentType { constrained, name: "json".to_owned() }));
    let call =
        ("[a-z_]{1,12}", place, of, text.clone()).prop_map(|(name, recipient_place, content_type, text)| Message {
            recipient: Some(format!("functions.{name}")),
            recipient_place,
            content_type,
            ..Message::assistant(Channel::Commentary, text)
        });
    let result = ("[a-z_]{1,12}", text).prop_map(|(name, text)| Message {
        recipient: Some("assistant".to_owned()),
        channel: Some(Channel::Commentary),
        ..Message::new(Author::Tool(format!("functions.{name}")), Content::Text(text))
    });
    prop_oneof![spoken, call, result]
}

proptest! {
    #![proptest_config(common::cases(3000))]

    #[test]
    fn no_word_of_the_model_is_ever_lost(pieces in prop::collection::vec(piece(), 0..40)) {
        let (ids, markers) = tokens(&pieces);
        let parsed = NANO.parse(&ids, Vec::new());
        let (messages, repairs) = all_text(&parsed);
        for marker in markers {
            let times = messages.matches(&marker).count();
            prop_assert!(times == 1 || (times == 0 && repairs.contains(&marker)), "{} in {:?}", marker, parsed);
        }
    }

    #[test]
    fn events_come_as_start_texts_end(pieces in prop::collection::vec(piece(), 0..40)) {
        let mut open = false;
        for event in events(&tokens(&pieces).0) {
            match event {
                Event::Start(_) => prop_assert!(!std::mem::replace(&mut open, true)),
                Event::Text(text) => prop_assert!(open && !text.is_empty()),
                Event::End(_) => prop_assert!(std::mem::replace(&mut open, false)),
            }
        }
        prop_assert!(!open);
    }

    #[test]
    fn content_is_the_bytes_of_its_tokens(ids in prop::collection::vec(0..3051_u32, 0..40)) {
        let tokenizer = NANO.tokenizer();
        let bytes: Vec<u8> = ids.iter().flat_map(|&id| tokenizer.token_bytes(id).expect("a token").to_vec()).collect();
        let mut all = tokenizer.encode_with_special("<|channel|>final<|message|>");
        all.extend(&ids);
        let parsed = NANO.parse(&all, Vec::new());
        prop_assert_eq!(parsed.messages.len(), 1);
        prop_assert_eq!(&parsed.messages[0].content, &String::from_utf8_lossy(&bytes));
        let deltas: String = events(&all).into_iter().filter_map(|event| match event {
            Event::Text(text) => Some(text),
            _ => None,
        }).collect();
        prop_assert_eq!(deltas, String::from_utf8_lossy(&bytes));
    }

    #[test]
    fn what_is_rendered_is_parsed_back(messages in prop::collection::vec(message(), 0..6)) {
        let conversation = Conversation { messages };
        let options = RenderOptions { purpose: Purpose::Plain, drop_finished_analysis: false };
        let functions = conversation.messages.iter().filter_map(|message| message.recipient.as_deref());
        let functions = functions.filter_map(|name| name.strip_prefix("functions.")).map(str::to_owned).collect();
        let parsed = NANO.parse(&NANO.render(&conversation, options), functions);
        prop_assert_eq!(&parsed.repairs, &vec![]);
        prop_assert_eq!(parsed.messages.len(), conversation.messages.len());
        for (parsed, message) in parsed.messages.iter().zip(&conversation.messages) {
            prop_assert_eq!(&parsed.header.author, &message.author);
            prop_assert_eq!(&parsed.header.channel, &message.channel);
            prop_assert_eq!(&parsed.header.recipient, &message.recipient);
            prop_assert_eq!(&parsed.header.content_type, &message.content_type);
            prop_assert_eq!(&[Content::Text(parsed.content.clone())][..], &message.content[..]);
            let calls = message.author == Author::Assistant(None) && message.recipient.is_some();
            prop_assert_eq!(parsed.ending, if calls { Ending::Call } else { Ending::End });
        }
    }
}
