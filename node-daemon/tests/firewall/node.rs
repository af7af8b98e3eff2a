//! The node's own tasks within a cell's namespace: who follows the policy server, and who changes the kernel.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use prometheus_client::registry::Registry;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use weft_daemon::tls::Files;
use weft_model::cell::Cell;
use weft_model::firewall::Guard;
use weft_model::follow::Intervals;
use weft_model::keeper::Keeper;
use weft_model::lease::{self, Holder};
use weft_model::subnet::SubnetKind;
use weft_node::cell::{Policies, Task, Underlay, ids};
use weft_node::directory::Directory;
use weft_node::inbox::{Inbox, inbox};
use weft_node::journal::Journal;
use weft_node::kernel::Netlink;
use weft_node::metrics::Metrics;
use weft_node::overlay::Overlay;
use weft_node::policy_server::{self, Applied, Config, Forced, Known, Server};
use weft_testbed::policy_server::PolicyServer;

/// A server that takes longer has failed.
pub(crate) const ANSWERS_WITHIN: Duration = Duration::from_millis(300);
const INTERVAL: Duration = Duration::from_millis(50);

pub(crate) struct Node {
    pub(crate) inbox: Inbox,
    pub(crate) known: watch::Receiver<Known>,
    pub(crate) applied: watch::Receiver<Applied>,
    tasks: [JoinHandle<()>; 2],
    /// What nobody changes here.
    _still: (watch::Sender<Overlay>, watch::Sender<Guard>, mpsc::Sender<Forced>),
}

impl Node {
    /// On the calling thread's network, with what is in `state`; returns after the first step. `like`: a cell with the
    /// same configuration and the same lease.
    pub(crate) async fn start(like: &Cell, state: &Path, server: &PolicyServer) -> Self {
        let inputs = like.inputs();
        let lease = inputs.lease.expect("a lease");
        let holder = Holder { cell_id: "cell".into(), boot_id: "boot".into() };
        let who = lease::Cell { underlay: lease.underlay, holder, wants: SubnetKind::Block };
        let mut overlay = Overlay::new(Instant::now(), Keeper::start(who, None).view());
        let peers = inputs.peers.values().map(|peer| (peer.underlay, *peer)).collect();
        overlay.table = Some((lease, peers));
        let (overlay, leases) = watch::channel(overlay);
        let (guard, guarded) = watch::channel(Guard::Ours);

        let config = config(state, server);
        let (out, known) = watch::channel(policy_server::known(&config).await);
        let (journal, records) = Journal::open(state, "boot").expect("a journal");
        let mut cell = Cell::new(inputs.config.clone());
        cell.replay(records);
        let (ids, wanted) = watch::channel(Arc::new(ids(cell.roster())));
        let (applied, done) = watch::channel(Applied::default());
        let metrics = Arc::new(Metrics::new(&mut Registry::default()));
        let (polls, forced) = mpsc::channel(1);
        let following = policy_server::run(config, wanted, out, done.clone(), forced, Arc::clone(&metrics));
        let follower = tokio::spawn(following);

        let (inbox, waiting) = inbox();
        let task = Task {
            cell,
            kernel: Netlink::open(inputs.config.vtep_name.clone()).expect("netlink"),
            journal,
            waiting,
            inbox: inbox.clone(),
            overlay: leases,
            underlay: Underlay { addresses: vec![lease.underlay.get()], ..Underlay::default() },
            guard: guarded,
            policies: Some(Policies { known: known.clone(), ids, applied, groups: true }),
            names: Directory::default(),
            metrics,
        };
        let started = task.start().await.expect("started");
        let nothing = (futures::stream::pending(), futures::stream::pending());
        let task = tokio::spawn(started.run(nothing.0, nothing.1));
        Self { inbox, known, applied: done, tasks: [follower, task], _still: (overlay, guard, polls) }
    }

    /// As `kill -9` does it; returns when nothing of it runs any more.
    pub(crate) async fn kill(self) {
        for task in self.tasks {
            task.abort();
            drop(task.await);
        }
    }
}

fn config(state: &Path, server: &PolicyServer) -> Config {
    let client = &server.files.client;
    let certificates = Files {
        ca: server.files.ca.clone(),
        certificate: client.certificate.clone(),
        key: client.key.clone(),
    };
    let url = server.url().parse().expect("a URL");
    Config {
        server: Server { url, certificates, answers_within: ANSWERS_WITHIN },
        intervals: Intervals { policies: INTERVAL, groups: Some(INTERVAL), router: None },
        state_directory: state.to_owned(),
    }
}
