//! Real controllers, as programs, over mutual TLS on loopback.

use std::collections::BTreeSet;
use std::fs;
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;
use tonic::Status;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};
use weft_model::reason::Reason;
use weft_proto::controller::leases_client::LeasesClient;
use weft_proto::controller::{
    AcquireRequest, Cell, Cursor, Kind, Lease, ListRequest, ReleaseRequest, RenewRequest, WatchRequest,
    WatchResponse,
};
use weft_proto::status::reason_of;
use weft_testbed::pki::Authority;
use weft_testbed::postgres::Postgres;

type Client = LeasesClient<Channel>;

struct World {
    directory: TempDir,
    authority: Authority,
}

/// A running controller; ended by its pid when dropped.
struct Controller {
    child: Child,
    port: u16,
    log: PathBuf,
}

impl Drop for Controller {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

fn free_port() -> u16 {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).and_then(|l| l.local_addr()).expect("a free port").port()
}

impl World {
    fn new() -> Self {
        let authority = Authority::new("weft test").expect("authority");
        Self { directory: tempfile::tempdir().expect("directory"), authority }
    }

    fn path(&self) -> &Path {
        self.directory.path()
    }

    /// Configuration of a controller, with `more` properties.
    fn config(&self, name: &str, more: &Value) -> (PathBuf, u16) {
        let directory = self.path().join(name);
        fs::create_dir_all(&directory).expect("directory");
        let ca = directory.join("ca.pem");
        self.authority.write(&ca).expect("write");
        let identity = self.authority.controller(Ipv4Addr::LOCALHOST.into()).expect("identity");
        let own = identity.write(&directory, "own").expect("write");
        let port = free_port();
        let mut config = json!({
            "listen": format!("127.0.0.1:{port}"), "health_address": format!("127.0.0.1:{}", free_port()),
            "ca_file": ca, "certificate_file": own.certificate, "key_file": own.key,
            "state_directory": directory, "reconcile_seconds": 0, "log_format": "text",
        });
        for (field, value) in more.as_object().expect("object") {
            config[field] = value.clone();
        }
        let file = directory.join("weft-controller.json");
        fs::write(&file, config.to_string()).expect("write");
        (file, port)
    }

    fn start(&self, name: &str, more: &Value) -> Controller {
        let (file, port) = self.config(name, more);
        let log = self.path().join(format!("{name}.log"));
        let out = fs::File::create(&log).expect("log");
        let child = Command::new(env!("CARGO_BIN_EXE_weft-controller"))
            .args(["run", "--config"])
            .arg(&file)
            .stdout(out.try_clone().expect("log"))
            .stderr(out)
            .spawn()
            .expect("start weft-controller");
        Controller { child, port, log }
    }

    fn tls(&self, name: &str) -> ClientTlsConfig {
        let identity = self.authority.named(name).expect("identity");
        ClientTlsConfig::new()
            .ca_certificate(Certificate::from_pem(self.authority.pem()))
            .identity(Identity::from_pem(identity.certificate, identity.key))
            .domain_name("weft-controller")
    }

    async fn client(&self, controller: &Controller) -> Client {
        connect(controller, self.tls("weft-node")).await
    }
}

/// Tries until the controller listens.
async fn connect(controller: &Controller, tls: ClientTlsConfig) -> Client {
    let deadline = Instant::now() + Duration::from_secs(20);
    let url = format!("https://127.0.0.1:{}", controller.port);
    let endpoint = Endpoint::from_shared(url).expect("url").tls_config(tls).expect("tls");
    loop {
        match endpoint.connect().await {
            Ok(channel) => return LeasesClient::new(channel),
            Err(error) if Instant::now() > deadline => {
                panic!("{error:?}; log: {}", fs::read_to_string(&controller.log).unwrap_or_default())
            }
            Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    }
}

fn cell(n: u8) -> Cell {
    Cell {
        underlay: Ipv4Addr::new(10, 0, 0, n).into(),
        cell_id: format!("cell-{n}"),
        boot_id: "boot".into(),
        wants: Kind::Block.into(),
    }
}

async fn acquire(client: &mut Client, n: u8) -> Result<Lease, Status> {
    let answer = client.acquire(AcquireRequest { cell: Some(cell(n)) }).await?;
    Ok(answer.into_inner().lease.expect("a lease"))
}

/// Until the database has been prepared.
async fn acquire_patiently(client: &mut Client, n: u8) -> Lease {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        match acquire(client, n).await {
            Ok(lease) => return lease,
            Err(status) if Instant::now() > deadline => panic!("{status:?}"),
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
}

#[track_caller]
fn reason<T: std::fmt::Debug>(answer: Result<T, Status>) -> Reason {
    let status = answer.expect_err("refused");
    reason_of(&status).unwrap_or_else(|| panic!("no reason: {status:?}"))
}

/// No WARN and no ERROR but those expected.
fn quiet(controller: &Controller, expected: &[&str]) {
    let log = fs::read_to_string(&controller.log).expect("log");
    for line in log.lines().filter(|line| line.contains(" WARN ") || line.contains(" ERROR ")) {
        assert!(expected.iter().any(|text| line.contains(text)), "unexpected in the log: {line}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn forty_cells_at_once_on_two_controllers_get_forty_subnets() {
    let (world, server) = (World::new(), Postgres::scratch().expect("a Postgres server"));
    let database = json!({"database": server.database("weft").expect("database")});
    let controllers = [world.start("a", &database), world.start("b", &database)];
    let mut clients = [world.client(&controllers[0]).await, world.client(&controllers[1]).await];
    for client in &mut clients {
        acquire_patiently(client, 1).await;
    }
    let at_once = (1..=40).map(|n| {
        let mut client = clients[usize::from(n) % 2].clone();
        tokio::spawn(async move { acquire(&mut client, n).await })
    });
    let mut subnets = BTreeSet::new();
    for answer in at_once.collect::<Vec<_>>() {
        let lease = answer.await.expect("task").expect("a lease");
        assert_eq!(lease.prefix, 24);
        subnets.insert(lease.subnet);
    }
    assert_eq!(subnets.len(), 40);

    // Twenty at once for one cell, on both: one lease, no error.
    let at_once = (0..20).map(|n: usize| {
        let mut client = clients[n % 2].clone();
        tokio::spawn(async move { acquire(&mut client, 99).await })
    });
    let mut subnets = BTreeSet::new();
    for answer in at_once.collect::<Vec<_>>() {
        subnets.insert(answer.await.expect("task").expect("a lease").subnet);
    }
    assert_eq!(subnets.len(), 1);
    controllers.iter().for_each(|controller| quiet(controller, &[]));
}

#[tokio::test]
async fn an_exhausted_pool_is_refused_at_once_and_a_released_subnet_is_given_again() {
    let world = World::new();
    // Three blocks, on the embedded database.
    let controller = world.start("a", &json!({"network": "10.255.0.0/22"}));
    let mut client = world.client(&controller).await;
    let mut leases = Vec::new();
    for n in 1..=3 {
        leases.push(acquire_patiently(&mut client, n).await);
    }
    assert_eq!(
        reason(acquire(&mut client, 4).await),
        Reason::PoolExhausted { network: "10.255.0.0/22".into() }
    );
    client.release(ReleaseRequest { cell: Some(cell(2)) }).await.expect("release");
    client.release(ReleaseRequest { cell: Some(cell(77)) }).await.expect("what is not held is no error");
    assert_eq!(acquire(&mut client, 4).await.expect("available again"), leases[1]);

    // A claim of what another cell holds is a conflict; of what lies outside the pool, a wrong field.
    let mut renew = async |n: u8, lease: &Lease| {
        let request = RenewRequest { cell: Some(cell(n)), lease: Some(lease.clone()) };
        client.renew(request).await.map(drop)
    };
    renew(1, &leases[0]).await.expect("its own");
    let conflict = reason(renew(2, &leases[1]).await);
    assert!(matches!(&conflict, Reason::LeaseConflict { holder } if holder.contains("cell-4")), "{conflict}");
    let outside = Lease { subnet: Ipv4Addr::new(10, 99, 0, 0).into(), prefix: 24, mac: Vec::new() };
    let invalid = reason(renew(2, &outside).await);
    assert!(matches!(&invalid, Reason::InvalidField { field, .. } if field == "lease"), "{invalid}");
    quiet(&controller, &[]);
}

struct Followed(tonic::Streaming<WatchResponse>);

impl Followed {
    async fn open(client: &mut Client, n: u8, held: Option<Lease>, since: Option<Cursor>) -> Self {
        let request = WatchRequest { cell: Some(cell(n)), held, since };
        Self(client.watch(request).await.expect("watch").into_inner())
    }

    async fn next(&mut self) -> WatchResponse {
        let next = tokio::time::timeout(Duration::from_secs(10), self.0.message()).await;
        next.expect("a message in time").expect("no error").expect("no end")
    }
}

#[tokio::test]
async fn changes_reach_streams_on_both_controllers_and_a_cursor_resumes() {
    let (world, server) = (World::new(), Postgres::scratch().expect("a Postgres server"));
    let database = json!({"database": server.database("weft").expect("database")});
    let controllers = [world.start("a", &database), world.start("b", &database)];
    let mut a = world.client(&controllers[0]).await;
    let mut b = world.client(&controllers[1]).await;
    let own = acquire_patiently(&mut a, 1).await;
    let mut here = Followed::open(&mut a, 1, Some(own.clone()), None).await;
    let mut there = Followed::open(&mut b, 2, None, None).await;
    for stream in [&mut here, &mut there] {
        let mut first = stream.next().await;
        // The other controller may have yet to hear of the first lease.
        while first.changes.is_empty() {
            first = stream.next().await;
        }
        assert_eq!(first.changes.len(), 1);
    }
    acquire_patiently(&mut b, 2).await;
    let (one, two) = (here.next().await, there.next().await);
    assert_eq!((one.changes.len(), one.from_empty, one.digest), (1, false, two.digest));
    assert_eq!(one.at, two.at, "one history");

    acquire_patiently(&mut b, 3).await;
    let missed = here.next().await;
    let mut resumed = Followed::open(&mut b, 2, None, one.at).await;
    let answer = resumed.next().await;
    assert_eq!((answer.from_empty, &answer.changes, answer.at), (false, &missed.changes, missed.at));

    // Another epoch: everything, from empty.
    let elsewhere = Cursor { epoch: 1, revision: 1 };
    let mut anew = Followed::open(&mut b, 2, None, Some(elsewhere)).await;
    let answer = anew.next().await;
    assert_eq!((answer.from_empty, answer.changes.len()), (true, 3));
    controllers.iter().for_each(|controller| quiet(controller, &[]));
}

#[tokio::test]
async fn a_database_that_is_away_is_said_so_and_nothing_is_lost() {
    let (world, server) = (World::new(), Postgres::scratch().expect("a Postgres server"));
    let controller = world.start("a", &json!({"database": server.database("weft").expect("database")}));
    let mut client = world.client(&controller).await;
    let lease = acquire_patiently(&mut client, 1).await;
    let mut stream = Followed::open(&mut client, 1, Some(lease.clone()), None).await;
    stream.next().await;

    server.kill().expect("kill -9");
    let answer = tokio::time::timeout(Duration::from_secs(20), acquire(&mut client, 2)).await;
    assert_eq!(reason(answer.expect("an answer in time")), Reason::StoreUnavailable);
    // Who follows is not cut off, and the list is still there to look at.
    let listed = client.list(ListRequest {}).await.expect("list").into_inner();
    assert_eq!(listed.leases.len(), 1);

    server.start().expect("start");
    let second = acquire_patiently(&mut client, 2).await;
    assert_ne!(second, lease);
    assert_eq!(acquire_patiently(&mut client, 1).await, lease, "the same as before");
    assert_eq!(stream.next().await.changes.len(), 1, "the stream goes on");
    // The pool complains of its own connections.
    quiet(&controller, &["lease database lost", "cannot listen to the database", "sqlx_core::pool"]);
}

#[tokio::test]
async fn a_lost_database_is_put_together_again_from_claims() {
    let (world, server) = (World::new(), Postgres::scratch().expect("a Postgres server"));
    let more =
        |name: &str| json!({"database": server.database(name).expect("database"), "reconcile_seconds": 3600});
    let controller = world.start("a", &more("new"));
    let mut client = world.client(&controller).await;
    let held = Lease { subnet: Ipv4Addr::new(10, 255, 77, 0).into(), prefix: 24, mac: Vec::new() };
    let deadline = Instant::now() + Duration::from_secs(20);
    let claim = RenewRequest { cell: Some(cell(1)), lease: Some(held.clone()) };
    while client.renew(claim.clone()).await.is_err() {
        assert!(Instant::now() < deadline, "the claim is not taken in");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(acquire(&mut client, 1).await.expect("its own"), held);
    assert_eq!(
        reason(acquire(&mut client, 2).await),
        Reason::Reconciling,
        "no new subnet until all have claimed"
    );
}

#[tokio::test]
async fn a_certificate_that_may_not_is_refused() {
    let world = World::new();
    let controller = world.start("a", &json!({}));
    let mut client = world.client(&controller).await;
    let lease = acquire_patiently(&mut client, 1).await;

    let mut stranger = connect(&controller, world.tls("somebody-else")).await;
    assert_eq!(reason(acquire(&mut stranger, 1).await), Reason::WrongRole { wanted: "weft-node".into() });
    let renew = RenewRequest { cell: Some(cell(1)), lease: Some(lease) };
    assert!(matches!(reason(stranger.renew(renew).await), Reason::WrongRole { .. }));
    let release = ReleaseRequest { cell: Some(cell(1)) };
    assert!(matches!(reason(stranger.release(release).await), Reason::WrongRole { .. }));
    let watch = WatchRequest { cell: Some(cell(1)), held: None, since: None };
    assert!(matches!(reason(stranger.watch(watch).await), Reason::WrongRole { .. }));
    stranger.list(ListRequest {}).await.expect("anybody of the authority may look");

    // Another authority, an expired certificate, none at all: no connection.
    let other = Authority::new("weft test").expect("authority").named("weft-node").expect("identity");
    let expired = world.authority.expired("weft-node", None).expect("identity");
    let base = || {
        ClientTlsConfig::new()
            .ca_certificate(Certificate::from_pem(world.authority.pem()))
            .domain_name("weft-controller")
    };
    let identity =
        |identity: weft_testbed::pki::Identity| Identity::from_pem(identity.certificate, identity.key);
    for (what, tls) in [
        ("another authority", base().identity(identity(other))),
        ("expired", base().identity(identity(expired))),
        ("none", base()),
    ] {
        let url = format!("https://127.0.0.1:{}", controller.port);
        let endpoint = Endpoint::from_shared(url).expect("url").tls_config(tls).expect("tls");
        // With TLS 1.3 the client hears of it with its first answer.
        let refused = match endpoint.connect().await {
            Ok(channel) => LeasesClient::new(channel).list(ListRequest {}).await.is_err(),
            Err(_) => true,
        };
        assert!(refused, "{what}");
    }
    quiet(&controller, &[]);
}

#[tokio::test]
async fn new_certificates_are_used_without_a_restart() {
    let world = World::new();
    let controller = world.start("a", &json!({}));
    acquire_patiently(&mut world.client(&controller).await, 1).await;
    // The authority is replaced, and with it the controller's certificate.
    let next = World::new();
    let directory = world.path().join("a");
    next.authority.write(&directory.join("ca.pem")).expect("write");
    let identity = next.authority.controller(Ipv4Addr::LOCALHOST.into()).expect("identity");
    identity.write(&directory, "own").expect("write");
    let client = tokio::time::timeout(Duration::from_secs(20), next.client(&controller)).await;
    acquire(&mut client.expect("in time"), 1).await.expect("acquire");
    quiet(&controller, &[]);
}

/// Runs the program to its end: exit status and standard error.
fn ends(arguments: &[&str]) -> (Option<i32>, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_weft-controller"))
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .expect("run weft-controller");
    (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
fn what_cannot_start_says_which_field_or_file() {
    let world = World::new();
    let run = |name: &str, more: Value| {
        let (file, _) = world.config(name, &more);
        let (code, said) = ends(&["run", "--config", file.to_str().expect("path")]);
        assert_eq!(code, Some(1), "{said}");
        said
    };
    let said = run("unknown", json!({"no_such_field": 1}));
    assert!(said.contains("no_such_field"), "{said}");
    let said = run("pool", json!({"subnet_prefix_length": 8}));
    assert!(said.contains("subnet_prefix_length"), "{said}");
    let said = run("key", json!({"key_file": "/nonexistent/key.pem"}));
    assert!(said.contains("/nonexistent/key.pem"), "{said}");
    let expired = world.authority.expired("weft-controller", None).expect("identity");
    let files = expired.write(world.path(), "expired").expect("write");
    let said = run("expired", json!({"certificate_file": files.certificate, "key_file": files.key}));
    assert!(said.contains("expired.pem") && said.contains("expired on"), "{said}");
    let said = run("health", json!({"health_address": "0.0.0.0:1"}));
    assert!(said.contains("health_address"), "{said}");

    let (code, said) = ends(&["run", "--config", "/nonexistent.json"]);
    assert!(code == Some(1) && said.contains("/nonexistent.json"), "{said}");
    let broken = world.path().join("broken.json");
    fs::write(&broken, "{\"listen\": ").expect("write");
    let (code, said) = ends(&["run", "--config", broken.to_str().expect("path")]);
    assert!(code == Some(1) && said.contains("broken.json") && said.contains("line 1"), "{said}");
    assert_eq!(ends(&["--help"]).0, Some(0));
    assert_eq!(ends(&["run"]).0, Some(2));
}
