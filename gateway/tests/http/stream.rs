//! Streamed chat answers, as bytes.

use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::timeout;

use super::{
    golden::{LINES, line},
    harness::{PATIENCE, start, start_for, start_with},
};

const CHAT: &str = "/v1/chat/completions";

fn ask() -> Value {
    json!({"messages": [{"role": "user", "content": "Spell tree."}]})
}

/// Blanks what differs from run to run.
fn steady(event: &str) -> String {
    let Some(at) = event.find("\"id\":\"chatcmpl-") else { return event.to_owned() };
    let (created, object) = (event.find("\"created\":").unwrap(), event.find("\"object\"").unwrap());
    let model = event.find(",\"model\"").unwrap();
    [&event[..at], "\"id\":\"ID\",", &event[object..created], "\"created\":0", &event[model..]].concat()
}

/// What a client makes of the chunks of one choice.
fn concatenated(chunks: &[Value], index: u64) -> Value {
    let (mut content, mut reasoning, mut calls) = (String::new(), String::new(), Vec::<Value>::new());
    for choice in chunks.iter().flat_map(|chunk| chunk["choices"].as_array().unwrap()) {
        if choice["index"] != index {
            continue;
        }
        let delta = &choice["delta"];
        content.push_str(delta["content"].as_str().unwrap_or_default());
        reasoning.push_str(delta["reasoning"].as_str().unwrap_or_default());
        assert_eq!(delta.get("reasoning"), delta.get("reasoning_content"));
        for fragment in delta["tool_calls"].as_array().into_iter().flatten() {
            let at = fragment["index"].as_u64().unwrap() as usize;
            if at == calls.len() {
                assert!(fragment["id"].as_str().unwrap().starts_with("call_"));
                calls.push(json!({"type": fragment["type"], "function": fragment["function"]}));
            } else {
                assert_eq!(at + 1, calls.len(), "never back to an earlier call");
                assert_eq!(fragment.as_object().unwrap().len(), 2, "only index and arguments");
                let so_far = calls[at]["function"]["arguments"].as_str().unwrap();
                let more = fragment["function"]["arguments"].as_str().unwrap();
                calls[at]["function"]["arguments"] = json!(format!("{so_far}{more}"));
            }
        }
    }
    json!({"content": content, "reasoning": reasoning, "tool_calls": calls})
}

#[tokio::test]
async fn a_stream_is_these_bytes() {
    let gateway = start().await;
    gateway.coordinator.behave(|behaviour| behaviour.group = 9);
    let mut body = ask();
    body["stream_options"] = json!({"include_usage": true});
    let mut stream = gateway.client.open(CHAT, body).await;
    assert_eq!(stream.headers["content-type"], "text/event-stream; charset=utf-8");
    assert_eq!(stream.headers["x-accel-buffering"], "no");
    assert!(!stream.headers.contains_key("content-length"));
    let mut events = Vec::new();
    while let Some(event) = stream.next().await {
        events.push(steady(&event));
    }
    let chunk = |delta: &str, finish: &str| {
        format!(
            "data: {{\"id\":\"ID\",\"object\":\"chat.completion.chunk\",\"created\":0,\"model\":\"nano\",\
             \"choices\":[{{\"index\":0,\"delta\":{delta},\"logprobs\":null,\"finish_reason\":{finish}}}]}}"
        )
    };
    let thought = |text: &str| chunk(&format!("{{\"reasoning\":\"{text}\",\"reasoning_content\":\"{text}\"}}"), "null");
    let usage = "data: {\"id\":\"ID\",\"object\":\"chat.completion.chunk\",\"created\":0,\"model\":\"nano\",\
                 \"choices\":[],\"usage\":{\"prompt_tokens\":58,\"completion_tokens\":22,\"total_tokens\":80,\
                 \"prompt_tokens_details\":{\"cached_tokens\":16},\
                 \"completion_tokens_details\":{\"reasoning_tokens\":8}}}";
    let expected = [
        chunk("{\"role\":\"assistant\",\"content\":\"\"}", "null"),
        thought("I will spell tree letter by"),
        thought(" letter."),
        chunk("{\"content\":\"t\"}", "null"),
        chunk("{\"content\":\"-r-e-e\"}", "null"),
        chunk("{}", "\"stop\""),
        usage.to_owned(),
        "data: [DONE]".to_owned(),
    ];
    assert_eq!(events.join("\n"), expected.join("\n"));
}

#[tokio::test]
async fn any_grouping_of_tokens_gives_the_same_text() {
    for line in LINES.iter().filter(|line| line.completion_ids.len() < 80) {
        let gateway = start_for(line).await;
        let expected = line.message();
        for group in [1, 2, 5, 1000] {
            gateway.coordinator.behave(|behaviour| behaviour.group = group);
            let chunks = gateway.client.open(CHAT, line.request.clone()).await.chunks().await;
            let found = concatenated(&chunks, 0);
            let context = format!("{} in groups of {group}", line.id);
            assert_eq!(found["reasoning"], expected["reasoning"], "{context}");
            assert_eq!(found["content"], expected["content"].as_str().unwrap_or_default(), "{context}");
            let calls = expected.get("tool_calls").cloned().unwrap_or_else(|| json!([]));
            assert_eq!(found["tool_calls"], calls, "{context}");
            assert!(!serde_json::to_string(&chunks).unwrap().contains('\u{FFFD}'), "{context}");
        }
    }
}

#[tokio::test]
async fn choices_interleave_each_with_one_role_and_one_end() {
    let gateway = start().await;
    let mut body = ask();
    body["n"] = json!(2);
    body["stream_options"] = json!({"include_usage": true, "continuous_usage_stats": true});
    let chunks = gateway.client.open(CHAT, body).await.chunks().await;
    for index in [0, 1] {
        let choices = chunks.iter().flat_map(|chunk| chunk["choices"].as_array().unwrap());
        let own: Vec<_> = choices.filter(|choice| choice["index"] == index).collect();
        assert_eq!(own.iter().filter(|choice| choice["delta"].get("role").is_some()).count(), 1);
        assert_eq!(own[0]["delta"]["role"], "assistant");
        assert_eq!(own.iter().filter(|choice| !choice["finish_reason"].is_null()).count(), 1);
        assert_eq!(own.last().unwrap()["finish_reason"], "stop");
        assert_eq!(concatenated(&chunks, index)["content"], "t-r-e-e");
    }
    let counts: Vec<_> = chunks.iter().map(|chunk| chunk["usage"]["completion_tokens"].as_u64().unwrap()).collect();
    assert!(counts.is_sorted(), "{counts:?}");
    assert_eq!(counts.last(), Some(&44));
    assert_eq!(chunks.last().unwrap()["choices"], json!([]));
    let ids: std::collections::HashSet<_> = chunks.iter().map(|chunk| chunk["id"].as_str().unwrap()).collect();
    assert_eq!(ids.len(), 1);
}

#[tokio::test]
async fn a_stop_string_over_several_tokens_never_shows() {
    let gateway = start().await;
    let mut body = ask();
    body["stop"] = json!("e-e");
    let mut stream = gateway.client.open(CHAT, body).await;
    let chunks = stream.chunks().await;
    assert_eq!(concatenated(&chunks, 0)["content"], "t-r-");
    assert_eq!(chunks.last().unwrap()["choices"][0]["finish_reason"], "stop");
}

#[tokio::test]
async fn logprobs_come_beside_the_text_they_belong_to() {
    let gateway = start().await;
    let mut body = ask();
    body["logprobs"] = json!(true);
    let chunks = gateway.client.open(CHAT, body).await.chunks().await;
    for choice in chunks.iter().map(|chunk| &chunk["choices"][0]) {
        let entries = choice["logprobs"]["content"].as_array();
        let text: String = entries.into_iter().flatten().map(|entry| entry["token"].as_str().unwrap()).collect();
        assert_eq!(text, choice["delta"]["content"].as_str().unwrap_or_default());
    }
}

#[tokio::test]
async fn token_ids_are_all_there_when_asked_for() {
    let line = line("Spell tree.");
    let gateway = start().await;
    let mut body = ask();
    body["return_token_ids"] = json!(true);
    let chunks = gateway.client.open(CHAT, body).await.chunks().await;
    assert_eq!(chunks[0]["prompt_token_ids"], json!(line.prompt_ids));
    assert!(chunks[1..].iter().all(|chunk| chunk.get("prompt_token_ids").is_none()));
    let ids = chunks.iter().flat_map(|chunk| chunk["choices"][0]["token_ids"].as_array().into_iter().flatten());
    assert_eq!(ids.cloned().collect::<Vec<_>>(), *json!(line.completion_ids).as_array().unwrap());
}

#[tokio::test]
async fn a_quiet_stream_is_kept_alive_with_comments() {
    let gateway = start_with(|config| config.timeouts.keep_alive = Duration::from_millis(20)).await;
    gateway.coordinator.behave(|behaviour| behaviour.hold_at = Some(5));
    let mut stream = gateway.client.open(CHAT, ask()).await;
    let comment = async {
        loop {
            let event = stream.next().await.unwrap();
            if event.starts_with(':') {
                return event;
            }
        }
    };
    assert_eq!(timeout(PATIENCE, comment).await.unwrap(), ": keep-alive");
}

#[tokio::test]
async fn a_client_that_hangs_up_cancels_its_streams() {
    let gateway = start().await;
    gateway.coordinator.behave(|behaviour| behaviour.hold_at = Some(5));
    let mut body = ask();
    body["n"] = json!(3);
    let mut stream = gateway.client.open(CHAT, body.clone()).await;
    stream.next().await.unwrap();
    drop(stream);
    let mut cancelled = gateway.coordinator.cancelled.subscribe();
    timeout(PATIENCE, cancelled.wait_for(|count| *count == 3)).await.expect("streams are dropped").unwrap();
    // The same without a stream.
    let waiting = tokio::spawn(gateway.client.chat(body));
    let asked = async {
        while gateway.coordinator.asked_count() < 6 {
            tokio::task::yield_now().await;
        }
    };
    timeout(PATIENCE, asked).await.expect("the coordinator is asked");
    waiting.abort();
    timeout(PATIENCE, cancelled.wait_for(|count| *count == 6)).await.expect("calls are dropped").unwrap();
}
