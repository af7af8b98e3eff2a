//! Who may talk to the daemon, and what a connection brings along.
//!
//! The first byte of a connection decides: `P` opens an HTTP/2 preface, and nothing is taken; 0x01 carries exactly
//! one descriptor by SCM_RIGHTS, and the preface follows. Anything else, or less than that within [`ADMISSION`], is refused.

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recv, recvmsg};
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::Connected;
use tracing::{debug, warn};

/// From accept to the end of the preface.
const ADMISSION: Duration = Duration::from_secs(2);
/// What every client of HTTP/2 sends first (RFC 9113, section 3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Before it, where a descriptor comes along.
const DESCRIPTOR: u8 = 1;
/// Connections at a time; the next ones wait in the socket's backlog.
const CONNECTIONS: usize = 512;

/// What a request's handler learns of its connection.
#[derive(Debug, Clone)]
pub(super) struct Peer(Arc<Mutex<Option<OwnedFd>>>);

impl Peer {
    /// The descriptor that the connection brought; the first taker gets it.
    pub(super) fn take_namespace(&self) -> Option<OwnedFd> {
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take()
    }
}

/// An admitted connection.
#[derive(Debug)]
pub(super) struct Admitted {
    stream: UnixStream,
    peer: Peer,
    _place: OwnedSemaphorePermit,
}

#[derive(Debug, thiserror::Error)]
enum Refused {
    #[error("uid {0} may not use this socket")]
    Uid(u32),
    #[error("nothing was sent in time")]
    Silent,
    #[error("it begins neither with a descriptor nor with HTTP/2: {0:02x?}")]
    Foreign(Vec<u8>),
    #[error("{0} descriptors came with the first byte instead of one")]
    Descriptors(usize),
    #[error("read what it begins with")]
    Read(#[source] io::Error),
}

/// Admitted connections. Ends never; accepting goes on after errors, which are about single connections.
pub(super) fn connections(listener: UnixListener) -> ReceiverStream<io::Result<Admitted>> {
    let (admitted, stream) = mpsc::channel(1);
    tokio::spawn(async move {
        let places = Arc::new(Semaphore::new(CONNECTIONS));
        while let Ok(place) = Arc::clone(&places).acquire_owned().await {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = admitted.closed() => return,
            };
            match accepted {
                Ok((stream, _)) => {
                    let admitted = admitted.clone();
                    tokio::spawn(async move {
                        match admit(stream, place).await {
                            Ok(connection) => drop(admitted.send(Ok(connection)).await),
                            Err(Refused::Uid(uid)) => warn!(uid, "connection refused"),
                            Err(why) => debug!(%why, "connection refused"),
                        }
                    });
                }
                Err(error) => {
                    // Out of descriptors: those in use become free as calls end.
                    warn!(%error, "accept failed");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    });
    ReceiverStream::new(stream)
}

async fn admit(stream: UnixStream, place: OwnedSemaphorePermit) -> Result<Admitted, Refused> {
    // Across PID namespaces a peer's pid reads 0; its uid is what the kernel vouches for.
    let uid = stream.peer_cred().map_err(Refused::Read)?.uid();
    if uid != 0 && uid != rustix::process::geteuid().as_raw() {
        return Err(Refused::Uid(uid));
    }
    let begins = tokio::time::timeout(ADMISSION, begins(&stream)).await;
    let namespace = begins.map_err(|_| Refused::Silent)??;
    Ok(Admitted { stream, peer: Peer(Arc::new(Mutex::new(namespace))), _place: place })
}

/// Waits for the whole preface, which stays; takes the descriptor that comes before it, if one does.
async fn begins(stream: &UnixStream) -> Result<Option<OwnedFd>, Refused> {
    let namespace = match peek::<1>(stream).await? {
        [DESCRIPTOR] => Some(descriptor(stream)?),
        _ => None,
    };
    // What is foreign is told by its first byte, so that nobody waits for more of it.
    let [first] = peek(stream).await?;
    if first != PREFACE[0] {
        return Err(Refused::Foreign(vec![first]));
    }
    let preface: [u8; PREFACE.len()] = peek(stream).await?;
    if preface != PREFACE { Err(Refused::Foreign(preface.to_vec())) } else { Ok(namespace) }
}

/// The next bytes, which stay.
async fn peek<const LENGTH: usize>(stream: &UnixStream) -> Result<[u8; LENGTH], Refused> {
    let mut bytes = [0; LENGTH];
    loop {
        let ready = stream.ready(Interest::READABLE).await.map_err(Refused::Read)?;
        let seen = stream.try_io(Interest::READABLE, || match recv(stream, &mut bytes, RecvFlags::PEEK)?.0 {
            seen if (1..LENGTH).contains(&seen) => Err(io::ErrorKind::WouldBlock.into()),
            seen => Ok(seen),
        });
        match seen {
            Ok(0) => return Err(Refused::Silent),
            Ok(_) => return Ok(bytes),
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => return Err(Refused::Read(error)),
            // Of a client that has closed its side no more comes, and there is nothing to wait for.
            Err(_) if ready.is_read_closed() => return Err(Refused::Silent),
            Err(_) => {}
        }
    }
}

/// Takes the first byte and what came with it. Descriptors beyond one are closed.
fn descriptor(stream: &UnixStream) -> Result<OwnedFd, Refused> {
    let mut byte = [0];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = recvmsg(stream, &mut [IoSliceMut::new(&mut byte)], &mut control, RecvFlags::CMSG_CLOEXEC);
    received.map_err(|errno| Refused::Read(errno.into()))?;
    let mut descriptors: Vec<OwnedFd> = control
        .drain()
        .filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
            _ => None,
        })
        .flatten()
        .collect();
    match (descriptors.len(), descriptors.pop()) {
        (1, Some(descriptor)) => Ok(descriptor),
        (n, _) => Err(Refused::Descriptors(n)),
    }
}

impl Connected for Admitted {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

impl AsyncRead for Admitted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Admitted {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
