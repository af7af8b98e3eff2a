//! Network namespaces of their own for each test, the guard's task in them, and iptables as an oracle.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, mpsc};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, setns, unshare};
use tokio::sync::{oneshot, watch};
use weft_node::guard::{Config, Guard, Wish, directories, run};

/// How long something may take that must happen: it is no measurement.
pub(crate) const LONG: Duration = Duration::from_secs(60);

pub(crate) const BOTH: [(&str, Wish); 2] = [("iptables-nft", Wish::Nft), ("iptables-legacy", Wish::Legacy)];

/// The rules as iptables prints them.
pub(crate) const INPUT: &str = "-A INPUT -m mark --mark 0x1000000/0xff000000 -m comment --comment \"weft: from a \
                                container to this cell, not allowed\" -j REJECT --reject-with icmp-port-unreachable";
pub(crate) const FORWARD: &str = "-A FORWARD -m mark --mark 0x2000000/0x2000000 -m comment --comment \"weft: allowed \
                                  by table inet weft\" -j ACCEPT";

/// A network namespace; gone when nobody holds it any more.
#[derive(Debug, Clone)]
pub(crate) struct Space(pub(crate) Arc<OwnedFd>);

impl Space {
    pub(crate) fn new() -> Self {
        assert!(nix::unistd::geteuid().is_root(), "these tests make network namespaces: run them as root");
        let make = || {
            unshare(CloneFlags::CLONE_NEWNET).expect("a new network namespace");
            File::open("/proc/thread-self/ns/net").expect("its descriptor").into()
        };
        let space = Self(Arc::new(thread::spawn(make).join().expect("thread")));
        space.run("ip link set lo up");
        space
    }

    pub(crate) fn move_thread(&self) {
        setns(self.0.as_fd(), CloneFlags::CLONE_NEWNET).expect("entered");
    }

    /// Does something on a thread of its own inside.
    pub(crate) fn enter<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let there = || {
            self.move_thread();
            work()
        };
        thread::scope(|scope| scope.spawn(there).join()).unwrap_or_else(|e| std::panic::resume_unwind(e))
    }

    /// Output of a shell command, which must succeed.
    pub(crate) fn run(&self, command: &str) -> String {
        let output = self.enter(|| Command::new("sh").args(["-c", command]).output().expect("sh"));
        let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        assert!(output.status.success(), "{command}: {text}");
        text
    }

    /// What iptables says of one chain.
    pub(crate) fn chain(&self, program: &str, chain: &str) -> Vec<String> {
        let listing = self.run(&format!("{program} -w 5 -S {chain}"));
        listing.lines().filter(|line| line.starts_with('-')).map(str::to_owned).collect()
    }

    /// Both of our rules.
    pub(crate) fn has_ours(&self, program: &str) -> bool {
        self.chain(program, "INPUT").contains(&INPUT.to_owned())
            && self.chain(program, "FORWARD").contains(&FORWARD.to_owned())
    }
}

/// The task at work. Ends when it is dropped.
pub(crate) struct Kept {
    pub(crate) published: mpsc::Receiver<Guard>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Kept {
    pub(crate) fn start(space: &Space, backend: Wish) -> Self {
        Self::among(space, backend, directories(None, std::env::var_os("PATH").as_deref()))
    }

    pub(crate) fn among(space: &Space, backend: Wish, directories: Vec<PathBuf>) -> Self {
        let (tell, published) = mpsc::channel();
        let (stop, stopped) = oneshot::channel();
        let space = space.clone();
        let work = move || {
            space.move_thread();
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
            runtime.block_on(async move {
                let (publish, mut guard) = watch::channel(Guard::Ours);
                let task = tokio::spawn(run(Config { backend, directories }, publish));
                let record = async {
                    while guard.changed().await.is_ok() {
                        // Nobody hears it after the test's end.
                        let _ = tell.send(*guard.borrow_and_update());
                    }
                };
                tokio::select! {
                    () = record => panic!("the task ended by itself"),
                    _ = stopped => {}
                }
                drop(guard);
                task.await.expect("the task ends when nobody is interested");
            });
        };
        Self { published, stop: Some(stop), thread: Some(thread::spawn(work)) }
    }

    /// The first words of a task that finds no rule.
    pub(crate) fn appends(&self, whose: &str) {
        assert_eq!((self.next(), self.next()), (Guard::Ours, Guard::Iptables), "{whose}");
    }

    pub(crate) fn next(&self) -> Guard {
        self.published.recv_timeout(LONG).expect("published")
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        drop(self.stop.take());
        let ended = self.thread.take().map(JoinHandle::join);
        if !thread::panicking() {
            ended.expect("started").expect("no panic");
        }
    }
}

pub(crate) fn eventually(what: &str, is: impl Fn() -> bool) {
    let began = Instant::now();
    while !is() {
        assert!(began.elapsed() < LONG, "never: {what}");
        thread::sleep(Duration::from_millis(20));
    }
}

/// A program for tests. Written by another process, so that no child of this one has it open for writing.
pub(crate) fn script(path: &Path, text: &str) {
    let write = "printf '#!/bin/sh\n%s\n' \"$2\" > \"$1\" && chmod +x \"$1\"";
    let done = Command::new("sh").args(["-c", write, "sh"]).arg(path).arg(text).status();
    assert!(done.expect("sh").success());
}
