//! What is written is read back, and foreign bytes do no harm: without a kernel.

mod programs;

use nf_tables::decode::{Body, Object, messages};
use nf_tables::{Batch, Data};
use programs::read::read;
use programs::{name, program};
use proptest::prelude::*;

proptest! {
    #[test]
    fn a_program_is_read_as_it_was_written(program in program()) {
        let table = name("weft");
        let mut batch = Batch::new(&table, u32::MAX - 3);
        program.load(&mut batch);
        let bytes = batch.finish().bytes;
        prop_assert_eq!(read(messages(&bytes).map(|message| message.expect("whole")), &table), program);
    }

    #[test]
    fn each_message_has_its_owner(program in program(), first in any::<u32>()) {
        let mut batch = Batch::new(&name("weft"), first);
        program.load(&mut batch);
        let transaction = batch.finish();
        let mut last = None;
        for message in messages(&transaction.bytes) {
            let message = message.expect("whole");
            let owner = transaction.owner(message.sequence);
            let of = match message.body {
                Body::There { object, .. } => match object {
                    Object::Table => "table".to_owned(),
                    Object::Chain { name, .. } | Object::Rule { chain: name, .. } => format!("chain {name}"),
                    Object::Set { name, .. } => format!("set {name}"),
                    Object::Elements { set, .. } if program.sets[&name(&set)].0.ranges => format!("ranges of {set}"),
                    Object::Elements { set, .. } => format!("elements of {set}"),
                },
                _ => {
                    prop_assert_eq!(owner, None);
                    continue;
                }
            };
            last = Some(message.sequence);
            prop_assert_eq!(owner, Some(&of));
        }
        prop_assert_eq!(Some(transaction.last()), last);
        prop_assert_eq!(transaction.owner(transaction.first()), None);
    }

    #[test]
    fn foreign_bytes_are_read_without_harm(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        let _ = messages(&bytes).count();
    }

    /// Past the envelope, into each kind of message.
    #[test]
    fn foreign_messages_are_read_without_harm(
        kind in 0u8..40, ours in any::<bool>(), flags in any::<u16>(), bytes in prop::collection::vec(any::<u8>(), 0..300),
    ) {
        let kind = if ours { 0xa00 | u16::from(kind) } else { u16::from(kind) };
        let length = u32::try_from(16 + bytes.len()).expect("small");
        let mut buffer = length.to_ne_bytes().to_vec();
        buffer.extend(kind.to_ne_bytes());
        buffer.extend(flags.to_ne_bytes());
        buffer.extend([0; 8]);
        buffer.extend(bytes);
        prop_assert!(messages(&buffer).all(|message| message.is_ok()));
    }

    #[test]
    fn damaged_programs_are_read_without_harm(
        program in program(), damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..40),
        cut in any::<prop::sample::Index>(),
    ) {
        let mut batch = Batch::new(&name("weft"), 1);
        program.load(&mut batch);
        let mut bytes = batch.finish().bytes;
        for (at, byte) in damage {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        let _ = messages(&bytes).count();
        let cut = cut.index(bytes.len());
        let _ = messages(&bytes[..cut]).count();
    }
}

#[test]
fn a_cut_message_is_told() {
    let mut batch = Batch::new(&name("weft"), 1);
    batch.add_table(&());
    let bytes = batch.finish().bytes;
    let all: Vec<bool> = messages(&bytes[..bytes.len() - 1]).map(|message| message.is_ok()).collect();
    assert_eq!(all, [true, true, false]);
}

#[test]
fn no_list_of_elements_is_longer_than_an_attribute() {
    let mut batch = Batch::new(&name("weft"), 1);
    let all: Vec<[u8; 4]> = (0u32..10_000).map(u32::to_be_bytes).collect();
    batch.add_elements(&"mine", &name("many"), all.iter().map(|key| (&key[..], &Data::Nothing)));
    let transaction = batch.finish();
    let mut read = Vec::new();
    let mut parts = 0;
    for message in messages(&transaction.bytes) {
        let message = message.expect("whole");
        if let Body::There { object: Object::Elements { elements, .. }, .. } = message.body {
            parts += 1;
            assert_eq!(transaction.owner(message.sequence), Some(&"mine"));
            read.extend(elements.into_iter().map(|one| one.expect("known").key));
        }
    }
    assert!(parts > 1);
    assert_eq!(read, all.iter().map(|key| key.to_vec()).collect::<Vec<_>>());
}

#[test]
fn a_batch_without_operations_asks_for_no_answer() {
    let batch = Batch::<()>::new(&name("weft"), 7);
    assert!(batch.is_empty());
    let transaction = batch.finish();
    assert_eq!((transaction.first(), transaction.last()), (7, 7));
}
