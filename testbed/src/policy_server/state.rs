//! What a policy server knows: policies with their tags, security groups, and when each last changed. Values
//! only; the server sets the clock before each change.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::time::Duration;

use anyhow::{Result, ensure};
use serde::Serialize;
use serde_json::json;

/// Two bytes of tag; 0 marks nothing.
const HIGHEST_TAG: u32 = 0xffff;

/// One app may send to another.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Policy {
    pub source: String,
    pub destination: String,
    pub protocol: String,
    pub start: u16,
    pub end: u16,
}

impl Policy {
    pub fn tcp(source: &str, destination: &str, port: u16) -> Self {
        Self {
            source: source.to_owned(),
            destination: destination.to_owned(),
            protocol: "tcp".to_owned(),
            start: port,
            end: port,
        }
    }
}

/// A security group as the server lists it. `rules` is any text: what is no JSON is served as it is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct SecurityGroup {
    pub guid: String,
    pub name: String,
    pub rules: String,
    pub staging_default: bool,
    pub running_default: bool,
    pub staging_space_guids: Vec<String>,
    pub running_space_guids: Vec<String>,
}

impl SecurityGroup {
    /// Bound to nothing, its guid also its name.
    pub fn named(guid: &str, rules: &str) -> Self {
        Self { guid: guid.to_owned(), name: guid.to_owned(), rules: rules.to_owned(), ..Self::default() }
    }

    fn concerns(&self, spaces: &HashSet<&str>) -> bool {
        let mut bound = self.staging_space_guids.iter().chain(&self.running_space_guids);
        self.staging_default || self.running_default || bound.any(|space| spaces.contains(space.as_str()))
    }
}

/// Everything that is served. Each change moves the time of its kind.
#[derive(Debug, Default)]
pub struct State {
    /// Unix nanoseconds, as `policies_last_updated` says.
    pub policies_last_updated: u64,
    /// Unix nanoseconds; `None` is a server of before 2025, which has no such route.
    pub security_groups_last_updated: Option<u64>,
    now: u64,
    behind: Duration,
    tags: Tags,
    /// By row, with the text that is served: a tag does not change while a policy uses it.
    policies: BTreeMap<u64, (Policy, String)>,
    rows: HashMap<Policy, u64>,
    by_app: HashMap<String, BTreeSet<u64>>,
    last_row: u64,
    groups: BTreeMap<u64, SecurityGroup>,
    last_group: u64,
}

impl State {
    pub(super) fn starting_at(now: u64) -> Self {
        Self { policies_last_updated: now, security_groups_last_updated: Some(now), now, ..Self::default() }
    }

    pub(super) fn set_now(&mut self, unix_nanoseconds: u64) {
        let behind = u64::try_from(self.behind.as_nanos()).unwrap_or(u64::MAX);
        self.now = unix_nanoseconds.saturating_sub(behind);
    }

    /// From the next change on, the server's clock is this much behind.
    pub fn set_clock_back(&mut self, behind: Duration) {
        self.behind = behind;
    }

    /// Adds those that are not there yet: all, or none if the tags do not suffice.
    pub fn add_policies(&mut self, policies: impl IntoIterator<Item = Policy>) -> Result<()> {
        let policies: Vec<Policy> = policies.into_iter().collect();
        let apps: BTreeSet<&str> =
            policies.iter().flat_map(|one| [&*one.source, &*one.destination]).collect();
        self.tags.ensure_room(&apps)?;
        for policy in policies {
            if self.rows.contains_key(&policy) {
                continue;
            }
            let source = self.tags.allocate(&policy.source, "app")?;
            let destination = self.tags.allocate(&policy.destination, "app")?;
            self.last_row += 1;
            let row = self.last_row;
            for app in [&policy.source, &policy.destination] {
                self.by_app.entry(app.clone()).or_default().insert(row);
            }
            let text = json!({
                "source": {"id": policy.source, "tag": source},
                "destination": {
                    "id": policy.destination,
                    "tag": destination,
                    "protocol": policy.protocol,
                    "ports": {"start": policy.start, "end": policy.end},
                },
            });
            self.rows.insert(policy.clone(), row);
            self.policies.insert(row, (policy, text.to_string()));
        }
        self.policies_last_updated = later(self.policies_last_updated, self.now);
        Ok(())
    }

    /// Removes those that are there. The tag of an app without policies is free at once.
    pub fn remove_policies<'a>(&mut self, policies: impl IntoIterator<Item = &'a Policy>) {
        for policy in policies {
            let Some(row) = self.rows.remove(policy) else { continue };
            self.policies.remove(&row);
            for app in [&policy.source, &policy.destination] {
                let Some(of_app) = self.by_app.get_mut(app) else { continue };
                of_app.remove(&row);
                if of_app.is_empty() {
                    self.by_app.remove(app);
                    self.tags.free(app);
                }
            }
        }
        self.policies_last_updated = later(self.policies_last_updated, self.now);
    }

    /// The tag of an app, as it is printed.
    pub fn tag(&self, app: &str) -> Option<String> {
        self.tags.by_guid.get(app).map(|(tag, _)| print(*tag))
    }

    /// A tag for any group; fails for a guid that has one of another type.
    pub fn allocate_tag(&mut self, guid: &str, kind: &str) -> Result<String> {
        self.tags.allocate(guid, kind)
    }

    /// Adds a group, or replaces the one of the same guid in its row.
    pub fn put_group(&mut self, group: SecurityGroup) {
        let row = self.row_of(&group.guid).unwrap_or(self.last_group + 1);
        self.last_group = self.last_group.max(row);
        self.groups.insert(row, group);
        self.groups_changed();
    }

    /// Changes a group, to bind it to a space or make it a default; returns whether there is one.
    pub fn change_group(&mut self, guid: &str, change: impl FnOnce(&mut SecurityGroup)) -> bool {
        let group = self.groups.values_mut().find(|group| group.guid == guid);
        let found = group.map(change).is_some();
        self.groups_changed();
        found
    }

    pub fn remove_group(&mut self, guid: &str) {
        if let Some(row) = self.row_of(guid) {
            self.groups.remove(&row);
        }
        self.groups_changed();
    }

    fn row_of(&self, guid: &str) -> Option<u64> {
        self.groups.iter().find(|(_, group)| group.guid == guid).map(|(row, _)| *row)
    }

    fn groups_changed(&mut self) {
        self.security_groups_last_updated =
            self.security_groups_last_updated.map(|last| later(last, self.now));
    }

    /// The list of policies that have one of `ids` as source or destination; of all, without `ids`.
    pub(super) fn policies_text(&self, ids: Option<&str>) -> String {
        let rows: BTreeSet<u64> = match ids {
            None => self.policies.keys().copied().collect(),
            Some(ids) => ids.split(',').filter_map(|id| self.by_app.get(id)).flatten().copied().collect(),
        };
        let texts: Vec<&str> =
            rows.iter().filter_map(|row| self.policies.get(row)).map(|(_, text)| text.as_str()).collect();
        format!(r#"{{"total_policies":{},"policies":[{}]}}"#, texts.len(), texts.join(","))
    }

    /// One page of the groups that are a default or bound to one of `spaces`. A limit of 0 is none.
    pub(super) fn groups_text(&self, spaces: &str, limit: usize, from: u64) -> String {
        let spaces: HashSet<&str> = spaces.split(',').filter(|space| !space.is_empty()).collect();
        let mut found = self.groups.range(from..).filter(|(_, group)| group.concerns(&spaces));
        let limit = if limit == 0 { usize::MAX } else { limit };
        let page: Vec<&SecurityGroup> = found.by_ref().take(limit).map(|(_, group)| group).collect();
        let next = found.next().map_or(0, |(row, _)| *row);
        json!({"next": next, "security_groups": page}).to_string()
    }
}

/// The database keeps microseconds; two changes are never at the same time.
fn later(last: u64, now: u64) -> u64 {
    let now = now / 1000 * 1000;
    if now == last { last + 1000 } else { now }
}

fn print(tag: u32) -> String {
    format!("{tag:04X}")
}

/// The table `groups`: which tag belongs to which guid.
#[derive(Debug, Default)]
struct Tags {
    by_guid: HashMap<String, (u32, String)>,
    /// The highest that was ever given out, and what is free below it.
    highest: u32,
    freed: BTreeSet<u32>,
}

impl Tags {
    fn ensure_room(&self, apps: &BTreeSet<&str>) -> Result<()> {
        let kind = |app: &str| self.by_guid.get(app).map(|(_, kind)| kind.as_str());
        ensure!(apps.iter().all(|app| kind(app).is_none_or(|kind| kind == "app")), "a guid of another type");
        let new = apps.iter().filter(|app| kind(app).is_none()).count();
        let free = self.freed.len() + usize::try_from(HIGHEST_TAG - self.highest)?;
        ensure!(new <= free, "{new} more tags are needed, {free} are free");
        Ok(())
    }

    fn allocate(&mut self, guid: &str, kind: &str) -> Result<String> {
        if let Some((tag, of_kind)) = self.by_guid.get(guid) {
            ensure!(of_kind == kind, "{guid} is of type {of_kind}");
            return Ok(print(*tag));
        }
        let tag = self.freed.pop_first().unwrap_or(self.highest + 1);
        ensure!(tag <= HIGHEST_TAG, "no tag is free");
        self.highest = self.highest.max(tag);
        self.by_guid.insert(guid.to_owned(), (tag, kind.to_owned()));
        Ok(print(tag))
    }

    fn free(&mut self, guid: &str) {
        self.freed.extend(self.by_guid.remove(guid).map(|(tag, _)| tag));
    }
}
