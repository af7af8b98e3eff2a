//! The plugin as a runtime executes it, against a node that answers what it is told to.
#![expect(clippy::unwrap_used, reason = "a panic is how a test fails, in its helpers too")]

#[path = "plugin/spec.rs"]
mod spec;

use std::fs::File;
use std::io::{IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixListener as StdUnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::Interest;
use tokio::net::{UnixListener, UnixStream};
use tokio_stream::once;
use tonic::{Code, Request, Response, Status};
use weft_model::profile::Digest;
use weft_model::reason::Reason;
use weft_proto::node::containers_server::{Containers, ContainersServer};
use weft_proto::node::{
    AddKnownRequest, AddRequest, AddResponse, CheckRequest, CheckResponse, CollectRequest, CollectResponse,
    ConnectionRate, DeleteRequest, DeleteResponse, DenyNetworks, ExplainRequest, ExplainResponse,
    HostService, Network, OutboundConnections, PortMapping, ReadyRequest, ReadyResponse, Settings,
    StatusRequest, StatusResponse, Transport,
};
use weft_proto::status::to_status;

/// What arrived at the node.
#[derive(Debug, Default)]
struct Arrived {
    adds: Vec<AddRequest>,
    /// The node does not know the rules that it is asked for, and says so.
    unknown: Option<Code>,
    known: Vec<AddKnownRequest>,
    checks: Vec<CheckRequest>,
    deletes: Vec<DeleteRequest>,
    collections: Vec<CollectRequest>,
    /// Device and inode of each descriptor.
    namespaces: Vec<(u64, u64)>,
}

#[derive(Debug, Clone)]
struct Node {
    arrived: Arc<Mutex<Arrived>>,
    refuses: Option<Reason>,
}

impl Node {
    fn answer<T>(&self, answer: T) -> Result<Response<T>, Status> {
        self.refuses.as_ref().map_or(Ok(Response::new(answer)), |reason| Err(to_status(reason)))
    }
}

#[tonic::async_trait]
impl Containers for Node {
    async fn add(&self, request: Request<AddRequest>) -> Result<Response<AddResponse>, Status> {
        self.arrived.lock().unwrap().adds.push(request.into_inner());
        self.answer(AddResponse {
            address: 0x0aff_1e02,
            gateway: 0xa9fe_0001,
            host_interface: "s-010255030002".into(),
            host_mac: vec![0xaa, 0xaa, 10, 255, 30, 2],
            container_mac: vec![0xee, 0xee, 10, 255, 30, 2],
            mtu: 1450,
        })
    }

    async fn add_known(&self, request: Request<AddKnownRequest>) -> Result<Response<AddResponse>, Status> {
        let mut arrived = self.arrived.lock().unwrap();
        arrived.known.push(request.into_inner());
        match arrived.unknown {
            None => self.answer(AddResponse { address: 0x0aff_1e02, ..AddResponse::default() }),
            Some(code) => Err(Status::new(code, "not known")),
        }
    }

    async fn check(&self, request: Request<CheckRequest>) -> Result<Response<CheckResponse>, Status> {
        self.arrived.lock().unwrap().checks.push(request.into_inner());
        self.answer(CheckResponse {})
    }

    async fn delete(&self, request: Request<DeleteRequest>) -> Result<Response<DeleteResponse>, Status> {
        self.arrived.lock().unwrap().deletes.push(request.into_inner());
        self.answer(DeleteResponse {})
    }

    async fn collect(&self, request: Request<CollectRequest>) -> Result<Response<CollectResponse>, Status> {
        self.arrived.lock().unwrap().collections.push(request.into_inner());
        self.answer(CollectResponse {})
    }

    async fn ready(&self, _: Request<ReadyRequest>) -> Result<Response<ReadyResponse>, Status> {
        self.answer(ReadyResponse {})
    }

    async fn explain(&self, _: Request<ExplainRequest>) -> Result<Response<ExplainResponse>, Status> {
        Err(Status::unimplemented("a plugin does not ask"))
    }

    async fn status(&self, _: Request<StatusRequest>) -> Result<Response<StatusResponse>, Status> {
        Ok(Response::new(StatusResponse::default()))
    }
}

/// A node on a socket of its own, in a thread that ends with the test.
struct World {
    directory: TempDir,
    arrived: Arc<Mutex<Arrived>>,
}

impl World {
    fn new(refuses: Option<Reason>) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let arrived = Arc::new(Mutex::new(Arrived::default()));
        let node = Node { arrived: Arc::clone(&arrived), refuses };
        let listener = StdUnixListener::bind(directory.path().join("node.sock")).unwrap();
        listener.set_nonblocking(true).unwrap();
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async move {
                let listener = UnixListener::from_std(listener).unwrap();
                while let Ok((stream, _)) = listener.accept().await {
                    let node = node.clone();
                    tokio::spawn(async move {
                        take_descriptor(&stream, &node.arrived).await;
                        let server =
                            tonic::transport::Server::builder().add_service(ContainersServer::new(node));
                        drop(server.serve_with_incoming(once(Ok::<_, std::io::Error>(stream))).await);
                    });
                }
            });
        });
        File::create(directory.path().join("namespace")).unwrap();
        Self { directory, arrived }
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("node.sock")
    }

    fn namespace(&self) -> PathBuf {
        self.directory.path().join("namespace")
    }

    fn conf(&self, version: &str) -> Value {
        json!({
            "cniVersion": version, "name": "weft", "type": "weft-cni", "socket": self.socket(),
            "metadata": {"app_id": "app", "space_id": "space", "org_id": "org", "container_workload": "app", "n": 1},
            "runtimeConfig": {"portMappings": [{"host_port": 61000, "container_port": 8080}], "netOutRules": null},
        })
    }

    fn environment(&self, command: &str) -> Vec<(&'static str, String)> {
        vec![
            ("CNI_COMMAND", command.to_owned()),
            ("CNI_CONTAINERID", "handle-1".to_owned()),
            ("CNI_NETNS", self.namespace().to_str().unwrap().to_owned()),
            ("CNI_IFNAME", "eth0".to_owned()),
            ("CNI_PATH", "/plugins".to_owned()),
        ]
    }

    fn run(&self, command: &str, conf: &Value) -> Output {
        execute(&self.environment(command), conf.to_string().as_bytes())
    }
}

/// As the daemon does: one byte 0x01 with the descriptor, where there is one.
async fn take_descriptor(stream: &UnixStream, arrived: &Mutex<Arrived>) {
    let taken = stream.async_io(Interest::READABLE, || {
        let mut byte = [0];
        let peeked = rustix::net::recv(stream, &mut byte, RecvFlags::PEEK)?.0;
        if peeked == 0 || byte[0] != 1 {
            return Ok(None);
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        recvmsg(stream, &mut [IoSliceMut::new(&mut byte)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
        let descriptor = control.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
            _ => None,
        });
        Ok(descriptor)
    });
    let taken: Option<OwnedFd> = taken.await.unwrap();
    if let Some(descriptor) = taken {
        let stat = rustix::fs::fstat(&descriptor).unwrap();
        arrived.lock().unwrap().namespaces.push((stat.st_dev, stat.st_ino));
    }
}

fn execute(environment: &[(&str, String)], stdin: &[u8]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_weft-cni"));
    command.env_clear().envs(environment.iter().map(|(key, value)| (key, value)));
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    // A plugin may end without reading.
    drop(child.stdin.take().unwrap().write_all(stdin));
    child.wait_with_output().unwrap()
}

/// Standard output is exactly one JSON document.
#[track_caller]
fn document(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|why| panic!("{why}: {}", String::from_utf8_lossy(&output.stdout)))
}

#[track_caller]
fn refused(output: &Output, code: i64, names: &str) {
    assert_eq!(output.status.code(), Some(1));
    let error = document(output);
    assert_eq!(error["code"], code, "{error}");
    assert!(error["msg"].as_str().unwrap().contains(names), "{names} is not named: {error}");
    assert!(error["cniVersion"].is_string() && error["details"].is_string(), "{error}");
}

const VERSIONS: [&str; 7] = ["0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];

#[test]
fn add_gives_the_result_in_the_version_asked_for() {
    let world = World::new(None);
    let sandbox = world.namespace();
    for version in VERSIONS {
        let output = world.run("ADD", &world.conf(version));
        assert!(output.status.success(), "{output:?}");
        let mut host = json!({"name": "s-010255030002", "mac": "aa:aa:0a:ff:1e:02"});
        let mut inner = json!({"name": "eth0", "mac": "ee:ee:0a:ff:1e:02", "sandbox": sandbox});
        let mut ip = json!({"interface": 1, "address": "10.255.30.2/32", "gateway": "169.254.0.1"});
        if version == "1.1.0" {
            host["mtu"] = 1450.into();
            inner["mtu"] = 1450.into();
        }
        if version.starts_with("0.") {
            ip["version"] = "4".into();
        }
        let routes = json!([{"dst": "0.0.0.0/0", "gw": "169.254.0.1"}]);
        let expected = match version {
            "0.1.0" | "0.2.0" => json!({
                "cniVersion": version, "dns": {},
                "ip4": {"ip": "10.255.30.2/32", "gateway": "169.254.0.1", "routes": routes},
            }),
            _ => json!({
                "cniVersion": version, "interfaces": [host, inner], "ips": [ip], "routes": routes, "dns": {},
            }),
        };
        assert_eq!(document(&output), expected, "{version}");
    }
    let arrived = world.arrived.lock().unwrap();
    let owner = arrived.adds[0].owner.clone().unwrap();
    let add = &arrived.adds[0];
    assert_eq!(
        (add.handle.as_str(), add.interface.as_str(), add.network.as_str()),
        ("handle-1", "eth0", "weft")
    );
    assert_eq!(
        (owner.app_id.as_str(), owner.space_id.as_str(), owner.org_id.as_str()),
        ("app", "space", "org")
    );
    let passed = std::fs::metadata(world.namespace()).unwrap();
    assert_eq!(
        arrived.namespaces,
        vec![(passed.dev(), passed.ino()); VERSIONS.len()],
        "the descriptor is the file that was named"
    );
}

/// What silk's configuration had, and what Garden passes, arrives at the node in types; the rules as they came.
#[test]
fn what_a_container_may_do_reaches_the_node() {
    let world = World::new(None);
    let mut conf = world.conf("1.0.0");
    conf["runtimeConfig"] = json!({
        "portMappings": [{"host_port": 61000, "container_port": 8080}, {"hostPort": 61001, "containerPort": 2222, "protocol": "tcp"}],
        "netOutRules": [{"protocol": 1, "networks": [{"start": "10.0.0.1", "end": "10.0.0.9"}], "ports": [{"start": 443}]}],
    });
    let fields = json!({
        "dns_servers": ["169.254.0.53", "2001:db8::53"],
        "host_tcp_services": ["169.254.0.3:9001"], "host_udp_services": ["169.254.0.3:9002"],
        "deny_networks": {"always": ["10.1.2.3/24"], "running": ["10.2.0.0/16"], "staging": ["0.0.0.0/0"]},
        "outbound_connections": {"limit": true, "logging": true, "burst": 5, "rate_per_sec": 2, "max": 500},
        "no_masquerade_cidr_range": "10.255.0.0/16",
        "iptables_asg_logging": true, "iptables_denied_logs_per_sec": 3, "iptables_accepted_udp_logs_per_sec": 4,
        "deny_cloud_metadata": false,
    });
    conf.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    let output = world.run("ADD", &conf);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(document(&output)["dns"], json!({"nameservers": ["169.254.0.53", "2001:db8::53"]}));
    assert!(world.run("ADD", &world.conf("1.0.0")).status.success());

    let arrived = world.arrived.lock().unwrap();
    let network = |address: [u8; 4], prefix| Network { address: u32::from_be_bytes(address), prefix };
    let service = |transport: Transport, port| HostService {
        transport: transport.into(),
        address: u32::from_be_bytes([169, 254, 0, 3]),
        port,
    };
    let expected = AddRequest {
        handle: "handle-1".into(),
        interface: "eth0".into(),
        mtu: 0,
        owner: arrived.adds[1].owner.clone(),
        ports: vec![
            PortMapping { host: 61_000, container: 8080 },
            PortMapping { host: 61_001, container: 2222 },
        ],
        settings: Some(Settings {
            dns_servers: vec![u32::from_be_bytes([169, 254, 0, 53])],
            host_services: vec![service(Transport::Tcp, 9001), service(Transport::Udp, 9002)],
            deny_networks: Some(DenyNetworks {
                always: vec![network([10, 1, 2, 0], 24)],
                running: vec![network([10, 2, 0, 0], 16)],
                staging: vec![network([0, 0, 0, 0], 0)],
            }),
            outbound_connections: Some(OutboundConnections {
                rate: Some(ConnectionRate { burst: 5, per_sec: 2, dry_run: false, log: true }),
                max: 500,
            }),
            no_masquerade: Some(network([10, 255, 0, 0], 16)),
            log_all: true,
            denied_logs_per_sec: 3,
            accepted_udp_logs_per_sec: 4,
            deny_cloud_metadata: false,
        }),
        net_out_rules: conf["runtimeConfig"]["netOutRules"].to_string().into(),
        network: "weft".into(),
        receives: None,
        sends: None,
        namespace: arrived.adds[1].namespace.clone(),
    };
    assert_eq!(arrived.adds[0], expected);
    // And without any of it.
    let plain = AddRequest {
        ports: vec![PortMapping { host: 61_000, container: 8080 }],
        settings: Some(Settings {
            deny_networks: Some(DenyNetworks::default()),
            outbound_connections: Some(OutboundConnections::default()),
            denied_logs_per_sec: 1,
            accepted_udp_logs_per_sec: 100,
            deny_cloud_metadata: true,
            ..Settings::default()
        }),
        net_out_rules: Vec::new(),
        ..expected
    };
    assert_eq!(arrived.adds[1], plain);
}

/// They are sent to a node that does not know them.
#[test]
fn long_rules_are_named_by_their_digest_first() {
    let world = World::new(None);
    let mut conf = world.conf("1.0.0");
    let rule = json!({"protocol": 1, "networks": [{"start": "10.0.0.1", "end": "10.0.0.9"}], "ports": [{"start": 443}]});
    conf["runtimeConfig"]["netOutRules"] = vec![rule; 300].into();
    let rules = conf["runtimeConfig"]["netOutRules"].to_string().into_bytes();
    // An older node does not know the call.
    for (n, unknown) in [(1, Code::NotFound), (2, Code::Unimplemented)] {
        world.arrived.lock().unwrap().unknown = Some(unknown);
        assert!(world.run("ADD", &conf).status.success());
        let arrived = world.arrived.lock().unwrap();
        assert_eq!((arrived.known.len(), arrived.adds.len()), (n, n));
        let last = &arrived.adds[n - 1];
        let asked = AddKnownRequest {
            add: Some(AddRequest { net_out_rules: Vec::new(), ..last.clone() }),
            net_out_rules: Digest::of_bytes(&rules).to_bytes().into(),
        };
        assert_eq!((&arrived.known[n - 1], &last.net_out_rules), (&asked, &rules));
    }
    world.arrived.lock().unwrap().unknown = None;
    assert!(world.run("ADD", &conf).status.success());
    let arrived = world.arrived.lock().unwrap();
    assert_eq!((arrived.known.len(), arrived.adds.len()), (3, 2));
}

#[test]
fn delete_and_check_say_nothing_when_all_is_well() {
    let world = World::new(None);
    for command in ["CHECK", "DEL"] {
        let mut conf = world.conf("1.0.0");
        conf["prevResult"] = json!({"cniVersion": "1.0.0", "ips": [{"address": "10.255.30.2/32"}]});
        let output = world.run(command, &conf);
        assert!(output.status.success() && output.stdout.is_empty(), "{command}: {output:?}");
    }
    // DEL as Garden calls it once the container has died: without its namespace.
    let mut environment = world.environment("DEL");
    environment[2].1 = "/nonexistent".into();
    assert!(execute(&environment, world.conf("1.0.0").to_string().as_bytes()).status.success());
    environment.remove(2);
    assert!(execute(&environment, world.conf("1.0.0").to_string().as_bytes()).status.success());
    // What only an ADD or a CHECK needs, and what is wrong in it, keeps no container from being deleted.
    let mut wrong = world.conf("1.0.0");
    (wrong["dns_servers"], wrong["prevResult"]) = (json!(["banana"]), json!("banana"));
    assert!(execute(&environment, wrong.to_string().as_bytes()).status.success());
    let arrived = world.arrived.lock().unwrap();
    assert_eq!((arrived.deletes.len(), arrived.checks[0].address), (4, 0x0aff_1e02));
    assert_eq!(arrived.namespaces.len(), 2, "nothing is passed where there is nothing");
}

#[test]
fn version_lists_what_is_supported() {
    let output = execute(&[("CNI_COMMAND", "VERSION".into())], br#"{"cniVersion":"1.0.0"}"#);
    assert!(output.status.success());
    assert_eq!(document(&output), json!({"cniVersion": "1.0.0", "supportedVersions": VERSIONS}));
    let unknown = execute(&[("CNI_COMMAND", "VERSION".into())], br#"{"cniVersion":"7.0.0"}"#);
    assert_eq!(document(&unknown)["cniVersion"], "7.0.0", "as it was given");
}

#[test]
fn executed_by_hand_it_introduces_itself() {
    let output = execute(&[], b"");
    assert!(output.status.success() && output.stdout.is_empty());
    assert!(String::from_utf8_lossy(&output.stderr).contains("0.1.0, 0.2.0, 0.3.0, 0.3.1, 0.4.0, 1.0.0"));
    for (flag, says) in [("--help", "CNI_COMMAND"), ("--version", env!("CARGO_PKG_VERSION"))] {
        let output = Command::new(env!("CARGO_BIN_EXE_weft-cni")).arg(flag).env_clear().output().unwrap();
        assert!(output.status.success() && String::from_utf8_lossy(&output.stdout).contains(says));
    }
}

#[test]
fn wrong_input_is_refused_by_name_and_never_reaches_the_node() {
    let world = World::new(None);
    let conf = world.conf("1.0.0");
    let with = |field: &str, value: Value| {
        let mut conf = conf.clone();
        conf[field] = value;
        conf
    };
    let environment = |name: &str, value: Option<&str>| {
        let mut environment = world.environment("ADD");
        environment.retain(|(key, _)| *key != name || value.is_some());
        for (key, given) in &mut environment {
            if *key == name {
                *given = value.unwrap_or_default().to_owned();
            }
        }
        environment
    };
    let text = conf.to_string();
    for (name, value) in [
        ("CNI_CONTAINERID", "-x"),
        ("CNI_CONTAINERID", "a b"),
        ("CNI_IFNAME", "a/b"),
        ("CNI_IFNAME", "sixteen-letters-"),
    ] {
        refused(&execute(&environment(name, Some(value)), text.as_bytes()), 4, name);
    }
    for name in ["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"] {
        refused(&execute(&environment(name, None), text.as_bytes()), 4, name);
    }
    let nothing = execute(&[("CNI_COMMAND", "ADD".into())], text.as_bytes());
    refused(&nothing, 4, "[CNI_CONTAINERID,CNI_NETNS,CNI_IFNAME] missing");
    for command in ["add", "gc", "X"] {
        refused(&world.run(command, &conf), 4, &format!("unknown CNI_COMMAND: {command}"));
    }
    for broken in ["", "{", "{\"cniVersion\": \"1.0.0\",}", "[]", "7"] {
        refused(&execute(&world.environment("ADD"), broken.as_bytes()), 6, "JSON");
    }
    for version in ["2.0.0", "1.0", "0.3.2"] {
        refused(&world.run("ADD", &with("cniVersion", version.into())), 1, &VERSIONS.join(", "));
    }
    refused(&world.run("ADD", &with("name", "".into())), 7, "name");
    refused(&world.run("ADD", &with("name", "a/b".into())), 7, "name");
    refused(&world.run("ADD", &with("mtu", "big".into())), 7, "mtu");
    refused(&world.run("ADD", &with("cniVersion", 1.into())), 7, "cniVersion");
    refused(&world.run("ADD", &with("metadata", "x".into())), 7, "metadata");
    for (field, value, names) in [
        ("dns_servers", json!(["banana"]), "field dns_servers: invalid DNS server \"banana\""),
        ("host_tcp_services", json!(["169.254.0.3"]), "field host_tcp_services: `169.254.0.3`"),
        ("host_udp_services", json!(["169.254.0.3:x"]), "field host_udp_services: `169.254.0.3:x`"),
        ("deny_networks", json!({"always": ["1.2.3.4"]}), "field deny_networks.always: `1.2.3.4`"),
        ("deny_networks", json!({"running": ["x"]}), "field deny_networks.running: `x`"),
        ("deny_networks", json!({"staging": ["::/0"]}), "field deny_networks.staging: `::/0`"),
        ("outbound_connections", json!({"burst": 0}), "field outbound_connections.burst: `0`"),
        ("outbound_connections", json!({"rate_per_sec": 0}), "field outbound_connections.rate_per_sec: `0`"),
        ("outbound_connections", json!({"max": "x"}), "field outbound_connections.max: `\"x\"`"),
        ("no_masquerade_cidr_range", json!("10.0.0.0"), "field no_masquerade_cidr_range: `10.0.0.0`"),
        ("iptables_asg_logging", json!("x"), "field iptables_asg_logging: `\"x\"`"),
        ("iptables_denied_logs_per_sec", json!(0), "field iptables_denied_logs_per_sec: `0`"),
        ("iptables_accepted_udp_logs_per_sec", json!(0), "field iptables_accepted_udp_logs_per_sec: `0`"),
        ("deny_cloud_metadata", json!(1), "field deny_cloud_metadata: `1`"),
        ("runtimeConfig", json!({"netOutRules": {}}), "field runtimeConfig.netOutRules: "),
        (
            "runtimeConfig",
            json!({"portMappings": [{"host_port": 0, "container_port": 1}]}),
            "field runtimeConfig.portMappings[0].host_port: `0`",
        ),
        (
            "runtimeConfig",
            json!({"portMappings": [{"host_port": 7, "container_port": 1}, {"host_port": 7, "container_port": 2}]}),
            "host_port: 7 is mapped twice",
        ),
    ] {
        refused(&world.run("ADD", &with(field, value)), 7, names);
    }
    let udp = json!({"portMappings": [{"host_port": 7, "container_port": 1, "protocol": "udp"}]});
    refused(&world.run("ADD", &with("runtimeConfig", udp)), 2, "portMappings[0].protocol with value \"udp\"");
    refused(&execute(&environment("CNI_NETNS", Some("/nonexistent")), text.as_bytes()), 3, "/nonexistent");
    let arrived = world.arrived.lock().unwrap();
    assert_eq!((arrived.adds.len(), arrived.checks.len(), arrived.deletes.len()), (0, 0, 0));
}

#[test]
fn what_the_node_refuses_keeps_its_code_and_its_words() {
    for (reason, code, names) in [
        (Reason::AlreadyAdded { handle: "handle-1".into() }, 100, "handle-1"),
        (
            Reason::HostPortTaken { port: 61_000, holder: "handle-0".into() },
            101,
            "61000 of the cell is taken by container handle-0",
        ),
        (Reason::InterfaceTaken { interface: "eth0".into() }, 102, "eth0"),
        (Reason::SubnetFull { subnet: "10.255.30.0/24".into() }, 103, "10.255.30.0/24"),
        (Reason::LeaseConflict { holder: "another".into() }, 105, "another"),
        (Reason::NoLeaseYet { why: "the pool is empty".into() }, 11, "the pool is empty"),
        (Reason::NamespaceIsCells { path: "the descriptor".into() }, 8, "/namespace"),
        (Reason::Damaged { handle: "h".into(), what: "no route".into() }, 106, "no route"),
    ] {
        let world = World::new(Some(reason));
        for command in ["ADD", "CHECK", "DEL"] {
            refused(&world.run(command, &world.conf("1.0.0")), code, names);
        }
    }
}

/// A promise of the contract: a runtime hears within a second that it has to try again later.
#[test]
fn a_node_that_is_away_is_code_11_within_a_second() {
    let directory = tempfile::tempdir().unwrap();
    let world = World::new(None);
    // Nobody there, nobody listening, and somebody who talks nonsense.
    let dead = directory.path().join("dead.sock");
    drop(StdUnixListener::bind(&dead).unwrap());
    let nonsense = directory.path().join("nonsense.sock");
    let talker = StdUnixListener::bind(&nonsense).unwrap();
    std::thread::spawn(move || {
        for stream in talker.incoming() {
            drop(stream.unwrap().write_all(b"HTTP/1.0 404 what\r\n\r\n"));
        }
    });
    for socket in [Path::new("/nonexistent/node.sock"), &dead, &nonsense] {
        for command in ["ADD", "DEL", "CHECK"] {
            let mut conf = world.conf("1.0.0");
            conf["socket"] = socket.to_str().unwrap().into();
            let began = Instant::now();
            let output = world.run(command, &conf);
            assert!(
                began.elapsed() < Duration::from_secs(1),
                "{command} at {}: {:?}",
                socket.display(),
                began.elapsed()
            );
            refused(&output, 11, "");
        }
    }
}

/// One that is there but does not run is given up as well, if later: it might be busy.
#[test]
fn a_node_that_is_stuck_is_code_11() {
    let world = World::new(None);
    let silent = world.directory.path().join("silent.sock");
    let _listener = StdUnixListener::bind(&silent).unwrap();
    let mut conf = world.conf("1.0.0");
    conf["socket"] = silent.to_str().unwrap().into();
    refused(&world.run("ADD", &conf), 11, "silent.sock");
}
