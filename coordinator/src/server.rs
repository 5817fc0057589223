//! One coordinator process: groups, gRPC server, health, reflection, and an orderly end.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use anyhow::Context;
use futures::future::{join_all, select_all};
use phalanx_proto::{
    tls::Door,
    v1::{self, GroupState, cluster_server::ClusterServer, inference_server::InferenceServer},
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpListener,
    sync::watch,
    task::{AbortHandle, JoinHandle},
};
use tokio_stream::Stream;
use tokio_util::sync::CancellationToken;
use tonic::{
    server::NamedService,
    service::interceptor::InterceptedService,
    transport::{
        Server,
        server::{Connected, TcpIncoming},
    },
};
use tonic_health::{ServingStatus, pb::FILE_DESCRIPTOR_SET as HEALTH_DESCRIPTOR_SET, server::HealthReporter};
use tracing::info;

use crate::{
    config::{Config, Deployment},
    door,
    group::{self, Epochs, GroupHandle},
    membership::{self, Deposed, Role},
    services::{Groups, cluster::ClusterService, inference::InferenceService},
};

/// A connection that is silent for this long is asked whether it lives, and given up after as long again.
const KEEP_ALIVE: Duration = Duration::from_secs(5);
/// Largest message from a client: a prompt of the longest context that is accepted takes 5 bytes a token.
const MAX_REQUEST_BYTES: usize = 16 << 20;
/// Largest message from a worker: log-probabilities of a long prompt.
const MAX_RESULT_BYTES: usize = 64 << 20;
/// Requests on one connection. The engine's own limits come first; this only bounds memory.
const MAX_STREAMS: u32 = 1 << 16;
/// How long connections may linger once everything is told to end.
const LINGER: Duration = Duration::from_secs(2);

/// Serves the configured deployments on `listener` until `shutdown` is cancelled and running requests have ended or run
/// out of time.
///
/// # Errors
/// When a deployment cannot be served, the membership cannot be used, or the server breaks down. When another
/// coordinator was elected, the error is [`Deposed`].
pub async fn run(config: Config, listener: TcpListener, shutdown: CancellationToken) -> anyhow::Result<()> {
    let address = listener.local_addr().context("reading the address that the coordinator listens on")?;
    let secured = config.clone();
    lead(config, address, shutdown, |groups, role, end| open_door(secured, groups, role, listener, end)).await
}

/// Like [`run`], over plain connections that are made elsewhere: a simulated network. `address` is what people and other
/// coordinators know this one by.
///
/// # Errors
/// Like [`run`].
pub async fn run_over<I, IO>(
    config: Config,
    address: SocketAddr,
    incoming: I,
    shutdown: CancellationToken,
) -> anyhow::Result<()>
where
    I: Stream<Item = std::io::Result<IO>> + Send + 'static,
    IO: AsyncRead + AsyncWrite + Connected + Unpin + Send + 'static,
{
    lead(config, address, shutdown, |groups, role, end| serve(groups, role, incoming, false, end)).await
}

/// Everything but the door, which `open_door` makes.
async fn lead<D>(
    config: Config,
    address: SocketAddr,
    shutdown: CancellationToken,
    open_door: impl FnOnce(Groups, watch::Receiver<Role>, CancellationToken) -> D,
) -> anyhow::Result<()>
where
    D: Future<Output = anyhow::Result<()>> + Send + 'static,
{
    let opened = config.clone();
    let deployments = tokio::task::spawn_blocking(move || opened.open()).await.context("opening")??;
    let membership = membership::start(&config.membership, address).await?;
    // Ends the groups also when it is not the caller who asked for it.
    let stop = shutdown.child_token();
    let (groups, tasks) = spawn_groups(&config, deployments, &Epochs::new(Arc::clone(&membership)), &stop)?;
    let fates: Vec<AbortHandle> = tasks.iter().map(JoinHandle::abort_handle).collect();
    info!(%address, "coordinator listens");
    let end = CancellationToken::new();
    let mut server = tokio::spawn(open_door(groups, membership.role(), end.clone()));
    let outcome = tokio::select! {
        outcome = supervise(tasks, &stop) => outcome,
        deposed = until_deposed(membership.role()) => {
            // At once and without draining: workers fence and clients go elsewhere when their streams end.
            fates.iter().for_each(AbortHandle::abort);
            Err(deposed.into())
        }
        served = &mut server => {
            stop.cancel();
            served.context("the server's task broke down")??;
            anyhow::bail!("the gRPC server ended although nobody asked it to");
        }
    };
    membership.resign().await;
    end.cancel();
    match tokio::time::timeout(LINGER, &mut server).await {
        Ok(served) => served.context("the server's task broke down")??,
        Err(_) => {
            info!("some connections did not close in time");
            server.abort();
        }
    }
    outcome
}

async fn until_deposed(mut role: watch::Receiver<Role>) -> Deposed {
    let why = match role.wait_for(|role| matches!(role, Role::Deposed(_))).await.as_deref() {
        Ok(Role::Deposed(why)) => Some(why.clone()),
        _ => None,
    };
    match why {
        Some(why) => Deposed(why),
        // A membership that has ended deposes nobody.
        None => std::future::pending().await,
    }
}

fn spawn_groups(
    config: &Config,
    deployments: Vec<Deployment>,
    epochs: &Epochs,
    stop: &CancellationToken,
) -> anyhow::Result<(Groups, Vec<JoinHandle<()>>)> {
    let mut handles: Vec<GroupHandle> = Vec::with_capacity(deployments.len());
    let mut tasks = Vec::with_capacity(deployments.len());
    for deployment in deployments {
        let name = deployment.config.served_model_name.clone();
        let spawned = group::spawn(deployment, config.limits.clone(), epochs.clone(), stop.clone());
        let (handle, task) = spawned.with_context(|| format!("deployment {name:?}"))?;
        handles.push(handle);
        tasks.push(task);
    }
    Ok((Arc::new(handles), tasks))
}

/// Waits for every group to end. One that ends before it was asked to is a bug, and the process says so.
async fn supervise(tasks: Vec<JoinHandle<()>>, stop: &CancellationToken) -> anyhow::Result<()> {
    let (first, _, rest) = select_all(tasks).await;
    let unasked = !stop.is_cancelled();
    stop.cancel();
    let rest = join_all(rest).await;
    for ended in std::iter::once(first).chain(rest) {
        ended.context("a group's task broke down")?;
    }
    anyhow::ensure!(!unasked, "a group's task ended although nobody asked it to");
    Ok(())
}

/// Serves over TLS and by roles if the configuration says so, else whoever connects.
async fn open_door(
    config: Config,
    groups: Groups,
    role: watch::Receiver<Role>,
    listener: TcpListener,
    end: CancellationToken,
) -> anyhow::Result<()> {
    match config.tls {
        Some(identity) => serve(groups, role, door::guarded(listener, identity.server_config()?), true, end).await,
        // A token goes out alone; waiting to fill a packet would cost more than a step.
        None => serve(groups, role, TcpIncoming::from(listener).with_nodelay(Some(true)), false, end).await,
    }
}

/// Serves what comes in; `guarded` says whether connections carry certificates, whose roles then open the doors.
async fn serve<I, IO>(
    groups: Groups,
    role: watch::Receiver<Role>,
    incoming: I,
    guarded: bool,
    end: CancellationToken,
) -> anyhow::Result<()>
where
    I: Stream<Item = std::io::Result<IO>>,
    IO: AsyncRead + AsyncWrite + Connected + Unpin + Send + 'static,
{
    let (reporter, health) = tonic_health::server::health_reporter();
    let watcher = tokio::spawn(report_health(Arc::clone(&groups), role.clone(), reporter));
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(v1::FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(HEALTH_DESCRIPTOR_SET)
    };
    let reflection_v1 = reflection().build_v1().context("building the reflection service")?;
    // Python's and older clients speak only this version.
    let reflection_v1alpha = reflection().build_v1alpha().context("building the reflection service")?;
    let inference = InferenceServer::new(InferenceService { groups: Arc::clone(&groups) });
    let cluster = ClusterServer::new(ClusterService { groups });
    let guard = |door| {
        let role = role.clone();
        move |request| {
            let request = if guarded { door::check_role(request, door)? } else { request };
            role.borrow().check()?;
            Ok(request)
        }
    };
    Server::builder()
        .http2_keepalive_interval(Some(KEEP_ALIVE))
        .http2_keepalive_timeout(Some(KEEP_ALIVE))
        .max_concurrent_streams(Some(MAX_STREAMS))
        .add_service(health)
        .add_service(reflection_v1)
        .add_service(reflection_v1alpha)
        .add_service(InterceptedService::new(
            inference.max_decoding_message_size(MAX_REQUEST_BYTES),
            guard(Door::Inference),
        ))
        .add_service(InterceptedService::new(cluster.max_decoding_message_size(MAX_RESULT_BYTES), guard(Door::Cluster)))
        .serve_with_incoming_shutdown(incoming, end.cancelled_owned())
        .await
        .context("serving gRPC")?;
    watcher.abort();
    Ok(())
}

/// Says `SERVING` for `Cluster` while this coordinator leads, and for the server as a whole and for `Inference` while
/// every group is ready, too.
async fn report_health(groups: Groups, mut role: watch::Receiver<Role>, reporter: HealthReporter) {
    const CLUSTER: &str = ClusterServer::<ClusterService>::NAME;
    const INFERENCE: &str = InferenceServer::<InferenceService>::NAME;
    let mut loads: Vec<_> = groups.iter().map(|group| group.load.clone()).collect();
    let mut last = None;
    loop {
        let leads = *role.borrow_and_update() == Role::Leading;
        let ready = leads && loads.iter_mut().all(|load| load.borrow_and_update().state() == GroupState::Ready);
        if last.replace((leads, ready)) != Some((leads, ready)) {
            for (service, serves) in [("", ready), (INFERENCE, ready), (CLUSTER, leads)] {
                let status = if serves { ServingStatus::Serving } else { ServingStatus::NotServing };
                reporter.set_service_status(service, status).await;
            }
        }
        let changes = loads.iter_mut().map(|load| Box::pin(load.changed()));
        let goes_on = tokio::select! {
            (change, _, _) = select_all(changes) => change.is_ok(),
            change = role.changed() => change.is_ok(),
        };
        if !goes_on {
            // A group or the membership has ended, and with it soon the process.
            reporter.set_service_status("", ServingStatus::NotServing).await;
            return;
        }
    }
}
