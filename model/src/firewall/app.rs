//! Who may open connections to an app's containers: one chain for the app, and one set of tag, protocol and ports.
//!
//! The tag that a packet carries is enough to know its sender by, also on the same cell: marks of this cell's containers and
//! the sets that they are compared with come from one answer of the policy server and change in one transaction.

use std::collections::BTreeMap;

use nf_tables::{Field, Key, Ranges, Set, Target};

use super::draft::{Part as Of, TCP, UDP, rule};
use super::{Planned, chain, joined, name, set};
use crate::policy::{AppGuid, AppPolicies};
use crate::profile::{Transport, digest_of};

pub(super) fn app_chain(guid: &AppGuid) -> String {
    format!("app-{}", digest_of(guid))
}

/// Nothing for an app that is the destination of no policy. `logged`: who is let in, is led past the log.
pub fn app(guid: &AppGuid, policies: &AppPolicies, logged: bool) -> Planned {
    if policies.inbound.is_empty() {
        return Planned::new();
    }
    let key = Key::from([Field::Mark, Field::Protocol, Field::Port]);
    let boxes = boxes(policies);
    let ranges = Ranges::new(key.len(), boxes.iter().map(|(low, high)| (low.as_slice(), high.as_slice())));
    // Named by its content: a set does not change.
    let senders = format!("senders-{}", digest_of(&(guid, &policies.inbound)));
    let allowed = rule("policy").in_set(&name(&senders), &[Of::Tag, Of::Protocol, Of::Port]);
    let allowed = if logged { allowed.goto("guests") } else { allowed.let_in() };
    let declared = Set { key, target: Target::Nothing, ranges: true, dynamic: None };
    vec![
        set(&senders, declared, ranges),
        chain(&app_chain(guid), vec![allowed, rule("no policy").goto("strangers")]),
    ]
}

/// Lower and upper ends, none within another: ports that meet are made one.
fn boxes(policies: &AppPolicies) -> Vec<(Vec<u8>, Vec<u8>)> {
    let mut by_sender: BTreeMap<(u16, u8), Vec<(u16, u16)>> = BTreeMap::new();
    for inbound in &policies.inbound {
        let protocol = if inbound.transport == Transport::Tcp { TCP } else { UDP };
        let ports = (inbound.ports.first(), inbound.ports.last());
        by_sender.entry((inbound.tag.get(), protocol)).or_default().push(ports);
    }
    let key = |tag: u16, protocol: u8, port: u16| {
        let [high, low] = port.to_be_bytes();
        [&u32::from(tag).to_ne_bytes()[..], &[protocol, 0, 0, 0, high, low, 0, 0]].concat()
    };
    let mut boxes = Vec::new();
    for ((tag, protocol), ports) in by_sender {
        let merged = joined(ports);
        boxes.extend(
            merged.iter().map(|(first, last)| (key(tag, protocol, *first), key(tag, protocol, *last))),
        );
    }
    boxes
}
