//! One rank's end of an NCCL communicator, which is never waited for without a deadline.

use std::{
    ffi::c_int,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use tracing::error;

use super::{
    NcclError, Values,
    binding::{Handle, IN_PROGRESS, Nccl, SUCCESS, UniqueId},
};
use crate::collective::AbortHandle;

/// How long an abort may take before the process must end instead.
pub const ABORT_LIMIT: Duration = Duration::from_secs(2);
/// Between two looks at a communicator's state. Forming takes a tenth of a second or more, and calls on a formed one are
/// done when they return.
const POLL: Duration = Duration::from_micros(200);

/// A rank's place in a group.
#[derive(Clone, Copy)]
pub struct Member {
    /// The formation.
    pub epoch: u64,
    /// What rank 0 made for this formation.
    pub id: UniqueId,
    /// This rank.
    pub rank: usize,
    /// Number of ranks.
    pub world_size: usize,
}

/// One rank's end of a communicator. Aborted when dropped, unless [`finish`](Self::finish) ended it in order.
pub struct Communicator(Arc<Inner>);

struct Inner {
    nccl: Arc<Nccl>,
    epoch: u64,
    rank: usize,
    /// Set before the handle is taken, so that nobody waits for a state that no one will see.
    aborted: AtomicBool,
    /// None once the communicator has ended. Held for the length of a call, so that none can meet an abort; calls return
    /// at once, and one that does not makes the abort count as hung.
    handle: Mutex<Option<Handle>>,
    on_hang: Box<dyn Fn(&NcclError) + Send + Sync>,
}

impl Communicator {
    /// Begins to join the group, on the device whose context is current. `on_hang` is called when an abort does not
    /// return within [`ABORT_LIMIT`]; it should end the process, since only that frees the device.
    ///
    /// # Errors
    /// When there is no usable device or the network fails at once.
    pub fn start(
        nccl: &Arc<Nccl>,
        member: &Member,
        on_hang: impl Fn(&NcclError) + Send + Sync + 'static,
    ) -> Result<Self, NcclError> {
        let (handle, result) = nccl.init(member.id, member.world_size as c_int, member.rank as c_int);
        let inner = Inner {
            nccl: Arc::clone(nccl),
            epoch: member.epoch,
            rank: member.rank,
            aborted: AtomicBool::new(false),
            handle: Mutex::new(handle),
            on_hang: Box::new(on_hang),
        };
        // Dropped on an error, which aborts what there is of it.
        let communicator = Self(Arc::new(inner));
        result.map(|()| communicator)
    }

    /// Waits until all ranks have joined.
    ///
    /// # Errors
    /// When a rank is missing after `limit`, NCCL fails, or the communicator is aborted meanwhile. It is of no use then.
    pub fn wait_ready(&self, limit: Duration) -> Result<(), NcclError> {
        self.0.settle("ncclCommInitRankConfig", limit)
    }

    /// Queues the sum over all ranks, and waits up to `limit` until it is queued, not until it is done.
    ///
    /// # Errors
    /// When NCCL fails, does not queue it in time, or the communicator was aborted.
    pub fn all_reduce(&self, values: &Values, limit: Duration) -> Result<(), NcclError> {
        self.0.with(|nccl, handle| nccl.all_reduce(handle, values))?;
        self.0.settle("ncclAllReduce", limit)
    }

    /// Queues the gathering of every rank's values, in the order of ranks, and waits up to `limit` until it is queued.
    ///
    /// # Errors
    /// As for [`all_reduce`](Self::all_reduce).
    pub fn all_gather(&self, values: &Values, limit: Duration) -> Result<(), NcclError> {
        self.0.with(|nccl, handle| nccl.all_gather(handle, values))?;
        self.0.settle("ncclAllGather", limit)
    }

    /// Fails if something went wrong since the last call; waits for nobody. To be asked while waiting for the stream.
    ///
    /// # Errors
    /// What NCCL found, or that the communicator was aborted.
    pub fn check(&self) -> Result<(), NcclError> {
        self.0.state("a collective under way").map(|_| ())
    }

    /// Ends the communicator in order once the stream is idle; all ranks must do so.
    ///
    /// # Errors
    /// When a peer does not follow within `limit`, or NCCL fails; the communicator is aborted then.
    pub fn finish(self, limit: Duration) -> Result<(), NcclError> {
        self.0.with(Nccl::finalize)?;
        self.0.settle("ncclCommFinalize", limit)?;
        match self.0.lock().take() {
            Some(handle) => self.0.nccl.destroy(handle),
            None => Err(self.0.gone()),
        }
    }

    /// Ends everything under way, from any thread. May be called more than once.
    ///
    /// # Errors
    /// [`NcclError::AbortHung`] when NCCL does not return within [`ABORT_LIMIT`], after telling `on_hang`.
    pub fn abort(&self) -> Result<(), NcclError> {
        abort(&self.0)
    }

    /// A handle that does [`abort`](Self::abort) from another thread.
    pub fn abort_handle(&self) -> AbortHandle {
        let inner = Arc::clone(&self.0);
        AbortHandle::new(move || abort_unheard(&inner))
    }
}

impl Drop for Communicator {
    fn drop(&mut self) {
        let ended = self.0.handle.try_lock().is_ok_and(|handle| handle.is_none());
        if !ended {
            abort_unheard(&self.0);
        }
    }
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, Option<Handle>> {
        self.handle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn gone(&self) -> NcclError {
        NcclError::Aborted { epoch: self.epoch }
    }

    fn with<T>(&self, call: impl FnOnce(&Nccl, &Handle) -> Result<T, NcclError>) -> Result<T, NcclError> {
        let handle = self.lock();
        match handle.as_ref() {
            Some(handle) if !self.aborted.load(Ordering::Acquire) => call(&self.nccl, handle),
            _ => Err(self.gone()),
        }
    }

    /// Whether the communicator is done with the last call.
    fn state(&self, call: &'static str) -> Result<bool, NcclError> {
        self.with(|nccl, handle| match nccl.async_error(handle)? {
            SUCCESS => Ok(true),
            IN_PROGRESS => Ok(false),
            code => Err(nccl.error(call, code, Some(handle))),
        })
    }

    /// Waits until the communicator is done with `call`.
    fn settle(&self, call: &'static str, limit: Duration) -> Result<(), NcclError> {
        let start = Instant::now();
        while !self.state(call)? {
            if start.elapsed() > limit {
                let limit_ms = limit.as_millis() as u64;
                return Err(NcclError::Late { call, rank: self.rank, epoch: self.epoch, limit_ms });
            }
            thread::sleep(POLL);
        }
        Ok(())
    }
}

/// Aborts on a thread of its own: NCCL may hang in it, or in the call that holds the lock.
fn abort(inner: &Arc<Inner>) -> Result<(), NcclError> {
    inner.aborted.store(true, Ordering::Release);
    let (done, ended) = mpsc::channel();
    let worker = Arc::clone(inner);
    let thread = thread::Builder::new().name("nccl-abort".to_owned()).spawn(move || {
        let mut handle = worker.lock();
        // The lock is kept, so that a second abort sees a hanging first one.
        let result = handle.take().map_or(Ok(()), |handle| worker.nccl.abort(handle));
        // Nobody listens any more when it took too long.
        drop(done.send(result));
    });
    let result = match thread.map(|_| ended.recv_timeout(ABORT_LIMIT)) {
        Ok(Ok(result)) => result,
        // The thread cannot be started, or has not answered.
        Err(_) | Ok(Err(_)) => {
            let limit_ms = ABORT_LIMIT.as_millis() as u64;
            Err(NcclError::AbortHung { rank: inner.rank, epoch: inner.epoch, limit_ms })
        }
    };
    if let Err(cause @ NcclError::AbortHung { .. }) = &result {
        (inner.on_hang)(cause);
    }
    result
}

/// Aborts where nobody can be told how that went.
fn abort_unheard(inner: &Arc<Inner>) {
    if let Err(cause) = abort(inner) {
        error!(rank = inner.rank, epoch = inner.epoch, %cause, "NCCL abort failed");
    }
}
