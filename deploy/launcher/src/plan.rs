//! `phalanx plan`: what each rank would hold, from the checkpoint's headers alone.

use anyhow::Result;
use phalanx_coordinator::planner::{Placement, plan, pools::KvDemand};
use phalanx_proto::checkpoint::Checkpoint;

use crate::{cli::PlanArgs, models, serve::parallelism};

/// Bytes of one key or value on a GPU (bf16), which is what people plan for.
const KV_ELEMENT_BYTES: usize = 2;

pub(crate) fn run(args: &PlanArgs) -> Result<()> {
    let checkpoint = Checkpoint::open(&models::resolve(&args.model, args.model_dir.as_deref())?)?;
    let demand = KvDemand {
        block_size: 16,
        max_num_seqs: 64,
        max_model_len: checkpoint.geometry.max_position_embeddings.min(8192),
        max_num_batched_tokens: 2048,
        enable_prefix_caching: true,
    };
    let placement = Placement {
        world_size: args.tensor_parallel_size,
        parallelism: parallelism(args.enable_expert_parallel),
        kv_element_bytes: KV_ELEMENT_BYTES,
        demand,
        memory_bytes: args.memory,
    };
    let layout = plan(&checkpoint, &placement)?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&layout)?);
    } else {
        println!("{layout}");
    }
    Ok(())
}
