//! The daemon: puts its tasks together, and ends when it is told to. Nothing in the kernel is taken down at the end.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result};
use prometheus_client::registry::Registry;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tracing::{info, warn};
use weft_daemon::http::{self, Health};
use weft_daemon::tls::TlsError;
use weft_model::cell::Cell;
use weft_model::firewall::Guard;
use weft_model::keeper::{Act, Keeper, LeaseState};
use weft_model::lease::{self, Holder};

use crate::api::Socket;
use crate::cell::{Policies, Task, chain};
use crate::config::Config;
use crate::flow_log::{self, Directory, FlowLog};
use crate::guard;
use crate::inbox::inbox;
use crate::journal::Journal;
use crate::kernel::{Counted, Kernel, Netlink, events, nflog, ruleset_events};
use crate::lease_stream::{Controllers, LeaseStream};
use crate::metrics::Metrics;
use crate::overlay::Overlay;
use crate::policy_server;
use crate::snapshot;

/// How long a daemon waits for the one before it to end.
const SUCCESSION: Duration = Duration::from_secs(3);
/// How often lines say how much was not logged.
const COUNTED_EVERY: Duration = Duration::from_secs(10);

pub async fn run(config: Config) -> Result<()> {
    let ended = ended()?;
    #[expect(clippy::disallowed_methods, reason = "certificates are valid in wall-clock time")]
    let now = SystemTime::now();
    match config.certificates().load(now) {
        // Containers come and go without a controller, so the node starts all the same. The lease stream says what is
        // wrong, and tries the files again.
        Ok(_) | Err(TlsError::Expired { .. } | TlsError::NotYetValid { .. }) => {}
        Err(unusable) => return Err(unusable.into()),
    }
    let boot_id = boot_id()?;
    // Bound before anything is read or changed: a second daemon on this cell ends here.
    let socket = patiently(async || Socket::bind(&config.socket)).await?;
    let health_listener = patiently(async || http::bind(config.health_address).await).await;
    let health_listener = health_listener.context("health_address")?;
    let (journal, records) = Journal::open(&config.state_directory, &boot_id)?;
    let snapshot = snapshot::load(&config.state_directory)?;

    let mut kernel = Netlink::open(config.vtep_name.clone())?;
    let device = kernel.underlay(config.underlay_ip, config.vxlan_interface_name.as_ref()).await;
    let device = device.context("underlay_ip")?;
    if config.mtu > device.mtu {
        warn!(
            configured = config.mtu,
            underlay = device.mtu,
            "mtu is more than the underlay carries; less is used"
        );
    }
    // Listening before the first look, so that nothing falls between.
    let events = events::watch(config.vtep_name.clone(), device.index)?;
    let touched = ruleset_events::touches(kernel.rules_port())?;

    let mut registry = Registry::default();
    let metrics = Arc::new(Metrics::new(&mut registry));
    let who = lease::Cell {
        underlay: config.underlay_ip,
        holder: Holder { cell_id: config.cell_id.clone(), boot_id },
        wants: config.wants(),
    };
    let keeper = Keeper::start(who.clone(), snapshot);
    let (overlay, leases) = watch::channel(Overlay::new(Instant::now(), keeper.view()));
    if let Some(Act::Publish { own, peers }) = keeper.known() {
        info!(subnet = %own.subnet, peers = peers.len(), "started from the snapshot of leases");
        overlay.send_modify(|overlay| {
            overlay.table = Some((own, peers));
            overlay.fenced = keeper.fenced().cloned();
        });
    }
    let directory = match config.traffic_log() {
        Some(settings) => Some(traffic_log(settings, config.traffic_log_group, &mut registry).await?),
        None => None,
    };
    let policies = match config.policy_server() {
        Some(server) => Some(follow_policies(server).await),
        None => None,
    };
    let (inbox, waiting) = inbox();
    let (guards, guard) = watch::channel(Guard::Ours);
    tokio::spawn(guard::run(config.guard(std::env::var_os("PATH").as_deref()), guards));
    let mut cell = Cell::new(config.cell());
    cell.replay(records);
    let task = Task {
        cell,
        kernel,
        journal,
        waiting,
        inbox: inbox.clone(),
        overlay: leases.clone(),
        underlay: config.underlay(),
        guard,
        policies,
        directory,
        metrics,
    };
    let started = task.start().await?;
    info!(underlay = %config.underlay_ip, version = env!("CARGO_PKG_VERSION"), "started");
    tokio::spawn(started.run(events, touched));
    tokio::spawn(http::serve(health_listener, move || health(&leases), Arc::new(registry)));
    let stream = LeaseStream {
        cell: who,
        controllers: Controllers {
            urls: config.controllers.clone().into(),
            name: config.controller_name.clone(),
            certificates: config.certificates(),
            turn: Arc::new(AtomicUsize::new(first_turn(config.controllers.len()))),
        },
        state_directory: config.state_directory.clone(),
        overlay,
    };
    tokio::spawn(stream.run(keeper));
    socket.serve(inbox, ended).await?;
    info!("stopped; everything in the kernel stays");
    Ok(())
}

/// Starts to follow the policy server. What it last said, before this node's start, is known from then on: the first wave
/// must not take it from the kernel.
async fn follow_policies(server: policy_server::Config) -> Policies {
    let groups = server.intervals.groups.is_some();
    let (out, mut known) = watch::channel(policy_server::Known::default());
    let (ids, wanted) = watch::channel(Arc::default());
    let (applied, done) = watch::channel(policy_server::Applied::default());
    tokio::spawn(policy_server::run(server, wanted, out, done));
    // An error only if that task has ended, and then there is nothing to wait for.
    drop(known.changed().await);
    Policies { known, ids, applied, groups }
}

/// Starts the traffic log; gives the way to tell it who is who.
async fn traffic_log(
    settings: flow_log::Settings,
    group: u16,
    registry: &mut Registry,
) -> Result<watch::Sender<Arc<Directory>>> {
    let (directory, known) = watch::channel(Arc::default());
    let records = patiently(async || nflog::listen(group)).await?;
    let log = FlowLog::start(settings, known).context("start the traffic log's thread")?;
    log.counters().register(registry);
    let (tally, mut counted) = (log.tally(), Counted::open()?);
    tokio::spawn(log.run(records));
    thread::Builder::new().name("weft-counters".into()).spawn(move || {
        loop {
            match counted.read() {
                #[expect(clippy::disallowed_methods, reason = "lines are stamped with wall-clock time")]
                Ok(totals) => tally.read(&totals, SystemTime::now()),
                Err(error) => warn!(error = %chain(&error), "what was not logged is not counted"),
            }
            thread::sleep(COUNTED_EVERY);
        }
    })?;
    Ok(directory)
}

/// A daemon that was killed keeps its sockets until its last thread is out of the kernel, where deleting a link may
/// hold one up for some 30 ms: its successor tries again for a while.
async fn patiently<T, E>(bind: impl AsyncFn() -> Result<T, E>) -> Result<T, E> {
    let deadline = Instant::now() + SUCCESSION;
    loop {
        match bind().await {
            Err(_) if Instant::now() < deadline => tokio::time::sleep(Duration::from_millis(20)).await,
            bound => return bound,
        }
    }
}

/// Cells begin at different controllers.
fn first_turn(controllers: usize) -> usize {
    let chance = getrandom::u32().unwrap_or_default();
    usize::try_from(chance).unwrap_or_default() % controllers.max(1)
}

fn health(overlay: &watch::Receiver<Overlay>) -> Health {
    let overlay = overlay.borrow();
    match (&overlay.fenced, overlay.view.state) {
        (Some(reason), _) => Health::Unhealthy { why: reason.to_string() },
        (None, LeaseState::None) => {
            let trouble = overlay.view.trouble.as_ref().map(ToString::to_string);
            Health::Unhealthy { why: trouble.unwrap_or_else(|| "no lease yet".into()) }
        }
        (None, _) => Health::Healthy,
    }
}

/// One boot of this machine (random(4), /proc/sys/kernel/random/boot_id).
fn boot_id() -> Result<String> {
    let path = Path::new("/proc/sys/kernel/random/boot_id");
    let text = std::fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
    Ok(text.trim().to_owned())
}

/// Done when the process is told to end.
fn ended() -> Result<impl Future<Output = ()> + Send> {
    let mut terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listen for SIGINT")?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}
