//! One-shot push all-reduce between the devices of one host, for messages too small for NCCL to be quick: the host's side
//! of `kernels/all_reduce.cu`, which holds the protocol and why it is right.
//!
//! | file | holds |
//! | --- | --- |
//! | `region` | how a rank's exported memory is laid out |
//! | `choice` | whether a message goes this way or through NCCL |
//!
//! It makes no CUDA calls: device addresses come in, launches go out. The life of a group over one epoch:
//!
//! 1. Every rank allocates [`Region::bytes`] of device memory, **clears them**, exports them, and registers a
//!    [`HostWords`] page with the device. What it exports travels to the others with its [`Offer`].
//! 2. [`agree`] checks the offers; every rank maps the others' regions and makes a [`PushGroup`]. No rank launches before
//!    all have cleared theirs, which the step log gives: the first plan comes when all ranks are ready.
//! 3. All ranks launch the same calls in the same order, each on one stream, directly or from a recorded graph.
//! 4. After each step [`PushGroup::check`]: a call that was aborted or had to wait too long has left its result
//!    unwritten, and all later launches have done nothing.
//! 5. At the end a rank closes its mappings when its stream is idle, and frees its own region when all others have closed
//!    theirs or are gone. The next epoch takes regions of its own: flags and counters are never reset.

mod choice;
mod region;

use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use thiserror::Error;

pub use choice::{ChoiceError, Facts, Way, Wish, choose};
pub use region::{Channel, GATHER_ROW_BYTES, Region};

use super::{AbortHandle, CollectiveError};
use crate::backend::cuda::driver::{Address, Arguments, Shape};

/// Most ranks that push to each other, as many as fit on one host's switch.
pub const MAX_WORLD: usize = 8;
/// Threads of a block of any kernel here, as in `all_reduce.cu`.
const THREADS: u32 = 384;
/// Shared memory of a block: two words, padded to 16 bytes, and one float a warp.
const SHARED_BYTES: u32 = 16 + 4 * (THREADS / 32);

/// Why a push group cannot be.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum PushError {
    /// Too many ranks, or none.
    #[error("a push all-reduce of {0} ranks, 1 to {MAX_WORLD} are possible; use NCCL (--all-reduce nccl)")]
    World(usize),
    /// The width does not divide into messages.
    #[error("rows of {0} values, a positive multiple of 8 is needed; use NCCL (--all-reduce nccl)")]
    Hidden(usize),
    /// No rows, or more than can wait at the same time.
    #[error("{rows} rows for {multiprocessors} multiprocessors, 1 to as many are possible")]
    Rows {
        /// Rows asked for.
        rows: usize,
        /// What the device has; each row's block needs one while it waits.
        multiprocessors: usize,
    },
    /// A rank belongs to another formation or laid out its memory differently.
    #[error("rank {rank} offers {found}, expected {expected}")]
    Offer {
        /// The rank.
        rank: usize,
        /// What it offers.
        found: String,
        /// What this rank offers, for that rank's place.
        expected: String,
    },
}

/// What a rank says of its region to the others, beside the handle with which they map it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offer {
    /// The formation.
    pub epoch: u64,
    /// Whose it is.
    pub rank: usize,
    /// How its memory is laid out.
    pub region: Region,
}

/// Checks that the offers, by rank, are of one formation and one layout with `own`.
///
/// # Errors
/// Naming the first rank that differs.
pub fn agree(own: &Offer, all: &[Offer]) -> Result<(), PushError> {
    if all.len() != own.region.world_size() {
        return Err(PushError::World(all.len()));
    }
    for (rank, offer) in all.iter().enumerate() {
        let expected = Offer { rank, ..*own };
        if *offer != expected {
            return Err(PushError::Offer { rank, found: format!("{offer:?}"), expected: format!("{expected:?}") });
        }
    }
    Ok(())
}

/// The words that host and device share: a page of the host's memory, to be registered with the device.
#[derive(Debug, Default)]
#[repr(C, align(4096))]
pub struct HostWords {
    abort: AtomicU32,
    error: AtomicU32,
}

impl HostWords {
    /// Bytes of the page, all of which are this value's own.
    pub const BYTES: usize = size_of::<Self>();

    /// The page's address on the host.
    pub fn address(&self) -> u64 {
        std::ptr::from_ref(self) as u64
    }
}

/// How a partial sum travels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Message {
    /// As it is.
    F32,
    /// Rounded to bf16: half the bytes, and errors of 2^-9 of each partial sum.
    Bf16,
}

/// What a fused call does after the sum: `x += sum`, `y = rms_norm(x) * weight`.
#[derive(Clone, Copy, Debug)]
pub struct Norm {
    /// f32 `[hidden]`.
    pub weight: Address,
    /// bf16 `[rows, hidden]`.
    pub y: Address,
    /// Added to the mean of squares.
    pub eps: f32,
}

/// A kernel to be started.
#[derive(Debug)]
pub struct Launch {
    /// Its name in `all_reduce.cu`.
    pub kernel: &'static str,
    /// How.
    pub shape: Shape,
    /// With what.
    pub arguments: Arguments,
}

/// Where a rank finds what a group shares, as its device sees it.
#[derive(Clone, Debug)]
pub struct Places {
    /// Every rank's region, by rank, aligned to 256 bytes.
    pub regions: Vec<Address>,
    /// This rank's [`HostWords`].
    pub words: Address,
}

/// One rank's end of a group over one epoch.
pub struct PushGroup {
    offer: Offer,
    places: Places,
    words: Arc<HostWords>,
    limit: Duration,
}

impl PushGroup {
    /// A group whose offers have been agreed on. No call waits longer than `limit` for a peer.
    ///
    /// # Errors
    /// When there are not as many regions as ranks.
    pub fn new(offer: Offer, places: Places, words: Arc<HostWords>, limit: Duration) -> Result<Self, PushError> {
        if places.regions.len() != offer.region.world_size() || offer.rank >= places.regions.len() {
            return Err(PushError::World(places.regions.len()));
        }
        Ok(Self { offer, places, words, limit })
    }

    /// The sum over ranks of `partial`, f32 `[rows, hidden]`. Without a norm it is written to `x`, which may be
    /// `partial`; with one it is added to `x`. May be recorded and replayed.
    ///
    /// # Errors
    /// When the group has failed, or there are more rows than its channel has.
    pub fn all_reduce(
        &self,
        rows: usize,
        message: Message,
        partial: Address,
        x: Address,
        norm: Option<Norm>,
    ) -> Result<Launch, CollectiveError> {
        self.check()?;
        let channel = self.offer.region.sums();
        self.fits(rows, channel)?;
        let kernel = match (message, norm.is_some()) {
            (Message::F32, false) => "all_reduce_f32",
            (Message::F32, true) => "all_reduce_norm_f32",
            (Message::Bf16, false) => "all_reduce_bf16",
            (Message::Bf16, true) => "all_reduce_norm_bf16",
        };
        let arguments = self.channel_arguments(channel).pointer(partial).pointer(x);
        let arguments = arguments.optional(norm.map(|norm| norm.weight)).optional(norm.map(|norm| norm.y));
        let arguments = arguments.f32(norm.map_or(0.0, |norm| norm.eps));
        Ok(launch(kernel, rows, arguments))
    }

    /// `result[rank] = mine` of that rank, for `bytes` a rank, a multiple of 16. May be recorded and replayed.
    ///
    /// # Errors
    /// When the group has failed, or its channel has no room for so many bytes.
    pub fn all_gather(&self, bytes: usize, mine: Address, result: Address) -> Result<Launch, CollectiveError> {
        self.check()?;
        let channel = self.offer.region.gathers();
        if !bytes.is_multiple_of(16) {
            let message = format!("{bytes} bytes are not a multiple of 16");
            return Err(CollectiveError::Io { what: "push all-gather".to_owned(), message });
        }
        let rows = bytes.div_ceil(channel.row_bytes());
        self.fits(rows, channel)?;
        let arguments = self.channel_arguments(channel).pointer(mine).pointer(result).size(bytes);
        Ok(launch("all_gather_small", rows, arguments))
    }

    /// Fails once a call has failed or the group was aborted; waits for nobody. What was computed since the last check
    /// is not to be used then, and the group is of no use any more.
    ///
    /// # Errors
    /// Why it ended.
    pub fn check(&self) -> Result<(), CollectiveError> {
        let error = self.words.error.load(Ordering::Acquire);
        match (error & 0xff, self.words.abort.load(Ordering::Acquire)) {
            (0, 0) => Ok(()),
            (FAILED_LATE, _) => Err(CollectiveError::Late {
                rank: (error >> 8 & 0xff) as usize,
                epoch: self.offer.epoch,
                limit_ms: self.limit.as_millis() as u64,
            }),
            _ => Err(CollectiveError::Aborted { epoch: self.offer.epoch }),
        }
    }

    /// Ends every waiting and future call of this rank; the peers' own deadlines or handles end theirs.
    pub fn abort_handle(&self) -> AbortHandle {
        let words = Arc::clone(&self.words);
        AbortHandle::new(move || words.abort.store(1, Ordering::Release))
    }

    fn fits(&self, rows: usize, channel: &Channel) -> Result<(), CollectiveError> {
        if (1..=channel.rows()).contains(&rows) {
            return Ok(());
        }
        let message = format!("{rows} rows for a channel of {}", channel.rows());
        Err(CollectiveError::Io { what: "push all-reduce".to_owned(), message })
    }

    /// `struct Channel` of `all_reduce.cu`.
    fn channel_arguments(&self, channel: &Channel) -> Arguments {
        let (world, rank) = (self.places.regions.len(), self.offer.rank);
        let at = |rank: usize| self.places.regions[rank].offset(channel.offset());
        // Beginning with the next rank; the last is this one's own.
        let ring = (1..=world).map(|step| at((rank + step) % world));
        ring.fold(Arguments::new(), Arguments::pointer)
            .pointer(at(rank).offset(channel.calls_offset()))
            .pointer(at(rank).offset(channel.failed_offset()))
            .pointer(self.places.words)
            .pointer(self.places.words.offset(std::mem::offset_of!(HostWords, error)))
            .u64(u64::try_from(self.limit.as_nanos()).unwrap_or(u64::MAX))
            .size(rank)
            .size(channel.rows())
            .size(channel.row_bytes())
            .u32(0) // padding of the structure
    }
}

/// `FAILED_LATE` of `all_reduce.cu`; any other number says that the call was aborted.
const FAILED_LATE: u32 = 2;

fn launch(kernel: &'static str, rows: usize, arguments: Arguments) -> Launch {
    let shape = Shape { grid: [rows as u32, 1, 1], threads: THREADS, shared_bytes: SHARED_BYTES };
    Launch { kernel, shape, arguments }
}
