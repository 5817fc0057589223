//! Chat answers as OpenAI writes them.

use super::deliver::{Dialect, End};
use crate::{
    config::ReasoningField,
    openai::reply::{
        AnswerMessage, ChatChoice, ChatChunkChoice, ChatLogprobs, Delta, FinishReason, FunctionCall, TokenLogprob,
        ToolCall, ToolCallDelta,
    },
    stream::{ChatAssembler, ChatPiece},
};

/// What the wire form of a chat answer depends on.
pub(crate) struct ChatDialect {
    pub(crate) reasoning_field: ReasoningField,
    pub(crate) logprobs: bool,
}

impl ChatDialect {
    /// The same text under `reasoning` and `reasoning_content`, as far as they are wanted.
    fn reasoning(&self, text: String) -> (Option<String>, Option<String>) {
        match self.reasoning_field {
            ReasoningField::Both => (Some(text.clone()), Some(text)),
            ReasoningField::Reasoning => (Some(text), None),
            ReasoningField::ReasoningContent => (None, Some(text)),
        }
    }

    fn logprobs(&self, content: Vec<TokenLogprob>) -> Option<ChatLogprobs> {
        self.logprobs.then_some(ChatLogprobs { content, refusal: None })
    }
}

fn call_delta(index: u32, name: Option<(String, String)>, arguments: String) -> Delta {
    let (id, name) = name.unzip();
    let kind = id.is_some().then_some("function");
    let fragment = ToolCallDelta { index, id, kind, function: FunctionCall { name, arguments } };
    Delta { tool_calls: Some(vec![fragment]), ..Delta::default() }
}

impl Dialect for ChatDialect {
    type Assembler = ChatAssembler;
    type Chunk = ChatChunkChoice;
    type Whole = ChatChoice;

    const OBJECTS: (&'static str, &'static str) = ("chat.completion.chunk", "chat.completion");

    fn opening(&self, index: u32) -> Option<ChatChunkChoice> {
        let delta = Delta { role: Some("assistant"), content: Some(String::new()), ..Delta::default() };
        Some(ChatChunkChoice { index, delta, logprobs: None, finish_reason: None, token_ids: None })
    }

    fn chunk(&self, index: u32, piece: ChatPiece, token_ids: Option<Vec<u32>>) -> ChatChunkChoice {
        let mut logprobs = None;
        let delta = match piece {
            ChatPiece::Reasoning(text) => {
                let (reasoning, reasoning_content) = self.reasoning(text);
                Delta { reasoning, reasoning_content, ..Delta::default() }
            }
            ChatPiece::Content { text, logprobs: content } => {
                logprobs = self.logprobs(content);
                Delta { content: Some(text), ..Delta::default() }
            }
            ChatPiece::Call { index, id, name } => call_delta(index, Some((id, name)), String::new()),
            ChatPiece::Arguments { index, text } => call_delta(index, None, text),
        };
        ChatChunkChoice { index, delta, logprobs, finish_reason: None, token_ids }
    }

    fn closing(&self, index: u32, reason: FinishReason, token_ids: Option<Vec<u32>>) -> ChatChunkChoice {
        let delta = Delta::default();
        ChatChunkChoice { index, delta, logprobs: None, finish_reason: Some(reason), token_ids }
    }

    fn whole(&self, index: u32, pieces: Vec<ChatPiece>, end: End) -> ChatChoice {
        let (mut content, mut thoughts) = (String::new(), String::new());
        let mut logprobs = Vec::new();
        let mut tool_calls: Vec<ToolCall> = Vec::new();
        for piece in pieces {
            match piece {
                ChatPiece::Reasoning(text) => thoughts.push_str(&text),
                ChatPiece::Content { text, logprobs: more } => {
                    content.push_str(&text);
                    logprobs.extend(more);
                }
                ChatPiece::Call { id, name, .. } => {
                    let function = FunctionCall { name: Some(name), arguments: String::new() };
                    tool_calls.push(ToolCall { id, kind: "function", function });
                }
                ChatPiece::Arguments { text, .. } => {
                    if let Some(call) = tool_calls.last_mut() {
                        call.function.arguments.push_str(&text);
                    }
                }
            }
        }
        let (reasoning, reasoning_content) = if thoughts.is_empty() { (None, None) } else { self.reasoning(thoughts) };
        // An empty answer is "", no answer is null: beside calls, or when the budget ended before one.
        let is_absent = content.is_empty() && (!tool_calls.is_empty() || end.reason == FinishReason::Length);
        let content = (!is_absent).then_some(content);
        let role = "assistant";
        let message = AnswerMessage { role, content, refusal: None, reasoning, reasoning_content, tool_calls };
        let (finish_reason, token_ids) = (end.reason, end.token_ids);
        ChatChoice { index, message, logprobs: self.logprobs(logprobs), finish_reason, token_ids }
    }
}
