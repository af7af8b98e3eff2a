//! Whatever bytes arrive, they become a value or a reason; and what is sent arrives as it was.

use proptest::prelude::*;
use prost::Message;
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

proptest! {
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
            let _: Result<_, Reason> = convert::wanted_from(message);
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
