//! A container's end of its link: laid and checked in the container's network namespace, on a thread that enters it
//! and ends. No container can hold up the cell's own task.

use std::io;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::thread;

use netlink_packet_route::link::{LinkAttribute, LinkFlags};
use netlink_sys::protocols::NETLINK_ROUTE;
use nix::sched::{CloneFlags, setns};
use rustix::fs::{CWD, Mode, OFlags, openat};
use tokio::sync::{Semaphore, oneshot};
use weft_model::link::{GATEWAY, LinkSpec};
use weft_model::reason::Reason;

use super::dump::{Device, RouteSocket, links, routes};
use super::message::Request;
use super::see::Tables;
use super::socket::NetlinkSocket;
use super::{carrier, message, sysctl};
use crate::calls::Remembered;

/// Threads at once: more would only wait for each other in the kernel.
static PLACES: Semaphore = Semaphore::const_new(64);

/// Raises the inner end and gives it address, neighbour, default route; raises the loopback device. Asked in the cell's
/// namespace, it returns when the cell's end passes packets, or after a quarter of a second.
pub async fn lay(namespace: impl AsFd + Send + 'static, spec: &LinkSpec) -> Result<(), Reason> {
    let work = move |spec: &LinkSpec| {
        // Stays one of the cell's namespace.
        let outside = open(spec);
        enter(&namespace, spec)?;
        carry_out(&mut open(spec)?, spec, &message::inner_end(spec))?;
        sysctl::ipv6_off(&spec.interface).map_err(|e| failed("switch IPv6 off on", spec, &e))?;
        // That it could not be seen is no harm to the container.
        drop(outside.map(|outside| carrier::wait(outside, spec)));
        Ok(())
    };
    away(spec, work).await
}

/// Gives the inner end another MTU. The namespace's file may be gone, or lead anywhere: what counts is that the container's
/// end is there.
pub async fn fit(namespace: PathBuf, spec: &LinkSpec) -> Result<(), Reason> {
    let work = move |spec: &LinkSpec| {
        // A file that blocks is none of a namespace.
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let opened = openat(CWD, &namespace, flags, Mode::empty());
        let opened = opened.map_err(|why| Reason::NamespaceGone {
            path: namespace.display().to_string(),
            why: why.to_string(),
        })?;
        enter(&opened, spec)?;
        let mut socket = open(spec)?;
        let devices = links(&mut socket).map_err(|e| failed("read", spec, &e))?;
        let ours = |device: &Device| (device.index, device.mac) == (spec.index(), Some(spec.container_mac()));
        if !devices.iter().any(ours) {
            return Err(failed("find", spec, &io::ErrorKind::NotFound.into()));
        }
        let mtu = vec![LinkAttribute::Mtu(spec.mtu)];
        carry_out(&mut socket, spec, &[message::set_link("fit", spec.index(), mtu, LinkFlags::empty())])
    };
    away(spec, work).await
}

/// Whether the inner end is as [`lay`] left it, or as plugins behind this one have.
pub async fn check(
    namespace: impl AsFd + Send + 'static,
    spec: &LinkSpec,
    remembered: Remembered,
) -> Result<(), Reason> {
    let work = move |spec: &LinkSpec| {
        enter(&namespace, spec)?;
        let mut socket = open(spec)?;
        let tables = Tables::read(&mut socket).map_err(|e| failed("read", spec, &io::Error::other(e)))?;
        let damaged = |what: &str| {
            let what = format!("{} {what}", spec.interface);
            Err(Reason::Damaged { handle: spec.handle.to_string(), what })
        };
        let Some(link) = tables.links.get(&spec.index()) else { return damaged("is gone") };
        if link.name != spec.interface.as_str() || link.mac != Some(spec.container_mac()) {
            return damaged("has another name or MAC address");
        }
        if link.mtu != remembered.mtu.unwrap_or(spec.mtu) {
            return damaged("has another MTU");
        }
        if !link.is_up_without_arp() || !link.rp_filter {
            return damaged("is down or has other settings");
        }
        if !tables.has_address(spec.index(), spec.addr.get(), GATEWAY, 32) {
            return damaged("has lost its address");
        }
        if !tables.has_neighbour(spec.index(), GATEWAY, spec.host_mac()) {
            return damaged("has lost its gateway's neighbour entry");
        }
        let routes = routes(&mut socket, spec.index()).map_err(|e| failed("read", spec, &e))?;
        if remembered.default_route && !routes.iter().any(|route| route.is_default_by(GATEWAY)) {
            return damaged("has lost its default route");
        }
        Ok(())
    };
    away(spec, work).await
}

/// The first refusal that counts ends it.
fn carry_out(socket: &mut RouteSocket, spec: &LinkSpec, requests: &[Request]) -> Result<(), Reason> {
    let messages = requests.iter().map(|r| (r.message.clone(), r.flags)).collect();
    let outcomes = socket.batch(messages).map_err(|e| failed("configure", spec, &e))?;
    for (request, outcome) in requests.iter().zip(outcomes) {
        match outcome {
            Err(refusal) if !request.tolerates.contains(&refusal.errno) => {
                return Err(failed(request.operation, spec, &refusal.into()));
            }
            _ => {}
        }
    }
    Ok(())
}

fn open(spec: &LinkSpec) -> Result<RouteSocket, Reason> {
    NetlinkSocket::open(NETLINK_ROUTE, 0).map_err(|e| failed("open a socket to configure", spec, &e))
}

fn failed(operation: &str, spec: &LinkSpec, error: &io::Error) -> Reason {
    let subject = format!("{} of container {}", spec.interface, spec.handle);
    Reason::Kernel { operation: operation.to_owned(), subject, why: error.to_string() }
}

/// Never comes back: for a thread that ends.
fn enter(namespace: &impl AsFd, spec: &LinkSpec) -> Result<(), Reason> {
    let entered = setns(namespace, CloneFlags::CLONE_NEWNET);
    entered.map_err(|e| failed("enter the network namespace for", spec, &e.into()))
}

/// Work on a thread of its own, in whose hands all is that it needs: who waits for it may go. The thread ends a moment after
/// the answer, and the namespace that it is in may live as long.
async fn away(
    spec: &LinkSpec,
    work: impl FnOnce(&LinkSpec) -> Result<(), Reason> + Send + 'static,
) -> Result<(), Reason> {
    let _place = PLACES.acquire().await;
    let (done, outcome) = oneshot::channel();
    let its_own = spec.clone();
    // Nobody waits any more: then the outcome is nobody's.
    let there = move || drop(done.send(work(&its_own)));
    let spawned = thread::Builder::new().name("weft-inside".into()).spawn(there);
    spawned.map_err(|e| failed("start a thread for", spec, &e))?;
    let bug = |_| Err(Reason::Bug { invariant: "laying a container's end does not panic".into() });
    outcome.await.unwrap_or_else(bug)
}
