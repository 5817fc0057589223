//! What the assembler says of each kernel, and what its launch bounds allow.

use std::collections::BTreeMap;

use phalanx_worker::backend::cuda::kernels::KernelFile;

/// Registers of a multiprocessor, on every architecture that is served.
const REGISTERS: u32 = 65536;
/// Registers that a thread can name.
const MOST_REGISTERS: u32 = 255;
/// Registers are given to a thread in groups of this many.
const GRANULARITY: u32 = 8;

/// What a kernel takes of a multiprocessor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Usage {
    /// Registers of a thread.
    pub(crate) registers: u32,
    /// Bytes stored and loaded because there were too few of them.
    pub(crate) spilled_bytes: u32,
}

/// Kernels by name, from a log of `--ptxas-options=-v`.
pub(crate) fn usage(log: &str) -> BTreeMap<String, Usage> {
    let mut kernels = BTreeMap::new();
    let mut name = String::new();
    for line in log.lines() {
        if let Some((_, rest)) = line.split_once("Compiling entry function '") {
            rest.split('\'').next().unwrap().clone_into(&mut name);
            kernels.insert(name.clone(), Usage::default());
        } else if let Some(kernel) = kernels.get_mut(&name) {
            if let Some(registers) = number_before(line, " registers") {
                kernel.registers = registers;
            }
            for what in [" bytes spill stores", " bytes spill loads"] {
                kernel.spilled_bytes += number_before(line, what).unwrap_or_default();
            }
        }
    }
    assert!(!kernels.is_empty(), "no kernel in the log:\n{log}");
    kernels
}

fn number_before(line: &str, what: &str) -> Option<u32> {
    let (before, _) = line.split_once(what)?;
    before.rsplit(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

/// The most registers that each kernel of a file may have by its `KERNEL(name, Arguments, threads, blocks)`.
pub(crate) fn register_caps(file: &KernelFile, definitions: &[(&str, u32)]) -> BTreeMap<String, u32> {
    let kernels = file.source.lines().filter_map(|line| line.trim().strip_prefix("KERNEL("));
    let caps = kernels.map(|rest| {
        let declaration: Vec<&str> = rest.split([',', ')']).map(str::trim).take(4).collect();
        let [name, _, threads, blocks] = declaration[..] else { panic!("{}: KERNEL({rest}", file.name) };
        // Bounds that are an expression are left to the assembler, which keeps to all of them.
        let [threads, blocks] = [threads, blocks].map(|text| value(file, definitions, text));
        let (Some(threads), Some(blocks)) = (threads, blocks) else { return (name.to_owned(), MOST_REGISTERS) };
        assert!(threads % 32 == 0 && threads <= 1024, "{name} of {}: {threads} threads", file.name);
        let cap = REGISTERS / (threads * blocks) / GRANULARITY * GRANULARITY;
        (name.to_owned(), cap.min(MOST_REGISTERS))
    });
    caps.collect()
}

/// A number, or a name that the definitions or the source give a number.
fn value(file: &KernelFile, definitions: &[(&str, u32)], text: &str) -> Option<u32> {
    let defined = || definitions.iter().find(|(name, _)| *name == text).map(|(_, value)| *value);
    let constant = |line: &str| {
        let (before, after) = line.split_once(&format!(" {text} "))?;
        let value = after.trim_start_matches(['=', ' ']).split([';', ' ', '/', 'u']).next()?;
        (before.starts_with("constexpr") || before.starts_with("#define")).then(|| value.parse().ok())?
    };
    text.parse().ok().or_else(defined).or_else(|| file.source.lines().find_map(constant))
}

#[test]
fn the_log_is_read() {
    let log = "ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'a' for 'sm_80'
ptxas info    : Function properties for a
ptxas         .     8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 14 registers, used 1 barriers, 384 bytes cmem[0]
ptxas info    : Compiling entry function 'b' for 'sm_80'
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 255 registers";
    let expected = [("a", 14, 16), ("b", 255, 0)];
    let expected = expected.map(|(name, registers, spilled_bytes)| (name.into(), Usage { registers, spilled_bytes }));
    assert_eq!(usage(log), BTreeMap::from(expected));
}

#[test]
fn launch_bounds_may_be_numbers_definitions_and_constants() {
    let source = "constexpr u32 WARPS = 8;\n#define BLOCKS 2\nKERNEL(a, A, 256, 1) {\nKERNEL(b, B, THREADS, BLOCKS) {}";
    let caps = register_caps(&KernelFile { name: "x.cu", source }, &[("THREADS", 512)]);
    assert_eq!(caps, BTreeMap::from([("a".to_owned(), 255), ("b".to_owned(), 64)]));
    let source = "constexpr u32 SIZE = 128;\nKERNEL(a, A, SIZE, 8)";
    assert_eq!(register_caps(&KernelFile { name: "x.cu", source }, &[])["a"], 64);
}
