//! What can be told of the kernels without a GPU: that NVRTC compiles each for every architecture that is served, that
//! the assembler spilled nothing, and which instructions came out.
//!
//! Compiler and disassembler are Python wheels, which `tests/run` installs (`tests/requirements.txt`).

#![allow(missing_docs, reason = "tests have no users")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "helpers of tests fail by panicking")]

mod cache;
mod ptxas;
mod sass;
mod tools;

use std::collections::BTreeMap;

use phalanx_worker::backend::cuda::{
    compiler::Compiler,
    kernels::{FILES, KernelFile},
    nvrtc::Compiled,
};

use crate::{ptxas::Usage, sass::Kernel};

/// A100; H100 and H200; RTX 5090 and RTX PRO 6000.
const ARCHITECTURES: [&str; 3] = ["sm_80", "sm_90a", "sm_120"];

/// Names with their values.
type Definitions = &'static [(&'static str, u32)];

/// Definitions that a file is compiled with, in as many sets as there are worth checking. Files that are not named here
/// are compiled with none.
const DEFINITIONS: &[(&str, &[Definitions])] = &[
    ("kv_write.cu", HEADS),
    ("attend_decode.cu", HEADS),
    ("attend_prefill.cu", HEADS),
    (
        "all_reduce.cu",
        &[&[("WORLD", 2), ("HIDDEN", 2880)], &[("WORLD", 4), ("HIDDEN", 2880)], &[("WORLD", 8), ("HIDDEN", 2880)]],
    ),
];
/// gpt-oss, and the small models of the tests.
const HEADS: &[Definitions] =
    &[&[("HEAD_DIM", 64), ("GROUP", 8)], &[("HEAD_DIM", 64), ("GROUP", 2)], &[("HEAD_DIM", 32), ("GROUP", 3)]];

/// What is expected of a kernel's instructions.
struct Expectation {
    kernel: &'static str,
    /// It multiplies on tensor cores.
    tensor_cores: bool,
    /// Most instructions that its busiest loop may take for a weight (see [`sass::Loop::instructions_a_weight`]).
    most_instructions_a_weight: Option<f64>,
}

/// Kernels that multiply matrices. The others need not be named: they must not use tensor cores.
const EXPECTATIONS: [Expectation; 18] = [
    on_tensor_cores("gemv_8_f32"),
    on_tensor_cores("gemv_16_f32"),
    on_tensor_cores("gemv_32_f32"),
    on_tensor_cores("gemv_8_bf16"),
    on_tensor_cores("gemv_16_bf16"),
    on_tensor_cores("gemv_32_bf16"),
    on_tensor_cores("gemm_f32"),
    on_tensor_cores("gemm_bf16"),
    // Decoding at batch 1 to 8 must stay below what memory leaves time for: 5.2 instructions a weight on an A100, 3.8 on
    // an H200 (multiprocessors times clock times four schedulers, over the weights that the memory brings).
    Expectation { kernel: "gate_up_8", tensor_cores: true, most_instructions_a_weight: Some(3.5) },
    Expectation { kernel: "down_8", tensor_cores: true, most_instructions_a_weight: Some(3.5) },
    on_tensor_cores("gate_up_16"),
    on_tensor_cores("gate_up_32"),
    on_tensor_cores("down_16"),
    on_tensor_cores("down_32"),
    on_tensor_cores("gate_up_gemm"),
    on_tensor_cores("down_gemm"),
    on_tensor_cores("attend_decode"),
    on_tensor_cores("attend_prefill"),
];

const fn on_tensor_cores(kernel: &'static str) -> Expectation {
    Expectation { kernel, tensor_cores: true, most_instructions_a_weight: None }
}

/// Kernels that compute in f64 on purpose: once, when the worker starts.
const IN_F64: [&str; 1] = ["rotary_table"];

fn definitions_of(file: &KernelFile) -> &'static [Definitions] {
    DEFINITIONS.iter().find(|(name, _)| *name == file.name).map_or(&[&[]], |(_, sets)| sets)
}

/// Every file, for every architecture, with every set of definitions.
fn for_each_image(mut check: impl FnMut(&KernelFile, &str, &[(&str, u32)], Compiled)) {
    let compiler = Compiler::new(tools::nvrtc(), None);
    for file in &FILES {
        for architecture in ARCHITECTURES {
            for definitions in definitions_of(file) {
                let compiled = compiler.compile(file, definitions, architecture);
                let compiled = compiled.unwrap_or_else(|error| panic!("{} for {architecture}: {error}", file.name));
                check(file, architecture, definitions, compiled);
            }
        }
    }
}

#[test]
fn every_kernel_compiles_everywhere_without_spills_and_within_its_registers() {
    for_each_image(|file, architecture, definitions, compiled| {
        let usage = ptxas::usage(&compiled.log);
        let caps = ptxas::register_caps(file, definitions);
        let (found, declared): (Vec<_>, Vec<_>) = (usage.keys().collect(), caps.keys().collect());
        assert_eq!(found, declared, "kernels of {} for {architecture}\n{}", file.name, compiled.log);
        for (kernel, Usage { registers, spilled_bytes }) in &usage {
            println!(
                "{architecture} {kernel}: {registers} registers of {}, {spilled_bytes} bytes spilled",
                caps[kernel]
            );
            assert_eq!(*spilled_bytes, 0, "{kernel} spills for {architecture}\n{}", compiled.log);
            assert!(
                *registers <= caps[kernel],
                "{kernel} for {architecture}: {registers} registers, at most {}",
                caps[kernel]
            );
        }
    });
}

#[test]
fn instructions_are_the_ones_that_were_meant() {
    let mut missing: Vec<&str> = EXPECTATIONS.iter().map(|expectation| expectation.kernel).collect();
    for_each_image(|file, architecture, _, compiled| {
        for (name, kernel) in sass::disassemble(&compiled.cubin) {
            let place = format!("{name} of {} for {architecture}", file.name);
            println!("{place}: {} instructions, {} on tensor cores", kernel.instructions(), kernel.on_tensor_cores());
            assert_eq!(kernel.first_with(&["E4M3", "E5M2"]), None, "{place}: an FP8 instruction");
            if !IN_F64.contains(&name.as_str()) {
                assert_eq!(kernel.first_with(&["DADD", "DMUL", "DFMA", ".F64"]), None, "{place}: f64 by mistake");
            }
            let expectation = EXPECTATIONS.iter().find(|expectation| expectation.kernel == name);
            check(&place, &kernel, expectation);
            missing.retain(|&kernel| kernel != name);
        }
    });
    assert!(missing.is_empty(), "no kernel is called {missing:?}");
}

fn check(place: &str, kernel: &Kernel, expectation: Option<&Expectation>) {
    let Some(expectation) = expectation else {
        assert_eq!(kernel.on_tensor_cores(), 0, "{place} uses tensor cores and is not among the kernels that should");
        return;
    };
    assert_eq!(kernel.on_tensor_cores() > 0, expectation.tensor_cores, "{place}: tensor cores");
    if let Some(most) = expectation.most_instructions_a_weight {
        let loops = kernel.loops();
        let busiest = loops.iter().max_by_key(|l| (l.matrix_products, std::cmp::Reverse(l.instructions)));
        let busiest = busiest.unwrap_or_else(|| panic!("{place} has no loop"));
        let found = busiest.instructions_a_weight();
        println!("{place}: {found:.2} instructions a weight, {busiest:?}");
        assert!(found <= most, "{place}: {found:.2} instructions a weight, at most {most}; {busiest:?}");
    }
}

/// A kernel with everything that the checks look for, so that they are known to find it.
const SAMPLE: KernelFile = KernelFile {
    name: "sample.cu",
    source: "#include <prelude.cuh>
struct Arguments { const u32* a; float* d; u32 steps; };
KERNEL(product, Arguments, THREADS, 2) {
    float d[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    const u32 b[2] = {args.a[0], args.a[1]};
#pragma unroll 1
    for (u32 step = 0; step < args.steps; ++step) {
        u32 a[4];
        for (u32 i = 0; i < 4; ++i) a[i] = args.a[(step * 4 + i) * 32 + lane_id()];
        mma_bf16(d, a, b);
    }
    for (u32 i = 0; i < 4; ++i) args.d[threadIdx.x * 4 + i] = d[i];
}
KERNEL(scale, Arguments, 1024, 1) { args.d[threadIdx.x] *= 1.1; }
",
};

#[test]
fn the_checks_find_what_they_look_for() {
    let compiler = Compiler::new(tools::nvrtc(), None);
    for architecture in ARCHITECTURES {
        let compiled = compiler.compile(&SAMPLE, &[("THREADS", 128)], architecture).unwrap();
        assert_eq!(ptxas::usage(&compiled.log).into_keys().collect::<Vec<_>>(), ["product", "scale"]);
        let caps = ptxas::register_caps(&SAMPLE, &[("THREADS", 128)]);
        assert_eq!(caps, BTreeMap::from([("product".to_owned(), 255), ("scale".to_owned(), 64)]));
        let kernels = sass::disassemble(&compiled.cubin);
        let (product, scale) = (&kernels["product"], &kernels["scale"]);
        assert_eq!(product.on_tensor_cores(), 1, "{architecture}: {product:?}");
        let [inner] = &product.loops()[..] else { panic!("{architecture}: {:?}", product.loops()) };
        assert_eq!(inner.matrix_products, 1);
        assert!((5..60).contains(&inner.instructions), "{inner:?}");
        assert_eq!(inner.instructions_a_weight(), inner.instructions as f64 / 8.0);
        assert!(scale.first_with(&["DADD", "DMUL", "DFMA", ".F64"]).is_some(), "{architecture}: {scale:?}");
        assert_eq!((scale.on_tensor_cores(), scale.loops().len()), (0, 0), "{architecture}");
    }
}

#[test]
fn what_does_not_compile_is_told_with_its_line() {
    let compiler = Compiler::new(tools::nvrtc(), None);
    let file = KernelFile { name: "wrong.cu", source: "#include <prelude.cuh>\nint x = nonsense;\n" };
    let error = compiler.compile(&file, &[], "sm_80").unwrap_err().to_string();
    assert!(error.contains("wrong.cu(2)") && error.contains("nonsense"), "{error}");
    let error = compiler.compile(&FILES[0], &[], "sm_1").unwrap_err().to_string();
    assert!(error.contains("gpu-architecture"), "{error}");
    let file = KernelFile { name: "zero.cu", source: "a\0b" };
    assert!(compiler.compile(&file, &[], "sm_80").is_err());
}
