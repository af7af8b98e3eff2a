//! Connections: TCP, then mutual TLS with certificates as they are on disk now.
//!
//! Woken by connections, each shaken hands with in a task of its own, and by a clock that looks whether the files have
//! changed. Connections that are open keep the certificates they were opened with.

use std::io;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio::time::{interval, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tracing::{debug, info, warn};
use weft_daemon::tls::{Files, Fingerprint, TlsError};

/// From a connection's start to the end of its handshake.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// Handshakes at a time: each costs about a millisecond of CPU.
const HANDSHAKES: usize = 64;
/// How often the certificate files are looked at.
const RELOAD: Duration = Duration::from_secs(5);

/// Certificates, and how to notice new ones.
#[derive(Debug)]
pub struct Certificates {
    files: Files,
    fingerprint: Fingerprint,
    server: Arc<rustls::ServerConfig>,
}

impl Certificates {
    pub fn load(files: Files) -> Result<Self, TlsError> {
        let fingerprint = files.fingerprint();
        let server = files.load(wall_clock())?.server_config()?;
        Ok(Self { files, fingerprint, server })
    }

    /// New files that cannot be used are reported once; the ones in use stay.
    fn reload(&mut self) {
        let Some(fingerprint) = self.files.changed_since(&self.fingerprint) else { return };
        self.fingerprint = fingerprint;
        match self.files.load(wall_clock()).and_then(|loaded| loaded.server_config()) {
            Ok(server) => {
                self.server = server;
                info!(certificate = %self.files.certificate.display(), "certificates reloaded");
            }
            Err(why) => warn!(%why, "new certificates not used"),
        }
    }
}

#[expect(clippy::disallowed_methods, reason = "certificates are valid in wall-clock time")]
fn wall_clock() -> SystemTime {
    SystemTime::now()
}

/// Connections whose clients have shown a certificate of the authority.
pub fn connections(
    listener: TcpListener,
    mut certificates: Certificates,
) -> ReceiverStream<io::Result<TlsStream<TcpStream>>> {
    let (accepted, connections) = mpsc::channel(HANDSHAKES);
    tokio::spawn(async move {
        let places = Arc::new(Semaphore::new(HANDSHAKES));
        let mut reload = interval(RELOAD);
        loop {
            let incoming = tokio::select! {
                _ = reload.tick() => {
                    certificates.reload();
                    continue;
                }
                () = accepted.closed() => return,
                incoming = listener.accept() => incoming,
            };
            let (stream, peer) = match incoming {
                Ok(incoming) => incoming,
                Err(error) => {
                    warn!(%error, "accept failed");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
            let (acceptor, accepted) =
                (TlsAcceptor::from(Arc::clone(&certificates.server)), accepted.clone());
            tokio::spawn(async move {
                drop(stream.set_nodelay(true));
                match timeout(HANDSHAKE, acceptor.accept(stream)).await {
                    Ok(Ok(stream)) => drop(accepted.send(Ok(stream)).await),
                    Ok(Err(why)) => info!(%peer, %why, "connection refused"),
                    Err(_) => debug!(%peer, "no handshake in time"),
                }
                drop(place);
            });
        }
    });
    ReceiverStream::new(connections)
}
