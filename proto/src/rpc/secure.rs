//! Connections with TLS. Those without are tonic's own and do not come through here.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::{Semaphore, mpsc};
use tokio_rustls::{TlsAcceptor, TlsConnector};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::{Connected, TcpConnectInfo, TcpIncoming};

use super::tls::{TlsFiles, explained};

/// How long a handshake may take.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(5);

/// How long a client waits for the first word of the server, which follows its verdict on the client's certificate.
const FIRST_WORD_LIMIT: Duration = Duration::from_secs(2);

/// Handshakes at a time: whoever opens more without finishing any keeps nobody else out for longer than the limit.
const HANDSHAKES: usize = 64;

trait Bytes: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Bytes for T {}

/// A connection that is ready for gRPC.
pub(super) struct Secure {
    inner: Box<dyn Bytes>,
    /// Read already, and not handed on yet.
    first: Vec<u8>,
    local: Option<SocketAddr>,
    remote: Option<SocketAddr>,
}

impl std::fmt::Debug for Secure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Secure").field("remote", &self.remote).finish_non_exhaustive()
    }
}

impl Secure {
    fn new(inner: impl Bytes + 'static, tcp: (Option<SocketAddr>, Option<SocketAddr>)) -> Self {
        Self { inner: Box::new(inner), first: Vec::new(), local: tcp.0, remote: tcp.1 }
    }

    /// Connects, and finds out whether the server accepts us before anything is sent.
    pub(super) async fn connect(authority: &str, files: &TlsFiles) -> io::Result<Self> {
        let config = files.client_config().map_err(io::Error::other)?;
        let host = authority.rsplit_once(':').map_or(authority, |(host, _)| host);
        let name = ServerName::try_from(host.trim_matches(['[', ']']).to_owned());
        let name = name.map_err(|_| io::Error::other(format!("{host:?} is no name for TLS")))?;
        let tcp = TcpStream::connect(authority).await?;
        tcp.set_nodelay(true)?;
        let addresses = (tcp.local_addr().ok(), tcp.peer_addr().ok());
        let shaking = TlsConnector::from(Arc::new(config)).connect(name, tcp);
        let tls = tokio::time::timeout(HANDSHAKE_LIMIT, shaking)
            .await
            .map_err(|_| io::Error::other("no answer to the TLS handshake"))?
            .map_err(|error| io::Error::other(format!("TLS: {}", explained(&error))))?;
        let mut connection = Self::new(tls, addresses);
        connection.first_word().await?;
        Ok(connection)
    }

    /// A server of HTTP/2 speaks first. In TLS 1.3 a client only learns then whether its certificate was accepted.
    async fn first_word(&mut self) -> io::Result<()> {
        let mut bytes = vec![0; 256];
        let read = match tokio::time::timeout(FIRST_WORD_LIMIT, self.inner.read(&mut bytes)).await {
            // One that is slow is for those to judge who wait for an answer.
            Err(_) => return Ok(()),
            Ok(Ok(0)) => return Err(io::Error::other("the other side closes the connection at once")),
            Ok(Ok(read)) => read,
            Ok(Err(error)) => return Err(io::Error::other(format!("TLS: {}", explained(&error)))),
        };
        bytes.truncate(read);
        self.first = bytes;
        Ok(())
    }
}

/// Whether a server answers the first words of plain HTTP/2 as one does that expects TLS: with an alert, or not at all.
pub(super) async fn wants_tls(authority: &str) -> io::Result<bool> {
    const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    const TLS_ALERT: u8 = 0x15;
    let mut tcp = TcpStream::connect(authority).await?;
    tcp.write_all(PREFACE).await?;
    let mut first = [0];
    match tokio::time::timeout(FIRST_WORD_LIMIT, tcp.read(&mut first)).await {
        Err(_) => Ok(false),
        Ok(Ok(1)) => Ok(first[0] == TLS_ALERT),
        Ok(_) => Ok(true),
    }
}

/// What arrives, its handshake done. Whoever cannot be let in is logged and dropped.
pub(super) fn secured(incoming: TcpIncoming, files: TlsFiles) -> ReceiverStream<io::Result<Secure>> {
    arriving(incoming, files, false)
}

/// The same, and whoever speaks plain HTTP/2 is let in as well.
#[cfg(feature = "test-hooks")]
pub(super) fn secured_or_plain(incoming: TcpIncoming, files: TlsFiles) -> ReceiverStream<io::Result<Secure>> {
    arriving(incoming, files, true)
}

fn arriving(
    mut incoming: TcpIncoming,
    files: TlsFiles,
    plain_too: bool,
) -> ReceiverStream<io::Result<Secure>> {
    let (ready, stream) = mpsc::channel(16);
    let room = Arc::new(Semaphore::new(HANDSHAKES));
    tokio::spawn(async move {
        while let Some(next) = incoming.next().await {
            let tcp = match next {
                Ok(tcp) => tcp,
                Err(error) => {
                    tracing::debug!(%error, "accepting a connection failed");
                    continue;
                }
            };
            let Ok(place) = Arc::clone(&room).acquire_owned().await else { return };
            let (ready, files) = (ready.clone(), files.clone());
            tokio::spawn(async move {
                let peer = tcp.peer_addr().ok();
                match tokio::time::timeout(HANDSHAKE_LIMIT, accept(tcp, &files, plain_too)).await {
                    Ok(Ok(connection)) => {
                        drop(place);
                        // Closed: the server has ended.
                        let _ = ready.send(Ok(connection)).await;
                    }
                    Ok(Err(reason)) => tracing::warn!(?peer, reason, "a connection is refused"),
                    Err(_) => tracing::warn!(?peer, "a connection is refused: no handshake came"),
                }
            });
        }
    });
    ReceiverStream::new(stream)
}

async fn accept(tcp: TcpStream, files: &TlsFiles, plain_too: bool) -> Result<Secure, String> {
    let addresses = (tcp.local_addr().ok(), tcp.peer_addr().ok());
    let mut first = [0];
    if plain_too && tcp.peek(&mut first).await.is_ok() && first == *b"P" {
        return Ok(Secure::new(tcp, addresses));
    }
    let config = files.server_config()?;
    let tls = TlsAcceptor::from(Arc::new(config)).accept(tcp).await;
    tls.map(|tls| Secure::new(tls, addresses)).map_err(|error| explained(&error))
}

impl Connected for Secure {
    type ConnectInfo = TcpConnectInfo;

    fn connect_info(&self) -> TcpConnectInfo {
        TcpConnectInfo { local_addr: self.local, remote_addr: self.remote }
    }
}

impl AsyncRead for Secure {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if !self.first.is_empty() {
            let count = self.first.len().min(into.remaining());
            into.put_slice(&self.first[..count]);
            self.first.drain(..count);
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut self.inner).poll_read(context, into)
    }
}

impl AsyncWrite for Secure {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write_vectored(context, bytes)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(context)
    }
}
