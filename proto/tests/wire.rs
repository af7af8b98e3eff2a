//! Whatever bytes arrive, they become a value or a reason; and what is sent arrives as it was.

use std::num::{NonZeroU16, NonZeroU32};
use std::sync::Arc;

use ipnetwork::Ipv4Network;
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use prost::Message;
use weft_model::container::PortMapping;
use weft_model::profile::{
    ConnectionRate, DenyNetworks, HostService, OutboundConnections, Settings, Transport,
};
use weft_model::reason::Reason;
use weft_proto::{controller, convert, node, status};

fn text() -> impl Strategy<Value = String> {
    "[ -~]{0,40}"
}

/// One of every shape that a reason has: no field, one, two, three.
fn reason() -> impl Strategy<Value = Reason> {
    prop_oneof![
        Just(Reason::Starting),
        Just(Reason::StoreUnavailable),
        text().prop_map(|holder| Reason::LeaseConflict { holder }),
        (any::<u16>(), text()).prop_map(|(port, holder)| Reason::HostPortTaken { port, holder }),
        (text(), text()).prop_map(|(field, why)| Reason::InvalidField { field, why }),
        (text(), text()).prop_map(|(claimed, seen)| Reason::NotYours { claimed, seen }),
        (text(), text(), text()).prop_map(|(operation, subject, why)| Reason::Kernel {
            operation,
            subject,
            why
        }),
    ]
}

fn network() -> impl Strategy<Value = Ipv4Network> {
    (any::<u32>(), 0..=32u8).prop_map(|(bits, prefix)| {
        let given = Ipv4Network::new(bits.into(), prefix).expect("prefix");
        Ipv4Network::new(given.network(), prefix).expect("prefix")
    })
}

fn settings() -> impl Strategy<Value = Settings> {
    let service = (any::<bool>(), any::<u32>(), any::<NonZeroU16>()).prop_map(|(tcp, addr, port)| {
        HostService { transport: if tcp { Transport::Tcp } else { Transport::Udp }, addr: addr.into(), port }
    });
    let networks = || vec(network(), 0..3);
    let deny = (networks(), networks(), networks()).prop_map(|(always, running, staging)| DenyNetworks {
        always,
        running,
        staging,
    });
    let rate = (any::<NonZeroU32>(), any::<NonZeroU32>(), any::<bool>(), any::<bool>())
        .prop_map(|(burst, per_sec, dry_run, log)| ConnectionRate { burst, per_sec, dry_run, log });
    let outbound = (option::of(rate), option::of(any::<NonZeroU32>()))
        .prop_map(|(rate, max)| OutboundConnections { rate, max });
    let lists = (vec(any::<u32>().prop_map(Into::into), 0..3), vec(service, 0..3), deny, outbound);
    let numbers = (any::<NonZeroU32>(), any::<NonZeroU32>());
    (lists, option::of(network()), numbers, any::<(bool, bool)>()).prop_map(
        |((dns_servers, host_services, deny_networks, outbound_connections), no_masquerade, logs, flags)| {
            Settings {
                dns_servers,
                host_services,
                deny_networks,
                outbound_connections,
                no_masquerade,
                log_all: flags.0,
                denied_logs_per_sec: logs.0,
                accepted_udp_logs_per_sec: logs.1,
                deny_cloud_metadata: flags.1,
            }
        },
    )
}

fn request() -> node::AddRequest {
    node::AddRequest { handle: "h".into(), interface: "eth0".into(), ..Default::default() }
}

proptest! {
    #[test]
    fn what_is_asked_for_arrives_as_it_was(
        settings in settings(), ports in vec(any::<(NonZeroU16, NonZeroU16)>(), 0..5), rules in vec(any::<u8>(), 0..20),
    ) {
        let mut ports: Vec<_> = ports.into_iter().map(|(host, container)| PortMapping { host, container }).collect();
        ports.sort_unstable();
        ports.dedup_by_key(|mapping| mapping.host);
        let request = node::AddRequest {
            ports: convert::ports_to(&ports),
            settings: Some(convert::settings_to(&settings)),
            net_out_rules: rules.clone(),
            ..request()
        };
        let sent = node::AddRequest::decode(request.encode_to_vec().as_slice()).expect("encoded");
        let asked = convert::asked_from(sent).expect("valid");
        prop_assert_eq!((&asked.settings, &asked.net_out_rules), (&settings, &rules));
        let wanted = convert::wanted(asked, Arc::default());
        prop_assert_eq!(wanted.ports, ports);
    }

    #[test]
    fn a_reason_arrives_as_it_was_sent(reason in reason()) {
        let status = status::to_status(&reason);
        prop_assert_eq!(status.message(), reason.to_string());
        prop_assert_eq!(status::reason_of(&status), Some(reason));
    }

    #[test]
    fn any_bytes_become_a_value_or_a_reason(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        if let Ok(message) = controller::WatchResponse::decode(bytes.as_slice()) {
            let _: Result<_, Reason> = convert::changes_from(message);
        }
        if let Ok(message) = controller::Cell::decode(bytes.as_slice()) {
            let _: Result<_, Reason> = convert::cell_from(message);
        }
        if let Ok(message) = node::AddRequest::decode(bytes.as_slice()) {
            let _: Result<_, Reason> = convert::asked_from(message).map(drop);
        }
    }

    #[test]
    fn any_lease_becomes_a_value_or_a_reason_and_goes_back(subnet: u32, prefix in 0u32..300, mac in proptest::collection::vec(any::<u8>(), 0..8)) {
        let underlay = convert::underlay_from(0x0a00_0001).expect("10.0.0.1");
        let message = controller::Lease { subnet, prefix, mac };
        if let Ok(lease) = convert::lease_from(underlay, &message) {
            prop_assert_eq!(convert::lease_to(&lease), message);
        }
    }
}

#[test]
fn a_status_of_somebody_else_has_no_reason() {
    assert_eq!(status::reason_of(&tonic::Status::unavailable("transport error")), None);
}

#[test]
fn a_wrong_field_is_named() {
    let cell =
        controller::Cell { underlay: 0x0a00_0001, cell_id: String::new(), boot_id: String::new(), wants: 0 };
    let named = |result: Result<_, Reason>| match result {
        Err(Reason::InvalidField { field, .. }) => field,
        other => panic!("{other:?}"),
    };
    assert_eq!(named(convert::cell_from(cell.clone())), "cell_id");
    assert_eq!(
        named(convert::cell_from(controller::Cell { underlay: 0, cell_id: "c".into(), ..cell.clone() })),
        "underlay"
    );
    assert_eq!(
        named(convert::cell_from(controller::Cell { wants: 9, cell_id: "c".into(), ..cell })),
        "wants"
    );
}

#[test]
fn a_wrong_field_of_a_container_is_named() {
    let valid = convert::settings_to(&Settings::default());
    let network = |address: u32, prefix| vec![node::Network { address, prefix }];
    let with_settings = |change: &dyn Fn(&mut node::Settings)| {
        let mut settings = valid.clone();
        change(&mut settings);
        node::AddRequest { settings: Some(settings), ..request() }
    };
    let with_ports = |ports: &[(u32, u32)]| {
        let ports =
            ports.iter().map(|(host, container)| node::PortMapping { host: *host, container: *container });
        node::AddRequest { ports: ports.collect(), ..request() }
    };
    let service = |transport, port| vec![node::HostService { transport, address: 1, port }];
    let rate = |burst, per_sec| node::OutboundConnections {
        rate: Some(node::ConnectionRate { burst, per_sec, ..Default::default() }),
        max: 0,
    };
    assert!(convert::asked_from(request()).is_ok_and(|asked| asked.settings == Settings::default()));
    for (wrong, expected) in [
        (node::AddRequest { handle: "-".into(), ..request() }, "handle"),
        (node::AddRequest { interface: "a/b".into(), ..request() }, "interface"),
        (with_ports(&[(0, 1)]), "ports.host"),
        (with_ports(&[(65_536, 1)]), "ports.host"),
        (with_ports(&[(1, 0)]), "ports.container"),
        (with_ports(&[(1, 1), (2, 1), (1, 2)]), "ports.host"),
        (with_settings(&|s| s.host_services = service(2, 1)), "settings.host_services.transport"),
        (with_settings(&|s| s.host_services = service(0, 0)), "settings.host_services.port"),
        (with_settings(&|s| s.denied_logs_per_sec = 0), "settings.denied_logs_per_sec"),
        (with_settings(&|s| s.accepted_udp_logs_per_sec = 0), "settings.accepted_udp_logs_per_sec"),
        (with_settings(&|s| s.no_masquerade = network(0, 33).pop()), "settings.no_masquerade"),
        (with_settings(&|s| s.no_masquerade = network(1, 24).pop()), "settings.no_masquerade"),
        (
            with_settings(&|s| s.deny_networks.as_mut().expect("there").running = network(0, 300)),
            "settings.deny_networks.running",
        ),
        (
            with_settings(&|s| s.outbound_connections = Some(rate(0, 1))),
            "settings.outbound_connections.rate.burst",
        ),
        (
            with_settings(&|s| s.outbound_connections = Some(rate(1, 0))),
            "settings.outbound_connections.rate.per_sec",
        ),
    ] {
        match convert::asked_from(wrong) {
            Err(Reason::InvalidField { field, .. }) => assert_eq!(field, expected),
            other => panic!("{expected}: {other:?}"),
        }
    }
}
