//! Who comes in: every connection as it is, or only those over TLS with a certificate of the authority, each through the
//! door that its role opens.
//!
//! A connection is refused with one line here and a reason for the other side, as far as it can understand one.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use phalanx_proto::tls::{Door, Role, advice};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    time::{sleep, timeout},
};
use tokio_rustls::{TlsAcceptor, rustls::ServerConfig, server::TlsStream};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Status};
use tracing::{debug, warn};

/// Longest time from a connection to the end of its handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// Handshakes under way; more connections wait in the system's queue.
const MAX_HANDSHAKES: usize = 256;
/// Connections that the server has not taken yet.
const READY: usize = 16;
/// Pause after the system refused a connection, for want of descriptors for example.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// How long, and for how many bytes, a refused peer is listened to, so that closing does not destroy what it was told.
const LINGER: Duration = Duration::from_secs(1);
const LINGER_BYTES: u64 = 64 << 10;
/// Time for a client without TLS to make its first call: that call then fails with the words for it, while one that
/// came later would only find the connection gone.
const FIRST_CALL: Duration = Duration::from_millis(200);
/// First byte of every TLS connection: a handshake record.
const TLS_HANDSHAKE: u8 = 0x16;
/// What a client learns that speaks HTTP/2 without TLS.
const PLAIN_REFUSAL: &[u8] = b"this coordinator takes only TLS: start the client with --tls";

/// Connections whose certificates are good. Ends when the stream is dropped.
pub(crate) fn guarded(
    listener: TcpListener,
    config: Arc<ServerConfig>,
) -> ReceiverStream<io::Result<TlsStream<TcpStream>>> {
    let (ready, incoming) = mpsc::channel(READY);
    tokio::spawn(accept(listener, TlsAcceptor::from(config), ready));
    ReceiverStream::new(incoming)
}

type Ready = mpsc::Sender<io::Result<TlsStream<TcpStream>>>;

async fn accept(listener: TcpListener, acceptor: TlsAcceptor, ready: Ready) {
    let places = Arc::new(Semaphore::new(MAX_HANDSHAKES));
    loop {
        let accepted = async {
            let place = Arc::clone(&places).acquire_owned().await.map_err(io::Error::other)?;
            listener.accept().await.map(|(stream, peer)| (stream, peer, place))
        };
        let accepted = tokio::select! {
            () = ready.closed() => return,
            accepted = accepted => accepted,
        };
        match accepted {
            Ok((stream, peer, place)) => {
                tokio::spawn(welcome(stream, peer, acceptor.clone(), ready.clone(), place));
            }
            Err(error) => {
                warn!(%error, "cannot accept a connection");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn welcome(
    stream: TcpStream,
    peer: SocketAddr,
    acceptor: TlsAcceptor,
    ready: Ready,
    place: OwnedSemaphorePermit,
) {
    // A token goes out alone. Where the system refuses, it leaves a little later.
    let _ = stream.set_nodelay(true);
    match timeout(HANDSHAKE_TIMEOUT, shake_hands(stream, peer, &acceptor)).await {
        Ok(Some(stream)) => {
            drop(place);
            // It fails when the server ends, and the connection ends with it.
            let _ = ready.send(Ok(stream)).await;
        }
        Ok(None) => {}
        Err(_) => warn!(%peer, "connection refused: its TLS handshake took more than {HANDSHAKE_TIMEOUT:?}"),
    }
}

async fn shake_hands(stream: TcpStream, peer: SocketAddr, acceptor: &TlsAcceptor) -> Option<TlsStream<TcpStream>> {
    let mut first = [0];
    match stream.peek(&mut first).await {
        // Whoever only looks whether the port is open, as some supervisors do.
        Ok(0) | Err(_) => {
            debug!(%peer, "a connection was closed before it said anything");
            None
        }
        Ok(_) if first[0] != TLS_HANDSHAKE => {
            warn!(%peer, "connection refused: it does not speak TLS; start the other side with --tls");
            sleep(FIRST_CALL).await;
            refuse(stream, &go_away(PLAIN_REFUSAL)).await;
            None
        }
        Ok(_) => match acceptor.accept(stream).into_fallible().await {
            Ok(stream) => Some(stream),
            Err((error, stream)) => {
                let advice = advice(&error).unwrap_or("no TLS handshake came about");
                warn!(%peer, %error, "connection refused: {advice}");
                // The alert that says why has been sent.
                refuse(stream, &[]).await;
                None
            }
        },
    }
}

/// Tells a peer why, and closes only once it has had time to read that.
async fn refuse(mut stream: TcpStream, last_words: &[u8]) {
    let linger = async {
        stream.write_all(last_words).await?;
        stream.shutdown().await?;
        tokio::io::copy(&mut stream.take(LINGER_BYTES), &mut tokio::io::sink()).await
    };
    // A peer that is gone needs no words.
    let _ = timeout(LINGER, linger).await;
}

/// An HTTP/2 connection that ends as soon as it began: empty SETTINGS, then GOAWAY with INADEQUATE_SECURITY and a text
/// (RFC 9113, sections 6.5, 6.8 and 7).
fn go_away(text: &[u8]) -> Vec<u8> {
    const SETTINGS: [u8; 9] = [0, 0, 0, 4, 0, 0, 0, 0, 0];
    const INADEQUATE_SECURITY: u32 = 0xc;
    let length = (8 + text.len() as u32).to_be_bytes();
    let last_stream = 0_u32.to_be_bytes();
    [&SETTINGS, &length[1..], &[7, 0], &last_stream, &last_stream, &INADEQUATE_SECURITY.to_be_bytes(), text].concat()
}

/// Lets a call through if its connection's certificate opens `door`.
///
/// # Errors
/// `PERMISSION_DENIED`, naming the role.
pub(crate) fn check_role(request: Request<()>, door: Door) -> Result<Request<()>, Status> {
    let certificates = request.peer_certs();
    let leaf = certificates.as_ref().and_then(|chain| chain.first());
    let role = leaf.map_or_else(|| Err("the connection has no certificate".to_owned()), Role::of_certificate);
    let refusal = match role {
        Ok(role) if role.may_call(door) => return Ok(request),
        Ok(role) => format!("a {role}'s certificate does not open {door:?}"),
        Err(reason) => format!("the certificate opens nothing: {reason}"),
    };
    warn!(peer = ?request.remote_addr(), "call refused: {refusal}");
    Err(Status::permission_denied(refusal))
}
