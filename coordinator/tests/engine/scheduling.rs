//! Batching, the window, room, fairness.

use phalanx_coordinator::engine::{EngineConfig, Request};
use phalanx_proto::{
    ids::{SequenceId, TokenId},
    sampling::SamplingSettings,
    v1,
};

use crate::cluster::{Cluster, request, settings, small_config};

#[test]
fn the_next_decode_is_planned_before_the_token_it_feeds_is_known() {
    let mut cluster = Cluster::new(small_config(), 20, 20);
    cluster.submit(request(&[1, 2, 3], 5)).unwrap();
    let first = cluster.plan().unwrap().slices[0].clone();
    assert_eq!((first.first_position, first.num_tokens, first.sample), (0, 3, true));
    let second = cluster.plan().unwrap().slices[0].clone();
    assert_eq!((second.first_position, second.num_tokens, second.sample), (3, 1, true));
    assert!(cluster.plan().is_none(), "the window has two places");
    cluster.drain();
    cluster.check_outputs();
}

#[test]
fn a_known_length_costs_no_extra_step() {
    let mut cluster = Cluster::new(small_config(), 20, 20);
    cluster.submit(request(&[1, 2, 3], 5)).unwrap();
    let mut computed = 0;
    loop {
        while let Some(plan) = cluster.plan() {
            computed += plan.num_tokens();
        }
        if !cluster.apply() {
            break;
        }
    }
    assert_eq!(computed, 3 + 4, "the last token is sampled, not computed");
    assert_eq!(cluster.steps, 6, "five tokens and the step that retires");
    cluster.drain();
    cluster.check_outputs();
}

#[test]
fn what_is_computed_past_a_stop_token_is_thrown_away() {
    for window in [1, 2, 3] {
        let mut cluster = Cluster::new(EngineConfig { window, ..small_config() }, 20, 20);
        for seed in 0..6 {
            let mut request = request(&[seed, 4, 5], 40);
            request.stop_tokens = (0..8).map(Into::into).collect();
            cluster.submit(request).unwrap();
        }
        cluster.drain();
        cluster.check_outputs();
        assert!(
            cluster.engine.stats().totals.finished_stop >= 5,
            "stop tokens were sampled: {:?}",
            cluster.engine.stats()
        );
    }
}

#[test]
fn stop_tokens_do_not_end_what_ignores_them() {
    let mut cluster = Cluster::new(small_config(), 40, 40);
    let stop_tokens: Vec<_> = (0..20).map(Into::into).collect();
    let ignoring = settings(v1::Sampling { ignore_eos: true, ..Default::default() });
    let id = cluster.submit(demanding(&stop_tokens, ignoring)).unwrap();
    let patient = settings(v1::Sampling { min_tokens: 9, ..Default::default() });
    let other = cluster.submit(demanding(&stop_tokens, patient)).unwrap();
    cluster.drain();
    cluster.check_outputs();
    assert_eq!(cluster.heard[&id].tokens.len(), 30);
    assert!(cluster.heard[&other].tokens.len() > 9);
    assert!(cluster.heard[&other].tokens.len() < 30);
}

fn demanding(stop_tokens: &[TokenId], sampling: SamplingSettings) -> Request {
    let mut request = request(&[9, 9, 9], 30);
    request.stop_tokens = stop_tokens.to_vec();
    request.sampling = sampling;
    request
}

#[test]
fn a_long_prompt_goes_in_chunks_beside_running_decodes() {
    let mut cluster = Cluster::new(small_config(), 60, 60);
    for seed in 0..3 {
        cluster.submit(request(&[seed], 30)).unwrap();
    }
    cluster.turn();
    cluster.turn();
    cluster.submit(request(&[7; 60], 4)).unwrap();
    cluster.turn();
    let plan = &cluster.flying.back().unwrap().0;
    let shape: Vec<(usize, usize)> =
        plan.slices.iter().map(|slice| (slice.first_position.min(1), slice.num_tokens)).collect();
    assert_eq!(shape, [(1, 1), (1, 1), (1, 1), (0, 21)], "decodes first, the prompt takes what is left of 24");
    cluster.drain();
    cluster.check_outputs();
}

#[test]
fn higher_priorities_are_admitted_first_and_equal_ones_by_age() {
    let mut cluster = Cluster::new(EngineConfig { max_num_seqs: 1, ..small_config() }, 40, 40);
    let priorities = [0, 5, 0, 5];
    let ids: Vec<SequenceId> = priorities
        .iter()
        .map(|&priority| {
            let mut request = request(&[1, 2], 3);
            request.priority = priority;
            cluster.submit(request).unwrap()
        })
        .collect();
    cluster.drain();
    let mut order = ids.clone();
    order.sort_by_key(|id| cluster.heard[id].finished_at);
    assert_eq!(order, [ids[1], ids[3], ids[0], ids[2]]);
}

#[test]
fn a_low_priority_is_served_under_endless_high_ones() {
    let mut cluster = Cluster::new(EngineConfig { max_num_seqs: 2, ..small_config() }, 30, 30);
    let mut low = request(&[3; 40], 5);
    low.priority = -1;
    let low = cluster.submit(low).unwrap();
    for seed in 0..400 {
        while cluster.engine.stats().waiting < 3 {
            cluster.submit(request(&[seed, 1, 2, 3], 4)).unwrap();
        }
        cluster.turn();
    }
    let finished = cluster.heard[&low].finished_at.expect("the low priority was starved");
    assert!(finished < 150, "it took {finished} steps");
    cluster.drain();
    cluster.check_outputs();
}

#[test]
fn a_low_priority_that_was_preempted_often_goes_first() {
    // Its prompt takes seven plans, and the others grow before it is through.
    let config = EngineConfig { max_num_seqs: 4, max_num_batched_tokens: 8, ..small_config() };
    let mut cluster = Cluster::new(EngineConfig { enable_prefix_caching: false, ..config }, 18, 60);
    let mut low = request(&[3; 56], 6);
    low.priority = -1;
    let low = cluster.submit(low).unwrap();
    for seed in 0..600 {
        while cluster.engine.stats().waiting < 3 {
            cluster.submit(request(&[seed; 6], 10)).unwrap();
        }
        cluster.turn();
    }
    assert!(cluster.engine.stats().totals.preemptions >= 4);
    let finished = cluster.heard[&low].finished_at.expect("the low priority was preempted for ever");
    assert!(finished < 400, "it took {finished} steps");
    cluster.drain();
    cluster.check_outputs();
}

#[test]
fn the_hindmost_makes_room_and_gets_the_same_tokens_later() {
    let mut cluster = Cluster::new(small_config(), 14, 60);
    let mut ids = Vec::new();
    for (seed, priority) in [(1, 0), (2, 3), (3, 0), (4, 1)] {
        let mut request = request(&[seed; 8], 30);
        request.priority = priority;
        ids.push(cluster.submit(request).unwrap());
    }
    cluster.drain();
    cluster.check_outputs();
    assert!(cluster.engine.stats().totals.preemptions > 0, "14 blocks are too few for four sequences of 10");
    let first = ids.iter().min_by_key(|id| cluster.heard[id].finished_at).unwrap();
    assert_eq!(*first, ids[1], "the highest priority is never preempted");
}

#[test]
fn a_newcomer_leaves_a_block_to_each_running_decode() {
    for (full_blocks, admitted) in [(6, 0), (7, 1)] {
        let mut cluster = Cluster::new(small_config(), full_blocks, 40);
        cluster.submit(request(&[1], 10)).unwrap();
        cluster.submit(request(&[2], 10)).unwrap();
        cluster.turn();
        cluster.submit(request(&[3; 12], 2)).unwrap();
        assert_eq!(cluster.plan().unwrap().admit.len(), admitted, "it takes 3 blocks of {full_blocks}, 2 are taken");
        cluster.drain();
        cluster.check_outputs();
    }
}

#[test]
fn a_chunk_leaves_a_block_to_each_running_decode() {
    let mut cluster = Cluster::new(small_config(), 60, 8);
    cluster.submit(request(&[1], 10)).unwrap();
    cluster.submit(request(&[2], 10)).unwrap();
    cluster.turn();
    cluster.submit(request(&[3; 60], 2)).unwrap();
    let chunk = cluster.plan().unwrap().slices[2].clone();
    assert_eq!(chunk.num_tokens, 16, "of 8 sliding blocks 2 are taken and 2 are left to the decodes");
    cluster.drain();
    cluster.check_outputs();
}

#[test]
fn a_preempted_sequence_waits_for_the_tokens_that_are_on_their_way() {
    let config = EngineConfig { window: 3, enable_prefix_caching: false, has_sliding_layers: false, ..small_config() };
    let mut cluster = Cluster::new(config, 4, 0);
    let [first, second] = [1, 2].map(|seed| cluster.submit(request(&[seed; 2], 8)).unwrap());
    let cancelled = cluster.submit(request(&[3], 8)).unwrap();
    let mut low = request(&[4], 8);
    low.priority = -1;
    let low = cluster.submit(low).unwrap();
    cluster.plan().unwrap();
    cluster.cancel(cancelled);
    cluster.plan().unwrap();
    cluster.plan().unwrap();
    cluster.apply();
    // The first two need a second block each; one is on its way back, the hindmost has to give another.
    assert_eq!(cluster.plan().unwrap().retire, [low]);
    cluster.cancel(first);
    cluster.cancel(second);
    // The one block is there now, but a token of the third plan is not known yet.
    cluster.apply();
    assert!(cluster.plan().unwrap().admit.is_empty());
    cluster.apply();
    cluster.apply();
    assert_eq!(cluster.plan().unwrap().admit[0].tokens.len(), 1 + 3);
    cluster.drain();
    cluster.check_outputs();
}

#[test]
fn a_shortage_of_sliding_blocks_is_survived_too() {
    for sliding in 3..12 {
        let mut cluster = Cluster::new(small_config(), 200, sliding);
        for seed in 0..5 {
            cluster.submit(request(&[seed; 17], 20)).unwrap();
        }
        cluster.drain();
        cluster.check_outputs();
    }
}

#[test]
fn a_long_sequence_keeps_no_more_than_its_window_of_sliding_blocks() {
    let mut cluster = Cluster::new(EngineConfig { enable_prefix_caching: false, ..small_config() }, 40, 40);
    cluster.submit(request(&[5; 4], 90)).unwrap();
    let mut most = 0;
    while cluster.turn() {
        most = most.max(cluster.engine.stats().sliding_blocks_used);
    }
    // Three blocks are touched by a window of 6, and one more may wait for its step.
    assert!(most <= 4, "{most} sliding blocks were in use");
    cluster.drain();
    cluster.check_outputs();
}

#[test]
fn models_with_one_kind_of_layer_need_one_pool() {
    for (has_full_layers, has_sliding_layers) in [(true, false), (false, true)] {
        let config = EngineConfig { has_full_layers, has_sliding_layers, ..small_config() };
        let (full, sliding) = if has_full_layers { (60, 0) } else { (0, 30) };
        let mut cluster = Cluster::new(config, full, sliding);
        for seed in 0..12 {
            cluster.submit(request(&[seed % 4; 21], 20)).unwrap();
        }
        cluster.drain();
        cluster.check_outputs();
        assert!(cluster.engine.stats().totals.prefix_cache_hits > 0);
    }
}
