//! What containers are added with: security groups' rules, and two mapped ports each.

use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::Result;
use serde_json::{Value, json};
use weft_testbed::external_networker::{ECHO_PORT, Request};

/// Rules, and whether somebody has the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct List {
    pub(super) rules: usize,
    new: bool,
}

impl List {
    pub(super) fn known(rules: usize) -> Self {
        Self { rules, new: false }
    }

    pub(super) fn new(rules: usize) -> Self {
        Self { rules, new: true }
    }

    pub(super) fn name(self) -> &'static str {
        if self.new { "new" } else { "known" }
    }

    /// Ports of the cell are given out in turn: more than there are containers at once.
    pub(super) fn request(self, handle: &str) -> Result<Request> {
        static GIVEN: AtomicU32 = AtomicU32::new(0);
        let number = GIVEN.fetch_add(1, Ordering::Relaxed);
        let host = 40_000 + number % 12_000 * 2;
        let list = if self.new { number + 1 } else { 0 };
        let port_mappings = json!([
            {"host_port": host, "container_port": ECHO_PORT},
            {"host_port": host + 1, "container_port": 61_001},
        ]);
        Ok(Request { port_mappings, net_out_rules: rules(list, self.rules)?, ..Request::app(handle) })
    }
}

/// As Garden passes them; none overlaps another.
fn rules(list: u32, count: usize) -> Result<Value> {
    let one = |index: u32| {
        let first = u32::from(Ipv4Addr::new(11, 0, 0, 0)).wrapping_add(list << 14) + index * 8;
        let (first, last) = (Ipv4Addr::from(first), Ipv4Addr::from(first + 7));
        let port = 1024 + index % 12;
        json!({"protocol": 1, "networks": [{"start": first, "end": last}], "ports": [{"start": port, "end": port}]})
    };
    Ok((0..u32::try_from(count)?).map(one).collect())
}
