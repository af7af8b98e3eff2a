//! What of an ADD is the kernel's work on the firewall: the bytes of its transaction, made before, sent by a socket of
//! their own.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use weft_model::profile::Known;

use crate::common::bed::{Ports, list, profile, wanted};
use crate::common::change::Measured;

pub(super) struct Transactions {
    measured: Measured,
    known: Arc<Known>,
}

/// Of the part.
pub(super) fn name(rules: usize, list: &str) -> String {
    format!("transaction-{rules}-{list}")
}

impl Transactions {
    /// In namespaces of this process. `known`: another container has the list.
    pub(super) fn new(rules: usize, of: &str) -> Result<Self> {
        let mut measured = Measured::new()?;
        let known: Arc<Known> = Arc::new(profile(list(1, rules, Ports::Usual)).into());
        if of == "known" {
            measured.bed.add([wanted("holder", "eth0", Arc::clone(&known))])?;
        }
        Ok(Self { measured, known })
    }

    pub(super) fn send(&mut self) -> Result<Duration> {
        let (cost, _) = self.measured.come_and_go(wanted("added", "eth0", Arc::clone(&self.known))?)?;
        Ok(Duration::from_secs_f64(cost.bare.wall / 1000.0))
    }
}
