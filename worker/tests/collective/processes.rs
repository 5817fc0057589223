//! Ranks as processes: the test starts its own binary again, and each such child obeys lines on its standard input.

use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Instant;

use phalanx_worker::collective::host::{HostCollective, Preparation, host_identity};
use phalanx_worker::collective::{AbortHandle, Collective, CollectiveError};

use crate::ranks::{sum_in_rank_order, values};
use crate::{ABORT_TAKES, BLOCKED, LOOPBACK, PATIENCE};

/// Set in children, where it makes the test below obey its parent instead of returning at once.
const CHILD: &str = "PHALANX_TEST_COLLECTIVE_CHILD";
/// Stands before every answer, to tell it from what the test harness prints.
const ANSWER: &str = "@ ";

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").unwrap();
        text
    })
}

fn unhex(text: &str) -> Vec<u8> {
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap()).collect()
}

/// A rank seen from the test.
struct Rank {
    process: Child,
    orders: ChildStdin,
    answers: Receiver<String>,
}

impl Rank {
    fn start() -> Self {
        let mut process = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "processes::child", "--nocapture", "--test-threads=1"])
            .env(CHILD, "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let orders = process.stdin.take().unwrap();
        let lines = BufReader::new(process.stdout.take().unwrap()).lines();
        let (sender, answers) = mpsc::channel();
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                if let Some((_, answer)) = line.split_once(ANSWER)
                    && sender.send(answer.to_owned()).is_err()
                {
                    break;
                }
            }
        });
        Self { process, orders, answers }
    }

    fn order(&mut self, order: &str) {
        writeln!(self.orders, "{order}").unwrap();
    }

    fn answer(&self) -> String {
        self.answers.recv_timeout(PATIENCE).unwrap()
    }

    fn ask(&mut self, order: &str) -> String {
        self.order(order);
        self.answer()
    }

    fn is_blocked(&self) -> bool {
        matches!(self.answers.recv_timeout(BLOCKED), Err(RecvTimeoutError::Timeout))
    }

    fn kill(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }

    fn maps(&self, epoch: u64) -> bool {
        let maps = std::fs::read_to_string(format!("/proc/{}/maps", self.process.id())).unwrap();
        maps.contains(&format!("phalanx-collective-{epoch}"))
    }
}

impl Drop for Rank {
    fn drop(&mut self) {
        // Already dead where the test has killed it.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn form(ranks: &mut [Rank], epoch: u64, link: &str) {
    for (rank, child) in ranks.iter_mut().enumerate() {
        let host = if link == "Tcp" { rank } else { 0 };
        child.order(&format!("prepare {epoch} {host}"));
    }
    let all: Vec<String> = ranks.iter().map(Rank::answer).collect();
    for (rank, child) in ranks.iter_mut().enumerate() {
        child.order(&format!("form {rank} {}", all.join(",")));
    }
    for child in ranks.iter() {
        assert_eq!(child.answer(), format!("formed {link}"));
    }
}

fn expect_sums(ranks: &mut [Rank], seed: u64, length: usize) {
    let expected = format!("sum {:016x}", digest(&sum_in_rank_order(seed, ranks.len(), length)));
    ranks.iter_mut().for_each(|rank| rank.order(&format!("sum {seed} {length}")));
    ranks.iter().for_each(|rank| assert_eq!(rank.answer(), expected));
}

fn digest(values: &[f32]) -> u64 {
    let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    xxhash_rust::xxh3::xxh3_64(&bytes)
}

/// Whether anything of the epoch is left on this host.
fn anything_left(epoch: u64) -> bool {
    let sockets = std::fs::read_to_string("/proc/net/unix").unwrap();
    let files = std::fs::read_dir("/dev/shm").unwrap().map(|entry| entry.unwrap().file_name());
    sockets.contains(&format!("@phalanx-{epoch}-"))
        || files.into_iter().any(|name| name.to_string_lossy().contains("phalanx"))
}

#[test]
fn processes_sum_the_same_bits() {
    for (world_size, link) in [(2, "SharedMemory"), (4, "SharedMemory"), (3, "Tcp")] {
        let mut ranks: Vec<Rank> = (0..world_size).map(|_| Rank::start()).collect();
        form(&mut ranks, 1, link);
        for length in [0, 1, 7, 2880, 1_000_000] {
            expect_sums(&mut ranks, length as u64, length);
        }
    }
}

#[test]
fn survivors_of_a_killed_rank_block_until_aborted_and_form_anew_with_its_replacement() {
    let (first, second) = (410_001, 410_002);
    let mut ranks: Vec<Rank> = (0..3).map(|_| Rank::start()).collect();
    form(&mut ranks, first, "SharedMemory");
    expect_sums(&mut ranks, 1, 2880);
    ranks[1].kill();
    ranks[0].order("sum 2 2880");
    ranks[2].order("sum 2 2880");
    assert!(ranks[0].is_blocked() && ranks[2].is_blocked(), "the death of a rank must not be noticed by itself");
    let aborted = Instant::now();
    ranks[2].order("abort");
    assert_eq!(ranks[2].answer(), "aborted");
    assert_eq!(ranks[0].answer(), "aborted");
    assert!(aborted.elapsed() < ABORT_TAKES, "{:?}", aborted.elapsed());

    ranks[1] = Rank::start();
    form(&mut ranks, second, "SharedMemory");
    expect_sums(&mut ranks, 3, 300_000);
    assert!(ranks.iter().all(|rank| rank.maps(second) && !rank.maps(first)), "the old epoch's memory is still mapped");
}

#[test]
fn a_killed_rank_over_tcp_ends_the_call_or_leaves_it_blocked_until_aborted() {
    let mut ranks: Vec<Rank> = (0..3).map(|_| Rank::start()).collect();
    form(&mut ranks, 1, "Tcp");
    ranks[0].order("sum 1 2880");
    assert!(ranks[0].is_blocked());
    ranks[2].kill();
    assert_eq!(ranks[0].answer(), "unreachable 2");
    ranks[1].order("abort");
    assert_eq!(ranks[1].ask("sum 1 2880"), "aborted");
    ranks[2] = Rank::start();
    form(&mut ranks, 2, "Tcp");
    expect_sums(&mut ranks, 2, 100_000);
}

#[test]
fn ranks_that_are_killed_leave_nothing_behind() {
    let epoch = 420_001;
    let mut ranks: Vec<Rank> = (0..2).map(|_| Rank::start()).collect();
    form(&mut ranks, epoch, "SharedMemory");
    assert!(ranks.iter().all(|rank| rank.maps(epoch)));
    // Killed in the middle of a sum that the other has not begun, and right after opening its door.
    ranks[0].order("sum 1 1000000");
    assert!(ranks[0].is_blocked());
    ranks[1].ask(&format!("prepare {epoch} 0"));
    assert!(anything_left(epoch), "an open door can be seen");
    ranks.iter_mut().for_each(Rank::kill);
    assert!(!anything_left(epoch));
}

#[test]
fn formations_leave_no_descriptor_and_no_memory_in_a_living_process() {
    for link in ["SharedMemory", "Tcp"] {
        let mut ranks: Vec<Rank> = (0..2).map(|_| Rank::start()).collect();
        let before: Vec<String> = ranks.iter_mut().map(|rank| rank.ask("descriptors")).collect();
        for epoch in 430_001..430_004 {
            form(&mut ranks, epoch, link);
            expect_sums(&mut ranks, epoch, 100);
            for rank in &mut ranks {
                assert_eq!(rank.ask("drop"), "dropped");
                assert!(!rank.maps(epoch));
            }
            assert!(!anything_left(epoch));
        }
        let after: Vec<String> = ranks.iter_mut().map(|rank| rank.ask("descriptors")).collect();
        assert_eq!(before, after, "{link}");
    }
}

/// Not a test by itself: what a child process does. Without a parent it has nothing to do.
#[test]
fn child() {
    if std::env::var_os(CHILD).is_none() {
        return;
    }
    let mut own = Own::default();
    for line in std::io::stdin().lines().map_while(Result::ok) {
        own.obey(&line.split(' ').collect::<Vec<_>>());
    }
    // The parent is gone; a thread may still be blocked in a sum.
    std::process::exit(0);
}

/// A rank seen from within.
#[derive(Default)]
struct Own {
    preparation: Option<Preparation>,
    collective: Option<Arc<Mutex<HostCollective>>>,
    abort: Option<AbortHandle>,
}

impl Own {
    fn obey(&mut self, order: &[&str]) {
        match order {
            ["prepare", epoch, host] => {
                let host = format!("{} {host}", host_identity().unwrap());
                let preparation = Preparation::new(epoch.parse().unwrap(), 1, &host, LOOPBACK).unwrap();
                println!("{ANSWER}{}", hex(&preparation.rendezvous()));
                self.preparation = Some(preparation);
            }
            ["form", rank, all] => {
                let all: Vec<Vec<u8>> = all.split(',').map(unhex).collect();
                let preparation = self.preparation.take().unwrap();
                let formed = preparation.form(rank.parse().unwrap(), &all, PATIENCE).unwrap();
                println!("{ANSWER}formed {:?}", formed.link());
                self.abort = Some(formed.abort_handle());
                self.collective = Some(Arc::new(Mutex::new(formed)));
            }
            ["sum", seed, length] => {
                let (seed, length) = (seed.parse().unwrap(), length.parse().unwrap());
                let collective = Arc::clone(self.collective.as_ref().unwrap());
                // On a thread of its own, so that an order to abort is heard.
                std::thread::spawn(move || {
                    let answer = sum(&mut collective.lock().unwrap(), seed, length);
                    // The last owner is this rank again before its parent may order to drop it.
                    drop(collective);
                    println!("{ANSWER}{answer}");
                });
            }
            ["abort"] => self.abort.as_ref().unwrap().abort(),
            ["drop"] => {
                *self = Self::default();
                println!("{ANSWER}dropped");
            }
            ["descriptors"] => {
                println!("{ANSWER}{}", std::fs::read_dir("/proc/self/fd").unwrap().count());
            }
            _ => panic!("unknown order {order:?}"),
        }
    }
}

fn sum(collective: &mut HostCollective, seed: u64, length: usize) -> String {
    let mut sum = values(seed, collective.rank(), length);
    match collective.all_reduce_sum(&mut sum) {
        Ok(()) => format!("sum {:016x}", digest(&sum)),
        Err(CollectiveError::Aborted { .. }) => "aborted".to_owned(),
        Err(CollectiveError::Unreachable { rank, .. }) => format!("unreachable {rank}"),
        Err(error) => error.to_string(),
    }
}
