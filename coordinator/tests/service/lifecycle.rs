//! How a group comes to be, what is said meanwhile, and how it ends.

use std::time::Duration;

use phalanx_coordinator::{Config, Limits, membership::MembershipConfig};
use phalanx_proto::{
    fault::{Fault, FaultKind},
    v1::{self, GroupState, inference_client::InferenceClient},
};
use tokio::time::timeout;
use tonic::{Code, transport::Channel};
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};
use tonic_reflection::pb::v1::{
    ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
    server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
};

use crate::{
    harness::{CONTEXT, Cluster, MODEL, PATIENCE, deployment, limits, read, request},
    worker::{Worker, continuation},
};

async fn channel(cluster: &Cluster) -> Channel {
    Channel::from_shared(format!("http://{}", cluster.address)).unwrap().connect().await.unwrap()
}

async fn health(cluster: &Cluster, service: &str) -> ServingStatus {
    let request = HealthCheckRequest { service: service.into() };
    HealthClient::new(channel(cluster).await).check(request).await.unwrap().into_inner().status()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_group_becomes_ready_when_all_its_workers_are_there() {
    let mut cluster = Cluster::start(deployment(2), limits()).await;
    let load = cluster.wait_for(|load| load.state() == GroupState::Joining).await;
    assert_eq!(load.detail, "waiting for ranks 0, 1 of 2 to join");
    let refused = Fault::from(&cluster.generate(request(&[1], 1)).await.unwrap_err());
    assert_eq!(refused.kind, FaultKind::NotReady);
    assert!(refused.message.contains("waiting for ranks 0, 1 of 2 to join"), "{}", refused.message);
    assert_eq!(health(&cluster, "").await, ServingStatus::NotServing);

    let _late = cluster.worker(Some(1));
    cluster.wait_for(|load| load.detail == "waiting for rank 0 of 2 to join").await;
    let first = cluster.worker(None);
    let load = cluster.wait_for(|load| load.state() == GroupState::Ready).await;
    assert_eq!((load.epoch, load.detail.as_str(), load.ranks.len()), (1, "", 2));
    assert!(load.ranks.iter().all(|rank| rank.loaded_bytes == 1000 && rank.kv_bytes > 0 && rank.device == "toy"));
    cluster.complete(request(&[1], 1)).await.unwrap();
    for service in ["", "phalanx.v1.Inference", "phalanx.v1.Cluster"] {
        assert_eq!(health(&cluster, service).await, ServingStatus::Serving);
    }
    let form = first.conduct.formed.lock().unwrap().clone().unwrap();
    assert_eq!((form.rendezvous.len(), form.max_batch_tokens, form.max_batch_sequences), (2, 64, 8));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_kv_cache_is_cut_for_the_rank_with_the_least_memory() {
    let mut cluster = Cluster::start(deployment(2), limits()).await;
    let mut small = cluster.nature(Some(1));
    // 4 key-value heads of 64, keys and values, 4 bytes, 12 layers of each kind, 16 tokens.
    let block = 2 * 4 * 64 * 4 * 12 * 16;
    small.free_bytes = 60 * block + 17;
    let workers = [cluster.worker(Some(0)), Worker::spawn(cluster.address, small)];
    cluster.wait_for(|load| load.state() == GroupState::Ready).await;
    for worker in workers {
        let kv = worker.conduct.formed.lock().unwrap().clone().unwrap().kv.unwrap();
        assert_eq!(kv.block_size, 16);
        assert!(kv.full_blocks >= CONTEXT as u32 / 16 && kv.sliding_blocks >= 10);
        assert_eq!(kv.full_blocks + kv.sliding_blocks, 60);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn too_little_memory_fails_the_group_with_the_numbers() {
    let mut cluster = Cluster::start(deployment(1), limits()).await;
    let mut poor = cluster.nature(None);
    poor.free_bytes = 1 << 20;
    let _worker = Worker::spawn(cluster.address, poor);
    let load = cluster.wait_for(|load| load.state() == GroupState::Failed).await;
    assert!(load.detail.contains("1048576 are available") && load.detail.contains("max_model_len"), "{}", load.detail);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_context_that_nobody_asked_for_is_as_long_as_the_cache() {
    let mut config = deployment(1);
    config.max_model_len = None;
    let mut cluster = Cluster::start(config, limits()).await;
    let mut poor = cluster.nature(None);
    // 8 key-value heads this time; 10 full blocks beside the 12 sliding ones that one sequence needs.
    poor.free_bytes = 22 * 2 * 8 * 64 * 4 * 12 * 16;
    let _worker = Worker::spawn(cluster.address, poor);
    let load = cluster.wait_for(|load| load.state() == GroupState::Ready).await;
    assert_eq!(load.deployment.unwrap().max_model_len, 160);
    let models = cluster.client.clone().models(v1::ModelsRequest {}).await.unwrap().into_inner().deployments;
    assert_eq!(models[0].max_model_len, 160);
    assert_eq!(cluster.complete(request(&[1; 100], 60)).await.unwrap().tokens, continuation(&[1; 100], 60));
    let unbounded = v1::GenerateRequest { max_tokens: None, ..request(&[1; 100], 0) };
    let tokens = cluster.complete(unbounded).await.unwrap().tokens;
    assert!((60..=61).contains(&tokens.len()), "the token sampled last needs no place: {}", tokens.len());
    let refused = Fault::from(&cluster.complete(request(&[1; 100], 80)).await.unwrap_err());
    assert_eq!(refused.kind, FaultKind::ContextLength);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_cannot_load_fails_the_group_until_another_one_comes() {
    let mut cluster = Cluster::start(deployment(1), limits()).await;
    let mut broken = cluster.nature(None);
    let message = "model-00001-of-00002.safetensors: truncated: tensor lm_head.weight ends at byte 9".to_owned();
    broken.load_fault = Some(v1::WorkerFault { epoch: 0, kind: "checkpoint".into(), message: message.clone() });
    let worker = Worker::spawn(cluster.address, broken);
    let load = cluster.wait_for(|load| load.state() == GroupState::Failed).await;
    assert_eq!(load.detail, format!("rank 0: {message}"));
    let refused = Fault::from(&cluster.generate(request(&[1], 1)).await.unwrap_err());
    assert!(refused.kind == FaultKind::NotReady && refused.message.contains(&message), "{}", refused.message);
    drop(worker);
    cluster.wait_for(|load| load.ranks.is_empty()).await;
    let _good = cluster.worker(None);
    cluster.wait_for(|load| load.state() == GroupState::Ready).await;
    cluster.complete(request(&[1], 1)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn workers_that_do_not_belong_are_refused_with_the_reason() {
    let mut cluster = Cluster::start(deployment(1), limits()).await;
    let mut other_backend = cluster.nature(None);
    other_backend.hello.backend = "cuda".into();
    let mut other_files = cluster.nature(None);
    other_files.hello.checkpoint_digest ^= 1;
    let mut nobody = cluster.nature(None);
    nobody.hello.incarnation = 0;
    let mut other_model = cluster.nature(None);
    other_model.hello.deployment = "gpt-oss-120b".into();
    let cases = [
        (nobody, Code::InvalidArgument, "incarnation"),
        (other_backend, Code::Unimplemented, "\"cuda\""),
        (other_files, Code::FailedPrecondition, "digest"),
        (other_model, Code::NotFound, "gpt-oss-20b"),
    ];
    for (nature, code, says) in cases {
        let mut worker = Worker::spawn(cluster.address, nature);
        let status = timeout(PATIENCE, &mut worker.task).await.unwrap().unwrap().unwrap_err();
        assert!(status.code() == code && status.message().contains(says), "{status}");
    }
    assert_eq!(cluster.wait_for(|_| true).await.state(), GroupState::Joining);
}

#[tokio::test(flavor = "multi_thread")]
async fn epochs_exceed_what_workers_and_earlier_coordinators_have_seen() {
    let state = tempfile::tempdir().unwrap();
    let config = || {
        let membership = MembershipConfig::Directory(state.path().to_owned());
        Config { deployments: vec![deployment(1)], membership, limits: limits(), ..Config::default() }
    };
    let mut cluster = Cluster::start_with(config()).await;
    let mut nature = cluster.nature(None);
    nature.hello.highest_epoch = 7;
    let _worker = Worker::spawn(cluster.address, nature);
    assert_eq!(cluster.wait_for(|load| load.state() == GroupState::Ready).await.epoch, 8);
    cluster.shutdown.cancel();
    timeout(PATIENCE, &mut cluster.run).await.unwrap().unwrap().unwrap();

    let mut cluster = Cluster::start_with(config()).await;
    let _worker = cluster.worker(None);
    assert_eq!(cluster.wait_for(|load| load.state() == GroupState::Ready).await.epoch, 9);
}

#[tokio::test(flavor = "multi_thread")]
async fn reflection_and_models_say_what_is_served() {
    let cluster = Cluster::start(deployment(2), limits()).await;
    let list = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let mut client = ServerReflectionClient::new(channel(&cluster).await);
    let mut answers = client.server_reflection_info(futures::stream::iter([list])).await.unwrap().into_inner();
    let answer = answers.message().await.unwrap().unwrap().message_response.unwrap();
    let MessageResponse::ListServicesResponse(services) = answer else { panic!("{answer:?}") };
    let names: Vec<String> = services.service.into_iter().map(|service| service.name).collect();
    for expected in ["grpc.health.v1.Health", "phalanx.v1.Cluster", "phalanx.v1.Inference"] {
        assert!(names.iter().any(|name| name == expected), "{names:?}");
    }
    let models = cluster.client.clone().models(v1::ModelsRequest {}).await.unwrap().into_inner().deployments;
    assert_eq!(models.len(), 1);
    assert_eq!((models[0].model.as_str(), models[0].world_size, models[0].max_model_len), (MODEL, 2, CONTEXT as u32));
    assert_eq!(models[0].eos_token_ids, [200_002, 199_999, 200_012]);
    assert!((20_000_000_000..22_000_000_000).contains(&models[0].parameters));
}

#[tokio::test(flavor = "multi_thread")]
async fn two_models_are_served_side_by_side() {
    let mut second = deployment(1);
    second.served_model_name = "another".into();
    let config = Config { deployments: vec![deployment(1), second], limits: limits(), ..Config::default() };
    let mut cluster = Cluster::start_with(config).await;
    let _first = cluster.worker(None);
    cluster.wait_for(|load| load.state() == GroupState::Ready).await;
    let to = |model: &str| v1::GenerateRequest { model: model.into(), ..request(&[3], 4) };
    assert_eq!(cluster.complete(to(MODEL)).await.unwrap().tokens, continuation(&[3], 4));
    let refused = cluster.complete(to("another")).await.unwrap_err();
    assert_eq!(Fault::from(&refused).kind, FaultKind::NotReady);
    assert_eq!(Fault::from(&cluster.complete(to("")).await.unwrap_err()).kind, FaultKind::ModelNotFound);
    let mut nature = cluster.nature(None);
    nature.hello.deployment = "another".into();
    let _second = Worker::spawn(cluster.address, nature);
    timeout(PATIENCE, async {
        while cluster.complete(to("another")).await.is_err() {
            tokio::task::yield_now().await;
        }
    })
    .await
    .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn shutdown_finishes_what_runs_and_takes_nothing_new() {
    let (mut cluster, workers) = Cluster::ready(2, limits()).await;
    workers[0].step_takes(Duration::from_millis(10));
    let running = cluster.generate(request(&[5], 50)).await.unwrap();
    cluster.shutdown.cancel();
    cluster.wait_for(|load| load.state() == GroupState::Draining).await;
    let refused = Fault::from(&cluster.generate(request(&[6], 1)).await.unwrap_err());
    assert_eq!(refused.kind, FaultKind::Draining);
    assert_eq!(read(running).await.unwrap().tokens, continuation(&[5], 50));
    timeout(PATIENCE, &mut cluster.run).await.unwrap().unwrap().unwrap();
    for mut worker in workers {
        timeout(PATIENCE, &mut worker.task).await.unwrap().unwrap().unwrap();
        assert_eq!(worker.conduct.left.lock().unwrap().as_deref(), Some("the coordinator is shutting down"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn shutdown_cuts_what_outlasts_the_grace_period() {
    let short = Limits { drain_grace: Duration::from_millis(100), ..limits() };
    let (mut cluster, workers) = Cluster::ready(1, short).await;
    workers[0].step_takes(Duration::from_millis(50));
    let running = cluster.generate(request(&[5], 200)).await.unwrap();
    cluster.shutdown.cancel();
    assert_eq!(Fault::from(&read(running).await.unwrap_err()).kind, FaultKind::Draining);
    timeout(PATIENCE, &mut cluster.run).await.unwrap().unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_does_not_read_is_cancelled_and_others_go_on() {
    let mut config = deployment(1);
    config.max_model_len = Some(131_072);
    config.kv_cache_memory_bytes = Some(8 << 30);
    let impatient = Limits { client_stall: Duration::from_millis(200), ..limits() };
    let mut cluster = Cluster::start(config, impatient).await;
    let mut rich = cluster.nature(None);
    rich.free_bytes = 16 << 30;
    let _worker = Worker::spawn(cluster.address, rich);
    cluster.wait_for(|load| load.state() == GroupState::Ready).await;
    let narrow = Channel::from_shared(format!("http://{}", cluster.address)).unwrap();
    let narrow = narrow.initial_stream_window_size(1024).initial_connection_window_size(1 << 16);
    let mut client = InferenceClient::new(narrow.connect().await.unwrap());
    let _unread = client.generate(request(&[1], 100_000)).await.unwrap().into_inner();
    let gone = |load: &v1::DeploymentLoad| load.totals.as_ref().unwrap().finished_aborted == 1;
    cluster.wait_for(|load| gone(load) && load.running == 0 && load.kv_blocks_used == 0).await;
    assert_eq!(cluster.complete(request(&[2], 5)).await.unwrap().tokens, continuation(&[2], 5));
}
