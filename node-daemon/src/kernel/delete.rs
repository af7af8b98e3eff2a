//! Links away: a few threads that delete, and the kernel's own word for when it is done.
//!
//! The call that deletes a link returns 15 to 27 ms later, when the last reader of the device's data is surely gone.
//! The link itself is gone from both namespaces, and its names and indices are free, when the kernel announces it
//! (RTM_DELLINK), after half a millisecond. So threads wait for the calls, and we for the announcement.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::AsFd;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use netlink_packet_route::AddressFamily;
use netlink_packet_route::RouteNetlinkMessage as Rtnl;
use netlink_packet_route::link::LinkAttribute;
use netlink_sys::protocols::NETLINK_ROUTE;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use weft_model::address::DeviceName;

use super::dump::RouteSocket;
use super::message::{Request, delete_link, delete_marked_links, mark_for_deletion};
use super::socket::NetlinkSocket;

/// More deletions at once only wait for each other.
const THREADS: usize = 8;
/// The kernel needs 1 ms; under heavy load 60 ms were seen.
const PATIENCE: Duration = Duration::from_secs(5);
/// RTMGRP_LINK (linux/rtnetlink.h).
const LINK_NOTIFICATIONS: u32 = 1;

/// Ends with its threads when dropped.
#[derive(Debug)]
pub(super) struct Deleters {
    queue: Sender<Deletion>,
}

struct Deletion {
    names: BTreeSet<DeviceName>,
    answer: Sender<(BTreeSet<DeviceName>, io::Result<()>)>,
    /// Wakes the one who waits for answers.
    bell: Arc<EventFd>,
}

impl Deleters {
    /// The threads work in the caller's network namespace.
    pub(super) fn start() -> io::Result<Self> {
        let (queue, deletions) = channel();
        let deletions = Arc::new(Mutex::new(deletions));
        for _ in 0..THREADS {
            let socket = NetlinkSocket::open(NETLINK_ROUTE, 0)?;
            let deletions = Arc::clone(&deletions);
            thread::Builder::new().name("weft-delete".into()).spawn(move || work(socket, &deletions))?;
        }
        Ok(Self { queue })
    }

    /// Returns when none of these links is there any more, or with those that did not go, and why.
    pub(super) fn delete(&self, mut names: BTreeSet<DeviceName>) -> BTreeMap<DeviceName, io::Error> {
        let mut failed = BTreeMap::new();
        if names.is_empty() {
            return failed;
        }
        let waited = self.wait(&mut names, &mut failed);
        let why = waited.err().unwrap_or_else(|| io::ErrorKind::TimedOut.into());
        failed.extend(names.into_iter().map(|name| (name, io::Error::new(why.kind(), why.to_string()))));
        failed
    }

    /// Takes from `left` what is gone or has failed.
    fn wait(
        &self,
        left: &mut BTreeSet<DeviceName>,
        failed: &mut BTreeMap<DeviceName, io::Error>,
    ) -> io::Result<()> {
        // Before the first deletion, so that none is missed.
        let mut announcements = NetlinkSocket::open(NETLINK_ROUTE, LINK_NOTIFICATIONS)?;
        announcements.set_non_blocking()?;
        let bell = Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?);
        let (answer, answers) = channel();
        // Each call waits for itself; for more than there are threads, one call for all is faster.
        let deletions: Vec<BTreeSet<DeviceName>> = match left.len() {
            0..=THREADS => left.iter().map(|name| BTreeSet::from([name.clone()])).collect(),
            _ => vec![left.clone()],
        };
        for names in deletions {
            let deletion = Deletion { names, answer: answer.clone(), bell: Arc::clone(&bell) };
            self.queue.send(deletion).map_err(|_| io::Error::other("the deleting threads have ended"))?;
        }
        let deadline = Instant::now() + PATIENCE;
        while !left.is_empty() {
            let rest = deadline.saturating_duration_since(Instant::now());
            let timeout = PollTimeout::try_from(rest).unwrap_or(PollTimeout::ZERO);
            let fds = [announcements.as_fd(), bell.as_fd()];
            match poll(&mut fds.map(|fd| PollFd::new(fd, PollFlags::POLLIN)), timeout) {
                Ok(0) => return Ok(()),
                Ok(_) | Err(Errno::EINTR) => {}
                Err(e) => return Err(e.into()),
            }
            left.retain({
                let gone = gone(&mut announcements);
                move |name| !gone.contains(name.as_str())
            });
            let _ = bell.read();
            for (names, result) in answers.try_iter() {
                for name in names.into_iter().filter(|name| left.remove(name)) {
                    if let Err(e) = &result {
                        failed.insert(name, io::Error::new(e.kind(), e.to_string()));
                    }
                }
            }
        }
        Ok(())
    }
}

fn work(mut socket: RouteSocket, deletions: &Mutex<Receiver<Deletion>>) {
    loop {
        let next = deletions.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(Deletion { names, answer, bell }) = next else { return };
        let requests = match (names.first(), names.len()) {
            (Some(name), 1) => vec![delete_link(name)],
            _ => names.iter().map(mark_for_deletion).chain([delete_marked_links()]).collect(),
        };
        let result = carry_out(&mut socket, requests);
        // Nobody listens any more if the announcement was faster.
        let _ = answer.send((names, result));
        let _ = bell.write(1);
    }
}

fn carry_out(socket: &mut RouteSocket, requests: Vec<Request>) -> io::Result<()> {
    let tolerated: Vec<_> = requests.iter().map(|request| request.tolerates).collect();
    let messages = requests.into_iter().map(|request| (request.message, request.flags)).collect();
    for (outcome, tolerated) in socket.batch(messages)?.into_iter().zip(tolerated) {
        match outcome {
            Err(refusal) if !tolerated.contains(&refusal.errno) => return Err(refusal.into()),
            _ => {}
        }
    }
    Ok(())
}

/// Names of links that have been announced as deleted. If announcements were lost, the calls' own answers follow.
fn gone(announcements: &mut RouteSocket) -> BTreeSet<String> {
    let mut gone = BTreeSet::new();
    while let Ok(messages) = announcements.notifications() {
        for (_, message) in messages {
            let Rtnl::DelLink(message) = message else { continue };
            // A port that leaves a bridge is announced in the same way.
            if message.header.interface_family == AddressFamily::Unspec {
                gone.extend(message.attributes.into_iter().filter_map(|attribute| match attribute {
                    LinkAttribute::IfName(name) => Some(name),
                    _ => None,
                }));
            }
        }
    }
    gone
}
