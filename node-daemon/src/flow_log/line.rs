//! The lines' text: JSON objects in the shape of silk's iptables-logger, whose readers parse ours as well
//! (docs/traffic-log.md).

use std::net::Ipv4Addr;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use weft_model::address::UnderlayAddr;
use weft_model::container::Container;
use weft_model::firewall::{ALLOWED, INGRESS};
use weft_model::policy::AppGuid;
use weft_model::policy::turns::Turn;
use weft_model::traffic::{Decision, Direction, Record, Suppressed};

use super::Lost;

const SOURCE: &str = "cfnetworking.iptables";
/// The rule of the decisions that no security group makes.
const RATE: &str = "outbound connection rate";

/// The configuration's `traffic_log_timestamps`, with iptables-logger's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Timestamps {
    /// RFC 3339, UTC, nanoseconds.
    #[default]
    Rfc3339,
    /// Seconds since 1970 with nine decimals, and `log_level` for `level`.
    Deprecated,
}

/// This cell, as lines name it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Host {
    pub addr: UnderlayAddr,
    /// The BOSH instance's GUID.
    pub guid: String,
}

#[derive(Debug)]
pub(super) struct Writer {
    pub(super) host: Host,
    pub(super) timestamps: Timestamps,
}

#[derive(Serialize)]
struct Line<'a> {
    timestamp: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    level: Option<&'static str>,
    source: &'static str,
    message: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    log_level: Option<u8>,
    data: Data<'a>,
}

/// In the order of their names, as iptables-logger writes them.
#[derive(Serialize, Default)]
struct Data<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    destination: Option<Party<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    lost: Option<Lost>,
    #[serde(skip_serializing_if = "Option::is_none")]
    packet: Option<Packet>,
    #[serde(skip_serializing_if = "Option::is_none")]
    rule: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    source: Option<Party<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    suppressed: Option<Count>,
}

/// Who sent what a container received.
#[derive(Debug, Clone, Copy)]
pub(super) enum Sender<'a> {
    /// One of this cell.
    Container(&'a Container),
    /// A container of it, on another cell: no more is known.
    App(&'a AppGuid),
}

/// Empty texts for what is not known; of another cell than this nothing is said.
#[derive(Serialize, Default)]
struct Party<'a> {
    container_id: &'a str,
    app_guid: &'a str,
    space_guid: &'a str,
    organization_guid: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    host_ip: Option<Ipv4Addr>,
    #[serde(skip_serializing_if = "Option::is_none")]
    host_guid: Option<&'a str>,
}

/// What the packet does not carry is 0.
#[derive(Serialize)]
struct Packet {
    direction: String,
    allowed: bool,
    src_ip: Ipv4Addr,
    dst_ip: Ipv4Addr,
    src_port: u16,
    dst_port: u16,
    protocol: String,
    /// As the kernel's log shows it: none at all if it is 0.
    mark: String,
    icmp_type: u8,
    icmp_code: u8,
}

#[derive(Serialize)]
struct Count {
    direction: String,
    allowed: bool,
    decision: String,
    count: u64,
}

impl Writer {
    /// One decision. `rule`: the one that decided, if it is known; `sender`: if another container received it.
    pub(super) fn decided(
        &self,
        record: &Record,
        who: Option<&Container>,
        sender: Option<Sender<'_>>,
        rule: Option<String>,
    ) -> String {
        let direction = record.direction();
        let allowed = record.decision.allows();
        let packet = record.packet;
        let packet = Packet {
            direction: direction.to_string(),
            allowed,
            src_ip: packet.source,
            dst_ip: packet.destination,
            src_port: packet.source_port.unwrap_or_default(),
            dst_port: packet.destination_port.unwrap_or_default(),
            protocol: packet.protocol.to_string(),
            mark: mark(record.mark),
            icmp_type: packet.icmp_kind.unwrap_or_default(),
            icmp_code: packet.icmp_code.unwrap_or_default(),
        };
        let what = if allowed { "allowed" } else { "denied" };
        let mut data =
            Data { packet: Some(packet), rule: rule_of(record.decision, rule), ..self.data(direction, who) };
        if let Some(sender) = sender {
            data.source = Some(match sender {
                Sender::Container(container) => self.party(Some(container)),
                Sender::App(app) => Party { app_guid: app.as_str(), ..Party::default() },
            });
        }
        self.line(record.at, format!("{direction}-{what}"), data)
    }

    /// So many more, of which no line tells.
    pub(super) fn suppressed(
        &self,
        suppressed: Suppressed,
        who: Option<&Container>,
        at: SystemTime,
    ) -> String {
        let Suppressed { decision, count, .. } = suppressed;
        let direction = decision.direction();
        let count = Count {
            direction: direction.to_string(),
            allowed: decision.allows(),
            decision: decision.to_string(),
            count,
        };
        let data = Data { suppressed: Some(count), ..self.data(direction, who) };
        self.line(at, format!("{direction}-suppressed"), data)
    }

    /// Lines that are missing before this one.
    pub(super) fn lost(&self, lost: Lost, at: SystemTime) -> String {
        self.line(at, "lost".into(), Data { lost: Some(lost), ..Data::default() })
    }

    fn data<'a>(&'a self, direction: Direction, who: Option<&'a Container>) -> Data<'a> {
        let party = self.party(who);
        match direction {
            Direction::Ingress => Data { destination: Some(party), ..Data::default() },
            Direction::Egress => Data { source: Some(party), ..Data::default() },
        }
    }

    fn party<'a>(&'a self, who: Option<&'a Container>) -> Party<'a> {
        let owner = who.map(|who| &who.owner);
        Party {
            container_id: who.map_or("", |who| who.handle.as_str()),
            app_guid: owner.map_or("", |owner| &owner.app_id),
            space_guid: owner.map_or("", |owner| &owner.space_id),
            organization_guid: owner.map_or("", |owner| &owner.org_id),
            host_ip: Some(self.host.addr.get()),
            host_guid: Some(&self.host.guid),
        }
    }

    fn line(&self, at: SystemTime, message: String, data: Data<'_>) -> String {
        let message = format!("{SOURCE}.{message}");
        let (timestamp, level, log_level) = match self.timestamps {
            Timestamps::Rfc3339 => (rfc3339(at), Some("info"), None),
            Timestamps::Deprecated => (deprecated(at), None, Some(1)),
        };
        let line = Line { timestamp, level, source: SOURCE, message, log_level, data };
        let text = serde_json::to_string(&line);
        text.unwrap_or_else(|_| unreachable!("texts and numbers are JSON")) + "\n"
    }
}

/// As the policy has it: without the bits that are our program's own affair.
fn mark(mark: u32) -> String {
    match if mark == INGRESS { mark } else { mark & !(ALLOWED | Turn::BITS) } {
        0 => String::new(),
        mark => format!("{mark:#x}"),
    }
}

fn rule_of(decision: Decision, rule: Option<String>) -> Option<String> {
    match decision {
        Decision::Allowed
        | Decision::Denied
        | Decision::DeniedC2c
        | Decision::AllowedC2c
        | Decision::DeniedOverlay => rule,
        Decision::Limited => Some(rule.unwrap_or_else(|| RATE.into())),
        Decision::WouldLimit => Some(rule.unwrap_or_else(|| RATE.into()) + " (dry run)"),
    }
}

/// Before 1970 is 1970.
fn since_1970(at: SystemTime) -> Duration {
    at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default()
}

fn deprecated(at: SystemTime) -> String {
    let since = since_1970(at);
    format!("{}.{:09}", since.as_secs(), since.subsec_nanos())
}

/// `2006-01-02T15:04:05.000000000Z`.
fn rfc3339(at: SystemTime) -> String {
    let since = since_1970(at);
    let (days, second) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
    let (year, month, day) = date(days);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{:09}Z", since.subsec_nanos())
}

/// The Gregorian date so many days after 1970-01-01. Years are taken to begin in March, so that the leap day is the
/// last; then 400 years have 146097 days, and months 153 in five.
fn date(days: u64) -> (u64, u64, u64) {
    // 0000-03-01 is 719468 days before 1970-01-01.
    let days = days + 719_468;
    let (cycle, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    (400 * cycle + year + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests;
