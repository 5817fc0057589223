//! The messages of a chat request.

use serde_json::Value;

use super::{error::ApiError, fields::Fields};

/// Most messages of one request.
const MAX_MESSAGES: usize = 4096;
/// Most parts of one message's content, and most calls of one message.
const MAX_PARTS: usize = 1024;

/// One message. Text comes in the parts in which the client sent it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Message {
    System {
        content: Vec<String>,
    },
    Developer {
        content: Vec<String>,
    },
    User {
        content: Vec<String>,
    },
    Assistant {
        content: Vec<String>,
        reasoning: Option<String>,
        tool_calls: Vec<ToolCall>,
    },
    /// An earlier assistant message has a call with this id.
    Tool {
        content: Vec<String>,
        tool_call_id: String,
    },
}

/// A call that the model made earlier.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ToolCall {
    pub(crate) id: String,
    pub(crate) name: String,
    /// JSON as the model wrote it, which need not be valid.
    pub(crate) arguments: String,
}

/// Takes `messages`; `ignored` gets the places of what has no effect.
pub(crate) fn take_messages(fields: &mut Fields, ignored: &mut Vec<String>) -> Result<Vec<Message>, ApiError> {
    let values = fields.array("messages", MAX_MESSAGES)?.ok_or_else(|| ApiError::missing("messages"))?;
    if values.is_empty() {
        return Err(ApiError::invalid_value("messages", "it is empty; expected at least one message"));
    }
    let mut messages = Vec::with_capacity(values.len());
    for (at, value) in values.into_iter().enumerate() {
        let message = take_message(format!("messages[{at}]"), value, &messages, ignored)?;
        messages.push(message);
    }
    Ok(messages)
}

fn take_message(
    path: String,
    value: Value,
    earlier: &[Message],
    ignored: &mut Vec<String>,
) -> Result<Message, ApiError> {
    let mut fields = Fields::of(path, value)?;
    let role = fields.required_string("role")?;
    let message = match role.as_str() {
        "system" => Message::System { content: required_content(&mut fields)? },
        "developer" => Message::Developer { content: required_content(&mut fields)? },
        "user" => Message::User { content: required_content(&mut fields)? },
        "assistant" => take_assistant(&mut fields)?,
        "tool" => take_tool_result(&mut fields, earlier)?,
        "function" => {
            return Err(ApiError::unsupported(&fields.path_of("role"), "'function' is deprecated; use 'tool'"));
        }
        _ => {
            let text = format!("'{role}' is not one of 'system', 'developer', 'user', 'assistant', 'tool'");
            return Err(ApiError::invalid_value(&fields.path_of("role"), text));
        }
    };
    ignored.extend(fields.untaken());
    Ok(message)
}

fn take_assistant(fields: &mut Fields) -> Result<Message, ApiError> {
    fields.refuse("function_call", "it is deprecated; use 'tool_calls'")?;
    fields.refuse("audio", "the model has no audio")?;
    let mut content = take_content(fields)?.unwrap_or_default();
    content.extend(fields.string("refusal")?);
    // Both names carry the same text when a client sends back what it got.
    let reasoning = fields.string("reasoning")?;
    let reasoning = fields.string("reasoning_content")?.or(reasoning);
    let tool_calls = take_tool_calls(fields)?;
    if content.is_empty() && tool_calls.is_empty() && reasoning.is_none() {
        return Err(ApiError::missing(&fields.path_of("content")));
    }
    Ok(Message::Assistant { content, reasoning, tool_calls })
}

fn take_tool_calls(fields: &mut Fields) -> Result<Vec<ToolCall>, ApiError> {
    let list = fields.path_of("tool_calls");
    let values = fields.array("tool_calls", MAX_PARTS)?.unwrap_or_default();
    let take = |(at, value)| {
        let mut call = Fields::of(format!("{list}[{at}]"), value)?;
        call.word("type", &[("function", ())])?;
        let id = call.required_string("id")?;
        let mut function = call.object("function")?.ok_or_else(|| ApiError::missing(&call.path_of("function")))?;
        let name = function.required_string("name")?;
        Ok(ToolCall { id, name, arguments: function.required_string("arguments")? })
    };
    values.into_iter().enumerate().map(take).collect()
}

fn take_tool_result(fields: &mut Fields, earlier: &[Message]) -> Result<Message, ApiError> {
    let content = required_content(fields)?;
    let id = fields.required_string("tool_call_id")?;
    // Some clients repeat the function's name; the call knows it.
    fields.string("name")?;
    let calls = |message: &Message| match message {
        Message::Assistant { tool_calls, .. } => tool_calls.iter().any(|call| call.id == id),
        _ => false,
    };
    if earlier.iter().any(calls) {
        return Ok(Message::Tool { content, tool_call_id: id });
    }
    let text = format!("no earlier assistant message has a tool call with the id '{id}'");
    Err(ApiError::invalid_value(&fields.path_of("tool_call_id"), text))
}

fn required_content(fields: &mut Fields) -> Result<Vec<String>, ApiError> {
    take_content(fields)?.ok_or_else(|| ApiError::missing(&fields.path_of("content")))
}

/// Text, or a list of parts of which each is text.
fn take_content(fields: &mut Fields) -> Result<Option<Vec<String>>, ApiError> {
    let path = fields.path_of("content");
    match fields.value("content") {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(vec![text])),
        Some(Value::Array(parts)) if parts.len() > MAX_PARTS => {
            let text = format!("it has {} parts, expected at most {MAX_PARTS}", parts.len());
            Err(ApiError::invalid_value(&path, text))
        }
        Some(Value::Array(parts)) => {
            let parts = parts.into_iter().enumerate();
            parts.map(|(at, part)| take_part(format!("{path}[{at}]"), part)).collect::<Result<_, _>>().map(Some)
        }
        Some(other) => Err(ApiError::invalid_type(&path, "a string or an array of parts", &other)),
    }
}

fn take_part(path: String, part: Value) -> Result<String, ApiError> {
    if let Value::String(text) = part {
        return Ok(text);
    }
    let mut part = Fields::of(path, part)?;
    let kind = part.required_string("type")?;
    match kind.as_str() {
        "text" => part.required_string("text"),
        "refusal" => part.required_string("refusal"),
        _ => {
            let reason = format!("parts of type '{kind}' cannot be read by this model, only 'text'");
            Err(ApiError::unsupported(&part.path_of("type"), reason))
        }
    }
}
