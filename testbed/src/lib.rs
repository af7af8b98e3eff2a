//! Worlds for demo, tests and measurements: cells as network and mount namespaces on an underlay of their own,
//! a certificate authority, a scratch Postgres, real controllers and nodes, a CNI client that behaves like
//! garden-external-networker, and probes that send real packets. Nothing here touches the machine's own
//! network namespace; all files are on a private mount below `/run/weft-lab`.

pub mod dice;
pub mod external_networker;
pub mod foundation;
pub mod interrupt;
pub mod lab;
pub mod netns;
pub mod pki;
pub mod policy_server;
pub mod postgres;
pub mod prober;
pub mod process;

pub use lab::{Lab, Options, Store};
