//! A cell on a real kernel: the model, the kernel's shell and one container's worth of wire, in network namespaces that
//! nothing keeps but this process, so they go with it, however it ends.

use std::collections::BTreeSet;
use std::fs::File;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::process::Command;
use std::sync::Arc;
use std::thread;

use anyhow::{Context, Result, ensure};
use nix::sched::{CloneFlags, setns, unshare};
use tokio::runtime::Runtime;
use weft_model::asg::{AddrRange, EgressRule, PortRange, Traffic};
use weft_model::bandwidth::Bandwidth;
use weft_model::cell::{Cell, CellConfig, OverlayIngress, Step, Wanted};
use weft_model::container::{Handle, Owner};
use weft_model::lease::{Lease, Peers};
use weft_model::profile::{Known, Profile, Workload};
use weft_node::kernel::{Kernel, Namespaces, Netlink};

/// The cell's address on the underlay, and that of the world's only host.
const CELL: &str = "10.77.0.11";
pub(crate) const WORLD: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
const OVERLAY: &str = "10.255.0.0/16";
const SUBNET: &str = "10.255.66.0/24";

/// A network namespace that lasts as long as its descriptor.
#[derive(Debug, Clone)]
pub(crate) struct Space(pub(crate) Arc<OwnedFd>);

impl Space {
    pub(crate) fn new() -> Result<Self> {
        let make = || -> Result<OwnedFd> {
            unshare(CloneFlags::CLONE_NEWNET).context("make a network namespace (as root?)")?;
            Ok(File::open("/proc/thread-self/ns/net")?.into())
        };
        let made = thread::spawn(make).join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        let space = Self(Arc::new(made?));
        space.run("ip link set lo up")?;
        Ok(space)
    }

    /// Does `work` inside, on a thread of its own.
    pub(crate) fn enter<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let there = || {
            setns(self.0.as_fd(), CloneFlags::CLONE_NEWNET).context("enter a network namespace")?;
            work()
        };
        thread::scope(|scope| scope.spawn(there).join())
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    pub(crate) fn run(&self, command: &str) -> Result<()> {
        self.enter(|| {
            let output = Command::new("sh").args(["-ec", command]).output().context("execute sh")?;
            let said = String::from_utf8_lossy(&output.stderr);
            ensure!(output.status.success(), "{command}: {}", said.trim());
            Ok(())
        })
    }
}

pub(crate) struct Bed {
    pub(crate) cell: Cell,
    pub(crate) space: Space,
    kernel: Netlink,
    pub(crate) runtime: Runtime,
    laid: bool,
}

impl Bed {
    /// With the world at the other end of its only wire. `laid`: whether the cell's table is; without it there are
    /// links only, which the firewall is compared with.
    pub(crate) fn new(world: &Space, laid: bool) -> Result<Self> {
        let space = Space::new()?;
        // By way of this process, since the descriptor has no name that `ip` could take.
        let there = format!("/proc/{}/fd/{}", std::process::id(), world.0.as_raw_fd());
        space.run(&format!(
            "ip link add eth0 type veth peer name eth0 netns {there}
             ip addr add {CELL}/24 dev eth0
             ip link set eth0 up"
        ))?;
        world.run(&format!(
            "ip addr add {WORLD}/24 dev eth0
             ip link set eth0 up
             ip route add {OVERLAY} via {CELL}"
        ))?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let vtep: weft_model::address::DeviceName = "silk-vtep".parse()?;
        let mut kernel = space.enter(|| Ok(Netlink::open(vtep.clone())?))?;
        let underlay = CELL.parse()?;
        let device = runtime.block_on(kernel.underlay(underlay, None))?;
        let mut cell = Cell::new(CellConfig {
            vtep_name: vtep,
            vtep_port: 4789,
            underlay,
            overlay: OVERLAY.parse()?,
            mtu: None,
            policy: true,
            cut: false,
            ingress: OverlayIngress::Off,
            log_group: 2312,
        });
        cell.underlay(Some(device));
        cell.ways(BTreeSet::from(["eth0".parse()?]));
        cell.leases(Some(Lease::new(underlay, SUBNET.parse()?)), &Peers::new());
        let mut bed = Self { cell, space, kernel, runtime, laid };
        let step = bed.cell.diff();
        bed.carry_out(step, &Namespaces::new())?;
        Ok(bed)
    }

    /// Containers whose links nobody asks for: the firewall's part only.
    pub(crate) fn add(&mut self, all: impl IntoIterator<Item = Result<Wanted>>) -> Result<()> {
        for wanted in all {
            self.cell.add(wanted?)?;
        }
        self.cell.take_records();
        let step = firewall_only(self.cell.diff());
        self.carry_out(step, &Namespaces::new())
    }

    /// All of it is carried out, or it is an error.
    pub(crate) fn carry_out(&mut self, mut step: Step, namespaces: &Namespaces) -> Result<()> {
        if !self.laid {
            step.firewall.changes.clear();
        }
        let outcome = self.apply(&step, namespaces)?;
        self.cell.settle(&step, &outcome);
        Ok(())
    }

    pub(crate) fn apply(
        &mut self,
        step: &Step,
        namespaces: &Namespaces,
    ) -> Result<weft_model::cell::Outcome> {
        let outcome = self.runtime.block_on(self.kernel.apply(step, namespaces));
        if let Some((key, why)) = outcome.failed.first_key_value() {
            anyhow::bail!("{key}: {why}");
        }
        Ok(outcome)
    }
}

pub(crate) fn firewall_only(step: Step) -> Step {
    Step { firewall: step.firewall, ..Step::default() }
}

pub(crate) fn handle(name: &str) -> Result<Handle> {
    Ok(name.parse()?)
}

pub(crate) fn wanted(name: &str, interface: &str, profile: Arc<Known>) -> Result<Wanted> {
    Ok(Wanted {
        handle: handle(name)?,
        interface: interface.parse()?,
        mtu: None,
        owner: Owner::default(),
        ports: Vec::new(),
        network: "weft".into(),
        bandwidth: Bandwidth::default(),
        namespace: String::new(),
        profile,
    })
}

// === lists ===

/// An app's profile with these rules and the settings that a cell has if its operator leaves them alone.
pub(crate) fn profile(rules: Vec<EgressRule>) -> Profile {
    Profile { workload: Workload::Running, rules, ..Profile::default() }
}

/// Which ports a list's rules have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ports {
    /// Those of a dozen services, as lists that people write have.
    Usual,
    /// No two rules have the same.
    Own,
}

/// A list of rules none of which overlaps another; lists of another number have other addresses. No rule matches the
/// world's host.
pub(crate) fn list(number: u32, length: usize, ports: Ports) -> Vec<EgressRule> {
    const USUAL: [(u16, u16); 12] = [
        (80, 80),
        (443, 443),
        (22, 22),
        (25, 25),
        (3306, 3306),
        (5432, 5432),
        (5672, 5672),
        (6379, 6379),
        (8080, 8090),
        (8443, 8443),
        (9000, 9200),
        (1024, 65_535),
    ];
    let one = |index: u32| {
        let first = u32::from(Ipv4Addr::new(11, 0, 0, 0)) + number * 0x4_0000 + index * 16;
        let to = range(first, first + 15);
        let some = usize::try_from(index).unwrap_or_default();
        let (low, high) = match ports {
            Ports::Usual => USUAL[some % USUAL.len()],
            Ports::Own => {
                let low = 1024 + u16::try_from(index * 8 % 60_000).unwrap_or_default();
                (low, low + u16::try_from(index % 5).unwrap_or_default())
            }
        };
        let ports = port_range(low, high);
        let traffic = if index % 5 == 4 { Traffic::Udp(ports) } else { Traffic::Tcp(ports) };
        EgressRule { to, traffic, log: false, index }
    };
    (0..u32::try_from(length).unwrap_or(u32::MAX)).map(one).collect()
}

pub(crate) fn range(first: u32, last: u32) -> AddrRange {
    AddrRange::new(first.into(), last.into()).unwrap_or_else(|_| unreachable!("first to last"))
}

pub(crate) fn port_range(first: u16, last: u16) -> PortRange {
    PortRange::new(first, last).unwrap_or_else(|_| unreachable!("first to last"))
}
