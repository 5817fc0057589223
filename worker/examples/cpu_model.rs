//! Measures the whole model on the CPU backend, one rank without collectives:
//! `cargo run --release -p phalanx-worker --example cpu_model -- CHECKPOINT [threads]`.
//!
//! Prints prefill of 512 tokens, decode of 1, 4 and 16 sequences, and the share of the memory bandwidth that decode uses.

use std::time::{Duration, Instant};

use anyhow::Context as _;
use phalanx_proto::{
    checkpoint::Checkpoint,
    ids::{BlockId, Rank, TokenId},
    layout::{Layout, Parallelism},
};
use phalanx_worker::{
    backend::{
        Arithmetic, Backend as _, Batch, BatchSequence,
        cpu::{CpuBackend, measure_read_bandwidth},
    },
    collective::Alone,
    model::Model,
};

const BLOCK_SIZE: usize = 32;
const PROMPT: usize = 512;
const STREAMS: usize = 16;
const STEPS: usize = 24;
/// Tokens of a sequence at most.
const LENGTH: usize = PROMPT + 4 * STEPS;

fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let path = arguments.next().context("expected the directory of a checkpoint")?;
    let threads: usize = arguments.next().map_or(Ok(2), |text| text.parse())?;
    let checkpoint = Checkpoint::open(path.as_ref())?;
    let layout = Layout::new(&checkpoint.geometry, 1, Parallelism::Tensor)?;
    let backend = CpuBackend::new(Arithmetic::new(checkpoint.geometry.clone()), threads)?;
    let start = Instant::now();
    let mut model = Model::load(&checkpoint, layout.rank(&checkpoint.geometry, Rank(0)), backend, &|_| {})?;
    let loaded = start.elapsed();
    let bytes = model.weight_bytes() as f64;
    println!("{}: {:.2} GB at {:.2} GB/s", model.backend().device(), bytes / 1e9, bytes / loaded.as_secs_f64() / 1e9);
    let blocks = STREAMS * LENGTH.div_ceil(BLOCK_SIZE);
    let spec = model.kv_cache_spec(BLOCK_SIZE, blocks, blocks);
    model.allocate_kv_cache(&spec)?;

    let mut prefill = Duration::MAX;
    for _ in 0..3 {
        prefill = prefill.min(forward(&mut model, 0..1, 0..PROMPT)?);
    }
    let prefill = PROMPT as f64 / prefill.as_secs_f64();
    println!("prefill {PROMPT}: {prefill:.0} tokens/s");
    for sequence in 1..STREAMS {
        forward(&mut model, sequence..sequence + 1, 0..PROMPT)?;
    }
    let mut alone = 0.0;
    for streams in [1, 4, STREAMS] {
        let before = model.backend().weight_bytes_read();
        let mut best = Duration::MAX;
        for step in 0..STEPS {
            best = best.min(forward(&mut model, 0..streams, PROMPT + step..PROMPT + step + 1)?);
        }
        let read = (model.backend().weight_bytes_read() - before) as f64 / STEPS as f64 / best.as_secs_f64();
        let bandwidth = measure_read_bandwidth(threads)?;
        let rate = streams as f64 / best.as_secs_f64();
        if streams == 1 {
            alone = rate;
            println!("prefill is {:.1} times decode", prefill / rate);
        }
        println!(
            "decode of {streams:2}: {rate:6.1} tokens/s, {:.1} times one; weights at {:.1} GB/s, {:.0} % of {:.1}",
            rate / alone,
            read / 1e9,
            read / bandwidth * 100.0,
            bandwidth / 1e9
        );
    }
    Ok(())
}

/// Runs these positions of these sequences in one step; how long it took.
fn forward(
    model: &mut Model<CpuBackend>,
    sequences: std::ops::Range<usize>,
    positions: std::ops::Range<usize>,
) -> anyhow::Result<Duration> {
    let mut batch = Batch::default();
    let mut last = Vec::new();
    let blocks = LENGTH.div_ceil(BLOCK_SIZE);
    for sequence in sequences {
        let first = batch.tokens.len();
        let vocab = model.geometry().vocab_size;
        batch.tokens.extend(positions.clone().map(|at| TokenId(((sequence * 7919 + at * 104_729) % vocab) as u32)));
        batch.positions.extend(positions.clone().map(|position| position as u32));
        let table: Vec<_> = (sequence * blocks..(sequence + 1) * blocks).map(|block| BlockId(block as u32)).collect();
        batch.sequences.push(BatchSequence {
            rows: first..batch.tokens.len(),
            first_position: positions.start,
            full_table: table.clone(),
            sliding_table: table,
        });
        last.push(batch.tokens.len() - 1);
    }
    let start = Instant::now();
    model.forward(&batch, &last, &mut Alone)?;
    Ok(start.elapsed())
}
