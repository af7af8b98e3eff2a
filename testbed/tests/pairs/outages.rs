//! What goes wrong meanwhile, and when: nodes die, controllers and the policy server are away. The moments follow the
//! containers that come, so that there are as many outages on a fast machine as on a slow one, and chance.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use weft_testbed::dice::Dice;
use weft_testbed::lab::{Cell, Controller};
use weft_testbed::policy_server::{Fault, PolicyServer};

use crate::PATIENCE;

/// Waits for a random part of `limit`.
fn pause(limit: Duration, dice: &mut Dice) {
    thread::sleep(limit / 1000 * u32::try_from(dice.below(1000)).unwrap());
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
        mut dice: Dice,
        mut outage: impl FnMut(&mut Dice),
    ) {
        let _alarm = self.alarm();
        for from in (0..containers).step_by(stretch) {
            let moment = from + usize::try_from(dice.below(stretch.min(containers - from) as u64)).unwrap();
            while self.begun(cells.clone()) < moment {
                if self.failed() {
                    return;
                }
                thread::sleep(Duration::from_millis(1));
            }
            pause(Duration::from_millis(200), &mut dice);
            outage(&mut dice);
        }
    }
}

pub(crate) fn kill_node(cell: &Cell, dice: &mut Dice) {
    cell.kill_node().unwrap();
    pause(Duration::from_millis(100), dice);
    cell.start_node().unwrap();
    cell.wait_ready(1, PATIENCE).unwrap();
}

pub(crate) fn without_controller(controller: &Controller, dice: &mut Dice) {
    if dice.below(2) == 0 {
        controller.kill().unwrap()
    } else {
        controller.stop().unwrap()
    }
    pause(Duration::from_secs(1), dice);
    controller.start().unwrap();
    controller.wait_ready(PATIENCE).unwrap();
}

/// Away, or there and of no use.
pub(crate) fn without_policy_server(server: &PolicyServer, dice: &mut Dice) {
    let faults = [
        Fault::Slow(Duration::from_secs(30)),
        Fault::Error,
        Fault::EmptyError,
        Fault::Garbage,
        Fault::Truncated,
        Fault::DropInHeaders,
    ];
    match faults.get(usize::try_from(dice.below(2 * faults.len() as u64)).unwrap()) {
        Some(fault) => server.set_fault_everywhere(*fault),
        None => server.stop(),
    }
    pause(Duration::from_secs(1), dice);
    server.set_fault_everywhere(None);
    server.start().unwrap();
}
