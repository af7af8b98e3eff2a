//! A network namespace, and a socket in it.

use std::fs::File;
use std::io::{ErrorKind, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Command, Stdio};
use std::thread;

use netlink_sys::protocols::NETLINK_NETFILTER;
use netlink_sys::{Socket, SocketAddr};
use nf_tables::decode::{Body, Message, Refusal, messages};
use nf_tables::{Batch, Name, Transaction, request};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::socket::{setsockopt, sockopt};

use crate::programs::{Program, name, read::read};

/// NFNLGRP_NFTABLES.
const ANNOUNCEMENTS: u32 = 7;
const ROOM: usize = 8 << 20;

pub(crate) struct World {
    namespace: OwnedFd,
    socket: Socket,
    sequence: u32,
}

impl World {
    pub(crate) fn new() -> Self {
        assert!(nix::unistd::geteuid().is_root(), "these tests make network namespaces: run them as root");
        let make = || {
            unshare(CloneFlags::CLONE_NEWNET).expect("a new network namespace");
            let namespace = File::open("/proc/thread-self/ns/net").expect("its descriptor").into();
            (namespace, open())
        };
        let (namespace, socket) = thread::spawn(make).join().expect("thread");
        Self { namespace, socket, sequence: 1000 }
    }

    pub(crate) fn table() -> Name {
        name("weft")
    }

    pub(crate) fn port(&self) -> u32 {
        let mut address = SocketAddr::new(0, 0);
        self.socket.get_address(&mut address).expect("address");
        address.port_number()
    }

    pub(crate) fn batch<T: Clone>(&mut self) -> Batch<T> {
        self.sequence += 100_000;
        Batch::new(&Self::table(), self.sequence)
    }

    /// All answers to a transaction: they are there once it is sent.
    pub(crate) fn answers<T>(&mut self, transaction: &Transaction<T>) -> Vec<Message> {
        let sent = self.socket.send(&transaction.bytes, 0).expect("sent");
        assert_eq!(sent, transaction.bytes.len());
        self.drain(&self.socket)
    }

    /// The owners of what was refused; none if the transaction is done.
    pub(crate) fn commit<T: Clone>(&mut self, batch: Batch<T>) -> Vec<(Option<T>, Refusal)> {
        let transaction = batch.finish();
        let answers = self.answers(&transaction);
        assert_eq!(answers.last().map(|answer| answer.sequence), Some(transaction.last()), "{answers:?}");
        answers
            .into_iter()
            .filter_map(|answer| match answer.body {
                Body::Refused(refusal) => Some((transaction.owner(answer.sequence).cloned(), refusal)),
                Body::Acknowledged => None,
                other => panic!("{other:?}"),
            })
            .collect()
    }

    pub(crate) fn load(&mut self, program: &Program) {
        let mut batch = self.batch();
        program.load(&mut batch);
        assert_eq!(self.commit(batch), []);
    }

    fn drain(&self, socket: &Socket) -> Vec<Message> {
        let mut all = Vec::new();
        loop {
            match socket.recv_from_full() {
                Ok((buffer, _)) => all.extend(messages(&buffer).map(|message| message.expect("whole"))),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return all,
                Err(error) => panic!("{error}"),
            }
        }
    }

    /// What is read of a dump, as it comes.
    pub(crate) fn raw(&mut self, request: impl FnOnce(u32) -> Vec<u8>) -> Vec<Vec<u8>> {
        self.socket.send(&request(1), 0).expect("sent");
        let read = || match self.socket.recv_from_full() {
            Ok((buffer, _)) => Some(buffer),
            Err(error) if error.kind() == ErrorKind::WouldBlock => None,
            Err(error) => panic!("{error}"),
        };
        std::iter::from_fn(read).collect()
    }

    /// A dump's messages, or the one answer.
    pub(crate) fn ask(&mut self, request: impl FnOnce(u32) -> Vec<u8>) -> Vec<Message> {
        self.sequence += 1;
        self.socket.send(&request(self.sequence), 0).expect("sent");
        let mut all = self.drain(&self.socket);
        assert!(all.iter().all(|message| message.sequence == self.sequence && !message.interrupted));
        all.pop_if(|last| last.body == Body::Done { errno: 0 });
        all
    }

    /// The program that is in the kernel.
    pub(crate) fn see(&mut self) -> Program {
        let table = &Self::table();
        let mut all = self.ask(request::tables);
        all.extend(self.ask(request::chains));
        all.extend(self.ask(|sequence| request::rules(table, sequence)));
        let sets = self.ask(|sequence| request::sets(table, sequence));
        let names: Vec<Name> = read(sets.clone(), table).sets.into_keys().collect();
        all.extend(sets);
        for set in names {
            all.extend(self.ask(|sequence| request::elements(table, &set, sequence)));
        }
        read(all, table)
    }

    /// A socket that hears of every commit in this namespace.
    pub(crate) fn listener(&self) -> Socket {
        self.enter(|| {
            let socket = open();
            socket.add_membership(ANNOUNCEMENTS).expect("membership");
            socket
        })
    }

    pub(crate) fn heard(&self, listener: &Socket) -> Vec<Message> {
        self.drain(listener)
    }

    pub(crate) fn enter<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let there = || {
            setns(self.namespace.as_fd(), CloneFlags::CLONE_NEWNET).expect("entered");
            work()
        };
        thread::scope(|scope| scope.spawn(there).join()).unwrap_or_else(|e| std::panic::resume_unwind(e))
    }

    pub(crate) fn list(&self) -> String {
        let (ok, text) = self.nft(&["list", "ruleset"], "");
        assert!(ok, "{text}");
        text
    }

    /// `nft -f -`.
    pub(crate) fn read_file(&self, text: &str) -> (bool, String) {
        self.nft(&["-f", "-"], text)
    }

    fn nft(&self, arguments: &[&str], input: &str) -> (bool, String) {
        self.enter(|| {
            let mut nft = Command::new("nft")
                .args(arguments)
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
                .expect("nft");
            let mut stdin = nft.stdin.take().expect("stdin");
            stdin.write_all(input.as_bytes()).expect("written");
            drop(stdin);
            let output = nft.wait_with_output().expect("nft");
            let text = [output.stdout, output.stderr].concat();
            (output.status.success(), String::from_utf8_lossy(&text).into_owned())
        })
    }
}

fn open() -> Socket {
    let mut socket = Socket::new(NETLINK_NETFILTER).expect("socket");
    socket.bind(&SocketAddr::new(0, 0)).expect("bound");
    socket.set_ext_ack(true).expect("explanations");
    socket.set_cap_ack(true).expect("short answers");
    socket.set_non_blocking(true).expect("not blocking");
    setsockopt(&socket, sockopt::SndBufForce, &ROOM).expect("room to send");
    setsockopt(&socket, sockopt::RcvBufForce, &ROOM).expect("room to receive");
    socket
}
