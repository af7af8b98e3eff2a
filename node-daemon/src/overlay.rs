//! What the cell's task needs to know of the leases: published by the lease stream, latest value only.

use std::time::Instant;

use weft_model::keeper::{LeaseState, View};
use weft_model::lease::{Lease, Peers};
use weft_model::reason::Reason;

#[derive(Debug, Clone)]
pub struct Overlay {
    /// The cell's own lease and the others'; none before the first answer on a cell without a snapshot.
    pub table: Option<(Lease, Peers)>,
    pub fenced: Option<Reason>,
    pub view: View,
    /// The controller that is followed.
    pub controller: Option<String>,
    /// Where the times of `view` count from.
    pub origin: Instant,
}

impl Overlay {
    pub fn new(origin: Instant, view: View) -> Self {
        Self { table: None, fenced: None, view, controller: None, origin }
    }

    /// Since a controller last confirmed the table.
    pub fn age_seconds(&self) -> u64 {
        let since_start = self.origin.elapsed();
        self.view.confirmed_at.map_or(since_start, |at| since_start.saturating_sub(at)).as_secs()
    }

    pub fn state(&self) -> &'static str {
        match self.view.state {
            LeaseState::None => "none",
            LeaseState::Held => "held",
            LeaseState::Fenced => "fenced",
        }
    }
}
