//! Dynamic security groups, as the policy server lists them: which rules, for which spaces.
//!
//! A group's rules are a text that is itself JSON, written by the Cloud Controller. Whatever is wrong with one rule, or
//! with one destination or one port of it, that much is skipped and the others hold: a group that was refused whole
//! would take its apps' connections away.

mod rule;

use std::collections::{BTreeSet, HashSet};

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::garden::MAX_RULES;
use super::{EgressRule, Skipped};
use crate::profile::Workload;
use rule::Rule;

/// Of each group so many skipped rules are told: who mends them needs no more at once.
const MOST_SKIPPED: usize = 1000;

/// A group and whom it is for.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub struct SecurityGroup {
    pub guid: String,
    pub name: String,
    /// For apps and tasks of every space.
    pub running_default: bool,
    /// For the staging of apps of every space.
    pub staging_default: bool,
    pub running_spaces: BTreeSet<String>,
    pub staging_spaces: BTreeSet<String>,
    /// How many rules its text has, those skipped included: the next group's are counted on from there.
    pub listed: u32,
    /// Counted from 0 within this group. One for each pair of a destination and a port range, in the order listed.
    pub rules: Vec<EgressRule>,
    /// Rules, or parts of them, that cannot be what was meant: the first thousand.
    pub skipped: Vec<Skipped>,
}

/// One answer of the policy server.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Page {
    pub groups: Vec<SecurityGroup>,
    /// Where the next page begins; 0: there is none.
    pub next: u64,
    /// Groups that could not be read at all: why.
    pub skipped: Vec<String>,
}

/// Takes an answer apart. An error only where it is not a list of groups as a whole.
pub fn parse(json: &[u8]) -> Result<Page, serde_json::Error> {
    #[derive(Deserialize)]
    struct Listed<'a> {
        #[serde(default)]
        next: u64,
        #[serde(borrow)]
        security_groups: Option<Vec<&'a RawValue>>,
    }
    let listed: Listed<'_> = serde_json::from_slice(json)?;
    let mut page = Page { next: listed.next, ..Page::default() };
    for (number, group) in (0..).zip(listed.security_groups.unwrap_or_default()) {
        match serde_json::from_str::<Written>(group.get()) {
            Ok(group) => page.groups.push(group.into()),
            Err(why) => page.skipped.push(format!("group {number} of the list: {why}")),
        }
    }
    Ok(page)
}

/// A group as written. Go writes null for a list that it never made.
#[derive(Deserialize)]
struct Written {
    guid: String,
    #[serde(default)]
    name: String,
    #[serde(default)]
    rules: Option<String>,
    #[serde(default)]
    running_default: bool,
    #[serde(default)]
    staging_default: bool,
    #[serde(default)]
    running_space_guids: Option<BTreeSet<String>>,
    #[serde(default)]
    staging_space_guids: Option<BTreeSet<String>>,
}

impl From<Written> for SecurityGroup {
    fn from(written: Written) -> Self {
        let group = Self {
            guid: written.guid,
            name: written.name,
            running_default: written.running_default,
            staging_default: written.staging_default,
            running_spaces: written.running_space_guids.unwrap_or_default(),
            staging_spaces: written.staging_space_guids.unwrap_or_default(),
            ..Self::default()
        };
        group.with_rules(&written.rules.unwrap_or_default())
    }
}

impl SecurityGroup {
    fn with_rules(mut self, text: &str) -> Self {
        if text.trim().is_empty() {
            return self;
        }
        let listed = match serde_json::from_str::<Option<Vec<&RawValue>>>(text) {
            Ok(listed) => listed.unwrap_or_default(),
            Err(why) => {
                let why = format!("its rules are not the array that they should be: {why}");
                self.skipped.push(Skipped { index: 0, why });
                return self;
            }
        };
        if listed.len() > MAX_RULES {
            let why = format!("{} rules are too many: at most {MAX_RULES} are taken", listed.len());
            self.skipped.push(Skipped { index: 0, why });
            return self;
        }
        for (index, json) in (0..).zip(listed) {
            self.listed = index + 1;
            let mut skip = |why| {
                if self.skipped.len() < MOST_SKIPPED {
                    self.skipped.push(Skipped { index, why });
                }
            };
            match Rule::parse(json.get(), &mut skip) {
                // Lists of destinations and of ports multiply.
                Ok(rule) if self.rules.len().saturating_add(rule.pairs()) > MAX_RULES => {
                    skip(format!(
                        "with it the group would have more than {MAX_RULES} pairs of a destination and a port range"
                    ));
                }
                Ok(rule) => self.rules.extend(rule.flatten(index)),
                Err(why) => skip(why),
            }
        }
        self
    }

    /// Whether it is for containers that do this in that space.
    pub fn is_for(&self, space: &str, workload: Workload) -> bool {
        match workload {
            // A container that belongs to no space is none of an app's.
            _ if space.is_empty() => false,
            Workload::Running => self.running_default || self.running_spaces.contains(space),
            Workload::Staging => self.staging_default || self.staging_spaces.contains(space),
            Workload::Other => false,
        }
    }
}

/// The groups that are for such a container, in the order given, each once.
pub fn groups_for<'a>(
    groups: &'a [SecurityGroup],
    space: &'a str,
    workload: Workload,
) -> impl Iterator<Item = &'a SecurityGroup> {
    let mut seen = HashSet::new();
    groups.iter().filter(move |group| group.is_for(space, workload) && seen.insert(group.guid.as_str()))
}

/// What such a container may send. Rules are counted through all of its groups: [`origin`] leads back.
pub fn rules_for(groups: &[SecurityGroup], space: &str, workload: Workload) -> Vec<EgressRule> {
    let mut before: u32 = 0;
    let mut rules = Vec::new();
    for group in groups_for(groups, space, workload) {
        let counted = |rule: &EgressRule| EgressRule { index: before.saturating_add(rule.index), ..*rule };
        rules.extend(group.rules.iter().map(counted));
        before = before.saturating_add(group.listed);
    }
    rules
}

/// The group that a rule of [`rules_for`] comes from, and which of the group's rules it is, counted from 0.
pub fn origin<'a>(
    groups: &'a [SecurityGroup],
    space: &'a str,
    workload: Workload,
    index: u32,
) -> Option<(&'a SecurityGroup, u32)> {
    let mut left = index;
    for group in groups_for(groups, space, workload) {
        match left.checked_sub(group.listed) {
            None => return Some((group, left)),
            Some(beyond) => left = beyond,
        }
    }
    None
}

/// Lists that overlap as one, each group once, in the order that both have: they are parts of one list.
pub fn merge(first: Vec<SecurityGroup>, second: Vec<SecurityGroup>) -> Vec<SecurityGroup> {
    let common: HashSet<String> = {
        let guids: HashSet<&str> = first.iter().map(|group| group.guid.as_str()).collect();
        second
            .iter()
            .filter(|group| guids.contains(group.guid.as_str()))
            .map(|group| group.guid.clone())
            .collect()
    };
    let mut seen = HashSet::new();
    let mut merged: Vec<SecurityGroup> = Vec::new();
    let mut first = first.into_iter();
    for group in second {
        if seen.contains(&group.guid) {
            continue;
        }
        if common.contains(&group.guid) {
            // All of the first list up to here comes before it.
            for before in first.by_ref() {
                let here = before.guid == group.guid;
                if seen.insert(before.guid.clone()) {
                    merged.push(before);
                }
                if here {
                    break;
                }
            }
        } else {
            seen.insert(group.guid.clone());
            merged.push(group);
        }
    }
    merged.extend(first.filter(|group| seen.insert(group.guid.clone())));
    merged
}

#[cfg(test)]
mod tests;
