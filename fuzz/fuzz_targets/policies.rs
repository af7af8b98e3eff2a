//! Policies as the policy server lists them.
#![no_main]

use libfuzzer_sys::fuzz_target;
use weft_node::policy_server::Listed;

fuzz_target!(|json: &[u8]| {
    let mut listed = Listed::default();
    if listed.add(json).is_ok() {
        let _ = listed.without_contradictions();
    }
});
