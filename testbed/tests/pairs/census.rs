//! All that a cell has, kind by kind, in words that two moments can be compared by: what changes by itself (handles,
//! counters, numbers of descriptors) is left out.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;
use weft_testbed::lab::Cell;
use weft_testbed::prober::wait_for;

use crate::PATIENCE;

/// What a container leaves no trace in while it is there.
const OF_THE_PROCESS: [&str; 2] = ["descriptors", "threads"];
/// Parts of the firewall that come with containers, by the names of their sets: of mapped ports, security groups, limits,
/// and policies.
const PARTS: [&str; 4] = ["ports", "asg-", "connections-", "senders-"];

/// Sorted lines of each kind.
#[derive(Debug)]
pub(crate) struct Census(BTreeMap<&'static str, Vec<String>>);

/// A `/tmp` that nobody else uses; the programs stay where they are, should they be there.
pub(crate) fn own_tmp(cell: &Cell, programs: &Path) {
    let script = r#"mkdir "$1" && mount --bind "$2" "$1" && mount -t tmpfs tmpfs /tmp && mkdir -p "$2" &&
        mount --bind "$1" "$2""#;
    let aside = cell.directory.join("programs");
    let paths = [aside.to_str().unwrap(), programs.to_str().unwrap()];
    cell.place.run("sh", &["-ec", script, "sh", paths[0], paths[1]], "").unwrap();
}

impl Census {
    /// Once the policy server has been heard.
    pub(crate) fn of_an_empty(cell: &Cell) -> Self {
        let heard = |file: &str| cell.directory.join("state").join(file).exists();
        wait_for("the first answers", || heard("policies.json") && heard("security-groups.json"));
        Self::of(cell)
    }

    fn of(cell: &Cell) -> Self {
        let lines = |program: &str, args: &[&str]| -> Vec<String> {
            let text = cell.place.run(program, args, "").unwrap();
            text.lines().map(|line| line.trim().to_owned()).collect()
        };
        let status = cell.status().unwrap();
        let process = cell.node.process().unwrap().pid;
        let entries = |what: &str| {
            let entries = fs::read_dir(format!("/proc/{process}/{what}")).unwrap();
            entries.filter_map(|entry| Some(entry.ok()?.path()))
        };
        let kinds: [(&'static str, Vec<String>); 15] = [
            ("links", lines("ip", &["-o", "link"]).iter().map(|line| word(line, 1)).collect()),
            ("queues", lines("tc", &["qdisc", "show"])),
            ("addresses", lines("ip", &["-o", "-4", "addr"]).iter().map(|line| word(line, 3)).collect()),
            ("routes", lines("ip", &["-4", "route", "show", "table", "all"])),
            ("neighbours", lines("ip", &["neigh", "show", "nud", "permanent"])),
            ("forwarding entries", lines("bridge", &["fdb", "show"])),
            ("namespaces", lines("ip", &["netns", "list-id"])),
            ("mounts", cell.place.enter(mounts).unwrap()),
            ("firewall", firewall(&lines("nft", &["-j", "list", "table", "inet", "weft"]).concat())),
            ("connections", connections(&lines("conntrack", &["-L"]))),
            ("containers", vec![status["containers"].to_string()]),
            ("free addresses", vec![status["free_addresses"].to_string()]),
            ("files", cell.place.enter(|| files(&cell.directory)).unwrap()),
            ("descriptors", entries("fd").map(|path| kind_of(&path)).collect()),
            ("threads", entries("task").map(|_| "thread".to_owned()).collect()),
        ];
        let sorted = kinds.into_iter().map(|(kind, mut lines)| {
            lines.sort_unstable();
            (kind, lines)
        });
        Self(sorted.collect())
    }

    /// What there is more of than `before`, and less. A process may have less: threads that a start needs end, and a
    /// descriptor is opened when it is first needed.
    fn since(&self, before: &Self) -> BTreeMap<&'static str, Vec<String>> {
        let differing = self.0.iter().filter_map(|(kind, now)| {
            let then = &before.0[kind];
            let mut said = surplus(now, then, "more");
            if !OF_THE_PROCESS.contains(kind) {
                said.extend(surplus(then, now, "less"));
            }
            (!said.is_empty()).then_some((*kind, said))
        });
        differing.collect()
    }

    /// Waits until all is as it was: namespaces end by and by, and addresses rest.
    pub(crate) fn wait_for_return(&self, cell: &Cell) {
        wait(cell, "is not as it was", |now| {
            let differing = now.since(self);
            (!differing.is_empty()).then_some(differing)
        });
    }

    /// Waits until containers are seen in every kind of thing that is counted: the control of the other one.
    pub(crate) fn wait_for_containers(&self, cell: &Cell) {
        wait(cell, "does not show its containers", |now| {
            let differing = now.since(self);
            let kinds =
                self.0.keys().filter(|kind| !OF_THE_PROCESS.contains(kind) && !differing.contains_key(*kind));
            let element = |part: &str| format!("element of \"{part}");
            let parts = PARTS
                .iter()
                .filter(|part| !now.0["firewall"].iter().any(|line| line.starts_with(&element(part))));
            let missing: Vec<&str> = kinds.chain(parts).copied().collect();
            (!missing.is_empty()).then_some(missing)
        });
    }
}

/// Counts until nothing is amiss.
fn wait<T: Debug>(cell: &Cell, what: &str, amiss: impl Fn(&Census) -> Option<T>) {
    let deadline = Instant::now() + PATIENCE;
    while let Some(amiss) = amiss(&Census::of(cell)) {
        assert!(Instant::now() < deadline, "{} {what}: {amiss:#?}", cell.name);
        thread::sleep(Duration::from_millis(200));
    }
}

/// What `here` has more often than `there`.
fn surplus(here: &[String], there: &[String], mark: &str) -> Vec<String> {
    let mut rest = there.to_vec();
    let mut found = Vec::new();
    for line in here {
        match rest.iter().position(|other| other == line) {
            Some(index) => drop(rest.swap_remove(index)),
            None => found.push(format!("{mark}: {line}")),
        }
    }
    found
}

fn word(line: &str, index: usize) -> String {
    line.split_whitespace().nth(index).unwrap_or_default().to_owned()
}

/// Mount points of the calling thread's namespace.
fn mounts() -> Vec<String> {
    let text = fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
    text.lines().map(|line| word(line, 4)).collect()
}

/// Connections of the overlay's addresses, by the packets that began them.
fn connections(listed: &[String]) -> Vec<String> {
    let ours = listed.iter().filter(|line| line.contains("=10.255."));
    ours.map(|line| {
        let ends = line
            .split_whitespace()
            .filter(|word| ["src=", "dst=", "sport=", "dport="].iter().any(|name| word.starts_with(name)));
        ends.collect::<Vec<_>>().join(" ")
    })
    .collect()
}

/// Below the cell's directory, and in `/tmp`.
fn files(directory: &Path) -> Vec<String> {
    let mut found = Vec::new();
    let mut left = vec![directory.to_owned(), "/tmp".into()];
    while let Some(directory) = left.pop() {
        for entry in fs::read_dir(&directory).unwrap() {
            let path = entry.unwrap().path();
            found.push(path.display().to_string());
            // Nothing of ours is below the programs.
            if path.symlink_metadata().is_ok_and(|meta| meta.is_dir()) && !path.ends_with("programs") {
                left.push(path);
            }
        }
    }
    found
}

/// What a descriptor leads to: all sockets are alike.
fn kind_of(descriptor: &Path) -> String {
    let target = fs::read_link(descriptor).unwrap_or_default().display().to_string();
    target.split(":[").next().unwrap_or_default().to_owned()
}

/// Chains with their rules in order, sets with their elements.
fn firewall(listed: &str) -> Vec<String> {
    let mut listed: Value = serde_json::from_str(listed).unwrap();
    let mut places: BTreeMap<String, usize> = BTreeMap::new();
    let mut lines = Vec::new();
    for object in listed["nftables"].as_array_mut().unwrap() {
        without_what_changes(object);
        if let Some(chain) = object["rule"]["chain"].as_str() {
            let place = places.entry(chain.to_owned()).or_default();
            *place += 1;
            lines.push(format!("rule {place}: {object}"));
            continue;
        }
        let kind = ["set", "map"].into_iter().find(|kind| object.get(kind).is_some());
        let elements = kind.and_then(|kind| object[kind].as_object_mut()?.remove("elem"));
        let name = kind.map(|kind| object[kind]["name"].clone()).unwrap_or_default();
        for element in elements.iter().filter_map(Value::as_array).flatten() {
            lines.push(format!("element of {name}: {element}"));
        }
        lines.push(object.to_string());
    }
    lines
}

fn without_what_changes(value: &mut Value) {
    match value {
        Value::Object(map) => {
            map.retain(|key, _| !matches!(key.as_str(), "handle" | "packets" | "bytes" | "expires"));
            map.values_mut().for_each(without_what_changes);
        }
        Value::Array(list) => list.iter_mut().for_each(without_what_changes),
        _ => {}
    }
}
