//! What must be after each step of a script: what the node knows is what the server has, what the kernel holds is what a
//! plan from scratch says, and each connection has the fate that `explain` and the policies and groups themselves say.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use weft_model::asg::group::{self, SecurityGroup, rules_for};
use weft_model::cell::unit::plan;
use weft_model::cell::{Belief, Cell, Key, Record, Scope};
use weft_model::firewall::explain::{Probe, Route, Verdict, explain};
use weft_model::firewall::program;
use weft_model::profile::{Transport, Workload};
use weft_node::kernel::Kernel;
use weft_node::kernel::conntrack::Connections;
use weft_node::policy_server::Known;

use crate::attempt::{Attempt, Became};
use crate::scripts::{APPS, Play, app, passed, space};
use crate::world::{CELL, part};

/// Tried by each container.
const WORLD: [(u8, Probe); 6] = [
    (1, Probe::Tcp { port: 80 }),
    (33, Probe::Tcp { port: 443 }),
    (2, Probe::Udp { port: 53 }),
    (20, Probe::Udp { port: 53 }),
    (5, Probe::Icmp { kind: 8, code: 0 }),
    // As the platform passed it.
    (9, Probe::Tcp { port: 9 }),
];

impl Play {
    /// Why not all of what the server has is in the kernel yet.
    pub(crate) async fn behind(&mut self) -> Option<String> {
        let known = self.node().known.borrow().clone();
        let (Some(policies), Some(groups)) = (&known.policies, &known.groups) else {
            return Some("nothing was heard of the server".into());
        };
        let apps: BTreeSet<u8> = self.containers.keys().map(|n| n % APPS).collect();
        for app_of in apps {
            let knows = policies.value.get(app(app_of).as_str());
            let inbound: BTreeSet<_> = knows
                .iter()
                .flat_map(|app| &app.inbound)
                .map(|inbound| {
                    (
                        inbound.from.to_string(),
                        inbound.transport == Transport::Tcp,
                        inbound.ports.first(),
                        inbound.ports.last(),
                    )
                })
                .collect();
            let to = self.policies.iter().filter(|(_, to, ..)| *to == app_of);
            let listed: BTreeSet<_> = to
                .map(|(from, _, tcp, port)| {
                    (app(*from), *tcp, 8080 + u16::from(*port), 8081 + u16::from(*port))
                })
                .collect();
            if inbound != listed {
                return Some(format!("known of app {app_of}: {inbound:?}, listed: {listed:?}"));
            }
            let tagged = knows.is_some_and(|app| app.tag.is_some());
            if tagged != self.policies.iter().any(|(from, ..)| *from == app_of) {
                return Some(format!("app {app_of} has a tag: {tagged}"));
            }
        }
        let spaces: BTreeSet<String> = self.containers.keys().map(|n| space(n / 2)).collect();
        if !groups.ids.spaces.is_superset(&spaces) {
            return Some(format!("asked about {:?}", groups.ids.spaces));
        }
        let concern = |group: &&SecurityGroup| {
            let mut bound = group.running_spaces.iter().chain(&group.staging_spaces);
            group.running_default || group.staging_default || bound.any(|space| spaces.contains(space))
        };
        let all: Value = json!({"next": 0, "security_groups": self.groups.values().collect::<Vec<_>>()});
        let listed = group::parse(all.to_string().as_bytes()).expect("a list").groups;
        let by_guid = |groups: &[SecurityGroup]| {
            groups
                .iter()
                .filter(concern)
                .map(|group| (group.guid.clone(), group.clone()))
                .collect::<BTreeMap<_, _>>()
        };
        if by_guid(&groups.value) != by_guid(&listed) {
            return Some(format!("known: {:?}, listed: {listed:?}", groups.value));
        }
        let applied = *self.node().applied.borrow();
        if (applied.policies, applied.groups) != (policies.number, groups.number) {
            return Some(format!("applied: {applied:?}"));
        }
        let differs = self.differences(&known).await;
        (!differs.is_empty()).then(|| format!("{differs:#?}"))
    }

    /// The same state from nothing.
    fn afresh(&self, known: &Known) -> Cell {
        let mut cell = self.empty.clone();
        for (_, container, profile) in self.containers.values() {
            cell.replay([Record::Profile(Arc::clone(profile)), Record::Present(Arc::new(container.clone()))]);
        }
        if let Some(told) = &known.policies {
            cell.policies((*told.value).clone());
        }
        if let Some(told) = &known.groups {
            let too_many = cell.groups(Some((Arc::clone(&told.value), told.ids.spaces.clone())));
            assert!(too_many.is_empty(), "{too_many:?}");
        }
        cell
    }

    /// What the kernel holds that the plan has not, and the other way round.
    pub(crate) async fn differences(&mut self, known: &Known) -> Vec<String> {
        let wanted = plan(self.afresh(known).inputs());
        let wanted: BTreeMap<Key, Belief> = wanted
            .into_iter()
            .filter(|(key, _)| key.is_firewall())
            .map(|(key, object)| (key, Belief::Holds(object)))
            .collect();
        let seen = self.world.site.kernel.see(Scope::Firewall).await.expect("seen");
        let keys: BTreeSet<&Key> = wanted.keys().chain(seen.keys()).collect();
        let differ = keys.into_iter().filter(|key| wanted.get(key) != seen.get(key));
        differ.map(|key| format!("{key}: wanted {:?}, is {:?}", wanted.get(key), seen.get(key))).collect()
    }

    /// Tries each container to each other, and to the world.
    pub(crate) fn connect(&mut self) {
        let known = self.node().known.borrow().clone();
        let cell = self.afresh(&known);
        let program = program(cell.wanted().iter().filter_map(part));
        let addrs = self.containers.values().map(|(_, container, _)| container.addr).collect();
        // A port that is used again would be taken for one more packet of a connection.
        self.world.site.space.enter(|| Connections::open()?.forget(&addrs)).expect("forgotten");
        for (n, (instance, ..)) in &self.containers {
            let others = self.containers.iter().filter(|(other, _)| *other != n);
            let near = others.flat_map(|(other, (server, ..))| {
                [8080, 8081, 8083].into_iter().flat_map(move |port| {
                    let probes = [Probe::Tcp { port }, Probe::Udp { port }];
                    probes.map(|probe| (Some(*other), server.addr, probe, &server.space))
                })
            });
            let outside = &self.world.outside;
            let far = WORLD.map(|(last, probe)| (None, Ipv4Addr::new(198, 51, 100, last), probe, outside));
            for (other, to, probe, server) in near.chain(far) {
                let routes = |_: Ipv4Addr| Route::Device("eth0".parse().expect("name"));
                let told = explain(&program, cell.inputs(), instance.addr, to, probe, routes).expect("whole");
                let port = match probe {
                    Probe::Tcp { port } | Probe::Udp { port } => port,
                    _ => 0,
                };
                let attempt = Attempt {
                    space: &instance.space,
                    from: instance.addr,
                    to,
                    probe,
                    server,
                    at: (to, port),
                    patience: Duration::from_secs(10),
                };
                let expected = match told.verdict {
                    Verdict::Allowed if told.masqueraded => Became::Arrived { seen: CELL },
                    Verdict::Allowed => Became::Arrived { seen: instance.addr },
                    Verdict::Refused => Became::Refused,
                    Verdict::Dropped => Became::Dropped,
                };
                let what = format!("container {n} to {other:?} {to}, {probe:?}");
                assert_eq!(attempt.make(), expected, "{what}: {told:?}");
                let may = match other {
                    Some(other) => policy_lets(&known, *n, other, probe),
                    None => group_lets(&known, *n, to, probe),
                };
                assert_eq!(told.verdict == Verdict::Allowed, may, "{what}: {told:?}");
                *self.fates.entry((other.is_some(), may)).or_default() += 1;
            }
        }
    }
}

/// What of it counts: not when it was confirmed, and under which number.
pub(crate) fn said(known: &Known) -> impl PartialEq + std::fmt::Debug {
    let policies = known.policies.as_ref().map(|told| (Arc::clone(&told.value), Arc::clone(&told.ids)));
    let groups = known.groups.as_ref().map(|told| (Arc::clone(&told.value), Arc::clone(&told.ids)));
    (policies, groups)
}

fn policy_lets(known: &Known, from: u8, to: u8, probe: Probe) -> bool {
    let [from, to] = [from, to].map(|n| app(n % APPS).parse().expect("guid"));
    let app = known.policies.as_ref().and_then(|told| told.value.get(&to));
    app.is_some_and(|app| {
        app.inbound.iter().filter(|inbound| inbound.from == from).any(|inbound| {
            match (inbound.transport, probe) {
                (Transport::Tcp, Probe::Tcp { port }) | (Transport::Udp, Probe::Udp { port }) => {
                    (inbound.ports.first()..=inbound.ports.last()).contains(&port)
                }
                _ => false,
            }
        })
    })
}

fn group_lets(known: &Known, from: u8, to: Ipv4Addr, probe: Probe) -> bool {
    let space = space(from / 2);
    let told = known.groups.as_ref().filter(|told| told.ids.spaces.contains(&space));
    let rules = told.map_or_else(passed, |told| rules_for(&told.value, &space, Workload::Running));
    rules.iter().any(|rule| rule.covers(to, probe))
}
