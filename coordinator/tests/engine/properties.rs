//! Random loads: each request gets what it gets alone, and nothing is left behind.

use std::num::NonZeroU32;

use phalanx_coordinator::engine::{EngineConfig, Request, Tenant};
use phalanx_proto::{ids::TokenId, v1};
use proptest::prelude::*;

use crate::{
    cluster::{Cluster, request, settings, small_config},
    rank::VOCAB,
};

/// Random cases a property: more with `PHALANX_FULL=1`.
fn cases() -> u32 {
    if std::env::var("PHALANX_FULL").is_ok_and(|full| full == "1") { 20_000 } else { 2000 }
}

#[derive(Clone, Debug)]
enum Op {
    Submit { family: u32, shared: usize, own: usize, max_tokens: usize, priority: i32, kind: u8, seed: u64, tenant: u8 },
    Cancel(prop::sample::Index),
    Plan,
    Apply,
    NewEpoch { full: usize, sliding: usize, cancel: bool },
}

fn op() -> impl Strategy<Value = Op> {
    let submit = (0..3_u32, 0..40_usize, 1..20_usize, 0..30_usize, -1..2_i32, 0..8_u8, 0..4_u64, 0..3_u8);
    prop_oneof![
        4 => submit.prop_map(|(family, shared, own, max_tokens, priority, kind, seed, tenant)| {
            Op::Submit { family, shared, own, max_tokens, priority, kind, seed, tenant }
        }),
        2 => any::<prop::sample::Index>().prop_map(Op::Cancel),
        12 => Just(Op::Plan),
        9 => Just(Op::Apply),
        1 => (20..40_usize, 3..24_usize, any::<bool>())
            .prop_map(|(full, sliding, cancel)| Op::NewEpoch { full, sliding, cancel }),
    ]
}

/// Two prompts of one family share their first tokens.
fn random_request(family: u32, shared: usize, own: usize, max_tokens: usize, kind: u8, seed: u64) -> Request {
    let common = (0..shared as u32).map(|i| (i * 7 + family) % VOCAB);
    let prompt: Vec<u32> = common.chain((0..own as u32).map(|i| (i + seed as u32) % VOCAB)).collect();
    let mut request = request(&prompt, max_tokens);
    request.sampling = settings(v1::Sampling {
        seed: Some(seed),
        min_tokens: u32::from(kind == 1) * 5,
        ignore_eos: kind == 2,
        prompt_logprobs: (kind == 3).then_some(0),
        ..Default::default()
    });
    if kind < 4 {
        request.stop_tokens = (0..4).map(TokenId).collect();
    }
    if kind == 5 {
        request.cache_salt = "other".into();
    }
    request
}

fn run(cluster: &mut Cluster, op: &Op) {
    match *op {
        Op::Submit { family, shared, own, max_tokens, priority, kind, seed, tenant } => {
            let mut request = random_request(family, shared, own, max_tokens, kind, seed);
            request.priority = priority;
            let weight = NonZeroU32::new(1 + u32::from(tenant) * 3).unwrap();
            request.tenant = Tenant { id: tenant.to_string(), weight };
            // Refusal is a fair answer when the pools are tiny.
            let _ = cluster.submit(request);
        }
        Op::Cancel(index) => {
            let ids: Vec<_> = cluster.heard.keys().copied().collect();
            if !ids.is_empty() {
                let id = *index.get(&ids);
                let alive = cluster.heard[&id].finished.is_none() && !cluster.heard[&id].failed;
                assert_eq!(cluster.cancel(id), alive);
            }
        }
        Op::Plan => {
            cluster.plan();
        }
        Op::Apply => {
            cluster.apply();
        }
        Op::NewEpoch { full, sliding, cancel } => {
            cluster.end_epoch();
            if cancel {
                let first = cluster.heard.keys().next().copied();
                first.map(|id| cluster.cancel(id));
            }
            cluster.begin_epoch(full, sliding);
        }
    }
}

fn config() -> impl Strategy<Value = EngineConfig> {
    let horizon = prop_oneof![Just(0_usize), 1..8_usize, Just(1000)];
    (1..6_usize, 1..12_usize, 1..8_usize, 0..30_usize, 1..4_usize, 0..3_u8, any::<bool>(), horizon).prop_map(
        |(block_size, sliding_window, max_num_seqs, extra, window, kinds, enable_prefix_caching, output_horizon)| {
            EngineConfig {
                output_horizon,
                block_size,
                sliding_window,
                has_full_layers: kinds != 1,
                has_sliding_layers: kinds != 2,
                max_num_seqs,
                max_num_batched_tokens: max_num_seqs + extra,
                window,
                enable_prefix_caching,
                ..small_config()
            }
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(), ..ProptestConfig::default() })]

    #[test]
    fn every_request_gets_what_it_gets_alone(
        config in config(),
        full in 12..40_usize,
        sliding in 2..24_usize,
        ops in prop::collection::vec(op(), 1..160),
    ) {
        let mut cluster = Cluster::new(config, full, sliding);
        ops.iter().for_each(|op| run(&mut cluster, op));
        cluster.drain();
        cluster.check_outputs();
        if cluster.config.output_horizon == 1000 {
            prop_assert_eq!(cluster.engine.stats().totals.preemptions, 0, "room was kept for everybody");
        }
    }

    /// With room for everything, what is found is what any earlier request with the same salt has computed: whole blocks
    /// of the longest common beginning, and at least one token is left to compute.
    #[test]
    fn prefixes_are_found_as_a_naive_cache_finds_them(
        block_size in 1..6_usize,
        sliding_window in 2..12_usize,
        kinds in 0..3_u8,
        requests in prop::collection::vec((0..3_u32, 0..40_usize, 1..20_usize, 0..12_usize, 4..6_u8, 0..4_u64), 1..24),
    ) {
        let config = EngineConfig {
            block_size,
            sliding_window,
            has_full_layers: kinds != 1,
            has_sliding_layers: kinds != 2,
            ..small_config()
        };
        let mut cluster = Cluster::new(config, 4000, 4000);
        let mut computed: Vec<(String, Vec<TokenId>)> = Vec::new();
        for (family, shared, own, max_tokens, kind, seed) in requests {
            let request = random_request(family, shared, own, max_tokens, kind, seed);
            let longest = computed.iter().filter(|(salt, _)| *salt == request.cache_salt).map(|(_, tokens)| {
                tokens.iter().zip(&request.prompt).take_while(|(a, b)| a == b).count()
            });
            let common = longest.max().unwrap_or(0).min(request.prompt.len() - 1);
            let expected = if max_tokens == 0 { 0 } else { common / block_size * block_size };
            let id = cluster.submit(request.clone()).unwrap();
            cluster.drain();
            prop_assert_eq!(cluster.heard[&id].cached_tokens, expected);
            let mut tokens = request.prompt;
            tokens.extend(cluster.heard[&id].tokens.iter().copied().map(TokenId));
            if max_tokens > 0 {
                // The last token is sampled and never computed.
                tokens.pop();
                computed.push((request.cache_salt, tokens));
            }
        }
    }
}

#[test]
fn a_soak_of_ten_thousand_steps_leaves_nothing_behind() {
    let mut cluster = Cluster::new(EngineConfig { max_num_seqs: 12, ..small_config() }, 50, 30);
    let mut random = 99_u64;
    let mut draw = |below: u64| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (random >> 33) % below
    };
    while cluster.steps < 10_000 {
        while cluster.engine.stats().waiting < 4 {
            let (family, shared, own) = (draw(3) as u32, draw(40) as usize, 1 + draw(19) as usize);
            let mut request = random_request(family, shared, own, draw(36) as usize, draw(8) as u8, draw(4));
            request.priority = draw(3) as i32;
            cluster.submit(request).unwrap();
        }
        cluster.turn();
        if draw(20) == 0 {
            let live = cluster.heard.iter().rev().find(|(_, heard)| heard.finished.is_none());
            let id = live.map(|(&id, _)| id);
            id.map(|id| cluster.cancel(id));
        }
    }
    cluster.drain();
    cluster.check_outputs();
    let totals = cluster.engine.stats().totals;
    assert!(
        totals.preemptions > 100 && totals.prefix_cache_hits > 10_000 && totals.finished_aborted > 100,
        "{totals:?}"
    );
}
