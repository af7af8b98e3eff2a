//! The ruleset's generation: the kernel counts the transactions.

use netlink_sys::Socket;
use netlink_sys::protocols::NETLINK_NETFILTER;
use nf_tables::decode::{Body, messages};
use nf_tables::request;

use crate::space::Space;

pub(crate) struct Ruleset(Socket);

impl Ruleset {
    pub(crate) fn of(space: &Space) -> Self {
        Self(space.enter(|| Socket::new(NETLINK_NETFILTER)).expect("a netlink socket"))
    }

    pub(crate) fn generation(&self) -> u32 {
        self.0.send(&request::generation(1), 0).expect("asked");
        let mut buffer = Vec::with_capacity(4096);
        self.0.recv(&mut buffer, 0).expect("answered");
        let told = messages(&buffer).find_map(|message| match message.expect("whole").body {
            Body::Generation(generation) => Some(generation.id),
            _ => None,
        });
        told.expect("a generation")
    }
}
