//! Harmony, the format of gpt-oss's conversations: rendered into token ids, parsed from them as they arrive.
//!
//! Pure: no I/O, no clock, no OpenAI wire types. Control tokens are resolved by name, since checkpoints place them at
//! different ids, and message text is never read for them, so that no user can write one.
//!
//! - `conversation`: what can be rendered; `render` and `typescript` render it;
//! - `chat`: the neutral form of a chat request, and what conversation it stands for;
//! - `parser`: tokens to events, never failing; `header` collects message headers, `reader` reads them, well-formed or
//!   not; `repair` says what was malformed and how it was read;
//! - `cli`: JSON in and out, for `phalanx harmony`.

pub mod chat;
pub mod cli;
mod conversation;
mod header;
mod parser;
mod reader;
mod render;
mod repair;
mod typescript;

use std::{fmt, sync::Arc};

use crate::tokenizer::Tokenizer;

pub use conversation::{
    Author, Channel, Content, ContentType, Conversation, DeveloperSettings, Message, ReasoningEffort, RecipientPlace,
    ResponseFormat, SystemSettings, ToolDescription, ToolNamespace,
};
pub use header::Header;
pub use parser::{Ending, Event, Parsed, ParsedMessage, Parser};
pub use render::{Purpose, RenderOptions};
pub use repair::{Repair, RepairKind};

/// A tokenizer that Harmony cannot be written with.
#[derive(Debug, thiserror::Error)]
pub enum HarmonyError {
    /// A control token is missing.
    #[error(
        "the tokenizer has no token {control}, which Harmony needs; is this the tokenizer.json of a gpt-oss model?"
    )]
    MissingControl {
        /// The token's name.
        control: Control,
    },
}

/// A token that gives a conversation its structure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Control {
    /// Begins a message's header.
    Start,
    /// Ends a message.
    End,
    /// Ends a header and begins the content.
    Message,
    /// Stands before the channel in a header.
    Channel,
    /// Stands before the type that the content is constrained to.
    Constrain,
    /// Ends the model's turn with an answer.
    Return,
    /// Ends the model's turn with a call of a tool.
    Call,
}

impl Control {
    /// All of them, in the order of their discriminants.
    const ALL: [Self; 7] =
        [Self::Start, Self::End, Self::Message, Self::Channel, Self::Constrain, Self::Return, Self::Call];

    /// The token's name in `tokenizer.json`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Start => "<|start|>",
            Self::End => "<|end|>",
            Self::Message => "<|message|>",
            Self::Channel => "<|channel|>",
            Self::Constrain => "<|constrain|>",
            Self::Return => "<|return|>",
            Self::Call => "<|call|>",
        }
    }
}

impl fmt::Display for Control {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Harmony over one model's tokenizer. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Harmony {
    tokenizer: Arc<Tokenizer>,
    /// The id of each of [`Control::ALL`].
    control_ids: [u32; Control::ALL.len()],
}

impl Harmony {
    /// Resolves the control tokens.
    ///
    /// # Errors
    /// When the tokenizer lacks one of them.
    pub fn new(tokenizer: Arc<Tokenizer>) -> Result<Self, HarmonyError> {
        let mut control_ids = [0; Control::ALL.len()];
        for (id, control) in control_ids.iter_mut().zip(Control::ALL) {
            *id = tokenizer.special(control.name()).ok_or(HarmonyError::MissingControl { control })?;
        }
        Ok(Self { tokenizer, control_ids })
    }

    /// The tokenizer beneath.
    pub fn tokenizer(&self) -> &Arc<Tokenizer> {
        &self.tokenizer
    }

    /// The id of a control token.
    pub fn id(&self, control: Control) -> u32 {
        self.control_ids[control as usize]
    }

    /// The control token of this id, if it is one.
    pub fn control(&self, id: u32) -> Option<Control> {
        Control::ALL.into_iter().find(|&control| self.id(control) == id)
    }

    /// The tokens at which the model's turn is over: an answer, a call, and the end of the text.
    pub fn stop_ids(&self) -> Vec<u32> {
        let ends = [Control::Return, Control::Call].map(|control| self.id(control));
        ends.into_iter().chain(self.tokenizer.special("<|endoftext|>")).collect()
    }

    /// A parser for what the model generates after a rendered prompt.
    ///
    /// `functions` are the names of the functions that it was offered; they tell a name from what is glued to it.
    pub fn parser(&self, functions: Vec<String>) -> Parser {
        Parser::new(self.clone(), functions)
    }

    /// Parses a whole completion, or a whole conversation.
    pub fn parse(&self, ids: &[u32], functions: Vec<String>) -> Parsed {
        let mut parser = self.parser(functions);
        let mut parsed = Parsed::default();
        for &id in ids {
            parsed.extend(parser.push(id));
        }
        parsed.extend(parser.finish());
        parsed.repairs = parser.into_repairs();
        parsed
    }
}
