//! What of an ADD is the kernel's work on the firewall: the bytes of its transaction, made before, sent by a socket of
//! their own.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use weft_model::profile::Known;

use crate::common::bed::{Ports, handle, list, profile, wanted};
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
        let wanted = wanted("added", "eth0", Arc::clone(&self.known))?;
        let (_, there) = self.measured.change(|bed| {
            bed.cell.add(wanted)?;
            Ok(())
        })?;
        let name = handle("added")?;
        let addr = self.measured.bed.cell.roster().get(&name).context("it was added")?.0.addr;
        let (_, gone) = self.measured.change(|bed| {
            bed.cell.drop(&name);
            Ok(())
        })?;
        self.measured.bed.cell.forgotten(&[addr].into());
        let ([bare, _], _) = self.measured.again(&there, &gone, || Ok(()))?;
        Ok(Duration::from_secs_f64(bare.wall / 1000.0))
    }
}
