//! What an ADD consists of, each part alone.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use tokio::net::UnixStream;
use tokio::runtime::Runtime;
use tonic::transport::{Channel, Endpoint, Uri};
use weft_proto::node::StatusRequest;
use weft_proto::node::containers_client::ContainersClient;
use weft_testbed::external_networker::INTERFACE;
use weft_testbed::lab::{Cell, programs};

use super::calls::call;
use super::idle::Idle;
use super::transactions::{self, Transactions};
use super::{Times, WARM_UPS, interrupt, progress};

#[derive(Debug, Serialize)]
pub(super) struct Part {
    pub(super) name: String,
    pub(super) what: String,
    #[serde(flatten)]
    pub(super) times: Times,
}

pub(super) fn all(cell: &Cell, count: usize) -> Result<Vec<Part>> {
    progress("the parts alone");
    let no_op = programs()?.join("no-op");
    ensure!(no_op.is_file(), "{} is not there: scripts/bench builds it", no_op.display());
    let exec = || call(Command::new(&no_op).env_clear(), b"").map(|call| call.took);
    let mut version = Command::new(cell.plugin_dir().join("weft-cni"));
    version.env_clear().env("CNI_COMMAND", "VERSION");
    let version = || call(&mut version, br#"{"cniVersion":"1.0.0"}"#).map(|call| call.took);
    let mut rpc = Rpc::connect(cell)?;
    let mut links = Links::start(cell)?;
    let file = cell.directory.join("entry-alone");
    let mut parts = vec![
        part("exec", "exec of a static program that does nothing", count, exec)?,
        part("version", "weft-cni VERSION: exec, input read, answer printed, no daemon", count, version)?,
        part("rpc", "Status, over a connection to the node's socket that is there", count, || rpc.call())?,
        part("link", "a pair born in both namespaces, addressed and raised by the cell", count, || {
            links.lay()
        })?,
        part("journal", "300 bytes written and renamed", count, || replace(&file))?,
    ];
    let idle = Idle::start(cell)?;
    for rules in [10, 1000] {
        let what = format!("weft-cni ADD with {rules} rules, answered by a node that does nothing");
        parts.push(part(&format!("client-{rules}"), &what, count, || idle.add(rules))?);
    }
    for (rules, list) in [10, 100, 1000].into_iter().flat_map(|rules| [(rules, "known"), (rules, "new")]) {
        let mut transactions = Transactions::new(rules, list)?;
        let what = format!("the transaction of a container whose list of {rules} rules is {list}");
        parts.push(part(&transactions::name(rules, list), &what, count, || transactions.send())?);
    }
    Ok(parts)
}

fn part(name: &str, what: &str, count: usize, mut work: impl FnMut() -> Result<Duration>) -> Result<Part> {
    for _ in 0..WARM_UPS {
        work()?;
    }
    let times = (0..count).map(|_| interrupt::check().and_then(|()| work())).collect::<Result<Vec<_>>>()?;
    Ok(Part { name: name.to_owned(), what: what.to_owned(), times: Times::of(times.into_iter()) })
}

fn replace(file: &Path) -> Result<Duration> {
    let start = Instant::now();
    let new = file.with_extension("new");
    std::fs::write(&new, [b'x'; 300])?;
    std::fs::rename(new, file)?;
    Ok(start.elapsed())
}

/// A call that does next to nothing.
struct Rpc {
    runtime: Runtime,
    client: ContainersClient<Channel>,
}

impl Rpc {
    fn connect(cell: &Cell) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let socket = cell.socket.clone();
        let connect = tower::service_fn(move |_: Uri| {
            let socket = socket.clone();
            async move { UnixStream::connect(socket).await.map(TokioIo::new) }
        });
        let node = Endpoint::from_static("http://node");
        let channel =
            runtime.block_on(node.connect_with_connector(connect)).context("connect to the node")?;
        Ok(Self { runtime, client: ContainersClient::new(channel) })
    }

    fn call(&mut self) -> Result<Duration> {
        let start = Instant::now();
        self.runtime.block_on(self.client.status(StatusRequest {})).context("ask for the node's status")?;
        Ok(start.elapsed())
    }
}

/// One long-lived `ip -batch` in the cell: lays links as fast as the kernel takes them, without an exec for each.
struct Links<'a> {
    cell: &'a Cell,
    ip: Child,
    answers: BufReader<ChildStdout>,
    laid: usize,
}

impl<'a> Links<'a> {
    fn start(cell: &'a Cell) -> Result<Self> {
        let mut command = Command::new("ip");
        command.args(["-batch", "-"]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut ip = cell.place.enter(|| command.spawn())?.context("execute ip (package iproute2)")?;
        let answers = BufReader::new(ip.stdout.take().context("read from ip")?);
        Ok(Self { cell, ip, answers, laid: 0 })
    }

    /// The time of the link alone; its namespace is made before and removed after.
    fn lay(&mut self) -> Result<Duration> {
        self.laid += 1;
        let handle = format!("link-alone-{}", self.laid);
        self.cell.create_namespace(&handle)?;
        let file = self.cell.namespace_file(&handle);
        let start = Instant::now();
        self.tell(&format!(
            "link add alone mtu 1450 type veth peer name {INTERFACE} mtu 1450 netns {}\n\
             addr add 169.254.0.1 peer 192.0.2.1 dev alone\nlink set alone up\n\
             neigh add 192.0.2.1 lladdr ee:ee:00:00:00:01 nud permanent dev alone\n",
            file.display()
        ))?;
        let took = start.elapsed();
        self.tell("link del alone\n")?;
        self.cell.remove_namespace(&handle)?;
        Ok(took)
    }

    /// Returns once everything told is done: a question at its end is answered.
    fn tell(&mut self, batch: &str) -> Result<()> {
        let stdin = self.ip.stdin.as_mut().context("write to ip")?;
        stdin.write_all(format!("{batch}link show dev lo\n").as_bytes())?;
        for _ in 0..2 {
            let mut line = String::new();
            ensure!(self.answers.read_line(&mut line)? > 0, "ip refused:\n{batch}");
        }
        Ok(())
    }
}

impl Drop for Links<'_> {
    fn drop(&mut self) {
        // The end of its input is the end of ip.
        drop(self.ip.stdin.take());
        drop(self.ip.wait());
    }
}
