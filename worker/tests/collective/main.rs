//! The collective of CPU ranks through its public door: ranks as threads over both links, and as processes that die.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed expectation ends a test")]

mod processes;
mod ranks;

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, TcpStream};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use phalanx_worker::collective::host::{HostCollective, Link, Preparation};
use phalanx_worker::collective::{Collective, CollectiveError};

use crate::ranks::{Random, form, prepare, sum_in_rank_order, together, values};

const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const LINKS: [Link; 2] = [Link::SharedMemory, Link::Tcp];
/// Far more than forming takes, far less than a hung test run.
const PATIENCE: Duration = Duration::from_secs(20);
/// Long enough that a rank which is not blocked would have answered.
const BLOCKED: Duration = Duration::from_millis(150);
/// Allows for a loaded machine; an abort itself takes well under a millisecond.
const ABORT_TAKES: Duration = Duration::from_millis(500);

/// A change to the list of rendezvous, and what is said about it.
type Alteration<'a> = (&'a dyn Fn(&mut Vec<Vec<u8>>), &'static str);

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

#[test]
fn sums_are_added_in_rank_order_with_the_same_bits_on_all_ranks() {
    for world_size in [1, 2, 3, 4, 8] {
        for link in LINKS {
            let mut group = form(link, 1, world_size);
            for length in [0, 1, 7, 2880, 1_000_000] {
                let expected = bits(&sum_in_rank_order(length as u64, world_size, length));
                together(&mut group, |collective| {
                    let mut sum = values(length as u64, collective.rank(), length);
                    collective.all_reduce_sum(&mut sum).unwrap();
                    assert!(bits(&sum) == expected, "{link:?}, world {world_size}, length {length}");
                });
            }
        }
    }
}

#[test]
fn gathered_byte_strings_keep_their_ranks_and_lengths() {
    // Empty, short, just beyond one slot of shared memory, several slots.
    let lengths = [0, 5, (1 << 20) + 1, 5_000_000];
    let part = |rank: usize| vec![rank as u8 + 1; lengths[rank]];
    for link in LINKS {
        let gathered = together(&mut form(link, 1, 4), |collective| collective.all_gather(&part(collective.rank())));
        for all in gathered {
            assert!(all.unwrap() == (0..4).map(part).collect::<Vec<_>>(), "{link:?}");
        }
    }
}

#[test]
fn random_sequences_of_operations_stay_right() {
    for link in LINKS {
        for (world_size, seed) in [(2, 1), (3, 2), (5, 3)] {
            together(&mut form(link, 1, world_size), |collective| random_operations(collective, seed));
        }
    }
}

fn random_operations(collective: &mut HostCollective, seed: u64) {
    // Around every size at which a link changes its way, in floats.
    const EDGES: [usize; 6] = [0, 16, 8 << 10, 16 << 10, 256 << 10, 512 << 10];
    let (rank, world_size) = (collective.rank(), collective.world_size());
    let mut random = Random::new(seed);
    for operation in 0..150 {
        let near_edge = (EDGES[random.below(EDGES.len())] + random.below(3)).saturating_sub(1);
        let length = if random.below(4) == 0 { near_edge } else { random.below(4000) };
        if random.below(3) == 0 {
            let part = |rank: usize| vec![rank as u8; length * (rank + 1) % 70_000];
            let all = collective.all_gather(&part(rank)).unwrap();
            assert!(all == (0..world_size).map(part).collect::<Vec<_>>(), "operation {operation}");
        } else {
            let mut sum = values(operation, rank, length);
            collective.all_reduce_sum(&mut sum).unwrap();
            let expected = sum_in_rank_order(operation, world_size, length);
            assert!(bits(&sum) == bits(&expected), "operation {operation}, {length} values");
        }
    }
}

#[test]
fn a_rank_blocks_until_it_is_aborted_and_stays_aborted() {
    for link in LINKS {
        let mut group = form(link, 9, 3);
        // The last rank never calls: without the abort the others would wait for ever.
        let _silent = group.pop();
        let handles: Vec<_> = group.iter().map(Collective::abort_handle).collect();
        let (answers, answered) = mpsc::channel();
        for mut collective in group {
            let answers = answers.clone();
            std::thread::spawn(move || {
                let blocked = collective.all_reduce_sum(&mut [1.0; 2880]);
                let after = collective.all_gather(b"after");
                answers.send((collective.rank(), blocked, after, Instant::now())).unwrap();
            });
        }
        assert!(answered.recv_timeout(BLOCKED).is_err(), "{link:?}: the silent rank was not waited for");
        let aborted = Instant::now();
        handles[0].abort();
        for _ in 0..2 {
            let (rank, blocked, after, answered) = answered.recv_timeout(PATIENCE).unwrap();
            assert!(answered - aborted < ABORT_TAKES, "{link:?}: took {:?}", answered - aborted);
            // Over TCP rank 0 takes no other with it, though one that still waited for its values sees it go.
            let saw_it_go = matches!(blocked, Err(CollectiveError::Unreachable { rank: 0, .. }));
            let is_aborted = matches!(blocked, Err(CollectiveError::Aborted { epoch: 9 }));
            assert!(is_aborted || saw_it_go && link == Link::Tcp && rank == 1, "{link:?}, rank {rank}: {blocked:?}");
            if link == Link::Tcp {
                handles[1].abort();
            }
            assert!(matches!(after, Err(CollectiveError::Aborted { epoch: 9 })), "{link:?}: {after:?}");
        }
    }
}

#[test]
fn a_group_of_one_obeys_its_abort_too() {
    let mut group = form(Link::Alone, 4, 1);
    group[0].all_reduce_sum(&mut [1.0]).unwrap();
    group[0].abort_handle().abort();
    assert!(matches!(group[0].all_reduce_sum(&mut [1.0]), Err(CollectiveError::Aborted { epoch: 4 })));
}

#[test]
fn ranks_that_call_different_operations_are_told_so() {
    for link in LINKS {
        let lengths = together(&mut form(link, 1, 3), |collective| {
            let length = if collective.rank() == 2 { 2881 } else { 2880 };
            collective.all_reduce_sum(&mut vec![0.0; length])
        });
        for (rank, result) in lengths.into_iter().enumerate() {
            let message = result.unwrap_err().to_string();
            let says = |found, expected| {
                format!(
                    "called all_reduce_sum of {found} values as call 1, expected all_reduce_sum of {expected} values as call 1"
                )
            };
            if rank == 2 {
                // Over TCP it names whichever of the others it heard first.
                let others = ["rank 0 ", "rank 1 "].map(|other| other.to_owned() + &says(2880, 2881));
                assert!(others.contains(&message), "{link:?}, rank 2: {message}");
            } else {
                assert_eq!(message, "rank 2 ".to_owned() + &says(2881, 2880), "{link:?}, rank {rank}");
            }
        }
        let kinds = together(&mut form(link, 1, 2), |collective| match collective.rank() {
            0 => collective.all_reduce_sum(&mut [0.0; 100]),
            _ => collective.all_gather(&[0; 300]).map(drop),
        });
        for result in kinds {
            assert!(matches!(result, Err(CollectiveError::Mismatch { .. })), "{link:?}: {result:?}");
        }
    }
}

#[test]
fn an_over_long_contribution_is_refused_before_it_is_sent() {
    let mut group = form(Link::Alone, 1, 1);
    let result = group[0].all_gather(&vec![0; (256 << 20) + 1]);
    assert!(matches!(result, Err(CollectiveError::Io { .. })));
}

#[test]
fn rendezvous_that_do_not_fit_together_are_refused() {
    let refused = |rank: usize, epoch: u64, alter: &dyn Fn(&mut Vec<Vec<u8>>)| {
        let (preparations, mut all) = prepare(Link::SharedMemory, epoch, 2);
        alter(&mut all);
        let preparation = preparations.into_iter().nth(rank).unwrap();
        match preparation.form(rank, &all, PATIENCE) {
            Err(CollectiveError::Rendezvous { rank, message }) => format!("{rank}: {message}"),
            Err(other) => format!("other error: {other}"),
            Ok(_) => "formed".to_owned(),
        }
    };
    let older = Preparation::new(6, 0, "host", LOOPBACK).unwrap();
    let cases: [Alteration<'_>; 6] = [
        (&|all| all[1] = b"garbage".to_vec(), "1: it cannot be read"),
        (&|all| all[1].clear(), "1: its version is 0"),
        (&|all| all[1].truncate(20), "1: "),
        (&|all| all[1] = older.rendezvous(), "1: it is of epoch 6, this rank forms epoch 7"),
        (&|all| all[1] = all[0].clone(), "1: it is that of rank 0 again"),
        (&|all| all.clear(), "0: the one listed among 0 ranks"),
    ];
    for (alter, expected) in cases {
        let found = refused(0, 7, alter);
        assert!(found.starts_with(expected), "{found:?} does not start with {expected:?}");
    }
    let swapped = refused(0, 7, &|all| all.swap(0, 1));
    assert!(swapped.contains("not the one that this rank prepared"), "{swapped}");
}

#[test]
fn a_listener_that_others_cannot_reach_is_refused() {
    let result = Preparation::new(1, 0, "host", IpAddr::V4(Ipv4Addr::UNSPECIFIED));
    assert!(matches!(result, Err(CollectiveError::Io { .. })));
}

#[test]
fn a_peer_with_a_wrong_nonce_or_another_list_is_not_let_in() {
    for link in LINKS {
        // The nonce stands last.
        let nonce = |all: &mut Vec<Vec<u8>>| *all[0].last_mut().unwrap() ^= 1;
        let (_third, more) = prepare(link, 3, 1);
        let longer = |all: &mut Vec<Vec<u8>>| all.extend(more.clone());
        let cases: [Alteration<'_>; 2] = [(&nonce, "wrong proof"), (&longer, "different lists")];
        for (alter, reason) in cases {
            let (mut preparations, all) = prepare(link, 3, 2);
            let mut altered = all.clone();
            alter(&mut altered);
            let second = preparations.pop().unwrap();
            let first = preparations.pop().unwrap();
            let abort = first.abort_handle();
            std::thread::scope(|scope| {
                let first = scope.spawn(move || first.form(0, &all, PATIENCE));
                let message = second.form(1, &altered, PATIENCE).err().unwrap().to_string();
                assert!(message.contains(reason), "{link:?}: {message}");
                abort.abort();
                assert!(matches!(first.join().unwrap(), Err(CollectiveError::Aborted { epoch: 3 })));
            });
        }
    }
}

/// The listener's address and the nonce in a rendezvous, as a stranger who has got hold of it would read them.
fn address_and_nonce(rendezvous: &[u8]) -> (String, [u8; 16]) {
    let start = rendezvous.windows(10).position(|bytes| bytes == b"127.0.0.1:").unwrap();
    // The length stands before the text.
    let address = rendezvous[start..start + rendezvous[start - 1] as usize].to_vec();
    (String::from_utf8(address).unwrap(), *rendezvous.last_chunk().unwrap())
}

#[test]
fn a_peer_of_another_epoch_is_refused_at_the_door_and_strangers_do_not_hold_it_up() {
    let (mut preparations, all) = prepare(Link::Tcp, 12, 2);
    let (address, nonce) = address_and_nonce(&all[0]);
    let (list, second, first) = (all.clone(), preparations.pop().unwrap(), preparations.pop().unwrap());
    let forming = std::thread::spawn(move || first.form(0, &list, PATIENCE).unwrap());
    let mut hello = b"PHALANX2".to_vec();
    hello.extend(11u64.to_le_bytes());
    hello.extend(1u32.to_le_bytes());
    hello.extend(2u32.to_le_bytes());
    hello.extend([7; 16]);
    hello.extend(0u64.to_le_bytes());
    let mut silent = TcpStream::connect(&address).unwrap();
    silent.write_all(&hello[..10]).unwrap();
    let mut chatty = TcpStream::connect(&address).unwrap();
    chatty.write_all(&[b'x'; 4096]).unwrap();

    // Each visitor gets a question of its own.
    let ask = || {
        let (mut stream, mut challenge) = (TcpStream::connect(&address).unwrap(), [0; 16]);
        stream.write_all(&hello).unwrap();
        stream.read_exact(&mut challenge).unwrap();
        (stream, challenge)
    };
    let answer = |mut stream: TcpStream, proof: &[u8]| {
        let mut answer = Vec::new();
        stream.write_all(proof).unwrap();
        stream.read_to_end(&mut answer).unwrap();
        String::from_utf8_lossy(&answer[2..]).into_owned()
    };
    // The one knows the secret and belongs to another epoch; the other has only overheard an answer.
    let ((stale, challenge), (eavesdropper, other)) = (ask(), ask());
    assert_ne!(challenge, other);
    let said = [b"phalanx collective guest", &hello[..], &challenge].concat();
    let proof = ring::hmac::sign(&ring::hmac::Key::new(ring::hmac::HMAC_SHA256, &nonce), &said);
    assert_eq!(answer(stale, proof.as_ref()), "this rank forms epoch 12, not 11");
    assert_eq!(answer(eavesdropper, proof.as_ref()), "wrong proof: this listener serves another formation");

    let second = second.form(1, &all, PATIENCE).unwrap();
    let mut group = vec![forming.join().unwrap(), second];
    for sum in together(&mut group, |collective| {
        let mut sum = [2.0];
        collective.all_reduce_sum(&mut sum).map(|()| sum)
    }) {
        assert_eq!(sum.unwrap(), [4.0]);
    }
}

#[test]
fn a_missing_rank_ends_the_formation_in_time() {
    for link in LINKS {
        let (mut preparations, all) = prepare(link, 2, 2);
        // Its door is open but it never forms: the connection succeeds and nothing comes.
        let first = preparations.remove(0);
        let second = preparations.remove(0);
        let started = Instant::now();
        let result = second.form(1, &all, Duration::from_millis(200));
        assert!(matches!(result, Err(CollectiveError::Unreachable { rank: 0, .. })), "{link:?}");
        assert!(started.elapsed() < Duration::from_secs(5), "{link:?}: {:?}", started.elapsed());
        // It has knocked and gone away: that is not being there.
        let result = first.form(0, &all, Duration::from_millis(200));
        assert!(matches!(result, Err(CollectiveError::Unreachable { rank: 1, .. })), "{link:?}");
        // A dead rank's door is shut.
        let (mut preparations, all) = prepare(link, 2, 2);
        drop(preparations.remove(0));
        let result = preparations.remove(0).form(1, &all, PATIENCE);
        assert!(matches!(result, Err(CollectiveError::Unreachable { rank: 0, .. })), "{link:?}");
    }
}

#[test]
fn a_formation_in_progress_can_be_aborted_and_its_handle_outlives_it() {
    for link in LINKS {
        let (mut preparations, all) = prepare(link, 2, 2);
        let first = preparations.remove(0);
        let handle = first.abort_handle();
        let (answers, answered) = mpsc::channel();
        std::thread::spawn(move || answers.send(first.form(0, &all, PATIENCE).err()).unwrap());
        assert!(answered.recv_timeout(BLOCKED).is_err(), "{link:?}: it did not wait for rank 1");
        handle.abort();
        let error = answered.recv_timeout(ABORT_TAKES).unwrap();
        assert!(matches!(error, Some(CollectiveError::Aborted { epoch: 2 })), "{link:?}");

        let (preparations, all) = prepare(link, 3, 2);
        let early = preparations[0].abort_handle();
        let mut group = ranks::form_prepared(preparations, &all);
        early.abort();
        assert!(matches!(group[0].all_reduce_sum(&mut [1.0]), Err(CollectiveError::Aborted { epoch: 3 })), "{link:?}");
    }
}
