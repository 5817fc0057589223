//! The prefix cache.

use phalanx_coordinator::engine::EngineConfig;
use phalanx_proto::v1;

use crate::cluster::{Cluster, request, settings, small_config};

const PROMPT: [u32; 18] = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18];

#[test]
fn an_equal_prompt_is_not_computed_again() {
    let mut cluster = Cluster::new(small_config(), 30, 30);
    cluster.submit(request(&PROMPT, 3)).unwrap();
    cluster.drain();
    let id = cluster.submit(request(&PROMPT, 3)).unwrap();
    let slice = cluster.plan().unwrap().slices[0].clone();
    assert_eq!((slice.first_position, slice.num_tokens), (16, 2), "four full blocks are there");
    assert_eq!(cluster.heard[&id].cached_tokens, 16);
    cluster.drain();
    cluster.check_outputs();
    let totals = cluster.engine.stats().totals;
    assert_eq!((totals.prefix_cache_queries, totals.prefix_cache_hits), (36, 16));
}

#[test]
fn at_least_one_token_is_computed() {
    let mut cluster = Cluster::new(small_config(), 30, 30);
    for _ in 0..2 {
        cluster.submit(request(&PROMPT[..16], 3)).unwrap();
        cluster.drain();
    }
    let cached: Vec<usize> = cluster.heard.values().map(|heard| heard.cached_tokens).collect();
    assert_eq!(cached, [0, 12], "the last block is computed again for its logits");
    cluster.check_outputs();
}

#[test]
fn salts_and_wanted_prompt_logits_do_not_share() {
    let mut cluster = Cluster::new(small_config(), 60, 60);
    cluster.submit(request(&PROMPT, 3)).unwrap();
    cluster.drain();
    let mut salted = request(&PROMPT, 3);
    salted.cache_salt = "tenant".into();
    let salted = cluster.submit(salted).unwrap();
    let mut echoed = request(&PROMPT, 3);
    echoed.sampling = settings(v1::Sampling { prompt_logprobs: Some(0), ..Default::default() });
    let echoed = cluster.submit(echoed).unwrap();
    cluster.drain();
    cluster.check_outputs();
    assert_eq!((cluster.heard[&salted].cached_tokens, cluster.heard[&echoed].cached_tokens), (0, 0));
}

#[test]
fn generated_tokens_are_found_by_the_next_turn_of_a_conversation() {
    let mut cluster = Cluster::new(small_config(), 40, 40);
    let first = cluster.submit(request(&PROMPT, 20)).unwrap();
    cluster.drain();
    let mut history = PROMPT.to_vec();
    history.extend(&cluster.heard[&first].tokens);
    history.extend([20, 21, 22]);
    let second = cluster.submit(request(&history, 5)).unwrap();
    cluster.drain();
    cluster.check_outputs();
    // 18 + 20 tokens, of which the last was never computed: 37 fill nine blocks.
    assert_eq!(cluster.heard[&second].cached_tokens, 36);
}

#[test]
fn choices_that_arrive_together_compute_their_prompt_once() {
    let mut cluster = Cluster::new(EngineConfig { max_num_batched_tokens: 96, ..small_config() }, 60, 60);
    for seed in 0..4 {
        let mut choice = request(&PROMPT, 6);
        choice.sampling = settings(v1::Sampling { seed: Some(seed), ..Default::default() });
        cluster.submit(choice).unwrap();
    }
    let mut computed = 0;
    loop {
        while let Some(plan) = cluster.plan() {
            computed += plan.num_tokens();
        }
        if !cluster.apply() {
            break;
        }
    }
    assert_eq!(computed, 18 + 3 * 2 + 4 * 5);
    cluster.drain();
    cluster.check_outputs();
}

#[test]
fn a_hit_needs_the_last_window_of_sliding_blocks() {
    let mut cluster = Cluster::new(small_config(), 200, 5);
    cluster.submit(request(&PROMPT, 2)).unwrap();
    cluster.drain();
    // Takes the sliding blocks of the first one, but few of its full blocks.
    cluster.submit(request(&[25; 40], 2)).unwrap();
    cluster.drain();
    let again = cluster.submit(request(&PROMPT, 2)).unwrap();
    cluster.drain();
    cluster.check_outputs();
    assert_eq!(cluster.heard[&again].cached_tokens, 0);
}

#[test]
fn the_least_recently_used_prefix_is_given_up_first() {
    let mut cluster = Cluster::new(small_config(), 14, 60);
    let prompts = [[1_u32; 18], [2; 18], [3; 18]];
    for prompt in &prompts {
        cluster.submit(request(prompt, 2)).unwrap();
        cluster.drain();
    }
    // The first is used again, so that the second is the oldest when room is needed.
    let mut cached = Vec::new();
    for prompt in [&prompts[0], &[4; 18], &prompts[0], &prompts[1]] {
        let id = cluster.submit(request(prompt, 2)).unwrap();
        cluster.drain();
        cached.push(cluster.heard[&id].cached_tokens);
    }
    assert_eq!(cached, [16, 0, 16, 4], "the end of the second prompt had to go, its beginning last");
    cluster.check_outputs();
}

#[test]
fn a_new_epoch_begins_with_an_empty_cache() {
    let mut cluster = Cluster::new(small_config(), 30, 30);
    cluster.submit(request(&PROMPT, 3)).unwrap();
    cluster.drain();
    cluster.end_epoch();
    cluster.begin_epoch(30, 30);
    let id = cluster.submit(request(&PROMPT, 3)).unwrap();
    cluster.drain();
    cluster.check_outputs();
    assert_eq!(cluster.heard[&id].cached_tokens, 0);
}
