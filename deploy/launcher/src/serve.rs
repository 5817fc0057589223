//! `phalanx serve`: a whole cluster as child processes of this one.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener},
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use phalanx_proto::{
    checkpoint::Checkpoint,
    layout::{Layout, Parallelism},
    tls::Role,
};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::mpsc,
};
use tracing::{info, warn};

use crate::{
    EXIT_REFUSED,
    access::Terminal,
    cli::{LoadFormat, ServeArgs},
    components, models, progress,
    supervisor::{ChildEvent, ChildSpec, Supervised},
    telemetry,
};

/// Ranks when nothing is said: two, so that the default is a real cluster.
const DEFAULT_WORLD_SIZE: usize = 2;
/// Times that children may be started again before the cluster is ready for the first time; one that needs more is not
/// going to be. Later on there is no such limit: requests wait, and `/readyz` says why.
const MAX_EARLY_RESTARTS: usize = 5;
/// What children get beyond the grace of running requests, to end in order.
const STOP_MARGIN: Duration = Duration::from_secs(5);

/// Children in the order in which they are stopped: the door first, the tensors last.
struct Cluster {
    gateway: Supervised,
    coordinator: Supervised,
    workers: Vec<Supervised>,
}

impl Cluster {
    async fn stop(self, grace: Duration) {
        self.gateway.stop(grace + STOP_MARGIN).await;
        self.coordinator.stop(grace + STOP_MARGIN).await;
        let workers = self.workers.into_iter().map(|worker| worker.stop(STOP_MARGIN));
        futures::future::join_all(workers).await;
    }
}

/// Runs a cluster until a signal or until a child cannot work.
pub(crate) async fn run(args: ServeArgs) -> Result<ExitCode> {
    let _telemetry = telemetry::init(&args.telemetry, "serve")?;
    let setup = Setup::new(args)?;
    let mut signals = Signals::new()?;
    let (events, mut happened) = mpsc::channel(64);
    let http = bind(SocketAddr::new(setup.args.http.host, setup.args.http.port), "--port")?;
    let grpc = bind(SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), setup.args.grpc_port), "--grpc-port")?;
    let (http_address, grpc_address) = (http.local_addr()?, grpc.local_addr()?);
    let coordinator = setup.args.tls.address(&grpc_address.to_string())?;
    let identity = setup.args.tls.identity(Role::Client)?;
    let ready = progress::ReadySocket::bind(http_address.port())?;
    let cluster = Cluster {
        coordinator: Supervised::start(setup.coordinator(grpc), events.clone())?,
        workers: (0..setup.world_size)
            .map(|rank| Supervised::start(setup.worker(rank, &coordinator), events.clone()))
            .collect::<Result<_>>()?,
        gateway: Supervised::start(setup.gateway(http, &coordinator, &ready.address()), events)?,
    };
    let grace = Duration::from_secs(setup.args.http.shutdown_timeout);
    let outcome = tokio::select! {
        ready = progress::until_ready(&coordinator, identity.as_deref(), &ready) => ready.map(|()| None),
        gone = until_gone(&mut happened, MAX_EARLY_RESTARTS) => Ok(Some(gone)),
        () = signals.first() => { stop(cluster, grace, &mut signals).await; return Ok(ExitCode::SUCCESS) }
    };
    match outcome {
        Ok(None) => println!("{}", ready_line(&setup, http_address)),
        Ok(Some(gone)) => {
            cluster.stop(Duration::ZERO).await;
            eprintln!("phalanx: {gone}");
            return Ok(ExitCode::from(EXIT_REFUSED));
        }
        Err(error) => {
            cluster.stop(Duration::ZERO).await;
            return Err(error);
        }
    }
    let gone = loop {
        tokio::select! {
            gone = until_gone(&mut happened, usize::MAX) => break Some(gone),
            wish = signals.next() => match wish {
                Wish::Stop => break None,
                Wish::Reload => cluster.gateway.reload().await,
            },
        }
    };
    stop(cluster, grace, &mut signals).await;
    match gone {
        Some(gone) => bail!("{gone}"),
        None => Ok(ExitCode::SUCCESS),
    }
}

/// Stops in order; a second signal ends everything at once.
async fn stop(cluster: Cluster, grace: Duration, signals: &mut Signals) {
    tokio::select! {
        () = cluster.stop(grace) => {}
        // The children die with this process.
        () = signals.first() => warn!("second signal, ending at once"),
    }
}

/// Logs restarts; ends with the sentence on the first child that stays away, or that is one too many to start again.
async fn until_gone(events: &mut mpsc::Receiver<ChildEvent>, most_restarts: usize) -> String {
    let mut restarts = 0;
    while let Some(event) = events.recv().await {
        match event {
            ChildEvent::Restarted { name, status } => {
                warn!(child = name, %status, "started again");
                restarts += 1;
                if restarts > most_restarts {
                    return format!("{name} ended ({status}), and children had ended {most_restarts} times before");
                }
            }
            ChildEvent::Gone { name, status, last_words } => {
                let words = last_words.strip_prefix("phalanx: ").unwrap_or(&last_words);
                return format!("{name} ended ({status}): {words}");
            }
        }
    }
    "every child is gone".to_owned()
}

fn bind(address: SocketAddr, flag: &str) -> Result<TcpListener> {
    let listener = TcpListener::bind(address)
        .with_context(|| format!("cannot listen on {address}; choose another port with {flag}"))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// What a signal asks for.
#[derive(PartialEq, Eq)]
enum Wish {
    Stop,
    /// Keys and certificates are to be read again.
    Reload,
}

struct Signals {
    terminate: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
    hangup: tokio::signal::unix::Signal,
    terminal: Terminal,
}

impl Signals {
    fn new() -> Result<Self> {
        let (terminate, interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        Ok(Self { terminate, interrupt, hangup: signal(SignalKind::hangup())?, terminal: Terminal::now() })
    }

    async fn next(&mut self) -> Wish {
        tokio::select! {
            _ = self.terminate.recv() => Wish::Stop,
            _ = self.interrupt.recv() => Wish::Stop,
            _ = self.hangup.recv() => if self.terminal.is_gone() { Wish::Stop } else { Wish::Reload },
        }
    }

    /// The first wish to stop.
    async fn first(&mut self) {
        while self.next().await == Wish::Reload {}
    }
}

/// Everything the children's command lines follow from.
struct Setup {
    args: ServeArgs,
    model: String,
    names: Vec<String>,
    world_size: usize,
    threads: usize,
}

impl Setup {
    fn new(args: ServeArgs) -> Result<Self> {
        args.http.access.check_bind(args.http.host, args.http.insecure_bind)?;
        // The gateway takes both; what is wrong with them is said before anything is started.
        args.http.access.keys()?;
        args.http.access.tls_files()?;
        args.foreign.announce();
        let directory = models::resolve(args.model.name(), args.model.model_dir.as_deref())?;
        // The children check it again, each where it runs; here it is refused before anything is started.
        let checkpoint = Checkpoint::open(&directory)?;
        checkpoint.check_complete()?;
        let world_size = args.scheduler.tensor_parallel_size.unwrap_or(DEFAULT_WORLD_SIZE);
        let parallelism = parallelism(args.scheduler.enable_expert_parallel);
        Layout::new(&checkpoint.geometry, world_size, parallelism).context("--tensor-parallel-size")?;
        components::check_backend(args.device.backend)?;
        ensure!(
            args.load_format == LoadFormat::Auto,
            "--load-format dummy: this version reads checkpoints only; tests/tools/make_checkpoint.py makes a synthetic one"
        );
        ensure!(
            args.data_parallel_size == 1,
            "--data-parallel-size {}: this version serves one group; start several clusters behind a balancer instead",
            args.data_parallel_size
        );
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = args.device.threads.unwrap_or((cores / world_size).max(1));
        let names = models::served_names(&directory, &args.model.served_model_name);
        Ok(Self { model: directory.display().to_string(), names, world_size, threads, args })
    }

    /// What every child is told.
    fn common(&self, role: &str) -> Vec<String> {
        let telemetry = &self.args.telemetry;
        let format = if telemetry.log_format == crate::cli::LogFormat::Json { "json" } else { "text" };
        let mut out = vec![role.into(), self.model.clone()];
        out.push(format!("--served-model-name={}", self.names.join(",")));
        out.push(format!("--log-format={format}"));
        out.push(format!("--log={}", telemetry.log));
        out.extend(self.args.tls.tls.iter().map(|directory| format!("--tls={}", directory.display())));
        out.extend(telemetry.otlp_traces_endpoint.iter().map(|url| format!("--otlp-traces-endpoint={url}")));
        out
    }

    fn coordinator(&self, listener: TcpListener) -> ChildSpec {
        let (s, mut args) = (&self.args.scheduler, self.common("coordinator"));
        args.push("--listen-stdin".into());
        args.push(format!("--backend={}", self.args.device.backend.name()));
        args.push(format!("--tensor-parallel-size={}", self.world_size));
        args.push(format!("--block-size={}", s.block_size));
        args.push(format!("--max-num-seqs={}", s.max_num_seqs));
        args.push(format!("--max-num-batched-tokens={}", s.max_num_batched_tokens));
        args.push(format!("--max-num-queued-reqs={}", s.max_num_queued_reqs));
        args.push(format!("--step-timeout-ms={}", s.step_timeout_ms));
        args.push(format!("--shutdown-timeout={}", self.args.http.shutdown_timeout));
        args.extend(s.max_model_len.map(|n| format!("--max-model-len={n}")));
        args.extend(s.kv_cache_memory_bytes.map(|n| format!("--kv-cache-memory-bytes={n}")));
        args.extend(s.state_dir.as_ref().map(|dir| format!("--state-dir={}", dir.display())));
        args.extend(s.enable_expert_parallel.then(|| "--enable-expert-parallel".into()));
        args.extend(s.no_enable_prefix_caching.then(|| "--no-enable-prefix-caching".into()));
        ChildSpec { name: "coordinator".into(), args, listener: Some(listener) }
    }

    fn worker(&self, rank: usize, coordinator: &str) -> ChildSpec {
        let (device, mut args) = (&self.args.device, self.common("worker"));
        args.push(format!("--rank={rank}"));
        args.push(format!("--coordinator={coordinator}"));
        args.push(format!("--backend={}", device.backend.name()));
        args.push(format!("--threads={}", self.threads));
        // The ranks of one host share its memory.
        args.push(format!("--gpu-memory-utilization={}", device.gpu_memory_utilization / self.world_size as f64));
        ChildSpec { name: format!("worker {rank}"), args, listener: None }
    }

    fn gateway(&self, listener: TcpListener, coordinator: &str, notify_socket: &str) -> ChildSpec {
        let (http, mut args) = (&self.args.http, self.common("gateway"));
        args.push("--listen-stdin".into());
        args.push(format!("--coordinator={coordinator}"));
        args.push(format!("--host={}", http.host));
        args.push(format!("--current-date={}", http.current_date));
        args.push(format!("--reasoning-field={}", http.reasoning_field.name()));
        args.extend(http.seed.map(|seed| format!("--seed={seed}")));
        args.push(format!("--shutdown-timeout={}", http.shutdown_timeout));
        args.extend(http.config.as_ref().map(|file| format!("--profiles={}", file.display())));
        args.extend(http.insecure_bind.then(|| "--insecure-bind".into()));
        args.extend(http.access.flags());
        args.push(format!("--notify-socket={notify_socket}"));
        ChildSpec { name: "gateway".into(), args, listener: Some(listener) }
    }
}

/// Expert parallel or tensor parallel.
pub(crate) fn parallelism(expert: bool) -> Parallelism {
    if expert { Parallelism::Expert } else { Parallelism::Tensor }
}

fn ready_line(setup: &Setup, address: SocketAddr) -> String {
    let (name, args) = (&setup.names[0], &setup.args);
    let (scheme, key) = args.http.access.to_try();
    info!(%address, model = name, "ready");
    format!(
        "ready: {name} on {world} {backend} rank(s) at {scheme}://{address}\n\
         try: curl -s {scheme}://{address}/v1/chat/completions{key} -H 'Content-Type: application/json' \
         -d '{{\"model\": \"{name}\", \"messages\": [{{\"role\": \"user\", \"content\": \
         \"What is the capital of France?\"}}]}}'",
        world = setup.world_size,
        backend = args.device.backend.name(),
    )
}
