//! Messages to values and back: the only place where both are known.
//!
//! Every decoding is total: it gives a value that cannot be wrong, or a [`Reason::InvalidField`] that names the field.

mod settings;

use std::fmt::Display;
use std::net::Ipv4Addr;
use std::num::NonZeroU16;
use std::sync::Arc;

pub use settings::{settings_from, settings_to};
use weft_model::address::{DeviceName, HardwareAddr, UnderlayAddr};
use weft_model::bandwidth::{Bandwidth, Limit};
use weft_model::firewall::explain::{Explanation, Probe};
use weft_model::lease::{Changes, Cursor, Digest, Epoch, Holder, Lease, Revision};
use weft_model::profile::{self, Known, Settings};
use weft_model::reason::Reason;
use weft_model::subnet::{OverlaySubnet, SubnetKind};
use weft_model::{cell, container, lease, link};

use crate::{controller, node};

fn invalid(field: &str, why: impl Display) -> Reason {
    Reason::InvalidField { field: field.into(), why: why.to_string() }
}

/// A message field that must be there.
pub fn required<T>(field: &str, value: Option<T>) -> Result<T, Reason> {
    value.ok_or_else(|| invalid(field, "is missing"))
}

pub fn underlay_from(number: u32) -> Result<UnderlayAddr, Reason> {
    Ipv4Addr::from(number).try_into().map_err(|why| invalid("underlay", why))
}

// === controller.proto ===

pub fn cell_from(cell: controller::Cell) -> Result<lease::Cell, Reason> {
    if cell.cell_id.is_empty() {
        return Err(invalid("cell_id", "is empty"));
    }
    let wants = match controller::Kind::try_from(cell.wants) {
        Ok(controller::Kind::Block) => SubnetKind::Block,
        Ok(controller::Kind::Single) => SubnetKind::Single,
        Err(unknown) => return Err(invalid("wants", unknown)),
    };
    let holder = Holder { cell_id: cell.cell_id, boot_id: cell.boot_id };
    Ok(lease::Cell { underlay: underlay_from(cell.underlay)?, holder, wants })
}

pub fn cell_to(cell: &lease::Cell) -> controller::Cell {
    let wants = match cell.wants {
        SubnetKind::Block => controller::Kind::Block,
        SubnetKind::Single => controller::Kind::Single,
    };
    controller::Cell {
        underlay: cell.underlay.get().into(),
        cell_id: cell.holder.cell_id.clone(),
        boot_id: cell.holder.boot_id.clone(),
        wants: wants.into(),
    }
}

pub fn lease_from(underlay: UnderlayAddr, lease: &controller::Lease) -> Result<Lease, Reason> {
    let prefix = u8::try_from(lease.prefix).map_err(|why| invalid("lease.prefix", why))?;
    let network = ipnetwork::Ipv4Network::new(lease.subnet.into(), prefix);
    let network = network.map_err(|why| invalid("lease.prefix", why))?;
    let subnet = OverlaySubnet::try_from(network).map_err(|why| invalid("lease.subnet", why))?;
    let foreign_mac = match lease.mac.as_slice() {
        [] => None,
        mac => Some(HardwareAddr::new(
            mac.try_into().map_err(|_| invalid("lease.mac", "is not six bytes long"))?,
        )),
    };
    Ok(Lease { underlay, subnet, foreign_mac })
}

pub fn lease_to(lease: &Lease) -> controller::Lease {
    let network = lease.subnet.network();
    controller::Lease {
        subnet: network.network().into(),
        prefix: network.prefix().into(),
        mac: lease.foreign_mac.map(|mac| mac.bytes().to_vec()).unwrap_or_default(),
    }
}

pub fn cursor_from(cursor: controller::Cursor) -> Cursor {
    Cursor { epoch: Epoch(cursor.epoch), revision: Revision(cursor.revision) }
}

pub fn cursor_to(cursor: Cursor) -> controller::Cursor {
    controller::Cursor { epoch: cursor.epoch.0, revision: cursor.revision.0 }
}

pub fn changes_from(message: controller::WatchResponse) -> Result<Changes, Reason> {
    let one = |change: controller::Change| {
        let underlay = underlay_from(change.underlay)?;
        let lease = match required("changes.what", change.what)? {
            controller::change::What::Lease(lease) => Some(lease_from(underlay, &lease)?),
            controller::change::What::Gone(controller::Gone {}) => None,
        };
        Ok((underlay, lease))
    };
    Ok(Changes {
        at: cursor_from(required("at", message.at)?),
        digest: Digest(message.digest),
        from_empty: message.from_empty,
        more: message.more,
        reconciling: message.reconciling,
        leases: message.changes.into_iter().map(one).collect::<Result<_, _>>()?,
    })
}

pub fn changes_to(changes: &Changes) -> controller::WatchResponse {
    let one = |(underlay, lease): &(UnderlayAddr, Option<Lease>)| {
        let what = match lease {
            Some(lease) => controller::change::What::Lease(lease_to(lease)),
            None => controller::change::What::Gone(controller::Gone {}),
        };
        controller::Change { underlay: underlay.get().into(), what: Some(what) }
    };
    controller::WatchResponse {
        at: Some(cursor_to(changes.at)),
        digest: changes.digest.0,
        from_empty: changes.from_empty,
        more: changes.more,
        reconciling: changes.reconciling,
        changes: changes.leases.iter().map(one).collect(),
    }
}

pub fn listed_to(row: &lease::Row) -> controller::Listed {
    let (state, since) = match row.state {
        lease::State::Held => (controller::State::Held, 0),
        lease::State::Expired { at } => (controller::State::Expired, at.0),
        lease::State::Released { at } => (controller::State::Released, at.0),
    };
    controller::Listed {
        underlay: row.lease.underlay.get().into(),
        lease: Some(lease_to(&row.lease)),
        cell_id: row.holder.cell_id.clone(),
        state: state.into(),
        state_since: since,
        seen_at: row.seen_at.0,
    }
}

// === node.proto ===

/// A container as it is asked for. Its rules are not looked into yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Asked {
    pub handle: container::Handle,
    pub interface: DeviceName,
    pub mtu: Option<u32>,
    pub owner: container::Owner,
    pub ports: Vec<container::PortMapping>,
    pub settings: Settings,
    /// As [`garden`](weft_model::asg::garden) reads them.
    pub net_out_rules: Vec<u8>,
    pub network: String,
    pub bandwidth: Bandwidth,
    pub namespace: String,
}

/// What is asked for, and the digest that names its rules.
pub fn known_from(add: Option<node::AddRequest>, rules: &[u8]) -> Result<(Asked, profile::Digest), Reason> {
    let wrong = |why| Reason::InvalidField { field: "net_out_rules".into(), why };
    let asked = asked_from(add.unwrap_or_default())?;
    if !asked.net_out_rules.is_empty() {
        return Err(wrong("are passed, and named by a digest as well".into()));
    }
    let digest =
        rules.try_into().map_err(|_| wrong(format!("{} bytes are no digest, which has 16", rules.len())))?;
    Ok((asked, profile::Digest::from_bytes(digest)))
}

pub fn asked_from(request: node::AddRequest) -> Result<Asked, Reason> {
    let owner = request.owner.unwrap_or_default();
    Ok(Asked {
        handle: handle_from(request.handle)?,
        interface: interface_from(request.interface)?,
        mtu: (request.mtu != 0).then_some(request.mtu),
        owner: container::Owner {
            app_id: owner.app_id,
            space_id: owner.space_id,
            org_id: owner.org_id,
            container_workload: owner.container_workload,
            policy_group_id: owner.policy_group_id,
            ports: owner.ports,
        },
        ports: ports_from(request.ports)?,
        settings: request.settings.map_or_else(|| Ok(Settings::default()), settings_from)?,
        net_out_rules: request.net_out_rules,
        network: request.network,
        bandwidth: Bandwidth {
            to: limit_from("receives", request.receives)?,
            from: limit_from("sends", request.sends)?,
        },
        namespace: request.namespace,
    })
}

/// `profile` is what its workload, settings and rules come to.
pub fn wanted(asked: Asked, profile: Arc<Known>) -> cell::Wanted {
    let Asked { handle, interface, mtu, owner, ports, network, bandwidth, namespace, .. } = asked;
    cell::Wanted { handle, interface, mtu, owner, ports, network, profile, bandwidth, namespace }
}

fn limit_from(field: &str, limit: Option<node::Limit>) -> Result<Option<Limit>, Reason> {
    let limit = limit.map(|limit| Limit::new(limit.rate, limit.burst)).transpose();
    limit.map_err(|why| invalid(field, why))
}

pub fn limit_to(limit: Limit) -> node::Limit {
    node::Limit { rate: limit.rate(), burst: limit.burst() }
}

fn ports_from(ports: Vec<node::PortMapping>) -> Result<Vec<container::PortMapping>, Reason> {
    let one = |mapping: node::PortMapping| {
        let host = port_from("ports.host", mapping.host)?;
        let container = port_from("ports.container", mapping.container)?;
        Ok(container::PortMapping { host, container })
    };
    let ports = ports.into_iter().map(one).collect::<Result<Vec<_>, _>>()?;
    match container::mapped_twice(&ports) {
        Some(port) => Err(invalid("ports.host", format!("{port} is mapped twice"))),
        None => Ok(ports),
    }
}

pub fn ports_to(ports: &[container::PortMapping]) -> Vec<node::PortMapping> {
    let one = |mapping: &container::PortMapping| node::PortMapping {
        host: mapping.host.get().into(),
        container: mapping.container.get().into(),
    };
    ports.iter().map(one).collect()
}

fn port_from(field: &str, number: u32) -> Result<NonZeroU16, Reason> {
    let port = u16::try_from(number).ok().and_then(NonZeroU16::new);
    port.ok_or_else(|| invalid(field, format!("{number} is not a port")))
}

pub fn handle_from(handle: String) -> Result<container::Handle, Reason> {
    handle.try_into().map_err(|why| invalid("handle", why))
}

pub fn interface_from(name: String) -> Result<DeviceName, Reason> {
    name.try_into().map_err(|why| invalid("interface", why))
}

pub fn owner_to(owner: &container::Owner) -> node::Owner {
    node::Owner {
        app_id: owner.app_id.clone(),
        space_id: owner.space_id.clone(),
        org_id: owner.org_id.clone(),
        container_workload: owner.container_workload.clone(),
        policy_group_id: owner.policy_group_id.clone(),
        ports: owner.ports.clone(),
    }
}

pub fn added_to(link: &link::LinkSpec) -> node::AddResponse {
    node::AddResponse {
        address: link.addr.get().into(),
        gateway: link::GATEWAY.into(),
        host_interface: link.host_name().to_string(),
        host_mac: link.host_mac().bytes().to_vec(),
        container_mac: link.container_mac().bytes().to_vec(),
        mtu: link.mtu,
    }
}

pub fn probe_from(request: &node::ExplainRequest) -> Result<Probe, Reason> {
    let byte = |field, value: u32| u8::try_from(value).map_err(|why| invalid(field, why));
    let port = || u16::try_from(request.port).map_err(|why| invalid("port", why));
    Ok(match byte("protocol", request.protocol)? {
        1 => Probe::Icmp {
            kind: byte("icmp_type", request.icmp_type)?,
            code: byte("icmp_code", request.icmp_code)?,
        },
        6 => Probe::Tcp { port: port()? },
        17 => Probe::Udp { port: port()? },
        protocol => Probe::Other { protocol },
    })
}

pub fn probe_to(from: String, to: Ipv4Addr, probe: Probe) -> node::ExplainRequest {
    let mut request = node::ExplainRequest {
        from,
        to: to.into(),
        protocol: probe.protocol().into(),
        ..node::ExplainRequest::default()
    };
    match probe {
        Probe::Tcp { port } | Probe::Udp { port } => request.port = port.into(),
        Probe::Icmp { kind, code } => (request.icmp_type, request.icmp_code) = (kind.into(), code.into()),
        Probe::Other { .. } => {}
    }
    request
}

pub fn explained_to(explanation: Explanation) -> node::ExplainResponse {
    let Explanation { verdict, rule, whose, mapped_to, masqueraded, logged } = explanation;
    node::ExplainResponse {
        verdict: verdict.to_string(),
        rule: rule.unwrap_or_default(),
        whose,
        mapped_to: mapped_to.unwrap_or_default(),
        masqueraded,
        logged,
    }
}
