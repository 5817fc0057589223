//! What a kernel can do wrong shows: each mistake that the emulator is to find, made on purpose.

use std::process::Command;

use phalanx_worker::backend::cuda::{
    driver::{Arguments, Driver, Shape},
    kernels::KernelFile,
};

use crate::{bench::Bench, emulator::Emulator};

/// Set in the process that makes the mistake.
const MISTAKE: &str = "PHALANX_TEST_MISTAKE";

const KERNELS: KernelFile = KernelFile {
    name: "mistakes.cu",
    source: r#"
#include <prelude.cuh>
struct Values { float* y; const float* x; u32 count; };

// Reads one element more than there is.
KERNEL(reads_beyond, Values, 32, 1) {
    if (threadIdx.x <= args.count) args.y[0] = args.x[threadIdx.x];
}
KERNEL(writes_before, Values, 32, 1) {
    if (threadIdx.x == 0) args.y[-1] = 1.0f;
}
// Half of the lanes never come to the shuffle.
KERNEL(loses_lanes, Values, 32, 1) {
    if (threadIdx.x < 16) args.y[threadIdx.x] = __shfl_xor_sync(0xffffffffu, args.x[0], 1);
}
KERNEL(goes_without_a_barrier, Values, 64, 1) {
    if (threadIdx.x < 32) __syncthreads();
    args.y[threadIdx.x] = 0.0f;
}
KERNEL(never_waits_for_its_copies, Values, 32, 1) {
    copy_async(shared_memory() + 16 * threadIdx.x, args.x);
    copy_async_commit();
}
KERNEL(loads_askew, Values, 32, 1) {
    args.y[threadIdx.x] = __uint_as_float(load_streaming(args.x + 1).x);
}
// What lies in shared memory was never written; a value copied asynchronously is used before it is waited for.
KERNEL(reads_unwritten, Values, 32, 1) {
    args.y[threadIdx.x] = reinterpret_cast<float*>(shared_memory())[threadIdx.x];
}
KERNEL(uses_copies_too_early, Values, 32, 1) {
    copy_async(shared_memory() + 16 * threadIdx.x, args.x);
    copy_async_commit();
    args.y[threadIdx.x] = reinterpret_cast<float*>(shared_memory())[4 * threadIdx.x];
    copy_async_wait<0>();
}
// Warps hand values on without a barrier: right in one order of them alone.
KERNEL(forgets_a_barrier, Values, 64, 1) {
    float* shared = reinterpret_cast<float*>(shared_memory());
    shared[threadIdx.x] = float(threadIdx.x);
    args.y[threadIdx.x] = shared[63 - threadIdx.x];
}
"#,
};

fn make(mistake: &'static str, threads: u32, backwards: bool) -> Vec<f32> {
    let device = Emulator::with_order(1, backwards);
    let module = device.load(&KERNELS, &[]).unwrap();
    let function = device.function(&module, mistake, 512).unwrap();
    let (x, y) = (device.allocate(4 * 8).unwrap(), device.allocate(4 * 64).unwrap());
    device.upload(x, &[0; 4 * 8]).unwrap();
    let arguments = Arguments::new().pointer(y).pointer(x).u32(8);
    device.launch(&function, Shape { grid: [1; 3], threads, shared_bytes: 512 }, &arguments).unwrap();
    let mut bytes = [0; 4 * 64];
    device.download(y, &mut bytes).unwrap();
    bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
}

/// Makes a mistake in a process of its own and answers what that said when it ended.
fn last_words(test: &str, mistake: &str) -> String {
    let mut process = Command::new(std::env::current_exe().unwrap());
    let output = process.args(["--exact", test, "--nocapture"]).env(MISTAKE, mistake).output().unwrap();
    assert!(!output.status.success(), "{mistake} went unnoticed");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn mistakes_that_hardware_forgives_end_the_process_and_are_told() {
    let mistakes: [(&str, u32, &str); 6] = [
        (
            "reads_beyond",
            32,
            "outside of every buffer: kernel reads_beyond, block (0, 0, 0) of (1, 1, 1), thread 8 of 32",
        ),
        ("writes_before", 32, "wrote before the beginning of a buffer"),
        ("loses_lanes", 32, "lane 16 waits at the end"),
        ("goes_without_a_barrier", 64, "32 threads of 64 stand at __syncthreads"),
        ("never_waits_for_its_copies", 32, "asynchronous copies that nobody waited for"),
        ("loads_askew", 32, "not aligned to 16"),
    ];
    if let Ok(mistake) = std::env::var(MISTAKE) {
        let &(name, threads, _) = mistakes.iter().find(|(name, ..)| *name == mistake).unwrap();
        make(name, threads, false);
        return;
    }
    for (mistake, _, expected) in mistakes {
        let said = last_words("mistakes::mistakes_that_hardware_forgives_end_the_process_and_are_told", mistake);
        assert!(said.contains(expected), "{mistake}: {said}");
    }
}

#[test]
fn what_was_never_written_is_not_a_number() {
    for mistake in ["reads_unwritten", "uses_copies_too_early"] {
        assert!(make(mistake, 32, false)[..32].iter().all(|value| value.is_nan()), "{mistake}");
    }
    Bench::in_both_orders(&KERNELS, &[], |bench| {
        let memory = bench.poisoned(100);
        assert!(bench.read_floats(memory, 100).iter().all(|value| value.is_nan()));
    });
}

#[test]
fn a_forgotten_barrier_shows_in_one_of_the_two_orders() {
    let reversed: Vec<f32> = (0..64).rev().map(|value| value as f32).collect();
    let right = |backwards| make("forgets_a_barrier", 64, backwards) == reversed;
    assert!(!(right(false) && right(true)));
}
