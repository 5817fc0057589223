//! What clients see when the coordinator fails.

use std::time::Duration;

use phalanx_proto::{
    fault::{Fault, FaultKind},
    v1::GroupState,
};
use serde_json::{Value, json};
use tokio::time::timeout;

use super::{
    coordinator::capacity,
    golden::line,
    harness::{PATIENCE, start, start_unready, start_with},
};

const CHAT: &str = "/v1/chat/completions";

fn ask() -> Value {
    json!({"messages": [{"role": "user", "content": "Spell tree."}]})
}

fn content_of(chunks: &[Value]) -> String {
    chunks.iter().map(|chunk| chunk["choices"][0]["delta"]["content"].as_str().unwrap_or_default()).collect()
}

#[tokio::test]
async fn a_lost_coordinator_is_a_pause_and_no_token_is_lost_or_doubled() {
    let gateway = start().await;
    for after in [0, 1, 15, 21] {
        let lost = Fault::new(FaultKind::NotReady, "connection reset");
        gateway.coordinator.behave(|behaviour| behaviour.fail_once = Some((after, lost)));
        let mut body = ask();
        body["stream_options"] = json!({"include_usage": true});
        let chunks = gateway.client.open(CHAT, body).await.chunks().await;
        let usage = &chunks.last().unwrap()["usage"];
        assert_eq!(usage["completion_tokens"], 22, "after {after} tokens");
        assert_eq!(content_of(&chunks[..chunks.len() - 1]), "t-r-e-e", "after {after} tokens");
        let requests = gateway.coordinator.requests.lock().unwrap();
        let [first, again] = &requests[requests.len() - 2..] else { panic!("it is asked twice") };
        assert_eq!(again.resume, line("Spell tree.").completion_ids[..after]);
        assert_eq!(again.sampling, first.sampling, "with the same seed");
        assert!(first.sampling.as_ref().unwrap().seed.is_some());
        assert_ne!(again.request_id, first.request_id);
    }
}

#[tokio::test]
async fn an_end_that_was_lost_with_the_coordinator_is_still_an_end() {
    let gateway = start().await;
    let lost = Fault::new(FaultKind::NotReady, "gone");
    // Chunks of one: with more tokens than the answer has, only `Finished` could be lost; so the last is cut off.
    gateway.coordinator.behave(|behaviour| {
        behaviour.answer = Some([&line("Spell tree.").completion_ids[..], &[3060]].concat());
        behaviour.fail_once = Some((22, lost));
    });
    let mut body = ask();
    body["ignore_eos"] = json!(false);
    let answer = gateway.client.post(CHAT, body).await.ok();
    assert_eq!(answer["choices"][0]["message"]["content"], "t-r-e-e");
}

#[tokio::test]
async fn a_fault_in_mid_stream_is_an_event_and_not_an_end() {
    let gateway = start().await;
    let broken = Fault::new(FaultKind::Diverged, "ranks 0 and 1 disagree at step 7");
    gateway.coordinator.behave(|behaviour| behaviour.fail_once = Some((4, broken)));
    let events = gateway.client.open(CHAT, ask()).await.rest().await;
    let last: Value = serde_json::from_str(events.last().unwrap()).unwrap();
    assert_eq!((&last["error"]["type"], &last["error"]["code"]), (&json!("server_error"), &json!("internal_error")));
    assert!(!last["error"]["message"].as_str().unwrap().contains("rank"), "no internals");
    assert!(!events.contains(&"[DONE]".to_owned()));
}

#[tokio::test]
async fn what_the_coordinator_has_replayed_too_often_is_not_taken_up_again() {
    let gateway = start().await;
    let lost = Fault::new(FaultKind::WorkerLost, "given up after 4 failed epochs");
    gateway.coordinator.behave(|behaviour| behaviour.fail_once = Some((4, lost)));
    let events = gateway.client.open(CHAT, ask()).await.rest().await;
    let last: Value = serde_json::from_str(events.last().unwrap()).unwrap();
    assert_eq!(last["error"]["code"], "worker_lost", "{last}");
    assert_eq!(gateway.coordinator.requests.lock().unwrap().len(), 1);
}

#[tokio::test]
async fn faults_before_the_first_byte_are_statuses() {
    let gateway = start_with(|config| config.timeouts.ready = Duration::from_millis(100)).await;
    let table = [
        (FaultKind::QueueFull, 429, "rate_limit_exceeded", Some("1")),
        (FaultKind::NotReady, 503, "not_ready", Some("2")),
        (FaultKind::Draining, 503, "draining", Some("2")),
        (FaultKind::WorkerLost, 503, "worker_lost", Some("2")),
        (FaultKind::ContextLength, 400, "context_length_exceeded", None),
        (FaultKind::ModelNotFound, 404, "model_not_found", None),
        (FaultKind::Internal, 500, "internal_error", None),
    ];
    for (kind, status, code, retry_after) in table {
        gateway.coordinator.behave(|behaviour| behaviour.refuse = Some(Fault::new(kind, "so it is")));
        for stream in [false, true] {
            let mut body = ask();
            body["stream"] = json!(stream);
            let answer = gateway.client.post(CHAT, body).await;
            let (found, _, found_code) = answer.error();
            assert_eq!((found, found_code.as_str()), (status, Some(code)), "{kind:?}");
            assert_eq!(answer.headers.get("retry-after").map(String::as_str), retry_after, "{kind:?}");
            let says_no = answer.headers.get("x-should-retry").is_some_and(|value| value == "false");
            assert_eq!(says_no, retry_after.is_none(), "{kind:?}");
        }
    }
    gateway.coordinator.behave(|behaviour| behaviour.refuse = Some(Fault::invalid("logit_bias", "token 9999")));
    assert_eq!(gateway.client.chat(ask()).await.error(), (400, json!("logit_bias"), json!("invalid_value")));
    gateway.coordinator.behave(|behaviour| behaviour.refuse = None);
    gateway.client.chat(ask()).await.ok();
}

#[tokio::test]
async fn a_group_that_still_loads_is_said_at_once_and_one_that_ran_is_waited_for() {
    let gateway = start_unready(|_| {}).await;
    gateway.coordinator.capacity.send_replace(capacity(GroupState::Loading));
    let loading = async {
        loop {
            let answer = gateway.client.get("/readyz").await;
            if answer.text().contains("loading") {
                return answer;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    assert_eq!(timeout(PATIENCE, loading).await.unwrap().error(), (503, Value::Null, json!("not_ready")));
    assert_eq!(gateway.client.chat(ask()).await.status, 503);
    gateway.coordinator.capacity.send_replace(capacity(GroupState::Ready));
    let ready = async { while gateway.client.get("/readyz").await.status != 200 {} };
    timeout(PATIENCE, ready).await.unwrap();
    gateway.coordinator.capacity.send_replace(capacity(GroupState::Fenced));
    let fenced = async { while gateway.client.get("/readyz").await.status == 200 {} };
    timeout(PATIENCE, fenced).await.unwrap();
    let waiting = tokio::spawn(gateway.client.chat(ask()));
    gateway.coordinator.capacity.send_replace(capacity(GroupState::Ready));
    timeout(PATIENCE, waiting).await.unwrap().unwrap().ok();
}

#[tokio::test]
async fn running_streams_finish_when_the_gateway_is_told_to_leave() {
    let gateway = start().await;
    let mut stream = gateway.client.open(CHAT, ask()).await;
    stream.next().await.unwrap();
    gateway.shutdown.cancel();
    assert_eq!(content_of(&stream.chunks().await), "t-r-e-e");
    drop(stream);
    timeout(PATIENCE, gateway.ended).await.unwrap().unwrap().unwrap();
}

#[tokio::test]
async fn what_runs_on_past_the_drain_time_is_cut_with_an_error() {
    let gateway = start_with(|config| config.timeouts.drain = Duration::from_millis(50)).await;
    gateway.coordinator.behave(|behaviour| behaviour.hold_at = Some(5));
    let mut stream = gateway.client.open(CHAT, ask()).await;
    stream.next().await.unwrap();
    gateway.shutdown.cancel();
    let events = timeout(PATIENCE, stream.rest()).await.unwrap();
    let last: Value = serde_json::from_str(events.last().unwrap()).unwrap();
    assert_eq!(last["error"]["code"], "draining");
    timeout(PATIENCE, gateway.ended).await.unwrap().unwrap().unwrap();
}
