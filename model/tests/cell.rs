//! The theorems of the cell, on a model of the kernel: docs/architecture.md, "Tests by layer".

use std::collections::BTreeSet;

use proptest::prelude::*;
use weft_model::cell::unit::plan;
use weft_model::cell::{Belief, Cell, Drift, Key, Presence, Record, Roster, Scope, Seen, UnderlayDevice};
use weft_model::container::Handle;
use weft_model::firewall::{Map, Part};
use weft_model::walk::{self, KernelModel, Move};

const DEVICE: u32 = 7;

struct Walker {
    cell: Cell,
    kernel: KernelModel,
    newborn: BTreeSet<Handle>,
    journal: Vec<Record>,
}

impl Walker {
    fn new() -> Self {
        let (cell, kernel) = (walk::start(DEVICE), KernelModel::default());
        Self { cell, kernel, newborn: BTreeSet::new(), journal: Vec::new() }
    }

    fn go(&mut self, mv: &Move) {
        match mv {
            Move::Wave { fails } => self.wave(*fails),
            Move::Audit => self.audit(),
            Move::Accident(accident) => {
                if let Some(Key::Link(addr)) = self.kernel.accident(&self.cell, accident) {
                    self.cell.link_gone(addr);
                }
            }
            edit => {
                let added = walk::edit(&mut self.cell, DEVICE, edit);
                self.newborn.extend(added);
            }
        }
        self.journal.extend(self.cell.take_records());
    }

    fn wave(&mut self, fails: Option<u8>) {
        let step = self.cell.diff();
        let outcome = self.kernel.apply(&step, &self.newborn, fails);
        for fault in self.cell.settle(&step, &outcome) {
            // As the node does: a container whose link could not be made is taken back.
            if let Key::Link(addr) = fault.key
                && let Some((container, Presence::Present)) = self.cell.roster().with_addr(addr)
                && self.newborn.contains(&container.handle)
            {
                self.cell.drop(&container.handle.clone());
            }
        }
        self.newborn.clear();
    }

    fn audit(&mut self) {
        let drift = audit(&mut self.cell, &self.kernel.holds);
        assert!(!drift.contains(&Drift::Bug), "wanted has drifted from the plan");
    }

    fn settle_down(&mut self) {
        self.audit();
        for _ in 0..3 {
            self.wave(None);
        }
        self.journal.extend(self.cell.take_records());
    }
}

fn audit(cell: &mut Cell, holds: &Seen) -> Vec<Drift> {
    let seen = |scope: Scope| holds.clone().into_iter().filter(move |(key, _)| scope.has(key)).collect();
    Scope::ALL.into_iter().flat_map(|scope| cell.audit(scope, seen(scope))).collect()
}

fn check(walker: &Walker) -> Result<(), TestCaseError> {
    let cell = &walker.cell;
    prop_assert_eq!(
        cell.wanted(),
        &plan(cell.inputs()),
        "the incremental plan is the plan from the whole inputs"
    );
    for key in walker.kernel.holds.keys() {
        prop_assert!(cell.believed().contains_key(key), "{} is there but not believed", key);
    }
    let mut addrs = BTreeSet::new();
    for (container, _) in cell.roster().iter() {
        prop_assert!(addrs.insert(container.addr), "{} is held twice", container.addr);
        prop_assert!(
            !cell.roster().resting().contains(&container.addr),
            "{} rests and is held",
            container.addr
        );
    }
    Ok(())
}

proptest! {
    #[test]
    fn a_walk_keeps_plan_belief_and_addresses_right(moves in walk::walk(40)) {
        let mut walker = Walker::new();
        for mv in &moves {
            walker.go(mv);
            check(&walker)?;
        }
    }

    /// From any belief that accidents, failures and audits leave, what is wanted is reached; then nothing is to do.
    #[test]
    fn a_quiet_kernel_reaches_what_is_wanted_whatever_the_path(moves in walk::walk(40)) {
        let mut walker = Walker::new();
        for mv in &moves {
            walker.go(mv);
        }
        walker.settle_down();
        let wanted = plan(walker.cell.inputs());
        let holds = walker.kernel.holds.iter().map(|(key, belief)| (key, belief.clone()));
        let expected = wanted.iter().map(|(key, object)| (key, Belief::Holds(object.clone())));
        prop_assert_eq!(holds.collect::<Vec<_>>(), expected.collect::<Vec<_>>());
        prop_assert!(walker.cell.diff().is_empty(), "a second diff is empty");
        prop_assert!(!walker.cell.roster().iter().any(|(_, p)| p == Presence::Leaving), "who left is gone");
    }

    /// Where nothing fails and nobody interferes, each wave reaches what is wanted, and belief is the truth.
    #[test]
    fn an_undisturbed_wave_is_enough(moves in walk::walk(40)) {
        let mut walker = Walker::new();
        for mv in moves.iter().filter(|mv| !matches!(mv, Move::Accident(_) | Move::Wave { .. } | Move::Audit)) {
            walker.go(mv);
            walker.wave(None);
            // A profile goes when the link of the last container that had it has gone.
            walker.wave(None);
            prop_assert_eq!(&walker.kernel.holds, walker.cell.believed());
            let wanted = plan(walker.cell.inputs()).into_iter().map(|(key, object)| (key, Belief::Holds(object)));
            prop_assert_eq!(&walker.kernel.holds, &wanted.collect());
        }
    }

    /// The journal, as written and as compacted, gives the roster that lived, the next free address included.
    #[test]
    fn the_journal_replays_to_the_same_roster(moves in walk::walk(60)) {
        let mut walker = Walker::new();
        let lease = walker.cell.inputs().lease.map(|lease| lease.subnet);
        for mv in moves.iter().filter(|mv| !matches!(mv, Move::Lease(_) | Move::Accident(_))) {
            walker.go(mv);
        }
        let replayed = |records: &[Record]| {
            let mut roster = Roster::default();
            roster.lease(lease);
            records.iter().for_each(|record| drop(roster.apply(record)));
            roster
        };
        prop_assert_eq!(&replayed(&walker.journal), walker.cell.roster());
        let compacted: Vec<_> = walker.cell.roster().records().collect();
        prop_assert_eq!(&replayed(&compacted), walker.cell.roster());
        let mut late = Roster::default();
        compacted.iter().for_each(|record| drop(late.apply(record)));
        late.lease(lease);
        prop_assert_eq!(&late, walker.cell.roster());
    }
}

#[test]
fn a_cell_without_a_lease_touches_nothing_on_the_overlay() {
    let mut walker = Walker::new();
    walker.go(&Move::Peers([(1, 4), (2, 5)].into()));
    walker.go(&Move::Add(1, 2));
    walker.wave(None);
    let running = walker.kernel.holds.clone();
    let peers = [(walk::subnet(4), walk::underlay(2)), (walk::subnet(5), walk::underlay(3))];
    for (subnet, underlay) in peers {
        assert!(running.contains_key(&Key::Peer(subnet)));
        let leased = Part::Element(Map::Leased, underlay.get().octets().into());
        assert!(running.contains_key(&Key::Firewall(leased)));
    }

    // The node starts again, its snapshot is lost, and the controller is away.
    let mut restarted = Cell::new(walker.cell.inputs().config.clone());
    restarted.replay(walker.journal.clone());
    restarted.ways(walker.cell.inputs().ways.clone());
    audit(&mut restarted, &running);
    assert!(restarted.diff().is_empty(), "nothing is known, so nothing is taken away");
    // Even if the firewall has to be made anew.
    let mut damaged = running.clone();
    damaged.insert(Key::Firewall(Part::Chain("forward".parse().expect("name"))), Belief::Unknown);
    audit(&mut restarted, &damaged);
    let step = restarted.diff();
    assert!(step.firewall.anew);
    let outcome = walker.kernel.apply(&step, &BTreeSet::new(), None);
    assert_eq!(restarted.settle(&step, &outcome), []);
    assert_eq!(walker.kernel.holds, running);

    // The lease is back: the same as before, so there is still nothing to do.
    restarted.underlay(walker.cell.inputs().device);
    let peers = walker.cell.inputs().peers.values().map(|lease| (lease.underlay, *lease)).collect();
    restarted.leases(walker.cell.inputs().lease, &peers);
    assert!(restarted.diff().is_empty());
}

#[test]
fn a_lost_journal_is_read_back_from_the_links() {
    let mut walker = Walker::new();
    walker.go(&Move::Add(1, 2));
    walker.wave(None);
    let mut restarted = walk::start(DEVICE);
    let drift = audit(&mut restarted, &walker.kernel.holds);
    assert!(drift.contains(&Drift::Adopted(walk::handle(1))), "{drift:?}");
    let step = restarted.diff();
    assert_eq!((step.lay, step.remove), (Vec::new(), Vec::new()), "its link stays as it is");
    let (handle, before) = (walk::handle(1), walker.cell.roster());
    let (adopted, presence) = restarted.roster().get(&handle).expect("adopted");
    let (lived, _) = before.get(&handle).expect("lived");
    assert_eq!((presence, adopted.addr, adopted.mtu), (Presence::Present, lived.addr, lived.mtu));
    assert_eq!(adopted.profile, None, "what it may do was in the journal only");
}

#[test]
fn peers_are_laid_anew_when_the_vtep_moves_to_another_device() {
    let mut walker = Walker::new();
    walker.go(&Move::Peers([(1, 4), (2, 5)].into()));
    walker.wave(None);
    walker.cell.underlay(Some(UnderlayDevice { index: DEVICE + 1, mtu: 1500 }));
    walker.wave(None);
    let wanted = plan(walker.cell.inputs()).into_iter().map(|(key, object)| (key, Belief::Holds(object)));
    assert_eq!(walker.kernel.holds, wanted.collect());
}
