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

use axum::{Router, body::Body, response::Response};
use hyper::{Request, body::Incoming, service::service_fn};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::{conn::auto::Builder, graceful::Watcher},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf},
    net::TcpStream,
    sync::{OwnedSemaphorePermit, oneshot},
    time::{sleep, timeout},
};
use tokio_rustls::TlsAcceptor;
use tower::ServiceExt;
use tracing::debug;

use crate::patience::Patient;

/// What a client is told whose header did not arrive in time.
const HEADER_TIMEOUT: &[u8] = b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: 129\r\n\r\n{\"error\":{\"message\":\"The header was not complete in time.\",\"type\":\"invalid_request_error\",\"param\":null,\"code\":\"header_timeout\"}}\n";
/// What a client is told that speaks HTTP where HTTPS is spoken.
const SPEAK_TLS: &[u8] = b"HTTP/1.1 400 Bad Request\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: 130\r\n\r\n{\"error\":{\"message\":\"This port speaks HTTPS; use https://.\",\"type\":\"invalid_request_error\",\"param\":null,\"code\":\"https_required\"}}\n";
/// How long the last words to a client may take.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// First byte of every TLS connection: a handshake record.
const HANDSHAKE: u8 = 0x16;

/// What a connection is served with.
pub(crate) struct Connection {
    pub(crate) router: Router,
    pub(crate) builder: Arc<Builder<TokioExecutor>>,
    pub(crate) watcher: Watcher,
    pub(crate) tls: Option<TlsAcceptor>,
    pub(crate) header_timeout: Duration,
    pub(crate) unread_timeout: Duration,
    pub(crate) _place: OwnedSemaphorePermit,
}

impl Connection {
    /// Serves a client until it leaves or is shown the door.
    pub(crate) async fn serve(mut self, stream: TcpStream) {
        let Some(acceptor) = self.tls.take() else { return self.speak(stream).await };
        match timeout(self.header_timeout, handshake(acceptor, stream)).await {
            Ok(Ok(stream)) => self.speak(stream).await,
            Ok(Err(error)) => debug!(%error, "handshake failed"),
            Err(_) => debug!("handshake not finished in time"),
        }
    }

    async fn speak<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(self, stream: S) {
        let Self { router, builder, watcher, header_timeout, unread_timeout, _place, .. } = self;
        let seen = Arc::new(AtomicBool::new(false));
        let mark = Arc::clone(&seen);
        let service = service_fn(move |request: Request<Incoming>| {
            mark.store(true, Ordering::Relaxed);
            answer(router.clone(), request)
        });
        let (lent, back) = Lent::new(Patient::new(stream, unread_timeout));
        let connection = Box::pin(watcher.watch(builder.serve_connection(TokioIo::new(lent), service).into_owned()));
        // The builder's own timeout begins when it knows the protocol, and a client may never say enough for that.
        let first_request = async {
            sleep(header_timeout + Duration::from_millis(500)).await;
            if seen.load(Ordering::Relaxed) {
                std::future::pending::<()>().await;
            }
        };
        // Either way the connection is dropped here, and its stream comes back.
        let timed_out = tokio::select! {
            result = connection => result.inspect_err(|error| debug!(%error, "connection ended")).is_err_and(is_timeout),
            () = first_request => true,
        };
        if timed_out && !seen.load(Ordering::Relaxed) {
            debug!(status = 408, "connection without a request");
            refuse_late(back).await;
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

fn is_timeout(error: Box<dyn std::error::Error + Send + Sync>) -> bool {
    error.downcast_ref::<hyper::Error>().is_some_and(hyper::Error::is_timeout)
}

/// Answers a client that began a header and did not end it. One that said nothing at all is not answered.
async fn refuse_late<S: AsyncWrite + Unpin>(back: oneshot::Receiver<(S, bool)>) {
    let Ok((mut stream, true)) = back.await else { return };
    let words = async {
        stream.write_all(HEADER_TIMEOUT).await?;
        stream.shutdown().await
    };
    if !matches!(timeout(LAST_WORDS, words).await, Ok(Ok(()))) {
        debug!("a slow client did not take its answer");
    }
}

/// A stream that comes back, with the word whether anything was read from it, when whoever has it drops it: hyper closes
/// a connection whose header is late without an answer.
struct Lent<S> {
    stream: Option<S>,
    was_read: bool,
    owner: Option<oneshot::Sender<(S, bool)>>,
}

impl<S> Lent<S> {
    fn new(stream: S) -> (Self, oneshot::Receiver<(S, bool)>) {
        let (owner, back) = oneshot::channel();
        (Self { stream: Some(stream), was_read: false, owner: Some(owner) }, back)
    }
}

impl<S: Unpin> Lent<S> {
    fn stream(&mut self) -> io::Result<Pin<&mut S>> {
        self.stream.as_mut().map(Pin::new).ok_or_else(|| io::ErrorKind::NotConnected.into())
    }
}

impl<S> Drop for Lent<S> {
    fn drop(&mut self) {
        if let (Some(stream), Some(owner)) = (self.stream.take(), self.owner.take()) {
            // Mostly nobody waits for it: the connection ended in order.
            let _ = owner.send((stream, self.was_read));
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Lent<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let result = self.stream()?.poll_read(cx, buffer);
        self.was_read |= buffer.filled().len() > before;
        result
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Lent<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.stream()?.poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stream()?.poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stream()?.poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.stream()?.poll_write_vectored(cx, bytes)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.as_ref().is_some_and(AsyncWrite::is_write_vectored)
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
