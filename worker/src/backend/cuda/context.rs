//! A device's primary context and the one stream in which everything happens.

#![allow(unsafe_code, reason = "calls of the driver")]

use std::ptr;

use cudarc::driver::sys;

use super::{
    calls::{Ordinal, check},
    driver::DriverError,
};

/// The primary context, which NCCL and other libraries share, and a stream of ours that waits for no other.
pub(super) struct Context {
    device: Ordinal,
    context: sys::CUcontext,
    /// Everything is told to this stream.
    pub(super) stream: sys::CUstream,
}

// SAFETY: the driver's handles may be used by any thread that has made the context current.
unsafe impl Send for Context {}
// SAFETY: as above; the driver takes its own locks.
unsafe impl Sync for Context {}

impl Context {
    /// Makes a device ready.
    pub(super) fn new(device: Ordinal) -> Result<Self, DriverError> {
        let mut context = ptr::null_mut();
        // SAFETY: a place for the handle.
        check("cuDevicePrimaryCtxRetain", unsafe { sys::cuDevicePrimaryCtxRetain(&raw mut context, device.0) })?;
        let mut made = Self { device, context, stream: ptr::null_mut() };
        made.bind()?;
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: a place for the handle; the context is current.
        check("cuStreamCreate", unsafe { sys::cuStreamCreate(&raw mut made.stream, flags) })?;
        Ok(made)
    }

    /// Makes the context this thread's. Needed before every call, since another library may have changed it; it costs
    /// some tens of nanoseconds.
    pub(super) fn bind(&self) -> Result<(), DriverError> {
        // SAFETY: the context lives as long as this value.
        check("cuCtxSetCurrent", unsafe { sys::cuCtxSetCurrent(self.context) })
    }

    /// Waits for everything told to the stream.
    pub(super) fn synchronize(&self) -> Result<(), DriverError> {
        // SAFETY: the stream lives as long as this value.
        check("cuStreamSynchronize", unsafe { sys::cuStreamSynchronize(self.stream) })
    }

    /// Bytes of memory that are free, and of all.
    pub(super) fn memory(&self) -> Result<(u64, u64), DriverError> {
        self.bind()?;
        let (mut free, mut total) = (0_usize, 0_usize);
        // SAFETY: places for the two numbers; the context is current.
        check("cuMemGetInfo", unsafe { sys::cuMemGetInfo_v2(&raw mut free, &raw mut total) })?;
        Ok((free as u64, total as u64))
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        if self.bind().is_ok() && !self.stream.is_null() {
            // SAFETY: created by `new`, destroyed this once; what it was told still happens.
            unsafe { sys::cuStreamDestroy_v2(self.stream) };
        }
        // SAFETY: retained by `new`, released this once.
        unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.device.0) };
    }
}
