//! The neutral form of a chat request: as much of it as the prompt depends on, free of the wire.
//!
//! The HTTP handlers fill it from their own checked types; `phalanx harmony render` reads it from JSON in OpenAI's shape.

use std::collections::HashMap;

use serde::{Deserialize, Deserializer};
use serde_json::Value;

use super::{
    Author, Channel, Content, ContentType, Conversation, DeveloperSettings, Harmony, Message, Purpose, ReasoningEffort,
    RecipientPlace, RenderOptions, ResponseFormat, SystemSettings, ToolDescription, ToolNamespace,
};

/// A chat to be continued by the model.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
pub struct ChatPrompt {
    /// What was said so far.
    pub messages: Vec<ChatMessage>,
    /// The functions that the model may call.
    #[serde(default, deserialize_with = "tools_from_json")]
    pub tools: Vec<ToolDescription>,
    /// How hard it shall think.
    #[serde(default)]
    pub reasoning_effort: ReasoningEffort,
    /// Today as `YYYY-MM-DD`; without it the model is not told.
    #[serde(default)]
    pub current_date: Option<String>,
    /// Who the model is, if not what it was trained to be.
    #[serde(default)]
    pub model_identity: Option<String>,
    /// What the answer must look like.
    #[serde(default, deserialize_with = "response_format_from_json")]
    pub response_format: Option<ResponseFormat>,
}

/// One message of a chat. Texts are lists of parts, which the model sees one after the other.
///
/// A user's name is not among them: the release's own template has no place for it.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(tag = "role", rename_all = "lowercase")]
pub enum ChatMessage {
    /// Instructions, which the API calls `system` or `developer`.
    #[serde(alias = "system")]
    Developer {
        /// The text.
        #[serde(deserialize_with = "texts_from_json")]
        content: Vec<String>,
    },
    /// What the person says.
    User {
        /// The text.
        #[serde(deserialize_with = "texts_from_json")]
        content: Vec<String>,
    },
    /// What the model said.
    Assistant(AssistantTurn),
    /// What a function returned.
    Tool {
        /// The id of the call.
        tool_call_id: String,
        /// The result.
        #[serde(deserialize_with = "texts_from_json")]
        content: Vec<String>,
    },
}

/// What the model said in one turn, in this order.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(from = "AssistantJson")]
pub struct AssistantTurn {
    /// What it thought.
    pub reasoning: Option<String>,
    /// The answer, or what it said to the user before its calls.
    pub content: Vec<String>,
    /// The functions that it called.
    pub tool_calls: Vec<ToolCall>,
}

/// One call of a function.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(from = "ToolCallJson")]
pub struct ToolCall {
    /// What the result will be known by.
    pub id: String,
    /// The function's name.
    pub name: String,
    /// Its arguments, as the model wrote them.
    pub arguments: String,
}

/// A chat that has no rendering.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PromptError {
    /// A result of no known call.
    #[error("message {message} answers the tool call {id:?}, but no assistant message before it makes that call")]
    UnknownToolCall {
        /// The message's place in the list, from 0.
        message: usize,
        /// The id that it names.
        id: String,
    },
    /// A name that would break the header that it stands in.
    #[error("{name:?} cannot be a function's name: it must be one word without spaces")]
    FunctionName {
        /// The name.
        name: String,
    },
}

impl ChatPrompt {
    /// The conversation that the model sees.
    ///
    /// Reasoning from before the last final answer is left out; that of a chain of calls that is still open stays.
    ///
    /// # Errors
    /// When a tool's result belongs to no call, or a function has no usable name.
    pub fn conversation(&self) -> Result<Conversation, PromptError> {
        self.tools.iter().try_for_each(|tool| check_name(&tool.name))?;
        let mut messages = vec![self.system_message()];
        let leading =
            self.messages.iter().take_while(|message| matches!(message, ChatMessage::Developer { .. })).count();
        let (instructions, rest) = self.messages.split_at(leading);
        messages.extend(self.developer_message(instructions));
        let mut functions = HashMap::new();
        for (at, message) in rest.iter().enumerate() {
            push_message(&mut messages, message, leading + at, &mut functions)?;
        }
        let last_answer = messages.iter().rposition(|message| message.channel == Some(Channel::Final)).unwrap_or(0);
        let mut at = 0..;
        messages.retain(|message| at.next() > Some(last_answer) || message.channel != Some(Channel::Analysis));
        Ok(Conversation { messages })
    }

    /// How the conversation is rendered: [`Self::conversation`] has left out what the model is not to see again.
    pub const RENDERING: RenderOptions = RenderOptions { purpose: Purpose::Completion, drop_finished_analysis: false };

    /// The names of the functions, for the parser of the model's answer.
    pub fn function_names(&self) -> Vec<String> {
        self.tools.iter().map(|tool| tool.name.clone()).collect()
    }

    fn system_message(&self) -> Message {
        let mut settings = SystemSettings {
            current_date: self.current_date.clone(),
            reasoning_effort: Some(self.reasoning_effort),
            ..SystemSettings::default()
        };
        if self.model_identity.is_some() {
            settings.identity.clone_from(&self.model_identity);
        }
        Message::new(Author::System, Content::System(settings))
    }

    fn developer_message(&self, leading: &[ChatMessage]) -> Option<Message> {
        let texts = leading.iter().filter_map(|message| match message {
            ChatMessage::Developer { content } => Some(content.join("\n")),
            _ => None,
        });
        let texts: Vec<_> = texts.filter(|text| !text.is_empty()).collect();
        let settings = DeveloperSettings {
            instructions: (!texts.is_empty()).then(|| texts.join("\n\n")),
            tools: if self.tools.is_empty() { vec![] } else { vec![ToolNamespace::functions(self.tools.clone())] },
            response_format: self.response_format.clone(),
        };
        let says_nothing = settings == DeveloperSettings::default();
        (!says_nothing).then(|| Message::new(Author::Developer, Content::Developer(settings)))
    }
}

impl Harmony {
    /// Renders a chat into the prompt of its next turn.
    ///
    /// # Errors
    /// As [`ChatPrompt::conversation`].
    pub fn render_chat(&self, prompt: &ChatPrompt) -> Result<Vec<u32>, PromptError> {
        Ok(self.render(&prompt.conversation()?, ChatPrompt::RENDERING))
    }
}

fn push_message<'p>(
    out: &mut Vec<Message>,
    message: &'p ChatMessage,
    at: usize,
    functions: &mut HashMap<&'p str, &'p str>,
) -> Result<(), PromptError> {
    match message {
        ChatMessage::Developer { content } => {
            let settings = DeveloperSettings { instructions: Some(content.join("\n")), ..DeveloperSettings::default() };
            out.push(Message::new(Author::Developer, Content::Developer(settings)));
        }
        ChatMessage::User { content } => out.push(with_texts(Author::User(None), content)),
        ChatMessage::Assistant(turn) => {
            for call in &turn.tool_calls {
                check_name(&call.name)?;
                functions.insert(&call.id, &call.name);
            }
            push_turn(out, turn);
        }
        ChatMessage::Tool { tool_call_id, content } => {
            let unknown = || PromptError::UnknownToolCall { message: at, id: tool_call_id.clone() };
            let name = functions.get(tool_call_id.as_str()).ok_or_else(unknown)?;
            out.push(Message {
                recipient: Some("assistant".to_owned()),
                channel: Some(Channel::Commentary),
                ..with_texts(Author::Tool(function_recipient(name)), content)
            });
        }
    }
    Ok(())
}

fn push_turn(out: &mut Vec<Message>, turn: &AssistantTurn) {
    if let Some(reasoning) = turn.reasoning.as_ref().filter(|text| !text.is_empty()) {
        out.push(Message::assistant(Channel::Analysis, reasoning.clone()));
    }
    let calls = !turn.tool_calls.is_empty();
    // Beside calls the content is what the model says before it makes them, and clients send "" for none.
    let says_something =
        if calls { turn.content.iter().any(|text| !text.is_empty()) } else { !turn.content.is_empty() };
    if says_something {
        let channel = if calls { Channel::Commentary } else { Channel::Final };
        out.push(Message { channel: Some(channel), ..with_texts(Author::Assistant(None), &turn.content) });
    }
    // A turn that comes with its reasoning is the model's own, so it is written as the model wrote it: the prefix cache
    // then holds it. Any other call is written as the release's template does.
    let place = if turn.reasoning.is_some() { RecipientPlace::BehindChannel } else { RecipientPlace::BehindRole };
    out.extend(turn.tool_calls.iter().map(|call| Message {
        recipient: Some(function_recipient(&call.name)),
        recipient_place: place,
        content_type: Some(ContentType::constrained_json()),
        ..Message::assistant(Channel::Commentary, call.arguments.clone())
    }));
}

fn with_texts(author: Author, texts: &[String]) -> Message {
    Message::with_parts(author, texts.iter().cloned().map(Content::Text).collect())
}

fn function_recipient(name: &str) -> String {
    format!("{}.{name}", ToolNamespace::FUNCTIONS)
}

fn check_name(name: &str) -> Result<(), PromptError> {
    if name.is_empty() || name.contains(char::is_whitespace) {
        return Err(PromptError::FunctionName { name: name.to_owned() });
    }
    Ok(())
}

/// An assistant message in OpenAI's shape. Both names of the reasoning may be there, since some servers send both.
#[derive(Deserialize)]
struct AssistantJson {
    #[serde(default)]
    reasoning: Option<String>,
    #[serde(default)]
    reasoning_content: Option<String>,
    #[serde(default, deserialize_with = "texts_from_json")]
    content: Vec<String>,
    #[serde(default)]
    tool_calls: Option<Vec<ToolCall>>,
}

impl From<AssistantJson> for AssistantTurn {
    fn from(json: AssistantJson) -> Self {
        Self {
            reasoning: json.reasoning.or(json.reasoning_content),
            content: json.content,
            tool_calls: json.tool_calls.unwrap_or_default(),
        }
    }
}

#[derive(Deserialize)]
struct ToolCallJson {
    id: String,
    function: FunctionCallJson,
}

#[derive(Deserialize)]
struct FunctionCallJson {
    name: String,
    arguments: String,
}

impl From<ToolCallJson> for ToolCall {
    fn from(json: ToolCallJson) -> Self {
        Self { id: json.id, name: json.function.name, arguments: json.function.arguments }
    }
}

fn texts_from_json<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged, expecting = "content is neither a string, nor null, nor a list of text parts")]
    enum Texts {
        One(String),
        Parts(Vec<Part>),
        None(()),
    }
    #[derive(Deserialize)]
    #[serde(tag = "type", rename_all = "lowercase")]
    enum Part {
        Text { text: String },
    }
    Ok(match Texts::deserialize(deserializer)? {
        Texts::One(text) => vec![text],
        Texts::Parts(parts) => parts.into_iter().map(|Part::Text { text }| text).collect(),
        Texts::None(()) => Vec::new(),
    })
}

fn tools_from_json<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<ToolDescription>, D::Error> {
    #[derive(Deserialize)]
    #[serde(tag = "type", rename_all = "lowercase")]
    enum Tool {
        Function { function: ToolDescription },
    }
    let tools = Option::<Vec<Tool>>::deserialize(deserializer)?.unwrap_or_default();
    Ok(tools.into_iter().map(|Tool::Function { function }| function).collect())
}

fn response_format_from_json<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<ResponseFormat>, D::Error> {
    #[derive(Deserialize)]
    #[serde(tag = "type", rename_all = "snake_case")]
    enum Format {
        Text,
        // What keeps the answer to JSON is the grammar; there is no schema to tell of.
        JsonObject,
        JsonSchema { json_schema: Schema },
    }
    #[derive(Deserialize)]
    struct Schema {
        name: String,
        #[serde(default)]
        description: Option<String>,
        #[serde(default)]
        schema: Value,
    }
    Ok(match Option::<Format>::deserialize(deserializer)? {
        Some(Format::JsonSchema { json_schema: Schema { name, description, schema } }) => {
            Some(ResponseFormat { name, description, schema })
        }
        Some(Format::Text | Format::JsonObject) | None => None,
    })
}
