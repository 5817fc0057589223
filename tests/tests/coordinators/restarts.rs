//! The one coordinator of `phalanx serve`, killed again and again.

use std::time::{Duration, Instant};

use phalanx_tests::{faults::mix, full_size};
use tokio::time::sleep;

use crate::cluster::{BLOWS, Lanes, Served};

/// Kills at CI size, and at full size (the other half of the contract's 50 hits leaders around an etcd).
const KILLS: (u64, u64) = (3, 25);
/// A child that lives for less is taken for one that cannot start; see the supervisor.
const SOUND_LIFE: Duration = Duration::from_secs(6);

#[tokio::test(flavor = "multi_thread")]
async fn a_coordinator_killed_under_streams_is_only_a_pause() {
    let cluster = Served::start().await;
    let workers = cluster.children("--rank=");
    assert_eq!((workers.len(), cluster.loads()), (2, 2));
    let questions = cluster.front.questions(4).await;
    let epoch = cluster.epoch();
    let lanes = Lanes::start(&cluster.front, &questions);
    let kills = if full_size() { KILLS.1 } else { KILLS.0 };
    let mut pauses = Vec::new();
    for kill in 0..kills {
        if kill % BLOWS == 0 {
            lanes.all_begin_anew().await;
        }
        lanes.all_go_on_after(Instant::now()).await;
        sleep(Duration::from_millis(mix(kill) % 1000)).await;
        let struck = cluster.kill_coordinator().await;
        pauses.push(lanes.all_go_on_after(struck + Duration::from_millis(50)).await);
        if kills > KILLS.0 {
            sleep(SOUND_LIFE).await;
        }
    }
    let (answers, longest) = lanes.finish().await;
    println!(
        "{kills} kills of the coordinator under {} streams: {answers} answers, all as undisturbed; every stream went on \
         after {pauses:.2?}, longest pause {longest:.2?}; epoch {epoch} → {}",
        Lanes::COUNT,
        cluster.epoch()
    );
    assert_eq!((cluster.children("--rank="), cluster.loads()), (workers, 2), "no weight is loaded again");
    assert!(cluster.epoch() >= epoch + kills, "each coordinator got its own epoch from the file");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_coordinator_killed_before_the_first_byte_is_made_good_by_the_gateway() {
    let cluster = Served::start().await;
    let questions = cluster.front.questions(2).await;
    let expected = |index: usize| (200, questions[index].answer.choices[&0].token_ids.clone());
    // One answer is half made when the coordinator is killed; the other is asked for when there is none.
    let running = cluster.front.post(&questions[0].body);
    let strike = async {
        sleep(Duration::from_millis(150)).await;
        cluster.kill_coordinator().await;
        cluster.front.post(&questions[1].body).await
    };
    let began = Instant::now();
    let (first, second) = tokio::join!(running, strike);
    println!("a coordinator killed before the first byte: both requests answered within {:.2?}", began.elapsed());
    assert_eq!((first, second), (expected(0), expected(1)));
    assert_eq!(cluster.loads(), 2, "no weight is loaded again");
}
