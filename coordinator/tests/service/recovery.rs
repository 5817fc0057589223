//! Epochs that fail: ranks that differ, die or hang. Streams go on, and no token is lost or doubled.

use std::{sync::atomic::Ordering, time::Duration};

use futures::future::join_all;
use phalanx_coordinator::Limits;
use phalanx_proto::{
    fault::{Fault, FaultKind},
    v1::{self, GroupState},
};

use crate::{
    harness::{Cluster, limits, read, request},
    worker::{Worker, continuation},
};

fn totals(load: &v1::DeploymentLoad) -> v1::Totals {
    load.totals.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn ranks_that_differ_end_the_epoch_and_streams_go_on() {
    let (cluster, workers) = Cluster::ready(2, limits()).await;
    workers[1].conduct.lie_at.store(12, Ordering::Relaxed);
    let prompts: Vec<Vec<u32>> = (0..6).map(|i| (0..10 + i).collect()).collect();
    let all = join_all(prompts.iter().map(|prompt| cluster.complete(request(prompt, 60)))).await;
    for (prompt, done) in prompts.iter().zip(all) {
        let done = done.unwrap();
        assert_eq!(done.tokens, continuation(prompt, 60));
        assert_eq!((done.finished.prompt_tokens, done.finished.completion_tokens), (prompt.len() as u32, 60));
    }
    let load = cluster.wait_for(|load| load.running == 0).await;
    assert_eq!((load.epoch, totals(&load).failed_epochs, totals(&load).integrity_failures), (2, 1, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_worker_is_replaced_and_streams_go_on() {
    let (mut cluster, mut workers) = Cluster::ready(2, limits()).await;
    for worker in &workers {
        worker.step_takes(Duration::from_millis(2));
    }
    let mut stream = cluster.generate(request(&[1, 2, 3], 120)).await.unwrap();
    let mut before = Vec::new();
    while before.len() < 20 {
        if let v1::generate_event::Event::Tokens(chunk) = stream.message().await.unwrap().unwrap().event.unwrap() {
            before.extend(chunk.tokens.iter().map(|token| token.id));
        }
    }
    drop(workers.remove(1));
    let missed = "waiting for rank 1 of 2 to join; rank 1 was lost: ";
    cluster.wait_for(|load| load.state() == GroupState::Fenced && load.detail.starts_with(missed)).await;
    // A request that comes meanwhile waits instead of being refused.
    let waiting = cluster.generate(request(&[9], 5)).await.unwrap();
    let _replacement = cluster.worker(None);
    let rest = read(stream).await.unwrap();
    assert_eq!([before, rest.tokens].concat(), continuation(&[1, 2, 3], 120));
    assert_eq!(rest.finished.completion_tokens, 120);
    assert_eq!(read(waiting).await.unwrap().tokens, continuation(&[9], 5));
    assert_eq!(cluster.wait_for(|load| load.state() == GroupState::Ready).await.epoch, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hung_worker_is_noticed_by_the_step_deadline_and_replaced() {
    let brisk = Limits { step_deadline: Duration::from_millis(600), silence: Duration::from_millis(1000), ..limits() };
    let (mut cluster, workers) = Cluster::ready(2, brisk).await;
    for worker in &workers {
        worker.step_takes(Duration::from_millis(2));
    }
    let stream = cluster.generate(request(&[4, 4], 80)).await.unwrap();
    cluster.wait_for(|load| totals(load).generation_tokens > 10).await;
    workers[0].conduct.hangs.send_replace(true);
    let load = cluster.wait_for(|load| load.state() == GroupState::Fenced && load.ranks.len() == 1).await;
    assert!(load.detail.contains("rank 0 was lost: it answered no step and gave no sign of life"), "{}", load.detail);
    let _replacement = cluster.worker(Some(0));
    assert_eq!(read(stream).await.unwrap().tokens, continuation(&[4, 4], 80));
    // The worker that hung finds itself let go when it wakes, and what it says about its old epoch is not heard.
    workers[0].conduct.hangs.send_replace(false);
    assert_eq!(cluster.complete(request(&[4, 5], 10)).await.unwrap().tokens, continuation(&[4, 5], 10));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_hangs_while_nothing_runs_is_noticed_too_and_so_is_a_spare() {
    let brisk = Limits { silence: Duration::from_millis(600), ..limits() };
    let (mut cluster, workers) = Cluster::ready(2, brisk).await;
    let spare = cluster.worker(None);
    spare.conduct.hangs.send_replace(true);
    let _another = cluster.worker(None);
    workers[1].conduct.hangs.send_replace(true);
    cluster.wait_for(|load| load.state() == GroupState::Ready && load.epoch == 2).await;
    assert_eq!(cluster.complete(request(&[6], 6)).await.unwrap().tokens, continuation(&[6], 6));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_spare_takes_over_at_once() {
    let (mut cluster, mut workers) = Cluster::ready(2, limits()).await;
    let _spare = cluster.worker(None);
    let stream = cluster.generate(request(&[8], 200)).await.unwrap();
    drop(workers.remove(0));
    assert_eq!(read(stream).await.unwrap().tokens, continuation(&[8], 200));
    let load = cluster.wait_for(|load| load.state() == GroupState::Ready && load.epoch > 1).await;
    assert_eq!(load.ranks.len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_restarts_under_its_incarnation_replaces_itself() {
    let mut cluster = Cluster::start(crate::harness::deployment(1), limits()).await;
    let nature = cluster.nature(None);
    let _first = Worker::spawn(cluster.address, nature.clone());
    cluster.wait_for(|load| load.state() == GroupState::Ready).await;
    let _again = Worker::spawn(cluster.address, nature);
    let load = cluster.wait_for(|load| load.state() == GroupState::Ready && load.epoch == 2).await;
    assert_eq!(load.ranks.len(), 1);
    assert_eq!(cluster.complete(request(&[6], 6)).await.unwrap().tokens, continuation(&[6], 6));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_in_four_failed_epochs_is_given_up_and_the_next_one_works() {
    let (cluster, workers) = Cluster::ready(2, limits()).await;
    // Every epoch fails after a while, so that the request goes on a bit in each.
    workers[1].conduct.lies.store(4, Ordering::Relaxed);
    workers[1].conduct.lies_in.store(9, Ordering::Relaxed);
    let outcome = cluster.complete(request(&[1], 200)).await;
    let fault = match outcome {
        Ok(done) => panic!("finished with {:?}", done.tokens),
        Err(status) => Fault::from(&status),
    };
    assert_eq!(fault.kind, FaultKind::WorkerLost, "{}", fault.message);
    assert!(fault.message.contains("given up after 4 failed epochs"), "{}", fault.message);
    assert_eq!(cluster.complete(request(&[1], 50)).await.unwrap().tokens, continuation(&[1], 50));
    let load = cluster.wait_for(|load| load.running == 0).await;
    assert_eq!((load.epoch, totals(&load).failed_epochs), (5, 4));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_crashes_the_group_is_found_and_ended_and_the_others_go_on() {
    const POISON: u32 = 777;
    let (cluster, workers) = Cluster::ready(2, limits()).await;
    workers[1].conduct.poison.store(POISON, Ordering::Relaxed);
    for worker in &workers {
        worker.step_takes(Duration::from_millis(2));
    }
    let prompts: Vec<Vec<u32>> = (1..6).map(|i| vec![i; 3]).collect();
    let bystanders = join_all(prompts.iter().map(|prompt| cluster.complete(request(prompt, 200))));
    let poisoned = async {
        cluster.wait_for(|load| totals(load).generation_tokens > 20).await;
        Fault::from(&cluster.complete(request(&[POISON, 5], 200)).await.unwrap_err())
    };
    let (done, fault) = futures::join!(bystanders, poisoned);
    assert_eq!(fault.kind, FaultKind::Internal, "{}", fault.message);
    assert!(fault.message.contains("in flight in 3 crashes in a row"), "{}", fault.message);
    for (prompt, done) in prompts.iter().zip(done) {
        assert_eq!(done.unwrap().tokens, continuation(prompt, 200));
    }
    let load = cluster.wait_for(|load| load.running == 0).await;
    assert_eq!((totals(&load).failed_epochs, totals(&load).integrity_failures), (3, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_group_that_fails_again_and_again_is_degraded_and_says_why() {
    let (cluster, workers) = Cluster::ready(2, limits()).await;
    workers[1].conduct.lies.store(6, Ordering::Relaxed);
    for _ in 0..2 {
        let fault = Fault::from(&cluster.complete(request(&[1], 50)).await.unwrap_err());
        assert_eq!(fault.kind, FaultKind::Internal, "{}", fault.message);
    }
    assert_eq!(cluster.complete(request(&[1], 50)).await.unwrap().tokens, continuation(&[1], 50));
    let load = cluster.wait_for(|load| load.state() == GroupState::Ready).await;
    assert!(load.detail.starts_with("degraded: 6 epochs failed within the last minute, the last one: "), "{load:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_do_not_wait_for_ever_for_a_group_that_does_not_come_back() {
    let hasty = Limits { group_stall: Duration::from_millis(300), ..limits() };
    let (cluster, mut workers) = Cluster::ready(1, hasty).await;
    workers[0].step_takes(Duration::from_millis(5));
    let stream = cluster.generate(request(&[1], 100)).await.unwrap();
    drop(workers.remove(0));
    let fault = Fault::from(&read(stream).await.unwrap_err());
    assert_eq!(fault.kind, FaultKind::WorkerLost);
    assert!(fault.message.contains("did not form again"), "{}", fault.message);
}
