//! The program `weft-cni`: see the library.
#![forbid(unsafe_code)]

use std::io::{Read, Write};
use std::process::ExitCode;

use weft_cni::{Command, Failure, Version};
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
            print(&format!("{}\n", weft_cni::error(version, code, &reason)));
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

fn run(command: &str, version: &mut Version) -> Result<Option<String>, Failure> {
    let command: Command = command.parse()?;
    let mut stdin = Vec::new();
    let read = std::io::stdin().lock().read_to_end(&mut stdin);
    read.map_err(|why| Reason::UnreadableInput { why: why.to_string() })?;
    weft_cni::parse(command, |name| std::env::var(name).ok(), &stdin, version)?.make()
}
