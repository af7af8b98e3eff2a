//! Numbers for whoever watches the node: OpenMetrics on loopback. Some are counted as things happen, here; others are
//! read when they are asked for ([`measured`]).

pub mod measured;

use std::sync::atomic::{AtomicI64, AtomicU64};
use std::time::Duration;

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};
use weft_model::cell::Cell;
use weft_model::follow::Subject;

use crate::overlay::Overlay;
use crate::policy_server::Applied;

#[derive(Debug)]
pub struct Metrics {
    containers: Gauge<i64, AtomicI64>,
    free_addresses: Gauge<i64, AtomicI64>,
    peers: Gauge<i64, AtomicI64>,
    fenced: Gauge<i64, AtomicI64>,
    drift: Counter<u64, AtomicU64>,
    refused: Counter<u64, AtomicU64>,
    wave: Histogram,
    inside: Histogram,
    polls: Family<[(&'static str, &'static str); 1], Histogram>,
    poll_failures: Family<[(&'static str, &'static str); 2], Counter<u64, AtomicU64>>,
    applies: Family<[(&'static str, &'static str); 1], Histogram>,
}

fn times() -> Histogram {
    Histogram::new(exponential_buckets(0.000_1, 2.0, 16))
}

/// Up to 82 s.
fn long_times() -> Histogram {
    Histogram::new(exponential_buckets(0.002_5, 2.0, 16))
}

fn word(subject: Subject) -> &'static str {
    match subject {
        Subject::Policies => "policies",
        Subject::Groups => "groups",
        Subject::Router => "router",
    }
}

impl Metrics {
    pub fn new(registry: &mut Registry) -> Self {
        let metrics = Self {
            containers: Gauge::default(),
            free_addresses: Gauge::default(),
            peers: Gauge::default(),
            fenced: Gauge::default(),
            drift: Counter::default(),
            refused: Counter::default(),
            polls: Family::new_with_constructor(long_times),
            poll_failures: Family::default(),
            applies: Family::new_with_constructor(times),
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
        let refused = metrics.refused.clone();
        registry.register("weft_node_kernel_refused", "Changes that the kernel refused", refused);
        let polls = metrics.polls.clone();
        let help = "Time of one question to the policy server, answered or not";
        registry.register_with_unit("weft_node_poll", help, Unit::Seconds, polls);
        let help = "Questions to the policy server that had no answer";
        registry.register("weft_node_poll_failures", help, metrics.poll_failures.clone());
        let help = "Time from a new answer of the policy server to the end of its wave";
        registry.register_with_unit("weft_node_apply", help, Unit::Seconds, metrics.applies.clone());
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
        self.containers.set(number(cell.roster().len()));
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

    pub fn refused(&self) {
        self.refused.inc();
    }

    pub fn polled(&self, subject: Subject, took: Duration) {
        self.polls.get_or_create(&[("subject", word(subject))]).observe(took.as_secs_f64());
    }

    pub fn poll_failed(&self, subject: Subject, kind: &'static str) {
        self.poll_failures.get_or_create(&[("subject", word(subject)), ("kind", kind)]).inc();
    }

    /// What was taken before and after a wave.
    pub fn applied(&self, before: Applied, after: Applied, took: Duration) {
        for ((subject, was), (_, is)) in before.by_subject().into_iter().zip(after.by_subject()) {
            if was != is {
                self.applies.get_or_create(&[("subject", word(subject))]).observe(took.as_secs_f64());
            }
        }
    }
}
