//! Whether the cell's end of a new link passes packets yet.
//!
//! The two ends of a veth pair come up together, when the second one is raised. That one sends at once; the other drops
//! what it is given to send until a worker of the kernel has been to it (net/core/link_watch.c), some time later, and on
//! a busy machine much later. An ADD that answers before has a container whose first answer from the world is lost, and
//! comes again after a second.

use std::io;
use std::thread;
use std::time::Duration;

use netlink_packet_route::RouteNetlinkMessage as Rtnl;
use netlink_packet_route::link::{LinkAttribute, LinkExtentMask, LinkMessage, State};
use weft_model::link::LinkSpec;

use super::dump::RouteSocket;

/// Between two looks. From Linux 6.9 on, a look does the worker's work, and one is enough.
const PAUSE: Duration = Duration::from_micros(500);
/// All of them together take a quarter of a second: longer than any worker needs, and no reason to fail an ADD.
const LOOKS: usize = 500;

/// On a thread that may wait, by a socket of the cell's namespace. A link that is gone is not waited for.
pub(super) fn wait(mut socket: RouteSocket, spec: &LinkSpec) -> io::Result<()> {
    for _ in 0..LOOKS {
        let mut request = LinkMessage::default();
        request.header.index = spec.index();
        request.attributes.push(LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]));
        match socket.get(Rtnl::GetLink(request))? {
            Ok(Rtnl::NewLink(link)) if !link.attributes.contains(&LinkAttribute::OperState(State::Up)) => {
                thread::sleep(PAUSE);
            }
            _ => break,
        }
    }
    Ok(())
}
