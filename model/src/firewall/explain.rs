//! What becomes of a packet, by running the program that the kernel runs; and which rule decides, and whose it is.

use std::fmt;
use std::net::Ipv4Addr;
use std::num::NonZeroU16;

use nf_tables::machine::{Broken, Decision, Outcome, Packet, Place, Program};
use serde::Serialize;

use super::base::ROUTERS;
use super::draft::{ICMP, NEW, TCP, UDP};
use super::{REFUSED, name};
use crate::address::{DeviceName, OverlayAddr};
use crate::asg::{EgressRule, Traffic};
use crate::cell::{Inputs, OverlayIngress, Presence};
use crate::container::{Container, Handle};
use crate::link;
use crate::policy::{AppGuid, Inbound, Policies, PolicyTag};
use crate::profile::{Profile, Transport};
use crate::subnet::OverlaySubnet;
use crate::traffic::{self, Decision as Told};

/// The first packet of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Probe {
    Tcp {
        port: u16,
    },
    Udp {
        port: u16,
    },
    Icmp {
        kind: u8,
        code: u8,
    },
    /// Any other protocol of IPv4.
    Other {
        protocol: u8,
    },
}

/// Where the cell's routes lead an address.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Route {
    /// It is the cell's own.
    Cell,
    Device(DeviceName),
    Nowhere,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    Allowed,
    /// The sender is told (ICMP port unreachable).
    Refused,
    /// Without a word.
    Dropped,
}

/// What becomes of a packet, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Explanation {
    pub verdict: Verdict,
    /// The chain and the rule's comment; none: no rule of ours is about it.
    pub rule: Option<String>,
    /// Who made it so: a container's security group, a policy, the cell's configuration.
    pub whose: String,
    /// Where a mapped port led it.
    pub mapped_to: Option<String>,
    /// The source that its destination sees, if that is not the sender's own.
    pub masqueraded: bool,
    /// What the traffic log would say of it.
    pub logged: Vec<String>,
}

impl Probe {
    pub fn protocol(self) -> u8 {
        match self {
            Self::Tcp { .. } => TCP,
            Self::Udp { .. } => UDP,
            Self::Icmp { .. } => ICMP,
            Self::Other { protocol } => protocol,
        }
    }

    /// The bytes behind the IP header that the program looks at.
    fn transport(self) -> Vec<u8> {
        let mut bytes = vec![0; 20];
        match self {
            Self::Tcp { port } | Self::Udp { port } => bytes[2..4].copy_from_slice(&port.to_be_bytes()),
            Self::Icmp { kind, code } => bytes[..2].copy_from_slice(&[kind, code]),
            Self::Other { .. } => {}
        }
        bytes
    }
}

impl EgressRule {
    pub fn covers(&self, to: Ipv4Addr, probe: Probe) -> bool {
        let fits = |given: Option<u8>, is: u8| given.is_none_or(|given| given == is);
        let traffic = match (self.traffic, probe) {
            (Traffic::All, _) => true,
            (Traffic::Tcp(ports), Probe::Tcp { port }) | (Traffic::Udp(ports), Probe::Udp { port }) => {
                (ports.first()..=ports.last()).contains(&port)
            }
            (Traffic::Icmp { kind, code }, Probe::Icmp { kind: k, code: c }) => {
                fits(kind, k) && fits(code, c)
            }
            _ => false,
        };
        traffic && (self.to.first()..=self.to.last()).contains(&to)
    }
}

/// The rule behind a line of the traffic log about what a container sent.
pub fn rule_behind(profile: &Profile, decision: Told, packet: &traffic::Packet) -> Option<String> {
    let (to, probe) = (packet.destination, probe_of(packet));
    match decision {
        Told::Allowed => {
            let rule = profile.rules.iter().rev().find(|rule| rule.covers(to, probe))?;
            Some(format!("security group rule {} ({rule})", rule.index))
        }
        // Deny networks are refused without a line.
        Told::Denied => Some("no security group".into()),
        Told::DeniedC2c => Some("no policy".into()),
        Told::DeniedOverlay => Some("source of no policy".into()),
        Told::Limited | Told::WouldLimit | Told::AllowedC2c => None,
    }
}

/// The policy behind a line about what an app received: `mark` is the packet's.
pub fn policy_behind(
    policies: &Policies,
    app: &AppGuid,
    mark: u32,
    packet: &traffic::Packet,
) -> Option<String> {
    let (tag, probe) = (tag_in(mark)?, probe_of(packet));
    let mut inbound = policies.get(app)?.inbound.iter();
    Some(inbound.find(|inbound| inbound.tag == tag && inbound.covers(probe))?.told(app))
}

/// The app whose packets have this mark, if a policy says so.
pub fn app_behind(policies: &Policies, mark: u32) -> Option<&AppGuid> {
    let tag = tag_in(mark)?;
    policies.iter().find(|(_, policies)| policies.tag == Some(tag)).map(|(app, _)| app)
}

fn tag_in(mark: u32) -> Option<PolicyTag> {
    let [low, high, ..] = mark.to_le_bytes();
    NonZeroU16::new(u16::from_le_bytes([low, high])).map(PolicyTag::new)
}

fn probe_of(packet: &traffic::Packet) -> Probe {
    match (packet.protocol.0, packet.destination_port, packet.icmp_kind.zip(packet.icmp_code)) {
        (TCP, Some(port), _) => Probe::Tcp { port },
        (UDP, Some(port), _) => Probe::Udp { port },
        (ICMP, _, Some((kind, code))) => Probe::Icmp { kind, code },
        (protocol, ..) => Probe::Other { protocol },
    }
}

/// Runs the program on a packet. `routes`: what the cell's routing says of an address.
pub fn explain(
    program: &Program,
    inputs: &Inputs,
    from: Ipv4Addr,
    to: Ipv4Addr,
    probe: Probe,
    routes: impl Fn(Ipv4Addr) -> Route,
) -> Result<Explanation, Broken> {
    let sender = present(inputs, from);
    let mut packet = packet(from, to, probe);
    let own = is_own(inputs, from);
    packet.in_name = match sender {
        Some(container) => Some(link::host_name(container.addr).to_string()),
        None => came_by(inputs, from).filter(|_| !own).map(|device| device.to_string()),
    };
    packet.in_index = sender.map(|container| link::index(container.addr));
    let router = inputs.router().filter(|_| is_router(inputs, from));
    packet.mark = router.map_or(0, |tag| tag.get().into());

    let (mut dst, mut probe, mut mapped_to) = (to, probe, None);
    // What the cell itself sends does not pass there.
    if !own && let Outcome::Dnat { addr, port } = program.run(&name("port-mapping"), &mut packet)?.outcome {
        dst = addr.into();
        probe = Probe::Tcp { port };
        mapped_to = Some(format!("{dst}:{port}"));
        packet.network[16..20].copy_from_slice(&addr);
        packet.transport = probe.transport();
    }
    let out = match present(inputs, dst) {
        Some(container) => Route::Device(link::host_name(container.addr)),
        None => routes(dst),
    };
    let told = |verdict, rule, whose: &str| Explanation {
        verdict,
        rule,
        whose: whose.into(),
        mapped_to: mapped_to.clone(),
        masqueraded: false,
        logged: Vec::new(),
    };
    let chain = match out {
        Route::Nowhere => return Ok(told(Verdict::Dropped, None, "the cell's routes lead nowhere")),
        Route::Cell => "input",
        Route::Device(device) => {
            packet.out_name = Some(device.to_string());
            if own { "output" } else { "forward" }
        }
    };
    if chain == "output" && !program.chains.contains_key(&name(chain)) {
        return Ok(told(Verdict::Allowed, None, "none of ours: what the cell itself sends is not filtered"));
    }
    let decision = program.run(&name(chain), &mut packet)?;
    let refused_later = chain == "input" && packet.mark == REFUSED;
    let verdict = match decision.outcome {
        Outcome::Accept if refused_later => Verdict::Refused,
        Outcome::Accept | Outcome::Dnat { .. } | Outcome::Masquerade => Verdict::Allowed,
        Outcome::Reject => Verdict::Refused,
        Outcome::Drop => Verdict::Dropped,
    };
    let masqueraded = verdict == Verdict::Allowed
        && chain == "forward"
        && program.run(&name("translation"), &mut packet)?.outcome == Outcome::Masquerade;
    let whose = whose(inputs, sender, &decision, dst, probe);
    let rule = decision.by.map(|Place { chain, comment, .. }| format!("{chain}: {comment}"));
    Ok(Explanation { masqueraded, logged: decision.logged, ..told(verdict, rule, &whose) })
}

fn packet(from: Ipv4Addr, to: Ipv4Addr, probe: Probe) -> Packet {
    // RFC 791, section 3.1; the program looks at the addresses only.
    let mut network = vec![0; 20];
    network[12..16].copy_from_slice(&from.octets());
    network[16..20].copy_from_slice(&to.octets());
    Packet {
        family: 2,
        protocol: probe.protocol(),
        network,
        transport: probe.transport(),
        state: NEW,
        ..Packet::default()
    }
}

fn present(inputs: &Inputs, addr: Ipv4Addr) -> Option<&Container> {
    let (container, presence) = inputs.roster.with_addr(OverlayAddr::new(addr))?;
    (presence == Presence::Present).then_some(container)
}

fn is_own(inputs: &Inputs, addr: Ipv4Addr) -> bool {
    let gateway = inputs.lease.map(|lease| lease.subnet.gateway());
    addr == inputs.config.underlay.get() || Some(addr) == gateway
}

/// A machine with a single address on the overlay runs no containers: its packets are taken to carry the routers' tag.
fn is_router(inputs: &Inputs, from: Ipv4Addr) -> bool {
    let single = OverlaySubnet::Single(from);
    inputs.config.ingress == OverlayIngress::Taken && inputs.peers.contains_key(&single)
}

/// The device by which a packet of somebody who is no container of this cell comes in.
fn came_by(inputs: &Inputs, from: Ipv4Addr) -> Option<&DeviceName> {
    let overlay = inputs.config.overlay.get().contains(from);
    if overlay { Some(&inputs.config.vtep_name) } else { inputs.ways.first() }
}

/// The security group that let it out, or the part of the cell that decided.
fn whose(
    inputs: &Inputs,
    sender: Option<&Container>,
    decision: &Decision,
    to: Ipv4Addr,
    probe: Probe,
) -> String {
    let Some(Place { chain, comment, .. }) = &decision.by else {
        return "none of ours: the cell's own rules decide".into();
    };
    let chain = chain.as_str();
    let of = |handle: &Handle, what: &str| format!("{what} of container {handle}");
    let known = sender.and_then(|container| inputs.roster.profile(container.profile?));
    match (sender, known) {
        (Some(sender), Some(known)) if chain.starts_with("egress-") || chain.starts_with("logged-") => {
            let covering = known.profile().rules.iter().rev().find(|rule| rule.covers(to, probe));
            match covering {
                Some(rule) if comment == "security group" => {
                    of(&sender.handle, &format!("security group rule {} ({rule})", rule.index))
                }
                _ => of(&sender.handle, "settings and security groups"),
            }
        }
        _ if comment == ROUTERS || chain == "output" => {
            let tag = inputs.router().map(|tag| tag.to_string()).unwrap_or_default();
            format!("overlay ingress: routers' packets carry tag {tag}")
        }
        _ if decides_on_policy(chain) => policy(inputs, sender, to, probe),
        (Some(sender), _) if chain.starts_with("services-") => {
            of(&sender.handle, "services offered by the cell, settings")
        }
        _ => "this cell".into(),
    }
}

fn decides_on_policy(chain: &str) -> bool {
    let one = ["strangers", "guests"].contains(&chain);
    one || ["app-", "uninvited-", "invited-"].iter().any(|begin| chain.starts_with(begin))
}

/// The policy that lets a sender of this cell in, or that there is none.
fn policy(inputs: &Inputs, sender: Option<&Container>, to: Ipv4Addr, probe: Probe) -> String {
    let receiver = present(inputs, to);
    let app = receiver.and_then(|container| container.owner.app());
    let inbound = app.as_ref().and_then(|app| inputs.policies.get(app)).map(|app| app.inbound.as_slice());
    let from = sender.and_then(|container| container.owner.app());
    let covers = |inbound: &&Inbound| Some(&inbound.from) == from.as_ref() && inbound.covers(probe);
    let name =
        |app: &Option<AppGuid>| app.as_ref().map_or_else(|| "no app".to_owned(), |app| format!("app {app}"));
    match (inbound.unwrap_or_default().iter().find(covers), &app) {
        (Some(inbound), Some(app)) => inbound.told(app),
        _ => format!("policies: none from {} to {} for this", name(&from), name(&app)),
    }
}

impl Inbound {
    fn covers(&self, probe: Probe) -> bool {
        match (self.transport, probe) {
            (Transport::Tcp, Probe::Tcp { port }) | (Transport::Udp, Probe::Udp { port }) => {
                (self.ports.first()..=self.ports.last()).contains(&port)
            }
            _ => false,
        }
    }

    /// As the policy of the app that it lets into.
    fn told(&self, to: &AppGuid) -> String {
        let Self { from, transport, ports, .. } = self;
        let transport = if *transport == Transport::Tcp { "tcp" } else { "udp" };
        format!("policy from app {from} to app {to}, {transport} {ports}")
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Allowed => "allowed",
            Self::Refused => "refused",
            Self::Dropped => "dropped",
        })
    }
}
