//! The firewall in the real kernel, packet by packet: docs/dataplane.md, "The firewall". Run as root; every test works in
//! network namespaces of its own.

#[path = "kernel/space.rs"]
mod space;

#[path = "firewall/attempt.rs"]
mod attempt;
#[path = "firewall/cast.rs"]
mod cast;
#[path = "firewall/expected.rs"]
mod expected;
#[path = "firewall/flood.rs"]
mod flood;
#[path = "firewall/holes.rs"]
mod holes;
#[path = "firewall/ipv6.rs"]
mod ipv6;
#[path = "firewall/limits.rs"]
mod limits;
#[path = "firewall/many.rs"]
mod many;
#[path = "firewall/node.rs"]
mod node;
#[path = "firewall/overlay.rs"]
mod overlay;
#[path = "firewall/packet.rs"]
mod packet;
#[path = "firewall/policies.rs"]
mod policies;
#[path = "firewall/random.rs"]
mod random;
#[path = "firewall/rows.rs"]
mod rows;
#[path = "firewall/ruleset.rs"]
mod ruleset;
#[path = "firewall/scripts.rs"]
mod scripts;
#[path = "firewall/table.rs"]
mod table;
#[path = "firewall/watch.rs"]
mod watch;
#[path = "firewall/world.rs"]
mod world;
