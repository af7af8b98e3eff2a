//! One question: has anything changed, and if so, to what? Of ids that are new, only the latter.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;
use std::time::SystemTime;

use weft_model::asg::group::SecurityGroup;
use weft_model::follow::{First, Ids, Stamp, Subject};
use weft_model::policy::{Policies, PolicyTag, by_app};

use super::client::{AskError, Client};
use super::{Known, Told};

/// An answer in parts whose stamp moved meanwhile is asked for so often; then it is taken as it is, under the stamp
/// from before it, so that the next poll asks again.
const TRIES: usize = 3;

#[derive(Debug)]
pub(super) enum Answer {
    Unchanged,
    Fetched(Fetched),
}

#[derive(Debug)]
pub(super) struct Fetched {
    pub value: Value,
    /// From before it was fetched.
    pub stamp: Option<Stamp>,
    /// What of it cannot be what was meant, for people.
    pub left_out: BTreeSet<String>,
}

#[derive(Debug)]
pub(super) enum Value {
    Policies(Policies),
    Groups(Vec<SecurityGroup>),
    Router(PolicyTag),
}

pub(super) async fn ask(
    client: &Client,
    subject: Subject,
    ids: &Ids,
    first: First,
) -> Result<Answer, AskError> {
    let mut before = match first {
        First::Nothing(stamp) => Some(stamp),
        First::Stamp | First::Unless(_) => last_updated(client, subject).await?,
    };
    if before.is_some_and(|stamp| first == First::Unless(stamp)) {
        return Ok(Answer::Unchanged);
    }
    let mut tries = 1;
    loop {
        let (value, left_out, parts) = fetch(client, subject, ids).await?;
        let fetched = Fetched { value, stamp: before, left_out };
        if parts <= 1 || before.is_none() || tries == TRIES {
            return Ok(Answer::Fetched(fetched));
        }
        let after = last_updated(client, subject).await?;
        if after == before {
            return Ok(Answer::Fetched(fetched));
        }
        before = after;
        tries += 1;
    }
}

async fn last_updated(client: &Client, subject: Subject) -> Result<Option<Stamp>, AskError> {
    match subject {
        Subject::Policies => client.policies_last_updated().await.map(Some),
        Subject::Groups => client.security_groups_last_updated().await,
        Subject::Router => Ok(None),
    }
}

async fn fetch(
    client: &Client,
    subject: Subject,
    ids: &Ids,
) -> Result<(Value, BTreeSet<String>, usize), AskError> {
    match subject {
        Subject::Policies => {
            let got = client.policies(&ids.apps).await?;
            let listed = got.answer.without_contradictions();
            Ok((Value::Policies(by_app(listed.policies)), listed.skipped, got.parts))
        }
        Subject::Groups => {
            let got = client.security_groups(&ids.spaces).await?;
            let rules = got.answer.groups.iter().flat_map(|group| {
                group.skipped.iter().map(move |skipped| {
                    let (name, guid) = (&group.name, &group.guid);
                    format!("security group {name} ({guid}), rule {}: {}", skipped.index, skipped.why)
                })
            });
            let left_out = rules.chain(got.answer.skipped.iter().cloned()).collect();
            Ok((Value::Groups(got.answer.groups), left_out, got.parts))
        }
        Subject::Router => Ok((Value::Router(client.router_tag().await?), BTreeSet::new(), 1)),
    }
}

impl Value {
    /// Whether it is what is known already.
    pub(super) fn is_in(&self, known: &Known) -> bool {
        match self {
            Self::Policies(policies) => known.policies.as_ref().is_some_and(|told| *told.value == *policies),
            Self::Groups(groups) => known.groups.as_ref().is_some_and(|told| *told.value == **groups),
            Self::Router(tag) => known.router.as_ref().is_some_and(|told| *told.value == *tag),
        }
    }

    pub(super) fn publish(self, known: &mut Known, number: u64, ids: Arc<Ids>, at: SystemTime) {
        match self {
            Self::Policies(policies) => {
                known.policies = Some(Told { value: Arc::new(policies), ids, at, number });
            }
            Self::Groups(groups) => known.groups = Some(Told { value: groups.into(), ids, at, number }),
            Self::Router(tag) => known.router = Some(Told { value: Arc::new(tag), ids, at, number }),
        }
    }
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Policies(policies) => write!(f, "policies of {} apps", policies.len()),
            Self::Groups(groups) => write!(f, "{} security groups", groups.len()),
            Self::Router(tag) => write!(f, "tag {tag} of the overlay's routers"),
        }
    }
}
