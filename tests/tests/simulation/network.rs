//! Connections of the simulated network, as gRPC takes them.

use std::{
    io,
    net::Ipv4Addr,
    pin::Pin,
    task::{Context, Poll},
};

use futures::{Stream, stream};
use hyper_util::rt::TokioIo;
use phalanx_worker::join::Dialling;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tonic::transport::{Endpoint, Uri, server::Connected};
use turmoil::net::{TcpListener, TcpStream};

/// Where the coordinator listens.
pub(crate) const PORT: u16 = 50051;
/// Its host.
pub(crate) const COORDINATOR: &str = "coordinator";

/// One accepted connection.
pub(crate) struct Wire(TcpStream);

impl Connected for Wire {
    type ConnectInfo = ();

    fn connect_info(&self) {}
}

impl AsyncRead for Wire {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(context, buffer)
    }
}

impl AsyncWrite for Wire {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(context)
    }
}

/// Opens the coordinator's door.
pub(crate) async fn listen() -> io::Result<impl Stream<Item = io::Result<Wire>> + Send> {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT)).await?;
    Ok(stream::unfold(listener, |listener| async move {
        let accepted = listener.accept().await.map(|(stream, _)| Wire(stream));
        Some((accepted, listener))
    }))
}

/// Connects over the simulated network.
pub(crate) fn dial(endpoint: Endpoint) -> Dialling {
    let connect = |uri: Uri| async move {
        let (host, port) = (uri.host().unwrap_or(COORDINATOR).to_owned(), uri.port_u16().unwrap_or(PORT));
        TcpStream::connect((host, port)).await.map(TokioIo::new)
    };
    Box::pin(async move { endpoint.connect_with_connector(tower::service_fn(connect)).await })
}
