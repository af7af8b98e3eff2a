//! Security groups' rules as sets that the kernel can hold.
//!
//! A rule is a box in the space of address, protocol and port (or ICMP type and code). The kernel refuses a set in which
//! one box lies within another, depending on the order of insertion, so boxes are laid in *layers*: within one, none
//! overlaps another. All accept, so the order of layers matters only where some log and others do not: of the rules
//! that match, the last one decides whether a connection is logged.

use std::cmp::Reverse;
use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap};
use std::hash::{Hash, Hasher};
use std::ops::Bound;

use nf_tables::{Field, Key, Ranges};

use crate::asg::{EgressRule, Traffic};
use crate::firewall::draft::{TCP, UDP};

/// Which fields a layer's boxes have behind the address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Shape {
    /// Any protocol.
    Any,
    /// TCP or UDP, and ports.
    Ports,
    /// ICMP type and code.
    Icmp,
}

/// What a box has besides its addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Side {
    shape: Shape,
    /// Protocol of [`Shape::Ports`]; else 0.
    protocol: u8,
    /// Ports; or type and code, each from and to.
    low: [u16; 2],
    high: [u16; 2],
}

/// First and last address.
type Span = (u32, u32);

/// First address to last address, by what the boxes have besides.
type Boxes = BTreeMap<Side, BTreeMap<u32, u32>>;

/// What one rule lets through.
#[derive(Debug, Clone, Copy)]
struct Egress {
    side: Side,
    span: Span,
    log: bool,
    /// Its place in the list.
    number: u32,
}

/// Boxes of one shape that do not overlap, and whether what they let through is logged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Layer {
    pub(super) shape: Shape,
    pub(super) log: bool,
    boxes: Vec<(Side, Span)>,
    /// Those of the run at hand, by the width of their sides, so that those that meet another are found without looking
    /// at all.
    near: BTreeMap<u32, Boxes>,
    /// All their addresses, as spans that do not touch: most boxes meet none of these.
    covered: BTreeMap<u32, u32>,
}

/// How a box lies to those of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Meeting {
    Apart,
    Overlaps,
    /// One of them holds it.
    Within,
}

/// In one piece, since each of thousands is looked up.
impl Hash for Side {
    fn hash<H: Hasher>(&self, state: &mut H) {
        let Self { shape, protocol, low, high } = self;
        let parts = [*shape as u16, (*protocol).into(), low[0], high[0], low[1], high[1]];
        state.write_u128(parts.into_iter().fold(0, |all, part| all << u16::BITS | u128::from(part)));
    }
}

impl Side {
    fn of(traffic: Traffic) -> Self {
        let ports = |protocol, ports: crate::asg::PortRange| Self {
            shape: Shape::Ports,
            protocol,
            low: [ports.first(), 0],
            high: [ports.last(), 0],
        };
        let ends = |value: Option<u8>| value.map_or((0, 255), |value| (u16::from(value), u16::from(value)));
        match traffic {
            Traffic::All => Self { shape: Shape::Any, protocol: 0, low: [0; 2], high: [0; 2] },
            Traffic::Tcp(range) => ports(TCP, range),
            Traffic::Udp(range) => ports(UDP, range),
            Traffic::Icmp { kind, code } => {
                let (kind, code) = (ends(kind), ends(code));
                Self { shape: Shape::Icmp, protocol: 0, low: [kind.0, code.0], high: [kind.1, code.1] }
            }
        }
    }

    /// Ports between first and last, or types, as a power of two that is not less.
    fn width(&self) -> u32 {
        u16::BITS - (self.high[0] - self.low[0]).leading_zeros()
    }

    /// From the first to the last that may meet it, of those of one width.
    fn neighbours(&self, width: u32) -> (Self, Self) {
        let most = u16::try_from((1_u32 << width) - 1).unwrap_or(u16::MAX);
        let least = [self.low[0].saturating_sub(most), 0];
        let (none, all) = ([0; 2], [u16::MAX; 2]);
        (Self { low: least, high: none, ..*self }, Self { low: [self.high[0], u16::MAX], high: all, ..*self })
    }

    fn overlaps(&self, other: &Self) -> bool {
        let meets = |n: usize| self.low[n] <= other.high[n] && other.low[n] <= self.high[n];
        self.shape == Shape::Any
            || other.shape == Shape::Any
            || (self.shape, self.protocol) == (other.shape, other.protocol) && meets(0) && meets(1)
    }

    fn contains(&self, other: &Self) -> bool {
        let holds = |n: usize| self.low[n] <= other.low[n] && other.high[n] <= self.high[n];
        self.shape == Shape::Any
            || (self.shape, self.protocol) == (other.shape, other.protocol) && holds(0) && holds(1)
    }
}

impl Egress {
    /// Of its sides first, then of its addresses.
    fn size(&self) -> (u32, u32) {
        let sides = self.side.high.iter().zip(self.side.low).map(|(high, low)| u32::from(high - low));
        (sides.sum(), self.span.1 - self.span.0)
    }
}

impl Layer {
    fn new(shape: Shape, log: bool) -> Self {
        Self { shape, log, boxes: Vec::new(), near: BTreeMap::new(), covered: BTreeMap::new() }
    }

    /// Whether it is for boxes such as this one.
    fn takes(&self, one: &Egress) -> bool {
        (self.shape, self.log) == (one.side.shape, one.log)
    }

    /// Boxes of a layer do not overlap, so the first one that meets this one says all.
    fn meets(&self, side: &Side, (first, last): Span) -> Meeting {
        if self.covered.range(..=last).next_back().is_none_or(|(_, end)| *end < first) {
            return Meeting::Apart;
        }
        let met = self.beside(side).filter(|(other, _)| other.overlaps(side)).find_map(|(other, spans)| {
            let (from, to) = spans.range(..=last).next_back().filter(|(_, end)| **end >= first)?;
            Some(other.contains(side) && *from <= first && last <= *to)
        });
        match met {
            None => Meeting::Apart,
            Some(true) => Meeting::Within,
            Some(false) => Meeting::Overlaps,
        }
    }

    /// All sides that may overlap this one.
    fn beside(&self, side: &Side) -> impl Iterator<Item = (&Side, &BTreeMap<u32, u32>)> {
        let everything = self.shape == Shape::Any || side.shape == Shape::Any;
        let none = self.shape != side.shape && !everything;
        self.near.iter().filter(move |_| !none).flat_map(move |(width, boxes)| {
            let (least, most) = side.neighbours(*width);
            let (from, to) = match everything {
                true => (Bound::Unbounded, Bound::Unbounded),
                false => (Bound::Included(least), Bound::Included(most)),
            };
            boxes.range((from, to))
        })
    }

    /// Others of its run are to find it.
    fn show(&mut self, side: Side, span: Span) {
        self.near.entry(side.width()).or_default().entry(side).or_default().insert(span.0, span.1);
        let (mut first, mut last) = span;
        while let Some((from, to)) = self.covered.range(..=last.saturating_add(1)).next_back()
            && to.saturating_add(1) >= first
        {
            let (from, to) = (*from, *to);
            (first, last) = (first.min(from), last.max(to));
            self.covered.remove(&from);
        }
        self.covered.insert(first, last);
    }

    /// The fields of the layer's key.
    pub(super) fn key(&self) -> Key {
        match self.shape {
            Shape::Any => [Field::Ipv4, Field::Protocol].into(),
            Shape::Ports => [Field::Ipv4, Field::Protocol, Field::Port].into(),
            Shape::Icmp => [Field::Ipv4, Field::IcmpType, Field::IcmpCode].into(),
        }
    }

    /// The boxes as the kernel takes them.
    pub(super) fn ranges(&self) -> Ranges {
        let length = self.key().len();
        let end = |side: &Side, addr: u32, of: [u16; 2], any: u8| {
            // Each field is filled up to four bytes.
            let mut key = [0; 12];
            key[..4].copy_from_slice(&addr.to_be_bytes());
            match self.shape {
                Shape::Any => key[4] = any,
                Shape::Ports => {
                    key[4] = side.protocol;
                    key[8..10].copy_from_slice(&of[0].to_be_bytes());
                }
                Shape::Icmp => (key[4], key[8]) = (of[0].to_be_bytes()[1], of[1].to_be_bytes()[1]),
            }
            key
        };
        let ends = self
            .boxes
            .iter()
            .map(|(side, (first, last))| (end(side, *first, side.low, 0), end(side, *last, side.high, 255)));
        let ends: Vec<([u8; 12], [u8; 12])> = ends.collect();
        let whole = length as usize;
        Ranges::new(length, ends.iter().map(|(low, high)| (&low[..whole], &high[..whole])))
    }
}

/// Layers in the order in which they are asked. `log_all` makes every rule a logging one.
///
/// Most rules of a list have addresses of their own. So boxes are taken in runs whose addresses meet no other run's:
/// only those of one run have to be compared.
pub(super) fn layers(rules: &[EgressRule], log_all: bool) -> Vec<Layer> {
    let egress = |(number, rule): (u32, &EgressRule)| Egress {
        side: Side::of(rule.traffic),
        span: (rule.to.first().into(), rule.to.last().into()),
        log: rule.log || log_all,
        number,
    };
    let mut boxes: Vec<Egress> = (0..).zip(rules).map(egress).collect();
    let alike = boxes.windows(2).all(|pair| pair[0].log == pair[1].log);
    // Those that begin at one address stay in the list's order. And a stable sort is quick with what is nearly in order, as
    // lists that people keep are.
    boxes.sort_by_key(|one| one.span.0);
    if alike {
        boxes = merged(boxes);
    }
    let mut layers: Vec<Layer> = Vec::new();
    let mut rest = boxes.as_mut_slice();
    while !rest.is_empty() {
        let (run, behind) = rest.split_at_mut(first_run(rest));
        rest = behind;
        if let [one] = run {
            // It meets none, so it needs no place behind any.
            let place = layers.iter().position(|layer| layer.takes(one));
            layer_at(&mut layers, place, one).boxes.push((one.side, one.span));
            continue;
        }
        if alike {
            // The order means nothing, so what holds others comes before them.
            run.sort_unstable_by_key(|one| (one.side.shape, Reverse(one.size()), one.number));
        } else {
            run.sort_unstable_by_key(|one| Reverse(one.number));
        }
        lay(run, &mut layers);
    }
    if alike {
        layers.sort_by_key(|layer| layer.shape);
    }
    layers
}

/// Boxes in the order of their addresses; those that differ in them only, and touch or overlap there, become one.
fn merged(boxes: Vec<Egress>) -> Vec<Egress> {
    let mut merged: Vec<Egress> = Vec::with_capacity(boxes.len());
    // The last one of each side: none behind it begins before it.
    let mut last: HashMap<Side, usize> = HashMap::with_capacity(boxes.len());
    for one in boxes {
        match last.entry(one.side) {
            Entry::Occupied(place) if one.span.0 <= merged[*place.get()].span.1.saturating_add(1) => {
                let before: &mut Egress = &mut merged[*place.get()];
                before.span.1 = before.span.1.max(one.span.1);
            }
            place => {
                place.insert_entry(merged.len());
                merged.push(one);
            }
        }
    }
    merged
}

/// How many boxes there are before the first whose addresses, and those of all behind it, none of them has.
fn first_run(boxes: &[Egress]) -> usize {
    let mut end = 0;
    let apart = |(n, one): (usize, &Egress)| {
        let apart = n > 0 && one.span.0 > end;
        end = end.max(one.span.1);
        apart
    };
    boxes.iter().enumerate().position(apart).unwrap_or(boxes.len())
}

/// The layer at that place; if there is none, a new one for such boxes.
fn layer_at<'a>(layers: &'a mut Vec<Layer>, place: Option<usize>, one: &Egress) -> &'a mut Layer {
    let place = place.unwrap_or_else(|| {
        layers.push(Layer::new(one.side.shape, one.log));
        layers.len() - 1
    });
    &mut layers[place]
}

/// Each box into the first layer where it meets no other, behind all that have to be asked before it.
fn lay(run: &[Egress], layers: &mut Vec<Layer>) {
    'boxes: for one in run {
        let Egress { side, span, log, .. } = one;
        let mut place = None;
        for (n, layer) in layers.iter().enumerate() {
            match layer.meets(side, *span) {
                Meeting::Within => continue 'boxes,
                Meeting::Overlaps if layer.log != *log => place = None,
                Meeting::Apart if layer.takes(one) => place = place.or(Some(n)),
                Meeting::Overlaps | Meeting::Apart => {}
            }
        }
        let layer = layer_at(layers, place, one);
        layer.boxes.push((*side, *span));
        layer.show(*side, *span);
    }
    for layer in layers {
        layer.near.clear();
        layer.covered.clear();
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::asg::{AddrRange, PortRange};

    /// Ports of every width, so that wide ranges meet narrow ones wherever they begin.
    fn rules() -> impl Strategy<Value = Vec<EgressRule>> {
        let ports = (any::<u16>(), 0_u32..=16, any::<u16>()).prop_map(|(first, bits, more)| {
            let wide = more & u16::try_from((1_u32 << bits) - 1).expect("16 bits");
            PortRange::new(first, first.saturating_add(wide)).expect("range")
        });
        let traffic = prop_oneof![
            1 => Just(Traffic::All),
            8 => ports.clone().prop_map(Traffic::Tcp),
            4 => ports.prop_map(Traffic::Udp),
            2 => (any::<Option<u8>>(), any::<Option<u8>>()).prop_map(|(kind, code)| Traffic::Icmp { kind, code }),
        ];
        let one = (0_u32..40, 0_u32..4, traffic, any::<bool>()).prop_map(|(first, more, traffic, log)| {
            let to = AddrRange::new(first.into(), (first + more).into()).expect("range");
            EgressRule { to, traffic, log, index: 0 }
        });
        proptest::collection::vec(one, 1..40)
    }

    proptest! {
        /// The kernel would refuse a set of which two boxes overlap.
        #[test]
        fn no_two_boxes_of_a_layer_overlap(rules in rules(), log_all in any::<bool>()) {
            for layer in layers(&rules, log_all) {
                for (n, (side, (first, last))) in layer.boxes.iter().enumerate() {
                    for (other, (from, to)) in &layer.boxes[..n] {
                        prop_assert!(!side.overlaps(other) || last < from || to < first, "{:?} {:?}", side, other);
                    }
                }
            }
        }

        /// What differs in its addresses only is one box.
        #[test]
        fn no_two_boxes_of_one_side_touch(rules in rules()) {
            let boxes: Vec<(Side, Span)> = layers(&rules, true).into_iter().flat_map(|layer| layer.boxes).collect();
            for (n, (side, (first, last))) in boxes.iter().enumerate() {
                for (other, (from, to)) in &boxes[..n] {
                    let touch = *first <= to.saturating_add(1) && *from <= last.saturating_add(1);
                    prop_assert!(side != other || !touch, "{:?} {} to {} and {} to {}", side, first, last, from, to);
                }
            }
        }

        /// No box is lost, and none is laid that another layer's holds already.
        #[test]
        fn every_rule_lies_within_the_layers(rules in rules(), log_all in any::<bool>()) {
            let layers = layers(&rules, log_all);
            for rule in &rules {
                let side = Side::of(rule.traffic);
                let span: Span = (rule.to.first().into(), rule.to.last().into());
                let holds = |(other, (from, to)): &(Side, Span)| other.contains(&side) && *from <= span.0 && span.1 <= *to;
                prop_assert!(layers.iter().flat_map(|layer| &layer.boxes).any(holds), "{}", rule);
            }
        }
    }
}
