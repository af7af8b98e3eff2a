//! What cells, controllers and plugins send each other: requests and answers of both APIs, as values.
#![no_main]

use libfuzzer_sys::fuzz_target;
use prost::Message;
use weft_proto::{controller, convert, node};

fuzz_target!(|input: (u8, &[u8])| {
    let (which, bytes) = input;
    match which % 4 {
        0 => drop(controller::WatchResponse::decode(bytes).map(convert::changes_from)),
        1 => drop(controller::Cell::decode(bytes).map(convert::cell_from)),
        2 => drop(node::AddRequest::decode(bytes).map(convert::asked_from)),
        _ => drop(node::ExplainRequest::decode(bytes).map(|request| convert::probe_from(&request))),
    }
});
