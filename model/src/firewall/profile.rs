//! What containers may send: the chains and sets of one profile, named by its digest. They never change; another
//! profile has others, and a container is moved by its elements in the maps.

use std::sync::Arc;

use ipnetwork::Ipv4Network;
use nf_tables::{Field, Key, Name, Ranges, Rule, Set, Target};

use super::draft::{Draft, INVALID, NEW, Part as Of, TCP, UDP, UNTRACKED, rule};
use super::layers::{Layer, Shape, layers};
use super::limits::{Limit, Lines, rate_limit};
use super::settings::{services_chain, translation_chain};
use super::{Content, Filled, Map, Part, Planned, chain, joined, name, set};
use crate::cell::CellConfig;
use crate::profile::{Digest, Known, Profile, Workload};

/// A profile's rules as the kernel takes them: made once for each profile.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Layers(Arc<[Made]>);

#[derive(Debug, Clone, PartialEq, Eq)]
struct Made {
    shape: Shape,
    log: bool,
    set: Arc<Filled>,
}

impl Layers {
    pub fn of(profile: &Profile) -> Self {
        let made = |layer: Layer| Made {
            shape: layer.shape,
            log: layer.log,
            set: Arc::new(Filled { set: with_ranges(layer.key()), ranges: layer.ranges() }),
        };
        Self(layers(&profile.rules, profile.settings.log_all).into_iter().map(made).collect())
    }
}

/// The chains that containers with a profile are led to: named once, since each of them asks.
#[derive(Debug, Clone)]
pub struct Chains {
    pub(super) egress: Name,
    pub(super) services: Name,
    pub(super) translation: Name,
}

impl Chains {
    /// `settings` is the digest of its settings.
    pub fn of(profile: Digest, settings: Digest) -> Self {
        Self {
            egress: name(&egress_chain(profile)),
            services: name(&services_chain(settings)),
            translation: name(&translation_chain(settings)),
        }
    }
}

fn egress_chain(digest: Digest) -> String {
    format!("egress-{digest}")
}

/// What the names of sets begin with that refuse what is in them.
const DENY: &str = "deny-";

/// Whether a set refuses what is in it, and does not let it through.
pub fn refuses(set: &Name) -> bool {
    set.as_str().starts_with(DENY)
}

/// What containers with this profile may send to the world.
pub fn profile(known: &Known, config: &CellConfig) -> Planned {
    let (digest, profile) = (known.digest(), known.profile());
    let this = This { digest, profile, config };
    let mut planned = Planned::new();
    let egress = this.egress(known.layers(), &mut planned);
    planned.push(chain(&egress_chain(digest), egress));
    planned
}

/// The mark of connections that a profile's rules let out. The overlay's port is part of it: where that changes, what
/// is refused to the new one may have been let out before.
pub(super) fn connection_mark(digest: Digest, vtep_port: u16) -> u32 {
    (digest.mark() ^ u32::from(vtep_port)).max(1)
}

struct This<'a> {
    digest: Digest,
    profile: &'a Profile,
    config: &'a CellConfig,
}

impl This<'_> {
    /// dataplane.md, "To the world", in its order.
    fn egress(&self, layers: &Layers, planned: &mut Planned) -> Vec<Rule> {
        let settings = &self.profile.settings;
        let mut rules = Vec::new();
        if let Some(max) = settings.outbound_connections.max {
            let limit = Limit::Connections { max: max.get() };
            rules.push(rule("too many connections").state(NEW).by(limit).reject());
            // A set that took no more would be no limit.
            let full = rule("connections cannot be counted").state(NEW);
            rules.push(full.not_in_set(&limit.set_name(), limit.key()).reject());
        }
        rules.extend(self.rate(planned));
        if settings.deny_cloud_metadata {
            rules.push(
                rule("cloud metadata")
                    .in_set(Map::Metadata.name(), &[Of::Destination])
                    .jump("metadata-rules"),
            );
        }
        rules.extend(self.deny_networks(planned));
        rules.extend(self.layers(layers, planned));
        if settings.log_all {
            let per_sec = settings.denied_logs_per_sec.get();
            rules.extend(limited_log(Lines::Denied, per_sec, self.config.log_group));
        }
        rules.push(rule("no security group").reject());
        rules
    }

    fn rate(&self, planned: &mut Planned) -> Vec<Rule> {
        let settings = &self.profile.settings;
        let Some(rate) = &settings.outbound_connections.rate else { return Vec::new() };
        let limit = rate_limit(rate);
        let too_many = || rule("too many new connections").protocol(TCP).state(NEW).by(limit);
        let log = |of| limited_log(of, settings.denied_logs_per_sec.get(), self.config.log_group);
        if rate.dry_run {
            let chain_name = format!("over-rate-{}", self.digest);
            planned.push(chain(&chain_name, log(Lines::OverLimit)));
            return vec![too_many().jump(&chain_name)];
        }
        let refused = if rate.log || settings.log_all {
            let chain_name = format!("over-rate-{}", self.digest);
            let mut rules = log(Lines::Limited);
            rules.push(rule("too many new connections").reject());
            planned.push(chain(&chain_name, rules));
            too_many().goto(&chain_name)
        } else {
            too_many().reject()
        };
        // A set that took no more would be no limit.
        let full = rule("new connections cannot be counted").protocol(TCP).state(NEW);
        vec![refused, full.not_in_set(&limit.set_name(), limit.key()).reject()]
    }

    fn deny_networks(&self, planned: &mut Planned) -> Option<Rule> {
        let deny = &self.profile.settings.deny_networks;
        let by_workload = match self.profile.workload {
            Workload::Running => deny.running.as_slice(),
            Workload::Staging => deny.staging.as_slice(),
            Workload::Other => &[],
        };
        let spans: Vec<(u32, u32)> = deny.always.iter().chain(by_workload).map(span).collect();
        if spans.is_empty() {
            return None;
        }
        let apart = joined(spans);
        let set_name = format!("{DENY}{}", self.digest);
        let key = |addr: u32, protocol: u8| [&addr.to_be_bytes()[..], &[protocol, 0, 0, 0]].concat();
        let ends: Vec<_> = apart.iter().map(|(first, last)| (key(*first, 0), key(*last, 255))).collect();
        let key = Key::from([Field::Ipv4, Field::Protocol]);
        let ranges = Ranges::new(key.len(), ends.iter().map(|(low, high)| (low.as_slice(), high.as_slice())));
        planned.push(set(&set_name, with_ranges(key), ranges));
        Some(rule("denied network").in_set(&name(&set_name), &[Of::Destination, Of::Protocol]).reject())
    }

    fn layers(&self, layers: &Layers, planned: &mut Planned) -> Vec<Rule> {
        let logged = format!("logged-{}", self.digest);
        if layers.0.iter().any(|layer| layer.log) {
            planned.push(chain(&logged, self.logged()));
        }
        let mut rules = Vec::new();
        for (number, layer) in layers.0.iter().enumerate() {
            let set_name = name(&format!("asg-{}-{number}", self.digest));
            planned.push((Part::Set(set_name.clone()), Content::Set(Arc::clone(&layer.set))));
            let security_group = rule("security group");
            let found = match layer.shape {
                Shape::Any => security_group.in_set(&set_name, &[Of::Destination, Of::Protocol]),
                Shape::Ports => security_group.in_set(&set_name, &[Of::Destination, Of::Protocol, Of::Port]),
                Shape::Icmp => security_group
                    .protocol(super::draft::ICMP)
                    .in_set(&set_name, &[Of::Destination, Of::IcmpType, Of::IcmpCode]),
            };
            rules.push(if layer.log { found.goto(&logged) } else { self.allow(found).accept() });
        }
        rules
    }

    /// Later packets of the connection are let out by one look, as long as the profile stays.
    fn allow(&self, draft: Draft) -> Draft {
        draft.mark_connection(connection_mark(self.digest, self.config.vtep_port))
    }

    fn logged(&self) -> Vec<Rule> {
        let per_sec = self.profile.settings.accepted_udp_logs_per_sec.get();
        let allowed = || rule("security group");
        let (udp, other) = (allowed().protocol(UDP).accept(), self.allow(allowed()).accept());
        log_each(Lines::AcceptedUdp, per_sec, self.config.log_group, udp, other)
    }
}

/// Counts, and logs as long as the limit says.
pub(super) fn limited_log(of: Lines, per_sec: u32, log_group: u16) -> Vec<Rule> {
    vec![
        rule("counted").by(Limit::Total { of }).go_on(),
        rule("logged").by(Limit::Lines { of, per_sec }).log(log_group, of.decision().prefix()).go_on(),
    ]
}

/// A line for each connection; of UDP, where one packet may be one, as many as the limit says. Then `udp` or `other`.
pub(super) fn log_each(of: Lines, per_sec: u32, log_group: u16, udp: Rule, other: Rule) -> Vec<Rule> {
    let prefix = of.decision().prefix();
    let datagram = |comment| rule(comment).protocol(UDP);
    vec![
        datagram("counted").by(Limit::Total { of }).go_on(),
        datagram("logged").by(Limit::Lines { of, per_sec }).log(log_group, prefix).go_on(),
        udp,
        rule("logged").state(INVALID | NEW | UNTRACKED).log(log_group, prefix).go_on(),
        other,
    ]
}

pub(super) fn with_ranges(key: Key) -> Set {
    Set { key, target: Target::Nothing, ranges: true, dynamic: None }
}

fn span(network: &Ipv4Network) -> (u32, u32) {
    (network.network().into(), network.broadcast().into())
}
