//! The cell: what is wanted, what is believed, and the step between them.

pub mod step;

pub use step::{Belief, Change, Key, Object, Outcome, PeerSpec, Seen, Step, Stray, VtepSpec};
