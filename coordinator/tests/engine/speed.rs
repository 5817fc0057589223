//! What a decode step costs the coordinator.

use std::time::{Duration, Instant};

use phalanx_coordinator::engine::{Engine, EngineConfig};
use phalanx_proto::{ids::Epoch, plan::Plan, v1};

use crate::cluster::request;

/// What a rank would report, without a rank.
fn answer(plan: &Plan) -> Vec<v1::SampledToken> {
    let token = |id| Some(v1::Token { id, logprob: None, top: Vec::new() });
    let sampling = plan.slices.iter().filter(|slice| slice.sample);
    sampling.map(|slice| v1::SampledToken { sequence: slice.sequence.0, token: token(5) }).collect()
}

#[test]
fn a_decode_step_of_256_sequences_is_planned_and_applied_within_200_microseconds() {
    let config = EngineConfig {
        block_size: 16,
        sliding_window: 128,
        has_full_layers: true,
        has_sliding_layers: true,
        max_model_len: 4096,
        max_num_batched_tokens: 2048,
        max_num_seqs: 256,
        max_num_queued_reqs: 256,
        max_queued_tokens: usize::MAX,
        max_queue_age: Duration::MAX,
        output_horizon: 256,
        window: 2,
        enable_prefix_caching: true,
    };
    let mut engine = Engine::new(config).unwrap();
    engine.begin_epoch(Epoch(1), 40_000, 6_000);
    for seed in 0..256_u32 {
        let prompt: Vec<u32> = (0..200).map(|i| (i * seed) % 1000).collect();
        engine.submit(request(&prompt, 2000), Duration::ZERO).unwrap();
    }
    let now = Duration::ZERO;
    let mut before = engine.next_plan(now).unwrap();
    let mut times = Vec::new();
    for _ in 0..1200 {
        let sampled = answer(&before);
        let step = before.step;
        let start = Instant::now();
        let next = engine.next_plan(now);
        let events = engine.apply(step, &sampled, &[], now).unwrap();
        let spent = start.elapsed();
        before = next.unwrap();
        if events.len() == 256 && before.slices.len() == 256 {
            times.push(spent);
        }
    }
    assert!(times.len() > 1000, "only {} steps were pure decodes", times.len());
    engine.check_integrity().unwrap();
    times.sort_unstable();
    let (median, p99) = (times[times.len() / 2], times[times.len() * 99 / 100]);
    println!("next_plan + apply of 256 decodes: median {median:?}, p99 {p99:?}");
    assert!(median < Duration::from_micros(200), "median {median:?}");
}
