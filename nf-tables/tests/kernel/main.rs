//! The kernel as judge, each test in a network namespace of its own.

#[path = "../programs/mod.rs"]
mod programs;

mod announcements;
mod listing;
mod names;
mod refusals;
mod round_trip;
mod world;
