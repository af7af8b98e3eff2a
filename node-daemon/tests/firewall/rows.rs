//! docs/dataplane.md, class by class: what the kernel does with a packet, and what `explain` says of it.

use std::time::Duration;

use weft_model::firewall::Guard;
use weft_model::firewall::explain::{Probe, Verdict};

use crate::attempt::{Attempt, Became};
use crate::cast::Cast;
use crate::packet::{ACK, Ears, Mouth, Packet, SYN};
use crate::table::{ELSEWHERE, Expect, Row, Seen, Who, table, without_policies};
use crate::world::CELL;

const PAGE: &str = include_str!("../../../docs/dataplane.md");
/// For what must come: longer than any test's machine is busy with other things.
const LONG: Duration = Duration::from_secs(10);

impl Cast {
    async fn check(&mut self, rows: &[Row]) {
        let mut wrong = Vec::new();
        for row in rows {
            let (space, from) = self.of(row.from);
            let (port, tcp) = match row.probe {
                Probe::Tcp { port } => (port, true),
                Probe::Udp { port } => (port, false),
                _ => (0, false),
            };
            let (server, at) = match (row.from, row.expect) {
                (Who::Cell, Expect::Allowed { at: Who::Cell, .. }) => (space, (row.to, port)),
                _ => self.behind(row.to, port, tcp),
            };
            let attempt = Attempt { space, from, to: row.to, probe: row.probe, server, at, patience: LONG };
            let expected = match row.expect {
                Expect::Refused => Became::Refused,
                Expect::Allowed { seen, .. } => Became::Arrived {
                    seen: match seen {
                        Seen::Own if row.from == Who::Cell => row.to,
                        Seen::Own => from,
                        Seen::Cell => CELL,
                        Seen::Gateway => weft_model::link::GATEWAY,
                    },
                },
            };
            let became = attempt.make();
            if became != expected {
                wrong.push(format!("{row:?}: {became:?}"));
            }
            // It speaks of what containers and the underlay send.
            if !matches!(row.from, Who::Cell | Who::Side) {
                wrong.extend(self.explained(row).await);
            }
        }
        assert!(wrong.is_empty(), "{wrong:#?}");
    }

    async fn explained(&mut self, row: &Row) -> Option<String> {
        let (_, from) = self.of(row.from);
        let told = self.world.site.explain(from, row.to, row.probe).await;
        let (verdict, seen) = match row.expect {
            Expect::Refused => (Verdict::Refused, false),
            Expect::Allowed { seen, .. } => (Verdict::Allowed, matches!(seen, Seen::Cell)),
        };
        ((told.verdict, told.masqueraded) != (verdict, seen)).then(|| format!("{row:?}: {told:?}"))
    }

    /// The two rules that stand in iptables; and a policy of DROP, for which the second is there.
    async fn rely_on(&mut self, iptables: &str) {
        self.world.site.space.run(&format!(
            "{iptables} -A INPUT -m mark --mark 0x01000000/0xff000000 -j REJECT && \
             {iptables} -A FORWARD -m mark --mark 0x02000000/0x02000000 -j ACCEPT && {iptables} -P FORWARD DROP"
        ));
        self.world.site.cell.guard(Guard::Iptables);
        self.world.site.settle().await;
    }
}

#[tokio::test]
async fn every_packet_of_the_table_goes_where_the_page_says() {
    Cast::new(true).await.check(&table()).await;
}

#[tokio::test]
async fn without_policies_containers_reach_each_other_and_nothing_else() {
    Cast::new(false).await.check(&without_policies()).await;
}

/// dataplane.md, "To the cell": the last rule of filter/INPUT refuses, and FORWARD's policy of DROP undoes nothing.
#[tokio::test]
async fn the_same_holds_with_rules_in_iptables_nft_and_a_policy_of_drop() {
    let mut cast = Cast::new(true).await;
    cast.rely_on("iptables-nft").await;
    cast.check(&table()).await;
}

#[tokio::test]
async fn the_same_holds_with_rules_in_iptables_legacy_and_a_policy_of_drop() {
    let mut cast = Cast::new(true).await;
    cast.rely_on("iptables-legacy").await;
    cast.check(&table()).await;
}

#[tokio::test]
async fn without_policies_the_same_holds_in_iptables_of_both_kinds() {
    for iptables in ["iptables-nft", "iptables-legacy"] {
        let mut cast = Cast::new(false).await;
        cast.rely_on(iptables).await;
        cast.check(&without_policies()).await;
    }
}

/// dataplane.md, "To the cell": an operator's own rule wins, where our own chain does not refuse.
#[tokio::test]
async fn an_operators_rule_in_the_input_chain_wins() {
    for iptables in ["iptables-nft", "iptables-legacy"] {
        let mut cast = Cast::new(true).await;
        cast.rely_on(iptables).await;
        cast.world.site.space.run(&format!("{iptables} -I INPUT -p tcp --dport 8898 -j ACCEPT"));
        let (space, from) = cast.of(Who::App);
        let attempt = |port| {
            let (probe, server) = (Probe::Tcp { port }, &cast.world.site.space);
            Attempt { space, from, to: CELL, probe, server, at: (CELL, port), patience: LONG }.make()
        };
        assert_eq!(attempt(8898), Became::Arrived { seen: from }, "{iptables}");
        assert_eq!(attempt(8899), Became::Refused, "{iptables}");
    }
}

/// dataplane.md, "To the world", 4.
#[tokio::test]
async fn tcp_that_belongs_to_no_connection_is_dropped() {
    let cast = Cast::new(true).await;
    let (space, from) = cast.of(Who::App);
    let (outside, own) = (Ears::in_space(&cast.world.outside, &[6]), Ears::in_space(space, &[1]));
    let mouth = Mouth::in_space(space);
    // An answer to nothing, then the beginning of something.
    for (id, flags) in [(1, SYN | ACK), (2, SYN)] {
        let to = Packet::new(from, [9, 9, 9, 9].into(), Probe::Tcp { port: 80 }, id);
        mouth.send(&Packet { flags, ..to });
    }
    let mut heard = Vec::new();
    while !heard.contains(&2) {
        heard.extend(outside.hear().into_iter().map(|heard| heard.id));
    }
    assert!(!heard.contains(&1), "{heard:?}");
    assert_eq!(own.hear().into_iter().find_map(|heard| heard.refuses()), None, "without a word");
}

/// dataplane.md, "To the cell", "To a container": what is related to a connection passes as it does.
#[tokio::test]
async fn errors_about_a_connection_come_back() {
    let cast = Cast::new(true).await;
    let (app, addr) = cast.of(Who::App);
    let refused = |space: &crate::space::Space, to: (std::net::Ipv4Addr, u16)| {
        let ears = Ears::in_space(space, &[1]);
        let socket = space.enter(|| std::net::UdpSocket::bind("0.0.0.0:0")).expect("bound");
        socket.connect(to).expect("connected");
        socket.set_read_timeout(Some(LONG)).expect("not for ever");
        socket.send(b"weft").expect("sent");
        let error = socket.recv(&mut [0; 4]).expect_err("nobody is there");
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused, "{to:?}");
        ears.hear().iter().find(|heard| heard.refuses().is_some()).map(|heard| heard.from)
    };
    // The ports are closed: who answers is the destination itself.
    assert_eq!(refused(&cast.world.site.space, (addr, 9)), Some(addr), "from a container to its cell");
    let far = [9, 9, 9, 9].into();
    assert_eq!(refused(app, (far, 53)), Some(far), "from the world to a container");
}

/// dataplane.md, "Checked against".
#[test]
fn the_page_says_how_many_there_are() {
    let (_, section) = PAGE.split_once("## Checked against").expect("a section");
    let section = section.split("\n## ").next().expect("its text").replace('\n', " ");
    for said in [
        format!("{} classes of packets", table().len()),
        format!("{} more without policies", without_policies().len()),
    ] {
        assert!(section.contains(&said), "the page does not say: {said}");
    }
    let paragraphs = table().into_iter().chain(without_policies()).map(|row| row.paragraph);
    for paragraph in paragraphs {
        assert!(PAGE.contains(&format!("## {paragraph}\n")), "the page has no paragraph {paragraph}");
    }
    for (what, tests) in ELSEWHERE {
        let said = section.contains(what) && section.contains(tests);
        assert!(said, "the page does not say that this is checked by {tests}: {what}");
    }
}
