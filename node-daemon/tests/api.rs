//! Who is admitted to the daemon's socket, and what a connection may bring along.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails, in its helpers too")]

use std::fs::{self, File, Permissions};
use std::io::{ErrorKind, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use nix::sched::{CloneFlags, unshare};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use tempfile::TempDir;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};
use weft_model::address::{DeviceName, OverlayAddr};
use weft_model::asg::garden;
use weft_model::cell::Wanted;
use weft_model::container::Handle;
use weft_model::firewall::explain::Explanation;
use weft_model::link::LinkSpec;
use weft_model::profile::{Digest, Settings, Workload};
use weft_model::reason::Reason;
use weft_node::api::{ApiError, Socket};
use weft_node::calls::{Calls, Remembered, Valid};
use weft_node::inbox::Question;
use weft_proto::convert::settings_to;
use weft_proto::node::containers_client::ContainersClient;
use weft_proto::node::{
    AddKnownRequest, AddRequest, DeleteRequest, Owner, PortMapping, StatusRequest, StatusResponse,
};
use weft_proto::status::reason_of;

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Counts what gets through, and keeps what was wanted.
#[derive(Debug, Clone, Default)]
struct Counted(Arc<AtomicUsize>, Arc<Mutex<Vec<Wanted>>>);

impl Calls for Counted {
    async fn add(&self, wanted: Wanted, _: OwnedFd) -> Result<LinkSpec, Reason> {
        self.0.fetch_add(1, Ordering::Relaxed);
        let addr = OverlayAddr::new([10, 255, 1, 2].into());
        self.1.lock().unwrap().push(wanted.clone());
        Ok(LinkSpec { addr, handle: wanted.handle, interface: wanted.interface, mtu: 1450 })
    }

    async fn check(&self, _: Remembered, _: OwnedFd) -> Result<(), Reason> {
        self.0.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    async fn collect(&self, _: Valid) -> Result<(), Reason> {
        self.0.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    async fn ready(&self) -> Result<(), Reason> {
        Err(Reason::Starting)
    }

    async fn delete(&self, _: Handle, _: DeviceName) -> Result<(), Reason> {
        self.0.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    async fn explain(&self, question: Question) -> Result<Explanation, Reason> {
        self.0.fetch_add(1, Ordering::Relaxed);
        Err(Reason::UnknownContainer { handle: format!("{:?}", question.from) })
    }

    async fn status(&self) -> StatusResponse {
        StatusResponse { version: "test".into(), ..StatusResponse::default() }
    }
}

struct World {
    directory: TempDir,
    calls: Counted,
}

impl World {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let world = Self { directory, calls: Counted::default() };
        let socket = Socket::bind(&world.path()).unwrap();
        tokio::spawn(socket.serve(world.calls.clone(), std::future::pending()));
        world
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("run/node.sock")
    }

    fn calls(&self) -> usize {
        self.calls.0.load(Ordering::Relaxed)
    }

    /// A connection that has sent so many bytes of what a client of HTTP/2 begins with.
    fn begun(&self, bytes: usize) -> StdUnixStream {
        let mut stream = StdUnixStream::connect(self.path()).unwrap();
        stream.write_all(&PREFACE[..bytes]).unwrap();
        stream
    }

    /// A client whose connection brings these descriptors with its first byte.
    async fn client(&self, descriptors: Vec<OwnedFd>) -> ContainersClient<Channel> {
        let (path, descriptors) = (self.path(), Arc::new(Mutex::new(descriptors)));
        let connector = tower::service_fn(move |_| {
            let (path, descriptors) = (path.clone(), Arc::clone(&descriptors));
            async move {
                let stream = UnixStream::connect(path).await?;
                let descriptors = std::mem::take(&mut *descriptors.lock().unwrap());
                if !descriptors.is_empty() {
                    send(&stream, &descriptors);
                }
                Ok::<_, std::io::Error>(TokioIo::new(stream))
            }
        });
        let channel = Endpoint::from_static("http://node").connect_with_connector(connector).await.unwrap();
        ContainersClient::new(channel)
    }

    async fn add(&self, descriptors: Vec<OwnedFd>) -> Result<(), Status> {
        self.client(descriptors).await.add(request()).await.map(drop)
    }

    /// What a request comes to.
    async fn wanted(&self, request: AddRequest) -> Result<Wanted, Reason> {
        let added = self.client(vec![another_namespace()]).await.add(request).await;
        added.map_err(|status| reason_of(&status).unwrap())?;
        Ok(self.calls.1.lock().unwrap().pop().unwrap())
    }
}

fn request() -> AddRequest {
    AddRequest { handle: "h".into(), interface: "eth0".into(), ..AddRequest::default() }
}

fn send(stream: impl AsFd, descriptors: &[OwnedFd]) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let descriptors: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
    assert!(control.push(SendAncillaryMessage::ScmRights(&descriptors)));
    sendmsg(stream, &[IoSlice::new(&[1])], &mut control, SendFlags::NOSIGNAL).unwrap();
}

fn another_namespace() -> OwnedFd {
    let made = std::thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).expect("unshare a network namespace: run the tests as root");
        File::open("/proc/thread-self/ns/net").unwrap().into()
    });
    made.join().unwrap()
}

fn file(path: &str) -> OwnedFd {
    File::open(path).unwrap().into()
}

#[tokio::test]
async fn the_namespace_is_a_containers_or_nothing_happens() {
    let world = World::new();
    let reason = |answer: Result<(), Status>| reason_of(&answer.unwrap_err()).unwrap();
    for (descriptor, expected) in [
        (file("/etc/passwd"), "NamespaceWrongKind"),
        (file("/proc/self/ns/mnt"), "NamespaceWrongKind"),
        (file("/proc/self/ns/net"), "NamespaceIsCells"),
    ] {
        let refused = reason(world.add(vec![descriptor]).await);
        assert!(format!("{refused:?}").starts_with(expected), "{refused:?}");
    }
    let missing = reason(world.add(Vec::new()).await);
    assert!(matches!(&missing, Reason::InvalidField { field, .. } if field == "namespace"), "{missing:?}");
    // DEL does nothing in the namespace, but whoever passes the cell's own has lost its way.
    let delete = DeleteRequest { handle: "h".into(), interface: "eth0".into() };
    let own = world.client(vec![file("/proc/self/ns/net")]).await.delete(delete.clone()).await.map(drop);
    assert!(matches!(reason(own), Reason::NamespaceIsCells { .. }));
    assert_eq!(world.calls(), 0, "nothing got through");

    world.add(vec![another_namespace()]).await.unwrap();
    world.client(Vec::new()).await.delete(delete).await.unwrap();
    assert_eq!(world.calls(), 2);
}

/// What the platform passes becomes what the cell works with, or is refused; what was passed before is not worked out
/// again.
#[tokio::test]
async fn what_a_container_may_do_is_decoded_and_shared() {
    let world = World::new();
    let rules = br#"[{"networks":[{"start":"1.1.1.1","end":"1.1.1.9"}],"log":true},{"protocol":1}]"#;
    let owner = |workload: &str| Some(Owner { container_workload: workload.into(), ..Owner::default() });
    let passed = AddRequest {
        owner: owner("task"),
        ports: vec![PortMapping { host: 61_000, container: 8080 }],
        net_out_rules: rules.to_vec(),
        ..request()
    };
    let first = world.wanted(passed.clone()).await.unwrap();
    let profile = first.profile.profile();
    assert_eq!((profile.workload, &profile.settings), (Workload::Running, &Settings::default()));
    let rules: Vec<String> = profile.rules.iter().map(ToString::to_string).collect();
    assert_eq!(rules, ["1.1.1.1-1.1.1.9 all log"], "the other is skipped");
    let ports: Vec<_> =
        first.ports.iter().map(|mapping| (mapping.host.get(), mapping.container.get())).collect();
    assert_eq!(ports, [(61_000, 8080)]);

    let second = world.wanted(AddRequest { handle: "h2".into(), ..passed.clone() }).await.unwrap();
    assert!(Arc::ptr_eq(&first.profile, &second.profile));
    for (workload, expected) in [
        ("app", Workload::Running),
        ("staging", Workload::Staging),
        ("", Workload::Other),
        ("x", Workload::Other),
    ] {
        let other = world.wanted(AddRequest { owner: owner(workload), ..passed.clone() }).await.unwrap();
        assert_eq!(other.profile.profile().workload, expected, "{workload}");
    }

    // As long as may be; and what is not a list.
    let mut longest = vec![b' '; garden::MAX_BYTES];
    longest[..2].copy_from_slice(b"[]");
    world.wanted(AddRequest { net_out_rules: longest, ..passed.clone() }).await.unwrap();
    let wrong = world.wanted(AddRequest { net_out_rules: b"{}".to_vec(), ..passed }).await.unwrap_err();
    assert!(matches!(&wrong, Reason::InvalidField { field, .. } if field == garden::FIELD), "{wrong:?}");
}

/// What is known need not be sent again; and asking for what is not costs the connection nothing.
#[tokio::test]
async fn known_rules_are_found_by_their_digest() {
    let world = World::new();
    let rules = br#"[{"networks":[{"start":"1.1.1.1"}]}]"#;
    let known = |settings: Settings| {
        let add = AddRequest { settings: Some(settings_to(&settings)), ..request() };
        AddKnownRequest { add: Some(add), net_out_rules: Digest::of_bytes(rules).to_bytes().into() }
    };
    let unknown = |status: Status| assert_eq!((status.code(), reason_of(&status)), (Code::NotFound, None));
    let mut client = world.client(vec![another_namespace()]).await;
    unknown(client.add_known(known(Settings::default())).await.unwrap_err());
    assert_eq!(world.calls(), 0);
    client.add(AddRequest { net_out_rules: rules.to_vec(), ..request() }).await.unwrap();
    let first = world.calls.1.lock().unwrap().pop().unwrap();

    let mut client = world.client(vec![another_namespace()]).await;
    let logging = Settings { log_all: true, ..Settings::default() };
    unknown(client.add_known(known(logging)).await.unwrap_err());
    client.add_known(known(Settings::default())).await.unwrap();
    let second = world.calls.1.lock().unwrap().pop().unwrap();
    assert!(Arc::ptr_eq(&first.profile, &second.profile));

    let both = AddRequest { net_out_rules: rules.to_vec(), ..request() };
    for (asked, named) in [
        (known(Settings::default()), "namespace"),
        (AddKnownRequest { net_out_rules: vec![7; 15], ..known(Settings::default()) }, "net_out_rules"),
        (AddKnownRequest { add: None, ..known(Settings::default()) }, "handle"),
        (AddKnownRequest { add: Some(both), ..known(Settings::default()) }, "net_out_rules"),
    ] {
        let wrong = world.client(Vec::new()).await.add_known(asked).await.unwrap_err();
        let wrong = reason_of(&wrong).unwrap();
        assert!(matches!(&wrong, Reason::InvalidField { field, .. } if field.contains(named)), "{wrong:?}");
    }
}

#[tokio::test]
async fn more_than_one_descriptor_or_another_first_byte_ends_the_connection() {
    let world = World::new();
    world.add(vec![another_namespace(), another_namespace()]).await.unwrap_err();
    for byte in [0u8, 2, b'G', 0xff] {
        let mut stream = StdUnixStream::connect(world.path()).unwrap();
        stream.write_all(&[byte]).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let ended = tokio::task::spawn_blocking(move || stream.read(&mut [0]).map_or(0, |n| n));
        assert_eq!(ended.await.unwrap(), 0, "{byte}");
    }
    assert_eq!(world.calls(), 0);
}

/// Those that connect and say nothing, or break off, are let go, and hold nobody up meanwhile.
#[tokio::test]
async fn the_silent_delay_nobody() {
    let world = World::new();
    let silent: Vec<_> = (0..=PREFACE.len()).chain([0; 30]).map(|n| world.begun(n)).collect();
    let answer = world.client(Vec::new()).await.status(StatusRequest {}).await.unwrap();
    assert_eq!(answer.into_inner().version, "test");
    for mut stream in silent {
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        // A server of HTTP/2 greets who has said the whole preface.
        let ended = tokio::task::spawn_blocking(move || stream.read_to_end(&mut Vec::new())).await.unwrap();
        // What was not read of it makes its end a reset.
        assert!(
            ended.as_ref().map_or_else(|end| end.kind() == ErrorKind::ConnectionReset, |_| true),
            "{ended:?}"
        );
    }
}

/// Those that have sent a part, and then closed their side or both.
#[tokio::test]
async fn who_breaks_off_is_let_go_at_once() {
    let world = World::new();
    for n in 1..PREFACE.len() {
        let mut stream = world.begun(n);
        stream.shutdown(Shutdown::Write).unwrap();
        // That it ends early, and is not held until its time is over, is for the one who waits behind it.
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        let ended = tokio::task::spawn_blocking(move || stream.read(&mut [0])).await.unwrap();
        assert!(
            ended.as_ref().map_or_else(|end| end.kind() == ErrorKind::ConnectionReset, |n| *n == 0),
            "{ended:?}"
        );
        drop(world.begun(n));
        let answer = world.client(Vec::new()).await.status(StatusRequest {}).await.unwrap();
        assert_eq!(answer.into_inner().version, "test");
    }
}

/// All places are taken by clients that have stopped in the middle: they become free, and a call that waits is answered.
#[tokio::test]
async fn a_flood_of_clients_that_stop_ends_and_a_call_behind_it_is_answered() {
    let world = World::new();
    let stopped: Vec<_> = (0..600).map(|_| world.begun(8)).collect();
    let answer = world.client(Vec::new()).await.status(StatusRequest {}).await.unwrap();
    assert_eq!(answer.into_inner().version, "test");
    drop(stopped);
}

#[tokio::test]
async fn the_socket_is_ours_alone() {
    let world = World::new();
    let mode = |path: PathBuf| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(world.path()), mode(world.directory.path().join("run"))), (0o600, 0o700));
    assert!(matches!(Socket::bind(&world.path()), Err(ApiError::InUse(_))));

    let open = world.directory.path().join("open");
    fs::create_dir(&open).unwrap();
    fs::set_permissions(&open, Permissions::from_mode(0o755)).unwrap();
    let error = Socket::bind(&open.join("node.sock")).unwrap_err().to_string();
    assert!(error.contains("755") && error.contains("open"), "{error}");

    let own = world.directory.path().join("own");
    fs::create_dir(&own).unwrap();
    fs::set_permissions(&own, Permissions::from_mode(0o700)).unwrap();
    fs::write(own.join("node.sock"), "precious").unwrap();
    assert!(matches!(Socket::bind(&own.join("node.sock")), Err(ApiError::NotASocket(_))));
    assert_eq!(fs::read_to_string(own.join("node.sock")).unwrap(), "precious");

    // What a daemon that was killed has left makes way.
    let stale = own.join("stale.sock");
    drop(std::os::unix::net::UnixListener::bind(&stale).unwrap());
    Socket::bind(&stale).unwrap();
}
