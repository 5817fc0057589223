//! Threads that run the tasks of one call together: fork, claim, join.
//!
//! Each thread first runs tasks of its own stretch, in order, so that neighbouring tasks read on where the last one ended;
//! then it helps the others with theirs. A slow thread delays nobody, and which thread runs a task never changes a result.
//! Idle threads spin for some microseconds, the time between two operations of a step, and then sleep.

use std::{
    any::Any,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    thread::JoinHandle,
};

use crate::backend::BackendError;

/// Pauses before a waiting thread sleeps: about 50 µs on current processors.
const SPINS: usize = 2000;

type Task<'a> = dyn Fn(usize) + Sync + 'a;

/// A call in progress. The lifetime is a lie that [`Open`] makes harmless: no thread holds a job when the call returns.
#[derive(Clone, Copy)]
struct Job {
    task: &'static Task<'static>,
    tasks: usize,
}

#[derive(Default)]
struct State {
    /// Present while threads may still join in.
    job: Option<Job>,
    /// Workers that wait on `wake`.
    sleeping: usize,
    /// The caller waits on `done`.
    caller_sleeps: bool,
    closing: bool,
    panic: Option<Box<dyn Any + Send>>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    wake: Condvar,
    done: Condvar,
    /// Number of jobs opened so far; written under the lock, watched without.
    opened: AtomicU64,
    /// Workers inside the job; written under the lock, watched without.
    active: AtomicUsize,
    /// The next task to claim of each thread's stretch; the caller's is the first.
    next: Vec<Claim>,
}

/// A counter with a cache line of its own.
#[derive(Default)]
#[repr(align(64))]
struct Claim(AtomicUsize);

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing that runs under the lock can leave the state half changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where a thread's stretch of the tasks begins.
    fn stretch(&self, thread: usize, tasks: usize) -> usize {
        tasks * thread / self.next.len()
    }

    fn work(&self, job: Job, thread: usize) {
        for offset in 0..self.next.len() {
            let owner = (thread + offset) % self.next.len();
            let end = self.stretch(owner + 1, job.tasks);
            loop {
                let index = self.next[owner].0.fetch_add(1, Ordering::Relaxed);
                if index >= end {
                    break;
                }
                (job.task)(index);
            }
        }
    }

    /// Waits for a job after the `seen` first ones; `None` when the pool closes.
    fn next_job(&self, seen: u64) -> Option<u64> {
        for _ in 0..SPINS {
            let opened = self.opened.load(Ordering::Acquire);
            if opened != seen {
                return Some(opened);
            }
            std::hint::spin_loop();
        }
        let mut state = self.lock();
        state.sleeping += 1;
        while self.opened.load(Ordering::Acquire) == seen && !state.closing {
            state = self.wake.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.sleeping -= 1;
        (!state.closing).then(|| self.opened.load(Ordering::Acquire))
    }

    fn worker(&self, thread: usize) {
        let mut seen = 0;
        while let Some(opened) = self.next_job(seen) {
            seen = opened;
            let job = {
                let state = self.lock();
                let Some(job) = state.job else { continue };
                self.active.fetch_add(1, Ordering::Relaxed);
                job
            };
            let result = catch_unwind(AssertUnwindSafe(|| self.work(job, thread)));
            let mut state = self.lock();
            if let Err(panic) = result {
                state.panic = Some(panic);
            }
            if self.active.fetch_sub(1, Ordering::Release) == 1 && state.caller_sleeps {
                self.done.notify_one();
            }
        }
    }
}

/// An open job. Dropping it, also by unwinding, lets no further thread in and waits for those inside.
struct Open<'a>(&'a Shared);

impl Drop for Open<'_> {
    fn drop(&mut self) {
        self.0.lock().job = None;
        for _ in 0..SPINS {
            if self.0.active.load(Ordering::Acquire) == 0 {
                return;
            }
            std::hint::spin_loop();
        }
        let mut state = self.0.lock();
        state.caller_sleeps = true;
        while self.0.active.load(Ordering::Acquire) != 0 {
            state = self.0.done.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.caller_sleeps = false;
    }
}

/// The caller's thread and some more.
pub(crate) struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

impl Pool {
    /// The caller's thread only.
    pub(crate) fn alone() -> Self {
        Self::of(1)
    }

    /// A pool with room for `threads`, of which none runs yet.
    fn of(threads: usize) -> Self {
        let next = (0..threads).map(|_| Claim::default()).collect();
        Self { shared: Arc::new(Shared { next, ..Shared::default() }), workers: Vec::new() }
    }

    /// A pool of `threads`, the caller's own included.
    pub(crate) fn new(threads: usize) -> Result<Self, BackendError> {
        let threads = threads.max(1);
        let mut pool = Self::of(threads);
        for index in 1..threads {
            let shared = Arc::clone(&pool.shared);
            let worker =
                std::thread::Builder::new().name(format!("cpu-{index}")).spawn(move || shared.worker(index)).map_err(
                    |error| BackendError::Unsupported(format!("thread {index} of {threads} does not start: {error}")),
                )?;
            pool.workers.push(worker);
        }
        Ok(pool)
    }

    /// Threads that work, the caller's own included.
    pub(crate) fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `task` once for each number below `tasks` and returns when all are done.
    pub(crate) fn run(&mut self, tasks: usize, task: &Task<'_>) {
        if self.workers.is_empty() || tasks <= 1 {
            (0..tasks).for_each(task);
            return;
        }
        // SAFETY: only the lifetime changes. `Open` keeps this call from returning while a thread can reach the job.
        let task = unsafe { std::mem::transmute::<&Task<'_>, &'static Task<'static>>(task) };
        let job = Job { task, tasks };
        let open = self.open(job);
        self.shared.work(job, 0);
        drop(open);
        let panic = self.shared.lock().panic.take();
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }

    fn open(&self, job: Job) -> Open<'_> {
        // No worker is inside a job now, so nobody else claims.
        for (thread, next) in self.shared.next.iter().enumerate() {
            next.0.store(self.shared.stretch(thread, job.tasks), Ordering::Relaxed);
        }
        let mut state = self.shared.lock();
        state.job = Some(job);
        // A call whose own task panicked may have left a worker's panic behind.
        state.panic = None;
        self.shared.opened.fetch_add(1, Ordering::Release);
        if state.sleeping > 0 {
            self.shared.wake.notify_all();
        }
        drop(state);
        Open(&self.shared)
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.lock().closing = true;
        self.shared.wake.notify_all();
        for worker in self.workers.drain(..) {
            // A worker catches what its tasks throw, so it never ends by a panic.
            let _ = worker.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once_whatever_the_number_of_threads() {
        for threads in [1, 2, 3, 7] {
            let mut pool = Pool::new(threads).unwrap();
            for tasks in [0, 1, 2, 5, 1000] {
                let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                pool.run(tasks, &|index| {
                    counts[index].fetch_add(1, Ordering::Relaxed);
                });
                assert!(
                    counts.iter().all(|count| count.load(Ordering::Relaxed) == 1),
                    "{threads} threads, {tasks} tasks"
                );
            }
        }
    }

    #[test]
    fn a_task_that_panics_fails_the_call_and_not_the_pool() {
        let mut pool = Pool::new(2).unwrap();
        let failed = catch_unwind(AssertUnwindSafe(|| pool.run(100, &|index| assert!(index != 50, "task 50"))));
        assert!(failed.is_err());
        let sum = AtomicUsize::new(0);
        pool.run(100, &|index| {
            sum.fetch_add(index, Ordering::Relaxed);
        });
        assert_eq!(sum.into_inner(), 4950);
    }

    #[test]
    fn a_pool_that_slept_works_again() {
        let mut pool = Pool::new(2).unwrap();
        // Until the worker sleeps; a fact of its state, no guess about time.
        while pool.shared.lock().sleeping == 0 {
            std::thread::yield_now();
        }
        let sum = AtomicUsize::new(0);
        pool.run(10, &|index| {
            sum.fetch_add(index, Ordering::Relaxed);
        });
        assert_eq!(sum.into_inner(), 45);
    }
}
