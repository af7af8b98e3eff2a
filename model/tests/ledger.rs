//! The ledger under any sequence of requests, by controllers whose replicas lag, on a database that may lose the
//! answer to a COMMIT or be restored from an earlier image.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::time::Duration;

use proptest::prelude::*;
use weft_model::address::UnderlayAddr;
use weft_model::lease::{
    Cell, Cursor, Digest, Epoch, Head, Holder, Lease, Revision, Row, ServiceTime, State,
};
use weft_model::ledger::{Answer, Decision, Ledger, Request, Rules};
use weft_model::reason::Reason;
use weft_model::subnet::{Pool, SubnetKind};

/// The database: the rows, and what a controller does in a transaction.
#[derive(Debug, Clone)]
struct Database {
    head: Head,
    rows: BTreeMap<UnderlayAddr, Row>,
}

impl Database {
    fn new(reconciling_until: u64) -> Self {
        let cursor = Cursor { epoch: Epoch(1), revision: Revision(0) };
        let head = Head {
            cursor,
            floor: Revision(0),
            service_time: ServiceTime(0),
            reconciling_until: ServiceTime(reconciling_until),
        };
        Self { head, rows: BTreeMap::new() }
    }

    fn absorb_into(&self, ledger: &mut Ledger) {
        let since = match ledger.head() {
            Some(head)
                if head.cursor.epoch == self.head.cursor.epoch && head.cursor.revision >= self.head.floor =>
            {
                head.cursor.revision
            }
            _ => {
                *ledger = Ledger::new(*ledger.rules());
                Revision(0)
            }
        };
        ledger.absorb(self.head, self.rows.values().filter(|row| row.revision > since).cloned());
    }

    /// What the constraints of a real database refuse.
    fn commit(&mut self, decision: &Decision) {
        for row in &decision.rows {
            let clash = self.rows.values().find(|other| {
                other.lease.underlay != row.lease.underlay
                    && !matches!(other.state, State::Released { .. })
                    && !matches!(row.state, State::Released { .. })
                    && other.lease.subnet.overlaps(row.lease.subnet)
            });
            assert!(clash.is_none(), "{row:?} overlaps {clash:?}");
            self.rows.insert(row.lease.underlay, row.clone());
        }
        for underlay in &decision.purge {
            self.rows.remove(underlay);
        }
        for underlay in &decision.seen {
            self.rows.get_mut(underlay).expect("seen row").seen_at = decision.head.service_time;
        }
        assert!(
            decision.head.cursor.revision.0 <= self.head.cursor.revision.0 + 1,
            "a commit is one revision"
        );
        self.head = decision.head;
    }
}

fn underlay(n: u8) -> UnderlayAddr {
    Ipv4Addr::new(10, 0, 0, n + 1).try_into().expect("address")
}

fn cell(n: u8, machine: u8, wants: SubnetKind) -> Cell {
    let holder = Holder { cell_id: format!("cell-{n}-{machine}"), boot_id: "boot".into() };
    Cell { underlay: underlay(n), holder, wants }
}

/// 10.255.0.0/26 in /29s: seven blocks, seven single addresses.
fn rules() -> Rules {
    Rules {
        pool: Pool::new("10.255.0.0/26".parse().expect("network"), 29).expect("pool"),
        expiry: Duration::from_secs(100),
        keep_tombstones: Duration::from_secs(300),
        holder_grace: Duration::from_secs(20),
    }
}

#[derive(Debug, Clone)]
enum Op {
    Batch {
        controller: usize,
        requests: Vec<Request>,
        answer_lost: bool,
    },
    /// Service time passes, and a controller ticks.
    Time {
        controller: usize,
        seconds: u64,
    },
    /// The database is put back to an earlier image, in a new epoch.
    Restore,
    Image,
}

fn request() -> impl Strategy<Value = Request> {
    let who = (
        0u8..9,
        prop_oneof![9 => Just(0u8), 1 => Just(1)],
        prop_oneof![4 => Just(SubnetKind::Block), 1 => Just(SubnetKind::Single)],
    );
    (who, 0u32..9, 0u8..4).prop_map(|((n, machine, wants), index, what)| {
        let cell = cell(n, machine, wants);
        let pool = rules().pool;
        match what {
            0 | 1 => Request::Acquire(cell),
            2 => Request::Release(cell),
            _ => {
                let subnet =
                    pool.nth(wants, index).unwrap_or_else(|| "192.168.5.0/29".parse().expect("outside"));
                Request::Claim(cell.clone(), Lease::new(cell.underlay, subnet))
            }
        }
    })
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        8 => (0usize..2, proptest::collection::vec(request(), 1..5), proptest::bool::weighted(0.1))
            .prop_map(|(controller, requests, answer_lost)| Op::Batch { controller, requests, answer_lost }),
        3 => (0usize..2, prop_oneof![Just(5u64), Just(30), Just(110), Just(400)])
            .prop_map(|(controller, seconds)| Op::Time { controller, seconds }),
        1 => Just(Op::Image),
        1 => Just(Op::Restore),
    ]
}

fn check(database: &Database, ledger: &Ledger) -> Result<(), TestCaseError> {
    let rows: Vec<&Row> = database.rows.values().collect();
    for (n, a) in rows.iter().enumerate() {
        prop_assert!(rules().pool.index_of(a.lease.subnet).is_some(), "{:?} is outside the pool", a.lease);
        for b in &rows[n + 1..] {
            let both = [a, b].iter().all(|row| !matches!(row.state, State::Released { .. }));
            prop_assert!(!both || !a.lease.subnet.overlaps(b.lease.subnet), "{:?} overlaps {:?}", a, b);
        }
    }
    prop_assert_eq!(ledger.rows().collect::<Vec<_>>().len(), rows.len());
    prop_assert_eq!(ledger.digest(), Digest::of(ledger.held()));
    Ok(())
}

proptest! {
    #[test]
    fn no_two_cells_ever_hold_overlapping_subnets(ops in proptest::collection::vec(op(), 1..60), seed: u32) {
        let mut database = Database::new(0);
        let mut ledgers = [Ledger::new(rules()), Ledger::new(rules())];
        let mut image = database.clone();
        let mut chance = seed;
        let mut pick = |n: u32| { chance = chance.wrapping_mul(1_664_525).wrapping_add(1_013_904_223); (chance >> 8) % n };
        for op in ops {
            let (controller, seconds, requests, answer_lost) = match op {
                Op::Batch { controller, requests, answer_lost } => (controller, 0, requests, answer_lost),
                Op::Time { controller, seconds } => (controller, seconds, vec![Request::Tick], false),
                Op::Image => { image = database.clone(); continue; }
                Op::Restore => {
                    let epoch = Epoch(database.head.cursor.epoch.0 + 1);
                    database = image.clone();
                    database.head.cursor.epoch = epoch;
                    image.head.cursor.epoch = epoch;
                    continue;
                }
            };
            let ledger = &mut ledgers[controller];
            database.absorb_into(ledger);
            let before = ledger.clone();
            let head = Head { service_time: ServiceTime(database.head.service_time.0 + seconds), ..database.head };
            let decision = ledger.step(&head, &requests, &mut pick);
            prop_assert_eq!(decision.answers.len(), requests.len());
            for (request, answer) in requests.iter().zip(&decision.answers) {
                if let (Request::Acquire(cell), Ok(Answer::Lease(lease))) = (request, answer) {
                    prop_assert_eq!(lease.underlay, cell.underlay);
                    prop_assert_eq!(lease.subnet.kind(), cell.wants);
                    // Sticky: who holds a lease of the kind gets that one.
                    if let Some(row) = before.row(cell.underlay)
                        && row.state == State::Held && row.lease.subnet.kind() == cell.wants && requests.len() == 1
                    {
                        prop_assert_eq!(row.lease, *lease);
                    }
                }
                let exhausted = matches!(answer, Err(Reason::PoolExhausted { .. }));
                prop_assert!(!exhausted || requests.len() > 1 || {
                    let Request::Acquire(cell) = request else { panic!("only an acquire exhausts") };
                    before.free(cell.wants) == 0 && before.rows().all(|row| !matches!(row.state, State::Expired { .. }) || row.lease.subnet.kind() != cell.wants)
                }, "exhausted with a subnet free");
            }
            database.commit(&decision);
            if !answer_lost {
                database.absorb_into(&mut ledgers[controller]);
                check(&database, &ledgers[controller])?;
            }
        }
    }

    /// What changed since a revision, applied to the table of that revision, gives the table of now.
    #[test]
    fn changes_since_a_revision_are_complete(ops in proptest::collection::vec((request(), 0u64..120), 1..50), from in 0usize..50) {
        let mut database = Database::new(0);
        let mut ledger = Ledger::new(rules());
        let mut past = None;
        for (n, (request, seconds)) in ops.iter().enumerate() {
            database.absorb_into(&mut ledger);
            if n == from { past = Some(ledger.clone()); }
            let head = Head { service_time: ServiceTime(database.head.service_time.0 + seconds), ..database.head };
            let decision = ledger.step(&head, &[Request::Tick, request.clone()], &mut |_| 0);
            database.commit(&decision);
        }
        database.absorb_into(&mut ledger);
        let Some(past) = past else { return Ok(()) };
        let since = past.head().expect("absorbed").cursor.revision;
        if since < ledger.head().expect("absorbed").floor {
            return Ok(());
        }
        let mut held: BTreeMap<UnderlayAddr, Lease> = past.held().map(|lease| (lease.underlay, *lease)).collect();
        for row in ledger.since(since) {
            match row.state {
                State::Held => held.insert(row.lease.underlay, row.lease),
                _ => held.remove(&row.lease.underlay),
            };
        }
        prop_assert_eq!(held.values().copied().collect::<Vec<_>>(), ledger.held().copied().collect::<Vec<_>>());
        prop_assert_eq!(Digest::of(held.values()), ledger.digest());
    }
}

/// Decides one request and commits it.
fn ask(database: &mut Database, ledger: &mut Ledger, request: Request) -> Result<Answer, Reason> {
    database.absorb_into(ledger);
    let mut decision = ledger.step(&database.head, &[request], &mut |n| n - 1);
    database.commit(&decision);
    database.absorb_into(ledger);
    decision.answers.remove(0)
}

fn lease_of(answer: Result<Answer, Reason>) -> Lease {
    match answer {
        Ok(Answer::Lease(lease)) => lease,
        other => panic!("no lease: {other:?}"),
    }
}

#[test]
fn never_used_then_longest_released_then_oldest_expired_then_exhausted() {
    let (mut database, mut ledger) = (Database::new(0), Ledger::new(rules()));
    let block = |n| cell(n, 0, SubnetKind::Block);
    let mut leases = Vec::new();
    for n in 0..7 {
        database.head.service_time = ServiceTime(u64::from(n));
        leases.push(lease_of(ask(&mut database, &mut ledger, Request::Acquire(block(n)))));
    }
    let exhausted = ask(&mut database, &mut ledger, Request::Acquire(block(7)));
    assert_eq!(exhausted, Err(Reason::PoolExhausted { network: "10.255.0.0/26".into() }));

    for (at, n) in [(10, 3), (11, 1)] {
        database.head.service_time = ServiceTime(at);
        ask(&mut database, &mut ledger, Request::Release(block(n))).expect("release");
    }
    assert_eq!(
        lease_of(ask(&mut database, &mut ledger, Request::Acquire(block(7)))).subnet,
        leases[3].subnet
    );
    // The cell that comes back gets its own again, though it is released.
    assert_eq!(lease_of(ask(&mut database, &mut ledger, Request::Acquire(block(1)))), leases[1]);

    database.head.service_time = ServiceTime(102);
    ask(&mut database, &mut ledger, Request::Tick).expect("tick");
    let taken = lease_of(ask(&mut database, &mut ledger, Request::Acquire(block(8))));
    assert_eq!(taken.subnet, leases[0].subnet, "cells 0 to 2 have expired, cell 0 longest");
    let conflict = ask(&mut database, &mut ledger, Request::Claim(block(0), leases[0]));
    assert!(matches!(conflict, Err(Reason::LeaseConflict { .. })), "{conflict:?}");
    ask(&mut database, &mut ledger, Request::Claim(block(2), leases[2]))
        .expect("an expired lease comes back");
}

#[test]
fn a_claim_of_an_absent_lease_is_inserted_if_valid() {
    let (mut database, mut ledger) = (Database::new(1_000), Ledger::new(rules()));
    let block = |n| cell(n, 0, SubnetKind::Block);
    let lease = |n, subnet: &str| Lease::new(underlay(n), subnet.parse().expect("subnet"));
    ask(&mut database, &mut ledger, Request::Claim(block(0), lease(0, "10.255.0.16/29"))).expect("claim");
    let overlapping = ask(&mut database, &mut ledger, Request::Claim(block(1), lease(1, "10.255.0.16/29")));
    assert!(matches!(overlapping, Err(Reason::LeaseConflict { .. })), "{overlapping:?}");
    for outside in ["10.255.0.0/29", "10.255.0.16/30", "192.168.5.0/29"] {
        let refused = ask(&mut database, &mut ledger, Request::Claim(block(1), lease(1, outside)));
        assert!(matches!(refused, Err(Reason::InvalidField { .. })), "{outside}: {refused:?}");
    }
    // While the table is put together again only those that are known get a lease.
    assert_eq!(ask(&mut database, &mut ledger, Request::Acquire(block(1))), Err(Reason::Reconciling));
    assert_eq!(
        lease_of(ask(&mut database, &mut ledger, Request::Acquire(block(0)))),
        lease(0, "10.255.0.16/29")
    );
}

#[test]
fn another_machine_at_the_address_is_refused_while_the_known_one_lives() {
    let (mut database, mut ledger) = (Database::new(0), Ledger::new(rules()));
    let lease = lease_of(ask(&mut database, &mut ledger, Request::Acquire(cell(0, 0, SubnetKind::Block))));
    let refused = ask(&mut database, &mut ledger, Request::Acquire(cell(0, 1, SubnetKind::Block)));
    assert!(matches!(refused, Err(Reason::LeaseConflict { .. })), "{refused:?}");
    database.head.service_time = ServiceTime(21);
    let taken = lease_of(ask(&mut database, &mut ledger, Request::Acquire(cell(0, 1, SubnetKind::Block))));
    assert_eq!(taken, lease, "the address keeps its subnet");
}

#[test]
fn a_cell_that_comes_back_as_its_tombstone_ends_has_what_it_was_given() {
    let (mut database, mut ledger) = (Database::new(0), Ledger::new(rules()));
    let block = || cell(0, 0, SubnetKind::Block);
    ask(&mut database, &mut ledger, Request::Acquire(block())).expect("acquire");
    ask(&mut database, &mut ledger, Request::Release(block())).expect("release");
    let head = Head { service_time: ServiceTime(1_000), ..database.head };
    let decision = ledger.step(&head, &[Request::Tick, Request::Acquire(block())], &mut |_| 0);
    let given = lease_of(decision.answers[1].clone());
    database.commit(&decision);
    assert_eq!(database.rows.get(&underlay(0)).map(|row| (row.lease, row.state)), Some((given, State::Held)));
}

#[test]
fn twenty_acquires_at_once_for_one_cell_are_one_lease() {
    let ledger = {
        let mut ledger = Ledger::new(rules());
        Database::new(0).absorb_into(&mut ledger);
        ledger
    };
    let batch = vec![Request::Acquire(cell(0, 0, SubnetKind::Block)); 20];
    let decision = ledger.step(ledger.head().expect("absorbed"), &batch, &mut |n| n / 2);
    assert_eq!(decision.rows.len(), 1);
    assert!(decision.answers.iter().all(|answer| *answer == decision.answers[0] && answer.is_ok()));
}
