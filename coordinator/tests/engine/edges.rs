//! Ends of every kind, refusals, epochs, and results that cannot be.

use std::time::Duration;

use phalanx_coordinator::engine::{Engine, EngineConfig};
use phalanx_proto::{
    fault::FaultKind,
    ids::{BlockId, SequenceId, Step, TokenId},
    v1::{self, FinishReason},
};

use crate::{
    cluster::{Cluster, alone, request, settings, small_config},
    rank::FakeRank,
};

#[test]
fn a_cancelled_sequence_is_retired_by_the_next_plan_and_frees_its_blocks_with_it() {
    for turns in 0..9 {
        let mut cluster = Cluster::new(EngineConfig { enable_prefix_caching: false, ..small_config() }, 40, 40);
        let id = cluster.submit(request(&[1; 50], 6)).unwrap();
        for _ in 0..turns {
            cluster.turn();
            cluster.plan();
        }
        if cluster.heard[&id].finished.is_some() {
            assert!(!cluster.cancel(id));
            continue;
        }
        assert!(cluster.cancel(id));
        assert!(!cluster.cancel(id), "it ends once");
        assert_eq!(cluster.heard[&id].finished, Some(FinishReason::Aborted));
        let in_flight = cluster.flying.len();
        (0..in_flight).for_each(|_| assert!(cluster.apply()));
        let retired = cluster.plan().map(|plan| (plan.retire.clone(), plan.slices.len()));
        assert_eq!(retired, (turns > 0).then(|| (vec![id], 0)));
        cluster.apply();
        assert_eq!(cluster.engine.stats().full_blocks_used, 0);
        cluster.drain();
        cluster.check_outputs();
    }
}

#[test]
fn five_hundred_random_cancels_leave_nothing_behind() {
    let mut cluster = Cluster::new(small_config(), 40, 30);
    let mut random = 12_345_u64;
    let mut draw = |below: u64| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (random >> 33) % below
    };
    let mut cancelled = 0;
    while cancelled < 500 {
        while cluster.engine.stats().waiting < 4 {
            let prompt = vec![draw(4) as u32; 1 + draw(40) as usize];
            cluster.submit(request(&prompt, 1 + draw(30) as usize)).unwrap();
        }
        for _ in 0..draw(3) {
            cluster.plan();
        }
        for _ in 0..draw(2) {
            cluster.apply();
        }
        let live: Vec<SequenceId> =
            cluster.heard.iter().filter(|(_, heard)| heard.finished.is_none()).map(|(&id, _)| id).collect();
        if draw(2) == 0 && !live.is_empty() {
            assert!(cluster.cancel(live[draw(live.len() as u64) as usize]));
            cancelled += 1;
        }
    }
    cluster.drain();
    cluster.check_outputs();
    assert_eq!(cluster.engine.stats().totals.finished_aborted, 500);
}

#[test]
fn an_epoch_that_ends_in_the_middle_loses_and_doubles_nothing() {
    let mut cluster = Cluster::new(small_config(), 40, 40);
    for seed in 0..8 {
        let mut request = request(&[seed; 20], 25);
        if seed % 2 == 0 {
            request.sampling = settings(v1::Sampling { prompt_logprobs: Some(0), ..Default::default() });
        }
        cluster.submit(request).unwrap();
    }
    for turns in [1, 2, 5, 9] {
        for _ in 0..turns {
            cluster.turn();
        }
        cluster.end_epoch();
        cluster.begin_epoch(40, 40);
    }
    cluster.drain();
    cluster.check_outputs();
}

#[test]
fn cancels_and_requests_between_epochs_are_kept() {
    let mut cluster = Cluster::new(small_config(), 40, 40);
    let first = cluster.submit(request(&[1; 20], 25)).unwrap();
    cluster.turn();
    cluster.end_epoch();
    assert!(cluster.cancel(first));
    cluster.submit(request(&[2; 20], 5)).unwrap();
    cluster.begin_epoch(40, 40);
    cluster.drain();
    cluster.check_outputs();
    assert_eq!(cluster.heard[&first].finished, Some(FinishReason::Aborted));
}

#[test]
fn sequences_that_a_smaller_cache_cannot_hold_fail_with_the_numbers() {
    let mut cluster = Cluster::new(small_config(), 40, 40);
    let long = cluster.submit(request(&[1; 60], 20)).unwrap();
    let short = cluster.submit(request(&[1; 10], 10)).unwrap();
    let mut open = request(&[2; 10], 1);
    open.max_tokens = None;
    let open = cluster.submit(open).unwrap();
    cluster.turn();
    cluster.end_epoch();
    cluster.begin_epoch(8, 8);
    cluster.drain();
    assert!(cluster.heard[&long].failed);
    assert_eq!(cluster.heard[&short].finished, Some(FinishReason::Length));
    // Without a limit of its own it goes as far as 8 blocks of 4 do, and one token more.
    assert_eq!(cluster.heard[&open].tokens.len(), 8 * 4 + 1 - 10);
    assert_eq!(cluster.engine.stats().totals.failed, 1);
}

#[test]
fn requests_that_can_never_run_are_refused_with_the_numbers() {
    let mut cluster = Cluster::new(small_config(), 10, 10);
    let fault = cluster.submit(request(&[1; 90], 7)).unwrap_err();
    assert_eq!(fault.kind, FaultKind::ContextLength);
    assert!(fault.message.contains("97") && fault.message.contains("96"), "{fault}");
    let fault = cluster.submit(request(&[1; 20], 30)).unwrap_err();
    assert_eq!(fault.kind, FaultKind::ContextLength);
    assert!(fault.message.contains("13 full") && fault.message.contains("10 and 10"), "{fault}");
    assert_eq!(cluster.submit(request(&[], 3)).unwrap_err().field, "prompt");
    let mut many = request(&[1], 3);
    many.stop_tokens = vec![TokenId(1); 65];
    assert_eq!(cluster.submit(many).unwrap_err().field, "stop_token_ids");
    let mut over = request(&[1], 3);
    over.resume = vec![TokenId(1); 4];
    assert_eq!(cluster.submit(over).unwrap_err().field, "resume");
    assert_eq!(cluster.engine.stats().totals.refused, 5);
    // Exactly what fits is taken: 10 blocks hold 40 positions, the last token needs none.
    cluster.submit(request(&[1; 20], 21)).unwrap();
    cluster.drain();
    cluster.check_outputs();
}

#[test]
fn a_full_queue_refuses() {
    let mut cluster = Cluster::new(EngineConfig { max_num_queued_reqs: 2, max_num_seqs: 2, ..small_config() }, 40, 40);
    for _ in 0..4 {
        cluster.submit(request(&[1; 5], 3)).unwrap();
    }
    assert_eq!(cluster.submit(request(&[1; 5], 3)).unwrap_err().kind, FaultKind::QueueFull);
    cluster.drain();
    cluster.submit(request(&[1; 5], 3)).unwrap();
    cluster.drain();
    cluster.check_outputs();
}

#[test]
fn a_request_goes_on_after_the_tokens_it_resumes_with() {
    let mut cluster = Cluster::new(small_config(), 40, 40);
    let whole = request(&[4; 9], 12);
    let (tokens, _) = alone(&whole, 21);
    for known in 0..=12 {
        let mut resumed = whole.clone();
        resumed.resume = tokens[..known].iter().copied().map(TokenId).collect();
        let id = cluster.submit(resumed).unwrap();
        cluster.drain();
        assert_eq!(cluster.heard[&id].tokens, tokens[known..]);
        assert_eq!(cluster.heard[&id].finished, Some(FinishReason::Length));
    }
    let mut stopped = whole;
    stopped.resume = vec![TokenId(3), TokenId(17)];
    stopped.stop_tokens = vec![TokenId(17)];
    let id = cluster.submit(stopped).unwrap();
    assert_eq!(cluster.heard[&id].finished, Some(FinishReason::Stop), "nothing is computed for it");
    cluster.drain();
}

#[test]
fn the_prompt_alone_can_be_asked_for() {
    let mut cluster = Cluster::new(small_config(), 40, 40);
    let mut echo = request(&[1, 5, 2, 6, 3, 7, 4, 8, 1, 5, 2, 6, 3, 7, 4, 8, 1, 5, 2, 6, 3, 7, 4, 8, 9, 9], 0);
    let plain = cluster.submit(echo.clone()).unwrap();
    echo.sampling = settings(v1::Sampling { prompt_logprobs: Some(3), ..Default::default() });
    cluster.submit(echo).unwrap();
    assert_eq!(cluster.heard[&plain].finished, Some(FinishReason::Length));
    cluster.drain();
    cluster.check_outputs();
}

#[test]
fn a_result_that_answers_no_plan_changes_nothing() {
    let mut cluster = Cluster::new(small_config(), 40, 40);
    assert_eq!(cluster.engine.apply(Step(1), &[], &[], Duration::ZERO).unwrap_err().kind, FaultKind::Internal);
    let id = cluster.submit(request(&[1; 5], 4)).unwrap();
    cluster.plan().unwrap();
    cluster.plan().unwrap();
    let token = Some(v1::Token { id: 1, logprob: None, top: Vec::new() });
    let good = v1::SampledToken { sequence: id.0, token };
    let absent = v1::SampledToken { sequence: id.0, token: None };
    let other = v1::SampledToken { sequence: 77, ..good.clone() };
    let prompt = v1::PromptLogprobs { sequence: id.0, tokens: vec![v1::Token::default()] };
    let cases = [
        (2, vec![good.clone()], vec![]),
        (1, vec![], vec![]),
        (1, vec![good.clone(), good.clone()], vec![]),
        (1, vec![other], vec![]),
        (1, vec![absent], vec![]),
        (1, vec![good], vec![prompt]),
    ];
    for (step, sampled, prompts) in cases {
        let fault = cluster.engine.apply(Step(step), &sampled, &prompts, Duration::ZERO).unwrap_err();
        assert_eq!(fault.kind, FaultKind::Internal, "{fault}");
        cluster.engine.check_integrity().unwrap();
    }
    cluster.drain();
    cluster.check_outputs();
}

#[test]
fn configurations_that_cannot_work_name_their_field() {
    let cases = [
        ("block_size", EngineConfig { block_size: 0, ..small_config() }),
        ("sliding_window", EngineConfig { sliding_window: 0, ..small_config() }),
        ("max_model_len", EngineConfig { max_model_len: 0, ..small_config() }),
        ("max_num_seqs", EngineConfig { max_num_seqs: 0, ..small_config() }),
        ("window", EngineConfig { window: 0, ..small_config() }),
        ("max_num_batched_tokens", EngineConfig { max_num_batched_tokens: 5, ..small_config() }),
        ("layer_types", EngineConfig { has_full_layers: false, has_sliding_layers: false, ..small_config() }),
    ];
    for (field, config) in cases {
        assert_eq!(Engine::new(config).unwrap_err().field, field);
    }
}

/// Shows that the rank of these tests can see a wrong table.
#[test]
#[should_panic(expected = "key")]
fn a_table_that_names_a_wrong_block_is_seen() {
    let config = small_config();
    let mut engine = Cluster::new(config.clone(), 20, 20);
    engine.submit(request(&[1, 2, 3, 4, 5, 6, 7, 8, 9], 8)).unwrap();
    let first = engine.plan().unwrap().clone();
    let mut second = engine.plan().unwrap().clone();
    let mut rank = FakeRank::new(&config, 20, 20);
    rank.execute(&first, 0);
    // The first block is named twice: position 12 overwrites position 0.
    second.slices[0].first_position = 9;
    second.slices[0].num_tokens = 1;
    rank.execute(&second, 1);
    let mut third = second.clone();
    third.step = Step(3);
    third.slices[0].first_position = 10;
    rank.execute(&third, 2);
    third.step = Step(4);
    third.slices[0].first_position = 11;
    rank.execute(&third, 3);
    third.step = Step(5);
    third.slices[0].first_position = 12;
    third.slices[0].full_blocks = vec![first.slices[0].full_blocks[0]];
    third.slices[0].sliding_blocks = vec![BlockId(19)];
    rank.execute(&third, 4);
}
