//! App-to-app policies: which app may open connections to which, as the policy server has them.
//!
//! An app that is a source of some policy has a *tag*, which its packets carry (as the packet's mark, and in VXLAN's
//! group-based policy field between cells). A freed tag is another app's a moment later, so tags mean something only
//! within one answer of the policy server: policies are replaced as a whole, and [`turns`] tells who has a tag now from
//! who had it.

pub mod turns;

use std::borrow::Borrow;
use std::collections::BTreeMap;
use std::fmt;
use std::num::{NonZeroU16, ParseIntError};
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::address::NotValid;
use crate::asg::PortRange;
use crate::profile::Transport;
use turns::Turn;

/// What policies call an app: its containers' `policy_group_id`. 1 to 255 bytes.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct AppGuid(Arc<str>);

impl AppGuid {
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for AppGuid {
    type Err = NotValid;

    fn from_str(text: &str) -> Result<Self, NotValid> {
        let fits = (1..=255).contains(&text.len());
        fits.then(|| Self(text.into())).ok_or_else(|| NotValid::new("an app's id (1 to 255 bytes)", text))
    }
}

/// So that a map of apps can be asked without one.
impl Borrow<str> for AppGuid {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for AppGuid {
    type Error = NotValid;

    fn try_from(text: String) -> Result<Self, NotValid> {
        text.parse()
    }
}

impl From<AppGuid> for String {
    fn from(guid: AppGuid) -> Self {
        guid.as_str().to_owned()
    }
}

impl fmt::Display for AppGuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A tag, 1 to 65,535: what fits the group policy field of VXLAN. Written as four hexadecimal digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PolicyTag(NonZeroU16);

impl PolicyTag {
    pub const fn new(tag: NonZeroU16) -> Self {
        Self(tag)
    }

    pub const fn get(self) -> u16 {
        self.0.get()
    }
}

/// Hexadecimal, leading zeros allowed.
impl FromStr for PolicyTag {
    type Err = ParseIntError;

    fn from_str(text: &str) -> Result<Self, ParseIntError> {
        let number = u32::from_str_radix(text, 16)?;
        // Of the errors that the number's own parser has: it is too large, or zero.
        Ok(Self(number.to_string().parse()?))
    }
}

impl TryFrom<String> for PolicyTag {
    type Error = ParseIntError;

    fn try_from(text: String) -> Result<Self, ParseIntError> {
        text.parse()
    }
}

impl From<PolicyTag> for String {
    fn from(tag: PolicyTag) -> Self {
        tag.to_string()
    }
}

impl fmt::Display for PolicyTag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04X}", self.0)
    }
}

/// Who may open connections to an app, and where.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Inbound {
    pub from: AppGuid,
    pub tag: PolicyTag,
    pub transport: Transport,
    pub ports: PortRange,
    /// The tag's.
    #[serde(default)]
    pub turn: Turn,
}

/// What concerns one app.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub struct AppPolicies {
    /// What its packets carry; none: it is the source of no policy.
    pub tag: Option<PolicyTag>,
    /// The tag's.
    #[serde(default)]
    pub turn: Turn,
    /// Sorted, each once.
    pub inbound: Vec<Inbound>,
}

/// All that is known of the apps of a cell.
pub type Policies = BTreeMap<AppGuid, Arc<AppPolicies>>;

/// One policy as the server lists it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Policy {
    pub source: AppGuid,
    pub source_tag: PolicyTag,
    pub destination: AppGuid,
    pub transport: Transport,
    pub ports: PortRange,
}

/// Policies by app.
pub fn by_app(policies: impl IntoIterator<Item = Policy>) -> Policies {
    let mut apps: BTreeMap<AppGuid, AppPolicies> = BTreeMap::new();
    for Policy { source, source_tag, destination, transport, ports } in policies {
        apps.entry(source.clone()).or_default().tag = Some(source_tag);
        let inbound = Inbound { from: source, tag: source_tag, transport, ports, turn: Turn::default() };
        apps.entry(destination).or_default().inbound.push(inbound);
    }
    for app in apps.values_mut() {
        app.inbound.sort_unstable();
        app.inbound.dedup();
    }
    apps.into_iter().map(|(guid, app)| (guid, Arc::new(app))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_are_hexadecimal_and_fit_the_field() {
        assert_eq!("00FF".parse::<PolicyTag>().map(PolicyTag::get), Ok(255));
        assert_eq!("000001".parse::<PolicyTag>().map(|tag| tag.to_string()), Ok("0001".into()));
        for text in ["", "0000", "10000", "xyz", "-1"] {
            text.parse::<PolicyTag>().expect_err(text);
        }
    }
}
