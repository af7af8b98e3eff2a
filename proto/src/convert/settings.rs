//! The network configuration's settings on the wire.

use std::num::NonZeroU32;

use ipnetwork::Ipv4Network;
use weft_model::profile::{
    ConnectionRate, DenyNetworks, HostService, OutboundConnections, Settings, Transport,
};
use weft_model::reason::Reason;

use super::{invalid, port_from};
use crate::node;

pub fn settings_from(settings: node::Settings) -> Result<Settings, Reason> {
    let deny = settings.deny_networks.unwrap_or_default();
    let outbound = settings.outbound_connections.unwrap_or_default();
    let services = settings.host_services.into_iter().map(service_from);
    Ok(Settings {
        dns_servers: settings.dns_servers.into_iter().map(Into::into).collect(),
        host_services: services.collect::<Result<_, _>>()?,
        deny_networks: DenyNetworks {
            always: networks_from("settings.deny_networks.always", deny.always)?,
            running: networks_from("settings.deny_networks.running", deny.running)?,
            staging: networks_from("settings.deny_networks.staging", deny.staging)?,
        },
        outbound_connections: OutboundConnections {
            rate: outbound.rate.map(rate_from).transpose()?,
            max: NonZeroU32::new(outbound.max),
        },
        no_masquerade: settings
            .no_masquerade
            .map(|network| network_from("settings.no_masquerade", network))
            .transpose()?,
        log_all: settings.log_all,
        denied_logs_per_sec: above_zero("settings.denied_logs_per_sec", settings.denied_logs_per_sec)?,
        accepted_udp_logs_per_sec: above_zero(
            "settings.accepted_udp_logs_per_sec",
            settings.accepted_udp_logs_per_sec,
        )?,
        deny_cloud_metadata: settings.deny_cloud_metadata,
    })
}

pub fn settings_to(settings: &Settings) -> node::Settings {
    let deny = &settings.deny_networks;
    let outbound = &settings.outbound_connections;
    node::Settings {
        dns_servers: settings.dns_servers.iter().map(|server| (*server).into()).collect(),
        host_services: settings.host_services.iter().map(service_to).collect(),
        deny_networks: Some(node::DenyNetworks {
            always: deny.always.iter().map(network_to).collect(),
            running: deny.running.iter().map(network_to).collect(),
            staging: deny.staging.iter().map(network_to).collect(),
        }),
        outbound_connections: Some(node::OutboundConnections {
            rate: outbound.rate.map(|rate| node::ConnectionRate {
                burst: rate.burst.get(),
                per_sec: rate.per_sec.get(),
                dry_run: rate.dry_run,
                log: rate.log,
            }),
            max: outbound.max.map_or(0, NonZeroU32::get),
        }),
        no_masquerade: settings.no_masquerade.as_ref().map(network_to),
        log_all: settings.log_all,
        denied_logs_per_sec: settings.denied_logs_per_sec.get(),
        accepted_udp_logs_per_sec: settings.accepted_udp_logs_per_sec.get(),
        deny_cloud_metadata: settings.deny_cloud_metadata,
    }
}

fn above_zero(field: &str, number: u32) -> Result<NonZeroU32, Reason> {
    NonZeroU32::new(number).ok_or_else(|| invalid(field, "is 0"))
}

fn rate_from(rate: node::ConnectionRate) -> Result<ConnectionRate, Reason> {
    Ok(ConnectionRate {
        burst: above_zero("settings.outbound_connections.rate.burst", rate.burst)?,
        per_sec: above_zero("settings.outbound_connections.rate.per_sec", rate.per_sec)?,
        dry_run: rate.dry_run,
        log: rate.log,
    })
}

fn service_from(service: node::HostService) -> Result<HostService, Reason> {
    let transport = match node::Transport::try_from(service.transport) {
        Ok(node::Transport::Tcp) => Transport::Tcp,
        Ok(node::Transport::Udp) => Transport::Udp,
        Err(unknown) => return Err(invalid("settings.host_services.transport", unknown)),
    };
    let port = port_from("settings.host_services.port", service.port)?;
    Ok(HostService { transport, addr: service.address.into(), port })
}

fn service_to(service: &HostService) -> node::HostService {
    let transport = match service.transport {
        Transport::Tcp => node::Transport::Tcp,
        Transport::Udp => node::Transport::Udp,
    };
    node::HostService {
        transport: transport.into(),
        address: service.addr.into(),
        port: service.port.get().into(),
    }
}

fn networks_from(field: &str, networks: Vec<node::Network>) -> Result<Vec<Ipv4Network>, Reason> {
    networks.into_iter().map(|network| network_from(field, network)).collect()
}

fn network_from(field: &str, network: node::Network) -> Result<Ipv4Network, Reason> {
    let prefix = u8::try_from(network.prefix).map_err(|why| invalid(field, why))?;
    let given = Ipv4Network::new(network.address.into(), prefix).map_err(|why| invalid(field, why))?;
    if given.network() != given.ip() {
        return Err(invalid(field, format!("{given} is not the address of a network")));
    }
    Ok(given)
}

fn network_to(network: &Ipv4Network) -> node::Network {
    node::Network { address: network.network().into(), prefix: network.prefix().into() }
}
