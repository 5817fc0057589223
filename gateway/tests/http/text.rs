//! `/v1/completions`, `/tokenize` and `/detokenize`.

use phalanx_gateway::tokenizer::Tokenizer;
use serde_json::{Value, json};

use super::harness::{Gateway, nano, start};

const PATH: &str = "/v1/completions";

fn tokenizer() -> Tokenizer {
    Tokenizer::from_file(&nano().join("tokenizer.json")).unwrap()
}

/// A gateway whose model always says this.
async fn saying(text: &str) -> Gateway {
    let gateway = start().await;
    let ids = tokenizer().encode_with_special(text);
    gateway.coordinator.behave(|behaviour| behaviour.answer = Some(ids));
    gateway
}

#[tokio::test]
async fn a_text_is_continued() {
    let gateway = saying(" and 서울.<|return|>").await;
    let body = gateway.client.post(PATH, json!({"prompt": "Paris", "max_tokens": 50})).await.ok();
    assert!(body["id"].as_str().unwrap().starts_with("cmpl-"));
    assert_eq!(body["object"], "text_completion");
    let expected = json!([{"index": 0, "text": " and 서울.", "logprobs": null, "finish_reason": "stop"}]);
    assert_eq!(body["choices"], expected);
    assert_eq!(gateway.coordinator.asked().prompt, tokenizer().encode_ordinary("Paris"));
    let body = gateway.client.post(PATH, json!({"prompt": "Paris", "skip_special_tokens": false})).await.ok();
    assert_eq!(body["choices"][0]["text"], " and 서울.<|return|>");
}

#[tokio::test]
async fn a_prompt_comes_in_four_shapes() {
    let gateway = saying("x<|return|>").await;
    let ids = [20, 21, 22];
    for (prompt, prompts) in [
        (json!("a<|start|>b"), vec![tokenizer().encode_with_special("a<|start|>b")]),
        (json!(["a", "b"]), vec![tokenizer().encode_ordinary("a"), tokenizer().encode_ordinary("b")]),
        (json!(ids), vec![ids.to_vec()]),
        (json!([ids, [23]]), vec![ids.to_vec(), vec![23]]),
    ] {
        gateway.coordinator.requests.lock().unwrap().clear();
        let body = gateway.client.post(PATH, json!({"prompt": prompt, "n": 2, "return_token_ids": true})).await.ok();
        let choices = body["choices"].as_array().unwrap();
        assert_eq!(choices.len(), 2 * prompts.len());
        for (at, choice) in choices.iter().enumerate() {
            assert_eq!(choice["index"], at);
            assert_eq!(choice["prompt_token_ids"], json!(prompts[at / 2]));
        }
        assert_eq!(body["usage"]["prompt_tokens"], prompts.iter().map(Vec::len).sum::<usize>());
    }
    for prompt in [json!(""), json!([]), json!([[]]), json!(["a", ""])] {
        assert_eq!(gateway.client.post(PATH, json!({"prompt": prompt})).await.error().1, json!("prompt"), "{prompt}");
    }
    let answer = gateway.client.post(PATH, json!({"prompt": ["a", 5]})).await;
    assert_eq!(answer.error(), (400, json!("prompt[1]"), json!("invalid_type")));
    for (name, value) in [("suffix", json!("b")), ("best_of", json!(3))] {
        let mut body = json!({"prompt": "a"});
        body[name] = value;
        assert_eq!(gateway.client.post(PATH, body).await.error(), (400, json!(name), json!("unsupported_parameter")));
    }
}

#[tokio::test]
async fn echo_and_logprobs_report_on_prompt_and_answer() {
    let gateway = saying(" c d<|return|>").await;
    let prompt = tokenizer().encode_ordinary("a b");
    let answer = tokenizer().encode_ordinary(" c d");
    for stream in [false, true] {
        let body = json!({"prompt": "a b", "echo": true, "logprobs": 1});
        let choice = if stream {
            merged(&gateway, body).await
        } else {
            gateway.client.post(PATH, body).await.ok()["choices"][0].clone()
        };
        assert_eq!(choice["text"], "a b c d");
        let logprobs = &choice["logprobs"];
        let tokens: Vec<_> =
            logprobs["tokens"].as_array().unwrap().iter().map(|token| token.as_str().unwrap()).collect();
        assert_eq!(tokens.concat(), "a b c d<|return|>");
        assert_eq!(tokens.len(), prompt.len() + answer.len() + 1);
        let mut offset = 0;
        for (at, token) in tokens.iter().enumerate() {
            assert_eq!(logprobs["text_offset"][at], offset);
            offset += token.chars().count();
            assert_eq!(logprobs["token_logprobs"][at].is_null(), at == 0);
            assert_eq!(logprobs["top_logprobs"][at].get(token), logprobs["token_logprobs"].get(at).filter(|_| at > 0));
        }
    }
}

/// A streamed choice put together.
async fn merged(gateway: &Gateway, body: Value) -> Value {
    let chunks = gateway.client.open(PATH, body).await.chunks().await;
    let mut text = String::new();
    let mut lists: [Vec<Value>; 4] = Default::default();
    let names = ["tokens", "token_logprobs", "top_logprobs", "text_offset"];
    for choice in chunks.iter().map(|chunk| &chunk["choices"][0]) {
        text.push_str(choice["text"].as_str().unwrap());
        for (name, list) in names.iter().zip(&mut lists) {
            list.extend(choice["logprobs"][name].as_array().into_iter().flatten().cloned());
        }
    }
    let [tokens, token_logprobs, top_logprobs, text_offset] = lists;
    let logprobs = json!({
        "tokens": tokens, "token_logprobs": token_logprobs, "top_logprobs": top_logprobs, "text_offset": text_offset
    });
    json!({"text": text, "logprobs": logprobs})
}

#[tokio::test]
async fn no_tokens_beyond_the_prompt_score_it() {
    let gateway = saying("x").await;
    let body = json!({"prompt": "a b", "echo": true, "logprobs": 0, "max_tokens": 0});
    let body = gateway.client.post(PATH, body).await.ok();
    let choice = &body["choices"][0];
    assert_eq!((&choice["text"], &choice["finish_reason"]), (&json!("a b"), &json!("length")));
    assert_eq!(choice["logprobs"]["tokens"].as_array().unwrap().len(), tokenizer().encode_ordinary("a b").len());
    assert_eq!(body["usage"]["completion_tokens"], 0);
}

#[tokio::test]
async fn a_text_stream_holds_back_halves_of_characters_and_stop_strings() {
    let gateway = saying("값은 뷁 END of it<|return|>").await;
    let mut stream = gateway.client.open(PATH, json!({"prompt": "a", "stop": ["END"]})).await;
    let chunks = stream.chunks().await;
    let texts: String = chunks.iter().map(|chunk| chunk["choices"][0]["text"].as_str().unwrap()).collect();
    assert_eq!(texts, "값은 뷁 ");
    assert_eq!(chunks.last().unwrap()["choices"][0]["finish_reason"], "stop");
}

#[tokio::test]
async fn tokens_go_there_and_back() {
    let gateway = start().await;
    let body =
        gateway.client.post("/tokenize", json!({"prompt": "서울 <|end|>", "return_token_strs": true})).await.ok();
    assert_eq!(body["tokens"], json!(tokenizer().encode_with_special("서울 <|end|>")));
    assert_eq!(body["max_model_len"], 1024);
    assert_eq!(body["count"], body["tokens"].as_array().unwrap().len());
    assert_eq!(body["token_strs"].as_array().unwrap().last(), Some(&json!("<|end|>")));
    let back = gateway.client.post("/detokenize", json!({"tokens": body["tokens"]})).await.ok();
    assert_eq!(back["prompt"], "서울 <|end|>");
    let line = super::golden::line("Spell tree.");
    let chat = gateway.client.post("/tokenize", line.request.clone()).await.ok();
    assert_eq!(chat["tokens"], json!(line.prompt_ids));
    let unknown = gateway.client.post("/detokenize", json!({"tokens": [1, 99999]})).await;
    assert_eq!(unknown.error(), (400, json!("tokens[1]"), json!("invalid_value")));
}
