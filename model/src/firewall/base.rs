//! The chains that do not depend on which containers there are, and the maps that lead on from them.
//!
//! ```text
//!            ┌ from a link ─▶ sent ──▶ from-container ─┬─ to a link ──▶ newcomers ─▶ uninvited
//!  forward ──┤           (let out before?)  (established?)  ├─ to the VTEP ─▶ to-overlay
//!            │               (who?)                    └─ to the world ▶ egress ──map──▶ egress-DIGEST
//!            └ to a link ───▶ received (established?) ──▶ newcomers
//!
//!            ┌ from a link ─▶ to-cell ──▶ asks-cell ──map──▶ services-DIGEST ──▶ refused-by-cell
//!  input ────┤  (the VXLAN port: only from cells that hold a lease)
//!            └ from the VTEP, new ───────────────────────────────────────────▶ refused-by-cell
//! ```
//! One map leads from a link and an address to the mark that its packets carry: who is not in it is nobody.

use std::collections::BTreeSet;
use std::sync::Arc;

use nf_tables::{Base as Hooked, Chain, Data, Hook, Kind, Rule};

use super::draft::{ESTABLISHED, INVALID, NEW, Part as Of, RELATED, TCP, UDP, rule};
use super::{Content, Guard, INGRESS, INGRESS_CONNECTION, Map, Part, Planned, REFUSED, chain, element, name};
use crate::address::DeviceName;
use crate::cell::{CellConfig, OverlayIngress};
use crate::policy::PolicyTag;

/// Before the chains of iptables, whose filter tables have priority 0.
const BEFORE_IPTABLES: i32 = -10;
/// NF_IP_PRI_NAT_DST and NF_IP_PRI_NAT_SRC.
const DESTINATION_NAT: i32 = -100;
const SOURCE_NAT: i32 = 100;

/// Addresses at which clouds answer a machine's questions about itself, its credentials among them; two of them also
/// resolve names.
const METADATA: [[u8; 4]; 2] = [[169, 254, 169, 254], [100, 100, 100, 200]];
/// Azure's platform address: DNS, and on these ports the agents' services.
const AZURE: [u8; 4] = [168, 63, 129, 16];
const AZURE_PORTS: [u16; 2] = [80, 32526];
const DNS: u16 = 53;

/// The comment of the rule that lets the overlay's routers in.
pub(super) const ROUTERS: &str = "overlay ingress";

/// What the base is made from.
#[derive(Debug)]
pub struct Base<'a> {
    pub config: &'a CellConfig,
    /// Devices that lead to the world.
    pub ways: &'a BTreeSet<DeviceName>,
    pub guard: Guard,
    /// The tag of the overlay's routers.
    pub router: Option<PolicyTag>,
}

pub fn base(base: &Base<'_>) -> Planned {
    let mut planned = vec![(Part::Table, Content::Table)];
    planned.extend(Map::ALL.into_iter().filter(|map| *map != Map::Exposed).map(Map::declared));
    match (base.config.ingress, base.router) {
        (OverlayIngress::Off, _) | (OverlayIngress::Sent, None) => {}
        (OverlayIngress::Taken, _) => planned.push(Map::Exposed.declared()),
        (OverlayIngress::Sent, Some(tag)) => {
            planned.push(hooked("output", Kind::Filter, Hook::Output, BEFORE_IPTABLES, base.output(tag)));
        }
    }
    planned.extend(METADATA.map(|addr| element(Map::Metadata, addr, Data::Nothing)));
    planned.push(element(Map::Metadata, AZURE, Data::Nothing));
    planned.extend([
        hooked("forward", Kind::Filter, Hook::Forward, BEFORE_IPTABLES, base.forward()),
        chain("sent", known("from-container")),
        chain("from-container", base.sent_by_container()),
        chain("to-overlay", base.to_overlay()),
        chain("egress", egress()),
        chain("metadata-rules", metadata()),
        chain("received", base.received()),
        chain("newcomers", base.newcomers()),
        chain("strangers", strangers()),
        chain("guests", guests()),
        hooked("input", Kind::Filter, Hook::Input, BEFORE_IPTABLES, base.input()),
        chain("to-cell", known("asks-cell")),
        chain("asks-cell", base.asks_cell()),
        chain("refused-by-cell", vec![base.refused_by_cell()]),
        hooked("port-mapping", Kind::Nat, Hook::Prerouting, DESTINATION_NAT, base.port_mapping()),
        hooked("translation", Kind::Nat, Hook::Postrouting, SOURCE_NAT, base.translation()),
    ]);
    planned
}

fn hooked(of: &str, kind: Kind, hook: Hook, priority: i32, rules: Vec<Rule>) -> (Part, Content) {
    let base = Some(Hooked { kind, hook, priority });
    (Part::Chain(name(of)), Content::Chain(Arc::new(Chain { base, rules })))
}

/// dataplane.md, "Spoofed sources, IPv6". The mark says from here on that the sender is known, and carries its tag.
fn known(next: &str) -> Vec<Rule> {
    vec![
        rule("the link's own address").ipv4().mark_from(Map::Sources, &[Of::InIndex, Of::Source]).goto(next),
        rule("spoofed, not IPv4, or from no container").drop(),
    ]
}

/// dataplane.md, "To the world".
fn egress() -> Vec<Rule> {
    vec![
        rule("TCP that belongs to no connection").protocol(TCP).state(INVALID).drop(),
        rule("what the container may").verdict_from(Map::Profiles, &[Of::Source]),
        rule("nothing is known of what it may").reject(),
    ]
}

/// dataplane.md, "Cloud metadata". Comes back with what is not refused.
fn metadata() -> Vec<Rule> {
    let azure = || rule("Azure's platform address").destination(AZURE.into());
    let mut rules: Vec<Rule> =
        AZURE_PORTS.map(|port| azure().protocol(TCP).port(port).reject()).into_iter().collect();
    rules.push(azure().back());
    rules.extend([TCP, UDP].map(|protocol| rule("names").protocol(protocol).port(DNS).back()));
    rules.push(rule("cloud metadata").reject());
    rules
}

/// dataplane.md, "To a container": whom no policy lets in.
fn strangers() -> Vec<Rule> {
    vec![rule("logged").verdict_from(Map::Uninvited, &[Of::Destination]), rule("no policy").reject()]
}

/// dataplane.md, "To a container": whom a policy lets in. Led to only while that is logged.
fn guests() -> Vec<Rule> {
    vec![rule("logged").verdict_from(Map::Invited, &[Of::Destination]), rule("policy").let_in()]
}

impl Base<'_> {
    fn forward(&self) -> Vec<Rule> {
        let vtep = &self.config.vtep_name;
        let mut rules = self.let_out_before();
        rules.extend([
            rule("from a container").in_by_link().goto("sent"),
            rule("to a container").out_by_link().goto("received"),
            rule("from another cell, to no container").in_by(vtep).reject(),
            rule("to another cell, from no container").out_by(vtep).reject(),
        ]);
        rules
    }

    /// dataplane.md, "To the world", line 3, comes before all else, since most packets need no more: one look says that the
    /// address is the link's own, and that the profile of today let the connection out or that it is one to a mapped port.
    /// It lets nothing through that the other lines would not: a connection gets such a mark by passing them.
    fn let_out_before(&self) -> Vec<Rule> {
        let before = |way| {
            rule("let out before by the rules of today, or an answer")
                .out_by(way)
                .mark_from(Map::Allowed, &[Of::InIndex, Of::Source, Of::ConnectionMark])
                .accept()
        };
        self.ways.iter().filter(|way| **way != self.config.vtep_name).map(before).collect()
    }

    fn sent_by_container(&self) -> Vec<Rule> {
        let mut rules =
            vec![rule("forged frames of the overlay").protocol(UDP).port(self.config.vtep_port).reject()];
        if self.config.cut {
            let asks = rule("asks a container of this cell").out_by_link().state(!RELATED).answers(false);
            rules.push(asks.goto("newcomers"));
        }
        rules.extend([
            rule("established").state(ESTABLISHED | RELATED).accept(),
            rule("segments that fit the path").fit_segment().go_on(),
            rule("to a container of this cell").out_by_link().goto("newcomers"),
            rule("to another cell").out_by(&self.config.vtep_name).goto("to-overlay"),
        ]);
        rules.extend(self.ways.iter().map(|way| rule("to the world").out_by(way).goto("egress")));
        rules.push(rule("on no way to the world").reject());
        rules
    }

    /// dataplane.md, "To a container", "Connections of removed policies".
    fn received(&self) -> Vec<Rule> {
        let mut rules = vec![rule("not IPv4").not_ipv4().drop()];
        match self.config.cut {
            true => rules.extend([
                rule("an answer").state(ESTABLISHED).answers(true).let_in(),
                rule("related").state(RELATED).let_in(),
                rule("segments that fit the path").state(NEW).fit_segment().go_on(),
            ]),
            false => rules.extend([
                rule("established").state(ESTABLISHED | RELATED).let_in(),
                rule("segments that fit the path").fit_segment().go_on(),
            ]),
        }
        rules.push(rule("new").goto("newcomers"));
        rules
    }

    /// dataplane.md, "To another cell".
    fn to_overlay(&self) -> Vec<Rule> {
        match self.config.policy {
            true => vec![
                rule("source of a policy").tagged().accept(),
                rule("logged").verdict_from(Map::Untagged, &[Of::Source]),
                rule("source of no policy").reject(),
            ],
            false => vec![rule("policies are disabled").accept()],
        }
    }

    fn newcomers(&self) -> Vec<Rule> {
        let mut rules =
            vec![rule("to a mapped port, from the underlay").connection_mark(INGRESS_CONNECTION).let_in()];
        if !self.config.policy {
            let overlay = self.config.overlay.get();
            let open = rule("policies are disabled").ipv4().source_in(overlay).destination_in(overlay);
            rules.push(open.let_in());
        }
        if let (OverlayIngress::Taken, Some(tag)) = (self.config.ingress, self.router) {
            let from = rule(ROUTERS).in_by(&self.config.vtep_name).tag(tag).ipv4().protocol(TCP);
            rules.push(from.in_set(Map::Exposed.name(), &[Of::Destination, Of::Port]).let_in());
        }
        rules.push(rule("policies of the app").ipv4().verdict_from(Map::Apps, &[Of::Destination]));
        rules.push(rule("no policies").goto("strangers"));
        rules
    }

    /// dataplane.md, "To the cell", "Frames of the overlay".
    fn input(&self) -> Vec<Rule> {
        vec![
            rule("from a container").in_by_link().goto("to-cell"),
            rule("frames from no cell")
                .protocol(UDP)
                .port(self.config.vtep_port)
                .ipv4()
                .not_in_set(Map::Leased.name(), &[Of::Source])
                .drop(),
            rule("from another cell, new")
                .in_by(&self.config.vtep_name)
                .state(!(ESTABLISHED | RELATED))
                .goto("refused-by-cell"),
        ]
    }

    /// dataplane.md, "Overlay ingress".
    fn output(&self, tag: PolicyTag) -> Vec<Rule> {
        vec![rule("the routers' tag").out_by(&self.config.vtep_name).mark(tag.get().into()).accept()]
    }

    fn asks_cell(&self) -> Vec<Rule> {
        vec![
            rule("forged frames of the overlay").protocol(UDP).port(self.config.vtep_port).reject(),
            rule("established").state(ESTABLISHED | RELATED).accept(),
            rule("what the cell offers").verdict_from(Map::Services, &[Of::Source]),
            rule("nothing is known of what it may").goto("refused-by-cell"),
        ]
    }

    fn refused_by_cell(&self) -> Rule {
        match self.guard {
            Guard::Ours => rule("the rule in filter/INPUT is missing").reject(),
            Guard::Iptables => {
                rule("refused by the last rule of filter/INPUT").counted().mark(REFUSED).accept()
            }
        }
    }

    /// dataplane.md, "To a mapped port".
    fn port_mapping(&self) -> Vec<Rule> {
        let to_cell = |comment| rule(comment).ipv4().destination(self.config.underlay.get()).protocol(TCP);
        let from_way = |way| {
            let came = rule("mapped port, from the underlay").in_by(way);
            let came = came.ipv4().destination(self.config.underlay.get()).protocol(TCP);
            came.dnat_from(Map::Ports, |rule| rule.mark_connection(INGRESS_CONNECTION).mark(INGRESS))
        };
        let mut rules: Vec<Rule> = self.ways.iter().map(from_way).collect();
        rules.push(to_cell("mapped port").dnat_from(Map::Ports, |rule| rule));
        rules
    }

    /// dataplane.md, "Masquerade".
    fn translation(&self) -> Vec<Rule> {
        vec![
            rule("to a container").out_by_link().accept(),
            rule("to another cell").out_by(&self.config.vtep_name).accept(),
            rule("from a container").ipv4().verdict_from(Map::Translations, &[Of::Source]),
        ]
    }
}
