//! Many containers of two cells come and go at once, while nodes are killed and controller and policy server are away:
//! no call fails but with "try again later", no address is given twice, nothing is left, and memory does not grow.
//!
//! `WEFT_PAIRS` sets how many (500), `WEFT_SEED` which outages there are and when, by the number of containers that have
//! begun to come: what the system does at that moment is up to the machine.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails, in its helpers too")]

#[path = "pairs/census.rs"]
mod census;
#[path = "pairs/outages.rs"]
mod outages;
#[path = "pairs/visit.rs"]
mod visit;

use std::collections::BTreeSet;
use std::hash::{BuildHasher, RandomState};
use std::net::Ipv4Addr;
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};
use weft_testbed::dice::Dice;
use weft_testbed::external_networker::Container;
use weft_testbed::lab::Cell;
use weft_testbed::{Lab, Options};

use census::Census;
use outages::Progress;
use visit::{Connections, Visit, World};

/// What takes longer has failed.
const PATIENCE: Duration = Duration::from_secs(60);
/// So many pairs, and memory is to stay within 5 % of what it was after a fifth of them.
const LONG: usize = 10_000;
/// On both cells together.
const PARALLEL: usize = 20;
/// After each of which everything rests for a moment.
const ROUNDS: usize = 10;
/// The first cell's node dies once for each so many of its own containers, so that the others come to an end. The second
/// one's lives: what a process keeps shows in one that lives for long. A controller is away, and the policy server, once
/// for each so many of all.
const KILLS: usize = 20;
const OUTAGES: usize = 50;
/// The log lines that an outage accounts for: a node that has lost its controller, and one that cannot ask the policy
/// server. A node's death accounts for none, in any log.
const EXPECTED: [&str; 2] = ["controller lost", "the policy server cannot be asked"];

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap())
}

/// Two cells whose containers have all that a container can have.
fn lab() -> Lab {
    let mut options = Options::unique("pairs").unwrap();
    options.policy_server = true;
    let object = |value: Value| -> Map<String, Value> { value.as_object().cloned().unwrap() };
    options.node = object(json!({
        "disable_container_network_policy": false,
        "policy_poll_interval_seconds": 0.5,
        "asg_poll_interval_seconds": 0.5,
    }));
    options.plugin = object(json!({
        "rate": 1_000_000, "burst": 1_000_000,
        "outbound_connections": {"limit": true, "burst": 100, "rate_per_sec": 100, "max": 100},
    }));
    let lab = Lab::up(&options).unwrap();
    for cell in &lab.cells {
        census::own_tmp(cell, &options.programs);
    }
    lab
}

/// Resident memory of a cell's node, in KiB.
fn memory(cell: &Cell) -> u64 {
    cell.node.process().and_then(|node| node.memory()).unwrap().0
}

/// Containers of these numbers come and go, [`PARALLEL`] at once, as many on each cell.
fn come_and_go(world: &World, numbers: &Range<usize>, progress: &Progress) {
    let cells = world.lab.cells.len();
    let next: Vec<AtomicUsize> = (numbers.start..).take(cells).map(AtomicUsize::new).collect();
    let addresses = Mutex::new(BTreeSet::<Ipv4Addr>::new());
    thread::scope(|scope| {
        for place in 0..PARALLEL {
            let (next, addresses) = (&next[place % cells], &addresses);
            scope.spawn(move || {
                let _alarm = progress.alarm();
                while let n = next.fetch_add(cells, Ordering::Relaxed)
                    && n < numbers.end
                    && !progress.failed()
                {
                    let visit = Visit::new(world, n, place);
                    progress.begin(visit.cell);
                    let container = visit.come();
                    let addr = container.addr;
                    assert!(addresses.lock().unwrap().insert(addr), "{addr} was given twice");
                    let _connections = visit.connect(&container);
                    addresses.lock().unwrap().remove(&addr);
                    visit.go();
                }
            });
        }
    });
}

/// One tenth of the containers, with outages meanwhile. Returns how often each cell said "try again".
fn round(world: &World, numbers: &Range<usize>, dice: &mut Dice) -> Vec<usize> {
    let cells = &world.lab.cells;
    let (progress, all) = (&Progress::of(cells.len()), (0..cells.len(), numbers.len()));
    let before = world.refused();
    thread::scope(|scope| {
        let (of_first, own) = ((0..1, numbers.len() / cells.len()), Dice(dice.below(u64::MAX)));
        let kill = |dice: &mut Dice| outages::kill_node(&cells[0], dice);
        scope.spawn(move || progress.disturb(of_first, KILLS, own, kill));
        let (of_all, own) = (all.clone(), Dice(dice.below(u64::MAX)));
        let controller = |dice: &mut Dice| outages::without_controller(&world.lab.controllers[0], dice);
        scope.spawn(move || progress.disturb(of_all, OUTAGES, own, controller));
        let own = Dice(dice.below(u64::MAX));
        let policy_server = |dice: &mut Dice| outages::without_policy_server(world.server, dice);
        scope.spawn(move || progress.disturb(all, OUTAGES, own, policy_server));
        come_and_go(world, numbers, progress);
    });
    let refused: Vec<usize> = world.refused().iter().zip(before).map(|(now, before)| now - before).collect();
    println!("{} pairs; \"try again\" by cell: {refused:?}", numbers.end);
    refused
}

#[test]
fn parallel_pairs_do_not_fail_and_leave_nothing() {
    let pairs = usize::try_from(number("WEFT_PAIRS").unwrap_or(500)).unwrap();
    let seed = number("WEFT_SEED").unwrap_or_else(|| RandomState::new().hash_one(0));
    println!("WEFT_SEED={seed} WEFT_PAIRS={pairs}");
    let began = Instant::now();
    let lab = lab();
    let [_, two] = lab.cells.as_slice() else { panic!("two cells") };
    let world = World::furnish(&lab);
    let before: Vec<Census> = lab.cells.iter().map(Census::of_an_empty).collect();

    // What comes back can be seen to go: beyond the pairs that are counted.
    let visits: Vec<Visit> = (0..PARALLEL).map(|n| Visit::new(&world, pairs + n, n)).collect();
    let containers: Vec<Container> = visits.iter().map(Visit::come).collect();
    let connections: Vec<Connections> =
        visits.iter().zip(&containers).map(|(visit, container)| visit.connect(container)).collect();
    lab.cells.iter().zip(&before).for_each(|(cell, before)| before.wait_for_containers(cell));
    visits.iter().for_each(Visit::go);
    drop(connections);

    let mut dice = Dice(seed);
    let mut curve = Vec::new();
    for tenth in 0..ROUNDS {
        let numbers = pairs * tenth / ROUNDS..pairs * (tenth + 1) / ROUNDS;
        let refused = round(&world, &numbers, &mut dice);
        assert_eq!(refused[1], 0, "a node that lives refuses nothing, whoever else is away");
        curve.push(memory(two));
    }
    lab.cells.iter().zip(&before).for_each(|(cell, before)| before.wait_for_return(cell));
    println!("{:.0?}; memory of the node that lives, in KiB after each round: {curve:?}", began.elapsed());
    assert_eq!(lab.complaints(&EXPECTED), Vec::<String>::new());
    // After the second tenth all has been in use that a process needs. In a short run caches still fill: what is seen there
    // is what each container costs from 15 KiB on.
    let (early, late) = (curve[1], curve[ROUNDS - 1]);
    let growth = if pairs < LONG { 3 << 10 } else { early / 20 };
    assert!(late <= early + growth, "{late} KiB after {early} KiB");
}
