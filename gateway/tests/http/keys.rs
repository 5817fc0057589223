//! Keys: their limits, their models, and their exchange while the gateway runs. Which routes ask for one is shown over a
//! real process, in `tests/tests/routes.rs`.

use std::{path::PathBuf, sync::Arc};

use phalanx_gateway::config::{Config, Digest};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::{sync::Notify, time::timeout};

use super::{
    client::{bearer, chat_body},
    harness::{Gateway, PATIENCE, start, start_for_key},
};

const CHAT: &str = "/v1/chat/completions";
/// Tokens of "Spell tree." and of its answer.
const TOKENS: u32 = PROMPT_TOKENS + 22;
const PROMPT_TOKENS: u32 = 58;

struct KeyFile {
    directory: TempDir,
    reload: Arc<Notify>,
}

impl KeyFile {
    /// `entries` are pairs of a key, which is also its name, and more fields of its entry.
    fn new(entries: &[(&str, &str)]) -> Self {
        let file = Self { directory: tempfile::tempdir().unwrap(), reload: Arc::default() };
        file.write(entries);
        file
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("keys.yaml")
    }

    fn write(&self, entries: &[(&str, &str)]) {
        let entry = |(key, fields): &(&str, &str)| {
            let digest = Digest::of_key(key).unwrap();
            format!("  - {{name: {key}, sha256: '{digest}', {fields}}}\n")
        };
        std::fs::write(self.path(), format!("keys:\n{}", entries.iter().map(entry).collect::<String>())).unwrap();
    }

    /// A gateway that is ready for a key of the file.
    async fn start_for(&self, key: &str) -> Gateway {
        self.start_with(key, |_| {}).await
    }

    async fn start_with(&self, key: &str, configure: impl FnOnce(&mut Config)) -> Gateway {
        start_for_key(key, |config| {
            config.keys.file = Some(self.path());
            config.reload = Arc::clone(&self.reload);
            configure(config);
        })
        .await
    }
}

#[tokio::test]
async fn a_key_over_its_requests_waits_and_another_does_not() {
    let file = KeyFile::new(&[("alice", "requests_per_minute: 2"), ("bob", "")]);
    let gateway = file.start_for("alice").await;
    for remaining in ["1", "0"] {
        let answer = gateway.client.chat_as("alice", json!({})).await;
        answer.ok();
        assert_eq!(answer.headers["x-ratelimit-limit-requests"], "2");
        assert_eq!(answer.headers["x-ratelimit-remaining-requests"], remaining);
        assert!(answer.headers["x-ratelimit-reset-requests"].ends_with('s'));
        assert!(!answer.headers.contains_key("x-ratelimit-limit-tokens"));
    }
    let refused = gateway.client.chat_as("alice", json!({})).await;
    assert_eq!(refused.error(), (429, Value::Null, json!("rate_limit_exceeded")));
    assert!((25..=30).contains(&refused.headers["retry-after"].parse::<u32>().unwrap()), "{:?}", refused.headers);
    assert_eq!(refused.headers["x-ratelimit-remaining-requests"], "0");
    assert!(!refused.headers.contains_key("x-should-retry"), "a retry makes sense");
    let other = gateway.client.chat_as("bob", json!({})).await;
    other.ok();
    assert!(!other.headers.keys().any(|name| name.starts_with("x-ratelimit")));
    // Looking is free, and says how things stand.
    let models = gateway.client.get_as("alice", "/v1/models").await;
    assert_eq!((models.status, models.headers["x-ratelimit-remaining-requests"].as_str()), (200, "0"));

    let stats = gateway.client.get_as("bob", "/stats").await.ok();
    let alice =
        json!({"running": 0, "requests": 2, "refused": 1, "prompt_tokens": 2 * PROMPT_TOKENS, "generation_tokens": 44});
    assert_eq!(stats["keys"]["alice"], alice);
    let metrics = gateway.client.get_as("bob", "/metrics").await.text();
    for line in [
        "phalanx_key_requests_total{key=\"bob\"} 1",
        "phalanx_key_refusals_total{key=\"alice\",limit=\"requests\"} 1",
        "phalanx_key_generation_tokens_total{key=\"alice\"} 44",
        "phalanx_key_requests_running{key=\"alice\"} 0.0",
    ] {
        assert!(metrics.lines().any(|found| found == line), "{line}\n{metrics}");
    }
}

#[tokio::test]
async fn a_key_over_its_tokens_waits_until_they_are_paid_back() {
    let file = KeyFile::new(&[("alice", "tokens_per_minute: 100")]);
    let gateway = file.start_for("alice").await;
    let first = gateway.client.chat_as("alice", json!({})).await;
    assert_eq!(first.ok()["usage"]["total_tokens"], TOKENS);
    assert_eq!(first.headers["x-ratelimit-limit-tokens"], "100");
    // Something is left, so a second one begins, and overdraws.
    gateway.client.chat_as("alice", json!({})).await.ok();
    let refused = gateway.client.chat_as("alice", json!({})).await;
    assert_eq!(refused.error(), (429, Value::Null, json!("rate_limit_exceeded")));
    assert_eq!(refused.headers["x-ratelimit-remaining-tokens"], "0");
    // 100 a minute pay back 2 * TOKENS - 100 and leave one.
    let seconds = refused.headers["retry-after"].parse::<u32>().unwrap();
    let expected = (2 * TOKENS - 100 + 1) * 60 / 100;
    assert!((expected - 5..=expected + 1).contains(&seconds), "{seconds}, expected {expected}");
}

#[tokio::test]
async fn a_keys_place_is_free_again_when_its_stream_ends_however_it_ends() {
    let file = KeyFile::new(&[("alice", "max_concurrency: 1"), ("bob", "max_concurrency: 1")]);
    let gateway = file.start_for("alice").await;
    gateway.coordinator.behave(|behaviour| behaviour.hold_at = Some(3));
    let mut running = gateway.client.open_with(CHAT, chat_body(json!({})), &bearer("alice")).await;
    running.next().await.unwrap();
    let refused = gateway.client.chat_as("alice", json!({})).await;
    assert_eq!(refused.error(), (429, Value::Null, json!("rate_limit_exceeded")));
    assert!(refused.text().contains("1 requests at a time") && refused.headers["retry-after"] == "1");
    gateway.coordinator.behave(|behaviour| behaviour.hold_at = None);
    gateway.client.chat_as("bob", json!({})).await.ok();
    drop(running);
    let free = async { while gateway.client.chat_as("alice", json!({})).await.status != 200 {} };
    timeout(PATIENCE, free).await.expect("a client that left gives its place back");
    // Both ends of an answer, and an error, give it back at once.
    gateway.client.open_with(CHAT, chat_body(json!({})), &bearer("alice")).await.chunks().await;
    assert_eq!(gateway.client.chat_as("alice", json!({"temperature": 9})).await.status, 400);
    gateway.client.chat_as("alice", json!({})).await.ok();
}

#[tokio::test]
async fn keys_are_exchanged_while_the_gateway_runs_and_a_bad_file_changes_nothing() {
    let file = KeyFile::new(&[("alice", "requests_per_minute: 2"), ("bob", "")]);
    let gateway = file.start_for("alice").await;
    gateway.client.chat_as("alice", json!({})).await.ok();
    let reload_until = async |key: &str, status: u16| {
        file.reload.notify_one();
        let known = async { while gateway.client.get_as(key, "/version").await.status != status {} };
        timeout(PATIENCE, known).await.expect("the keys are read again");
    };
    file.write(&[("alice", "requests_per_minute: 3"), ("carol", "")]);
    reload_until("carol", 200).await;
    assert_eq!(gateway.client.get_as("bob", "/version").await.status, 401);
    let alice = gateway.client.get_as("alice", "/version").await;
    assert_eq!(alice.headers["x-ratelimit-limit-requests"], "3");
    assert_eq!(alice.headers["x-ratelimit-remaining-requests"], "2", "what was used stays used");
    std::fs::write(file.path(), "keys: [{name: dave}]").unwrap();
    file.reload.notify_one();
    for _ in 0..20 {
        assert_eq!(gateway.client.get_as("carol", "/version").await.status, 200);
    }
    file.write(&[("dave", "")]);
    reload_until("dave", 200).await;
    assert_eq!(gateway.client.get_as("carol", "/version").await.status, 401);
}

#[tokio::test]
async fn a_key_sees_and_uses_only_its_models() {
    let file = KeyFile::new(&[("alice", "models: [small]"), ("bob", "models: [other]")]);
    let configure = |config: &mut Config| config.served_names = vec!["gpt-oss-20b".into(), "small".into()];
    let gateway = file.start_with("alice", configure).await;
    let names =
        |list: Value| list["data"].as_array().unwrap().iter().map(|model| model["id"].clone()).collect::<Vec<_>>();
    assert_eq!(names(gateway.client.get_as("alice", "/v1/models").await.ok()), ["small"]);
    assert_eq!(names(gateway.client.get_as("bob", "/v1/models").await.ok()), Vec::<Value>::new());
    // Without a name, the first that the key may use.
    assert_eq!(gateway.client.chat_as("alice", json!({})).await.ok()["model"], "small");
    let not_allowed = (403, json!("model"), json!("model_not_allowed"));
    for (key, body) in
        [("alice", json!({"model": "gpt-oss-20b"})), ("bob", json!({"model": "small"})), ("bob", json!({}))]
    {
        let answer = gateway.client.chat_as(key, body.clone()).await;
        assert_eq!(answer.error(), not_allowed, "{key} {body}");
        assert_eq!(answer.json()["error"]["type"], "permission_error");
    }
    assert_eq!(gateway.client.get_as("alice", "/v1/models/gpt-oss-20b").await.error(), not_allowed);
    assert_eq!(gateway.client.chat_as("alice", json!({"model": "none"})).await.status, 404);
    assert_eq!(gateway.coordinator.asked_count(), 1);
}

#[tokio::test]
async fn the_coordinator_learns_whose_request_it_is_and_caches_are_kept_apart() {
    let file = KeyFile::new(&[("alice", "weight: 3"), ("bob", "")]);
    let gateway = file.start_for("alice").await;
    let mut salts = Vec::new();
    for (key, weight, salt) in [("alice", 3, "s"), ("alice", 3, "s"), ("alice", 3, ""), ("bob", 1, "s"), ("bob", 1, "")]
    {
        gateway.client.chat_as(key, json!({"cache_salt": salt})).await.ok();
        let asked = gateway.coordinator.asked();
        let tenant = asked.tenant.unwrap();
        assert_eq!((tenant.id.as_str(), tenant.weight), (key, weight));
        salts.push(asked.cache_salt);
    }
    assert_eq!(salts[0], salts[1], "one tenant shares with itself");
    salts.sort();
    salts.dedup();
    assert_eq!(salts.len(), 4, "and with nobody else: {salts:?}");
    let open = start().await;
    open.client.chat(json!({"cache_salt": "s"})).await.ok();
    let asked = open.coordinator.asked();
    assert_eq!((asked.tenant, asked.cache_salt.as_str()), (None, "s"));
}

#[tokio::test]
async fn who_has_no_key_is_told_so_whatever_comes_with_the_request() {
    let file = KeyFile::new(&[("alice", "")]);
    let gateway = file.start_for("alice").await;
    let large = vec![b' '; 1 << 20];
    for headers in [String::new(), bearer("mallory"), "x-request-timeout-ms: never\r\n".into()] {
        let answer = gateway.client.post_bytes(CHAT, &large, &headers).await;
        assert_eq!(answer.error(), (401, Value::Null, json!("invalid_api_key")), "{headers}");
        assert_eq!(answer.headers["www-authenticate"], "Bearer");
        assert!(!answer.text().contains("mallory"));
    }
}

#[tokio::test]
async fn keys_of_the_environment_have_no_limits() {
    let gateway = start_for_key("sk-one", |config| {
        config.keys.unlimited = ["sk-one", "sk-two"].map(|key| Digest::of_key(key).unwrap()).to_vec();
    })
    .await;
    gateway.client.chat_as("sk-two", json!({})).await.ok();
    assert_eq!(gateway.client.chat_as("sk-three", json!({})).await.status, 401);
    let stats = gateway.client.get_as("sk-one", "/stats").await.ok();
    assert_eq!(stats["keys"]["env-2"]["requests"], 1);
}
