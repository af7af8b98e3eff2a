//! iptables as a program: where it is, what it is told, what it says.
//!
//! Every program runs in the daemon's network namespace, which it inherits, and is killed when it takes too long.
//! Looking at a backend makes no table there: the nft programs make none for `-S` and `-C`, the legacy ones do, so
//! legacy is asked only if the kernel says that its table is there.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Output, Stdio};
use std::time::Duration;

use tokio::process::Command;
use tokio::time::timeout;
use tracing::debug;

use super::backend::{Backend, Program, Seen, Side};
use super::rule::{Held, Rule};

/// How long iptables waits for its lock, in seconds, which every other iptables on the cell takes as well.
const WAIT: &str = "5";
/// When it is killed: late enough to say by itself that it did not get the lock.
pub(super) const DEADLINE: Duration = Duration::from_secs(6);
/// Where distributions have it; a daemon's PATH need not name them.
const USUAL: [&str; 4] = ["/usr/sbin", "/sbin", "/usr/local/sbin", "/usr/bin"];
/// The names of the legacy tables that exist in this network namespace. Without the file no namespace has any.
const LEGACY_TABLES: &str = "/proc/thread-self/net/ip_tables_names";

#[derive(Debug, thiserror::Error)]
pub(super) enum ProgramError {
    #[error("start {program}")]
    Start {
        program: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{program} {arguments}: not done after {} s", deadline.as_secs())]
    Late { program: PathBuf, arguments: String, deadline: Duration },
    #[error("{program} {arguments}: {status}: {said}")]
    Failed { program: PathBuf, arguments: String, status: ExitStatus, said: String },
}

/// Of what kind a failure is, so that each is told once, with what to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Why {
    /// No program for the backend.
    Absent,
    Late,
    Locked,
    NotPermitted,
    Incompatible,
    Failed,
    /// It says that the rule was appended, and then that it is not there.
    Vain,
}

impl Why {
    pub(super) fn advice(self) -> &'static str {
        match self {
            Self::Absent => {
                "install iptables, or set iptables_directory to where it is, or iptables_backend to none"
            }
            Self::Late | Self::Locked => "find out who holds the lock of iptables for so long",
            Self::NotPermitted => {
                "give the daemon CAP_NET_ADMIN, CAP_NET_RAW and write access to the lock's file"
            }
            Self::Incompatible => {
                "somebody wrote rules or chains with nft that iptables cannot work with; they belong in another table"
            }
            Self::Failed => "run the command by hand on this cell",
            Self::Vain => "find out who removes the rule, or whether iptables changes it",
        }
    }
}

/// A failure as it is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Trouble {
    pub(super) why: Why,
    pub(super) said: String,
}

impl From<ProgramError> for Trouble {
    fn from(error: ProgramError) -> Self {
        let why = match &error {
            ProgramError::Start { source, .. } => match source.kind() {
                io::ErrorKind::NotFound => Why::Absent,
                io::ErrorKind::PermissionDenied => Why::NotPermitted,
                _ => Why::Failed,
            },
            ProgramError::Late { .. } => Why::Late,
            ProgramError::Failed { said, .. } => why(said),
        };
        let said = match &error {
            ProgramError::Start { source, .. } => format!("{error}: {source}"),
            _ => error.to_string(),
        };
        Self { why, said }
    }
}

/// By the words that iptables 1.6 to 1.8 uses; its exit status tells less.
fn why(said: &str) -> Why {
    let says = |words: &[&str]| words.iter().any(|words| said.contains(words));
    if says(&["xtables lock"]) {
        Why::Locked
    } else if says(&["incompatible", "CHAIN_ADD failed"]) {
        Why::Incompatible
    } else if says(&["Permission denied", "Operation not permitted", "Read-only file system"]) {
        Why::NotPermitted
    } else {
        Why::Failed
    }
}

/// Directories in which to look, the first that has a program wins: the one of the property `iptables_directory`,
/// those of PATH, the usual ones.
pub fn directories(named: Option<&Path>, path: Option<&OsStr>) -> Vec<PathBuf> {
    let path = path.map(OsString::from).unwrap_or_default();
    let all = named.map(Path::to_owned).into_iter().chain(std::env::split_paths(&path));
    let mut directories = Vec::new();
    for directory in all.chain(USUAL.map(PathBuf::from)).filter(|directory| directory.is_absolute()) {
        if !directories.contains(&directory) {
            directories.push(directory);
        }
    }
    directories
}

/// The programs, and what their tables hold.
pub(super) async fn look(directories: &[PathBuf]) -> Seen {
    let mut seen = Seen::default();
    for directory in directories {
        for (slot, name) in [(&mut seen.nft, "iptables-nft"), (&mut seen.legacy, "iptables-legacy")] {
            let path = directory.join(name);
            if slot.is_none() && is_executable(&path) {
                *slot = Some(Side { path, held: Held::default() });
            }
        }
        let path = directory.join("iptables");
        let wanted = seen.plain.is_none() || seen.nft.is_none() || seen.legacy.is_none();
        if wanted && is_executable(&path) {
            match execute(&path, &["--version".into()], DEADLINE).await.map_err(Trouble::from) {
                Ok(output) => {
                    let backend = Backend::of_version(&String::from_utf8_lossy(&output.stdout));
                    seen.plain.get_or_insert(backend);
                    let slot = match backend {
                        Backend::Nft => &mut seen.nft,
                        Backend::Legacy => &mut seen.legacy,
                    };
                    slot.get_or_insert(Side { path, held: Held::default() });
                }
                Err(trouble) => debug!(error = %trouble.said, "iptables passed over"),
            }
        }
    }
    let legacy_is_used = has_filter(&std::fs::read_to_string(LEGACY_TABLES).unwrap_or_default());
    if let Some(nft) = &mut seen.nft {
        nft.held = held(&nft.path).await;
    }
    if let Some(legacy) = seen.legacy.as_mut().filter(|_| legacy_is_used) {
        legacy.held = held(&legacy.path).await;
    }
    seen
}

fn is_executable(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

fn has_filter(names: &str) -> bool {
    names.lines().any(|name| name == "filter")
}

/// A table that cannot be listed is none that rules can be appended to.
async fn held(program: &Path) -> Held {
    let arguments = ["-w", WAIT, "-S"].map(str::to_owned);
    match execute(program, &arguments, DEADLINE).await.map_err(Trouble::from) {
        Ok(output) => Held::read(&String::from_utf8_lossy(&output.stdout)),
        Err(trouble) => {
            debug!(error = %trouble.said, "iptables passed over");
            Held::default()
        }
    }
}

/// Whether the rule is there.
pub(super) async fn check(program: &Program, rule: Rule) -> Result<bool, Trouble> {
    match run(program, "-C", rule).await {
        Ok(()) => Ok(true),
        // 1 is also how other failures end, but what is not there is appended next, and that tells.
        Err(ProgramError::Failed { status, .. }) if status.code() == Some(1) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

pub(super) async fn append(program: &Program, rule: Rule) -> Result<(), Trouble> {
    Ok(run(program, "-A", rule).await?)
}

/// Takes a rule of ours out of the backend that is not used any more.
pub(super) async fn withdraw(program: &Program, rule: Rule) -> Result<(), Trouble> {
    match run(program, "-D", rule).await {
        Err(ProgramError::Failed { status, .. }) if status.code() == Some(1) => Ok(()), // it was not there
        result => Ok(result?),
    }
}

async fn run(program: &Program, command: &str, rule: Rule) -> Result<(), ProgramError> {
    let mut arguments: Vec<String> = ["-w", WAIT, command].map(str::to_owned).into();
    arguments.extend(rule.spec());
    execute(&program.path, &arguments, DEADLINE).await.map(drop)
}

async fn execute(program: &Path, arguments: &[String], deadline: Duration) -> Result<Output, ProgramError> {
    let mut command = Command::new(program);
    // Dropped at the deadline, or with the daemon's task, and killed with it.
    command.args(arguments).stdin(Stdio::null()).kill_on_drop(true);
    let program = program.to_owned();
    let shown = || arguments.join(" ");
    match timeout(deadline, command.output()).await {
        Err(_elapsed) => Err(ProgramError::Late { program, arguments: shown(), deadline }),
        Ok(Err(source)) => Err(ProgramError::Start { program, source }),
        Ok(Ok(output)) if output.status.success() => Ok(output),
        Ok(Ok(output)) => {
            let said = String::from_utf8_lossy(&output.stderr).trim().replace('\n', "; ");
            Err(ProgramError::Failed { program, arguments: shown(), status: output.status, said })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_to_look() {
        let found = directories(Some("/opt/garden".as_ref()), Some("/sbin:relative::/bin".as_ref()));
        let expected = ["/opt/garden", "/sbin", "/bin", "/usr/sbin", "/usr/local/sbin", "/usr/bin"];
        assert_eq!(found, expected.map(PathBuf::from));
        assert_eq!(directories(None, None), USUAL.map(PathBuf::from));
    }

    #[test]
    fn what_iptables_says_is_told_apart() {
        for (said, expected) in [
            ("Another app is currently holding the xtables lock. Stopped waiting after 5s.", Why::Locked),
            (
                "iptables v1.8.9 (nf_tables): table `filter' is incompatible, use 'nft' tool.",
                Why::Incompatible,
            ),
            (
                "iptables v1.8.9 (nf_tables):  CHAIN_ADD failed (Operation not supported): chain INPUT",
                Why::Incompatible,
            ),
            (
                "iptables v1.8.9 (nf_tables): Could not fetch rule set generation id: Permission denied (you must be root)",
                Why::NotPermitted,
            ),
            ("iptables: No chain/target/match by that name.", Why::Failed),
        ] {
            assert_eq!(why(said), expected, "{said}");
        }
    }

    #[tokio::test]
    async fn a_program_that_hangs_is_killed() {
        let directory = tempfile::tempdir().expect("directory");
        let file = directory.path().join("pid");
        let script = format!("echo $$ > {}.new; mv {0}.new {0}; exec sleep 600", file.display());
        let hangs = execute("/bin/sh".as_ref(), &["-c".into(), script], Duration::from_secs(1)).await;
        assert!(matches!(&hangs, Err(ProgramError::Late { .. })), "{hangs:?}");
        let pid = std::fs::read_to_string(&file).expect("it ran");
        let gone = || match std::fs::read_to_string(format!("/proc/{}/stat", pid.trim())) {
            Ok(stat) => stat.contains(") Z "), // killed, not reaped yet
            Err(_) => true,
        };
        while !gone() {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn what_cannot_be_started() {
        let error = execute("/nowhere/iptables".as_ref(), &[], DEADLINE).await.expect_err("not there");
        assert_eq!(Trouble::from(error).why, Why::Absent);
        assert_eq!(look(&["/nowhere".into()]).await, Seen::default());
    }
}
