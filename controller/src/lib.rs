//! weft-controller: leases subnets of the overlay to cells, and tells every cell of all of them.
//!
//! ```text
//!  cells ──▶ grpc ──▶ writer ──▶ store (Postgres, SQLite, memory)        health, metrics
//!    ▲                  │ absorbs what it and others committed
//!    └──── streams ◀── editions
//! ```
//! Decisions are `weft_model::ledger`'s; this program moves rows and messages.

pub mod config;
pub mod editions;
pub mod grpc;
pub mod identity;
pub mod listen;
pub mod metrics;
pub mod run;
pub mod store;
pub mod writer;
