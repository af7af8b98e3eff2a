//! What both daemons do at their edges: configuration file, logging, errors in words, certificates,
//! loopback HTTP.
//!
//! It owns no state and wakes on nothing by itself: the programs call it at start, poll it for changed
//! certificates, and give it a task to serve health and metrics from.
#![forbid(unsafe_code)]

pub mod cause;
pub mod config;
pub mod http;
pub mod log;
pub mod tls;
