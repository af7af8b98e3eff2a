//! What a cell asks for, holds and enforces follows what concerns the cell, not how large the foundation is.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails, in its helpers too")]

use std::time::Duration;

use serde_json::{Value, json};
use weft_testbed::foundation::{APPS, CONTAINERS, fill, guid, policies};
use weft_testbed::lab::Cell;
use weft_testbed::policy_server::{Policy, PolicyServer, Route};
use weft_testbed::prober::wait_within;
use weft_testbed::{Lab, Options};

const PATIENCE: Duration = Duration::from_secs(60);
/// After each of which the cell asks anew.
const CHANGES: u64 = 5;

/// What is counted while policies change that are none of the cell's.
#[derive(Debug, PartialEq, Eq)]
struct Counted {
    requests: u64,
    bytes: u64,
    /// In the snapshot on disk, which is what the node knows.
    held: usize,
    /// Of the table's sets.
    elements: usize,
}

fn count(server: &PolicyServer, cell: &Cell) -> Counted {
    let asked = || (server.asked(Route::Policies), server.answered(Route::Policies));
    change_elsewhere(server);
    let before = asked();
    for _ in 0..CHANGES {
        change_elsewhere(server);
    }
    let after = asked();
    Counted {
        requests: after.0 - before.0,
        bytes: after.1 - before.1,
        held: held(cell),
        elements: elements(cell),
    }
}

fn change_elsewhere(server: &PolicyServer) {
    let policy = Policy::tcp(&guid(1), &guid(2), 9999);
    let before = server.asked(Route::Policies);
    let change = |state: &mut weft_testbed::policy_server::State| {
        state.remove_policies([&policy]);
        state.add_policies([policy.clone()])
    };
    server.change(change).unwrap().unwrap();
    wait_within(PATIENCE, "a fetch", || server.asked(Route::Policies) > before);
    // It is asked for in parts; behind the last one the time of the last change is asked for once more, and then by the
    // next poll.
    let last = server.asked(Route::PoliciesLastUpdated);
    wait_within(PATIENCE, "its end", || server.asked(Route::PoliciesLastUpdated) >= last + 2);
}

fn held(cell: &Cell) -> usize {
    let text = std::fs::read_to_string(cell.directory.join("state/policies.json")).unwrap();
    let saved: Value = serde_json::from_str(&text).unwrap();
    let apps = saved["value"].as_object().unwrap().values();
    apps.map(|app| app["inbound"].as_array().unwrap().len()).sum()
}

fn elements(cell: &Cell) -> usize {
    let text = cell.place.run("nft", &["-j", "list", "table", "inet", "weft"], "").unwrap();
    let listed: Value = serde_json::from_str(&text).unwrap();
    let objects = listed["nftables"].as_array().unwrap().iter();
    let sets = objects.flat_map(|object| [&object["set"]["elem"], &object["map"]["elem"]]);
    sets.filter_map(Value::as_array).map(Vec::len).sum()
}

#[test]
fn a_cell_of_a_large_foundation_asks_for_and_holds_what_is_its_own() {
    let mut options = Options::unique("foundation").unwrap();
    options.cells = 1;
    options.policy_server = true;
    let node = json!({"disable_container_network_policy": false, "policy_poll_interval_seconds": 0.5});
    options.node.extend(node.as_object().cloned().unwrap());
    let lab = Lab::up(&options).unwrap();
    let (cell, server) = (&lab.cells[0], lab.policy_server.as_ref().unwrap());
    let (concerned, others) = policies();
    let (own, all) = (concerned.len(), concerned.len() + others.len());
    assert_eq!((all, CONTAINERS), (60_000, 250));
    server.change(|state| state.add_policies(concerned)).unwrap().unwrap();
    fill(cell).unwrap();
    wait_within(PATIENCE, "all that concerns the cell", || held(cell) == own);

    let few = count(server, cell);
    server.change(|state| state.add_policies(others)).unwrap().unwrap();
    let many = count(server, cell);
    assert_eq!(many, few, "as with a server that has nothing else");
    assert_eq!(few.held, own);
    assert!(few.elements > own / 2, "each that leads to the cell is one: {few:?}");
    // In parts, since no URL has room for all ids; and of all policies a small part.
    assert!(few.requests >= 2 * CHANGES, "{few:?}");
    let each = few.bytes / CHANGES;
    assert!(each < u64::try_from(all).unwrap() * 100 / 20, "{each} bytes for each answer, of {APPS} apps");
    assert_eq!(lab.complaints(&[]), Vec::<String>::new());
}
