//! The keeper, event by event.

use std::net::Ipv4Addr;
use std::time::Duration;

use weft_model::address::UnderlayAddr;
use weft_model::keeper::{Act, Event, Keeper, LeaseState, Snapshot};
use weft_model::lease::{Cell, Changes, Cursor, Digest, Epoch, Holder, Lease, Peers, Revision};
use weft_model::reason::Reason;
use weft_model::subnet::SubnetKind;

fn lease(n: u8) -> Lease {
    let underlay: UnderlayAddr = Ipv4Addr::new(10, 0, 0, n).try_into().expect("address");
    Lease::new(underlay, format!("10.255.{n}.0/24").parse().expect("subnet"))
}

fn cell() -> Cell {
    let holder = Holder { cell_id: "cell".into(), boot_id: "boot".into() };
    Cell { underlay: lease(1).underlay, holder, wants: SubnetKind::Block }
}

fn cursor(revision: u64) -> Cursor {
    Cursor { epoch: Epoch(7), revision: Revision(revision) }
}

fn peers(of: impl IntoIterator<Item = u8>) -> Peers {
    of.into_iter().map(|n| (lease(n).underlay, lease(n))).collect()
}

/// The whole table: our own lease and those of `others`.
fn table(revision: u64, others: impl IntoIterator<Item = u8>) -> Changes {
    let leases: Vec<Lease> = std::iter::once(1).chain(others).map(lease).collect();
    Changes {
        at: cursor(revision),
        digest: Digest::of(&leases),
        from_empty: true,
        more: false,
        reconciling: false,
        leases: leases.into_iter().map(|lease| (lease.underlay, Some(lease))).collect(),
    }
}

struct Driven {
    keeper: Keeper,
    now: Duration,
}

impl Driven {
    fn start(snapshot: Option<Snapshot>) -> Self {
        Self { keeper: Keeper::start(cell(), snapshot), now: Duration::ZERO }
    }

    fn on(&mut self, event: Event) -> Vec<Act> {
        self.keeper.on(event, self.now, &mut |n| n - 1)
    }

    /// Waits for the deadline and acts.
    fn due(&mut self) -> Vec<Act> {
        self.now = self.keeper.next_deadline().expect("a deadline");
        self.on(Event::Due)
    }

    /// A keeper that follows, with the table of cells 1 to 6.
    fn following() -> Self {
        let mut driven = Self::start(None);
        driven.due();
        driven.on(Event::Granted(lease(1)));
        driven.on(Event::Opened);
        driven.on(Event::Changes(table(10, 2..=6)));
        assert_eq!(driven.keeper.view().peers, 5);
        driven
    }
}

fn away() -> Reason {
    Reason::ControllerAway { why: "test".into() }
}

fn saved(acts: &[Act]) -> Snapshot {
    let saved = acts.iter().find_map(|act| match act {
        Act::Save(snapshot) => Some(snapshot.clone()),
        _ => None,
    });
    saved.unwrap_or_else(|| panic!("nothing is saved: {acts:?}"))
}

#[test]
fn from_nothing_it_acquires_and_then_follows() {
    let mut driven = Driven::start(None);
    assert_eq!(driven.keeper.known(), None);
    assert_eq!(driven.due(), [Act::Acquire]);
    assert_eq!(driven.keeper.next_deadline(), None, "the driver bounds the attempt");
    let acts = driven.on(Event::Granted(lease(1)));
    assert_eq!(acts[0], Act::Publish { own: lease(1), peers: Peers::new() });
    assert_eq!(acts[2], Act::Watch { held: lease(1), since: None });
    driven.on(Event::Opened);
    let acts = driven.on(Event::Changes(table(10, [2, 3])));
    assert_eq!(acts[0], Act::Publish { own: lease(1), peers: peers([2, 3]) });
    assert_eq!(saved(&acts).cursor, Some(cursor(10)));
    assert_eq!(driven.keeper.view().state, LeaseState::Held);
}

#[test]
fn from_a_snapshot_it_works_at_once_and_resumes() {
    let snapshot = Snapshot { lease: lease(1), peers: peers([2, 3]), cursor: Some(cursor(10)), fenced: None };
    let text = serde_json::to_string(&snapshot).expect("serialise");
    let mut driven = Driven::start(serde_json::from_str(&text).expect("deserialise"));
    assert_eq!(driven.keeper.known(), Some(Act::Publish { own: lease(1), peers: peers([2, 3]) }));
    assert_eq!(driven.due(), [Act::Watch { held: lease(1), since: Some(cursor(10)) }]);
    driven.on(Event::Opened);
    // Only what changed since.
    let change = Changes { from_empty: false, leases: vec![(lease(3).underlay, None)], ..table(11, [2]) };
    let acts = driven.on(Event::Changes(change));
    assert_eq!(acts[0], Act::Publish { own: lease(1), peers: peers([2]) });
    // The snapshot of another cell is none.
    let other = Cell { underlay: lease(9).underlay, ..cell() };
    assert_eq!(Keeper::start(other, Some(snapshot)).known(), None);
}

#[test]
fn waits_grow_to_a_bound_and_nothing_is_given_up() {
    let mut driven = Driven::following();
    driven.on(Event::Closed(away()));
    let mut last = Duration::ZERO;
    for _ in 0..12 {
        let wait = driven.keeper.next_deadline().expect("a deadline") - driven.now;
        assert!(wait >= last && wait <= Duration::from_secs(15), "{wait:?} after {last:?}");
        last = wait;
        assert_eq!(driven.due(), [Act::Watch { held: lease(1), since: Some(cursor(10)) }]);
        assert_eq!(driven.on(Event::Closed(away())), []);
    }
    assert_eq!(last, Duration::from_secs(15));
    assert_eq!(driven.keeper.view().peers, 5);
}

#[test]
fn a_conflict_fences_until_the_claim_is_accepted_and_over_a_restart() {
    let mut driven = Driven::following();
    let conflict = Reason::LeaseConflict { holder: "another".into() };
    let acts = driven.on(Event::Closed(conflict.clone()));
    assert_eq!(acts[0], Act::Fence(conflict.clone()));
    let restarted = Keeper::start(cell(), Some(saved(&acts)));
    assert_eq!((restarted.view().state, restarted.fenced()), (LeaseState::Fenced, Some(&conflict)));
    driven.due();
    assert_eq!(driven.on(Event::Closed(conflict)), [], "said once");
    driven.due();
    let acts = driven.on(Event::Opened);
    assert_eq!(acts[0], Act::Unfence);
    assert_eq!(saved(&acts).fenced, None);
}

#[test]
fn a_table_that_does_not_come_out_right_is_asked_for_again_from_empty() {
    let mut driven = Driven::following();
    let wrong = Changes { from_empty: false, leases: vec![(lease(2).underlay, None)], ..table(11, 2..=6) };
    let acts = driven.on(Event::Changes(wrong));
    assert!(matches!(acts.as_slice(), [Act::Mistrust(_), Act::HangUp]), "{acts:?}");
    assert_eq!(driven.keeper.view().peers, 5, "nothing of it is believed");
    assert_eq!(driven.due(), [Act::Watch { held: lease(1), since: None }]);
}

#[test]
fn a_controller_that_is_behind_is_not_believed() {
    let mut driven = Driven::following();
    assert_eq!(driven.on(Event::Changes(table(9, []))), [Act::HangUp]);
    assert_eq!(driven.keeper.view().peers, 5);
    assert_eq!(driven.due(), [Act::Watch { held: lease(1), since: Some(cursor(10)) }]);
}

#[test]
fn nothing_is_taken_away_before_an_answer_is_complete() {
    let mut driven = Driven::following();
    let whole = table(12, [2, 3, 4, 7]);
    let part = |from: usize, to: usize, more| {
        Event::Changes(Changes { more, leases: whole.leases[from..to].to_vec(), ..whole.clone() })
    };
    assert_eq!(driven.on(part(0, 2, true)), []);
    assert_eq!(driven.keeper.view().peers, 5);
    let acts = driven.on(part(2, 5, false));
    assert_eq!(acts[0], Act::Publish { own: lease(1), peers: peers([2, 3, 4, 7]) });
}

#[test]
fn the_loss_of_most_peers_at_once_is_believed_when_it_is_said_twice() {
    let mut driven = Driven::following();
    assert_eq!(driven.on(Event::Changes(table(11, [2]))), [Act::HangUp]);
    assert_eq!(driven.keeper.view().peers, 5);
    assert_eq!(driven.due(), [Act::Watch { held: lease(1), since: None }]);
    driven.on(Event::Opened);
    let acts = driven.on(Event::Changes(table(11, [2])));
    assert_eq!(acts[0], Act::Publish { own: lease(1), peers: peers([2]) });
}

#[test]
fn while_the_controllers_reconcile_nothing_is_taken_away() {
    let mut driven = Driven::following();
    let restored = |reconciling, others: &[u8]| {
        let at = Cursor { epoch: Epoch(8), revision: Revision(1) };
        Event::Changes(Changes { at, reconciling, ..table(1, others.iter().copied()) })
    };
    let acts = driven.on(restored(true, &[2, 8]));
    assert_eq!(acts[0], Act::Publish { own: lease(1), peers: peers([2, 3, 4, 5, 6, 8]) });
    // Afterwards what nobody claimed goes.
    let acts = driven.on(restored(false, &[2, 4, 5, 6, 8]));
    assert_eq!(acts[0], Act::Publish { own: lease(1), peers: peers([2, 4, 5, 6, 8]) });
}

#[test]
fn a_lease_of_ours_that_is_gone_is_claimed_again_with_a_pause() {
    let mut driven = Driven::following();
    let gone = Changes {
        from_empty: false,
        digest: Digest::of(peers(2..=6).values()),
        leases: vec![(lease(1).underlay, None)],
        ..table(11, [])
    };
    assert!(driven.on(Event::Changes(gone)).contains(&Act::HangUp));
    assert!(driven.keeper.next_deadline().is_some_and(|at| at > driven.now));
    assert!(matches!(driven.due().as_slice(), [Act::Watch { held, .. }] if *held == lease(1)));
}

#[test]
fn answers_to_what_was_given_up_are_not_heard() {
    let mut driven = Driven::following();
    driven.on(Event::Closed(away()));
    for late in
        [Event::Opened, Event::Granted(lease(9)), Event::Changes(table(20, [])), Event::Closed(away())]
    {
        assert_eq!(driven.on(late), []);
    }
    assert_eq!(driven.keeper.view().peers, 5);
}

#[test]
fn a_subnet_that_moves_to_another_cell_leaves_the_first() {
    let mut driven = Driven::following();
    let moved = Lease::new(lease(7).underlay, lease(2).subnet);
    let now: Vec<Lease> = [1, 3, 4, 5, 6].map(lease).into_iter().chain([moved]).collect();
    let change = Changes {
        from_empty: false,
        digest: Digest::of(&now),
        leases: vec![(lease(2).underlay, None), (moved.underlay, Some(moved))],
        ..table(11, [])
    };
    driven.on(Event::Changes(change));
    let Some(Act::Publish { peers, .. }) = driven.keeper.known() else { panic!("known") };
    assert_eq!(peers.get(&moved.underlay), Some(&moved));
    assert!(!peers.contains_key(&lease(2).underlay));
}
