//! The command line of weft-node.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::transport::Endpoint;
use weft_node::config::Config;
use weft_node::{report, run};
use weft_proto::node::StatusRequest;
use weft_proto::node::containers_client::ContainersClient;

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
    Status {
        #[arg(long, default_value = "/var/vcap/data/weft-node/run/weft-node.sock")]
        socket: PathBuf,
        /// One JSON document instead of a table.
        #[arg(long)]
        json: bool,
    },
}

fn main() -> ExitCode {
    let done = match Arguments::parse().command {
        Command::Run { config } => start(&config).map(|()| ExitCode::SUCCESS),
        Command::Status { socket, json } => show(&socket, json),
    };
    done.unwrap_or_else(|error| {
        let _ = writeln!(std::io::stderr(), "weft-node: {error:#}");
        ExitCode::FAILURE
    })
}

fn start(config: &Path) -> Result<()> {
    let config: Config = weft_daemon::config::load(config)?;
    config.check()?;
    weft_daemon::log::init(&config.log_level, config.log_format).context("log_level")?;
    let runtime =
        tokio::runtime::Builder::new_multi_thread().enable_all().build().context("start a runtime")?;
    let done = runtime.block_on(run::run(config));
    // Threads that wait for the kernel do not hold up the end.
    runtime.shutdown_timeout(Duration::from_secs(1));
    done
}

fn show(socket: &Path, json: bool) -> Result<ExitCode> {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("start a runtime")?;
    let asked = async {
        let path = socket.to_owned();
        let connector = tower::service_fn(move |_| {
            let path = path.clone();
            async move { UnixStream::connect(path).await.map(TokioIo::new) }
        });
        let channel = Endpoint::from_static("http://weft-node").connect_with_connector(connector).await?;
        anyhow::Ok(ContainersClient::new(channel).status(StatusRequest {}).await?.into_inner())
    };
    let answer = runtime.block_on(async { tokio::time::timeout(Duration::from_secs(5), asked).await });
    let status = answer.context("no answer in 5 s").flatten();
    let status = status.with_context(|| format!("ask the daemon at {}", socket.display()))?;
    let text = if json { format!("{:#}\n", report::json(&status)) } else { report::text(&status) };
    std::io::stdout().write_all(text.as_bytes()).context("print")?;
    if status.not_ready.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    let _ = writeln!(std::io::stderr(), "weft-node: not ready: {}", status.not_ready);
    Ok(ExitCode::FAILURE)
}
