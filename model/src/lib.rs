//! What Weft decides, without doing any of it.
//!
//! Everything here is a value or a function of values: no I/O, no clock, no chance (time and chance are
//! arguments). The programs around it only carry out what is planned here and report what happened.
//!
//! ```text
//!  values               address  subnet  lease  container  reason
//!  who holds what       ledger (the controller's step)   keeper (the cell's side of it)   ipam (addresses in a cell)
//!  what apps may do     policy  asg  profile   follow (when to ask the policy server for it)
//!  what a cell holds    cell (wanted, believed, diff)  ── unit (what is planned together)  ── link (names and MACs)
//! ```
#![forbid(unsafe_code)]

pub mod address;
pub mod asg;
pub mod bandwidth;
pub mod cell;
pub mod container;
pub mod firewall;
pub mod follow;
pub mod ipam;
pub mod keeper;
pub mod lease;
pub mod ledger;
pub mod link;
pub mod policy;
pub mod profile;
pub mod reason;
pub mod subnet;
pub mod traffic;
#[cfg(feature = "walk")]
pub mod walk;
