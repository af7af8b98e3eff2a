//! One container's elements: where its packets are led, and what leads to it. And the cells whose frames are taken.

use std::collections::BTreeSet;
use std::num::NonZeroU16;

use nf_tables::{Data, Name, Verdict};

use super::app::app_chain;
use super::between::{invited_chain, uninvited_chain, untagged_chain};
use super::profile::connection_mark;
use super::{ALLOWED, INGRESS_CONNECTION, Part, Planned, element, name};
use crate::address::UnderlayAddr;
use crate::cell::CellConfig;
use crate::container::Container;
use crate::link;
use crate::policy::AppPolicies;
use crate::profile::Known;

/// A container whose profile is not known has an address and its mapped ports: it is reached, and sends nothing by itself.
///
/// `log_c2c`: what is between containers is logged, whatever the profile says.
pub fn member(
    container: &Container,
    known: Option<&Known>,
    app: Option<&AppPolicies>,
    config: &CellConfig,
    log_c2c: bool,
) -> Planned {
    let addr = container.addr.get().octets();
    let own = |set: &str, data| element(set, addr, data);
    let goto = |chain: &Name| Data::Verdict(Verdict::Goto(chain.clone()));
    let source = [&link::index(container.addr).to_ne_bytes()[..], &addr].concat();
    let tagged = app.and_then(|app| Some(u32::from(app.tag?.get()) | app.turn.mark()));
    let mark = ALLOWED | tagged.unwrap_or_default();
    let mark = || Data::Value(mark.to_ne_bytes().to_vec());
    let allowed =
        |connection: u32| element("allowed", [&source[..], &connection.to_ne_bytes()].concat(), mark());
    let mut planned = vec![element("sources", &source[..], mark()), allowed(INGRESS_CONNECTION)];
    if let (Some(guid), true) = (container.owner.app(), app.is_some_and(|app| !app.inbound.is_empty())) {
        planned.push(own("apps", goto(&name(&app_chain(&guid)))));
    }
    if let Some(known) = known {
        let chains = known.chains();
        planned.extend([
            own("profiles", goto(&chains.egress)),
            allowed(connection_mark(known.digest(), config.vtep_port)),
            own("services", goto(&chains.services)),
            own("translations", goto(&chains.translation)),
        ]);
        let settings = &known.profile().settings;
        if settings.log_all || log_c2c {
            let per_sec = settings.denied_logs_per_sec.get();
            planned.push(own("uninvited", goto(&name(&uninvited_chain(per_sec)))));
            planned.push(own("untagged", goto(&name(&untagged_chain(per_sec)))));
        }
        if log_c2c {
            let per_sec = settings.accepted_udp_logs_per_sec.get();
            planned.push(own("invited", goto(&name(&invited_chain(per_sec)))));
        }
    }
    planned.extend(container.ports.iter().map(|mapping| {
        let [high, low] = mapping.container.get().to_be_bytes();
        let to = [&addr[..], &[high, low, 0, 0]].concat();
        element("ports", mapping.host.get().to_be_bytes(), Data::Value(to))
    }));
    planned
}

/// The elements that let the overlay's routers in: to the ports that its app offers, and to those that are mapped, as a
/// proxy's are.
pub fn exposed(container: &Container) -> Planned {
    let addr = container.addr.get().octets();
    let mapped = container.ports.iter().map(|mapping| mapping.container);
    let ports: BTreeSet<NonZeroU16> = container.owner.offered().0.into_iter().chain(mapped).collect();
    let key = |port: NonZeroU16| [&addr[..], &port.get().to_be_bytes(), &[0; 2]].concat();
    ports.into_iter().map(|port| element("exposed", key(port), Data::Nothing)).collect()
}

/// The element that lets a cell's frames in.
pub fn leased(underlay: UnderlayAddr) -> Planned {
    vec![element("leased", underlay.get().octets(), Data::Nothing)]
}

/// Whether a part says whose frames are taken: while the lease table is not known, those stay as they are.
pub fn is_leased(part: &Part) -> bool {
    matches!(part, Part::Element(set, _) if set.as_str() == "leased")
}
