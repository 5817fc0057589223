//! A layout plan as a table for people.

use std::fmt;

use super::{Fit, LayoutPlan, RankPlan};

/// Bytes with a binary unit and three significant figures or more.
fn size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} B") } else { format!("{value:.2} {}", UNITS[unit]) }
}

fn range([start, end]: [usize; 2]) -> String {
    format!("{start}..{end}")
}

/// What all layers hold at least and at most.
fn lengths(ranges: impl Iterator<Item = [usize; 2]>) -> String {
    let (mut least, mut most) = (usize::MAX, 0);
    for [start, end] in ranges {
        least = least.min(end - start);
        most = most.max(end - start);
    }
    if least >= most { most.to_string() } else { format!("{least}-{most}") }
}

impl fmt::Display for LayoutPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let billions = self.parameters as f64 / 1e9;
        let (ranks, how) = (self.world_size, &self.parallelism);
        writeln!(f, "{}: {billions:.1} B weights over {ranks} ranks ({how})", self.model)?;
        writeln!(
            f,
            "{:>4}  {:>12}  {:>12}  {:>12}  {:>12}  {:>8}  {:>8}  {:>14}  {:>8}  {:>10}",
            "rank",
            "weights",
            "experts",
            "attention",
            "other",
            "q heads",
            "kv heads",
            "vocab rows",
            "experts",
            "x inner"
        )?;
        for rank in &self.ranks {
            write_rank(f, rank)?;
        }
        let total: u64 = self.ranks.iter().map(|rank| rank.weight_bytes).sum();
        writeln!(
            f,
            "all ranks {} = checkpoint {} + replicas {}{}",
            size(total),
            size(self.checkpoint_bytes),
            size(self.replicated_bytes),
            if self.unused_bytes > 0 { format!(" - unused {}", size(self.unused_bytes)) } else { String::new() }
        )?;
        writeln!(f, "largest rank {:.2} % above the mean", (self.largest_over_mean - 1.0) * 100.0)?;
        let (token, sequence) = (self.kv_bytes_per_token, self.kv_bytes_per_sequence_sliding);
        writeln!(f, "KV cache, all ranks: {} a token, and {} a sequence", size(token), size(sequence))?;
        self.fits.as_ref().map_or(Ok(()), |fit| write_fit(f, fit))
    }
}

fn write_rank(f: &mut fmt::Formatter<'_>, rank: &RankPlan) -> fmt::Result {
    writeln!(
        f,
        "{:>4}  {:>12}  {:>12}  {:>12}  {:>12}  {:>8}  {:>8}  {:>14}  {:>8}  {:>10}",
        rank.rank,
        size(rank.weight_bytes),
        size(rank.expert_bytes),
        size(rank.attention_bytes),
        size(rank.other_bytes),
        range(rank.q_heads),
        range(rank.kv_heads),
        range(rank.vocab_rows),
        lengths(rank.layers.iter().map(|layer| layer.experts)),
        lengths(rank.layers.iter().map(|layer| layer.intermediate)),
    )
}

fn write_fit(f: &mut fmt::Formatter<'_>, fit: &Fit) -> fmt::Result {
    writeln!(
        f,
        "{} a rank leave {} for the KV cache: {} tokens ({} full and {} sliding blocks of {} tokens, {})",
        size(fit.memory_bytes),
        size(fit.free_bytes),
        fit.tokens,
        fit.full_blocks,
        fit.sliding_blocks,
        fit.block_size,
        size(fit.kv_bytes),
    )?;
    writeln!(f, "sequences of the greatest length at once: {}", fit.longest_sequences)
}
