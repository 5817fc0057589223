//! Slow and large clients.

use std::time::Duration;

use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

use super::harness::{Gateway, PATIENCE, start, start_with};

const CHAT: &str = "/v1/chat/completions";

/// What comes back, up to the end of the connection, after these bytes.
async fn answer_to(gateway: &Gateway, bytes: &[u8]) -> String {
    let mut socket = TcpStream::connect(gateway.client.0).await.unwrap();
    socket.write_all(bytes).await.unwrap();
    let mut answer = Vec::new();
    timeout(PATIENCE, socket.read_to_end(&mut answer)).await.expect("the connection ends").unwrap();
    String::from_utf8(answer).unwrap()
}

#[tokio::test]
async fn a_header_that_does_not_end_is_cut_off() {
    let gateway = start_with(|config| config.timeouts.header = Duration::from_millis(100)).await;
    assert_eq!(answer_to(&gateway, b"").await, "", "who says nothing is told nothing");
    for begun in ["P", "GET / HTTP/1.1\r\nhost: te"] {
        let answer = answer_to(&gateway, begun.as_bytes()).await;
        assert!(answer.starts_with("HTTP/1.1 408 Request Timeout\r\n"), "{begun:?}: {answer}");
        assert!(answer.contains("\"code\":\"header_timeout\""), "{answer}");
    }
    // A connection that was used and then left alone just ends.
    let idle = answer_to(&gateway, b"GET /livez HTTP/1.1\r\nhost: test\r\n\r\n").await;
    assert!(idle.starts_with("HTTP/1.1 200 OK\r\n") && !idle.contains("408"), "{idle}");
    gateway.client.chat(json!({})).await.ok();
}

#[tokio::test]
async fn a_header_may_come_in_any_pieces_and_what_is_none_is_refused_at_once() {
    let gateway = start().await;
    for header in ["GET /livez HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n", "GET /livez HTTP/1.0\n\n"] {
        let mut socket = TcpStream::connect(gateway.client.0).await.unwrap();
        socket.set_nodelay(true).unwrap();
        for byte in header.bytes() {
            socket.write_all(&[byte]).await.unwrap();
            tokio::task::yield_now().await;
        }
        let mut answer = String::new();
        timeout(PATIENCE, socket.read_to_string(&mut answer)).await.expect("an answer").unwrap();
        assert!(answer.contains(" 200 OK\r\n"), "{header:?}: {answer}");
    }
    // The first byte shows that no header is to come, and nobody waits for its time to run out.
    let began = std::time::Instant::now();
    let answer = answer_to(&gateway, b"\x16\x03\x01").await;
    assert!(answer.starts_with("HTTP/1.1 400 Bad Request\r\n"), "{answer}");
    let long = format!("GET /livez HTTP/1.1\r\nx-long: {}", "a".repeat(70 << 10));
    let answer = answer_to(&gateway, long.as_bytes()).await;
    assert!(answer.starts_with("HTTP/1.1 431 "), "{answer}");
    assert!(began.elapsed() < Duration::from_secs(5));
}

#[tokio::test]
async fn a_body_that_does_not_end_is_a_timeout() {
    let gateway = start_with(|config| config.timeouts.body = Duration::from_millis(100)).await;
    let head = format!("POST {CHAT} HTTP/1.1\r\nhost: test\r\nconnection: close\r\ncontent-length: 100\r\n\r\n{{");
    let answer = answer_to(&gateway, head.as_bytes()).await;
    assert!(answer.starts_with("HTTP/1.1 408 "), "{answer}");
    assert!(answer.contains("\"code\":\"body_timeout\""), "{answer}");
}

#[tokio::test]
async fn a_body_that_is_too_large_is_refused_in_words() {
    let gateway = start().await;
    let body = json!({"messages": [{"role": "user", "content": "a".repeat(5 << 20)}]}).to_string();
    let answer = gateway.client.post_bytes(CHAT, body.as_bytes(), "").await;
    assert_eq!(answer.error(), (413, Value::Null, json!("body_too_large")));
    gateway.client.chat(json!({})).await.ok();
}

#[tokio::test]
async fn more_requests_than_allowed_are_told_to_come_back() {
    let gateway = start_with(|config| config.limits.requests = 1).await;
    gateway.coordinator.behave(|behaviour| behaviour.hold_at = Some(3));
    let mut running =
        gateway.client.open(CHAT, json!({"messages": [{"role": "user", "content": "Spell tree."}]})).await;
    running.next().await.unwrap();
    let answer = gateway.client.chat(json!({})).await;
    assert_eq!(answer.error(), (429, Value::Null, json!("rate_limit_exceeded")));
    assert_eq!(answer.headers["retry-after"], "1");
    drop(running);
    let mut cancelled = gateway.coordinator.cancelled.subscribe();
    timeout(PATIENCE, cancelled.wait_for(|count| *count == 1)).await.unwrap().unwrap();
    gateway.coordinator.behave(|behaviour| behaviour.hold_at = None);
    let free = async { while gateway.client.chat(json!({})).await.status != 200 {} };
    timeout(PATIENCE, free).await.expect("the place is free again");
}

#[tokio::test]
async fn more_connections_than_allowed_are_refused_at_once() {
    let gateway = start_with(|config| config.limits.connections = 2).await;
    let _held =
        [TcpStream::connect(gateway.client.0).await.unwrap(), TcpStream::connect(gateway.client.0).await.unwrap()];
    let refused = async {
        loop {
            let answer = gateway.client.get("/livez").await;
            if answer.status == 503 {
                return answer;
            }
        }
    };
    let answer = timeout(PATIENCE, refused).await.unwrap();
    assert_eq!(answer.error(), (503, Value::Null, json!("too_many_connections")));
}

#[tokio::test]
async fn a_client_that_does_not_read_is_cancelled() {
    let gateway = start_with(|config| {
        config.limits.stream_events = 1;
        config.timeouts.unread = Duration::from_millis(100);
        config.timeouts.request = Duration::from_secs(3600);
    })
    .await;
    // More than any socket buffers, one token an event.
    gateway.coordinator.behave(|behaviour| behaviour.answer = Some(vec![16; 100_000]));
    let body = json!({"messages": [{"role": "user", "content": "Spell tree."}], "ignore_eos": true, "stream": true});
    let body = body.to_string();
    let mut socket = TcpStream::connect(gateway.client.0).await.unwrap();
    let head = format!(
        "POST {CHAT} HTTP/1.1\r\nhost: test\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    socket.write_all(&[head.as_bytes(), body.as_bytes()].concat()).await.unwrap();
    let mut cancelled = gateway.coordinator.cancelled.subscribe();
    timeout(PATIENCE, cancelled.wait_for(|count| *count == 1)).await.expect("it is given up").unwrap();
}
