//! Which slice of which tensor each rank holds.
//!
//! Rank, world size, parallelism and geometry determine every range, so that the planner (which adds up bytes), the
//! coordinator (which assigns) and the worker (which reads) cannot disagree: all three ask this module.

#![allow(clippy::single_range_in_vec_init, reason = "a tensor of one axis has one range")]

use std::{fmt, ops::Range, str::FromStr};

use thiserror::Error;

use crate::{
    geometry::{Geometry, LayerKind, MXFP4_BLOCK},
    ids::Rank,
};

/// How the experts are divided. Attention is always divided by heads and the unembedding by vocabulary rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Parallelism {
    /// Every rank holds a slice of every expert, cut along the intermediate axis by whole MXFP4 blocks.
    Tensor,
    /// Every rank holds whole experts.
    Expert,
}

impl fmt::Display for Parallelism {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tensor => "tp",
            Self::Expert => "ep",
        })
    }
}

impl FromStr for Parallelism {
    type Err = LayoutError;

    fn from_str(text: &str) -> Result<Self, LayoutError> {
        match text {
            "tp" => Ok(Self::Tensor),
            "ep" => Ok(Self::Expert),
            other => Err(LayoutError::Parallelism(other.to_owned())),
        }
    }
}

/// Why a model cannot be divided as asked.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum LayoutError {
    /// The world size does not divide the model.
    #[error("world size {world_size} does not fit: {reason}; sizes that fit: {fitting:?}")]
    WorldSize {
        /// The size asked for.
        world_size: usize,
        /// What does not divide.
        reason: String,
        /// Sizes that would do.
        fitting: Vec<usize>,
    },
    /// No such parallelism.
    #[error("parallelism is {0:?}, expected \"tp\" or \"ep\"")]
    Parallelism(String),
}

/// Largest world size that is considered.
pub const MAX_WORLD_SIZE: usize = 64;

/// How a whole group divides a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    world_size: usize,
    parallelism: Parallelism,
}

/// What one rank holds, in units of heads, rows, experts and intermediate values.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RankLayout {
    /// Place in the group.
    pub rank: Rank,
    /// Size of the group.
    pub world_size: usize,
    /// How the experts are divided.
    pub parallelism: Parallelism,
    /// Query heads.
    pub q_heads: Range<usize>,
    /// Key and value heads. Ranks share one when there are more ranks than heads.
    pub kv_heads: Range<usize>,
    /// Rows of the unembedding.
    pub vocab_rows: Range<usize>,
    /// One entry a layer.
    pub experts: Vec<ExpertRange>,
}

/// A rank's part of one layer's experts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExpertRange {
    /// Experts this rank computes.
    pub experts: Range<usize>,
    /// Values of the intermediate axis, both ends multiples of the MXFP4 block.
    pub intermediate: Range<usize>,
}

/// A slab of one tensor of the checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSlice {
    /// Name in the checkpoint.
    pub name: String,
    /// Shape of the whole tensor.
    pub shape: Vec<usize>,
    /// The part that is held, one range an axis; an empty range means nothing of it.
    pub ranges: Vec<Range<usize>>,
    /// Element type the tensor must have.
    pub kind: TensorKind,
}

/// What a tensor's elements are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TensorKind {
    /// bf16, f16 or f32.
    Dense,
    /// Packed FP4 pairs or E8M0 scales.
    Bytes,
}

impl TensorSlice {
    /// Elements held.
    pub fn elements(&self) -> usize {
        self.ranges.iter().map(ExactSizeIterator::len).product()
    }

    /// Shape of what is held.
    pub fn held_shape(&self) -> Vec<usize> {
        self.ranges.iter().map(ExactSizeIterator::len).collect()
    }

    /// Whether nothing is cut away.
    pub fn is_whole(&self) -> bool {
        self.ranges.iter().zip(&self.shape).all(|(range, &len)| *range == (0..len))
    }
}

/// Part `index` of `0..len` cut into `parts` pieces whose lengths differ by at most one; longer pieces are spread evenly.
pub fn even_part(len: usize, parts: usize, index: usize) -> Range<usize> {
    (index * len).div_ceil(parts)..((index + 1) * len).div_ceil(parts)
}

impl Layout {
    /// Divides a model over `world_size` ranks.
    ///
    /// # Errors
    /// When the size does not divide the heads or exceeds what can be cut; lists the sizes that fit.
    pub fn new(geometry: &Geometry, world_size: usize, parallelism: Parallelism) -> Result<Self, LayoutError> {
        match misfit(geometry, world_size, parallelism) {
            None => Ok(Self { world_size, parallelism }),
            Some(reason) => {
                let fits = |&size: &usize| misfit(geometry, size, parallelism).is_none();
                let fitting = (1..=MAX_WORLD_SIZE).filter(fits).collect();
                Err(LayoutError::WorldSize { world_size, reason, fitting })
            }
        }
    }

    /// The whole model on one rank, which always fits.
    pub fn single() -> Self {
        Self { world_size: 1, parallelism: Parallelism::Tensor }
    }

    /// Number of ranks.
    pub fn world_size(&self) -> usize {
        self.world_size
    }

    /// How the experts are divided.
    pub fn parallelism(&self) -> Parallelism {
        self.parallelism
    }

    /// What `rank` holds. A rank outside the group holds what its number modulo the world size would.
    pub fn rank(&self, geometry: &Geometry, rank: Rank) -> RankLayout {
        let (world, index) = (self.world_size, rank.index() % self.world_size);
        let q = geometry.num_attention_heads / world;
        let kv_heads = if world <= geometry.num_key_value_heads {
            even_part(geometry.num_key_value_heads, world, index)
        } else {
            let head = index * geometry.num_key_value_heads / world;
            head..head + 1
        };
        let experts = (0..geometry.num_hidden_layers()).map(|layer| self.expert_range(geometry, layer, index));
        RankLayout {
            rank,
            world_size: world,
            parallelism: self.parallelism,
            q_heads: index * q..(index + 1) * q,
            kv_heads,
            vocab_rows: even_part(geometry.vocab_size, world, index),
            experts: experts.collect(),
        }
    }

    /// Pieces of uneven length move on by one rank from layer to layer, so that memory comes out even.
    fn expert_range(&self, geometry: &Geometry, layer: usize, index: usize) -> ExpertRange {
        let part = (index + layer) % self.world_size;
        match self.parallelism {
            Parallelism::Tensor => {
                let blocks = even_part(geometry.intermediate_blocks(), self.world_size, part);
                ExpertRange {
                    experts: 0..geometry.num_local_experts,
                    intermediate: blocks.start * MXFP4_BLOCK..blocks.end * MXFP4_BLOCK,
                }
            }
            Parallelism::Expert => ExpertRange {
                experts: even_part(geometry.num_local_experts, self.world_size, part),
                intermediate: 0..geometry.intermediate_size,
            },
        }
    }
}

/// Why a world size does not fit, or nothing.
fn misfit(geometry: &Geometry, world: usize, parallelism: Parallelism) -> Option<String> {
    let (q, kv) = (geometry.num_attention_heads, geometry.num_key_value_heads);
    if world == 0 || world > MAX_WORLD_SIZE {
        return Some(format!("a group has 1 to {MAX_WORLD_SIZE} ranks"));
    }
    if !q.is_multiple_of(world) {
        return Some(format!("{q} query heads do not divide by {world}"));
    }
    if !kv.is_multiple_of(world) && !world.is_multiple_of(kv) {
        return Some(format!("{kv} key-value heads neither divide by {world} nor divide it"));
    }
    if geometry.vocab_size < world {
        return Some(format!("there are only {} rows of the vocabulary", geometry.vocab_size));
    }
    let (what, pieces) = match parallelism {
        Parallelism::Tensor => ("MXFP4 blocks of the intermediate axis", geometry.intermediate_blocks()),
        Parallelism::Expert => ("experts", geometry.num_local_experts),
    };
    (pieces < world).then(|| format!("there are only {pieces} {what}"))
}

impl RankLayout {
    /// Whether this rank adds the biases that follow a product whose partial sums are added up over the group.
    pub fn adds_shared_bias(&self) -> bool {
        self.rank.index() == 0
    }

    /// Every tensor of the checkpoint with the part that this rank holds, in the order in which the model uses them.
    pub fn tensors(&self, geometry: &Geometry) -> Vec<TensorSlice> {
        let (vocab, hidden) = (geometry.vocab_size, geometry.hidden_size);
        let mut out = vec![dense("model.embed_tokens.weight".into(), &[vocab, hidden], vec![0..vocab, 0..hidden])];
        for layer in 0..geometry.num_hidden_layers() {
            self.attention_tensors(geometry, layer, &mut out);
            self.expert_tensors(geometry, layer, &mut out);
        }
        out.push(dense("model.norm.weight".into(), &[hidden], vec![0..hidden]));
        out.push(dense("lm_head.weight".into(), &[vocab, hidden], vec![self.vocab_rows.clone(), 0..hidden]));
        out
    }

    fn attention_tensors(&self, geometry: &Geometry, layer: usize, out: &mut Vec<TensorSlice>) {
        let (hidden, dim) = (geometry.hidden_size, geometry.head_dim);
        let rows = |heads: &Range<usize>| heads.start * dim..heads.end * dim;
        let (q_all, kv_all) = (geometry.num_attention_heads * dim, geometry.num_key_value_heads * dim);
        let (q, kv) = (rows(&self.q_heads), rows(&self.kv_heads));
        let name = |tail: &str| format!("model.layers.{layer}.{tail}");
        out.push(dense(name("input_layernorm.weight"), &[hidden], vec![0..hidden]));
        for (part, all, held) in [("q", q_all, &q), ("k", kv_all, &kv), ("v", kv_all, &kv)] {
            let weight = name(&format!("self_attn.{part}_proj.weight"));
            out.push(dense(weight, &[all, hidden], vec![held.clone(), 0..hidden]));
            out.push(dense(name(&format!("self_attn.{part}_proj.bias")), &[all], vec![held.clone()]));
        }
        let heads = geometry.num_attention_heads;
        out.push(dense(name("self_attn.sinks"), &[heads], vec![self.q_heads.clone()]));
        out.push(dense(name("self_attn.o_proj.weight"), &[hidden, q_all], vec![0..hidden, q]));
        out.push(dense(name("self_attn.o_proj.bias"), &[hidden], vec![self.shared_bias(hidden)]));
    }

    fn expert_tensors(&self, geometry: &Geometry, layer: usize, out: &mut Vec<TensorSlice>) {
        let (hidden, inter, all) = (geometry.hidden_size, geometry.intermediate_size, geometry.num_local_experts);
        let held = &self.experts[layer];
        let experts = held.experts.clone();
        // Gate and up rows are interleaved, so a value of the intermediate axis is a pair of rows.
        let pairs = 2 * held.intermediate.start..2 * held.intermediate.end;
        let blocks = held.intermediate.start / MXFP4_BLOCK..held.intermediate.end / MXFP4_BLOCK;
        let (hidden_blocks, inter_blocks, half) = (hidden / MXFP4_BLOCK, inter / MXFP4_BLOCK, MXFP4_BLOCK / 2);
        let name = |tail: &str| format!("model.layers.{layer}.{tail}");
        let expert = |tail: &str| name(&format!("mlp.experts.{tail}"));
        out.push(dense(name("post_attention_layernorm.weight"), &[hidden], vec![0..hidden]));
        out.push(dense(name("mlp.router.weight"), &[all, hidden], vec![0..all, 0..hidden]));
        out.push(dense(name("mlp.router.bias"), &[all], vec![0..all]));
        out.push(bytes(
            expert("gate_up_proj_blocks"),
            &[all, 2 * inter, hidden_blocks, half],
            vec![experts.clone(), pairs.clone(), 0..hidden_blocks, 0..half],
        ));
        out.push(bytes(
            expert("gate_up_proj_scales"),
            &[all, 2 * inter, hidden_blocks],
            vec![experts.clone(), pairs.clone(), 0..hidden_blocks],
        ));
        out.push(dense(expert("gate_up_proj_bias"), &[all, 2 * inter], vec![experts.clone(), pairs]));
        out.push(bytes(
            expert("down_proj_blocks"),
            &[all, hidden, inter_blocks, half],
            vec![experts.clone(), 0..hidden, blocks.clone(), 0..half],
        ));
        out.push(bytes(
            expert("down_proj_scales"),
            &[all, hidden, inter_blocks],
            vec![experts.clone(), 0..hidden, blocks],
        ));
        // Whole experts keep their own bias; of divided ones the first rank adds it for all.
        let bias_columns = match self.parallelism {
            Parallelism::Tensor => self.shared_bias(hidden),
            Parallelism::Expert => 0..hidden,
        };
        out.push(dense(expert("down_proj_bias"), &[all, hidden], vec![experts, bias_columns]));
    }

    fn shared_bias(&self, len: usize) -> Range<usize> {
        if self.adds_shared_bias() { 0..len } else { 0..0 }
    }

    /// Bytes of keys and values that this rank keeps for one token of all layers of one kind, at `element_bytes` a value.
    pub fn kv_bytes_per_token(&self, geometry: &Geometry, kind: LayerKind, element_bytes: usize) -> usize {
        2 * self.kv_heads.len() * geometry.head_dim * geometry.layers_of(kind) * element_bytes
    }
}

fn dense(name: String, shape: &[usize], ranges: Vec<Range<usize>>) -> TensorSlice {
    TensorSlice { name, shape: shape.to_vec(), ranges, kind: TensorKind::Dense }
}

fn bytes(name: String, shape: &[usize], ranges: Vec<Range<usize>>) -> TensorSlice {
    TensorSlice { name, shape: shape.to_vec(), ranges, kind: TensorKind::Bytes }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_cover_everything_once_and_differ_by_at_most_one() {
        for (len, parts) in [(90, 4), (90, 8), (3, 2), (1003, 7), (5, 5)] {
            let cut: Vec<_> = (0..parts).map(|i| even_part(len, parts, i)).collect();
            assert_eq!((cut[0].start, cut[parts - 1].end), (0, len));
            assert!(cut.windows(2).all(|pair| pair[0].end == pair[1].start));
            let lengths = cut.iter().map(ExactSizeIterator::len);
            assert!(lengths.clone().max().unwrap() - lengths.min().unwrap() <= 1);
        }
        let lengths: Vec<_> = (0..4).map(|i| even_part(90, 4, i).len()).collect();
        assert_eq!(lengths, [23, 22, 23, 22]);
    }
}
