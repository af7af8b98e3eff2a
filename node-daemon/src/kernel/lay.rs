//! Carries out a step: what it lays, then what it takes away. Each change that fails is reported by its key; all
//! others are carried out.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::AsRawFd;

use nix::libc::{EEXIST, ENODEV};
use weft_model::address::{DeviceName, HardwareAddr, OverlayAddr};
use weft_model::bandwidth::device_name;
use weft_model::cell::{Belief, Change, Key, Object, Outcome, PeerSpec, Step, Stray, VtepSpec};
use weft_model::link::{LinkSpec, host_name};
use weft_model::reason::Reason;
use weft_model::subnet::OverlaySubnet;

use super::delete::Deleters;
use super::dump::{self, Device, RouteSocket};
use super::message::{self, Request};
use super::rules::RulesSocket;
use super::socket::Refusal;
use super::{Namespaces, shaping, sysctl};

/// One step on its way through the kernel.
pub(super) struct Work<'a> {
    pub(super) socket: &'a mut RouteSocket,
    pub(super) rules: &'a mut RulesSocket,
    pub(super) deleters: &'a Deleters,
    pub(super) vtep: &'a DeviceName,
    pub(super) namespaces: &'a Namespaces,
    /// Only the first failure of a key is kept: the others follow from it.
    pub(super) outcome: Outcome,
}

/// A message, and whose it is.
type Owned<'a> = (&'a Key, Request);

/// What a step lays on the VXLAN device. A stray that has the same address is no stray any more.
#[derive(Default)]
struct Laid {
    gateways: BTreeSet<Ipv4Addr>,
    macs: BTreeSet<HardwareAddr>,
}

impl Work<'_> {
    pub(super) fn carry_out(mut self, step: &Step) -> Outcome {
        // First: a new link finds its rules, and one that goes has lost them.
        self.outcome.failed.extend(self.rules.carry_out(&step.firewall));
        self.clear_the_way(step);
        for change in step.changes() {
            if let Some(Object::Vtep(spec)) = &change.will {
                self.lay_vtep(spec).unwrap_or_else(|why| self.fail(&change.key, why));
            }
        }
        self.create_veths(step);
        let settings = self.settings(step);
        self.send(settings);
        for (key, link) in links(step) {
            if !self.outcome.failed.contains_key(key)
                && let Err(e) = sysctl::ipv6_off(&link.host_name())
            {
                self.fail(key, kernel("switch IPv6 off on", key, &e));
            }
        }
        self.delete_links(removed_links(step));
        if let Some(change) = step.changes().find(|c| c.key == Key::Vtep && c.will.is_none()) {
            self.delete_vtep().unwrap_or_else(|why| self.fail(&change.key, why));
        }
        self.outcome
    }

    fn fail(&mut self, key: &Key, why: Reason) {
        self.outcome.failed.entry(key.clone()).or_insert(why);
    }

    // === links ===

    /// A link that is made anew, while there may be something of it, is taken away first.
    fn clear_the_way(&mut self, step: &Step) {
        let anew = step.changes().filter(|change| match &change.will {
            Some(Object::Link(spec)) => change.was.is_some() && self.namespaces.contains_key(&spec.addr),
            _ => false,
        });
        self.delete_links(anew.map(|change| &change.key).collect());
    }

    /// All pairs first: what could not be created must not be configured, it would be another's.
    fn create_veths(&mut self, step: &Step) {
        let mut creations = Vec::new();
        for (key, spec) in links(step) {
            if let Some(namespace) = self.namespaces.get(&spec.addr)
                && !self.outcome.failed.contains_key(key)
            {
                let namespace = namespace.as_raw_fd();
                creations.push(((key, spec), message::number_namespace(spec, namespace)));
                creations.push(((key, spec), message::veth(spec, namespace)));
            }
        }
        for ((key, spec), request, refusal) in self.refused(creations) {
            let why = match refusal {
                Ok(refusal) if refusal.errno == EEXIST && !self.exists(&spec.host_name()) => {
                    Reason::InterfaceTaken { interface: spec.interface.to_string() }
                }
                Ok(refusal) => kernel(request.operation, key, &refusal.into()),
                Err(e) => kernel(request.operation, key, &e),
            };
            self.fail(key, why);
        }
    }

    fn delete_links(&mut self, keys: Vec<&Key>) {
        let names: BTreeMap<DeviceName, &Key> = keys
            .into_iter()
            .filter_map(|key| match key {
                Key::Link(addr) => Some((host_name(*addr), key)),
                Key::Shaping(addr) => Some((device_name(*addr), key)),
                _ => None,
            })
            .collect();
        for (name, error) in self.deleters.delete(names.keys().cloned().collect()) {
            if let Some(key) = names.get(&name) {
                self.fail(key, kernel("delete", key, &error));
            }
        }
    }

    // === all that is set on devices ===

    fn settings<'s>(&mut self, step: &'s Step) -> Vec<Owned<'s>> {
        let laid = Laid::by(step);
        // Without the device there is nothing to take from it; laying fails with "no such device".
        let vtep = match step.changes().any(|change| matches!(change.key, Key::Peer(_) | Key::Stray(_))) {
            true => self.device(self.vtep.as_str()).ok().flatten().map_or(0, |device| device.index),
            false => 0,
        };
        let mut all = self.routes_with_metric(step, vtep);
        for change in step.changes().filter(|change| !self.outcome.failed.contains_key(&change.key)) {
            let requests = match (&change.key, &change.will) {
                (Key::Peer(_), Some(Object::Peer(spec))) => lay_peer(change, spec, vtep),
                (Key::Peer(_), None) if vtep != 0 => remove_peer(change, vtep),
                (Key::Stray(stray), None) if vtep != 0 => laid.unless(stray, vtep),
                (Key::Link(addr), Some(Object::Link(spec))) => {
                    let anew = self.namespaces.contains_key(addr);
                    let mend = (!anew).then(|| message::mend(spec));
                    mend.into_iter().chain(message::host_end(spec)).collect()
                }
                (Key::Shaping(addr), Some(Object::Shaping(spec))) => {
                    shaping::lay(spec, change.was.as_ref(), self.namespaces.contains_key(addr))
                }
                (Key::Shaping(addr), None) if !goes(step, *addr) => shaping::unlay(*addr),
                _ => Vec::new(),
            };
            all.extend(requests.into_iter().map(|request| (&change.key, request)));
        }
        all
    }

    /// Of a peer that is not what it should be, routes beside the one that we lay and delete.
    fn routes_with_metric<'s>(&mut self, step: &'s Step, vtep: u32) -> Vec<Owned<'s>> {
        let unknown: BTreeMap<OverlaySubnet, &Key> = step
            .changes()
            .filter(|change| change.was == Some(Belief::Unknown))
            .filter_map(|change| match &change.key {
                Key::Peer(subnet) => Some((*subnet, &change.key)),
                _ => None,
            })
            .collect();
        if unknown.is_empty() || vtep == 0 {
            return Vec::new();
        }
        // What cannot be read now is seen by the next audit.
        let routes = dump::routes(self.socket, vtep).unwrap_or_default();
        let beside = routes.into_iter().filter(|route| route.metric != 0).filter_map(|route| {
            let subnet = route.subnet()?;
            let key = unknown.get(&subnet)?;
            Some((*key, message::delete_route(subnet, route.gateway, route.metric, vtep)))
        });
        beside.collect()
    }

    fn send(&mut self, requests: Vec<Owned<'_>>) {
        for (key, request, refusal) in self.refused(requests) {
            let why = match (key, refusal) {
                (Key::Link(addr), Ok(refusal)) if refusal.errno == ENODEV => {
                    kernel(request.operation, key, &io::Error::other(format!("{} is gone", host_name(*addr))))
                }
                (_, Ok(refusal)) => kernel(request.operation, key, &refusal.into()),
                (_, Err(e)) => kernel(request.operation, key, &e),
            };
            self.fail(key, why);
        }
    }

    /// Sends all, and returns those that were not carried out: refused, or not even sent.
    fn refused<T>(&mut self, requests: Vec<(T, Request)>) -> Vec<(T, Request, io::Result<Refusal>)> {
        if requests.is_empty() {
            return Vec::new();
        }
        let messages = requests.iter().map(|(_, request)| (request.message.clone(), request.flags)).collect();
        match self.socket.batch(messages) {
            Ok(outcomes) => {
                let refused = requests.into_iter().zip(outcomes).filter_map(|((owner, request), outcome)| {
                    let refusal =
                        outcome.err().filter(|refusal| !request.tolerates.contains(&refusal.errno))?;
                    Some((owner, request, Ok(refusal)))
                });
                refused.collect()
            }
            Err(e) => {
                let copy = || io::Error::new(e.kind(), e.to_string());
                requests.into_iter().map(|(owner, request)| (owner, request, Err(copy()))).collect()
            }
        }
    }

    // === the VXLAN device ===

    /// Makes the device, or adopts one that is made the same way, and gives it MTU and address.
    fn lay_vtep(&mut self, spec: &VtepSpec) -> Result<(), Reason> {
        let key = &Key::Vtep;
        let failed = |operation: &str, e: &io::Error| kernel(operation, key, e);
        let read = |e: io::Error| failed("read", &e);
        let mut device = self.device(spec.name.as_str()).map_err(read)?;
        if let Some(there) = &device {
            refuse_foreign(there)?;
            if !there.vtep(spec.addr, spec.overlay).is_some_and(|is| is.same_device(spec)) {
                self.one(key, message::delete_link(&spec.name))?;
                device = None;
            }
        }
        if device.is_none() {
            self.one(key, message::vtep(spec))?;
            device = self.device(spec.name.as_str()).map_err(read)?;
        }
        let Some(device) = device else { return Err(read_nothing(spec)) };
        let prefix = spec.overlay.get().prefix();
        let addresses = dump::addresses(self.socket).map_err(read)?;
        let others = addresses.into_iter().filter(|a| a.index == device.index && !a.is(spec.addr, prefix));
        for other in others {
            self.one(key, message::delete_address(device.index, other.local, other.peer, other.prefix))?;
        }
        for request in message::vtep_settings(spec, device.index) {
            self.one(key, request)?;
        }
        sysctl::ipv6_off(&spec.name).map_err(|e| failed("switch IPv6 off on", &e))?;
        self.forward_from_underlay(spec.device)
            .map_err(|e| failed("switch forwarding on for the device of", &e))
    }

    fn forward_from_underlay(&mut self, index: u32) -> io::Result<()> {
        let links = dump::links(self.socket)?;
        let device = links.into_iter().find(|device| device.index == index);
        let name = device.and_then(|device| device.name.parse().ok());
        sysctl::forward_from(&name.ok_or_else(|| io::Error::other("the underlay's device is gone"))?)
    }

    fn delete_vtep(&mut self) -> Result<(), Reason> {
        if let Some(there) = self.device(self.vtep.as_str()).map_err(|e| kernel("read", &Key::Vtep, &e))? {
            refuse_foreign(&there)?;
        }
        self.one(&Key::Vtep, message::delete_link(self.vtep))
    }

    fn one(&mut self, key: &Key, request: Request) -> Result<(), Reason> {
        match self.refused(vec![((), request)]).pop() {
            None => Ok(()),
            Some(((), request, refusal)) => {
                let error = refusal.map_or_else(|e| e, io::Error::from);
                Err(kernel(request.operation, key, &error))
            }
        }
    }

    fn device(&mut self, name: &str) -> io::Result<Option<Device>> {
        match self.socket.get(message::get_link(name))? {
            Ok(message) => Ok(dump::device(message)),
            Err(refusal) if refusal.errno == ENODEV => Ok(None),
            Err(refusal) => Err(refusal.into()),
        }
    }

    fn exists(&mut self, name: &DeviceName) -> bool {
        !matches!(self.device(name.as_str()), Ok(None))
    }
}

impl Laid {
    fn by(step: &Step) -> Self {
        let mut laid = Self::default();
        for change in step.changes() {
            if let Some(Object::Peer(spec)) = &change.will {
                laid.gateways.insert(spec.subnet.gateway());
                laid.macs.insert(spec.mac);
            }
        }
        laid
    }

    fn unless(&self, stray: &Stray, vtep: u32) -> Vec<Request> {
        match stray {
            Stray::Route { dst, gateway } => vec![message::delete_route(*dst, *gateway, 0, vtep)],
            Stray::Neighbour(addr) if !self.gateways.contains(addr) => {
                vec![message::delete_neighbour(*addr, vtep)]
            }
            Stray::Forward(mac) if !self.macs.contains(mac) => vec![message::delete_forward(*mac, vtep)],
            Stray::Neighbour(_) | Stray::Forward(_) => Vec::new(),
        }
    }
}

/// All is replaced in place, so that a peer that is whole loses no packet. Only another MAC's entry has to go.
fn lay_peer(change: &Change, spec: &PeerSpec, vtep: u32) -> Vec<Request> {
    let mut requests = Vec::new();
    if let Some(Belief::Holds(Object::Peer(was))) = &change.was
        && was.mac != spec.mac
    {
        requests.push(message::delete_forward(was.mac, vtep));
    }
    requests.extend(message::peer(spec, vtep));
    requests
}

fn remove_peer(change: &Change, vtep: u32) -> Vec<Request> {
    let Key::Peer(subnet) = change.key else { return Vec::new() };
    let mac = match &change.was {
        Some(Belief::Holds(Object::Peer(was))) => was.mac,
        _ => subnet.hardware_addr(),
    };
    vec![
        message::delete_route(subnet, subnet.gateway(), 0, vtep),
        message::delete_neighbour(subnet.gateway(), vtep),
        message::delete_forward(mac, vtep),
    ]
}

fn links(step: &Step) -> impl Iterator<Item = (&Key, &LinkSpec)> {
    step.changes().filter_map(|change| match &change.will {
        Some(Object::Link(spec)) => Some((&change.key, spec)),
        _ => None,
    })
}

fn removed_links(step: &Step) -> Vec<&Key> {
    let removed = step.changes().filter(|change| change.will.is_none());
    let device = |change: &&Change| match (&change.key, &change.was) {
        (Key::Shaping(_), Some(Belief::Holds(Object::Shaping(spec)))) => spec.bandwidth.from.is_some(),
        (key, _) => matches!(key, Key::Link(_) | Key::Shaping(_)),
    };
    removed.filter(device).map(|change| &change.key).collect()
}

/// Whether a container's link is taken away, and with it all that stands on it.
fn goes(step: &Step, addr: OverlayAddr) -> bool {
    step.changes().any(|change| change.key == Key::Link(addr) && change.will.is_none())
}

/// A device of our name that is not of our kind belongs to somebody: it is neither changed nor deleted.
fn refuse_foreign(there: &Device) -> Result<(), Reason> {
    if there.vxlan.is_some() {
        return Ok(());
    }
    let why =
        "a device of this name is there and is no VXLAN device; rename it, or configure another vtep_name";
    Err(Reason::Kernel { operation: "take over".into(), subject: there.name.clone(), why: why.into() })
}

fn read_nothing(spec: &VtepSpec) -> Reason {
    Reason::Kernel {
        operation: "create".into(),
        subject: spec.name.to_string(),
        why: "it was gone at once: something else deletes it".into(),
    }
}

fn kernel(operation: &str, key: &Key, error: &io::Error) -> Reason {
    Reason::Kernel { operation: operation.to_owned(), subject: key.to_string(), why: error.to_string() }
}
