//! One coordinator, worker or gateway: from its flags to its running service, and the end of it.

use std::{
    net::{IpAddr, SocketAddr, ToSocketAddrs, UdpSocket},
    os::fd::AsFd,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, Result};
use phalanx_proto::tls::Role;
use phalanx_worker::backend::cuda;
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
    sync::Notify,
};
use tokio_util::sync::CancellationToken;

use crate::{
    access::Terminal,
    cli::{Backend, CoordinatorArgs, GatewayArgs, SchedulerArgs, WorkerArgs},
    config_file, models,
    serve::parallelism,
    supervisor,
    telemetry::{self, Telemetry},
    tls::TlsArgs,
};

/// Refuses `--backend cuda` where the machine lacks something, in a line that says what.
pub(crate) fn check_backend(backend: Backend) -> Result<()> {
    if backend == Backend::Cuda { cuda::check().context("--backend cuda") } else { Ok(()) }
}

/// KV cache of a rank on a CPU when nothing is said, in bytes: main memory is shared with everything else.
const CPU_KV_BYTES: u64 = 1 << 30;

/// Runs a coordinator until it is told to stop.
pub(crate) async fn coordinator(args: CoordinatorArgs) -> Result<()> {
    let (telemetry, shutdown) = prepare(&args.telemetry, "coordinator")?;
    if !args.listen_stdin {
        args.tls.check_bind(args.listen.ip(), args.insecure_bind)?;
    }
    let config = coordinator_config(&args)?;
    show(&config);
    let listener = listener(args.listen_stdin, args.listen, "--listen").await?;
    let outcome = phalanx_coordinator::run(config, listener, shutdown).await;
    finish(telemetry, outcome).await
}

fn coordinator_config(args: &CoordinatorArgs) -> Result<phalanx_coordinator::Config> {
    let scheduler: &SchedulerArgs = &args.scheduler;
    let directory = models::resolve(args.model.name(), args.model.model_dir.as_deref())?;
    let names = models::served_names(&directory, &args.model.served_model_name);
    let world_size = scheduler.tensor_parallel_size.unwrap_or(1);
    let mut deployment = phalanx_coordinator::DeploymentConfig::new(directory, &names[0], world_size);
    deployment.parallelism = parallelism(scheduler.enable_expert_parallel);
    deployment.backend = args.backend.name().parse()?;
    deployment.max_model_len = scheduler.max_model_len;
    deployment.max_num_seqs = scheduler.max_num_seqs;
    deployment.max_num_batched_tokens = scheduler.max_num_batched_tokens;
    deployment.max_num_queued_reqs = scheduler.max_num_queued_reqs;
    deployment.block_size = scheduler.block_size;
    // A GPU's memory is all for weights and cache: what the weights leave is the cache's.
    let default = (args.backend != Backend::Cuda).then_some(CPU_KV_BYTES);
    deployment.kv_cache_memory_bytes = scheduler.kv_cache_memory_bytes.or(default);
    deployment.enable_prefix_caching = !scheduler.no_enable_prefix_caching;
    let limits = phalanx_coordinator::Limits {
        step_deadline: Duration::from_millis(scheduler.step_timeout_ms),
        drain_grace: Duration::from_secs(args.shutdown_timeout),
        ..Default::default()
    };
    Ok(phalanx_coordinator::Config {
        deployments: vec![deployment],
        membership: args.etcd.membership(scheduler.state_dir.clone())?,
        tls: args.tls.identity(Role::Coordinator)?,
        limits,
    })
}

/// Runs a worker until it is told to stop.
pub(crate) async fn worker(args: WorkerArgs) -> Result<()> {
    let (telemetry, shutdown) = prepare(&args.telemetry, "worker")?;
    let outcome = match worker_config(&args) {
        Ok(config) => {
            show(&config);
            phalanx_worker::run(config, shutdown).await
        }
        Err(error) => Err(error),
    };
    finish(telemetry, outcome).await
}

fn worker_config(args: &WorkerArgs) -> Result<phalanx_worker::Config> {
    let model_dir = models::resolve(args.model.name(), args.model.model_dir.as_deref())?;
    let names = models::served_names(&model_dir, &args.model.served_model_name);
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let coordinators = addresses(&args.tls, &args.coordinator)?;
    let mut config = phalanx_worker::Config::new(&coordinators[0], &names[0], model_dir);
    config.coordinators = coordinators;
    config.tls = args.tls.identity(Role::Worker)?;
    config.backend = args.device.backend.name().parse()?;
    config.threads = args.device.threads.unwrap_or(cores);
    config.rank = args.rank;
    config.memory_utilization = args.device.gpu_memory_utilization;
    config.bind_ip = args.bind_ip.map_or_else(|| address_towards(&args.coordinator[0]), Ok)?;
    Ok(config)
}

/// The addresses of all coordinators, each with its scheme.
fn addresses(tls: &TlsArgs, coordinators: &[String]) -> Result<Vec<String>> {
    coordinators.iter().map(|address| tls.address(address)).collect()
}

/// The address of this host from which the coordinator is reached: other hosts of the cluster can reach it too.
fn address_towards(coordinator: &str) -> Result<IpAddr> {
    let address = coordinator.split_once("://").map_or(coordinator, |(_, rest)| rest).trim_end_matches('/');
    let unspecified = |address: SocketAddr| if address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let find = || {
        let target = address.to_socket_addrs()?.next().context("it has no address")?;
        let socket = UdpSocket::bind(unspecified(target))?;
        // Connecting a datagram socket sends nothing; it only picks the route.
        socket.connect(target)?;
        anyhow::Ok(socket.local_addr()?.ip())
    };
    find().with_context(|| format!("--coordinator {coordinator}: no way there from this host; see also --bind-ip"))
}

/// Runs a gateway until it is told to stop.
pub(crate) async fn gateway(args: GatewayArgs) -> Result<()> {
    let (telemetry, shutdown) = prepare(&args.telemetry, "gateway")?;
    // A panic's words may quote a prompt; where it happened is enough to find it.
    std::panic::set_hook(Box::new(
        |panic| tracing::error!(at = ?panic.location().map(ToString::to_string), "panicked"),
    ));
    args.http.access.check_bind(args.http.host, args.http.insecure_bind)?;
    let config = gateway_config(&args)?;
    show(&config);
    reload_on_hangup(Arc::clone(&config.reload), shutdown.clone())?;
    let address = SocketAddr::new(args.http.host, args.http.port);
    let listener = listener(args.listen_stdin, address, "--port").await?;
    let outcome = phalanx_gateway::run(config, listener, shutdown).await;
    finish(telemetry, outcome).await
}

fn gateway_config(args: &GatewayArgs) -> Result<phalanx_gateway::Config> {
    let model_dir = models::resolve(args.model.name(), args.model.model_dir.as_deref())?;
    let coordinators = addresses(&args.tls, &args.coordinator)?;
    let mut config = phalanx_gateway::Config::new(&coordinators[0], &model_dir);
    config.coordinators = coordinators;
    config.coordinator_tls = args.tls.identity(Role::Gateway)?;
    config.served_names = models::served_names(&model_dir, &args.model.served_model_name);
    config.current_date = args.http.current_date.parse().context("--current-date")?;
    config.reasoning_field = args.http.reasoning_field.name().parse()?;
    config.seed = args.http.seed;
    config.timeouts.drain = Duration::from_secs(args.http.shutdown_timeout);
    config.keys = args.http.access.keys()?;
    config.tls = args.http.access.tls_files()?;
    config.notify_socket = args.notify_socket.clone();
    if let Some(file) = args.http.config.as_ref().or(args.http.profiles.as_ref()) {
        config.profiles = config_file::profiles(file)?;
    }
    config.validate()?;
    Ok(config)
}

/// SIGHUP reads keys and certificates again, unless it says that the terminal is gone.
fn reload_on_hangup(reload: Arc<Notify>, shutdown: CancellationToken) -> Result<()> {
    let (mut hangup, terminal) = (signal(SignalKind::hangup())?, Terminal::now());
    tokio::spawn(async move {
        while hangup.recv().await.is_some() {
            if terminal.is_gone() {
                shutdown.cancel();
            } else {
                reload.notify_one();
            }
        }
    });
    Ok(())
}

/// Says what the process goes by. Keys and passwords do not show themselves.
fn show(config: &impl std::fmt::Debug) {
    tracing::info!(?config, "configuration");
}

/// What every component does first: logs, the bond to its parent, and a token that a signal cancels.
fn prepare(args: &crate::cli::TelemetryArgs, role: &'static str) -> Result<(Telemetry, CancellationToken)> {
    supervisor::die_with_parent()?;
    supervisor::give_signs_of_life()?;
    let telemetry = telemetry::init(args, role)?;
    let shutdown = CancellationToken::new();
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let token = shutdown.clone();
    tokio::spawn(async move {
        for _ in 0..2 {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            if token.is_cancelled() {
                // A second signal ends at once; 130 is what shells show for an interrupted command.
                std::process::exit(130);
            }
            token.cancel();
        }
    });
    Ok((telemetry, shutdown))
}

/// Sends what is left of the traces, then hands on the outcome.
async fn finish(telemetry: Telemetry, outcome: Result<()>) -> Result<()> {
    // Flushing blocks, so it must not hold a thread of the runtime that the exporter itself needs.
    tokio::task::spawn_blocking(move || telemetry.flush()).await.context("flushing traces")?;
    outcome
}

async fn listener(from_stdin: bool, address: SocketAddr, flag: &str) -> Result<TcpListener> {
    if from_stdin {
        let socket = std::io::stdin().as_fd().try_clone_to_owned().context("the listening socket on standard input")?;
        let listener = std::net::TcpListener::from(socket);
        listener.set_nonblocking(true)?;
        return TcpListener::from_std(listener).context("the listening socket on standard input");
    }
    TcpListener::bind(address).await.with_context(|| format!("cannot listen on {address}; choose another with {flag}"))
}
