//! What the policy server answers about policies, as values.
//!
//! One policy that cannot be what was meant is left out and the others hold; so are those that contradict each other on
//! whose a tag is, as letting the wrong app in is worse than keeping the right one out until the next answer.

use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;
use serde_json::value::RawValue;
use weft_model::asg::PortRange;
use weft_model::policy::{AppGuid, Policy, PolicyTag};
use weft_model::profile::Transport;

/// One or more answers taken together.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Listed {
    pub policies: BTreeSet<Policy>,
    /// Why policies were left out, for people.
    pub skipped: BTreeSet<String>,
}

impl Listed {
    /// Adds what an answer lists. An error only where it is not a list of policies as a whole.
    pub fn add(&mut self, json: &[u8]) -> Result<(), serde_json::Error> {
        #[derive(Deserialize)]
        struct Answer<'a> {
            // Go writes null for a list that it never made; an answer without it is none of the policy server's.
            #[serde(borrow)]
            policies: Option<Vec<&'a RawValue>>,
            #[expect(dead_code, reason = "that it is there tells such an answer from any other object")]
            total_policies: u64,
        }
        let answer: Answer<'_> = serde_json::from_slice(json)?;
        for policy in answer.policies.unwrap_or_default() {
            match parse(policy.get()) {
                Ok(policy) => drop(self.policies.insert(policy)),
                Err(why) => drop(self.skipped.insert(why)),
            }
        }
        Ok(())
    }

    /// Leaves out policies whose source has two tags, or whose tag has two sources.
    pub fn without_contradictions(mut self) -> Self {
        let mut tags: BTreeMap<&AppGuid, BTreeSet<PolicyTag>> = BTreeMap::new();
        let mut apps: BTreeMap<PolicyTag, BTreeSet<&AppGuid>> = BTreeMap::new();
        for Policy { source, source_tag, .. } in &self.policies {
            tags.entry(source).or_default().insert(*source_tag);
            apps.entry(*source_tag).or_default().insert(source);
        }
        let split = |app: &AppGuid| tags.get(app).is_some_and(|tags| tags.len() > 1);
        let shared = |tag: PolicyTag| apps.get(&tag).is_some_and(|apps| apps.len() > 1);
        let wrong: BTreeSet<(AppGuid, PolicyTag)> = self
            .policies
            .iter()
            .filter(|policy| split(&policy.source) || shared(policy.source_tag))
            .map(|policy| (policy.source.clone(), policy.source_tag))
            .collect();
        self.skipped.extend(wrong.iter().map(|(app, tag)| {
            format!("app {app} with tag {tag}: the answer contradicts itself on whose the tag is")
        }));
        self.policies.retain(|policy| !wrong.contains(&(policy.source.clone(), policy.source_tag)));
        self
    }
}

#[derive(Deserialize)]
struct Written {
    source: Source,
    destination: Destination,
}

#[derive(Deserialize)]
struct Source {
    id: String,
    tag: String,
}

#[derive(Deserialize)]
struct Destination {
    id: String,
    protocol: String,
    ports: Ports,
}

#[derive(Deserialize)]
struct Ports {
    start: u16,
    end: u16,
}

fn parse(json: &str) -> Result<Policy, String> {
    let Written { source, destination } =
        serde_json::from_str(json).map_err(|why| format!("a policy that cannot be read: {why}"))?;
    let about = |why: String| format!("from {} to {}: {why}", source.id, destination.id);
    let app = |id: &str| id.parse::<AppGuid>().map_err(|why| about(why.to_string()));
    Ok(Policy {
        source: app(&source.id)?,
        source_tag: source.tag.parse().map_err(|why| about(format!("tag `{}`: {why}", source.tag)))?,
        destination: app(&destination.id)?,
        transport: match destination.protocol.as_str() {
            "tcp" => Transport::Tcp,
            "udp" => Transport::Udp,
            other => return Err(about(format!("protocol `{other}` is neither tcp nor udp"))),
        },
        ports: PortRange::new(destination.ports.start, destination.ports.end)
            .map_err(|why| about(format!("ports: {why}")))?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::{Value, json};

    fn policy(from: &str, tag: &str, to: &str, protocol: &str, ports: (u32, u32)) -> Value {
        json!({
            "source": { "id": from, "tag": tag },
            "destination": { "id": to, "tag": "0009", "protocol": protocol,
                             "ports": { "start": ports.0, "end": ports.1 } },
        })
    }

    fn listed(policies: &[Value]) -> Listed {
        let mut listed = Listed::default();
        let json = json!({ "total_policies": policies.len(), "policies": policies }).to_string();
        listed.add(json.as_bytes()).expect("a list");
        listed
    }

    #[test]
    fn one_bad_policy_leaves_the_others() {
        let good = policy("a", "0001", "b", "tcp", (80, 90));
        let read = listed(&[
            policy("a", "0001", "b", "sctp", (1, 1)),
            policy("a", "0001", "b", "tcp", (9, 1)),
            policy("a", "0000", "b", "tcp", (1, 1)),
            policy("a", "x", "b", "tcp", (1, 1)),
            policy("", "0001", "b", "tcp", (1, 1)),
            policy("a", "0001", "b", "udp", (1, 70_000)),
            json!(7),
            good.clone(),
            good.clone(),
        ]);
        assert_eq!(read.policies, listed(&[good]).policies);
        assert_eq!((read.policies.len(), read.skipped.len()), (1, 7), "{:?}", read.skipped);
    }

    #[test]
    fn what_contradicts_is_left_out_and_said() {
        let read = listed(&[
            policy("a", "0001", "b", "tcp", (1, 1)),
            policy("b", "0001", "a", "tcp", (1, 1)),
            policy("c", "0002", "a", "tcp", (1, 1)),
            policy("c", "0003", "b", "tcp", (1, 1)),
            policy("d", "0004", "a", "tcp", (1, 1)),
            policy("d", "0004", "b", "tcp", (1, 1)),
        ])
        .without_contradictions();
        assert!(read.policies.iter().all(|policy| policy.source.as_str() == "d"), "{:?}", read.policies);
        assert_eq!((read.policies.len(), read.skipped.len()), (2, 4));
    }

    #[test]
    fn what_is_no_list_is_an_error() {
        for json in [
            "",
            "[]",
            "{}",
            r#"{"error": "x"}"#,
            r#"{"policies":[]}"#,
            r#"{"total_policies":1,"policies":[{"#,
        ] {
            Listed::default().add(json.as_bytes()).expect_err(json);
        }
        assert_eq!(listed(&[]), Listed::default());
        Listed::default().add(br#"{"total_policies":0,"policies":null}"#).expect("Go's empty list");
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes: Vec<u8>, text in r#"[\[\]{}":,a-z0-9]{0,60}"#) {
            drop(Listed::default().add(&bytes));
            drop(Listed::default().add(text.as_bytes()));
            drop(parse(&text));
        }

        #[test]
        fn what_is_left_has_one_tag_per_app_and_one_app_per_tag(
            pairs in prop::collection::vec((0u8..5, 1u8..5), 0..12),
        ) {
            let policies: Vec<_> = pairs.iter()
                .map(|(app, tag)| policy(&format!("app-{app}"), &format!("{tag:04X}"), "z", "tcp", (1, 1))).collect();
            let left = listed(&policies).without_contradictions().policies;
            for (one, other) in left.iter().flat_map(|one| left.iter().map(move |other| (one, other))) {
                prop_assert_eq!(one.source == other.source, one.source_tag == other.source_tag);
            }
        }
    }
}
