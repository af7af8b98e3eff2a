//! Many containers come and go at once: none fails, no address is given twice, nothing is left.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails, in its helpers too")]

use std::collections::BTreeSet;
use std::thread;
use std::time::{Duration, Instant};

use weft_testbed::external_networker::Request;
use weft_testbed::{Lab, Options};

const PARALLEL: usize = 20;

/// `WEFT_PAIRS` in the environment, for long runs.
fn pairs() -> usize {
    std::env::var("WEFT_PAIRS").map_or(200, |text| text.parse().unwrap())
}

#[test]
fn parallel_pairs_do_not_fail_and_leave_nothing() {
    let mut options = Options::unique("pairs").unwrap();
    options.cells = 1;
    let lab = Lab::up(&options).unwrap();
    let cell = &lab.cells[0];
    let devices = || cell.place.run("ip", &["-brief", "link"], "").unwrap().lines().count();
    let before = devices();
    let free = cell.status().unwrap()["free_addresses"].clone();
    for round in 0..pairs().div_ceil(PARALLEL) {
        let handles: Vec<String> = (0..PARALLEL).map(|index| format!("pair-{round}-{index}")).collect();
        let addresses: BTreeSet<_> = thread::scope(|scope| {
            let adds: Vec<_> = handles
                .iter()
                .map(|handle| scope.spawn(|| cell.add(&Request::app(handle)).unwrap()))
                .collect();
            adds.into_iter().map(|add| add.join().unwrap().addr).collect()
        });
        assert_eq!(addresses.len(), PARALLEL, "an address was given twice: {addresses:?}");
        assert_eq!(devices(), before + PARALLEL);
        thread::scope(|scope| {
            for handle in &handles {
                scope.spawn(|| cell.del(handle).unwrap());
            }
        });
        assert_eq!(devices(), before, "a link is left after DEL");
    }
    assert_eq!(cell.status().unwrap()["containers"].as_array().unwrap().len(), 0);
    // Addresses rest until connections are forgotten, which nobody waits for.
    let deadline = Instant::now() + Duration::from_secs(30);
    while cell.status().unwrap()["free_addresses"] != free {
        assert!(Instant::now() < deadline, "{} of {free} free", cell.status().unwrap()["free_addresses"]);
        thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(lab.complaints(&[]), Vec::<String>::new());
}
