//! The wire: generated messages, and the only conversions between them and `weft-model`.
#![forbid(unsafe_code)]

pub mod convert;
pub mod status;

/// Messages and stubs of `controller.proto`.
#[expect(clippy::allow_attributes, clippy::clone_on_ref_ptr, reason = "generated")]
pub mod controller {
    tonic::include_proto!("weft.controller.v1");
}

/// Messages and stubs of `node.proto`.
#[expect(clippy::allow_attributes, clippy::clone_on_ref_ptr, reason = "generated")]
pub mod node {
    tonic::include_proto!("weft.node.v1");
}
