//! What a machine has for GPUs: for `phalanx doctor`, which looks and serves nothing.

#![allow(unsafe_code, reason = "calls of the driver and of NCCL")]

use std::os::raw::c_int;

use cudarc::driver::sys;
use serde::Serialize;

use super::{
    calls::{self, Initialized, Ordinal, Unusable, check},
    compiler,
    context::Context,
    driver::DriverError,
    library::{self, LibraryError, Loaded, NCCL},
    nvrtc::Nvrtc,
};

/// A library, found or not.
#[derive(Clone, Debug, Serialize)]
pub struct FoundLibrary {
    /// Its file.
    pub path: Option<String>,
    /// Such as `12.9`.
    pub version: Option<String>,
    /// Why it cannot be used.
    pub problem: Option<String>,
}

/// A GPU.
#[derive(Clone, Debug, Serialize)]
pub struct FoundDevice {
    /// Its place in the driver's list, counted from 0.
    pub index: u32,
    /// The product's name.
    pub name: String,
    /// Where it sits, such as `0000:3b:00.0`.
    pub bus: String,
    /// What its kernels are compiled for, such as `sm_80`.
    pub architecture: String,
    /// Device memory, bytes.
    pub memory_bytes: u64,
    /// Device memory that is free now, bytes.
    pub free_bytes: Option<u64>,
    /// Why it cannot be used.
    pub problem: Option<String>,
}

/// How one GPU reaches another.
#[derive(Clone, Debug, Serialize)]
pub struct Link {
    /// Index of the device that reads and writes.
    pub from: u32,
    /// Index of the device whose memory that is.
    pub to: u32,
    /// Whether it can do so without the host's memory between.
    pub direct: bool,
    /// The driver's rank of this link among all of them; the lower the faster.
    pub performance_rank: u32,
    /// Whether atomic operations work across it, as over NVLink.
    pub atomics: bool,
}

/// Whether GPUs can be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Presence {
    /// At least one device is there, and a driver that works.
    Present,
    /// There is no driver, or no device for this process.
    Absent,
    /// There is a driver that does not work.
    Broken,
}

/// What a machine has for GPUs.
#[derive(Clone, Debug, Serialize)]
pub struct Inventory {
    /// Whether there is anything to use.
    pub gpu: Presence,
    /// The driver; its version is that of CUDA which it knows.
    pub driver: FoundLibrary,
    /// The compiler of kernels.
    pub nvrtc: FoundLibrary,
    /// Collectives between GPUs.
    pub nccl: FoundLibrary,
    /// Every device that this process may use.
    pub devices: Vec<FoundDevice>,
    /// Every ordered pair of devices.
    pub links: Vec<Link>,
}

impl FoundLibrary {
    fn found(path: &std::path::Path, version: String) -> Self {
        Self { path: Some(path.display().to_string()), version: Some(version), problem: None }
    }

    fn not(problem: String) -> Self {
        Self { path: None, version: None, problem: Some(problem) }
    }
}

/// Looks at everything. Nothing is left allocated.
pub fn take() -> Inventory {
    let initialized = calls::initialize();
    let gpu = match &initialized {
        Ok(_) => Presence::Present,
        Err(Unusable::NoDriver(_) | Unusable::NoDevice { .. }) => Presence::Absent,
        Err(Unusable::Broken { .. }) => Presence::Broken,
    };
    let (devices, links) = initialized.as_ref().map_or_else(|_| Default::default(), |found| all_of(found.devices));
    let driver = match initialized {
        Ok(Initialized { path, version: (major, minor), .. }) => FoundLibrary::found(&path, format!("{major}.{minor}")),
        Err(error) => FoundLibrary::not(error.to_string()),
    };
    let nvrtc = match Nvrtc::open() {
        Ok(nvrtc) => FoundLibrary::found(&nvrtc.path, format!("{}.{}", nvrtc.version.0, nvrtc.version.1)),
        Err(error) => FoundLibrary::not(error.to_string()),
    };
    let nccl = match library::open(&NCCL).and_then(|nccl| Ok((nccl_version(&nccl)?, nccl))) {
        Ok((version, nccl)) => FoundLibrary::found(&nccl.path, version),
        Err(error) => FoundLibrary::not(error.to_string()),
    };
    Inventory { gpu, driver, nvrtc, nccl, devices, links }
}

/// Such as `2.27.3`, from a number such as 22703.
fn nccl_version(nccl: &Loaded) -> Result<String, LibraryError> {
    type VersionOf = unsafe extern "C" fn(*mut c_int) -> c_int;
    // SAFETY: the type that `nccl.h` declares.
    let version_of = unsafe { nccl.function::<VersionOf>("ncclGetVersion") }?;
    let mut version: c_int = 0;
    // SAFETY: a place for the number.
    unsafe { version_of(&raw mut version) };
    Ok(format!("{}.{}.{}", version / 10_000, version % 10_000 / 100, version % 100))
}

fn all_of(devices: u32) -> (Vec<FoundDevice>, Vec<Link>) {
    let found = (0..devices).map(|index| {
        device(index).unwrap_or_else(|error| FoundDevice {
            index,
            name: "unknown".to_owned(),
            bus: String::new(),
            architecture: String::new(),
            memory_bytes: 0,
            free_bytes: None,
            problem: Some(error.to_string()),
        })
    });
    let pairs = (0..devices).flat_map(|from| (0..devices).map(move |to| (from, to))).filter(|(from, to)| from != to);
    (found.collect(), pairs.filter_map(|(from, to)| link(from, to).ok()).collect())
}

fn device(index: u32) -> Result<FoundDevice, DriverError> {
    let device = Ordinal::of(index)?;
    let compute_capability = device.compute_capability()?;
    let mut problem = super::unfit(compute_capability);
    let free = Context::new(device).and_then(|context| context.memory());
    let free_bytes = match free {
        Ok((free, _)) => Some(free),
        Err(error) => {
            problem = problem.or_else(|| Some(error.to_string()));
            None
        }
    };
    Ok(FoundDevice {
        index,
        name: device.name()?,
        bus: device.bus()?,
        architecture: compiler::architecture(compute_capability),
        memory_bytes: device.memory_bytes()?,
        free_bytes,
        problem,
    })
}

fn link(from: u32, to: u32) -> Result<Link, DriverError> {
    use sys::CUdevice_P2PAttribute::{
        CU_DEVICE_P2P_ATTRIBUTE_NATIVE_ATOMIC_SUPPORTED as ATOMICS, CU_DEVICE_P2P_ATTRIBUTE_PERFORMANCE_RANK as RANK,
    };
    let (device, peer) = (Ordinal::of(from)?, Ordinal::of(to)?);
    let mut direct: c_int = 0;
    // SAFETY: a place for the answer.
    let code = unsafe { sys::cuDeviceCanAccessPeer(&raw mut direct, device.0, peer.0) };
    check("cuDeviceCanAccessPeer", code)?;
    let attribute = |attribute| {
        let mut value: c_int = 0;
        // SAFETY: a place for the number.
        let code = unsafe { sys::cuDeviceGetP2PAttribute(&raw mut value, attribute, device.0, peer.0) };
        check("cuDeviceGetP2PAttribute", code).map(|()| value.unsigned_abs())
    };
    Ok(Link { from, to, direct: direct != 0, performance_rank: attribute(RANK)?, atomics: attribute(ATOMICS)? != 0 })
}
