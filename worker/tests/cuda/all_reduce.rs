//! The push all-reduce and all-gather: ranks are emulated devices, each launched by a thread of its own, in one address
//! space.

use std::{
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use half::bf16;
use phalanx_worker::{
    backend::cuda::{
        driver::{Address, Driver},
        kernels::ALL_REDUCE,
    },
    collective::{
        CollectiveError,
        push::{HostWords, Launch, Message, Norm, Offer, Places, PushGroup, Region, agree},
    },
};

use crate::bench::{assert_close, noise};
use crate::emulator::{Emulator, Graph, Module};

/// Far beyond what a test takes: whoever reaches it hangs.
const NEVER: Duration = Duration::from_secs(60);
/// Rounding to bf16 loses at most half of 2^-8 of a value.
const BF16: f64 = 1.0 / 256.0;
/// How long the others wait for a rank that is missing; far longer than any of them is late on a busy machine.
const LIMIT: Duration = Duration::from_secs(2);
const ROWS: usize = 3;
const EPS: f32 = 1e-5;

struct Rank {
    device: Emulator,
    module: Module,
    offer: Offer,
    places: Places,
    words: Arc<HostWords>,
    group: PushGroup,
    region: Address,
}

/// A formed group. The waiting blocks of a rank run at the same time, as they must: one thread of the system for each.
fn form(world: usize, hidden: usize, backwards: bool) -> Vec<Rank> {
    let layout = Region::new(world, hidden, ROWS, 3 * 4096, ROWS).unwrap();
    let devices: Vec<Emulator> = (0..world).map(|_| Emulator::with_order(ROWS as u32, backwards)).collect();
    let regions: Vec<Address> = devices.iter().map(|device| device.allocate(layout.bytes()).unwrap()).collect();
    let offers: Vec<Offer> = (0..world).map(|rank| Offer { epoch: 7, rank, region: layout }).collect();
    let ranks = devices.into_iter().enumerate().map(|(rank, device)| {
        device.clear(regions[rank], layout.bytes()).unwrap();
        agree(&offers[rank], &offers).unwrap();
        let (offer, words) = (offers[rank], Arc::new(HostWords::default()));
        let places = Places { regions: regions.clone(), words: Address(words.address()) };
        let group = PushGroup::new(offer, places.clone(), Arc::clone(&words), NEVER).unwrap();
        let module = device.load(&ALL_REDUCE, &layout.definitions()).unwrap_or_else(|error| panic!("{error}"));
        Rank { device, module, offer, places, words, group, region: regions[rank] }
    });
    ranks.collect()
}

/// Does the same on all ranks at once.
fn on_all<T: Send>(ranks: &[Rank], run: impl Fn(usize, &Rank) -> T + Sync) -> Vec<T> {
    thread::scope(|scope| {
        let run = &run;
        let threads: Vec<_> =
            ranks.iter().enumerate().map(|(index, rank)| scope.spawn(move || run(index, rank))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

impl Rank {
    fn floats(&self, values: &[f32]) -> Address {
        self.bytes(&values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<_>>())
    }

    fn bytes(&self, bytes: &[u8]) -> Address {
        let address = self.device.allocate(bytes.len()).unwrap();
        self.device.upload(address, bytes).unwrap();
        address
    }

    fn read(&self, from: Address, bytes: usize) -> Vec<u8> {
        let mut all = vec![0; bytes];
        self.device.download(from, &mut all).unwrap();
        all
    }

    fn read_floats(&self, from: Address, count: usize) -> Vec<f32> {
        self.read(from, 4 * count).as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
    }

    fn launch(&self, launch: &Launch) {
        let function = self.device.function(&self.module, launch.kernel, launch.shape.shared_bytes).unwrap();
        self.device.launch(&function, launch.shape, &launch.arguments).unwrap();
    }

    /// Makes counters and flags what they are after 2^32 - 3 calls.
    fn age(&self) {
        let channel = self.offer.region.sums();
        let slots = 2 * self.offer.region.world_size() * channel.rows() * channel.row_bytes();
        let words = (channel.failed_offset() - slots) / 4;
        let old: Vec<u8> = (0..words).flat_map(|_| 0xffff_fffd_u32.to_le_bytes()).collect();
        self.device.upload(self.region.offset(slots), &old).unwrap();
    }
}

/// One call's data: what each rank gives, and what was there before.
struct Case {
    rows: usize,
    hidden: usize,
    message: Message,
    fused: bool,
    partials: Vec<Vec<f32>>,
    x: Vec<f32>,
    weight: Vec<f32>,
}

impl Case {
    /// Kinds and numbers of rows change from call to call, as they do when batches do.
    fn of_call(call: usize, world: usize, hidden: usize) -> Self {
        let (rows, seed) = (1 + call * 2 % ROWS, 100 * call as u64);
        Self {
            rows,
            hidden,
            message: if (call / 2).is_multiple_of(2) { Message::F32 } else { Message::Bf16 },
            fused: call % 2 == 1,
            partials: (0..world).map(|rank| noise(rows * hidden, seed + rank as u64)).collect(),
            x: noise(rows * hidden, seed + 50),
            weight: noise(hidden, seed + 51),
        }
    }

    /// Runs it on one rank: `x`, and `y` where there is a norm.
    fn run(&self, index: usize, rank: &Rank) -> (Vec<f32>, Vec<f32>) {
        let count = self.rows * self.hidden;
        let (partial, y) = (rank.floats(&self.partials[index]), rank.device.allocate(2 * count).unwrap());
        // Without a norm the sum takes the place of the partial one.
        let x = if self.fused { rank.floats(&self.x) } else { partial };
        let norm = self.fused.then(|| Norm { weight: rank.floats(&self.weight), y, eps: EPS });
        rank.launch(&rank.group.all_reduce(self.rows, self.message, partial, x, norm).unwrap());
        rank.group.check().unwrap();
        let halves = rank.read(y, 2 * count);
        let y = halves.as_chunks::<2>().0.iter().map(|bytes| bf16::from_le_bytes(*bytes).to_f32()).collect();
        (rank.read_floats(x, count), if self.fused { y } else { Vec::new() })
    }

    /// The sum in the order of ranks, to the bit.
    fn expected_x(&self) -> Vec<f32> {
        let sent = |value: f32| match self.message {
            Message::F32 => value,
            Message::Bf16 => bf16::from_f32(value).to_f32(),
        };
        let sum = |i: usize| self.partials.iter().fold(0.0, |sum: f32, partial| sum + sent(partial[i]));
        (0..self.rows * self.hidden).map(|i| if self.fused { self.x[i] + sum(i) } else { sum(i) }).collect()
    }

    #[track_caller]
    fn check(&self, found: &[(Vec<f32>, Vec<f32>)]) {
        let expected = self.expected_x();
        for (rank, (x, y)) in found.iter().enumerate() {
            assert_eq!(x, &expected, "rank {rank}");
            assert_eq!(y, &found[0].1, "rank {rank} has other bits than rank 0");
        }
        let exact = |i: usize| {
            let sum: f64 = self.partials.iter().map(|partial| f64::from(partial[i])).sum();
            sum + if self.fused { f64::from(self.x[i]) } else { 0.0 }
        };
        let exact: Vec<f64> = (0..self.rows * self.hidden).map(exact).collect();
        let tolerance = if self.message == Message::F32 { 1e-6 } else { BF16 };
        assert_close("sum", &found[0].0, &exact, self.hidden, tolerance);
        if self.fused {
            let normed = expected.chunks(self.hidden).flat_map(|row| {
                let squares: f64 = row.iter().map(|&value| f64::from(value).powi(2)).sum();
                let root = (squares / self.hidden as f64 + f64::from(EPS)).sqrt();
                row.iter().zip(&self.weight).map(move |(&x, &w)| f64::from(x) / root * f64::from(w))
            });
            assert_close("norm", &found[0].1, &normed.collect::<Vec<_>>(), self.hidden, BF16);
        }
    }
}

/// Lets the other ranks run ahead or fall behind.
fn dawdle(index: usize, call: usize) {
    let turns = (index * 7 + call * 13) % 11;
    (0..turns * turns * 4).for_each(|_| thread::yield_now());
}

fn many_calls(world: usize, hidden: usize, calls: usize, aged: bool) {
    for backwards in [false, true] {
        let ranks = form(world, hidden, backwards);
        if aged {
            ranks.iter().for_each(Rank::age);
        }
        let cases: Vec<Case> = (0..calls).map(|call| Case::of_call(call, world, hidden)).collect();
        let found = on_all(&ranks, |index, rank| {
            let run = |(call, case): (usize, &Case)| {
                dawdle(index, call);
                case.run(index, rank)
            };
            cases.iter().enumerate().map(run).collect::<Vec<_>>()
        });
        for (call, case) in cases.iter().enumerate() {
            case.check(&found.iter().map(|rank| rank[call].clone()).collect::<Vec<_>>());
        }
    }
}

#[test]
fn two_ranks_get_the_same_sums_call_after_call() {
    many_calls(2, 96, 24, false);
}

#[test]
fn four_ranks_sum_and_norm_rows_of_the_models_width() {
    many_calls(4, 2880, 8, false);
}

#[test]
fn eight_ranks_get_the_same_sums_call_after_call() {
    many_calls(8, 96, 12, false);
}

#[test]
fn counters_may_wrap() {
    many_calls(2, 96, 12, true);
}

#[test]
fn one_rank_sums_alone() {
    many_calls(1, 96, 4, false);
}

#[test]
fn a_recorded_call_can_be_replayed() {
    let (world, hidden) = (3, 96);
    let ranks = form(world, hidden, false);
    let partials: Vec<_> = (0..world).map(|rank| noise(ROWS * hidden, rank as u64)).collect();
    let found = on_all(&ranks, |index, rank| {
        let (partial, x) = (rank.floats(&partials[index]), rank.floats(&vec![0.0; ROWS * hidden]));
        let y = rank.device.allocate(2 * ROWS * hidden).unwrap();
        let norm = Norm { weight: rank.floats(&vec![1.0; hidden]), y, eps: EPS };
        let call = rank.group.all_reduce(ROWS, Message::F32, partial, x, Some(norm)).unwrap();
        rank.device.begin_capture().unwrap();
        (0..3).for_each(|_| rank.launch(&call));
        let graph = rank.device.end_capture().unwrap();
        for step in 0..5 {
            dawdle(index, step);
            rank.device.replay(&graph).unwrap();
        }
        rank.group.check().unwrap();
        rank.read_floats(x, ROWS * hidden)
    });
    let sum = |i: usize| partials.iter().fold(0.0, |sum: f32, partial| sum + partial[i]);
    let expected: Vec<f32> = (0..ROWS * hidden).map(|i| (0..15).fold(0.0, |x: f32, _| x + sum(i))).collect();
    found.iter().for_each(|x| assert_eq!(x, &expected));
}

#[test]
fn gathers_put_every_ranks_bytes_in_order_between_sums() {
    for (world, backwards) in [(2, false), (4, true), (8, false)] {
        let ranks = form(world, 96, backwards);
        let sizes = [16, 4096, 4112, 3 * 4096, 2016, 9008];
        let of = |rank: usize, call: usize| -> Vec<u8> {
            (0..sizes[call]).map(|i| (i * 31 + rank * 7 + call * 3) as u8).collect()
        };
        let sums: Vec<Case> = (0..sizes.len()).map(|call| Case::of_call(call, world, 96)).collect();
        let found = on_all(&ranks, |index, rank| {
            let run = |call: usize| {
                dawdle(index, call);
                let result = rank.device.allocate(world * sizes[call]).unwrap();
                let mine = rank.bytes(&of(index, call));
                rank.launch(&rank.group.all_gather(sizes[call], mine, result).unwrap());
                rank.group.check().unwrap();
                (rank.read(result, world * sizes[call]), sums[call].run(index, rank))
            };
            (0..sizes.len()).map(run).collect::<Vec<_>>()
        });
        for call in 0..sizes.len() {
            let expected: Vec<u8> = (0..world).flat_map(|rank| of(rank, call)).collect();
            found.iter().for_each(|calls| assert!(calls[call].0 == expected, "call {call} of {world} ranks"));
            sums[call].check(&found.iter().map(|calls| calls[call].1.clone()).collect::<Vec<_>>());
        }
    }
}

/// A recorded call of all rows, and what it sums.
type Recorded = (Graph, Address);

/// A group after two good calls, which from here on waits no longer than `limit`, and for each rank a recorded call.
fn recorded(limit: Duration) -> (Vec<Rank>, Vec<Recorded>) {
    let mut ranks = form(4, 96, false);
    on_all(&ranks, |index, rank| (0..2).for_each(|call| drop(Case::of_call(call, 4, 96).run(index, rank))));
    for rank in &mut ranks {
        rank.group = PushGroup::new(rank.offer, rank.places.clone(), Arc::clone(&rank.words), limit).unwrap();
    }
    let record = |rank: &Rank| {
        let (partial, x) = (rank.floats(&vec![1.0; ROWS * 96]), rank.floats(&vec![0.0; ROWS * 96]));
        let call = rank.group.all_reduce(ROWS, Message::Bf16, partial, x, None).unwrap();
        rank.device.begin_capture().unwrap();
        rank.launch(&call);
        (rank.device.end_capture().unwrap(), partial)
    };
    let calls = ranks.iter().map(record).collect();
    (ranks, calls)
}

/// What a failed group does from now on: it refuses new launches, and recorded ones end at once and reach no peer.
fn assert_dead(rank: &Rank, (graph, partial): &Recorded, peer: &Rank) {
    assert!(rank.group.all_reduce(1, Message::F32, rank.region, rank.region, None).is_err());
    // Other values than those that the peer has, so that they would show.
    rank.device.upload(*partial, &[0x40; 4 * ROWS * 96]).unwrap();
    let bytes = peer.offer.region.bytes();
    let (before, start) = (peer.read(peer.region, bytes), Instant::now());
    for _ in 0..40 {
        rank.device.replay(graph).unwrap();
    }
    // Forty waits would take twice as long.
    assert!(start.elapsed() < 20 * LIMIT, "{:?}", start.elapsed());
    assert!(peer.read(peer.region, bytes) == before, "a dead rank wrote to a peer");
}

#[test]
fn a_missing_rank_ends_in_an_error_that_names_it() {
    let (ranks, calls) = recorded(LIMIT);
    let start = Instant::now();
    on_all(&ranks, |index, rank| {
        if index != 2 {
            rank.device.replay(&calls[index].0).unwrap();
        }
    });
    assert!(start.elapsed() >= LIMIT);
    assert!(start.elapsed() < 10 * LIMIT, "{:?}", start.elapsed());
    for index in [0, 1, 3] {
        let error = ranks[index].group.check().unwrap_err();
        assert!(matches!(error, CollectiveError::Late { rank: 2, epoch: 7, limit_ms: 2000 }), "{error}");
        assert_dead(&ranks[index], &calls[index], &ranks[2]);
    }
    ranks[2].group.check().unwrap();
}

#[test]
fn an_abort_ends_all_that_wait_within_its_time() {
    let (ranks, calls) = recorded(NEVER);
    let start = Instant::now();
    on_all(&ranks, |index, rank| match index {
        // Whether the others wait already or are about to does not matter.
        1 => {
            dawdle(3, 7);
            ranks.iter().for_each(|rank| rank.group.abort_handle().abort());
        }
        _ => rank.device.replay(&calls[index].0).unwrap(),
    });
    assert!(start.elapsed() < NEVER / 2, "{:?}", start.elapsed());
    for index in [0, 2, 3] {
        let error = ranks[index].group.check().unwrap_err();
        assert!(matches!(error, CollectiveError::Aborted { epoch: 7 }), "{error}");
        assert_dead(&ranks[index], &calls[index], &ranks[1]);
    }
}

#[test]
fn an_abort_in_the_middle_of_many_calls_leaves_only_whole_sums() {
    let (ranks, calls) = recorded(NEVER);
    let done = on_all(&ranks, |index, rank| {
        let mut whole = 0;
        loop {
            rank.device.replay(&calls[index].0).unwrap();
            if rank.group.check().is_err() {
                return whole;
            }
            whole += 1;
            if index == 3 && whole == 50 {
                // Only after this rank's own call, so that the others are ahead of it or wait.
                ranks.iter().for_each(|rank| rank.group.abort_handle().abort());
            }
        }
    });
    // Nobody gets further than one call beyond the slowest.
    assert!(done.iter().all(|&calls| (48..=52).contains(&calls)), "{done:?}");
}

#[test]
fn what_does_not_fit_is_refused_before_any_launch() {
    let ranks = form(2, 96, false);
    let (group, at) = (&ranks[0].group, ranks[0].region);
    assert!(group.all_reduce(ROWS + 1, Message::F32, at, at, None).is_err());
    assert!(group.all_reduce(0, Message::F32, at, at, None).is_err());
    assert!(group.all_gather(3 * 4096 + 16, at, at).is_err());
    assert!(group.all_gather(24, at, at).is_err());
    let offer = |rank, hidden| Offer { epoch: 7, rank, region: Region::new(2, hidden, 1, 0, 1).unwrap() };
    let error = agree(&offer(0, 96), &[offer(0, 96), offer(1, 104)]).unwrap_err();
    assert!(error.to_string().starts_with("rank 1 offers"), "{error}");
    assert!(agree(&offer(0, 96), &[offer(0, 96)]).is_err());
}
