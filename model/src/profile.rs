//! What a container may do, but for its own address: the settings that the network configuration carries and the
//! security groups that the platform passed. Containers that are alike share one profile, and one set of chains.

use std::fmt;
use std::hash::{Hash, Hasher};
use std::net::Ipv4Addr;
use std::num::{NonZeroU16, NonZeroU32};
use std::sync::OnceLock;

use ipnetwork::Ipv4Network;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::asg::EgressRule;
use crate::firewall::{Chains, Layers};

/// Everything of a container's firewall that others may have in common with it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Profile {
    pub workload: Workload,
    pub settings: Settings,
    /// In the order in which the platform passed them.
    pub rules: Vec<EgressRule>,
}

/// What the container runs (`container_workload`): decides which deny networks count.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Workload {
    /// `app` or `task`.
    Running,
    Staging,
    /// None of these: no container of the platform's users.
    #[default]
    Other,
}

/// The CNI configuration's properties, with silk's names where silk has them (contract: silk-release, job silk-cni).
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(default)]
pub struct Settings {
    /// Only link-local ones (169.254.0.0/16, RFC 3927) are let through to the cell, tcp and udp 53.
    pub dns_servers: Vec<Ipv4Addr>,
    /// What containers may reach on the cell itself.
    pub host_services: Vec<HostService>,
    pub deny_networks: DenyNetworks,
    pub outbound_connections: OutboundConnections,
    /// Destinations that see the container's own address; none: the overlay.
    pub no_masquerade: Option<Ipv4Network>,
    /// Logs every decision on what a container sends, whatever the rules say.
    pub log_all: bool,
    /// Lines per second and container.
    pub denied_logs_per_sec: NonZeroU32,
    /// Lines per second and container.
    pub accepted_udp_logs_per_sec: NonZeroU32,
    /// Refuses the addresses at which clouds tell machines their credentials.
    pub deny_cloud_metadata: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct HostService {
    pub transport: Transport,
    pub addr: Ipv4Addr,
    pub port: NonZeroU16,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Transport {
    Tcp,
    Udp,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct DenyNetworks {
    pub always: Vec<Ipv4Network>,
    pub running: Vec<Ipv4Network>,
    pub staging: Vec<Ipv4Network>,
}

/// Limits of the connections that a container opens.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct OutboundConnections {
    /// New TCP connections, per destination address and port.
    pub rate: Option<ConnectionRate>,
    /// At once, of every kind and to all destinations together.
    pub max: Option<NonZeroU32>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ConnectionRate {
    pub burst: NonZeroU32,
    pub per_sec: NonZeroU32,
    /// Only logs what it would refuse.
    pub dry_run: bool,
    /// Logs what it refuses.
    pub log: bool,
}

impl Default for Settings {
    fn default() -> Self {
        let one = NonZeroU32::MIN;
        Self {
            dns_servers: Vec::new(),
            host_services: Vec::new(),
            deny_networks: DenyNetworks::default(),
            outbound_connections: OutboundConnections::default(),
            no_masquerade: None,
            log_all: false,
            denied_logs_per_sec: one,
            accepted_udp_logs_per_sec: one.saturating_add(99),
            deny_cloud_metadata: true,
        }
    }
}

/// A profile with what follows from it, which is worked out once.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(from = "Saved", into = "Saved")]
pub struct Known {
    digest: Digest,
    /// Of its settings alone.
    settings: Digest,
    chains: Chains,
    profile: Profile,
    /// Not before they are asked for: of a profile that the cell has already, nobody asks.
    layers: OnceLock<Layers>,
}

impl PartialEq for Known {
    fn eq(&self, other: &Self) -> bool {
        (self.digest, &self.profile) == (other.digest, &other.profile)
    }
}

impl Eq for Known {}

impl Known {
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// Names its settings: profiles whose security groups alone differ have the same.
    pub fn settings_digest(&self) -> Digest {
        self.settings
    }

    pub fn profile(&self) -> &Profile {
        &self.profile
    }

    pub(crate) fn chains(&self) -> &Chains {
        &self.chains
    }

    fn named(digest: Digest, profile: Profile) -> Self {
        let settings = digest_of(&profile.settings);
        let chains = Chains::of(digest, settings);
        Self { digest, settings, chains, profile, layers: OnceLock::new() }
    }

    pub fn layers(&self) -> &Layers {
        self.layers.get_or_init(|| Layers::of(&self.profile))
    }
}

impl Default for Known {
    fn default() -> Self {
        Profile::default().into()
    }
}

impl From<Profile> for Known {
    fn from(profile: Profile) -> Self {
        Self::named(digest_of(&profile), profile)
    }
}

/// As it is written down. The digest goes with it, so that containers find it whatever a later version would call it.
#[derive(Serialize, Deserialize)]
struct Saved {
    digest: Digest,
    profile: Profile,
}

impl From<Known> for Saved {
    fn from(Known { digest, profile, .. }: Known) -> Self {
        Self { digest, profile }
    }
}

impl From<Saved> for Known {
    fn from(Saved { digest, profile }: Saved) -> Self {
        Self::named(digest, profile)
    }
}

/// Names a profile, or another value, by its content: the first 128 bits of SHA-256.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest(u128);

/// Of any value, by what it hashes.
pub fn digest_of(value: &impl Hash) -> Digest {
    let mut fed = Fed(Vec::new());
    value.hash(&mut fed);
    Digest::of_bytes(&fed.0)
}

impl Digest {
    pub fn of_bytes(bytes: &[u8]) -> Self {
        let mut first = [0; 16];
        first.copy_from_slice(&Sha256::digest(bytes)[..16]);
        Self(u128::from_be_bytes(first))
    }

    pub fn to_bytes(self) -> [u8; 16] {
        self.0.to_be_bytes()
    }

    pub fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(u128::from_be_bytes(bytes))
    }

    /// 31 bits of it, never 0: marks connections that this profile's rules let out.
    pub fn mark(self) -> u32 {
        let low = u32::try_from(self.0 & 0x7fff_ffff).unwrap_or_default();
        low.max(1)
    }
}

/// What a value hashes, to be digested in one piece. Lengths and discriminants are part of it, so that no two values feed
/// the same.
struct Fed(Vec<u8>);

impl Hasher for Fed {
    fn write(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    fn finish(&self) -> u64 {
        unreachable!("the digest is taken whole")
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> Self {
        digest.to_string()
    }
}

impl TryFrom<String> for Digest {
    type Error = std::num::ParseIntError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        u128::from_str_radix(&text, 16).map(Self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn profiles_that_differ_have_other_digests() {
        let plain = Profile::default();
        let logged =
            Profile { settings: Settings { log_all: true, ..Settings::default() }, ..Profile::default() };
        assert_eq!(digest_of(&plain), digest_of(&Profile::default()));
        assert_ne!(digest_of(&plain), digest_of(&logged));
        assert_eq!(Digest::try_from(digest_of(&plain).to_string()), Ok(digest_of(&plain)));
    }
}
