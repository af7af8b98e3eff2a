//! The wire: generated messages, and the only conversions between them and `weft-model`.
#![forbid(unsafe_code)]

/// Messages and stubs of `controller.proto`.
#[expect(
    clippy::all,
    clippy::allow_attributes,
    unreachable_pub,
    missing_debug_implementations,
    reason = "generated"
)]
pub mod controller {
    tonic::include_proto!("weft.controller.v1");
}

/// Messages and stubs of `node.proto`.
#[expect(
    clippy::all,
    clippy::allow_attributes,
    unreachable_pub,
    missing_debug_implementations,
    reason = "generated"
)]
pub mod node {
    tonic::include_proto!("weft.node.v1");
}
