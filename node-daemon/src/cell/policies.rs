//! What the policy server says, as edits of the cell; and what the cell wants to know of it.

use std::mem;
use std::sync::Arc;

use tokio::sync::watch;
use tracing::error;
use weft_model::cell::Roster;
use weft_model::follow::Ids;

use super::Running;
use crate::kernel::Kernel;
use crate::policy_server::{self, Applied, Known};

/// The cell's ends of the channels to who follows the policy server.
#[derive(Debug)]
pub struct Policies {
    pub known: watch::Receiver<policy_server::Known>,
    /// Whose policies and groups are wanted.
    pub ids: watch::Sender<Arc<Ids>>,
    /// What is in the kernel by now.
    pub applied: watch::Sender<Applied>,
    /// Whether security groups come from the server (`enable_asg_syncing`).
    pub groups: bool,
}

impl Policies {
    /// Says whose containers the cell has now.
    pub(super) fn want(&self, roster: &Roster) {
        self.ids.send_if_modified(|wanted| {
            let same = wanted.apps.iter().eq(roster.apps()) && wanted.spaces.iter().eq(roster.spaces());
            if !same {
                *wanted = Arc::new(ids(roster));
            }
            !same
        });
    }
}

impl<K: Kernel> Running<K> {
    /// What is not new costs nothing: the lists of groups are worked out anew otherwise, for all containers.
    pub(super) fn follow_policies(&mut self) {
        let Some(policies) = &mut self.task.policies else { return };
        let known = policies.known.borrow_and_update().clone();
        let before = mem::replace(&mut self.told, known);
        let Known { policies: answer, groups, router, .. } = &self.told;
        if let Some(told) = answer.as_ref().filter(|told| told.differs_from(before.policies.as_ref())) {
            self.task.cell.policies((*told.value).clone());
            self.policies_changed = true;
        }
        if let Some(told) = router.as_ref().filter(|told| told.differs_from(before.router.as_ref())) {
            self.task.cell.router(*told.value);
        }
        let groups = groups.as_ref().filter(|_| policies.groups);
        if let Some(told) = groups.filter(|told| told.differs_from(before.groups.as_ref())) {
            let covered = (Arc::clone(&told.value), told.ids.spaces.clone());
            for handle in self.task.cell.groups(Some(covered)) {
                error!(%handle, "security groups are too many rules for one container; it keeps those it has");
            }
        }
    }

    /// Says which answers are in the kernel, once nothing of them is refused any more.
    pub(super) fn policies_applied(&self) {
        let Some(policies) = self.task.policies.as_ref().filter(|_| !self.task.cell.unsettled_firewall())
        else {
            return;
        };
        let taken = Applied::of(&self.told);
        policies.applied.send_if_modified(|applied| mem::replace(applied, taken) != taken);
    }
}

/// Waits until the policy server has said something new; forever where there is none.
pub(super) async fn said(policies: &mut Option<Policies>) {
    let Some(policies) = policies else { return std::future::pending().await };
    if policies.known.changed().await.is_err() {
        // Who follows the server has ended, and says nothing any more.
        std::future::pending().await
    }
}

/// Whose policies and security groups the cell wants to know.
pub fn ids(roster: &Roster) -> Ids {
    Ids { apps: roster.apps().cloned().collect(), spaces: roster.spaces().cloned().collect() }
}
