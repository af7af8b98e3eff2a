//! A lab leaves nothing behind, however it ends, and is never made twice under one name.
#![expect(clippy::unwrap_used, reason = "a panic is how a test fails, in its helpers too")]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use weft_testbed::netns::Id;
use weft_testbed::{Lab, Options, Store, lab, process};

const PATIENCE: Duration = Duration::from_secs(60);

fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lab"));
    command.args(args).env("WEFT_BIN_DIR", lab::programs().unwrap());
    command
}

fn run(args: &[&str]) -> Output {
    command(args).output().unwrap()
}

fn unique(purpose: &str) -> String {
    format!("{purpose}-{}", std::process::id())
}

fn directory(name: &str) -> PathBuf {
    Path::new("/run/weft-lab").join(name)
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Devices of the machine's own network namespace.
fn devices() -> String {
    text(&Command::new("ip").args(["-brief", "link"]).output().unwrap().stdout)
}

fn namespaces(lab: &Lab) -> Vec<Id> {
    let places = lab.cells.iter().map(|cell| &cell.place).chain(lab.controllers.iter().map(|one| &one.place));
    places.chain([&lab.underlay]).flat_map(|place| place.ids()).collect()
}

/// A lab that stands by itself, taken down also when the test fails.
struct Standing(String);

impl Drop for Standing {
    fn drop(&mut self) {
        run(&["down", "--name", &self.0]);
    }
}

/// No mount, no file, no process whose command line names the lab.
fn assert_nothing_left(name: &str) {
    let path = directory(name);
    let path = path.to_str().unwrap();
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(&format!("{path} ")), "mounts are left:\n{mounts}");
    assert!(!Path::new(path).exists(), "{path} is left");
    assert!(!Path::new(&format!("{path}.lock")).exists(), "{path}.lock is left");
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let line = text(&std::fs::read(entry.path().join("cmdline")).unwrap_or_default());
        assert!(!line.contains(&format!("{path}/")), "process {:?} is left: {line}", entry.file_name());
    }
}

/// Starts `lab up` and waits until a file of the lab is there; the lab is then half made.
fn up_until(name: &str, file: &str) -> Child {
    let mut child =
        command(&["up", "--name", name]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let deadline = Instant::now() + PATIENCE;
    while !directory(name).join(file).exists() {
        assert!(child.try_wait().unwrap().is_none(), "lab up ended before {file} was there");
        assert!(Instant::now() < deadline, "{file} does not come");
        thread::sleep(Duration::from_micros(200));
    }
    child
}

fn signal(child: &Child, signal: Signal) {
    kill(Pid::from_raw(child.id().cast_signed()), signal).unwrap();
}

#[test]
fn up_and_down_leave_nothing() {
    let before = devices();
    let options = Options::unique("updown").unwrap();
    let lab = Lab::up(&options).unwrap();
    let inside = namespaces(&lab);
    assert_eq!(inside.len(), 6, "two cells of two namespaces, a controller, the underlay");
    assert_eq!(devices(), before, "the machine's own network is not touched");
    assert_eq!(lab.complaints(&[]), Vec::<String>::new());
    let nodes: Vec<_> = lab.cells.iter().map(|cell| cell.node.process().unwrap()).collect();
    lab.down().unwrap();
    assert!(nodes.iter().all(|node| !node.alive()));
    assert_nothing_left(&options.name);
    assert_eq!(devices(), before);
    // Nobody keeps the namespaces alive.
    assert_eq!(process::inside(&inside), []);
}

#[test]
fn a_lab_that_is_dropped_is_gone() {
    let options = Options::unique("dropped").unwrap();
    drop(Lab::up(&options).unwrap());
    assert_nothing_left(&options.name);
}

#[test]
fn several_controllers_on_one_postgres() {
    let mut options = Options::unique("postgres").unwrap();
    (options.store, options.controllers) = (Store::Postgres, 2);
    let lab = Lab::up(&options).unwrap();
    let tables: Vec<_> = lab.controllers.iter().map(|controller| controller.lease_table().unwrap()).collect();
    assert_eq!(tables[0], tables[1]);
    assert_eq!(lab.complaints(&[]), Vec::<String>::new());
    lab.down().unwrap();
    assert_nothing_left(&options.name);
}

#[test]
fn a_lab_stands_until_it_is_taken_down() {
    let name = unique("stands");
    let _standing = Standing(name.clone());
    let up = run(&["up", "--name", &name]);
    assert!(up.status.success(), "{}", text(&up.stderr));
    let document: lab::Document = serde_json::from_slice(&up.stdout).unwrap();
    for cell in &document.cells {
        for path in [&cell.network_namespace, &cell.mount_namespace, &cell.socket, &cell.conflist, &cell.logs]
        {
            assert!(path.exists(), "{} is not there", path.display());
        }
        assert!(cell.plugin_dir.join("weft-cni").exists());
    }

    let second = run(&["up", "--name", &name]);
    assert!(!second.status.success());
    assert!(text(&second.stderr).contains("is up already"), "{}", text(&second.stderr));
    assert!(second.stdout.is_empty(), "nothing but the document is written to standard output");

    // Another name is another lab, with the same addresses.
    let other = Lab::up(&Options::unique("beside").unwrap()).unwrap();
    assert_eq!(other.cells[0].underlay, document.cells[0].underlay);

    let inside = run(&["exec", "--name", &name, "cell1", "--", "ip", "-brief", "addr", "show", "eth0"]);
    assert!(text(&inside.stdout).contains(&document.cells[0].underlay.to_string()), "{inside:?}");
    assert_eq!(run(&["exec", "--name", &name, "cell1", "--", "sh", "-c", "exit 7"]).status.code(), Some(7));

    let add = run(&["add", "--name", &name, "cell1", "one"]);
    assert!(add.status.success(), "{}", text(&add.stderr));
    let again = run(&["add", "--name", &name, "cell1", "one"]);
    assert!(!again.status.success() && text(&again.stderr).contains("already"), "{again:?}");
    // And the first one lives.
    let container =
        run(&["exec", "--name", &name, "cell1/one", "--", "ip", "-brief", "addr", "show", "eth0"]);
    assert!(text(&container.stdout).contains("10.255."), "{container:?}");
    assert!(run(&["del", "--name", &name, "cell1", "one"]).status.success());

    assert!(run(&["down", "--name", &name]).status.success());
    assert_nothing_left(&name);
    assert!(run(&["down", "--name", &name]).status.success(), "down again is no error");
    assert!(other.cells[0].status().is_ok(), "the other lab is untouched");
}

#[test]
fn a_lab_that_is_held_is_not_made_twice() {
    let options = Options::unique("held").unwrap();
    let lab = Lab::up(&options).unwrap();
    let refused = Lab::up(&options).unwrap_err().to_string();
    assert!(refused.contains("another process is making, using or removing"), "{refused}");
    Lab::remove(&options.name).unwrap_err();
    assert!(lab.cells[0].status().is_ok());
}

#[test]
fn an_interrupted_up_removes_what_it_made() {
    let stages = [
        "namespaces/underlay.net",
        "lab.json",
        "controller1/weft-controller.pid",
        "cell2/logs/weft-node.pid",
    ];
    for file in stages {
        for how in [Signal::SIGINT, Signal::SIGTERM] {
            let name = unique("interrupted");
            let child = up_until(&name, file);
            signal(&child, how);
            let output = child.wait_with_output().unwrap();
            // It may have been ready just before; then it stands, and that is said.
            if output.status.success() {
                assert!(!output.stdout.is_empty());
                assert!(run(&["down", "--name", &name]).status.success());
            } else {
                assert!(text(&output.stderr).contains("interrupted"), "{}", text(&output.stderr));
            }
            assert_nothing_left(&name);
        }
    }
}

#[test]
fn what_a_crash_left_is_cleaned_up() {
    let name = unique("crashed");
    for file in ["namespaces/underlay.net", "lab.json", "cell1/logs/weft-node.pid"] {
        let mut child = up_until(&name, file);
        child.kill().unwrap();
        child.wait().unwrap();
        // By the next `up` of that name …
        let lab = Lab::up(&Options { name: name.clone(), ..Options::unique("crashed").unwrap() }).unwrap();
        lab.down().unwrap();
        assert_nothing_left(&name);
        // … and by `down`.
        let mut child = up_until(&name, file);
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(run(&["down", "--name", &name]).status.success());
        assert_nothing_left(&name);
    }
}

#[test]
fn a_node_that_does_not_start_is_explained() {
    let mut options = Options::unique("explained").unwrap();
    options.node.insert("no_such_property".to_owned(), true.into());
    let error = format!("{:#}", Lab::up(&options).unwrap_err());
    assert!(error.contains("weft-node of cell1 has ended"), "{error}");
    assert!(error.contains("no_such_property"), "the log's last lines tell why: {error}");
    assert_nothing_left(&options.name);
}
