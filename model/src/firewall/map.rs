//! The maps and sets whose elements come and go one by one: their names, and what is looked up in them.

use std::fmt;
use std::sync::OnceLock;

use nf_tables::{Field, Key, Name, Ranges, Set, Target};

use super::{Content, Part, name, set};

/// docs/dataplane.md, "Whose rules", has what each leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Map {
    Sources,
    Allowed,
    Profiles,
    Services,
    Translations,
    Apps,
    Uninvited,
    Untagged,
    Invited,
    Ports,
    Exposed,
    Leased,
    Metadata,
}

const _: () = assert!(Map::ALL.len() == Map::Metadata as usize + 1, "all are there, in their order");

impl Map {
    pub const ALL: [Self; 13] = [
        Self::Sources,
        Self::Allowed,
        Self::Profiles,
        Self::Services,
        Self::Translations,
        Self::Apps,
        Self::Uninvited,
        Self::Untagged,
        Self::Invited,
        Self::Ports,
        Self::Exposed,
        Self::Leased,
        Self::Metadata,
    ];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Sources => "sources",
            Self::Allowed => "allowed",
            Self::Profiles => "profiles",
            Self::Services => "services",
            Self::Translations => "translations",
            Self::Apps => "apps",
            Self::Uninvited => "uninvited",
            Self::Untagged => "untagged",
            Self::Invited => "invited",
            Self::Ports => "ports",
            Self::Exposed => "exposed",
            Self::Leased => "leased",
            Self::Metadata => "metadata",
        }
    }

    /// As the kernel knows it.
    pub fn name(self) -> &'static Name {
        static NAMES: OnceLock<[Name; Map::ALL.len()]> = OnceLock::new();
        &NAMES.get_or_init(|| Self::ALL.map(|map| name(map.as_str())))[self as usize]
    }

    pub fn with_name(name: &Name) -> Option<Self> {
        Self::ALL.into_iter().find(|map| map.as_str() == name.as_str())
    }

    /// Empty.
    pub(super) fn declared(self) -> (Part, Content) {
        let addr = || Key::from([Field::Ipv4]);
        let (key, target) = match self {
            Self::Sources => ([Field::InterfaceIndex, Field::Ipv4].into(), Target::Value(vec![Field::Mark])),
            Self::Allowed => {
                ([Field::InterfaceIndex, Field::Ipv4, Field::Mark].into(), Target::Value(vec![Field::Mark]))
            }
            Self::Profiles
            | Self::Services
            | Self::Translations
            | Self::Apps
            | Self::Uninvited
            | Self::Untagged
            | Self::Invited => (addr(), Target::Verdict),
            Self::Ports => ([Field::Port].into(), Target::Value(vec![Field::Ipv4, Field::Port])),
            Self::Exposed => ([Field::Ipv4, Field::Port].into(), Target::Nothing),
            Self::Leased | Self::Metadata => (addr(), Target::Nothing),
        };
        set(self.as_str(), Set { key, target, ranges: false, dynamic: None }, Ranges::default())
    }
}

impl fmt::Display for Map {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_is_found_by_its_own_name() {
        for map in Map::ALL {
            assert_eq!((map.name().as_str(), Map::with_name(map.name())), (map.as_str(), Some(map)));
        }
    }
}
