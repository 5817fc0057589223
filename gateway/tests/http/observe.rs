//! Models, health, figures and headers.

use phalanx_proto::v1::GroupState;
use serde_json::json;

use super::{
    coordinator::capacity,
    harness::{start, start_with},
};

#[tokio::test]
async fn models_are_listed_and_found_under_their_aliases() {
    let gateway = start_with(|config| config.served_names = vec!["gpt-oss-20b".into()]).await;
    let list = gateway.client.get("/v1/models").await.ok();
    assert_eq!(list["object"], "list");
    assert_eq!(list["data"][0]["id"], "gpt-oss-20b");
    assert_eq!(list["data"][0]["object"], "model");
    assert_eq!(list["data"][0]["max_model_len"], 1024);
    for name in ["gpt-oss-20b", "openai/gpt-oss-20b", "openai%2Fgpt-oss-20b", "nano"] {
        let model = gateway.client.get(&format!("/v1/models/{name}")).await.ok();
        assert_eq!(model["id"], name.replace("%2F", "/"));
    }
    let answer = gateway.client.chat(json!({"model": "openai/gpt-oss-20b"})).await.ok();
    assert_eq!(answer["model"], "openai/gpt-oss-20b");
    assert_eq!(gateway.coordinator.asked().model, "nano", "the coordinator is asked by its own name");
    let answer = gateway.client.chat(json!({})).await.ok();
    assert_eq!(answer["model"], "gpt-oss-20b");
}

#[tokio::test]
async fn every_response_carries_its_id_and_its_time() {
    let gateway = start().await;
    let answer = gateway.client.post_bytes("/v1/completions", b"{}", "x-request-id: mine-7\r\n").await;
    assert_eq!((answer.status, answer.headers["x-request-id"].as_str()), (400, "mine-7"));
    answer.headers["openai-processing-ms"].parse::<u64>().unwrap();
    let answer = gateway.client.get("/livez").await;
    assert!(answer.headers["x-request-id"].starts_with("req_"));
    assert!(!answer.headers.contains_key("access-control-allow-origin"));
}

#[tokio::test]
async fn health_follows_the_group() {
    let gateway = start().await;
    for path in ["/health", "/readyz", "/livez", "/version", "/"] {
        assert_eq!(gateway.client.get(path).await.status, 200, "{path}");
    }
    gateway.coordinator.capacity.send_replace(capacity(GroupState::Failed));
    while gateway.client.get("/health").await.status == 200 {}
    assert_eq!(gateway.client.get("/readyz").await.error(), (503, json!(null), json!("not_ready")));
    assert_eq!(gateway.client.get("/livez").await.status, 200);
    assert_eq!(gateway.client.chat(json!({})).await.status, 503);
}

#[tokio::test]
async fn stats_tell_what_happened_and_who_serves() {
    let gateway = start().await;
    for _ in 0..3 {
        gateway.client.chat(json!({"profile": "balanced"})).await.ok();
    }
    gateway.coordinator.behave(|behaviour| {
        let fault = phalanx_proto::fault::Fault::new(phalanx_proto::fault::FaultKind::QueueFull, "full");
        behaviour.refuse = Some(fault);
    });
    assert_eq!(gateway.client.chat(json!({})).await.status, 429);
    let stats = gateway.client.get("/stats").await.ok();
    assert_eq!((&stats["requests"], &stats["errors"]), (&json!(4), &json!(1)));
    assert_eq!(stats["requests_by_profile"], json!({"balanced": 3, "none": 1}));
    assert_eq!(stats["ttft_ms"]["count"], 3);
    for quantile in ["p50", "p95", "p99"] {
        assert!(stats["e2e_ms"][quantile].as_f64().unwrap() >= stats["ttft_ms"]["p50"].as_f64().unwrap() * 0.5);
    }
    assert!(stats["qps"].as_f64().unwrap() > 0.0);
    assert!(stats["tokens_per_second"]["generation"].as_f64().unwrap() > 0.0);
    let facts = ["model_id", "model_size", "parallelism", "profile", "backend", "state"].map(|name| &stats[name]);
    assert_eq!(facts, ["nano", "6m", "tp2", "none", "cpu", "ready"]);
    assert_eq!((&stats["running"], &stats["waiting"]), (&json!(2), &json!(5)));
    assert_eq!(stats["kv_cache"], json!({"used_blocks": 25, "blocks": 100, "usage": 0.25}));
}

#[tokio::test]
async fn metrics_have_our_names_and_those_that_dashboards_know() {
    let gateway = start().await;
    gateway.client.chat(json!({"profile": "balanced"})).await.ok();
    gateway.client.chat(json!({"temperature": 9})).await;
    let answer = gateway.client.get("/metrics").await;
    assert!(answer.headers["content-type"].starts_with("application/openmetrics-text"));
    let text = answer.text();
    let labels = |profile: &str| {
        format!(
            "model_id=\"nano\",model_name=\"nano\",model_size=\"6m\",backend=\"cpu\",parallelism=\"tp2\",\
             profile=\"{profile}\""
        )
    };
    for prefix in ["phalanx_", "vllm:"] {
        for (name, value) in [
            (format!("generation_tokens_total{{{}}}", labels("balanced")), "22"),
            (format!("request_success_total{{{},finished_reason=\"stop\"}}", labels("balanced")), "1"),
            (format!("time_to_first_token_seconds_count{{{}}}", labels("balanced")), "1"),
            (format!("inter_token_latency_seconds_count{{{}}}", labels("balanced")), "21"),
            (format!("e2e_request_latency_seconds_count{{{}}}", labels("balanced")), "1"),
            (format!("num_requests_waiting{{{}}}", labels("none")), "5.0"),
            (format!("kv_cache_usage_perc{{{}}}", labels("none")), "0.25"),
            (format!("prefix_cache_hits_total{{{}}}", labels("none")), "320"),
            (format!("num_preemptions_total{{{}}}", labels("none")), "3"),
            (format!("cache_config_info{{{},block_size=\"16\",num_gpu_blocks=\"100\"}}", labels("none")), "1.0"),
        ] {
            let line = format!("{prefix}{name} {value}");
            assert!(text.lines().any(|found| found == line), "{line}\n{text}");
        }
    }
    assert!(text.contains("phalanx_http_requests_total{route=\"/v1/chat/completions\",status=\"400\"} 1"));
    assert!(!text.contains("Spell"), "no prompt in any metric");
}
