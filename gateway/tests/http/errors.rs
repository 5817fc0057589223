//! Bad input: the error names the parameter, and the next request works.

use serde_json::{Value, json};

use super::harness::start;

const CHAT: &str = "/v1/chat/completions";

fn tool(name: &str) -> Value {
    json!({"type": "function", "function": {"name": name}})
}

fn many(tools: usize) -> Vec<Value> {
    (0..tools).map(|at| tool(&format!("tool_{at}"))).collect()
}

fn biases(count: usize) -> Value {
    Value::Object((0..count).map(|id| (id.to_string(), json!(1))).collect())
}

#[tokio::test]
async fn every_bad_parameter_is_named() {
    let gateway = start().await;
    let user = json!([{"role": "user", "content": "Spell tree."}]);
    let with = |name: &str, value: Value| {
        let mut body = json!({"messages": user});
        body[name] = value;
        body
    };
    let table = [
        (json!({}), "messages", "missing_required_parameter"),
        (json!({"messages": []}), "messages", "invalid_value"),
        (json!({"messages": "hi"}), "messages", "invalid_type"),
        (json!({"messages": ["hi"]}), "messages[0]", "invalid_type"),
        (json!({"messages": [{"content": "hi"}]}), "messages[0].role", "missing_required_parameter"),
        (json!({"messages": [{"role": 7, "content": "hi"}]}), "messages[0].role", "invalid_type"),
        (json!({"messages": [{"role": "king", "content": "hi"}]}), "messages[0].role", "invalid_value"),
        (json!({"messages": [{"role": "user"}]}), "messages[0].content", "missing_required_parameter"),
        (json!({"messages": [{"role": "user", "content": 5}]}), "messages[0].content", "invalid_type"),
        (
            json!({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}),
            "messages[0].content[0].type",
            "unsupported_parameter",
        ),
        (
            json!({"messages": [{"role": "tool", "content": "5", "tool_call_id": "call_9"}]}),
            "messages[0].tool_call_id",
            "invalid_value",
        ),
        (with("temperature", json!(2.5)), "temperature", "invalid_value"),
        (with("temperature", json!("hot")), "temperature", "invalid_type"),
        (with("top_p", json!(0)), "top_p", "invalid_value"),
        (with("top_k", json!(1.5)), "top_k", "invalid_type"),
        (with("max_tokens", json!(0)), "max_tokens", "invalid_value"),
        (with("max_tokens", json!(5000)), "messages", "context_length_exceeded"),
        (with("n", json!(17)), "n", "invalid_value"),
        (with("n", json!(true)), "n", "invalid_type"),
        (with("stop", json!([""])), "stop", "invalid_value"),
        (with("stop", json!(5)), "stop", "invalid_type"),
        (with("stop", json!(vec!["x"; 17])), "stop", "invalid_value"),
        (with("stop", json!(["x".repeat(257)])), "stop", "invalid_value"),
        (with("cache_salt", json!("x".repeat(257))), "cache_salt", "invalid_value"),
        (with("logit_bias", json!({"x": 1})), "logit_bias", "invalid_value"),
        (with("logit_bias", biases(1025)), "logit_bias", "invalid_value"),
        (with("logit_bias", json!({"5": 101})), "logit_bias.5", "invalid_value"),
        (with("top_logprobs", json!(2)), "top_logprobs", "invalid_value"),
        (with("stream", json!("yes")), "stream", "invalid_type"),
        (with("stream_options", json!({})), "stream_options", "invalid_value"),
        (with("reasoning_effort", json!("extreme")), "reasoning_effort", "invalid_value"),
        (with("response_format", json!({"type": "json_object"})), "response_format", "unsupported_parameter"),
        (with("guided_regex", json!("a+")), "guided_regex", "unsupported_parameter"),
        (with("audio", json!({})), "audio", "unsupported_parameter"),
        (with("tools", json!([{"type": "web_search"}])), "tools[0].type", "unsupported_parameter"),
        (with("tools", json!([tool("a b")])), "tools[0].function.name", "invalid_value"),
        (with("tools", json!([tool("a"), tool("a")])), "tools[1].function.name", "invalid_value"),
        (with("tools", json!(many(129))), "tools", "invalid_value"),
        (with("tool_choice", json!("required")), "tool_choice", "invalid_value"),
        (with("tool_choice", tool("a")), "tool_choice.function.name", "invalid_value"),
        (with("profile", json!("fast")), "profile", "invalid_value"),
        (with("model", json!("gpt-4")), "model", "model_not_found"),
        (with("min_tokens", json!(5000)), "min_tokens", "invalid_value"),
    ];
    for (body, param, code) in table {
        let answer = gateway.client.post(CHAT, body.clone()).await;
        let status = if code == "model_not_found" { 404 } else { 400 };
        assert_eq!(answer.error(), (status, json!(param), json!(code)), "{body}");
        assert_eq!(answer.headers["x-should-retry"], "false", "{body}");
    }
    assert_eq!(gateway.coordinator.asked_count(), 0, "nothing of it reached the coordinator");
}

#[tokio::test]
async fn parameters_at_their_limits_are_taken() {
    let gateway = start().await;
    let most = json!({"stop": vec!["x".repeat(256); 16], "logit_bias": biases(1024), "cache_salt": "x".repeat(256)});
    gateway.client.chat(most).await.ok();
    // So many tools exceed the context of this model, but not the limit.
    let tools = gateway.client.chat(json!({"tools": many(128)})).await;
    assert_eq!(tools.error(), (400, json!("messages"), json!("context_length_exceeded")));
    gateway.client.chat(json!({})).await.ok();
}

#[tokio::test]
async fn what_is_no_json_is_said_so() {
    let gateway = start().await;
    let deep = [vec![b'['; 200], vec![b']'; 200]].concat();
    let bodies: [&[u8]; 6] = [b"", b"{", b"{\"messages\": [}", b"{\"a\": \"\xff\"}", &deep, b"{\"a\": 1e999}"];
    for body in bodies {
        let answer = gateway.client.post_bytes(CHAT, body, "").await;
        assert_eq!(answer.error(), (400, Value::Null, json!("invalid_json")), "{}", String::from_utf8_lossy(body));
    }
    assert_eq!(gateway.client.post(CHAT, json!([])).await.error(), (400, json!("body"), json!("invalid_type")));
    let form = "content-type: application/x-www-form-urlencoded\r\n";
    let answer = gateway.client.post_bytes(CHAT, b"{}", form).await;
    assert_eq!(answer.error(), (415, Value::Null, json!("unsupported_media_type")));
    gateway.client.chat(json!({})).await.ok();
}

#[tokio::test]
async fn a_prompt_that_fills_the_context_is_refused() {
    let gateway = start().await;
    let long = "tree ".repeat(2000);
    let answer = gateway.client.post(CHAT, json!({"messages": [{"role": "user", "content": long}]})).await;
    assert_eq!(answer.error(), (400, json!("messages"), json!("context_length_exceeded")));
    assert!(answer.text().contains("maximum context length is 1024 tokens"));
}

#[tokio::test]
async fn unknown_paths_and_methods_are_errors_in_the_same_form() {
    let gateway = start().await;
    assert_eq!(gateway.client.get("/v1/nothing").await.error(), (404, Value::Null, json!("unknown_path")));
    let answer = gateway.client.get(CHAT).await;
    assert_eq!(answer.error(), (405, Value::Null, json!("method_not_allowed")));
    assert_eq!(answer.headers["allow"], "POST");
    assert_eq!(gateway.client.get("/v1/models/gpt-4").await.error().0, 404);
}
