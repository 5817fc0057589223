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
pub const HEADERS: [KernelFile; 3] = [file!("prelude.cuh"), file!("instructions.cuh"), file!("attention.cuh")];
/// Embedding, norms, sums, conversions.
pub const ROWS: KernelFile = file!("rows.cu");
/// Rotary embedding, and keys and values into the cache. Defined by `HEAD_DIM` and `GROUP`, as all of attention is.
pub const KV_WRITE: KernelFile = file!("kv_write.cu");
/// Attention of sequences with one row each.
pub const ATTEND_DECODE: KernelFile = file!("attend_decode.cu");
/// Attention of sequences with many rows.
pub const ATTEND_PREFILL: KernelFile = file!("attend_prefill.cu");
/// Sums and exchanges between ranks that push into each other's memory; compiled with the definitions of
/// [`Region`](crate::collective::push::Region).
pub const ALL_REDUCE: KernelFile = file!("all_reduce.cu");
/// Every file that is compiled by itself.
pub const FILES: [KernelFile; 5] = [ROWS, KV_WRITE, ATTEND_DECODE, ATTEND_PREFILL, ALL_REDUCE];
