//! What the kernel tells those who listen.

use nf_tables::decode::{Body, Found, Gone, Object};
use nf_tables::{Data, Verdict, request};

use crate::programs::{Program, name, read::read};
use crate::world::World;

#[test]
fn a_commit_is_announced_as_it_was_made() {
    let mut world = World::new();
    let listener = world.listener();
    let program: Program = crate::listing::program();
    world.load(&program);
    let heard = world.heard(&listener);
    assert_eq!(heard.iter().filter(|message| matches!(message.body, Body::Other { .. })).count(), 0);
    let Some(Body::Generation(made)) = heard.last().map(|message| message.body.clone()) else {
        panic!("{heard:?}")
    };
    // As the machine's first process namespace counts, which need not be ours.
    assert_ne!(made.pid, 0);
    assert!(!made.process.is_empty());
    assert!(heard.iter().all(|message| message.port == world.port()));
    let current = world.ask(request::generation);
    let [Body::Generation(current)] = current.iter().map(|message| &message.body).collect::<Vec<_>>()[..]
    else {
        panic!("{current:?}")
    };
    assert_eq!(current.id, made.id);
    assert_eq!(read(heard, &World::table()), program);
}

#[test]
fn what_goes_is_announced() {
    let mut world = World::new();
    world.load(&crate::listing::program());
    let listener = world.listener();
    let (ok, text) = world.read_file(
        "delete element inet weft profiles { 10.255.1.2 }
         flush chain inet weft postrouting
         delete chain inet weft postrouting
         delete rule inet weft metadata handle 1000
         ",
    );
    assert!(!ok, "{text}");
    let (ok, text) = world.read_file(
        "delete element inet weft profiles { 10.255.1.2 }
         flush chain inet weft postrouting
         delete chain inet weft postrouting
         add chain inet weft Foreign",
    );
    assert!(ok, "{text}");
    let heard = world.heard(&listener);
    assert!(heard.iter().all(|message| message.port != world.port()));
    let mut gone = Vec::new();
    for message in &heard {
        match &message.body {
            Body::Gone { place, name } => {
                assert!(place.is(&World::table()));
                gone.push(name);
            }
            Body::There { object: Object::Chain { name, base }, .. } => {
                assert_eq!((name.as_str(), base), ("Foreign", &Ok(None)));
            }
            Body::Generation(generation) => assert_eq!(generation.process, "nft"),
            other => panic!("{other:?}"),
        }
    }
    let data = Data::Verdict(Verdict::Goto(name("leaf")));
    let element = Found { key: vec![10, 255, 1, 2], end: None, data, counted: None };
    let elements = Gone::Elements { set: "profiles".to_owned(), elements: vec![Ok(element)] };
    assert!(gone.contains(&&elements), "{gone:?}");
    assert!(gone.contains(&&Gone::Chain { name: "postrouting".to_owned() }), "{gone:?}");
    assert!(gone.iter().any(|gone| matches!(gone, Gone::Rule { chain, .. } if chain == "postrouting")));

    let mut batch = world.batch();
    batch.delete_table(&());
    assert_eq!(world.commit(batch), []);
    let heard = world.heard(&listener);
    assert!(heard.iter().any(|message| matches!(&message.body, Body::Gone { name: Gone::Table, .. })));
    assert!(heard.iter().any(|message| matches!(&message.body, Body::Gone { name: Gone::Set { .. }, .. })));
}
