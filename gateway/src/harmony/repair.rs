//! What was malformed in a model's output, and how it was read.

use serde::Serialize;

/// One departure from the format.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Repair {
    /// The position of the token at which it was noticed, counted from the first one parsed.
    pub at: usize,
    /// What was wrong.
    pub kind: RepairKind,
    /// The text or token that it is about. What became part of no message stands here.
    pub text: String,
}

/// How the format was broken, and what was made of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum RepairKind {
    /// A message began without `<|start|>`: it is the assistant's, and text without any header is an answer.
    MissingStart,
    /// A header ended without `<|message|>`: what is not header is content.
    MissingMessage,
    /// A message was interrupted by the next one: it ends there.
    MissingEnd,
    /// The role is absent or none that exists: the assistant speaks.
    Role,
    /// The channel is absent or misspelt: the likeliest one is taken, `final` if there is none.
    Channel,
    /// A header names something twice: the later one counts.
    DoubledHeader,
    /// The recipient is glued to something, set apart from its `to=` or lacks it.
    Recipient,
    /// A content type stands where no call is: it is kept, and the content is an answer.
    ContentType,
    /// Words in a header that mean nothing there.
    HeaderText,
    /// A control token where it has no meaning: it is left out.
    StrayControl,
    /// An id that the tokenizer does not know: U+FFFD stands for it.
    UnknownToken,
}
