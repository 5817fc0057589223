//! etcd killed, stopped and robbed of its data: what runs goes on, and a new epoch waits for it.

use std::time::{Duration, Instant};

use phalanx_proto::v1::GroupState;
use phalanx_tests::full_size;
use tokio::time::sleep;

use crate::cluster::{Lanes, Pair, until};

/// Rounds of kill, stop and loss; the contract's full size is 41 faults.
const ROUNDS: (usize, usize) = (1, 14);
const FULL_FAULTS: usize = 41;
/// For how long etcd is away: shorter and longer than the leases.
const ABSENCES: [Duration; 2] = [Duration::from_secs(3), Duration::from_secs(12)];
/// The longest pause that a busy machine may put between two tokens of a stream that nothing disturbs.
const HICCUP: Duration = Duration::from_secs(4);

#[derive(Clone, Copy, Debug)]
enum Blow {
    Killed,
    Stopped,
    Wiped,
}

async fn strike(cluster: &mut Pair, blow: Blow, absence: Duration) {
    match blow {
        Blow::Killed | Blow::Wiped => {
            cluster.etcd.kill();
            sleep(absence).await;
            if let Blow::Wiped = blow {
                cluster.etcd.lose_data();
            }
            cluster.etcd.restart();
        }
        Blow::Stopped => {
            cluster.etcd.freeze();
            sleep(absence).await;
            cluster.etcd.thaw();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn etcd_lost_while_streaming_is_not_noticed() {
    let mut cluster = Pair::start().await;
    let questions = cluster.front.questions(4).await;
    let (leader, before) = (cluster.leader().await, cluster.load().await);
    let lanes = Lanes::start(&cluster.front, &questions);
    let rounds = if full_size() { ROUNDS.1 } else { ROUNDS.0 };
    let blows = (0..rounds).flat_map(|round| {
        let absence = |place: usize| ABSENCES[(round + place) % ABSENCES.len()];
        [(Blow::Killed, absence(0)), (Blow::Stopped, absence(1)), (Blow::Wiped, absence(0))]
    });
    let mut count = 0;
    for (blow, absence) in blows.take(FULL_FAULTS) {
        strike(&mut cluster, blow, absence).await;
        lanes.all_go_on_after(Instant::now()).await;
        assert_eq!(cluster.leader().await, leader, "{blow:?}: nobody else leads");
        count += 1;
    }
    let (answers, longest) = lanes.finish().await;
    println!(
        "etcd killed, stopped or wiped {count} times under {} streams: {answers} answers, all as undisturbed, longest \
         pause {longest:.2?}",
        Lanes::COUNT
    );
    let after = cluster.load().await;
    assert_eq!((after.state(), after.epoch), (GroupState::Ready, before.epoch), "no epoch has ended: {after:?}");
    assert!(longest < HICCUP, "{longest:?}");

    // etcd has lost its data, and knows no epoch; the next one is greater all the same.
    assert_eq!(cluster.etcd.get("/phalanx/epoch"), None);
    let question = &questions[0];
    cluster.replace_worker(1);
    let answer = cluster.front.stream(&question.body, |_| {}).await;
    assert_eq!(answer.essence(), question.answer);
    let load = until(cluster.address(leader), |load| load.state() == GroupState::Ready).await;
    assert!(load.epoch > before.epoch, "{} → {}", before.epoch, load.epoch);
    assert_eq!(cluster.etcd.get("/phalanx/epoch"), Some(load.epoch.to_string()));
}

#[tokio::test(flavor = "multi_thread")]
async fn etcd_lost_before_the_first_byte_is_not_noticed() {
    let mut cluster = Pair::start().await;
    let questions = cluster.front.questions(2).await;
    cluster.etcd.kill();
    sleep(Duration::from_secs(1)).await;
    let began = Instant::now();
    for question in &questions {
        let expected = (200, question.answer.choices[&0].token_ids.clone());
        assert_eq!(cluster.front.post(&question.body).await, expected);
    }
    println!("without etcd two requests were answered in {:.2?}", began.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_epoch_waits_for_etcd_and_says_so() {
    let mut cluster = Pair::start().await;
    let questions = cluster.front.questions(4).await;
    let (leader, before) = (cluster.leader().await, cluster.load().await);
    let lanes = Lanes::start(&cluster.front, &questions);
    lanes.all_go_on_after(Instant::now()).await;
    cluster.etcd.kill();
    cluster.replace_worker(0);
    let told = until(cluster.address(leader), |load| load.detail.contains("etcd")).await;
    println!("meanwhile: {}", told.detail);
    assert_eq!(told.state(), GroupState::Fenced);
    assert!(told.detail.contains(&cluster.etcd.url()) && told.detail.contains("until etcd answers"), "{}", told.detail);
    sleep(Duration::from_secs(1)).await;
    cluster.etcd.restart();
    let back = Instant::now();
    println!("etcd is back: every stream went on {:.2?} later", lanes.all_go_on_after(back).await);
    lanes.finish().await;
    assert!(cluster.load().await.epoch > before.epoch);
    assert_eq!(cluster.loads(), 3, "only the new worker has loaded weights");
}
