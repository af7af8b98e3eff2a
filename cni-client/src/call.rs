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
use tonic::{Code, Status};
use weft_model::reason::Reason;
use weft_proto::convert;
use weft_proto::node::containers_client::ContainersClient;
use weft_proto::node::{AddRequest, CheckRequest, DeleteRequest};
use weft_proto::status::reason_of;

use crate::environment::{Command, Environment};
use crate::netconf::{Addition, NetConf, Version};
use crate::output;

/// A daemon that is there accepts at once; a runtime must hear within a second that it is not.
const CONNECT: Duration = Duration::from_millis(800);
/// A daemon that is there but does not run, stopped or stuck, answers no ping.
const PING: Duration = Duration::from_secs(2);
const PONG: Duration = Duration::from_secs(5);
/// For the whole call. The daemon has a shorter deadline of its own, so this one speaks only if the daemon hangs.
const CALL: Duration = Duration::from_secs(60);

/// What the daemon is asked for.
#[derive(Debug)]
pub(crate) enum Asked {
    Add(Box<Addition>),
    Check,
    Delete,
}

pub(crate) fn make(
    environment: &Environment,
    conf: &NetConf,
    asked: Asked,
    version: Version,
) -> Result<Option<String>, Reason> {
    if environment.command == Command::Check && version < Version::V0_4_0 {
        let why = format!("version {} of the specification has no CHECK, 0.4.0 has", version.as_str());
        return Err(Reason::InvalidField { field: "cniVersion".into(), why });
    }
    let namespace = open_namespace(environment)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|why| Reason::File {
        operation: "set up".into(),
        path: "epoll".into(),
        why: why.to_string(),
    })?;
    runtime.block_on(async {
        let call = call(environment, conf, asked, version, namespace);
        let late = || Reason::Deadline { operation: format!("{:?}", environment.command).to_uppercase() };
        tokio::time::timeout(CALL, call).await.unwrap_or_else(|_| Err(late()))
    })
}

/// A namespace that is gone is an error, but for DEL: what was in it is gone with it.
fn open_namespace(environment: &Environment) -> Result<Option<OwnedFd>, Reason> {
    let Some(path) = &environment.namespace else { return Ok(None) };
    match File::open(path) {
        Ok(file) => Ok(Some(file.into())),
        Err(_) if environment.command == Command::Del => Ok(None),
        Err(why) => Err(Reason::NamespaceGone { path: path.display().to_string(), why: why.to_string() }),
    }
}

async fn call(
    environment: &Environment,
    conf: &NetConf,
    asked: Asked,
    version: Version,
    namespace: Option<OwnedFd>,
) -> Result<Option<String>, Reason> {
    let away = |why: String| Reason::DaemonAway { socket: conf.socket.display().to_string(), why };
    let connected = tokio::time::timeout(CONNECT, connect(&conf.socket, namespace)).await;
    let channel = connected.map_err(|_| away("no answer in time".into()))?.map_err(away)?;
    let mut client = ContainersClient::new(channel);
    let (handle, interface) = (environment.handle.to_string(), environment.interface.to_string());
    let failed = |status: Status| match reason_of(&status) {
        // The daemon knows descriptors only; which path it was is known here.
        Some(Reason::NamespaceWrongKind { .. }) => Reason::NamespaceWrongKind { path: path(environment) },
        Some(Reason::NamespaceIsCells { .. }) => Reason::NamespaceIsCells { path: path(environment) },
        Some(reason) => reason,
        None if matches!(status.code(), Code::PermissionDenied | Code::Unauthenticated) => {
            Reason::NotYours { claimed: "the node daemon".into(), seen: status.message().into() }
        }
        None => away(status.message().to_owned()),
    };
    match asked {
        Asked::Add(addition) => {
            let request = AddRequest {
                handle,
                interface,
                mtu: addition.mtu,
                owner: Some(addition.owner),
                ports: convert::ports_to(&addition.ports),
                settings: Some(convert::settings_to(&addition.settings)),
                net_out_rules: addition.net_out_rules,
                receives: addition.bandwidth.to.map(convert::limit_to),
                sends: addition.bandwidth.from.map(convert::limit_to),
                namespace: path(environment),
            };
            let added = client.add(request).await.map_err(failed)?.into_inner();
            let sandbox = environment.namespace.as_deref().unwrap_or_else(|| Path::new(""));
            let nameservers = &addition.nameservers;
            Ok(Some(output::added(version, &added, &environment.interface, sandbox, nameservers)))
        }
        Asked::Check => {
            let address = conf.address.map_or(0, u32::from);
            client.check(CheckRequest { handle, interface, address }).await.map_err(failed)?;
            Ok(None)
        }
        Asked::Delete => {
            client.delete(DeleteRequest { handle, interface }).await.map_err(failed)?;
            Ok(None)
        }
    }
}

fn path(environment: &Environment) -> String {
    environment.namespace.as_ref().map(|path| path.display().to_string()).unwrap_or_default()
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
