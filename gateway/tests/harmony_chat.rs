//! Chat requests to prompts: the bundled model's golden conversations, and the rules of history.
#![allow(clippy::expect_used, clippy::panic, reason = "helpers of tests fail by panicking")]

mod common;

use phalanx_gateway::harmony::{
    Harmony,
    chat::{ChatPrompt, PromptError},
    cli,
};
use serde_json::{Value, json};

fn nano() -> Harmony {
    Harmony::new(common::NANO.clone()).expect("it has the control tokens")
}

fn prompt_text(request: Value) -> String {
    cli::render_json(&nano(), &request.to_string()).expect("it renders").text
}

/// The part of a prompt behind the system message.
fn history(messages: Value) -> String {
    let text = prompt_text(json!({"messages": messages}));
    text.split_once("every message.<|end|>").expect("a system message").1.to_owned()
}

#[test]
fn all_golden_requests_give_the_golden_prompt_tokens() {
    let lines = common::golden("nano.jsonl");
    let mut count = 0;
    for line in lines.lines() {
        let golden: Value = serde_json::from_str(line).expect("JSON");
        let mut request = golden["request"].clone();
        request["current_date"] = golden["current_date"].clone();
        let rendered = cli::render_json(&nano(), &request.to_string()).expect("it renders");
        assert_eq!(rendered.text, golden["prompt"], "{}", golden["id"]);
        assert_eq!(json!(rendered.token_ids), golden["prompt_ids"], "{}", golden["id"]);
        count += 1;
    }
    assert_eq!(count, 60);
}

#[test]
fn reasoning_before_the_last_answer_is_dropped_and_an_open_chain_of_calls_keeps_its_own() {
    let call = |id: &str| json!([{"id": id, "type": "function", "function": {"name": "f", "arguments": "{}"}}]);
    let text = history(json!([
        {"role": "user", "content": "q1"},
        {"role": "assistant", "reasoning": "t1", "reasoning_content": "t1", "tool_calls": call("a"), "content": null},
        {"role": "tool", "tool_call_id": "a", "content": "r1"},
        {"role": "assistant", "reasoning_content": "t2", "content": "a1"},
        {"role": "user", "content": "q2"},
        {"role": "assistant", "reasoning": "t3", "tool_calls": call("b"), "content": ""},
        {"role": "tool", "tool_call_id": "b", "content": [{"type": "text", "text": "r"}, {"type": "text", "text": "2"}]},
    ]));
    let expected = concat!(
        "<|start|>user<|message|>q1<|end|>",
        "<|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>",
        "<|start|>functions.f to=assistant<|channel|>commentary<|message|>r1<|end|>",
        "<|start|>assistant<|channel|>final<|message|>a1<|end|>",
        "<|start|>user<|message|>q2<|end|>",
        "<|start|>assistant<|channel|>analysis<|message|>t3<|end|>",
        "<|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>",
        "<|start|>functions.f to=assistant<|channel|>commentary<|message|>r2<|end|>",
        "<|start|>assistant",
    );
    assert_eq!(text, expected);
}

#[test]
fn content_beside_calls_is_what_is_said_before_them() {
    let calls = json!([
        {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{\"x\":1}"}},
        {"id": "b", "type": "function", "function": {"name": "g", "arguments": "{}"}},
    ]);
    let text = history(json!([
        {"role": "assistant", "content": "I will look.", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "b", "content": "2"},
        {"role": "tool", "tool_call_id": "a", "content": "1"},
    ]));
    let expected = concat!(
        "<|start|>assistant<|channel|>commentary<|message|>I will look.<|end|>",
        "<|start|>assistant to=functions.f<|channel|>commentary <|constrain|>json<|message|>{\"x\":1}<|call|>",
        "<|start|>assistant to=functions.g<|channel|>commentary <|constrain|>json<|message|>{}<|call|>",
        "<|start|>functions.g to=assistant<|channel|>commentary<|message|>2<|end|>",
        "<|start|>functions.f to=assistant<|channel|>commentary<|message|>1<|end|>",
        "<|start|>assistant",
    );
    assert_eq!(text, expected);
}

#[test]
fn system_and_developer_messages_become_one_developer_message_where_they_stand() {
    let text = history(json!([
        {"role": "system", "content": "Be brief."},
        {"role": "developer", "content": [{"type": "text", "text": "Be kind."}]},
        {"role": "user", "content": "hi"},
        {"role": "system", "content": "Be formal."},
    ]));
    let expected = concat!(
        "<|start|>developer<|message|># Instructions\n\nBe brief.\n\nBe kind.<|end|>",
        "<|start|>user<|message|>hi<|end|>",
        "<|start|>developer<|message|># Instructions\n\nBe formal.<|end|>",
        "<|start|>assistant",
    );
    assert_eq!(text, expected);
}

#[test]
fn settings_of_the_request_reach_the_prompt() {
    let text = prompt_text(json!({
        "messages": [{"role": "user", "content": "list"}],
        "reasoning_effort": "high",
        "current_date": "2026-01-02",
        "model_identity": "You are Phalanx.",
        "response_format": {"type": "json_schema", "json_schema": {"name": "items", "schema": {"type": "object"}}},
        "temperature": 0,
    }));
    let expected = concat!(
        "<|start|>system<|message|>You are Phalanx.\nKnowledge cutoff: 2024-06\nCurrent date: 2026-01-02\n\n",
        "Reasoning: high\n\n",
        "# Valid channels: analysis, commentary, final. Channel must be included for every message.<|end|>",
        "<|start|>developer<|message|># Response Formats\n\n## items\n\n{\"type\":\"object\"}<|end|>",
        "<|start|>user<|message|>list<|end|><|start|>assistant",
    );
    assert_eq!(text, expected);
}

#[test]
fn what_cannot_be_rendered_is_refused_with_its_place() {
    let conversation = |request: Value| serde_json::from_value::<ChatPrompt>(request).expect("a chat").conversation();
    let orphan = conversation(json!({"messages": [
        {"role": "user", "content": "q"},
        {"role": "tool", "tool_call_id": "call_9", "content": "r"},
    ]}));
    assert_eq!(orphan, Err(PromptError::UnknownToolCall { message: 1, id: "call_9".to_owned() }));
    let spaced = conversation(json!({
        "messages": [{"role": "user", "content": "q"}],
        "tools": [{"type": "function", "function": {"name": "f to=user"}}],
    }));
    assert_eq!(spaced, Err(PromptError::FunctionName { name: "f to=user".to_owned() }));
    let unreadable = [
        r#"{"messages":[{"role":"robot","content":"x"}]}"#,
        r#"{"messages":[{"role":"user","content":7}]}"#,
        r#"{"messages":[{"role":"user","content":[{"type":"image_url","image_url":{}}]}]}"#,
        r#"{}"#,
    ];
    for input in unreadable {
        let error = cli::render_json(&nano(), input).expect_err(input).to_string();
        assert!(error.contains("expected an object with \"messages\""), "{error}");
    }
}
