//! The firewall in the real kernel, packet by packet: docs/dataplane.md, "The firewall". Run as root; every test works in
//! network namespaces of its own.

#[path = "kernel/space.rs"]
mod space;

#[path = "firewall/attempt.rs"]
mod attempt;
#[path = "firewall/cast.rs"]
mod cast;
#[path = "firewall/packet.rs"]
mod packet;
#[path = "firewall/random.rs"]
mod random;
#[path = "firewall/rows.rs"]
mod rows;
#[path = "firewall/table.rs"]
mod table;
#[path = "firewall/watch.rs"]
mod watch;
#[path = "firewall/world.rs"]
mod world;
