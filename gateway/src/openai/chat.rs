//! The body of `/v1/chat/completions`.

use serde_json::Value;

use super::{
    error::ApiError,
    fields::Fields,
    messages::{Message, take_messages},
    params::Params,
    tools::{Function, ToolChoice, take_tool_choice, take_tools},
};

/// Most alternatives beside a token.
const MAX_TOP_LOGPROBS: u32 = 20;

/// How much the model thinks before it answers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Deserialize, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ReasoningEffort {
    /// Little.
    Low,
    /// The model's own default.
    #[default]
    Medium,
    /// Long.
    High,
}

/// A chat request, checked.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct ChatRequest {
    pub(crate) params: Params,
    pub(crate) messages: Vec<Message>,
    pub(crate) tools: Vec<Function>,
    pub(crate) tool_choice: ToolChoice,
    pub(crate) parallel_tool_calls: bool,
    /// `None`: the profile's, then the model's own.
    pub(crate) reasoning_effort: Option<ReasoningEffort>,
    pub(crate) include_reasoning: bool,
    /// Report log-probabilities, with this many alternatives.
    pub(crate) logprobs: Option<u32>,
}

impl ChatRequest {
    /// Checks a body.
    pub(crate) fn from_body(body: Value) -> Result<Self, ApiError> {
        let mut fields = Fields::of_body(body)?;
        let mut ignored = Vec::new();
        let messages = take_messages(&mut fields, &mut ignored)?;
        let tools = take_tools(&mut fields, &mut ignored)?;
        refuse_unsupported(&mut fields)?;
        // The newer name wins, as it does at OpenAI.
        let max_completion_tokens = fields.count("max_completion_tokens", 1, u32::MAX)?;
        let mut params = Params::take(&mut fields, 1)?;
        params.max_tokens = max_completion_tokens.or(params.max_tokens);
        let request = Self {
            messages,
            tool_choice: take_tool_choice(&mut fields, &tools)?,
            tools,
            parallel_tool_calls: fields.boolean("parallel_tool_calls")?.unwrap_or(true),
            reasoning_effort: take_effort(&mut fields)?,
            include_reasoning: fields.boolean("include_reasoning")?.unwrap_or(true),
            logprobs: take_logprobs(&mut fields)?,
            params: Params { ignored: Vec::new(), ..params.clone() },
        };
        ignored.append(&mut params.ignored);
        ignored.extend(fields.untaken());
        Ok(Self { params: Params { ignored, ..request.params }, ..request })
    }
}

fn take_effort(fields: &mut Fields) -> Result<Option<ReasoningEffort>, ApiError> {
    let words = [("low", ReasoningEffort::Low), ("medium", ReasoningEffort::Medium), ("high", ReasoningEffort::High)];
    fields.word("reasoning_effort", &words)
}

fn take_logprobs(fields: &mut Fields) -> Result<Option<u32>, ApiError> {
    let wanted = fields.boolean("logprobs")?.unwrap_or(false);
    let top = fields.count("top_logprobs", 0, MAX_TOP_LOGPROBS)?;
    match (wanted, top) {
        (true, top) => Ok(Some(top.unwrap_or(0))),
        (false, Some(top)) if top > 0 => {
            Err(ApiError::invalid_value("top_logprobs", "it is only allowed when 'logprobs' is true"))
        }
        (false, _) => Ok(None),
    }
}

fn refuse_unsupported(fields: &mut Fields) -> Result<(), ApiError> {
    if let Some(mut format) = fields.object("response_format")? {
        let kind = format.required_string("type")?;
        match kind.as_str() {
            "text" => {}
            "json_object" | "json_schema" => {
                let reason = format!("'{kind}' needs constrained decoding, which is not available yet");
                return Err(ApiError::unsupported("response_format", reason));
            }
            _ => {
                let text = format!("'{kind}' is not one of 'text', 'json_object', 'json_schema'");
                return Err(ApiError::invalid_value("response_format.type", text));
            }
        }
    }
    if let Some(modalities) = fields.array("modalities", 8)?
        && modalities.iter().any(|modality| modality != "text")
    {
        return Err(ApiError::unsupported("modalities", "the model reads and writes only 'text'"));
    }
    fields.refuse("audio", "the model has no audio")?;
    for name in ["chat_template", "continue_final_message", "documents"] {
        fields.refuse(name, "conversations are rendered as the model was trained, and in no other way")?;
    }
    Ok(())
}
