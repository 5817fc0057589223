//! How long a client wants to wait, and what it is told when the queue is full.

use std::time::Duration;

use phalanx_proto::{
    fault::{Fault, FaultKind},
    v1::GroupState,
};
use serde_json::{Value, json};
use tokio::time::{Instant, timeout};

use super::{
    client::{Answer, chat_body},
    coordinator::capacity,
    harness::{Gateway, PATIENCE, start},
};

const CHAT: &str = "/v1/chat/completions";

async fn chat_within(gateway: &Gateway, ms: &str) -> Answer {
    let body = chat_body(json!({})).to_string();
    gateway.client.post_bytes(CHAT, body.as_bytes(), &format!("x-request-timeout-ms: {ms}\r\n")).await
}

async fn until_cancelled(gateway: &Gateway, times: usize) {
    let mut cancelled = gateway.coordinator.cancelled.subscribe();
    timeout(PATIENCE, cancelled.wait_for(|count| *count >= times)).await.expect("the sequence is cancelled").unwrap();
}

#[tokio::test]
async fn a_wish_out_of_bounds_is_refused_by_name() {
    let gateway = start().await;
    for ms in ["0", "-1", "1.5", "soon", "", "86400001", "99999999999999999999"] {
        let answer = chat_within(&gateway, ms).await;
        assert_eq!(answer.error(), (400, json!("x-request-timeout-ms"), json!("invalid_value")), "{ms:?}");
    }
    assert_eq!(gateway.coordinator.asked_count(), 0);
    for ms in ["86400000", "20000"] {
        chat_within(&gateway, ms).await.ok();
    }
}

#[tokio::test]
async fn an_answer_that_takes_longer_is_a_504_and_its_sequence_is_cancelled() {
    let gateway = start().await;
    gateway.coordinator.behave(|behaviour| behaviour.hold_at = Some(3));
    let began = Instant::now();
    assert_eq!(chat_within(&gateway, "200").await.error(), (504, Value::Null, json!("timeout")));
    assert!(began.elapsed() >= Duration::from_millis(200));
    until_cancelled(&gateway, 1).await;
    let stats = gateway.client.get("/stats").await.ok();
    assert_eq!((&stats["errors"], &stats["cancelled"]), (&json!(1), &json!(0)), "the client did not leave");
}

#[tokio::test]
async fn a_stream_that_takes_longer_ends_with_an_error_and_its_sequence_is_cancelled() {
    let gateway = start().await;
    gateway.coordinator.behave(|behaviour| behaviour.hold_at = Some(5));
    let mut stream = gateway.client.open_with(CHAT, chat_body(json!({})), "x-request-timeout-ms: 200\r\n").await;
    assert_eq!(stream.status, 200);
    let events = timeout(PATIENCE, stream.rest()).await.unwrap();
    let last: Value = serde_json::from_str(events.last().unwrap()).unwrap();
    assert_eq!((&last["error"]["type"], &last["error"]["code"]), (&json!("server_error"), &json!("timeout")));
    assert!(events.len() > 1 && !events.contains(&"[DONE]".to_owned()), "{events:?}");
    until_cancelled(&gateway, 1).await;
}

#[tokio::test]
async fn waiting_for_a_group_counts_too() {
    let gateway = start().await;
    gateway.coordinator.capacity.send_replace(capacity(GroupState::Fenced));
    let fenced = async { while gateway.client.get("/readyz").await.status == 200 {} };
    timeout(PATIENCE, fenced).await.unwrap();
    assert_eq!(chat_within(&gateway, "200").await.error(), (504, Value::Null, json!("timeout")));
    assert_eq!(gateway.coordinator.asked_count(), 0);
}

#[tokio::test]
async fn a_body_that_comes_too_late_for_the_wish_is_a_504() {
    let gateway = start().await;
    let head = format!(
        "POST {CHAT} HTTP/1.1\r\nhost: test\r\nconnection: close\r\nx-request-timeout-ms: 100\r\ncontent-length: 9\r\n\r\n"
    );
    assert_eq!(gateway.client.raw(head.as_bytes()).await.error(), (504, Value::Null, json!("timeout")));
}

#[tokio::test]
async fn a_refusal_says_when_a_place_is_likely_free() {
    let gateway = start().await;
    for (kind, status) in [(FaultKind::QueueFull, 429), (FaultKind::Internal, 500)] {
        let fault = Fault::new(kind, "64 requests are waiting").retry_after(Duration::from_millis(6_100));
        gateway.coordinator.behave(|behaviour| behaviour.refuse = Some(fault));
        let answer = gateway.client.chat(json!({})).await;
        assert_eq!(answer.status, status);
        let retry_after = answer.headers.get("retry-after").map(String::as_str);
        assert_eq!(retry_after, (status == 429).then_some("7"), "whole seconds, rounded up");
    }
}

#[tokio::test]
async fn a_queue_known_to_be_full_refuses_before_the_prompt_is_looked_at() {
    let gateway = start().await;
    let mut full = capacity(GroupState::Ready);
    full.deployments[0].retry_after_ms = 2_500;
    gateway.coordinator.capacity.send_replace(full.clone());
    let refused = async {
        loop {
            let answer = gateway.client.chat(json!({"max_tokens": 5000})).await;
            // Until the gateway knows, it finds that the prompt does not fit.
            if answer.status != 400 {
                return answer;
            }
        }
    };
    let answer = timeout(PATIENCE, refused).await.unwrap();
    assert_eq!(answer.error(), (429, Value::Null, json!("rate_limit_exceeded")));
    assert_eq!(answer.headers["retry-after"], "3");
    assert_eq!(gateway.coordinator.asked_count(), 0, "the coordinator is not asked");
    full.deployments[0].retry_after_ms = 0;
    gateway.coordinator.capacity.send_replace(full);
    let free = async { while gateway.client.chat(json!({})).await.status != 200 {} };
    timeout(PATIENCE, free).await.expect("requests are taken again");
}
