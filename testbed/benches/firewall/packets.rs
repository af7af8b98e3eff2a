//! What a packet meets: the same traffic through the program, through a table that holds the established shortcut only,
//! and through none.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use serde::Serialize;
use weft_model::profile::Known;
use weft_testbed::interrupt;

use super::bed::matching;
use super::traffic::{Speeds, TCP, Traffic, UDP};
use crate::common::bed::{Bed, Ports, Space, WORLD, list, profile};
use crate::common::figure::Figure;
use crate::common::machine::progress;

/// Other containers, where there are any, and rules of each of their lists.
const OTHERS: usize = 250;
const OTHER_LISTS: u32 = 50;
const OTHER_RULES: usize = 100;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Firewall {
    None,
    /// `ct state established,related accept`, and nothing else; or masquerade besides.
    Shortcut {
        masquerade: bool,
    },
    /// A list of so many rules, the last ones of which match.
    Program {
        rules: usize,
        others: usize,
        /// Or the destination is one that sees the container's own address, as on the overlay.
        masquerade: bool,
    },
}

const NONE: &str = "no firewall";
const SHORTCUT: &str = "established shortcut alone";
const MASQUERADE: &str = "shortcut and masquerade";
const TEN: &str = "10 rules";
const ONE: &str = "1 rule";
const CASES: [(&str, Firewall); 10] = [
    (NONE, Firewall::None),
    (SHORTCUT, Firewall::Shortcut { masquerade: false }),
    (MASQUERADE, Firewall::Shortcut { masquerade: true }),
    (ONE, Firewall::Program { rules: 1, others: 0, masquerade: true }),
    (TEN, Firewall::Program { rules: 10, others: 0, masquerade: true }),
    ("1,000 rules", Firewall::Program { rules: 1000, others: 0, masquerade: true }),
    ("5,000 rules", Firewall::Program { rules: 5000, others: 0, masquerade: true }),
    ("10 rules, no masquerade", Firewall::Program { rules: 10, others: 0, masquerade: false }),
    ("5,000 rules, no masquerade", Firewall::Program { rules: 5000, others: 0, masquerade: false }),
    ("5,000 rules, 250 containers", Firewall::Program { rules: 5000, others: OTHERS, masquerade: true }),
];

struct Case {
    name: &'static str,
    traffic: Traffic,
    rounds: Vec<Speeds>,
    /// The namespaces stay as long as it does.
    _bed: Bed,
}

#[derive(Debug, Serialize)]
pub(super) struct Row {
    pub(super) case: &'static str,
    pub(super) quantities: Vec<Quantity>,
}

/// One quantity of one case, and what it is to the others.
#[derive(Debug, Serialize)]
pub(super) struct Quantity {
    pub(super) name: &'static str,
    pub(super) value: Figure,
    pub(super) to_ten_rules: Figure,
    pub(super) to_one_rule: Figure,
    pub(super) to_shortcut: Figure,
    pub(super) to_shortcut_and_masquerade: Figure,
    pub(super) to_none: Figure,
}

type Of = fn(&Speeds) -> f64;
const QUANTITIES: [(&str, Of); 5] = [
    ("datagrams_per_second", |speeds| speeds.datagrams),
    ("connections_per_second", |speeds| speeds.connections),
    ("connect_us", |speeds| speeds.connect),
    ("round_trip_us", |speeds| speeds.round_trip),
    ("bulk_gbit_per_second", |speeds| speeds.bulk),
];

pub(super) fn measure(rounds: usize, long: Duration) -> Result<Vec<Row>> {
    let mut cases = Vec::new();
    for (name, firewall) in CASES {
        progress(&format!("packets: {name}"));
        interrupt::check()?;
        cases.push(Case::new(name, firewall)?);
    }
    for case in &cases {
        case.traffic.measure(long / 5)?;
    }
    for round in 0..rounds {
        progress(&format!("packets: round {} of {rounds}", round + 1));
        let count = cases.len();
        for n in 0..count {
            interrupt::check()?;
            // Forth in one round, back in the next.
            let case = &mut cases[if round.is_multiple_of(2) { n } else { count - 1 - n }];
            let speeds = case.traffic.measure(long)?;
            case.rounds.push(speeds);
        }
    }
    Ok(cases.iter().map(|case| case.row(&cases)).collect())
}

impl Case {
    fn new(name: &'static str, firewall: Firewall) -> Result<Self> {
        let (laid, rules, others, masquerade) = match firewall {
            Firewall::Program { rules, others, masquerade } => (true, rules, others, masquerade),
            Firewall::None | Firewall::Shortcut { .. } => (false, 0, 0, false),
        };
        let world = Space::new()?;
        let mut bed = Bed::new(&world, laid)?;
        let matching = matching(rules, TCP, UDP);
        let mut rules = list(1, rules.saturating_sub(matching.len()), Ports::Usual);
        rules.extend(matching);
        if others > 0 {
            let lists = (0..OTHER_LISTS).map(|number| list(100 + number, OTHER_RULES, Ports::Usual));
            let profiles: Vec<Arc<Known>> = lists.map(|rules| Arc::new(profile(rules).into())).collect();
            bed.add_idle(others, &profiles)?;
        }
        let mut profile = profile(rules);
        profile.settings.no_masquerade = (!masquerade).then(|| WORLD.into());
        let container = bed.add_linked("sender", Arc::new(profile.into()))?;
        if let Firewall::Shortcut { masquerade } = firewall {
            bed.space.run(&shortcut(masquerade))?;
        }
        let traffic = Traffic::new(container, world)?;
        Ok(Self { name, traffic, rounds: Vec::new(), _bed: bed })
    }

    fn row(&self, cases: &[Self]) -> Row {
        let quantity = |(name, of): (&'static str, Of)| {
            let values = |case: &Self| case.rounds.iter().map(of).collect::<Vec<f64>>();
            let to = |other: &str| {
                let other = cases.iter().find(|case| case.name == other);
                other.map_or_else(Figure::default, |other| Figure::ratio(&values(self), &values(other)))
            };
            Quantity {
                name,
                value: Figure::of(values(self)),
                to_ten_rules: to(TEN),
                to_one_rule: to(ONE),
                to_shortcut: to(SHORTCUT),
                to_shortcut_and_masquerade: to(MASQUERADE),
                to_none: to(NONE),
            }
        };
        Row { case: self.name, quantities: QUANTITIES.map(quantity).into() }
    }
}

/// As a command for a shell.
fn shortcut(masquerade: bool) -> String {
    let nat = match masquerade {
        true => "chain out { type nat hook postrouting priority 100; oifname \"eth0\" masquerade; }",
        false => "",
    };
    format!(
        "nft -f - <<'END'
         table inet shortcut {{
           chain forward {{
             type filter hook forward priority -10; policy accept;
             ct state established,related accept
           }}
           {nat}
         }}\nEND"
    )
}
