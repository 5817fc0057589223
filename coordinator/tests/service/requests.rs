//! Requests: what they get, what is refused, and what is left of cancelled ones.

use std::{sync::atomic::Ordering, time::Duration};

use futures::future::join_all;
use phalanx_proto::{
    fault::{Fault, FaultKind},
    v1::{self, FinishReason},
};
use proptest::{
    prelude::{Rng, RngExt},
    test_runner::{RngAlgorithm, TestRng},
};
use tonic::Code;

use crate::{
    harness::{CONTEXT, Cluster, MODEL, deployment, limits, read, request},
    worker::continuation,
};

#[tokio::test(flavor = "multi_thread")]
async fn a_request_gets_the_tokens_that_the_ranks_sample() {
    let (cluster, _workers) = Cluster::ready(2, limits()).await;
    let prompt: Vec<u32> = (0..100).collect();
    let done = cluster.complete(v1::GenerateRequest { request_id: "r1".into(), ..request(&prompt, 20) }).await.unwrap();
    assert_eq!(done.tokens, continuation(&prompt, 20));
    assert_eq!((done.admitted.request_id.as_str(), done.admitted.prompt_tokens), ("r1", 100));
    assert_eq!((done.finished.reason(), done.finished.prompt_tokens), (FinishReason::Length, 100));
    assert_eq!(done.finished.completion_tokens, 20);
    let again = cluster.complete(request(&prompt, 20)).await.unwrap();
    assert_eq!(again.tokens, done.tokens);
    assert_eq!(again.finished.cached_tokens, 96, "six whole blocks of 16 are shared");
    assert!(!again.admitted.request_id.is_empty(), "the coordinator draws an id");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_token_is_delivered_last() {
    let (cluster, _workers) = Cluster::ready(1, limits()).await;
    let expected = continuation(&[7], 30);
    let stopping = v1::GenerateRequest { stop_token_ids: vec![expected[9]], ..request(&[7], 30) };
    let done = cluster.complete(stopping).await.unwrap();
    assert_eq!((done.tokens.as_slice(), done.finished.reason()), (&expected[..10], FinishReason::Stop));
}

#[tokio::test(flavor = "multi_thread")]
async fn concurrent_requests_get_what_each_gets_alone() {
    let (cluster, _workers) = Cluster::ready(2, limits()).await;
    let prompts: Vec<Vec<u32>> = (0..40).map(|i| (i..i + 1 + 3 * i % 70).collect()).collect();
    let all = join_all(prompts.iter().map(|prompt| cluster.complete(request(prompt, 40)))).await;
    for (prompt, done) in prompts.iter().zip(all) {
        assert_eq!(done.unwrap().tokens, continuation(prompt, 40));
    }
    let all_done = |load: &v1::DeploymentLoad| load.totals.as_ref().unwrap().finished_length == 40;
    let totals = cluster.wait_for(all_done).await.totals.unwrap();
    println!("{} steps, {} us each without a model", totals.steps, totals.step_us / totals.steps);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_resumed_request_goes_on_after_what_its_client_holds() {
    let (cluster, _workers) = Cluster::ready(1, limits()).await;
    let expected = continuation(&[1, 2, 3], 20);
    let resumed = v1::GenerateRequest { resume: expected[..8].to_vec(), ..request(&[1, 2, 3], 20) };
    let done = cluster.complete(resumed).await.unwrap();
    assert_eq!(done.tokens, expected[8..]);
    assert_eq!((done.finished.prompt_tokens, done.finished.completion_tokens), (3, 20));
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_asks_less_does_not_wait_for_whoever_asks_ten_times_as_much() {
    let (cluster, workers) = Cluster::ready(1, limits()).await;
    workers[0].step_takes(Duration::from_millis(2));
    let (done, mut order) = tokio::sync::mpsc::unbounded_channel();
    for (tenant, count) in [("much", 60_u32), ("little", 6)] {
        for number in 0..count {
            let of = Some(v1::Tenant { id: tenant.into(), weight: 1 });
            let stream = cluster.generate(v1::GenerateRequest { tenant: of, ..request(&[number], 30) });
            let (stream, done) = (stream.await.unwrap(), done.clone());
            tokio::spawn(async move {
                read(stream).await.unwrap();
                done.send(tenant).unwrap();
            });
        }
    }
    let (mut much, mut little) = (0, 0);
    while little < 6 {
        match order.recv().await.unwrap() {
            "much" => much += 1,
            _ => little += 1,
        }
    }
    println!("{much} requests of the one tenant ended before the 6 of the other");
    // Eight ran already when the other came, and both share eight places from then on.
    assert!(much <= 8 + 6 + 4, "{much} requests of the one tenant ended before the 6 of the other");
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_requests_name_their_field_and_the_next_one_works() {
    let (cluster, _workers) = Cluster::ready(1, limits()).await;
    let good = || request(&[1, 2], 2);
    let sampling = |sampling| v1::GenerateRequest { sampling: Some(sampling), ..good() };
    let of_tenant = |id, weight| v1::GenerateRequest { tenant: Some(v1::Tenant { id, weight }), ..good() };
    let cases = [
        (v1::GenerateRequest { prompt: vec![], ..good() }, FaultKind::InvalidArgument, "prompt"),
        (v1::GenerateRequest { prompt: vec![201_088], ..good() }, FaultKind::InvalidArgument, "prompt"),
        (v1::GenerateRequest { resume: vec![u32::MAX], ..good() }, FaultKind::InvalidArgument, "resume"),
        (v1::GenerateRequest { resume: vec![5; 3], ..good() }, FaultKind::InvalidArgument, "resume"),
        (v1::GenerateRequest { stop_token_ids: vec![1; 65], ..good() }, FaultKind::InvalidArgument, "stop_token_ids"),
        (v1::GenerateRequest { stop_token_ids: vec![201_088], ..good() }, FaultKind::InvalidArgument, "stop_token_ids"),
        (v1::GenerateRequest { request_id: "x".repeat(257), ..good() }, FaultKind::InvalidArgument, "request_id"),
        (v1::GenerateRequest { cache_salt: "x".repeat(257), ..good() }, FaultKind::InvalidArgument, "cache_salt"),
        (of_tenant("x".repeat(65), 1), FaultKind::InvalidArgument, "tenant.id"),
        (of_tenant("x".into(), 1001), FaultKind::InvalidArgument, "tenant.weight"),
        (v1::GenerateRequest { model: "other".into(), ..good() }, FaultKind::ModelNotFound, "model"),
        (v1::GenerateRequest { prompt: vec![1; CONTEXT + 1], ..good() }, FaultKind::ContextLength, "prompt"),
        (v1::GenerateRequest { max_tokens: Some(CONTEXT as u32), ..good() }, FaultKind::ContextLength, "max_tokens"),
        (
            sampling(v1::Sampling { temperature: Some(-1.0), ..Default::default() }),
            FaultKind::InvalidArgument,
            "temperature",
        ),
        (sampling(v1::Sampling { min_tokens: 3, ..Default::default() }), FaultKind::InvalidArgument, "min_tokens"),
    ];
    for (bad, kind, field) in cases {
        let fault = Fault::from(&cluster.complete(bad).await.unwrap_err());
        assert_eq!((fault.kind, fault.field.as_str()), (kind, field), "{}", fault.message);
    }
    let named = v1::GenerateRequest { model: MODEL.into(), ..good() };
    assert_eq!(cluster.complete(named).await.unwrap().tokens, continuation(&[1, 2], 2));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_running_id_is_refused_and_an_ended_one_may_be_used_again() {
    let (cluster, workers) = Cluster::ready(1, limits()).await;
    workers[0].step_takes(Duration::from_millis(5));
    let named = || v1::GenerateRequest { request_id: "same".into(), ..request(&[1], 20) };
    let first = cluster.generate(named()).await.unwrap();
    let fault = Fault::from(&cluster.generate(named()).await.unwrap_err());
    assert_eq!((fault.kind, fault.field.as_str()), (FaultKind::DuplicateRequest, "request_id"));
    read(first).await.unwrap();
    assert_eq!(cluster.complete(named()).await.unwrap().tokens, continuation(&[1], 20));
}

#[tokio::test(flavor = "multi_thread")]
async fn abort_ends_running_and_queued_requests() {
    let (cluster, workers) = Cluster::ready(1, limits()).await;
    workers[0].step_takes(Duration::from_millis(5));
    let named = |id: usize| v1::GenerateRequest { request_id: format!("r{id}"), ..request(&[id as u32], 200) };
    // The cache has 69 blocks, and each of them takes 13 in the end: five run, five wait.
    let streams = join_all((0..10).map(|id| cluster.generate(named(id)))).await;
    cluster.wait_for(|load| load.running == 5 && load.waiting == 5).await;
    for id in 0..10 {
        let answer = cluster.client.clone().abort(v1::AbortRequest { request_id: format!("r{id}") }).await.unwrap();
        assert!(answer.into_inner().aborted);
    }
    for (id, stream) in streams.into_iter().enumerate() {
        let done = read(stream.unwrap()).await.unwrap();
        assert_eq!(done.finished.reason(), FinishReason::Aborted);
        assert_eq!(done.tokens, continuation(&[id as u32], done.tokens.len()));
    }
    let unknown = cluster.client.clone().abort(v1::AbortRequest { request_id: "r0".into() }).await.unwrap();
    assert!(!unknown.into_inner().aborted);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_queue_is_refused_at_once() {
    let mut config = deployment(1);
    (config.max_num_seqs, config.max_num_queued_reqs) = (1, 2);
    let mut cluster = Cluster::start(config, limits()).await;
    let worker = cluster.worker(None);
    worker.step_takes(Duration::from_millis(20));
    cluster.wait_for(|load| load.state() == v1::GroupState::Ready).await;
    let running = join_all((0..3).map(|id| cluster.generate(request(&[id], 100)))).await;
    assert!(running.iter().all(Result::is_ok));
    let refused = cluster.generate(request(&[9], 1)).await.unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted);
    assert_eq!(Fault::from(&refused).kind, FaultKind::QueueFull);
    drop(running);
    cluster.wait_for(|load| load.running == 0 && load.waiting == 0).await;
    assert_eq!(cluster.complete(request(&[9], 3)).await.unwrap().tokens, continuation(&[9], 3));
    cluster.wait_for(|load| load.totals.as_ref().unwrap().refused == 1).await;
}

/// Cancels requests while they wait, prefill, decode, and at their last step, by hang-up and by `Abort`.
#[tokio::test(flavor = "multi_thread")]
async fn five_hundred_random_cancels_leave_nothing_behind() {
    let (cluster, workers) = Cluster::ready(2, limits()).await;
    let mut random = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    for worker in &workers {
        worker.step_takes(Duration::from_micros(300));
    }
    let mut cancels = 0;
    while cancels < 500 {
        let batch: Vec<_> = (0..25).map(|i| (cancels + i, random.next_u64())).collect();
        join_all(batch.iter().map(|&(id, draw)| cancel_somewhere(&cluster, id, draw))).await;
        cancels += batch.len();
        if random.random_ratio(1, 4) {
            let prompt = [cancels as u32, 3];
            assert_eq!(cluster.complete(request(&prompt, 9)).await.unwrap().tokens, continuation(&prompt, 9));
        }
    }
    let idle = |load: &v1::DeploymentLoad| load.running == 0 && load.waiting == 0 && load.kv_blocks_used == 0;
    let before = cluster.wait_for(idle).await.totals.unwrap().integrity_checks;
    cluster.complete(request(&[1], 1)).await.unwrap();
    let load = cluster.wait_for(|load| idle(load) && load.totals.as_ref().unwrap().integrity_checks > before).await;
    let totals = load.totals.unwrap();
    assert_eq!((totals.integrity_failures, totals.failed_epochs, load.epoch), (0, 0, 1));
    println!("{} aborted, {} finished first", totals.finished_aborted, totals.finished_length);
    assert!(totals.finished_aborted > 250, "most cancels met a live request: {}", totals.finished_aborted);
    // The retirement of the last sequences has reached every rank.
    for worker in &workers {
        assert_eq!(worker.conduct.sequences.load(Ordering::Relaxed), 0);
    }
}

async fn cancel_somewhere(cluster: &Cluster, id: usize, draw: u64) {
    let prompt: Vec<u32> = (0..1 + draw % 120).map(|i| (i * (1 + draw % 5)) as u32).collect();
    let max_tokens = 1 + (draw >> 8) % 60;
    let named = v1::GenerateRequest { request_id: format!("c{id}"), ..request(&prompt, max_tokens as u32) };
    let mut stream = cluster.generate(named).await.unwrap();
    // 0: while queued or prefilling; the largest: about when it ends by itself.
    let events = (draw >> 16) % (max_tokens + 2);
    for _ in 0..events {
        if stream.message().await.unwrap().is_none() {
            return;
        }
    }
    if draw >> 32 & 1 == 0 {
        return drop(stream);
    }
    cluster.client.clone().abort(v1::AbortRequest { request_id: format!("c{id}") }).await.unwrap();
    let mut terminal = 0;
    while let Some(event) = stream.message().await.unwrap() {
        terminal += u32::from(matches!(event.event, Some(v1::generate_event::Event::Finished(_))));
    }
    assert!(terminal <= 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_callers_trace_reaches_every_rank() {
    let (cluster, workers) = Cluster::ready(2, limits()).await;
    let traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let mut message = tonic::Request::new(request(&[4], 2));
    message.metadata_mut().insert("traceparent", traceparent.parse().unwrap());
    read(cluster.client.clone().generate(message).await.unwrap().into_inner()).await.unwrap();
    for worker in &workers {
        assert_eq!(worker.conduct.traceparents.lock().unwrap().as_slice(), [traceparent]);
    }
}
