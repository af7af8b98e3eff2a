//! Every class of packets of docs/dataplane.md, with what becomes of it.

use std::net::Ipv4Addr;

use weft_model::firewall::explain::Probe;

/// Who sends or gets a packet. The profiles of the containers are in `cast.rs`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Who {
    /// A container of an app, with security groups and services: 10.255.30.2.
    App,
    /// One without any: 10.255.30.3.
    Bare,
    /// A staging task, all in its security group: 10.255.30.4.
    Staging,
    /// Neither app nor task, all in its security group: 10.255.30.5.
    Other,
    /// A task with all in its security group, and a range that sees its own address: 10.255.30.6.
    Open,
    /// The same, without the refusal of cloud metadata: 10.255.30.7.
    Trusted,
    Cell,
    /// 10.0.16.77.
    Outside,
    /// An address of the internet, by the underlay.
    Far,
    /// By a device of the cell that is no way to the world.
    Side,
    /// A container of another cell: 10.255.40.2.
    Remote,
}

#[derive(Debug, Clone, Copy)]
pub(crate) enum Expect {
    /// It arrives there, and its answer comes back.
    Allowed {
        at: Who,
        seen: Seen,
    },
    Refused,
}

/// The source that its destination sees.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Seen {
    Own,
    /// The cell's underlay address.
    Cell,
    /// 169.254.0.1.
    Gateway,
}

/// One observation.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Row {
    /// Of docs/dataplane.md.
    pub(crate) paragraph: &'static str,
    pub(crate) from: Who,
    pub(crate) to: Ipv4Addr,
    pub(crate) probe: Probe,
    pub(crate) expect: Expect,
}

/// What silk's table of the same classes has and this one not, and which of the testbed's tests check it.
pub(crate) const ELSEWHERE: &[(&str, &str)] = &[
    ("container to container, a policy names source, protocol and port", "`policies`"),
    ("container to another cell, it is the source of a policy", "`policies`"),
    ("the tag of the source in frames of the overlay", "`policies`"),
    ("lines of the log", "`firewall`"),
];

/// With policies.
pub(crate) fn table() -> Vec<Row> {
    [to_the_world(), metadata(), to_the_cell(), mapped_ports(), to_containers()].concat()
}

fn tcp(port: u16) -> Probe {
    Probe::Tcp { port }
}

fn udp(port: u16) -> Probe {
    Probe::Udp { port }
}

fn icmp(kind: u8, code: u8) -> Probe {
    Probe::Icmp { kind, code }
}

const PING: Probe = Probe::Icmp { kind: 8, code: 0 };
const GRE: Probe = Probe::Other { protocol: 47 };

type Short = (Who, [u8; 4], Probe, Expect);

fn rows(paragraph: &'static str, rows: &[Short]) -> Vec<Row> {
    let row = |(from, to, probe, expect): &Short| Row {
        paragraph,
        from: *from,
        to: (*to).into(),
        probe: *probe,
        expect: *expect,
    };
    rows.iter().map(row).collect()
}

use Expect::Refused;
use Who::{App, Bare, Far, Open, Other, Outside, Remote, Side, Staging, Trusted};

const WORLD: Expect = Expect::Allowed { at: Outside, seen: Seen::Cell };
const UNSEEN: Expect = Expect::Allowed { at: Outside, seen: Seen::Own };

const fn at(at: Who) -> Expect {
    Expect::Allowed { at, seen: Seen::Own }
}

fn to_the_world() -> Vec<Row> {
    let mut all = rows(
        "To the world",
        &[
            (App, [9, 9, 9, 9], tcp(80), WORLD),
            (App, [9, 9, 9, 9], tcp(81), WORLD),
            (App, [9, 9, 9, 10], tcp(443), WORLD),
            (App, [9, 9, 9, 9], udp(53), WORLD),
            (App, [203, 0, 113, 7], tcp(82), WORLD),
            (App, [203, 0, 113, 7], udp(54), WORLD),
            (App, [203, 0, 113, 7], PING, WORLD),
            (App, [203, 0, 113, 7], GRE, WORLD),
            (App, [9, 9, 9, 9], tcp(82), Refused),
            (App, [9, 9, 9, 11], tcp(80), Refused),
            (App, [8, 8, 8, 8], tcp(80), Refused),
            (App, [9, 9, 9, 10], udp(53), Refused),
            (App, [9, 9, 9, 9], udp(54), Refused),
            (App, [9, 9, 9, 9], GRE, Refused),
            (App, [10, 0, 16, 1], tcp(80), Refused),
            // A name server that is not link-local is as any address of the world.
            (App, [8, 8, 4, 4], udp(53), Refused),
            (App, [8, 8, 8, 8], PING, WORLD),
            (App, [8, 8, 8, 8], icmp(8, 1), Refused),
            (App, [8, 8, 8, 8], icmp(13, 0), Refused),
            (App, [9, 9, 9, 10], PING, WORLD),
            (App, [9, 9, 9, 10], icmp(13, 0), WORLD),
            (App, [9, 9, 9, 9], PING, Refused),
            (Bare, [9, 9, 9, 9], tcp(80), Refused),
            (Bare, [9, 9, 9, 9], udp(53), Refused),
            (Bare, [9, 9, 9, 9], PING, Refused),
            // Denied networks: of all, of apps and tasks, of staging tasks.
            (App, [172, 16, 66, 5], tcp(80), Refused),
            (App, [172, 16, 66, 5], PING, Refused),
            (App, [172, 16, 67, 5], tcp(80), Refused),
            (App, [172, 16, 68, 5], tcp(80), WORLD),
            (Staging, [172, 16, 66, 5], tcp(80), Refused),
            (Staging, [172, 16, 67, 5], tcp(80), WORLD),
            (Staging, [172, 16, 68, 5], tcp(80), Refused),
            (Other, [172, 16, 66, 5], tcp(80), Refused),
            (Other, [172, 16, 67, 5], tcp(80), WORLD),
            (Other, [172, 16, 68, 5], tcp(80), WORLD),
            // By no way to the world.
            (Open, [198, 18, 0, 5], tcp(80), Refused),
            (Open, [198, 18, 0, 5], udp(80), Refused),
            (Open, [198, 18, 0, 5], PING, Refused),
            (Open, [9, 9, 9, 9], udp(4789), Refused),
            (Open, [9, 9, 9, 9], tcp(4789), WORLD),
        ],
    );
    let masquerade = [
        (Open, [203, 0, 113, 7], tcp(80), UNSEEN),
        (Open, [203, 0, 113, 7], udp(80), UNSEEN),
        (Open, [203, 0, 114, 7], tcp(80), WORLD),
        (Open, [203, 0, 114, 7], udp(80), WORLD),
    ];
    all.extend(rows("Masquerade", &masquerade));
    all
}

fn metadata() -> Vec<Row> {
    rows(
        "Cloud metadata",
        &[
            (App, [169, 254, 169, 254], tcp(80), Refused),
            (Open, [169, 254, 169, 254], tcp(80), Refused),
            (Open, [169, 254, 169, 254], udp(80), Refused),
            (Open, [169, 254, 169, 254], PING, Refused),
            (Open, [169, 254, 169, 254], tcp(53), WORLD),
            (Open, [169, 254, 169, 254], udp(53), WORLD),
            (Open, [100, 100, 100, 200], tcp(80), Refused),
            (Open, [100, 100, 100, 200], udp(53), WORLD),
            (Open, [168, 63, 129, 16], tcp(80), Refused),
            (Open, [168, 63, 129, 16], tcp(32526), Refused),
            (Open, [168, 63, 129, 16], tcp(443), WORLD),
            (Open, [168, 63, 129, 16], udp(53), WORLD),
            (Trusted, [169, 254, 169, 254], tcp(80), WORLD),
            (Trusted, [168, 63, 129, 16], tcp(80), WORLD),
        ],
    )
}

fn to_the_cell() -> Vec<Row> {
    let mut all = rows(
        "To the cell",
        &[
            (App, [169, 254, 0, 2], tcp(53), at(Who::Cell)),
            (App, [169, 254, 0, 2], udp(53), at(Who::Cell)),
            (App, [169, 254, 0, 2], tcp(80), Refused),
            (App, [169, 254, 0, 2], PING, Refused),
            (App, [169, 254, 0, 3], tcp(9001), at(Who::Cell)),
            (App, [169, 254, 0, 3], udp(9002), at(Who::Cell)),
            (App, [169, 254, 0, 3], tcp(9002), Refused),
            (App, [169, 254, 0, 3], udp(9001), Refused),
            (App, [169, 254, 0, 3], tcp(53), Refused),
            (App, [10, 0, 16, 14], tcp(22), Refused),
            (App, [10, 0, 16, 14], PING, Refused),
            (App, [169, 254, 0, 1], tcp(22), Refused),
            (App, [169, 254, 0, 1], udp(53), Refused),
            (App, [169, 254, 0, 1], PING, Refused),
            (App, [10, 255, 30, 0], tcp(22), Refused),
            (App, [192, 168, 77, 1], tcp(22), Refused),
            (App, [10, 0, 16, 14], GRE, Refused),
            (Bare, [169, 254, 0, 2], udp(53), Refused),
            (Open, [10, 0, 16, 14], tcp(22), Refused),
            (Open, [10, 0, 16, 14], udp(4789), Refused),
            (Open, [10, 255, 30, 0], udp(4789), Refused),
            (Open, [169, 254, 0, 1], udp(4789), Refused),
            // By the overlay.
            (Remote, [10, 255, 30, 0], tcp(22), Refused),
            (Remote, [10, 255, 30, 0], udp(53), Refused),
            (Remote, [10, 255, 30, 0], PING, Refused),
        ],
    );
    let from_it = |to, probe| (Who::Cell, to, probe, Expect::Allowed { at: App, seen: Seen::Gateway });
    all.extend(rows(
        "To a container",
        &[
            from_it([10, 255, 30, 2], tcp(8081)),
            from_it([10, 255, 30, 2], udp(8081)),
            from_it([10, 255, 30, 2], PING),
        ],
    ));
    all
}

fn mapped_ports() -> Vec<Row> {
    rows(
        "To a mapped port",
        &[
            (Outside, [10, 0, 16, 14], tcp(61_000), at(App)),
            (Outside, [10, 0, 16, 14], tcp(61_001), at(App)),
            (Outside, [10, 0, 16, 14], tcp(60_099), at(App)),
            (Far, [10, 0, 16, 14], tcp(61_000), at(App)),
            // Its answers need no security group.
            (Outside, [10, 0, 16, 14], tcp(61_003), at(Bare)),
            // Other ports and protocols are the cell's own.
            (Outside, [10, 0, 16, 14], tcp(61_099), at(Who::Cell)),
            (Outside, [10, 0, 16, 14], udp(61_000), at(Who::Cell)),
            (Who::Cell, [10, 0, 16, 14], tcp(61_000), at(Who::Cell)),
            // As between containers.
            (Bare, [10, 0, 16, 14], tcp(61_000), Refused),
            (Open, [10, 0, 16, 14], tcp(61_000), Refused),
            (App, [10, 0, 16, 14], tcp(61_000), Refused),
            // Not from the underlay.
            (Side, [10, 0, 16, 14], tcp(61_000), Refused),
        ],
    )
}

fn to_containers() -> Vec<Row> {
    let mut all = rows(
        "To a container",
        &[
            (Bare, [10, 255, 30, 2], tcp(8081), Refused),
            (Bare, [10, 255, 30, 2], udp(8081), Refused),
            (Bare, [10, 255, 30, 2], PING, Refused),
            (Bare, [10, 255, 30, 2], GRE, Refused),
            (Open, [10, 255, 30, 2], tcp(8080), Refused),
            (Outside, [10, 255, 30, 2], tcp(8080), Refused),
            (Outside, [10, 255, 30, 2], udp(8080), Refused),
            (Outside, [10, 255, 30, 2], PING, Refused),
            (Side, [10, 255, 30, 2], tcp(8080), Refused),
            (Remote, [10, 255, 30, 2], tcp(8081), Refused),
            (Remote, [10, 255, 30, 2], udp(8081), Refused),
            (Remote, [10, 255, 30, 2], PING, Refused),
        ],
    );
    all.extend(rows(
        "To another cell",
        &[
            (App, [10, 255, 40, 2], tcp(8081), Refused),
            (Open, [10, 255, 40, 2], tcp(8081), Refused),
            (Open, [10, 255, 40, 2], udp(8081), Refused),
            (Open, [10, 255, 40, 2], PING, Refused),
            (Open, [10, 255, 40, 0], tcp(22), Refused),
            // An address that no container has.
            (Open, [10, 255, 30, 99], tcp(80), Refused),
            (Outside, [10, 255, 40, 2], tcp(8081), Refused),
        ],
    ));
    all
}

/// With `disable_container_network_policy`.
pub(crate) fn without_policies() -> Vec<Row> {
    let mut all = rows(
        "To a container",
        &[
            (Bare, [10, 255, 30, 2], tcp(8081), at(App)),
            (Bare, [10, 255, 30, 2], udp(8081), at(App)),
            (Bare, [10, 255, 30, 2], PING, at(App)),
            (Bare, [10, 255, 30, 2], GRE, at(App)),
            (Remote, [10, 255, 30, 2], tcp(8081), at(App)),
            (Remote, [10, 255, 30, 2], udp(8081), at(App)),
            (Remote, [10, 255, 30, 2], PING, at(App)),
            (Outside, [10, 255, 30, 2], tcp(8080), Refused),
            (Outside, [10, 255, 30, 2], PING, Refused),
            (Side, [10, 255, 30, 2], tcp(8080), Refused),
        ],
    );
    let more = [
        ("To a mapped port", (Bare, [10, 0, 16, 14], tcp(61_000), at(App))),
        ("To a mapped port", (Side, [10, 0, 16, 14], tcp(61_000), Refused)),
        ("To another cell", (App, [10, 255, 40, 2], tcp(8081), at(Remote))),
        ("To another cell", (Bare, [10, 255, 40, 2], udp(8081), at(Remote))),
        ("To another cell", (Bare, [10, 255, 40, 2], PING, at(Remote))),
        ("To another cell", (Outside, [10, 255, 40, 2], tcp(8081), Refused)),
        ("To the cell", (Remote, [10, 255, 30, 0], tcp(22), Refused)),
        ("To the cell", (Bare, [10, 0, 16, 14], tcp(22), Refused)),
        ("To the world", (Bare, [9, 9, 9, 9], tcp(80), Refused)),
        ("To the world", (App, [9, 9, 9, 9], tcp(80), WORLD)),
    ];
    all.extend(more.iter().flat_map(|(paragraph, row)| rows(paragraph, &[*row])));
    all
}
