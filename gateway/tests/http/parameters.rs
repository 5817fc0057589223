//! What the coordinator is asked for.

use phalanx_gateway::profiles::{Profile, Profiles, ReasoningEffort};
use serde_json::json;

use super::{
    golden::line,
    harness::{start, start_with},
};

#[tokio::test]
async fn parameters_reach_the_coordinator() {
    let gateway = start().await;
    let body = json!({
        "model": "nano",
        "max_tokens": 40, "max_completion_tokens": 50, "temperature": 0.5, "top_p": 0.25, "top_k": -1, "min_p": 0.125,
        "presence_penalty": 1, "frequency_penalty": -1, "repetition_penalty": 1.5, "logit_bias": {"20": -100},
        "seed": -1, "min_tokens": 2, "stop_token_ids": [9], "priority": -3, "cache_salt": "tenant",
        "logprobs": true, "top_logprobs": 4,
    });
    gateway.client.chat(body).await.ok();
    let asked = gateway.coordinator.asked();
    assert_eq!((asked.max_tokens, asked.priority, asked.cache_salt.as_str()), (Some(50), -3, "tenant"));
    assert_eq!(asked.stop_token_ids, [9, 3052, 3055, 3065]);
    let sampling = asked.sampling.unwrap();
    assert_eq!((sampling.temperature, sampling.top_p, sampling.top_k), (Some(0.5), Some(0.25), 0));
    assert_eq!((sampling.min_p, sampling.presence_penalty, sampling.frequency_penalty), (0.125, 1.0, -1.0));
    assert_eq!((sampling.repetition_penalty, sampling.min_tokens), (Some(1.5), 2));
    assert_eq!(sampling.logit_bias, [(20, -100.0)].into());
    assert_eq!((sampling.seed, sampling.logprobs), (Some(u64::MAX), Some(4)));
}

#[tokio::test]
async fn without_parameters_the_model_cards_defaults_apply() {
    let gateway = start().await;
    let answer = gateway.client.chat(json!({})).await;
    assert!(!answer.headers.contains_key("x-phalanx-profile"));
    assert!(!answer.headers.contains_key("x-phalanx-ignored-parameters"));
    let asked = gateway.coordinator.asked();
    assert_eq!((asked.max_tokens, asked.priority), (None, 0));
    let sampling = asked.sampling.unwrap();
    assert_eq!((sampling.temperature, sampling.top_p, sampling.top_k, sampling.logprobs), (None, None, 0, None));
}

#[tokio::test]
async fn a_profile_fills_in_what_the_request_leaves_open() {
    let mine = Profile {
        max_tokens: Some(5000),
        temperature: Some(0.25),
        top_k: Some(9),
        reasoning_effort: Some(ReasoningEffort::Medium),
        priority: Some(4),
        ..Profile::default()
    };
    let profiles = Profiles::new([("mine".to_owned(), mine)].into(), Some("mine".into())).unwrap();
    let gateway = start_with(|config| config.profiles = profiles).await;
    let answer = gateway.client.chat(json!({"temperature": 0})).await;
    answer.ok();
    assert_eq!(answer.headers["x-phalanx-profile"], "mine");
    let asked = gateway.coordinator.asked();
    // A profile's budget gives way to the context; a request's own would be refused.
    assert_eq!(asked.max_tokens, Some(1024 - line("Spell tree.").prompt_ids.len() as u32));
    assert_eq!(asked.priority, 4);
    assert_eq!(asked.sampling.as_ref().map(|sampling| (sampling.temperature, sampling.top_k)), Some((Some(0.0), 9)));
    // A built-in profile changes the prompt by its reasoning effort, and the request's own word goes before it.
    let low = json!({"profile": "latency_first"});
    gateway.coordinator.behave(|behaviour| behaviour.answer = Some(line("Spell tree.").completion_ids.clone()));
    assert_eq!(gateway.client.chat(low).await.headers["x-phalanx-profile"], "latency_first");
    assert_ne!(gateway.coordinator.asked().prompt, asked.prompt);
    gateway.client.chat(json!({"profile": "latency_first", "reasoning_effort": "medium"})).await.ok();
    assert_eq!(gateway.coordinator.asked().prompt, asked.prompt);
}

#[tokio::test]
async fn a_profile_may_name_the_model_and_the_request_goes_before_it() {
    let other = Profile { model: Some("other".into()), ..Profile::default() };
    let profiles = Profiles::new([("other".to_owned(), other)].into(), None).unwrap();
    let gateway = start_with(|config| config.profiles = profiles).await;
    let answer = gateway.client.chat(json!({"profile": "other"})).await;
    assert_eq!(answer.error(), (404, json!("model"), json!("model_not_found")));
    gateway.client.chat(json!({"profile": "other", "model": "nano"})).await.ok();
}

#[tokio::test]
async fn what_has_no_effect_is_named_in_a_header() {
    let gateway = start().await;
    let body = json!({
        "messages": [{"role": "user", "content": "Spell tree.", "name": "Ada"}],
        "user": "u", "store": true, "metadata": {"a": "b"}, "service_tier": "auto", "verbosity": "low", "l\u{e4}nge": 1,
        "logprobs": null, "future": null,
    });
    let answer = gateway.client.post("/v1/chat/completions", body).await;
    answer.ok();
    assert_eq!(
        answer.headers["x-phalanx-ignored-parameters"],
        "messages[0].name, user, service_tier, metadata, store, verbosity, l\\u{e4}nge"
    );
}

#[tokio::test]
async fn one_call_is_enough_when_calls_must_not_be_parallel() {
    let line = line("How is the weather in Quinn?");
    let gateway = super::harness::start_for(line).await;
    // The model goes on with a second call instead of waiting for the first one's result.
    let call = &line.completion_ids[line.completion_ids.iter().rposition(|&id| id == 3058).unwrap()..];
    let end = call.len() - 1;
    let two = [&line.completion_ids[..line.completion_ids.len() - 1], &[3060, 3059, 281], call].concat();
    assert_eq!(call[end], 3065);
    gateway.coordinator.behave(|behaviour| behaviour.answer = Some(two));
    for (parallel, calls) in [(true, 2), (false, 1)] {
        let mut request = line.request.clone();
        request["parallel_tool_calls"] = json!(parallel);
        let answer = gateway.client.chat(request).await.ok();
        let found = answer["choices"][0]["message"]["tool_calls"].as_array().unwrap();
        assert_eq!(found.len(), calls);
        let ids: std::collections::HashSet<_> = found.iter().map(|call| call["id"].as_str().unwrap()).collect();
        assert_eq!(ids.len(), calls);
        assert_eq!(answer["choices"][0]["finish_reason"], "tool_calls");
    }
}
