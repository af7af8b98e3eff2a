//! One wave: what was asked for becomes edits, journal, a step or a few, and answers.

use std::collections::BTreeMap;
use std::mem;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use tracing::{debug, error, info};
use weft_daemon::cause::chain;
use weft_model::address::OverlayAddr;
use weft_model::cell::{Fault, Key, Outcome, Record, Roster, Scope, Step};
use weft_model::container::Container;
use weft_model::link::LinkSpec;
use weft_model::reason::Reason;

use super::Running;
use super::call::lay_inside;
use crate::directory::Entered;
use crate::inbox::{Reply, Request};
use crate::kernel::{Kernel, Namespaces};
use crate::report::status;

/// A call that has its effect in this wave.
pub(super) enum Asked {
    Add { container: Arc<Container>, namespace: Arc<OwnedFd>, reply: Reply<LinkSpec> },
    Delete { addrs: Vec<OverlayAddr>, reply: Reply<()> },
    LogC2c { on: bool, reply: Reply<bool> },
}

impl<K: Kernel> Running<K> {
    pub(super) async fn wave(&mut self, requests: Vec<Request>) {
        // A fence that was published before a call is heard before it.
        if self.task.overlay.has_changed().unwrap_or(false) {
            self.follow_leases();
        }
        if self.unwritten.is_some() {
            // Who asks whether a container can be added asks about now.
            self.write_journal();
        }
        let mut asked = Vec::new();
        let mut namespaces = Namespaces::new();
        let told = |request: &Request| matches!(request, Request::Forgotten(_) | Request::NotForgotten(_));
        let (told, requests): (Vec<_>, Vec<_>) = requests.into_iter().partition(told);
        // Who waits for an address is before who has just come.
        for request in told.into_iter().chain(mem::take(&mut self.parked)).chain(requests) {
            self.edit(request, &mut asked, &mut namespaces).await;
        }
        self.write_journal();
        if let Some(why) = self.unwritten.clone() {
            // Nothing that is not in the journal may be laid: an unknown container would lose its address.
            asked = self.refuse_adds(asked, &why);
        }
        if mem::take(&mut self.table_touched) {
            self.look(Scope::Firewall).await;
        }
        let failed = self.carry_out(&asked, &namespaces).await;
        self.leaving = false;
        self.write_journal();
        for asked in asked {
            self.answer(asked, &failed);
        }
        self.forget_resting();
        self.tell_names();
        self.policies_applied();
        self.task.metrics.observe(&self.task.cell, &self.task.overlay.borrow());
    }

    /// Applies steps until all is done that can be, and says what failed, by key, or by the key of the link of a container
    /// that could not be added.
    async fn carry_out(&mut self, asked: &[Asked], namespaces: &Namespaces) -> BTreeMap<Key, Reason> {
        let mut failed = BTreeMap::new();
        let mut looked = false;
        // A container that could not be added is taken away again in the same wave, so that a failure leaves nothing.
        for _ in 0..4 {
            let step = self.task.cell.diff();
            if step.is_empty() {
                break;
            }
            let done = self.apply(&step, namespaces).await;
            if done.failed.keys().any(Key::is_firewall) && !looked {
                // Perhaps somebody has just changed the table: what is there is looked at, and then it is tried again.
                looked = true;
                self.look(Scope::Firewall).await;
                continue;
            }
            let mut dropped = false;
            for asked in asked {
                let Asked::Add { container, .. } = asked else { continue };
                let why = self.task.cell.keys_of(container).find_map(|key| done.failed.get(key));
                if let Some(why) = why.cloned() {
                    failed.entry(Key::Link(container.addr)).or_insert(why);
                    self.task.cell.drop(&container.handle);
                    dropped = true;
                }
            }
            for (key, why) in done.failed {
                failed.entry(key).or_insert(why);
            }
            if !dropped {
                break;
            }
        }
        failed
    }

    async fn edit(&mut self, request: Request, asked: &mut Vec<Asked>, namespaces: &mut Namespaces) {
        match request {
            // The caller is gone, so nothing is made that it would have to take back.
            Request::Add { reply, .. } if reply.is_closed() => {}
            Request::Add { .. } if self.addresses_come() => self.parked.push(request),
            Request::Add { wanted, namespace, reply } => match self.task.cell.add(*wanted) {
                Ok(container) => {
                    namespaces.insert(container.addr, Arc::clone(&namespace));
                    self.report_ports(&container);
                    asked.push(Asked::Add { container, namespace, reply });
                }
                Err(reason) => drop(reply.send(Err(self.explained(reason)))),
            },
            Request::Delete { handle, interface, reply } => {
                // Another interface is not ours: a runtime ends in this way what it could not begin.
                let found = self.task.cell.roster().get(&handle);
                let ours = found.is_none_or(|(container, _)| container.interface == interface);
                if ours {
                    self.refuse_parked(|wanted| wanted.handle == handle && wanted.interface == interface);
                }
                asked.push(self.delete(ours.then_some(handle), reply));
            }
            Request::Collect { valid, reply } => {
                self.refuse_parked(|wanted| valid.ends(&wanted.network, &wanted.handle, &wanted.interface));
                let stale = self.stale(&valid);
                for handle in &stale {
                    info!(%handle, "container deleted: its runtime knows it no more");
                }
                asked.push(self.delete(stale, reply));
            }
            Request::Ready { reply } => {
                drop(reply.send(self.ready()));
            }
            Request::Check(check) => self.check(check).await,
            Request::Explain { question, reply } => drop(reply.send(self.explain(question).await)),
            Request::Status { reply } => {
                let ready = self.ready();
                let known = self.task.policies.as_ref().map(|policies| policies.known.borrow());
                let (cell, overlay) = (&self.task.cell, self.task.overlay.borrow());
                drop(reply.send(Ok(status(cell, &overlay, known.as_deref(), ready.err()))));
            }
            Request::LogC2c { set: None, reply } => {
                drop(reply.send(Ok(self.task.cell.inputs().log_c2c)));
            }
            Request::LogC2c { set: Some(on), reply } => {
                self.task.cell.log_c2c(on);
                asked.push(Asked::LogC2c { on, reply });
            }
            Request::Measure { reply } => drop(reply.send(Ok(self.size()))),
            Request::Forgotten(addrs) => self.forgotten(&addrs),
            Request::Fitted(outcomes) => self.fitted(outcomes),
            Request::NotForgotten(why) => self.not_forgotten(&why),
        }
    }

    /// Why there is no lease yet is known to the lease stream only.
    fn explained(&self, reason: Reason) -> Reason {
        match (reason, &self.task.overlay.borrow().view.trouble) {
            (Reason::NoLeaseYet { .. }, Some(trouble)) => Reason::NoLeaseYet { why: trouble.to_string() },
            (reason, _) => reason,
        }
    }

    fn refuse_adds(&mut self, asked: Vec<Asked>, why: &Reason) -> Vec<Asked> {
        let mut kept = Vec::new();
        for asked in asked {
            match asked {
                Asked::Add { container, reply, .. } => {
                    self.task.cell.drop(&container.handle);
                    drop(reply.send(Err(why.clone())));
                }
                other @ (Asked::Delete { .. } | Asked::LogC2c { .. }) => kept.push(other),
            }
        }
        kept
    }

    /// What is not written now is with the next wave that can.
    fn write_journal(&mut self) {
        let records = self.task.cell.take_records();
        let roster = self.task.cell.roster();
        self.renamed.extend(records.iter().filter_map(|record| concerns(record, roster)));
        let written = self.task.journal.append(&records, || self.task.cell.roster().records().collect());
        let why = written.err().map(|error| Reason::File {
            operation: "write".into(),
            path: "the journal of containers".into(),
            why: chain(&error),
        });
        match (&self.unwritten, &why) {
            (None, Some(why)) => error!(%why, "no container is added until the journal can be written"),
            (Some(_), None) => info!("journal written again; containers are added"),
            _ => {}
        }
        self.unwritten = why;
    }

    /// Tells whoever asks for names, and for policies, of what this wave has changed.
    fn tell_names(&mut self) {
        let (roster, names) = (self.task.cell.roster(), &self.task.names);
        #[expect(clippy::disallowed_methods, reason = "the log's times are wall-clock times")]
        let now = std::time::SystemTime::now();
        for addr in &self.renamed {
            match roster.with_addr(*addr) {
                Some((container, _)) => {
                    let profile = container.profile.and_then(|digest| roster.profile(digest)).cloned();
                    names.enter(Entered { container: Arc::clone(container), profile });
                }
                None => names.leave(addr.get(), now),
            }
        }
        if mem::take(&mut self.policies_changed) {
            let policies = self.told.policies.as_ref().map(|told| Arc::clone(&told.value));
            names.policies(policies.unwrap_or_default());
        }
        let changed = !mem::take(&mut self.renamed).is_empty();
        if let Some(policies) = self.task.policies.as_ref().filter(|_| changed) {
            policies.want(roster);
        }
    }

    /// Whether a container can be added.
    fn ready(&self) -> Result<(), Reason> {
        if !self.addresses_come() {
            self.task.cell.ready().map_err(|reason| self.explained(reason))?;
        }
        self.unwritten.clone().map_or(Ok(()), Err)
    }

    async fn apply(&mut self, step: &Step, namespaces: &Namespaces) -> Outcome {
        let began = std::time::Instant::now();
        let outcome = self.task.kernel.apply(step, namespaces).await;
        self.task.metrics.wave(began.elapsed());
        for change in step.changes() {
            if !outcome.failed.contains_key(&change.key) {
                self.reported.remove(&change.key);
                if matches!(change.key, Key::Link(_) | Key::Shaping(_) | Key::Firewall(_)) {
                    debug!(%change, "applied")
                } else {
                    info!(%change, "applied")
                }
            }
        }
        for Fault { key, why } in self.task.cell.settle(step, &outcome) {
            let newborn =
                matches!(&key, Key::Link(addr) | Key::Shaping(addr) if namespaces.contains_key(addr));
            // A caller hears of its own link; everything else is for the log, once until it is mended.
            if !newborn && self.reported.insert(key.clone()) {
                self.task.metrics.refused();
                error!(%key, %why, "kernel refused a change; it is tried again");
            }
        }
        outcome
    }

    fn answer(&self, asked: Asked, failed: &BTreeMap<Key, Reason>) {
        match asked {
            Asked::Delete { addrs, reply } => {
                let keys = addrs.into_iter().flat_map(|addr| [Key::Link(addr), Key::Shaping(addr)]);
                let failed = keys.into_iter().find_map(|key| failed.get(&key).cloned());
                drop(reply.send(failed.map_or(Ok(()), Err)));
            }
            Asked::LogC2c { on, reply } => {
                let failed = failed.iter().find(|(key, _)| key.is_firewall()).map(|(_, why)| why.clone());
                drop(reply.send(failed.map_or(Ok(on), Err)));
            }
            Asked::Add { container, namespace, reply } => {
                if let Some(why) = failed.get(&Key::Link(container.addr)) {
                    drop(reply.send(Err(why.clone())));
                    return;
                }
                let spec = LinkSpec::of(&container);
                let inbox = self.task.inbox.clone();
                let metrics = Arc::clone(&self.task.metrics);
                tokio::spawn(async move { lay_inside(spec, namespace, reply, inbox, &metrics).await });
            }
        }
    }
}

/// Whose entry in the directory is another after a change of the roster.
fn concerns(record: &Record, roster: &Roster) -> Option<OverlayAddr> {
    match record {
        Record::Present(container) => Some(container.addr),
        Record::Assigned(handle, _) | Record::Fitted(handle, _) => {
            roster.get(handle).map(|(container, _)| container.addr)
        }
        Record::Resting(addr) => Some(*addr),
        Record::Profile(_) | Record::Leaving(_) | Record::Free(_) => None,
    }
}
