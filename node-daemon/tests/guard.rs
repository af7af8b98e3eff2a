//! Our two rules in iptables, both backends, by the real programs: kept, alone of their kind, after the operators'.
//! Run as root; every test works in network namespaces of its own.

#[path = "guard/world.rs"]
mod world;

#[path = "guard/backends.rs"]
mod backends;
#[path = "guard/notifications.rs"]
mod notifications;
#[path = "guard/packets.rs"]
mod packets;
#[path = "guard/rules.rs"]
mod rules;
