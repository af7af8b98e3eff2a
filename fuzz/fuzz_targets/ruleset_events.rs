//! The kernel's notifications of changed rules, whoever changed them.
#![no_main]

use libfuzzer_sys::fuzz_target;
use weft_node::kernel::ruleset_events::Notice;

fuzz_target!(|input: (u8, &[u8])| {
    let (kind, payload) = input;
    let _ = Notice::read(0xa00 | u16::from(kind), 0, payload);
});
