//! What is told of traffic between containers: chains that log before they do what would be done anyway. One for each
//! figure of lines per second; containers are led to them by elements of maps.

use super::draft::{INVALID, NEW, UDP, UNTRACKED, rule};
use super::limits::{Limit, Lines};
use super::profile::limited_log;
use super::{Content, Part, chain};
use crate::traffic::Decision;

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

/// dataplane.md, "To a container", let through by a policy: a line for each connection; of UDP, where one packet may be
/// one, as many as the limit says.
pub(super) fn invited(per_sec: u32, log_group: u16) -> (Part, Content) {
    let (of, prefix) = (Lines::InvitedUdp, Decision::AllowedC2c.prefix());
    let udp = |comment| rule(comment).protocol(UDP);
    let rules = vec![
        udp("counted").by(Limit::Total { of }).go_on(),
        udp("logged").by(Limit::Lines { of, per_sec }).log(log_group, prefix).go_on(),
        udp("policy").let_in(),
        rule("logged").state(INVALID | NEW | UNTRACKED).log(log_group, prefix).go_on(),
        rule("policy").let_in(),
    ];
    chain(&invited_chain(per_sec), rules)
}
