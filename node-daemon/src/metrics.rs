//! Numbers for whoever watches the node: OpenMetrics on loopback.

use std::sync::atomic::{AtomicI64, AtomicU64};
use std::time::Duration;

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};
use weft_model::cell::Cell;

use crate::overlay::Overlay;

#[derive(Debug)]
pub struct Metrics {
    containers: Gauge<i64, AtomicI64>,
    free_addresses: Gauge<i64, AtomicI64>,
    peers: Gauge<i64, AtomicI64>,
    fenced: Gauge<i64, AtomicI64>,
    drift: Counter<u64, AtomicU64>,
    wave: Histogram,
    inside: Histogram,
}

impl Metrics {
    pub fn new(registry: &mut Registry) -> Self {
        let times = || Histogram::new(exponential_buckets(0.000_1, 2.0, 16));
        let metrics = Self {
            containers: Gauge::default(),
            free_addresses: Gauge::default(),
            peers: Gauge::default(),
            fenced: Gauge::default(),
            drift: Counter::default(),
            wave: times(),
            inside: times(),
        };
        registry.register("weft_node_containers", "Containers on this cell", metrics.containers.clone());
        let free = metrics.free_addresses.clone();
        registry.register("weft_node_free_addresses", "Addresses that containers can still get", free);
        registry.register("weft_node_peers", "Other cells that are routed to", metrics.peers.clone());
        registry.register("weft_node_fenced", "1 while no container may be added", metrics.fenced.clone());
        let drift = metrics.drift.clone();
        registry.register("weft_node_drift", "Kernel objects that somebody else had changed", drift);
        let wave = metrics.wave.clone();
        registry.register_with_unit(
            "weft_node_kernel",
            "Time the kernel took for one wave",
            Unit::Seconds,
            wave,
        );
        let inside = metrics.inside.clone();
        let help = "Time to lay one inner end of a link";
        registry.register_with_unit("weft_node_inside", help, Unit::Seconds, inside);
        metrics
    }

    pub fn observe(&self, cell: &Cell, overlay: &Overlay) {
        let number = |n: usize| i64::try_from(n).unwrap_or(i64::MAX);
        self.containers.set(number(cell.roster().iter().count()));
        self.free_addresses.set(number(cell.roster().ipam().free()));
        self.peers.set(number(cell.inputs().peers.len()));
        self.fenced.set(i64::from(overlay.fenced.is_some()));
    }

    pub fn wave(&self, took: Duration) {
        self.wave.observe(took.as_secs_f64());
    }

    pub fn inside(&self, took: Duration) {
        self.inside.observe(took.as_secs_f64());
    }

    pub fn drift(&self) {
        self.drift.inc();
    }
}
