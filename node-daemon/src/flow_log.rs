//! The traffic log: one line of JSON for each decision of the containers' firewall that the kernel tells, in the shape
//! of silk's iptables-logger, and lines that tell how many have none.
//!
//! Owns the log file. Woken by: records of the kernel ([`nflog`](crate::kernel::nflog)), and readings of the kernel's
//! counters. Emits: lines, and [`Counters`]. Nothing waits for the file: what it does not take in time is dropped and
//! counted.
//!
//! ```text
//!  kernel ──records──▶ FlowLog::run ─┬─bounded queue──▶ thread: line ──▶ file
//!  counters ─────────▶ Tally::read ──┘                    └──what was written──▶ Suppression
//! ```

use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Instant, SystemTime};

use futures::stream::{Stream, StreamExt};
use tokio::sync::mpsc;
use tracing::{debug, info, warn};
use weft_model::firewall::explain::{app_behind, policy_behind, rule_behind};
use weft_model::traffic::{Decision, Direction, Protocol, Record, Suppressed, Suppression, Totals};

use crate::directory::{Directory, Named};
use crate::kernel::nflog::Event;

mod counters;
mod file;
mod line;

pub use counters::{Counters, Lost};
pub use line::{Host, Timestamps};

use file::{LogFile, Turn};
use line::{Sender, Writer};

/// Lines that wait for the file: some 2 MiB at most.
const QUEUE: usize = 8192;
/// Lines that are written together.
const BATCH: usize = 128;

#[derive(Debug, Clone)]
pub struct Settings {
    pub file: PathBuf,
    pub timestamps: Timestamps,
    pub host: Host,
}

/// What is to be told in one line, with what was known when it happened.
#[derive(Debug)]
struct Entry {
    named: Named,
    told: Told,
}

#[derive(Debug)]
enum Told {
    Decided(Record),
    Suppressed(Suppressed, SystemTime),
}

impl Told {
    /// With what the directory has of those it is about.
    fn named(self, directory: &Directory) -> Entry {
        let named = match &self {
            Self::Decided(record) => {
                let sender = Some(record.packet.source).filter(|_| is_received_from_another(record));
                directory.named(record.container(), sender, record.at)
            }
            Self::Suppressed(suppressed, at) => directory.named(suppressed.container, None, *at),
        };
        Entry { named, told: self }
    }
}

impl Named {
    /// Who sent what a container received from another, as far as it is known.
    fn sender(&self, record: &Record) -> Option<Sender<'_>> {
        match &self.sender {
            Some(container) => Some(Sender::Container(container)),
            None if is_received_from_another(record) => {
                app_behind(&self.policies, record.mark).map(Sender::App)
            }
            None => None,
        }
    }

    fn rule(&self, record: &Record) -> Option<String> {
        let entered = self.container.as_ref()?;
        if record.decision == Decision::AllowedC2c {
            let app = entered.container.owner.app()?;
            return policy_behind(&self.policies, &app, record.mark, &record.packet);
        }
        rule_behind(entered.profile.as_ref()?.profile(), record.decision, &record.packet)
    }
}

fn is_received_from_another(record: &Record) -> bool {
    record.decision.is_between_containers() && record.direction() == Direction::Ingress
}

/// The end of the queue that is filled.
#[derive(Debug)]
pub struct FlowLog {
    tally: Tally,
}

/// Takes readings of the kernel's counters, and has lines written of what was suppressed.
#[derive(Debug, Clone)]
pub struct Tally {
    queue: mpsc::Sender<Entry>,
    directory: Directory,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    counters: Counters,
    suppression: Mutex<Suppression>,
}

impl FlowLog {
    /// Starts the thread that writes. A file that cannot be opened is no error: it is tried again with each line.
    pub fn start(settings: Settings, directory: Directory) -> io::Result<Self> {
        let (queue, waiting) = mpsc::channel(QUEUE);
        let shared = Arc::new(Shared::default());
        let scribe = Scribe {
            writer: Writer { host: settings.host, timestamps: settings.timestamps },
            file: LogFile::new(settings.file),
            shared: Arc::clone(&shared),
            told: Lost::default(),
        };
        thread::Builder::new().name("weft-traffic".into()).spawn(move || scribe.run(waiting))?;
        Ok(Self { tally: Tally { queue, directory, shared } })
    }

    pub fn counters(&self) -> Counters {
        self.tally.shared.counters.clone()
    }

    pub fn tally(&self) -> Tally {
        self.tally.clone()
    }

    /// Takes records as fast as they come, until there are no more.
    pub async fn run(self, events: impl Stream<Item = Event> + Send) {
        let mut events = std::pin::pin!(events);
        let counters = &self.tally.shared.counters;
        while let Some(event) = events.next().await {
            match event {
                Event::Decided(record) => {
                    if !self.tally.enqueue(Told::Decided(record)) {
                        counters.dropped_queue.inc();
                    }
                }
                Event::Lost(records) => {
                    counters.lost_kernel.inc_by(records);
                }
                Event::Foreign => {
                    counters.foreign.inc();
                    debug!("a record of the traffic log's group is not ours");
                }
            }
        }
    }
}

impl Tally {
    /// The counters as they are now: what was denied and limited, all of it. Writes a line for each container and
    /// decision of which more was counted than lines tell, as of the reading before: see [`Suppression`].
    pub fn read(&self, totals: &Totals, now: SystemTime) {
        let reports = self.shared.suppression().read(totals);
        for report in reports {
            if !self.enqueue(Told::Suppressed(report, now)) {
                self.shared.suppression().untold(&report);
            }
        }
    }

    /// False if too many wait.
    fn enqueue(&self, told: Told) -> bool {
        self.queue.try_send(told.named(&self.directory)).is_ok()
    }
}

impl Shared {
    /// It is whole after a panic as well: each of its functions changes it at its end.
    fn suppression(&self) -> MutexGuard<'_, Suppression> {
        self.suppression.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The thread that writes.
struct Scribe {
    writer: Writer,
    file: LogFile,
    shared: Arc<Shared>,
    /// Of what was lost, what lines tell already.
    told: Lost,
}

impl Scribe {
    fn run(mut self, mut waiting: mpsc::Receiver<Entry>) {
        let mut entries = Vec::with_capacity(BATCH);
        while waiting.blocking_recv_many(&mut entries, BATCH) > 0 {
            self.write(&entries, Instant::now());
            entries.clear();
        }
    }

    /// Writes a line for what was lost before, if anything was, and one for each entry.
    fn write(&mut self, entries: &[Entry], now: Instant) {
        let lost = self.shared.counters.lost();
        let news = lost.since(self.told);
        let at = entries.first().map(|entry| match &entry.told {
            Told::Decided(record) => record.at,
            Told::Suppressed(_, at) => *at,
        });
        let mut lines: Vec<String> =
            at.filter(|_| news.any()).map(|at| self.writer.lost(news, at)).into_iter().collect();
        let first = lines.len();
        lines.extend(entries.iter().map(|entry| self.line(entry)));
        let appended = self.file.append(&lines, now);
        if first > 0 && appended.whole >= first {
            self.told = lost;
        }
        let (written, unwritten) = entries.split_at(appended.whole.saturating_sub(first));
        self.account_for(written, unwritten);
        match appended.turn {
            Some(Turn::Fails(why)) => {
                let file = self.file.path().display();
                warn!(%file, %why, "the traffic log cannot be written; lines are lost");
            }
            Some(Turn::WorksAgain) => {
                info!(file = %self.file.path().display(), "the traffic log is written again");
            }
            None => {}
        }
    }

    fn line(&self, entry: &Entry) -> String {
        let named = &entry.named;
        let who = named.container.as_ref().map(|entered| &*entered.container);
        match &entry.told {
            Told::Decided(record) => {
                self.writer.decided(record, who, named.sender(record), named.rule(record))
            }
            Told::Suppressed(suppressed, at) => self.writer.suppressed(*suppressed, who, *at),
        }
    }

    fn account_for(&self, written: &[Entry], unwritten: &[Entry]) {
        let counters = &self.shared.counters;
        let mut suppression = self.shared.suppression();
        for entry in written {
            if let Told::Decided(record) = &entry.told
                && is_limited(record)
            {
                suppression.printed((record.container(), record.decision), 1);
            }
            counters.written.inc();
        }
        for entry in unwritten {
            match &entry.told {
                Told::Decided(_) => {
                    counters.dropped_file.inc();
                }
                // Told with a later one.
                Told::Suppressed(suppressed, _) => suppression.untold(suppressed),
            }
        }
    }
}

/// Whether the kernel counts what is told here: of what is allowed, it limits the lines of UDP only.
fn is_limited(record: &Record) -> bool {
    !record.decision.allows() || record.packet.protocol == Protocol::UDP
}

#[cfg(test)]
mod tests;
