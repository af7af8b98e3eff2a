//! Security groups' rules as Garden passes them, and what the kernel is to hold of them.
#![no_main]

use libfuzzer_sys::fuzz_target;
use weft_model::asg::garden;
use weft_model::profile::{Known, Profile};

fuzz_target!(|json: &[u8]| {
    if let Ok(parsed) = garden::parse(json) {
        let known = Known::from(Profile { rules: parsed.rules.into(), ..Profile::default() });
        let _ = known.layers();
    }
});
