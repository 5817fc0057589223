//! Workers against a coordinator that the test plays: the life of a group over real gRPC.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod coordinator;
mod script;

use std::{net::SocketAddr, path::PathBuf};

use phalanx_proto::{
    fault::{Fault, FaultKind},
    plan::message_digest,
    v1::{self, worker_command::Command},
};
use phalanx_worker::{
    config::{BackendKind, Config},
    join,
};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use self::{
    coordinator::{Attachment, Coordinator, StepLog},
    script::{BLOCK_SIZE, BLOCKS, completions, conversations, greedy, log, model_dir},
};

fn config(coordinator: SocketAddr, rank: u32) -> Config {
    Config {
        threads: 1,
        rank: Some(rank),
        memory_bytes: Some(1 << 30),
        ..Config::new(&coordinator.to_string(), "nano", model_dir())
    }
}

/// A worker that runs within the test.
struct Member {
    attachment: Attachment,
    hello: v1::Hello,
    shutdown: CancellationToken,
    worker: JoinHandle<anyhow::Result<()>>,
}

async fn start(coordinator: &mut Coordinator, config: Config) -> Member {
    let shutdown = CancellationToken::new();
    let worker = tokio::spawn(join::run(config, shutdown.clone()));
    let (attachment, hello) = coordinator.attached().await;
    Member { attachment, hello, shutdown, worker }
}

/// A worker that would like to be rank 0.
async fn start_first(coordinator: &mut Coordinator) -> Member {
    let config = config(coordinator.address, 0);
    start(coordinator, config).await
}

/// A group of two whose shards are resident.
async fn loaded(coordinator: &mut Coordinator) -> Vec<Member> {
    let mut members = Vec::new();
    for rank in 0..2 {
        let config = config(coordinator.address, rank);
        let mut member = start(coordinator, config).await;
        member.attachment.assign(rank, 2).await;
        members.push(member);
    }
    members
}

/// Forms `epoch` and returns its step logs, by rank.
async fn form(coordinator: &mut Coordinator, epoch: u64, members: &mut [Member]) -> Vec<StepLog> {
    let mut rendezvous = Vec::new();
    for member in &mut *members {
        rendezvous.push(member.attachment.prepare(epoch, member.hello.incarnation).await);
    }
    for member in &*members {
        let form = form_message(epoch, member.hello.incarnation, rendezvous.clone());
        member.attachment.tell(Command::Form(form)).await;
    }
    for member in &mut *members {
        member.attachment.formed(epoch).await;
    }
    let mut logs: Vec<(StepLog, v1::StepJoin)> = Vec::new();
    for _ in 0..members.len() {
        logs.push(coordinator.joined().await);
    }
    logs.sort_by_key(|(_, join)| join.rank);
    for (member, (_, join)) in members.iter().zip(&logs) {
        assert_eq!((join.epoch, join.incarnation), (epoch, member.hello.incarnation));
    }
    logs.into_iter().map(|(log, _)| log).collect()
}

fn form_message(epoch: u64, incarnation: u64, rendezvous: Vec<Vec<u8>>) -> v1::Form {
    let blocks = BLOCKS as u32;
    v1::Form {
        epoch,
        incarnation,
        rendezvous,
        kv: Some(v1::KvCacheShape { block_size: BLOCK_SIZE as u32, full_blocks: blocks, sliding_blocks: blocks }),
        max_batch_tokens: 256,
        max_batch_sequences: 8,
    }
}

/// Sends plans to all ranks, two ahead of the results, and returns rank 0's.
async fn step(logs: &mut [StepLog], plans: &[v1::Plan]) -> Vec<v1::StepResult> {
    let mut results = Vec::new();
    for index in 0..plans.len() + 2 {
        if let Some(plan) = plans.get(index) {
            for log in &*logs {
                log.plan(plan.clone()).await;
            }
        }
        let Some(plan) = index.checked_sub(2).map(|index| &plans[index]) else { continue };
        let mut ranks = Vec::new();
        for log in &mut *logs {
            ranks.push(log.result().await.expect("a result of every rank"));
        }
        for result in &ranks {
            assert_eq!((result.epoch, result.step, result.plan_digest), (plan.epoch, plan.step, message_digest(plan)));
            assert_eq!(result.token_digest, ranks[0].token_digest);
        }
        results.push(ranks.remove(0));
    }
    results
}

async fn leave(members: Vec<Member>) {
    for member in members {
        member.attachment.tell(Command::Leave(v1::Leave { reason: "the test is over".into() })).await;
        member.worker.await.unwrap().unwrap();
    }
}

fn golden() -> Vec<Vec<u32>> {
    conversations().into_iter().map(|conversation| conversation.completion_ids).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn two_workers_load_form_and_step_to_the_golden_completions() {
    let mut coordinator = Coordinator::listen().await;
    let mut members = loaded(&mut coordinator).await;
    for (rank, member) in members.iter().enumerate() {
        let hello = &member.hello;
        assert_eq!((hello.deployment.as_str(), hello.backend.as_str()), ("nano", "cpu"));
        assert_eq!((hello.wanted_rank, hello.highest_epoch, &hello.resident), (Some(rank as u32), 0, &None));
        assert_eq!((hello.memory_bytes, hello.device.is_empty()), (1 << 30, false));
    }
    let (first, second) = (&members[0].hello, &members[1].hello);
    assert_eq!((&first.host, first.checkpoint_digest), (&second.host, second.checkpoint_digest));
    assert_ne!(first.incarnation, second.incarnation);

    let mut logs = form(&mut coordinator, 1, &mut members).await;
    let results = step(&mut logs, &log(1, &conversations(), &greedy())).await;
    assert_eq!(completions(&results), golden());
    let timing = results[5].timing.unwrap();
    assert!(timing.execute_us >= timing.collective_us && timing.collective_us > 0);
    leave(members).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rank_that_blocks_is_fenced_and_the_group_forms_again_over_the_same_weights() {
    let mut coordinator = Coordinator::listen().await;
    let mut members = loaded(&mut coordinator).await;
    let mut logs = form(&mut coordinator, 3, &mut members).await;
    let plans = log(3, &conversations(), &greedy());
    step(&mut logs, &plans[..4]).await;
    // Rank 1 never sees this plan, so rank 0 blocks in its first sum, for ever.
    logs[0].plan(plans[4].clone()).await;
    for member in &members {
        member.attachment.tell(Command::Fence(v1::Fence { epoch: 3 })).await;
    }
    assert!(logs[0].result().await.is_none() && logs[1].result().await.is_none(), "a fenced epoch gives no results");

    // No loading in between: the next thing each worker says is that it is prepared.
    let mut logs = form(&mut coordinator, 4, &mut members).await;
    let results = step(&mut logs, &log(4, &conversations(), &greedy())).await;
    assert_eq!(completions(&results), golden());
    leave(members).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_coordinator_that_is_gone_finds_the_weights_when_it_is_back() {
    let mut coordinator = Coordinator::listen().await;
    let mut members = loaded(&mut coordinator).await;
    let logs = form(&mut coordinator, 9, &mut members).await;
    logs[0].plan(log(9, &conversations(), &greedy()).remove(0)).await;
    // Both streams of both workers break while rank 0 is in the middle of a step.
    let mut again = Vec::new();
    let mut old = Vec::new();
    for Member { attachment, hello, shutdown, worker } in members {
        drop(attachment);
        old.push((hello, shutdown, worker));
    }
    drop(logs);
    for _ in 0..2 {
        let (mut attachment, hello) = coordinator.attached().await;
        let resident = hello.resident.clone().expect("the shard is still there");
        assert_eq!((resident.world_size, hello.highest_epoch), (2, 9));
        let position = old.iter().position(|(old, _, _)| old.incarnation == hello.incarnation);
        let (_, shutdown, worker) = old.remove(position.expect("the same process"));
        // The same shard is not loaded again.
        attachment.tell(Command::Assign(resident.clone())).await;
        let (news, signs) = attachment.news().await;
        assert!(matches!(news, Some(v1::worker_event::Event::Loaded(_))) && signs == 0, "{news:?}");
        again.push((resident.rank, Member { attachment, hello, shutdown, worker }));
    }
    again.sort_by_key(|(rank, _)| *rank);
    let mut members: Vec<Member> = again.into_iter().map(|(_, member)| member).collect();
    let mut logs = form(&mut coordinator, 10, &mut members).await;
    let results = step(&mut logs, &log(10, &conversations()[..1], &greedy())).await;
    assert_eq!(completions(&results)[0], golden()[0]);
    leave(members).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn epochs_that_are_not_newer_or_meant_for_another_process_are_refused() {
    let mut coordinator = Coordinator::listen().await;
    let mut member = start_first(&mut coordinator).await;
    let incarnation = member.hello.incarnation;
    member.attachment.assign(0, 1).await;
    let rendezvous = member.attachment.prepare(5, incarnation).await;
    for epoch in [4, 5] {
        member.attachment.tell(Command::Prepare(v1::Prepare { epoch, incarnation })).await;
        let fault = member.attachment.fault().await;
        assert_eq!((fault.epoch, fault.kind.as_str()), (epoch, "stale_epoch"), "{}", fault.message);
    }
    // Neither another incarnation's messages nor an unprepared epoch's form change anything.
    member.attachment.tell(Command::Prepare(v1::Prepare { epoch: 6, incarnation: incarnation ^ 1 })).await;
    member.attachment.tell(Command::Form(form_message(5, incarnation ^ 1, vec![rendezvous.clone()]))).await;
    member.attachment.tell(Command::Form(form_message(6, incarnation, vec![rendezvous.clone()]))).await;
    assert_eq!(member.attachment.fault().await.kind, "stale_epoch");
    member.attachment.tell(Command::Form(form_message(5, incarnation, vec![rendezvous]))).await;
    member.attachment.formed(5).await;
    let (mut steps, _) = coordinator.joined().await;

    // A plan of another epoch ends this one, and the coordinator is told.
    steps.plan(v1::Plan { epoch: 4, step: 1, ..Default::default() }).await;
    let fault = member.attachment.fault().await;
    assert_eq!((fault.epoch, fault.kind.as_str()), (5, "stale_epoch"), "{}", fault.message);
    assert!(steps.result().await.is_none());
    member.shutdown.cancel();
    member.worker.await.unwrap().unwrap();
}

/// What a worker of this configuration tells before it ends, as the coordinator hears it and as the process says it.
async fn refusal(change: impl FnOnce(&mut Config)) -> (v1::WorkerFault, String) {
    let mut coordinator = Coordinator::listen().await;
    let mut config = config(coordinator.address, 0);
    change(&mut config);
    let mut member = start(&mut coordinator, config).await;
    let fault = member.attachment.fault().await;
    drop(member.attachment);
    let error = member.worker.await.unwrap().expect_err("the process fails");
    (fault, format!("{error:#}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_cannot_start_says_why_to_coordinator_and_caller() {
    let copy = tempfile::tempdir().unwrap();
    for file in ["config.json", "tokenizer.json", "model.safetensors"] {
        std::fs::copy(model_dir().join(file), copy.path().join(file)).unwrap();
    }
    let weights = std::fs::OpenOptions::new().write(true).open(copy.path().join("model.safetensors")).unwrap();
    weights.set_len(5_000_000).unwrap();
    let truncated: PathBuf = copy.path().to_owned();
    let (fault, error) = refusal(|config| config.model_dir = truncated).await;
    assert_eq!((fault.kind.as_str(), &fault.message), ("checkpoint", &error));
    assert!(error.contains("model.safetensors: truncated: tensor "), "{error}");

    let (fault, error) = refusal(|config| config.model_dir = "/nonexistent".into()).await;
    assert_eq!((fault.kind.as_str(), &fault.message), ("checkpoint", &error));
    assert!(error.contains("/nonexistent/config.json"), "{error}");

    let (fault, error) = refusal(|config| config.backend = BackendKind::Cuda).await;
    assert_eq!((fault.kind.as_str(), &fault.message), ("unsupported", &error));

    let (fault, error) = refusal(|config| (config.threads, config.memory_utilization) = (0, 1.5)).await;
    assert_eq!((fault.kind.as_str(), &fault.message), ("invalid_argument", &error));
    assert!(error.contains("threads is 0") && error.contains("memory utilization is 1.5"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_that_lasts_ends_the_worker_and_another_does_not() {
    let mut coordinator = Coordinator::listen().await;
    coordinator.refuse(Fault::new(FaultKind::QueueFull, "as many spares as ranks are enough"));
    coordinator.refuse(Fault::new(FaultKind::Checkpoint, "use equal files"));
    let config = config(coordinator.address, 0);
    let error = join::run(config.clone(), CancellationToken::new()).await.expect_err("the second refusal lasts");
    assert_eq!(error.to_string(), "the coordinator refuses this worker: use equal files");
    coordinator.refuse(Fault::new(FaultKind::QueueFull, "as many spares as ranks are enough"));
    leave(vec![start(&mut coordinator, config).await]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn shards_that_do_not_fit_end_the_worker_with_the_numbers() {
    for (memory, world_size, kind, part) in [
        (5_000_000, 1, "out_of_memory", "rank 0 of 1 needs "),
        (1 << 30, 3, "invalid_argument", "sizes that fit: [1, 2, 4]"),
    ] {
        let mut coordinator = Coordinator::listen().await;
        let config = Config { memory_bytes: Some(memory), ..config(coordinator.address, 0) };
        let mut member = start(&mut coordinator, config).await;
        let assign = v1::Assign { rank: 0, world_size, parallelism: "tp".into() };
        member.attachment.tell(Command::Assign(assign)).await;
        let fault = member.attachment.fault().await;
        assert_eq!(fault.kind, kind, "{}", fault.message);
        drop(member.attachment);
        let error = format!("{:#}", member.worker.await.unwrap().expect_err("the process fails"));
        assert!(error == fault.message && error.contains(part), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kv_cache_that_does_not_fit_fails_the_epoch_and_not_the_worker() {
    let mut coordinator = Coordinator::listen().await;
    let mut member = start_first(&mut coordinator).await;
    member.attachment.assign(0, 1).await;
    let rendezvous = member.attachment.prepare(1, member.hello.incarnation).await;
    let mut form = form_message(1, member.hello.incarnation, vec![rendezvous]);
    form.kv = Some(v1::KvCacheShape { block_size: 16, full_blocks: 10_000_000, sliding_blocks: 1 });
    member.attachment.tell(Command::Form(form)).await;
    let fault = member.attachment.fault().await;
    assert_eq!((fault.epoch, fault.kind.as_str()), (1, "out_of_memory"), "{}", fault.message);

    let logs = form_again(&mut coordinator, &mut member).await;
    assert_eq!(logs.len(), 1);
    leave(vec![member]).await;
}

async fn form_again(coordinator: &mut Coordinator, member: &mut Member) -> Vec<StepLog> {
    form(coordinator, 2, std::slice::from_mut(member)).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_waits_for_its_coordinator_and_stops_when_told() {
    let address = Coordinator::listen().await.address;
    let shutdown = CancellationToken::new();
    let mut coordinator = Coordinator::listen().await;
    let unreachable = Config { coordinators: vec![address.to_string()], ..config(coordinator.address, 0) };
    let waiting = tokio::spawn(join::run(unreachable, shutdown.clone()));
    // Another worker gets through its whole start meanwhile.
    let member = start_first(&mut coordinator).await;
    assert!(!waiting.is_finished());
    shutdown.cancel();
    waiting.await.unwrap().unwrap();
    member.shutdown.cancel();
    member.worker.await.unwrap().unwrap();
}
