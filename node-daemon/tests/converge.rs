//! The walk of `weft_model::walk` on the real kernel, each in a network namespace of its own: whatever edits,
//! failures and accidents came before, a quiet kernel reaches what is wanted, and then nothing is left to do.
//!
//! `WEFT_WALKS` sets how many walks are made (32).

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, unshare};
use proptest::test_runner::{Config, TestCaseError, TestRunner};
use weft_model::address::OverlayAddr;
use weft_model::cell::unit::plan;
use weft_model::cell::{Belief, Cell, Drift, Key, Presence, Scope, Seen};
use weft_model::container::Handle;
use weft_model::walk::{self, Accident, Move};
use weft_node::kernel::{Kernel, Namespaces, Netlink};

/// A namespace that lives as long as its descriptor and what was born in it.
fn namespace() -> OwnedFd {
    let made = std::thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).expect("unshare a network namespace: run the tests as root");
        File::open("/proc/thread-self/ns/net").expect("open the new namespace").into()
    });
    made.join().expect("thread that makes a namespace")
}

fn ip(arguments: &str) -> bool {
    let output = Command::new("ip").args(arguments.split_whitespace()).output().expect("run ip (iproute2)");
    output.status.success()
}

fn tc(arguments: &str) -> bool {
    let output = Command::new("tc").args(arguments.split_whitespace()).output().expect("run tc (iproute2)");
    output.status.success()
}

fn nft(arguments: &str) -> bool {
    let output = Command::new("nft").args(arguments.split_whitespace()).output().expect("run nft (nftables)");
    output.status.success()
}

struct Walker {
    cell: Cell,
    kernel: Netlink,
    device: u32,
    /// Containers' namespaces, as a runtime holds them.
    namespaces: BTreeMap<Handle, Arc<OwnedFd>>,
    newborn: Vec<Handle>,
}

impl Walker {
    async fn new() -> Self {
        assert!(ip("link set lo up"));
        assert!(ip("link add eth0 mtu 1500 type veth peer name uplink"));
        assert!(ip("addr add 10.0.0.100/24 dev eth0"));
        assert!(ip("link set eth0 up") && ip("link set uplink up"));
        let mut kernel = Netlink::open("silk-vtep".parse().expect("name")).expect("open netlink");
        let device = kernel.underlay(walk::underlay(100), None).await.expect("underlay").index;
        let cell = walk::start(device);
        Self { cell, kernel, device, namespaces: BTreeMap::new(), newborn: Vec::new() }
    }

    async fn go(&mut self, mv: &Move) {
        match mv {
            // A number that fails is not in the kernel's power here: the wave is left out instead.
            Move::Wave { fails: Some(_) } => {}
            Move::Wave { fails: None } => self.wave().await,
            Move::Audit => self.audit().await,
            Move::Accident(accident) => self.accident(accident).await,
            edit => {
                if let Move::UnderlayMtu(mtu) = edit {
                    assert!(ip(&format!("link set eth0 mtu {mtu}")));
                }
                if let Some(handle) = walk::edit(&mut self.cell, self.device, edit) {
                    self.namespaces.insert(handle.clone(), Arc::new(namespace()));
                    self.newborn.push(handle);
                }
            }
        }
        self.cell.take_records();
    }

    async fn wave(&mut self) {
        let newborn = std::mem::take(&mut self.newborn);
        let born = newborn.iter().filter_map(|handle| {
            let (container, _) = self.cell.roster().get(handle)?;
            Some((container.addr, Arc::clone(self.namespaces.get(handle)?)))
        });
        let namespaces: Namespaces = born.collect();
        let step = self.cell.diff();
        let outcome = self.kernel.apply(&step, &namespaces).await;
        for fault in self.cell.settle(&step, &outcome) {
            if let Key::Link(addr) = fault.key {
                let failed =
                    self.cell.roster().with_addr(addr).map(|(container, _)| container.handle.clone());
                if let Some(handle) = failed.filter(|handle| newborn.contains(handle)) {
                    self.cell.drop(&handle);
                }
            }
        }
    }

    async fn see(&mut self) -> Seen {
        let mut seen = Seen::new();
        for scope in Scope::ALL {
            seen.extend(self.kernel.see(scope).await.expect("see"));
        }
        seen
    }

    async fn audit(&mut self) {
        for scope in Scope::ALL {
            let seen = self.kernel.see(scope).await.expect("see");
            let drift = self.cell.audit(scope, seen);
            assert!(!drift.contains(&Drift::Bug), "wanted has drifted from the plan");
        }
    }

    /// Damage that finds nothing to damage is no accident, so the answers of `ip` do not matter.
    async fn accident(&mut self, accident: &Accident) {
        let link = |n: u8| {
            let (container, _) = self.cell.roster().get(&walk::handle(n))?;
            Some((container.handle.clone(), container.addr, weft_model::link::host_name(container.addr)))
        };
        match accident {
            Accident::VtepDeleted => {
                ip("link del silk-vtep");
            }
            Accident::PeerDamaged(n) => {
                let gateway = walk::subnet(n + 3).gateway();
                match n % 3 {
                    0 => ip(&format!("route del {} dev silk-vtep", walk::subnet(n + 3))),
                    1 => ip(&format!("neigh del {gateway} dev silk-vtep")),
                    _ => ip(&format!(
                        "neigh replace {gateway} lladdr 02:00:00:00:00:01 dev silk-vtep nud permanent"
                    )),
                };
            }
            Accident::LinkDamaged(n) => {
                if let Some((_, addr, name)) = link(*n) {
                    match n % 3 {
                        0 => ip(&format!("link set {name} down")),
                        1 => ip(&format!("addr flush dev {name}")),
                        _ => ip(&format!("neigh del {addr} dev {name}")),
                    };
                }
            }
            Accident::ShapingDamaged(n) => {
                if let Some((_, addr, name)) = link(*n) {
                    let device = weft_model::bandwidth::device_name(addr);
                    match n % 3 {
                        0 => ip(&format!("link del {device}")),
                        1 => tc(&format!("qdisc del dev {name} root")),
                        _ => tc(&format!("qdisc del dev {name} ingress")),
                    };
                }
            }
            Accident::TableDeleted => drop(nft("delete table inet weft")),
            Accident::FirewallDamaged(n) => drop(nft(match n % 10 {
                0 => "flush chain inet weft egress",
                1 => "flush map inet weft sources",
                2 => "add rule inet weft forward accept",
                3 => "add chain inet weft intruder",
                4 => "add element inet weft leased { 10.0.0.77 }",
                5 => "flush set inet weft metadata",
                6 => "add set inet weft intruder { type ipv4_addr ; flags timeout ; }",
                7 => "add set inet weft intruder { type ipv4_addr ; elements = { 10.0.0.77 } ; }",
                8 => {
                    "add chain inet weft intruder ; add map inet weft intruders { type ipv4_addr : verdict ; \
                     elements = { 10.0.0.77 : goto intruder } ; }"
                }
                _ => "flush ruleset",
            })),
            Accident::LinkGone(n) => {
                if let Some((handle, addr, _)) = link(*n) {
                    self.end_namespace(&handle, addr).await;
                }
            }
        }
    }

    async fn end_namespace(&mut self, handle: &Handle, addr: OverlayAddr) {
        if self.newborn.contains(handle) || self.namespaces.remove(handle).is_none() {
            return;
        }
        let deadline = Instant::now() + Duration::from_secs(20);
        while self.see().await.contains_key(&Key::Link(addr)) {
            assert!(Instant::now() < deadline, "the link of {handle} outlives its namespace");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        self.cell.link_gone(addr);
    }

    async fn settle_down(&mut self) -> Result<(), TestCaseError> {
        self.wave().await;
        self.audit().await;
        for _ in 0..2 {
            self.wave().await;
        }
        let wanted = plan(self.cell.inputs()).into_iter().map(|(key, object)| (key, Belief::Holds(object)));
        let (wanted, seen) = (wanted.collect::<Seen>(), self.see().await);
        let differs = |a: &Seen, b: &Seen| {
            a.iter()
                .filter(|(k, v)| b.get(k) != Some(v))
                .map(|(k, v)| format!("{k}: {v:?}"))
                .collect::<Vec<_>>()
        };
        if seen != wanted {
            return Err(TestCaseError::fail(format!(
                "wanted {:#?}\nseen {:#?}",
                differs(&wanted, &seen),
                differs(&seen, &wanted)
            )));
        }
        if !self.cell.diff().is_empty() || self.cell.roster().iter().any(|(_, p)| p == Presence::Leaving) {
            return Err(TestCaseError::fail("something is left to do"));
        }
        Ok(())
    }
}

fn walk_in_a_namespace(moves: Vec<Move>) -> Result<(), TestCaseError> {
    let walk = std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET).expect("unshare a network namespace: run the tests as root");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
        runtime.block_on(async {
            let mut walker = Walker::new().await;
            for mv in &moves {
                walker.go(mv).await;
            }
            walker.settle_down().await
        })
    });
    walk.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

#[test]
fn a_walk_on_the_real_kernel_reaches_what_is_wanted() {
    let walks = std::env::var("WEFT_WALKS").map_or(32, |n| n.parse().expect("WEFT_WALKS is a number"));
    let config =
        Config { cases: walks, max_shrink_iters: 200, failure_persistence: None, ..Config::default() };
    TestRunner::new(config)
        .run(&walk::walk(30), walk_in_a_namespace)
        .unwrap_or_else(|fault| panic!("{fault}"));
}
