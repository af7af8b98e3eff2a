//! What is told of traffic between containers: chains that log before they do what would be done anyway. One for each
//! figure of lines per second; containers are led to them by elements of maps.

use super::draft::{UDP, rule};
use super::limits::Lines;
use super::profile::{limited_log, log_each};
use super::{Content, Part, chain};

pub(super) fn uninvited_chain(per_sec: u32) -> String {
    format!("uninvited-{per_sec}")
}

pub(super) fn untagged_chain(per_sec: u32) -> String {
    format!("untagged-{per_sec}")
}

pub(super) fn invited_chain(per_sec: u32) -> String {
    format!("invited-{per_sec}")
}

/// dataplane.md, "To a container", refused.
pub(super) fn uninvited(per_sec: u32, log_group: u16) -> (Part, Content) {
    let mut rules = limited_log(Lines::Uninvited, per_sec, log_group);
    rules.push(rule("no policy").reject());
    chain(&uninvited_chain(per_sec), rules)
}

/// dataplane.md, "To another cell", refused.
pub(super) fn untagged(per_sec: u32, log_group: u16) -> (Part, Content) {
    let mut rules = limited_log(Lines::Untagged, per_sec, log_group);
    rules.push(rule("source of no policy").reject());
    chain(&untagged_chain(per_sec), rules)
}

/// dataplane.md, "To a container", let through by a policy.
pub(super) fn invited(per_sec: u32, log_group: u16) -> (Part, Content) {
    let let_in = || rule("policy");
    let (udp, other) = (let_in().protocol(UDP).let_in(), let_in().let_in());
    chain(&invited_chain(per_sec), log_each(Lines::InvitedUdp, per_sec, log_group, udp, other))
}
