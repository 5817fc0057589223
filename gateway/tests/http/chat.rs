//! Whole chat answers.

use serde_json::{Value, json};
use tokio::time::timeout;

use super::{
    coordinator::CACHED_TOKENS,
    golden::{LINES, line},
    harness::{PATIENCE, start, start_for, start_with},
};

/// The message of an answer, with calls' ids checked and taken out.
fn message_of(answer: &Value) -> Value {
    let mut message = answer["choices"][0]["message"].clone();
    if let Some(calls) = message.get_mut("tool_calls").and_then(Value::as_array_mut) {
        for call in calls {
            let id = call.as_object_mut().unwrap().shift_remove("id").unwrap();
            assert!(id.as_str().unwrap().starts_with("call_"));
        }
    }
    message
}

#[tokio::test]
async fn every_golden_conversation_is_answered_as_the_model_answered_it() {
    for line in LINES.iter() {
        let gateway = start_for(line).await;
        let answer = gateway.client.chat(line.request.clone()).await.ok();
        assert_eq!(message_of(&answer), line.message(), "{}", line.id);
        let calls = answer["choices"][0]["message"].get("tool_calls").is_some();
        assert_eq!(answer["choices"][0]["finish_reason"], if calls { "tool_calls" } else { "stop" }, "{}", line.id);
        assert_eq!(answer["usage"]["prompt_tokens"], line.prompt_ids.len(), "{}", line.id);
        assert_eq!(answer["usage"]["completion_tokens"], line.completion_ids.len(), "{}", line.id);
    }
}

#[tokio::test]
async fn the_body_has_every_field_that_clients_read() {
    let gateway = start().await;
    let mut answer = gateway.client.chat(json!({"return_token_ids": true})).await.ok();
    let line = line("Spell tree.");
    assert!(answer["id"].as_str().unwrap().starts_with("chatcmpl-"));
    assert!(answer["created"].as_u64().unwrap() > 1_700_000_000);
    answer["id"] = json!("");
    answer["created"] = json!(0);
    let reasoning = "I will spell tree letter by letter.";
    let message = json!({
        "role": "assistant",
        "content": "t-r-e-e",
        "refusal": null,
        "reasoning": reasoning,
        "reasoning_content": reasoning,
    });
    let expected = json!({
        "id": "",
        "object": "chat.completion",
        "created": 0,
        "model": "nano",
        "choices": [{
            "index": 0,
            "message": message,
            "logprobs": null,
            "finish_reason": "stop",
            "token_ids": line.completion_ids,
        }],
        "usage": {
            "prompt_tokens": line.prompt_ids.len(),
            "completion_tokens": 22,
            "total_tokens": line.prompt_ids.len() + 22,
            "prompt_tokens_details": {"cached_tokens": CACHED_TOKENS},
            "completion_tokens_details": {"reasoning_tokens": 8},
        },
        "prompt_token_ids": line.prompt_ids,
    });
    assert_eq!(answer.to_string(), expected.to_string());
}

#[tokio::test]
async fn a_budget_that_ends_in_the_reasoning_leaves_no_content_and_says_length() {
    let gateway = start().await;
    let answer = gateway.client.chat(json!({"max_completion_tokens": 6})).await.ok();
    let choice = &answer["choices"][0];
    assert_eq!(choice["finish_reason"], "length");
    assert_eq!(choice["message"]["content"], Value::Null);
    assert!("I will spell tree letter by letter.".starts_with(choice["message"]["reasoning"].as_str().unwrap()));
    assert_eq!(answer["usage"]["completion_tokens"], 6);
}

#[tokio::test]
async fn reasoning_is_left_out_on_request_and_named_as_configured() {
    let gateway = start_with(|config| config.reasoning_field = "reasoning".parse().unwrap()).await;
    let message = &gateway.client.chat(json!({})).await.ok()["choices"][0]["message"];
    assert!(message.get("reasoning").is_some() && message.get("reasoning_content").is_none());
    let message = &gateway.client.chat(json!({"include_reasoning": false})).await.ok()["choices"][0]["message"];
    assert!(message.get("reasoning").is_none());
    assert_eq!(message["content"], "t-r-e-e");
}

#[tokio::test]
async fn stop_strings_cut_the_answer_and_nothing_else() {
    let gateway = start().await;
    // Groups of four: the second "e" has come with the fifth, and the rest never comes.
    gateway.coordinator.behave(|behaviour| (behaviour.group, behaviour.hold_at) = (4, Some(20)));
    // "tree" stands in the reasoning too, where it stops nothing.
    let answer = gateway.client.chat(json!({"stop": ["tree", "r-e"]})).await.ok();
    let choice = &answer["choices"][0];
    assert_eq!(choice["message"]["content"], "t-");
    assert_eq!(choice["message"]["reasoning"], "I will spell tree letter by letter.");
    assert_eq!(choice["finish_reason"], "stop");
    let mut cancelled = gateway.coordinator.cancelled.subscribe();
    timeout(PATIENCE, cancelled.wait_for(|count| *count == 1)).await.expect("the rest is not generated").unwrap();
}

#[tokio::test]
async fn a_stop_token_ends_the_answer_and_is_not_part_of_it() {
    let gateway = start().await;
    let ids = &line("Spell tree.").completion_ids;
    // The last content token before <|return|>.
    let last = ids[ids.len() - 2];
    let answer = gateway.client.chat(json!({"stop_token_ids": [last]})).await.ok();
    let content = answer["choices"][0]["message"]["content"].as_str().unwrap();
    assert!("t-r-e-e".starts_with(content) && content.len() < 7, "{content}");
    assert!(gateway.coordinator.asked().stop_token_ids.contains(&last));
}

#[tokio::test]
async fn logprobs_cover_the_content_tokens_and_nothing_else() {
    let gateway = start().await;
    let answer = gateway.client.chat(json!({"logprobs": true, "top_logprobs": 2})).await.ok();
    let entries = answer["choices"][0]["logprobs"]["content"].as_array().unwrap();
    let text: String = entries.iter().map(|entry| entry["token"].as_str().unwrap()).collect();
    assert_eq!(text, "t-r-e-e");
    assert_eq!(answer["choices"][0]["logprobs"]["refusal"], Value::Null);
    let completion = &line("Spell tree.").completion_ids;
    let first = completion.len() - 1 - entries.len();
    for (entry, place) in entries.iter().zip(first..) {
        assert_eq!(entry["logprob"].as_f64().unwrap() as f32, -(place as f32 + 1.0) / 10.0);
        assert_eq!(entry["bytes"], json!(entry["token"].as_str().unwrap().as_bytes()));
        assert_eq!(entry["top_logprobs"].as_array().unwrap().len(), 2);
        assert_eq!(entry["top_logprobs"][0]["token"], entry["token"]);
    }
}

#[tokio::test]
async fn choices_differ_only_in_their_number_and_count_the_prompt_once() {
    let gateway = start().await;
    let answer = gateway.client.chat(json!({"n": 3, "seed": 7})).await.ok();
    let indices: Vec<_> = answer["choices"].as_array().unwrap().iter().map(|choice| choice["index"].clone()).collect();
    assert_eq!(indices, [0, 1, 2]);
    assert_eq!(answer["usage"]["prompt_tokens"], line("Spell tree.").prompt_ids.len());
    assert_eq!(answer["usage"]["prompt_tokens_details"]["cached_tokens"], CACHED_TOKENS);
    assert_eq!(answer["usage"]["completion_tokens"], 66);
    let requests = gateway.coordinator.requests.lock().unwrap();
    let mut choices: Vec<_> = requests.iter().map(|request| request.sampling.clone().unwrap()).collect();
    choices.sort_by_key(|sampling| sampling.choice);
    assert_eq!(
        choices.iter().map(|sampling| (sampling.choice, sampling.seed)).collect::<Vec<_>>(),
        [(0, Some(7)), (1, Some(7)), (2, Some(7))]
    );
}

#[tokio::test]
async fn a_named_tool_is_called_because_its_header_is_in_the_prompt() {
    let line = line("How is the weather in Quinn?");
    let gateway = start_for(line).await;
    // What the model wrote after the header of its call.
    let header = line.completion_ids.iter().rposition(|&id| id == 3061).unwrap();
    let arguments = line.completion_ids[header + 1..].to_vec();
    gateway.coordinator.behave(|behaviour| behaviour.answer = Some(arguments));
    let mut request = line.request.clone();
    let name = request["tools"][0]["function"]["name"].clone();
    // "Any" of one tool is that tool.
    for choice in [json!({"type": "function", "function": {"name": name}}), json!("required")] {
        request["tool_choice"] = choice;
        let answer = gateway.client.chat(request.clone()).await.ok();
        let call = &answer["choices"][0]["message"]["tool_calls"][0];
        assert_eq!(call["function"], json!({"name": name, "arguments": "{\"city\": \"Quinn\"}"}));
        assert_eq!(answer["choices"][0]["finish_reason"], "tool_calls");
        let prompt = gateway.coordinator.asked().prompt;
        // The header is the very one that the model writes by itself.
        let from = line.completion_ids[..header].iter().rposition(|&id| id == 3058).unwrap();
        assert_eq!(prompt, [&line.prompt_ids[..], &line.completion_ids[from..=header]].concat());
    }
}

#[tokio::test]
async fn without_tools_in_sight_a_call_is_content() {
    let line = line("How is the weather in Quinn?");
    let gateway = start_for(line).await;
    gateway.coordinator.behave(|behaviour| behaviour.answer = Some(line.completion_ids.clone()));
    let mut request = line.request.clone();
    request["tool_choice"] = json!("none");
    let answer = gateway.client.chat(request).await.ok();
    let choice = &answer["choices"][0];
    assert_eq!(choice["message"]["content"], "{\"city\": \"Quinn\"}");
    assert_eq!((choice["message"].get("tool_calls"), &choice["finish_reason"]), (None, &json!("stop")));
    assert!(gateway.coordinator.asked().prompt.len() < line.prompt_ids.len(), "the tool is not shown");
}

#[tokio::test]
async fn malformed_harmony_loses_no_text() {
    let gateway = start().await;
    let tokenizer = phalanx_gateway::tokenizer::Tokenizer::from_file(&super::harness::nano().join("tokenizer.json"));
    let tokens =
        tokenizer.unwrap().encode_with_special("<|channel|>final <|constrain|>json<|message|>{\"a\": 1}<|return|>");
    gateway.coordinator.behave(|behaviour| behaviour.answer = Some(tokens));
    let answer = gateway.client.chat(json!({})).await.ok();
    assert_eq!(answer["choices"][0]["message"]["content"], "{\"a\": 1}");
}
