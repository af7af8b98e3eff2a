//! What the benches of the firewall's changes have in common: a cell on a real kernel, one change of it measured, and
//! figures of rounds.

pub(crate) mod bare;
pub(crate) mod bed;
pub(crate) mod change;
pub(crate) mod figure;
pub(crate) mod machine;
pub(crate) mod processor;
