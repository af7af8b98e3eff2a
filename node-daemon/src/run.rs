//! The daemon: puts its tasks together, and ends when it is told to. Nothing in the kernel is taken down at the end.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result};
use prometheus_client::registry::Registry;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;
use tracing::{info, warn};
use weft_daemon::cause::chain;
use weft_daemon::http::{self, Health};
use weft_daemon::log::Level;
use weft_daemon::tls::TlsError;
use weft_model::cell::Cell;
use weft_model::firewall::Guard;
use weft_model::follow::Ids;
use weft_model::keeper::{Act, Keeper, LeaseState};
use weft_model::lease::{self, Holder};

use crate::api::Socket;
use crate::cell::{Policies, Task, ids};
use crate::config::{Config, RunbookEndpoints};
use crate::directory::Directory;
use crate::flow_log::{self, FlowLog};
use crate::guard;
use crate::inbox::inbox;
use crate::journal::Journal;
use crate::kernel::{Counted, Kernel, LinkCounters, Netlink, events, nflog, ruleset_events};
use crate::lease_stream::{Controllers, LeaseStream};
use crate::metrics::Metrics;
use crate::metrics::measured::{self, Measured};
use crate::overlay::Overlay;
use crate::policy_server;
use crate::runbook::Runbook;
use crate::snapshot;

/// How long a daemon waits for the one before it to end.
const SUCCESSION: Duration = Duration::from_secs(3);
/// Forced polls that wait to be taken.
const POLLS: usize = 64;
/// How long a start waits to hear whether the rule in INPUT is there: iptables needs about 10 ms to say so.
const GUARD_SPEAKS_IN: Duration = Duration::from_secs(1);
/// How often lines say how much was not logged.
const COUNTED_EVERY: Duration = Duration::from_secs(10);

pub async fn run(config: Config, level: Level) -> Result<()> {
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
    let runbook_listeners = match &config.runbook_endpoints {
        RunbookEndpoints { enabled: false, .. } => None,
        RunbookEndpoints { force_address, debug_address, .. } => {
            let bind =
                async |address, field| patiently(async || http::bind(address).await).await.context(field);
            let force = bind(*force_address, "runbook_endpoints.force_address").await?;
            Some((force, bind(*debug_address, "runbook_endpoints.debug_address").await?))
        }
    };
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
    let names = Directory::default();
    if let Some(settings) = config.traffic_log() {
        traffic_log(settings, config.traffic_log_group, names.clone(), &mut registry).await?;
    }
    let mut cell = Cell::new(config.cell());
    cell.log_c2c(config.iptables_c2c_logging);
    cell.replay(records);
    let (polls, forced) = mpsc::channel(POLLS);
    let policies = match config.policy_server() {
        Some(server) => Some(follow_policies(server, ids(cell.roster()), forced, Arc::clone(&metrics)).await),
        None => None,
    };
    let (inbox, waiting) = inbox();
    let (guards, mut guard) = watch::channel(Guard::Ours);
    tokio::spawn(guard::run(config.guard(std::env::var_os("PATH").as_deref()), guards));
    // While it is not known that the rule in INPUT is there, our program refuses by itself, also what an operator's rule
    // accepts: a restart does not, unless iptables is busy for long.
    let _known_or_late = timeout(GUARD_SPEAKS_IN, guard.changed()).await;
    let runbook = Runbook {
        inbox: inbox.clone(),
        polls: policies.as_ref().map(|_| polls),
        groups: policies.as_ref().is_some_and(|policies| policies.groups),
        level: Arc::new(level),
    };
    let measured = Measured::new(measured::Sources {
        vtep: config.vtep_name.clone(),
        inbox: inbox.clone(),
        links: LinkCounters::open()?,
        directory: names.clone(),
        known: policies.as_ref().map(|policies| policies.known.clone()),
    });
    registry.register_collector(Box::new(Arc::clone(&measured)));
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
        names,
        metrics,
    };
    let started = task.start().await?;
    info!(underlay = %config.underlay_ip, version = env!("CARGO_PKG_VERSION"), "started");
    tokio::spawn(started.run(events, touched));
    let measure: http::Measure = Box::new(move || Box::pin(Arc::clone(&measured).measure()));
    let registry = Arc::new(registry);
    tokio::spawn(http::serve_measured(health_listener, move || health(&leases), registry, measure));
    if let Some((force, debug)) = runbook_listeners {
        tokio::spawn(runbook.serve(force, debug));
    }
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

/// Starts to follow the policy server, from what it last said.
async fn follow_policies(
    server: policy_server::Config,
    ids: Ids,
    forced: mpsc::Receiver<policy_server::Forced>,
    metrics: Arc<Metrics>,
) -> Policies {
    let groups = server.intervals.groups.is_some();
    let (out, known) = watch::channel(policy_server::known(&server).await);
    let (ids, wanted) = watch::channel(Arc::new(ids));
    let (applied, done) = watch::channel(policy_server::Applied::default());
    tokio::spawn(policy_server::run(server, wanted, out, done, forced, metrics));
    Policies { known, ids, applied, groups }
}

/// Starts the traffic log.
async fn traffic_log(
    settings: flow_log::Settings,
    group: u16,
    names: Directory,
    registry: &mut Registry,
) -> Result<()> {
    let records = patiently(async || nflog::listen(group)).await?;
    let log = FlowLog::start(settings, names).context("start the traffic log's thread")?;
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
    Ok(())
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
