//! Measures the CPU backend's kernels: `cargo run --release -p phalanx-worker --example cpu_kernels -- [threads [isa]]`.
//!
//! Prints bytes of weights per second, its share of the memory bandwidth, and operations per second, by number of tokens.

use std::time::{Duration, Instant};

use half::bf16;
use phalanx_proto::{
    geometry::{Geometry, LayerKind},
    ids::{BlockId, TokenId},
};
use phalanx_worker::backend::{
    Arithmetic, AttentionSite, Backend, Batch, BatchSequence, DenseData, DenseMatrix, ExpertsData, KvCacheSpec, Qkv,
    cpu::{CpuBackend, Isa, measure_read_bandwidth},
};

const EXPERTS: usize = 32;
const EXPERTS_PER_TOKEN: usize = 4;
const HEAD_DIM: usize = 64;

fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let threads: usize = arguments.next().map_or(Ok(2), |text| text.parse())?;
    let isa = match arguments.next().as_deref() {
        Some("avx2") => Isa::Avx2,
        Some("portable") => Isa::Portable,
        _ => Isa::available().into_iter().next().unwrap_or(Isa::Portable),
    };
    let mut backend = CpuBackend::with_isa(arithmetic(), threads, isa)?;
    let bandwidth = measure_read_bandwidth(threads)?;
    println!("{}; reads {:.1} GB/s", backend.device(), bandwidth / 1e9);
    for (name, rows, columns) in [("960 x 960", 960, 960), ("vocab x 960", 32768, 960), ("4096 x 2880", 4096, 2880)] {
        measure_linear(&mut backend, name, (rows, columns), bandwidth)?;
    }
    for width in [960, 2880] {
        measure_experts(&mut backend, width, bandwidth)?;
    }
    measure_attention(&mut backend, bandwidth)
}

fn arithmetic() -> Arithmetic {
    Arithmetic {
        geometry: Geometry {
            hidden_size: 960,
            intermediate_size: 960,
            num_attention_heads: 64,
            num_key_value_heads: 8,
            head_dim: HEAD_DIM,
            num_local_experts: EXPERTS,
            num_experts_per_tok: EXPERTS_PER_TOKEN,
            vocab_size: 32768,
            sliding_window: 128,
            max_position_embeddings: 131_072,
            layer_types: vec![LayerKind::FullAttention],
            rms_norm_eps: 1e-5,
            rope_theta: 150_000.0,
            rope_scaling: None,
            swiglu_limit: 7.0,
            eos_token_ids: Vec::new(),
        },
        inverse_frequencies: (0..HEAD_DIM / 2).map(|i| 150_000f64.powf(-2.0 * i as f64 / HEAD_DIM as f64)).collect(),
        rotary_scale: 1.0,
    }
}

/// Cheap noise in [-1, 1).
fn noise(len: usize) -> impl Iterator<Item = f32> {
    let mut state = 1u32;
    (0..len).map(move |_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    })
}

/// The best time of a call, called for a fifth of a second: whatever else the machine does only ever slows.
fn time<T>(mut call: impl FnMut() -> T) -> Duration {
    let begin = Instant::now();
    let mut times = Vec::new();
    while begin.elapsed() < Duration::from_millis(200) || times.len() < 3 {
        let start = Instant::now();
        std::hint::black_box(call());
        times.push(start.elapsed());
    }
    times.into_iter().min().unwrap_or_default()
}

fn report(what: &str, tokens: usize, took: Duration, (bytes, operations, bandwidth): (u64, f64, f64)) {
    let seconds = took.as_secs_f64();
    let rate = bytes as f64 / seconds;
    println!(
        "{what:>24} {tokens:4} tokens {:9.1} us {:6.1} GB/s {:4.0} % {:7.1} GFLOP/s",
        seconds * 1e6,
        rate / 1e9,
        rate / bandwidth * 100.0,
        operations / seconds / 1e9
    );
}

fn measure_linear(
    backend: &mut CpuBackend,
    name: &str,
    (rows, columns): (usize, usize),
    bandwidth: f64,
) -> anyhow::Result<()> {
    // So many copies that no cache holds them all, as in a model of many layers.
    let copies = (256 << 20) / (rows * columns * 2) + 1;
    let data = DenseData::Bf16(noise(rows * columns).map(bf16::from_f32).collect());
    let matrix = DenseMatrix { rows, columns, data };
    let linears: Vec<_> = (0..copies).map(|_| backend.load_linear(matrix.clone(), None)).collect::<Result<_, _>>()?;
    for tokens in [1, 2, 4, 6, 7, 16, 64, 512] {
        let x = backend.from_host(noise(tokens * columns).collect(), columns)?;
        let before = backend.weight_bytes_read();
        backend.linear(&x, &linears[0])?;
        let bytes = backend.weight_bytes_read() - before;
        let mut next = 0;
        let took = time(|| {
            next = (next + 1) % copies;
            backend.linear(&x, &linears[next]).map(|_| ())
        });
        report(&format!("bf16 {name}"), tokens, took, (bytes, 2.0 * (rows * columns * tokens) as f64, bandwidth));
    }
    Ok(())
}

fn measure_experts(backend: &mut CpuBackend, width: usize, bandwidth: f64) -> anyhow::Result<()> {
    let byte = |seed: usize| move |i: usize| (i.wrapping_mul(2_654_435_761).wrapping_add(seed) >> 7) as u8;
    let data = ExpertsData {
        experts: 0..EXPERTS,
        hidden: width,
        intermediate: width,
        gate_up_blocks: (0..EXPERTS * width * width).map(byte(1)).collect(),
        gate_up_scales: vec![120; EXPERTS * 2 * width * width / 32],
        gate_up_bias: vec![0.1; EXPERTS * 2 * width],
        down_blocks: (0..EXPERTS * width * width / 2).map(byte(2)).collect(),
        down_scales: vec![120; EXPERTS * width * width / 32],
        down_bias: vec![0.1; EXPERTS * width],
    };
    let start = Instant::now();
    let copies = if width < 1000 { 8 } else { 1 };
    let layers: Vec<_> = (0..copies).map(|_| backend.load_experts(data.clone())).collect::<Result<_, _>>()?;
    let loaded = copies * EXPERTS * width * width * 3 / 2;
    println!("{:>24} repacked at {:.2} GB/s", "experts", loaded as f64 / start.elapsed().as_secs_f64() / 1e9);
    let router = noise(EXPERTS * width).map(bf16::from_f32).collect();
    let router = DenseMatrix { rows: EXPERTS, columns: width, data: DenseData::Bf16(router) };
    let router = backend.load_linear(router, None)?;
    for tokens in [1, 2, 4, 8, 16, 64, 512] {
        let x = backend.from_host(noise(tokens * width).collect(), width)?;
        let routing = backend.route(&x, &router)?;
        let before = backend.weight_bytes_read();
        backend.experts(&x, &routing, &layers[0])?;
        let bytes = backend.weight_bytes_read() - before;
        let mut next = 0;
        let took = time(|| {
            next = (next + 1) % copies;
            backend.experts(&x, &routing, &layers[next]).map(|_| ())
        });
        let operations = 6.0 * (width * width * EXPERTS_PER_TOKEN * tokens) as f64;
        report(&format!("mxfp4 experts {width}"), tokens, took, (bytes, operations, bandwidth));
    }
    Ok(())
}

fn measure_attention(backend: &mut CpuBackend, bandwidth: f64) -> anyhow::Result<()> {
    let (heads, kv_heads, context) = (64, 8, 4096);
    backend.allocate_kv_cache(&KvCacheSpec {
        layers: vec![LayerKind::FullAttention],
        kv_heads,
        head_dim: HEAD_DIM,
        block_size: 32,
        full_blocks: context / 32,
        sliding_blocks: 0,
    })?;
    let table: Vec<_> = (0..context as u32 / 32).map(BlockId).collect();
    let sinks = vec![0.0; heads];
    for tokens in [512, 1] {
        let mut operations = 0.0;
        let mut at = 0;
        let mut took = Duration::ZERO;
        while at + tokens <= context && (tokens > 1 || at == 0) {
            let first = if tokens == 1 { context - 1 } else { at };
            let sequence = BatchSequence {
                rows: 0..tokens,
                first_position: first,
                full_table: table.clone(),
                sliding_table: Vec::new(),
            };
            let batch = Batch {
                tokens: vec![TokenId(0); tokens],
                positions: (first as u32..(first + tokens) as u32).collect(),
                sequences: vec![sequence],
            };
            let mut call = || -> anyhow::Result<()> {
                let qkv = Qkv {
                    q: backend.from_host(noise(tokens * heads * HEAD_DIM).collect(), heads * HEAD_DIM)?,
                    k: backend.from_host(noise(tokens * kv_heads * HEAD_DIM).collect(), kv_heads * HEAD_DIM)?,
                    v: backend.from_host(noise(tokens * kv_heads * HEAD_DIM).collect(), kv_heads * HEAD_DIM)?,
                };
                backend.attention(qkv, &AttentionSite { layer: 0, sinks: &sinks }, &batch)?;
                Ok(())
            };
            if tokens == 1 {
                took = time(call);
            } else {
                let start = Instant::now();
                call()?;
                took += start.elapsed();
            }
            operations += (0..tokens).map(|i| (first + i + 1) as f64).sum::<f64>() * (heads * HEAD_DIM * 4) as f64;
            at += tokens;
        }
        let bytes = if tokens == 1 { (context * kv_heads * HEAD_DIM * 8) as u64 } else { 0 };
        report(&format!("attention over {context}"), tokens, took, (bytes, operations, bandwidth));
    }
    Ok(())
}
