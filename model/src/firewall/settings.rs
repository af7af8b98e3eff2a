//! What containers with the same settings have in common besides their security groups: what the cell offers them, and
//! where their addresses are translated. Named by a digest of the settings, so that a change of a security group leaves
//! all of this alone.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;

use ipnetwork::Ipv4Network;
use nf_tables::{Field, Key, Ranges, Rule};

use super::draft::{Part as Of, TCP, UDP, rule};
use super::profile::with_ranges;
use super::{Planned, chain, name, set};
use crate::profile::{Digest, HostService, Settings, Transport};
use crate::subnet::OverlayNetwork;

pub(super) fn services_chain(digest: Digest) -> String {
    format!("services-{digest}")
}

pub(super) fn translation_chain(digest: Digest) -> String {
    format!("translation-{digest}")
}

/// `digest` is that of the settings.
pub fn settings(digest: Digest, settings: &Settings, overlay: OverlayNetwork) -> Planned {
    let mut planned = Planned::new();
    let services = services(digest, settings, &mut planned);
    planned.push(chain(&services_chain(digest), services));
    let kept = settings.no_masquerade.unwrap_or_else(|| overlay.get());
    planned.push(chain(&translation_chain(digest), translation(kept)));
    planned
}

/// dataplane.md, "To the cell".
fn services(digest: Digest, settings: &Settings, planned: &mut Planned) -> Vec<Rule> {
    let dns = settings
        .dns_servers
        .iter()
        .filter(|server| server.is_link_local())
        .flat_map(|server| [TCP, UDP].map(|protocol| (*server, protocol, 53)));
    let services = settings.host_services.iter().map(|HostService { transport, addr, port }| {
        (*addr, if *transport == Transport::Tcp { TCP } else { UDP }, port.get())
    });
    let key = |(addr, protocol, port): (Ipv4Addr, u8, u16)| {
        let [high, low] = port.to_be_bytes();
        [&addr.octets()[..], &[protocol, 0, 0, 0, high, low, 0, 0]].concat()
    };
    let keys: BTreeSet<Vec<u8>> = dns.chain(services).map(key).collect();
    let refused = rule("not offered").goto("refused-by-cell");
    if keys.is_empty() {
        return vec![refused];
    }
    let set_name = format!("offered-{digest}");
    let fields = Key::from([Field::Ipv4, Field::Protocol, Field::Port]);
    let ranges = Ranges::new(fields.len(), keys.iter().map(|key| (key.as_slice(), key.as_slice())));
    planned.push(set(&set_name, with_ranges(fields), ranges));
    let offered = rule("offered").in_set(&name(&set_name), &[Of::Destination, Of::Protocol, Of::Port]);
    vec![offered.accept(), refused]
}

/// dataplane.md, "Masquerade".
fn translation(kept: Ipv4Network) -> Vec<Rule> {
    vec![
        rule("sees the container's own address").ipv4().destination_in(kept).accept(),
        rule("to the world").masquerade(),
    ]
}
