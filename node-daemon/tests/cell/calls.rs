//! The calls beside ADD: what CHECK finds, what a runtime no longer knows, what its namespace has left behind.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use weft_model::cell::Wanted;
use weft_model::container::{Owner, PortMapping};
use weft_model::profile::Profile;
use weft_model::{reason::Reason, walk};
use weft_node::calls::{Calls, Remembered, Valid};
use weft_node::directory::Directory;
use weft_node::kernel::events::Event;

use crate::{World, ip, links, namespace, nft, own_lease, table, wait_for, within};

fn remembered(n: u8) -> Remembered {
    Remembered {
        handle: walk::handle(n),
        interface: "eth0".parse().unwrap(),
        addr: None,
        mtu: None,
        default_route: true,
    }
}

impl World {
    async fn check(&self, n: u8, namespace: &OwnedFd) -> Result<(), Reason> {
        self.inbox.check(remembered(n), namespace.try_clone().unwrap()).await
    }

    async fn handles(&self) -> Vec<String> {
        self.inbox.status().await.containers.into_iter().map(|container| container.handle).collect()
    }

    /// Until these containers are left.
    async fn left(&self, expected: &[u8]) {
        let expected: Vec<String> = expected.iter().map(|n| walk::handle(*n).to_string()).collect();
        for _ in 0..2_000 {
            if self.handles().await == expected {
                return;
            }
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
        panic!("{:?} instead of {expected:?}", self.handles().await);
    }
}

/// Nobody tells the node of the damage, as between a change and its repair.
#[test]
fn check_finds_damage_of_the_cells_end_and_of_rules() {
    within(async || {
        let world = World::start(own_lease()).await;
        let port = |n: u16| n.try_into().unwrap();
        let wanted = Wanted {
            ports: vec![PortMapping { host: port(61_000), container: port(8080) }],
            owner: Owner { policy_group_id: "app".into(), ..Owner::default() },
            profile: Arc::new(Profile::default().into()),
            ..walk::wanted(1)
        };
        let kept = namespace();
        let link = world.inbox.add(wanted, kept.try_clone().unwrap()).await.unwrap();
        world.check(1, &kept).await.unwrap();
        let (addr, device) = (link.addr.to_string(), link.host_name().to_string());
        let whole = table();
        for command in [
            "delete table inet weft".to_owned(),
            "flush chain inet weft forward".into(),
            "flush map inet weft sources".into(),
            "flush map inet weft ports".into(),
        ] {
            nft(&command);
            assert_ne!(table(), whole, "{command} changes nothing");
            let found = world.check(1, &kept).await;
            assert!(
                matches!(&found, Err(Reason::Damaged { what, .. }) if what.contains("rules")),
                "{command}: {found:?}"
            );
            world.touched.send(()).unwrap();
            wait_for(|| table() == whole, &command).await;
            world.check(1, &kept).await.unwrap();
        }
        for (command, names) in [
            (format!("route del {addr} dev {device}"), "route"),
            (format!("neigh del {addr} dev {device}"), "not whole"),
            (format!("link set {device} mtu 1000"), "not whole"),
            (format!("addr flush dev {device}"), "not whole"),
            (format!("link set {device} down"), "not whole"),
            (format!("link del {device}"), "gone"),
        ] {
            ip(&command);
            let found = world.check(1, &kept).await;
            assert!(
                matches!(&found, Err(Reason::Damaged { what, .. }) if what.contains(names)),
                "{command}: {found:?}"
            );
        }
    });
}

#[test]
fn a_delete_of_another_interface_is_not_ours() {
    within(async || {
        let world = World::start(own_lease()).await;
        let kept = namespace();
        world.add(1, kept.try_clone().unwrap()).await.unwrap();
        let again = world.add(1, namespace()).await;
        assert!(matches!(again, Err(Reason::AlreadyAdded { .. })), "{again:?}");
        world.inbox.delete(walk::handle(1), "eth1".parse().unwrap()).await.unwrap();
        assert_eq!((world.handles().await.len(), links()), (1, 1), "eth0 is still there");
        world.delete(1).await.unwrap();
        world.empty().await;
    });
}

#[test]
fn what_the_runtime_of_a_network_no_longer_lists_is_removed() {
    within(async || {
        let world = World::start(own_lease()).await;
        // Held, or the links would go with them.
        let namespaces: Vec<_> = (1..=4).map(|_| namespace()).collect();
        let lent = |n: u8| namespaces[usize::from(n) - 1].try_clone().unwrap();
        for n in 1..=3 {
            world.add(n, lent(n)).await.unwrap();
        }
        let other = Wanted { network: "other".into(), ..walk::wanted(4) };
        world.inbox.add(other, lent(4)).await.unwrap();
        let valid = |network: &str, listed: &[(u8, &str)]| Valid {
            network: network.into(),
            attachments: listed
                .iter()
                .map(|(n, interface)| (walk::handle(*n).to_string(), (*interface).into()))
                .collect(),
        };
        // What is listed and not there is no matter; another interface is another attachment.
        world.inbox.collect(valid("weft", &[(1, "eth0"), (2, "eth1"), (9, "eth0")])).await.unwrap();
        world.left(&[1, 4]).await;
        assert_eq!(links(), 2, "done when the links are gone");
        // One that cannot be removed is said so; the others are.
        world.add(2, lent(2)).await.unwrap();
        world.fail(0);
        let failed = world.inbox.collect(valid("weft", &[])).await.unwrap_err();
        assert!(failed.to_string().contains("injected"), "{failed}");
        world.inbox.collect(valid("weft", &[])).await.unwrap();
        world.left(&[4]).await;
        world.inbox.collect(valid("unheard-of", &[])).await.unwrap();
        world.left(&[4]).await;
        world.inbox.collect(valid("other", &[])).await.unwrap();
        world.empty().await;
    });
}

/// As a DEL would do it, which may never come. A container that has lost its link only waits for one.
#[test]
fn a_container_whose_namespace_has_ended_is_removed() {
    within(async || {
        let world = World::start(own_lease()).await;
        let (alive, robbed, ended) = (namespace(), namespace(), namespace());
        world.add(1, alive.try_clone().unwrap()).await.unwrap();
        world.add(2, robbed.try_clone().unwrap()).await.unwrap();
        world.add(3, ended.try_clone().unwrap()).await.unwrap();
        let names = ip("-o link");
        let device = names.lines().filter(|line| line.contains(": s-")).nth(1).unwrap();
        ip(&format!("link del {}", device.split([':', '@']).nth(1).unwrap().trim()));
        drop(ended);
        wait_for(|| links() == 1, "the link goes with its namespace").await;
        world.events.send(Event::Changed).unwrap();
        world.left(&[1, 2]).await;
        world.check(1, &alive).await.unwrap();
        let found = world.check(2, &robbed).await;
        assert!(matches!(found, Err(Reason::Damaged { .. })), "{found:?}");
        let found = world.check(3, &alive).await;
        assert!(matches!(found, Err(Reason::UnknownContainer { .. })), "{found:?}");
        drop(robbed);
        world.delete(1).await.unwrap();
        world.delete(2).await.unwrap();
        world.empty().await;
    });
}

#[test]
fn a_cell_says_whether_it_takes_containers() {
    within(async || {
        let world = World::start(None).await;
        let none = world.inbox.ready().await;
        assert!(matches!(none, Err(Reason::NoLeaseYet { .. })), "{none:?}");
        // Why there is none is the controllers' word.
        let exhausted = Reason::PoolExhausted { network: "10.255.0.0/16".into() };
        world.overlay.send_modify(|overlay| overlay.view.trouble = Some(exhausted));
        let none = world.inbox.ready().await.unwrap_err();
        assert!(none.to_string().contains("no free subnet in 10.255.0.0/16"), "{none}");
        world.overlay.send_modify(|overlay| {
            overlay.table = own_lease().map(|lease| (lease, weft_model::lease::Peers::new()));
        });
        let mut added = 0;
        while world.inbox.ready().await.is_ok() {
            added += 1;
            world.add(added, namespace()).await.unwrap();
        }
        let full = world.inbox.ready().await;
        assert!(matches!(full, Err(Reason::SubnetFull { .. })), "{full:?}");
        assert_eq!(added, 5);
        let conflict = Reason::LeaseConflict { holder: "another".into() };
        world.overlay.send_modify(|overlay| overlay.fenced = Some(conflict.clone()));
        let mut fenced = world.inbox.ready().await;
        for _ in 0..2_000 {
            if fenced == Err(conflict.clone()) {
                return;
            }
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
            fenced = world.inbox.ready().await;
        }
        panic!("{fenced:?}");
    });
}

/// The addresses of those who have just left are free once their connections are forgotten: nobody is refused for that.
#[test]
fn a_full_subnet_takes_another_as_soon_as_one_leaves() {
    within(async || {
        let world = World::start(own_lease()).await;
        for n in 0..5 {
            world.add(n, namespace()).await.unwrap();
        }
        for n in 5..30 {
            world.delete(n - 5).await.unwrap();
            let added = world.add(n, namespace()).await;
            assert!(added.is_ok(), "{n}: {added:?}");
        }
        let full = world.add(40, namespace()).await;
        assert!(matches!(full, Err(Reason::SubnetFull { .. })), "{full:?}");
        assert!(world.inbox.ready().await.is_err());
        // Five leave and six come, all at once: the last has no place.
        let leave = futures::future::join_all((25..30).map(|n| world.delete(n)));
        let come = futures::future::join_all((0..6).map(|n| world.add(n, namespace())));
        let (left, come) = tokio::join!(leave, come);
        assert!(left.iter().all(Result::is_ok), "{left:?}");
        assert!(come[..5].iter().all(Result::is_ok), "{come:?}");
        assert!(matches!(come[5], Err(Reason::SubnetFull { .. })), "{come:?}");
        // Whom its runtime gives up while it waits never comes.
        let (left, waits, gone) = tokio::join!(world.delete(0), world.add(7, namespace()), world.delete(7));
        assert!(
            left.is_ok() && gone.is_ok() && matches!(waits, Err(Reason::Busy)),
            "{left:?} {waits:?} {gone:?}"
        );
        world.add(8, namespace()).await.unwrap();
    });
}

#[test]
fn those_who_are_there_have_names() {
    within(async || {
        let world = World::start(own_lease()).await;
        let kept = namespace();
        let addr = world.add(1, kept.try_clone().unwrap()).await.unwrap();
        let named = |names: &Directory| names.present(addr).map(|container| container.handle.clone());
        wait_for(|| named(&world.names) == Some(walk::handle(1)), "its name").await;
        let world = world.restart(own_lease()).await;
        wait_for(|| named(&world.names) == Some(walk::handle(1)), "its name").await;
        let entered = world.names.named(addr, None, std::time::SystemTime::UNIX_EPOCH).container.unwrap();
        assert_eq!(entered.profile.unwrap().digest(), walk::wanted(1).profile.digest());
        world.delete(1).await.unwrap();
        wait_for(|| named(&world.names).is_none(), "no name").await;
    });
}
