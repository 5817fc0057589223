//! The driver's library made ready, and its answers as values.
//!
//! `cudarc` panics when it finds no library or a function is missing, so everything starts with [`initialize`]: it looks
//! for the library itself, and refuses drivers older than the functions used here.

#![allow(unsafe_code, reason = "calls of the driver")]

use std::{
    ffi::{CStr, c_char, c_int},
    path::{Path, PathBuf},
    ptr,
    sync::OnceLock,
};

use cudarc::driver::sys;
use thiserror::Error;

use super::{
    driver::DriverError,
    library::{self, DRIVER, LibraryError, Loaded},
};

/// The oldest driver whose functions suffice and which loads cubins of NVRTC 12, as `cuDriverGetVersion` has it.
const OLDEST_DRIVER: c_int = 12000;

/// Why there is no GPU to use.
#[derive(Debug, Error)]
pub(super) enum Unusable {
    /// No driver is installed.
    #[error("no GPU can be used: {0}")]
    NoDriver(#[source] LibraryError),
    /// A driver is installed, and no device is there for this process.
    #[error(
        "no GPU can be used: {path} is there, but {message}; check nvidia-smi, /dev/nvidia* and CUDA_VISIBLE_DEVICES"
    )]
    NoDevice {
        /// The driver's library.
        path: String,
        /// What the driver said.
        message: String,
    },
    /// A driver is installed and does not work.
    #[error("no GPU can be used: {path}: {message}; {advice}")]
    Broken {
        /// The driver's library.
        path: String,
        /// What the driver said.
        message: String,
        /// What may help.
        advice: &'static str,
    },
}

/// A driver that works.
#[derive(Clone, Debug)]
pub(super) struct Initialized {
    /// Its library.
    pub(super) path: PathBuf,
    /// The version of CUDA that it knows, such as `(12, 4)`.
    pub(super) version: (u32, u32),
    /// Devices that this process may use, at least one.
    pub(super) devices: u32,
}

/// The driver's library. It is never unloaded: `cudarc` keeps addresses of its functions.
fn driver_library() -> Result<&'static Path, Unusable> {
    static LIBRARY: OnceLock<Loaded> = OnceLock::new();
    if let Some(loaded) = LIBRARY.get() {
        return Ok(&loaded.path);
    }
    let loaded = library::open(&DRIVER).map_err(|error| match error {
        LibraryError::Broken { path, message, .. } => broken(Path::new(&path), message, BROKEN_INSTALLATION),
        missing => Unusable::NoDriver(missing),
    })?;
    let path = LIBRARY.get_or_init(|| loaded).path.as_path();
    // SAFETY: it only tries to open the library by the names that cudarc will use; one that is loaded is found again by
    // the name inside it, wherever it lies.
    if !unsafe { sys::is_culib_present() } {
        return Err(broken(path, "it cannot be loaded by the name libcuda.so.1".to_owned(), BROKEN_INSTALLATION));
    }
    Ok(path)
}

const BROKEN_INSTALLATION: &str =
    "install the driver that belongs to the running kernel module, or restart the machine";

fn broken(path: &Path, message: String, advice: &'static str) -> Unusable {
    Unusable::Broken { path: path.display().to_string(), message, advice }
}

/// Makes the driver ready and counts devices. May be called any number of times.
///
/// # Errors
/// When there is no driver, no device, or the driver is too old or broken.
pub(super) fn initialize() -> Result<Initialized, Unusable> {
    let path = driver_library()?;
    let no_device = |message: String| Unusable::NoDevice { path: path.display().to_string(), message };
    // SAFETY: the library is there.
    let code = unsafe { sys::cuInit(0) };
    check("cuInit", code).map_err(|error| match code {
        sys::CUresult::CUDA_ERROR_NO_DEVICE => no_device(error.to_string()),
        sys::CUresult::CUDA_ERROR_STUB_LIBRARY => {
            let advice = "this is a stub for linking: take its directory out of LD_LIBRARY_PATH";
            broken(path, error.to_string(), advice)
        }
        sys::CUresult::CUDA_ERROR_SYSTEM_DRIVER_MISMATCH | sys::CUresult::CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE => {
            broken(
                path,
                error.to_string(),
                "the library does not fit the kernel module: take CUDA's compat directory away",
            )
        }
        _ => broken(path, error.to_string(), BROKEN_INSTALLATION),
    })?;
    let failed = |error: DriverError| broken(path, error.to_string(), BROKEN_INSTALLATION);
    let (mut version, mut devices): (c_int, c_int) = (0, 0);
    // SAFETY: a place for the number.
    check("cuDriverGetVersion", unsafe { sys::cuDriverGetVersion(&raw mut version) }).map_err(failed)?;
    let known = (version.unsigned_abs() / 1000, version.unsigned_abs() % 1000 / 10);
    if version < OLDEST_DRIVER {
        let message = format!("the driver knows CUDA {}.{}, and 12.0 is needed", known.0, known.1);
        return Err(broken(path, message, "install driver 525 or newer"));
    }
    // SAFETY: a place for the number.
    check("cuDeviceGetCount", unsafe { sys::cuDeviceGetCount(&raw mut devices) }).map_err(failed)?;
    if devices <= 0 {
        return Err(no_device("it has no device for this process".to_owned()));
    }
    Ok(Initialized { path: path.to_owned(), version: known, devices: devices.unsigned_abs() })
}

/// What the driver answered to `call`.
///
/// # Errors
/// With the error's name and text, unless it succeeded.
pub(super) fn check(call: &'static str, code: sys::CUresult) -> Result<(), DriverError> {
    match code {
        sys::CUresult::CUDA_SUCCESS => Ok(()),
        code => Err(DriverError::Call { call, message: describe(code) }),
    }
}

/// An error's name and text, such as `CUDA_ERROR_NO_DEVICE: no CUDA-capable device is detected`.
fn describe(code: sys::CUresult) -> String {
    let (mut name, mut text): (*const c_char, *const c_char) = (ptr::null(), ptr::null());
    // SAFETY: a place for the string's address, which becomes null for an unknown code.
    unsafe { sys::cuGetErrorName(code, &raw mut name) };
    // SAFETY: as above.
    unsafe { sys::cuGetErrorString(code, &raw mut text) };
    let known: Vec<String> = [name, text].into_iter().filter_map(string).collect();
    if known.is_empty() { format!("error {}", code as u32) } else { known.join(": ") }
}

fn string(text: *const c_char) -> Option<String> {
    // SAFETY: a string of the driver, which stays loaded; null was asked for before.
    (!text.is_null()).then(|| unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned())
}

/// A device of the driver's list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ordinal(pub(super) sys::CUdevice);

impl Ordinal {
    /// The device in this place of the list, counted from 0.
    pub(super) fn of(index: u32) -> Result<Self, DriverError> {
        let mut device = 0;
        // SAFETY: a place for the handle.
        check("cuDeviceGet", unsafe { sys::cuDeviceGet(&raw mut device, index as c_int) })?;
        Ok(Self(device))
    }

    /// A property that is a number.
    pub(super) fn attribute(self, attribute: sys::CUdevice_attribute) -> Result<u32, DriverError> {
        let mut value: c_int = 0;
        // SAFETY: a place for the number.
        check("cuDeviceGetAttribute", unsafe { sys::cuDeviceGetAttribute(&raw mut value, attribute, self.0) })?;
        Ok(value.unsigned_abs())
    }

    /// Such as `(8, 0)`.
    pub(super) fn compute_capability(self) -> Result<(u32, u32), DriverError> {
        use sys::CUdevice_attribute::{
            CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR as MAJOR,
            CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR as MINOR,
        };
        Ok((self.attribute(MAJOR)?, self.attribute(MINOR)?))
    }

    /// The product's name.
    pub(super) fn name(self) -> Result<String, DriverError> {
        let mut name: [c_char; 256] = [0; 256];
        // SAFETY: as many bytes as are said, the last of them a zero.
        let code = unsafe { sys::cuDeviceGetName(name.as_mut_ptr(), name.len() as c_int, self.0) };
        check("cuDeviceGetName", code)?;
        Ok(until_zero(&name))
    }

    /// Where it sits, such as `0000:3b:00.0`.
    pub(super) fn bus(self) -> Result<String, DriverError> {
        let mut bus: [c_char; 32] = [0; 32];
        // SAFETY: as many bytes as are said, the last of them a zero.
        let code = unsafe { sys::cuDeviceGetPCIBusId(bus.as_mut_ptr(), bus.len() as c_int, self.0) };
        check("cuDeviceGetPCIBusId", code)?;
        Ok(until_zero(&bus))
    }

    /// Bytes of memory.
    pub(super) fn memory_bytes(self) -> Result<u64, DriverError> {
        let mut bytes = 0_usize;
        // SAFETY: a place for the number.
        check("cuDeviceTotalMem", unsafe { sys::cuDeviceTotalMem_v2(&raw mut bytes, self.0) })?;
        Ok(bytes as u64)
    }
}

fn until_zero(text: &[c_char]) -> String {
    let bytes: Vec<u8> = text.iter().take_while(|&&byte| byte != 0).map(|&byte| byte as u8).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}
