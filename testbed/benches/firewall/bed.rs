//! What only this bench asks of its bed: containers that have links, or that are alike, and lists in Garden's words.

use std::sync::Arc;

use anyhow::Result;
use serde_json::{Value, json};
use weft_model::asg::{EgressRule, Traffic};
use weft_model::cell::Wanted;
use weft_model::link::LinkSpec;
use weft_model::profile::Known;
use weft_node::kernel::{Namespaces, inside};

use crate::common::bed::{Bed, Space, WORLD, port_range, range, wanted};

/// Containers with the same profile.
pub(super) fn alike(name: &str, count: usize, profile: &Arc<Known>) -> impl Iterator<Item = Result<Wanted>> {
    (0..count).map(move |n| wanted(&format!("{name}-{n}"), "eth0", Arc::clone(profile)))
}

impl Bed {
    /// As many containers with their links, in one namespace together: they are there, and do nothing.
    pub(crate) fn add_idle(&mut self, count: usize, profiles: &[Arc<Known>]) -> Result<()> {
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
    pub(crate) fn add_linked(&mut self, name: &str, profile: Arc<Known>) -> Result<Space> {
        let space = Space::new()?;
        let container = self.cell.add(wanted(name, "eth0", profile)?)?;
        let step = self.cell.diff();
        self.carry_out(step, &Namespaces::from([(container.addr, Arc::clone(&space.0))]))?;
        self.runtime.block_on(inside::lay(Arc::clone(&space.0), &LinkSpec::of(&container)))?;
        Ok(space)
    }
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
