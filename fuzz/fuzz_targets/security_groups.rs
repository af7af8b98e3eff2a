//! Security groups as the policy server lists them.
#![no_main]

use libfuzzer_sys::fuzz_target;
use weft_model::asg::group;
use weft_model::profile::Workload;

fuzz_target!(|json: &[u8]| {
    if let Ok(page) = group::parse(json) {
        let _ = group::rules_for(&page.groups, "space", Workload::Running);
    }
});
