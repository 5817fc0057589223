//! The host's side of a GPU, against a driver that is not one: order, staging, capture, errors.
//!
//! A driver's library stays in a process for good, so each test runs itself again in a process of its own that finds
//! the fake one.

#![allow(missing_docs, reason = "tests have no users")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "helpers of tests fail by panicking")]

#[path = "../cuda_compile/tools.rs"]
#[allow(dead_code, reason = "only the environment is of interest here")]
mod tools;

use std::{os::unix::fs::symlink, path::Path, process::Command};

use phalanx_worker::backend::cuda::{
    self,
    device::Device,
    driver::{Address, Arguments, Driver, DriverError, Shape},
    inventory::{self, Presence},
    kernels::ROWS,
};

const INSIDE: &str = "PHALANX_TEST_FAKE_DRIVER";

/// Runs `body` in a process that finds the fake driver and NVRTC.
fn with_fake_driver(test: &str, body: fn()) {
    if std::env::var_os(INSIDE).is_some() {
        return body();
    }
    let directory = tempfile::tempdir().unwrap();
    let library = directory.path().join("libcuda.so.1");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cuda_device/fake_driver.c");
    let mut compiler = Command::new("cc");
    compiler.args("-O1 -Wall -Wextra -Werror -shared -fPIC -Wl,-soname,libcuda.so.1 -o".split(' '));
    assert!(compiler.arg(&library).arg(source).status().unwrap().success());
    // The first name by which a driver is looked for.
    symlink(&library, directory.path().join("libcuda.so")).unwrap();
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env(INSIDE, "1")
        .env("PHALANX_LIBRARY_PATH", directory.path())
        .env("LD_LIBRARY_PATH", directory.path())
        .env("VIRTUAL_ENV", tools::environment())
        .env("XDG_CACHE_HOME", directory.path())
        .output()
        .unwrap();
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && said.contains("1 passed"), "{said}");
}

fn floats(device: &Device, values: &[f32]) -> Address {
    let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_ne_bytes()).collect();
    let address = device.allocate(bytes.len()).unwrap();
    device.upload(address, &bytes).unwrap();
    address
}

fn read(device: &Device, from: Address, count: usize) -> Vec<f32> {
    let mut bytes = vec![0; 4 * count];
    device.download(from, &mut bytes).unwrap();
    bytes.chunks_exact(4).map(|bytes| f32::from_ne_bytes(bytes.try_into().unwrap())).collect()
}

fn add(x: Address, y: Address, count: usize) -> (Shape, Arguments) {
    let arguments = Arguments::new().pointer(x).pointer(y).u64(count as u64);
    (Shape { grid: [1, 1, 1], threads: 256, shared_bytes: 0 }, arguments)
}

#[test]
fn launches_copies_and_replays_happen_in_the_order_in_which_they_were_told() {
    with_fake_driver("launches_copies_and_replays_happen_in_the_order_in_which_they_were_told", || {
        let device = cuda::open(0).unwrap();
        assert_eq!((device.properties().name.as_str(), device.properties().multiprocessors), ("fake", 108));
        let module = device.load(&ROWS, &[]).unwrap();
        let function = device.function(&module, "add", 100 << 10).unwrap();
        drop(module);
        let (x, y) = (floats(&device, &[1.0, 2.0, 3.0]), floats(&device, &[10.0, 20.0, 30.0]));
        let (shape, arguments) = add(x, y, 3);
        device.launch(&function, shape, &arguments).unwrap();
        assert_eq!(read(&device, x, 3), [11.0, 22.0, 33.0]);

        let copy = device.allocate(12).unwrap();
        device.begin_capture().unwrap();
        device.launch(&function, shape, &arguments).unwrap();
        device.copy(copy, x, 12).unwrap();
        device.clear(x, 4).unwrap();
        let late = device.upload(x, &[0; 4]).unwrap_err();
        assert!(late.to_string().contains("not while a capture records"), "{late}");
        assert!(device.allocate(4).is_err() && device.synchronize().is_err());
        let graph = device.end_capture().unwrap();
        assert_eq!(read(&device, x, 3), [11.0, 22.0, 33.0], "recording does nothing");
        device.replay(&graph).unwrap();
        device.replay(&graph).unwrap();
        assert_eq!(read(&device, x, 3), [0.0, 62.0, 93.0]);
        assert_eq!(read(&device, copy, 3), [10.0, 62.0, 93.0]);
    });
}

#[test]
fn bytes_may_be_overwritten_as_soon_as_an_upload_returns() {
    with_fake_driver("bytes_may_be_overwritten_as_soon_as_an_upload_returns", || {
        let device = cuda::open(0).unwrap();
        let most = 40 << 20;
        let at = device.allocate(most).unwrap();
        let mut state = 1_u32;
        let mut random = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as usize
        };
        let mut expected = vec![0_u8; most];
        device.clear(at, most).unwrap();
        let mut bytes = Vec::new();
        for round in 0..600 {
            let length = if round % 50 == 0 { random() % most } else { random() % 70_000 };
            let offset = random() % (most - length);
            bytes.clear();
            bytes.resize(length, round as u8 + 1);
            device.upload(at.offset(offset), &bytes).unwrap();
            bytes.fill(0);
            expected[offset..offset + length].fill(round as u8 + 1);
        }
        let mut found = vec![0; most];
        device.download(at, &mut found).unwrap();
        assert!(found == expected, "an upload took bytes that were not its own");
        device.free(at);
    });
}

#[test]
fn memory_is_freed_when_nothing_uses_it_any_more() {
    with_fake_driver("memory_is_freed_when_nothing_uses_it_any_more", || {
        let device = cuda::open(0).unwrap();
        let free = device.free_bytes().unwrap();
        let x = floats(&device, &[1.0; 1000]);
        assert_eq!(device.free_bytes().unwrap(), free - 4000);
        device.clear(x, 4000).unwrap();
        // The fake driver ends the process if the stream is busy.
        device.free(x);
        assert_eq!(device.free_bytes().unwrap(), free);
        let y = floats(&device, &[1.0; 1000]);
        device.begin_capture().unwrap();
        device.free(y);
        assert_eq!(device.free_bytes().unwrap(), free - 4000, "not within a capture");
        drop(device.end_capture().unwrap());
        assert_eq!(device.free_bytes().unwrap(), free);
        let Err(DriverError::OutOfMemory { needed, free: left }) = device.allocate(2 << 30) else {
            panic!("not refused")
        };
        assert_eq!((needed, left), (2 << 30, free));
    });
}

#[test]
fn errors_name_the_call_what_it_was_for_and_what_the_driver_said() {
    with_fake_driver("errors_name_the_call_what_it_was_for_and_what_the_driver_said", || {
        let error = cuda::open(1).map(drop).unwrap_err().to_string();
        assert!(error.contains("device 1 was asked for, and there are 1"), "{error}");
        let device = cuda::open(0).unwrap();
        let module = device.load(&ROWS, &[]).unwrap();
        let error = device.function(&module, "nonsense", 0).map(drop).unwrap_err().to_string();
        assert_eq!(error, "cuModuleGetFunction: FAKE_INVALID: of the fake driver (nonsense of rows.cu)");
        let error = device.function(&module, "add", 200 << 10).map(drop).unwrap_err().to_string();
        assert!(error.contains("204800 bytes of shared memory, the device has 166912"), "{error}");
        let function = device.function(&module, "add", 0).unwrap();
        let x = floats(&device, &[1.0]);
        let (shape, arguments) = add(x, x, 1);
        let error = device.launch(&function, Shape { shared_bytes: 64, ..shape }, &arguments).unwrap_err().to_string();
        assert!(error.contains("add was promised 0 bytes"), "{error}");
        let error = device.launch(&function, shape, &arguments.u32(1)).unwrap_err().to_string();
        assert!(error.starts_with("cuLaunchKernel: FAKE_INVALID: of the fake driver (add, Shape"), "{error}");
    });
}

#[test]
fn an_inventory_lists_the_device() {
    with_fake_driver("an_inventory_lists_the_device", || {
        let found = inventory::take();
        assert_eq!((found.gpu, found.driver.version.as_deref()), (Presence::Present, Some("12.2")));
        let [device] = &found.devices[..] else { panic!("{found:?}") };
        assert_eq!((device.name.as_str(), device.architecture.as_str(), &device.problem), ("fake", "sm_80", &None));
        assert_eq!(device.free_bytes, Some(device.memory_bytes));
        assert_eq!(found.nvrtc.version.as_deref(), Some("12.9"), "{:?}", found.nvrtc);
    });
}
