//! What Cloud Foundry's own suites (smoke, acceptance, CATs) observe of policies and security groups, and what is wrong
//! with silk's agent: as scenarios across two cells, with a policy server that speaks the real protocol, and real
//! packets. docs/suites.md leads from each row to its test.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails, in its helpers too")]

#[path = "suites/world.rs"]
mod world;

#[path = "suites/changes.rs"]
mod changes;
#[path = "suites/defects.rs"]
mod defects;
#[path = "suites/groups.rs"]
mod groups;
#[path = "suites/intervals.rs"]
mod intervals;
#[path = "suites/newcomers.rs"]
mod newcomers;
#[path = "suites/outages.rs"]
mod outages;
#[path = "suites/policies.rs"]
mod policies;
