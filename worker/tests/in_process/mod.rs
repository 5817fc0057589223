//! A collective between threads of one process, for tests of what stands above it.

use std::sync::{Arc, Condvar, Mutex};

use phalanx_worker::collective::{AbortHandle, Collective, CollectiveError};

struct Exchange {
    /// What each rank brought to the exchange that is gathering.
    brought: Vec<Option<Vec<u8>>>,
    /// The last complete exchange, and how many ranks have yet to take it.
    complete: Option<(Vec<Vec<u8>>, usize)>,
    aborted: bool,
}

struct Shared {
    exchange: Mutex<Exchange>,
    changed: Condvar,
}

/// One rank's end.
pub(crate) struct InProcess {
    rank: usize,
    world_size: usize,
    shared: Arc<Shared>,
}

/// The ends of a group of `world_size` threads, by rank.
pub(crate) fn group(world_size: usize) -> Vec<InProcess> {
    let exchange = Exchange { brought: vec![None; world_size], complete: None, aborted: false };
    let shared = Arc::new(Shared { exchange: Mutex::new(exchange), changed: Condvar::new() });
    (0..world_size).map(|rank| InProcess { rank, world_size, shared: Arc::clone(&shared) }).collect()
}

/// Runs `work` on one thread a rank and returns what each gave, by rank.
pub(crate) fn on_every_rank<T: Send>(world_size: usize, work: impl Fn(InProcess) -> T + Sync) -> Vec<T> {
    let work = &work;
    std::thread::scope(|scope| {
        let threads: Vec<_> = group(world_size).into_iter().map(|end| scope.spawn(move || work(end))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

impl Collective for InProcess {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.world_size
    }

    fn all_reduce_sum(&mut self, values: &mut [f32]) -> Result<(), CollectiveError> {
        let mine: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        values.fill(0.0);
        for theirs in self.all_gather(&mine)? {
            let theirs = theirs.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes));
            values.iter_mut().zip(theirs).for_each(|(sum, value)| *sum += value);
        }
        Ok(())
    }

    fn all_gather(&mut self, mine: &[u8]) -> Result<Vec<Vec<u8>>, CollectiveError> {
        let Shared { exchange, changed } = &*self.shared;
        let mut state = exchange.lock().unwrap();
        state = changed.wait_while(state, |state| state.complete.is_some() && !state.aborted).unwrap();
        state.brought[self.rank] = Some(mine.to_vec());
        if state.brought.iter().all(Option::is_some) {
            let all = state.brought.iter_mut().map(|bytes| bytes.take().unwrap()).collect();
            state.complete = Some((all, self.world_size));
            changed.notify_all();
        }
        state = changed.wait_while(state, |state| state.complete.is_none() && !state.aborted).unwrap();
        if state.aborted {
            return Err(CollectiveError::Aborted { epoch: 0 });
        }
        let (all, left) = state.complete.as_mut().unwrap();
        let (all, last) = (all.clone(), *left == 1);
        *left -= 1;
        if last {
            state.complete = None;
            changed.notify_all();
        }
        Ok(all)
    }

    fn abort_handle(&self) -> AbortHandle {
        let shared = Arc::clone(&self.shared);
        AbortHandle::new(move || {
            shared.exchange.lock().unwrap().aborted = true;
            shared.changed.notify_all();
        })
    }
}
