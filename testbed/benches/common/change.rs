//! One change of a cell, part by part.

use anyhow::Result;
use nf_tables::batch::Transaction;
use weft_model::cell::{Key, Step};
use weft_node::journal::Journal;
use weft_node::kernel::{Namespaces, transactions};

use super::bare::Bare;
use super::bed::{Bed, Space, firewall_only};
use super::figure::{Figure, Spent, median_of};

/// What one change took.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Cost {
    /// Edits, the layers of a list that is new, difference, and belief afterwards.
    pub(crate) plan: Spent,
    /// The transaction by the kernel's shell, from asking to its answer.
    pub(crate) kernel: Spent,
    pub(crate) journal: Spent,
    /// The same bytes sent again.
    pub(crate) bare: Spent,
}

/// What all samples of a row said, round by round.
#[derive(Debug)]
pub(crate) struct Rounds<S>(pub(crate) Vec<Vec<S>>);

impl<S> Default for Rounds<S> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<S> Rounds<S> {
    fn medians(&self, of: impl Fn(&S) -> f64) -> Vec<f64> {
        self.0.iter().map(|samples| median_of(samples.iter().map(&of).collect())).collect()
    }

    pub(crate) fn figure(&self, of: impl Fn(&S) -> f64) -> Figure {
        Figure::of(self.medians(of))
    }

    pub(crate) fn ratio(&self, of: impl Fn(&S) -> f64, to: impl Fn(&S) -> f64) -> Figure {
        Figure::ratio(&self.medians(of), &self.medians(to))
    }
}

/// A cell with what it takes to measure on it.
pub(crate) struct Measured {
    pub(crate) bed: Bed,
    pub(crate) bare: Bare,
    journal: Journal,
    _world: Space,
    _directory: tempfile::TempDir,
}

impl Measured {
    pub(crate) fn new() -> Result<Self> {
        let world = Space::new()?;
        let bed = Bed::new(&world, true)?;
        let directory = tempfile::tempdir()?;
        let (journal, _) = Journal::open(directory.path(), "boot")?;
        Ok(Self { bare: Bare::open(&bed.space)?, bed, journal, _world: world, _directory: directory })
    }

    /// `edit` on the model, and all that follows; what it took without its bare transaction, and the step.
    pub(crate) fn change(&mut self, edit: impl FnOnce(&mut Bed) -> Result<()>) -> Result<(Cost, Step)> {
        let begin = Spent::now()?;
        edit(&mut self.bed)?;
        let step = firewall_only(self.bed.cell.diff());
        let planned = Spent::now()?;
        let records = self.bed.cell.take_records();
        let roster = self.bed.cell.roster();
        self.journal.append(&records, || roster.records().collect())?;
        let written = Spent::now()?;
        let outcome = self.bed.apply(&step, &Namespaces::new())?;
        let applied = Spent::now()?;
        self.bed.cell.settle(&step, &outcome);
        let settled = Spent::now()?;
        let cost = Cost {
            plan: planned.since(begin) + settled.since(applied),
            kernel: applied.since(written),
            journal: written.since(planned),
            bare: Spent::default(),
        };
        Ok((cost, step))
    }

    /// What was sent for a change there and back, sent again; what they took, and the bytes of the first. `before` each
    /// of them is done what was done before the change itself, so that both find the processor's caches alike.
    pub(crate) fn again(
        &mut self,
        there: &Step,
        back: &Step,
        mut before: impl FnMut() -> Result<()>,
    ) -> Result<([Spent; 2], usize)> {
        let [there, back] = [there, back].map(|step| transactions(&step.firewall));
        let mut again = |sent: &[Transaction<&Key>]| {
            before()?;
            sent.iter()
                .try_fold(Spent::default(), |spent, one| Ok::<_, anyhow::Error>(spent + self.bare.send(one)?))
        };
        let spent = [again(&there)?, again(&back)?];
        Ok((spent, there.iter().map(|one| one.bytes.len()).sum()))
    }
}

/// Forth in one round, back in the next.
pub(crate) fn in_turns<T>(all: &mut [T], round: usize) -> Box<dyn Iterator<Item = &mut T> + '_> {
    if round.is_multiple_of(2) { Box::new(all.iter_mut()) } else { Box::new(all.iter_mut().rev()) }
}
