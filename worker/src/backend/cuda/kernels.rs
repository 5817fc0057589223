//! The kernels' sources, which are part of the binary, and what a launch of each looks like.

/// A file of kernels. What it includes is in [`HEADERS`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KernelFile {
    /// Its name below `worker/kernels`.
    pub name: &'static str,
    /// Its text.
    pub source: &'static str,
}

macro_rules! file {
    ($name:literal) => {
        KernelFile { name: $name, source: include_str!(concat!("../../../kernels/", $name)) }
    };
}

/// What kernels include.
pub const HEADERS: [KernelFile; 2] = [file!("prelude.cuh"), file!("instructions.cuh")];
/// Embedding, norms, sums, conversions.
pub const ROWS: KernelFile = file!("rows.cu");
/// Every file that is compiled by itself.
pub const FILES: [KernelFile; 1] = [ROWS];
