//! JSON in, JSON out, for `phalanx harmony render` and `phalanx harmony parse`.

use serde::{Deserialize, Serialize};

use super::{
    Channel, Harmony, ParsedMessage, Repair,
    chat::{ChatPrompt, PromptError},
};

/// Input that cannot be rendered or parsed.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    /// It is not the JSON that is asked for.
    #[error("cannot read the input: {source}; expected {expected}")]
    Json {
        /// What it should have been.
        expected: &'static str,
        /// What is wrong, and where.
        source: serde_json::Error,
    },
    /// The chat has no rendering.
    #[error(transparent)]
    Prompt(#[from] PromptError),
}

/// A rendered prompt.
#[derive(Debug, Serialize)]
pub struct Rendered {
    /// Its text, control tokens by name.
    pub text: String,
    /// Its tokens.
    pub token_ids: Vec<u32>,
}

/// What a row of tokens says.
#[derive(Debug, Serialize)]
pub struct ParsedOutput {
    /// The messages in order.
    pub messages: Vec<MessageOutput>,
    /// What was malformed, and how it was read.
    pub repairs: Vec<Repair>,
}

/// One message.
#[derive(Debug, Serialize)]
pub struct MessageOutput {
    /// Who speaks, if it is not the assistant.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub role: Option<&'static str>,
    /// The speaker's name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// What the message is; null where a well-formed header names no channel.
    pub channel: Option<Channel>,
    /// Whom it is for.
    pub recipient: Option<String>,
    /// What the content is written in.
    pub content_type: Option<String>,
    /// The text.
    pub content: String,
    /// Whether a token of its own ended it.
    pub complete: bool,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum ParseInput {
    TokenIds { token_ids: Vec<u32> },
    Text { text: String },
}

/// Renders `{"messages", "tools", "reasoning_effort", "current_date", "model_identity", "response_format"}`, all but the
/// first optional and in the shape of OpenAI's chat API.
///
/// # Errors
/// When the input is not that, or a tool's result belongs to no call.
pub fn render_json(harmony: &Harmony, input: &str) -> Result<Rendered, CliError> {
    let prompt: ChatPrompt = read(input, r#"an object with "messages" as in a chat request"#)?;
    let conversation = prompt.conversation()?;
    let text = conversation.rendered_text(ChatPrompt::RENDERING);
    Ok(Rendered { text, token_ids: harmony.render(&conversation, ChatPrompt::RENDERING) })
}

/// Parses `{"token_ids"}` or `{"text"}`, a completion or a whole conversation.
///
/// # Errors
/// When the input is neither.
pub fn parse_json(harmony: &Harmony, input: &str) -> Result<ParsedOutput, CliError> {
    let token_ids = match read(input, r#"{"token_ids": [...]} or {"text": "..."}"#)? {
        ParseInput::TokenIds { token_ids } => token_ids,
        ParseInput::Text { text } => harmony.tokenizer().encode_with_special(&text),
    };
    let parsed = harmony.parse(&token_ids, Vec::new());
    Ok(ParsedOutput { messages: parsed.messages.into_iter().map(message_output).collect(), repairs: parsed.repairs })
}

fn read<'i, T: Deserialize<'i>>(input: &'i str, expected: &'static str) -> Result<T, CliError> {
    serde_json::from_str(input).map_err(|source| CliError::Json { expected, source })
}

fn message_output(message: ParsedMessage) -> MessageOutput {
    let ParsedMessage { header, content, ending } = message;
    let role = header.author.role();
    MessageOutput {
        role: (role != "assistant").then_some(role),
        name: header.author.name().map(str::to_owned),
        channel: header.channel,
        recipient: header.recipient,
        content_type: header.content_type.map(|of| of.to_string()),
        content,
        complete: ending.is_complete(),
    }
}
