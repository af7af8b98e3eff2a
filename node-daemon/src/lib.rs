//! weft-node: keeps one cell's part of the overlay in step with its lease, its peers and its containers.
//!
//! ```text
//!  weft-cni ──▶ api ──▶ inbox ──▶ cell ──▶ kernel (VXLAN, routes, links, nf_tables)
//!              profiles            ▲ │ └──▶ journal        health, metrics
//!  controllers ◀──▶ lease_stream ──┤ │ └◀── kernel::events, kernel::ruleset_events
//!  policy server ◀──▶ policy_server┤ │ ◀── runbook
//!  iptables ◀──▶ guard ──────────────┘ └──▶ directory ──▶ flow_log ◀── kernel::nflog
//! ```
//! One task per module; each module's first lines say what it owns, what wakes it and what it emits.

pub mod api;
pub mod calls;
pub mod cell;
pub mod config;
pub mod directory;
pub mod flow_log;
mod follower;
pub mod guard;
pub mod inbox;
pub mod journal;
mod kept;
pub mod kernel;
pub mod lease_stream;
pub mod metrics;
pub mod overlay;
pub mod policy_server;
pub mod profiles;
pub mod question;
pub mod report;
pub mod run;
pub mod runbook;
pub mod snapshot;
