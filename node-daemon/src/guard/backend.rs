//! Which of iptables' two backends is this cell's: a pure function of what was seen.

use std::fmt;
use std::path::PathBuf;

use serde::Deserialize;

use super::rule::Held;

/// The property `iptables_backend`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Wish {
    #[default]
    Auto,
    Nft,
    Legacy,
    /// No iptables: operators' rules do not win over ours.
    None,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Backend {
    Nft,
    Legacy,
}

impl Backend {
    pub(super) fn other(self) -> Self {
        match self {
            Self::Nft => Self::Legacy,
            Self::Legacy => Self::Nft,
        }
    }

    /// As `iptables --version` has it in parentheses. Older than 1.8 there is only legacy, and it says nothing.
    pub(super) fn of_version(said: &str) -> Self {
        if said.contains("(nf_tables)") { Self::Nft } else { Self::Legacy }
    }
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Nft => "nft",
            Self::Legacy => "legacy",
        })
    }
}

/// A program that writes to one of the backends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Program {
    pub(super) path: PathBuf,
    pub(super) backend: Backend,
}

/// What there is to choose from.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Seen {
    pub(super) nft: Option<Side>,
    pub(super) legacy: Option<Side>,
    /// What the first program says that is called just `iptables`.
    pub(super) plain: Option<Backend>,
}

/// A backend for which there is a program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Side {
    pub(super) path: PathBuf,
    /// In its table `filter`.
    pub(super) held: Held,
}

/// What the choice follows from, for the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Because {
    #[error("iptables_backend says so")]
    Wished,
    #[error("there is no program for the other")]
    Only,
    #[error("its filter table holds rules, the other's does not")]
    Holds,
    #[error("so says iptables --version, and both filter tables hold rules")]
    PlainOfBoth,
    #[error("so says iptables --version, and neither filter table holds rules")]
    PlainOfNeither,
}

impl Seen {
    pub(super) fn side(&self, backend: Backend) -> Option<&Side> {
        match backend {
            Backend::Nft => self.nft.as_ref(),
            Backend::Legacy => self.legacy.as_ref(),
        }
    }

    pub(super) fn program(&self, backend: Backend) -> Option<Program> {
        self.side(backend).map(|side| Program { path: side.path.clone(), backend })
    }

    /// None: there is no program for it.
    pub(super) fn choose(&self, wish: Wish) -> Option<(Program, Because)> {
        let (backend, because) = match wish {
            Wish::None => return None,
            Wish::Nft => (Backend::Nft, Because::Wished),
            Wish::Legacy => (Backend::Legacy, Because::Wished),
            Wish::Auto => self.find()?,
        };
        Some((self.program(backend)?, because))
    }

    fn find(&self) -> Option<(Backend, Because)> {
        let (nft, legacy) = match (&self.nft, &self.legacy) {
            (None, None) => return None,
            (Some(_), None) => return Some((Backend::Nft, Because::Only)),
            (None, Some(_)) => return Some((Backend::Legacy, Because::Only)),
            (Some(nft), Some(legacy)) => (nft.held.foreign, legacy.held.foreign),
        };
        // Without a plain one, the backend that distributions have had as their default since 2019.
        let plain = self.plain.unwrap_or(Backend::Nft);
        Some(match (nft, legacy) {
            (true, false) => (Backend::Nft, Because::Holds),
            (false, true) => (Backend::Legacy, Because::Holds),
            (true, true) => (plain, Because::PlainOfBoth),
            (false, false) => (plain, Because::PlainOfNeither),
        })
    }

    /// Whether the backend in use has become the wrong one, or its program is gone: others began to use the other.
    /// Where both are used, or neither, nothing is moved under way.
    pub(super) fn moves(&self, from: &Program) -> bool {
        let foreign = |backend| self.side(backend).is_some_and(|side| side.held.foreign);
        let there = self.side(from.backend).is_some_and(|side| side.path == from.path);
        !there || !foreign(from.backend) && foreign(from.backend.other())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn side(name: &str, foreign: bool, ours: bool) -> Option<Side> {
        Some(Side { path: name.into(), held: Held { foreign, ours } })
    }

    #[test]
    fn the_table_of_choices() {
        use {Backend::*, Because::*};
        let seen = |nft, legacy, plain| Seen { nft, legacy, plain };
        let (n, l) = (|holds| side("n", holds, false), |holds| side("l", holds, false));
        let auto = Wish::Auto;
        for (wish, seen, expected) in [
            (auto, seen(n(true), l(false), Some(Legacy)), Some((Nft, Holds))),
            (auto, seen(n(false), l(true), Some(Nft)), Some((Legacy, Holds))),
            (auto, seen(n(true), l(true), Some(Legacy)), Some((Legacy, PlainOfBoth))),
            (auto, seen(n(false), l(false), Some(Legacy)), Some((Legacy, PlainOfNeither))),
            (auto, seen(n(false), l(false), None), Some((Nft, PlainOfNeither))),
            // Our own rules are no reason to stay.
            (auto, seen(side("n", false, true), l(true), Some(Nft)), Some((Legacy, Holds))),
            (auto, seen(n(false), None, Some(Legacy)), Some((Nft, Only))),
            (auto, seen(None, l(false), Some(Nft)), Some((Legacy, Only))),
            (auto, seen(None, None, None), None),
            (Wish::Nft, seen(n(false), l(true), Some(Legacy)), Some((Nft, Wished))),
            (Wish::Legacy, seen(n(true), l(false), Some(Nft)), Some((Legacy, Wished))),
            (Wish::Legacy, seen(n(true), None, Some(Nft)), None),
            (Wish::None, seen(n(true), l(true), Some(Nft)), None),
        ] {
            let chosen = seen.choose(wish).map(|(program, because)| (program.backend, because));
            assert_eq!(chosen, expected, "{wish:?} {seen:?}");
        }
    }

    #[test]
    fn versions() {
        assert_eq!(Backend::of_version("iptables v1.8.9 (nf_tables)\n"), Backend::Nft);
        assert_eq!(Backend::of_version("iptables v1.8.9 (legacy)\n"), Backend::Legacy);
        assert_eq!(Backend::of_version("iptables v1.6.1\n"), Backend::Legacy);
    }

    proptest! {
        /// What moves by itself stays where it moved to, whatever a fresh choice would say.
        #[test]
        fn no_move_back_and_forth(nft: (bool, bool), legacy: (bool, bool), from_nft: bool) {
            let seen = Seen { nft: side("n", nft.0, nft.1), legacy: side("l", legacy.0, legacy.1), plain: None };
            let from = seen.program(if from_nft { Backend::Nft } else { Backend::Legacy }).expect("there");
            if seen.moves(&from) {
                let (to, _) = seen.choose(Wish::Auto).expect("chosen");
                prop_assert!(!seen.moves(&to));
                prop_assert_ne!(to, from);
            }
        }
    }
}
