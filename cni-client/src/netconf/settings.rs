//! What silk's job has as properties, with the names that its plugin's configuration gives them (silk-release, job
//! silk-cni), and what is Weft's own beside them.

use std::net::{IpAddr, Ipv4Addr, SocketAddrV4};
use std::num::{NonZeroU16, NonZeroU32};

use ipnetwork::Ipv4Network;
use weft_model::profile::{
    ConnectionRate, DenyNetworks, HostService, OutboundConnections, Settings, Transport,
};
use weft_model::reason::Reason;

use super::fields::{Fields, invalid};

/// silk's defaults of `outbound_connections` (job silk-cni).
const BURST: NonZeroU32 = NonZeroU32::MIN.saturating_add(999);
const RATE: NonZeroU32 = NonZeroU32::MIN.saturating_add(99);

/// As they were given, and what they are.
pub(super) fn dns_servers(conf: &Fields<'_>) -> Result<Vec<(String, IpAddr)>, Reason> {
    let server = |given: String| match given.parse() {
        Ok(addr) => Ok((given, addr)),
        Err(_) => {
            Err(invalid("dns_servers", format!("invalid DNS server \"{given}\", must be an IP address")))
        }
    };
    conf.texts("dns_servers")?.into_iter().map(server).collect()
}

/// `dns_servers` are those of the same configuration.
pub(super) fn settings(conf: &Fields<'_>, dns_servers: &[(String, IpAddr)]) -> Result<Settings, Reason> {
    let mut host_services = services(conf, "host_tcp_services", Transport::Tcp)?;
    host_services.extend(services(conf, "host_udp_services", Transport::Udp)?);
    let default = Settings::default();
    let ipv4 = |(_, addr): &(String, IpAddr)| match addr {
        IpAddr::V4(addr) => Some(*addr),
        IpAddr::V6(_) => None,
    };
    Ok(Settings {
        dns_servers: dns_servers.iter().filter_map(ipv4).collect(),
        host_services,
        deny_networks: deny_networks(conf)?,
        outbound_connections: outbound_connections(conf)?,
        no_masquerade: no_masquerade(conf)?,
        log_all: conf.flag("iptables_asg_logging", default.log_all)?,
        denied_logs_per_sec: conf.above_zero("iptables_denied_logs_per_sec", default.denied_logs_per_sec)?,
        accepted_udp_logs_per_sec: conf
            .above_zero("iptables_accepted_udp_logs_per_sec", default.accepted_udp_logs_per_sec)?,
        deny_cloud_metadata: conf.flag("deny_cloud_metadata", default.deny_cloud_metadata)?,
    })
}

fn services(conf: &Fields<'_>, field: &str, transport: Transport) -> Result<Vec<HostService>, Reason> {
    let service = |given: String| {
        let parsed: Option<SocketAddrV4> = given.parse().ok();
        let service = parsed.and_then(|at| {
            NonZeroU16::new(at.port()).map(|port| HostService { transport, addr: *at.ip(), port })
        });
        service
            .ok_or_else(|| conf.wrong(field, &given, "an IPv4 address and a port, such as 169.254.0.3:9001"))
    };
    conf.texts(field)?.into_iter().map(service).collect()
}

fn deny_networks(conf: &Fields<'_>) -> Result<DenyNetworks, Reason> {
    let Some(deny) = conf.object("deny_networks")? else { return Ok(DenyNetworks::default()) };
    let networks = |field: &str| {
        let one = |given: String| network(&given).ok_or_else(|| not_a_network(&deny, field, &given));
        deny.texts(field)?.into_iter().map(one).collect::<Result<_, _>>()
    };
    Ok(DenyNetworks {
        always: networks("always")?,
        running: networks("running")?,
        staging: networks("staging")?,
    })
}

fn outbound_connections(conf: &Fields<'_>) -> Result<OutboundConnections, Reason> {
    let Some(outbound) = conf.object("outbound_connections")? else {
        return Ok(OutboundConnections::default());
    };
    // Checked whether they count or not, as silk does: a wrong figure is found before it is needed.
    let (burst, per_sec) = (outbound.above_zero("burst", BURST)?, outbound.above_zero("rate_per_sec", RATE)?);
    let (limit, dry_run) = (outbound.flag("limit", false)?, outbound.flag("dry_run", false)?);
    let log = outbound.flag("logging", false)? || dry_run;
    let rate = ConnectionRate { burst, per_sec, dry_run, log };
    let max = match outbound.get("max")? {
        None => None,
        Some(max) => {
            let number = max.as_u64().and_then(|number| u32::try_from(number).ok());
            NonZeroU32::new(number.ok_or_else(|| outbound.wrong("max", max, "a whole number, 0 for none"))?)
        }
    };
    Ok(OutboundConnections { rate: (limit || dry_run).then_some(rate), max })
}

fn no_masquerade(conf: &Fields<'_>) -> Result<Option<Ipv4Network>, Reason> {
    let field = "no_masquerade_cidr_range";
    match conf.text(field)?.filter(|given| !given.is_empty()) {
        None => Ok(None),
        Some(given) => network(&given).map(Some).ok_or_else(|| not_a_network(conf, field, &given)),
    }
}

fn not_a_network(of: &Fields<'_>, field: &str, given: &str) -> Reason {
    of.wrong(field, given, "an IPv4 network in CIDR notation")
}

/// The network that an address with a prefix length is in.
fn network(given: &str) -> Option<Ipv4Network> {
    let (addr, prefix) = given.split_once('/')?;
    let addr: Ipv4Addr = addr.parse().ok()?;
    let prefix: u8 = prefix.parse().ok().filter(|_| prefix.bytes().all(|byte| byte.is_ascii_digit()))?;
    let given = Ipv4Network::new(addr, prefix).ok()?;
    Ipv4Network::new(given.network(), prefix).ok()
}
