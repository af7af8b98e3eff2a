//! Containers come, change and go: what is asked of them becomes records of the roster, and units that are planned anew.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::{Belief, Cell, Key, Presence, Record, Unit};
use crate::address::{DeviceName, OverlayAddr};
use crate::bandwidth::Bandwidth;
use crate::container::{Container, Handle, Owner, PortMapping};
use crate::profile::Known;
use crate::reason::Reason;

/// A container as it is asked for; the cell gives it an address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    pub handle: Handle,
    pub interface: DeviceName,
    /// Bytes; none: what the overlay carries.
    pub mtu: Option<u32>,
    pub owner: Owner,
    pub ports: Vec<PortMapping>,
    /// The network configuration's name.
    pub network: String,
    pub profile: Arc<Known>,
    pub bandwidth: Bandwidth,
    /// The file of its network namespace, as the runtime named it.
    pub namespace: String,
}

/// What a delete found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dropped {
    /// Nothing is left to wait for.
    Absent,
    /// The link is removed by the next step.
    Leaving(OverlayAddr),
}

impl Cell {
    /// Whether a container could be added now, and if not, why.
    pub fn ready(&self) -> Result<(), Reason> {
        if let Some(reason) = &self.fenced {
            return Err(reason.clone());
        }
        let Some(lease) = self.inputs.lease else {
            return Err(Reason::NoLeaseYet { why: "the controller has not answered yet".into() });
        };
        if self.inputs.device.is_none() {
            return Err(Reason::Starting);
        }
        if self.inputs.roster.ipam().next().is_none() {
            return Err(Reason::SubnetFull { subnet: lease.subnet.to_string() });
        }
        Ok(())
    }

    pub fn add(&mut self, wanted: Wanted) -> Result<Arc<Container>, Reason> {
        match self.inputs.roster.get(&wanted.handle) {
            None => {}
            Some((_, Presence::Leaving)) => return Err(Reason::Busy),
            Some(_) => return Err(Reason::AlreadyAdded { handle: wanted.handle.to_string() }),
        }
        self.ready()?;
        let (Some(addr), Some(fits)) = (self.inputs.roster.ipam().next(), self.inputs.mtu()) else {
            return Err(Reason::Bug { invariant: "a ready cell has an address and an MTU".into() });
        };
        let mtu = wanted.mtu.unwrap_or(fits);
        // RFC 791: every IPv4 module must forward 68 bytes without fragmenting.
        if !(68..=fits).contains(&mtu) {
            let why = format!("{mtu} is outside 68 to {fits}, what the overlay carries here");
            return Err(Reason::InvalidField { field: "mtu".into(), why });
        }
        self.take_ports(&wanted.ports)?;
        let profile = wanted.profile.digest();
        if self.inputs.roster.profile(profile).is_none() {
            self.record(Record::Profile(wanted.profile));
        }
        let container = Arc::new(Container {
            handle: wanted.handle,
            addr,
            interface: wanted.interface,
            mtu,
            wanted_mtu: wanted.mtu,
            namespace: wanted.namespace,
            owner: wanted.owner,
            ports: wanted.ports,
            network: wanted.network,
            profile: Some(profile),
            passed: Some(profile),
            bandwidth: wanted.bandwidth,
        });
        // The queues of a link that stood there before are not this one's.
        if let Some(belief) = self.believed.get_mut(&Key::Shaping(addr)) {
            *belief = Belief::Unknown;
        }
        self.record(Record::Present(Arc::clone(&container)));
        self.unborn.insert(addr);
        self.replan_container(&container.handle);
        self.follow_groups(&container.handle);
        Ok(container)
    }

    /// Containers whose links carry more than the overlay now does, or less than they could; and how much they should.
    pub fn misfits(&self) -> impl Iterator<Item = (&Arc<Container>, u32)> {
        let present = self.inputs.roster.iter().filter(|(_, presence)| *presence == Presence::Present);
        present.filter_map(|(container, _)| {
            let mtu = self.inputs.link_mtu(container).filter(|mtu| *mtu != container.mtu)?;
            Some((container, mtu))
        })
    }

    /// The container's own end carries so much now: the cell's end follows. The other way round, what the container sends
    /// would be too long for the cell's end, and vanish.
    pub fn fit(&mut self, addr: OverlayAddr, mtu: u32) {
        if let Some((container, Presence::Present)) = self.inputs.roster.with_addr(addr)
            && container.mtu != mtu
        {
            let handle = container.handle.clone();
            self.record(Record::Fitted(handle.clone(), mtu));
            self.replan(Unit::Container(handle));
        }
    }

    /// Gives a container another profile. Its established connections stay.
    pub fn assign(&mut self, handle: &Handle, profile: Arc<Known>) -> Result<(), Reason> {
        let unknown = || Reason::UnknownContainer { handle: handle.to_string() };
        let (container, presence) = self.inputs.roster.get(handle).ok_or_else(unknown)?;
        let digest = profile.digest();
        if container.profile == Some(digest) || presence == Presence::Leaving {
            return Ok(());
        }
        if self.inputs.roster.profile(digest).is_none() {
            self.record(Record::Profile(profile));
        }
        self.record(Record::Assigned(handle.clone(), digest));
        self.replan(Unit::Granted(handle.clone()));
        Ok(())
    }

    /// Frees ports whose holders' namespaces have ended without a delete; refuses those that are in use.
    fn take_ports(&mut self, ports: &[PortMapping]) -> Result<(), Reason> {
        let holders = ports.iter().filter_map(|mapping| {
            let holder = self.inputs.roster.with_port(mapping.host)?;
            Some((mapping.host, self.inputs.roster.get(holder)?))
        });
        let mut ended = BTreeSet::new();
        for (port, (holder, presence)) in holders {
            match presence {
                Presence::Lost => drop(ended.insert(holder.handle.clone())),
                Presence::Leaving => return Err(Reason::Busy),
                Presence::Present => {
                    let holder = holder.handle.to_string();
                    return Err(Reason::HostPortTaken { port: port.get(), holder });
                }
            }
        }
        for handle in ended {
            self.drop(&handle);
        }
        Ok(())
    }

    pub fn drop(&mut self, handle: &Handle) -> Dropped {
        let Some((container, presence)) = self.inputs.roster.get(handle) else { return Dropped::Absent };
        let addr = container.addr;
        if presence != Presence::Leaving {
            self.record(Record::Leaving(handle.clone()));
            self.replan_container(handle);
        }
        if self.believed.contains_key(&Key::Link(addr)) {
            return Dropped::Leaving(addr);
        }
        self.unborn.remove(&addr);
        self.record(Record::Resting(addr));
        Dropped::Absent
    }

    /// The kernel said that a link is gone. Unless we removed it, its container's namespace has ended.
    pub fn link_gone(&mut self, addr: OverlayAddr) -> Option<Handle> {
        let (container, presence) = self.inputs.roster.with_addr(addr)?;
        let handle = container.handle.clone();
        if presence != Presence::Present || !self.believed.contains_key(&Key::Link(addr)) {
            return None;
        }
        self.believed.remove(&Key::Link(addr));
        self.inputs.roster.set_lost(&handle, true);
        self.replan_container(&handle);
        Some(handle)
    }

    /// The connections of these resting addresses are gone: they may be given out again.
    pub fn forgotten(&mut self, addrs: &BTreeSet<OverlayAddr>) {
        for addr in addrs.intersection(&self.inputs.roster.resting().clone()) {
            self.record(Record::Free(*addr));
        }
    }
}
