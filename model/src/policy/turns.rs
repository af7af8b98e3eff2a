//! Whose turn it is to have a tag.
//!
//! A freed tag is another app's in the server's next answer. A packet that is on its way through the program when that
//! becomes the kernel's may have a mark of one answer and be compared with what the other says. Known by its tag alone, its
//! sender would be taken for the app that has the tag in the other. So packets carry besides whether the tag has changed
//! hands an even or an odd number of times. Only on their own cell: a frame has no room for it.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{AppGuid, Inbound, Policies, PolicyTag};

/// Of those who have a tag one after the other, every second is at the same turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Turn {
    #[default]
    First,
    Second,
}

impl Turn {
    /// The bits of a packet's mark that carry it: none that VXLAN's group-based policy puts into frames. The lower one says
    /// that the packet is from this cell, the upper one that it is the second turn.
    pub const BITS: u32 = 3 << 26;
    /// With these turned over, the marks of the two turns are on either side of that of other cells' packets, which have
    /// none of the bits: so a range holds those and either turn, and never both.
    pub const TURNED: u32 = 1 << 26;

    /// Its part of the mark of a packet of this cell.
    pub const fn mark(self) -> u32 {
        match self {
            Self::First => 1 << 26,
            Self::Second => Self::BITS,
        }
    }

    /// The ends of the range of marks, turned over, that come at this turn, from this cell and others.
    pub const fn ends(self) -> [u32; 2] {
        let elsewhere = Self::TURNED;
        match self {
            Self::First => [self.mark() ^ Self::TURNED, elsewhere],
            Self::Second => [elsewhere, self.mark() ^ Self::TURNED],
        }
    }

    const fn next(self) -> Self {
        match self {
            Self::First => Self::Second,
            Self::Second => Self::First,
        }
    }
}

/// Who has each tag, or had it last.
#[derive(Debug, Clone, Default)]
pub struct Turns(BTreeMap<PolicyTag, (AppGuid, Turn)>);

impl Turns {
    /// As they were in a noted answer.
    pub fn of(noted: &Policies) -> Self {
        let own =
            noted.iter().filter_map(|(app, policies)| Some((policies.tag?, (app.clone(), policies.turn))));
        let inbound = noted.values().flat_map(|policies| &policies.inbound);
        Self(own.chain(inbound.map(|one| (one.tag, (one.from.clone(), one.turn)))).collect())
    }

    /// Notes in an answer which turn it is of each tag. An answer gives a tag to one app.
    pub fn note(&mut self, policies: &mut Policies) {
        for (app, policies) in policies.iter_mut() {
            let own = policies.tag.map(|tag| self.turn(tag, app)).unwrap_or_default();
            // Most of them it is the first: what says so already is shared as it is.
            let mut differs = |one: &Inbound| one.turn != self.turn(one.tag, &one.from);
            if own != policies.turn || policies.inbound.iter().any(&mut differs) {
                let policies = Arc::make_mut(policies);
                policies.turn = own;
                policies.inbound.iter_mut().for_each(|one| one.turn = self.turn(one.tag, &one.from));
            }
        }
    }

    fn turn(&mut self, tag: PolicyTag, app: &AppGuid) -> Turn {
        let (had, turn) = self.0.entry(tag).or_insert_with(|| (app.clone(), Turn::default()));
        if had != app {
            (*had, *turn) = (app.clone(), turn.next());
        }
        *turn
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Policy, by_app};
    use super::*;
    use crate::asg::PortRange;
    use crate::profile::Transport;

    fn answer(given: &[(&str, u16)]) -> Policies {
        let guid = |name: &str| name.parse::<AppGuid>().expect("guid");
        by_app(given.iter().map(|(app, tag)| Policy {
            source: guid(app),
            source_tag: PolicyTag::new((*tag).try_into().expect("tag")),
            destination: guid("to"),
            transport: Transport::Tcp,
            ports: PortRange::new(80, 80).expect("range"),
        }))
    }

    /// Of an app's own tag; where policies name it they have to agree.
    fn turn(policies: &Policies, app: &str) -> Turn {
        let app = app.parse::<AppGuid>().expect("guid");
        let own = policies[&app].turn;
        let to = policies.values().flat_map(|to| &to.inbound).filter(|inbound| inbound.from == app);
        assert!(to.into_iter().all(|inbound| inbound.turn == own), "{policies:?}");
        own
    }

    #[test]
    fn a_tag_is_at_its_next_turn_when_it_is_another_apps() {
        let mut turns = Turns::default();
        let note = |turns: &mut Turns, given: &[(&str, u16)]| {
            let mut policies = answer(given);
            turns.note(&mut policies);
            policies
        };
        let said = note(&mut turns, &[("a", 1), ("b", 2)]);
        assert_eq!((turn(&said, "a"), turn(&said, "b")), (Turn::First, Turn::First));
        let said = note(&mut turns, &[("b", 1), ("c", 2)]);
        assert_eq!((turn(&said, "b"), turn(&said, "c")), (Turn::Second, Turn::Second));
        let mut turns = Turns::of(&said);
        assert_eq!(turn(&note(&mut turns, &[("b", 1)]), "b"), Turn::Second, "again, after a restart");
        assert!(note(&mut turns, &[]).is_empty());
        assert_eq!(turn(&note(&mut turns, &[("b", 1)]), "b"), Turn::Second, "the same hands, after a while");
        assert_eq!(turn(&note(&mut turns, &[("a", 1), ("c", 2)]), "a"), Turn::First);
        assert_eq!(turn(&note(&mut turns, &[("a", 1), ("c", 2)]), "c"), Turn::Second);
    }

    #[test]
    fn no_range_holds_both_turns_and_each_holds_other_cells_packets() {
        for turn in [Turn::First, Turn::Second] {
            let [low, high] = turn.ends();
            let held = |mark: u32| (low..=high).contains(&(mark ^ Turn::TURNED));
            assert_eq!(
                [held(0), held(turn.mark()), held(turn.next().mark())],
                [true, true, false],
                "{turn:?}"
            );
        }
    }

    #[test]
    fn what_is_at_its_first_turn_is_not_copied() {
        let mut policies = answer(&[("a", 1)]);
        let before: Vec<_> = policies.values().map(Arc::as_ptr).collect();
        let shared = policies.clone();
        Turns::default().note(&mut policies);
        assert_eq!(policies.values().map(Arc::as_ptr).collect::<Vec<_>>(), before);
        drop(shared);
    }
}
