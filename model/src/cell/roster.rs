//! The containers of a cell and the addresses they hold, as a fold over records.
//!
//! The same records that change the roster are written to the journal, so replaying the journal gives the same
//! roster, the order of free addresses included.

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroU16;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::address::OverlayAddr;
use crate::container::{Container, Handle};
use crate::ipam::Ipam;
use crate::policy::AppGuid;
use crate::profile::{Digest, Known};
use crate::subnet::OverlaySubnet;

/// One change of the roster: what the journal holds, line by line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Record {
    /// Containers will have this profile. It is forgotten with the last of them.
    Profile(Arc<Known>),
    /// The container is wanted, and holds its address.
    Present(Arc<Container>),
    /// The container has another profile now.
    Assigned(Handle, Digest),
    /// The container's link carries packets of this length now.
    Fitted(Handle, u32),
    /// The container is wanted no more; its link may still be there, so name and address stay taken.
    Leaving(Handle),
    /// The link with this address is gone from the kernel. The address rests until its connections are gone too.
    Resting(OverlayAddr),
    /// The address may be given to another container.
    Free(OverlayAddr),
}

/// What a container is to the cell.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Presence {
    Present,
    /// Its link vanished without a delete, as when its namespace died. Only a delete ends it.
    Lost,
    Leaving,
}

#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Roster {
    containers: BTreeMap<Handle, (Arc<Container>, Presence)>,
    by_addr: BTreeMap<OverlayAddr, Handle>,
    resting: BTreeSet<OverlayAddr>,
    /// Freed since the journal began, oldest first: the tail of the queue of free addresses.
    freed: Vec<OverlayAddr>,
    ipam: Ipam,
    profiles: BTreeMap<Digest, Kept>,
    by_app: BTreeMap<AppGuid, BTreeSet<Handle>>,
    /// How many containers a space has.
    by_space: BTreeMap<String, usize>,
    /// Who has a port of the cell.
    ports: BTreeMap<NonZeroU16, Handle>,
}

/// A profile, with the number of containers for which it counts, and of those with which it was passed.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Kept {
    known: Arc<Known>,
    in_force: usize,
    passed: usize,
}

impl Roster {
    /// Records that do not fit, such as the end of a container that is not there, change nothing. Returns the profiles that
    /// count for some container since then, or for none any more.
    pub fn apply(&mut self, record: &Record) -> Vec<Arc<Known>> {
        let mut turned = Vec::new();
        match record {
            Record::Profile(known) => {
                let kept = || Kept { known: Arc::clone(known), in_force: 0, passed: 0 };
                self.profiles.entry(known.digest()).or_insert_with(kept);
            }
            Record::Present(container) => {
                if !self.containers.contains_key(&container.handle) && self.ipam.take(container.addr) {
                    turned.extend(container.profile.and_then(|digest| self.take_up(digest)));
                    if let Some(kept) = container.passed.and_then(|digest| self.profiles.get_mut(&digest)) {
                        kept.passed += 1;
                    }
                    if let Some(guid) = container.owner.app() {
                        self.by_app.entry(guid).or_default().insert(container.handle.clone());
                    }
                    *self.by_space.entry(container.owner.space_id.clone()).or_default() += 1;
                    let ports = container.ports.iter().map(|mapping| mapping.host);
                    self.ports.extend(ports.map(|port| (port, container.handle.clone())));
                    self.freed.retain(|addr| *addr != container.addr);
                    self.by_addr.insert(container.addr, container.handle.clone());
                    self.containers
                        .insert(container.handle.clone(), (Arc::clone(container), Presence::Present));
                }
            }
            Record::Assigned(handle, digest) => {
                if let Some((container, _)) = self.containers.get_mut(handle)
                    && self.profiles.contains_key(digest)
                {
                    let before = Arc::make_mut(container).profile.replace(*digest);
                    turned.extend(self.take_up(*digest));
                    turned.extend(self.let_go(before, |kept| &mut kept.in_force));
                }
            }
            Record::Fitted(handle, mtu) => {
                if let Some((container, _)) = self.containers.get_mut(handle) {
                    Arc::make_mut(container).mtu = *mtu;
                }
            }
            Record::Leaving(handle) => {
                if let Some((_, presence)) = self.containers.get_mut(handle) {
                    *presence = Presence::Leaving;
                }
            }
            Record::Resting(addr) => {
                if let Some(handle) = self.by_addr.remove(addr)
                    && let Some((container, _)) = self.containers.remove(&handle)
                {
                    for mapping in &container.ports {
                        if self.ports.get(&mapping.host) == Some(&handle) {
                            self.ports.remove(&mapping.host);
                        }
                    }
                    if let Some(guid) = container.owner.app()
                        && let Some(handles) = self.by_app.get_mut(&guid)
                    {
                        handles.remove(&handle);
                        if handles.is_empty() {
                            self.by_app.remove(&guid);
                        }
                    }
                    if let Some(count) = self.by_space.get_mut(&container.owner.space_id) {
                        *count -= 1;
                        if *count == 0 {
                            self.by_space.remove(&container.owner.space_id);
                        }
                    }
                    turned.extend(self.let_go(container.profile, |kept| &mut kept.in_force));
                    self.let_go(container.passed, |kept| &mut kept.passed);
                }
                self.ipam.take(*addr);
                self.resting.insert(*addr);
            }
            Record::Free(addr) => {
                if !self.by_addr.contains_key(addr) {
                    self.resting.remove(addr);
                    self.ipam.take(*addr);
                    self.ipam.free_again(*addr);
                    self.freed.retain(|freed| freed != addr);
                    self.freed.push(*addr);
                }
            }
        }
        turned
    }

    /// The profile counts for one container more. Returned if that is the first.
    fn take_up(&mut self, digest: Digest) -> Option<Arc<Known>> {
        let kept = self.profiles.get_mut(&digest)?;
        kept.in_force += 1;
        (kept.in_force == 1).then(|| Arc::clone(&kept.known))
    }

    /// One container less. Returned if that was the last.
    fn let_go(
        &mut self,
        digest: Option<Digest>,
        count: impl FnOnce(&mut Kept) -> &mut usize,
    ) -> Option<Arc<Known>> {
        let digest = digest?;
        let kept = self.profiles.get_mut(&digest)?;
        let count = count(kept);
        *count = count.saturating_sub(1);
        let last = (*count == 0).then(|| Arc::clone(&kept.known));
        if (kept.in_force, kept.passed) == (0, 0) {
            self.profiles.remove(&digest);
        }
        last
    }

    pub fn profile(&self, digest: Digest) -> Option<&Arc<Known>> {
        self.profiles.get(&digest).map(|kept| &kept.known)
    }

    /// The profile, if it counts for a container.
    pub fn in_force(&self, digest: Digest) -> Option<&Arc<Known>> {
        self.profiles.get(&digest).filter(|kept| kept.in_force > 0).map(|kept| &kept.known)
    }

    /// Those that count for some container.
    pub fn profiles(&self) -> impl Iterator<Item = &Arc<Known>> {
        self.profiles.values().filter(|kept| kept.in_force > 0).map(|kept| &kept.known)
    }

    pub fn of_app(&self, guid: &AppGuid) -> impl Iterator<Item = &Handle> {
        self.by_app.get(guid).into_iter().flatten()
    }

    /// Those of which there are containers.
    pub fn apps(&self) -> impl Iterator<Item = &AppGuid> {
        self.by_app.keys()
    }

    /// Those of which there are containers.
    pub fn spaces(&self) -> impl Iterator<Item = &String> {
        self.by_space.keys().filter(|space| !space.is_empty())
    }

    /// The container that has a port of the cell.
    pub fn with_port(&self, port: NonZeroU16) -> Option<&Handle> {
        self.ports.get(&port)
    }

    /// The subnet whose addresses containers get. Those of an earlier one stay with their containers.
    pub fn lease(&mut self, subnet: Option<OverlaySubnet>) {
        self.ipam.lease(subnet);
        for addr in &self.freed {
            self.ipam.used(*addr);
        }
    }

    /// The shortest journal that gives this roster.
    pub fn records(&self) -> impl Iterator<Item = Record> {
        let freed = self.freed.iter().map(|addr| Record::Free(*addr));
        let resting = self.resting.iter().map(|addr| Record::Resting(*addr));
        let containers = self.containers.values().flat_map(|(container, presence)| {
            let left = (*presence == Presence::Leaving).then(|| Record::Leaving(container.handle.clone()));
            [Some(Record::Present(Arc::clone(container))), left].into_iter().flatten()
        });
        let profiles = self.profiles.values().map(|kept| Record::Profile(Arc::clone(&kept.known)));
        freed.chain(resting).chain(profiles).chain(containers)
    }

    pub fn get(&self, handle: &Handle) -> Option<(&Arc<Container>, Presence)> {
        self.containers.get(handle).map(|(container, presence)| (container, *presence))
    }

    pub fn iter(&self) -> impl Iterator<Item = (&Arc<Container>, Presence)> {
        self.containers.values().map(|(container, presence)| (container, *presence))
    }

    pub fn len(&self) -> usize {
        self.containers.len()
    }

    pub fn is_empty(&self) -> bool {
        self.containers.is_empty()
    }

    pub fn with_addr(&self, addr: OverlayAddr) -> Option<(&Arc<Container>, Presence)> {
        self.by_addr.get(&addr).and_then(|handle| self.get(handle))
    }

    pub fn ipam(&self) -> &Ipam {
        &self.ipam
    }

    /// Addresses whose connections have still to be forgotten.
    pub fn resting(&self) -> &BTreeSet<OverlayAddr> {
        &self.resting
    }

    /// Not a record: after a restart the audit finds out again.
    pub fn set_lost(&mut self, handle: &Handle, lost: bool) {
        if let Some((_, presence)) = self.containers.get_mut(handle)
            && *presence != Presence::Leaving
        {
            *presence = if lost { Presence::Lost } else { Presence::Present };
        }
    }
}
