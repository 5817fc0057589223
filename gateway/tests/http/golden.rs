//! What nano said: the conversations of `tests/data/golden/nano.jsonl`.

use std::{path::PathBuf, sync::LazyLock};

use serde_json::{Value, json};

pub(crate) struct Line {
    pub(crate) id: String,
    pub(crate) request: Value,
    pub(crate) current_date: Option<String>,
    pub(crate) prompt_ids: Vec<u32>,
    pub(crate) completion: String,
    pub(crate) completion_ids: Vec<u32>,
}

pub(crate) static LINES: LazyLock<Vec<Line>> = LazyLock::new(|| {
    let text = std::fs::read_to_string(root().join("tests/data/golden/nano.jsonl")).unwrap();
    let ids = |value: &Value| value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect();
    let line_of = |line: &str| {
        let line: Value = serde_json::from_str(line).unwrap();
        Line {
            id: line["id"].as_str().unwrap().to_owned(),
            request: line["request"].clone(),
            current_date: line["current_date"].as_str().map(str::to_owned),
            prompt_ids: ids(&line["prompt_ids"]),
            completion: line["completion"].as_str().unwrap().to_owned(),
            completion_ids: ids(&line["completion_ids"]),
        }
    };
    text.lines().map(line_of).collect()
});

pub(crate) fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The line whose last message is this one.
pub(crate) fn line(last_message: &str) -> &'static Line {
    let says = |line: &&Line| {
        let messages = line.request["messages"].as_array().unwrap();
        messages.last().unwrap()["content"] == last_message
    };
    LINES.iter().find(says).unwrap_or_else(|| panic!("no golden line asks {last_message:?}"))
}

impl Line {
    /// The message that the completion stands for, read from its text, which is well-formed in every line.
    pub(crate) fn message(&self) -> Value {
        let offers_tools = self.request.get("tools").is_some();
        let (mut content, mut reasoning, mut calls) = (None, String::new(), Vec::new());
        for message in self.completion.split("<|start|>assistant") {
            let (header, text) = message.split_once("<|message|>").unwrap();
            let text = text.split("<|").next().unwrap();
            let header = header.strip_prefix("<|channel|>").unwrap();
            match header.split_once(" to=functions.") {
                Some((_, call)) if offers_tools => {
                    let name = call.split(' ').next().unwrap();
                    calls.push(json!({"type": "function", "function": {"name": name, "arguments": text}}));
                }
                None if header == "analysis" => reasoning.push_str(text),
                _ => content.get_or_insert_with(String::new).push_str(text),
            }
        }
        let mut message = json!({
            "role": "assistant",
            "content": content,
            "refusal": null,
            "reasoning": reasoning,
            "reasoning_content": reasoning,
        });
        if !calls.is_empty() {
            message["tool_calls"] = json!(calls);
        }
        message
    }
}
