//! One simulation: hosts, requests, faults, and what must hold at the end.

use std::{
    net::{IpAddr, Ipv4Addr},
    sync::{Arc, Mutex},
    time::Duration,
};

use phalanx_coordinator::{Config, DeploymentConfig, Limits, membership::MembershipConfig};
use phalanx_proto::{checkpoint::Checkpoint, v1};
use phalanx_worker::join::Ground;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use turmoil::{Builder, Sim};

use crate::{
    client::{End, Heard, Wish, ask, connect},
    device::{Hub, device},
    network::{COORDINATOR, PORT, dial, listen},
    room::WORLD_SIZE,
};

const MODEL: &str = "nano";
/// As many ranks as there are, and a spare.
const WORKERS: [&str; 3] = ["worker-0", "worker-1", "worker-2"];
const GATEWAY: &str = "gateway";
/// Longest sequence.
const CONTEXT: usize = 256;
/// Everything is whole again after this time.
const HEALED: Duration = Duration::from_secs(20);
/// Longest simulation. Nothing may take so long.
const LONGEST: Duration = Duration::from_secs(400);
/// Finest step of virtual time.
const TICK: Duration = Duration::from_millis(5);
/// How long a process stays away that ended by itself, as its supervisor has it.
const RESTART: Duration = Duration::from_millis(500);

/// Random numbers of one seed (splitmix64).
pub(crate) struct Dice(u64);

impl Dice {
    fn draw(&mut self, below: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % below
    }

    fn millis(&mut self, least: u64, most: u64) -> Duration {
        Duration::from_millis(least + self.draw(most - least))
    }

    fn host(&mut self) -> &'static str {
        let hosts = [COORDINATOR, GATEWAY, WORKERS[0], WORKERS[1], WORKERS[2]];
        hosts[self.draw(hosts.len() as u64) as usize]
    }
}

/// What came of one or more simulations.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    pub(crate) problems: Vec<String>,
    pub(crate) finished: usize,
    pub(crate) left: usize,
    pub(crate) given_up: usize,
    pub(crate) resumes: usize,
    pub(crate) steps: u64,
    pub(crate) faults: usize,
    pub(crate) failed_epochs: u64,
    pub(crate) simulated: Duration,
    pub(crate) trace: u64,
}

impl Outcome {
    pub(crate) fn add(&mut self, other: &Self) {
        self.finished += other.finished;
        self.left += other.left;
        self.given_up += other.given_up;
        self.resumes += other.resumes;
        self.steps += other.steps;
        self.faults += other.faults;
        self.failed_epochs += other.failed_epochs;
        self.simulated += other.simulated;
        self.trace ^= other.trace;
    }
}

/// A request, and what an independent implementation answers to it.
struct Line {
    prompt: Vec<u32>,
    completion: Vec<u32>,
}

/// Golden answers that a rounding error does not change.
fn lines() -> Vec<Line> {
    let text = std::fs::read_to_string(phalanx_tests::data("golden/nano.jsonl")).unwrap();
    let line = |line: &str| {
        let line: serde_json::Value = serde_json::from_str(line).unwrap();
        let ids = |name: &str| -> Vec<u32> {
            line[name].as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
        };
        let sure = line["min_margin"].as_f64().unwrap() > 0.3 && line["finish"] == "stop";
        let completion = ids("completion_ids");
        let prompt = ids("prompt_ids");
        (sure && completion.len() < 60 && prompt.len() + completion.len() < CONTEXT)
            .then_some(Line { prompt, completion })
    };
    text.lines().filter_map(line).collect()
}

/// A fault: what is done, and what undoes it.
#[derive(Clone, Copy, Debug)]
enum Fault {
    Crash(&'static str),
    Partition(&'static str, &'static str),
    OneWay(&'static str, &'static str),
    Hold(&'static str, &'static str),
}

impl Fault {
    fn random(dice: &mut Dice) -> Self {
        let (from, mut to) = (dice.host(), dice.host());
        while to == from {
            to = dice.host();
        }
        match dice.draw(6) {
            0 | 1 => Self::Crash(WORKERS[dice.draw(WORKERS.len() as u64) as usize]),
            2 => Self::Crash(COORDINATOR),
            3 => Self::Partition(from, to),
            4 => Self::OneWay(from, to),
            _ => Self::Hold(from, to),
        }
    }

    fn begin(self, sim: &mut Sim<'_>) {
        match self {
            Self::Crash(host) => sim.crash(host),
            Self::Partition(a, b) => sim.partition(a, b),
            Self::OneWay(a, b) => sim.partition_oneway(a, b),
            Self::Hold(a, b) => sim.hold(a, b),
        }
    }

    fn end(self, sim: &mut Sim<'_>) {
        match self {
            Self::Crash(host) => sim.bounce(host),
            Self::Partition(a, b) => sim.repair(a, b),
            Self::OneWay(a, b) => sim.repair_oneway(a, b),
            Self::Hold(a, b) => sim.release(a, b),
        }
    }
}

/// Beginnings and ends of faults by time. Of one host or pair there is at most one at a time.
fn schedule(dice: &mut Dice) -> Vec<(Duration, bool, Fault)> {
    let mut events = Vec::new();
    let mut at = dice.millis(500, 4000);
    while at < HEALED / 2 {
        let fault = Fault::random(dice);
        let end = (at + dice.millis(50, 8000)).min(HEALED);
        events.push((at, true, fault));
        events.push((end, false, fault));
        // Most come alone, some while the last one lasts.
        at = if dice.draw(3) == 0 { at + dice.millis(50, 1000) } else { end + dice.millis(50, 3000) };
    }
    events.sort_by_key(|(at, begins, _)| (*at, *begins));
    events
}

/// Carries out what a fault means, unless another one of the same host or pair is under way. Whether it began.
fn apply(sim: &mut Sim<'_>, begins: bool, fault: Fault, active: &mut Vec<String>) -> bool {
    let name = format!("{fault:?}");
    let place = active.iter().position(|other| *other == name);
    match (begins, place) {
        (true, None) => {
            fault.begin(sim);
            active.push(name);
        }
        (false, Some(place)) => {
            active.remove(place);
            fault.end(sim);
        }
        _ => return false,
    }
    begins
}

fn coordinator(sim: &mut Sim<'_>, state: std::path::PathBuf) {
    sim.host(COORDINATOR, move || {
        let membership = MembershipConfig::Directory(state.clone());
        let deployment = DeploymentConfig {
            max_model_len: Some(CONTEXT),
            max_num_seqs: 4,
            max_num_batched_tokens: 96,
            ..DeploymentConfig::new(crate::model_dir(), MODEL, WORLD_SIZE)
        };
        let config =
            Config { deployments: vec![deployment], membership, limits: Limits::default(), ..Config::default() };
        async move {
            let address = (Ipv4Addr::UNSPECIFIED, PORT).into();
            let incoming = listen().await?;
            phalanx_coordinator::run_over(config, address, incoming, CancellationToken::new()).await?;
            Ok(())
        }
    });
}

fn worker(sim: &mut Sim<'_>, name: &'static str, hub: &Hub) {
    let hub = hub.clone();
    sim.host(name, move || {
        let hub = hub.clone();
        async move {
            loop {
                let (device, task) = device(hub.clone());
                let task = tokio::spawn(task);
                let device = Mutex::new(Some(device));
                let ground = Ground {
                    dial: Arc::new(dial),
                    device: Arc::new(move |_, _, _| Ok(device.lock().unwrap().take().unwrap())),
                };
                let address = format!("http://{COORDINATOR}:{PORT}");
                let config = phalanx_worker::Config {
                    memory_bytes: Some(1 << 30),
                    threads: 1,
                    bind_ip: IpAddr::from(Ipv4Addr::LOCALHOST),
                    ..phalanx_worker::Config::new(&address, MODEL, crate::model_dir())
                };
                // However it ends, its supervisor starts it again.
                let ended = phalanx_worker::join::run_on(ground, config, CancellationToken::new()).await;
                hub.note(&format!("{name} ended: {}", ended.is_ok()));
                task.abort();
                sleep(RESTART).await;
            }
        }
    });
}

/// What the gateway's requests came to, and the coordinator's last word about itself.
type Report = Arc<Mutex<(Vec<(usize, Heard)>, Option<v1::DeploymentLoad>)>>;

async fn requests(wishes: Vec<Wish>, report: Report, hub: Hub) -> turmoil::Result {
    let asking = wishes.into_iter().enumerate().map(|(index, wish)| {
        let (report, hub) = (Arc::clone(&report), hub.clone());
        async move {
            let heard = ask(&wish).await;
            hub.note(&format!("{} heard {heard:?}", wish.id));
            report.lock().unwrap().0.push((index, heard));
        }
    });
    futures::future::join_all(asking).await;
    // When nobody asks for anything, everything must come to rest.
    let load = timeout(Duration::from_secs(90), rest()).await.ok();
    report.lock().unwrap().1 = load;
    Ok(())
}

/// The coordinator's word once it is ready and idle, and has looked through its books.
async fn rest() -> v1::DeploymentLoad {
    loop {
        sleep(Duration::from_millis(500)).await;
        let Ok(mut client) = connect().await else { continue };
        let Ok(stream) = client.watch(v1::WatchRequest { interval_ms: 200 }).await else { continue };
        let mut stream = stream.into_inner();
        while let Ok(Some(capacity)) = stream.message().await {
            let Some(load) = capacity.deployments.into_iter().next() else { continue };
            let idle = load.running == 0 && load.waiting == 0 && load.kv_blocks_used == 0;
            let totals = load.totals.unwrap_or_default();
            // A coordinator that never ran anything has nothing to check.
            let checked = totals.integrity_checks > 0 || totals.steps == 0;
            if load.state() == v1::GroupState::Ready && idle && checked {
                return load;
            }
        }
    }
}

/// Runs the simulation of one seed.
pub(crate) fn simulate(seed: u64, faults: bool) -> Outcome {
    let mut dice = Dice(seed);
    let (lines, hub, report) = (lines(), Hub::default(), Report::default());
    let eos = Checkpoint::open(&crate::model_dir()).unwrap().eos_token_ids;
    let mut asked = Vec::new();
    let wishes: Vec<Wish> = (0..3 + dice.draw(5))
        .map(|number| {
            let line = dice.draw(lines.len() as u64) as usize;
            asked.push(line);
            Wish {
                id: format!("request-{number}"),
                prompt: lines[line].prompt.clone(),
                stop_token_ids: eos.clone(),
                after: dice.millis(0, 9000),
                leaves_after: (dice.draw(5) == 0).then(|| dice.draw(20) as usize),
            }
        })
        .collect();
    let events = if faults { schedule(&mut dice) } else { Vec::new() };
    let state = tempfile::tempdir().unwrap();
    let mut sim = Builder::new()
        .rng_seed(seed)
        .tick_duration(TICK)
        .min_message_latency(Duration::from_millis(1))
        .max_message_latency(dice.millis(2, 40))
        .simulation_duration(LONGEST)
        .tcp_capacity(4096)
        .build();
    coordinator(&mut sim, state.path().to_owned());
    WORKERS.iter().for_each(|name| worker(&mut sim, name, &hub));
    sim.client(GATEWAY, requests(wishes, Arc::clone(&report), hub.clone()));
    let (mut next, mut faults, mut active, mut problems) = (0, 0, Vec::new(), Vec::new());
    loop {
        while let Some((_, begins, fault)) = events.get(next).filter(|(at, _, _)| *at <= sim.elapsed()) {
            faults += usize::from(apply(&mut sim, *begins, *fault, &mut active));
            next += 1;
        }
        match sim.step() {
            Ok(false) => {}
            Ok(true) => break,
            Err(error) => {
                problems.push(format!("the simulation broke: {error}"));
                break;
            }
        }
    }
    let simulated = sim.elapsed();
    drop(sim);
    let (steps, trace) = hub.summary();
    problems.extend(hub.violations());
    let mut outcome = Outcome { problems, steps, trace, simulated, faults, ..Outcome::default() };
    judge(&mut outcome, &report, &lines, &asked);
    outcome
}

/// Holds what was heard against what must be.
fn judge(outcome: &mut Outcome, report: &Report, lines: &[Line], asked: &[usize]) {
    let (heard, load) = std::mem::take(&mut *report.lock().unwrap());
    if heard.len() != asked.len() {
        outcome.problems.push(format!("{} of {} requests ended", heard.len(), asked.len()));
    }
    for (index, heard) in heard {
        let expected = &lines[asked[index]].completion;
        outcome.resumes += heard.resumes;
        let whole = heard.tokens == *expected;
        let beginning = expected.starts_with(&heard.tokens);
        let right = match &heard.end {
            End::Finished(finished) => {
                outcome.finished += 1;
                whole && finished.completion_tokens as usize == expected.len()
            }
            End::Left => {
                outcome.left += 1;
                beginning
            }
            // What it may: three failed epochs with the same request, for example.
            End::Failed(fault) => {
                outcome.given_up += 1;
                beginning && !fault.message.is_empty()
            }
        };
        if !right {
            outcome.problems.push(format!("request {index} got {heard:?}, expected {expected:?}"));
        }
    }
    match load {
        None => outcome.problems.push("the cluster did not come to rest".to_owned()),
        Some(load) => {
            let totals = load.totals.unwrap_or_default();
            outcome.failed_epochs += totals.failed_epochs;
            if totals.integrity_failures > 0 {
                outcome.problems.push(format!("{} checks of the books failed", totals.integrity_failures));
            }
        }
    }
}
