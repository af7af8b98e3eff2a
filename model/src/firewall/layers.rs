//! Security groups' rules as sets that the kernel can hold.
//!
//! A rule is a box in the space of address, protocol and port (or ICMP type and code). The kernel refuses a set in which
//! one box lies within another, depending on the order of insertion, so boxes are laid in *layers*: within one, none
//! overlaps another. All accept, so the order of layers matters only where some log and others do not: of the rules
//! that match, the last one decides whether a connection is logged.

use std::collections::BTreeMap;

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
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
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

/// Boxes of one shape that do not overlap, and whether what they let through is logged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Layer {
    pub(super) shape: Shape,
    pub(super) log: bool,
    /// First address to last address, by what the boxes have besides.
    boxes: BTreeMap<Side, BTreeMap<u32, u32>>,
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

impl Layer {
    fn overlaps(&self, side: &Side, (first, last): Span) -> bool {
        self.boxes
            .iter()
            .filter(|(other, _)| other.overlaps(side))
            .any(|(_, spans)| spans.range(..=last).next_back().is_some_and(|(_, end)| *end >= first))
    }

    fn contains(&self, side: &Side, (first, last): Span) -> bool {
        self.boxes
            .iter()
            .filter(|(other, _)| other.contains(side))
            .any(|(_, spans)| spans.range(..=first).next_back().is_some_and(|(_, end)| *end >= last))
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
        let end = |side: &Side, addr: u32, of: [u16; 2], any: u8| {
            let mut key = addr.to_be_bytes().to_vec();
            // Each field is filled up to four bytes.
            let byte = |value: u16| [value.to_be_bytes()[1], 0, 0, 0];
            match self.shape {
                Shape::Any => key.extend([any, 0, 0, 0]),
                Shape::Ports => {
                    let [high, low] = of[0].to_be_bytes();
                    key.extend([side.protocol, 0, 0, 0, high, low, 0, 0]);
                }
                Shape::Icmp => key.extend(byte(of[0]).into_iter().chain(byte(of[1]))),
            }
            key
        };
        let ends = self.boxes.iter().flat_map(|(side, spans)| {
            let one = |(first, last): (&u32, &u32)| {
                (end(side, *first, side.low, 0), end(side, *last, side.high, 255))
            };
            spans.iter().map(one)
        });
        let ends: Vec<(Vec<u8>, Vec<u8>)> = ends.collect();
        Ranges::new(self.key().len(), ends.iter().map(|(low, high)| (low.as_slice(), high.as_slice())))
    }
}

/// Layers in the order in which they are asked. `log_all` makes every rule a logging one.
pub(super) fn layers(rules: &[EgressRule], log_all: bool) -> Vec<Layer> {
    let logs = |rule: &EgressRule| rule.log || log_all;
    let mut boxes: Vec<(Side, Span, bool)> = rules
        .iter()
        .map(|rule| (Side::of(rule.traffic), (rule.to.first().into(), rule.to.last().into()), logs(rule)))
        .collect();
    let alike = boxes.windows(2).all(|pair| pair[0].2 == pair[1].2);
    if alike {
        // The order means nothing, so neighbours can be made one, and what holds others comes before them.
        boxes = merged(boxes);
    } else {
        boxes.reverse();
    }
    let mut layers: Vec<Layer> = Vec::new();
    for (side, span, log) in boxes {
        if layers.iter().any(|layer| layer.contains(&side, span)) {
            continue;
        }
        // Behind every layer that has to be asked before it.
        let after = layers.iter().rposition(|layer| layer.log != log && layer.overlaps(&side, span));
        let from = after.map_or(0, |n| n + 1);
        let fits =
            |layer: &Layer| (layer.shape, layer.log) == (side.shape, log) && !layer.overlaps(&side, span);
        let place = layers.iter().skip(from).position(fits).map(|n| n + from);
        let place = place.unwrap_or_else(|| {
            layers.push(Layer { shape: side.shape, log, boxes: BTreeMap::new() });
            layers.len() - 1
        });
        layers[place].boxes.entry(side).or_default().insert(span.0, span.1);
    }
    layers
}

/// Boxes that differ in their addresses only, and touch or overlap there, become one. Larger ones come first.
fn merged(mut boxes: Vec<(Side, Span, bool)>) -> Vec<(Side, Span, bool)> {
    boxes.sort_unstable();
    let mut merged: Vec<(Side, Span, bool)> = Vec::with_capacity(boxes.len());
    for (side, (first, last), log) in boxes {
        match merged.last_mut() {
            Some((same, (_, end), _)) if *same == side && first <= end.saturating_add(1) => {
                *end = last.max(*end)
            }
            _ => merged.push((side, (first, last), log)),
        }
    }
    let size =
        |side: &Side| side.high.iter().zip(side.low).map(|(high, low)| u32::from(high - low)).sum::<u32>();
    merged.sort_by_key(|(side, (first, last), _)| {
        (side.shape, std::cmp::Reverse(size(side)), std::cmp::Reverse(last - first), *first)
    });
    merged
}
