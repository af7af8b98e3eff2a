//! The command line of weft-controller.

use std::fmt::Write as _;
use std::io::Write as _;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, anyhow};
use clap::{Args, Parser, Subcommand};
use serde_json::json;
use tonic::transport::{Certificate, ClientTlsConfig, Endpoint, Identity};
use weft_controller::config::Config;
use weft_controller::run;
use weft_daemon::cause;
use weft_daemon::tls::Files;
use weft_proto::controller::leases_client::LeasesClient;
use weft_proto::controller::{ListRequest, ListResponse, Listed, State};

/// Leases subnets of a Weft overlay to cells.
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
    /// Show who holds which subnet, as a running controller has it.
    Leases(Ask),
}

#[derive(Debug, Args)]
struct Ask {
    /// https://host:port
    #[arg(long)]
    controller: String,
    /// The authority of the controller's certificate, PEM.
    #[arg(long)]
    ca: PathBuf,
    /// A certificate of the controller's authority, PEM, and its key.
    #[arg(long)]
    certificate: PathBuf,
    #[arg(long)]
    key: PathBuf,
    /// The name in the controller's certificate.
    #[arg(long, default_value = "weft-controller")]
    server_name: String,
    /// One JSON document instead of a table.
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    let done = match Arguments::parse().command {
        Command::Run { config } => start(&config),
        Command::Leases(ask) => show(&ask),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "weft-controller: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn start(config: &Path) -> Result<()> {
    let config: Config = weft_daemon::config::load(config)?;
    config.check()?;
    weft_daemon::log::init(&config.log_level, config.log_format).context("log_level")?;
    let runtime =
        tokio::runtime::Builder::new_multi_thread().enable_all().build().context("start a runtime")?;
    let done = runtime.block_on(run::run(config));
    runtime.shutdown_timeout(Duration::from_secs(1));
    done
}

fn show(ask: &Ask) -> Result<()> {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("start a runtime")?;
    let asked = runtime.block_on(async { tokio::time::timeout(Duration::from_secs(10), list(ask)).await });
    let listed =
        asked.context("no answer in 10 s").flatten().with_context(|| format!("ask {}", ask.controller))?;
    let text = if ask.json { format!("{:#}\n", document(&listed)) } else { table(&listed) };
    std::io::stdout().write_all(text.as_bytes()).context("print")
}

async fn list(ask: &Ask) -> Result<ListResponse> {
    #[expect(clippy::disallowed_methods, reason = "certificates are valid in wall-clock time")]
    let now = SystemTime::now();
    let files = Files { ca: ask.ca.clone(), certificate: ask.certificate.clone(), key: ask.key.clone() };
    let loaded = files.load(now)?;
    let tls = ClientTlsConfig::new()
        .ca_certificate(Certificate::from_pem(&loaded.pem().ca))
        .identity(Identity::from_pem(&loaded.pem().certificate, &loaded.pem().key))
        .domain_name(ask.server_name.clone());
    let connected = Endpoint::from_shared(ask.controller.clone())?.tls_config(tls)?.connect().await;
    let channel = connected.map_err(|error| anyhow!(cause::last(&error)))?;
    let mut client = LeasesClient::new(channel).max_decoding_message_size(64 << 20);
    Ok(client.list(ListRequest {}).await?.into_inner())
}

fn state(listed: &Listed) -> &'static str {
    match listed.state() {
        State::Held => "held",
        State::Expired => "expired",
        State::Released => "released",
    }
}

fn subnet(listed: &Listed) -> String {
    let lease = listed.lease.clone().unwrap_or_default();
    format!("{}/{}", Ipv4Addr::from(lease.subnet), lease.prefix)
}

/// For programs.
fn document(listed: &ListResponse) -> serde_json::Value {
    let at = listed.at.unwrap_or_default();
    let leases = listed.leases.iter().map(|row| {
        json!({
            "underlay": Ipv4Addr::from(row.underlay), "subnet": subnet(row), "cell_id": row.cell_id,
            "state": state(row), "seen_seconds_ago": listed.service_time.saturating_sub(row.seen_at),
        })
    });
    json!({"revision": at.revision, "epoch": format!("{:016x}", at.epoch), "leases": leases.collect::<Vec<_>>()})
}

/// For people.
fn table(listed: &ListResponse) -> String {
    let mut out = String::new();
    let _ = writeln!(out, "{:<17}{:<20}{:<10}{:<10}CELL", "UNDERLAY", "SUBNET", "STATE", "SEEN");
    for row in &listed.leases {
        let seen = format!("{} s", listed.service_time.saturating_sub(row.seen_at));
        let underlay = Ipv4Addr::from(row.underlay).to_string();
        let _ = writeln!(out, "{underlay:<17}{:<20}{:<10}{seen:<10}{}", subnet(row), state(row), row.cell_id);
    }
    out
}
