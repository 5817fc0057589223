//! Ranks that are killed and stopped: streams pause and go on, and what clients have at the end is what they would have
//! had. The measured times stand in the contract.

use std::{
    sync::Mutex,
    time::{Duration, Instant},
};

use phalanx_proto::v1::{
    GenerateRequest, GroupState, Sampling, generate_event::Event, inference_client::InferenceClient,
};
use phalanx_tests::{
    cluster::binary,
    faults::{Answer, Blow, Lanes, Target, Watcher, Wound, body_of, mix, percentile, questions, signal},
    full_size,
    parts::Parts,
};
use serde_json::{Value, json};
use tokio::time::sleep;

/// Streams at any time.
const LANES: u64 = 16;
/// From a kill to the next token, for 99 of 100 streams.
const NEXT_TOKEN: Duration = Duration::from_secs(3);
/// From a kill and from a stop to the end of the epoch.
const KILL_NOTICED: Duration = Duration::from_secs(1);
const STOP_NOTICED: Duration = Duration::from_millis(5500);
const KILL: &str = "KILL";
const STOP: &str = "STOP";

/// One cluster at a time, so that the times are those of a machine that has nothing else to do.
static TURN: Mutex<()> = Mutex::new(());

fn in_turn(test: impl Future<Output = ()>) {
    let _turn = TURN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    tokio::runtime::Runtime::new().unwrap().block_on(test);
}

/// Strikes random ranks under full load. Gives what each blow did, and from each to every stream's next token.
async fn blows(signal: &'static str, count: u64) -> (Vec<Wound>, Vec<Duration>) {
    let target = Target::start(&[]).await;
    let questions = questions(&target, 12, 200).await;
    let lanes = Lanes::start(&target, &questions, LANES);
    let (mut wounds, mut pauses) = (Vec::new(), Vec::new());
    for number in 0..count {
        let dice = mix(number + 1);
        let wound = target.strike(Blow { rank: dice & 1, signal }).await;
        pauses.extend(lanes.next_after(wound.ready).await.iter().map(|next| *next - wound.struck));
        wounds.push(wound);
        // Long enough that no request has to live through more blows than it may.
        sleep(Duration::from_millis(700 + (dice >> 8) % 1500)).await;
    }
    let answers = lanes.finish().await;
    let (_, load) = target.watch.until("an end of all work", |load| load.running + load.waiting == 0).await;
    let totals = load.totals.unwrap();
    assert_eq!((totals.integrity_failures, load.state()), (0, GroupState::Ready), "{load:?}");
    assert!(answers > LANES, "{answers} answers say little");
    println!("{count} × SIG{signal} under {LANES} streams: {answers} answers, 0 wrong, 0 failed");
    (wounds, pauses)
}

fn print_times(what: &str, times: &mut [Duration]) -> Duration {
    let [half, most, all] = [0.5, 0.99, 1.0].map(|share| percentile(times, share));
    println!("{what}: p50 {half:.2?}, p99 {most:.2?}, max {all:.2?} over {}", times.len());
    most
}

#[test]
fn streams_live_through_killed_ranks_and_go_on_within_three_seconds() {
    in_turn(async {
        let (wounds, mut pauses) = blows(KILL, if full_size() { 200 } else { 10 }).await;
        let mut noticed: Vec<Duration> = wounds.iter().map(|wound| wound.noticed).collect();
        let late = print_times("kill noticed", &mut noticed);
        assert!(late <= KILL_NOTICED, "{noticed:?}");
        let p99 = print_times("kill to next token", &mut pauses);
        assert!(p99 <= NEXT_TOKEN, "{p99:?}");
    });
}

#[test]
fn streams_live_through_stopped_ranks_which_are_noticed_in_time_and_replaced() {
    in_turn(async {
        let (wounds, mut pauses) = blows(STOP, if full_size() { 100 } else { 5 }).await;
        let mut noticed: Vec<Duration> = wounds.iter().map(|wound| wound.noticed).collect();
        print_times("stop to next token", &mut pauses);
        print_times("stop noticed", &mut noticed);
        assert!(noticed.iter().all(|time| *time <= STOP_NOTICED), "{noticed:?}");
    });
}

/// A request of random length and settings over gRPC, read to its end or dropped on the way.
async fn random_request(target: &Target, dice: u64) {
    let length = 1 + dice % 60;
    let sampling = Sampling {
        temperature: Some(if dice & 64 == 0 { 0.0 } else { 1.0 }),
        top_k: (dice >> 10) as u32 % 40,
        repetition_penalty: Some(1.0 + (dice >> 20 & 3) as f32 * 0.1),
        logprobs: (dice & 128 == 0).then_some(2),
        ignore_eos: true,
        ..Default::default()
    };
    let request = GenerateRequest {
        prompt: (0..length).map(|place| (mix(dice ^ place) % 3000) as u32).collect(),
        max_tokens: Some(1 + (dice >> 32) as u32 % 200),
        sampling: Some(sampling),
        ..Default::default()
    };
    let mut stream = target.inference().await.generate(request).await.unwrap().into_inner();
    let leave_after = if dice & 7 == 0 { dice >> 40 & 63 } else { u64::MAX };
    let mut seen = 0;
    while let Some(event) = stream.message().await.unwrap() {
        seen += u64::from(matches!(event.event, Some(Event::Tokens(_))));
        if seen > leave_after {
            return;
        }
    }
}

#[test]
fn under_full_load_ranks_never_differ_and_none_is_taken_for_dead() {
    // PHALANX_LOAD_S: the full size in less time, with as many fewer steps.
    let seconds = std::env::var("PHALANX_LOAD_S").ok().and_then(|seconds| seconds.parse().ok());
    let (steps, least) = match seconds {
        Some(seconds) => (1_000_000 * seconds / 3600, seconds),
        None if full_size() => (1_000_000, 3600),
        None => (50_000, 30),
    };
    in_turn(async {
        let target = Target::start(&[]).await;
        let (began, least) = (Instant::now(), Duration::from_secs(least));
        let work = |lane: u64| {
            let target = &target;
            async move {
                for number in 0.. {
                    if target.watch.totals().steps >= steps && began.elapsed() >= least {
                        return;
                    }
                    random_request(target, mix(lane << 40 | number)).await;
                }
            }
        };
        tokio::join!(work(1), work(2), work(3));
        let (_, load) = target.watch.until("an end of all work", |load| load.running + load.waiting == 0).await;
        let totals = load.totals.unwrap();
        println!("{} steps in {:.0?}: {} failed epochs", totals.steps, began.elapsed(), totals.failed_epochs);
        assert_eq!((load.epoch, totals.failed_epochs, totals.integrity_failures), (1, 0, 0), "{load:?}");
    });
}

/// Asks twice, the second time killing a rank after `tokens` tokens; both answers must be the same. Gives the second.
async fn same_with_a_kill(target: &Target, body: &Value, tokens: usize) -> Answer {
    let expected = target.stream(body, |_| {}).await;
    assert_eq!((expected.status, expected.done), (200, 1), "{expected:?}");
    assert!(expected.tokens() > tokens + 20, "too short to be disturbed: {expected:?}");
    let (started, mut begun) = tokio::sync::watch::channel(0);
    let again = target.stream(body, |tokens| {
        started.send_replace(tokens);
    });
    let blow = async {
        begun.wait_for(|seen| *seen > tokens).await.unwrap();
        target.strike(Blow { rank: tokens as u64 % 2, signal: KILL }).await;
        *begun.borrow()
    };
    let (again, seen) = tokio::join!(again, blow);
    assert!(seen < again.tokens(), "the answer was there before the kill");
    assert_eq!(again.essence(), expected.essence(), "{body}");
    again
}

#[test]
fn a_replay_continues_bit_for_bit_whatever_was_asked_for() {
    in_turn(async {
        let target = Target::start(&[]).await;
        let base = |more: Value| {
            let mut body = json!({"prompt": [3059, 304, 3061, 779, 12, 99], "max_tokens": 400, "ignore_eos": true});
            body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            body
        };
        let several = base(json!({"n": 3, "seed": 5, "temperature": 1.2, "max_tokens": 250}));
        let answer = same_with_a_kill(&target, &several, 60).await;
        assert_eq!((answer.choices.len(), answer.usage), (3, (6, 750)));
        assert_ne!(answer.choices[&0], answer.choices[&1], "choices differ by their index");

        let penalties = json!({"temperature": 0, "presence_penalty": 0.9, "frequency_penalty": 0.6,
            "repetition_penalty": 1.3});
        same_with_a_kill(&target, &base(penalties), 30).await;

        let sampled = json!({"seed": 11, "temperature": 1.4, "top_p": 0.95, "top_k": 80, "min_p": 0.01});
        same_with_a_kill(&target, &base(sampled), 31).await;

        let scored = same_with_a_kill(&target, &base(json!({"temperature": 0, "logprobs": 5})), 32).await;
        assert_eq!(scored.choices[&0].logprobs.len(), 400);

        let long: Vec<u64> = (0..200).map(|place| mix(place) % 3000).collect();
        let cached = same_with_a_kill(&target, &base(json!({"prompt": long, "temperature": 0})), 33).await;
        assert!(cached.cached >= 160, "the prompt was in the prefix cache: {}", cached.cached);

        // A stop string from the midst of what is said without it.
        let unstopped = target.stream(&base(json!({"temperature": 0})), |_| {}).await;
        let text: Vec<char> = unstopped.choices[&0].text.chars().collect();
        let stop: String = text[text.len() * 3 / 4..][..8].iter().collect();
        let expected = target.stream(&base(json!({"temperature": 0, "stop": [stop]})), |_| {}).await;
        assert_eq!(expected.choices[&0].finish, ["stop"]);
        let kill_at = expected.tokens() / 3;
        let stopped = same_with_a_kill(&target, &base(json!({"temperature": 0, "stop": [stop]})), kill_at).await;
        assert_eq!(stopped.essence(), expected.essence());
    });
}

/// Long enough to be disturbed several times.
fn long_body(index: u64) -> Value {
    let mut body = body_of(index * 4, 1500);
    body["return_token_ids"] = json!(true);
    body
}

/// The answer in one piece, in the form of a streamed one.
fn pieced(target: &Target, body: Value) -> tokio::task::JoinHandle<(u16, Value)> {
    let (http, url) = (target.http.clone(), format!("{}/v1/completions", target.cluster.url));
    tokio::spawn(async move {
        let answer = http.post(url).json(&body).send().await.unwrap();
        (answer.status().as_u16(), answer.json().await.unwrap())
    })
}

/// Both cells of a row of the client table: a rank is struck while one answer streams and another is being collected.
async fn both_cells(signal: &'static str) {
    let target = Target::start(&[]).await;
    let (streamed, whole) = (long_body(1), long_body(2));
    let expected = [target.stream(&streamed, |_| {}).await, target.stream(&whole, |_| {}).await];
    let collected = pieced(&target, whole);
    let (started, mut begun) = tokio::sync::watch::channel(0);
    let answer = target.stream(&streamed, |tokens| {
        started.send_replace(tokens);
    });
    let blow = async {
        begun.wait_for(|seen| *seen > 50).await.unwrap();
        target.strike(Blow { rank: 1, signal }).await;
        *begun.borrow()
    };
    let (answer, seen) = tokio::join!(answer, blow);
    assert!(seen < answer.tokens(), "the answer was there before the blow");
    assert_eq!(answer.essence(), expected[0].essence());
    let (status, body) = collected.await.unwrap();
    assert_eq!(status, 200, "{body}");
    let tokens: Vec<u64> =
        body["choices"][0]["token_ids"].as_array().unwrap().iter().filter_map(Value::as_u64).collect();
    assert_eq!(tokens, expected[1].choices[&0].token_ids);
    assert_eq!(body["usage"]["completion_tokens"], 1500);
}

#[test]
fn a_killed_worker_is_a_pause_for_a_stream_and_a_later_answer_for_others() {
    in_turn(both_cells(KILL));
}

#[test]
fn a_hung_worker_is_a_pause_for_a_stream_and_a_later_answer_for_others() {
    in_turn(both_cells(STOP));
}

#[test]
fn when_replays_are_exhausted_a_stream_ends_with_an_error_event_and_others_get_503() {
    in_turn(async {
        let target = Target::start(&[]).await;
        let collected = pieced(&target, long_body(1));
        let (started, mut begun) = tokio::sync::watch::channel(0);
        let body = long_body(2);
        let answer = target.stream(&body, |tokens| {
            started.send_replace(tokens);
        });
        let blows = async {
            for number in 0..4 {
                let seen = *begun.borrow();
                // With progress in between it is not the request that is to blame.
                begun.wait_for(|now| *now > seen + 40).await.unwrap();
                target.strike(Blow { rank: number % 2, signal: KILL }).await;
            }
        };
        let (answer, ()) = tokio::join!(answer, blows);
        let error = answer.error.clone().unwrap_or_else(|| panic!("no error after {} tokens", answer.tokens()));
        assert_eq!((answer.status, answer.done, error["code"].as_str()), (200, 0, Some("worker_lost")), "{error}");
        assert!(error["message"].as_str().unwrap().contains("4 failed epochs"), "{error}");
        let (status, body) = collected.await.unwrap();
        assert_eq!((status, body["error"]["code"].as_str()), (503, Some("worker_lost")), "{body}");
        // The group is none the worse for it.
        let next = target.stream(&body_of(0, 50), |_| {}).await;
        assert_eq!((next.status, next.done, next.tokens()), (200, 1, 50));
    });
}

#[test]
fn a_long_pause_has_keep_alives_and_its_stream_goes_on() {
    in_turn(async {
        let target = Target::start(&[]).await;
        let body = long_body(3);
        let expected = target.stream(&body, |_| {}).await;
        let (started, mut begun) = tokio::sync::watch::channel(0);
        let answer = target.stream(&body, |tokens| {
            started.send_replace(tokens);
        });
        let outage = async {
            begun.wait_for(|seen| *seen > 50).await.unwrap();
            let worker = target.worker(0).await;
            // A supervisor that stands still replaces nobody.
            signal(target.cluster.pid(), STOP);
            signal(worker, KILL);
            sleep(Duration::from_secs(12)).await;
            signal(target.cluster.pid(), "CONT");
        };
        let (answer, ()) = tokio::join!(answer, outage);
        assert!(answer.keep_alives > 0);
        assert_eq!(answer.essence(), expected.essence());
        let load = target.watch.load();
        assert_eq!(load.totals.unwrap().failed_epochs, 1, "nobody else was taken for dead: {load:?}");
    });
}

/// Tokens of a greedy completion over gRPC. `seen` is told how many there are.
async fn complete(coordinator: &str, seen: impl Fn(usize)) -> Vec<u32> {
    let sampling = Sampling { temperature: Some(0.0), ignore_eos: true, ..Default::default() };
    let prompt = (0..40).map(|place| (mix(place) % 3000) as u32).collect();
    let request = GenerateRequest { prompt, max_tokens: Some(1000), sampling: Some(sampling), ..Default::default() };
    let mut client = InferenceClient::connect(coordinator.to_owned()).await.unwrap();
    let mut stream = client.generate(request).await.unwrap().into_inner();
    let mut tokens = Vec::new();
    while let Some(event) = stream.message().await.unwrap() {
        if let Some(Event::Tokens(chunk)) = event.event {
            tokens.extend(chunk.tokens.iter().map(|token| token.id));
            seen(tokens.len());
        }
    }
    tokens
}

#[test]
fn a_worker_that_wakes_after_it_was_let_go_does_no_harm_and_serves_as_a_spare() {
    in_turn(async {
        // Started by hand, so that no supervisor kills the one that sleeps.
        let mut parts = Parts::default();
        let address = parts.coordinator("").to_string();
        let coordinator = format!("http://{address}");
        parts.worker("first", 0, &address, "");
        let sleeper = parts.worker("sleeper", 1, &address, "");
        let watch = Watcher::follow(&coordinator);
        let first_epoch = watch.until("ready", |load| load.state() == GroupState::Ready).await.1.epoch;
        let expected = complete(&coordinator, |_| {}).await;

        let (started, mut begun) = tokio::sync::watch::channel(0);
        let again = complete(&coordinator, |tokens| {
            started.send_replace(tokens);
        });
        let replace = async {
            begun.wait_for(|seen| *seen > 30).await.unwrap();
            signal(sleeper, STOP);
            let replacement = parts.worker("replacement", 1, &address, "");
            watch.until_ready_after(first_epoch).await;
            signal(sleeper, "CONT");
            replacement
        };
        let (again, replacement) = tokio::join!(again, replace);
        assert_eq!(again, expected);
        assert_eq!(watch.totals().failed_epochs, 1, "the sleeper disturbed nobody: {:?}", watch.load());

        // Nobody starts another worker: only the sleeper can take the place.
        let epoch = watch.load().epoch;
        signal(replacement, KILL);
        watch.until_ready_after(epoch).await;
        assert_eq!(complete(&coordinator, |_| {}).await, expected);
    });
}

#[test]
fn a_worker_is_started_again_also_when_the_programs_file_was_replaced_meanwhile() {
    in_turn(async {
        let directory = tempfile::tempdir().unwrap();
        let program = directory.path().join("phalanx");
        std::fs::copy(binary(), &program).unwrap();
        let target = Target::start_program(&program, &[]).await;
        // As an upgrade does: another file under the same name.
        std::fs::remove_file(&program).unwrap();
        std::fs::write(&program, "not a program").unwrap();
        target.strike(Blow { rank: 1, signal: KILL }).await;
        assert_eq!(target.stream(&body_of(0, 20), |_| {}).await.tokens(), 20);
    });
}
