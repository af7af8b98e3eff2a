//! The log as a whole, on records that are made up; tests/kernel/nflog.rs has the kernel's.

use super::*;

use std::fs::{self, File};
use std::io::Read as _;
use std::net::Ipv4Addr;
use std::path::Path;
use std::time::Duration;

use futures::stream;
use nix::sys::stat::Mode;
use serde_json::{Value, json};
use weft_model::container::{Container, Owner};
use weft_model::traffic::Packet;

use crate::directory::{self, Entered, tests::container};

const CONTAINER: Ipv4Addr = Ipv4Addr::new(10, 255, 30, 2);

fn settings(file: &Path) -> Settings {
    let host = Host { addr: "10.0.16.14".parse().expect("address"), guid: "cell".into() };
    Settings { file: file.to_owned(), timestamps: Timestamps::Rfc3339, host }
}

fn record() -> Record {
    let mut bytes = vec![0x45, 0, 0, 60, 0, 0, 0, 0, 64, 6, 0, 0, 10, 255, 30, 2, 8, 8, 8, 8];
    bytes.extend([0x80, 0, 0, 80]);
    Record {
        decision: Decision::Denied,
        at: SystemTime::UNIX_EPOCH,
        incoming: None,
        outgoing: Some(2),
        mark: 0,
        packet: Packet::parse(&bytes).expect("a packet"),
    }
}

fn records(count: usize) -> impl Stream<Item = Event> {
    stream::iter((0..count).map(|_| Event::Decided(record())))
}

fn directory() -> Directory {
    directory::tests::directory(container(CONTAINER, Owner::default()))
}

fn started(file: &Path) -> FlowLog {
    FlowLog::start(settings(file), directory()).expect("started")
}

/// Waits until it is so; a test that waits in vain fails.
fn wait_for(what: impl Fn() -> bool) {
    for _ in 0..2000 {
        if what() {
            return;
        }
        thread::sleep(Duration::from_millis(5));
    }
    panic!("waited in vain");
}

fn parsed(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
}

#[tokio::test]
async fn a_record_becomes_a_line_with_identity_and_rule() {
    let place = tempfile::tempdir().expect("directory");
    let file = place.path().join("traffic.log");
    let log = started(&file);
    let counters = log.counters();
    log.run(records(1)).await;
    wait_for(|| counters.written.get() == 1);
    let line = &parsed(&fs::read_to_string(&file).expect("read"))[0];
    assert_eq!(line["message"], "cfnetworking.iptables.egress-denied");
    assert_eq!(line["data"]["source"]["container_id"], "handle-1");
    assert_eq!(line["data"]["source"]["host_guid"], "cell");
    assert_eq!(line["data"]["rule"], "no security group");
}

/// The container may be gone when the line is written.
#[tokio::test]
async fn who_it_was_is_what_was_known_when_it_happened() {
    let place = tempfile::tempdir().expect("directory");
    let file = place.path().join("traffic.log");
    nix::unistd::mkfifo(&file, Mode::S_IRUSR | Mode::S_IWUSR).expect("a pipe");
    let names = directory();
    let log = FlowLog::start(settings(&file), names.clone()).expect("started");
    log.run(records(1)).await;
    let handle = "handle-2".parse().expect("handle");
    let other = Container { handle, ..container(CONTAINER, Owner::default()) };
    names.enter(Entered { container: Arc::new(other), profile: None });
    let mut text = String::new();
    File::open(&file).expect("open").read_to_string(&mut text).expect("read");
    assert_eq!(parsed(&text)[0]["data"]["source"]["container_id"], "handle-1");
}

/// The pipe takes nothing until somebody opens its other end: the records are taken all the same, and what does not
/// fit the queue is counted, and told when lines are written again.
#[tokio::test]
async fn a_slow_file_holds_nobody_up() {
    let place = tempfile::tempdir().expect("directory");
    let file = place.path().join("traffic.log");
    nix::unistd::mkfifo(&file, Mode::S_IRUSR | Mode::S_IWUSR).expect("a pipe");
    let log = started(&file);
    let counters = log.counters();
    let count = QUEUE + BATCH + 1000;
    let tally = log.tally();
    log.run(records(count)).await;
    let dropped = counters.dropped_queue.get();
    assert!((1000..=1000 + 128).contains(&dropped), "{dropped}");
    drop(tally);
    let mut text = String::new();
    File::open(&file).expect("open").read_to_string(&mut text).expect("read");
    let lines = parsed(&text);
    let (lost, lines): (Vec<_>, Vec<_>) =
        lines.iter().partition(|line| line["message"] == "cfnetworking.iptables.lost");
    assert_eq!(lines.len() as u64, count as u64 - dropped);
    let told: u64 = lost.iter().map(|line| line["data"]["lost"]["queue"].as_u64().expect("number")).sum();
    assert_eq!(told, dropped);
    assert_eq!(counters.written.get(), lines.len() as u64);
}

#[tokio::test]
async fn lines_for_a_full_disk_are_counted() {
    let log = started(Path::new("/dev/full"));
    let counters = log.counters();
    log.run(records(500)).await;
    wait_for(|| counters.dropped_file.get() == 500);
    assert_eq!(counters.written.get(), 0);
}

/// A thread that is not there: entry by entry, as the thread does it.
fn scribe(file: &Path) -> Scribe {
    let settings = settings(file);
    Scribe {
        writer: Writer { host: settings.host, timestamps: settings.timestamps },
        file: LogFile::new(settings.file),
        shared: Arc::default(),
        told: Lost::default(),
    }
}

#[test]
fn what_was_lost_is_told_when_the_file_works_again() {
    let place = tempfile::tempdir().expect("directory");
    let file = place.path().join("traffic.log");
    let mut scribe = scribe(&file);
    let entry = || Told::Decided(record()).named(&directory());
    let now = Instant::now();
    // A directory is in the file's place.
    fs::create_dir(&file).expect("made");
    scribe.write(&[entry(), entry()], now);
    scribe.write(&[entry()], now);
    scribe.shared.counters.lost_kernel.inc_by(7);
    fs::remove_dir(&file).expect("removed");
    scribe.write(&[entry()], now);
    scribe.write(&[entry()], now);
    let lines = parsed(&fs::read_to_string(&file).expect("read"));
    let kinds: Vec<_> =
        lines.iter().map(|line| line["message"].as_str().expect("text").rsplit('.').next()).collect();
    assert_eq!(kinds, [Some("lost"), Some("egress-denied"), Some("egress-denied")]);
    assert_eq!(lines[0]["data"], json!({"lost": {"kernel": 7, "queue": 0, "file": 3}}));
}

#[tokio::test]
async fn lines_and_reports_add_up_to_the_kernels_total() {
    let place = tempfile::tempdir().expect("directory");
    let file = place.path().join("traffic.log");
    let log = started(&file);
    let (counters, tally) = (log.counters(), log.tally());
    let decided = (CONTAINER, Decision::Denied);
    let read = |total| tally.read(&Totals::from([(decided, total)]), SystemTime::UNIX_EPOCH);
    read(1000);
    log.run(records(3)).await;
    wait_for(|| counters.written.get() == 3);
    read(1042);
    read(1042);
    wait_for(|| counters.written.get() == 4);
    read(1042);
    let lines = parsed(&fs::read_to_string(&file).expect("read"));
    assert_eq!(lines.len(), 4);
    let last = &lines[3];
    assert_eq!(last["message"], "cfnetworking.iptables.egress-suppressed");
    assert_eq!(last["data"]["source"]["container_id"], "handle-1");
    assert_eq!(last["data"]["suppressed"]["count"], 39);
}

/// The count is part of a later report, and not among the lost lines.
#[test]
fn a_report_that_is_not_written_is_not_lost() {
    let place = tempfile::tempdir().expect("directory");
    let file = place.path().join("traffic.log");
    let mut scribe = scribe(&file);
    let (queue, mut waiting) = mpsc::channel(QUEUE);
    let tally = Tally { queue, directory: directory(), shared: Arc::clone(&scribe.shared) };
    let mut read = |total| {
        tally.read(&Totals::from([((CONTAINER, Decision::Limited), total)]), SystemTime::UNIX_EPOCH);
        std::iter::from_fn(|| waiting.try_recv().ok()).collect::<Vec<_>>()
    };
    fs::create_dir(&file).expect("made");
    assert!(read(0).is_empty() && read(5).is_empty());
    scribe.write(&read(6), Instant::now());
    fs::remove_dir(&file).expect("removed");
    scribe.write(&read(6), Instant::now());
    let lines = parsed(&fs::read_to_string(&file).expect("read"));
    assert_eq!(lines.len(), 1);
    assert_eq!(lines[0]["data"]["suppressed"]["count"], 6);
}

#[test]
fn the_numbers_have_names() {
    let (counters, mut registry) = (Counters::default(), prometheus_client::registry::Registry::default());
    counters.register(&mut registry);
    counters.written.inc_by(3);
    counters.clone().dropped_queue.inc();
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &registry).expect("text");
    assert!(text.contains("weft_node_traffic_log_written_total 3\n"), "{text}");
    assert!(text.contains("weft_node_traffic_log_dropped_queue_total 1\n"), "{text}");
}
