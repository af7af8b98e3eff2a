//! Dynamic sets: what counts connections and log lines. One for each figure that some profile asks for.
//!
//! Where a set is full a limit would be none: who relies on one looks afterwards whether its key is there.

use nf_tables::{Dynamic, Field, Key, Name, Ranges, Set, Stateful, Target};

use super::between::{invited, uninvited, untagged};
use super::draft::{Draft, Part as Of};
use super::{Planned, name, set};
use crate::profile::{ConnectionRate, Profile};
use crate::traffic::Decision;

/// A cell has no more containers than this, whatever its subnet.
const CONTAINERS: u32 = 65_535;
/// Destinations that are counted at once, of all containers together: as many as a small machine tracks connections.
/// A connection to one more is refused until others have been quiet for a while.
const DESTINATIONS: u32 = 262_144;
/// A bucket of log lines is full again after a second.
const LOG_TIMEOUT: u64 = 10_000;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Limit {
    /// Connections of a container at once.
    Connections { max: u32 },
    /// New TCP connections of a container to one destination.
    Rate { per_sec: u32, burst: u32 },
    /// Log lines of a container in a second.
    Lines { of: Lines, per_sec: u32 },
    /// Totals of what would have been logged without the limits, by container.
    Total { of: Lines },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Lines {
    Denied,
    Limited,
    /// As limited, in a dry run.
    OverLimit,
    /// To a container, and no policy lets it.
    Uninvited,
    /// To another cell, from a container whose app is the source of no policy.
    Untagged,
    AcceptedUdp,
    /// Of what a policy lets in.
    InvitedUdp,
}

impl Lines {
    pub const ALL: [Self; 7] = [
        Self::Denied,
        Self::Limited,
        Self::OverLimit,
        Self::Uninvited,
        Self::Untagged,
        Self::AcceptedUdp,
        Self::InvitedUdp,
    ];

    /// What the lines say.
    pub const fn decision(self) -> Decision {
        match self {
            Self::Denied => Decision::Denied,
            Self::Limited => Decision::Limited,
            Self::OverLimit => Decision::WouldLimit,
            Self::Uninvited => Decision::DeniedC2c,
            Self::Untagged => Decision::DeniedOverlay,
            Self::AcceptedUdp => Decision::Allowed,
            Self::InvitedUdp => Decision::AllowedC2c,
        }
    }

    const fn word(self) -> &'static str {
        match self {
            Self::Denied => "denied",
            Self::Limited => "limited",
            Self::OverLimit => "over-limit",
            Self::Uninvited => "uninvited",
            Self::Untagged => "untagged",
            Self::AcceptedUdp => "accepted-udp",
            Self::InvitedUdp => "invited-udp",
        }
    }
}

impl Limit {
    pub fn set_name(self) -> Name {
        name(&match self {
            Self::Connections { max } => format!("connections-{max}"),
            Self::Rate { per_sec, burst } => format!("rate-{per_sec}-{burst}"),
            Self::Lines { of, per_sec } => format!("lines-{}-{per_sec}", of.word()),
            Self::Total { of } => format!("total-{}", of.word()),
        })
    }

    /// What a key of it is made of, for rules.
    pub(super) fn key(self) -> &'static [Of] {
        match self {
            Self::Rate { .. } => &[Of::Source, Of::Destination, Of::Port],
            Self::Lines { of: Lines::Uninvited | Lines::InvitedUdp, .. }
            | Self::Total { of: Lines::Uninvited | Lines::InvitedUdp } => &[Of::Destination],
            _ => &[Of::Source],
        }
    }

    fn stateful(self) -> Stateful {
        match self {
            Self::Connections { max } => Stateful::ConnectionsOver { count: max },
            Self::Rate { per_sec, burst } => Stateful::Limit { rate: per_sec.into(), burst, over: true },
            Self::Lines { per_sec, .. } => {
                Stateful::Limit { rate: per_sec.into(), burst: per_sec, over: false }
            }
            Self::Total { .. } => Stateful::Counter,
        }
    }
}

impl Draft {
    /// Goes on if the limit says so: for connections and rates, that there are too many; for lines, that one more fits.
    pub(super) fn by(self, limit: Limit) -> Self {
        self.update(&limit.set_name(), limit.key(), limit.stateful())
    }
}

/// The limits that a profile's chains use. `log_c2c`: what is between containers is logged, whatever the profile says.
pub fn limits_of(profile: &Profile, log_c2c: bool) -> Vec<Limit> {
    let settings = &profile.settings;
    let denied = settings.denied_logs_per_sec.get();
    let lines = |of, per_sec| [Limit::Lines { of, per_sec }, Limit::Total { of }];
    let mut limits = Vec::new();
    if let Some(max) = settings.outbound_connections.max {
        limits.push(Limit::Connections { max: max.get() });
    }
    if let Some(rate) = &settings.outbound_connections.rate {
        limits.push(rate_limit(rate));
        limits.extend(lines(if rate.dry_run { Lines::OverLimit } else { Lines::Limited }, denied));
    }
    if settings.log_all {
        limits.extend(lines(Lines::Denied, denied));
    }
    if settings.log_all || log_c2c {
        limits.extend(lines(Lines::Uninvited, denied));
        limits.extend(lines(Lines::Untagged, denied));
    }
    if log_c2c {
        limits.extend(lines(Lines::InvitedUdp, settings.accepted_udp_logs_per_sec.get()));
    }
    if settings.log_all || profile.rules.iter().any(|rule| rule.log) {
        limits.extend(lines(Lines::AcceptedUdp, settings.accepted_udp_logs_per_sec.get()));
    }
    limits
}

pub(super) fn rate_limit(rate: &ConnectionRate) -> Limit {
    Limit::Rate { per_sec: rate.per_sec.get(), burst: rate.burst.get() }
}

/// What the kernel holds for a limit.
pub fn limit(limit: Limit, log_group: u16) -> Planned {
    let (fields, size, timeout) = match limit {
        Limit::Connections { .. } => (vec![Field::Ipv4], CONTAINERS, None),
        Limit::Rate { per_sec, burst } => {
            // A bucket that has been left alone for so long is full again.
            let full = u64::from(burst.div_ceil(per_sec)) * 1000;
            (vec![Field::Ipv4, Field::Ipv4, Field::Port], DESTINATIONS, Some(full))
        }
        Limit::Lines { .. } => (vec![Field::Ipv4], CONTAINERS, Some(LOG_TIMEOUT)),
        Limit::Total { .. } => (vec![Field::Ipv4], CONTAINERS, None),
    };
    let dynamic = Some(Dynamic { size, timeout });
    let declared = Set { key: Key(fields), target: Target::Nothing, ranges: false, dynamic };
    let mut planned = vec![set(limit.set_name().as_str(), declared, Ranges::default())];
    match limit {
        Limit::Lines { of: Lines::Uninvited, per_sec } => planned.push(uninvited(per_sec, log_group)),
        Limit::Lines { of: Lines::Untagged, per_sec } => planned.push(untagged(per_sec, log_group)),
        Limit::Lines { of: Lines::InvitedUdp, per_sec } => planned.push(invited(per_sec, log_group)),
        _ => {}
    }
    planned
}
