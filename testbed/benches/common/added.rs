//! A container whose rules are added and taken away again, for the benches of ADD.

use anyhow::{Context, Result};
use weft_model::cell::Wanted;

use crate::common::change::{Cost, Measured};

impl Measured {
    /// What adding them took, and the bytes that were sent for it.
    pub(crate) fn come_and_go(&mut self, wanted: Wanted) -> Result<(Cost, usize)> {
        let name = wanted.handle.clone();
        let (cost, there) = self.change(|bed| {
            bed.cell.add(wanted)?;
            Ok(())
        })?;
        let addr = self.bed.cell.roster().get(&name).context("it was added")?.0.addr;
        let (_, gone) = self.change(|bed| {
            bed.cell.drop(&name);
            Ok(())
        })?;
        self.bed.cell.forgotten(&[addr].into());
        let ([bare, _], bytes) = self.again(&there, &gone, || Ok(()))?;
        Ok((Cost { bare, ..cost }, bytes))
    }
}
