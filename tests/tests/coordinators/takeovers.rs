//! Two coordinators around an etcd: one leads, the other takes over.

use std::time::{Duration, Instant};

use phalanx_proto::{
    fault::{Fault, FaultKind},
    v1::{GroupState, WorkerEvent, cluster_client::ClusterClient, inference_client::InferenceClient},
};
use phalanx_tests::{
    faults::{mix, signal},
    full_size,
    parts::request,
};
use tokio::time::sleep;
use tonic::Code;

use crate::cluster::{BLOWS, Lanes, Pair, load_at, until};

/// Kills at CI size, and at full size (half of the contract's 50).
const KILLS: (u64, u64) = (3, 25);
/// A dead leader's lease (10 s), the two seconds in which its place must stay empty, the longest wait between two tries of a
/// worker (2 s) and of a gateway (1 s), forming, and as much again for a machine that is busy.
const TAKEOVER: Duration = Duration::from_secs(30);

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_killed_under_streams_is_only_a_pause() {
    let mut cluster = Pair::start().await;
    assert_eq!(cluster.loads(), 2);
    let questions = cluster.front.questions(4).await;
    let lanes = Lanes::start(&cluster.front, &questions);
    let kills = if full_size() { KILLS.1 } else { KILLS.0 };
    let (mut pauses, mut epochs) = (Vec::new(), vec![cluster.load().await.epoch]);
    for kill in 0..kills {
        if kill % BLOWS == 0 {
            lanes.all_begin_anew().await;
        }
        lanes.all_go_on_after(Instant::now()).await;
        sleep(Duration::from_millis(mix(kill) % 1000)).await;
        let leader = cluster.leader().await;
        let struck = Instant::now();
        signal(cluster.pid(leader), "KILL");
        pauses.push(lanes.all_go_on_after(struck + Duration::from_millis(50)).await);
        let load = until(cluster.address(1 - leader), |load| load.state() == GroupState::Ready).await;
        epochs.push(load.epoch);
        let name = cluster.name(leader);
        assert_eq!(cluster.parts.exit_code(&name), None, "it was killed");
        cluster.start_coordinator(leader);
    }
    let (answers, _) = lanes.finish().await;
    println!(
        "{kills} kills of the leader under {} streams: {answers} answers, all as undisturbed; every stream went on after \
         {pauses:.2?}; epochs {epochs:?}",
        Lanes::COUNT
    );
    assert_eq!(cluster.loads(), 2, "no weight is loaded again");
    assert!(epochs.is_sorted_by(|a, b| a < b), "{epochs:?}");
    assert!(pauses.iter().all(|&pause| pause <= TAKEOVER), "{pauses:?}");
}

/// What a coordinator answers to health checks of its whole server.
async fn health(address: &str) -> i32 {
    let channel = tonic::transport::Channel::from_shared(format!("http://{address}")).unwrap().connect().await.unwrap();
    let request = tonic_health::pb::HealthCheckRequest::default();
    let mut client = tonic_health::pb::health_client::HealthClient::new(channel);
    client.check(request).await.unwrap().into_inner().status
}

#[tokio::test(flavor = "multi_thread")]
async fn a_coordinator_that_waits_sends_everybody_elsewhere_and_a_deposed_one_ends() {
    let mut cluster = Pair::start().await;
    let leader = cluster.leader().await;
    let (first, second) = (cluster.address(leader).to_owned(), cluster.address(1 - leader).to_owned());
    use tonic_health::pb::health_check_response::ServingStatus::{NotServing, Serving};
    assert_eq!((health(&first).await, health(&second).await), (Serving as i32, NotServing as i32));
    let refused = InferenceClient::connect(format!("http://{second}")).await.unwrap().generate(request(1, 4)).await;
    let status = refused.map(|_| ()).unwrap_err();
    assert_eq!((status.code(), Fault::from(&status).kind), (Code::Unavailable, FaultKind::NotReady), "{status}");
    assert!(status.message().contains(&format!("{first} leads")), "{status}");
    let attached = ClusterClient::connect(format!("http://{second}")).await.unwrap();
    let attached = attached.clone().attach(tokio_stream::iter([WorkerEvent::default()])).await;
    assert_eq!(attached.map(|_| ()).unwrap_err().code(), Code::Unavailable);

    // The leader stands still for longer than its lease; its workers and clients go to the one that takes over.
    let question = cluster.front.questions(1).await.remove(0);
    signal(cluster.pid(leader), "STOP");
    let began = Instant::now();
    let load = until(&second, |load| load.state() == GroupState::Ready).await;
    println!("a leader that stands still: another one is ready after {:.1?}, epoch {}", began.elapsed(), load.epoch);
    signal(cluster.pid(leader), "CONT");
    let woke = Instant::now();
    let name = cluster.name(leader);
    assert_eq!(cluster.parts.exit_code(&name), Some(70), "it may be started again");
    println!("it wakes, sees that another one leads, and ends after {:.1?}", woke.elapsed());
    assert!(cluster.parts.log(&name).contains("no longer leads"), "{}", cluster.parts.log(&name));
    let (status, ids) = cluster.front.post(&question.body).await;
    assert_eq!((status, &ids), (200, &question.answer.choices[&0].token_ids));
    assert_eq!(cluster.loads(), 2, "no weight is loaded again");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_told_to_stop_hands_over_without_waiting_for_its_lease() {
    let mut cluster = Pair::start().await;
    let questions = cluster.front.questions(2).await;
    let leader = cluster.leader().await;
    let lanes = Lanes::start(&cluster.front, &questions);
    lanes.all_go_on_after(Instant::now()).await;
    let told = Instant::now();
    signal(cluster.pid(leader), "TERM");
    let name = cluster.name(leader);
    assert_eq!(cluster.parts.exit_code(&name), Some(0));
    let drained = told.elapsed();
    let pause = lanes.all_go_on_after(Instant::now()).await;
    let (answers, _) = lanes.finish().await;
    println!("a leader told to stop drains in {drained:.1?}; streams go on {pause:.1?} later; {answers} answers");
    assert!(load_at(cluster.address(leader)).await.is_err());
    assert_eq!(cluster.loads(), 2, "no weight is loaded again");
    assert!(pause < Duration::from_secs(8), "{pause:?}: the lease alone would take 10 s");
}
