//! Who is who: whose an address is, or was a moment ago, for the traffic log and for numbers by app.
//!
//! Changed by the cell's task alone, one entry at a time, so that what an ADD costs does not grow with the containers
//! that are there. Read by whoever has a handle; nobody holds it for longer than a look.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use weft_model::container::Container;
use weft_model::policy::Policies;
use weft_model::profile::Known;

/// How long a container that has left is still named: records come a moment after their packets.
const REMEMBERED: Duration = Duration::from_secs(1);

/// A handle; all of them are of one directory.
#[derive(Debug, Clone, Default)]
pub struct Directory(Arc<Mutex<Entries>>);

#[derive(Debug, Default)]
struct Entries {
    present: BTreeMap<Ipv4Addr, Entered>,
    /// Who has left of late, and when.
    left: BTreeMap<Ipv4Addr, (Entered, SystemTime)>,
    /// Of one answer of the policy server, which is the one that packets' marks are from.
    policies: Arc<Policies>,
}

#[derive(Debug, Clone)]
pub struct Entered {
    pub container: Arc<Container>,
    /// What it may send.
    pub profile: Option<Arc<Known>>,
}

/// What was known of a packet's ends, and of the rules that they are under, when it was looked up.
#[derive(Debug)]
pub struct Named {
    pub container: Option<Entered>,
    /// The container that sent to it.
    pub sender: Option<Arc<Container>>,
    pub policies: Arc<Policies>,
}

impl Directory {
    /// In the place of whoever had the address.
    pub fn enter(&self, entered: Entered) {
        let mut entries = self.entries();
        let addr = entered.container.addr.get();
        entries.left.remove(&addr);
        entries.present.insert(addr, entered);
    }

    pub fn leave(&self, addr: Ipv4Addr, now: SystemTime) {
        let mut entries = self.entries();
        entries.left.retain(|_, (_, at)| now <= *at + REMEMBERED);
        if let Some(entered) = entries.present.remove(&addr) {
            entries.left.insert(addr, (entered, now));
        }
    }

    pub fn policies(&self, policies: Arc<Policies>) {
        self.entries().policies = policies;
    }

    /// Whose the address is now.
    pub fn present(&self, addr: Ipv4Addr) -> Option<Arc<Container>> {
        self.entries().present.get(&addr).map(|entered| Arc::clone(&entered.container))
    }

    /// Whose two addresses were at that time: the container's that a packet was about, and its sender's if that may be
    /// another.
    pub fn named(&self, container: Ipv4Addr, sender: Option<Ipv4Addr>, at: SystemTime) -> Named {
        let entries = self.entries();
        let sender = sender.and_then(|addr| entries.at(addr, at));
        Named {
            container: entries.at(container, at).cloned(),
            sender: sender.map(|entered| Arc::clone(&entered.container)),
            policies: Arc::clone(&entries.policies),
        }
    }

    /// It is whole after a panic as well: each change is one.
    fn entries(&self) -> MutexGuard<'_, Entries> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Entries {
    fn at(&self, addr: Ipv4Addr, at: SystemTime) -> Option<&Entered> {
        let left = || self.left.get(&addr).filter(|(_, left)| at <= *left + REMEMBERED);
        self.present.get(&addr).or_else(|| left().map(|(entered, _)| entered))
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use weft_model::address::OverlayAddr;
    use weft_model::bandwidth::Bandwidth;
    use weft_model::container::Owner;

    use super::*;

    pub(crate) fn container(addr: Ipv4Addr, owner: Owner) -> Container {
        Container {
            handle: "handle-1".parse().expect("handle"),
            addr: OverlayAddr::new(addr),
            interface: "eth0".parse().expect("name"),
            mtu: 1450,
            wanted_mtu: None,
            namespace: String::new(),
            owner,
            ports: Vec::new(),
            network: String::new(),
            profile: None,
            passed: None,
            bandwidth: Bandwidth::default(),
        }
    }

    /// With one container.
    pub(crate) fn directory(container: Container) -> Directory {
        let directory = Directory::default();
        directory.enter(Entered { container: Arc::new(container), profile: Some(Arc::default()) });
        directory
    }

    #[test]
    fn a_container_that_has_left_is_named_for_a_moment() {
        let [addr, other] = [2, 3].map(|n| Ipv4Addr::new(10, 255, 30, n));
        let directory = directory(container(addr, Owner::default()));
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(10);
        let named = |at| directory.named(addr, None, at).container.is_some();
        assert!(named(now) && directory.present(addr).is_some());
        directory.leave(addr, now);
        assert!(named(now) && named(now + REMEMBERED) && directory.present(addr).is_none());
        let late = now + REMEMBERED + Duration::from_millis(1);
        assert!(!named(late), "a packet of later");
        directory.leave(other, now + REMEMBERED);
        assert!(named(now));
        directory.leave(other, late);
        assert!(!named(now), "and then it is forgotten");
    }

    #[test]
    fn an_address_is_whose_it_is_now() {
        let addr = Ipv4Addr::new(10, 255, 30, 2);
        let directory = directory(container(addr, Owner::default()));
        let now = SystemTime::UNIX_EPOCH;
        directory.leave(addr, now);
        let again = Arc::new(container(addr, Owner { app_id: "another".into(), ..Owner::default() }));
        directory.enter(Entered { container: Arc::clone(&again), profile: None });
        for named in [
            directory.named(addr, None, now).container.map(|entered| entered.container),
            directory.named(addr, Some(addr), now).sender,
        ] {
            assert_eq!(named, Some(Arc::clone(&again)));
        }
    }
}
