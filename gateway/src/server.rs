//! Connections: bounded in number and in the time that a header takes, drained at the end.
//!
//! `axum::serve` has no header timeout, so thousands of half-open headers would stay; hyper's own builders have one.

use std::{
    io,
    os::{linux::net::SocketAddrExt, unix::net as unix},
    sync::Arc,
    time::Duration,
};

use axum::Router;
use hyper::server::conn::{http1, http2};
use hyper_util::{
    rt::{TokioExecutor, TokioTimer},
    server::graceful::GracefulShutdown,
};
use rustix::net::sockopt::set_socket_send_buffer_size;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use crate::{
    app::App,
    config::Config,
    connection::{Connection, MAX_HEADER_BYTES, Protocols},
    routes::router,
    tls::Tls,
};

/// Most headers of a request.
const MAX_HEADERS: usize = 128;
/// HTTP/2 streams that a client may open and reset before its connection is closed.
const MAX_RESETS: usize = 64;
/// Pings that find out that an HTTP/2 client is gone, and how long each may take.
const PING: (Duration, Duration) = (Duration::from_secs(20), Duration::from_secs(20));
/// What a client may leave unread in the system's memory, in bytes; Linux doubles it.
const SEND_BUFFER_BYTES: usize = 64 << 10;
/// Pause after the system refused a connection, for want of descriptors for example.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// How long connections may take to send their last error after the drain is over.
const FLUSH: Duration = Duration::from_secs(2);
/// What a connection over the limit is told.
const FULL: &[u8] = b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: 127\r\n\r\n{\"error\":{\"message\":\"The gateway has too many connections.\",\"type\":\"server_error\",\"param\":null,\"code\":\"too_many_connections\"}}\n";

/// Serves the OpenAI API on `listener` until `shutdown`, then lets running requests finish within the drain time.
///
/// # Errors
/// When the configuration, the keys, the certificate or the model's tokenizer cannot be used.
pub async fn run(config: Config, listener: TcpListener, shutdown: CancellationToken) -> anyhow::Result<()> {
    let tls = config.tls.clone().map(Tls::load).transpose()?.map(Arc::new);
    let app = Arc::new(App::new(config, shutdown.clone()).await?);
    let ended = CancellationToken::new();
    let follower = tokio::spawn(Arc::clone(&app.upstream).follow(ended.clone()));
    let attendant = tokio::spawn(attend(Arc::clone(&app), tls.clone(), ended.clone()));
    info!(address = %listener.local_addr()?, coordinators = ?app.config.coordinators, "gateway listening");
    let connections = Connections::new(&app, tls);
    connections.accept(&listener, &shutdown).await;
    drop(listener);
    connections.drain(&app).await;
    ended.cancel();
    follower.await?;
    attendant.await?;
    Ok(())
}

/// Says once that requests can be answered, and reads keys and certificates again whenever it is told to.
async fn attend(app: Arc<App>, tls: Option<Arc<Tls>>, ended: CancellationToken) {
    let mut announced = app.config.notify_socket.is_none();
    loop {
        tokio::select! {
            () = ended.cancelled() => return,
            () = app.upstream.became_ready(), if !announced => {
                announced = true;
                announce(app.config.notify_socket.as_deref().unwrap_or_default());
            }
            () = app.config.reload.notified() => {
                app.access.reload().await;
                if let Some(tls) = &tls {
                    tls.reload();
                }
            }
        }
    }
}

/// Tells whoever started this process that it is ready, as systemd's `sd_notify` does. One small datagram: it is taken
/// at once or not at all.
fn announce(socket: &str) {
    let say = || {
        let address = match socket.strip_prefix('@') {
            Some(name) => unix::SocketAddr::from_abstract_name(name)?,
            None => unix::SocketAddr::from_pathname(socket)?,
        };
        let sender = unix::UnixDatagram::unbound()?;
        sender.set_nonblocking(true)?;
        sender.send_to_addr(b"READY=1", &address)
    };
    if let Err(error) = say() {
        // After a restart nobody waits for it any more.
        debug!(%error, socket, "nobody took the word that this gateway is ready");
    }
}

/// Accepts and serves connections.
struct Connections {
    router: Router,
    protocols: Arc<Protocols>,
    tls: Option<Arc<Tls>>,
    places: Arc<Semaphore>,
    graceful: GracefulShutdown,
    header_timeout: Duration,
    unread_timeout: Duration,
}

impl Connections {
    fn new(app: &Arc<App>, tls: Option<Arc<Tls>>) -> Self {
        let limits = &app.config.limits;
        let header_timeout = app.config.timeouts.header;
        let mut protocols =
            Protocols { http1: http1::Builder::new(), http2: http2::Builder::new(TokioExecutor::new()) };
        protocols
            .http1
            .timer(TokioTimer::new())
            .header_read_timeout(header_timeout)
            .max_buf_size(MAX_HEADER_BYTES)
            .max_headers(MAX_HEADERS);
        protocols
            .http2
            .timer(TokioTimer::new())
            .max_concurrent_streams(limits.http2_streams)
            .max_pending_accept_reset_streams(MAX_RESETS)
            .max_local_error_reset_streams(MAX_RESETS)
            .max_header_list_size(MAX_HEADER_BYTES as u32)
            .keep_alive_interval(PING.0)
            .keep_alive_timeout(PING.1);
        Self {
            router: router(Arc::clone(app)),
            protocols: Arc::new(protocols),
            tls,
            places: Arc::new(Semaphore::new(limits.connections.min(Semaphore::MAX_PERMITS))),
            graceful: GracefulShutdown::new(),
            header_timeout,
            unread_timeout: app.config.timeouts.unread,
        }
    }

    async fn accept(&self, listener: &TcpListener, shutdown: &CancellationToken) {
        loop {
            let accepted = tokio::select! {
                () = shutdown.cancelled() => return,
                accepted = listener.accept() => accepted,
            };
            match accepted {
                Ok((stream, _)) => self.begin(stream, shutdown),
                Err(error) => {
                    warn!(%error, "cannot accept a connection");
                    sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    fn begin(&self, stream: TcpStream, shutdown: &CancellationToken) {
        let Ok(place) = Arc::clone(&self.places).try_acquire_owned() else {
            return refuse(&stream);
        };
        // Each event of a stream is to leave at once. Where the system refuses, it leaves a little later.
        let _ = stream.set_nodelay(true);
        // Left to itself, the system keeps megabytes for each client that does not read.
        let _ = set_socket_send_buffer_size(&stream, SEND_BUFFER_BYTES);
        let connection = Connection {
            router: self.router.clone(),
            protocols: Arc::clone(&self.protocols),
            watcher: self.graceful.watcher(),
            shutdown: shutdown.clone(),
            tls: self.tls.as_ref().map(|tls| tls.acceptor()),
            header_timeout: self.header_timeout,
            unread_timeout: self.unread_timeout,
            _place: place,
        };
        tokio::spawn(connection.serve(stream));
    }

    /// Lets running requests finish; at the deadline they end with an error, and then their connections are dropped.
    async fn drain(self, app: &App) {
        let mut finished = std::pin::pin!(self.graceful.shutdown());
        if timeout(app.config.timeouts.drain, &mut finished).await.is_err() {
            warn!("requests are still running at the end of the drain time");
            app.deadline.cancel();
            if timeout(FLUSH, &mut finished).await.is_err() {
                warn!("connections did not take their last bytes");
            }
        }
    }
}

/// Tells a client that there is no place for it, if that fits into the socket's buffer.
fn refuse(stream: &TcpStream) {
    if let Err(error) = stream.try_write(FULL) {
        debug!(%error, "cannot refuse a connection");
    }
}

/// Binds an address, with an error that says which.
///
/// # Errors
/// When the address is in use or not one of this host's.
pub async fn bind(address: &str) -> io::Result<TcpListener> {
    let named = |error: io::Error| io::Error::new(error.kind(), format!("cannot listen on {address}: {error}"));
    TcpListener::bind(address).await.map_err(named)
}
