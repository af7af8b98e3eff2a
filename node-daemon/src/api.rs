//! The daemon's API on its Unix socket.
//!
//! Owns the socket and its directory. Woken by connections, each admitted in a task of its own ([`admit`]), so that
//! a slow client delays nobody. Emits decoded calls ([`Calls`]); whether the container's namespace is one, and not
//! the cell's own, is known before a call goes further, and so is what its security groups come to ([`Profiles`]).

mod admit;

use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::mem;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::net::UnixListener;
use tonic::{Extensions, Request, Response, Status};
use weft_model::address::OverlayAddr;
use weft_model::asg::garden;
use weft_model::cell::Wanted;
use weft_model::reason::Reason;
use weft_proto::node::containers_server::{Containers, ContainersServer};
use weft_proto::node::{
    AddKnownRequest, AddRequest, AddResponse, CheckRequest, CheckResponse, CollectRequest, CollectResponse,
    DeleteRequest, DeleteResponse, ExplainRequest, ExplainResponse, ReadyRequest, ReadyResponse,
    StatusRequest, StatusResponse,
};
use weft_proto::{convert, status::to_status};

use crate::calls::{Calls, Remembered, Valid};
use crate::inbox::{Question, Sender};
use crate::profiles::{Passed, Profiles};
use admit::Peer;

/// Bytes of a request: a list of rules, and room for all else.
const MAX_REQUEST: usize = garden::MAX_BYTES + (1 << 20);

/// Calls at a time on one connection: a client has one, and a flood of them takes no more memory than its connections do.
const STREAMS: u32 = 2;
/// A connection whose client says nothing for so long is asked whether it is there, and ended if it is silent for as long
/// again: a client that waits for a call's answer says so, and one that is stopped holds its place no longer.
const SILENCE: Duration = Duration::from_secs(5);

#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    #[error("socket {0}: the path has no directory")]
    NoDirectory(PathBuf),
    #[error("create the socket's directory {path}")]
    CreateDirectory {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(
        "the socket's directory {path} belongs to uid {uid} with mode {mode:o}; make it mode 700 and our own"
    )]
    UnsafeDirectory { path: PathBuf, uid: u32, mode: u32 },
    #[error("socket {0}: another daemon answers there")]
    InUse(PathBuf),
    #[error("socket {0}: something that is no socket is there")]
    NotASocket(PathBuf),
    #[error("listen on socket {path}")]
    Listen {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("look at our own network namespace")]
    OwnNamespace(#[source] io::Error),
    #[error("serve the API")]
    Serve(#[source] tonic::transport::Error),
}

/// The bound socket: nobody else answers there.
#[derive(Debug)]
pub struct Socket {
    listener: UnixListener,
    own_namespace: Identity,
}

/// Which namespace a descriptor stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Identity {
    device: u64,
    inode: u64,
}

impl Socket {
    /// Makes the directory, mode 0700, and the socket in it, mode 0600. A socket left by a daemon that died is
    /// replaced. Must be called within a tokio runtime.
    pub fn bind(path: &Path) -> Result<Self, ApiError> {
        let directory = path.parent().ok_or_else(|| ApiError::NoDirectory(path.to_owned()))?;
        let created = DirBuilder::new().recursive(true).mode(0o700).create(directory);
        created.map_err(|source| ApiError::CreateDirectory { path: directory.to_owned(), source })?;
        let listen = |source| ApiError::Listen { path: path.to_owned(), source };
        let metadata = fs::metadata(directory).map_err(listen)?;
        let (uid, mode) = (metadata.uid(), metadata.mode() & 0o7777);
        if uid != rustix::process::geteuid().as_raw() || mode & 0o077 != 0 {
            return Err(ApiError::UnsafeDirectory { path: directory.to_owned(), uid, mode });
        }
        remove_stale(path)?;
        let listener = UnixListener::bind(path).map_err(listen)?;
        fs::set_permissions(path, Permissions::from_mode(0o600)).map_err(listen)?;
        let own = fs::metadata("/proc/thread-self/ns/net").map_err(ApiError::OwnNamespace)?;
        Ok(Self { listener, own_namespace: Identity { device: own.dev(), inode: own.ino() } })
    }

    /// Answers calls until `shutdown` is done; calls under way are finished.
    pub async fn serve(
        self,
        calls: impl Calls,
        shutdown: impl Future<Output = ()> + Send,
    ) -> Result<(), ApiError> {
        let api = Api { calls, own_namespace: self.own_namespace, profiles: Profiles::default() };
        let service = ContainersServer::new(api).max_decoding_message_size(MAX_REQUEST);
        let incoming = admit::connections(self.listener);
        let server = tonic::transport::Server::builder()
            .max_concurrent_streams(Some(STREAMS))
            .http2_keepalive_interval(Some(SILENCE))
            .http2_keepalive_timeout(Some(SILENCE))
            .add_service(service);
        server.serve_with_incoming_shutdown(incoming, shutdown).await.map_err(ApiError::Serve)
    }
}

fn remove_stale(path: &Path) -> Result<(), ApiError> {
    let listen = |source| ApiError::Listen { path: path.to_owned(), source };
    match fs::symlink_metadata(path) {
        Err(gone) if gone.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(source) => return Err(listen(source)),
        Ok(there) if !there.file_type().is_socket() => return Err(ApiError::NotASocket(path.to_owned())),
        Ok(_) => {}
    }
    match StdUnixStream::connect(path) {
        Ok(_) => Err(ApiError::InUse(path.to_owned())),
        Err(refused) if refused.kind() == io::ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(listen)
        }
        Err(source) => Err(listen(source)),
    }
}

#[derive(Debug)]
struct Api<C> {
    calls: C,
    own_namespace: Identity,
    profiles: Profiles,
}

impl<C: Calls> Api<C> {
    /// The container's namespace, as the connection brought it.
    fn namespace(&self, extensions: &Extensions) -> Result<OwnedFd, Reason> {
        let descriptor = extensions.get::<Peer>().and_then(Peer::take_namespace);
        let descriptor = descriptor.ok_or_else(|| Reason::InvalidField {
            field: "namespace".into(),
            why: "the connection brought no descriptor of the container's network namespace".into(),
        })?;
        self.check_namespace(&descriptor)?;
        Ok(descriptor)
    }

    async fn lay(&self, wanted: Wanted, namespace: OwnedFd) -> Result<Response<AddResponse>, Status> {
        let link = self.calls.add(wanted, namespace).await.map_err(|reason| to_status(&reason))?;
        Ok(Response::new(convert::added_to(&link)))
    }

    async fn wanted(&self, request: AddRequest) -> Result<Wanted, Reason> {
        let mut asked = convert::asked_from(request)?;
        let passed = Passed {
            workload: asked.owner.workload(),
            settings: mem::take(&mut asked.settings),
            net_out_rules: mem::take(&mut asked.net_out_rules),
        };
        let profile = self.profiles.get(passed, &asked.handle).await?;
        Ok(convert::wanted(asked, profile))
    }

    fn check_namespace(&self, descriptor: &OwnedFd) -> Result<(), Reason> {
        let path = || "the descriptor".to_owned();
        if !is_network_namespace(descriptor) {
            return Err(Reason::NamespaceWrongKind { path: path() });
        }
        let stat = rustix::fs::fstat(descriptor.as_fd()).map_err(|why| Reason::File {
            operation: "look at".into(),
            path: path(),
            why: why.to_string(),
        })?;
        if (Identity { device: stat.st_dev, inode: stat.st_ino }) == self.own_namespace {
            return Err(Reason::NamespaceIsCells { path: path() });
        }
        Ok(())
    }
}

/// ioctl_ns(2): NS_GET_NSTYPE gives the CLONE_ flag of the namespace's kind; other files answer with an error.
#[expect(
    unsafe_code,
    reason = "neither rustix nor nix has this ioctl, and a descriptor's name in /proc is its path"
)]
fn is_network_namespace(descriptor: &OwnedFd) -> bool {
    const NS_GET_NSTYPE: nix::libc::Ioctl = 0xb703;
    // SAFETY: takes no argument and writes no memory; the descriptor is open for as long as it is borrowed.
    let kind = unsafe { nix::libc::ioctl(descriptor.as_raw_fd(), NS_GET_NSTYPE) };
    kind == nix::libc::CLONE_NEWNET
}

#[tonic::async_trait]
impl<C: Calls> Containers for Api<C> {
    async fn add(&self, request: Request<AddRequest>) -> Result<Response<AddResponse>, Status> {
        let namespace = self.namespace(request.extensions()).map_err(|reason| to_status(&reason))?;
        let wanted = self.wanted(request.into_inner()).await.map_err(|reason| to_status(&reason))?;
        self.lay(wanted, namespace).await
    }

    async fn add_known(&self, request: Request<AddKnownRequest>) -> Result<Response<AddResponse>, Status> {
        let (_, extensions, AddKnownRequest { add, net_out_rules }) = request.into_parts();
        let known = convert::known_from(add, &net_out_rules).map_err(|reason| to_status(&reason))?;
        let (asked, rules) = known;
        let profile = self.profiles.known(asked.owner.workload(), &asked.settings, rules);
        let unknown = || Status::not_found("the rules are not known; they have to be passed");
        let wanted = convert::wanted(asked, profile.ok_or_else(unknown)?);
        let namespace = self.namespace(&extensions).map_err(|reason| to_status(&reason))?;
        self.lay(wanted, namespace).await
    }

    async fn check(&self, request: Request<CheckRequest>) -> Result<Response<CheckResponse>, Status> {
        let namespace = self.namespace(request.extensions()).map_err(|reason| to_status(&reason))?;
        let CheckRequest { handle, interface, address, mtu, without_default_route } = request.into_inner();
        let checked = async {
            let remembered = Remembered {
                handle: convert::handle_from(handle)?,
                interface: convert::interface_from(interface)?,
                addr: (address != 0).then(|| OverlayAddr::new(address.into())),
                mtu: (mtu != 0).then_some(mtu),
                default_route: !without_default_route,
            };
            self.calls.check(remembered, namespace).await
        };
        checked.await.map(|()| Response::new(CheckResponse {})).map_err(|reason| to_status(&reason))
    }

    async fn delete(&self, request: Request<DeleteRequest>) -> Result<Response<DeleteResponse>, Status> {
        // Nothing is done in the namespace; but a runtime that passes the cell's own has lost its way.
        let namespace = request.extensions().get::<Peer>().and_then(Peer::take_namespace);
        let own = namespace.map(|namespace| self.check_namespace(&namespace));
        if let Some(Err(reason @ Reason::NamespaceIsCells { .. })) = own {
            return Err(to_status(&reason));
        }
        let DeleteRequest { handle, interface } = request.into_inner();
        let deleted = async {
            let (handle, interface) = (convert::handle_from(handle)?, convert::interface_from(interface)?);
            self.calls.delete(handle, interface).await
        };
        deleted.await.map(|()| Response::new(DeleteResponse {})).map_err(|reason| to_status(&reason))
    }

    async fn collect(&self, request: Request<CollectRequest>) -> Result<Response<CollectResponse>, Status> {
        let CollectRequest { network, valid } = request.into_inner();
        let attachments = valid.into_iter().map(|one| (one.handle, one.interface)).collect();
        let collected = self.calls.collect(Valid { network, attachments }).await;
        collected.map(|()| Response::new(CollectResponse {})).map_err(|reason| to_status(&reason))
    }

    async fn ready(&self, _: Request<ReadyRequest>) -> Result<Response<ReadyResponse>, Status> {
        let ready = self.calls.ready().await;
        ready.map(|()| Response::new(ReadyResponse {})).map_err(|reason| to_status(&reason))
    }

    async fn explain(&self, request: Request<ExplainRequest>) -> Result<Response<ExplainResponse>, Status> {
        let request = request.into_inner();
        let explained = async {
            let probe = convert::probe_from(&request)?;
            let from = match request.from.parse() {
                Ok(addr) => Sender::Addr(addr),
                Err(_) => Sender::Container(convert::handle_from(request.from)?),
            };
            self.calls.explain(Question { from, to: request.to.into(), probe }).await
        };
        let explained = explained.await.map_err(|reason| to_status(&reason))?;
        Ok(Response::new(convert::explained_to(explained)))
    }

    async fn status(&self, _: Request<StatusRequest>) -> Result<Response<StatusResponse>, Status> {
        Ok(Response::new(self.calls.status().await))
    }
}
