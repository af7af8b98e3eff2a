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
use crate::container::{Container, Handle};
use crate::profile::{Digest, Known, Profile};

/// What the policy server has said, and whom it is about.
#[derive(Debug, Clone, Default)]
pub(super) struct Groups {
    all: Arc<[SecurityGroup]>,
    spaces: BTreeSet<String>,
    /// By space, and by the profile that the platform passed: none for a space whose groups are too much for one
    /// container.
    made: BTreeMap<(String, Digest), Option<Arc<Known>>>,
}

impl Cell {
    /// The security groups of these spaces; none: the platform's own count (`enable_asg_syncing` is off). Returns the
    /// containers whose groups are too many rules: they keep what they have.
    pub fn groups(&mut self, told: Option<(Arc<[SecurityGroup]>, BTreeSet<String>)>) -> Vec<Handle> {
        let made = BTreeMap::new();
        self.groups = told.map(|(all, spaces)| Groups { all, spaces, made });
        let containers: Vec<Arc<Container>> =
            self.inputs.roster.iter().map(|(container, _)| Arc::clone(container)).collect();
        containers
            .iter()
            .filter(|container| !self.follow_groups(container))
            .map(|c| c.handle.clone())
            .collect()
    }

    /// Gives a container the profile that its space's groups make. False if they are too many rules.
    pub(super) fn follow_groups(&mut self, container: &Container) -> bool {
        let Some(passed) = container.passed.and_then(|digest| self.inputs.roster.profile(digest)).cloned()
        else {
            return true;
        };
        let space = &container.owner.space_id;
        let known = match &mut self.groups {
            Some(groups) if groups.spaces.contains(space) => {
                let key = (space.clone(), passed.digest());
                let made =
                    groups.made.entry(key).or_insert_with(|| dynamic(&groups.all, space, passed.profile()));
                match made {
                    Some(known) => Arc::clone(known),
                    None => return false,
                }
            }
            _ => passed,
        };
        // It is in the roster; and one that leaves needs nothing.
        drop(self.assign(&container.handle, known));
        true
    }
}

fn dynamic(groups: &[SecurityGroup], space: &str, passed: &Profile) -> Option<Arc<Known>> {
    let rules = rules_for(groups, space, passed.workload);
    let fits = rules.len() <= MAX_RULES;
    let (workload, settings) = (passed.workload, &passed.settings);
    fits.then(|| Arc::new(Profile { workload, settings: settings.clone(), rules }.into()))
}
