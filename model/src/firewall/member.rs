//! One container's elements: where its packets are led, and what leads to it. And the cells whose frames are taken.

use nf_tables::{Data, Verdict};

use super::app::app_chain;
use super::between::{invited_chain, uninvited_chain, untagged_chain};
use super::profile::{egress_chain, services_chain, translation_chain};
use super::{ALLOWED, INGRESS_CONNECTION, Part, Planned, element, name};
use crate::address::UnderlayAddr;
use crate::container::Container;
use crate::link;
use crate::policy::AppPolicies;
use crate::profile::Profile;

/// A container whose profile is not known has an address and its mapped ports: it is reached, and sends nothing by itself.
///
/// `log_c2c`: what is between containers is logged, whatever the profile says.
pub fn member(
    container: &Container,
    profile: Option<&Profile>,
    app: Option<&AppPolicies>,
    log_c2c: bool,
) -> Planned {
    let addr = container.addr.get().octets();
    let own = |set: &str, data| element(set, addr.to_vec(), data);
    let goto = |chain: String| Data::Verdict(Verdict::Goto(name(&chain)));
    let source = [&link::index(container.addr).to_ne_bytes()[..], &addr].concat();
    let mark = ALLOWED | app.and_then(|app| app.tag).map_or(0, |tag| tag.get().into());
    let mark = || Data::Value(mark.to_ne_bytes().to_vec());
    let allowed =
        |connection: u32| element("allowed", [&source[..], &connection.to_ne_bytes()].concat(), mark());
    let mut planned = vec![element("sources", source.clone(), mark()), allowed(INGRESS_CONNECTION)];
    if let (Some(guid), true) = (container.owner.app(), app.is_some_and(|app| !app.inbound.is_empty())) {
        planned.push(own("apps", goto(app_chain(&guid))));
    }
    if let (Some(digest), Some(profile)) = (container.profile, profile) {
        planned.extend([
            own("profiles", goto(egress_chain(digest))),
            allowed(digest.mark()),
            own("services", goto(services_chain(digest))),
            own("translations", goto(translation_chain(digest))),
        ]);
        if profile.settings.log_all || log_c2c {
            let per_sec = profile.settings.denied_logs_per_sec.get();
            planned.push(own("uninvited", goto(uninvited_chain(per_sec))));
            planned.push(own("untagged", goto(untagged_chain(per_sec))));
        }
        if log_c2c {
            let per_sec = profile.settings.accepted_udp_logs_per_sec.get();
            planned.push(own("invited", goto(invited_chain(per_sec))));
        }
    }
    planned.extend(container.ports.iter().map(|mapping| {
        let [high, low] = mapping.container.get().to_be_bytes();
        let to = [&addr[..], &[high, low, 0, 0]].concat();
        element("ports", mapping.host.get().to_be_bytes().to_vec(), Data::Value(to))
    }));
    planned
}

/// The element that lets a cell's frames in.
pub fn leased(underlay: UnderlayAddr) -> Planned {
    vec![element("leased", underlay.get().octets().to_vec(), Data::Nothing)]
}

/// Whether a part says whose frames are taken: while the lease table is not known, those stay as they are.
pub fn is_leased(part: &Part) -> bool {
    matches!(part, Part::Element(set, _) if set.as_str() == "leased")
}
