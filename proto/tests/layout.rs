//! The ranks' slices, together, are the checkpoint: every element once, replicas where they are stated, nothing else.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "helpers of tests fail by panicking")]

use std::{collections::BTreeSet, path::Path};

use phalanx_proto::{
    geometry::{Geometry, LayerKind, MXFP4_BLOCK},
    ids::Rank,
    layout::{Layout, LayoutError, Parallelism, RankLayout, TensorSlice},
};

fn geometry(model: &str) -> Geometry {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(model).join("config.json");
    Geometry::from_config_json(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn models() -> Vec<Geometry> {
    ["tests/data/golden/tiny", "tests/data/golden/tiny-ragged", "deploy/models/nano"].map(geometry).to_vec()
}

/// The release's 120b, from the numbers of its card.
fn largest() -> Geometry {
    let mut geometry = geometry("tests/data/golden/tiny");
    geometry.hidden_size = 2880;
    geometry.intermediate_size = 2880;
    geometry.num_attention_heads = 64;
    geometry.num_key_value_heads = 8;
    geometry.num_local_experts = 128;
    geometry.vocab_size = 201_088;
    geometry.layer_types = [LayerKind::SlidingAttention, LayerKind::FullAttention].repeat(18);
    geometry
}

fn ranks(geometry: &Geometry, world: usize, parallelism: Parallelism) -> Option<Vec<RankLayout>> {
    let layout = Layout::new(geometry, world, parallelism).ok()?;
    Some((0..world).map(|rank| layout.rank(geometry, Rank(rank as u32))).collect())
}

/// How many ranks must hold each element of a tensor.
fn stated_copies(name: &str, geometry: &Geometry, world: usize) -> usize {
    let replicated = ["embed_tokens", "norm.weight", "router"].iter().any(|part| name.contains(part));
    let key_or_value = name.contains("k_proj") || name.contains("v_proj");
    match (replicated, key_or_value) {
        (true, _) => world,
        (_, true) => (world / geometry.num_key_value_heads).max(1),
        _ => 1,
    }
}

/// Asserts that every element of a tensor lies in exactly `copies` of the slices: cuts the tensor along all borders of
/// all slices and looks at each cell.
fn assert_covered(slices: &[&TensorSlice], copies: usize) {
    let name = &slices[0].name;
    let borders = |axis: usize| {
        let ends = slices.iter().filter(|slice| slice.elements() > 0).map(|slice| &slice.ranges[axis]);
        let borders: BTreeSet<usize> = ends.flat_map(|range| [range.start, range.end]).collect();
        assert!(borders.first() == Some(&0) && borders.last() == Some(&slices[0].shape[axis]), "{name} axis {axis}");
        borders.into_iter().collect::<Vec<_>>()
    };
    let mut cells: Vec<Vec<usize>> = vec![vec![]];
    for axis in 0..slices[0].shape.len() {
        let borders = borders(axis);
        let starts = &borders[..borders.len() - 1];
        cells = cells.iter().flat_map(|cell| starts.iter().map(|&s| [&cell[..], &[s]].concat())).collect();
    }
    for cell in cells {
        let holds = |slice: &&&TensorSlice| slice.ranges.iter().zip(&cell).all(|(range, at)| range.contains(at));
        assert_eq!(slices.iter().filter(holds).count(), copies, "{name} at {cell:?}");
    }
}

#[test]
fn slices_cover_every_tensor_once_and_replicas_as_stated() {
    let mut divisions = 0;
    for geometry in models().into_iter().chain([largest()]) {
        for world in 1..=16 {
            for parallelism in [Parallelism::Tensor, Parallelism::Expert] {
                let Some(ranks) = ranks(&geometry, world, parallelism) else { continue };
                let tensors: Vec<_> = ranks.iter().map(|rank| rank.tensors(&geometry)).collect();
                for tensor in 0..tensors[0].len() {
                    let slices: Vec<_> = tensors.iter().map(|of_rank| &of_rank[tensor]).collect();
                    assert_covered(&slices, stated_copies(&slices[0].name, &geometry, world));
                }
                divisions += 1;
            }
        }
    }
    assert!(divisions >= 20, "only {divisions} divisions fit");
}

#[test]
fn every_query_head_lies_with_its_key_value_head() {
    for geometry in models().into_iter().chain([largest()]) {
        for world in 1..=16 {
            for rank in ranks(&geometry, world, Parallelism::Expert).unwrap_or_default() {
                for q in rank.q_heads.clone() {
                    assert!(rank.kv_heads.contains(&(q / geometry.group_size())), "world {world}: {rank:?}");
                }
                assert_eq!(rank.q_heads.len() % rank.kv_heads.len(), 0);
            }
        }
    }
}

#[test]
fn intermediate_slices_are_whole_blocks_and_come_out_even_over_the_layers() {
    let geometry = largest();
    for world in [4, 8] {
        let ranks = ranks(&geometry, world, Parallelism::Tensor).unwrap();
        let held = ranks.iter().map(|rank| {
            let cut = rank.experts.iter().map(|experts| &experts.intermediate);
            assert!(cut.clone().all(|range| range.start % MXFP4_BLOCK == 0 && range.end % MXFP4_BLOCK == 0));
            cut.map(ExactSizeIterator::len).sum::<usize>()
        });
        let held: Vec<_> = held.collect();
        let (most, least) = (*held.iter().max().unwrap(), *held.iter().min().unwrap());
        assert!((most - least) * 100 <= least, "world {world}: {held:?}");
    }
}

#[test]
fn only_the_first_rank_holds_the_biases_that_are_added_once() {
    let geometry = geometry("tests/data/golden/tiny");
    for rank in ranks(&geometry, 4, Parallelism::Tensor).unwrap() {
        let tensors = rank.tensors(&geometry);
        let shared = tensors.iter().filter(|t| t.name.ends_with("o_proj.bias") || t.name.ends_with("down_proj_bias"));
        assert!(shared.clone().all(|slice| (slice.elements() > 0) == rank.adds_shared_bias()));
        assert_eq!(shared.count(), 2 * geometry.num_hidden_layers());
    }
}

#[test]
fn sizes_that_do_not_fit_are_refused_with_those_that_do() {
    let refusal =
        |geometry: &Geometry, world, parallelism| Layout::new(geometry, world, parallelism).unwrap_err().to_string();
    let ragged = geometry("tests/data/golden/tiny-ragged");
    let cases = [
        (0, Parallelism::Tensor, "a group has 1 to 64 ranks; sizes that fit: [1, 2]"),
        (65, Parallelism::Tensor, "a group has 1 to 64 ranks; sizes that fit: [1, 2]"),
        (4, Parallelism::Tensor, "6 query heads do not divide by 4; sizes that fit: [1, 2]"),
        (3, Parallelism::Tensor, "2 key-value heads neither divide by 3 nor divide it; sizes that fit: [1, 2]"),
        (6, Parallelism::Tensor, "there are only 3 MXFP4 blocks of the intermediate axis; sizes that fit: [1, 2]"),
    ];
    for (world, parallelism, reason) in cases {
        let expected = format!("world size {world} does not fit: {reason}");
        assert_eq!(refusal(&ragged, world, parallelism), expected);
    }
    assert!(Layout::new(&ragged, 6, Parallelism::Expert).is_ok());
    let few_experts = Geometry { num_local_experts: 5, ..ragged.clone() };
    assert!(refusal(&few_experts, 6, Parallelism::Expert).contains("there are only 5 experts"));
    let few_words = Geometry { vocab_size: 1, ..ragged };
    assert!(refusal(&few_words, 2, Parallelism::Tensor).contains("there are only 1 rows of the vocabulary"));
}

#[test]
fn parallelism_is_spelled_tp_or_ep() {
    assert_eq!("tp".parse(), Ok(Parallelism::Tensor));
    assert_eq!("ep".parse(), Ok(Parallelism::Expert));
    assert_eq!("pp".parse::<Parallelism>(), Err(LayoutError::Parallelism("pp".to_owned())));
    assert_eq!([Parallelism::Tensor, Parallelism::Expert].map(|p| p.to_string()), ["tp", "ep"]);
}
