//! What the kernel announces of the ruleset.

use std::time::Duration;

use futures::StreamExt;
use futures::stream::BoxStream;
use tokio::time::timeout;
use weft_node::kernel::ruleset_events::{Event, Kind, Notice, Object, family, watch};

use crate::world::{LONG, Space};

fn listen(space: &Space) -> BoxStream<'static, Event> {
    let runtime = tokio::runtime::Handle::current();
    space.enter(move || {
        let _inside = runtime.enter();
        watch().expect("listening").boxed()
    })
}

async fn next(events: &mut BoxStream<'static, Event>) -> Event {
    timeout(LONG, events.next()).await.expect("announced").expect("the stream does not end")
}

#[tokio::test]
async fn each_object_is_announced_by_name() {
    use {Kind::*, Object::*};
    let space = Space::new();
    let mut events = listen(&space);
    space.run("nft 'add table inet weft; add chain inet weft c; add set inet weft s { type ipv4_addr; }'");
    space.run("nft 'add rule inet weft c accept; add element inet weft s { 10.0.0.1 }'");
    space.run(
        "nft 'delete element inet weft s { 10.0.0.1 }; flush chain inet weft c; delete set inet weft s'",
    );
    space.run("nft delete table inet weft && iptables-nft -A INPUT -j ACCEPT && iptables-nft -F INPUT");
    let expected = [
        (family::INET, "weft", None, Table, New),
        (family::INET, "weft", Some("c"), Chain, New),
        (family::INET, "weft", None, Set, New),
        (family::INET, "weft", Some("c"), Rule, New),
        (family::INET, "weft", None, Element, New),
        (family::INET, "weft", None, Element, Deleted),
        (family::INET, "weft", Some("c"), Rule, Deleted),
        (family::INET, "weft", None, Set, Deleted),
        (family::INET, "weft", Some("c"), Chain, Deleted),
        (family::INET, "weft", None, Table, Deleted),
        (family::IPV4, "filter", None, Table, New),
        (family::IPV4, "filter", Some("INPUT"), Chain, New),
        (family::IPV4, "filter", Some("INPUT"), Rule, New),
        (family::IPV4, "filter", Some("INPUT"), Rule, Deleted),
    ];
    let mut ports = Vec::new();
    for (family, table, chain, object, kind) in expected {
        let Event::Changed(notice) = next(&mut events).await else { panic!("nothing was lost") };
        ports.push(notice.by_port);
        let chain = chain.map(str::to_owned);
        assert_eq!(
            notice,
            Notice { family, table: table.into(), chain, object, kind, by_port: notice.by_port }
        );
    }
    assert!(ports.iter().all(|port| *port != 0), "{ports:?}");
    ports.dedup();
    assert_eq!(ports.len(), 6, "one for each program: {ports:?}");
}

#[tokio::test]
async fn what_is_lost_is_said() {
    let space = Space::new();
    let mut events = listen(&space);
    // Nobody reads meanwhile.
    space.run(
        "{ echo add table ip t; echo add chain ip t c; yes 'add rule ip t c counter accept' | head -60000; } | nft -f -",
    );
    while next(&mut events).await != Event::Lost {}
    // What did fit is read first: until then there is room for nothing new.
    while timeout(Duration::from_millis(500), events.next()).await.is_ok() {}
    space.run("nft add table ip after");
    let Event::Changed(notice) = next(&mut events).await else { panic!("lost again") };
    assert_eq!((notice.table.as_str(), notice.object, notice.kind), ("after", Object::Table, Kind::New));
}
