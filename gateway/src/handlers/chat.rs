//! `/v1/chat/completions`.

use std::sync::Arc;

use axum::{Extension, body::Body, extract::State, response::Response};
use http::Request;
use uuid::Uuid;

use super::{
    chat_wire::ChatDialect,
    deliver::{self, Frame},
    prepare::{Ask, Prepared, start_all},
    replies::{Choice, Replies},
};
use crate::{
    app::{App, unix_seconds},
    body::read_json,
    frame::Identity,
    harmony::{
        Control, Harmony, ReasoningEffort, ToolDescription,
        chat::{AssistantTurn, ChatMessage, ChatPrompt, PromptError, ToolCall},
    },
    openai::{
        chat::{ChatRequest, ReasoningEffort as AskedEffort},
        error::ApiError,
        messages::Message,
        tools::ToolChoice,
    },
    stream::{ChatAssembler, ChatSettings},
};

/// What the endpoint calls its prompt.
const PROMPT: &str = "messages";

/// Answers a chat.
pub(crate) async fn create(
    State(app): State<Arc<App>>,
    Extension(identity): Extension<Identity>,
    request: Request<Body>,
) -> Result<Response, ApiError> {
    let body = read_json(&app.config, request).await?;
    let mut chat = ChatRequest::from_body(body)?;
    let place = app.admit()?;
    let prepared = Prepared::new(&app, &identity, std::mem::take(&mut chat.params), "chatcmpl")?;
    let turn = Turn::render(&app, &chat, &prepared, &identity.id).await?;
    let max_tokens = prepared.max_tokens(turn.prompt.len(), PROMPT)?;
    let count = prepared.params.n;
    let mut meter = prepared.meter(&app, &identity, "chat", count as usize);
    let stops = app.harmony.stop_ids();
    let requests = (0..count).map(|index| {
        let ask = Ask { index, choice: index, max_tokens, logprobs: chat.logprobs, prompt_logprobs: None };
        prepared.request(turn.prompt.clone(), &stops, ask)
    });
    let generations = start_all(&app, requests, &mut meter, &identity, PROMPT).await?;
    let choices = generations.into_iter().zip(0..).map(|(generation, index)| Choice {
        generation,
        assembler: ChatAssembler::new(app.harmony.clone(), turn.settings(&chat, &prepared, index)),
        counts_prompt: index == 0,
        counts_tokens: true,
    });
    let prompt_tokens = turn.prompt.len() as u64;
    let replies = Replies::new(choices.collect(), prompt_tokens, meter, identity.id, PROMPT, place);
    let dialect = ChatDialect { reasoning_field: app.config.reasoning_field, logprobs: chat.logprobs.is_some() };
    let frame = Frame {
        id: prepared.id.clone(),
        deadline: identity.deadline,
        created: unix_seconds(),
        model: prepared.served.name.clone(),
        choices: count as usize,
        return_token_ids: prepared.params.return_token_ids,
        prompt_token_ids: prepared.params.return_token_ids.then_some(turn.prompt),
        headers: prepared.headers(),
    };
    match prepared.params.stream {
        Some(options) => Ok(deliver::streamed(app, replies, dialect, frame, options)),
        None => deliver::whole(&app, replies, &dialect, frame).await,
    }
}

/// The model's turn as far as the gateway writes it.
pub(crate) struct Turn {
    pub(crate) prompt: Vec<u32>,
    /// Functions that were offered.
    functions: Vec<String>,
    /// The end of the prompt that belongs to the turn itself.
    prefill: Vec<u32>,
}

impl Turn {
    /// Renders a chat. A long one takes a while, so another thread does it.
    ///
    /// # Errors
    /// When the conversation has no rendering.
    pub(crate) async fn render(
        app: &App,
        chat: &ChatRequest,
        prepared: &Prepared,
        request_id: &str,
    ) -> Result<Self, ApiError> {
        let effort = chat.reasoning_effort.or(prepared.reasoning_effort).unwrap_or_default();
        let prompt = chat_prompt(chat, effort, app.config.current_date.at(std::time::SystemTime::now()));
        let named = match &chat.tool_choice {
            ToolChoice::Named(name) => Some(name.clone()),
            ToolChoice::Auto | ToolChoice::None => None,
        };
        let harmony = app.harmony.clone();
        let rendered = tokio::task::spawn_blocking(move || {
            let mut ids = harmony.render_chat(&prompt)?;
            let prefill = named.map(|name| call_header(&harmony, &name)).unwrap_or_default();
            ids.extend(&prefill);
            Ok(Self { prompt: ids, functions: prompt.function_names(), prefill })
        });
        let rendered: Result<_, PromptError> = rendered.await.map_err(|error| {
            // Not the panic's own words, which may quote the conversation.
            tracing::error!(request_id, panicked = error.is_panic(), "conversation could not be rendered");
            ApiError::internal(request_id)
        })?;
        rendered.map_err(|error| ApiError::invalid_value(PROMPT, error))
    }

    fn settings(&self, chat: &ChatRequest, prepared: &Prepared, choice: u32) -> ChatSettings {
        let mut unique = Uuid::new_v4().simple().to_string();
        unique.truncate(20);
        ChatSettings {
            functions: self.functions.clone(),
            parallel_calls: chat.parallel_tool_calls,
            prefill: self.prefill.clone(),
            call_id: format!("call_{unique}{choice:02}"),
            stop: prepared.params.stop.clone(),
            stop_tokens: prepared.params.stop_token_ids.clone(),
            include_reasoning: chat.include_reasoning,
            logprobs: chat.logprobs.is_some(),
        }
    }
}

/// The header of a call, as the model writes it itself: with it in the prompt, only arguments can follow.
fn call_header(harmony: &Harmony, function: &str) -> Vec<u32> {
    let tokenizer = harmony.tokenizer();
    let mut ids = vec![harmony.id(Control::Channel)];
    tokenizer.encode_ordinary_into(&format!("commentary to=functions.{function} "), &mut ids);
    ids.push(harmony.id(Control::Constrain));
    tokenizer.encode_ordinary_into("json", &mut ids);
    ids.push(harmony.id(Control::Message));
    ids
}

pub(crate) fn chat_prompt(chat: &ChatRequest, effort: AskedEffort, current_date: Option<String>) -> ChatPrompt {
    let shows_tools = chat.tool_choice != ToolChoice::None;
    let tools = chat.tools.iter().filter(|_| shows_tools).map(|tool| ToolDescription {
        name: tool.name.clone(),
        description: tool.description.clone().unwrap_or_default(),
        parameters: tool.parameters.clone(),
    });
    let reasoning_effort = match effort {
        AskedEffort::Low => ReasoningEffort::Low,
        AskedEffort::Medium => ReasoningEffort::Medium,
        AskedEffort::High => ReasoningEffort::High,
    };
    ChatPrompt {
        messages: chat.messages.iter().map(chat_message).collect(),
        tools: tools.collect(),
        reasoning_effort,
        current_date,
        model_identity: None,
        response_format: None,
    }
}

fn chat_message(message: &Message) -> ChatMessage {
    match message.clone() {
        Message::System { content } | Message::Developer { content } => ChatMessage::Developer { content },
        Message::User { content } => ChatMessage::User { content },
        Message::Assistant { content, reasoning, tool_calls } => {
            let calls = tool_calls.into_iter();
            let tool_calls =
                calls.map(|call| ToolCall { id: call.id, name: call.name, arguments: call.arguments }).collect();
            ChatMessage::Assistant(AssistantTurn { reasoning, content, tool_calls })
        }
        Message::Tool { content, tool_call_id } => ChatMessage::Tool { tool_call_id, content },
    }
}
