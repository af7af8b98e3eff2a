//! The client of the policy server, and the task that follows it, against a server on loopback.
#![expect(clippy::unwrap_used, reason = "a failed step of a test is its failure")]

mod policy_server {
    pub(crate) mod world;
}

use std::collections::BTreeSet;
use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use policy_server::world::{Reply, World, certificates, ok};
use prometheus_client::registry::Registry;
use rustls::SupportedProtocolVersion;
use serde_json::{Value, json};
use tokio::sync::{mpsc, oneshot, watch};
use weft_daemon::cause::chain;
use weft_daemon::tls::Files;
use weft_model::follow::{Ids, Intervals, Stamp, Subject};
use weft_model::policy::AppGuid;
use weft_node::metrics::Metrics;
use weft_node::policy_server::{self as follower, Applied, Client, Config, Forced, Known, Server, run};
use weft_testbed::policy_server::PolicyServer;

const POLICIES: &str = "/networking/v1/internal/policies?id=";
const GROUPS: &str = "/networking/v1/internal/security_groups?limit=5000&from=";

fn apps(names: &[&str]) -> BTreeSet<AppGuid> {
    names.iter().map(|name| name.parse().unwrap()).collect()
}

fn spaces(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(ToString::to_string).collect()
}

fn list(policies: &[Value]) -> Reply {
    ok(json!({ "total_policies": policies.len(), "policies": policies }))
}

fn policy(from: &str, tag: &str, to: &str) -> Value {
    let ports = json!({ "start": 8080, "end": 8080 });
    json!({
        "source": { "id": from, "tag": tag },
        "destination": { "id": to, "tag": "00FF", "protocol": "tcp", "ports": ports },
    })
}

fn page(next: u64, guids: &[&str]) -> Reply {
    let group = |guid: &&str| json!({ "guid": guid, "name": guid, "rules": "[]", "running_default": true });
    ok(json!({ "next": next, "security_groups": guids.iter().map(group).collect::<Vec<_>>() }))
}

/// The real server speaks TLS 1.2 with one suite, and has an RSA key.
#[tokio::test]
async fn either_version_of_tls_will_do() {
    let server = PolicyServer::scratch().unwrap();
    static OLD: &[&SupportedProtocolVersion] = &[&rustls::version::TLS12];
    static NEW: &[&SupportedProtocolVersion] = &[&rustls::version::TLS13];
    for versions in [OLD, NEW] {
        server.speak(versions);
        server.start().unwrap();
        let client = &server.files.client;
        let certificates = Files {
            ca: server.files.ca.clone(),
            certificate: client.certificate.clone(),
            key: client.key.clone(),
        };
        let url = server.url().parse().unwrap();
        let client = Client::new(Server { url, certificates, answers_within: Duration::from_secs(60) });
        assert!(client.policies_last_updated().await.unwrap().0 > 0);
    }
}

#[tokio::test]
async fn answers_are_json_whatever_they_say_they_are() {
    let world = World::start(|path| match path {
        "/networking/v1/internal/policies_last_updated" => ok("1795454564696425000"),
        "/networking/v1/internal/security_groups_last_updated" => ok("-7\n"),
        _ => list(&[policy("a", "0001", "b")]),
    })
    .await;
    let client = world.client();
    assert_eq!(client.policies_last_updated().await.unwrap(), Stamp(1_795_454_564_696_425_000));
    assert_eq!(client.security_groups_last_updated().await.unwrap(), Some(Stamp(-7)));
    let got = client.policies(&apps(&["a", "b,c"])).await.unwrap();
    assert_eq!((got.answer.policies.len(), got.parts), (1, 1));
    assert_eq!(world.asked()[2], format!("{POLICIES}a,b%2Cc"));
    assert_eq!(world.connections(), 1, "it is kept");
    assert_eq!(client.policies(&apps(&[])).await.unwrap().parts, 0);
    assert_eq!(world.asked(), [""; 0], "no ids would be all policies");
}

#[tokio::test]
async fn the_routers_are_asked_for_by_name_and_nobody_elses_tag_is_taken() {
    let answers = |id: &str, tag: &str| ok(json!({ "id": id, "tag": tag, "type": "router" }));
    let world = World::start(move |_| answers("INGRESS_ROUTER", "00FF")).await;
    let client = world.client();
    assert_eq!(client.router_tag().await.unwrap().get(), 255);
    let asked = r#"PUT /networking/v1/internal/tags {"id":"INGRESS_ROUTER","type":"router"}"#;
    assert_eq!(world.asked(), [asked]);
    for (id, tag) in [("other", "0001"), ("INGRESS_ROUTER", "0000"), ("INGRESS_ROUTER", "10000")] {
        world.answer(move |_| answers(id, tag));
        let error = chain(&client.router_tag().await.unwrap_err());
        assert!(error.contains("has no tag of theirs") && error.contains(tag), "{error}");
    }
    world.answer(|_| Reply::Text(500, r#"{"error": "database create failed"}"#.into()));
    let error = chain(&client.router_tag().await.unwrap_err());
    assert!(error.contains("database create failed"), "{error}");
}

#[tokio::test]
async fn many_ids_are_asked_about_in_parts_and_all_must_be_answered() {
    let names: Vec<String> = (0..500).map(|n| format!("{n:036}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let apps = apps(&names);
    let world = World::start(|path| {
        // A policy whose source and destination are in different parts is in both.
        let first = path.strip_prefix(POLICIES).unwrap().split(',').next().unwrap();
        list(&[
            policy(first, &format!("{:04X}", first.parse::<u16>().unwrap() + 1), "x"),
            policy("y", "FFFF", "x"),
        ])
    })
    .await;
    let client = world.client();
    let got = client.policies(&apps).await.unwrap();
    let asked = world.asked();
    assert_eq!((got.parts, asked.len(), got.answer.policies.len()), (3, 3, 4));
    assert!(asked.iter().all(|path| path.len() <= 8 << 10));
    let listed: Vec<&str> = asked.iter().flat_map(|path| path[POLICIES.len()..].split(',')).collect();
    assert_eq!(listed, names);

    let mut left = 2;
    world.answer(move |_| {
        left -= 1;
        if left >= 0 { list(&[]) } else { Reply::Text(500, r#"{"error": "database read failed"}"#.into()) }
    });
    let error = chain(&client.policies(&apps).await.unwrap_err());
    assert!(error.contains("500") && error.contains("database read failed"), "{error}");
    assert!(error.contains("policies from https://localhost:") && !error.contains("?id="), "{error}");
}

#[tokio::test]
async fn pages_are_followed_to_the_end_and_not_in_circles() {
    let world = World::start(|path| match path.strip_prefix(GROUPS).unwrap() {
        "0&space_guids=r,s" => page(7, &["a", "b"]),
        "7&space_guids=r,s" => page(9, &["b", "c"]),
        "9&space_guids=r,s" => page(0, &["d"]),
        "0" => page(7, &["a"]),
        "7" => page(7, &["a"]),
        other => panic!("{other}"),
    })
    .await;
    let client = world.client();
    let got = client.security_groups(&spaces(&["r", "s"])).await.unwrap();
    let guids: Vec<_> = got.answer.groups.iter().map(|group| group.guid.as_str()).collect();
    assert_eq!((guids, got.parts), (vec!["a", "b", "c", "d"], 3));
    let error = chain(&client.security_groups(&spaces(&[])).await.unwrap_err());
    assert!(error.contains("page 7 is said to follow page 7"), "{error}");
}

#[tokio::test]
async fn each_kind_of_bad_answer_is_an_error_that_says_so() {
    let world = World::start(|_| Reply::Garbage).await;
    let client = world.client();
    for (reply, says) in [
        (Reply::Text(404, "404 page not found\n".into()), "404 Not Found: 404 page not found"),
        (Reply::Text(204, String::new()), "204"),
        (Reply::Text(200, "<html>".into()), "should be JSON"),
        (Reply::Text(200, r#"{"error": "x"}"#.into()), "should be JSON"),
        (Reply::Truncated(r#"{"total_policies":0,"policies":[]}"#.into()), "exchange HTTP"),
        (Reply::Garbage, "exchange HTTP"),
        (Reply::Text(200, "x".repeat((64 << 20) + 1)), "more than 67108864 bytes"),
    ] {
        // A connection that is kept is tried again when it fails, so twice the same.
        let mut reply = Some(reply);
        world.answer(move |_| match reply.as_ref().unwrap() {
            Reply::Text(..) => reply.take().unwrap(),
            Reply::Truncated(text) => Reply::Truncated(text.clone()),
            _ => Reply::Garbage,
        });
        let error = chain(&client.policies(&apps(&["a"])).await.unwrap_err());
        assert!(error.contains(says), "{says}: {error}");
    }
    world.answer(|_| ok("soon"));
    let error = chain(&client.policies_last_updated().await.unwrap_err());
    assert!(error.contains("`soon` is not the whole number"), "{error}");
    world.answer(|_| Reply::Text(404, "404 page not found\n".into()));
    assert_eq!(client.security_groups_last_updated().await.unwrap(), None, "an older server");
    client.policies_last_updated().await.unwrap_err();
}

#[tokio::test]
async fn a_server_that_says_nothing_is_given_up() {
    let world = World::start(|_| Reply::Silence).await;
    let client = Client::new(world.server(&world.files, Duration::from_secs(2)));
    let error = chain(&client.policies_last_updated().await.unwrap_err());
    assert!(error.contains("no answer within"), "{error}");
    // What was given up half-way is not used again.
    world.answer(|_| ok(1));
    assert_eq!(client.policies_last_updated().await.unwrap(), Stamp(1));
    assert_eq!(world.connections(), 2);
}

#[tokio::test]
async fn a_connection_that_the_server_ended_is_opened_anew() {
    let world = World::start(|_| ok(1)).await;
    let client = world.client();
    client.policies_last_updated().await.unwrap();
    let mut broken = false;
    world.answer(move |_| if std::mem::replace(&mut broken, true) { ok(2) } else { Reply::Garbage });
    assert_eq!(client.policies_last_updated().await.unwrap(), Stamp(2));
    assert_eq!(world.connections(), 2);
    // As when a certificate is replaced by one that is as good.
    let again = fs::read(&world.files.certificate).unwrap();
    fs::write(world.directory.path().join("next"), again).unwrap();
    fs::rename(world.directory.path().join("next"), &world.files.certificate).unwrap();
    client.policies_last_updated().await.unwrap();
    assert_eq!(world.connections(), 3);
}

#[tokio::test]
async fn both_sides_must_show_a_certificate_of_the_authority() {
    let world = World::start(|_| ok(1)).await;
    let elsewhere = tempfile::tempdir().unwrap();
    let foreign = certificates(elsewhere.path());
    let ask = async |files| {
        let client = Client::new(world.server(&files, Duration::from_secs(60)));
        chain(&client.policies_last_updated().await.unwrap_err())
    };
    let unknown = ask(foreign.clone()).await;
    assert!(unknown.contains("agree on TLS") && unknown.contains("UnknownIssuer"), "{unknown}");
    let mut shown = foreign;
    shown.ca.clone_from(&world.files.ca);
    let refused = ask(shown.clone()).await;
    assert!(refused.contains("alert"), "{refused}");
    fs::remove_file(&shown.key).unwrap();
    let missing = ask(shown).await;
    assert!(missing.contains("own.key"), "{missing}");
    assert_eq!(world.asked(), [""; 0]);

    // And none at all.
    let mut roots = rustls::RootCertStore::empty();
    let ca = <rustls::pki_types::CertificateDer as rustls::pki_types::pem::PemObject>::from_pem_file(
        &world.files.ca,
    );
    roots.add(ca.unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let tcp = tokio::net::TcpStream::connect(world.address).await.unwrap();
    let name = "localhost".try_into().unwrap();
    let mut tls = tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, tcp).await.unwrap();
    let refused = tokio::io::AsyncReadExt::read_u8(&mut tls).await.unwrap_err().to_string();
    assert!(refused.contains("CertificateRequired"), "{refused}");
}

/// A task that follows the server, and the ends of what it is given.
struct Following {
    ids: watch::Sender<Arc<Ids>>,
    known: watch::Receiver<Known>,
    applied: watch::Sender<Applied>,
    polls: mpsc::Sender<Forced>,
    metrics: Registry,
    task: tokio::task::JoinHandle<()>,
}

/// `router`: their tag as well.
async fn follow(world: &World, ids: Ids, router: bool) -> Following {
    follow_each(Duration::from_millis(100), world, ids, router).await
}

async fn follow_each(often: Duration, world: &World, ids: Ids, router: bool) -> Following {
    let config = Config {
        server: world.server(&world.files, Duration::from_secs(60)),
        intervals: Intervals { policies: often, groups: Some(often), router: router.then_some(often) },
        state_directory: world.directory.path().to_owned(),
    };
    let (ids, wanted) = watch::channel(Arc::new(ids));
    let (out, known) = watch::channel(follower::known(&config).await);
    let (applied, applied_receiver) = watch::channel(Applied::default());
    let (polls, forced) = mpsc::channel(4);
    let mut metrics = Registry::default();
    let counted = Arc::new(Metrics::new(&mut metrics));
    let task = tokio::spawn(run(config, wanted, out, applied_receiver, forced, counted));
    Following { ids, known, applied, polls, metrics, task }
}

/// Not a measure of speed: what never comes is to fail rather than hang.
async fn until(known: &mut watch::Receiver<Known>, is: impl FnMut(&Known) -> bool) -> Known {
    let seen = tokio::time::timeout(Duration::from_secs(60), known.wait_for(is)).await;
    seen.expect("it comes about").unwrap().clone()
}

fn ids(names: &[&str]) -> Ids {
    Ids { apps: apps(names), spaces: spaces(names) }
}

/// What is wrong with one of them is nothing to the others; and their tag outlives both sides.
#[tokio::test]
async fn the_routers_tag_is_followed_by_itself() {
    let tags = |path: &str| path.ends_with("}");
    let world = World::start(move |path| match path {
        path if path.ends_with("last_updated") => ok(1),
        path if path.starts_with(POLICIES) => list(&[policy("a", "0001", "b")]),
        path if tags(path) => Reply::Text(500, r#"{"error": "database create failed"}"#.into()),
        _ => page(0, &[]),
    })
    .await;
    let tag = |known: &Known| known.router.as_ref().map(|told| told.value.get());
    let lost = |known: &Known| known.lost.keys().copied().collect::<Vec<_>>();
    let mut following = follow(&world, ids(&["a"]), true).await;
    let known = until(&mut following.known, |known| known.policies.is_some() && !known.lost.is_empty()).await;
    assert_eq!((tag(&known), lost(&known)), (None, vec![Subject::Router]));
    world.answer(|_| ok(json!({ "id": "INGRESS_ROUTER", "tag": "0002", "type": "router" })));
    until(&mut following.known, |known| tag(known) == Some(2)).await;
    drop(following.ids);
    following.task.await.unwrap();

    world.answer(|_| Reply::Silence);
    let mut following = follow(&world, ids(&["a"]), true).await;
    let known = until(&mut following.known, |known| known.router.is_some()).await;
    assert_eq!(tag(&known), Some(2));
}

#[tokio::test]
async fn the_task_follows_the_server_and_what_it_knows_outlives_both() {
    let stamp = Arc::new(AtomicI64::new(1));
    let (world_stamp, both) = (Arc::clone(&stamp), ["policies", "security_groups"]);
    let answers = move |path: &str| {
        let stamp = world_stamp.load(Ordering::SeqCst);
        if path.ends_with("last_updated") {
            return ok(stamp);
        }
        let tag = format!("{stamp:04X}");
        if path.starts_with(POLICIES) { list(&[policy("a", &tag, "b")]) } else { page(0, &[&tag]) }
    };
    let world = World::start(answers.clone()).await;
    let mut following = follow(&world, ids(&["a"]), false).await;
    let tag = |known: &Known| {
        let told = known.policies.as_ref()?;
        Some(told.value.get(&"a".parse::<AppGuid>().ok()?)?.tag?.get())
    };
    let group = |known: &Known| Some(known.groups.as_ref()?.value.first()?.guid.clone());
    let first = |known: &Known| tag(known) == Some(1) && group(known).as_deref() == Some("0001");
    let known = until(&mut following.known, first).await;
    let number = |known: &Known| known.policies.as_ref().unwrap().number;
    assert_eq!((number(&known), known.policies.as_ref().unwrap().ids.apps.clone()), (1, apps(&["a"])));

    // Once applied, only the stamp is asked for.
    following.applied.send_replace(Applied { policies: 1, groups: 1, router: 0 });
    let fetches = |asked: Vec<String>| asked.iter().filter(|path| path.contains('?')).count();
    loop {
        world.asked();
        while world.asked.lock().unwrap().len() < 6 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        if fetches(world.asked()) == 0 {
            break;
        }
    }

    // A change is fetched, and an app that is new is known to be asked about although nothing is new for it.
    stamp.store(2, Ordering::SeqCst);
    until(&mut following.known, |known| tag(known) == Some(2)).await;
    following.ids.send_replace(Arc::new(ids(&["a", "z"])));
    let covered = |known: &Known| known.policies.as_ref().is_some_and(|told| told.ids.apps.len() == 2);
    until(&mut following.known, covered).await;

    // An outage is said, and takes nothing.
    world.answer(|_| Reply::Text(500, r#"{"error": "database read failed"}"#.into()));
    let away = until(&mut following.known, |known| known.lost.len() == 2).await;
    assert_eq!(tag(&away), Some(2));
    assert!(away.lost[&Subject::Policies].contains("database read failed"), "{:?}", away.lost);

    // Nor does a restart meanwhile; a snapshot that cannot be read is done without.
    drop(following.ids);
    following.task.await.unwrap();
    for subject in both {
        let file = format!("{}.json", subject.replace('_', "-"));
        assert!(world.directory.path().join(file).exists());
    }
    fs::write(world.directory.path().join("security-groups.json"), "{").unwrap();
    let mut following = follow(&world, ids(&["a"]), false).await;
    let away = until(&mut following.known, |known| known.lost.len() == 2).await;
    assert_eq!((tag(&away), group(&away)), (Some(2), None));

    world.answer(answers);
    until(&mut following.known, |known| known.lost.is_empty() && group(known).is_some()).await;
}

/// What is forced is fetched though nothing has changed and nobody would ask for an hour, and ends when it is applied.
#[tokio::test]
async fn a_forced_poll_ends_when_it_is_applied_or_says_why_not() {
    let world = World::start(|path| match path.ends_with("last_updated") {
        true => ok(7),
        false => list(&[policy("a", "0001", "b")]),
    })
    .await;
    let mut following = follow_each(Duration::from_secs(3600), &world, ids(&["a"]), false).await;
    until(&mut following.known, |known| known.policies.is_some()).await;
    let polls = following.polls.clone();
    let force = || {
        let (reply, done) = oneshot::channel();
        polls.try_send(Forced { subject: Subject::Policies, reply }).unwrap();
        done
    };
    let mut done = force();
    tokio::time::sleep(Duration::from_millis(300)).await;
    done.try_recv().expect_err("it is not applied yet");
    following.applied.send_replace(Applied { policies: 1, ..Applied::default() });
    assert_eq!(done.await.unwrap(), Ok(()));
    world.asked();
    assert_eq!(force().await.unwrap(), Ok(()));
    let asked = world.asked();
    assert!(asked.iter().any(|path| path.starts_with(POLICIES)), "unconditionally: {asked:?}");

    world.answer(|_| Reply::Text(500, r#"{"error": "database read failed"}"#.into()));
    let why = force().await.unwrap().unwrap_err();
    assert!(why.contains("database read failed"), "{why}");
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &following.metrics).unwrap();
    let failures = r#"weft_node_poll_failures_total{subject="policies",kind="status"} 1"#;
    assert!(text.contains(failures), "{text}");
    assert!(text.contains(r#"weft_node_poll_seconds_count{subject="policies"} 4"#), "{text}");
}
