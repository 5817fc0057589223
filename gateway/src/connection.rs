//! One connection: the handshake if there is one, its requests, and what a client that never finishes is told.

use std::{
    convert::Infallible,
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use axum::{
    Router,
    body::{Body, Bytes},
    response::Response,
};
use hyper::{
    Request,
    body::Incoming,
    server::conn::{http1, http2},
    service::service_fn,
};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::graceful::Watcher,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf},
    net::TcpStream,
    sync::OwnedSemaphorePermit,
    time::{sleep, timeout},
};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;
use tracing::debug;

use crate::patience::Patient;

/// What a client is told whose header did not arrive in time.
const HEADER_TIMEOUT: &[u8] = b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: 129\r\n\r\n{\"error\":{\"message\":\"The header was not complete in time.\",\"type\":\"invalid_request_error\",\"param\":null,\"code\":\"header_timeout\"}}\n";
/// What a client is told that speaks HTTP where HTTPS is spoken.
const SPEAK_TLS: &[u8] = b"HTTP/1.1 400 Bad Request\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: 130\r\n\r\n{\"error\":{\"message\":\"This port speaks HTTPS; use https://.\",\"type\":\"invalid_request_error\",\"param\":null,\"code\":\"https_required\"}}\n";
/// Room for what is read of a header at a time, in bytes.
const LEAST_READ: usize = 512;
/// How long the last words to a client may take.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// Largest header of a request, in bytes.
pub(crate) const MAX_HEADER_BYTES: usize = 64 << 10;
/// How every connection that speaks HTTP/2 begins.
const HTTP2: &[u8] = b"PRI * HTTP/2";
/// First byte of every TLS connection: a handshake record.
const HANDSHAKE: u8 = 0x16;

/// How each protocol is spoken.
pub(crate) struct Protocols {
    pub(crate) http1: http1::Builder,
    pub(crate) http2: http2::Builder<TokioExecutor>,
}

/// What a connection is served with.
pub(crate) struct Connection {
    pub(crate) router: Router,
    pub(crate) protocols: Arc<Protocols>,
    pub(crate) watcher: Watcher,
    pub(crate) shutdown: CancellationToken,
    pub(crate) tls: Option<TlsAcceptor>,
    pub(crate) header_timeout: Duration,
    pub(crate) unread_timeout: Duration,
    pub(crate) _place: OwnedSemaphorePermit,
}

impl Connection {
    /// Serves a client until it leaves or is shown the door.
    pub(crate) async fn serve(mut self, stream: TcpStream) {
        match self.tls.take() {
            None => self.speak(stream).await,
            // Boxed, so that other connections need not keep room for it.
            Some(acceptor) => Box::pin(self.speak_tls(acceptor, stream)).await,
        }
    }

    async fn speak_tls(self, acceptor: TlsAcceptor, stream: TcpStream) {
        match timeout(self.header_timeout, handshake(acceptor, stream)).await {
            Ok(Ok(stream)) => self.speak(stream).await,
            Ok(Err(error)) => debug!(%error, "handshake failed"),
            Err(_) => debug!("handshake not finished in time"),
        }
    }

    async fn speak<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(self, mut stream: S) {
        let mut head = Vec::new();
        match timeout(self.header_timeout, read_head(&mut stream, &mut head, &self.shutdown)).await {
            Ok(Ok(true)) => {}
            Ok(Ok(false)) => return,
            Ok(Err(error)) => return debug!(%error, "connection ended"),
            Err(_) => {
                debug!(status = 408, "connection without a request");
                // One that said nothing at all is not answered.
                if !head.is_empty() {
                    refuse_late(stream).await;
                }
                return;
            }
        }
        let is_http2 = head.starts_with(HTTP2);
        let stream = Patient::new(Rewound { head: head.into(), stream }, self.unread_timeout);
        let (router, seen) = (self.router, Arc::new(AtomicBool::new(false)));
        let mark = Arc::clone(&seen);
        let service = service_fn(move |request: Request<Incoming>| {
            mark.store(true, Ordering::Relaxed);
            answer(router.clone(), request)
        });
        let connection: Pin<Box<dyn Future<Output = hyper::Result<()>> + Send>> = if is_http2 {
            Box::pin(self.watcher.watch(self.protocols.http2.serve_connection(TokioIo::new(stream), service)))
        } else {
            Box::pin(self.watcher.watch(self.protocols.http1.serve_connection(TokioIo::new(stream), service)))
        };
        // hyper gives HTTP/2 clients all the time they want.
        let first_request = async {
            sleep(self.header_timeout).await;
            if seen.load(Ordering::Relaxed) {
                std::future::pending::<()>().await;
            }
        };
        tokio::select! {
            ended = connection => if let Err(error) = ended {
                debug!(%error, "connection ended");
            },
            () = first_request => debug!("connection without a request"),
        }
    }
}

/// Reads a first header, or as much as shows that it is none; `false` where nothing will come. hyper would take more
/// than 20 KiB for each client that never finishes its header, and end its connection without a word.
async fn read_head<S: AsyncRead + Unpin>(
    stream: &mut S,
    head: &mut Vec<u8>,
    shutdown: &CancellationToken,
) -> io::Result<bool> {
    loop {
        let read = head.len();
        head.reserve(LEAST_READ);
        let length = tokio::select! {
            length = stream.read_buf(head) => length?,
            () = shutdown.cancelled(), if head.is_empty() => return Ok(false),
        };
        if length == 0 {
            return Ok(!head.is_empty());
        }
        // The end may have begun in what was read before.
        let from = read.saturating_sub(2);
        let ends = |end: &[u8]| head[from..].windows(end.len()).any(|bytes| bytes == end);
        let begins_a_request = head[0].is_ascii_alphabetic() && !head.starts_with(HTTP2);
        if !begins_a_request || ends(b"\n\r\n") || ends(b"\n\n") || head.len() > MAX_HEADER_BYTES {
            return Ok(true);
        }
    }
}

async fn handshake(
    acceptor: TlsAcceptor,
    mut stream: TcpStream,
) -> io::Result<tokio_rustls::server::TlsStream<TcpStream>> {
    let mut first = [0];
    if stream.peek(&mut first).await? == 1 && first[0] != HANDSHAKE {
        stream.write_all(SPEAK_TLS).await?;
        stream.shutdown().await?;
        return Err(io::Error::new(io::ErrorKind::InvalidData, "the client does not speak TLS"));
    }
    acceptor.accept(stream).await
}

async fn answer(router: Router, request: Request<Incoming>) -> Result<Response, Infallible> {
    router.oneshot(request.map(Body::new)).await
}

/// Answers a client that began a header and did not end it.
async fn refuse_late<S: AsyncWrite + Unpin>(mut stream: S) {
    let words = async {
        stream.write_all(HEADER_TIMEOUT).await?;
        stream.shutdown().await
    };
    if !matches!(timeout(LAST_WORDS, words).await, Ok(Ok(()))) {
        debug!("a slow client did not take its answer");
    }
}

/// A stream of which the beginning was read already.
struct Rewound<S> {
    head: Bytes,
    stream: S,
}

impl<S: AsyncRead + Unpin> AsyncRead for Rewound<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.head.is_empty() {
            return Pin::new(&mut self.stream).poll_read(cx, buffer);
        }
        let length = self.head.len().min(buffer.remaining());
        buffer.put_slice(&self.head.split_to(length));
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Rewound<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bytes)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fixed_answers_have_the_length_that_they_name() {
        for answer in [HEADER_TIMEOUT, SPEAK_TLS] {
            let (head, body) = std::str::from_utf8(answer).unwrap().split_once("\r\n\r\n").unwrap();
            let length = head.split("content-length: ").nth(1).unwrap();
            assert_eq!(length.parse(), Ok(body.len()), "{body}");
        }
    }
}
