//! GPUs through CUDA's driver: kernels of our own, compiled for the device when the worker first starts.
//!
//! | module | holds |
//! | --- | --- |
//! | `backend` | the model's operations, each a launch or a few |
//! | `linear`, `experts`, `attention` | resident weights and products with them; the KV cache |
//! | `step` | what the attention kernels need to know of a batch |
//! | `memory`, `tensor` | buffers, the pool of activations, what lies in them |
//! | [`kernels`] | the kernels' sources and what was compiled of them |
//! | [`driver`] | the few things asked of a device |
//! | [`device`], `context`, `staging`, `calls` | a real GPU that does them |
//! | [`compiler`], [`nvrtc`] | kernels from source to machine code, kept on disk |
//! | [`library`] | CUDA's libraries, found when the program runs |
//! | [`inventory`] | what a machine has, for `phalanx doctor` |
//!
//! The residual stream and partial sums are f32; what a matrix is multiplied with is bf16, as the weights are.

mod attention;
mod backend;
mod calls;
pub mod compiler;
mod context;
pub mod device;
pub mod driver;
mod experts;
pub mod inventory;
pub mod kernels;
pub mod library;
mod linear;
mod memory;
pub mod nvrtc;
mod staging;
mod step;
mod tensor;

pub use backend::{CudaBackend, Embedding, Vector};
use calls::{Initialized, Ordinal};
use compiler::Compiler;
use device::Device;
use driver::DriverError;
pub use experts::{Experts, Routing};
pub use linear::Linear;
use nvrtc::Nvrtc;
pub use tensor::Tensor;

use super::BackendError;

/// The oldest devices that have what the kernels use: bf16 matrix instructions and asynchronous copies.
const OLDEST_DEVICE: (u32, u32) = (8, 0);

/// Whether GPUs can be used here at all, without touching one.
///
/// # Errors
/// [`BackendError::Unsupported`] in one line that says what is missing and what to do.
pub fn check() -> Result<(), BackendError> {
    initialize()?;
    compiler_of_this_machine().map(drop)
}

/// Makes the device at `index` of the driver's list ready, counted from 0 among those that `CUDA_VISIBLE_DEVICES` leaves.
///
/// # Errors
/// [`BackendError::Unsupported`] in one line that says what is missing and what to do: driver, device, compiler; and
/// [`BackendError::Operation`] when the device fails.
pub fn open(index: u32) -> Result<Device, BackendError> {
    let found = initialize()?;
    if index >= found.devices {
        let message = format!(
            "device {index} was asked for, and there are {}: lower the number of ranks, or check CUDA_VISIBLE_DEVICES",
            found.devices
        );
        return Err(BackendError::Unsupported(message));
    }
    let compiler = compiler_of_this_machine()?;
    let device = Ordinal::of(index).map_err(broken)?;
    if let Some(problem) = unfit(device.compute_capability().map_err(broken)?) {
        return Err(BackendError::Unsupported(format!("device {index}: {problem}")));
    }
    Device::new(device, compiler, found.version).map_err(broken)
}

fn initialize() -> Result<Initialized, BackendError> {
    calls::initialize().map_err(|error| BackendError::Unsupported(error.to_string()))
}

fn compiler_of_this_machine() -> Result<Compiler, BackendError> {
    let nvrtc = Nvrtc::open().map_err(|error| BackendError::Unsupported(error.to_string()))?;
    Ok(Compiler::new(nvrtc, compiler::user_cache()))
}

/// Why a device of this compute capability cannot be used.
fn unfit(compute_capability: (u32, u32)) -> Option<String> {
    let ((major, minor), (least, _)) = (compute_capability, OLDEST_DEVICE);
    (compute_capability < OLDEST_DEVICE)
        .then(|| format!("its compute capability is {major}.{minor}, and {least}.0 (A100) or newer is needed"))
}

fn broken(error: DriverError) -> BackendError {
    match error {
        DriverError::OutOfMemory { needed, free } => BackendError::OutOfMemory {
            what: "the device's context".to_owned(),
            needed: needed as u64,
            available: free,
        },
        DriverError::Call { call, message } => BackendError::Operation { operation: call, message },
        error @ DriverError::Compile { .. } => {
            BackendError::Operation { operation: "compile", message: error.to_string() }
        }
    }
}
