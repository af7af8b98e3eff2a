//! weft-cni: the CNI plugin that a runtime executes for each container.
//!
//! Owns nothing and keeps nothing: reads the environment and standard input, opens the container's network
//! namespace, makes one call to the node daemon with the namespace's descriptor, prints the result. Everything on
//! standard output is JSON of the CNI specification; nothing is logged.
#![forbid(unsafe_code)]

mod call;
mod environment;
mod netconf;
mod output;
mod previous;

use std::io::{Read, Write};
use std::process::ExitCode;

use call::Asked;
use environment::{Attachment, Command};
use netconf::{Addition, Fields, NetConf, Version};
use weft_model::reason::Reason;

const ABOUT: &str = concat!(
    "weft-cni ",
    env!("CARGO_PKG_VERSION"),
    ": connects a container to Weft's overlay.\n",
    "A CNI runtime executes it with CNI_COMMAND and the other variables of the CNI specification set, and the\n",
    "network configuration on standard input. Supported CNI versions: 0.1.0, 0.2.0, 0.3.0, 0.3.1, 0.4.0, 1.0.0,\n",
    "1.1.0.\n",
);

fn main() -> ExitCode {
    let argument = std::env::args().nth(1);
    match argument.as_deref() {
        Some("--version" | "-V") => return print(concat!("weft-cni ", env!("CARGO_PKG_VERSION"), "\n")),
        Some("--help" | "-h") => return print(ABOUT),
        _ => {}
    }
    let Ok(command) = std::env::var("CNI_COMMAND") else {
        // As the specification's own library does: executed by hand, it introduces itself.
        let _ = std::io::stderr().write_all(ABOUT.as_bytes());
        return ExitCode::SUCCESS;
    };
    // What was asked for in the configuration decides the version that even an error is given in.
    let mut version = Version::LATEST;
    match run(&command, &mut version) {
        Ok(Some(result)) => print(&format!("{result}\n")),
        Ok(None) => ExitCode::SUCCESS,
        Err(Failure { code, reason }) => {
            print(&format!("{}\n", output::error(version, code, &reason)));
            ExitCode::FAILURE
        }
    }
}

/// A runtime that has closed our standard output does not want to know.
fn print(text: &str) -> ExitCode {
    match std::io::stdout().write_all(text.as_bytes()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

/// Why a call failed, and the code that says so to a runtime.
struct Failure {
    code: u32,
    reason: Reason,
}

impl From<Reason> for Failure {
    fn from(reason: Reason) -> Self {
        Self { code: reason.meaning().cni, reason }
    }
}

fn run(command: &str, version: &mut Version) -> Result<Option<String>, Failure> {
    let command: Command = command.parse()?;
    let mut stdin = Vec::new();
    let read = std::io::stdin().lock().read_to_end(&mut stdin);
    read.map_err(|why| Reason::UnreadableInput { why: why.to_string() })?;
    let conf = Fields::document(&stdin)?;
    if command == Command::Version {
        return Ok(Some(output::versions(&netconf::given_version(&conf)?)));
    }
    *version = netconf::version_of(&conf)?;
    supports(*version, command)?;
    let asked = ask(command, &conf, *version)?;
    let answer = call::make(command, &NetConf::parse(&conf)?, asked, *version);
    answer.map_err(|reason| match command {
        Command::Status => Failure { code: reason.status_code(), reason },
        _ => reason.into(),
    })
}

/// Commands are younger than the first versions.
fn supports(version: Version, command: Command) -> Result<(), Reason> {
    let since = match command {
        Command::Add | Command::Del | Command::Version => Version::V0_1_0,
        Command::Check => Version::V0_4_0,
        Command::Gc | Command::Status => Version::V1_1_0,
    };
    if version >= since {
        return Ok(());
    }
    let supported = format!("{} from {} on", command.as_str(), since.as_str());
    Err(Reason::CniVersionUnsupported { given: version.as_str().into(), supported })
}

fn ask(command: Command, conf: &Fields<'_>, version: Version) -> Result<Asked, Reason> {
    let var = |name: &str| std::env::var(name).ok();
    Ok(match command {
        Command::Add => {
            let attachment = Attachment::read(command, var)?;
            Asked::Add(attachment, Box::new(Addition::parse(conf, version)?))
        }
        Command::Check => {
            let attachment = Attachment::read(command, var)?;
            let ours = netconf::previous(conf)?.ours(&attachment.interface)?;
            Asked::Check(attachment, ours)
        }
        Command::Del => Asked::Delete(Attachment::read(command, var)?),
        Command::Gc => {
            environment::check_path(var)?;
            Asked::Collect(netconf::valid_attachments(conf)?)
        }
        Command::Status | Command::Version => Asked::Ready,
    })
}
