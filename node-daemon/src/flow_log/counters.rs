//! What became of the traffic log's lines, as numbers.

use std::sync::atomic::AtomicU64;

use prometheus_client::metrics::counter::Counter;
use prometheus_client::registry::Registry;

type Count = Counter<u64, AtomicU64>;

/// Clones count together.
#[derive(Debug, Clone, Default)]
pub struct Counters {
    pub written: Count,
    /// The file took lines too slowly.
    pub dropped_queue: Count,
    /// The file could not be written.
    pub dropped_file: Count,
    /// Records that nobody read in time.
    pub lost_kernel: Count,
    /// Records of the group that are not ours.
    pub foreign: Count,
}

/// Decisions that the kernel told, or would have, and that have no line of their own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize)]
pub struct Lost {
    pub kernel: u64,
    pub queue: u64,
    pub file: u64,
}

impl Lost {
    pub(super) fn since(self, before: Self) -> Self {
        Self {
            kernel: self.kernel - before.kernel,
            queue: self.queue - before.queue,
            file: self.file - before.file,
        }
    }

    pub(super) fn any(self) -> bool {
        self != Self::default()
    }
}

impl Counters {
    pub fn register(&self, registry: &mut Registry) {
        for (name, help, counter) in [
            ("written", "Lines of the traffic log", &self.written),
            ("dropped_queue", "Lines dropped because the file took them too slowly", &self.dropped_queue),
            ("dropped_file", "Lines dropped because the file could not be written", &self.dropped_file),
            ("lost_kernel", "Records lost because they were not read in time", &self.lost_kernel),
            ("foreign", "Records in the log group that no rule of ours made", &self.foreign),
        ] {
            registry.register(format!("weft_node_traffic_log_{name}"), help, counter.clone());
        }
    }

    pub fn lost(&self) -> Lost {
        Lost {
            kernel: self.lost_kernel.get(),
            queue: self.dropped_queue.get(),
            file: self.dropped_file.get(),
        }
    }
}
