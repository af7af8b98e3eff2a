//! What the kernel answers about nf_tables: read without harm, and a rule that is known is written as it was read.
#![no_main]

use libfuzzer_sys::fuzz_target;
use nf_tables::decode::{Body, Object, messages};
use nf_tables::{Batch, Chain, Name, Rule};

fuzz_target!(|input: (u8, u16, &[u8])| {
    let (kind, flags, body) = input;
    // Within an envelope that is whole: what is not, ends the walk at once.
    let Ok(length) = u32::try_from(16 + body.len()) else { return };
    let mut buffer = length.to_ne_bytes().to_vec();
    buffer.extend((0xa00 | u16::from(kind)).to_ne_bytes());
    buffer.extend(flags.to_ne_bytes());
    buffer.extend([0; 8]);
    buffer.extend(body);
    for message in messages(&buffer) {
        if let Ok(Body::There { object: Object::Rule { rule: Ok(rule), .. }, .. }) =
            message.map(|message| message.body)
        {
            assert_eq!(written_and_read(&rule).as_ref(), Some(&rule));
        }
    }
    messages(body).for_each(drop);
});

fn written_and_read(rule: &Rule) -> Option<Rule> {
    let name: Name = "weft".parse().ok()?;
    let mut batch = Batch::new(&name, 1);
    batch.add_chain(&(), &name, &Chain { base: None, rules: vec![rule.clone()] });
    messages(&batch.finish().bytes).find_map(|message| match message.ok()?.body {
        Body::There { object: Object::Rule { rule, .. }, .. } => rule.ok(),
        _ => None,
    })
}
