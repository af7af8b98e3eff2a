//! The one call to the node daemon, with the container's namespace as a descriptor.
//!
//! The descriptor travels before the HTTP/2 preface: one byte 0x01 with SCM_RIGHTS. So the daemon needs neither our
//! mount namespace nor our process to reach the container, and trusts no path. It gets the path too: if that leads to the
//! container much later, its end of the link can follow the underlay's MTU.

use std::fs::File;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Response, Status};
use weft_model::profile::Digest;
use weft_model::reason::Reason;
use weft_proto::convert;
use weft_proto::node::containers_client::ContainersClient;
use weft_proto::node::{
    self, AddKnownRequest, AddRequest, AddResponse, CheckRequest, CollectRequest, DeleteRequest, ReadyRequest,
};
use weft_proto::status::reason_of;

use crate::environment::{Attachment, Command};
use crate::netconf::{Addition, NetConf, Version};
use crate::output;
use crate::previous::Ours;

/// A daemon that is there accepts at once; a runtime must hear within a second that it is not.
const CONNECT: Duration = Duration::from_millis(800);
/// A daemon that is there but does not run, stopped or stuck, answers no ping.
const PING: Duration = Duration::from_secs(2);
const PONG: Duration = Duration::from_secs(5);
/// For the whole call. The daemon has a shorter deadline of its own, so this one speaks only if the daemon hangs.
const CALL: Duration = Duration::from_secs(60);

/// Bytes of rules, some hundred of them, that cost more to send than to name.
const LONG: usize = 16 << 10;

/// What the daemon is asked for.
#[derive(Debug)]
pub(crate) enum Asked<'a> {
    Add(Attachment, Box<Addition<'a>>),
    Check(Attachment, Ours),
    Delete(Attachment),
    Collect(Vec<node::Attachment>),
    Ready,
}

impl Asked<'_> {
    fn namespace(&self) -> Option<&Path> {
        match self {
            Self::Add(attachment, _) | Self::Check(attachment, _) | Self::Delete(attachment) => {
                attachment.namespace.as_deref()
            }
            Self::Collect(_) | Self::Ready => None,
        }
    }
}

pub(crate) fn make(
    command: Command,
    conf: &NetConf,
    asked: Asked<'_>,
    version: Version,
) -> Result<Option<String>, Reason> {
    let namespace = open_namespace(command, asked.namespace())?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|why| Reason::File {
        operation: "set up".into(),
        path: "epoll".into(),
        why: why.to_string(),
    })?;
    runtime.block_on(async {
        let call = call(conf, asked, version, namespace);
        let late = || Reason::Deadline { operation: command.as_str().into() };
        tokio::time::timeout(CALL, call).await.unwrap_or_else(|_| Err(late()))
    })
}

/// A namespace that is gone is an error, but for DEL: what was in it is gone with it.
fn open_namespace(command: Command, path: Option<&Path>) -> Result<Option<OwnedFd>, Reason> {
    let Some(path) = path else { return Ok(None) };
    match File::open(path) {
        Ok(file) => Ok(Some(file.into())),
        Err(_) if command == Command::Del => Ok(None),
        Err(why) => Err(Reason::NamespaceGone { path: path.display().to_string(), why: why.to_string() }),
    }
}

async fn call(
    conf: &NetConf,
    asked: Asked<'_>,
    version: Version,
    namespace: Option<OwnedFd>,
) -> Result<Option<String>, Reason> {
    let away = |why: String| Reason::DaemonAway { socket: conf.socket.display().to_string(), why };
    let connected = tokio::time::timeout(CONNECT, connect(&conf.socket, namespace)).await;
    let channel = connected.map_err(|_| away("no answer in time".into()))?.map_err(away)?;
    let mut client = ContainersClient::new(channel);
    let path = asked.namespace().map(|path| path.display().to_string()).unwrap_or_default();
    let failed = |status: Status| match reason_of(&status) {
        // The daemon knows descriptors only; which path it was is known here.
        Some(Reason::NamespaceWrongKind { .. }) => Reason::NamespaceWrongKind { path: path.clone() },
        Some(Reason::NamespaceIsCells { .. }) => Reason::NamespaceIsCells { path: path.clone() },
        Some(reason) => reason,
        None if matches!(status.code(), Code::PermissionDenied | Code::Unauthenticated) => {
            Reason::NotYours { claimed: "the node daemon".into(), seen: status.message().into() }
        }
        None => away(status.message().to_owned()),
    };
    match asked {
        Asked::Add(Attachment { handle, interface, namespace }, addition) => {
            let request = AddRequest {
                handle: handle.to_string(),
                interface: interface.to_string(),
                mtu: addition.mtu,
                owner: Some(addition.owner),
                ports: convert::ports_to(&addition.ports),
                settings: Some(convert::settings_to(&addition.settings)),
                net_out_rules: Vec::new(),
                network: conf.name.clone(),
                receives: addition.bandwidth.to.map(convert::limit_to),
                sends: addition.bandwidth.from.map(convert::limit_to),
                namespace: path.clone(),
            };
            let added = add(&mut client, request, addition.net_out_rules).await.map_err(failed)?;
            let sandbox = namespace.as_deref().unwrap_or_else(|| Path::new(""));
            let Addition { nameservers, previous, .. } = *addition;
            Ok(Some(output::added(version, &added, &interface, sandbox, &nameservers, previous)))
        }
        Asked::Check(Attachment { handle, interface, .. }, ours) => {
            let request = CheckRequest {
                handle: handle.to_string(),
                interface: interface.to_string(),
                address: ours.address.map_or(0, u32::from),
                mtu: ours.mtu.unwrap_or_default(),
                without_default_route: ours.without_default_route,
            };
            client.check(request).await.map(|_| None).map_err(failed)
        }
        Asked::Delete(Attachment { handle, interface, .. }) => {
            let request = DeleteRequest { handle: handle.to_string(), interface: interface.to_string() };
            client.delete(request).await.map(|_| None).map_err(failed)
        }
        Asked::Collect(valid) => {
            let request = CollectRequest { network: conf.name.clone(), valid };
            client.collect(request).await.map(|_| None).map_err(failed)
        }
        Asked::Ready => client.ready(ReadyRequest {}).await.map(|_| None).map_err(failed),
    }
}

/// A long list is named at first: the node knows most of them, and need not be sent them.
async fn add(
    client: &mut ContainersClient<Channel>,
    request: AddRequest,
    rules: &[u8],
) -> Result<AddResponse, Status> {
    if rules.len() > LONG {
        let net_out_rules = Digest::of_bytes(rules).to_bytes().into();
        let known = AddKnownRequest { add: Some(request.clone()), net_out_rules };
        match client.add_known(known).await {
            Err(status) if is_unknown(&status) => {}
            answer => return answer.map(Response::into_inner),
        }
    }
    let request = AddRequest { net_out_rules: rules.to_vec(), ..request };
    client.add(request).await.map(Response::into_inner)
}

/// The rules, to the node; or the call, to one of another version.
fn is_unknown(status: &Status) -> bool {
    matches!(status.code(), Code::NotFound | Code::Unimplemented) && reason_of(status).is_none()
}

async fn connect(socket: &Path, namespace: Option<OwnedFd>) -> Result<Channel, String> {
    let (socket, namespace) = (socket.to_owned(), namespace.map(Arc::new));
    let connector = tower::service_fn(move |_| {
        let (socket, namespace) = (socket.clone(), namespace.clone());
        async move {
            let stream = UnixStream::connect(socket).await?;
            if let Some(namespace) = namespace {
                stream.writable().await?;
                send_descriptor(&stream, &namespace)?;
            }
            Ok::<_, io::Error>(TokioIo::new(stream))
        }
    });
    // The name stands for nothing: the connector decides where to.
    let endpoint =
        Endpoint::from_static("http://weft-node").http2_keep_alive_interval(PING).keep_alive_timeout(PONG);
    let connected = endpoint.connect_with_connector(connector).await;
    connected.map_err(|error| {
        let mut why: &dyn std::error::Error = &error;
        while let Some(source) = why.source() {
            why = source;
        }
        why.to_string()
    })
}

fn send_descriptor(stream: &UnixStream, namespace: &OwnedFd) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let descriptors = [namespace.as_fd()];
    if !control.push(SendAncillaryMessage::ScmRights(&descriptors)) {
        return Err(io::Error::other("no room for one descriptor"));
    }
    sendmsg(stream, &[IoSlice::new(&[1])], &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}
