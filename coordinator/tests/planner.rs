//! The planner on the headers of the released models: what it says adds up, and what it refuses it explains.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use std::path::PathBuf;

use phalanx_coordinator::planner::{
    LayoutPlan, Placement, PlanError, plan,
    pools::{BlockBytes, KvDemand, KvPools, split},
};
use phalanx_proto::{checkpoint::Checkpoint, layout::Parallelism};

const GIB: u64 = 1 << 30;

fn headers(model: &str) -> Checkpoint {
    let directory = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/data/headers").join(model);
    Checkpoint::open(&directory).unwrap()
}

fn demand() -> KvDemand {
    KvDemand {
        block_size: 16,
        max_num_seqs: 64,
        max_model_len: 8192,
        max_num_batched_tokens: 2048,
        enable_prefix_caching: true,
    }
}

fn placement(world_size: usize, parallelism: Parallelism) -> Placement {
    Placement { world_size, parallelism, kv_element_bytes: 2, demand: demand(), memory_bytes: None }
}

fn weights(plan: &LayoutPlan) -> Vec<u64> {
    plan.ranks.iter().map(|rank| rank.weight_bytes).collect()
}

#[test]
fn ranks_add_up_to_the_checkpoint_and_its_stated_replicas() {
    for model in ["gpt-oss-20b", "gpt-oss-120b"] {
        let checkpoint = headers(model);
        for parallelism in [Parallelism::Tensor, Parallelism::Expert] {
            for world in [1, 2, 4, 8, 16] {
                let plan = plan(&checkpoint, &placement(world, parallelism)).unwrap();
                let total: u64 = weights(&plan).iter().sum();
                let stated = plan.checkpoint_bytes - plan.unused_bytes + plan.replicated_bytes;
                assert_eq!(total, stated, "{model} {parallelism} {world}");
                assert_eq!(plan.unused_bytes, 0, "the release has no tensor that the model does not use");
            }
        }
    }
}

#[test]
fn the_largest_rank_is_within_three_per_cent_of_the_mean() {
    for model in ["gpt-oss-20b", "gpt-oss-120b"] {
        let checkpoint = headers(model);
        for world in [1, 2, 4, 8] {
            let plan = plan(&checkpoint, &placement(world, Parallelism::Tensor)).unwrap();
            let held = weights(&plan);
            let mean = held.iter().sum::<u64>() as f64 / held.len() as f64;
            let ratio = *held.iter().max().unwrap() as f64 / mean;
            println!("{model} tp {world}: largest rank {:.3} % above the mean", (ratio - 1.0) * 100.0);
            assert!(ratio < 1.03, "{model} over {world}: {ratio}");
            assert!((plan.largest_over_mean - ratio).abs() < 1e-9);
        }
    }
}

#[test]
fn every_head_row_and_expert_is_held_as_often_as_stated() {
    let checkpoint = headers("gpt-oss-20b");
    for (parallelism, world) in [(Parallelism::Tensor, 8), (Parallelism::Expert, 8), (Parallelism::Tensor, 16)] {
        let plan = plan(&checkpoint, &placement(world, parallelism)).unwrap();
        let held = |of: &dyn Fn(usize) -> [usize; 2]| (0..world).map(of).map(|[start, end]| end - start).sum::<usize>();
        assert_eq!(held(&|rank| plan.ranks[rank].q_heads), 64);
        assert_eq!(held(&|rank| plan.ranks[rank].kv_heads), 8.max(world));
        assert_eq!(held(&|rank| plan.ranks[rank].vocab_rows), 201_088);
        for layer in 0..24 {
            let of = |rank: &dyn Fn(usize) -> [usize; 2]| held(rank);
            let (experts, inner) = (
                of(&|rank| plan.ranks[rank].layers[layer].experts),
                of(&|rank| plan.ranks[rank].layers[layer].intermediate),
            );
            let expected = if parallelism == Parallelism::Tensor { (32 * world, 2880) } else { (32, 2880 * world) };
            assert_eq!((experts, inner), expected);
        }
    }
}

#[test]
fn kv_bytes_follow_from_heads_layers_and_blocks() {
    let checkpoint = headers("gpt-oss-120b");
    let plan = plan(&checkpoint, &placement(4, Parallelism::Tensor)).unwrap();
    // Keys and values, 8 heads of 64, 18 layers of each kind, 2 bytes.
    let token = 2 * 8 * 64 * 18 * 2;
    assert_eq!(plan.kv_bytes_per_token, token);
    // 128 positions touch at most 9 blocks of 16, and one more is on its way out.
    assert_eq!(plan.kv_bytes_per_sequence_sliding, token * 10 * 16);
    assert!(plan.ranks.iter().all(|rank| rank.kv_bytes_per_token == token / 4));
}

#[test]
fn what_fits_is_never_more_than_the_memory_and_grows_with_it() {
    let checkpoint = headers("gpt-oss-20b");
    let mut ask = placement(1, Parallelism::Tensor);
    let mut before = 0;
    for memory in [14, 16, 24, 80] {
        ask.memory_bytes = Some(memory * GIB);
        let plan = plan(&checkpoint, &ask).unwrap();
        let fit = plan.fits.unwrap();
        assert!(plan.ranks[0].weight_bytes + fit.kv_bytes <= memory * GIB);
        assert!(fit.tokens >= before && fit.longest_sequences >= 1);
        before = fit.tokens;
    }
    assert_eq!(before, 64 * 8192, "80 GiB serve everything that was asked for, and no more is taken");
}

#[test]
fn refusals_name_the_sizes_that_fit() {
    let checkpoint = headers("gpt-oss-120b");
    let refused = plan(&checkpoint, &placement(3, Parallelism::Tensor)).unwrap_err().to_string();
    assert!(refused.contains("64 query heads do not divide by 3"), "{refused}");
    assert!(refused.contains("[1, 2, 4, 8, 16, 32, 64]"), "{refused}");

    let mut ask = placement(2, Parallelism::Tensor);
    ask.memory_bytes = Some(24 * GIB);
    let Err(PlanError::Weights { needed, available, fitting, .. }) = plan(&checkpoint, &ask) else {
        panic!("half of the 120b does not fit into 24 GiB");
    };
    assert!(needed > available);
    assert_eq!(fitting, [4, 8, 16, 32, 64]);

    ask.memory_bytes = Some(needed + (64 << 20));
    let refused = plan(&checkpoint, &ask).unwrap_err().to_string();
    assert!(refused.contains("max_model_len 8192") && refused.contains("lower max_model_len to at most"), "{refused}");
}

#[test]
fn a_length_that_a_refusal_names_is_accepted() {
    let block = BlockBytes { full: 1000, sliding: 500 };
    let too_long = split(40_000, &block, 128, &demand()).unwrap_err();
    let shorter = KvDemand { max_model_len: too_long.largest as usize, ..demand() };
    let pools = split(40_000, &block, 128, &shorter).unwrap();
    assert!(pools.bytes(&block) <= 40_000 && pools.sliding_blocks > 0);
}

#[test]
fn kinds_of_layers_that_a_model_lacks_get_no_blocks() {
    let only_full = split(GIB, &BlockBytes { full: 4096, sliding: 0 }, 128, &demand()).unwrap();
    assert_eq!(only_full, KvPools { full_blocks: 64 * 512, sliding_blocks: 0 });
    let only_sliding = split(GIB, &BlockBytes { full: 0, sliding: 4096 }, 128, &demand()).unwrap();
    // 64 sequences of 10 blocks and two steps of 2048 tokens, twice for cached prefixes.
    assert_eq!(only_sliding, KvPools { full_blocks: 0, sliding_blocks: 2 * (640 + 256) });
}

#[test]
fn json_and_table_say_the_same() {
    let checkpoint = headers("gpt-oss-120b");
    let plan = plan(&checkpoint, &Placement { memory_bytes: Some(80 * GIB), ..placement(4, Parallelism::Tensor) });
    let plan = plan.unwrap();
    let json = serde_json::to_value(&plan).unwrap();
    assert_eq!(json["world_size"], 4);
    assert_eq!(json["ranks"][3]["rank"], 3);
    assert_eq!(json["ranks"][1]["q_heads"], serde_json::json!([16, 32]));
    assert!(json["fits"]["tokens"].as_u64().unwrap() > 0);
    let table = plan.to_string();
    println!("{table}");
    assert_eq!(table.lines().count(), 2 + 4 + 3 + 2);
    assert!(table.contains("16..32") && table.contains("704-736"));
}
