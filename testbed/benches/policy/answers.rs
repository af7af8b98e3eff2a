//! What the policy server answers: as it has it, as it writes it, and as the node reads it.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::time::ClockId;
use serde_json::{Value, json};
use tokio::runtime::Runtime;
use weft_daemon::tls::Files;
use weft_model::asg::group::{self, SecurityGroup};
use weft_model::asg::{EgressRule, Traffic};
use weft_model::follow::Ids;
use weft_model::policy::{Policies, by_app};
use weft_node::policy_server::{Client, Listed, Server};
use weft_testbed::policy_server::{self as served, PolicyServer};

use crate::common::figure::Spent;

const THIS_THREAD: ClockId = ClockId::CLOCK_THREAD_CPUTIME_ID;

/// All that the server has of one kind.
#[derive(Debug, Clone)]
pub(super) enum Stock {
    Policies(Vec<served::Policy>),
    Groups(Vec<served::SecurityGroup>),
}

/// What the node knows of it.
#[derive(Debug, Clone)]
pub(super) enum Decoded {
    Policies(Policies),
    Groups(Arc<[SecurityGroup]>),
}

/// A server, and the node's client of it.
pub(super) struct Source {
    server: PolicyServer,
    client: Client,
    runtime: Runtime,
}

impl Source {
    pub(super) fn new() -> Result<Self> {
        let server = PolicyServer::scratch()?;
        let identity = &server.files.client;
        let certificates = Files {
            ca: server.files.ca.clone(),
            certificate: identity.certificate.clone(),
            key: identity.key.clone(),
        };
        let client = Client::new(Server {
            url: server.url().parse()?,
            certificates,
            answers_within: Duration::from_secs(30),
        });
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        Ok(Self { server, client, runtime })
    }

    /// From now on it has this, and no longer that.
    pub(super) fn replace(&self, before: &Stock, now: &Stock) -> Result<()> {
        self.server.change(|state| match (before, now) {
            (Stock::Policies(before), Stock::Policies(now)) => {
                let (old, new): (HashSet<_>, HashSet<_>) = (before.iter().collect(), now.iter().collect());
                state.remove_policies(old.difference(&new).copied());
                state.add_policies(new.difference(&old).map(|policy| (*policy).clone()))
            }
            (Stock::Groups(before), Stock::Groups(now)) => {
                before.iter().for_each(|group| state.remove_group(&group.guid));
                now.iter().for_each(|group| state.put_group(group.clone()));
                Ok(())
            }
            _ => anyhow::bail!("of one kind"),
        })?
    }

    /// Asks for it as the node does, and reads the answer. The server's own CPU time is not in it.
    pub(super) fn fetch(&self, stock: &Stock, ids: &Ids) -> Result<Spent> {
        let begin = Spent::read(THIS_THREAD)?;
        match stock {
            Stock::Policies(_) => drop(self.runtime.block_on(self.client.policies(&ids.apps))?),
            Stock::Groups(_) => drop(self.runtime.block_on(self.client.security_groups(&ids.spaces))?),
        }
        Ok(Spent::read(THIS_THREAD)?.since(begin))
    }

    /// The body of that answer.
    pub(super) fn body(&self, stock: &Stock) -> Result<Vec<u8>> {
        let body = match stock {
            Stock::Policies(policies) => {
                let apps = policies.iter().flat_map(|policy| [&policy.source, &policy.destination]);
                let tags = self.server.change(|state| {
                    apps.filter_map(|app| Some((app.as_str(), state.tag(app)?))).collect::<BTreeMap<_, _>>()
                })?;
                let listed = policies.iter().map(|policy| {
                    let tag = |app: &String| tags.get(app.as_str()).context("an app of a policy has a tag");
                    Ok(json!({
                        "source": {"id": policy.source, "tag": tag(&policy.source)?},
                        "destination": {
                            "id": policy.destination,
                            "tag": tag(&policy.destination)?,
                            "protocol": policy.protocol,
                            "ports": {"start": policy.start, "end": policy.end},
                        },
                    }))
                });
                json!({"total_policies": policies.len(), "policies": listed.collect::<Result<Vec<_>>>()?})
            }
            Stock::Groups(groups) => json!({"next": 0, "security_groups": groups}),
        };
        Ok(body.to_string().into_bytes())
    }
}

/// As the node does it.
pub(super) fn decode(stock: &Stock, body: &[u8]) -> Result<Decoded> {
    Ok(match stock {
        Stock::Policies(_) => {
            let mut listed = Listed::default();
            listed.add(body)?;
            Decoded::Policies(by_app(listed.without_contradictions().policies))
        }
        Stock::Groups(_) => Decoded::Groups(group::parse(body)?.groups.into()),
    })
}

/// Rules as the Cloud Controller writes them.
pub(super) fn written(rules: &[EgressRule]) -> String {
    let one = |rule: &EgressRule| -> Value {
        let destination = format!("{}-{}", rule.to.first(), rule.to.last());
        match rule.traffic {
            Traffic::Tcp(ports) => {
                json!({"protocol": "tcp", "destination": destination, "ports": ports.to_string()})
            }
            Traffic::Udp(ports) => {
                json!({"protocol": "udp", "destination": destination, "ports": ports.to_string()})
            }
            Traffic::Icmp { .. } | Traffic::All => json!({"protocol": "all", "destination": destination}),
        }
    };
    rules.iter().map(one).collect::<Value>().to_string()
}
