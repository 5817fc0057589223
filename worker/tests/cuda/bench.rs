//! A place to try one kernel: makes buffers, launches, reads back.

use half::bf16;
use phalanx_worker::backend::cuda::{
    driver::{Address, Arguments, Driver, Shape},
    kernels::KernelFile,
};

use crate::machine::{Function, Machine, Module, on_gpu};

/// A device with one file of kernels.
pub(crate) struct Bench {
    pub(crate) device: Machine,
    module: Module,
}

impl Bench {
    /// One that runs first to last, and one that runs last to first.
    pub(crate) fn in_both_orders(file: &KernelFile, definitions: &[(&str, u32)], test: impl Fn(&Self)) {
        // A real device has its own order.
        let orders: &[bool] = if on_gpu() { &[false] } else { &[false, true] };
        for &backwards in orders {
            let device = Machine::new(2, backwards);
            let module = device.load(file, definitions).unwrap_or_else(|error| panic!("{error}"));
            test(&Self { device, module });
        }
    }

    /// Another file on a device that runs in the same order.
    pub(crate) fn in_this_order(&self, file: &KernelFile, test: impl FnOnce(&Self)) {
        let device = Machine::new(2, self.device.backwards());
        let module = device.load(file, &[]).unwrap_or_else(|error| panic!("{error}"));
        test(&Self { device, module });
    }

    pub(crate) fn floats(&self, values: &[f32]) -> Address {
        self.bytes(&values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<_>>())
    }

    pub(crate) fn halves(&self, values: &[bf16]) -> Address {
        self.bytes(&values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<_>>())
    }

    pub(crate) fn words(&self, values: &[u32]) -> Address {
        self.bytes(&values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<_>>())
    }

    pub(crate) fn bytes(&self, bytes: &[u8]) -> Address {
        let address = self.device.allocate(bytes.len()).unwrap();
        self.device.upload(address, bytes).unwrap();
        self.device.synchronize().unwrap();
        address
    }

    /// Poisoned memory for so many values of 4 bytes.
    pub(crate) fn poisoned(&self, values: usize) -> Address {
        self.device.allocate(4 * values).unwrap()
    }

    pub(crate) fn function(&self, name: &'static str, shared_bytes: u32) -> Function {
        self.device.function(&self.module, name, shared_bytes).unwrap()
    }

    pub(crate) fn launch(&self, name: &'static str, shape: Shape, arguments: &Arguments) {
        let function = self.function(name, shape.shared_bytes);
        // Another device of the same test may have to read what comes of it, and what was uploaded here.
        self.device.launch(&function, shape, arguments).unwrap();
        self.device.synchronize().unwrap();
    }

    pub(crate) fn read_floats(&self, from: Address, count: usize) -> Vec<f32> {
        self.read(from, 4 * count).as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
    }

    pub(crate) fn read_halves(&self, from: Address, count: usize) -> Vec<f32> {
        let halves = self.read(from, 2 * count);
        halves.as_chunks::<2>().0.iter().map(|bytes| bf16::from_le_bytes(*bytes).to_f32()).collect()
    }

    pub(crate) fn read_words(&self, from: Address, count: usize) -> Vec<u32> {
        self.read(from, 4 * count).as_chunks::<4>().0.iter().map(|bytes| u32::from_le_bytes(*bytes)).collect()
    }

    pub(crate) fn read(&self, from: Address, bytes: usize) -> Vec<u8> {
        let mut all = vec![0; bytes];
        self.device.download(from, &mut all).unwrap();
        all
    }
}

/// Seeded values of a normal-like distribution with deviation one.
pub(crate) fn noise(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut uniform = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1_u64 << 24) as f32 - 0.5
    };
    // The sum of twelve uniform values has deviation one.
    (0..count).map(|_| (0..12).map(|_| uniform()).sum()).collect()
}

pub(crate) fn to_bf16(values: &[f32]) -> Vec<bf16> {
    values.iter().map(|&value| bf16::from_f32(value)).collect()
}

/// Fails where a value is farther from the expected one than `relative` of the largest expected magnitude of its row.
#[track_caller]
pub(crate) fn assert_close(what: &str, found: &[f32], expected: &[f64], width: usize, relative: f64) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (row, (found, expected)) in found.chunks(width).zip(expected.chunks(width)).enumerate() {
        let scale = expected.iter().fold(1e-30_f64, |most, value| most.max(value.abs()));
        for (column, (&found, &expected)) in found.iter().zip(expected).enumerate() {
            let distance = (f64::from(found) - expected).abs();
            assert!(distance <= relative * scale, "{what}[{row}][{column}] is {found}, expected {expected}");
        }
    }
}
