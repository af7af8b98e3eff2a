//! Three cells, six containers: all of them reach each other, whole packets, true sources.
#![expect(clippy::unwrap_used, reason = "a panic is how a test fails, in its helpers too")]

use std::net::SocketAddrV4;

use weft_testbed::external_networker::{Container, ECHO_PORT, Request};
use weft_testbed::lab::UNDERLAY_MTU;
use weft_testbed::{Lab, Options, prober};

/// What VXLAN over IPv4 leaves of the underlay's packets.
const OVERLAY_MTU: u32 = UNDERLAY_MTU - 50;

fn world(purpose: &str) -> (Lab, Vec<Container>) {
    let mut options = Options::unique(purpose).unwrap();
    options.cells = 3;
    let lab = Lab::up(&options).unwrap();
    let mut containers = Vec::new();
    for cell in &lab.cells {
        for letter in ["a", "b"] {
            let container = cell.add(&Request::app(&format!("{letter}-on-{}", cell.name))).unwrap();
            cell.serve(&container).unwrap();
            containers.push(container);
        }
    }
    (lab, containers)
}

#[test]
fn every_container_reaches_every_other() {
    let (lab, containers) = world("reach");
    let pairs = prober::matrix(&containers);
    assert_eq!(pairs.len(), 30);
    for pair in &pairs {
        let (from, to) = (&containers[pair.from], &containers[pair.to]);
        // The matrix also compares the source that the peer sees with the container's own address.
        assert!(pair.reached(), "{} to {}: {pair:?}", from.handle, to.handle);
        prober::ping_whole(&from.place, to.addr, OVERLAY_MTU).unwrap();
    }
    // A neighbour on the same cell, and one on another.
    for to in &containers[1..3] {
        let larger =
            prober::ping_whole(&containers[0].place, to.addr, OVERLAY_MTU + 1).unwrap_err().to_string();
        assert!(larger.contains("too long"), "one byte more is refused at once: {larger}");
    }
    assert_eq!(lab.complaints(&[]), Vec::<String>::new());
}

#[test]
fn a_cell_reaches_its_own_containers_and_those_of_others() {
    let (lab, containers) = world("cells");
    for cell in &lab.cells {
        for container in &containers {
            prober::tcp(&cell.place, SocketAddrV4::new(container.addr, ECHO_PORT)).unwrap();
        }
    }
}

#[test]
fn a_deleted_container_is_gone_and_the_others_stay() {
    let (lab, containers) = world("deleted");
    let (gone, rest) = containers.split_first().unwrap();
    let cell = lab.cell(&gone.cell).unwrap();
    cell.check(gone).unwrap();
    cell.del(&gone.handle).unwrap();
    cell.del(&gone.handle).unwrap();
    prober::tcp(&rest[0].place, SocketAddrV4::new(gone.addr, ECHO_PORT)).unwrap_err();
    assert!(prober::matrix(rest).iter().all(prober::Pair::reached));
    let listed = cell.status().unwrap()["containers"].to_string();
    assert!(!listed.contains(&gone.handle), "{listed}");
    assert_eq!(lab.complaints(&[]), Vec::<String>::new());
}
