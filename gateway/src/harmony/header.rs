//! The headers of messages: what they say, and as far as they have arrived.

use super::{
    Author, Channel, ContentType, RepairKind, ToolNamespace,
    reader::{self, Extent},
};

/// A header with more words or bytes is no header: its text is content that lacks `<|message|>`.
const MAX_HEADER_WORDS: usize = 8;
/// Names of functions have at most 64 characters with OpenAI; some callers' are twice as long.
const MAX_HEADER_BYTES: usize = 320;

/// What a message's header says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// Who speaks.
    pub author: Author,
    /// What the message is; without a channel it is an answer.
    pub channel: Option<Channel>,
    /// Whom it is for.
    pub recipient: Option<String>,
    /// What the content is written in.
    pub content_type: Option<ContentType>,
}

impl Header {
    /// The header of an answer.
    pub(super) fn answer() -> Self {
        let channel = Some(Channel::Final);
        Self { author: Author::Assistant(None), channel, recipient: None, content_type: None }
    }

    /// The name of the function that the assistant calls with this message, without its namespace `functions.`; tools of
    /// other namespaces keep theirs.
    pub fn called_function(&self) -> Option<&str> {
        let recipient = self.recipient.as_deref()?;
        let calls = matches!(self.author, Author::Assistant(_)) && !matches!(recipient, "assistant" | "user" | "all");
        calls.then(|| function_name(recipient))
    }
}

pub(super) fn function_name(recipient: &str) -> &str {
    recipient.strip_prefix(ToolNamespace::FUNCTIONS).and_then(|rest| rest.strip_prefix('.')).unwrap_or(recipient)
}

/// What a header began with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Opening {
    /// The prompt: it ended in `<|start|>assistant`.
    Turn,
    /// A `<|start|>` of the model.
    Marked,
    /// Nothing, after the end of a message.
    Implied,
}

/// A control token inside a header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mark {
    Channel,
    Constrain,
}

/// A header as far as it has arrived.
#[derive(Debug)]
pub(super) struct Draft {
    pub(super) opening: Opening,
    /// The text before the first mark, then each mark with the text after it.
    pub(super) parts: Vec<Part>,
}

#[derive(Debug)]
pub(super) struct Part {
    pub(super) mark: Option<Mark>,
    pub(super) text: Vec<u8>,
}

/// What became of a draft's words.
#[derive(Debug)]
pub(super) struct Reading {
    pub(super) header: Header,
    /// Text from before the header proper: a message of its own.
    pub(super) before: Vec<u8>,
    /// The beginning of the content.
    pub(super) content: Vec<u8>,
    pub(super) repairs: Vec<(RepairKind, String)>,
}

/// Whether the text after a `<|channel|>` in content makes it the beginning of a header.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Header,
    NoHeader,
    NotYetKnown,
}

impl Draft {
    pub(super) fn new(opening: Opening) -> Self {
        Self { opening, parts: vec![Part { mark: None, text: Vec::new() }] }
    }

    pub(super) fn push_mark(&mut self, mark: Mark) {
        self.parts.push(Part { mark: Some(mark), text: Vec::new() });
    }

    pub(super) fn push_text(&mut self, bytes: &[u8]) {
        if let Some(part) = self.parts.last_mut() {
            part.text.extend_from_slice(bytes);
        }
    }

    /// All of its text as it came, without the marks.
    pub(super) fn text(&self) -> Vec<u8> {
        self.parts.iter().flat_map(|part| part.text.iter().copied()).collect()
    }

    pub(super) fn is_blank(&self) -> bool {
        self.parts.len() == 1 && self.parts.iter().all(|part| part.text.trim_ascii().is_empty())
    }

    pub(super) fn is_too_long(&self) -> bool {
        let count = |count: fn(&Part) -> usize| self.parts.iter().map(count).sum::<usize>();
        count(|part| part.text.len()) > MAX_HEADER_BYTES || count(|part| words(&part.text).count()) > MAX_HEADER_WORDS
    }

    pub(super) fn names_channel(&self) -> bool {
        self.parts.iter().any(|part| part.mark == Some(Mark::Channel))
    }

    /// Judges the word after a `<|channel|>`; `complete` says that no more of it can come.
    pub(super) fn verdict(&self, complete: bool) -> Verdict {
        let text = self.parts.last().map(|part| part.text.trim_ascii_start()).unwrap_or_default();
        let end = text.iter().position(u8::is_ascii_whitespace);
        let word = &text[..end.unwrap_or(text.len())];
        let mut names = Channel::ALL.into_iter().map(|channel| channel.name().as_bytes());
        if complete || end.is_some() {
            if names.any(|name| name == word) { Verdict::Header } else { Verdict::NoHeader }
        } else if names.any(|name| name.starts_with(word)) {
            Verdict::NotYetKnown
        } else {
            Verdict::NoHeader
        }
    }

    /// Reads a header that `<|message|>` ended.
    pub(super) fn read_closed(&self, functions: &[String]) -> Reading {
        reader::read(self, Extent::Closed, functions)
    }

    /// Reads a header that nothing ended, so that its content lies in it as well.
    pub(super) fn read_open(&self, functions: &[String]) -> Reading {
        reader::read(self, Extent::Open, functions)
    }

    /// Reads a header that nothing ended and whose last word may go on.
    pub(super) fn read_growing(&self, functions: &[String]) -> Reading {
        reader::read(self, Extent::Growing, functions)
    }
}

pub(super) fn words(text: &[u8]) -> impl Iterator<Item = (usize, usize)> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let start = at + text[at..].iter().position(|byte| !byte.is_ascii_whitespace())?;
        let len = text[start..].iter().position(u8::is_ascii_whitespace).unwrap_or(text.len() - start);
        at = start + len;
        Some((start, at))
    })
}
