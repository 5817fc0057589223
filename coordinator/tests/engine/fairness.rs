//! Who gets how much, who is refused, and who never has to make room.

use std::{num::NonZeroU32, time::Duration};

use phalanx_coordinator::engine::{EngineConfig, Request, Tenant};
use phalanx_proto::{fault::FaultKind, ids::SequenceId, v1::FinishReason};

use crate::cluster::{Cluster, request, small_config};

fn tenant(id: &str, weight: u32) -> Tenant {
    Tenant { id: id.into(), weight: NonZeroU32::new(weight).unwrap() }
}

/// A request of a tenant whose size follows from a number.
fn sized(tenant: &Tenant, number: usize) -> Request {
    let seed = (number as u32).wrapping_mul(2_654_435_761) >> 16;
    let prompt: Vec<u32> = (0..2 + seed % 17).map(|i| (seed + i * i) % 29).collect();
    Request { tenant: tenant.clone(), ..request(&prompt, 3 + seed as usize % 23) }
}

/// What two tenants with these weights and loads were served, after a while of both competing.
fn shares(
    config: EngineConfig,
    blocks: usize,
    weights: [u32; 2],
    alive: [usize; 2],
    priorities: [i32; 2],
) -> [usize; 2] {
    let tenants = [tenant("a", weights[0]), tenant("b", weights[1])];
    let mut cluster = Cluster::new(config, blocks, blocks);
    cluster.check = false;
    let (mut number, mut counts) = (0, [0; 2]);
    while cluster.steps < 6000 {
        for (index, tenant) in tenants.iter().enumerate() {
            let mine = |heard: &&crate::cluster::Heard| heard.request.as_ref().unwrap().tenant == *tenant;
            for _ in cluster.heard.values().filter(mine).count()..alive[index] {
                number += 1;
                let request = Request { priority: priorities[index], ..sized(tenant, number) };
                cluster.submit(request).unwrap();
            }
        }
        cluster.turn();
        // Whoever has ended is counted and forgotten.
        let before: Vec<SequenceId> =
            cluster.heard.iter().filter(|(_, heard)| heard.finished.is_some()).map(|(&id, _)| id).collect();
        for id in before {
            let heard = cluster.heard.remove(&id).unwrap();
            let request = heard.request.unwrap();
            counts[usize::from(request.tenant.id == "b")] +=
                request.prompt.len() - heard.cached_tokens + heard.tokens.len();
        }
    }
    cluster.engine.check_integrity().unwrap();
    counts
}

fn crowded() -> EngineConfig {
    EngineConfig { max_num_seqs: 8, max_num_queued_reqs: 1000, max_num_batched_tokens: 32, ..small_config() }
}

#[test]
fn two_tenants_at_ten_to_one_load_are_served_the_same() {
    for (blocks, output_horizon, enable_prefix_caching) in [(100, 256, false), (100, 256, true), (24, 0, false)] {
        let config = EngineConfig { output_horizon, enable_prefix_caching, ..crowded() };
        let [a, b] = shares(config, blocks, [1, 1], [100, 10], [0, 0]);
        println!("{blocks} blocks, caching {enable_prefix_caching}: served {a} and {b} tokens");
        assert!(a.abs_diff(b) * 10 <= a.max(b), "served {a} and {b} tokens");
    }
}

#[test]
fn weights_divide_what_there_is() {
    for weights in [[1, 3], [5, 2], [1, 20]] {
        let [a, b] = shares(crowded(), 100, weights, [60, 60], [0, 0]);
        println!("weights {weights:?}: served {a} and {b} tokens");
        let [expected, found] = [f64::from(weights[0]) / f64::from(weights[1]), a as f64 / b as f64];
        assert!((found / expected - 1.0).abs() <= 0.1, "weights {weights:?}, served {a} and {b} tokens");
    }
}

#[test]
fn calling_everything_urgent_earns_nothing_from_others() {
    let [a, b] = shares(crowded(), 100, [1, 1], [60, 60], [1000, 0]);
    assert!(a.abs_diff(b) * 10 <= a.max(b), "served {a} and {b} tokens");
}

#[test]
fn whoever_comes_new_does_not_wait_behind_the_queue_of_another() {
    let mut cluster = Cluster::new(EngineConfig { max_num_queued_reqs: 500, ..crowded() }, 100, 100);
    let (busy, fresh) = (tenant("busy", 1), tenant("fresh", 1));
    for number in 0..400 {
        cluster.submit(sized(&busy, number)).unwrap();
    }
    (0..50).for_each(|_| assert!(cluster.turn()));
    let admitted_before = cluster.heard.values().filter(|heard| heard.admitted > 0).count();
    let id = cluster.submit(sized(&fresh, 7)).unwrap();
    while cluster.heard[&id].admitted == 0 {
        cluster.turn();
    }
    let admitted = cluster.heard.values().filter(|heard| heard.admitted > 0).count();
    assert!(admitted - admitted_before <= 2, "{} were admitted before it", admitted - admitted_before - 1);
    cluster.drain();
    cluster.check_outputs();
}

#[test]
fn whoever_was_served_most_makes_room_first() {
    let config = EngineConfig { enable_prefix_caching: false, ..small_config() };
    let mut cluster = Cluster::new(config, 14, 60);
    let (much, little) = (tenant("much", 1), tenant("little", 1));
    // The oldest and most urgent, but of a tenant with two others.
    let mut ids = Vec::new();
    for (seed, tenant, priority) in [(1, &much, 9), (2, &much, 8), (3, &much, 7), (4, &little, 0)] {
        let request = Request { tenant: tenant.clone(), priority, ..request(&[seed; 8], 30) };
        ids.push(cluster.submit(request).unwrap());
    }
    cluster.drain();
    cluster.check_outputs();
    assert!(cluster.engine.stats().totals.preemptions > 0);
    let ends: Vec<u64> = ids.iter().map(|id| cluster.heard[id].finished_at.unwrap()).collect();
    assert!(ends[3] < ends[1] && ends[3] < ends[2], "ends {ends:?}");
}

#[test]
fn nobody_is_preempted_for_want_of_room_that_was_kept() {
    let config = EngineConfig { output_horizon: 30, enable_prefix_caching: false, ..crowded() };
    let mut cluster = Cluster::new(config, 20, 60);
    for number in 0..60 {
        cluster.submit(sized(&tenant("a", 1), number)).unwrap();
    }
    cluster.drain();
    cluster.check_outputs();
    assert_eq!(cluster.engine.stats().totals.preemptions, 0);
}

#[test]
fn tokens_that_wait_are_limited_and_one_request_always_may() {
    let config = EngineConfig { max_queued_tokens: 50, max_num_seqs: 1, ..small_config() };
    let mut cluster = Cluster::new(config, 60, 60);
    cluster.submit(request(&[1; 20], 60)).unwrap();
    let fault = cluster.submit(request(&[1; 2], 2)).unwrap_err();
    assert_eq!(fault.kind, FaultKind::QueueFull);
    assert!(fault.message.contains("80 tokens wait") && fault.message.contains("50"), "{fault}");
    assert_eq!(cluster.engine.stats().waiting_tokens, 80);
    cluster.turn();
    assert_eq!(cluster.engine.stats().waiting_tokens, 0, "it runs now");
    // An open end counts as a usual answer, not as all that the context leaves.
    let open = Request { max_tokens: None, ..request(&[1; 20], 0) };
    cluster.submit(open).unwrap();
    assert_eq!(cluster.engine.stats().waiting_tokens, small_config().max_model_len);
}

#[test]
fn a_request_that_waited_for_too_long_is_refused_and_one_that_ran_is_not() {
    let config = EngineConfig { max_queue_age: Duration::from_secs(2), max_num_seqs: 1, ..small_config() };
    let mut cluster = Cluster::new(config, 60, 60);
    let runs = cluster.submit(request(&[1; 5], 40)).unwrap();
    cluster.turn();
    let waits = cluster.submit(request(&[2; 5], 4)).unwrap();
    let resumed = Request { resume: vec![7.into()], ..request(&[3; 5], 4) };
    let resumed = cluster.submit(resumed).unwrap();
    cluster.pass(Duration::from_secs(2));
    assert!(!cluster.heard[&waits].failed);
    // A failed epoch sends everybody back to the queue.
    cluster.end_epoch();
    cluster.pass(Duration::from_millis(1));
    assert!(cluster.heard[&waits].failed);
    let fault = cluster.heard[&waits].fault.clone().unwrap();
    assert_eq!(fault.kind, FaultKind::QueueFull);
    assert!(fault.retry_after.is_some() && fault.message.contains("longest wait is 2 s"), "{fault}");
    cluster.begin_epoch(60, 60);
    cluster.drain();
    assert_eq!(cluster.heard[&runs].finished, Some(FinishReason::Length));
    assert_eq!(cluster.heard[&resumed].finished, Some(FinishReason::Length));
    assert_eq!(cluster.engine.stats().totals.expired, 1);
}

#[test]
fn those_who_are_refused_are_told_when_a_tenth_of_the_queue_is_served() {
    let config = EngineConfig { max_num_queued_reqs: 40, enable_prefix_caching: false, ..small_config() };
    let mut cluster = Cluster::new(EngineConfig { max_num_seqs: 2, ..config }, 100, 100);
    assert_eq!(cluster.engine.stats().retry_after, Duration::ZERO);
    let fill = |cluster: &mut Cluster| loop {
        if let Err(fault) = cluster.submit(request(&[1; 8], 12)) {
            return fault;
        }
    };
    assert_eq!(fill(&mut cluster).retry_after, Some(Duration::from_secs(1)), "nothing was measured yet");
    // A step takes 20 ms and more, and two sequences run.
    for _ in 0..300 {
        cluster.pass(Duration::from_millis(20));
        cluster.turn();
    }
    let fault = fill(&mut cluster);
    let stats = cluster.engine.stats();
    let expected = stats.waiting_tokens as f64 / 10.0 / stats.tokens_per_second as f64;
    let told = fault.retry_after.unwrap();
    println!(
        "{} tokens wait, {} are served a second: retry after {told:?}",
        stats.waiting_tokens, stats.tokens_per_second
    );
    assert!((50..200).contains(&stats.tokens_per_second), "{stats:?}");
    assert_eq!(told, stats.retry_after);
    assert!((told.as_secs_f64() / expected - 1.0).abs() < 0.1, "{told:?}, expected {expected} s");
}
