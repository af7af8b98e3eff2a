//! The overlay's MTU follows the underlay's while containers run, at both ends of their links; and where a path carries
//! less than the ends of a connection know, TCP learns it from the first packet.
#![expect(clippy::unwrap_used, reason = "a panic is how a test fails, in its helpers too")]

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

use serde_json::json;
use weft_testbed::external_networker::{Container, Request};
use weft_testbed::lab::Cell;
use weft_testbed::netns::Place;
use weft_testbed::prober::{ping_whole, wait_for};
use weft_testbed::{Lab, Options};

const PATIENCE: Duration = Duration::from_secs(30);
const PORT: u16 = 5202;
const BIG: usize = 3 << 20;

/// Sends much over a new connection, each way. Returns the largest segment that `from` sends, as its kernel has it.
fn transfer(from: &Place, to: &Place, addr: Ipv4Addr) -> u32 {
    let listener = to.enter(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT))).unwrap().unwrap();
    let target = SocketAddrV4::new(addr, PORT);
    let mut out = from.enter(|| TcpStream::connect_timeout(&target.into(), PATIENCE)).unwrap().unwrap();
    let (mut back, _) = listener.accept().unwrap();
    for stream in [&out, &back] {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
    }
    let one_way = |sender: &mut TcpStream, receiver: &mut TcpStream| {
        thread::scope(|scope| {
            scope.spawn(|| sender.write_all(&vec![0x57; BIG]).unwrap());
            receiver.read_exact(&mut vec![0; BIG]).unwrap();
        });
    };
    one_way(&mut out, &mut back);
    one_way(&mut back, &mut out);
    nix::sys::socket::getsockopt(&back, nix::sys::socket::sockopt::TcpMaxSeg).unwrap()
}

fn mtu(place: &Place, device: &str) -> u32 {
    let shown = place.run("ip", &["link", "show", "dev", device], "").unwrap();
    shown.split("mtu ").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap()
}

fn link(container: &Container) -> String {
    let [a, b, c, d] = container.addr.octets();
    format!("s-{a:03}{b:03}{c:03}{d:03}")
}

/// Both ends of the link, and the VTEP.
fn carries(cell: &Cell, container: &Container) -> [u32; 3] {
    [mtu(&cell.place, "silk-vtep"), mtu(&cell.place, &link(container)), mtu(&container.place, "eth0")]
}

fn set_underlay(lab: &Lab, bytes: u32) {
    for cell in &lab.cells {
        cell.place.ip(&format!("link set eth0 mtu {bytes}\n")).unwrap();
    }
}

#[test]
fn links_of_running_containers_follow_the_underlay() {
    let lab = Lab::up(&Options::unique("mtu").unwrap()).unwrap();
    let [first, second] = &lab.cells[..] else { panic!("two cells") };
    let one = first.add(&Request::app("one")).unwrap();
    let two = second.add(&Request::app("two")).unwrap();
    first.configure_plugin(json!({"mtu": 1300}).as_object().unwrap()).unwrap();
    let small = first.add(&Request::app("small")).unwrap();
    assert_eq!(carries(first, &small), [1450, 1300, 1300]);

    // Less, less than somebody asked for, and more again; with a restart of a node in between.
    for (underlay, overlay) in [(1400, 1350), (1200, 1150), (1500, 1450)] {
        set_underlay(&lab, underlay);
        if underlay == 1200 {
            first.kill_node().unwrap();
            first.start_node().unwrap();
            first.wait_ready(1, PATIENCE).unwrap();
        }
        wait_for("links follow", || {
            carries(first, &one) == [overlay; 3] && carries(second, &two) == [overlay; 3]
        });
        wait_for("as far as was asked for", || carries(first, &small)[1..] == [overlay.min(1300); 2]);
        ping_whole(&one.place, two.addr, overlay).unwrap();
        ping_whole(&one.place, two.addr, overlay + 1).unwrap_err();
        assert_eq!(transfer(&one.place, &two.place, two.addr), overlay - 52, "segments with timestamps");
        transfer(&two.place, &one.place, one.addr);
        for container in [&one, &small] {
            first.check(container).unwrap();
        }
    }
    // What is added now is as large as what was there.
    second.del("two").unwrap();
    let two = second.add(&Request::app("two")).unwrap();
    assert_eq!(carries(second, &two), [1450; 3]);
    assert_eq!(lab.complaints(&[]), Vec::<String>::new());
}

#[test]
fn a_container_that_cannot_be_reached_keeps_a_link_that_works() {
    let lab = Lab::up(&Options::unique("unreached").unwrap()).unwrap();
    let [first, second] = &lab.cells[..] else { panic!("two cells") };
    let one = first.add(&Request::app("one")).unwrap();
    let two = second.add(&Request::app("two")).unwrap();
    // The file is another container's, and the container lives on.
    let (own, other) = (first.namespace_file("one"), first.namespace_file("other"));
    first.create_namespace("other").unwrap();
    let kept = Place::clone(&one.place);
    let moved = first.namespace_file("moved");
    first.place.run("touch", &[moved.to_str().unwrap()], "").unwrap();
    let remount = format!(
        "mount --bind {own} {moved} && umount {own} && mount --bind {other} {own}",
        own = own.display(),
        other = other.display(),
        moved = moved.display()
    );
    first.place.run("sh", &["-c", &remount], "").unwrap();
    let place = first.place.container(&moved);
    drop(kept);

    set_underlay(&lab, 1400);
    wait_for("the VTEPs follow", || [first, second].iter().all(|cell| mtu(&cell.place, "silk-vtep") == 1350));
    wait_for("it is said", || !lab.complaints(&[]).is_empty());
    wait_for("who can be reached follows", || carries(second, &two) == [1350; 3]);
    assert_eq!((mtu(&first.place, &link(&one)), mtu(&place, "eth0")), (1450, 1450));
    assert_eq!(transfer(&place, &two.place, two.addr), 1350 - 52, "too much is told, and sent anew");
    transfer(&two.place, &place, one.addr);
    ping_whole(&place, two.addr, 1350).unwrap();
    ping_whole(&place, two.addr, 1351).unwrap_err();
    let said = lab.complaints(&["container's end not reached; its link keeps its MTU"]);
    assert_eq!(said, Vec::<String>::new());
}

/// A route says that less gets through than the devices on the way carry: only the cell knows it.
#[test]
fn segments_fit_a_path_that_only_the_cell_knows() {
    let lab = Lab::up(&Options::unique("clamp").unwrap()).unwrap();
    let [first, second] = &lab.cells[..] else { panic!("two cells") };
    let one = first.add(&Request::app("one")).unwrap();
    let two = second.add(&Request::app("two")).unwrap();
    assert_eq!(transfer(&one.place, &two.place, two.addr), 1450 - 52);
    let [a, b, c, _] = two.addr.octets();
    let base = format!("{a}.{b}.{c}.0");
    let narrow = format!("route replace {}/32 via {base} dev silk-vtep mtu 1234\n", two.addr);
    first.place.ip(&narrow).unwrap();
    assert_eq!(transfer(&one.place, &two.place, two.addr), 1234 - 52, "what two sends");
}

/// The node's property counts the packet on the underlay.
#[test]
fn the_property_counts_the_outer_packet_and_never_more_than_fits() {
    let mut options = Options { cells: 2, ..Options::unique("outer").unwrap() };
    options.node.insert("mtu".into(), 1400.into());
    options.only.insert("cell2".into(), json!({"mtu": 9000}).as_object().unwrap().clone());
    let lab = Lab::up(&options).unwrap();
    let [first, second] = &lab.cells[..] else { panic!("two cells") };
    let one = first.add(&Request::app("one")).unwrap();
    let two = second.add(&Request::app("two")).unwrap();
    assert_eq!(carries(first, &one), [1350; 3]);
    assert_eq!(carries(second, &two), [1450; 3]);
    assert_eq!(
        lab.complaints(&["mtu is more than the underlay carries; less is used"]),
        Vec::<String>::new()
    );
}
