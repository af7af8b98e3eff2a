//! A policy server that speaks the internal protocol of cf-networking-release's `policy-server-internal`:
//! mutual TLS, HTTP/1.1, bodies of JSON that call themselves text; with faults on demand. It owns one thread
//! and a listening socket in the place it was made for; its state is a value that tests change. As with the real
//! one, TLS 1.2 is spoken with ECDHE-RSA-AES128-GCM-SHA256 only, and its key is RSA.

mod http;
mod state;

use std::collections::BTreeMap;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig, SupportedProtocolVersion};
use tokio::sync::oneshot;
use tokio_rustls::TlsAcceptor;

use crate::netns::Place;
use crate::pki::{Authority, IdentityFiles};
use crate::prober::patiently;

pub use state::{Policy, SecurityGroup, State};

/// The name that clients expect in its certificate.
pub const NAME: &str = "policy-server.service.cf.internal";
pub const PORT: u16 = 4003;
/// Of its certificate.
pub(crate) const KEY: &str = include_str!("policy_server/key.pem");

/// What can be asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Route {
    Policies,
    PoliciesLastUpdated,
    SecurityGroups,
    SecurityGroupsLastUpdated,
    Tags,
}

impl Route {
    pub const ALL: [Self; 5] = [
        Self::Policies,
        Self::PoliciesLastUpdated,
        Self::SecurityGroups,
        Self::SecurityGroupsLastUpdated,
        Self::Tags,
    ];
}

/// What goes wrong with every answer of a route. For a refused connection: [`PolicyServer::stop`]; for rules
/// that do not parse and a clock that goes back: the [`State`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The right answer, late.
    Slow(Duration),
    /// 500 with a description.
    Error,
    /// 500 with a list of nothing, or the time 0.
    EmptyError,
    /// 200 with a page of HTML.
    Garbage,
    /// Half of the body, then the end of the connection.
    Truncated,
    /// Half of the headers, then the end of the connection.
    DropInHeaders,
}

/// Its files: PEM.
#[derive(Debug, Clone)]
pub struct Files {
    pub ca: PathBuf,
    pub server: IdentityFiles,
    /// With which a client may ask.
    pub client: IdentityFiles,
}

impl Files {
    /// Where [`Files::write`] and a lab put them.
    pub fn at(directory: &Path) -> Self {
        let identity = |stem: &str| IdentityFiles {
            certificate: directory.join(format!("{stem}.pem")),
            key: directory.join(format!("{stem}.key")),
        };
        Self { ca: directory.join("ca.pem"), server: identity("policy-server"), client: identity("client") }
    }

    fn write(authority: &Authority, directory: &Path, address: Ipv4Addr) -> Result<Self> {
        authority.write(&directory.join("ca.pem"))?;
        authority.policy_server(address.into())?.write(directory, "policy-server")?;
        authority.node()?.write(directory, "client")?;
        Ok(Self::at(directory))
    }
}

#[derive(Debug)]
pub struct PolicyServer {
    pub address: SocketAddrV4,
    pub files: Files,
    place: Place,
    served: Arc<Served>,
    running: Mutex<Option<Running>>,
    versions: Mutex<&'static [&'static SupportedProtocolVersion]>,
    /// Removed last.
    _temporary: Option<tempfile::TempDir>,
}

#[derive(Debug)]
struct Running {
    end: oneshot::Sender<()>,
    thread: JoinHandle<()>,
}

/// What tests and connections share.
#[derive(Debug)]
struct Served {
    state: Mutex<State>,
    asked: Mutex<Asked>,
}

#[derive(Debug, Default)]
struct Asked {
    total: u64,
    by_route: BTreeMap<Route, Times>,
    faults: BTreeMap<Route, Fault>,
}

/// Of one route.
#[derive(Debug, Default)]
struct Times {
    asked: u64,
    /// Bytes of the right answers' bodies.
    answered: u64,
    last_query: String,
}

impl PolicyServer {
    /// A server with an authority of its own, on a free port of the loopback of this thread's network.
    pub fn scratch() -> Result<Self> {
        let temporary = tempfile::tempdir().context("make a temporary directory")?;
        let files = Files::write(&Authority::new("scratch")?, temporary.path(), Ipv4Addr::LOCALHOST)?;
        let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).and_then(|listener| listener.local_addr())?;
        let address = SocketAddrV4::new(Ipv4Addr::LOCALHOST, free.port());
        let place = Place::at("/proc/thread-self/ns/net".into(), None);
        let mut server = Self::make(&place, address, files)?;
        server._temporary = Some(temporary);
        Ok(server)
    }

    /// A server in a place. It knows nothing yet.
    pub fn make(place: &Place, address: SocketAddrV4, files: Files) -> Result<Self> {
        let server = Self {
            address,
            files,
            place: place.clone(),
            served: Arc::new(Served {
                state: Mutex::new(State::starting_at(unix_nanoseconds()?)),
                asked: Mutex::default(),
            }),
            running: Mutex::default(),
            versions: Mutex::new(rustls::ALL_VERSIONS),
            _temporary: None,
        };
        server.start()?;
        Ok(server)
    }

    /// Speaks these versions of TLS only, from the next [`start`](Self::start) on.
    pub fn speak(&self, versions: &'static [&'static SupportedProtocolVersion]) {
        *lock(&self.versions) = versions;
    }

    /// By address: names are not resolved in a lab.
    pub fn url(&self) -> String {
        format!("https://{}", self.address)
    }

    /// Starts it, also after a [`stop`](Self::stop), with what it knew; reads its files again.
    pub fn start(&self) -> Result<()> {
        self.stop();
        let tls = TlsAcceptor::from(Arc::new(tls(&self.files, *lock(&self.versions))?));
        // A socket stays in the namespace in which it was opened; who accepts on it may be anywhere.
        let listener = self.place.enter(|| patiently(|| TcpListener::bind(self.address)))?;
        let listener = listener.with_context(|| format!("listen on {}", self.address))?;
        listener.set_nonblocking(true)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (end, ended) = oneshot::channel();
        let served = Arc::clone(&self.served);
        let thread = std::thread::spawn(move || {
            // With the runtime every connection ends.
            let accepted = runtime.block_on(async {
                tokio::select! {
                    accepted = accept(listener, tls, served) => accepted,
                    _ = ended => Ok(()),
                }
            });
            if let Err(error) = accepted {
                eprintln!("policy server: {error}");
            }
        });
        *lock(&self.running) = Some(Running { end, thread });
        Ok(())
    }

    /// Ends every connection; from now on they are refused.
    pub fn stop(&self) {
        if let Some(running) = lock(&self.running).take() {
            drop(running.end);
            drop(running.thread.join());
        }
    }

    /// Changes what it knows, between two answers.
    pub fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> Result<T> {
        let now = unix_nanoseconds()?;
        Ok(self.served.with(|state| {
            state.set_now(now);
            change(state)
        }))
    }

    /// From now on this goes wrong with a route; or nothing any more.
    pub fn set_fault(&self, route: Route, fault: impl Into<Option<Fault>>) {
        let mut asked = lock(&self.served.asked);
        match fault.into() {
            Some(fault) => asked.faults.insert(route, fault),
            None => asked.faults.remove(&route),
        };
    }

    /// As [`set_fault`](Self::set_fault), for every route.
    pub fn set_fault_everywhere(&self, fault: impl Into<Option<Fault>>) {
        let fault = fault.into();
        Route::ALL.into_iter().for_each(|route| self.set_fault(route, fault));
    }

    /// How often a route was asked, faults included.
    pub fn asked(&self, route: Route) -> u64 {
        lock(&self.served.asked).by_route.get(&route).map_or(0, |times| times.asked)
    }

    /// Bytes of all that was answered on a route, but for headers; what a fault does to it does not count.
    pub fn answered(&self, route: Route) -> u64 {
        lock(&self.served.asked).by_route.get(&route).map_or(0, |times| times.answered)
    }

    /// What was behind the `?` when a route was last asked.
    pub fn last_query(&self, route: Route) -> Option<String> {
        lock(&self.served.asked).by_route.get(&route).map(|times| times.last_query.clone())
    }
}

impl Drop for PolicyServer {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Served {
    fn with<T>(&self, work: impl FnOnce(&mut State) -> T) -> T {
        work(&mut lock(&self.state))
    }

    /// Counts a request; returns its number, and what is to go wrong with it.
    fn note(&self, route: Option<Route>, query: &str) -> (u64, Option<Fault>) {
        let mut asked = lock(&self.asked);
        asked.total += 1;
        let Some(route) = route else { return (asked.total, None) };
        let times = asked.by_route.entry(route).or_default();
        times.asked += 1;
        query.clone_into(&mut times.last_query);
        (asked.total, asked.faults.get(&route).copied())
    }

    fn note_answer(&self, route: Route, body: &str) {
        let bytes = u64::try_from(body.len()).unwrap_or(u64::MAX);
        lock(&self.asked).by_route.entry(route).or_default().answered += bytes;
    }
}

async fn accept(listener: TcpListener, tls: TlsAcceptor, served: Arc<Served>) -> io::Result<()> {
    let listener = tokio::net::TcpListener::from_std(listener)?;
    loop {
        let (stream, _): (_, SocketAddr) = listener.accept().await?;
        let (tls, served) = (tls.clone(), Arc::clone(&served));
        tokio::spawn(async move {
            // A client that is refused, or leaves in the middle, learns of it itself.
            if let Ok(stream) = tls.accept(stream).await {
                drop(http::serve(stream, &served).await);
            }
        });
    }
}

fn tls(files: &Files, versions: &[&'static SupportedProtocolVersion]) -> Result<ServerConfig> {
    use rustls::crypto::ring::cipher_suite as suites;
    let provider = Arc::new(CryptoProvider {
        cipher_suites: vec![
            suites::TLS13_AES_128_GCM_SHA256,
            suites::TLS13_AES_256_GCM_SHA384,
            suites::TLS13_CHACHA20_POLY1305_SHA256,
            suites::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
        ],
        ..ring::default_provider()
    });
    let certificates = |file: &Path| -> Result<Vec<CertificateDer<'static>>> {
        let all = CertificateDer::pem_file_iter(file).and_then(Iterator::collect);
        all.with_context(|| format!("read {}", file.display()))
    };
    let mut roots = RootCertStore::empty();
    for root in certificates(&files.ca)? {
        roots.add(root)?;
    }
    let clients =
        WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider)).build()?;
    let key = PrivateKeyDer::from_pem_file(&files.server.key)
        .with_context(|| format!("read {}", files.server.key.display()))?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(versions)?
        .with_client_cert_verifier(clients)
        .with_single_cert(certificates(&files.server.certificate)?, key)?;
    // The server's order, as in Go; and no ALPN, whatever the client offers.
    config.ignore_client_order = true;
    Ok(config)
}

#[expect(clippy::disallowed_methods, reason = "the shell that owns the server's clock")]
fn unix_nanoseconds() -> Result<u64> {
    let elapsed = SystemTime::now().duration_since(UNIX_EPOCH).context("read the clock")?;
    u64::try_from(elapsed.as_nanos()).context("read the clock")
}

/// What a test that panicked left is still whole: nothing is changed in two steps.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
