//! Golden lines. The decisions, addresses, guids and times are those of the samples in silk's documentation of its
//! traffic logs, as iptables-logger wrote them.

use super::*;
use serde_json::{Value, json};
use weft_model::address::OverlayAddr;
use weft_model::container::Owner;
use weft_model::link;
use weft_model::traffic::{Packet, Protocol};

use crate::directory::tests::container;

const SENDER: Ipv4Addr = Ipv4Addr::new(10, 255, 73, 3);
const RECEIVER: Ipv4Addr = Ipv4Addr::new(10, 255, 73, 2);

fn writer(timestamps: Timestamps) -> Writer {
    let host = Host {
        addr: "10.0.16.15".parse().expect("address"),
        guid: "0455ec2b-11fa-41ab-9d1c-f3a575cd55ea".into(),
    };
    Writer { host, timestamps }
}

fn who(handle: &str) -> Container {
    let owner = Owner {
        app_id: "bc6f229d-5e4a-4c41-a63f-e8795496c283".into(),
        space_id: "b9f86312-a7d7-4bcf-b70f-a440436c210b".into(),
        org_id: "604bd59e-4139-4734-a3be-4e97836eb790".into(),
        container_workload: "app".into(),
        policy_group_id: "bc6f229d-5e4a-4c41-a63f-e8795496c283".into(),
        ..Owner::default()
    };
    let handle = handle.parse().expect("handle");
    Container { handle, ..container([10, 255, 30, 2].into(), owner) }
}

fn sender() -> Container {
    who("bfce786c-ab07-40ad-79f9-8f21")
}

fn at(seconds: u64, nanos: u32) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::new(seconds, nanos)
}

fn tcp(destination: Ipv4Addr, source_port: u16, destination_port: u16) -> Packet {
    Packet {
        source: SENDER,
        destination,
        protocol: Protocol::TCP,
        length: 60,
        source_port: Some(source_port),
        destination_port: Some(destination_port),
        icmp_kind: None,
        icmp_code: None,
    }
}

fn record(decision: Decision, at: SystemTime, packet: Packet) -> Record {
    let to_container = packet.destination == RECEIVER;
    let outgoing = if to_container { link::index(OverlayAddr::new(RECEIVER)) } else { 2 };
    let incoming = Some(link::index(OverlayAddr::new(SENDER)));
    // As a container of this cell sends it.
    let mark = ALLOWED | Turn::Second.mark() | 1;
    Record { decision, at, incoming, outgoing: Some(outgoing), mark, packet }
}

/// The lines that silk's documentation shows, but for the white space.
#[test]
fn lines_are_those_of_iptables_logger() {
    let party = |handle: &str| {
        format!(
            r#"{{"container_id":"{handle}","app_guid":"bc6f229d-5e4a-4c41-a63f-e8795496c283","space_guid":"b9f86312-a7d7-4bcf-b70f-a440436c210b","organization_guid":"604bd59e-4139-4734-a3be-4e97836eb790","host_ip":"10.0.16.15","host_guid":"0455ec2b-11fa-41ab-9d1c-f3a575cd55ea"}}"#
        )
    };
    let source = format!(r#""source":{}"#, party("bfce786c-ab07-40ad-79f9-8f21"));
    let destination = format!(r#""destination":{}"#, party("d5978989-1401-49ff-46cd-33e5"));
    let packet = |direction: &str, allowed: bool, to: &str, from_port: u16, port: u16| {
        format!(
            r#""packet":{{"direction":"{direction}","allowed":{allowed},"src_ip":"10.255.73.3","dst_ip":"{to}","src_port":{from_port},"dst_port":{port},"protocol":"TCP","mark":"0x1","icmp_type":0,"icmp_code":0}}"#
        )
    };
    let world = Ipv4Addr::new(8, 8, 8, 8);
    for (decision, (seconds, nanos), rfc, to, ports, kind, data) in [
        (
            Decision::Allowed,
            (1_500_923_950, 331_232_071),
            "2017-07-24T19:19:10.331232071Z",
            world,
            (51858, 80),
            "egress-allowed",
            format!("{},{source}", packet("egress", true, "8.8.8.8", 51858, 80)),
        ),
        (
            Decision::Denied,
            (1_500_923_712, 879_277_706),
            "2017-07-24T19:15:12.879277706Z",
            Ipv4Addr::new(10, 10, 10, 10),
            (36296, 80),
            "egress-denied",
            format!("{},{source}", packet("egress", false, "10.10.10.10", 36296, 80)),
        ),
        (
            Decision::AllowedC2c,
            (1_500_924_070, 182_554_722),
            "2017-07-24T19:21:10.182554722Z",
            RECEIVER,
            (46936, 8080),
            "ingress-allowed",
            format!("{destination},{}", packet("ingress", true, "10.255.73.2", 46936, 8080)),
        ),
        (
            Decision::DeniedC2c,
            (1_500_924_111, 467_581_511),
            "2017-07-24T19:21:51.467581511Z",
            RECEIVER,
            (37366, 8081),
            "ingress-denied",
            format!("{destination},{}", packet("ingress", false, "10.255.73.2", 37366, 8081)),
        ),
    ] {
        let record = record(decision, at(seconds, nanos), tcp(to, ports.0, ports.1));
        let of = if to == RECEIVER { who("d5978989-1401-49ff-46cd-33e5") } else { sender() };
        assert_eq!(
            writer(Timestamps::Deprecated).decided(&record, Some(&of), None, None),
            format!(
                r#"{{"timestamp":"{seconds}.{nanos:09}","source":"cfnetworking.iptables","message":"cfnetworking.iptables.{kind}","log_level":1,"data":{{{data}}}}}"#
            ) + "\n"
        );
        assert_eq!(
            writer(Timestamps::Rfc3339).decided(&record, Some(&of), None, None),
            format!(
                r#"{{"timestamp":"{rfc}","level":"info","source":"cfnetworking.iptables","message":"cfnetworking.iptables.{kind}","data":{{{data}}}}}"#
            ) + "\n"
        );
    }
}

fn parsed(line: &str) -> Value {
    assert!(line.ends_with("}\n") && line.matches('\n').count() == 1, "{line}");
    serde_json::from_str(line).expect("JSON")
}

/// Between containers both ends are told: all of one of this cell, and of another's what the packet's mark says.
#[test]
fn a_sender_is_told_as_far_as_it_is_known() {
    let record = record(Decision::AllowedC2c, at(0, 0), tcp(RECEIVER, 40000, 8080));
    let (receiver, sent) = (who("receiver"), sender());
    let app = "app-2".parse().expect("an app");
    let line = |sender| {
        parsed(&writer(Timestamps::Rfc3339).decided(&record, Some(&receiver), sender, None))["data"].take()
    };
    let own = line(Some(Sender::Container(&sent)));
    assert_eq!(own["source"]["container_id"], "bfce786c-ab07-40ad-79f9-8f21");
    assert_eq!(own["source"]["host_ip"], own["destination"]["host_ip"]);
    let remote = line(Some(Sender::App(&app)));
    let empty = json!({"container_id": "", "app_guid": "app-2", "space_guid": "", "organization_guid": ""});
    assert_eq!(remote["source"], empty);
    let unknown = line(None);
    assert_eq!((unknown.get("source"), &unknown["destination"]), (None, &remote["destination"]));
}

#[test]
fn what_is_not_known_is_empty_and_0() {
    let packet = Packet {
        protocol: Protocol(47),
        source_port: None,
        destination_port: None,
        ..tcp(Ipv4Addr::new(8, 8, 8, 8), 0, 0)
    };
    let record = Record { mark: 0, ..record(Decision::Denied, at(0, 0), packet) };
    let line = parsed(&writer(Timestamps::Rfc3339).decided(&record, None, None, None));
    assert_eq!(line["timestamp"], "1970-01-01T00:00:00.000000000Z");
    assert_eq!(
        line["data"],
        json!({
            "packet": {
                "direction": "egress", "allowed": false, "src_ip": "10.255.73.3", "dst_ip": "8.8.8.8", "src_port": 0,
                "dst_port": 0, "protocol": "47", "mark": "", "icmp_type": 0, "icmp_code": 0,
            },
            "source": {
                "container_id": "", "app_guid": "", "space_guid": "", "organization_guid": "",
                "host_ip": "10.0.16.15", "host_guid": "0455ec2b-11fa-41ab-9d1c-f3a575cd55ea",
            },
        })
    );
}

#[test]
fn icmp_has_kind_and_code() {
    let packet = Packet {
        protocol: Protocol::ICMP,
        source_port: None,
        destination_port: None,
        icmp_kind: Some(8),
        icmp_code: Some(3),
        ..tcp(Ipv4Addr::new(8, 8, 8, 8), 0, 0)
    };
    let record = Record { mark: 0xffff_0000, ..record(Decision::Allowed, at(0, 0), packet) };
    let line = parsed(&writer(Timestamps::Rfc3339).decided(&record, None, None, None));
    let packet = &line["data"]["packet"];
    assert_eq!((&packet["protocol"], &packet["mark"]), (&json!("ICMP"), &json!("0xffff0000")));
    assert_eq!((&packet["icmp_type"], &packet["icmp_code"]), (&json!(8), &json!(3)));
}

#[test]
fn the_rule_that_decided_is_named() {
    let rule = |decision, known: Option<&str>| {
        let record = record(decision, at(0, 0), tcp(Ipv4Addr::new(8, 8, 8, 8), 1, 2));
        let line =
            writer(Timestamps::Rfc3339).decided(&record, Some(&sender()), None, known.map(ToOwned::to_owned));
        let line = parsed(&line);
        assert_eq!(line["data"]["packet"]["allowed"], json!(decision == Decision::Allowed));
        line["data"].get("rule").map(|rule| rule.as_str().expect("text").to_owned())
    };
    assert_eq!(rule(Decision::Allowed, None), None);
    assert_eq!(rule(Decision::Allowed, Some("8.8.8.8 tcp 80")).as_deref(), Some("8.8.8.8 tcp 80"));
    assert_eq!(rule(Decision::Denied, Some("deny \"x\"\n")).as_deref(), Some("deny \"x\"\n"));
    assert_eq!(rule(Decision::Limited, None).as_deref(), Some("outbound connection rate"));
    assert_eq!(rule(Decision::WouldLimit, None).as_deref(), Some("outbound connection rate (dry run)"));
    assert_eq!(rule(Decision::WouldLimit, Some("2 per second")).as_deref(), Some("2 per second (dry run)"));
}

#[test]
fn lines_of_what_has_none() {
    let writer = writer(Timestamps::Rfc3339);
    let mut lines = String::new();
    for decision in [Decision::Denied, Decision::WouldLimit, Decision::DeniedC2c] {
        let suppressed = Suppressed { container: SENDER, decision, count: 41 };
        let line = parsed(&writer.suppressed(suppressed, Some(&sender()), at(1, 0)));
        let data = line["data"].as_object().expect("object");
        let party = data.get(if decision == Decision::DeniedC2c { "destination" } else { "source" });
        assert_eq!(party.expect("a container")["container_id"], "bfce786c-ab07-40ad-79f9-8f21");
        lines += &format!("{} {}\n", line["message"].as_str().expect("text"), data["suppressed"]);
    }
    assert_eq!(
        lines,
        r#"cfnetworking.iptables.egress-suppressed {"direction":"egress","allowed":false,"decision":"denied","count":41}
cfnetworking.iptables.egress-suppressed {"direction":"egress","allowed":false,"decision":"would-limit","count":41}
cfnetworking.iptables.ingress-suppressed {"direction":"ingress","allowed":false,"decision":"denied-c2c","count":41}
"#
        .lines()
        .map(|line| {
            // serde_json's own maps are in the order of their keys.
            let (message, object) = line.split_once(' ').expect("two words");
            let object: Value = serde_json::from_str(object).expect("JSON");
            format!("{message} {object}\n")
        })
        .collect::<String>()
    );
    assert_eq!(
        writer.lost(Lost { kernel: 1, queue: 2, file: 3 }, at(1, 5)),
        concat!(
            r#"{"timestamp":"1970-01-01T00:00:01.000000005Z","level":"info","source":"cfnetworking.iptables","#,
            r#""message":"cfnetworking.iptables.lost","data":{"lost":{"kernel":1,"queue":2,"file":3}}}"#,
            "\n"
        )
    );
}

/// From a calendar.
#[test]
fn dates_are_the_calendars() {
    for (seconds, text) in [
        (0, "1970-01-01T00:00:00"),
        (86_399, "1970-01-01T23:59:59"),
        (68_169_599, "1972-02-28T23:59:59"),
        (68_169_600, "1972-02-29T00:00:00"),
        (951_782_400, "2000-02-29T00:00:00"),
        (951_868_800, "2000-03-01T00:00:00"),
        (1_709_164_800, "2024-02-29T00:00:00"),
        (1_735_689_599, "2024-12-31T23:59:59"),
        (4_107_542_400, "2100-03-01T00:00:00"),
        (253_402_300_799, "9999-12-31T23:59:59"),
    ] {
        assert_eq!(rfc3339(at(seconds, 0)), format!("{text}.000000000Z"));
    }
}

/// Each day's date follows the date of the day before, for 800 years.
#[test]
fn every_day_follows_the_one_before() {
    let mut before = date(0);
    for days in 1..292_194 {
        let (year, month, day) = before;
        let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
        let last = match month {
            2 => 28 + u64::from(leap),
            4 | 6 | 9 | 11 => 30,
            _ => 31,
        };
        let next = match (month, day == last) {
            (_, false) => (year, month, day + 1),
            (12, true) => (year + 1, 1, 1),
            (_, true) => (year, month + 1, 1),
        };
        before = date(days);
        assert_eq!(before, next);
    }
}
