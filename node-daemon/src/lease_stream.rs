//! The driver of [`Keeper`]: connects, sends, receives, and carries out what the keeper says.
//!
//! Owns the connection to one controller at a time. Woken by its answers and by the keeper's deadlines. Emits
//! [`Overlay`] for the cell's task, and the snapshot on disk. Certificates are read anew for every connection.

use std::error::Error;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use tokio::sync::{mpsc, watch};
use tokio::task::{AbortHandle, spawn_blocking};
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};
use tonic::{Request, Status};
use tracing::{error, info, warn};
use weft_daemon::cause;
use weft_daemon::tls::Files;
use weft_model::keeper::{Act, Event, Keeper, Snapshot};
use weft_model::lease::{Cell, Cursor, Lease};
use weft_model::reason::{Level, Reason};
use weft_proto::controller::leases_client::LeasesClient;
use weft_proto::controller::{AcquireRequest, WatchRequest};
use weft_proto::convert::{cell_to, changes_from, cursor_to, lease_from, lease_to, required};
use weft_proto::status::reason_of;

use crate::follower::{due, pick};
use crate::overlay::Overlay;
use crate::snapshot;

/// To a controller that is there, a connection takes milliseconds.
const CONNECT: Duration = Duration::from_secs(5);
/// For the answer to one request, and for a watch to open.
const ANSWER: Duration = Duration::from_secs(10);
/// A controller that does not answer pings for so long is gone.
const PING: Duration = Duration::from_secs(3);

#[derive(Debug)]
pub struct LeaseStream {
    pub cell: Cell,
    pub controllers: Controllers,
    pub state_directory: PathBuf,
    pub overlay: watch::Sender<Overlay>,
}

/// How to reach the controllers.
#[derive(Debug, Clone)]
pub struct Controllers {
    pub urls: Arc<[String]>,
    /// The name in their certificates.
    pub name: String,
    pub certificates: Files,
    /// Which is tried next.
    pub turn: Arc<AtomicUsize>,
}

/// What the attempt under way reports, and how to end it. A later attempt has a channel of its own, so nothing that
/// an ended one still says is heard.
struct Attempt {
    events: mpsc::Receiver<Event>,
    task: AbortHandle,
}

impl Drop for Attempt {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl LeaseStream {
    /// Follows the controllers for ever.
    pub async fn run(self, mut keeper: Keeper) {
        let origin = self.overlay.borrow().origin;
        let mut attempt: Option<Attempt> = None;
        let mut away = false;
        self.publish(&keeper, |_| {});
        loop {
            let event = tokio::select! {
                () = due(origin, keeper.next_deadline()) => Event::Due,
                event = next(&mut attempt) => event,
            };
            self.log(&event, &mut away);
            if matches!(event, Event::Refused(_) | Event::Closed(_)) {
                self.controllers.turn.fetch_add(1, Ordering::Relaxed);
                attempt = None;
            }
            let following = match &event {
                Event::Opened => Some(Some(self.controllers.url())),
                Event::Refused(_) | Event::Closed(_) => Some(None),
                _ => None,
            };
            let acts = keeper.on(event, origin.elapsed(), &mut pick);
            self.publish(&keeper, |overlay| {
                if let Some(controller) = following {
                    overlay.controller = controller;
                }
            });
            for act in acts {
                self.act(act, &keeper, &mut attempt).await;
            }
        }
    }

    async fn act(&self, act: Act, keeper: &Keeper, attempt: &mut Option<Attempt>) {
        match act {
            Act::Acquire => *attempt = Some(self.acquire()),
            Act::Watch { held, since } => *attempt = Some(self.watch(held, since)),
            Act::HangUp => *attempt = None,
            Act::Publish { own, peers } => {
                info!(subnet = %own.subnet, peers = peers.len(), "leases changed");
                self.publish(keeper, |overlay| overlay.table = Some((own, peers)));
            }
            Act::Save(snapshot) => self.save(snapshot).await,
            Act::Fence(reason) => {
                error!(why = %reason, "fenced: no container is added until this is mended");
                self.publish(keeper, |overlay| overlay.fenced = Some(reason));
            }
            Act::Unfence => {
                info!("lease confirmed; no longer fenced");
                self.publish(keeper, |overlay| overlay.fenced = None);
            }
            Act::Mistrust(what) => warn!(what, controller = self.controllers.url(), "table asked for again"),
        }
    }

    fn publish(&self, keeper: &Keeper, change: impl FnOnce(&mut Overlay)) {
        self.overlay.send_modify(|overlay| {
            change(overlay);
            overlay.view = keeper.view();
        });
    }

    async fn save(&self, snapshot: Snapshot) {
        let directory = self.state_directory.clone();
        let saved = spawn_blocking(move || snapshot::save(&directory, &snapshot)).await;
        if let Ok(Err(error)) = saved {
            error!(error = %cause::chain(&error), "snapshot not saved; a restart would start from an older one");
        }
    }

    /// Once per change: away, refused, followed again.
    fn log(&self, event: &Event, away: &mut bool) {
        match event {
            Event::Opened => {
                *away = false;
                info!(controller = self.controllers.url(), "controller followed");
            }
            Event::Refused(reason) | Event::Closed(reason) if !std::mem::replace(away, true) => {
                let controller = self.controllers.url();
                match reason.meaning().level {
                    Level::Error => error!(controller, why = %reason, "no lease from the controller"),
                    _ => warn!(controller, why = %reason, "controller lost; what is in place stays"),
                }
            }
            _ => {}
        }
    }

    fn acquire(&self) -> Attempt {
        let (controllers, cell) = (self.controllers.clone(), self.cell.clone());
        attempt(|events| async move {
            let event = match ask(&controllers, &cell).await {
                Ok(lease) => Event::Granted(lease),
                Err(reason) => Event::Refused(reason),
            };
            drop(events.send(event).await);
        })
    }

    fn watch(&self, held: Lease, since: Option<Cursor>) -> Attempt {
        let (controllers, cell) = (self.controllers.clone(), self.cell.clone());
        attempt(move |events| async move {
            let Err(reason) = follow(&controllers, &cell, &held, since, &events).await;
            drop(events.send(Event::Closed(reason)).await);
        })
    }
}

fn attempt<F: Future<Output = ()> + Send + 'static>(run: impl FnOnce(mpsc::Sender<Event>) -> F) -> Attempt {
    let (sender, events) = mpsc::channel(1);
    Attempt { events, task: tokio::spawn(run(sender)).abort_handle() }
}

async fn next(attempt: &mut Option<Attempt>) -> Event {
    match attempt {
        Some(attempt) => match attempt.events.recv().await {
            Some(event) => event,
            // It has said its last event; the keeper's deadline comes next.
            None => std::future::pending().await,
        },
        None => std::future::pending().await,
    }
}

async fn ask(controllers: &Controllers, cell: &Cell) -> Result<Lease, Reason> {
    let mut client = controllers.connect().await?;
    let request = AcquireRequest { cell: Some(cell_to(cell)) };
    let answer = tokio::time::timeout(ANSWER, client.acquire(request)).await;
    let answer = answer.map_err(|_| controllers.silent())?.map_err(|status| controllers.failed(&status))?;
    lease_from(cell.underlay, &required("lease", answer.into_inner().lease)?)
}

async fn follow(
    controllers: &Controllers,
    cell: &Cell,
    held: &Lease,
    since: Option<Cursor>,
    events: &mpsc::Sender<Event>,
) -> Result<std::convert::Infallible, Reason> {
    let mut client = controllers.connect().await?;
    let request =
        WatchRequest { cell: Some(cell_to(cell)), held: Some(lease_to(held)), since: since.map(cursor_to) };
    let answer = tokio::time::timeout(ANSWER, client.watch(Request::new(request))).await;
    let answer = answer.map_err(|_| controllers.silent())?.map_err(|status| controllers.failed(&status))?;
    drop(events.send(Event::Opened).await);
    let mut stream = answer.into_inner();
    loop {
        let message = stream.message().await.map_err(|status| controllers.failed(&status))?;
        let why = || format!("{} has ended the stream", controllers.url());
        let message = message.ok_or_else(|| Reason::ControllerAway { why: why() })?;
        drop(events.send(Event::Changes(changes_from(message)?)).await);
    }
}

impl Controllers {
    fn url(&self) -> String {
        let turn = self.turn.load(Ordering::Relaxed);
        self.urls.get(turn % self.urls.len().max(1)).cloned().unwrap_or_default()
    }

    async fn connect(&self) -> Result<LeasesClient<Channel>, Reason> {
        #[expect(clippy::disallowed_methods, reason = "certificates are valid in wall-clock time")]
        let now = SystemTime::now();
        // A certificate that cannot be used may be replaced at any time, so this is asked again like an outage.
        let unusable = |why: String| Reason::ControllerAway { why };
        let loaded = self.certificates.load(now).map_err(|error| unusable(error.to_string()))?;
        let pem = loaded.pem();
        let tls = ClientTlsConfig::new()
            .ca_certificate(Certificate::from_pem(&pem.ca))
            .identity(Identity::from_pem(&pem.certificate, &pem.key))
            .domain_name(self.name.clone());
        let url = self.url();
        let endpoint = Endpoint::from_shared(url.clone()).and_then(|endpoint| endpoint.tls_config(tls));
        let endpoint = endpoint.map_err(|error| unusable(format!("{url}: {}", cause::last(&error))))?;
        let endpoint = endpoint
            .connect_timeout(CONNECT)
            .http2_keep_alive_interval(PING)
            .keep_alive_timeout(PING)
            .keep_alive_while_idle(true);
        let connected = tokio::time::timeout(CONNECT, endpoint.connect()).await;
        let connected = connected.map_err(|_| unusable(format!("{url}: no connection in time")))?;
        connected.map(LeasesClient::new).map_err(|error| unusable(format!("{url}: {}", cause::last(&error))))
    }

    /// A status with a reason is the controller's word; any other is the connection's.
    fn failed(&self, status: &Status) -> Reason {
        reason_of(status).unwrap_or_else(|| {
            let cause = status.source().map_or_else(|| status.message().to_owned(), cause::last);
            Reason::ControllerAway { why: format!("{}: {cause}", self.url()) }
        })
    }

    fn silent(&self) -> Reason {
        Reason::ControllerAway { why: format!("{}: no answer in time", self.url()) }
    }
}
