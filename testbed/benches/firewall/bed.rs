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
use serde_json::{Value, json};
use tokio::runtime::Runtime;
use weft_model::asg::{AddrRange, EgressRule, PortRange, Traffic};
use weft_model::bandwidth::Bandwidth;
use weft_model::cell::{Cell, CellConfig, OverlayIngress, Step, Wanted};
use weft_model::container::{Handle, Owner};
use weft_model::lease::{Lease, Peers};
use weft_model::link::LinkSpec;
use weft_model::profile::{Known, Profile, Workload};
use weft_node::kernel::{Kernel, Namespaces, Netlink, inside};

/// The cell's address on the underlay, and that of the world's only host.
const CELL: &str = "10.77.0.11";
pub(super) const WORLD: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
const OVERLAY: &str = "10.255.0.0/16";
const SUBNET: &str = "10.255.66.0/24";

/// A network namespace that lasts as long as its descriptor.
#[derive(Debug, Clone)]
pub(super) struct Space(Arc<OwnedFd>);

impl Space {
    fn new() -> Result<Self> {
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
    pub(super) fn enter<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let there = || {
            setns(self.0.as_fd(), CloneFlags::CLONE_NEWNET).context("enter a network namespace")?;
            work()
        };
        thread::scope(|scope| scope.spawn(there).join())
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    pub(super) fn run(&self, command: &str) -> Result<()> {
        self.enter(|| {
            let output = Command::new("sh").args(["-ec", command]).output().context("execute sh")?;
            let said = String::from_utf8_lossy(&output.stderr);
            ensure!(output.status.success(), "{command}: {}", said.trim());
            Ok(())
        })
    }
}

/// Whether the cell's table is laid.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Program {
    Laid,
    /// Links only: what the firewall is compared with.
    None,
}

pub(super) struct Bed {
    pub(super) cell: Cell,
    pub(super) space: Space,
    pub(super) world: Space,
    kernel: Netlink,
    runtime: Runtime,
    program: Program,
}

impl Bed {
    pub(super) fn new(program: Program) -> Result<Self> {
        let (space, world) = (Space::new()?, Space::new()?);
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
        let mut bed = Self { cell, space, world, kernel, runtime, program };
        let step = bed.cell.diff();
        bed.carry_out(step, &Namespaces::new())?;
        Ok(bed)
    }

    /// Containers whose links nobody asks for: the firewall's part only.
    pub(super) fn add(&mut self, name: &str, count: usize, profile: &Arc<Known>) -> Result<()> {
        for n in 0..count {
            self.cell.add(wanted(&format!("{name}-{n}"), "eth0", Arc::clone(profile))?)?;
        }
        self.cell.take_records();
        let step = firewall_only(self.cell.diff());
        self.carry_out(step, &Namespaces::new())
    }

    /// As many containers with their links, in one namespace together: they are there, and do nothing.
    pub(super) fn add_idle(&mut self, count: usize, profiles: &[Arc<Known>]) -> Result<()> {
        let together = Space::new()?;
        let mut namespaces = Namespaces::new();
        for (n, profile) in (0..count).zip(profiles.iter().cycle()) {
            let wanted = wanted(&format!("idle-{n}"), &format!("eth{n}"), Arc::clone(profile))?;
            namespaces.insert(self.cell.add(wanted)?.addr, Arc::clone(&together.0));
        }
        let step = self.cell.diff();
        self.carry_out(step, &namespaces)
    }

    /// A container that can send: its namespace.
    pub(super) fn add_linked(&mut self, name: &str, profile: Arc<Known>) -> Result<Space> {
        let space = Space::new()?;
        let container = self.cell.add(wanted(name, "eth0", profile)?)?;
        let step = self.cell.diff();
        self.carry_out(step, &Namespaces::from([(container.addr, Arc::clone(&space.0))]))?;
        inside::lay(space.0.as_fd(), &LinkSpec::of(&container))?;
        Ok(space)
    }

    /// All of it is carried out, or it is an error.
    pub(super) fn carry_out(&mut self, mut step: Step, namespaces: &Namespaces) -> Result<()> {
        if self.program == Program::None {
            step.firewall.changes.clear();
        }
        let outcome = self.apply(&step, namespaces)?;
        self.cell.settle(&step, &outcome);
        Ok(())
    }

    pub(super) fn apply(
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

pub(super) fn firewall_only(step: Step) -> Step {
    Step { firewall: step.firewall, ..Step::default() }
}

pub(super) fn handle(name: &str) -> Result<Handle> {
    Ok(name.parse()?)
}

pub(super) fn wanted(name: &str, interface: &str, profile: Arc<Known>) -> Result<Wanted> {
    Ok(Wanted {
        handle: handle(name)?,
        interface: interface.parse()?,
        mtu: None,
        owner: Owner::default(),
        ports: Vec::new(),
        profile,
        bandwidth: Bandwidth::default(),
        namespace: String::new(),
    })
}

// === lists ===

/// An app's profile with these rules and the settings that a cell has if its operator leaves them alone.
pub(super) fn profile(rules: Vec<EgressRule>) -> Profile {
    Profile { workload: Workload::Running, rules, ..Profile::default() }
}

/// Which ports a list's rules have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ports {
    /// Those of a dozen services, as lists that people write have.
    Usual,
    /// No two rules have the same.
    Own,
}

/// A list of rules none of which overlaps another; lists of another number have other addresses. No rule matches the
/// world's host.
pub(super) fn list(number: u32, length: usize, ports: Ports) -> Vec<EgressRule> {
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

/// The rules that let a container speak with the world's host: at the end of a list.
pub(super) fn matching(after: usize, tcp: u16, udp: u16) -> [EgressRule; 2] {
    let to = range(WORLD.into(), WORLD.into());
    let index = u32::try_from(after).unwrap_or(u32::MAX - 1);
    let rule = |traffic, index| EgressRule { to, traffic, log: false, index };
    [rule(Traffic::Tcp(port_range(tcp, tcp)), index), rule(Traffic::Udp(port_range(udp, udp)), index + 1)]
}

/// The same as Garden passes it.
pub(super) fn garden(rules: &[EgressRule]) -> Value {
    let one = |rule: &EgressRule| {
        let (protocol, ports) = match rule.traffic {
            Traffic::Tcp(ports) => (1, Some(ports)),
            Traffic::Udp(ports) => (2, Some(ports)),
            Traffic::Icmp { .. } | Traffic::All => (0, None),
        };
        let networks = json!([{"start": rule.to.first(), "end": rule.to.last()}]);
        match ports {
            None => json!({"protocol": protocol, "networks": networks}),
            Some(ports) => {
                let ports = json!([{"start": ports.first(), "end": ports.last()}]);
                json!({"protocol": protocol, "networks": networks, "ports": ports})
            }
        }
    };
    rules.iter().map(one).collect()
}

fn range(first: u32, last: u32) -> AddrRange {
    AddrRange::new(first.into(), last.into()).unwrap_or_else(|_| unreachable!("first to last"))
}

fn port_range(first: u16, last: u16) -> PortRange {
    PortRange::new(first, last).unwrap_or_else(|_| unreachable!("first to last"))
}
