//! The workers without gateway or gRPC: every rank a thread of this process with its own backend threads, driven by the
//! coordinator's engine, summing through the same shared memory as separate processes do.

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow};
use phalanx_coordinator::engine::{Engine, EngineConfig, Event, Request, Tenant};
use phalanx_proto::{
    checkpoint::Checkpoint,
    geometry::{Geometry, LayerKind},
    ids::{Epoch, Rank, TokenId},
    layout::Layout,
    plan::Plan,
    sampling::SamplingSettings,
    v1,
};
use phalanx_worker::{
    backend::{Arithmetic, Backend, cpu, cuda, reference::ReferenceBackend},
    collective::{Alone, Collective, host},
    executor::{Executor, Formation},
    model::Model,
};
use serde::Serialize;
use serde_json::json;

use super::serving::mix;
use crate::{
    cli::{self, BenchArgs},
    models,
    serve::parallelism,
};

const BLOCK_SIZE: usize = 16;
/// Tokens of one step, as `phalanx serve` has it by default.
const MAX_BATCH_TOKENS: usize = 512;
/// Longest time that ranks wait for each other while they form.
const FORM_TIMEOUT: Duration = Duration::from_secs(30);
const GB: f64 = 1e9;

/// What one batch size gave.
#[derive(Debug, Serialize)]
struct Level {
    concurrency: usize,
    prefill_tokens_per_second: f64,
    decode_tokens_per_second: f64,
    decode_step_ms: f64,
    /// Weights that all ranks together streamed in the decode phase, in GB/s.
    decode_weight_gb_per_second: f64,
    /// The same as a share of the memory bandwidth measured in this run.
    bandwidth_share: f64,
    /// Share of the decode phase that is not the model's execution on rank 0.
    overhead_share: f64,
    /// Share spent in all-reduces, within execution.
    collective_share: f64,
}

/// Measures each batch size and prints a table, or JSON.
pub(super) async fn run(args: BenchArgs) -> Result<()> {
    // Everything here blocks and computes.
    tokio::task::spawn_blocking(move || measure(&args)).await?
}

fn measure(args: &BenchArgs) -> Result<()> {
    let directory = models::resolve(args.model.name(), args.model.model_dir.as_deref())?;
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let world = args.tensor_parallel_size;
    let threads = args.threads.unwrap_or((cores / world.max(1)).max(1));
    let bandwidth = cpu::measure_read_bandwidth(threads * world)?;
    let levels = match args.backend {
        cli::Backend::Cpu => {
            let make = move |arithmetic| cpu::CpuBackend::new(arithmetic, threads);
            Bench::start(args, &directory, make, cpu::CpuBackend::weight_bytes_read)?.levels(bandwidth)?
        }
        cli::Backend::Reference => {
            let make = |arithmetic| Ok(ReferenceBackend::new(arithmetic));
            Bench::start(args, &directory, make, |_| 0)?.levels(bandwidth)?
        }
        cli::Backend::Cuda => {
            crate::components::check_backend(args.backend)?;
            anyhow::ensure!(world == 1, "bench --engine --backend cuda measures one GPU, -tp is {world}");
            let make = |arithmetic| cuda::CudaBackend::new(arithmetic, cuda::open(0)?);
            Bench::start(args, &directory, make, |_| 0)?.levels(bandwidth)?
        }
    };
    let model = directory.display().to_string();
    if args.json {
        let report = json!({
            "model": model, "world_size": world, "threads": threads, "backend": args.backend.name(),
            "memory_bandwidth_gb_per_second": bandwidth / GB, "levels": levels,
        });
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print_table(&model, world, threads, bandwidth, &levels);
    }
    Ok(())
}

fn print_table(model: &str, world: usize, threads: usize, bandwidth: f64, levels: &[Level]) {
    println!("{model}: {world} rank(s) of {threads} thread(s), memory bandwidth {:.1} GB/s", bandwidth / GB);
    println!(
        "{:>7} {:>13} {:>12} {:>9} {:>13} {:>10} {:>9} {:>11}",
        "streams", "prefill tok/s", "decode tok/s", "step ms", "weights GB/s", "bandwidth", "overhead", "all-reduce"
    );
    for level in levels {
        println!(
            "{:>7} {:>13.1} {:>12.1} {:>9.2} {:>13.2} {:>9.0}% {:>8.1}% {:>10.1}%",
            level.concurrency,
            level.prefill_tokens_per_second,
            level.decode_tokens_per_second,
            level.decode_step_ms,
            level.decode_weight_gb_per_second,
            level.bandwidth_share * 100.0,
            level.overhead_share * 100.0,
            level.collective_share * 100.0,
        );
    }
}

/// One rank's thread.
struct RankThread {
    plans: mpsc::Sender<Arc<(Plan, u64)>>,
    results: mpsc::Receiver<Result<v1::StepResult>>,
}

/// A formed group and the engine that drives it.
struct Bench<'a> {
    args: &'a BenchArgs,
    engine: Engine,
    ranks: Vec<RankThread>,
    weight_bytes: Arc<AtomicU64>,
    vocab_size: usize,
    start: Instant,
}

/// What a phase of one level took and did.
#[derive(Default)]
struct Phase {
    seconds: f64,
    tokens: usize,
    steps: usize,
    weight_bytes: u64,
    execute_us: u64,
    collective_us: u64,
}

impl<'a> Bench<'a> {
    fn start<B: Backend + 'static>(
        args: &'a BenchArgs,
        directory: &Path,
        make: impl Fn(Arithmetic) -> Result<B, phalanx_worker::backend::BackendError> + Copy + Send + 'static,
        bytes_read: fn(&B) -> u64,
    ) -> Result<Self> {
        let checkpoint = Checkpoint::open(directory)?;
        let layout = Layout::new(&checkpoint.geometry, args.tensor_parallel_size, parallelism(false))?;
        let config = engine_config(&checkpoint.geometry, args)?;
        let formation = formation(&config, checkpoint.geometry.vocab_size);
        let weight_bytes = Arc::new(AtomicU64::new(0));
        let collectives = collectives(args.tensor_parallel_size)?;
        let mut ranks = Vec::new();
        for (rank, collective) in collectives.into_iter().enumerate() {
            let held = layout.rank(&checkpoint.geometry, Rank(rank as u32));
            let (checkpoint, formation, total) = (checkpoint.clone(), formation.clone(), weight_bytes.clone());
            let (plans, orders) = mpsc::channel();
            let (answers, results) = mpsc::channel();
            thread::Builder::new().name(format!("rank {rank}")).spawn(move || {
                let loaded = make(Arithmetic::new(checkpoint.geometry.clone()))
                    .map_err(anyhow::Error::from)
                    .and_then(|backend| Ok(Model::load(&checkpoint, held, backend, &|_| ())?));
                match loaded {
                    Ok(model) => serve(model, collective, &formation, (orders, answers), (bytes_read, total)),
                    // The receiver outlives this thread unless the bench has already ended.
                    Err(error) => drop(answers.send(Err(error))),
                }
            })?;
            ranks.push(RankThread { plans, results });
        }
        let mut engine = Engine::new(config)?;
        engine.begin_epoch(formation.epoch, formation.full_blocks, formation.sliding_blocks);
        let vocab_size = checkpoint.geometry.vocab_size;
        Ok(Self { args, engine, ranks, weight_bytes, vocab_size, start: Instant::now() })
    }

    fn levels(mut self, bandwidth: f64) -> Result<Vec<Level>> {
        // Once through everything, so that no page is touched for the first time while the clock runs.
        self.level(1, 0)?;
        let sizes = self.args.concurrency.clone();
        sizes
            .iter()
            .enumerate()
            .map(|(index, &streams)| {
                let (prefill, decode) = self.level(streams.max(1), index as u64 + 1)?;
                anyhow::ensure!(
                    decode.steps > 0,
                    "the first of {streams} streams ends before the last one begins: --generate is {}, try {}",
                    self.args.output_len,
                    4 * (streams * self.args.input_len).div_ceil(MAX_BATCH_TOKENS) + 64
                );
                let execute = decode.execute_us as f64 / 1e6;
                let weights = decode.weight_bytes as f64 / decode.seconds;
                Ok(Level {
                    concurrency: streams,
                    prefill_tokens_per_second: (streams * self.args.input_len) as f64 / prefill.seconds,
                    decode_tokens_per_second: decode.tokens as f64 / decode.seconds,
                    decode_step_ms: decode.seconds * 1e3 / decode.steps.max(1) as f64,
                    decode_weight_gb_per_second: weights / GB,
                    bandwidth_share: weights / bandwidth,
                    overhead_share: (1.0 - execute / decode.seconds).max(0.0),
                    collective_share: decode.collective_us as f64 / 1e6 / decode.seconds,
                })
            })
            .collect()
    }

    /// Runs `streams` requests to their end. The phases: until each has its first token, and while all of them decode; the
    /// steps after the first has ended, with ever fewer streams, count for neither.
    fn level(&mut self, streams: usize, salt: u64) -> Result<(Phase, Phase)> {
        for stream in 0..streams as u64 {
            let request = self.request(salt << 32 | stream)?;
            self.engine.submit(request, self.start.elapsed())?;
        }
        let [mut prefill, mut decode, mut rest] = [(); 3].map(|()| Phase::default());
        let (mut begun, mut finished) = (std::collections::HashSet::new(), 0);
        let mut mark = Instant::now();
        while finished < streams {
            let phase = if begun.len() < streams {
                &mut prefill
            } else if finished == 0 {
                &mut decode
            } else {
                &mut rest
            };
            for event in self.step(phase)? {
                match event {
                    Event::Tokens { sequence, tokens, .. } => {
                        begun.insert(sequence);
                        phase.tokens += tokens.len();
                    }
                    Event::Finished { .. } => finished += 1,
                    Event::Failed { fault, .. } => return Err(fault.into()),
                    Event::Admitted { .. } => {}
                }
            }
            phase.seconds += mark.elapsed().as_secs_f64();
            mark = Instant::now();
        }
        // Plans that were sent ahead for sequences that have ended.
        while self.engine.plans_in_flight() > 0 {
            self.step(&mut Phase::default())?;
        }
        Ok((prefill, decode))
    }

    /// Fills the window, then takes the oldest step's results from every rank.
    fn step(&mut self, phase: &mut Phase) -> Result<Vec<Event>> {
        while let Some(plan) = self.engine.next_plan(self.start.elapsed()) {
            let digest = plan.digest();
            let plan = Arc::new((plan, digest));
            for rank in &self.ranks {
                // A rank that is gone has left its reason in `results`.
                let _ = rank.plans.send(plan.clone());
            }
        }
        let mut first = None;
        for (rank, thread) in self.ranks.iter().enumerate() {
            let result = thread.results.recv().map_err(|_| anyhow!("rank {rank} ended"))?;
            let result = result.with_context(|| format!("rank {rank}"))?;
            first.get_or_insert(result);
        }
        let result = first.context("a group has at least one rank")?;
        let timing = result.timing.unwrap_or_default();
        phase.steps += 1;
        phase.execute_us += timing.execute_us;
        phase.collective_us += timing.collective_us;
        phase.weight_bytes += self.weight_bytes.swap(0, Ordering::Relaxed);
        let now = self.start.elapsed();
        Ok(self.engine.apply(phalanx_proto::ids::Step(result.step), &result.sampled, &result.prompt_logprobs, now)?)
    }

    fn request(&self, index: u64) -> Result<Request> {
        let token = |position: u64| mix(self.args.seed ^ index.rotate_left(20) ^ position.rotate_left(44));
        let prompt = (0..self.args.input_len as u64).map(|at| TokenId((token(at) % self.vocab_size as u64) as u32));
        let sampling = v1::Sampling { temperature: Some(0.0), ignore_eos: true, ..Default::default() };
        Ok(Request {
            request_id: format!("bench-{index}"),
            prompt: prompt.collect(),
            resume: Vec::new(),
            max_tokens: Some(self.args.output_len.max(2)),
            stop_tokens: Vec::new(),
            sampling: SamplingSettings::check(&sampling, self.vocab_size, 0)?,
            tenant: Tenant::default(),
            priority: 0,
            cache_salt: String::new(),
            traceparent: String::new(),
        })
    }
}

/// Where a rank's plans come from and its results go.
type Line = (mpsc::Receiver<Arc<(Plan, u64)>>, mpsc::Sender<Result<v1::StepResult>>);

fn serve<B: Backend>(
    mut model: Model<B>,
    collective: Box<dyn Collective>,
    formation: &Formation,
    (plans, results): Line,
    (bytes_read, total): (fn(&B) -> u64, Arc<AtomicU64>),
) {
    let abort = collective.abort_handle();
    let mut executor = match Executor::new(&mut model, collective, formation) {
        Ok(executor) => executor,
        Err(fault) => return drop(results.send(Err(fault.into()))),
    };
    let mut seen = 0;
    while let Ok(plan) = plans.recv() {
        let result = executor.execute(&plan.0, plan.1);
        let read = bytes_read(executor.model().backend());
        total.fetch_add(read - seen, Ordering::Relaxed);
        seen = read;
        let failed = result.is_err();
        if results.send(result.map_err(Into::into)).is_err() || failed {
            break;
        }
    }
    // Peers that are waiting for this rank must not wait for ever.
    abort.abort();
}

fn engine_config(geometry: &Geometry, args: &BenchArgs) -> Result<EngineConfig> {
    let most = args.concurrency.iter().copied().max().unwrap_or(1).max(1);
    let length = args.input_len + args.output_len.max(2);
    anyhow::ensure!(args.input_len > 0, "--prompt is 0, expected at least one token");
    anyhow::ensure!(
        length <= geometry.max_position_embeddings,
        "--prompt and --generate make {length} tokens, the model's context has {}",
        geometry.max_position_embeddings
    );
    Ok(EngineConfig {
        block_size: BLOCK_SIZE,
        sliding_window: geometry.sliding_window,
        has_full_layers: geometry.layers_of(LayerKind::FullAttention) > 0,
        has_sliding_layers: geometry.layers_of(LayerKind::SlidingAttention) > 0,
        max_model_len: length,
        max_num_batched_tokens: MAX_BATCH_TOKENS.max(most),
        max_num_seqs: most,
        max_num_queued_reqs: most,
        max_queued_tokens: usize::MAX,
        max_queue_age: Duration::MAX,
        // There is room for every sequence at its full length.
        output_horizon: 0,
        window: 2,
        // Every prompt is computed: nothing is measured that was only looked up.
        enable_prefix_caching: false,
    })
}

/// Room for every sequence at its full length in both pools.
fn formation(config: &EngineConfig, vocab_size: usize) -> Formation {
    let blocks = config.max_num_seqs * (config.max_model_len.div_ceil(BLOCK_SIZE) + 2);
    Formation {
        epoch: Epoch(1),
        block_size: BLOCK_SIZE,
        full_blocks: blocks,
        sliding_blocks: blocks,
        max_batch_tokens: config.max_num_batched_tokens,
        max_batch_sequences: config.max_num_seqs,
        sampled_vocab: vocab_size,
    }
}

/// One end a rank.
fn collectives(world: usize) -> Result<Vec<Box<dyn Collective>>> {
    if world == 1 {
        return Ok(vec![Box::new(Alone)]);
    }
    let host = host::host_identity()?;
    let local = std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);
    let prepared = (0..world).map(|rank| host::Preparation::new(1, rank as u64 + 1, &host, local));
    let prepared = prepared.collect::<Result<Vec<_>, _>>()?;
    let rendezvous: Vec<_> = prepared.iter().map(host::Preparation::rendezvous).collect();
    thread::scope(|scope| {
        let forming: Vec<_> = prepared
            .into_iter()
            .enumerate()
            .map(|(rank, one)| (one, rank, &rendezvous))
            .map(|(one, rank, all)| scope.spawn(move || one.form(rank, all, FORM_TIMEOUT)))
            .collect();
        let formed = forming.into_iter().map(|thread| {
            let collective = thread.join().map_err(|_| anyhow!("a rank's thread ended while the group formed"))??;
            Ok(Box::new(collective) as Box<dyn Collective>)
        });
        formed.collect()
    })
}
