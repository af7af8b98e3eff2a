//! What can go wrong, and who acts on it: one total table for all programs.
//!
//! A failure gets its reason where it is first understood. Hops add context but never change the reason, and code
//! branches on nothing finer than [`Class`]. docs/operating.md carries the same table for people; a test compares.

use serde::{Deserialize, Serialize};

/// Why something was not done. The message says what happened to what; where a person can mend it, it says how.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(tag = "reason")]
pub enum Reason {
    #[error("environment variable {name}: {why}")]
    InvalidEnvironment { name: String, why: String },
    #[error("cannot read the configuration from standard input: {why}")]
    UnreadableInput { why: String },
    #[error("the configuration on standard input is not the JSON it should be: {why}")]
    InvalidJson { why: String },
    #[error("field {field}: {why}")]
    InvalidField { field: String, why: String },
    #[error(
        "incompatible CNI versions: the configuration asks for `{given}`, this plugin supports {supported}"
    )]
    CniVersionUnsupported { given: String, supported: String },
    #[error("field {field} with value {value} is not supported")]
    FieldUnsupported { field: String, value: String },

    #[error("network namespace {path} is gone: {why}")]
    NamespaceGone { path: String, why: String },
    #[error("{path} is not a network namespace")]
    NamespaceWrongKind { path: String },
    #[error("{path} is the cell's own network namespace, not a container's")]
    NamespaceIsCells { path: String },
    #[error("container {handle} is not known here")]
    UnknownContainer { handle: String },
    #[error("container {handle} is damaged: {what}; delete and add it again")]
    Damaged { handle: String, what: String },

    #[error("container {handle} has been added before; delete it first")]
    AlreadyAdded { handle: String },
    #[error("interface {interface} exists in the container's namespace already")]
    InterfaceTaken { interface: String },
    #[error(
        "port {port} of the cell is taken by container {holder}; delete that one first, or map another port"
    )]
    HostPortTaken {
        #[serde(with = "as_text")]
        port: u16,
        holder: String,
    },
    #[error("no free address in {subnet}: every one is in use or still being cleaned up")]
    SubnetFull { subnet: String },

    #[error("no free subnet in {network}: raise the network's size, shorten leases or release unused ones")]
    PoolExhausted { network: String },
    #[error(
        "the lease is held by another cell ({holder}); give this machine another address, or release that lease"
    )]
    LeaseConflict { holder: String },
    #[error("the certificate speaks for {seen}, not for {claimed}")]
    NotYours { claimed: String, seen: String },
    #[error("the certificate has none of the names that may do this: {wanted}")]
    WrongRole { wanted: String },
    #[error("the lease database is not available")]
    StoreUnavailable,
    #[error("the outcome of a change to the lease database is not known yet; asking again is safe")]
    CommitUnknown,
    #[error(
        "the lease table is being put together again after a loss of the database; no new subnets until then"
    )]
    Reconciling,
    #[error("no controller answers: {why}")]
    ControllerAway { why: String },

    #[error("this cell has no lease yet: {why}")]
    NoLeaseYet { why: String },
    #[error("the node daemon is starting")]
    Starting,
    #[error("the node daemon has too many calls in hand")]
    Busy,
    #[error("not done in time: {operation}")]
    Deadline { operation: String },
    #[error("the node daemon does not answer at {socket}: {why}")]
    DaemonAway { socket: String, why: String },

    #[error("{operation} {subject}: {why}")]
    Kernel { operation: String, subject: String, why: String },
    #[error("{operation} {path}: {why}")]
    File { operation: String, path: String, why: String },
    #[error("a bug in weft: {invariant}")]
    Bug { invariant: String },
}

/// What a caller does next. Nothing branches on more than this.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Class {
    /// Ask again later, unchanged.
    Retry,
    /// Asking again unchanged is of no use.
    Refused,
    /// As refused, and this cell must not add containers until a person has acted.
    Fenced,
}

/// How loud the one who handles it logs it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Level {
    Info,
    Warn,
    Error,
}

/// The gRPC status codes in use (google.rpc.Code).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Rpc {
    InvalidArgument = 3,
    DeadlineExceeded = 4,
    NotFound = 5,
    AlreadyExists = 6,
    PermissionDenied = 7,
    ResourceExhausted = 8,
    FailedPrecondition = 9,
    Internal = 13,
    Unavailable = 14,
}

/// A row of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Meaning {
    /// CNI error code: below 100 as the CNI specification has it, from 100 our own.
    pub cni: u32,
    pub rpc: Rpc,
    pub class: Class,
    pub level: Level,
}

impl Reason {
    pub fn meaning(&self) -> Meaning {
        use Class::{Fenced, Refused, Retry};
        use Level::{Error, Info, Warn};
        let row = |cni, rpc, class, level| Meaning { cni, rpc, class, level };
        match self {
            Self::InvalidEnvironment { .. } => row(4, Rpc::InvalidArgument, Refused, Info),
            Self::UnreadableInput { .. } => row(5, Rpc::InvalidArgument, Refused, Info),
            Self::InvalidJson { .. } => row(6, Rpc::InvalidArgument, Refused, Info),
            Self::InvalidField { .. } => row(7, Rpc::InvalidArgument, Refused, Info),
            Self::CniVersionUnsupported { .. } => row(1, Rpc::InvalidArgument, Refused, Info),
            Self::FieldUnsupported { .. } => row(2, Rpc::InvalidArgument, Refused, Info),
            Self::NamespaceGone { .. } => row(3, Rpc::FailedPrecondition, Refused, Info),
            Self::NamespaceWrongKind { .. } => row(4, Rpc::FailedPrecondition, Refused, Info),
            Self::NamespaceIsCells { .. } => row(8, Rpc::FailedPrecondition, Refused, Warn),
            Self::UnknownContainer { .. } => row(3, Rpc::NotFound, Refused, Info),
            Self::Damaged { .. } => row(106, Rpc::FailedPrecondition, Refused, Warn),
            Self::AlreadyAdded { .. } => row(100, Rpc::AlreadyExists, Refused, Warn),
            Self::HostPortTaken { .. } => row(101, Rpc::AlreadyExists, Refused, Warn),
            Self::InterfaceTaken { .. } => row(102, Rpc::AlreadyExists, Refused, Warn),
            Self::SubnetFull { .. } => row(103, Rpc::ResourceExhausted, Refused, Error),
            Self::PoolExhausted { .. } => row(103, Rpc::ResourceExhausted, Refused, Error),
            Self::LeaseConflict { .. } => row(105, Rpc::AlreadyExists, Fenced, Error),
            Self::NotYours { .. } => row(104, Rpc::PermissionDenied, Refused, Warn),
            Self::WrongRole { .. } => row(104, Rpc::PermissionDenied, Refused, Warn),
            Self::StoreUnavailable => row(11, Rpc::Unavailable, Retry, Warn),
            Self::CommitUnknown => row(11, Rpc::Unavailable, Retry, Warn),
            Self::Reconciling => row(11, Rpc::Unavailable, Retry, Warn),
            Self::ControllerAway { .. } => row(11, Rpc::Unavailable, Retry, Warn),
            Self::NoLeaseYet { .. } => row(11, Rpc::Unavailable, Retry, Warn),
            Self::Starting => row(11, Rpc::Unavailable, Retry, Info),
            Self::Busy => row(11, Rpc::Unavailable, Retry, Warn),
            Self::Deadline { .. } => row(11, Rpc::DeadlineExceeded, Retry, Warn),
            Self::DaemonAway { .. } => row(11, Rpc::Unavailable, Retry, Warn),
            Self::Kernel { .. } => row(5, Rpc::Internal, Refused, Error),
            Self::File { .. } => row(5, Rpc::Internal, Refused, Error),
            Self::Bug { .. } => row(199, Rpc::Internal, Refused, Error),
        }
    }

    pub fn class(&self) -> Class {
        self.meaning().class
    }

    /// The code of a STATUS that finds this (CNI 1.1.0, "STATUS"). 50: no container can be added. 51: and those that are
    /// there may reach less than they should, since the cell's lease is another's, or nobody follows other cells and
    /// policies for them.
    pub fn status_code(&self) -> u32 {
        match (self, self.class()) {
            (Self::DaemonAway { .. } | Self::Deadline { .. }, _) | (_, Class::Fenced) => 51,
            _ => 50,
        }
    }
}

/// Fields of a reason are texts, so that they travel as such (`google.rpc.ErrorInfo`).
mod as_text {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(super) fn serialize<S: Serializer>(number: &u16, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(number)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u16, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}
