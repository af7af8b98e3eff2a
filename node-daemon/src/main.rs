//! The command line of weft-node.

use std::io::Write;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::thread::available_parallelism;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use clap::{Parser, Subcommand};
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Response, Status};
use weft_daemon::cause;
use weft_node::config::Config;
use weft_node::question::{self, Target};
use weft_node::{report, run};
use weft_proto::convert;
use weft_proto::node::StatusRequest;
use weft_proto::node::containers_client::ContainersClient;
use weft_proto::status::reason_of;

/// Keeps this cell's part of a Weft overlay: VXLAN device, routes to other cells, container links.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the daemon.
    Run {
        /// The configuration, one JSON object (docs/operating.md).
        #[arg(long)]
        config: PathBuf,
    },
    /// Show what the daemon on this cell holds. Exit status 1 if it does not answer, or cannot add containers.
    Status(Ask),
    /// Say what becomes of a connection, which rule decides, and whose it is: by the program that runs in the kernel.
    /// Exit status 0 if it is allowed, 2 if it is refused or dropped, 1 if there is no answer or it was asked wrongly.
    Explain {
        /// A container's handle, or an IPv4 address.
        #[arg(long, value_name = "HANDLE|IP")]
        from: String,
        /// IP:PORT/tcp, IP:PORT/udp, IP/icmp, IP:TYPE.CODE/icmp, or IP/NUMBER for another protocol.
        #[arg(long, value_name = "IP:PORT/PROTO")]
        to: Target,
        #[command(flatten)]
        ask: Ask,
    },
}

/// How to ask the daemon.
#[derive(Debug, clap::Args)]
struct Ask {
    #[arg(long, default_value = "/var/vcap/data/weft-node/run/weft-node.sock")]
    socket: PathBuf,
    /// One JSON document instead of text.
    #[arg(long)]
    json: bool,
}

/// One task decides for the whole cell, and the kernel takes one change of links or rules at a time: more threads would
/// only hold memory. Each that has worked for long keeps 0.2 MiB of what it freed.
const WORKERS: usize = 4;

/// Exit status of an explanation that is not "allowed".
const NOT_ALLOWED: u8 = 2;

fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        // clap would end with the status of a connection that is refused.
        Err(misused) => {
            let _ = misused.print();
            return if misused.use_stderr() { ExitCode::FAILURE } else { ExitCode::SUCCESS };
        }
    };
    let done = match arguments.command {
        Command::Run { config } => start(&config).map(|()| ExitCode::SUCCESS),
        Command::Status(ask) => show(&ask),
        Command::Explain { from, to, ask } => explain(from, to, &ask),
    };
    done.unwrap_or_else(|error| {
        let _ = writeln!(std::io::stderr(), "weft-node: {error:#}");
        ExitCode::FAILURE
    })
}

fn start(config: &Path) -> Result<()> {
    let config: Config = weft_daemon::config::load(config)?;
    config.check()?;
    let level = weft_daemon::log::init(&config.log_level, config.log_format).context("log_level")?;
    #[cfg(target_env = "gnu")]
    one_arena();
    let workers = available_parallelism().map_or(1, NonZeroUsize::get).min(WORKERS);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(workers)
        .enable_all()
        .build()
        .context("start a runtime")?;
    let done = runtime.block_on(run::run(config, level));
    // Threads that wait for the kernel do not hold up the end.
    runtime.shutdown_timeout(Duration::from_secs(1));
    done
}

/// glibc gives threads that allocate arenas of their own, up to eight for each processor, and keeps in each what was freed
/// there: memory grows for thousands of containers, to the most that each of them ever needed. Most threads wait for the
/// kernel most of the time, and those that work have caches for what is small: one arena serves all.
#[cfg(target_env = "gnu")]
#[expect(unsafe_code, reason = "the allocator's settings are a function of C")]
fn one_arena() {
    // SAFETY: it sets a number, and no other thread exists yet that could allocate meanwhile.
    unsafe { nix::libc::mallopt(nix::libc::M_ARENA_MAX, 1) };
}

fn show(ask: &Ask) -> Result<ExitCode> {
    let status = asked(&ask.socket, async |mut node| node.status(StatusRequest {}).await)?;
    print(if ask.json { format!("{:#}\n", report::json(&status)) } else { report::text(&status) })?;
    if status.not_ready.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    let _ = writeln!(std::io::stderr(), "weft-node: not ready: {}", status.not_ready);
    Ok(ExitCode::FAILURE)
}

fn explain(from: String, to: Target, ask: &Ask) -> Result<ExitCode> {
    let question = convert::probe_to(from, to.addr, to.probe);
    let answer = asked(&ask.socket, async |mut node| node.explain(question).await)?;
    print(if ask.json { format!("{:#}\n", question::json(&answer)) } else { question::text(&answer) })?;
    Ok(if answer.verdict == "allowed" { ExitCode::SUCCESS } else { ExitCode::from(NOT_ALLOWED) })
}

fn print(text: String) -> Result<()> {
    std::io::stdout().write_all(text.as_bytes()).context("print")
}

/// One call to the daemon.
fn asked<T>(
    socket: &Path,
    call: impl AsyncFnOnce(ContainersClient<Channel>) -> Result<Response<T>, Status>,
) -> Result<T> {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("start a runtime")?;
    let asked = async {
        let path = socket.to_owned();
        let connector = tower::service_fn(move |_| {
            let path = path.clone();
            async move { UnixStream::connect(path).await.map(TokioIo::new) }
        });
        let connected = Endpoint::from_static("http://weft-node").connect_with_connector(connector).await;
        let channel = connected.map_err(|error| anyhow!(cause::last(&error)))?;
        match call(ContainersClient::new(channel)).await {
            Ok(answer) => Ok(answer.into_inner()),
            Err(status) => match reason_of(&status) {
                Some(reason) => Err(anyhow::Error::new(reason)),
                None => Err(anyhow::Error::new(status)),
            },
        }
    };
    let answer = runtime.block_on(async { tokio::time::timeout(Duration::from_secs(5), asked).await });
    let answer = answer.context("no answer in 5 s").flatten();
    answer.with_context(|| format!("ask the daemon at {}", socket.display()))
}
