//! The kernel's seam on a real kernel: what is laid is seen, by us and by iproute2; what drifts is seen; packets flow.
//! Run as root; every test works in network namespaces of its own.

#[path = "kernel/space.rs"]
mod space;
#[path = "kernel/world.rs"]
mod world;

#[path = "kernel/drift.rs"]
mod drift;
#[path = "kernel/links.rs"]
mod links;
#[path = "kernel/nflog.rs"]
mod nflog;
#[path = "kernel/objects.rs"]
mod objects;
#[path = "kernel/packets.rs"]
mod packets;
#[path = "kernel/shaping.rs"]
mod shaping;
