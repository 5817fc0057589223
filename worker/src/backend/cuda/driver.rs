//! The few things that the backend asks of a device.
//!
//! Two implementations: the CUDA driver, and in tests an emulator that runs the same kernels on the host. Everything
//! that a driver is told happens in the order in which it was told (one stream); only [`Driver::download`] and
//! [`Driver::synchronize`] wait.

use thiserror::Error;

use super::kernels::KernelFile;

/// Why a device did not do what it was told.
#[derive(Debug, Error)]
pub enum DriverError {
    /// The device's memory is used up.
    #[error("{needed} bytes of device memory, {free} are free")]
    OutOfMemory {
        /// Bytes asked for.
        needed: usize,
        /// Bytes that the device said were free.
        free: u64,
    },
    /// A kernel does not compile for this device; a bug, or a compiler that is too old.
    #[error("compiling {file} for {architecture}: {log}")]
    Compile {
        /// The source file.
        file: &'static str,
        /// Such as `sm_80`.
        architecture: String,
        /// What the compiler said.
        log: String,
    },
    /// Any other call failed.
    #[error("{call}: {message}")]
    Call {
        /// What was called.
        call: &'static str,
        /// What the driver said.
        message: String,
    },
}

/// A place in device memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address(pub u64);

impl Address {
    /// The place `bytes` further on.
    pub fn offset(self, bytes: usize) -> Self {
        Self(self.0 + bytes as u64)
    }
}

/// What is worth knowing of a device.
#[derive(Clone, Debug)]
pub struct Properties {
    /// The device for people.
    pub name: String,
    /// Such as `(8, 0)`.
    pub compute_capability: (u32, u32),
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// Shared memory that a block may have, bytes.
    pub shared_bytes: u32,
    /// Device memory, bytes.
    pub memory_bytes: u64,
}

/// What a kernel is started with.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Blocks along x, y and z, none of them zero.
    pub grid: [u32; 3],
    /// Threads of a block, a multiple of 32.
    pub threads: u32,
    /// Dynamic shared memory of a block, bytes.
    pub shared_bytes: u32,
}

/// A kernel's argument structure as bytes, in the layout that C gives it.
#[derive(Clone, Debug, Default)]
pub struct Arguments {
    bytes: Vec<u8>,
    alignment: usize,
}

impl Arguments {
    /// No arguments yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// What a nested structure of this alignment ends with: padding.
    #[must_use]
    pub fn align(mut self, alignment: usize) -> Self {
        self.bytes.resize(self.bytes.len().next_multiple_of(alignment), 0);
        self
    }

    fn push(mut self, field: &[u8]) -> Self {
        self.alignment = self.alignment.max(field.len());
        self.bytes.resize(self.bytes.len().next_multiple_of(field.len()), 0);
        self.bytes.extend_from_slice(field);
        self
    }

    /// A pointer.
    pub fn pointer(self, address: Address) -> Self {
        self.push(&address.0.to_ne_bytes())
    }

    /// A pointer, or null.
    pub fn optional(self, address: Option<Address>) -> Self {
        self.pointer(address.unwrap_or(Address(0)))
    }

    /// An `u32`.
    pub fn u32(self, value: u32) -> Self {
        self.push(&value.to_ne_bytes())
    }

    /// A size or an index as `u32`. Larger ones do not occur: 2^32 values are more than any tensor's rows or columns.
    pub fn size(self, value: usize) -> Self {
        debug_assert!(u32::try_from(value).is_ok(), "{value}");
        self.u32(value as u32)
    }

    /// An `u64`.
    pub fn u64(self, value: u64) -> Self {
        self.push(&value.to_ne_bytes())
    }

    /// An f64.
    pub fn f64(self, value: f64) -> Self {
        self.push(&value.to_ne_bytes())
    }

    /// An f32.
    pub fn f32(self, value: f32) -> Self {
        self.push(&value.to_ne_bytes())
    }

    /// The structure's bytes, padded to its alignment.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = self.bytes.clone();
        bytes.resize(bytes.len().next_multiple_of(self.alignment.max(1)), 0);
        bytes
    }
}

/// A device and its one stream.
///
/// Every function that answers with a `Result` fails when the device does; after an error of a kernel all later calls
/// fail too.
#[allow(clippy::missing_errors_doc, reason = "stated once for the whole trait")]
pub trait Driver: Send + Sync + 'static {
    /// A compiled file of kernels.
    type Module: Send + Sync;
    /// A kernel that can be launched.
    type Function: Send + Sync;
    /// Recorded launches.
    type Graph: Send + Sync;

    /// What is worth knowing of the device.
    fn properties(&self) -> &Properties;
    /// Bytes of memory that are free now.
    fn free_bytes(&self) -> Result<u64, DriverError>;
    /// Memory aligned to 256 bytes whose contents are undefined.
    fn allocate(&self, bytes: usize) -> Result<Address, DriverError>;
    /// Gives memory back once everything told before has happened.
    fn free(&self, address: Address);
    /// Compiles a file of kernels with these `name=value` definitions for this device.
    fn load(&self, file: &KernelFile, definitions: &[(&str, u32)]) -> Result<Self::Module, DriverError>;
    /// A kernel of a file, which may be launched with up to `shared_bytes` of shared memory.
    fn function(
        &self,
        module: &Self::Module,
        name: &'static str,
        shared_bytes: u32,
    ) -> Result<Self::Function, DriverError>;
    /// Starts a kernel.
    fn launch(&self, function: &Self::Function, shape: Shape, arguments: &Arguments) -> Result<(), DriverError>;
    /// Copies to the device. `bytes` may be used again on return.
    fn upload(&self, to: Address, bytes: &[u8]) -> Result<(), DriverError>;
    /// Waits for everything told before and copies to the host.
    fn download(&self, from: Address, bytes: &mut [u8]) -> Result<(), DriverError>;
    /// Copies within the device.
    fn copy(&self, to: Address, from: Address, bytes: usize) -> Result<(), DriverError>;
    /// Writes zeros.
    fn clear(&self, at: Address, bytes: usize) -> Result<(), DriverError>;
    /// Waits for everything told before.
    fn synchronize(&self) -> Result<(), DriverError>;
    /// From here on launches, copies within the device and clears are recorded and do not happen.
    fn begin_capture(&self) -> Result<(), DriverError>;
    /// What was recorded, ready to be replayed any number of times.
    fn end_capture(&self) -> Result<Self::Graph, DriverError>;
    /// Lets what was recorded happen.
    fn replay(&self, graph: &Self::Graph) -> Result<(), DriverError>;
}
