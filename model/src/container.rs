//! Containers as the platform names them.

use std::collections::BTreeSet;
use std::fmt;
use std::num::NonZeroU16;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::address::{DeviceName, NotValid, OverlayAddr};
use crate::bandwidth::Bandwidth;
use crate::policy::AppGuid;
use crate::profile::{Digest, Workload};

/// Garden's name of a container, CNI's container id: starts with a letter or digit, then letters, digits,
/// `_`, `.` and `-` (CNI 1.1.0, CNI_CONTAINERID). At most 239 bytes, so that it fits a file name
/// and, behind an interface's name, a device's alias.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Handle(Arc<str>);

impl Handle {
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Handle {
    type Err = NotValid;

    fn from_str(text: &str) -> Result<Self, NotValid> {
        let starts = text.starts_with(|c: char| c.is_ascii_alphanumeric());
        let clean = text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-'));
        if starts && clean && text.len() <= 239 {
            Ok(Self(text.into()))
        } else {
            Err(NotValid::new(
                "a container id (a letter or digit, then letters, digits, `_`, `.`, `-`; at most 239 bytes)",
                text,
            ))
        }
    }
}

impl TryFrom<String> for Handle {
    type Error = NotValid;

    fn try_from(text: String) -> Result<Self, NotValid> {
        text.parse()
    }
}

impl From<Handle> for String {
    fn from(handle: Handle) -> Self {
        handle.0.as_ref().into()
    }
}

impl fmt::Display for Handle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Whose container it is, from the `metadata` that garden-external-networker passes. All fields may be
/// empty: Diego's health checks have none.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Owner {
    pub app_id: String,
    /// What policies call its app.
    pub policy_group_id: String,
    pub space_id: String,
    pub org_id: String,
    pub container_workload: String,
    /// The ports that its app listens on: `8080, 2222`.
    pub ports: String,
}

impl Owner {
    /// The ports; and what is said in their place and is none, which spoils nothing else.
    pub fn offered(&self) -> (BTreeSet<NonZeroU16>, Vec<&str>) {
        let (mut ports, mut wrong) = (BTreeSet::new(), Vec::new());
        for piece in self.ports.split(',').map(str::trim).filter(|piece| !piece.is_empty()) {
            match piece.parse() {
                Ok(port) => drop(ports.insert(port)),
                Err(_) => wrong.push(piece),
            }
        }
        (ports, wrong)
    }

    /// The app as policies name it; health checks have none.
    pub fn app(&self) -> Option<AppGuid> {
        self.policy_group_id.parse().ok()
    }

    pub fn workload(&self) -> Workload {
        match self.container_workload.as_str() {
            "app" | "task" => Workload::Running,
            "staging" => Workload::Staging,
            _ => Workload::Other,
        }
    }
}

/// A port of the cell that leads to a port of the container (NetIn): TCP.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PortMapping {
    pub host: NonZeroU16,
    pub container: NonZeroU16,
}

/// The first port of the cell that two of the mappings have.
pub fn mapped_twice(ports: &[PortMapping]) -> Option<NonZeroU16> {
    let mut seen = BTreeSet::new();
    ports.iter().map(|mapping| mapping.host).find(|host| !seen.insert(*host))
}

/// A container on this cell: what was asked for, and the address it got.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Container {
    pub handle: Handle,
    pub addr: OverlayAddr,
    /// The interface's name inside the container: CNI_IFNAME.
    pub interface: DeviceName,
    /// Bytes of the largest IP packet on the container's link, at both its ends.
    pub mtu: u32,
    /// What was asked for; none: what the overlay carries.
    #[serde(default)]
    pub wanted_mtu: Option<u32>,
    /// The file of its network namespace as the runtime named it; empty: not known. It may be gone, or another's.
    #[serde(default)]
    pub namespace: String,
    #[serde(default)]
    pub owner: Owner,
    /// No two have the same port of the cell.
    #[serde(default)]
    pub ports: Vec<PortMapping>,
    /// The network configuration's name that it was added with; empty: not known.
    #[serde(default)]
    pub network: String,
    /// The [`Profile`](crate::profile::Profile) that counts for it; none: nothing is known of what it may do.
    #[serde(default)]
    pub profile: Option<Digest>,
    /// The one that the platform passed: it counts while nothing is known of the container's space.
    #[serde(default)]
    pub passed: Option<Digest>,
    #[serde(default)]
    pub bandwidth: Bandwidth,
}
