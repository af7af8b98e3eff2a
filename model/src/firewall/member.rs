//! One container's elements: where its packets are led, and what leads to it. And the cells whose frames are taken.

use std::collections::BTreeSet;
use std::num::NonZeroU16;

use nf_tables::{Data, Name, Verdict};

use super::app::app_chain;
use super::between::{invited_chain, uninvited_chain, untagged_chain};
use super::profile::connection_mark;
use super::{ALLOWED, Content, INGRESS_CONNECTION, Map, Part, Planned, element, name};
use crate::address::UnderlayAddr;
use crate::cell::CellConfig;
use crate::container::Container;
use crate::link;
use crate::policy::AppPolicies;
use crate::profile::Known;

/// Who a container is, and what leads to it. One whose profile is not known has no more: it is reached, and sends nothing by
/// itself.
pub fn member(container: &Container, app: Option<&AppPolicies>) -> Planned {
    let addr = container.addr.get().octets();
    let mut planned = vec![
        element(Map::Sources, source(container), mark(app)),
        allowed(container, app, INGRESS_CONNECTION),
    ];
    if let (Some(guid), true) = (container.owner.app(), app.is_some_and(|app| !app.inbound.is_empty())) {
        planned.push(element(Map::Apps, addr, goto(&name(&app_chain(&guid)))));
    }
    planned.extend(container.ports.iter().map(|mapping| {
        let [high, low] = mapping.container.get().to_be_bytes();
        let [a, b, c, d] = addr;
        let to = [a, b, c, d, high, low, 0, 0];
        element(Map::Ports, mapping.host.get().to_be_bytes(), Data::Value(to.into()))
    }));
    planned
}

/// What its profile gives a container.
///
/// `log_c2c`: what is between containers is logged, whatever the profile says.
pub fn granted(
    container: &Container,
    known: &Known,
    app: Option<&AppPolicies>,
    config: &CellConfig,
    log_c2c: bool,
) -> Planned {
    let addr = container.addr.get().octets();
    let own = |of, data| element(of, addr, data);
    let chains = known.chains();
    let mut planned = vec![
        own(Map::Profiles, goto(&chains.egress)),
        allowed(container, app, connection_mark(known.digest(), config.vtep_port)),
        own(Map::Services, goto(&chains.services)),
        own(Map::Translations, goto(&chains.translation)),
    ];
    let settings = &known.profile().settings;
    if settings.log_all || log_c2c {
        let per_sec = settings.denied_logs_per_sec.get();
        planned.push(own(Map::Uninvited, goto(&name(&uninvited_chain(per_sec)))));
        planned.push(own(Map::Untagged, goto(&name(&untagged_chain(per_sec)))));
    }
    if log_c2c {
        let per_sec = settings.accepted_udp_logs_per_sec.get();
        planned.push(own(Map::Invited, goto(&name(&invited_chain(per_sec)))));
    }
    planned
}

fn goto(chain: &Name) -> Data {
    Data::Verdict(Verdict::Goto(chain.clone()))
}

/// Index of the link, and address.
fn source(container: &Container) -> [u8; 8] {
    let (index, addr) = (link::index(container.addr).to_ne_bytes(), container.addr.get().octets());
    let mut source = [0; 8];
    source[..4].copy_from_slice(&index);
    source[4..].copy_from_slice(&addr);
    source
}

/// The mark of what it sends.
fn mark(app: Option<&AppPolicies>) -> Data {
    let tagged = app.and_then(|app| Some(u32::from(app.tag?.get()) | app.turn.mark()));
    Data::Value((ALLOWED | tagged.unwrap_or_default()).to_ne_bytes().into())
}

/// Its packets of connections with this mark are let out.
fn allowed(container: &Container, app: Option<&AppPolicies>, connection: u32) -> (Part, Content) {
    let mut key = [0; 12];
    key[..8].copy_from_slice(&source(container));
    key[8..].copy_from_slice(&connection.to_ne_bytes());
    element(Map::Allowed, key, mark(app))
}

/// The elements that let the overlay's routers in: to the ports that its app offers, and to those that are mapped, as a
/// proxy's are.
pub fn exposed(container: &Container) -> Planned {
    let addr = container.addr.get().octets();
    let mapped = container.ports.iter().map(|mapping| mapping.container);
    let ports: BTreeSet<NonZeroU16> = container.owner.offered().0.into_iter().chain(mapped).collect();
    let key = |port: NonZeroU16| {
        let ([a, b, c, d], [high, low]) = (addr, port.get().to_be_bytes());
        [a, b, c, d, high, low, 0, 0]
    };
    ports.into_iter().map(|port| element(Map::Exposed, key(port), Data::Nothing)).collect()
}

/// The element that lets a cell's frames in.
pub fn leased(underlay: UnderlayAddr) -> Planned {
    vec![element(Map::Leased, underlay.get().octets(), Data::Nothing)]
}

/// Whether a part says whose frames are taken: while the lease table is not known, those stay as they are.
pub fn is_leased(part: &Part) -> bool {
    matches!(part, Part::Element(Map::Leased, _))
}
