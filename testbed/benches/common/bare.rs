//! The kernel's part alone: a transaction's bytes, made before, sent by a socket of its own.

use anyhow::{Context, Result, bail};
use netlink_sys::protocols::NETLINK_NETFILTER;
use netlink_sys::{Socket, SocketAddr};
use nf_tables::batch::Transaction;
use nf_tables::decode::{Body, messages};
use nix::sys::socket::{setsockopt, sockopt};

use crate::common::bed::Space;
use crate::common::figure::Spent;

const ROOM: usize = 16 << 20;

pub(crate) struct Bare {
    socket: Socket,
    buffer: Vec<u8>,
}

impl Bare {
    pub(crate) fn open(space: &Space) -> Result<Self> {
        space.enter(|| {
            let mut socket = Socket::new(NETLINK_NETFILTER)?;
            socket.bind(&SocketAddr::new(0, 0))?;
            socket.set_cap_ack(true)?;
            setsockopt(&socket, sockopt::SndBufForce, &ROOM)?;
            Ok(Self { socket, buffer: Vec::with_capacity(64 << 10) })
        })
    }

    /// From the first byte sent to the acknowledgement.
    pub(crate) fn send<T>(&mut self, transaction: &Transaction<T>) -> Result<Spent> {
        let begin = Spent::now()?;
        self.socket.send(&transaction.bytes, 0).context("send a transaction")?;
        loop {
            self.buffer.clear();
            self.socket.recv(&mut self.buffer, 0).context("read the answer to a transaction")?;
            for message in messages(&self.buffer) {
                let message = message?;
                match message.body {
                    Body::Refused(refusal) => {
                        bail!("a transaction that was taken before is refused: {refusal:?}")
                    }
                    Body::Acknowledged if message.sequence == transaction.last() => {
                        return Ok(Spent::now()?.since(begin));
                    }
                    _ => {}
                }
            }
        }
    }
}
