//! Who may open connections to an app's containers: one chain for the app, and one set of tag, protocol and ports.
//!
//! A packet's sender is known by its tag and, on the same cell, by the tag's turn, too: marks of this cell's containers and
//! the sets that they are compared with come from one answer of the policy server and change in one transaction, but a
//! packet may be on its way just then.

use std::collections::BTreeMap;

use nf_tables::{Field, Key, Ranges, Set, Target};

use super::draft::{Part as Of, TCP, UDP, rule};
use super::{Planned, chain, joined, name, set};
use crate::policy::turns::Turn;
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
    let allowed = rule("policy").in_set(&name(&senders), &[Of::TagAtTurn, Of::Protocol, Of::Port]);
    let allowed = if logged { allowed.goto("guests") } else { allowed.let_in() };
    let declared = Set { key, target: Target::Nothing, ranges: true, dynamic: None };
    vec![
        set(&senders, declared, ranges),
        chain(&app_chain(guid), vec![allowed, rule("no policy").goto("strangers")]),
    ]
}

// A mark's bytes are compared from the first on: where the turn is in the last of them, all that is between the ends of a
// tag's range is this tag.
const _: () = assert!(cfg!(target_endian = "little"));

/// Lower and upper ends, none within another: ports that meet are made one.
fn boxes(policies: &AppPolicies) -> Vec<(Vec<u8>, Vec<u8>)> {
    let mut by_sender: BTreeMap<(u16, Turn, u8), Vec<(u16, u16)>> = BTreeMap::new();
    for inbound in &policies.inbound {
        let protocol = if inbound.transport == Transport::Tcp { TCP } else { UDP };
        let ports = (inbound.ports.first(), inbound.ports.last());
        by_sender.entry((inbound.tag.get(), inbound.turn, protocol)).or_default().push(ports);
    }
    let key = |tag: u16, turn: u32, protocol: u8, port: u16| {
        let [high, low] = port.to_be_bytes();
        [&(u32::from(tag) | turn).to_ne_bytes()[..], &[protocol, 0, 0, 0, high, low, 0, 0]].concat()
    };
    let mut boxes = Vec::new();
    for ((tag, turn, protocol), ports) in by_sender {
        let [low, high] = turn.ends();
        let one = |(first, last)| (key(tag, low, protocol, first), key(tag, high, protocol, last));
        boxes.extend(joined(ports).into_iter().map(one));
    }
    boxes
}
