//! NCCL's functions as values: every `unsafe` block of the binding is here.
//!
//! Types and numbers are those of `nccl.h` 2.18, which later versions only add to: structures that grow carry their size
//! and version, and a library accepts those of older ones.

#![allow(unsafe_code, reason = "NCCL is a C library")]

use std::{
    ffi::{CStr, c_char, c_int, c_uint, c_void},
    mem::ManuallyDrop,
    path::{Path, PathBuf},
    ptr::{self, NonNull},
};

use libloading::Library;

use super::{NcclError, Values};

/// The name that every installation has.
pub const SONAME: &str = "libnccl.so.2";
/// Oldest version with everything used here, as [`Nccl::version`] spells it.
pub const MIN_VERSION: u32 = 21_800;

/// Bytes of a [`UniqueId`].
pub const UNIQUE_ID_BYTES: usize = 128;

/// `ncclResult_t`.
pub(super) const SUCCESS: c_int = 0;
/// `ncclResult_t` of a communicator that is still at work on the last call.
pub(super) const IN_PROGRESS: c_int = 7;

/// What the ranks of one communicator have in common: where rank 0 waits for the others.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct UniqueId(pub [u8; UNIQUE_ID_BYTES]);

/// `ncclConfig_t` as of 2.18.
#[repr(C)]
struct Config {
    size: usize,
    magic: c_uint,
    version: c_uint,
    blocking: c_int,
    cga_cluster_size: c_int,
    min_ctas: c_int,
    max_ctas: c_int,
    net_name: *const c_char,
    split_share: c_int,
}

/// Says of a field of [`Config`] that the library may choose.
const UNDEFINED: c_int = c_int::MIN;

impl Config {
    fn non_blocking() -> Self {
        Self {
            size: size_of::<Self>(),
            magic: 0xcafe_beef,
            version: MIN_VERSION,
            blocking: 0,
            cga_cluster_size: UNDEFINED,
            min_ctas: UNDEFINED,
            max_ctas: UNDEFINED,
            net_name: ptr::null(),
            split_share: UNDEFINED,
        }
    }
}

/// A communicator that has neither been destroyed nor aborted.
pub(super) struct Handle(NonNull<c_void>);

// SAFETY: NCCL's communicators may be used from any thread, one call at a time; the owner holds a lock.
unsafe impl Send for Handle {}

type Comm = *mut c_void;
type Stream = *mut c_void;

struct Functions {
    get_version: unsafe extern "C" fn(*mut c_int) -> c_int,
    get_unique_id: unsafe extern "C" fn(*mut UniqueId) -> c_int,
    comm_init_rank_config: unsafe extern "C" fn(*mut Comm, c_int, UniqueId, c_int, *mut Config) -> c_int,
    comm_get_async_error: unsafe extern "C" fn(Comm, *mut c_int) -> c_int,
    comm_abort: unsafe extern "C" fn(Comm) -> c_int,
    comm_finalize: unsafe extern "C" fn(Comm) -> c_int,
    comm_destroy: unsafe extern "C" fn(Comm) -> c_int,
    all_reduce: unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, c_int, Comm, Stream) -> c_int,
    all_gather: unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, Comm, Stream) -> c_int,
    get_error_string: unsafe extern "C" fn(c_int) -> *const c_char,
    get_last_error: unsafe extern "C" fn(Comm) -> *const c_char,
}

/// The library. It stays loaded until the process ends, since it starts threads of its own.
pub struct Nccl {
    functions: Functions,
    version: u32,
    path: PathBuf,
}

impl Nccl {
    /// Loads the library at `path`, which may be the plain name [`SONAME`] for the system's search.
    ///
    /// # Errors
    /// When there is no such library, it is not NCCL, or it is older than [`MIN_VERSION`].
    pub fn open(path: &Path) -> Result<Self, NcclError> {
        let failed = |what: &str, error: &libloading::Error| NcclError::Library {
            path: path.to_owned(),
            message: format!("{what}: {}", cause(error)),
        };
        // SAFETY: loading runs the library's initializers: the operator names the library and trusts it.
        let library = unsafe { Library::new(path) }.map_err(|error| failed("load", &error))?;
        let library = ManuallyDrop::new(library);
        let functions = Functions::find(&library).map_err(|(name, error)| failed(name, &error))?;
        let mut found = 0;
        // SAFETY: writes one int.
        let code = unsafe { (functions.get_version)(&raw mut found) };
        let version = u32::try_from(found).unwrap_or(0);
        let nccl = Self { functions, version, path: path.to_owned() };
        nccl.check("ncclGetVersion", code, None)?;
        if version < MIN_VERSION {
            return Err(NcclError::TooOld { path: nccl.path, version: spell(version) });
        }
        Ok(nccl)
    }

    /// The version as NCCL writes it: 10000 × major + 100 × minor + patch.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// Where the library was loaded from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A new identity for a communicator; this process, rank 0's, listens for the others until they have come.
    ///
    /// # Errors
    /// When no network interface can be used.
    pub fn unique_id(&self) -> Result<UniqueId, NcclError> {
        let mut id = UniqueId([0; UNIQUE_ID_BYTES]);
        // SAFETY: writes the identity's 128 bytes.
        let code = unsafe { (self.functions.get_unique_id)(&raw mut id) };
        self.check("ncclGetUniqueId", code, None)?;
        Ok(id)
    }

    /// Begins to form a communicator on the device of the calling thread's context. It can be used once
    /// [`Self::async_error`] no longer says [`IN_PROGRESS`]. Beside an error there may be a handle, to be aborted.
    pub(super) fn init(&self, id: UniqueId, world: c_int, rank: c_int) -> (Option<Handle>, Result<(), NcclError>) {
        let (mut comm, mut config) = (ptr::null_mut(), Config::non_blocking());
        let init = self.functions.comm_init_rank_config;
        // SAFETY: NCCL copies the configuration and writes the communicator's address before it returns.
        let code = unsafe { init(&raw mut comm, world, id, rank, &raw mut config) };
        let handle = NonNull::new(comm).map(Handle);
        let code = if code == IN_PROGRESS { SUCCESS } else { code };
        let mut result = self.check("ncclCommInitRankConfig", code, handle.as_ref());
        if result.is_ok() && handle.is_none() {
            result = Err(self.error("ncclCommInitRankConfig", code, None));
        }
        (handle, result)
    }

    /// The communicator's state: success, [`IN_PROGRESS`] or what went wrong since.
    pub(super) fn async_error(&self, comm: &Handle) -> Result<c_int, NcclError> {
        let mut state = SUCCESS;
        // SAFETY: the communicator lives, since handles are given up before it ends; writes one int.
        let code = unsafe { (self.functions.comm_get_async_error)(comm.0.as_ptr(), &raw mut state) };
        self.check("ncclCommGetAsyncError", code, Some(comm))?;
        Ok(state)
    }

    /// Ends everything under way and frees the communicator.
    pub(super) fn abort(&self, comm: Handle) -> Result<(), NcclError> {
        // SAFETY: the communicator lives, and the handle that named it is given up here.
        let code = unsafe { (self.functions.comm_abort)(comm.0.as_ptr()) };
        self.check("ncclCommAbort", code, None)
    }

    /// Begins to end a communicator in order.
    pub(super) fn finalize(&self, comm: &Handle) -> Result<(), NcclError> {
        // SAFETY: the communicator lives.
        let code = unsafe { (self.functions.comm_finalize)(comm.0.as_ptr()) };
        self.begun("ncclCommFinalize", code, comm)
    }

    /// Frees a communicator that has been finalized.
    pub(super) fn destroy(&self, comm: Handle) -> Result<(), NcclError> {
        // SAFETY: the communicator lives, and the handle that named it is given up here.
        let code = unsafe { (self.functions.comm_destroy)(comm.0.as_ptr()) };
        self.check("ncclCommDestroy", code, None)
    }

    /// Queues `to = sum over ranks of from`, for `count` values of a kind.
    pub(super) fn all_reduce(&self, comm: &Handle, values: &Values) -> Result<(), NcclError> {
        const SUM: c_int = 0;
        let (from, to, stream) = (values.from as *const c_void, values.to as *mut c_void, values.stream as Stream);
        let (kind, call) = (values.kind as c_int, self.functions.all_reduce);
        // SAFETY: the communicator lives; the addresses are the device's and read or written by it alone.
        let code = unsafe { call(from, to, values.count, kind, SUM, comm.0.as_ptr(), stream) };
        self.begun("ncclAllReduce", code, comm)
    }

    /// Queues `to[rank] = from of that rank`, for `count` values a rank.
    pub(super) fn all_gather(&self, comm: &Handle, values: &Values) -> Result<(), NcclError> {
        let (from, to, stream) = (values.from as *const c_void, values.to as *mut c_void, values.stream as Stream);
        let (kind, call) = (values.kind as c_int, self.functions.all_gather);
        // SAFETY: as for `all_reduce`.
        let code = unsafe { call(from, to, values.count, kind, comm.0.as_ptr(), stream) };
        self.begun("ncclAllGather", code, comm)
    }

    /// What a result means, with NCCL's own words.
    pub(super) fn error(&self, call: &'static str, code: c_int, comm: Option<&Handle>) -> NcclError {
        // SAFETY: answers for any number with a string that is never freed.
        let meaning = unsafe { (self.functions.get_error_string)(code) };
        let comm = comm.map_or(ptr::null_mut(), |comm| comm.0.as_ptr());
        // SAFETY: takes null, or a communicator that lives; the string may be overwritten by the next failure, which
        // at worst garbles a text.
        let last = unsafe { (self.functions.get_last_error)(comm) };
        NcclError::Call { call, code, meaning: text(meaning), detail: text(last), advice: advice(code) }
    }

    fn check(&self, call: &'static str, code: c_int, comm: Option<&Handle>) -> Result<(), NcclError> {
        if code == SUCCESS { Ok(()) } else { Err(self.error(call, code, comm)) }
    }

    /// Like `check` for calls that a communicator may go on with after they have returned.
    fn begun(&self, call: &'static str, code: c_int, comm: &Handle) -> Result<(), NcclError> {
        if code == IN_PROGRESS { Ok(()) } else { self.check(call, code, Some(comm)) }
    }
}

impl Functions {
    /// Finds all of them, or says which one is missing.
    fn find(library: &Library) -> Result<Self, (&'static str, libloading::Error)> {
        Ok(Self {
            // SAFETY: the type is that of nccl.h, here and below.
            get_version: unsafe { symbol(library, "ncclGetVersion") }?,
            // SAFETY: as above.
            get_unique_id: unsafe { symbol(library, "ncclGetUniqueId") }?,
            // SAFETY: as above.
            comm_init_rank_config: unsafe { symbol(library, "ncclCommInitRankConfig") }?,
            // SAFETY: as above.
            comm_get_async_error: unsafe { symbol(library, "ncclCommGetAsyncError") }?,
            // SAFETY: as above.
            comm_abort: unsafe { symbol(library, "ncclCommAbort") }?,
            // SAFETY: as above.
            comm_finalize: unsafe { symbol(library, "ncclCommFinalize") }?,
            // SAFETY: as above.
            comm_destroy: unsafe { symbol(library, "ncclCommDestroy") }?,
            // SAFETY: as above.
            all_reduce: unsafe { symbol(library, "ncclAllReduce") }?,
            // SAFETY: as above.
            all_gather: unsafe { symbol(library, "ncclAllGather") }?,
            // SAFETY: as above.
            get_error_string: unsafe { symbol(library, "ncclGetErrorString") }?,
            // SAFETY: as above.
            get_last_error: unsafe { symbol(library, "ncclGetLastError") }?,
        })
    }
}

/// A function of the library, which is never unloaded.
///
/// # Safety
/// `T` is the function's type.
unsafe fn symbol<T: Copy>(library: &Library, name: &'static str) -> Result<T, (&'static str, libloading::Error)> {
    // SAFETY: the caller vouches for the type.
    unsafe { library.get::<T>(name) }.map(|function| *function).map_err(|error| (name, error))
}

/// What the system said, which the error itself leaves to its source.
fn cause(error: &libloading::Error) -> String {
    std::error::Error::source(error).map_or_else(|| error.to_string(), ToString::to_string)
}

fn text(place: *const c_char) -> String {
    if place.is_null() {
        return String::new();
    }
    // SAFETY: NCCL's strings end with a zero and stay where they are.
    unsafe { CStr::from_ptr(place) }.to_string_lossy().into_owned()
}

fn spell(version: u32) -> String {
    // Up to 2.8 the version was 1000 × major + 100 × minor + patch.
    let major = if version < 10_000 { 1_000 } else { 10_000 };
    format!("{}.{}.{}", version / major, version % major / 100, version % 100)
}

fn advice(code: c_int) -> &'static str {
    match code {
        1 => "see that nvidia-smi works here and that its driver is new enough for this NCCL",
        2 => "see that NCCL_SOCKET_IFNAME names an interface that reaches the other hosts, and that /dev/shm has room",
        4 | 5 => "ranks may run different versions of Phalanx; otherwise this is a bug in it",
        6 => "a peer ended or cannot be reached any more; its own log says why",
        _ => "start the worker with NCCL_DEBUG=INFO to learn more",
    }
}
