//! Network namespaces of their own for each test.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::process::Command;
use std::sync::Arc;
use std::thread;

use nix::sched::{CloneFlags, setns, unshare};
use weft_node::kernel::Netlink;

/// A network namespace; gone when nobody holds it any more.
#[derive(Debug, Clone)]
pub(crate) struct Space(pub(crate) Arc<OwnedFd>);

impl Space {
    /// With its loopback device up.
    pub(crate) fn new() -> Self {
        let space = Self::bare();
        space.run("ip link set lo up");
        space
    }

    /// As a runtime makes it for a container.
    pub(crate) fn bare() -> Self {
        assert!(nix::unistd::geteuid().is_root(), "these tests make network namespaces: run them as root");
        let make = || {
            unshare(CloneFlags::CLONE_NEWNET).expect("a new network namespace");
            File::open("/proc/thread-self/ns/net").expect("its descriptor").into()
        };
        Self(Arc::new(thread::spawn(make).join().expect("thread")))
    }

    /// What `ip` takes for its name, since it has none.
    pub(crate) fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd())
    }

    /// Does something on a thread of its own inside.
    pub(crate) fn enter<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let there = || {
            setns(self.0.as_fd(), CloneFlags::CLONE_NEWNET).expect("entered");
            work()
        };
        thread::scope(|scope| scope.spawn(there).join()).unwrap_or_else(|e| std::panic::resume_unwind(e))
    }

    /// Output of a shell command, which must succeed.
    pub(crate) fn run(&self, command: &str) -> String {
        let (ok, text) = self.try_run(command);
        assert!(ok, "{command}: {text}");
        text
    }

    pub(crate) fn try_run(&self, command: &str) -> (bool, String) {
        let output = self.enter(|| Command::new("sh").args(["-c", command]).output().expect("sh"));
        let text = [output.stdout, output.stderr].concat();
        (output.status.success(), String::from_utf8_lossy(&text).into_owned())
    }

    pub(crate) fn netlink(&self) -> Netlink {
        self.enter(|| Netlink::open("silk-vtep".parse().expect("name")).expect("netlink"))
    }
}
