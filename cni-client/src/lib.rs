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

use call::Asked;
use environment::Attachment;
pub use environment::Command;
pub use netconf::Version;
use netconf::{Addition, Fields, NetConf};
pub use output::error;
use weft_model::reason::Reason;

/// Why a call failed, and the code that says so to a runtime.
#[derive(Debug)]
pub struct Failure {
    pub code: u32,
    pub reason: Reason,
}

impl From<Reason> for Failure {
    fn from(reason: Reason) -> Self {
        Self { code: reason.meaning().cni, reason }
    }
}

/// What a runtime wants, understood.
#[derive(Debug)]
pub struct Call<'a>(Wanted<'a>);

#[derive(Debug)]
enum Wanted<'a> {
    /// The answer, for which nobody needs to be asked.
    Versions(String),
    OfNode {
        command: Command,
        conf: NetConf,
        asked: Asked<'a>,
        version: Version,
    },
}

/// Understands a call: its other variables, and what is on standard input. `version`: the one in which even an error is given,
/// as soon as it is known.
pub fn parse<'a>(
    command: Command,
    var: impl Fn(&str) -> Option<String>,
    stdin: &'a [u8],
    version: &mut Version,
) -> Result<Call<'a>, Reason> {
    let conf = Fields::document(stdin)?;
    if command == Command::Version {
        return Ok(Call(Wanted::Versions(output::versions(&netconf::given_version(&conf)?))));
    }
    *version = netconf::version_of(&conf)?;
    supports(*version, command)?;
    let asked = ask(command, var, &conf, *version)?;
    Ok(Call(Wanted::OfNode { command, conf: NetConf::parse(&conf)?, asked, version: *version }))
}

impl Call<'_> {
    /// Does it. What goes to standard output, if anything.
    pub fn make(self) -> Result<Option<String>, Failure> {
        let (command, conf, asked, version) = match self.0 {
            Wanted::Versions(answer) => return Ok(Some(answer)),
            Wanted::OfNode { command, conf, asked, version } => (command, conf, asked, version),
        };
        call::make(command, &conf, asked, version).map_err(|reason| match command {
            Command::Status => Failure { code: reason.status_code(), reason },
            _ => reason.into(),
        })
    }
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

fn ask<'a>(
    command: Command,
    var: impl Fn(&str) -> Option<String>,
    conf: &Fields<'a>,
    version: Version,
) -> Result<Asked<'a>, Reason> {
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
