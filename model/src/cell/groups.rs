//! Dynamic security groups: what the policy server says a space's containers may send, in place of what the platform
//! passed with each container.
//!
//! A container of a space of which nothing has been heard keeps what was passed. Its settings (deny networks, limits,
//! logs) are its own in any case.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::Cell;
use crate::asg::garden::MAX_RULES;
use crate::asg::group::{SecurityGroup, rules_for};
use crate::container::Handle;
use crate::profile::{Digest, Known, Profile};

/// What the policy server has said, and whom it is about.
#[derive(Debug, Clone, Default)]
pub(super) struct Groups {
    all: Arc<[SecurityGroup]>,
    spaces: BTreeSet<String>,
    /// By the profile that the platform passed, and by space: none for a space whose groups are too much for one
    /// container.
    made: BTreeMap<Digest, BTreeMap<String, Option<Arc<Known>>>>,
}

impl Cell {
    /// The security groups of these spaces; none: the platform's own count (`enable_asg_syncing` is off). Returns the
    /// containers whose groups are too many rules: they keep what they have.
    pub fn groups(&mut self, told: Option<(Arc<[SecurityGroup]>, BTreeSet<String>)>) -> Vec<Handle> {
        let made = BTreeMap::new();
        self.groups = told.map(|(all, spaces)| Groups { all, spaces, made });
        let handles = self.inputs.roster.iter().map(|(container, _)| container.handle.clone());
        let mut handles: Vec<Handle> = handles.collect();
        handles.retain(|handle| !self.follow_groups(handle));
        handles
    }

    /// Gives a container the profile that its space's groups make. False if they are too many rules.
    pub(super) fn follow_groups(&mut self, handle: &Handle) -> bool {
        let roster = &self.inputs.roster;
        let container = roster.get(handle).map(|(container, _)| container);
        let Some((container, passed)) = container.and_then(|container| {
            let passed = roster.profile(container.passed?)?;
            Some((container, Arc::clone(passed)))
        }) else {
            return true;
        };
        let space = &container.owner.space_id;
        let known = match &mut self.groups {
            Some(groups) if groups.spaces.contains(space) => {
                let made = groups.made.entry(passed.digest()).or_default();
                if !made.contains_key(space) {
                    made.insert(space.clone(), dynamic(&groups.all, space, passed.profile()));
                }
                match &made[space] {
                    Some(known) => Arc::clone(known),
                    None => return false,
                }
            }
            _ => passed,
        };
        // It is in the roster; and one that leaves needs nothing.
        drop(self.assign(handle, known));
        true
    }
}

fn dynamic(groups: &[SecurityGroup], space: &str, passed: &Profile) -> Option<Arc<Known>> {
    let rules = rules_for(groups, space, passed.workload);
    let fits = rules.len() <= MAX_RULES;
    let (workload, settings) = (passed.workload, &passed.settings);
    fits.then(|| Arc::new(Profile { workload, settings: settings.clone(), rules }.into()))
}
