//! The model against tensors that independent implementations computed, over backends, world sizes and layouts.
//!
//! | module | holds |
//! | --- | --- |
//! | `tiny` | random weights: every golden logit and greedy token; hidden states, attention and router of short prompts |
//! | `worlds` | the same greedy tokens at every world size and layout; how a prompt is cut and batched changes no bit |
//! | `nano` | a trained model's sixty golden answers |
//! | `shapes` | checkpoints of other shapes: the backends and the world sizes agree |
//! | `precisions` | the same values as bf16, f16 and f32, in one file and in several |
//! | `cuda` | the CUDA kernels, run on the host by the emulator: tiny, tiny-ragged and nano within the gates for bf16 |
//! | `refusals` | damaged checkpoints and batches that do not fit |
//! | `group`, `session`, `recorder`, `files` | ranks as threads, running prompts, listening in, reading golden files |

#![allow(missing_docs, reason = "tests have no users")]
#![allow(unsafe_code, reason = "the emulator loads compiled kernels and gives them memory with guard pages")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "helpers of tests fail by panicking")]

#[cfg(target_arch = "x86_64")]
mod cuda;
#[cfg(target_arch = "x86_64")]
#[path = "../emulator/mod.rs"]
mod emulator;
mod files;
mod group;
#[path = "../in_process/mod.rs"]
mod in_process;
#[cfg(target_arch = "x86_64")]
#[path = "../emulator/machine.rs"]
mod machine;
mod nano;
mod precisions;
mod recorder;
mod refusals;
mod session;
mod shapes;
mod tiny;
mod worlds;

use phalanx_worker::backend::{Arithmetic, Backend, cpu::CpuBackend, reference::ReferenceBackend};

/// A backend under test.
trait Candidate: Backend {
    /// Largest absolute difference from a golden logit.
    const LOGIT_TOLERANCE: f32;
    /// Tokens a block. Small and odd, so that slices end within blocks and tables are long.
    const BLOCK_SIZE: usize = 13;

    fn make(arithmetic: Arithmetic) -> Self;
}

impl Candidate for ReferenceBackend {
    // The golden implementations differ from each other by 2.9e-5 at most. With logits up to 20, f32's unit roundoff of
    // 6e-8 gives 1.2e-6 for the last rounding alone; some 30 roundings in a row (three to five layers of norm, product,
    // softmax, product) that partly cancel explain 3e-5, and three times that is the gate. Short prompts keep half of it.
    // At position 4200 the angles' rounding comes on top: the golden power function differs from ours in the last bit of
    // one frequency (the seventh), which moves logits by up to 7e-5.
    const LOGIT_TOLERANCE: f32 = 1e-4;

    fn make(arithmetic: Arithmetic) -> Self {
        Self::new(arithmetic)
    }
}

impl Candidate for CpuBackend {
    // What the experts read is quantized to 16 bits: off by at most half of 1/32639 of the greatest of 32 values, which is
    // 2e-5 of the values' deviation. How a model amplifies that was measured: in `tiny` the stream is off by at most 2.6e-4
    // after the first experts and by 1.4e-3 after the fourth, a logit (deviation 4, at most 20) by 3.2e-3 among 770,000.
    // The gate is a quarter more than that; f32's own 1.2e-4 does not count beside it. `cpu_experts` holds a layer to the
    // exact bound.
    const LOGIT_TOLERANCE: f32 = 4e-3;

    fn make(arithmetic: Arithmetic) -> Self {
        // One thread a rank: groups of four share the test machine's two cores.
        Self::new(arithmetic, 1).unwrap()
    }
}
