//! A conversation as Harmony sees it.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::Control;

/// Messages in order.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Conversation {
    /// The messages.
    pub messages: Vec<Message>,
}

/// One message.
#[derive(Debug, Clone, PartialEq)]
pub struct Message {
    /// Who speaks.
    pub author: Author,
    /// Whom a call or a tool's result is for.
    pub recipient: Option<String>,
    /// Where the header names the recipient.
    pub recipient_place: RecipientPlace,
    /// What the message is.
    pub channel: Option<Channel>,
    /// What the content is written in.
    pub content_type: Option<ContentType>,
    /// The parts, encoded one by one.
    pub content: Vec<Content>,
}

impl Message {
    /// A message of one part with nothing else in its header.
    pub fn new(author: Author, content: Content) -> Self {
        Self::with_parts(author, vec![content])
    }

    /// A message of several parts with nothing else in its header.
    pub fn with_parts(author: Author, content: Vec<Content>) -> Self {
        let recipient_place = RecipientPlace::default();
        Self { author, recipient: None, recipient_place, channel: None, content_type: None, content }
    }

    /// A text of the assistant on a channel.
    pub fn assistant(channel: Channel, text: String) -> Self {
        Self { channel: Some(channel), ..Self::new(Author::Assistant(None), Content::Text(text)) }
    }
}

/// Where a header names the recipient; both places mean the same.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum RecipientPlace {
    /// Behind the role: `assistant to=f<|channel|>commentary`.
    #[default]
    BehindRole,
    /// Behind the channel, where gpt-oss itself writes it: `assistant<|channel|>commentary to=f`.
    BehindChannel,
}

/// Who speaks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Author {
    /// The settings of the model.
    System,
    /// Instructions and tools.
    Developer,
    /// A person, perhaps named.
    User(Option<String>),
    /// The model, perhaps named.
    Assistant(Option<String>),
    /// The tool of this full name, such as `functions.get_weather`.
    Tool(String),
}

impl Author {
    /// The role as the OpenAI API names it.
    pub fn role(&self) -> &'static str {
        match self {
            Self::System => "system",
            Self::Developer => "developer",
            Self::User(_) => "user",
            Self::Assistant(_) => "assistant",
            Self::Tool(_) => "tool",
        }
    }

    /// The name beside the role; a tool is its name.
    pub fn name(&self) -> Option<&str> {
        match self {
            Self::System | Self::Developer => None,
            Self::User(name) | Self::Assistant(name) => name.as_deref(),
            Self::Tool(name) => Some(name),
        }
    }
}

/// What a message of the assistant is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Channel {
    /// Reasoning, not meant for the user.
    Analysis,
    /// Calls of functions, and what is said to the user between them.
    Commentary,
    /// The answer.
    Final,
}

impl Channel {
    /// All of them, in the order in which the system message names them.
    pub const ALL: [Self; 3] = [Self::Analysis, Self::Commentary, Self::Final];

    /// The channel's name in a header.
    pub fn name(self) -> &'static str {
        match self {
            Self::Analysis => "analysis",
            Self::Commentary => "commentary",
            Self::Final => "final",
        }
    }

    /// The channel of exactly this name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|channel| channel.name() == name)
    }
}

/// What a message's content is written in, such as `json`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContentType {
    /// Whether `<|constrain|>` stands before the name.
    pub constrained: bool,
    /// The name.
    pub name: String,
}

impl ContentType {
    /// The type of a function's arguments: `<|constrain|>json`.
    pub fn constrained_json() -> Self {
        Self { constrained: true, name: "json".to_owned() }
    }
}

impl fmt::Display for ContentType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mark = if self.constrained { Control::Constrain.name() } else { "" };
        write!(f, "{mark}{}", self.name)
    }
}

impl FromStr for ContentType {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(match text.strip_prefix(Control::Constrain.name()) {
            Some(name) => Self { constrained: true, name: name.to_owned() },
            None => Self { constrained: false, name: text.to_owned() },
        })
    }
}

/// One part of a message.
#[derive(Debug, Clone, PartialEq)]
pub enum Content {
    /// Text as it is.
    Text(String),
    /// The content of a system message.
    System(SystemSettings),
    /// The content of a developer message.
    Developer(DeveloperSettings),
}

/// How hard the model thinks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ReasoningEffort {
    /// Briefly.
    Low,
    /// As the model's own template has it.
    #[default]
    Medium,
    /// At length.
    High,
}

impl ReasoningEffort {
    /// The word in the system message.
    pub fn name(self) -> &'static str {
        match self {
            Self::Low => "low",
            Self::Medium => "medium",
            Self::High => "high",
        }
    }
}

/// What the system message says. What is absent is left out of it.
#[derive(Debug, Clone, PartialEq)]
pub struct SystemSettings {
    /// Who the model is.
    pub identity: Option<String>,
    /// Up to when it knows the world, as `YYYY-MM`.
    pub knowledge_cutoff: Option<String>,
    /// Today, as `YYYY-MM-DD`.
    pub current_date: Option<String>,
    /// How hard it thinks.
    pub reasoning_effort: Option<ReasoningEffort>,
    /// Built-in tools, such as `browser`.
    pub tools: Vec<ToolNamespace>,
    /// The channels it may use; none leaves the section out.
    pub valid_channels: Vec<Channel>,
    /// Whether every message must name its channel.
    pub channel_required: bool,
}

impl Default for SystemSettings {
    /// The settings that gpt-oss was trained with. Source: the release's chat template.
    fn default() -> Self {
        Self {
            identity: Some("You are ChatGPT, a large language model trained by OpenAI.".to_owned()),
            knowledge_cutoff: Some("2024-06".to_owned()),
            current_date: None,
            reasoning_effort: Some(ReasoningEffort::default()),
            tools: Vec::new(),
            valid_channels: Channel::ALL.to_vec(),
            channel_required: true,
        }
    }
}

/// What a developer message says.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct DeveloperSettings {
    /// What elsewhere is called the system prompt.
    pub instructions: Option<String>,
    /// The functions that the model may call.
    pub tools: Vec<ToolNamespace>,
    /// What the answer must look like.
    pub response_format: Option<ResponseFormat>,
}

/// Tools under a common name.
#[derive(Debug, Clone, PartialEq)]
pub struct ToolNamespace {
    /// The name before the dot: `functions`, `browser`.
    pub name: String,
    /// What it is for.
    pub description: Option<String>,
    /// The tools; without any, the description is the whole section.
    pub tools: Vec<ToolDescription>,
}

impl ToolNamespace {
    /// The name of the namespace that a caller's functions live in.
    pub const FUNCTIONS: &'static str = "functions";

    /// A caller's functions.
    pub fn functions(tools: Vec<ToolDescription>) -> Self {
        Self { name: Self::FUNCTIONS.to_owned(), description: None, tools }
    }
}

/// One function.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct ToolDescription {
    /// Its name.
    pub name: String,
    /// What it does.
    #[serde(default)]
    pub description: String,
    /// The JSON schema of its arguments, with the properties in the caller's order.
    #[serde(default)]
    pub parameters: Option<Value>,
}

/// What the answer must look like.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct ResponseFormat {
    /// The format's name.
    pub name: String,
    /// What it is for.
    #[serde(default)]
    pub description: Option<String>,
    /// Its JSON schema.
    pub schema: Value,
}
