//! How much memory a worker may use, and what it needs beside weights.

use std::fs;

use phalanx_proto::{
    fault::{Fault, FaultKind},
    geometry::Geometry,
    layout::RankLayout,
};

use crate::{
    backend::{Backend, cuda, cuda::driver::Driver},
    executor::{Formation, faults},
    model::Model,
};

/// Tokens of the step that activations are set aside for: the usual `max_num_batched_tokens`.
const ACTIVATION_TOKENS: usize = 2048;
/// Rows of logits in the same step: the usual `max_num_seqs`.
const LOGIT_ROWS: usize = 256;

/// Bytes of host memory that can be had now: what the kernel calls available, or what the control group leaves.
///
/// # Errors
/// When `/proc/meminfo` does not say.
pub(crate) fn available_bytes() -> Result<u64, Fault> {
    const MEMINFO: &str = "/proc/meminfo";
    let unknown = |what: String| Fault::new(FaultKind::Unsupported, format!("{MEMINFO}: {what}; set the memory limit"));
    let text = fs::read_to_string(MEMINFO).map_err(|error| unknown(error.to_string()))?;
    let kibibytes = text.lines().find_map(|line| line.strip_prefix("MemAvailable:")?.split_whitespace().next());
    let kibibytes = kibibytes.and_then(|number| number.parse::<u64>().ok());
    let available = kibibytes.ok_or_else(|| unknown("no MemAvailable".into()))? * 1024;
    Ok(available.min(control_group_bytes().unwrap_or(u64::MAX)))
}

/// Bytes of a GPU's memory that are free now.
///
/// # Errors
/// When the GPU cannot be used; the message says what is missing.
pub(crate) fn available_device_bytes(index: u32) -> Result<u64, Fault> {
    let free = cuda::open(index).and_then(|device| Ok(device.free_bytes()?));
    free.map_err(|error| faults::of_backend(&error))
}

/// What the limit of this process's control group (version 2, as containers have it) leaves. `None` without a limit.
fn control_group_bytes() -> Option<u64> {
    let number = |file: &str| fs::read_to_string(format!("/sys/fs/cgroup/{file}")).ok()?.trim().parse::<u64>().ok();
    Some(number("memory.max")?.saturating_sub(number("memory.current")?))
}

/// Bytes set aside for the activations and logits of one full step: f32 buffers of the widest layer, which live at the
/// same time.
pub(crate) fn working_bytes(geometry: &Geometry, layout: &RankLayout) -> u64 {
    let held = layout.experts.iter().map(|range| range.intermediate.len()).max().unwrap_or_default();
    let heads = layout.q_heads.len() + 2 * layout.kv_heads.len();
    // Residual stream, its norm, a partial sum and its copy for the collective; queries, keys, values and their heads'
    // output; gate, up and product of each visited expert.
    let width = 4 * geometry.hidden_size
        + (heads + layout.q_heads.len()) * geometry.head_dim
        + geometry.num_experts_per_tok * 3 * held;
    let values = ACTIVATION_TOKENS * width + LOGIT_ROWS * layout.vocab_rows.len();
    (values * size_of::<f32>()) as u64
}

/// Checks that weights and KV cache fit in `memory_bytes` together.
///
/// # Errors
/// A fault of kind `OutOfMemory` with the numbers.
pub(crate) fn check_cache<B: Backend>(model: &Model<B>, formation: &Formation, memory_bytes: u64) -> Result<(), Fault> {
    use phalanx_proto::geometry::LayerKind::{FullAttention, SlidingAttention};
    let (geometry, layout) = (model.geometry(), model.layout());
    let blocks = geometry.layers_of(FullAttention) * formation.full_blocks
        + geometry.layers_of(SlidingAttention) * formation.sliding_blocks;
    let of_token = model.backend().kv_bytes_per_token_and_layer(layout.kv_heads.len(), geometry.head_dim);
    let needed = blocks as u128 * formation.block_size as u128 * of_token as u128;
    let left = memory_bytes.saturating_sub(model.weight_bytes());
    if needed <= u128::from(left) {
        return Ok(());
    }
    let message = format!("a KV cache of {needed} bytes, {left} are left of {memory_bytes}; form with fewer blocks");
    Err(Fault::new(FaultKind::OutOfMemory, message))
}
