//! The two rules in iptables' filter table, as values.

use std::fmt;

use weft_model::firewall;

use crate::kernel::ruleset_events::{Event, Kind, Notice, Object, family};

/// What every rule of ours begins its comment with.
const SIGNATURE: &str = "weft: ";

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Rule {
    /// Refuses what our table marked as sent to the cell itself and not allowed, unless an operator's rule before it
    /// accepts it.
    Input,
    /// Accepts what our table allowed, so that a policy of DROP does not undo that.
    Forward,
}

/// A packet mark, and the bits of it that count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mark {
    pub value: u32,
    pub mask: u32,
}

impl fmt::Display for Mark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#010x}/{:#010x}", self.value, self.mask)
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.chain())
    }
}

impl Rule {
    pub const ALL: [Self; 2] = [Self::Input, Self::Forward];

    pub const fn chain(self) -> &'static str {
        match self {
            Self::Input => "INPUT",
            Self::Forward => "FORWARD",
        }
    }

    /// What our table marks packets with that this rule is about.
    pub const fn mark(self) -> Mark {
        match self {
            // The ingress mark 0xffff0000 has every high bit: the whole byte must be compared.
            Self::Input => Mark { value: firewall::REFUSED, mask: firewall::REFUSED_MASK },
            Self::Forward => Mark { value: firewall::ALLOWED, mask: firewall::ALLOWED },
        }
    }

    /// The rule, from the chain's name on, as iptables takes it.
    pub fn spec(self) -> Vec<String> {
        let mark = self.mark().to_string();
        let (comment, target): (_, &[&str]) = match self {
            Self::Input => (
                "from a container to this cell, not allowed",
                &["REJECT", "--reject-with", "icmp-port-unreachable"],
            ),
            Self::Forward => ("allowed by table inet weft", &["ACCEPT"]),
        };
        let comment = format!("{SIGNATURE}{comment}");
        let matches =
            [self.chain(), "-m", "mark", "--mark", &mark, "-m", "comment", "--comment", &comment, "-j"];
        matches.iter().chain(target).map(|word| (*word).to_owned()).collect()
    }

    const fn index(self) -> usize {
        match self {
            Self::Input => 0,
            Self::Forward => 1,
        }
    }
}

/// A value for each rule.
#[derive(Debug, Clone, Default)]
pub(super) struct Each<T>([T; 2]);

impl<T> std::ops::Index<Rule> for Each<T> {
    type Output = T;

    fn index(&self, rule: Rule) -> &T {
        &self.0[rule.index()]
    }
}

impl<T> std::ops::IndexMut<Rule> for Each<T> {
    fn index_mut(&mut self, rule: Rule) -> &mut T {
        &mut self.0[rule.index()]
    }
}

/// What a table holds that iptables prints with `-S`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Held {
    /// Rules of others.
    pub(super) foreign: bool,
    /// Rules of ours.
    pub(super) ours: bool,
}

impl Held {
    pub(super) fn read(listing: &str) -> Self {
        let mut held = Self::default();
        for rule in listing.lines().filter(|line| line.starts_with("-A ")) {
            if rule.contains(&format!("--comment \"{SIGNATURE}")) {
                held.ours = true;
            } else {
                held.foreign = true;
            }
        }
        held
    }
}

/// What a change of the ruleset means for a rule in iptables' nft backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Touch {
    /// Something was made there: that takes no rule away, but may be what a rule was waiting for.
    Made,
    /// The rule may be gone.
    Suspicious,
}

impl Touch {
    /// None if it has nothing to do with this rule: other tables, and the chains that a container runtime makes and
    /// unmakes for each container.
    pub(super) fn of(event: &Event, rule: Rule) -> Option<Self> {
        let notice = match event {
            Event::Lost => return Some(Self::Suspicious),
            Event::Changed(notice) => notice,
        };
        let Notice { family, table, chain, object, kind, .. } = notice;
        if *family != family::IPV4 || table != "filter" {
            return None;
        }
        let here = match object {
            Object::Table => true,
            Object::Chain | Object::Rule => chain.as_deref() == Some(rule.chain()),
            Object::Set | Object::Element | Object::Named | Object::Flowtable => false,
        };
        here.then_some(match kind {
            Kind::New => Self::Made,
            Kind::Deleted => Self::Suspicious,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_iptables_takes_them() {
        assert_eq!(
            Rule::Input.spec().join(" "),
            "INPUT -m mark --mark 0x01000000/0xff000000 -m comment --comment weft: from a container to this cell, not \
             allowed -j REJECT --reject-with icmp-port-unreachable"
        );
        assert_eq!(
            Rule::Forward.spec().join(" "),
            "FORWARD -m mark --mark 0x02000000/0x02000000 -m comment --comment weft: allowed by table inet weft -j \
             ACCEPT"
        );
    }

    #[test]
    fn ours_are_told_from_others() {
        let policies = "# Warning: legacy tables present\n-P INPUT ACCEPT\n-P FORWARD DROP\n-N w--input\n";
        let ours =
            "-A INPUT -m mark --mark 0x1000000/0xff000000 -m comment --comment \"weft: x\" -j REJECT\n";
        let foreign = "-A INPUT -i w+ -m comment --comment \"no weft: x\" -j w--input\n";
        for (listing, foreign, ours) in [
            (policies.to_owned(), false, false),
            (format!("{policies}{ours}"), false, true),
            (format!("{policies}{foreign}"), true, false),
            (format!("{foreign}{ours}"), true, true),
        ] {
            assert_eq!(Held::read(&listing), Held { foreign, ours }, "{listing}");
        }
    }

    #[test]
    fn what_an_event_means() {
        use {Kind::*, Object::*, Touch::*};
        let cases = [
            ((2, "filter", None, Table, Deleted), Some(Suspicious), Some(Suspicious)),
            ((2, "filter", None, Table, New), Some(Made), Some(Made)),
            ((2, "filter", Some("INPUT"), Chain, Deleted), Some(Suspicious), None),
            ((2, "filter", Some("INPUT"), Rule, Deleted), Some(Suspicious), None),
            ((2, "filter", Some("INPUT"), Rule, New), Some(Made), None),
            ((2, "filter", Some("FORWARD"), Rule, Deleted), None, Some(Suspicious)),
            ((2, "filter", Some("w--forward"), Rule, Deleted), None, None),
            ((2, "filter", None, Set, Deleted), None, None),
            ((2, "nat", Some("INPUT"), Rule, Deleted), None, None),
            ((1, "filter", Some("INPUT"), Rule, Deleted), None, None),
            ((10, "filter", None, Table, Deleted), None, None),
        ];
        for ((family, table, chain, object, kind), input, forward) in cases {
            let chain = chain.map(str::to_owned);
            let event =
                Event::Changed(Notice { family, table: table.into(), chain, object, kind, by_port: 1 });
            assert_eq!(Touch::of(&event, super::Rule::Input), input, "{event:?}");
            assert_eq!(Touch::of(&event, super::Rule::Forward), forward, "{event:?}");
        }
        assert_eq!(Touch::of(&Event::Lost, super::Rule::Input), Some(Suspicious));
    }
}
