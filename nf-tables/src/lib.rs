//! nf_tables programs as values: tables, chains, rules, sets and their elements; to netlink messages, and back.
//!
//! No I/O: [`batch`] makes the bytes of a transaction, [`decode`] reads what the kernel answers, and whoever owns a
//! socket carries them. [`machine`] runs a program on a packet as the kernel would.
//!
//! ```text
//!  name  field  expression  rule  set     a program, as values
//!  constants                              every number of the wire format, with the kernel that brought it
//!  wire  encode  batch  request           values ──▶ bytes
//!  wire  decode                           bytes  ──▶ values
//!  machine                                a program, a packet ──▶ a verdict, and the rule that gave it
//! ```
//! Only what works on Linux 5.15 and later is spoken.
#![forbid(unsafe_code)]

pub mod batch;
pub mod constants;
pub mod decode;
mod encode;
pub mod expression;
pub mod field;
pub mod machine;
pub mod name;
pub mod request;
pub mod rule;
pub mod set;
mod wire;

pub use batch::{Batch, Transaction};
pub use expression::{Comparison, Connection, Expression, Header, Lookup, Metadata, Slot, Stateful};
pub use field::{Field, Key};
pub use name::{Name, NotAName};
pub use rule::{Base, Chain, Hook, Kind, Rule, Verdict};
pub use set::{Data, Dynamic, Ranges, Set, Target};
