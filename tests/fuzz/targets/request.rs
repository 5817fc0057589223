//! The bodies of requests: accepted and rendered, or refused with a client's error that says something; never a panic.
//!
//! The first byte of an input chooses the endpoint, the rest is the body.

#![no_main]

use std::sync::{Arc, LazyLock};

use libfuzzer_sys::fuzz_target;
use phalanx_gateway::{
    dry_run::{Endpoint, dry_run},
    harmony::Harmony,
    tokenizer::Tokenizer,
};

const TOKENIZER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../deploy/models/nano/tokenizer.json");
const ENDPOINTS: [Endpoint; 4] = [Endpoint::Chat, Endpoint::Completions, Endpoint::Tokenize, Endpoint::Detokenize];
const MAX_INPUT: usize = 8 << 10;

static NANO: LazyLock<Harmony> = LazyLock::new(|| {
    let tokenizer = Tokenizer::from_file(TOKENIZER.as_ref()).expect("the bundled tokenizer");
    Harmony::new(Arc::new(tokenizer)).expect("control tokens")
});

fuzz_target!(|data: &[u8]| {
    let Some((&choice, body)) = data.split_first() else { return };
    if body.len() > MAX_INPUT {
        return;
    }
    let endpoint = ENDPOINTS[usize::from(choice) % ENDPOINTS.len()];
    match dry_run(endpoint, body, &NANO) {
        Ok(tokens) => {
            let known = |id: &u32| NANO.tokenizer().token_bytes(*id).is_some();
            assert!(endpoint != Endpoint::Chat || tokens.iter().all(known), "a chat was rendered to no tokens");
        }
        Err(refusal) => {
            assert!((400..500).contains(&refusal.status), "{refusal:?}");
            assert!(refusal.message.ends_with('.') && refusal.message.len() > 10, "{refusal:?}");
        }
    }
});
