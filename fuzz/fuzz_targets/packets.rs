//! Packets that containers sent and that are to be logged.
#![no_main]

use libfuzzer_sys::fuzz_target;
use weft_model::traffic::Packet;

fuzz_target!(|bytes: &[u8]| {
    let _ = Packet::parse(bytes);
});
