//! A CNI runtime that was not written here: the distribution's containerd, `ctr run --cni`, brings containers of its own
//! into a cell's network.
//!
//! It gets root, state and socket of its own, and namespaces of mounts and process ids in which the places that its
//! client knows by heart (/etc/cni, /opt/cni, /var/lib/cni, /run/containerd) are private; its network is the cell's.
//! What it starts ends with it.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails, in its helpers too")]

use std::fs;
use std::net::Ipv4Addr;
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;
use weft_testbed::external_networker::{Container, Request};
use weft_testbed::lab::Cell;
use weft_testbed::netns::Place;
use weft_testbed::process::Daemon;
use weft_testbed::{Lab, Options, prober};

const PATIENCE: Duration = Duration::from_secs(60);

/// Makes the mounts, then becomes containerd. $1: the conflist's directory, $2: the plugin, $3: containerd's directory.
const START: &str = r#"
mount -t tmpfs weft-test /mnt
mkdir -p /mnt/etc/cni /mnt/opt/cni /mnt/lib/cni /mnt/run/weft-lab
cp -r "$1" /mnt/etc/cni/net.d
mkdir /mnt/opt/cni/bin
ln -s "$2" /mnt/opt/cni/bin/weft-cni
mount --rbind /run/weft-lab /mnt/run/weft-lab
for place in etc opt run; do mount --rbind "/mnt/$place" "/$place"; done
mount --rbind /mnt/lib /var/lib
exec containerd --config "$3/config.toml"
"#;

struct Containerd<'a> {
    /// Of containerd: containers and control groups are named after it.
    namespace: String,
    cell: &'a Cell,
    /// The cell's network with the machine's mounts, which have control groups.
    place: Place,
    directory: PathBuf,
    daemon: Daemon,
}

impl<'a> Containerd<'a> {
    fn start(lab: &Lab, cell: &'a Cell) -> Self {
        let directory = cell.directory.join("containerd");
        for name in ["root", "state", "rootfs/bin", "rootfs/proc", "rootfs/sys", "rootfs/dev"] {
            fs::create_dir_all(directory.join(name)).unwrap();
        }
        let busybox = directory.join("rootfs/bin/busybox");
        fs::copy("/bin/busybox", &busybox).expect("busybox-static is installed by scripts/test");
        symlink("busybox", directory.join("rootfs/bin/sh")).unwrap();
        // As little of it as it takes to run a container from a directory.
        let config = format!(
            "version = 2\nroot = {root:?}\nstate = {state:?}\n\
             disabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n[grpc]\naddress = {socket:?}\n",
            root = directory.join("root"),
            state = directory.join("state"),
            socket = directory.join("containerd.sock"),
        );
        fs::write(directory.join("config.toml"), config).unwrap();
        let network = lab.directory.join("namespaces").join(format!("{}.net", cell.name));
        let place = Place::at(network, None);
        let daemon = Daemon::named(&directory, "containerd");
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation=private", "--pid", "--mount-proc", "--fork", "--kill-child"]);
        command.args(["--", "sh", "-euc", START, "containerd"]);
        command
            .arg(cell.conflist().parent().unwrap())
            .arg(cell.plugin_dir().join("weft-cni"))
            .arg(&directory);
        daemon.start(&place, command, None).unwrap();
        let namespace = format!("weft-{}", std::process::id());
        let containerd = Self { namespace, cell, place, directory, daemon };
        let deadline = Instant::now() + PATIENCE;
        while containerd.ctr(&["version"]).is_err() {
            assert!(
                Instant::now() < deadline,
                "containerd does not answer; its log ends:\n{}",
                containerd.daemon.tail()
            );
            thread::sleep(Duration::from_millis(50));
        }
        containerd
    }

    /// Its client, where it runs itself.
    fn ctr(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let unshare = self.daemon.process().expect("containerd runs").pid;
        let children = fs::read_to_string(format!("/proc/{unshare}/task/{unshare}/children"))?;
        let target = format!("--target={}", children.trim());
        let socket = self.directory.join("containerd.sock");
        let before = [target.as_str(), "--mount", "--pid", "--", "timeout", "60", "ctr", "--namespace"];
        let address = [self.namespace.as_str(), "--address", socket.to_str().unwrap()];
        self.place.run("nsenter", &[before.as_slice(), &address, arguments].concat(), "")
    }

    /// Runs a shell's command in a new container, to its end or in the background.
    fn run(&self, id: &str, how: &str, command: &str) -> String {
        let root = self.directory.join("rootfs");
        let arguments =
            ["run", how, "--cni", "--rootfs", root.to_str().unwrap(), id, "/bin/sh", "-c", command];
        self.ctr(&arguments)
            .unwrap_or_else(|why| panic!("{why:#}\ncontainerd's log ends:\n{}", self.daemon.tail()))
    }

    /// Handle and address of each container that the node knows.
    fn known(&self) -> Vec<(String, Ipv4Addr)> {
        let status = self.cell.status().unwrap();
        let list = status["containers"].as_array().unwrap().iter();
        let text = |value: &serde_json::Value| value.as_str().unwrap().to_owned();
        list.map(|one| (text(&one["handle"]), text(&one["address"]).parse().unwrap())).collect()
    }
}

/// The namespace's control group, in each hierarchy that there is, is what containerd leaves.
impl Drop for Containerd<'_> {
    fn drop(&mut self) {
        let hierarchies =
            fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten().map(|entry| entry.path());
        for hierarchy in hierarchies.chain(["/sys/fs/cgroup".into()]) {
            drop(fs::remove_dir(hierarchy.join(&self.namespace)));
        }
    }
}

fn links(cell: &Cell) -> usize {
    cell.place.run("ip", &["-o", "link"], "").unwrap().lines().filter(|line| line.contains(": s-")).count()
}

/// A container of the other cell, for theirs to talk to.
fn neighbour(cell: &Cell) -> Container {
    let container = cell.add(&Request::app("neighbour")).unwrap();
    cell.serve(&container).unwrap();
    container
}

#[test]
fn the_distributions_containerd_adds_and_removes_containers() {
    let lab = Lab::up(&Options::unique("containerd").unwrap()).unwrap();
    let [one, two] = lab.cells.as_slice() else { panic!("two cells") };
    let neighbour = neighbour(two);
    let tuning = json!({"type": "tuning", "sysctl": {"net.core.somaxconn": "500"}});
    one.configure_list("1.0.0", "weft", &[one.plugin().into(), tuning]).unwrap();
    let containerd = Containerd::start(&lab, one);

    // To its end: added, seen from within, reaching another cell, deleted by the runtime.
    let told = containerd.run(
        "short",
        "--rm",
        &format!(
            "busybox ip -4 -o addr show eth0 && busybox ip route && busybox ping -c 1 -w 5 {}",
            neighbour.addr
        ),
    );
    assert!(told.contains("10.255.") && told.contains("default via 169.254.0.1 dev eth0"), "{told}");
    assert!(told.contains("1 packets received"), "{told}");
    assert_eq!((containerd.known(), links(one)), (Vec::new(), 0));

    // In the background: reached from the other cell.
    containerd.run("long", "--detach", "busybox sleep 1000");
    let known = containerd.known();
    let [(handle, addr)] = known.as_slice() else { panic!("{known:?}") };
    assert_eq!(*handle, format!("{}-long", containerd.namespace));
    prober::ping(&neighbour.place, *addr).unwrap();
    // Killed, and no DEL comes: ctr makes none for what runs in the background.
    containerd.ctr(&["tasks", "delete", "--force", "long"]).unwrap();
    containerd.ctr(&["containers", "delete", "long"]).unwrap();
    let deadline = Instant::now() + PATIENCE;
    while (containerd.known(), links(one)) != (Vec::new(), 0) {
        assert!(Instant::now() < deadline, "{:?} is left", containerd.known());
        thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(lab.complaints(&[]), Vec::<String>::new());
}
