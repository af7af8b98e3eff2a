//! What goes wrong meanwhile, and when: nodes die, controllers and the policy server are away. The moments follow the
//! containers that come, so that there are as many outages on a fast machine as on a slow one, and chance.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use weft_testbed::lab::{Cell, Controller};
use weft_testbed::policy_server::{Fault, PolicyServer};

use crate::PATIENCE;

/// Numbers that follow from a seed (SplitMix64).
pub(crate) struct Chance(pub(crate) u64);

impl Chance {
    pub(crate) fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        usize::try_from((mixed ^ (mixed >> 31)) % limit as u64).unwrap()
    }

    /// One that shares nothing with this one from now on.
    pub(crate) fn split(&mut self) -> Self {
        Self(self.below(usize::MAX) as u64)
    }

    fn pause(&mut self, limit: Duration) {
        thread::sleep(limit.mul_f64(self.below(1000) as f64 / 1000.0));
    }
}

/// How many containers of each cell have begun to come, and whether there is any use in going on.
pub(crate) struct Progress {
    begun: Vec<AtomicUsize>,
    failed: AtomicBool,
}

/// Ends the others' waiting when the thread that has it panics.
pub(crate) struct Alarm<'a>(&'a Progress);

impl Drop for Alarm<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.failed.store(true, Ordering::Relaxed);
        }
    }
}

impl Progress {
    pub(crate) fn of(cells: usize) -> Self {
        Self { begun: (0..cells).map(|_| AtomicUsize::new(0)).collect(), failed: AtomicBool::new(false) }
    }

    pub(crate) fn alarm(&self) -> Alarm<'_> {
        Alarm(self)
    }

    pub(crate) fn begin(&self, cell: usize) {
        self.begun[cell].fetch_add(1, Ordering::Relaxed);
    }

    fn begun(&self, cells: Range<usize>) -> usize {
        self.begun[cells].iter().map(|count| count.load(Ordering::Relaxed)).sum()
    }

    pub(crate) fn failed(&self) -> bool {
        self.failed.load(Ordering::Relaxed)
    }

    /// Causes one outage at a random moment of each `stretch` of so many containers of these cells, one after the other.
    pub(crate) fn disturb(
        &self,
        (cells, containers): (Range<usize>, usize),
        stretch: usize,
        mut chance: Chance,
        mut outage: impl FnMut(&mut Chance),
    ) {
        let _alarm = self.alarm();
        for from in (0..containers).step_by(stretch) {
            let moment = from + chance.below(stretch.min(containers - from));
            while self.begun(cells.clone()) < moment {
                if self.failed() {
                    return;
                }
                thread::sleep(Duration::from_millis(1));
            }
            chance.pause(Duration::from_millis(200));
            outage(&mut chance);
        }
    }
}

pub(crate) fn kill_node(cell: &Cell, chance: &mut Chance) {
    cell.kill_node().unwrap();
    chance.pause(Duration::from_millis(100));
    cell.start_node().unwrap();
    cell.wait_ready(1, PATIENCE).unwrap();
}

pub(crate) fn without_controller(controller: &Controller, chance: &mut Chance) {
    if chance.below(2) == 0 {
        controller.kill().unwrap()
    } else {
        controller.stop().unwrap()
    }
    chance.pause(Duration::from_secs(1));
    controller.start().unwrap();
    controller.wait_ready(PATIENCE).unwrap();
}

/// Away, or there and of no use.
pub(crate) fn without_policy_server(server: &PolicyServer, chance: &mut Chance) {
    let faults = [
        Fault::Slow(Duration::from_secs(30)),
        Fault::Error,
        Fault::EmptyError,
        Fault::Garbage,
        Fault::Truncated,
        Fault::DropInHeaders,
    ];
    match faults.get(chance.below(2 * faults.len())) {
        Some(fault) => server.set_fault_everywhere(*fault),
        None => server.stop(),
    }
    chance.pause(Duration::from_secs(1));
    server.set_fault_everywhere(None);
    server.start().unwrap();
}
