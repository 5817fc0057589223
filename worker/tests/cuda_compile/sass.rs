//! Machine code as `nvdisasm` shows it: a kernel's instructions and its loops.

use std::{collections::BTreeMap, process::Command};

use crate::tools;

/// Weights that a matrix instruction of 16 × 8 × 16 takes, as its A operand.
const WEIGHTS_A_PRODUCT: usize = 16 * 16;
/// Threads that execute an instruction together.
const LANES: usize = 32;

/// A kernel's machine code.
#[derive(Debug, Default)]
pub(crate) struct Kernel {
    /// Opcode and operands of each, without the predicate.
    code: Vec<String>,
    /// The instruction that follows each label.
    labels: BTreeMap<String, usize>,
}

/// A stretch of code that ends with a branch to its beginning.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Loop {
    /// Instructions of one turn, if nothing is skipped.
    pub(crate) instructions: usize,
    /// Those on tensor cores among them.
    pub(crate) matrix_products: usize,
}

impl Loop {
    /// Instructions that a thread executes for one weight, when weights are the A operands of 16 × 8 × 16 products: a
    /// warp's instruction counts for its 32 threads, and a product takes 256 weights.
    pub(crate) fn instructions_a_weight(&self) -> f64 {
        (self.instructions * LANES) as f64 / (self.matrix_products * WEIGHTS_A_PRODUCT) as f64
    }
}

impl Kernel {
    /// Instructions without the padding at the end.
    pub(crate) fn instructions(&self) -> usize {
        self.code.iter().filter(|code| !code.starts_with("NOP")).count()
    }

    /// Instructions on tensor cores.
    pub(crate) fn on_tensor_cores(&self) -> usize {
        self.code.iter().filter(|code| is_matrix_product(code)).count()
    }

    /// The first instruction whose opcode has one of these in it.
    pub(crate) fn first_with(&self, parts: &[&str]) -> Option<&str> {
        let opcode = |code: &str| code.split_whitespace().next().unwrap_or_default().to_owned();
        let has = |code: &&String| parts.iter().any(|part| opcode(code).contains(part));
        self.code.iter().find(has).map(String::as_str)
    }

    /// Every loop, inner ones beside those around them. The one that follows the last instruction of every kernel and
    /// does nothing is none.
    pub(crate) fn loops(&self) -> Vec<Loop> {
        let branches = self.code.iter().enumerate().filter(|(_, code)| code.starts_with("BRA"));
        let back = branches.filter_map(|(end, code)| {
            let label = code.split('(').nth(1)?.split(')').next()?;
            self.labels.get(label).filter(|&&begin| begin < end).map(|&begin| &self.code[begin..=end])
        });
        back.map(|turn| Loop {
            instructions: turn.len(),
            matrix_products: turn.iter().filter(|code| is_matrix_product(code)).count(),
        })
        .collect()
    }
}

fn is_matrix_product(code: &str) -> bool {
    ["HMMA", "QMMA", "IMMA", "HGMMA", "QGMMA", "IGMMA", "UTCHMMA"].iter().any(|opcode| code.starts_with(opcode))
}

/// The kernels of a cubin by name.
pub(crate) fn disassemble(cubin: &[u8]) -> BTreeMap<String, Kernel> {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("kernels.cubin");
    std::fs::write(&path, cubin).unwrap();
    let nvdisasm = tools::nvdisasm();
    let output = Command::new(&nvdisasm).arg("-c").arg(&path).output();
    let output = output.unwrap_or_else(|error| panic!("{}: {error}", nvdisasm.display()));
    let (text, said) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{}: {said}", nvdisasm.display());
    parse(&text)
}

fn parse(text: &str) -> BTreeMap<String, Kernel> {
    let mut kernels = BTreeMap::new();
    let mut name = None;
    for line in text.lines().map(str::trim) {
        if let Some((_, section)) = line.split_once(".section\t.text.") {
            name = section.split(',').next().map(str::to_owned);
        }
        let Some(name) = &name else { continue };
        let kernel: &mut Kernel = kernels.entry(name.clone()).or_default();
        if let Some(label) = line.strip_suffix(':').filter(|label| label.starts_with(".L_")) {
            kernel.labels.insert(label.to_owned(), kernel.code.len());
        } else if let Some((_, code)) = line.strip_prefix("/*").and_then(|line| line.split_once("*/")) {
            let code = code.trim();
            // `@!P0 BRA ...`: whether it is executed is not of interest.
            let code = if code.starts_with('@') { code.split_once(' ').map_or("", |(_, code)| code) } else { code };
            kernel.code.push(code.trim().to_owned());
        }
    }
    assert!(kernels.values().all(|kernel| kernel.instructions() > 0), "a kernel without code:\n{text}");
    assert!(!kernels.is_empty(), "no kernel in:\n{text}");
    kernels
}
