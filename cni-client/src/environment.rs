//! The environment of a CNI call (CNI 1.1.0, "Parameters").

use std::path::PathBuf;
use std::str::FromStr;

use weft_model::address::DeviceName;
use weft_model::container::Handle;
use weft_model::reason::Reason;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Command {
    Add,
    Check,
    Del,
    Version,
}

impl FromStr for Command {
    type Err = Reason;

    fn from_str(command: &str) -> Result<Self, Reason> {
        match command {
            "ADD" => Ok(Self::Add),
            "CHECK" => Ok(Self::Check),
            "DEL" => Ok(Self::Del),
            "VERSION" => Ok(Self::Version),
            unknown => Err(Reason::InvalidEnvironment {
                name: "CNI_COMMAND".into(),
                why: format!("unknown CNI_COMMAND: {unknown}"),
            }),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Environment {
    pub(crate) command: Command,
    pub(crate) handle: Handle,
    pub(crate) interface: DeviceName,
    /// Always there for ADD and CHECK.
    pub(crate) namespace: Option<PathBuf>,
}

impl Environment {
    /// All that is missing is named at once.
    pub(crate) fn read(command: Command, var: impl Fn(&str) -> Option<String>) -> Result<Self, Reason> {
        let get = |name| var(name).filter(|value| !value.is_empty());
        let needs_namespace = command != Command::Del;
        let mut missing = Vec::new();
        for (name, needed) in [
            ("CNI_CONTAINERID", true),
            ("CNI_NETNS", needs_namespace),
            ("CNI_IFNAME", true),
            ("CNI_PATH", true),
        ] {
            if needed && get(name).is_none() {
                missing.push(name);
            }
        }
        let (Some(handle), Some(interface), []) =
            (get("CNI_CONTAINERID"), get("CNI_IFNAME"), missing.as_slice())
        else {
            let missing = missing.join(",");
            let why = format!("required env variables [{missing}] missing");
            return Err(Reason::InvalidEnvironment { name: missing, why });
        };
        let invalid = |name: &str, why: &dyn std::fmt::Display| Reason::InvalidEnvironment {
            name: name.into(),
            why: why.to_string(),
        };
        Ok(Self {
            command,
            handle: handle.parse().map_err(|why| invalid("CNI_CONTAINERID", &why))?,
            interface: interface.parse().map_err(|why| invalid("CNI_IFNAME", &why))?,
            namespace: get("CNI_NETNS").map(PathBuf::from),
        })
    }
}
