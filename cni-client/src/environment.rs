//! The environment of a CNI call (CNI 1.1.0, "Parameters").

use std::path::PathBuf;
use std::str::FromStr;

use weft_model::address::DeviceName;
use weft_model::container::Handle;
use weft_model::reason::Reason;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    Add,
    Check,
    Del,
    Gc,
    Status,
    Version,
}

impl Command {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Add => "ADD",
            Self::Check => "CHECK",
            Self::Del => "DEL",
            Self::Gc => "GC",
            Self::Status => "STATUS",
            Self::Version => "VERSION",
        }
    }
}

impl FromStr for Command {
    type Err = Reason;

    fn from_str(command: &str) -> Result<Self, Reason> {
        let all = [Self::Add, Self::Check, Self::Del, Self::Gc, Self::Status, Self::Version];
        all.into_iter().find(|one| one.as_str() == command).ok_or_else(|| Reason::InvalidEnvironment {
            name: "CNI_COMMAND".into(),
            why: format!("unknown CNI_COMMAND: {command}"),
        })
    }
}

/// A container's place in a network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Attachment {
    pub(crate) handle: Handle,
    pub(crate) interface: DeviceName,
    /// Always there for ADD and CHECK.
    pub(crate) namespace: Option<PathBuf>,
}

/// For GC, which is about no attachment. Nothing of it is used.
pub(crate) fn check_path(var: impl Fn(&str) -> Option<String>) -> Result<(), Reason> {
    var("CNI_PATH").filter(|value| !value.is_empty()).map(drop).ok_or_else(|| missing(&["CNI_PATH"]))
}

fn missing(names: &[&str]) -> Reason {
    let name = names.join(",");
    let why = format!("required env variables [{name}] missing");
    Reason::InvalidEnvironment { name, why }
}

impl Attachment {
    /// All that is missing is named at once.
    pub(crate) fn read(command: Command, var: impl Fn(&str) -> Option<String>) -> Result<Self, Reason> {
        let get = |name| var(name).filter(|value| !value.is_empty());
        let needs_namespace = command != Command::Del;
        let needed = [("CNI_CONTAINERID", true), ("CNI_NETNS", needs_namespace), ("CNI_IFNAME", true)];
        let absent = needed.into_iter().filter(|(name, needed)| *needed && get(name).is_none());
        let absent: Vec<&str> = absent.map(|(name, _)| name).collect();
        let (Some(handle), Some(interface), []) =
            (get("CNI_CONTAINERID"), get("CNI_IFNAME"), absent.as_slice())
        else {
            return Err(missing(&absent));
        };
        let invalid = |name: &str, why: &dyn std::fmt::Display| Reason::InvalidEnvironment {
            name: name.into(),
            why: why.to_string(),
        };
        Ok(Self {
            handle: handle.parse().map_err(|why| invalid("CNI_CONTAINERID", &why))?,
            interface: interface.parse().map_err(|why| invalid("CNI_IFNAME", &why))?,
            namespace: get("CNI_NETNS").map(PathBuf::from),
        })
    }
}
