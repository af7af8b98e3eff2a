//! Reasons on the wire: `google.rpc.ErrorInfo` beside the status code, so that nobody reads messages by text.

use std::collections::HashMap;

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};
use weft_model::reason::{Reason, Rpc};

const DOMAIN: &str = "weft";

/// The status of a reason: its code from the table, its name and fields as ErrorInfo, its text as message.
pub fn to_status(reason: &Reason) -> Status {
    let code = match reason.meaning().rpc {
        Rpc::InvalidArgument => Code::InvalidArgument,
        Rpc::DeadlineExceeded => Code::DeadlineExceeded,
        Rpc::NotFound => Code::NotFound,
        Rpc::AlreadyExists => Code::AlreadyExists,
        Rpc::PermissionDenied => Code::PermissionDenied,
        Rpc::ResourceExhausted => Code::ResourceExhausted,
        Rpc::FailedPrecondition => Code::FailedPrecondition,
        Rpc::Internal => Code::Internal,
        Rpc::Unavailable => Code::Unavailable,
    };
    // A reason is a tag and fields of text, so it serialises to a flat object of strings.
    let mut fields: HashMap<String, String> =
        serde_json::to_value(reason).and_then(serde_json::from_value).unwrap_or_default();
    let name = fields.remove("reason").unwrap_or_default();
    Status::with_error_details(code, reason.to_string(), ErrorDetails::with_error_info(name, DOMAIN, fields))
}

/// The reason that the other side gave; none if the status came from somewhere else, such as the transport.
pub fn reason_of(status: &Status) -> Option<Reason> {
    let given = status.get_details_error_info().filter(|given| given.domain == DOMAIN)?;
    let mut fields = given.metadata;
    fields.insert("reason".into(), given.reason);
    serde_json::to_value(fields).and_then(serde_json::from_value).ok()
}
