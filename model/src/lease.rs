//! Leases: who holds which subnet, as recorded by the controllers and as told to the cells.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::address::{HardwareAddr, UnderlayAddr};
use crate::subnet::{OverlaySubnet, SubnetKind};

/// One subnet, held by the cell at one underlay address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Lease {
    pub underlay: UnderlayAddr,
    pub subnet: OverlaySubnet,
    /// The VTEP's MAC where it is not the one derived from the subnet (a cell of another implementation).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub foreign_mac: Option<HardwareAddr>,
}

impl Lease {
    pub fn new(underlay: UnderlayAddr, subnet: OverlaySubnet) -> Self {
        Self { underlay, subnet, foreign_mac: None }
    }

    pub fn hardware_addr(&self) -> HardwareAddr {
        self.foreign_mac.unwrap_or_else(|| self.subnet.hardware_addr())
    }
}

impl fmt::Display for Lease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at {}", self.subnet, self.underlay)
    }
}

/// Who speaks for an underlay address: a machine (BOSH instance GUID) and one boot of it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Holder {
    pub cell_id: String,
    pub boot_id: String,
}

/// A cell as it presents itself to the controller.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cell {
    pub underlay: UnderlayAddr,
    pub holder: Holder,
    pub wants: SubnetKind,
}

/// Seconds of service: a clock in the database's head row that runs only while controllers run, so that an
/// outage, a restore or a step of the wall clock ages no lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct ServiceTime(pub u64);

impl ServiceTime {
    /// Time since `earlier`; zero if that lies ahead.
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_secs(self.0.saturating_sub(earlier.0))
    }

    #[must_use]
    pub fn after(self, time: Duration) -> Self {
        Self(self.0.saturating_add(time.as_secs()))
    }
}

/// The number of the last committed change of the published table. Rises by one per commit, within an epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct Revision(pub u64);

/// One life of the database: random, new at creation and at restore.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Epoch(pub u64);

/// A place in the history of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Cursor {
    pub epoch: Epoch,
    pub revision: Revision,
}

/// What the head row holds beside the cursor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Head {
    pub cursor: Cursor,
    /// Oldest revision from which changes are still complete: tombstones before it have been purged.
    pub floor: Revision,
    pub service_time: ServiceTime,
    /// Until then no *new* subnet is given out: cells of a lost or restored database claim theirs first.
    pub reconciling_until: ServiceTime,
}

impl Head {
    pub fn reconciling(&self) -> bool {
        self.service_time < self.reconciling_until
    }
}

/// Whether a row's subnet is in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Published: peers route to it.
    Held,
    /// Not renewed in time: no longer published, but kept for the cell unless the pool runs out.
    Expired { at: ServiceTime },
    /// Given back, or taken for another cell: free for anybody; the row stays as a tombstone and as memory.
    Released { at: ServiceTime },
}

/// A row of the lease table. One per underlay address, for ever or until its tombstone is purged.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Row {
    pub lease: Lease,
    pub holder: Holder,
    pub state: State,
    /// Last claim, in service time; written in batches, changes no revision.
    pub seen_at: ServiceTime,
    /// Revision of the row's last published change.
    pub revision: Revision,
}

/// The leases a cell knows, by underlay address; its own is not among them.
pub type Peers = BTreeMap<UnderlayAddr, Lease>;

/// Order-free digest of a set of leases: the wrapping sum of a 64-bit hash (FNV-1a) of each. Both ends keep it
/// in step with O(1) work per change; unequal digests mean that the sets differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub struct Digest(pub u64);

impl Digest {
    #[must_use]
    pub fn with(self, lease: &Lease) -> Self {
        Self(self.0.wrapping_add(hash(lease)))
    }

    #[must_use]
    pub fn without(self, lease: &Lease) -> Self {
        Self(self.0.wrapping_sub(hash(lease)))
    }

    pub fn of<'a>(leases: impl IntoIterator<Item = &'a Lease>) -> Self {
        leases.into_iter().fold(Self::default(), Self::with)
    }
}

fn hash(lease: &Lease) -> u64 {
    let network = lease.subnet.network();
    let fields = lease
        .underlay
        .get()
        .octets()
        .into_iter()
        .chain(network.network().octets())
        .chain([network.prefix()])
        .chain(lease.hardware_addr().bytes());
    fields.fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

/// A part of the table's history, as a controller tells it: the table at `at`, as changes from where the listener was.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Changes {
    pub at: Cursor,
    /// Of all held leases at `at`.
    pub digest: Digest,
    /// The listener's place is not part of this history: what the whole answer does not name is gone.
    pub from_empty: bool,
    /// More parts of the same answer follow; until the last one nothing is taken away.
    pub more: bool,
    /// The table is being put together again after a loss: nothing is taken away.
    pub reconciling: bool,
    /// In order; `None`: no longer held.
    pub leases: Vec<(UnderlayAddr, Option<Lease>)>,
}
