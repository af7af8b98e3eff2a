//! Numbers for whoever watches the controller: OpenMetrics on loopback.

use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};
use weft_model::lease::State;
use weft_model::ledger::Ledger;
use weft_model::reason::Reason;
use weft_model::subnet::SubnetKind;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Requested {
    method: &'static str,
    result: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Kind {
    kind: &'static str,
    state: &'static str,
}

#[derive(Debug)]
pub struct Metrics {
    requests: Family<Requested, Counter<u64, AtomicU64>>,
    leases: Family<Kind, Gauge<i64, AtomicI64>>,
    streams: Gauge<i64, AtomicI64>,
    revision: Gauge<i64, AtomicI64>,
    transactions: Histogram,
    available: AtomicBool,
}

/// An open stream, counted while it lives.
#[derive(Debug)]
pub struct Open(Gauge<i64, AtomicI64>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.dec();
    }
}

impl Metrics {
    pub fn new(registry: &mut Registry) -> Self {
        let metrics = Self {
            requests: Family::default(),
            leases: Family::default(),
            streams: Gauge::default(),
            revision: Gauge::default(),
            transactions: Histogram::new(exponential_buckets(0.000_5, 2.0, 15)),
            available: AtomicBool::new(false),
        };
        let requests = metrics.requests.clone();
        registry.register("weft_controller_requests", "Requests answered, by method and result", requests);
        let leases = metrics.leases.clone();
        registry.register(
            "weft_controller_leases",
            "Subnets, by kind and state; state free: not in use",
            leases,
        );
        registry.register(
            "weft_controller_streams",
            "Cells that follow this controller",
            metrics.streams.clone(),
        );
        registry.register("weft_controller_revision", "Of the lease table", metrics.revision.clone());
        let transactions = metrics.transactions.clone();
        let help = "Time that write transactions took";
        registry.register_with_unit("weft_controller_transaction", help, Unit::Seconds, transactions);
        metrics
    }

    pub fn request(&self, method: &'static str, refused: Option<&Reason>) {
        let result = match refused.map(Reason::class) {
            None => "ok",
            Some(weft_model::reason::Class::Retry) => "retry",
            Some(weft_model::reason::Class::Refused) => "refused",
            Some(weft_model::reason::Class::Fenced) => "conflict",
        };
        self.requests.get_or_create(&Requested { method, result }).inc();
    }

    pub fn opened(&self) -> Open {
        self.streams.inc();
        Open(self.streams.clone())
    }

    pub fn transaction(&self, took: Duration) {
        self.transactions.observe(took.as_secs_f64());
    }

    pub fn table(&self, ledger: &Ledger) {
        for (kind, name) in [(SubnetKind::Block, "block"), (SubnetKind::Single, "single")] {
            let count = |state: fn(&State) -> bool| {
                let rows = ledger.rows().filter(|row| row.lease.subnet.kind() == kind && state(&row.state));
                i64::try_from(rows.count()).unwrap_or(i64::MAX)
            };
            let set = |state, number| {
                self.leases.get_or_create(&Kind { kind: name, state }).set(number);
            };
            set("held", count(|state| *state == State::Held));
            set("expired", count(|state| matches!(state, State::Expired { .. })));
            set("released", count(|state| matches!(state, State::Released { .. })));
            set("free", i64::from(ledger.free(kind)));
        }
        if let Some(head) = ledger.head() {
            self.revision.set(i64::try_from(head.cursor.revision.0).unwrap_or(i64::MAX));
        }
    }

    pub fn available(&self, available: bool) {
        self.available.store(available, Ordering::Relaxed);
    }

    /// Whether the last word from the database was a good one.
    pub fn is_available(&self) -> bool {
        self.available.load(Ordering::Relaxed)
    }
}
